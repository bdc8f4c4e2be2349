"""What watching over a run costs its steps when nothing goes wrong.  `python -m benchmarks.guards`

The demo's model is trained by the public command in this process, and what is there for faults alone is timed and
counted in every step; so are all small sums over ranks and waits for the device, this project's and DeepSpeed's.
Several ranks: `torchrun --nproc-per-node 2 -m benchmarks.guards`.
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint import ROOT, Counted
from benchmarks.step_cost import write_json
from data_prep import cli
from data_prep.errors import UserError
from pipeline import distributed, train, update
from pipeline.distributed import World
from pipeline.keeping.keep import Keeper
from pipeline.keeping.lease import Lease
from pipeline.update import Update
from pipeline.watching.activity import Activity
from pipeline.watching.guard import Guard
from pipeline.watching.monitor import Monitor

WATCHING: dict[str, list[tuple[type, str]]] = {
    "judging loss and gradient": [(Guard, "judge")],
    "saying what goes on": [(Activity, "enter")],
    "checkpoints in writing": [(Keeper, "report"), (Keeper, "agree")],
    "the step's line, the lease looked at": [(Monitor, "step")],
    "of it the lease": [(Lease, "check")],
}


OURS, DEEPSPEEDS = "waits of ours", "waits of DeepSpeed's"


class Meter:
    """Seconds of calls by name, and waits for the device by whom; a step's begin with `lap`."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.waits: Counter[str] = Counter()
        self.laps: list[dict[str, float]] = []

    def time(self, name: str, owner: type, method: str) -> None:
        inner = getattr(owner, method)

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - began

        setattr(owner, method, timed)

    def count_waits(self) -> None:
        """Numbers taken out of tensors: on a GPU each waits for it."""
        for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
            setattr(torch.Tensor, name, self._counting(getattr(torch.Tensor, name)))

    def _counting(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def counted(tensor: torch.Tensor, *args: Any) -> Any:
            frame = sys._getframe(1)
            module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
            if module == "pipeline.distributed" or (module == "pipeline.update" and function == "__call__"):
                self.waits[OURS] += 1
            elif module.startswith("deepspeed"):
                self.waits[DEEPSPEEDS] += 1
            return inner(tensor, *args)

        return counted


def main(*, steps: int = 60, json: Path | None = None) -> None:
    """Print the table; --json FILE writes it.  The first third of the steps warms up and is not counted."""
    if steps < 3:
        raise UserError("--steps must be 3 or more")
    meter, counted, sums = Meter(), Counted(), Counter[str]()
    for name, methods in WATCHING.items():
        for owner, method in methods:
            meter.time(name, owner, method)
    meter.count_waits()
    plain_total, plain_call = distributed.total, Update.__call__

    def total(*args: Any) -> list[float]:
        sums["ours"] += 1
        return plain_total(*args)

    def step(self: Update, *args: Any) -> Any:
        if meter.laps:
            meter.laps[-1] |= {"whole": time.perf_counter() - meter.laps[-1]["began"], **meter.seconds}
        before, ours = counted.calls, sums["ours"]
        meter.seconds.clear()
        meter.waits.clear()
        meter.laps.append({"began": time.perf_counter()})
        result = plain_call(self, *args)
        meter.laps[-1] |= {
            "collectives": counted.calls - before,
            "sums": sums["ours"] - ours,
            **{who: meter.waits[who] for who in (OURS, DEEPSPEEDS)},
        }
        return result

    update.total, Update.__call__ = total, step  # type: ignore[assignment,method-assign]
    with tempfile.TemporaryDirectory() as folder:
        out = shared(folder)
        options: dict[str, Any] = {
            "train.val_samples": "0", "train.checkpoint_every": "0", "train.export": "none", "train.log_every": "1000",
            "curriculum.stages": f"[{{latents: 3, skip: 3, steps: {steps}}}]",
            "data.options": '{grid: 3, colours: 6, mix: "look:1", train: 2400, val: 8, test: 8}',
        }  # fmt: skip
        train.main(ds=ROOT / "ds_configs" / "zero3.json", out=out / "run", data=str(out / "data"), **options)
    if World.from_environment().main:
        show(meter.laps[len(meter.laps) // 3 : -1], json)


def shared(folder: str) -> Path:
    """The folder, or for several ranks one that is named after torchrun, which started them all."""
    alone = World.from_environment().size == 1
    return Path(folder) if alone else Path(tempfile.gettempdir()) / f"ivtlr-guards-{os.getppid()}"


def show(laps: list[dict[str, float]], json: Path | None) -> None:
    """laps: by step."""
    middle = {name: statistics.median(lap.get(name, 0.0) for lap in laps) for name in laps[0]}
    print(f"{len(laps)} steps of {middle['whole'] * 1e3:.1f} ms (median); in one step:")
    own = 0.0
    for name in WATCHING:
        seconds = middle.get(name, 0.0)
        own += 0.0 if name.startswith("of it") else seconds
        print(f"    {name:40}{seconds * 1e6:8.0f} us")
    print(f"    {'together':40}{own * 1e6:8.0f} us, {own / middle['whole']:.2%} of the step")
    print(f"    collectives: {middle['collectives']:.0f}, of them {middle['sums']:.0f} small sums of ours")
    print(f"    waits for the device: {middle[OURS]:.0f} of ours, {middle[DEEPSPEEDS]:.0f} of DeepSpeed's")
    if json is not None:
        write_json(json, {"step": middle, "watching": {"seconds": own, "share": own / middle["whole"]}})


if __name__ == "__main__":
    cli.run(main)
