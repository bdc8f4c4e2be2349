"""What the benchmarks run: a model of random weights, a batch, and a training step executed in four ways.

ordinary    the final sequence in one pass through transformers' own attention, as plain fine-tuning would run it
segmented   every column once, in n+1 passes; `segmented_bptt` with gradient through h
prepass     n passes without a graph, then the final sequence in one
naive       every prefix computed again for each latent step, then the final sequence, as the definition says
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from pipeline.backbones.qwen2_vl import Qwen2VL
from pipeline.data.batch import Batch
from pipeline.latent.attention import ATTENTION_NAME, KeptSegments
from pipeline.latent.forward import LatentForward, Trace
from pipeline.latent.method import LatentConfig, LatentMethod
from pipeline.latent.recompute import enable_checkpointing, has_dropout
from pipeline.latent.schedules import Wanted, choose_schedule, latent_forward
from pipeline.loss import token_nll

IMAGE, VOCAB = 5, 8000
STEPS = ("ordinary", "segmented", "segmented_bptt", "prepass", "naive")


SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "text": {"vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "mrope_section": [4, 6, 6]},
        "vision": {"depth": 1, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2},
    },
    "small": {
        "text": {"vocab_size": VOCAB, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
                 "num_attention_heads": 8, "num_key_value_heads": 4, "mrope_section": [8, 12, 12]},
        "vision": {"depth": 2, "embed_dim": 128, "num_heads": 4, "mlp_ratio": 2},
    },
    "2b": {
        "text": {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                 "num_attention_heads": 12, "num_key_value_heads": 2, "mrope_section": [16, 24, 24]},
        "vision": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4},
    },
    "7b": {
        "text": {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                 "num_attention_heads": 28, "num_key_value_heads": 4, "mrope_section": [16, 24, 24]},
        "vision": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4},
    },
}  # fmt: skip
"""tiny: to see that it runs; small: minutes on two cores; 2b and 7b: Qwen2-VL's own shapes."""


def model_config(shape: str = "small") -> Qwen2VLConfig:
    """A shape of SHAPES."""
    text, vision = dict(SHAPES[shape]["text"]), SHAPES[shape]["vision"]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": text.pop("mrope_section")}
    return Qwen2VLConfig(
        text_config=text | {"rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        vision_config=vision | {"hidden_size": text["hidden_size"]},
        image_token_id=IMAGE,
        tie_word_embeddings=shape == "2b",
    )


def make_model(
    *,
    lora: bool = False,
    checkpointing: bool = False,
    shape: str = "small",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Qwen2VL:
    """Random weights, no dropout.  lora: rank 64 on every projection of the language model, the rest frozen."""
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            vlm: Any = Qwen2VLForConditionalGeneration(model_config(shape))
    finally:
        torch.set_default_dtype(usual)
    vlm.model.language_model.config._attn_implementation = ATTENTION_NAME
    if lora:
        scope = Qwen2VL.LORA_SCOPE.format(names="q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj")
        vlm = get_peft_model(vlm, LoraConfig(r=64, lora_alpha=16, lora_dropout=0.0, target_modules=scope))
    if checkpointing:
        enable_checkpointing(vlm)
    return Qwen2VL(vlm).train()


def make_batch(latents: int, size: int = 2, text: int = 60, side: int = 10, rest: int = 60) -> Batch:
    """`size` rows: side x side image columns, then text; `rest` target columns."""
    width = side * side + text
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(10, VOCAB, (size, width), generator=random)
    ids[:, : side * side] = IMAGE
    return Batch(
        prompt_ids=ids,
        prompt_mask=torch.ones(size, width, dtype=torch.bool),
        prompt_positions=torch.arange(width).expand(3, size, -1),
        image_mask=ids == IMAGE,
        pixel_values=torch.randn(size * 4 * side * side, 1176, generator=random),
        image_grid=torch.tensor([[1, 2 * side, 2 * side]] * size),
        latents=torch.full((size,), latents),
        target_ids=torch.randint(10, VOCAB, (size, rest), generator=random),
        target_mask=torch.ones(size, rest, dtype=torch.bool),
        row_ids=torch.arange(size),
        passes=latents,
        has_images=True,
    )


def step_loss(name: str, backbone: Qwen2VL, batch: Batch, config: LatentConfig) -> Tensor:
    """Mean NLL of a step, executed as `name` of STEPS says; config: detached."""
    checkpointing = bool(backbone.decoder.layers[0].gradient_checkpointing)
    if name == "segmented_bptt":
        through = config.model_copy(update={"latent_grad": "bptt"})
        trace = latent_forward(backbone, batch, LatentMethod.of(through, backbone))
    elif name in ("segmented", "prepass"):
        schedule = choose_schedule(
            cast(Wanted, name),
            latent_grad="detach",
            checkpointing=checkpointing,
            dropout=has_dropout(backbone.decoder),
            gathers=False,
        )
        trace = latent_forward(backbone, batch, LatentMethod.of(config, backbone), schedule)
    else:
        trace = OTHERS[name](backbone, batch, config)
    return token_nll(trace.predictors(batch.latents), batch.labels, backbone.head).mean()


def ordinary(backbone: Qwen2VL, batch: Batch, config: LatentConfig) -> Trace:
    """One pass over as many columns; the latent steps' are the first image columns again."""
    prompt, targets = backbone.embed_prompt(batch), backbone.embed_tokens(batch.target_ids)
    inserted = batch.passes * (config.num_patches + 1)
    embeds = torch.cat([prompt, prompt[:, :inserted].detach(), targets], dim=1)
    positions = torch.arange(embeds.shape[1], device=embeds.device).expand(3, len(embeds), -1)
    hidden = backbone.decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
    start = hidden.shape[1] - targets.shape[1]
    return Trace([], [hidden[:, start - 1]] * (batch.passes + 1), [hidden], start)


def naive(backbone: Qwen2VL, batch: Batch, config: LatentConfig) -> Trace:
    """Every pass over its whole prefix, nothing kept; SDPA and one explicit row, as fast as the definition allows."""
    run = LatentForward(backbone, batch, LatentMethod.of(config, backbone))
    embeds, positions = run.prompt_embeds, run.prompt_positions
    tips = []
    for _ in range(batch.passes):
        run.kept, run.passes = KeptSegments(), []
        saliency = run.run_pass(embeds, positions, read=True)
        new, at = run.take_step(saliency)
        tips.append(run.tips[-1])
        embeds, positions = torch.cat([embeds, new], dim=1), torch.cat([positions, at], dim=2)
    run.kept, run.passes = KeptSegments(), []
    embeds = torch.cat([embeds, backbone.embed_tokens(batch.target_ids)], dim=1)
    positions = torch.cat([positions, run.sequence.grow(batch.target_mask)], dim=2)
    run.run_pass(embeds, positions, read=False)
    hidden = run.passes[0]
    start = hidden.shape[1] - batch.target_ids.shape[1]
    return Trace(run.steps, [*tips, hidden[:, start - 1]], [hidden], start)


OTHERS: dict[str, Callable[[Qwen2VL, Batch, LatentConfig], Trace]] = {"ordinary": ordinary, "naive": naive}
