"""The memory forecast, by hand for a 7B model, and what it decides."""

from __future__ import annotations

import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoTokenizer, Qwen2VLConfig

from data_prep.errors import UserError
from data_prep.tokenizer import train_tokenizer
from pipeline import build, distributed, memory
from pipeline.backbones import BACKBONES
from pipeline.config import ROOT, ScratchConfig
from pipeline.ds_config import Triangle, batch_triangle, load_ds_config
from pipeline.engine import expected_size, load_model, use_of
from pipeline.memory import (
    Forecast,
    ModelSize,
    Room,
    Use,
    cgroup_limits,
    forecast,
    machine_memory,
    residency,
    smallest_room,
    snapshot_bytes,
    stays_resident,
)
from pipeline.memory_advice import lack_of_memory_told, problem_of_states, warning_of_activations
from pipeline.model import resolve_dtype
from pipeline.recipe import load_config
from tests.pipeline.conftest import TEXTS
from tests.pipeline.tiny import tiny_models

N = 7_600_000_000
FULL = ModelSize(
    parameters=N, trained=N, layers=28, hidden=3584, intermediate=18944, kv_width=512, vocabulary=152064, width=2
)


GPU, CPU = Room(80_000_000_000, 200_000_000_000), Room(80_000_000_000, 0)
USE = Use(zero_stage=3, world=8, rows=1, row_columns=3400, checkpointing=True, keeps_kv=False)


def of(size: ModelSize = FULL, room: Room = CPU, **options: Any) -> Forecast:
    return forecast(size, replace(USE, **options), room)


@pytest.mark.parametrize(
    ("zero", "expected"),
    [(1, 2 * N + 2 * N + 12 * N // 8), (2, 2 * N + (2 + 12) * N // 8), (3, (2 + 2 + 12) * N // 8)],
)
def test_states_are_split_as_the_stage_says(zero: int, expected: int) -> None:
    """bf16 parameters and gradients, fp32 master copy and two moments."""
    assert of(zero_stage=zero).states == expected


def test_frozen_parameters_have_no_optimizer() -> None:
    lora = replace(FULL, trained=160_000_000)
    assert of(lora).states == (2 * N + 14 * 160_000_000) // 8


@pytest.mark.parametrize(
    ("zero", "without_frozen", "expected"),
    [(3, False, (12 * 160_000_000 + 2 * (N - 160_000_000)) // 8), (3, True, 12 * 160_000_000 // 8),
     (2, False, 12 * 160_000_000 // 8 + 2 * N), (2, True, 12 * 160_000_000 // 8 + 2 * 160_000_000)],
)  # fmt: skip
def test_copy_of_a_checkpoint(zero: int, without_frozen: bool, expected: int) -> None:
    """Master copy and moments are split; below ZeRO-3 one rank has the weights whole."""
    lora = replace(FULL, trained=160_000_000)
    assert snapshot_bytes(lora, zero, 8, without_frozen) == expected


def test_activations() -> None:
    """Checkpointing keeps a layer's input a column; bptt keeps keys and values besides."""
    kept, kv, plain = of(), of(keeps_kv=True), of(checkpointing=False)
    assert kv.activations - kept.activations == 3400 * 28 * 2 * 2 * 512
    inputs, logits = 3400 * 28 * 2 * 3584, 3 * 4 * 152064 * 1024
    layer = kept.activations - inputs - logits
    assert plain.activations == 28 * layer + logits
    assert of(rows=2).activations - kept.activations == inputs + layer


def test_a_whole_copy_stays_where_it_fits() -> None:
    assert of().gathered == 2 * N and of().resident
    assert not of(room=Room(30_000_000_000, 0)).resident
    assert of(world=1).gathered == of(zero_stage=2).gathered == 0


def test_limits_follow_the_decision() -> None:
    for resident in (True, False):
        zero = {"stage": 3, **residency(resident, N)}
        assert stays_resident(zero, N) is resident
    assert stays_resident({"stage": 2}, N)
    assert not stays_resident({"stage": 3}, N), "DeepSpeed's own limits are a billion parameters"


def test_size_of_a_model() -> None:
    backbone, _ = tiny_models()
    backbone.vision.requires_grad_(False)
    size = ModelSize.of(backbone, backbone.decoder.config)
    frozen = sum(p.numel() for p in backbone.vision.parameters())
    assert size.parameters - size.trained == frozen > 0
    assert (size.layers, size.hidden, size.kv_width, size.width) == (3, 64, 2 * 16, 4)


# ---- offloading ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "states", "offloaded"),
    [
        ({}, (2 + 2 + 12) * N // 8, 0),
        ({"optimizer_on": "cpu"}, 2 * N // 8, (12 + 4) * N // 8),
        ({"optimizer_on": "cpu", "parameters_on": "cpu"}, 0, (2 + 12 + 4) * N // 8),
        ({"optimizer_on": "nvme", "parameters_on": "nvme"}, 0, 0),
        ({"optimizer_on": "cpu", "parameters_on": "cpu", "zero_stage": 2}, 2 * N, (12 + 4) * N // 8),
        ({"optimizer_on": "cpu", "zero_stage": 1}, 2 * N + 2 * N, (12 + 4) * N // 8),
    ],
)
def test_offloading_beside_a_gpu(options: dict[str, Any], states: int, offloaded: int) -> None:
    found = of(room=GPU, **options)
    assert (found.states, found.offloaded) == (states, offloaded)
    assert found.states_fit


def test_offloading_to_where_a_rank_computes_changes_nothing() -> None:
    assert of(optimizer_on="cpu", parameters_on="cpu") == of()


def test_offloading_needs_room_on_the_machine() -> None:
    assert not of(room=Room(80_000_000_000, 10_000_000_000), optimizer_on="cpu").states_fit


def test_a_deepspeed_file_with_offloading() -> None:
    config = load_config(None, {"data.path": "d", "model.path": "m", "latent.latent_grad": "bptt"})
    zero = load_ds_config(ROOT / "ds_configs" / "zero3_offload.json")
    use = use_of(config, zero, Triangle(64, 4, 2, 8))
    assert use == Use(3, 8, 4, config.prompt.max_tokens, True, True, "cpu", "cpu")
    assert (
        use_of(config, load_ds_config(ROOT / "ds_configs" / "zero2.json"), Triangle(8, 1, 1, 8)).optimizer_on == "none"
    )


# ---- what there is ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("membership", "files", "limits"),
    [
        ("0::/", {"memory.max": "5000\n"}, [5000]),
        ("0::/", {"memory.max": "max\n"}, []),
        ("0::/job/step", {"job/step/memory.max": "max", "job/memory.max": "700", "memory.max": "9000"}, [700, 9000]),
        ("0::/only/there/on/the/machine", {"memory.max": "800"}, [800]),
        ("4:cpu:/x\n3:cpuset,memory:/x/y", {"memory/x/memory.limit_in_bytes": "600", "x/memory.max": "1"}, [600]),
        ("0::/x\n1:name=systemd:/x", {}, []),
    ],
    ids=["container", "no limit", "above", "path of the machine", "version 1", "nothing"],
)
def test_limits_of_control_groups(tmp_path: Path, membership: str, files: dict[str, str], limits: list[int]) -> None:
    (tmp_path / "cgroup").write_text(membership + "\n")
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert list(cgroup_limits(tmp_path / "cgroup", tmp_path / "fs")) == limits
    assert list(cgroup_limits(tmp_path / "none", tmp_path / "fs")) == []


def test_a_limit_counts_where_it_is_less_than_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = psutil.virtual_memory().total
    monkeypatch.setattr(memory, "cgroup_limits", lambda: iter([2**63, 10**15]))
    assert machine_memory() == whole
    monkeypatch.setattr(memory, "cgroup_limits", lambda: iter([2**63, 4096]))
    assert machine_memory() == 4096


def test_ranks_of_a_machine_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of other machines do not; the tightest decides for all."""
    monkeypatch.setattr(memory, "machine_memory", lambda: 12_000)
    host = socket.gethostname()
    answers = iter([[host, "other", host, "other", host], [Room(4_000, 0), Room(5_000, 0)]])
    monkeypatch.setattr(distributed, "gather", lambda value: next(answers))
    assert smallest_room(torch.device("cpu")) == Room(4_000, 0)


# ---- before the model is loaded -----------------------------------------------------------------------------
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("training", ["full", "lora", "frozen tower"])
def test_the_size_is_known_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: str, training: str
) -> None:
    """From the config alone, with the tokens that are added; the tokenizer is left as it was."""
    monkeypatch.setattr(distributed, "gather", lambda value: [value])
    settings = {
        "full": {"model.dtype": "fp32"},
        "lora": {"model.lora": "{r: 4}", "model.dtype": "bf16"},
        "frozen tower": {"model.freeze_vision": "true"},
    }[training]
    config = load_config(
        None, {"model.backbone": backbone, "model.path": "m", "data.path": "d", "prompt.markers": "true", **settings}
    )
    family, dtype = BACKBONES[backbone], resolve_dtype(config.model.dtype, "cpu")
    tokenizer = train_tokenizer(TEXTS, tmp_path, 520, family.TOKENIZER)
    shape: Any = ScratchConfig(hidden_size=64, intermediate_size=96, layers=2, kv_heads=2, vision_size=32)
    family.create(shape, tokenizer, tmp_path)
    tokens = len(tokenizer)
    before = expected_size(config, tmp_path, dtype, tokenizer)
    assert len(tokenizer) == tokens
    backbone_model = family(load_model(config, tmp_path, dtype, tokenizer))
    assert before == ModelSize.of(backbone_model, backbone_model.decoder.config)
    assert before.width == dtype.itemsize
    # Chameleon's image tokenizer is never trained
    assert (before.trained < before.parameters) is (training != "full" or backbone == "chameleon")


SEVEN = {  # Qwen2-VL-7B's shape
    "text_config": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064,
    },
    "vision_config": {"hidden_size": 3584, "embed_dim": 1280, "depth": 32, "num_heads": 16, "mlp_ratio": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def seven(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a 7B model's config and no weights at all."""
    folder = tmp_path_factory.mktemp("seven") / "model"
    shutil.copytree(model_folder, folder)
    Qwen2VLConfig(**SEVEN, tie_word_embeddings=False).save_pretrained(folder)
    return folder


def checked(
    seven: Path, monkeypatch: pytest.MonkeyPatch, ds: str, ranks: int, gb: float, **options: str
) -> tuple[ModelSize, list[str]]:
    """`check_memory` on so many ranks of so much memory each; the warnings that it logs."""
    monkeypatch.setattr(build, "smallest_room", lambda device: Room(int(gb * 1e9), 0))
    settings = {"model.path": str(seven), "data.path": "d", "model.dtype": "bf16", **options}
    config = load_config(None, settings)
    triangle = batch_triangle(config.train, ranks, {})
    plan: Any = SimpleNamespace(config=config, ds=load_ds_config(ROOT / "ds_configs" / f"{ds}.json"), triangle=triangle)
    warnings: list[str] = []
    log: Any = SimpleNamespace(info=lambda *_: None, warning=warnings.append)
    tokenizer = AutoTokenizer.from_pretrained(seven)
    return build.check_memory(plan, seven, tokenizer, torch.device("cpu"), log)[0], warnings


def test_a_model_that_cannot_fit_is_refused(seven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its weights are looked for, with what would do; each piece of advice, taken, is right."""
    with pytest.raises(UserError) as caught:
        checked(seven, monkeypatch, "zero2", 4, 48)
    said = str(caught.value)
    assert "parameters, gradients and optimizer of 8.29 billion parameters (8.29 trained) take 45.60 GB" in said
    assert "a rank under ZeRO-2 on 4 ranks; this rank's share of the machine's memory has 48.00 GB" in said
    assert "would fit with: ZeRO-3 (33.17 GB a rank); LoRA (17." in said
    assert "5 ranks of as much memory each (39.80 GB a rank)" in said
    for ds, ranks, more in (("zero3", 4, {}), ("zero2", 5, {}), ("zero2", 4, {"model.lora": "{r: 64}"})):
        checked(seven, monkeypatch, ds, ranks, 48, **more)


def test_measures_together(seven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one small machine: nothing alone would do, and so many ranks."""
    with pytest.raises(UserError) as caught:
        checked(seven, monkeypatch, "zero2", 2, 12, **{"model.dtype": "fp32"})
    said = str(caught.value)
    assert "would fit with: ZeRO-3 and LoRA and model.dtype bf16 (9.58 GB a rank); ZeRO-3 on 16 ranks of as" in said


def test_going_on_regardless(seven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, warnings = checked(seven, monkeypatch, "zero2", 2, 16, **{"train.memory_check": "warn"})
    assert size.parameters == size.trained and len(warnings) == 1 and "would fit with" in warnings[0]


def test_offloading_is_advised_beside_a_gpu() -> None:
    tight = Room(24_000_000_000, 200_000_000_000)
    said = problem_of_states(FULL, replace(USE, world=2, zero_stage=2), tight, None)
    assert "its GPU has 24.00 GB" in said
    assert "would fit with: optimizer offload (15.20 GB and 60.80 GB of the machine's memory a rank)" in said
    least = problem_of_states(FULL, replace(USE, world=1), Room(1_000_000_000, 2_000_000_000), None)
    assert "would fit with: 136 ranks of as much memory each (0.89 GB a rank)" in least
    assert "not even 4096 ranks would do" in problem_of_states(FULL, USE, Room(1_000_000, 1_000_000), None)
    assert problem_of_states(FULL, USE, GPU, None) == ""


def test_rows_that_may_not_fit() -> None:
    """Smaller micro-batches where one row fits, else shorter rows; each, taken, is right."""
    use = replace(USE, rows=32, checkpointing=False)
    said = warning_of_activations(FULL, use, GPU)
    (rows,) = re.findall(r"train.micro_batch (\d+) ", said)
    assert "model.checkpointing true (" in said
    fewer = replace(use, rows=int(rows))
    assert of(room=GPU, rows=int(rows), checkpointing=False).fits and warning_of_activations(FULL, fewer, GPU) == ""
    assert not of(room=GPU, rows=int(rows) + 1, checkpointing=False).fits
    small = Room(20_000_000_000, 0)
    (columns,) = re.findall(
        r"train.micro_batch 1 and prompt.max_tokens (\d+)", warning_of_activations(FULL, use, small)
    )
    assert of(room=small, rows=1, row_columns=int(columns), checkpointing=False).fits


def test_a_gpu_that_is_too_small_for_the_first_step() -> None:
    """A mistake in the settings is one line; later the next start may do better, and its error stays as it is."""
    said = (
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 12.06 GiB is"
        " free. Of the allocated memory 60.10 GiB is allocated by PyTorch. See documentation for Memory Management"
    )
    with pytest.raises(UserError) as told, lack_of_memory_told(lambda: False):
        raise torch.OutOfMemoryError(said)
    (line,) = told.value.lines
    assert line.startswith("out of memory before the first step was done: CUDA out of memory. Tried to allocate 20.00")
    assert "12.06 GiB is free; less is taken by a smaller train.micro_batch" in line
    with pytest.raises(torch.OutOfMemoryError), lack_of_memory_told(lambda: True):
        raise torch.OutOfMemoryError(said)
