"""`--resume elastic`: a checkpoint of two ranks goes on with one or three, and under another ZeRO stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from data_prep.index import open_split
from pipeline.checkpoint import Checkpoints
from pipeline.config import load_config
from pipeline.loader import Share, StageSteps
from pipeline.prompt import RowBuilder
from tests.launch import TINY, losses, train

LORA = {"model.scratch": "none", "model.lora": "{r: 4, alpha: 8, dropout: 0}", "optim.lr": "0.01"}


def stopped(run: Path, out: Path, stage: int, step: int) -> Path:
    """A copy of a run as it would be had it ended at a checkpoint; metrics of lost steps stay, as after a crash."""
    shutil.copytree(run, out)
    for checkpoint in Checkpoints(out).all():
        if (checkpoint.state.stage, checkpoint.state.step) > (stage, step):
            shutil.rmtree(checkpoint.path)
    for done in range(stage, 3):
        (out / f"stage{done}.done").unlink(missing_ok=True)
        shutil.rmtree(out / "export" / f"stage{done}", ignore_errors=True)
    return out


def entries(out: Path) -> dict[int, dict]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {entry["global_step"]: entry for entry in found}


def expected_keys(data: Path, stage: int) -> list[list[str]]:
    """Rows of every step of a stage, by a single rank's arithmetic."""
    config, index = load_config(TINY, {}), open_split(data, "train")
    size = config.train.global_batch
    steps = StageSteps(
        index, RowBuilder.__new__(RowBuilder), config.curriculum, stage, Share(0, 1, size, size), config.train.seed,
        "drop",
    )  # fmt: skip
    return [[index.key(int(i)) for i in steps.samples(step)[1]] for step in range(len(steps))]


def nothing_left(out: Path) -> bool:
    """Whether what was made for going on is gone again."""
    return not (out / "checkpoints" / "universal").exists()


@pytest.mark.parametrize(("ranks", "step"), [(1, 6), (3, 3)])
def test_full_training(whole_run, data, tmp_path, ranks, step):
    """The same losses as without a stop, and each of the remaining rows once, in the order that was due."""
    out = stopped(whole_run, tmp_path / "run", 2, step)
    log = train(out, data, "--resume", "elastic", "--train.trace", "true", ranks=ranks)
    assert f"{ranks} ranks under ZeRO-3 go on from 2 under ZeRO-3" in log and "begins anew" not in log
    found, expected = losses(out), losses(whole_run)
    assert found.keys() == expected.keys()
    assert max(abs(found[s] - expected[s]) for s in expected) <= 1e-5
    seen = [entry["keys"] for s, entry in entries(out).items() if s >= 16 + step]
    assert seen == expected_keys(data, 2)[step:]
    state = Checkpoints(out).all()[-1].state
    assert (state.world, state.samples, state.epoch, state.seed) == (ranks, 64, 0, 0)
    assert nothing_left(out)


@pytest.fixture(scope="module")
def lora_run(whole_run, data, tmp_path_factory):
    """An uninterrupted 2-rank run of one stage with LoRA on a pretrained folder."""
    out = tmp_path_factory.mktemp("lora") / "run"
    train(out, data, *lora_options(whole_run), ranks=2)
    return out


def lora_options(base: Path) -> list[str]:
    settings = LORA | {"model.path": str(base / "export" / "stage0")}
    return ["--stages", "1", *(word for name, value in settings.items() for word in (f"--{name}", value))]
