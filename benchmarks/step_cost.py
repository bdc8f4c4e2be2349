"""Cost of a latent training step against one ordinary pass over as many columns.  `python -m benchmarks.step_cost`

Steps are those of `cases`; `*_ckpt` with checkpointing, `*_lora` and `*_lora_ckpt` with LoRA, `*_resident` under ZeRO-3
with parameters kept.  Four measures:

    flops          counted in forward and backward, attention included
    live_bytes     allocated by forward and still held before backward, kept keys and values included
    gather_bytes   parameters gathered by one rank of two under ZeRO-3 (see `gather`)
    seconds        median over repeats that take turns in one process
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
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import STEPS, make_batch, make_model, step_loss
from data_prep import cli
from data_prep.errors import UserError
from data_prep.files import write_atomic
from pipeline.backbones.qwen2_vl import Qwen2VL
from pipeline.batch import Batch
from pipeline.latent.forward import LatentConfig

VARIANTS = {
    "": {"checkpointing": False, "lora": False},
    "_ckpt": {"checkpointing": True, "lora": False},
    "_lora": {"checkpointing": False, "lora": True},
    "_lora_ckpt": {"checkpointing": True, "lora": True},
}
MEASURES = ("flops", "live_bytes", "gather_bytes", "seconds")
Result = dict[str, dict[str, float]]


def main(
    *,
    repeats: int = 7,
    latents: int = 3,
    patches: int = 32,
    batch: int = 2,
    gather: bool = True,
    json: Path | None = None,
) -> None:
    """Print the table; --json FILE writes it.  Hidden 512, 8 layers, 10x10 image columns, 60 + 60 text tokens.

    --batch: rows; --no-gather leaves out the two-rank run.
    """
    if repeats < 1 or batch < 1 or latents < 0:
        raise UserError("--repeats and --batch must be 1 or more, --latents 0 or more")
    warnings.filterwarnings("ignore", category=FutureWarning)
    result: Result = {measure: {} for measure in MEASURES}
    rows, config = make_batch(latents, size=batch), LatentConfig(num_patches=patches, latent_grad="detach")
    for suffix, variant in VARIANTS.items():
        measure(make_model(**variant), rows, config, repeats, suffix, result)
    result["kept_bytes"] = {"segmented_bptt": float(kept_bytes(make_model(), rows, config))}
    if gather:
        result["gather_bytes"] = gathered()
    print(table(result))
    if json:
        write_json(json, result)


def write_json(path: Path, result: Result) -> None:
    write_atomic(path, json.dumps(result, indent=1) + "\n")


def measure(backbone: Qwen2VL, batch: Batch, config: LatentConfig, repeats: int, suffix: str, result: Result) -> None:
    """FLOPs, live bytes and seconds of every step, into `result` under its name + `suffix`."""
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    for name in STEPS:
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            run(name, backbone, batch, config)
        result["flops"][name + suffix] = counter.get_total_flops()
        result["live_bytes"][name + suffix] = live_bytes(name, backbone, batch, config)
    for _ in range(repeats):
        for name in STEPS:
            seconds[name].append(run(name, backbone, batch, config))
    result["seconds"] |= {name + suffix: statistics.median(values) for name, values in seconds.items()}


def run(name: str, backbone: Qwen2VL, batch: Batch, config: LatentConfig) -> float:
    """Seconds of forward, loss and backward."""
    backbone.zero_grad()
    start = time.perf_counter()
    step_loss(name, backbone, batch, config).backward()
    return time.perf_counter() - start


def live_bytes(name: str, backbone: Qwen2VL, batch: Batch, config: LatentConfig) -> int:
    """Bytes that forward allocates less those it frees: what is held until backward, whoever holds it."""
    backbone.zero_grad()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loss = step_loss(name, backbone, batch, config)
    events = recorded.profiler.kineto_results.events()
    held = sum(event.nbytes() for event in events if event.name() == "[memory]")
    del loss
    return held


def kept_bytes(backbone: Qwen2VL, batch: Batch, config: LatentConfig) -> int:
    """Bytes of the keys and values that `segmented` keeps for later passes."""
    columns = batch.prompt_ids.shape[1] + batch.passes * (config.num_patches + 1) + batch.target_ids.shape[1]
    text = backbone.decoder.config
    heads = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * len(batch.latents) * columns * heads * 4


def gathered() -> dict[str, float]:
    """`gather` on two ranks of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "gather.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*launcher, "-m", "benchmarks.gather", "--json_file", str(out)]
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
    shown = {
        "flops": ("GFLOP", 1e9),
        "live_bytes": ("live MB", 1e6),
        "gather_bytes": ("gather MB", 1e6),
        "seconds": ("s", 1),
    }
    lines = [f"{'step':<26}" + "".join(f"{label:>11}{'ratio':>8}" for label, _ in shown.values())]
    suffixes = [*VARIANTS, "_resident"]
    for suffix in suffixes:
        for name in STEPS:
            cells = ""
            for measure, (_, unit) in shown.items():
                value, base = (result[measure].get(n + suffix) for n in (name, "ordinary"))
                cells += f"{value / unit:>11.3f}{value / base:>8.3f}" if value and base else " " * 19
            lines.append(f"{name + suffix:<26}{cells}")
    lines.append(f"keys and values kept by segmented: {result['kept_bytes']['segmented_bptt'] / 1e6:.1f} MB")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
