"""Presets of recipes/methods, and an idea of one's own from docs/new_method.md, through the public commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from data_prep.reader import open_split
from pipeline.backbones import BACKBONES
from pipeline.data.batch import collate
from pipeline.data.loader import Share, StageSteps
from pipeline.engine import add_tokens
from pipeline.latent.decode import Decoding
from pipeline.latent.parts import WEIGHTINGS
from pipeline.latent.select import select_patches
from pipeline.loaded import load_export
from pipeline.model import LatentModel
from pipeline.prompt import LATENT_TOKEN, MARKERS, RowBuilder
from pipeline.recipe import load_config
from tests import launch
from tests.launch import ROOT, TINY, train, try_train

PRESETS = sorted((ROOT / "recipes" / "methods").glob("*.yaml"))
# by stage: (latent passes, columns that they insert in a 3x3 picture at K = 2, written steps left out of 3)
EXPECTED = {
    "ivtlr": [(0, 0, 0), (1, 3, 1), (2, 6, 2), (3, 9, 3)],
    "pause": [(0, 0, 0), (1, 3, 1), (2, 6, 2), (3, 9, 3)],
    "coconut": [(0, 0, 0), (2, 2, 1), (4, 4, 2), (6, 6, 3)],
    "patches_again": [(0, 0, 0), (1, 9, 1), (1, 9, 2), (1, 9, 3)],
    "steps_removed": [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3)],
    "no_cot": [(0, 0, 3)],
    "explicit_cot": [(0, 0, 0)],
}
SHORT = "[{latents: 0, skip: 0, steps: 4}, {latents: 2, skip: 2, steps: 4}]"


def test_every_preset_is_expected() -> None:
    assert {path.stem for path in PRESETS} == EXPECTED.keys()


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset(whole_run, data, preset) -> None:
    """Over the tiny recipe: every stage's rows have the method's columns, its loss reaches every part, it answers."""
    config = load_config([TINY, preset], {"data.path": str(data)})
    assert config.name == preset.stem and config.train.global_batch == 8
    assert sum(stage.epochs for stage in config.curriculum.stages) == 16, "presets are compared at one budget"
    family = BACKBONES[config.model.backbone]
    processor = family.processor(whole_run / "base", config.prompt)
    vlm = family.load(whole_run / "base", torch.float32)
    add_tokens(vlm, processor.tokenizer, [LATENT_TOKEN, *MARKERS])
    model = LatentModel(family(vlm), config.latent).train()
    builder = RowBuilder(processor, config.prompt, config.latent.patches_taken)
    index, share, found = open_split(data, "train"), Share(0, 1, 8, 8), []
    config = config.model_copy(update={"curriculum": config.curriculum.model_copy(update={"mix": 0.0})})
    longest = 0
    for stage in range(len(config.curriculum.stages)):
        (batch,) = StageSteps(index, builder, config.curriculum, stage, share, 0, "drop")[0]
        loss, _ = model(batch)
        loss.backward()
        steps = model.answer(batch, Decoding(1, 0)).steps
        columns = {int(sum(step.inserted[row].sum() for step in steps)) for row in range(8)}
        longest = longest or len(batch.target_ids[0])
        found.append((batch.passes, *columns, config.curriculum.stages[stage].skip))
    expected = EXPECTED[preset.stem]
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    assert [min(entry[2], 3) for entry in found] == [entry[2] for entry in expected]
    assert all(parameter.grad is not None for parameter in model.method.parameters())


def test_presets_differ_in_nothing_but_the_method() -> None:
    plain = load_config([TINY], {"data.path": "x"}).model_dump()
    for preset in PRESETS:
        laid_over = load_config([TINY, preset], {"data.path": "x"}).model_dump()
        changed = {name for name in plain if plain[name] != laid_over[name]}
        assert changed <= {"name", "latent", "curriculum"} | ({"prompt"} if preset.stem == "coconut" else set())


@pytest.fixture(scope="module")
def idea(tmp_path_factory):
    """The documentation's examples of a feedback, in one file."""
    text = (ROOT / "docs" / "new_method.md").read_text()
    found = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "@FEEDBACKS.add" in block]
    assert len(found) == 2 and "`mean_four.py`, anywhere:\n\n```python\n" + found[0] in text
    path = tmp_path_factory.mktemp("idea") / "mean_four.py"
    path.write_text("\n".join(found))
    return path


def test_functions_of_the_documentation() -> None:
    (text,) = [t for t in (ROOT / "docs" / "new_method.md").read_text().split("```python\n") if "SELECTIONS.add" in t]
    exec(text.split("```")[0], {})
    columns, filled = select_patches(torch.rand(1, 6), torch.tensor([[0, 1, 0, 1, 1, 1]]).bool(), 2, selection="first")
    assert columns.tolist() == [[1, 3]] and filled.all()
    assert WEIGHTINGS["loud"].factors(torch.rand(1, 6), columns, filled).tolist() == [[2, 2]]


def test_an_idea_of_ones_own(data, idea, tmp_path) -> None:
    """On two ranks under ZeRO-3; its export asks for the same file again, and resuming refuses another."""
    out = tmp_path / "run"
    options = ("--plugin", str(idea), "--latent.feedback", "layer_mix", "--curriculum.stages", SHORT)
    log = train(out, data, *options, ranks=2)
    assert "method: feedback layer_mix, selection attention (2 patches a step" in log and f"plugin {idea} (SHA" in log
    assert load_file(out / "export" / "stage1" / "latent_parts.safetensors")["feedback.shares"].abs().min() > 0
    assert (out / "plugin.py").read_text() == idea.read_text()
    evaluate = [sys.executable, "-m", "pipeline.evaluate", "--run", str(out), "--limit", "4", "--max_new_tokens", "6"]
    settings = {"cwd": ROOT, "env": launch.environment(), "capture_output": True, "text": True}
    without = subprocess.run(evaluate, **settings)
    assert without.returncode == 2 and "Traceback" not in without.stderr
    assert "no feedback is called layer_mix" in without.stderr
    assert "(it was trained with --plugin mean_four.py)" in without.stderr
    done = subprocess.run([*evaluate, "--plugin", str(idea)], **settings)
    assert done.returncode == 0, done.stderr
    line = json.loads((out / "evaluation" / "test" / "latent" / "predictions.jsonl").read_text().splitlines()[0])
    assert line["autoregressive_steps"] == 2 + 6
    idea.write_text(idea.read_text() + "# edited\n")
    refused = subprocess.run([*evaluate, "--plugin", str(idea)], **settings)
    assert refused.returncode == 2 and "--allow_changed_plugin true answers with it all the same" in refused.stderr
    (out / "stage1.done").unlink()
    code, log = try_train(out, data, *options, ranks=2)
    assert code == 2 and "Traceback" not in log
    assert f"error: the settings, or the text of {idea}, are not those" in log


@pytest.mark.parametrize(("ds", "dtype", "latent_grad"), [("zero2", "fp32", "bptt"), ("zero3", "bf16", "detach")])
def test_learned_parts_are_trained_and_exported(data, tmp_path, ds, dtype, latent_grad) -> None:
    """Not used in stage 0, trained in stage 1, in the export with the values that answered."""
    out = tmp_path / "run"
    options = ("--latent.feedback", "pause", "--latent.latent_grad", latent_grad, "--curriculum.stages", SHORT)
    train(out, data, *options, "--model.dtype", dtype, ranks=2, ds=ds)
    parts = [load_file(out / "export" / f"stage{stage}" / "latent_parts.safetensors") for stage in (0, 1)]
    assert parts[0].keys() == {"feedback.embedding"}
    moved = (parts[1]["feedback.embedding"] - parts[0]["feedback.embedding"]).abs().max()
    assert 1e-4 < moved < 0.1
    loaded = load_export(out / "export" / "stage1")
    assert torch.equal(loaded.model.method.feedback.embedding.cpu(), parts[1]["feedback.embedding"].float())
    sample = loaded.builder.prompt_row(open_split(data, "test").read(0), "0", 0, 2)
    batch = collate([sample], loaded.processor.row_format, 2)
    with torch.no_grad():
        before = loaded.model.answer(batch, Decoding(4, 0)).steps[1].latent
        loaded.model.method.feedback.embedding.mul_(3)
        after = loaded.model.answer(batch, Decoding(4, 0)).steps[1].latent
    assert (before - after).abs().max() > 1e-4
