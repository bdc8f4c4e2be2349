"""The base model and the data, checked before anything is built."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from data_prep.errors import UserError
from pipeline.config import LoraConfig, ModelConfig
from pipeline.prepare import base_hash, check_base, data_folder, data_name, make_data
from pipeline.prompt import PromptConfig
from pipeline.recipe import load_config
from tests.pipeline.tiny import tiny_config


@pytest.fixture(scope="module")
def model(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model's folder; its weights and tokenizer do not fit each other, which no check here looks at."""
    folder = tmp_path_factory.mktemp("pretrained") / "model"
    shutil.copytree(model_folder, folder)
    Qwen2VLForConditionalGeneration(tiny_config()).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


def problem(folder: Path, lora: LoraConfig | None = None) -> str:
    with pytest.raises(UserError) as caught:
        check_base(ModelConfig(path=str(folder), lora=lora), PromptConfig())
    (line,) = caught.value.lines
    assert "\n" not in line
    return line


def test_sound(folder: Path) -> None:
    check_base(ModelConfig(path=str(folder), lora=LoraConfig()), PromptConfig())


def test_weights_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no weights (model.safetensors)" in problem(folder)
    shards = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
    assert "model-00001-of-00002.safetensors is missing" in problem(folder)


def test_weights_cut_short(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors is damaged or cut short" in problem(folder)


def test_lora_targets_that_match_nothing(folder: Path) -> None:
    line = problem(folder, LoraConfig(targets=["q_proj", "q_porj", "qkv"]))  # qkv is the vision tower's
    assert line == "model.lora.targets: no module of the language model is called q_porj, qkv"


# ---- identity ---------------------------------------------------------------------------------
def change(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


@pytest.mark.parametrize("frozen", [True, False])
def test_base_hash(folder: Path, frozen: bool) -> None:
    """The tokenizer counts always, the weights only where checkpoints leave some out."""
    before = base_hash(folder, frozen)
    (folder / "README.md").write_text("hello")
    assert base_hash(folder, frozen) == before
    for name in ("tokenizer.json", "preprocessor_config.json"):
        change(folder / name)
        assert base_hash(folder, frozen) != before
        before = base_hash(folder, frozen)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert base_hash(folder, frozen) != before
    before = base_hash(folder, frozen)
    change(folder / "model.safetensors")
    assert (base_hash(folder, frozen) != before) == frozen


# ---- data -------------------------------------------------------------------------------------
def test_signal_to_the_whole_job_does_not_end_data_making(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGUSR1 asks the trainer to stop; the program that makes its data goes on."""
    maker = tmp_path / "maker"
    maker.write_text("#!/bin/sh\nkill -USR1 $$\nexit 0\n")
    maker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(maker))
    config = load_config(None, {"model.path": "m", "data.path": str(tmp_path / "data"), "data.source": "trails"})
    make_data(config, print)
    maker.write_text("#!/bin/sh\nexit 1\n")
    elsewhere = config.model_copy(update={"data": config.data.model_copy(update={"path": "https://host/shards"})})
    make_data(elsewhere, print)  # a URL is never made
    assert data_name(elsewhere) == data_folder(elsewhere) == "https://host/shards"
    with pytest.raises(UserError, match="could not be made from trails"):
        make_data(config, print)
