"""Conversion for another number of ranks: made once, whole or absent; what DeepSpeed leaves out; the traced order."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_prep.errors import UserError
from data_prep.files import sha256
from pipeline import distributed
from pipeline import train as training
from pipeline.data.order import rank_share
from pipeline.distributed import World
from pipeline.engine import set_hyperparameters
from pipeline.keeping import elastic
from pipeline.keeping.state import Checkpoint, refuse_damaged
from tests.pipeline.test_plan import STATE, settings, write_checkpoint

LOG: Any = SimpleNamespace(info=print)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "gather", lambda value: [value])
    monkeypatch.setattr(distributed, "from_main", lambda value: value)
    monkeypatch.setattr(distributed, "barrier", lambda: None)


def test_converted_once(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made anew from another checkpoint of the same name, and what a killed start left is removed."""
    made = []

    def write(checkpoint: Checkpoint, folder: Path) -> None:
        made.append(folder)
        (folder / "zero").mkdir(parents=True)
        (folder / "zero" / "a.pt").write_text("weights")

    monkeypatch.setattr(elastic, "write_universal", write)
    source = Checkpoint(write_checkpoint(tmp_path, STATE), STATE)
    (tmp_path / "checkpoints" / "universal" / "writing-dead" / "zero").mkdir(parents=True)
    first = elastic.convert(source, World(), LOG)
    assert elastic.convert(source, World(), LOG) == first and len(made) == 1
    assert set(json.loads((first.path / "manifest.json").read_text())) == {"state.json", "zero/a.pt"}
    refuse_damaged(first, World())
    (source.path / "manifest.json").write_text('{"more": {}}')
    second = elastic.convert(source, World(), LOG)
    assert len(made) == 2 and [p.name for p in second.path.parent.iterdir()] == [second.path.name]
    (second.path / "zero" / "a.pt").write_text("WEIGHTS")
    with pytest.raises(UserError, match=r"universal/stage0-step000008-\w+: zero/a.pt is damaged; remove this folder"):
        refuse_damaged(second, World())
    elastic.remove_converted(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [source.path.name]


def test_damaged_checkpoint_is_not_converted(tmp_path: Path, alone: None) -> None:
    source = Checkpoint(write_checkpoint(tmp_path, STATE), STATE)
    entry = {"bytes": 1, "sha256": sha256(source.path / "state.json")}
    (source.path / "manifest.json").write_text(json.dumps({"state.json": entry}))
    engine: Any = SimpleNamespace(zero_optimization_stage=lambda: 2)
    with pytest.raises(UserError, match=r"state.json is damaged"):
        elastic.load(engine, source, World(), False, LOG)


def test_failed_conversion(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Traceback (most recent call last):\n  ...\nRuntimeError: something is missing\n\n"
    monkeypatch.setattr(elastic, "run_to_end", lambda command, **_: (1, said))
    source = Checkpoint(write_checkpoint(tmp_path, STATE), STATE)
    with pytest.raises(UserError, match=r"step000008 cannot be converted .*: RuntimeError: something is missing$"):
        elastic.convert(source, World(), LOG)


def test_disk_full_while_converting(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by all ranks, which wait for rank 0; what was written, as large as the checkpoint, goes."""

    def write(checkpoint: Checkpoint, folder: Path) -> None:
        folder.mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(elastic, "write_universal", write)
    source = Checkpoint(write_checkpoint(tmp_path, STATE), STATE)
    with pytest.raises(UserError, match=r"step000008 cannot be converted .*No space left on device$"):
        elastic.convert(source, World(), LOG)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [source.path.name]


def test_rest_of_shared_weights(tmp_path: Path) -> None:
    """ZeRO-3: frozen weights from every rank's part, and buffers as they are; what is trained stays out."""
    frozen = torch.arange(7.0)
    for rank in range(3):
        part = torch.nn.functional.pad(frozen, (0, 2))[3 * rank : 3 * rank + 3]
        saved = {
            "module": {"trained": torch.empty(0), "frozen": torch.empty(0), "ids": torch.tensor([2**40])},
            "buffer_names": ["ids"],
            "frozen_param_shapes": {"frozen": torch.Size([7, 1])},
            "frozen_param_fragments": {"frozen": part},
        }
        torch.save(saved, tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    found = elastic.rest_of(tmp_path, 3, 3)
    assert found.keys() == {"frozen", "ids"}
    assert torch.equal(found["frozen"], frozen.view(7, 1)) and found["ids"].tolist() == [2**40]


def test_rest_of_whole_weights(tmp_path: Path) -> None:
    module = {name: torch.ones(2) for name in ("trained", "tied", "frozen", "buffer")}
    saved = {"module": module, "param_shapes": [{}, {"trained": (2,)}], "shared_params": {"tied": "trained"}}
    torch.save(saved, tmp_path / "mp_rank_00_model_states.pt")
    assert elastic.rest_of(tmp_path, 2, 3).keys() == {"frozen", "buffer"}


def test_put_back(tmp_path: Path) -> None:
    def model(value: float) -> torch.nn.Module:
        module = torch.nn.BatchNorm1d(2)
        module.bias.requires_grad_(False)
        return module.apply(lambda m: [t.fill_(value) for t in m.state_dict().values()])  # type: ignore[func-returns-value]

    saved, module, file = model(3), model(0), tmp_path / "rest.safetensors"
    rest = {name: value for name, value in saved.state_dict().items() if name != "weight"}
    elastic.save_file(rest, file)
    elastic.put_back(module, file, without_frozen=False)
    assert module.bias.tolist() == module.running_var.tolist() == [3, 3] and int(module.num_batches_tracked) == 3
    assert module.weight.tolist() == [0, 0], "trained"
    elastic.save_file({"running_mean": torch.ones(2)}, file)
    elastic.put_back(module, file, without_frozen=True)
    assert module.bias.tolist() == [3, 3] and module.running_mean.tolist() == [1, 1]
    with pytest.raises(AssertionError, match="lacks"):
        elastic.put_back(module, file, without_frozen=False)


def test_decay_after_a_load_that_gave_all_groups_the_first_ones() -> None:
    groups = [{"lr": 1.0, "weight_decay": 0.5}, {"lr": 1.0, "weight_decay": 0.5}]
    engine: Any = SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups))
    set_hyperparameters(engine, settings(**{"optim.weight_decay": "0.25"}).optim, 0.125)
    assert groups == [{"lr": 0.125, "weight_decay": 0.25}, {"lr": 0.125, "weight_decay": 0}]


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (2, 2), (3, 2), (3, 3), (11, 1)])
def test_traced_order_is_that_of_the_global_batch(monkeypatch: pytest.MonkeyPatch, world: int, micro: int) -> None:
    rows = torch.arange(8).numpy()
    parts = [
        [f"row{i}" if i >= 0 else "" for part in rank_share(rows, rank, world, micro) for i in part]
        for rank in range(world)
    ]
    monkeypatch.setattr(distributed, "gather", lambda mine: [mine, *parts[1:]])
    own: Any = [SimpleNamespace(keys=parts[0])]
    assert training.rows_of_step(own) == [f"row{i}" for i in rows]
