"""Start training as users do, and read what it left."""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "tiny.yaml"


def environment(**extra: str) -> dict[str, str]:
    """This process's, with one thread a rank and the interpreter's own programs first; ranks can show their stacks."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ours = {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    return {**os.environ, **ours, "HF_HUB_OFFLINE": "1", **extra}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def arguments(out: Path, data: Path | None, *options: str, ds: str = "zero3") -> list[str]:
    there = ["--data", str(data)] if data else []
    return ["pipeline/train.py", "--ds", f"ds_configs/{ds}.json", "--recipe", str(TINY), "--out", str(out), *there,
            *options]  # fmt: skip


def launch(out: Path, data: Path, *options: str, ranks: int = 2, ds: str = "zero3") -> subprocess.Popen:
    """`deepspeed pipeline/train.py ...` in its own process group, output to OUT.log."""
    command = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return start([*command, *arguments(out, data, *options, ds=ds)], out)


def start(command: list[str], out: Path, cwd: Path = ROOT, **extra: str) -> subprocess.Popen:
    """A command in its own process group, output to OUT.log; extra: environment variables."""
    log = open(f"{out}.log", "a")  # noqa: SIM115  (the child's)
    return subprocess.Popen(command, cwd=cwd, env=environment(**extra), stdout=log, stderr=log, start_new_session=True)


class Rank:
    """The training command in a process that is forked from one which has done the imports: they take most of a start.

    All else is as `python pipeline/train.py ...` does it; `launch` and the tests of slurm/ start that itself.
    """

    def __init__(self, words: list[str], log: Path, **extra: str) -> None:
        self._process = _forks().Process(target=_train, args=(words, log, environment(**extra)))
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("train", timeout or 0)
        return self._process.exitcode


@functools.cache
def _forks() -> Any:
    os.environ.update(environment())  # the imports read it
    context = multiprocessing.get_context("forkserver")
    # the second is what deepspeed.initialize imports besides, with torch's compiler behind it
    context.set_forkserver_preload(["pipeline.train", "deepspeed.runtime.zero.muon.muon_optimizer"])
    return context


def _train(words: list[str], log: Path, variables: dict[str, str]) -> None:
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(variables)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = words
    from pipeline import train as command
    from pipeline.watching.watch import STOP, run_rank

    STOP.begin()
    run_rank(command.main, command.World.from_environment().main)


def train(out: Path, data: Path, *options: str, ranks: int = 1, ds: str = "zero3") -> str:
    """Train with plain processes, as `srun` starts them; returns the log.  Fails the test where a rank fails."""
    code, log = try_train(out, data, *options, ranks=ranks, ds=ds)
    assert code == 0, log[-4000:]
    return log


def try_train(
    out: Path, data: Path | None, *options: str, ranks: int = 1, ds: str = "zero3", **extra: str
) -> tuple[int, str]:
    """The same, giving rank 0's exit status and the log.  extra: environment variables."""
    log = Path(f"{out}.log")
    log.unlink(missing_ok=True)
    processes = start_ranks(out, arguments(out, data, *options, ds=ds), ranks, **extra)
    try:
        code = wait(processes[0], out, 300)
        if code == 0:
            code = max(wait(process, out, 60) for process in processes)
    finally:
        for process in processes:
            kill_tree(process)
    return code, log.read_text()


def start_ranks(out: Path, words: list[str], ranks: int, **extra: str) -> list[Rank]:
    """The ranks of one start; they write to OUT.log."""
    extra |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [Rank(words, Path(f"{out}.log"), RANK=str(r), LOCAL_RANK=str(r), **extra) for r in range(ranks)]


def wait(process: subprocess.Popen | Rank, out: Path, seconds: float) -> int:
    """Exit status.  A run that does not end fails the test, showing where every process of it stands."""
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        for pid in training_processes(out) or [process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGABRT)  # PYTHONFAULTHANDLER writes the stacks of all threads
        time.sleep(2)
        kill_tree(process)
        raise AssertionError(f"not ended after {seconds:.0f} s\n{Path(f'{out}.log').read_text()[-20000:]}") from None


def losses(out: Path) -> dict[int, float]:
    """global step -> loss, from metrics.jsonl; fails where a step appears twice."""
    found: dict[int, float] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        assert entry["global_step"] not in found, f"step {entry['global_step']} appears twice"
        found[entry["global_step"]] = entry["loss"]
    return found


def wait_for_step(out: Path, global_step: int, process: subprocess.Popen, seconds: float = 240) -> None:
    """Return once the run has logged `global_step`."""
    deadline = time.monotonic() + seconds
    path = out / "metrics.jsonl"
    while not (path.exists() and f'"global_step": {global_step},' in path.read_text()):
        assert process.poll() is None, Path(f"{out}.log").read_text()[-4000:]
        assert time.monotonic() < deadline, "the run does not get there"
        time.sleep(0.02)


def rank_processes(out: Path) -> list[int]:
    """Process ids of the training ranks of a run folder, without their launchers and loader workers."""
    parents = training_processes(out)
    return sorted(pid for pid, parent in parents.items() if parent not in parents)


def training_processes(out: Path) -> dict[int, int]:
    """Process id -> its parent's, of the ranks of a run folder and their loader workers."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if b"pipeline/train.py" in words[:3] and str(out).encode() in words:
                parents[int(entry.name)] = parent
    return parents


def kill_tree(process: subprocess.Popen | Rank) -> None:
    """SIGKILL to the whole process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
