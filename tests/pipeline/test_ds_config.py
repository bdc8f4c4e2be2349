"""DeepSpeed files: what the pipeline decides holds whether a file names it or not, and bad files are refused early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import UserError
from pipeline.config import ROOT, RunConfig
from pipeline.ds_config import Triangle, check_ds_config, fill_auto, load_ds_config
from pipeline.recipe import load_config

TRIANGLE = Triangle(24, 2, 6, 2)


def config(**overrides: str) -> RunConfig:
    return load_config(None, {"model.path": "m", "data.path": "d", "optim.clip": "0.01", **overrides})


@pytest.mark.parametrize(
    "ds",
    [
        {"zero_optimization": {"stage": 1}},
        {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": False, "bf16": {"enabled": "auto"}},
        json.loads((ROOT / "ds_configs" / "zero2.json").read_text()),
    ],
    ids=["bare", "against it", "auto"],
)
@pytest.mark.parametrize("bf16", [True, False])
def test_what_the_pipeline_decides(ds: dict[str, Any], bf16: bool) -> None:
    filled = fill_auto(ds, TRIANGLE, config(), hidden=64, bf16=bf16)
    decided = {
        "train_batch_size": 24, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 6,
        "gradient_clipping": 0.01, "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    assert {name: filled[name] for name in decided} == decided


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimization": {"stage": 2, "foo": 1}}', "zero_optimization.foo: Extra inputs are not permitted"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "moon"}}}', "offload_param.device: Input"),
        ('{"zero_optimization": {"stage": true}}', "zero_optimization.stage is True, expected 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 2}, "wall_clock_breakdown": "auto"}', "wall_clock_breakdown cannot be auto"),
        ('{"zero_optimization": {"stage": 2, "compute_grad_norm": false}}', "compute_grad_norm tells steps"),
        ('{"zero_optimization": {"stage": 2}, "aio": 3}', "DeepSpeed refuses it"),
        ('{"zero_optimization": {"stage": 2}, "bf16": "auto"}', "bf16 is 'auto', expected"),
        ('{"zero_optimization": {"stage": 2}, "fp16": {"enabled": true}}', "fp16 is not supported; model.dtype"),
        ('{"zero_optimization": {"stage": 2}, "fp16": {"enabled": "auto"}}', "fp16 is not supported; model.dtype"),
        (
            '{"zero_optimization": {"stage": 2}, "checkpoint": {"writer": {"type": "FAST"}}}',
            "checkpoint.writer is not supported",
        ),
        ("[" * 100_000, "nested too deeply"),
    ],
    ids=lambda value: value[:60],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        check_ds_config(load_ds_config(path), path, TRIANGLE, config())
    (line,) = caught.value.lines
    assert message in line and "\n" not in line


def test_bf16_against_the_recipe() -> None:
    ds = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    check_ds_config(ds, Path("ds.json"), TRIANGLE, config())
    with pytest.raises(UserError, match="disagrees with model.dtype fp32"):
        check_ds_config(ds, Path("ds.json"), TRIANGLE, config(**{"model.dtype": "fp32"}))


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_our_files(path: Path) -> None:
    check_ds_config(load_ds_config(path), path, TRIANGLE, config())


def test_fp16_off_is_no_fp16(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2}, "fp16": {"enabled": false}}')
    check_ds_config(load_ds_config(path), path, TRIANGLE, config())
