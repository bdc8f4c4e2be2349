"""Command: which of a job's nodes are fit for training.  slurm/run_stage.sh starts it before a stage.

`health.py check` runs once on every node: it imports the packages, uses the run's disk, the GPUs and local space, and
prints what it found as a line of JSON.  `health.py judge` reads the lines of all nodes, names those that are not fit,
and writes them to OUT/bad_nodes.

Uses the standard library alone until a node's packages are tried: that they are missing is one of the findings, and the
node that judges need not have them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = ("numpy", "PIL", "torch", "transformers", "deepspeed", "safetensors")
SPACE = {"/tmp": 512, "/dev/shm": 64}
"""MB that must be free: of temporary files, and of what loaders and NCCL share."""
SKEW = 10.0
"""Seconds that a node's clock may be off: leases and markers are judged by it."""
CPU_BUILD = "PyTorch's CPU build is installed: run ./install.sh on a node with GPUs, or set TASKS_PER_NODE for CPUs"
UNFIT, HOPELESS = 3, 4
"""Exit status of a judgement: some nodes are not fit; none is, or by what they share, so that others would not help."""


@dataclass
class Answer:
    """What a node says of itself."""

    node: str
    time: float
    """Its clock, in seconds since 1970"""
    gpus: int = 0
    """GPUs that torch sees"""
    problems: list[str] = field(default_factory=list)
    cpu_build: bool = False
    """Whether torch can never see any GPU"""


# ---- on each node --------------------------------------------------------------------------------------------
def check(folder: Path, word: str) -> Answer:
    """Look at this node.

    folder: of the run's disk, where `word` lies as another node wrote it; the node leaves its own there.
    """
    answer = Answer(os.environ.get("SLURMD_NODENAME") or socket.gethostname(), time.time())
    _try(answer, "packages", imports)
    _try(answer, "run folder", lambda: shared(folder, word, answer.node))
    for place, least in SPACE.items():
        _try(answer, place, lambda place=place, least=least: space(place, least))  # type: ignore[misc]
    if not answer.problems:
        _try(answer, "GPU", lambda: setattr(answer, "gpus", gpus()))
        answer.cpu_build = answer.gpus == 0 and is_cpu_build()
    return answer


def _try(answer: Answer, what: str, look: Callable[[], object]) -> None:
    """Note how a look fails, whatever is raised by libraries and drivers."""
    try:
        look()
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        answer.problems.append(f"{what}: {told}" if isinstance(error, Unfit) else f"{what}: {_kind(error)}: {told}")


def _kind(error: Exception) -> str:
    return type(error).__name__


class Unfit(Exception):
    """What is wrong, in words."""


def imports() -> None:
    """Raises what the first package raises that cannot be imported."""
    for name in PACKAGES:
        importlib.import_module(name)


def shared(folder: Path, word: str, node: str) -> None:
    """Read what another node wrote to the run's disk, and write there."""
    for _ in range(20):  # a network file system may take a moment
        if (folder / "word").exists():
            break
        time.sleep(0.25)
    else:
        raise Unfit(f"{folder}, which another node made, is not there")
    if (folder / "word").read_text() != word:
        raise Unfit(f"{folder / 'word'} is not as another node wrote it")
    with open(folder / node, "w") as file:
        file.write(word)
        file.flush()
        os.fsync(file.fileno())


def space(place: str, least: int) -> None:
    free = shutil.disk_usage(place).free // 2**20
    if free < least:
        raise Unfit(f"{free} MB free, less than {least}")


def is_cpu_build() -> bool:
    import torch

    return torch.version.cuda is None and torch.version.hip is None


def gpus() -> int:
    """Number of GPUs; each must multiply two matrices right.  0 where torch sees none."""
    import torch

    if not torch.cuda.is_available():
        return 0
    # small whole numbers: exact in every format and order
    left = (torch.arange(256 * 256) % 7 - 3).reshape(256, 256).float()
    right = (torch.arange(256 * 256) % 5 - 2).reshape(256, 256).float()
    expected = left @ right
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        try:
            found = (left.to(device) @ right.to(device)).cpu()
        except Exception as error:
            raise Unfit(f"number {number} fails: {_kind(error)}: {error}") from None
        if not torch.equal(found, expected):
            raise Unfit(f"number {number} multiplies two matrices wrong")
    return torch.cuda.device_count()


# ---- on the node of the batch script -------------------------------------------------------------------------
def read_answers(lines: Iterable[str]) -> dict[str, Answer]:
    """Answers by node, from among whatever libraries print."""
    found = {}
    for line in lines:
        try:
            answer = Answer(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[answer.node] = answer
    return found


def judge(
    nodes: list[str],
    answers: dict[str, Answer],
    folder: Path,
    word: str,
    gpus: int,
    asked: float,
    limit: float,
    cpus_do: bool = True,
) -> dict[str, str]:
    """Reasons by node that is not fit.

    gpus: of each node, as the job asked for; asked: when the nodes were asked, by the clock here; limit: seconds that
    they had; cpus_do: where torch sees no GPU on any node, this is a run on CPUs, and nothing is expected.
    """
    now = time.time()
    with_gpus = not cpus_do or any(answer.gpus for answer in answers.values())
    bad = {}
    for node in nodes:
        answer = answers.get(node)
        if answer is None:
            bad[node] = f"did not answer within {limit:.0f} s"
            continue
        problems = list(answer.problems)
        if not problems and _text(folder / node) != word:
            problems.append("run folder: what it wrote there cannot be seen here")
        if not problems and with_gpus and answer.gpus < gpus:
            told = f"GPU: torch sees {answer.gpus} of {gpus}"
            problems.append(told + (f"; {CPU_BUILD}" if answer.cpu_build else ""))
        off = max(asked - answer.time, answer.time - now)
        if off > SKEW:
            problems.append(f"clock: at least {off:.0f} s {'behind' if answer.time < asked else 'ahead'}")
        if problems:
            bad[node] = "; ".join(problems)
    return bad


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def note(file: Path, bad: dict[str, str], job: str) -> None:
    """Append to the run's list of bad nodes: time, job, node, reason."""
    when = time.strftime("%Y-%m-%d %H:%M:%S")
    with open(file, "a") as out:
        out.writelines(f"{when}\tjob {job}\t{node}\t{reason}\n" for node, reason in bad.items())


# ---- command -------------------------------------------------------------------------------------------------
def main(words: list[str]) -> int:
    """0: fit.  `UNFIT`: the unfit nodes are on stdout, one a line.  `HOPELESS`: no node is fit, or none answered."""
    parser = argparse.ArgumentParser(prog="health.py")
    parser.add_argument("what", choices=["check", "judge"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--word", required=True)
    parser.add_argument("--answers", type=Path)
    parser.add_argument("--nodes", default="")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--cpus_do", action="store_true")
    parser.add_argument("--asked", type=float, default=0.0)
    parser.add_argument("--limit", type=float, default=0.0)
    parser.add_argument("--note", type=Path)
    given: Any = parser.parse_args(words)
    if given.what == "check":
        # in one piece, whatever a library leaves on the line
        sys.stdout.write("\n" + json.dumps(asdict(check(given.folder, given.word))) + "\n")
        sys.stdout.flush()
        os._exit(0)  # no library's goodbyes: a driver that hangs in them is found out by training
    nodes = given.nodes.split()
    answers = read_answers(given.answers.read_text(errors="replace").splitlines())
    bad = judge(nodes, answers, given.folder, given.word, given.gpus, given.asked, given.limit, given.cpus_do)
    for node, reason in bad.items():
        print(f"node {node} is not fit: {reason}", file=sys.stderr)
    if not bad:
        return 0
    if len(nodes) > 1 and len(bad) == len(nodes) or any(CPU_BUILD in reason for reason in bad.values()):
        return HOPELESS
    note(given.note, bad, os.environ.get("SLURM_JOB_ID", ""))
    print(*bad, sep="\n")
    return UNFIT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
