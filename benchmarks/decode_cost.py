"""Cost of an answer: latent steps and a short answer against written reasoning.  `make bench`

    none      10 tokens, no reasoning
    latent    3 latent steps of K = 32, then 10 tokens
    cot100    100 tokens, the reasoning written out; cot180: 180

`latent` goes through this project's decoding, the others through transformers' `generate` on its own model with SDPA
attention and the same weights.  All read the picture and the question, and all write exactly so many tokens.
Interleaved repeats in one process, median; `_b8`: eight questions at once.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from transformers import GenerationConfig, Qwen2VLForConditionalGeneration

from benchmarks.cases import make_batch, make_model
from benchmarks.step_cost import write_json
from data_prep import cli
from data_prep.errors import UserError
from pipeline.backbones.qwen2_vl import Qwen2VL
from pipeline.data.batch import Batch
from pipeline.latent.decode import Decoding, generate
from pipeline.latent.method import LatentConfig, LatentMethod

NO_EOS = 10**6
"""No token: every answer has its full length."""


def main(
    *,
    repeats: int = 5,
    latents: int = 3,
    patches: int = 32,
    tokens: int = 10,
    text: int = 60,
    shape: Literal["tiny", "small", "2b", "7b"] = "small",
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["fp32", "bf16"] = "fp32",
    json: Path | None = None,
) -> None:
    """Print the table; --json FILE writes it.  Model and question as in step_cost, batches of 1 and 8."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here")
    backbone = make_model(shape=shape, device=device, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32).eval()
    stock = stock_model(backbone)
    answers: dict[str, Callable[[], object]] = {}
    for size in (1, 8):
        batch = make_batch(latents, size, text=text).to(device)
        method = LatentMethod.of(LatentConfig(num_patches=patches), backbone)
        decoding = Decoding(tokens, NO_EOS)
        answers[f"none_b{size}"] = partial(write, stock, batch, tokens)
        answers[f"latent_b{size}"] = partial(generate, backbone, batch, method, decoding)
        answers[f"cot100_b{size}"] = partial(write, stock, batch, 100)
        answers[f"cot180_b{size}"] = partial(write, stock, batch, 180)
    result: dict[str, dict[str, float]] = {"seconds": {}, "forward_calls": {}}
    for name, answer in answers.items():  # once each, unmeasured
        result["forward_calls"][name] = calls_of([backbone.decoder, stock.model.language_model], answer)
    seconds: dict[str, list[float]] = {name: [] for name in answers}
    for _ in range(repeats):
        for name, answer in answers.items():
            start = time.perf_counter()
            answer()  # ends in host values: nothing is left running
            seconds[name].append(time.perf_counter() - start)
    result["seconds"] = {name: statistics.median(values) for name, values in seconds.items()}
    print(table(result))
    if json:
        write_json(json, result)


def stock_model(backbone: Qwen2VL) -> Qwen2VLForConditionalGeneration:
    """transformers' own model with the backbone's weights."""
    config = copy.deepcopy(backbone.core.config)
    weight = backbone.decoder.norm.weight
    stock = Qwen2VLForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=weight.dtype)
    stock.load_state_dict(backbone.core.state_dict())
    return stock.to(weight.device).eval()


def write(stock: Qwen2VLForConditionalGeneration, batch: Batch, count: int) -> None:
    """Exactly `count` greedy tokens to each question."""
    stock.model.rope_deltas = None  # of the batch before
    stock.generate(
        input_ids=batch.prompt_ids,
        attention_mask=batch.prompt_mask.long(),
        pixel_values=batch.pixel_values,
        image_grid_thw=batch.image_grid,
        mm_token_type_ids=batch.image_mask.int(),
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=count, min_new_tokens=count, eos_token_id=2, pad_token_id=0
        ),
    )


def calls_of(decoders: list[torch.nn.Module], answer: Callable[[], object]) -> int:
    """How often `answer` runs one of the decoders."""
    calls: list[int] = []
    handles = [decoder.register_forward_pre_hook(lambda *_: calls.append(1)) for decoder in decoders]
    answer()
    for handle in handles:
        handle.remove()
    return len(calls)


def table(result: dict[str, dict[str, float]]) -> str:
    """Seconds and forward calls, and how many times the latent answer's seconds each takes."""
    lines = [f"{'answer':<12}{'calls':>7}{'seconds':>10}{'to latent':>11}"]
    for name, seconds in result["seconds"].items():
        ratio = seconds / result["seconds"]["latent_b" + name.rpartition("_b")[2]]
        lines.append(f"{name:<12}{result['forward_calls'][name]:>7}{seconds:>10.3f}{ratio:>11.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
