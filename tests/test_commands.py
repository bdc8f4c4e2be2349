"""The commands as users type them: what they print, where they fail."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from data_prep.errors import UserError
from data_prep.reader import open_split
from pipeline import ask
from pipeline.evaluate import open_data
from pipeline.export import ExportInfo
from pipeline.loaded import load_export
from tests import launch


def command(module, *options):
    """(exit status, stdout, stderr) of `python -m MODULE OPTIONS`."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, options)],
        cwd=launch.ROOT, env=launch.environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_evaluate_without_shards(tmp_path):
    with pytest.raises(UserError, match="none is not there; make it with python -m data_prep.shard"):
        open_data(None, tmp_path / "none", "test")
    info = SimpleNamespace(info=SimpleNamespace(data=str(tmp_path / "gone")))
    with pytest.raises(UserError, match="gone are not here; give --data DIR"):
        open_data(info, None, "test")
    info.info.data = "http://127.0.0.1:1/shards"  # where the export was trained: it is asked for, not looked up here
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(UserError, match=r"shards/manifest.json cannot be read \(Cannot connect to host"),
    ):
        patch.setattr("data_prep.storage.remote.OPEN_SECONDS", 0.1)
        patch.setenv("IVTLR_CACHE_GB", "0")
        open_data(info, None, "test")


def test_evaluate_run(whole_run, data):
    code, out, err = command("pipeline.evaluate", "--run", whole_run, "--timed", 2)
    assert code == 0, err
    folder = whole_run / "evaluation" / "test"
    reports = {r["name"]: r for r in json.loads((folder / "report.json").read_text())}
    assert reports.keys() == {"explicit", "latent"}
    assert reports["latent"]["autoregressive_steps"] <= 2 + 12  # eval.max_new_tokens of the run
    assert reports["latent"]["questions"] == 24 and reports["latent"]["seconds"] > 0
    lines = [json.loads(line) for line in (folder / "latent" / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [open_split(data, "test").read(i).id for i in range(24)]
    assert {"id", "choices", "answer", "domain", "topic", "messages"} <= lines[0].keys()
    assert (lines[0]["context"], lines[0]["image"], lines[0]["answer_style"]) == ("", True, "letter")
    mean = sum(line["autoregressive_steps"] for line in lines) / 24
    assert mean == pytest.approx(reports["latent"]["autoregressive_steps"])
    assert "explicit is the stage-0 model" in out
    words = ["--benchmark", "m3cot", "--judge", "strict", "--predictions", folder / "latent" / "predictions.jsonl"]
    code, _, err = command("pipeline.score", *words, "--gold", data, "--json", folder / "scores.json")
    total = json.loads((folder / "scores.json").read_text())["total"]
    assert (total["correct"], total["questions"]) == (reports["latent"]["right"], 24), err
    code, out, err = command("pipeline.summary", "--run", whole_run)
    assert re.search(r"^latent by kind: describe [\d.]+% of \d+, look [\d.]+% of \d+$", out, re.M), out
    assert code == 0 and "latent, N=24" in out and "tensorboard --logdir" in out, err


def test_evaluate_with_sampling(whole_run, data, tmp_path):
    """One seed gives one set of answers, the timed questions before them or not; another seed, others."""
    texts = []
    for seed, timed in ((1, 0), (1, 2), (2, 0)):
        out = tmp_path / f"{seed}-{timed}"
        code, printed, err = command(
            "pipeline.evaluate", "--model", whole_run / "export" / "stage2", "--timed", timed, "--max_new_tokens", 8,
            "--limit", 6, "--batch", 3, "--latents", 1, "--temperature", 1.5, "--top_p", 0.95, "--seed", seed,
            "--out", out,
        )  # fmt: skip
        assert code == 0, err
        assert f"tokens drawn: temperature 1.5, top_p 0.95, top_k 0, seed {seed}, batch 3" in printed
        (report,) = json.loads((out / "report.json").read_text())
        assert report["decoding"].startswith("temperature 1.5") and report["autoregressive_steps"] <= 9
        lines = (out / "latent-n=1" / "predictions.jsonl").read_text().splitlines()
        texts.append([json.loads(line)["messages"][1] for line in lines])
    assert texts[0] == texts[1] != texts[2]


def test_ask(whole_run, data, tmp_path):
    example = open_split(data, "test").read(0)
    picture = tmp_path / "picture.png"
    picture.write_bytes(example.image)
    choices = [word for choice in example.choices for word in ("--choice", choice)]
    code, out, err = command(
        "pipeline.ask", "--run", whole_run, "--image", picture, "--question", example.question, *choices
    )
    assert code == 0, err
    assert "latent step 2: patches (row,column) of 3x3: (" in out and "autoregressive steps" in out


def test_ask_takes_a_prompt(monkeypatch):
    """The same as an evaluation; a context that is given is shown all the same."""
    asked = []

    class Loaded:
        def asked(self, **settings):
            asked.append(settings)
            if "asked" in settings:
                return self
            raise UserError("far enough")

    monkeypatch.setattr(ask, "load_export", lambda *_, **options: Loaded())
    with pytest.raises(UserError, match="far enough"):
        ask.main(question="q", choice=["a", "b"], model=Path("m"), context="c", prompt="released")
    assert asked == [{"context": False, "asked": "released"}, {"context": True}]


@pytest.mark.parametrize(
    "module, options, message",
    [
        ("pipeline.evaluate", ["--model", "{data}"], "is not an export of this pipeline: it has no latent_config.json"),
        ("pipeline.evaluate", [], "give either --run DIR or --model EXPORT"),
        ("pipeline.evaluate", ["--run", "{run}", "--split", "tset"], "has no split tset; it has test, train, val"),
        ("pipeline.evaluate", ["--run", "{run}", "--limt", "3"], "unknown option --limt; did you mean --limit?"),
        ("pipeline.evaluate", ["--run", "{run}", "--limit", "0"], "--limit 0: expected 1 or more"),
        ("pipeline.evaluate", ["--run", "{run}", "--temperature", "1", "--top_p", "1.5"], "--top_p 1.5: expected"),
        ("pipeline.ask", ["--run", "{run}", "--question", "Q", "--choice", "a", "--temperature", "-1"],
         "--temperature -1.0: expected 0 (greedy)"),
        ("pipeline.ask", ["--run", "{run}", "--question", "Q", "--choice", "a", "--seed", "-1"], "--seed -1: expected"),
        ("pipeline.ask", ["--run", "{run}", "--question", "Q", "--choice", "a"], "fewer than 2 choices: 1"),
        ("pipeline.ask", ["--run", "{run}", "--question", "Q", "--choice", "a", "--choice", "b", "--image", "/no"],
         "--image /no: No such file or directory"),
        ("pipeline.summary", ["--run", "{data}"], "is not a run folder"),
    ],
)  # fmt: skip
def test_mistakes_give_one_line(whole_run, data, module, options, message):
    code, _, err = command(module, *[option.format(run=whole_run, data=data) for option in options])
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0], err
    assert "Traceback" not in err


@pytest.mark.parametrize("module", ["pipeline.convert", "pipeline.reproduce"])
def test_help_lists_every_option(module):
    code, out, err = command(module, "--help")
    assert code == 0, err
    assert {"--from released (default none)", "--weights path", "--out path"} <= set(
        re.findall(r"^  (--from .*|--weights path|--out path)", out, re.M)
    )


def test_export_is_plain_transformers(whole_run):
    """The export loads with transformers alone, has no pickled file, and its vocabulary was not shrunk."""
    folder = whole_run / "export" / "stage2"
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = model.get_input_embeddings().num_embeddings
    base = Qwen2VLForConditionalGeneration.from_pretrained(whole_run / "base").get_input_embeddings().num_embeddings
    assert rows == base >= len(tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|latent|>") < rows
    assert not [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]
    assert ExportInfo.read(folder).latents == 2
    names = {}
    for place in (folder, whole_run / "base"):
        with safe_open(place / "model.safetensors", "pt") as file:
            names[place.name] = set(file.keys())
    assert names["stage2"] == names["base"] > {"model.embed_tokens.weight", "visual.merger.mlp.0.weight"}


def test_export_gives_the_same_logits(whole_run):
    """Reloaded and saved again, the weights are the same bytes; the latent attention gives stock logits at n = 0."""
    folder = whole_run / "export" / "stage2"
    loaded = load_export(folder)
    stock = Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
    ours = dict(loaded.model.backbone.vlm.named_parameters())
    for name, parameter in stock.named_parameters():
        assert torch.equal(parameter, ours[name]), name
