"""A published recipe from raw files to the table beside the paper's figures, on tiny stand-ins for data and model."""

from __future__ import annotations

import re

import pytest

from tests.test_benchmark_formats import m3cot_files, scienceqa_files
from tests.test_commands import command

SCRATCH = (
    "{hidden_size: 64, intermediate_size: 96, layers: 2, heads: 4, kv_heads: 2, vision_layers: 1, vision_size: 32,"
    " vision_heads: 2, vocab_size: 400, image_size: 32}"
)
STAGES = "[{latents: 0, skip: 0, steps: 2}, {latents: 3, skip: 3, steps: 2}]"
TINY = {
    "model.path": "none", "model.lora": "none", "model.dtype": "fp32", "model.scratch": SCRATCH,
    "curriculum.stages": STAGES, "latent.num_patches": "3",
    "train.global_batch": "4", "train.micro_batch": "2", "train.val_samples": "2", "data.workers": "0",
    "eval.max_new_tokens": "8",
}  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "files", "paper"),
    [
        ("qwen2vl_m3cot", m3cot_files, "71.8%             10.0        0.65"),
        ("chameleon_scienceqa", scienceqa_files, "64.0%             11.0        1.14"),
    ],
)
def test_trained_here(tmp_path, recipe, files, paper):
    (tmp_path / "raw").mkdir()
    (tmp_path / "log.yaml").write_text("train: {log_every: 1}\n")
    files(tmp_path / "raw")
    settings = TINY | {
        "data.path": tmp_path / "data",
        "data.options": f"{{text_only: skip, input: {tmp_path / 'raw'}}}",
    }
    if recipe.startswith("qwen"):
        settings["prompt.image_size"] = 84
    options = [f"--{name}={value}" for name, value in settings.items()]
    recipes = f"published/{recipe},{tmp_path / 'log.yaml'}"
    reproduce = ["pipeline.reproduce", "--recipe", recipes, "--batch", "4", *options]
    code, out, err = command(*reproduce, "--train", "--ranks", "1", "--out", tmp_path / "run")
    assert code == 0, err[-3000:]
    assert re.search(rf"^paper +{paper}$", out, re.M), out
    for judge in ("released", "strict", "official"):
        assert re.search(rf"^here, {judge} scorer +[\d.]+% \([\d.]+% to [\d.]+%\) +\d+\.\d +\d\.\d\d$", out, re.M), out
    assert f"{recipe}, {recipe.split('_')[1]}: " in out
    code, again, err = command(*reproduce, "--run", tmp_path / "run", "--out", tmp_path / "again")
    assert code == 0, err[-3000:]
    accuracy = [re.findall(r"scorer +([\d.]+%)", text) for text in (out, again)]
    assert accuracy[0] == accuracy[1] and len(accuracy[0]) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--recipe", "published/qwen2vl_m3cot,published/qwen2vl"],
            "published/qwen2vl: no such file, and none of best/",
        ),
        (["--recipe", "published/qwen2vl"], "no such file, and none of best/chameleon_m3cot"),
        (
            ["--recipe", "published/qwen2vl_m3cot"],
            "give one of --train, --from released --weights F.pth, and --run DIR",
        ),
        (["--recipe", "published/qwen2vl_m3cot", "--from", "released"], "--weights F.pth go together"),
        (["--recipe", "demo", "--train"], "data.source is trails: expected one of m3cot, scienceqa"),
        (["--recipe", "published/qwen2vl_m3cot", "--trian"], "unknown option --trian; did you mean --train?"),
    ],
)
def test_mistakes(options, said):
    code, _, err = command("pipeline.reproduce", *options)
    assert code == 2 and said in err and "Traceback" not in err
