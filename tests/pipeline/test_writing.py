"""A rank's files of a checkpoint: what a copy must keep, and what becomes of one that cannot be written."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from torch import nn

from data_prep.errors import UserError
from pipeline.keeping.writing import Files, entry_of, part_of, snapshot


def nothing() -> None: ...


def state() -> dict[str, Any]:
    """Of DeepSpeed's kinds: views of one flat buffer, a module's ordered state, attributes, objects."""
    flat = torch.arange(12.0)
    fp32 = torch.arange(6.0).requires_grad_()
    fp32.ds_id = "3_5"  # type: ignore[attr-defined]
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).to(torch.bfloat16)
    step = torch.tensor(7.0)
    shape = torch.Size([3, 4])
    return {
        "module": module.state_dict(),
        "flat": [flat[:5], flat[5:].view(7), flat[::2], torch.empty(0), torch.empty(0)],
        "fp32": (fp32, nn.Parameter(flat[3:4])),
        "optimizer": {"state": {0: {"step": step}, 1: {"step": step}}, "param_groups": [{"lr": 0.1, "shape": shape}]},
        "loss_scaler": LossScaler(scale=4.0),
        "shapes": [OrderedDict(weight=shape)],
    }


def test_a_copy_is_written_as_the_original(tmp_path: Path) -> None:
    """The same bytes, also after the original has been trained on."""
    given = state()
    copied = snapshot(given)
    assert copied["flat"][0].untyped_storage().data_ptr() == copied["flat"][1].untyped_storage().data_ptr()
    assert copied["module"]._metadata and copied["fp32"][0].ds_id == "3_5"
    for folder, saved in (("given", given), ("copied", copied)):
        (tmp_path / folder).mkdir()
        torch.save(saved, tmp_path / folder / "x.pt")
    before = (tmp_path / "given" / "x.pt").read_bytes()
    assert (tmp_path / "copied" / "x.pt").read_bytes() == before
    given["flat"][0].zero_()
    given["optimizer"]["state"][0]["step"] += 1
    given["optimizer"]["param_groups"][0]["lr"] = 0.2
    given["loss_scaler"].cur_scale = 2.0
    given["module"]["0.weight"].zero_()
    torch.save(copied, tmp_path / "copied" / "x.pt")
    assert (tmp_path / "copied" / "x.pt").read_bytes() == before


@pytest.mark.parametrize("background", [False, True])
def test_files_and_their_hashes(tmp_path: Path, background: bool) -> None:
    """In order; the part of the manifest comes last, and names what is a part of the checkpoint."""
    files, calls = Files(tmp_path, 1, background, nothing), []
    for name in ("a", "b"):
        files.add(lambda name=name: calls.append((tmp_path / name).write_text(name)), tmp_path / name)  # type: ignore[misc]
    files.add(lambda: (tmp_path / "script").write_text("s"))
    assert len(calls) == (0 if background else 2) and not part_of(tmp_path, 1).exists()
    files.close()
    files.wait()
    assert files.done.is_set() and files.error is None
    assert json.loads(part_of(tmp_path, 1).read_text()) == {name: entry_of(tmp_path / name) for name in ("a", "b")}


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("where", ["disk", "fence"])
def test_the_first_error_ends_it(tmp_path: Path, background: bool, where: str) -> None:
    """Nothing is written after it, nor where the folder was taken over."""
    looks = iter(range(10))

    def write_badly() -> None:
        if where == "disk":
            raise OSError(28, "No space left on device")

    def fence() -> None:
        if where == "fence" and next(looks):
            raise UserError("was taken over")

    files = Files(tmp_path, 0, background, fence)
    files.add(lambda: (tmp_path / "a").write_text("a"), tmp_path / "a")
    files.add(write_badly)
    files.add(lambda: (tmp_path / "b").write_text("b"), tmp_path / "b")
    files.close()
    files.wait()
    assert files.done.is_set() and isinstance(files.error, OSError if where == "disk" else UserError)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_dropped(tmp_path: Path) -> None:
    """The file of the moment is finished, no other begun."""
    begun, go_on = threading.Event(), threading.Event()

    def slowly() -> None:
        begun.set()
        go_on.wait(10)
        (tmp_path / "a").write_text("a")

    files = Files(tmp_path, 0, True, nothing)
    files.add(slowly, tmp_path / "a")
    files.add(lambda: (tmp_path / "b").write_text("b"), tmp_path / "b")
    files.close()
    begun.wait(10)
    threading.Timer(0.05, go_on.set).start()
    files.drop()
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and files.error is None
