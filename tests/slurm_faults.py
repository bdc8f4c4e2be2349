"""Command: what a cluster's faults cost a run.  `python -m tests.slurm_faults [NAME...]`; half an hour on busy cores.

Trains the tiny recipe (ZeRO-3, one rank on each of four nodes) on a Slurm of six virtual nodes on this machine, injects
one fault after another, compares every step's loss with an undisturbed run's, and prints a table.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.prepare import make_data
from pipeline.recipe import load_config
from tests import launch
from tests.slurm_cluster import Cluster, unavailable

STEPS, EVERY, FAULT_AT = 24, 4, 9
"""Length of the stage, steps between checkpoints, and the step after which a fault comes."""


@dataclass(eq=False)
class Job:
    """The stage's training in a Slurm job."""

    cluster: Cluster
    out: Path
    data: Path
    nodes: int = 4
    tasks: int = 1
    steps: int = STEPS
    settings: dict[str, Any] = field(default_factory=dict)
    sbatch: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)

    @property
    def options(self) -> list[str]:
        """Of pipeline/train.py, without blanks."""
        stages = json.dumps([{"latents": 0, "skip": 0, "steps": self.steps}], separators=(",", ":"))
        settings = {"curriculum.stages": stages, "train.checkpoint_every": EVERY, "train.val_samples": 0}
        settings |= {"data.workers": 0, "train.export": "none"} | self.settings
        return [f"--{name}={value}" for name, value in settings.items()]

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PYTHON": sys.executable,
            "RECIPE": "tests/tiny.yaml",
            "OUT": str(self.out),
            "DATA": str(self.data),
            "EXTRA": " ".join(self.options),
            "TASKS_PER_NODE": str(self.tasks),
            "OMP_NUM_THREADS": "1",
            **self.env,
        }

    def start(self) -> Job:
        options = [f"--nodes={self.nodes}", f"--output={self.log}", *self.sbatch]
        self.id = self.cluster.submit(*options, "slurm/stage0.sbatch", env=self.environment, cwd=launch.ROOT)
        return self

    @property
    def log(self) -> Path:
        return Path(f"{self.out}.log")

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.id)["Restarts"])

    @property
    def hosts(self) -> list[str]:
        """The job's nodes, that of rank 0 first."""
        return self.cluster.run("scontrol", "show", "hostnames", self.cluster.job(self.id)["NodeList"]).stdout.split()

    def losses(self) -> dict[int, float]:
        with contextlib.suppress(FileNotFoundError, ValueError):  # the last line is just being written
            return launch.losses(self.out)
        return {}

    def until(self, true: Callable[[], object], what: str, seconds: float = 400) -> float:
        """Seconds until something is so."""
        began = time.monotonic()
        while not true():
            told = self.log.read_text()[-6000:] if self.log.exists() else ""
            assert time.monotonic() < began + seconds, f"{what}: not after {seconds:.0f} s\n{told}"
            time.sleep(0.05)
        return time.monotonic() - began

    def until_step(self, step: int) -> None:
        self.until(lambda: step in self.losses(), f"step {step}")

    def resumed(self) -> int:
        """Steps that the last start found done."""
        found = re.findall(r"resumed from \S*-step(\d+)", self.log.read_text())
        return int(found[-1]) if found else 0

    def finish(self) -> dict[str, str]:
        job = self.cluster.wait(self.id, seconds=900)
        ended = {name: job[name] for name in ("JobState", "Reason", "ExitCode", "Restarts")}
        assert job["JobState"] == "COMPLETED", f"{self.log.read_text()[-6000:]}\n{ended}"
        assert (self.out / "stage0.done").exists()
        return job


# ---- faults --------------------------------------------------------------------------------------------------
class Fault:
    """What happens to a job in mid-stage, and afterwards, when its next start trains."""

    def inject(self, job: Job) -> None:
        raise AssertionError("each fault has its own")

    def afterwards(self, job: Job) -> None:
        """Nothing to mend."""


@dataclass
class PowerOff(Fault):
    """Of the job's node of that number; it boots again later."""

    number: int

    def inject(self, job: Job) -> None:
        self.node = job.hosts[self.number]
        job.cluster.power_off(self.node)

    def afterwards(self, job: Job) -> None:
        job.cluster.power_on(self.node)


@dataclass
class PulledCable(Fault):
    """Of the job's node of that number; plugged in again later.  Meanwhile its processes run on, and see the disk."""

    number: int

    def inject(self, job: Job) -> None:
        self.node = job.hosts[self.number]
        job.cluster.pull_cable(self.node)

    def afterwards(self, job: Job) -> None:
        job.cluster.plug_cable(self.node)


class Requeue(Fault):
    """By hand."""

    def inject(self, job: Job) -> None:
        done = job.cluster.run("scontrol", "requeue", str(job.id))
        assert done.returncode == 0, done.stderr


@dataclass
class Signal(Fault):
    """To one rank or loader's worker alone: SIGKILL ends it as a lack of memory does, SIGSTOP lets it stand still."""

    number: signal.Signals
    worker: bool = False

    def inject(self, job: Job) -> None:
        ranks = launch.rank_processes(job.out)
        workers = [pid for pid, parent in launch.training_processes(job.out).items() if parent in ranks]
        os.kill((workers if self.worker else ranks)[-1], self.number)


class TimeLimit(Fault):
    """Comes by itself."""

    def inject(self, job: Job) -> None:
        """Nothing to do."""


@dataclass(frozen=True)
class Survived:
    """How a job came through a fault."""

    detected: float
    """Seconds until the job was queued again"""
    redone: int
    """Steps that were trained twice"""
    starts: int


def survive(job: Job, fault: Fault) -> Survived:
    """Start a job, let a fault come in mid-stage, and see it to its end."""
    job.start()
    job.until_step(FAULT_AT)
    fault.inject(job)
    detected = job.until(lambda: job.restarts, "the fault is noticed")
    done = 0

    def resumed() -> bool:
        nonlocal done
        if "resumed from" in job.log.read_text():
            return True
        done = max(done, len(job.losses()))  # a job that is asked to stop ends its step
        return False

    job.until(resumed, "a new start")
    redone = done - job.resumed()
    fault.afterwards(job)
    job.finish()
    return Survived(detected, redone, job.restarts + 1)


def check(job: Job, reference: dict[int, float], survived: Survived) -> None:
    """Every step once, with the loss of an undisturbed run; one writer; little lost.  Raises AssertionError."""
    same_losses(job.out, reference)
    assert 0 <= survived.redone <= EVERY, survived
    lease = json.loads((job.out / "lease.json").read_text())
    assert lease["released"]  # by the last holder, in its own file
    assert lease["token"] == survived.starts, lease
    job.until(lambda: not launch.training_processes(job.out), "the earlier start's processes are gone", 90)


def same_losses(out: Path, reference: dict[int, float]) -> None:
    found = launch.losses(out)  # refuses a step that is there twice
    assert list(found) == list(reference), list(found)
    assert found == reference, {
        step: (found[step], reference[step]) for step in found if found[step] != reference[step]
    }


# ---- the table -----------------------------------------------------------------------------------------------
class Lab:
    """The cluster, and what undisturbed runs give."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.data = folder / "data"
        make_data(load_config(launch.TINY, {"data.path": str(self.data)}), lambda _: None)
        self._references: dict[int, dict[int, float]] = {}

    def reference(self, steps: int) -> dict[int, float]:
        if steps not in self._references:
            job = Job(self.cluster, self.folder / f"undisturbed{steps}", self.data, steps=steps).start()
            job.finish()
            self._references[steps] = job.losses()
        return self._references[steps]

    def measure(self, name: str, fault: Fault, **how: Any) -> list[str]:
        """A line of the table."""
        job = Job(self.cluster, self.folder / name.replace(" ", "-"), self.data, **how)
        reference = self.reference(job.steps)
        survived = survive(job, fault)
        check(job, reference, survived)
        detected = "at its signal" if isinstance(fault, TimeLimit) else f"{survived.detected:.1f}"
        return [name, detected, str(survived.redone), f"finished in {survived.starts} starts, all losses equal"]

    def chain(self, name: str) -> list[str]:
        """`submit_all.sh`, and a node that is lost in its second stage."""
        reference = self.folder / "undisturbed-chain"
        launch.train(reference, self.data, "--data.workers", "0", ranks=4)
        out = self.folder / "chain"
        env = Job(self.cluster, out, out / "shards").environment
        env |= {"EXTRA": "--data.workers 0", "SBATCH_EXTRA": "--nodes=4", "SBATCH_OUTPUT": f"{out}.%x.log"}
        done = self.cluster.run("slurm/submit_all.sh", env=env, cwd=launch.ROOT)
        assert done.returncode == 0, done.stderr
        jobs = {name: int(number) for name, number in re.findall(r"^(\w+): job (\d+)$", done.stdout, re.MULTILINE)}
        assert list(jobs) == ["prep", "stage0", "stage1", "stage2", "evaluate"]
        job = Job(self.cluster, out, self.data)
        job.id = jobs["stage1"]
        job.until_step(12)
        fault = PowerOff(-1)
        fault.inject(job)
        detected = job.until(lambda: job.restarts, "the fault is noticed")
        done_steps = max(job.losses()) + 1
        for stage, number in jobs.items():
            ended = self.cluster.wait(number, seconds=900)
            assert ended["JobState"] == "COMPLETED", Path(ended["StdOut"]).read_text()[-6000:]
            if stage == "stage1":
                resumed = re.findall(r"resumed from \S*stage1-step(\d+)", Path(ended["StdOut"]).read_text())
                redone = done_steps - 8 - int(resumed[-1] if resumed else 0)
        fault.afterwards(job)
        same_losses(out, launch.losses(reference))
        return [name, f"{detected:.1f}", str(redone), f"{len(jobs)} jobs completed, all losses equal"]


FAULTS: dict[str, Callable[[Lab, str], list[str]]] = {
    "scontrol requeue": lambda lab, name: lab.measure(name, Requeue()),
    "time limit, USR1 before it": lambda lab, name: lab.measure(
        name, TimeLimit(), steps=300, sbatch=["--time=2", "--signal=USR1@45"]
    ),
    "submit_all.sh, node lost in stage 1": lambda lab, name: lab.chain(name),
    "power off, last node": lambda lab, name: lab.measure(name, PowerOff(-1)),
    "power off, rank 0's node": lambda lab, name: lab.measure(name, PowerOff(0)),
    "cable pulled, rank 0's node": lambda lab, name: lab.measure(name, PulledCable(0)),
    "cable pulled, another node": lambda lab, name: lab.measure(name, PulledCable(2)),
    "one rank killed": lambda lab, name: lab.measure(name, Signal(signal.SIGKILL)),
    "one loader's worker killed": lambda lab, name: lab.measure(
        name, Signal(signal.SIGKILL, worker=True), settings={"data.workers": 1}
    ),
    "one rank stopped, hang_minutes 0.2": lambda lab, name: lab.measure(
        name, Signal(signal.SIGSTOP), settings={"train.hang_minutes": 0.2}
    ),
    "power off, 2 nodes x 2 tasks, LOCAL_DATA": lambda lab, name: lab.measure(
        name, PowerOff(-1), nodes=2, tasks=2, env={"LOCAL_DATA": str(lab.folder / "local")}
    ),
}


def main(*names: str) -> int:
    """Inject the faults whose names contain one of `names`, or all; print the table.  0: all survived."""
    if reason := unavailable():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    chosen = {name: run for name, run in FAULTS.items() if not names or any(part in name for part in names)}
    failed = 0
    print("| fault | detected after (s) | work redone (steps) | outcome |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="faults-", dir="/tmp") as folder, Cluster(nodes=6) as cluster:
        lab = Lab(cluster, Path(folder))
        for name, run in chosen.items():
            try:
                row = run(lab, name)
            except (AssertionError, TimeoutError) as error:
                failed += 1
                row = [name, "", "", f"FAILED: {' '.join(str(error).split())[-1500:]}"]
            print(f"| {' | '.join(row)} |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
