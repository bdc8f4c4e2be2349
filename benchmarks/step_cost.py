"""Cost of a latent training step against one ordinary pass over as many columns.  `python -m benchmarks.step_cost`

Steps are those of `cases`; `*_ckpt` with checkpointing, `*_lora` and `*_lora_ckpt` with LoRA, `*_resident` under ZeRO-3
with parameters kept.  Four measures:

    flops          counted in forward and backward, attention included
    live_bytes     allocated by forward and still held before backward, kept keys and values included
    gather_bytes   parameters gathered by one rank of two under ZeRO-3 (see `gather`)
    seconds        median over repeats that take turns in one process

MFU is the ordinary step's FLOPs without recomputation, over seconds, over what a large matrix product reaches.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import STEPS, make_batch, make_model, step_loss
from data_prep import cli
from data_prep.errors import UserError
from data_prep.files import write_atomic
from pipeline.backbones.qwen2_vl import Qwen2VL
from pipeline.data.batch import Batch
from pipeline.latent.method import LatentConfig

VARIANTS = {
    "plain": {"checkpointing": False, "lora": False},
    "ckpt": {"checkpointing": True, "lora": False},
    "lora": {"checkpointing": False, "lora": True},
    "lora_ckpt": {"checkpointing": True, "lora": True},
}
MEASURES = ("flops", "live_bytes", "gather_bytes", "seconds", "peak_bytes")
Result = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Bench:
    """A model and batch to run steps of."""

    backbone: Qwen2VL
    batch: Batch
    config: LatentConfig

    def forward(self, name: str) -> Tensor:
        self.backbone.zero_grad()
        return step_loss(name, self.backbone, self.batch, self.config)

    def seconds(self, name: str) -> float:
        """Of forward, loss and backward."""
        synchronize()
        start = time.perf_counter()
        self.forward(name).backward()
        synchronize()
        return time.perf_counter() - start

    def flops(self, name: str) -> int:
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            self.forward(name).backward()
        return counter.get_total_flops()

    def live_bytes(self, name: str) -> int:
        """Bytes that forward allocates less those it frees: what is held until backward, whoever holds it."""
        self.backbone.zero_grad()
        gc.collect()
        if on_gpu():
            before = torch.cuda.memory_allocated()
            loss = self.forward(name)
            return torch.cuda.memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            loss = self.forward(name)
        events = recorded.profiler.kineto_results.events()
        held = sum(event.nbytes() for event in events if event.name() == "[memory]")
        del loss
        return held


def main(
    *,
    repeats: int = 7,
    latents: int = 3,
    patches: int = 32,
    batch: int = 2,
    text: int = 60,
    rest: int = 60,
    shape: Literal["tiny", "small", "2b", "7b"] = "small",
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["fp32", "bf16"] = "fp32",
    variants: str = "plain,ckpt,lora,lora_ckpt",
    gather: bool = True,
    json: Path | None = None,
) -> None:
    """Print the table; --json FILE writes it.  10x10 image columns, --text question and --rest target tokens a row.

    --batch: rows; --shape: model, see cases.SHAPES; --variants: which of plain, ckpt, lora, lora_ckpt; --gather false
    leaves out the two-rank run.
    """
    chosen = [name.strip() for name in variants.split(",")]
    problems = [f"--variants {name}: expected some of {', '.join(VARIANTS)}" for name in chosen if name not in VARIANTS]
    problems += [
        f"--{name} must be 1 or more" for name, n in (("repeats", repeats), ("batch", batch), ("rest", rest)) if n < 1
    ]
    if gather and shape in ("2b", "7b"):
        problems.append(f"--shape {shape}: two ranks of it do not fit here; add --gather false")
    if device == "cuda" and not torch.cuda.is_available():
        problems.append("--device cuda: PyTorch sees no GPU here")
    if problems:
        raise UserError(*problems)
    warnings.filterwarnings("ignore", category=FutureWarning)
    result: Result = {measure: {} for measure in MEASURES}
    rows = make_batch(latents, batch, text=text, rest=rest).to(device)
    config = LatentConfig(num_patches=patches, latent_grad="detach")
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    for name in chosen:
        backbone = make_model(**VARIANTS[name], shape=shape, device=device, dtype=kind)
        measure(Bench(backbone, rows, config), repeats, "" if name == "plain" else f"_{name}", result)
        result["kept_bytes"] = {"segmented_bptt": float(kept_bytes(backbone, rows, config))}
        del backbone
    if gather:
        result["gather_bytes"] = gathered(shape)
    result["columns"] = {"step": float(columns_of(rows, config))}
    result["product_flops_per_second"] = {"product": product_rate(device, kind)}
    print(table(result))
    if json:
        write_json(json, result)


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(result, indent=1) + "\n")


def on_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.memory_allocated() > 0


def synchronize() -> None:
    """Wait for the GPU, where one computes."""
    if on_gpu():
        torch.cuda.synchronize()


def measure(bench: Bench, repeats: int, suffix: str, result: Result) -> None:
    """FLOPs, live bytes and seconds of every step, into `result` under its name + `suffix`."""
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    for name in STEPS:
        result["flops"][name + suffix] = bench.flops(name)
        result["live_bytes"][name + suffix] = bench.live_bytes(name)
        if on_gpu():
            torch.cuda.reset_peak_memory_stats()
            bench.seconds(name)
            result["peak_bytes"][name + suffix] = torch.cuda.max_memory_allocated()
    for _ in range(repeats):
        for name in STEPS:
            seconds[name].append(bench.seconds(name))
    result["seconds"] |= {name + suffix: statistics.median(values) for name, values in seconds.items()}


def product_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product of matrices, best of 5: what there is to use."""
    side = 8192 if device == "cuda" else 2048
    square, seconds = torch.randn(side, side, device=device, dtype=dtype), []
    for _ in range(6):
        synchronize()
        start = time.perf_counter()
        square @ square
        synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds[1:])


def columns_of(batch: Batch, config: LatentConfig) -> int:
    """Columns of the final sequences of all rows."""
    question, targets = batch.prompt_ids.shape[1], batch.target_ids.shape[1]
    return len(batch.latents) * (question + batch.passes * (config.num_patches + 1) + targets)


def kept_bytes(backbone: Qwen2VL, batch: Batch, config: LatentConfig) -> int:
    """Bytes of the keys and values that `segmented` keeps for later passes."""
    text = backbone.decoder.config
    width = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    size = next(backbone.decoder.parameters()).element_size()
    return 2 * text.num_hidden_layers * columns_of(batch, config) * width * size


def gathered(shape: str) -> dict[str, float]:
    """`gather` on two ranks of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "gather.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*launcher, "-m", "benchmarks.gather", "--json_file", str(out), "--shape", shape]
        ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if ran.returncode:
            raise UserError("the two-rank run failed:", *ran.stderr.splitlines()[-5:])
        return json.loads(out.read_text())


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


def table(result: Result) -> str:
    """Every measure with its ratio to the ordinary step of the same variant."""
    units = {"flops": ("GFLOP", 1e9), "live_bytes": ("live MB", 1e6), "gather_bytes": ("gather MB", 1e6)}
    units |= {"peak_bytes": ("peak MB", 1e6), "seconds": ("s", 1)}
    shown = {measure: unit for measure, unit in units.items() if result[measure]}
    names = [*result["flops"]]
    names += [name for name in result["gather_bytes"] if name not in names and name != "parameters"]
    columns = result["columns"]["step"]
    product = result["product_flops_per_second"]["product"]
    lines = [f"{'step':<26}" + "".join(f"{label:>11}{'ratio':>8}" for label, _ in shown.values())]
    lines[0] += f"{'columns/s':>11}{'MFU':>8}"
    for name in names:
        base = "ordinary" + name.removeprefix(
            next(s for s in sorted(STEPS, key=len, reverse=True) if name.startswith(s))
        )
        cells = ""
        for measure, (_, unit) in shown.items():
            value, ordinary = (result[measure].get(n) for n in (name, base))
            cells += f"{value / unit:>11.3f}{value / ordinary:>8.3f}" if value and ordinary else " " * 19
        # model FLOPs: those of an ordinary step that recomputes nothing
        model = result["flops"].get(base.removesuffix("_ckpt"))
        if model and (seconds := result["seconds"].get(name)):
            cells += f"{columns / seconds:>11.0f}{model / seconds / product:>8.3f}"
        lines.append(f"{name:<26}{cells}".rstrip())
    lines.append(f"a large matrix product: {product / 1e12:.2f} TFLOP/s")
    lines.append(f"keys and values kept by segmented_bptt: {result['kept_bytes']['segmented_bptt'] / 1e6:.1f} MB")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
