"""`--resume elastic`: a checkpoint of two ranks goes on with four, then one, and with three of another ZeRO stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep.reader import open_split
from pipeline.data.loader import Share, StageSteps
from pipeline.keeping.checkpoint import Checkpoints
from pipeline.prompt import RowBuilder
from pipeline.recipe import load_config
from tests.launch import TINY, losses, train


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


def rows_seen(out: Path) -> dict[int, list[str]]:
    """Global step -> keys, of the steps that were traced."""
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {entry["global_step"]: entry["keys"] for entry in entries if "keys" in entry}


def rows_due(data: Path, stage: int) -> list[list[str]]:
    """Rows of every step of a stage, by a single rank's arithmetic."""
    config, index = load_config(TINY, {}), open_split(data, "train")
    size = config.train.global_batch
    steps = StageSteps(
        index, RowBuilder.__new__(RowBuilder), config.curriculum, stage, Share(0, 1, size, size), config.train.seed,
        "drop",
    )  # fmt: skip
    return [[index.key(int(i)) for i in steps.samples(step)[1]] for step in range(len(steps))]


def assert_as_without_a_stop(out: Path, whole: Path) -> None:
    found, expected = losses(out), losses(whole)
    assert found.keys() == expected.keys()
    largest = max(abs(found[step] - expected[step]) for step in expected)
    print(f"{out}: losses differ by {largest:.1e} at most")
    assert largest <= 1e-5


def frozen_weights(out: Path) -> set[str]:
    """Fingerprints of the frozen weights, of all checkpoints."""
    return {checkpoint.state.weights.frozen for checkpoint in Checkpoints(out).all()}


def test_full_training(whole_run, data, tmp_path):
    """2 -> 4 -> 1 ranks: the same losses as without a stop, and each of the remaining rows once, in the order due."""
    before = whole_run
    for number, (ranks, step) in enumerate([(4, 3), (1, 6)]):
        out = stopped(before, tmp_path / str(number), 2, step)
        log = train(out, data, "--resume", "elastic", "--train.trace", "true", ranks=ranks)
        assert (
            f"{ranks} ranks under ZeRO-3 go on from {(2, 4)[number]} under ZeRO-3" in log and "begins anew" not in log
        )
        assert_as_without_a_stop(out, whole_run)
        seen = rows_seen(out)
        assert [seen[due] for due in range(16 + step, 24)] == rows_due(data, 2)[step:]
        assert not (out / "checkpoints" / "universal").exists()
        end = Checkpoints(out).all()[-1]
        assert (end.state.world, end.state.samples, end.state.epoch, end.state.seed) == (ranks, 64, 0, 0)
        # which DeepSpeed loads with one group's decay, and one step count
        for file in end.path.glob("*_optim_states.pt"):
            optimizer = torch.load(file, weights_only=False)["optimizer_state_dict"]["optimizer_state_dict"]
            assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0.01, 0]
            assert [float(state["step"]) for state in optimizer["state"].values()] == [24, 24]
        before = out


def lora_options(base: Path) -> list[str]:
    settings = {
        "model.path": str(base / "export" / "stage0"), "model.scratch": "none", "optim.lr": "0.01",
        "model.lora": "{r: 4, alpha: 8, dropout: 0}",
    }  # fmt: skip
    return ["--stages", "0", *(word for name, value in settings.items() for word in (f"--{name}", value))]


@pytest.fixture(scope="module")
def lora_run(whole_run, data, tmp_path_factory):
    """An uninterrupted 2-rank run of one stage with LoRA, under ZeRO-2."""
    out = tmp_path_factory.mktemp("lora") / "run"
    train(out, data, *lora_options(whole_run), ranks=2, ds="zero2")
    return out


def test_lora(whole_run, lora_run, data, tmp_path):
    """The same; frozen weights, which no checkpoint holds, are the base's; ZeRO-1 and 2 read each other's optimizer."""
    before = lora_run
    for ranks, ds, step in [(4, "zero2", 3), (1, "zero1", 6)]:
        out = stopped(before, tmp_path / str(ranks), 0, step)
        train(out, data, *lora_options(whole_run), "--resume", "elastic", ranks=ranks, ds=ds)
        assert_as_without_a_stop(out, lora_run)
        before = out
    (frozen,) = frozen_weights(lora_run)
    assert frozen_weights(out) == {frozen}
    base, after = (load_file(run / "export" / "stage0" / "model.safetensors") for run in (whole_run, out))
    kept = [name for name in base if not name.endswith("_proj.weight")]
    assert any("visual" in name for name in kept) and any("embed" in name for name in kept)
    assert all(torch.equal(base[name], after[name]) for name in kept)
    assert any(not torch.equal(base[name], after[name]) for name in base)


def test_other_zero_stage(data, tmp_path):
    """Weights and place in the data go on, the optimizer says that it begins anew; frozen weights are the checkpoint's.

    Chameleon's tokenizer of images is frozen and stored, and the base's weights are not compared.
    """
    whole, options = tmp_path / "whole", ["--model.backbone", "chameleon", "--train.val_samples", "0"]
    options += ["--curriculum.stages", "[{latents: 1, skip: 1, steps: 5}]", "--train.trace", "true"]
    train(whole, data, *options, ranks=2)
    out = stopped(whole, tmp_path / "run", 0, 3)
    weights = load_file(out / "base" / "model.safetensors")
    spoilt = {name: value + 1 if "vqmodel" in name else value for name, value in weights.items()}
    assert any("vqmodel" in name for name in spoilt)
    save_file(spoilt, out / "base" / "model.safetensors", {"format": "pt"})
    log = train(out, data, *options, "--resume", "elastic", ranks=3, ds="zero2")
    assert "the optimizer begins anew: ZeRO-2 cannot read its state from ZeRO-3" in log
    found, expected = losses(out), losses(whole)
    assert found.keys() == expected.keys()
    assert abs(found[3] - expected[3]) <= 1e-5 and 1e-5 < abs(found[4] - expected[4]) < 1
    assert rows_seen(out) == rows_seen(whole)
    before, after = (load_file(run / "export" / "stage0" / "model.safetensors") for run in (whole, out))
    assert all(torch.equal(before[name], after[name]) for name in before if "vqmodel" in name)
    assert len(frozen_weights(whole) | frozen_weights(out)) == 1
