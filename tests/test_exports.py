"""Exports and run folders that are not as they were written: one clear line each, and no answer from random weights."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from data_prep.errors import UserError
from data_prep.files import parse_json
from data_prep.index import read_manifest
from pipeline import evaluate
from pipeline.backbones import BACKBONES
from pipeline.evaluate import exports_of
from pipeline.export import FILE, ExportInfo
from pipeline.keeping.checkpoint import Checkpoints
from pipeline.loaded import load_export
from pipeline.prepare import base_hash
from pipeline.scoring.report import read_reports
from pipeline.summary import lines
from pipeline.user_files import load_json
from tests.launch import train
from tests.test_training import lora_settings, options_of

DEEP = b"[" * 100_000


@pytest.fixture
def export(whole_run, tmp_path):
    """A copy of a good export, to be damaged."""
    return shutil.copytree(whole_run / "export" / "stage2", tmp_path / "stage2")


@pytest.fixture(scope="module")
def trained_adapter(whole_run, data, tmp_path_factory):
    """(base, adapter export) of a LoRA run."""
    folder = tmp_path_factory.mktemp("adapter")
    base = shutil.copytree(whole_run / "export" / "stage0", folder / "base")
    lora = "{r: 4, alpha: 8, dropout: 0, export: adapter}"
    settings = lora_settings(whole_run, **{"model.lora": lora, "model.path": str(base)})
    train(folder / "run", data, "--stages", "0", *options_of(settings))
    return base, folder / "run" / "export" / "stage0"


@pytest.fixture
def adapter(trained_adapter, tmp_path):
    return shutil.copytree(trained_adapter[1], tmp_path / "adapter")


def refused(folder):
    """The one line that loading an export ends with."""
    with pytest.raises(UserError) as caught:
        load_export(folder)
    assert len(caught.value.lines) == 1 and "\n" not in caught.value.lines[0]
    return caught.value.lines[0]


def edit_weights(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---- weights
def test_missing_weights(export):
    """Whatever a model lacks would be drawn at random; a head tied to the embeddings is no missing weight."""
    assert "lm_head.weight" not in load_file(export / "model.safetensors")
    load_export(export)
    edit_weights(export / "model.safetensors", lambda weights: weights.pop("model.layers.1.mlp.down_proj.weight"))
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    assert refused(export) == f"{export}: 1 weights missing or of another shape: {name}"


def test_missing_vision_tower(export):
    def without_vision(weights):
        for name in [name for name in weights if "visual" in name]:
            del weights[name]

    edit_weights(export / "model.safetensors", without_vision)
    said = refused(export)
    assert "weights missing or of another shape: model.visual." in said and " more" in said
    assert said.count("model.visual.") == 3


def test_weights_of_another_shape(export):
    def cut(weights):
        weights["model.norm.weight"] = weights["model.norm.weight"][:5].clone()

    edit_weights(export / "model.safetensors", cut)
    assert refused(export).endswith("1 weights missing or of another shape: model.language_model.norm.weight")


def test_missing_weights_of_an_adapter(adapter):
    load_export(adapter)
    victims = []

    def without(weights):
        victims.append(next(name for name in weights if "lora_B" in name))
        del weights[victims[0]]

    edit_weights(adapter / "adapter_model.safetensors", without)
    assert refused(adapter).endswith(f"1 weights missing or of another shape: {victims[0]}")


# ---- an adapter's base
def test_adapter_knows_its_base(trained_adapter):
    base, folder = trained_adapter
    assert ExportInfo.read(folder).base_hash == base_hash(base, weights=True)
    assert load_export(folder).info.adapter_of == str(base)


def test_adapter_on_other_weights(whole_run, adapter, tmp_path):
    other = shutil.copytree(whole_run / "export" / "stage2", tmp_path / "base")
    edit_json(adapter / FILE, adapter_of=str(other))
    assert "whose weights are not those that it was trained on" in refused(adapter)


def test_adapter_without_its_base(adapter, tmp_path):
    edit_json(adapter / FILE, adapter_of=str(tmp_path / "gone"))
    assert f"is an adapter of {tmp_path / 'gone'}, which is not here" in refused(adapter)


def test_adapter_that_does_not_say_its_base(adapter):
    edit_json(adapter / FILE, base_hash=None)
    assert "does not say which weights the adapter's base has (base_hash)" in refused(adapter)


# ---- other files
@pytest.mark.parametrize(
    "field, value, message",
    [
        ("latents", "2", "latents: Input should be a valid integer (given: '2')"),
        ("latents", None, "latents: Input should be a valid integer"),
        ("latents", 1.5, "latents: Input should be a valid integer"),
        ("latents", -1, "latents: Input should be greater than or equal to 0 (given: -1)"),
        ("latents", True, "latents: Input should be a valid integer"),
        ("stage", "two", "stage: Input should be a valid integer"),
        ("data", None, "data: Input should be a valid string"),
        ("backbone", "vit", "backbone: expected one of qwen2_vl, qwen2_5_vl, chameleon (given: 'vit')"),
        ("latent", {"num_patches": "2"}, "latent.num_patches: Input should be a valid integer"),
        ("latent", None, "latent: Input should be"),
        ("colour", 1, "unknown key colour"),
    ],
)
def test_damaged_description(export, field, value, message):
    edit_json(export / FILE, **{field: value})
    assert refused(export).startswith(f"{export / FILE} cannot be used: {message}")


def test_description_survives_writing(export):
    info = ExportInfo.read(export)
    (export / FILE).unlink()
    info.write(export)
    assert ExportInfo.read(export) == info


@pytest.mark.parametrize("name", ["config.json", *BACKBONES["qwen2_vl"].PROCESSOR_FILES])
def test_missing_files(export, name):
    (export / name).unlink()
    assert refused(export) == f"export {export} is not complete: it lacks {name}"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", DEEP], ids=["empty", "other", "deep"])
def test_damaged_files(export, name, content):
    """Among them a config without a model's sizes: the library would build the 7B model."""
    (export / name).write_bytes(content)
    assert refused(export).startswith(f"export {export} cannot be loaded: ")


@pytest.mark.parametrize("template, message", [("", "it has no chat template"), ("hello", "leaves the text out")])
def test_damaged_chat_template(export, template, message):
    (export / "chat_template.jinja").write_text(template)
    assert message in refused(export)


def test_config_of_nothing(export):
    (export / "config.json").write_text("{}")
    assert "Unrecognized model" in refused(export)


# ---- which models of a run
def run_of(folder, whole_run, latents):
    """A run folder whose exports are descriptions alone: stage -> latents."""
    described = ExportInfo.read(whole_run / "export" / "stage2")
    for stage, n in latents.items():
        place = folder / "export" / f"stage{stage}"
        place.mkdir(parents=True)
        described.model_copy(update={"latents": n, "stage": stage}).write(place)
    return folder


@pytest.mark.parametrize(
    "latents, names",
    [
        ({0: 0, 1: 1, 2: 2}, ["explicit", "latent"]),
        ({0: 2}, ["latent"]),
        ({0: 0}, ["explicit"]),
        ({0: 0, 1: 0, 3: 0}, ["explicit stage 0", "explicit stage 3"]),
        ({0: 1, 1: 2}, ["latent stage 0", "latent stage 1"]),
        ({2: 2, 10: 2}, ["latent"]),
    ],
)
def test_names_follow_latents(tmp_path, whole_run, latents, names):
    run = run_of(tmp_path, whole_run, latents)
    found = exports_of(run)
    assert [name for name, _ in found] == names
    assert found[-1][1] == run / "export" / f"stage{max(latents)}"


def test_leftover_folders_are_no_exports(tmp_path, whole_run):
    run = run_of(tmp_path, whole_run, {0: 0, 1: 1})
    for name in ("stage2.writing", "stage2-old", "stage", "stages"):
        shutil.copytree(run / "export" / "stage1", run / "export" / name)
    assert exports_of(run) == [("explicit", run / "export" / "stage0"), ("latent", run / "export" / "stage1")]


def answer(out, capsys, **options):
    """Names of the models that answered, and what was printed."""
    evaluate.main(out=out, limit=2, timed=0, max_new_tokens=4, **options)
    return [report.name for report in read_reports(out)], capsys.readouterr().out


def test_other_latents_than_trained(whole_run, tmp_path, capsys):
    """--latents is for the last model, whatever it is called."""
    names, said = answer(tmp_path / "run", capsys, run=whole_run, latents=1)
    assert names == ["explicit", "latent n=1"] and "explicit is the stage-0 model" in said
    names, _ = answer(tmp_path / "explicit", capsys, model=whole_run / "export" / "stage0", latents=2)
    assert names == ["explicit n=2"]
    predictions = (tmp_path / "explicit" / "explicit-n=2" / "predictions.jsonl").read_text().splitlines()
    steps = [json.loads(line)["autoregressive_steps"] for line in predictions]
    assert min(steps) >= 3


def test_control_without_latents(whole_run, tmp_path, capsys):
    """Both models of a run explain: each has a name, a report and predictions of its own."""
    run = tmp_path / "run"
    for stage in (0, 1):
        folder = shutil.copytree(whole_run / "export" / "stage0", run / "export" / f"stage{stage}")
        edit_json(folder / FILE, stage=stage)
    names, said = answer(tmp_path / "out", capsys, run=run)
    assert names == ["explicit stage 0", "explicit stage 1"]
    assert (tmp_path / "out" / "explicit-stage-1" / "predictions.jsonl").exists()
    assert "explicit stage 0 is the stage-0 model: it was trained for fewer steps than the explicit stage 1 one" in said


def test_unwritable_out(whole_run, tmp_path, monkeypatch):
    """Said before the questions are answered."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluate, "answer_all", lambda *_: pytest.fail("answered first"))
    with pytest.raises(UserError, match="out cannot be written: Not a directory; choose another --out"):
        evaluate.main(run=whole_run, out=tmp_path / "file" / "out")


# ---- a run's records
@pytest.fixture
def metrics(whole_run, tmp_path):
    """A run folder of nothing but its metrics."""
    return shutil.copy(whole_run / "metrics.jsonl", tmp_path)


def test_summary_of_a_cut_line(metrics, tmp_path):
    """A line that is being written does not count; all before it do."""
    whole = lines(tmp_path, "test")
    with open(metrics, "a") as file:
        file.write('{"global_step": 24, "sta')
    assert lines(tmp_path, "test") == whole


@pytest.mark.parametrize("line", ["{", "null", '{"stage": 0}', '{"stage": "x", "loss": 1}', "[" * 100_000])
def test_summary_of_a_damaged_line(metrics, tmp_path, line):
    with open(metrics) as file:
        content = file.read().splitlines()
    content[4] = line
    (tmp_path / "metrics.jsonl").write_text("\n".join(content) + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged in line 5 \("):
        lines(tmp_path, "test")


def test_json_of_absurd_nesting(tmp_path):
    """Is damaged JSON as any other."""
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(DEEP)
    for name in ("manifest.json", "report.json", "checkpoints/stage0-step1/state.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(DEEP)
    (tmp_path / "checkpoints" / "stage0-step1" / "manifest.json").touch()
    for read in (read_manifest, read_reports):
        with pytest.raises(UserError):
            read(tmp_path)
    assert [path.name for path in Checkpoints(tmp_path).unreadable()] == ["stage0-step1"]
    with pytest.raises(UserError, match="not JSON: nested too deeply"):
        load_json(tmp_path / "manifest.json", "file")
