"""What a checkpoint costs the steps beside it, written at once or while training goes on.  `make bench`

    none          no checkpoint
    at once       train.async_checkpoints false: training waits until it is complete
    beside        train.async_checkpoints true: training waits for the copy alone

One rank trains a model of 67 million parameters under ZeRO-3 with AdamW and saves it through the project's own `Keeper`
in its first step.  Turns of the three in one process, in pairs; medians.
"""

from __future__ import annotations

import functools
import json as json_module
import logging
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from benchmarks.step_cost import write_json
from data_prep import cli
from data_prep.errors import UserError
from pipeline import distributed
from pipeline.data.order import DataState
from pipeline.distributed import World, total
from pipeline.keeping.keep import Keeper
from pipeline.keeping.lease import Lease
from pipeline.recipe import load_config

ROOT = Path(__file__).resolve().parents[1]
MODES = ("none", "at once", "beside")
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "barrier", "reduce_scatter_tensor")
WIDTHS = {"tiny": 64, "small": 2048}


class Counted:
    """Collectives that this process has called."""

    def __init__(self) -> None:
        self.calls = 0
        for name in COLLECTIVES:
            counting = self._counting(getattr(dist, name))
            for module in (dist, distributed_c10d):  # the second for those that are made of others
                setattr(module, name, counting)

    def _counting(self, collective: Any) -> Any:
        @functools.wraps(collective)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return collective(*args, **kwargs)

        return counted


def main(
    *, pairs: int = 5, steps: int = 20, rows: int = 256, shape: str = "small", out: Path | None = None,
    json: Path | None = None,
) -> None:  # fmt: skip
    """Print the table; --json FILE writes it.  --out: folder on the disk to be measured, the system's temporary one."""
    if pairs < 1 or steps < 1 or shape not in WIDTHS:
        raise UserError(f"--pairs and --steps must be 1 or more, --shape one of {', '.join(WIDTHS)}")
    counted = Counted()
    distributed.start(World())
    engine, size = make_engine(WIDTHS[shape])
    batch = torch.randn(rows, WIDTHS[shape])
    found: dict[str, dict[str, list[float]]] = {mode: {"whole": [], "blocked": [], "calls": []} for mode in MODES}
    with tempfile.TemporaryDirectory(dir=out) as folder:
        keepers = {mode: make_keeper(engine, Path(folder) / mode, mode == "beside") for mode in MODES}
        train(engine, batch, 3, keepers["none"], counted, at=None)  # first steps set DeepSpeed up
        for pair in range(pairs):
            for mode in MODES:
                measured = train(engine, batch, steps, keepers[mode], counted, at=None if mode == "none" else pair)
                for name, value in measured.items():
                    found[mode][name].append(value)
        files = list(Path(folder, "beside").rglob("*.pt"))
        written = sum(path.stat().st_size for path in files) / max(1, len({path.parent for path in files}))
        for keeper in keepers.values():
            keeper.lease.release()
    print(f"{size:,} parameters, {written / 1e6:.0f} MB a checkpoint, {steps} steps, {pairs} pairs")
    print(f"{'checkpoint':12}{'whole s':>10}{'ratio':>8}{'blocked s':>11}{'share':>8}{'collectives':>13}")
    result: dict[str, dict[str, float]] = {"whole": {}, "ratio": {}, "blocked": {}, "share": {}, "collectives": {}}
    for mode in MODES:
        whole, blocked = (statistics.median(found[mode][name]) for name in ("whole", "blocked"))
        ratios = [a / b for a, b in zip(found[mode]["whole"], found["none"]["whole"], strict=True)]
        calls = statistics.median(found[mode]["calls"]) - statistics.median(found["none"]["calls"])
        row = [whole, statistics.median(ratios), blocked, blocked / whole, calls]
        for name, value in zip(result, row, strict=True):
            result[name][mode] = value
        print(f"{mode:12}{row[0]:10.2f}{row[1]:8.3f}{row[2]:11.2f}{row[3]:8.1%}{row[4]:13.0f}")
    if json is not None:
        write_json(json, result)
    distributed.stop()


def make_engine(width: int) -> tuple[deepspeed.DeepSpeedEngine, int]:
    """Sixteen square layers under ZeRO-3 with AdamW, and their number of parameters."""
    config = json_module.loads((ROOT / "ds_configs" / "zero3_lean.json").read_text())
    zero = config["zero_optimization"] | {"overlap_comm": False, "stage3_param_persistence_threshold": 0}
    zero |= {"reduce_bucket_size": 5_000_000, "stage3_prefetch_bucket_size": 0}
    micro = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    config |= {"zero_optimization": zero, **micro, "gradient_clipping": 1.0, "steps_per_print": 10**9}
    config["bf16"] = {"enabled": False}
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(16)))
    size = sum(p.numel() for p in model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-6), config=config
    )
    return engine, size


def make_keeper(engine: deepspeed.DeepSpeedEngine, out: Path, background: bool) -> Keeper:
    """The project's own, of a run folder of its own."""
    lease = Lease(out)
    lease.acquire()
    options = {"model.path": "m", "data.path": "d", "train.async_checkpoints": str(background).lower()}
    config = load_config(None, options | {"train.keep_checkpoints": "1"})
    plan: Any = SimpleNamespace(config=config, out=out, zero_stage=3)
    stage = SimpleNamespace(state=lambda step: DataState(0, 0, step, 0, ""))
    parts: Any = SimpleNamespace(engine=engine, base_hash="", stages=[stage])
    return Keeper(plan, parts, World(), lease, logging.getLogger("benchmark"))


def train(
    engine: deepspeed.DeepSpeedEngine, batch: torch.Tensor, steps: int, keeper: Keeper, counted: Counted, at: int | None
) -> dict[str, float]:
    """Seconds of so many steps, those of them that a checkpoint took from training, and collectives called.

    at: names the checkpoint saved after the first step; none: there is none.
    """
    blocked, calls, began = 0.0, counted.calls, time.perf_counter()
    for step in range(steps):
        reports = int(total([0.0, keeper.report()], batch.device)[1])
        before = time.perf_counter()
        keeper.agree(reports)
        blocked += time.perf_counter() - before
        engine.backward(engine(batch).square().mean())
        engine.step()
        if step == 0 and at is not None:
            before = time.perf_counter()
            keeper.save(0, at + 1, 10**6, at + 1)
            blocked += time.perf_counter() - before
    before = time.perf_counter()
    keeper.finish()  # counts as blocked where the steps were too few
    blocked += time.perf_counter() - before
    return {"whole": time.perf_counter() - began, "blocked": blocked, "calls": float(counted.calls - calls)}


if __name__ == "__main__":
    cli.run(main)
