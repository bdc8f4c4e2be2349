"""Cost of a latent training step against one ordinary pass over the same columns.  `make bench`

    ordinary     the final sequence in one pass, as plain fine-tuning would run it
    segmented    the latent forward: every column once, in n+1 passes
    naive        every prefix computed again for each latent step, then the final sequence (as the definition says)

Interleaved repeats in one process, median; FLOPs are counted, attention included.  `*_ckpt`: with checkpointing.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from data_prep import cli
from data_prep.files import write_atomic
from pipeline.backbones.qwen2_vl import Qwen2VL
from pipeline.batch import Batch
from pipeline.latent.attention import ATTENTION_NAME, KeptSegments
from pipeline.latent.forward import LatentConfig, LatentForward, Trace
from pipeline.latent.schedules import latent_forward
from pipeline.loss import token_nll

IMAGE, VOCAB = 5, 8000


def main(*, repeats: int = 5, latents: int = 3, patches: int = 32, json_file: Path | None = None) -> None:
    """Print the table; --json_file writes it.  Hidden 512, 8 layers, 10x10 image columns, 60 + 60 text, batch 2."""
    backbone, batch = make_model(), make_batch(latents)
    config = LatentConfig(num_patches=patches, latent_grad="detach")
    sequence = final_sequence(backbone, batch, config)
    steps = {
        "ordinary": lambda: ordinary(backbone, batch, config, sequence),
        "segmented": lambda: latent_forward(backbone, batch, config),
        "naive": lambda: naive(backbone, batch, config),
    }
    result: dict[str, dict[str, float]] = {"flops": {}, "seconds": {}}
    for suffix, on in (("", False), ("_ckpt", True)):
        if on:
            backbone.core.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for name, step in steps.items():
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
                backward(backbone, batch, step)
            result["flops"][name + suffix] = counter.get_total_flops()
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(repeats):
            for name, step in steps.items():
                start = time.perf_counter()
                backward(backbone, batch, step)
                seconds[name].append(time.perf_counter() - start)
        result["seconds"] |= {name + suffix: statistics.median(values) for name, values in seconds.items()}
    print(table(result))
    if json_file:
        write_atomic(json_file, json.dumps(result, indent=1) + "\n")


def attention_flops(query: tuple, key: tuple, *_, out_shape=None, **__) -> int:
    """Two products of (rows, columns, head size) for every head."""
    batch, heads, rows, size = query
    return 4 * batch * heads * rows * key[2] * size


def attention_backward_flops(grad: tuple, query: tuple, key: tuple, *_, out_shape=None, **__) -> int:
    """Five products where the forward has two."""
    return attention_flops(query, key) * 5 // 2


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}
"""PyTorch's counter has no formula for these."""


def make_model() -> Qwen2VL:
    """Random weights, no dropout."""
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": VOCAB, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
            "num_attention_heads": 8, "num_key_value_heads": 4,
            "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        },
        vision_config={"depth": 2, "embed_dim": 128, "num_heads": 4, "mlp_ratio": 2, "hidden_size": 512},
        image_token_id=IMAGE,
    )  # fmt: skip
    vlm = Qwen2VLForConditionalGeneration(config)
    vlm.model.language_model.config._attn_implementation = ATTENTION_NAME
    return Qwen2VL(vlm).train()


def make_batch(latents: int, size: int = 2, text: int = 60, side: int = 10, rest: int = 60) -> Batch:
    """`size` rows: side x side image columns, then text."""
    width = side * side + text
    ids = torch.randint(10, VOCAB, (size, width))
    ids[:, : side * side] = IMAGE
    return Batch(
        prompt_ids=ids,
        prompt_mask=torch.ones(size, width, dtype=torch.bool),
        prompt_positions=torch.arange(width).expand(3, size, -1),
        image_mask=ids == IMAGE,
        pixel_values=torch.randn(size * 4 * side * side, 1176),
        image_grid=torch.tensor([[1, 2 * side, 2 * side]] * size),
        latents=torch.full((size,), latents),
        target_ids=torch.randint(10, VOCAB, (size, rest)),
        target_mask=torch.ones(size, rest, dtype=torch.bool),
        row_ids=torch.arange(size),
        passes=latents,
        has_images=True,
    )


def final_sequence(backbone: Qwen2VL, batch: Batch, config: LatentConfig) -> Tensor:
    """Input embeddings of every column of the final sequence, detached, (B,T,D)."""
    with torch.no_grad():
        return torch.cat(latent_forward(backbone, batch, config).embeds, dim=1)


def ordinary(backbone: Qwen2VL, batch: Batch, config: LatentConfig, sequence: Tensor) -> Trace:
    """One pass over as many columns, vision tower included."""
    run = LatentForward(backbone, batch, config)
    new = sequence.shape[1] - run.prompt_embeds.shape[1]
    positions = [run.prompt_positions, run.sequence.grow(torch.ones(len(sequence), new, dtype=torch.bool))]
    embeds = torch.cat([run.prompt_embeds, sequence[:, -new:]], dim=1)
    hidden, _ = run.run_pass(embeds, torch.cat(positions, dim=2), read=False)
    start = hidden.shape[1] - batch.target_ids.shape[1]
    return Trace([], [hidden[:, start - 1]] * (batch.passes + 1), [hidden], start)


def naive(backbone: Qwen2VL, batch: Batch, config: LatentConfig) -> Trace:
    """Every pass over its whole prefix, nothing kept; SDPA and one explicit row, as fast as the definition allows."""
    run = LatentForward(backbone, batch, config)
    embeds, positions = run.prompt_embeds, run.prompt_positions
    tips = []
    for _ in range(batch.passes):
        run.kept, run.passes_run = KeptSegments(), 0
        hidden, saliency = run.run_pass(embeds, positions, read=True)
        tips.append(hidden[:, -1])
        new, at = run.take_step(hidden[:, -1], saliency)
        embeds, positions = torch.cat([embeds, new], dim=1), torch.cat([positions, at], dim=2)
    run.kept, run.passes_run = KeptSegments(), 0
    embeds = torch.cat([embeds, backbone.embed_tokens(batch.target_ids)], dim=1)
    positions = torch.cat([positions, run.sequence.grow(batch.target_mask)], dim=2)
    hidden, _ = run.run_pass(embeds, positions, read=False)
    start = hidden.shape[1] - batch.target_ids.shape[1]
    return Trace(run.steps, [*tips, hidden[:, start - 1]], [hidden], start)


def backward(backbone: Qwen2VL, batch: Batch, step: Callable[[], Trace]) -> None:
    """Forward, loss and backward of one step."""
    backbone.zero_grad()
    token_nll(step().predictors(batch.latents), batch.labels, backbone.head).mean().backward()


def table(result: dict[str, dict[str, float]]) -> str:
    """Seconds and FLOPs, and their ratios to the ordinary step."""
    lines = [f"{'step':<16}{'seconds':>9}{'ratio':>8}{'GFLOP':>9}{'ratio':>8}"]
    for name, seconds in result["seconds"].items():
        base = "ordinary_ckpt" if name.endswith("_ckpt") else "ordinary"
        flops = result["flops"][name]
        ratios = seconds / result["seconds"][base], flops / result["flops"][base]
        lines.append(f"{name:<16}{seconds:>9.3f}{ratios[0]:>8.2f}{flops / 1e9:>9.1f}{ratios[1]:>8.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
