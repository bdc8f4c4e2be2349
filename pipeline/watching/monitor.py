"""What a run tells: TensorBoard, a line on the screen now and then, and the exact numbers of every step in a file.

Only rank 0 writes.  After a resume, points past the checkpoint are dropped, so that no step appears twice.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter

from data_prep.files import write_atomic
from pipeline.watching.activity import ACTIVITY

LAYOUT = {
    "training": {
        "loss": ["Multiline", ["train/loss", "val/loss"]],
        "accuracy": ["Multiline", ["val/accuracy"]],
        "gradient norm and rate": ["Multiline", ["train/grad_norm", "train/lr"]],
    },
    "latent steps": {
        "norm of h": ["Multiline", ["latent/norm"]],
        "selection: entropy (nats) and share of the image taken": [
            "Multiline",
            ["latent/selection_entropy", "latent/coverage"],
        ],
        "stage": ["Multiline", ["curriculum/stage", "curriculum/latents"]],
    },
    "speed": {
        "throughput": ["Multiline", ["speed/tokens_per_s", "speed/samples_per_s"]],
        "seconds of a step": ["Multiline", ["time/data_wait", "time/forward", "time/backward", "time/step"]],
        "memory (GB)": ["Multiline", ["memory/allocated_gb", "memory/peak_gb"]],
    },
    "data": {
        "problems since the start": ["Multiline", ["data/bad_samples", "data/overlong_rows", "data/dropped_steps"]]
    },
}


@dataclass
class Stopwatch:
    """Seconds by phase of one step."""

    device: torch.device
    exact: bool
    """Wait for the GPU at each border: right, but slower; on logged steps only."""
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        with ACTIVITY.part(phase):
            yield
            if self.exact and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


@dataclass
class StepResult:
    """A step's numbers, summed over ranks."""

    loss: float
    grad_norm: float
    columns: int
    """Real question and target columns"""
    stopping: bool
    """Some rank was asked to stop"""
    statistics: dict[str, float]
    """Sums over rows; see `pipeline.latent.forward.Trace.statistics`"""


def step_scalars(result: StepResult, watch: Stopwatch, global_batch: int) -> dict[str, float]:
    """What TensorBoard shows of a step: loss, speed, the time of each phase, and what the latent steps did."""
    seconds, sums = sum(watch.seconds.values()), result.statistics
    latent_steps = max(1.0, sums["latent_steps"])
    return {
        "train/loss": result.loss,
        "train/grad_norm": result.grad_norm,
        "speed/tokens_per_s": result.columns / seconds,
        "speed/samples_per_s": global_batch / seconds,
        **{f"time/{phase}": value for phase, value in watch.seconds.items()},
        "latent/norm": sums["latent_norm"] / latent_steps,
        "latent/selection_entropy": sums["selection_entropy"] / latent_steps,
        "latent/coverage": sums["coverage"] / max(1.0, sums["rows_with_latents"]),
        "latent/auxiliary_loss": sums["auxiliary"] / max(1.0, sums["labels"]),
    }


def memory_gb(device: torch.device) -> dict[str, float]:
    """Memory of this process now and at its peak, in GB: the GPU's, else resident memory."""
    if device.type == "cuda":
        used, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    else:
        import resource

        used = psutil.Process().memory_info().rss
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"memory/allocated_gb": used / 1e9, "memory/peak_gb": peak / 1e9}


def configure_logging(folder: Path, rank: int) -> logging.Logger:
    """Each rank logs to its own file in `folder`; rank 0 also to the screen."""
    folder.mkdir(parents=True, exist_ok=True)
    log = logging.getLogger("pipeline")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers.clear()
    handlers: list[logging.Handler] = [logging.FileHandler(folder / f"rank{rank}.log")]
    if rank == 0:
        handlers.append(logging.StreamHandler())
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    return log


@dataclass
class Sparing:
    """Says at most `lines` lines a minute; how many it kept to itself comes with the first of a later minute."""

    say: Callable[..., None]
    """Such as a logger's `warning`"""
    lines: int = 20
    clock: Callable[[], float] = time.monotonic
    _since: float = -math.inf
    _said: int = 0

    def __call__(self, text: str, *args: object) -> None:
        if self.clock() - self._since >= 60:
            self.tell_rest()
            self._since = self.clock()
        self._said += 1
        if self._said <= self.lines:
            self.say(text, *args)

    def tell_rest(self) -> None:
        """Say how many lines were left out since the last minute began."""
        if self._said > self.lines:
            self.say("... and %d more lines like these", self._said - self.lines)
        self._said = 0


def step_of(line: bytes) -> int | None:
    """Step of a line of metrics.jsonl; none of one that a crash or an editor damaged."""
    try:
        return int(json.loads(line)["global_step"])
    except (ValueError, KeyError, TypeError):
        return None


class Monitor:
    """Rank 0's writers; on other ranks every method does nothing."""

    def __init__(self, run: Path, main: bool, first_step: int | None, config_text: str) -> None:
        """first_step: the first that is going to be trained; none where only an export is made again."""
        self._main = main
        if not main:
            return
        self._steps = run / "metrics.jsonl"
        if first_step is not None:
            self._forget_from(first_step)
        self._file = open(self._steps, "a", buffering=1)  # noqa: SIM115  (closed by close)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)
        if first_step == 0:
            self._board.add_custom_scalars(LAYOUT)
            self._board.add_text("config", "```yaml\n" + config_text + "\n```", 0)

    def _forget_from(self, step: int) -> None:
        if self._steps.exists():
            lines = self._steps.read_bytes().splitlines(keepends=True)
            kept = [
                line
                for line in lines
                if line.endswith(b"\n") and (number := step_of(line)) is not None and number < step
            ]
            write_atomic(self._steps, b"".join(kept))

    def step(self, global_step: int, exact: Mapping[str, float | int | list[str]]) -> None:
        """Numbers and rows of every step, as they are, to `metrics.jsonl`."""
        if self._main:
            self._file.write(json.dumps({"global_step": global_step, **exact}) + "\n")

    def scalars(self, global_step: int, values: dict[str, float]) -> None:
        if self._main:
            for name, value in values.items():
                self._board.add_scalar(name, value, global_step)

    def close(self) -> None:
        if self._main:
            self._file.close()
            self._board.close()


class Progress:
    """Rate and time left of a stage."""

    def __init__(self, done: int, total: int) -> None:
        self._first, self._total, self._start = done, total, time.monotonic()

    def rate(self, done: int) -> float:
        """Steps a second."""
        return (done - self._first) / max(1e-9, time.monotonic() - self._start)

    def left(self, done: int) -> float:
        """Seconds; 0 before the first step."""
        return (self._total - done) / self.rate(done) if done > self._first else 0.0

    def line(self, done: int) -> str:
        rate, left = self.rate(done), int(self.left(done))
        return f"{done}/{self._total} {rate:.2f} steps/s, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
