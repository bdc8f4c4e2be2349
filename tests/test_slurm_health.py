"""slurm/health.py: what a node says of itself, and who is judged fit."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

ON_GPU = [torch.device("cuda", 0), torch.device("cuda", 1)]
PROGRAM = Path(__file__).resolve().parents[1] / "slurm" / "health.py"


@pytest.fixture
def health(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """The program's names."""
    module = types.ModuleType("health")
    module.__file__ = str(PROGRAM)
    monkeypatch.setitem(sys.modules, "health", module)  # dataclasses look their module up
    exec(compile(PROGRAM.read_text(), PROGRAM, "exec"), module.__dict__)
    monkeypatch.setenv("SLURMD_NODENAME", "node1")
    return module  # type: ignore[return-value]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "word").write_text("w")
    return tmp_path


def test_a_sound_node(health: Any, folder: Path) -> None:
    before = time.time()
    answer = health.check(folder, "w")
    assert (answer.node, answer.problems) == ("node1", [])
    assert before <= answer.time <= time.time()
    assert (folder / "node1").read_text() == "w"
    assert health.judge(["node1"], {"node1": answer}, folder, "w", 8, before, 60.0) == {}


def test_what_a_node_finds_wrong(health: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, not the first."""
    health.PACKAGES = ("json", "no_such_package")
    health.SPACE = {"/dev/shm": 10**9}
    (folder / "word").write_text("another's")
    packages, shared, space = health.check(folder, "w").problems
    assert packages == "packages: ModuleNotFoundError: No module named 'no_such_package'"
    assert shared == f"run folder: {folder}/word is not as another node wrote it"
    assert space.startswith("/dev/shm: ")
    assert space.endswith(" MB free, less than 1000000000")
    monkeypatch.setattr(health.time, "sleep", lambda _: None)
    (problem,) = [text for text in health.check(folder / "absent", "w").problems if text.startswith("run folder: ")]
    assert problem.endswith("absent, which another node made, is not there")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [(None, []), (1.0, ["GPU: number 1 multiplies two matrices wrong"]),
     (RuntimeError("uncorrectable ECC error"), ["GPU: number 1 fails: RuntimeError: uncorrectable ECC error"])],
)  # fmt: skip
def test_gpus(health: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, wrong: Any, told: list[str]) -> None:
    """Two, of which the second adds `wrong` to what it computes, or raises it."""

    class OnGpu:
        def __init__(self, matrix: torch.Tensor, number: int) -> None:
            self.matrix, self.number = matrix, number

        def __matmul__(self, other: OnGpu) -> OnGpu:
            if self.number and isinstance(wrong, Exception):
                raise wrong
            return OnGpu(self.matrix @ other.matrix + (self.number and wrong or 0.0), self.number)

        def cpu(self) -> torch.Tensor:
            return self.matrix

    health.PACKAGES = ()
    to = torch.Tensor.to
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *to_: OnGpu(x, to_[0].index) if to_[0] in ON_GPU else to(x, *to_))
    answer = health.check(folder, "w")
    assert answer.problems == told
    assert answer.gpus == (0 if told else 2)


def test_judgement(health: Any, folder: Path) -> None:
    now = time.time()
    nodes = [f"node{n}" for n in range(1, 8)]
    answers = {
        "node1": health.Answer("node1", now, 8),
        "node2": health.Answer("node2", now, 7),
        "node3": health.Answer("node3", now - 100, 8),
        "node4": health.Answer("node4", now + 100, 8),
        "node5": health.Answer("node5", now, 8),  # its file is not there
        "node6": health.Answer("node6", now, 0, ["GPU: number 3 fails", "/tmp: full"]),
    }
    for node in nodes:
        if node != "node5":
            (folder / node).write_text("w")
    bad = health.judge(nodes, answers, folder, "w", 8, now - 1, 60.0)
    assert bad == {
        "node2": "GPU: torch sees 7 of 8",
        "node3": "clock: at least 99 s behind",
        "node4": bad["node4"],
        "node5": "run folder: what it wrote there cannot be seen here",
        "node6": "GPU: number 3 fails; /tmp: full",
        "node7": "did not answer within 60 s",
    }
    assert bad["node4"].endswith(" s ahead")


def test_a_node_without_gpus_among_others(health: Any, folder: Path) -> None:
    """Its driver has failed; where no node sees any, training is on CPUs."""
    now = time.time()
    for node in ("node1", "node2"):
        (folder / node).write_text("w")
    answers = {"node1": health.Answer("node1", now), "node2": health.Answer("node2", now)}
    assert health.judge(["node1", "node2"], answers, folder, "w", 8, now, 60.0) == {}
    answers["node2"].gpus = 8
    assert health.judge(["node1", "node2"], answers, folder, "w", 8, now, 60.0) == {"node1": "GPU: torch sees 0 of 8"}


def test_gpus_that_nobody_sees_where_they_are_wanted(health: Any, folder: Path) -> None:
    """Else a job's GPUs would idle all night."""
    now = time.time()
    (folder / "node1").write_text("w")
    answers = {"node1": health.Answer("node1", now)}

    def judged() -> dict[str, str]:
        return health.judge(["node1"], answers, folder, "w", 8, now, 60.0, cpus_do=False)

    assert judged() == {"node1": "GPU: torch sees 0 of 8"}
    answers["node1"].cpu_build = True
    assert judged() == {"node1": f"GPU: torch sees 0 of 8; {health.CPU_BUILD}"}
    answers["node1"].gpus = 8
    assert judged() == {}


def test_the_command(folder: Path) -> None:
    """A line of JSON among what libraries print; the judge names the unfit, and keeps them."""
    lines = ["[INFO] a library's", '{"node": 1}', "[1]", json.dumps({"node": "node1", "time": time.time()})]
    (folder / "answers").write_text("\n".join(lines) + "\n")
    (folder / "node1").write_text("w")
    about = [
        "--folder",
        str(folder),
        "--word",
        "w",
        "--answers",
        str(folder / "answers"),
        "--note",
        str(folder / "bad"),
    ]

    def judged(nodes: str, *cpus: str) -> tuple[int, str, str]:
        more = ["--nodes", nodes, "--gpus", "8", "--asked", str(time.time() - 5), "--limit", "9", *cpus]
        command = [sys.executable, "-IS", str(PROGRAM), "judge", *about, *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    assert judged("node1", "--cpus_do") == (0, "", "")
    assert judged("node1\nnode2", "--cpus_do") == (3, "node2\n", "node node2 is not fit: did not answer within 9 s\n")
    assert judged("node3 node2")[0] == 4
    (line,) = (folder / "bad").read_text().splitlines()
    assert line.endswith("\tnode2\tdid not answer within 9 s")
    assert runpy.run_path(str(PROGRAM))["UNFIT"] == 3
    answer = {"node": "node1", "time": time.time(), "cpu_build": True}
    (folder / "answers").write_text(json.dumps(answer) + "\n")
    assert judged("node1")[0] == 4
