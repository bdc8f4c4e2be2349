"""One run of four stages, killed again and again at random moments: its end is that of a run nobody disturbed.

    IVTLR_KILLS=30 IVTLR_SEED=7 python -m pytest -s tests/test_survival.py

IVTLR_KILLS says how many times (3), IVTLR_SEED which victims, moments and delays are drawn (0).  The last line counts
the kills by victim and by what rank 0 said it was doing, and the steps that were done twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.errors import UserError
from pipeline.keeping.checkpoint import Checkpoints
from pipeline.watching.heartbeat import Beat, read_beat
from tests import launch

KILLS, SEED = int(os.environ.get("IVTLR_KILLS", "3")), int(os.environ.get("IVTLR_SEED", "0"))
STAGES, STEPS = 4, 5 + KILLS
VICTIMS = ("rank", "launcher", "tree")
MOMENTS = {"saving": 0.05, "validating": 0.4, "exporting": 0.08, "training": 0.5, "starting": 3.0}
"""Phases in which a process is killed, and so many seconds at most after they were seen to begin."""

PLUGIN = """
from pipeline.latent.parts import FEEDBACKS, Feedback
from pipeline.watching import heartbeat

heartbeat.LOOK = 0.01  # phases of a tiny model last no second

@FEEDBACKS.add("seen")
class Seen(Feedback):
    def forward(self, reading):
        return reading.tip[:, None]
"""


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """Everything comes up often, and every step is told."""
    plugin = tmp_path_factory.mktemp("plugin") / "seen.py"
    plugin.write_text(PLUGIN)
    stages = [{"latents": n // 2, "skip": n, "steps": STEPS} for n in range(STAGES)]
    settings = {
        "curriculum.stages": json.dumps(stages), "latent.feedback": "seen", "train.checkpoint_every": 2,
        "train.validate_every": 3, "train.val_samples": 8, "train.log_every": 1, "train.trace": "true",
    }  # fmt: skip
    return ["--plugin", str(plugin), *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]


def beat_of(out: Path) -> Beat | None:
    with contextlib.suppress(UserError):
        return read_beat(out)
    return None


def last_step(out: Path) -> int:
    """Steps that metrics.jsonl tells of."""
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return sum(line.endswith(b"\n") for line in lines)


def wait_for_moment(out: Path, process: Any, born: float, moment: str, past: int) -> None:
    """Return as soon as rank 0 of this start (of time `born`) is in a phase, with `past` steps done; or is starting."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        beat = beat_of(out)
        ready = beat is not None and beat.started >= born and last_step(out) >= past
        if ready and beat.phase == moment or moment == "starting" and ranks_run(out, process):
            return
        assert process.poll() is None, f"ended before a kill: {Path(f'{out}.log').read_text()[-6000:]}"
        time.sleep(0.002)
    raise AssertionError(f"no {moment} after {past} steps")


def ranks_run(out: Path, process: Any) -> bool:
    return isinstance(process, launch.Rank) or bool(launch.rank_processes(out))


def begin(out: Path, data: Path, options: list[str], launcher: bool) -> list[Any]:
    """The processes of a start: DeepSpeed's launcher, or the ranks themselves as `srun` starts them."""
    if launcher:
        return [launch.launch(out, data, *options)]
    return launch.start_ranks(out, launch.arguments(out, data, *options), 2)


def kill(victim: str, processes: list[Any], out: Path, rng: random.Random) -> None:
    """SIGKILL; the launcher ends the rank that is left, or `srun` would."""
    ranks = [process.pid for process in processes] if len(processes) > 1 else launch.rank_processes(out)
    if victim == "tree":
        for process in processes:
            launch.kill_tree(process)
    elif victim == "launcher" or ranks:
        os.kill(processes[0].pid if victim == "launcher" else rng.choice(ranks), signal.SIGKILL)
    for process in processes if len(processes) > 1 else []:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)


def moments(rng: random.Random, kills: int) -> Iterator[tuple[str, str, int]]:
    """(victim, moment, steps that are done before): every moment and victim about equally often, along the run."""
    drawn = [list(MOMENTS)[i % len(MOMENTS)] for i in range(kills)]
    victims = [VICTIMS[i % len(VICTIMS)] for i in range(kills)]
    rng.shuffle(drawn)
    rng.shuffle(victims)
    for i, (victim, moment) in enumerate(zip(victims, drawn, strict=True)):
        yield victim, moment, (STAGES - 1) * STEPS * i // kills + rng.randint(0, 2)


def test_killed_at_random_moments(data, tmp_path, options, capsys):
    """Parameters, optimizer, losses, rows, gradient norms, exports and TensorBoard: all bitwise the same."""
    rng, whole, out = random.Random(SEED), tmp_path / "whole", tmp_path / "run"
    launch.train(whole, data, *options, ranks=2)
    made: Counter[str] = Counter()
    redone = 0
    for i, (victim, moment, past) in enumerate(moments(rng, KILLS)):
        if moment == "exporting" and last_step(out) > (STAGES - 1) * STEPS:
            moment = "saving"  # the last stage's end is the run's
        born = time.time()
        by_launcher = victim == "launcher" or victim == "rank" and i % 2 == 0
        beside = str(rng.random() < 0.5).lower()  # whether checkpoints are written while training goes on
        processes = begin(out, data, [*options, "--train.async_checkpoints", beside], by_launcher)
        try:
            wait_for_moment(out, processes[0], born, moment, past)
            time.sleep(rng.uniform(0, MOMENTS[moment]))
            beat = beat_of(out)
            kill(victim, processes, out, rng)
            for process in processes:
                launch.wait(process, out, 120)
        finally:
            for process in processes:
                launch.kill_tree(process)
        phase = beat.phase if beat and beat.started >= born else "starting"
        steps, kept = last_step(out), Checkpoints(out).all()
        lost = steps - (kept[-1].state.global_step if kept else 0) if phase != "starting" else 0
        redone += lost
        made.update((victim, phase))
        with capsys.disabled():
            print(f"\n  killed: {victim} when {phase} (aim: {moment}), {steps} steps done, {lost} of them lost", end="")
    launch.train(out, data, *options, ranks=2)
    with capsys.disabled():
        print(f"\n  seed {SEED}, {KILLS} kills: {told(made, VICTIMS)}; {told(made, MOMENTS)}; {redone} steps redone")
    assert_same(out, whole)


ASKING = """
import importlib
import os
import signal

from pipeline.latent.parts import FEEDBACKS, Feedback

@FEEDBACKS.add("asking")
class Asking(Feedback):
    def forward(self, reading):
        return reading.tip[:, None]

def send_at(where, signals):
    module, _, path = where.partition(":")
    owner = importlib.import_module(module)
    *within, name = path.split(".")
    for part in within:
        owner = getattr(owner, part)
    real = getattr(owner, name)

    def sending(*arguments, **options):
        while signals:
            os.kill(os.getpid(), signals.pop())
        return real(*arguments, **options)

    setattr(owner, name, sending)

if "ASK" in os.environ:
    where, *names = os.environ["ASK"].split()
    send_at(where, [signal.Signals[name] for name in names])
"""

ASKED = {
    "imports, settings": ("pipeline.plan:check_same_run SIGTERM SIGTERM", 75, -1),
    "the folder being taken": ("pipeline.keeping.lease:Lease.acquire SIGUSR1", 75, -1),
    "data and base being made": ("pipeline.prepare:train_tokenizer SIGTERM SIGUSR1", 75, -1),
    "model being built": ("deepspeed:initialize SIGINT", 75, -1),
    "validation": ("pipeline.validate:is_right SIGTERM", 75, 3),
    "hashes being checked": ("pipeline.keeping.checkpoint:Checkpoint.damaged SIGUSR1", 75, -1),
    "a checkpoint being written": ("pipeline.keeping.checkpoint:write_atomic SIGUSR1 SIGUSR1", 75, 5),
    "a stage's export": ("pipeline.keeping.stage_end:write_export SIGINT", 75, 7),
    "a checkpoint being loaded": ("pipeline.keeping.checkpoint:Checkpoints.load SIGTERM SIGTERM", 75, 8),
    "the last stage's export": ("pipeline.keeping.stage_end:write_export SIGTERM SIGUSR1 SIGINT", 0, 12),
}
"""What is going on: the function that is just called, and the signals; exit status; steps done then, -1 as before."""
ALIKE = {"the folder being taken", "hashes being checked", "a checkpoint being loaded"}
"""Tried only where there is more time: with more kills than 3."""


def test_asked_to_stop_at_any_moment(data, tmp_path):
    """Status 75 and a sound checkpoint, or done; and the next start goes on exactly.  Never a traceback."""
    plugin, out, whole = tmp_path / "asking.py", tmp_path / "run", tmp_path / "whole"
    plugin.write_text(ASKING)
    stages = "[{latents: 0, skip: 0, steps: 6}, {latents: 1, skip: 1, steps: 6}]"
    settings = {"latent.feedback": "asking", "curriculum.stages": stages, "train.checkpoint_every": "2",
                "train.validate_every": "2", "train.val_samples": "2", "train.trace": "true"}  # fmt: skip
    options = ["--plugin", str(plugin), *(word for name, value in settings.items() for word in (f"--{name}", value))]
    steps = 0
    for moment, (ask, status, wanted) in ASKED.items():
        if KILLS <= 3 and moment in ALIKE:
            continue
        code, log = launch.try_train(out, data, *options, ASK=ask)
        assert code == status, f"{moment}: {log[-4000:]}"
        assert "Traceback" not in log and ("stopped on request" in log) == (status == 75), f"{moment}: {log[-4000:]}"
        steps = steps if wanted < 0 else wanted
        assert last_step(out) == steps, moment
        newest = Checkpoints(out).all()[-1:]
        assert [c.state.global_step for c in newest] == ([steps] if steps else []), moment
        assert not any(c.damaged() for c in newest), moment
        lease = out / "lease.json"
        assert not lease.exists() or json.loads(lease.read_text()).get("released"), moment
        beat = beat_of(out)
        assert beat is None or beat.phase == ("stopped" if status == 75 else "done"), moment
    launch.train(whole, data, *options)
    assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert scalars(out) == scalars(whole)


def told(made: Counter[str], names: Any) -> str:
    return ", ".join(f"{name} {made[name]}" for name in names)


def assert_same(out: Path, whole: Path) -> None:
    assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert scalars(out) == scalars(whole)
    for stage in range(STAGES):
        best = f"best-stage{stage}.json"
        assert (out / best).read_text() == (whole / best).read_text()
        export = Path("export") / f"stage{stage}" / "model.safetensors"
        assert (out / export).read_bytes() == (whole / export).read_bytes(), stage
        assert (out / f"stage{stage}.done").exists()
    found, expected = ({c.path.name: c for c in Checkpoints(run).all()} for run in (out, whole))
    assert found.keys() == expected.keys()
    for name, checkpoint in expected.items():
        assert found[name].state == checkpoint.state and not found[name].damaged()
        for file in checkpoint.path.glob("*.pt"):
            assert alike(contents(file), contents(found[name].path / file.name)), f"{name}/{file.name}"
    assert {path.name for path in (out / "checkpoints").iterdir() if path.is_dir()} == found.keys()


def contents(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=False)


def alike(one: Any, other: Any) -> bool:
    """Whether two trees of containers hold the same, tensors bit by bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return type(one) is type(other) and (not isinstance(one, int | float | str) or one == other)


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's points by name, (step, value); of what was measured by the clock the steps alone.

    Restarts are marked where there were some, once at each step that one began with.
    """
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    measured = ("speed/", "time/", "memory/")
    found = {
        name: [(e.step, 0.0 if name.startswith(measured) else e.value) for e in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    restarts = [step for step, _ in found.pop("run/restarts", [])]
    assert restarts == sorted(set(restarts)), restarts
    return found
