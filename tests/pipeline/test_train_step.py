"""What stops an update, and what a run's numbers survive."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from pipeline import distributed
from pipeline import train as command
from pipeline import update as module
from pipeline import validate as validation
from pipeline.data.batch import Batch, Row, collate, masked_row
from pipeline.data.unusable import Unusable
from pipeline.ds_config import Triangle
from pipeline.summary import stage_losses
from pipeline.update import Update
from pipeline.watching.guard import Guard, GuardState
from pipeline.watching.monitor import Monitor, Stopwatch
from pipeline.watching.watch import STOPPED
from tests.pipeline.test_plan import settings
from tests.pipeline.tiny import FORMAT

CPU = torch.device("cpu")


class Engine:
    """Answers with given numbers, and remembers whether it was stepped."""

    def __init__(self, nll: float, norm: float | None, overflow: bool = False) -> None:
        self.nll, self.norm, self.stepped = nll, norm, False
        self.optimizer = SimpleNamespace(param_groups=[{"weight_decay": 0.0}], overflow=overflow)

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return torch.tensor(self.nll), {}

    def backward(self, loss: torch.Tensor) -> None: ...

    def step(self) -> None:
        self.stepped = True

    def get_global_grad_norm(self) -> float | None:
        return self.norm


@pytest.fixture
def update(monkeypatch: pytest.MonkeyPatch) -> Update:
    monkeypatch.setattr(module, "total", lambda values, device: [float(value) for value in values])
    monkeypatch.setattr(distributed, "gather", lambda value: [value])
    update: Any = Update.__new__(Update)
    update.config, update.triangle, update.world = settings(), Triangle(2, 2, 1, 1), distributed.World()
    update.stop = SimpleNamespace(requested=False)

    def give_up(*told: str) -> None:
        raise UserError(*told, "and the checkpoint that was being written is complete")

    update.keeper = SimpleNamespace(report=lambda: 0, agree=lambda reports: None, give_up=give_up)
    update.said = []
    log: Any = SimpleNamespace(warning=lambda *a: update.said.append(a[0] % a[1:]))
    update.unusable = Unusable(100, log, Path("logs"))
    return update


def rows(*targets: int) -> list[Batch]:
    """One micro-batch; a row without any target is too long."""
    made = [
        Row(f"row{i}", i, [10], np.zeros((3, 1), dtype=np.int64), target_ids=[11] * n)
        if n
        else masked_row(FORMAT, f"row{i}", overlong=True)
        for i, n in enumerate(targets)
    ]
    return [collate(made, FORMAT, 0)]


def step(update: Any, batches: list[Batch], nll: float = 2.0, norm: float | None = 1.0) -> Any:
    update.engine = Engine(nll, norm)
    return update(batches, 1e-3, 4, Stopwatch(CPU, exact=False), CPU)


def test_sound_step(update: Any) -> None:
    result = step(update, rows(2, 0))
    assert (result.loss, result.grad_norm, update.unusable.overlong) == (1.0, 1.0, 1)
    assert step(update, rows(2, 0), norm=None).grad_norm == 0.0


def test_step_of_nothing_is_refused(update: Any) -> None:
    with pytest.raises(UserError, match="no row of step 5 can be trained on: 2 are longer than .* 3400(.|\n)*complete"):
        step(update, rows(0, 0))
    assert not update.engine.stepped


def test_a_step_of_bad_rows_is_taken(update: Any) -> None:
    """They are few, as data.max_bad says: the run goes on."""
    step(update, [collate([masked_row(FORMAT, "row0", "torn")], FORMAT, 0)])
    assert update.said == ["skipped row0: torn"] and update.engine.stepped


def test_bad_samples_are_named_sparingly(update: Any) -> None:
    """Some lines a minute, then a count, so that a bad disk does not fill another one; past the limit the run stops."""

    def bad(first: int, last: int) -> None:
        step(update, [collate([masked_row(FORMAT, f"row{n}", "torn") for n in range(first, last)], FORMAT, 0)])

    now = [0.0]
    update.unusable.max_bad, update.unusable.sparing.clock = 50, lambda: now[0]
    bad(10, 40)
    assert update.said == [f"skipped row{n}: torn" for n in range(10, 30)]
    now[0] = 61.0
    bad(30, 60)  # ten of them are known
    assert update.said[20:22] == ["... and 10 more lines like these", "skipped row40: torn"] and len(update.said) == 41
    with pytest.raises(UserError, match=r"51 samples could not be used, more than data.max_bad 50"):
        bad(60, 61)
    assert update.said[41:] == ["... and 1 more lines like these"]


def test_a_sample_counts_once_whatever_its_reason(update: Any) -> None:
    """The same in another epoch, when the disk says something else; and a name may hold what stands behind names."""
    update.unusable.max_bad = 2
    for reason in ("torn", "gone", "torn"):
        step(update, [collate([masked_row(FORMAT, f"my: data/{n}", reason) for n in range(2)], FORMAT, 0)])
    assert (
        update.said == ["skipped my: data/0: torn", "skipped my: data/1: torn"] and len(update.unusable.bad_keys) == 2
    )


def test_max_bad_is_a_short_form(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def plan(config: Any, *_: Any) -> None:
        given.append(config.data)
        raise UserError("as far as this test goes")

    monkeypatch.setattr(command, "make_plan", plan)
    for options in ({"max_bad": 7}, {"data.max_bad": "7"}):
        with pytest.raises(UserError, match="as far as"):
            command.main(ds=Path("x.json"), data="d", **options)
    assert [(data.max_bad, data.path) for data in given] == [(7, "d")] * 2


def test_asked_to_stop_while_going_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal may have ended the converter, too: that is a stop, after which the job is queued again."""
    monkeypatch.setattr(command, "total", lambda values, device: [float(value) for value in values])
    run: Any = command.Run.__new__(command.Run)
    run.guard = Guard(1, 0.0, GuardState(in_a_row=1))
    run.config, run.out, run.device, run.stop = settings(), Path("run"), CPU, SimpleNamespace(requested=True)
    run.monitor = SimpleNamespace(mark=lambda *_: None, scalars=lambda *_: None)
    said = []
    run.log = SimpleNamespace(warning=lambda *_: None, info=lambda *a: said.append(a[0] % a[1:]))

    def load(start: Any) -> None:
        raise UserError("it cannot be converted: status -15")

    start = SimpleNamespace(path=Path("stage0-step000003"))
    run.keeper = SimpleNamespace(roll_back=lambda told, recovered: start, load=load)
    with pytest.raises(SystemExit) as end:
        run._tell_wrong(0, 5, 4, 1e-3, "loss nan", [])
    assert end.value.code == STOPPED
    assert said == ["stopped on request while going back to stage0-step000003; start again to go on"]
    run.stop.requested = False
    with pytest.raises(UserError, match="it cannot be converted"):
        run._tell_wrong(0, 5, 4, 1e-3, "loss nan", [])


# ---- validation -------------------------------------------------------------------------------
def test_validation_says_how_many_rows_it_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty slot counts as nothing; a row that is bad or too long as one that could not be used."""
    monkeypatch.setattr(validation, "total", lambda values, device: [float(value) for value in values])
    batch = collate(
        [*(masked_row(FORMAT, "row0", bad, overlong) for bad, overlong in (("torn", False), ("", True))),
         masked_row(FORMAT), Row("row3", 3, [10], np.zeros((3, 1), dtype=np.int64), target_ids=[11])],
        FORMAT, 0,
    )  # fmt: skip
    example: Any = SimpleNamespace(choices=["a", "b"], answer=1)
    builder: Any = SimpleNamespace(
        processor=SimpleNamespace(eos_id=1, decode=lambda ids: "Therefore, the answer is B"),
        config=SimpleNamespace(answer="letter"),
    )

    class Validated(Engine):
        def __call__(self, batch: Batch, answer: Any = None) -> Any:
            return ([[1]] * 4, [3] * 4) if answer else super().__call__(batch)

        def zero_optimization_partition_weights(self) -> bool:
            return False

        def eval(self) -> None: ...

        def train(self) -> None: ...

    data = validation.ValidationSet([batch], [[None, None, None, example]])
    found = validation.validate(Validated(2.0, 1.0), data, builder, 4, CPU)
    assert found == {
        "val/loss": 2.0, "val/accuracy": 1.0, "val/autoregressive_steps": 3.0, "val/rows": 1.0,
        "val/unusable_rows": 2.0,
    }  # fmt: skip


# ---- metrics.jsonl ----------------------------------------------------------------------------
LINES = ['{"global_step": 0, "stage": 0, "loss": 3.0}', "\0\0", '{"global_step": 1, "stage": 0, "loss": 2.0}']


def test_metrics_after_a_crash(tmp_path: Path) -> None:
    """Lines from the first step on go, and so do damaged ones."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*LINES, '{"global_step": 2, "stage": 0, "loss": 1.0}', '{"global_st']))
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged in line 2"):
        stage_losses(tmp_path)
    Monitor(tmp_path, True, 2, "", lambda: None).close()
    assert [json.loads(line)["global_step"] for line in path.read_text().splitlines()] == [0, 1]
    assert stage_losses(tmp_path) == ({0: 2}, {0: 2.5})


def test_metrics_where_nothing_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    Monitor(tmp_path, True, None, "", lambda: None).close()
    assert path.read_text() == "\n".join(LINES) + "\n"
