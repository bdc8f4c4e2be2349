"""Files in the form of the released checkpoints: to exports and back, and everything that is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from data_prep import cli
from data_prep.errors import UserError
from pipeline import evaluate, reproduce
from pipeline.backbones.qwen2_vl import Qwen2VL
from pipeline.config import ROOT, ScratchConfig
from pipeline.convert import main
from pipeline.data.batch import collate
from pipeline.export import FILE, TOKEN_ROWS, ExportInfo
from pipeline.latent.attention import ATTENTION_NAME
from pipeline.latent.method import LatentConfig, LatentMethod
from pipeline.latent.schedules import latent_forward
from pipeline.loaded import load_export
from pipeline.prepare import base_hash
from pipeline.prompt import PromptConfig, RowBuilder
from pipeline.recipe import load_config
from pipeline.released import exporting
from pipeline.scoring.report import read_reports
from tests.pipeline.examples import make_example
from tests.pipeline.tiny import spread

PUBLISHED = LatentConfig(num_patches=2, latent_grad="detach", positions="sequential", patch_order="score")
"""What these exports record, at K = 2"""

ADDED = ["<|start-latent|>", "<|end-latent|>", "<|latent|>"]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT = "base_model.model."
WRAPPED = f"base_causallm.{PEFT}"
SMALL = ["--latent.num_patches", "2", "--prompt.image_size", "none", "--prompt.max_tokens", "300"]
Q_PROJ = "model.layers.1.self_attn.q_proj"
BATCH_ROWS = ({"question": "Which fruit is it?"}, {"question": "Is it green?", "answer": 0})


@dataclass
class Checkpoint:
    """What a released run has: a base model's folder, and the model after training."""

    base: Path
    peft: torch.nn.Module
    tokens: int
    """Of the base's tokenizer"""

    def state(self, prefix: str = WRAPPED, aliases: bool = True) -> dict[str, Tensor]:
        """The state dict with the names of transformers 4.51 inside the released trainer's wrapper."""
        state = {}
        for name, tensor in self.peft.state_dict().items():
            hub = name.removeprefix(PEFT).replace("model.visual.", "visual.").replace("model.language_model.", "model.")
            state[prefix + hub] = tensor.detach().clone()
        if aliases:
            state[prefix.removesuffix(WRAPPED) + "embedding.weight"] = state[prefix + "model.embed_tokens.weight"]
        return state

    def write(self, path: Path, **options) -> Path:
        torch.save(self.state(**options), path)
        return path


def make_base(model_folder: Path, folder: Path, dtype: torch.dtype = torch.float32, **shape) -> Path:
    """A base model with a padded vocabulary, beside its processor."""
    shutil.copytree(model_folder, folder)
    values = {"hidden_size": 64, "intermediate_size": 96, "layers": 2, "heads": 4, "kv_heads": 2, "vision_size": 32}
    scratch = ScratchConfig(**{**values, **shape})
    vlm = Qwen2VL.create(scratch, AutoTokenizer.from_pretrained(folder), folder)
    spread(vlm)
    vlm.tie_weights()
    vlm.to(dtype).save_pretrained(folder)
    return folder


def train_like_released(base: Path, rank: int = 4) -> Checkpoint:
    """LoRA, a vocabulary cut to the tokens in use, head rows of new tokens copied from another; bf16 values in fp32."""
    torch.manual_seed(5)
    attention = {"text_config": ATTENTION_NAME, "vision_config": "sdpa"}
    vlm = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32, attn_implementation=attention)
    tokens = len(AutoTokenizer.from_pretrained(base))
    model = get_peft_model(vlm, LoraConfig(r=rank, lora_alpha=16, lora_dropout=0.05, target_modules=TARGETS))
    model.resize_token_embeddings(tokens + len(ADDED), mean_resizing=False)
    with torch.no_grad():
        vlm.lm_head.weight[tokens:] = vlm.lm_head.weight[40]
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    return Checkpoint(base, model.eval(), tokens)


@pytest.fixture(scope="module")
def untied(model_folder, tmp_path_factory):
    base = make_base(model_folder, tmp_path_factory.mktemp("untied") / "base", torch.bfloat16, tie_embeddings=False)
    return train_like_released(base)


@pytest.fixture(scope="module")
def tied(model_folder, tmp_path_factory):
    shape = {"layers": 3, "hidden_size": 32, "heads": 2, "kv_heads": 1, "tie_embeddings": True}
    return train_like_released(make_base(model_folder, tmp_path_factory.mktemp("tied") / "base", **shape), rank=2)


def run(*words) -> None:
    cli.run(main, [str(word) for word in words])


def convert(checkpoint: Checkpoint, weights: Path, out: Path, *options) -> Path:
    run("--from", "released", "--weights", weights, "--base", checkpoint.base, "--out", out, *SMALL, *options)
    return out


def latent_logits(model: torch.nn.Module, processor) -> Tensor:
    """Logits of two questions' answers after two latent steps, (labelled columns, vocabulary)."""
    builder = RowBuilder(processor, PromptConfig(), 2)
    rows = [builder.row(make_example(**changes), "k", 0, 2, ["It is green."]) for changes in BATCH_ROWS]
    batch, backbone = collate(rows, processor.row_format, 2), Qwen2VL(model)
    with torch.no_grad():
        trace = latent_forward(backbone, batch, LatentMethod.of(PUBLISHED, backbone))
        return backbone.logits(trace.predictors(batch.latents))


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest logit, or of 1."""
    assert (found - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())


def logits_of(export: Path) -> Tensor:
    loaded = load_export(export, torch.float32)
    assert loaded.info.latent == PUBLISHED
    return latent_logits(loaded.model.backbone.vlm, loaded.processor)


# ---- to an export
@pytest.mark.parametrize("export", ["merged", "adapter"])
@pytest.mark.parametrize("prefix", [WRAPPED, "module." + WRAPPED, PEFT, "net." + PEFT])
@pytest.mark.parametrize("which", ["untied", "tied"])
def test_same_logits(which, prefix, export, request, tmp_path):
    """Of every vocabulary row, new tokens' included, after latent steps."""
    checkpoint = request.getfixturevalue(which)
    weights = checkpoint.write(tmp_path / "f.pth", prefix=prefix)
    out = convert(checkpoint, weights, tmp_path / "out", "--export", export)
    processor = Qwen2VL.processor(checkpoint.base, PromptConfig())
    expected, found = latent_logits(checkpoint.peft, processor), logits_of(out)
    assert found.shape == expected.shape and found.shape[-1] == checkpoint.tokens + 3
    assert_close(found, expected)
    info = ExportInfo.read(out)
    assert info.converted.prefix == prefix and info.converted.lora_alpha == 16
    assert len(AutoTokenizer.from_pretrained(out)) == checkpoint.tokens + 3
    assert not list(tmp_path.glob("*.writing"))


def test_adapter_records_its_base(untied, tmp_path):
    out = convert(untied, untied.write(tmp_path / "f.pth"), tmp_path / "out", "--export", "adapter")
    info = ExportInfo.read(out)
    assert info.base_hash == base_hash(untied.base, weights=True) and info.adapter_of == str(untied.base)
    assert not (out / "model.safetensors").exists()


def test_todays_names(untied, tmp_path):
    """A file that peft writes with transformers 5."""
    torch.save(untied.peft.state_dict(), tmp_path / "f.pth")
    out = convert(untied, tmp_path / "f.pth", tmp_path / "out")
    expected = latent_logits(untied.peft, Qwen2VL.processor(untied.base, PromptConfig()))
    assert_close(logits_of(out), expected)


def test_files_of_many_shards(tied, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "SHARD", "100KB")
    out = convert(tied, tied.write(tmp_path / "f.pth"), tmp_path / "out")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    expected = latent_logits(tied.peft, Qwen2VL.processor(tied.base, PromptConfig()))
    assert_close(logits_of(out), expected)


def test_frozen_weights_in_bf16(untied, tmp_path):
    """As ZeRO-2's fp32 files have them: merged matrices are fp32, the others stay; --dtype makes all alike."""
    state = {n: t if "lora_" in n else t.bfloat16() for n, t in untied.state().items()}
    torch.save(state, tmp_path / "f.pth")
    out = convert(untied, tmp_path / "f.pth", tmp_path / "out")
    types = {name: tensor.dtype for name, tensor in load_file(out / "model.safetensors").items()}
    assert types[f"{Q_PROJ}.weight"] == torch.float32 and types["lm_head.weight"] == torch.bfloat16
    expected = latent_logits(untied.peft, Qwen2VL.processor(untied.base, PromptConfig()))
    assert_close(logits_of(out), expected)
    out = convert(untied, tmp_path / "f.pth", tmp_path / "small", "--dtype", "bf16")
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


def test_alpha_counts(untied, tmp_path):
    """Merged weights are W + alpha/r B A."""
    weights = untied.write(tmp_path / "f.pth")
    out = convert(untied, weights, tmp_path / "out", "--model.lora.alpha", "6")
    state = untied.state()
    a, b = (state[f"{WRAPPED}{Q_PROJ}.lora_{factor}.default.weight"] for factor in "AB")
    wanted = state[f"{WRAPPED}{Q_PROJ}.base_layer.weight"] + 6 / 4 * b @ a
    assert torch.allclose(load_file(out / "model.safetensors")[f"{Q_PROJ}.weight"], wanted, atol=1e-6)


# ---- what the state dict does not say
def test_published_settings(untied, tmp_path, data):
    """Are the default, and the export answers questions with them."""
    out = tmp_path / "out"
    weights = untied.write(tmp_path / "f.pth")
    run("--from", "released", "--weights", weights, "--base", untied.base, "--out", out, "--benchmark", "scienceqa")
    info = ExportInfo.read(out)
    published = load_config(ROOT / "recipes" / "published" / "qwen2vl_scienceqa.yaml", {})
    assert info.latent == published.latent and info.prompt == published.prompt
    assert (info.latent.num_patches, info.latent.patch_order, info.prompt.answer) == (32, "score", "index")
    assert (info.latents, info.stage, info.groups) == (3, 3, 3)
    evaluate.main(model=out, data=data, limit=2, timed=0, max_new_tokens=3)
    (report,) = read_reports(out / "evaluation" / "test")
    assert report.name == "latent" and report.questions == 2 and 4 <= report.autoregressive_steps <= 6


def test_reproduced_from_a_released_file(untied, tmp_path, data, capsys):
    """By the one command: converted, answered, scored three ways beside the paper's figures."""
    settings = {
        "model.path": untied.base, "data.path": data, "prompt.image_size": 84, "latent.num_patches": 2, "limit": 2,
        "eval.max_new_tokens": 3, "out": tmp_path / "out", "weights": untied.write(tmp_path / "f.pth"),
    }  # fmt: skip
    groups = tmp_path / "groups.yaml"
    groups.write_text("name: laid_over\ncurriculum: {groups: 2}\n")

    def run_again(**changed) -> None:
        words = {name: str(value) for name, value in (settings | changed).items()}
        words |= {"recipe": f"published/qwen2vl_m3cot,{groups}", "from": "released"}
        reproduce.main(**cli.bind(reproduce.main, words))

    run_again()
    said = capsys.readouterr().out
    assert "71.8%" in said and "asked as released" in said
    judges = [line.split()[1] for line in said.splitlines() if line.startswith("here, ")]
    assert judges == ["released", "strict", "official"]
    assert "laid_over, m3cot: 2 questions" in said
    info = ExportInfo.read(tmp_path / "out" / "released")
    assert info.latent == PUBLISHED and info.groups == 2
    run_again()
    assert "is there, made from" in capsys.readouterr().out
    with pytest.raises(UserError, match="released: latent is not the recipe's"):  # of another K
        run_again(**{"latent.num_patches": 3})
    with pytest.raises(UserError, match="released: the last stage is not the recipe's .3; 0.") as refusal:
        run_again(**{"curriculum.stages": "[{latents: 0, skip: 0, epochs: 16}]"})
    assert "its number of latent steps is not the recipe's (3; 0)" in refusal.value.lines[1]
    with pytest.raises(UserError, match="made from f.pth, and model.lora.alpha is 6 now, was 16; remove it, or choose"):
        run_again(**{"model.lora.alpha": 6})
    with pytest.raises(UserError, match="made from f.pth, and SHA-256 of .*other.pth is .* now, was"):
        other = edited(untied, tmp_path / "other.pth", lambda state: state[LORA_A].mul_(2))
        run_again(weights=other)


def test_settings_of_a_recipe(untied, tmp_path):
    """Take the place of the published ones; single options come after them."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "model: {path: other, lora: {r: 64, alpha: 8}}\nprompt: {answer: index}\nlatent: {num_patches: 5}\n"
        "curriculum: {groups: 2, stages: [{latents: 0, skip: 0, steps: 1}, {latents: 4, skip: 1, steps: 1}]}\n"
        "data: {path: shards}\n"
    )
    weights = untied.write(tmp_path / "f.pth")
    words = ["--from", "released", "--weights", weights, "--base", untied.base, "--recipe", recipe]
    run(*words, "--out", tmp_path / "out", "--prompt.answer", "letter")
    info = ExportInfo.read(tmp_path / "out")
    assert info.prompt == PromptConfig(answer="letter") and info.latent == LatentConfig(num_patches=5)
    assert (info.latents, info.stage, info.groups, info.converted.lora_alpha) == (4, 1, 2, 8)
    run(*words, "--out", tmp_path / "first", "--stage", "0", "--data", tmp_path)
    info = ExportInfo.read(tmp_path / "first")
    assert (info.latents, info.stage, info.data) == (0, 0, str(tmp_path))


# ---- back
@pytest.mark.parametrize("prefix, aliases", [(WRAPPED, True), ("module." + WRAPPED, True), (PEFT, False)])
@pytest.mark.parametrize("which", ["untied", "tied"])
def test_back_from_an_adapter(which, prefix, aliases, request, tmp_path):
    """The same names and the same bytes."""
    checkpoint = request.getfixturevalue(which)
    weights = checkpoint.write(tmp_path / "f.pth", prefix=prefix, aliases=aliases)
    out = convert(checkpoint, weights, tmp_path / "out", "--export", "adapter")
    run("--to", "released", "--model", out, "--out", tmp_path / "back.pth")
    before, after = (torch.load(path, weights_only=True) for path in (weights, tmp_path / "back.pth"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    if aliases:
        table = f"{prefix}model.embed_tokens.weight"
        alias = prefix.removesuffix(WRAPPED) + "embedding.weight"
        assert after[alias].data_ptr() == after[table].data_ptr()
    run("--to", "released", "--model", convert(checkpoint, tmp_path / "back.pth", tmp_path / "again"), "--out",
        tmp_path / "merged.pth")  # fmt: skip


@pytest.mark.parametrize("which", ["untied", "tied"])
def test_back_from_a_merged_export(which, request, tmp_path):
    """Plain weights in fp32, which convert again where changed weights are allowed."""
    checkpoint = request.getfixturevalue(which)
    out = convert(checkpoint, checkpoint.write(tmp_path / "f.pth"), tmp_path / "out")
    run("--to", "released", "--model", out, "--out", tmp_path / "back.pth")
    state = torch.load(tmp_path / "back.pth", weights_only=True)
    plain = {name.removeprefix("base_causallm."): tensor for name, tensor in state.items()}
    stored = load_file(out / "model.safetensors")
    head = {"lm_head.weight"} if which == "tied" else set()
    assert plain.keys() == stored.keys() | head and all(torch.equal(plain[name], stored[name]) for name in stored)
    again = convert(checkpoint, tmp_path / "back.pth", tmp_path / "again", "--allow_changed_base", "true")
    assert torch.equal(logits_of(again), logits_of(out)) and ExportInfo.read(again).converted.changed_base


def test_back_from_an_adapter_trained_here(untied, tmp_path):
    """Its vocabulary is cut to what the released code has; names are those that its loader asks for."""
    out = convert(untied, untied.write(tmp_path / "f.pth"), tmp_path / "out", "--export", "adapter")
    values = json.loads((out / FILE).read_text())
    (out / FILE).write_text(json.dumps(values | {"vocabulary": None, "converted": None}))
    (out / TOKEN_ROWS).unlink()
    run("--to", "released", "--model", out, "--out", tmp_path / "back.pth")
    state, back = untied.state(), torch.load(tmp_path / "back.pth", weights_only=True)
    assert state.keys() == back.keys()
    base = load_file(untied.base / "model.safetensors")
    for name, tensor in state.items():
        if name.endswith("lm_head.weight"):
            tensor = base["lm_head.weight"][: len(tensor)].float()
        assert torch.equal(back[name], tensor), name


# ---- another base
def changed(checkpoint: Checkpoint, path: Path, name: str) -> Path:
    state = checkpoint.state(aliases=False)
    state[WRAPPED + name].view(-1)[7] += 1e-4
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    "name", ["visual.blocks.0.mlp.fc1.weight", "model.norm.weight", f"{Q_PROJ}.base_layer.weight", "lm_head.weight"]
)
def test_changed_frozen_weight(untied, tmp_path, capsys, name):
    """Is named, however small the change; taken as it is where that is asked for."""
    weights = changed(untied, tmp_path / "f.pth", name)
    plain = name.replace(".base_layer", "")
    for export in ("merged", "adapter"):
        said = refused(untied, weights, tmp_path, capsys, "--export", export)
        assert f"1 of 46 frozen weights are not those of {untied.base}: {plain};" in said
    out = convert(untied, weights, tmp_path / "out", "--allow_changed_base", "true")
    assert ExportInfo.read(out).converted.changed_base
    wanted = torch.load(weights, weights_only=True)[WRAPPED + name]
    if "proj" not in name:
        assert torch.equal(load_file(out / "model.safetensors")[plain], wanted)


def test_base_in_other_precision(model_folder, tmp_path, capsys):
    """The released trainer loads its base in bf16: merged that is the file's model; an adapter's would be another."""
    checkpoint = train_like_released(make_base(model_folder, tmp_path / "base"))
    state = {n: t if "lora_" in n else t.bfloat16().float() for n, t in checkpoint.state().items()}
    torch.save(state, tmp_path / "f.pth")
    convert(checkpoint, tmp_path / "f.pth", tmp_path / "out")
    said = capsys.readouterr().out
    assert "equal them in bf16" in said
    said = refused(checkpoint, tmp_path / "f.pth", tmp_path, capsys, "--export", "adapter")
    assert "rounded to bf16" in said and "use --export merged" in said


# ---- refused
def refused(checkpoint: Checkpoint, weights: Path, folder: Path, capsys, *options, lines: int = 1) -> str:
    """What the command says; it leaves nothing behind."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        convert(checkpoint, weights, folder / "refused", *options)
    assert ended.value.code == 2 and not list(folder.glob("refused*"))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == lines, said
    return "\n".join(said)


class Code:
    def __reduce__(self):
        return print, ("code ran",)


def test_files_that_are_no_state_dict(untied, tmp_path, capsys):
    path = tmp_path / "f.pth"
    assert "no such file" in refused(untied, path, tmp_path, capsys)
    assert "not a file" in refused(untied, tmp_path, tmp_path, capsys)
    path.write_bytes(b"weights")
    assert "is not a file of torch.save, or is cut short" in refused(untied, path, tmp_path, capsys)
    path.write_bytes(pickle.dumps({"a": 1}))
    assert "is not a file of torch.save, or is cut short" in refused(untied, path, tmp_path, capsys)
    path.write_bytes(untied.write(tmp_path / "whole.pth").read_bytes()[:-1000])
    assert "is not a file of torch.save, or is cut short" in refused(untied, path, tmp_path, capsys)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")
    assert f"{path} is not read: " in refused(untied, path, tmp_path, capsys)
    torch.save({"a": Code()}, path)
    said = refused(untied, path, tmp_path, capsys)
    assert "it holds code, not tensors alone" in said and "code ran" not in capsys.readouterr().out
    torch.save([torch.ones(2)], path)
    assert "it holds a list, not names and tensors" in refused(untied, path, tmp_path, capsys)
    torch.save({"epoch": 3, "model": untied.state()}, path)
    assert "is no state dict: epoch, model are no tensors" in refused(untied, path, tmp_path, capsys)


def edited(checkpoint: Checkpoint, path: Path, edit) -> Path:
    state = checkpoint.state()
    edit(state)
    torch.save(state, path)
    return path


NORM = WRAPPED + "model.norm.weight"
LORA_A, LORA_B = (f"{WRAPPED}{Q_PROJ}.lora_{x}.default.weight" for x in "AB")


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda s: s.update({WRAPPED + "model.extra.weight": torch.ones(2)}),
         f"{WRAPPED}model.extra.weight is in no model like the base"),
        (lambda s: s.update({f"{WRAPPED}{Q_PROJ}.lora_C.default.weight": torch.ones(2)}), "lora_C.default.weight is"),
        (lambda s: s.update({f"odd{i}.weight": torch.ones(2) for i in range(5)}),
         "odd0.weight, odd1.weight, odd2.weight and 2 more are in no model"),
        (lambda s: s.pop(WRAPPED + "visual.merger.mlp.0.weight"), "visual.merger.mlp.0.weight is missing"),
        (lambda s: s.pop(LORA_B), f"{Q_PROJ}.lora_B is missing"),
        (lambda s: (s.pop(LORA_A), s.pop(LORA_B)), f"{Q_PROJ}.lora_A, {Q_PROJ}.lora_B are missing"),
        (lambda s: s.pop(f"{WRAPPED}{Q_PROJ}.base_layer.weight"), f"{Q_PROJ}.weight is missing"),
        (lambda s: s.update({f"{WRAPPED}{Q_PROJ}.weight": torch.ones(64, 64)}), "is there under another name too"),
        (lambda s: s.update({WRAPPED + "model.norm.weight": torch.ones(63)}),
         "model.norm.weight (63,) in place of (64,) is of another shape"),
        (lambda s: s.update({LORA_A: torch.ones(3, 64), LORA_B: torch.ones(64, 3)}),
         f"{Q_PROJ} (3) is of another LoRA rank than the rest (4)"),
        (lambda s: s.update({LORA_B: torch.ones(63, 4)}), f"{Q_PROJ}.lora_B (63, 4) in place of (64, 4)"),
        (lambda s: s.update({LORA_A: torch.ones(())}), f"{Q_PROJ}.lora_A is no finite matrix of floats"),
        (lambda s: s[LORA_A].fill_(float("nan")), f"{Q_PROJ}.lora_A is no finite matrix of floats"),
        (lambda s: s.update({LORA_A: s[LORA_A].int()}), f"{Q_PROJ}.lora_A is no finite matrix of floats"),
        (lambda s: s.update({LORA_A: s[LORA_A][:0]}), f"{Q_PROJ}.lora_A is no finite matrix of floats"),
        (lambda s: s.update({WRAPPED + "lm_head.weight": torch.ones(100, 64)}), "embeddings and head have"),
        (lambda s: s.update({NORM: s[NORM].int()}), "model.norm.weight is of a type that is no model's (torch.int32)"),
        (lambda s: s.update({NORM: s[NORM].to(torch.float8_e4m3fn)}), "model.norm.weight is of a type that is no"),
        (lambda s: s.update({NORM: s[NORM].to_sparse()}), "model.norm.weight is of a type that is no model's"),
        (lambda s: s.update({NORM: s[NORM].to("meta")}), "model.norm.weight is of a type that is no model's"),
        (lambda s: s.update({"a\n\x1b[31m": torch.ones(2)}), "'a\\n\\x1b[31m' is in no model"),
        (lambda s: s.update({"embedding.weight": s["embedding.weight"] + 1}), "embedding.weight is not equal to"),
        (lambda s: [s.pop(n) for n in list(s) if "embed" in n or "head" in n],
         "no name ends in model.embed_tokens.weight or lm_head.weight"),
    ],
)  # fmt: skip
def test_state_dicts_that_do_not_fit(untied, tmp_path, capsys, edit, message):
    weights = edited(untied, tmp_path / "f.pth", edit)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        convert(untied, weights, tmp_path / "out")
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert all(line.startswith("error: ") for line in said.splitlines())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [(), ("--allow_changed_base", "true"), ("--export", "adapter")])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_no_numbers(untied, tmp_path, capsys, name, options, value):
    """Neither in a row that the trainer added, nor in a frozen weight of whatever base."""
    weights = edited(untied, tmp_path / "f.pth", lambda s: s[WRAPPED + name].view(-1)[-1].fill_(value))
    said = refused(untied, weights, tmp_path, capsys, *options)
    assert f"1 weights have NaN or infinite values, such as {name}" in said


def test_vocabulary_smaller_than_the_tokenizer(untied, tmp_path, capsys):
    def cut(state):
        for name in state:
            if "embed" in name or "head" in name:
                state[name] = state[name][:100].clone()

    said = refused(untied, edited(untied, tmp_path / "f.pth", cut), tmp_path, capsys)
    assert f"its vocabulary has 100 rows, but the base's tokenizer has {untied.tokens} tokens" in said


def test_bases_that_do_not_fit(untied, tied, tmp_path, capsys):
    weights = untied.write(tmp_path / "f.pth")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        convert(tied, weights, tmp_path / "out")
    said = capsys.readouterr().err
    assert "model.layers.2.self_attn.q_proj.weight" in said and "of another shape than the base asks for" in said
    for base, message in (
        (tmp_path / "none", "no such folder"),
        (tmp_path, "cannot be loaded"),
        ("nobody/none", "nor to be had from the hub"),
    ):
        said = refused(Checkpoint(base, untied.peft, 0), weights, tmp_path, capsys)
        assert message in said
    base = shutil.copytree(untied.base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    assert "is a bert model; released files are known of qwen2_vl" in refused(
        Checkpoint(base, untied.peft, 0), weights, tmp_path, capsys
    )
    (base / "config.json").write_text(json.dumps(config))
    stored = load_file(base / "model.safetensors")
    del stored["model.norm.weight"]
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    assert "model.norm.weight" in refused(Checkpoint(base, untied.peft, 0), weights, tmp_path, capsys)
    (base / "model.safetensors").unlink()
    assert "has no weights" in refused(Checkpoint(base, untied.peft, 0), weights, tmp_path, capsys)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--export", "adapter", "--dtype", "bf16"], "--dtype is for merged exports"),
        (["--export", "adapter", "--allow_changed_base", "true"], "--allow_changed_base is for merged exports"),
        (["--stage", "4"], "--stage 4: the curriculum has stages 0 to 3"),
        (["--latent.num_patch", "4"], "unknown option --latent.num_patch; did you mean --latent.num_patches?"),
        (["--exports", "adapter"], "unknown option --exports"),
        (["--benchmark", "vqa"], "--benchmark vqa: expected one of m3cot, scienceqa"),
        (["--prompt.answer", "word"], "prompt.answer: Input should be 'letter' or 'index'"),
        (["--model.backbone", "chameleon"], "is qwen2_vl"),
        (["--model.path", "elsewhere"], "--model.path elsewhere: --base"),
        (["--recipe", str(ROOT / "recipes/published/chameleon_m3cot.yaml")], "model.backbone chameleon: --base"),
    ],
)
def test_options_that_do_not_fit(untied, tmp_path, capsys, options, message):
    weights = untied.write(tmp_path / "f.pth")
    assert message in refused(untied, weights, tmp_path, capsys, *options)


def test_adapter_without_lora(untied, tmp_path, capsys):
    def plain(state):
        for name in list(state):
            tensor = state.pop(name)
            if "lora_" not in name:
                state[name.replace(".base_layer", "")] = tensor

    weights = edited(untied, tmp_path / "f.pth", plain)
    assert "has no LoRA weights" in refused(untied, weights, tmp_path, capsys, "--export", "adapter")


def failing(capsys, *words) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_directions(untied, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    weights = untied.write(tmp_path / "f.pth")
    words = ["--weights", weights, "--base", untied.base, "--out", tmp_path / "there"]
    assert "--out" in (said := failing(capsys, "--from", "released", *words)) and "exists; choose another" in said
    assert "give either --from released or --to released" in failing(capsys, *words)
    assert "give either --from released" in failing(capsys, "--from", "released", "--to", "released", *words)
    out = tmp_path / "back.pth"
    assert "is not an export of this pipeline" in failing(
        capsys, "--to", "released", "--model", untied.base, "--out", out
    )
    assert "exists; choose another" in failing(capsys, "--to", "released", "--model", tmp_path, "--out", weights)
    assert "unknown option --base" in failing(capsys, "--to", "released", "--model", "m", "--out", out, "--base", "b")
    assert not out.exists()


def test_token_rows_are_needed(untied, tmp_path):
    out = convert(untied, untied.write(tmp_path / "f.pth"), tmp_path / "out", "--export", "adapter")
    (out / TOKEN_ROWS).unlink()
    with pytest.raises(UserError, match=f"is not complete: it lacks {TOKEN_ROWS}"):
        load_export(out)
