"""A run on several shard folders, as users start it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from data_prep.shard import build
from tests.launch import ROOT, arguments, environment, losses

LENGTH = ["--data.group_by_length", "2", "--stages", "0", "--train.checkpoint_every", "5"]


def start(out: Path, mix: str) -> subprocess.CompletedProcess[str]:
    words = arguments(out, Path(), *LENGTH, "--data.mix", mix, ds="zero2")
    at = words.index("--data")
    command = [sys.executable, *words[:at], *words[at + 2 :]]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


def test_a_mixture_is_trained_and_resumed(tmp_path: Path) -> None:
    """Validated, exported, and resumed from inside the stage to the same numbers; not with other weights."""
    for seed, grid in enumerate((3, 4)):
        options = {"grid": grid, "colours": 6, "train": 24, "val": 4, "test": 0, "seed": seed}
        build("trails", tmp_path / f"d{seed}", options=options)
    out, mix = tmp_path / "run", f"[{{path: {tmp_path}/d0, weight: 2}}, {{path: {tmp_path}/d1, weight: 1}}]"
    done = start(out, mix)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "48 samples an epoch, of 48 there are: d0 24 (2 of 3 rows), d1 24 (1 of 3 rows)" in done.stderr
    whole = losses(out)
    assert len(whole) == 8 and (out / "export" / "stage0" / "config.json").exists()
    shutil.rmtree(out / "checkpoints" / "stage0-step000008")
    (out / "stage0.done").unlink()
    refused = start(out, mix.replace("weight: 2", "weight: 3"))
    assert (
        refused.returncode == 2 and "data.mix (its folders, their order and weights) is not the one" in refused.stderr
    )
    resumed = start(out, mix)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "resumed from" in resumed.stderr and losses(out) == whole
