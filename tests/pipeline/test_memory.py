"""The memory forecast, by hand for a 7B model, and what it decides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.memory import Forecast, ModelSize, forecast, residency, snapshot_bytes, stays_resident
from tests.pipeline.tiny import tiny_models

N = 7_600_000_000
FULL = ModelSize(
    parameters=N, trained=N, layers=28, hidden=3584, intermediate=18944, kv_width=512, vocabulary=152064, width=2
)


def of(size: ModelSize = FULL, **options: Any) -> Forecast:
    usual = {"zero_stage": 3, "world": 8, "columns": 3400, "checkpointing": True, "keeps_kv": False}
    return forecast(size, **usual | {"available": 80_000_000_000} | options)


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
    assert of(columns=6800).activations - kept.activations == inputs + layer


def test_a_whole_copy_stays_where_it_fits() -> None:
    assert of().gathered == 2 * N and of().resident
    assert not of(available=30_000_000_000).resident
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
