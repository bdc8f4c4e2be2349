"""Ranks that do not begin with the same thing end together, before anything is made, and one of them says why."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_prep.errors import PassingFault, UserError
from pipeline import distributed
from pipeline import train as training
from pipeline.agreement import ABSENT, SHOWN, agreed, code_hashes, disagreements, facts_of_inputs, versions
from pipeline.distributed import World
from tests import launch
from tests.launch import ROOT, TINY
from tests.ranks import on_ranks

HOST = socket.gethostname()


# ---- what is said -----------------------------------------------------------------------------------------------
def test_nothing_differs() -> None:
    assert disagreements([("a", {"x": 1, "y": [None, "z"]}, ())] * 3) == []


def test_a_line_for_each_difference() -> None:
    facts: list[dict[str, Any]] = [{"optim.lr": 1e-3, "same": 0, "stage": 1} for _ in range(9)]
    facts[2]["optim.lr"] = facts[5]["optim.lr"] = 1e-4
    facts[8] = {"optim.lr": 1e-3, "same": 0, "more": True}
    hosts = [f"node{1 + rank // 2}" for rank in range(9)]
    assert disagreements([(host, found, ()) for host, found in zip(hosts, facts, strict=True)]) == [
        "ranks differ in optim.lr: 0.001 on ranks 0, 1, 3, 4, 6-8 (node1, node2, node3 and 2 more);"
        " 0.0001 on ranks 2, 5 (node2, node3)",
        f"ranks differ in stage: 1 on ranks 0-7 (node1, node2, node3 and 1 more); {ABSENT} on rank 8 (node5)",
        f"ranks differ in more: {ABSENT} on ranks 0-7 (node1, node2, node3 and 1 more); true on rank 8 (node5)",
    ]


def test_many_differences_are_counted() -> None:
    lines = disagreements([("a", {str(n): rank for n in range(100)}, ()) for rank in range(2)])
    assert len(lines) == SHOWN + 1 and lines[-1] == f"ranks differ in {100 - SHOWN} more settings or files"


def test_mistakes_come_first() -> None:
    """A rank with one may lack its facts; what all have, or rank 0, is said as it is."""
    every = [("a", {"x": 1}, ("all",)), ("b", {}, ("all", "mine")), ("c", {"x": 2}, ("all",))]
    assert disagreements(every) == ["all", "on rank 1 (b): mine"]
    assert disagreements([("a", {"x": 1}, ()), ("b", {}, ("mine",)), ("c", {"x": 2}, ())]) == [
        "on rank 1 (b): mine", "ranks differ in x: 1 on rank 0 (a); 2 on rank 2 (c)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("theirs", "kind"),
    [(None, PassingFault), (PassingFault("away, too"), PassingFault), (UserError("a mistake"), UserError)],
    ids=str,
)
def test_faults_that_pass_stay_such(
    monkeypatch: pytest.MonkeyPatch, theirs: UserError | None, kind: type[UserError]
) -> None:
    """For every rank, unless one has made a mistake besides."""
    monkeypatch.setattr(distributed, "gather", lambda ours: [ours, (HOST, {}, theirs)])
    with pytest.raises(UserError) as told, agreed():
        raise PassingFault("the run folder is away")
    assert type(told.value) is kind and any("the run folder is away" in line for line in told.value.lines)


def test_code_and_versions() -> None:
    names = code_hashes().keys()
    assert {"pipeline/train.py", "pipeline/latent/forward.py", "data_prep/reader.py"} <= names
    assert {"the version of Python", "the version of torch", "the version of deepspeed"} <= versions().keys()


# ---- real ranks -------------------------------------------------------------------------------------------------
def told(data: Path, out: Path, *, second: dict[str, str], change: Any = None) -> str:
    """What both of two ranks raise, where the second has other options, or `change` made to it."""

    def start(world: World) -> None:
        options: dict[str, str] = {"data": str(data)} | (second if world.rank else {})
        if world.rank and change:
            change()
        training.main(ds=ROOT / "ds_configs" / "zero3.json", recipe=str(TINY), out=out, **options)  # type: ignore[arg-type]

    errors = on_ranks(2, start, meet=False)
    assert all(isinstance(error, UserError) for error in errors), errors
    assert str(errors[0]) == str(errors[1])
    lease = out / "lease.json"
    assert not lease.exists() or json.loads(lease.read_text())["released"]
    assert not (out / "config.yaml").exists() and not (out / "base").exists()
    return str(errors[0])


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [("optim.lr", "0.001", "0.0001"), ("train.checkpoint_every", "3", "4"), ("train.seed", "0", "1")],
)
def test_other_settings(data: Path, tmp_path: Path, name: str, ours: str, theirs: str) -> None:
    """Also one that no number depends on: the ranks would not meet in a checkpoint."""
    line = f"ranks differ in {name}: {ours} on rank 0 ({HOST}); {theirs} on rank 1 ({HOST})"
    assert told(data, tmp_path / "run", second={name: theirs}) == line


def test_other_data(data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    said = told(data, tmp_path / "run", second={"data": str(copy)})
    assert said == f"ranks differ in data.path: {data} on rank 0 ({HOST}); {copy} on rank 1 ({HOST})"


def test_a_mistake_of_one_rank(data: Path, tmp_path: Path) -> None:
    """Found before the process group is there; the other rank does not wait for it."""
    said = told(data, tmp_path / "run", second={"data": "/nowhere/at/all", "data.source": "none"})
    assert said.startswith(f"on rank 1 ({HOST}): the shard folder /nowhere/at/all is not there; ")


def test_other_plugin(data: Path, tmp_path: Path) -> None:
    """The text under one name; each node may have its own copy of it."""
    plugin = tmp_path / "plugin.py"
    text = "from pipeline.latent.parts import FEEDBACKS, Feedback\n@FEEDBACKS.add('own')\nclass Own(Feedback):\n"
    text += "    def forward(self, reading):\n        return reading.tip[:, None]\n"
    plugin.write_text(text)

    def start(world: World) -> None:
        if world.rank:
            read = Path.read_bytes
            Path.read_bytes = lambda path: read(path) + (b"# edited" if path == plugin else b"")  # type: ignore[method-assign]
        options: Any = {"plugin": str(plugin), "latent.feedback": "own", "data": str(data)}
        training.main(ds=ROOT / "ds_configs" / "zero3.json", recipe=str(TINY), out=tmp_path / "run", **options)

    errors = on_ranks(2, start, meet=False)
    assert [str(error).count("ranks differ in the text of plugin.py") for error in errors] == [1, 1]


def test_data_of_one_name(tmp_path: Path) -> None:
    """Nodes with a disk of their own may have another folder at the same path: its index tells."""

    def compare(world: World) -> None:
        folder, index = tmp_path / str(world.rank), SimpleNamespace(index_hash=f"{world.rank}" * 8)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(7 + world.rank))
        (folder / "tokenizer.json").write_text("{}" + " " * world.rank)
        with agreed() as facts:
            facts |= facts_of_inputs({"train": index}, folder, None)  # type: ignore[dict-item]

    errors = on_ranks(2, compare)
    assert str(errors[0]) == str(errors[1])
    assert [line.partition(":")[0] for line in str(errors[0]).splitlines()] == [
        "ranks differ in the train split of the data", "ranks differ in the base model's config and tokenizer",
        "ranks differ in the bytes of the base model's model.safetensors",
    ]  # fmt: skip


def test_edited_code_through_the_command(data: Path, tmp_path: Path) -> None:
    """As users start it: one rank runs another copy of the code. Both end with 2, and it is said once."""
    copy, out = tmp_path / "copy", tmp_path / "run"
    copy.mkdir()
    for part in ("pipeline", "data_prep", "ds_configs", "recipes"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    edited = copy / "pipeline" / "loss.py"
    edited.write_text(edited.read_text() + "# edited\n")
    port = str(launch.free_port())
    ranks = [
        launch.start(
            [sys.executable, *launch.arguments(out, data), *options], out, cwd=root,
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )
        for rank, (root, options) in enumerate([(ROOT, []), (copy, ["--train.log_every", "3"])])
    ]  # fmt: skip
    try:
        assert launch.wait(ranks[0], out, 120) == 2
    finally:
        for rank in ranks:
            launch.kill_tree(rank)
    log = Path(f"{out}.log").read_text()
    assert log.count("ranks differ in the text of pipeline/loss.py: ") == 1, log
    assert log.count(f"ranks differ in train.log_every: 2 on rank 0 ({HOST}); 3 on rank 1 ({HOST})") == 1
    assert "Traceback" not in log and log.count("error: ") == 2
