"""The DeepSpeed file, read, checked and its `auto` values filled; the batch triangle that it and the recipe share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError

from data_prep.errors import UserError
from pipeline.config import RunConfig, TrainConfig
from pipeline.memory import RESIDENCY
from pipeline.user_files import load_json


@dataclass(frozen=True)
class Triangle:
    """global batch = what is kept; micro-batch x accumulation x ranks covers it."""

    global_batch: int
    micro_batch: int
    accumulation: int
    world: int

    def __str__(self) -> str:
        slots = self.micro_batch * self.accumulation * self.world
        empty = f", {slots - self.global_batch} slots masked" if slots > self.global_batch else ""
        return (
            f"{self.global_batch} rows a step = {self.world} ranks x {self.accumulation} micro-batches"
            f" x {self.micro_batch} rows{empty}"
        )


def batch_triangle(train: TrainConfig, world: int, ds: dict[str, Any]) -> Triangle:
    """Fill in what is not given; explicit values of the recipe and the DeepSpeed file must agree.

    A world that does not divide the global batch is fine: short ranks get masked rows.
    Raises UserError with one line for each disagreement.
    """
    problems = []

    def explicit(ours: int | None, name: str, key: str) -> int | None:
        theirs = ds.get(key, "auto")
        if theirs == "auto":
            return ours
        if ours is not None and theirs != ours:
            problems.append(f"{name} is {ours} but {key} in the DeepSpeed file is {theirs}")
        return int(theirs)

    given = train.global_batch if "global_batch" in train.model_fields_set else None
    total = explicit(given, "train.global_batch", "train_batch_size") or train.global_batch
    micro = explicit(train.micro_batch, "train.micro_batch", "train_micro_batch_size_per_gpu")
    accumulation = explicit(train.accumulation, "train.accumulation", "gradient_accumulation_steps")
    share = -(-total // world)
    if micro is None:
        micro = -(-share // (accumulation or 1))
    if accumulation is None:
        accumulation = -(-share // micro)
    elif -(-share // micro) != accumulation:
        problems.append(
            f"micro-batch {micro} x accumulation {accumulation} x {world} ranks"
            f" = {micro * accumulation * world} does not fit the global batch of {total}"
        )
    if problems:
        raise UserError(*problems)
    return Triangle(total, micro, accumulation, world)


def load_ds_config(path: Path) -> dict[str, Any]:
    """The DeepSpeed file.  Raises UserError where it is not one this pipeline can run."""
    ds = load_json(path, "DeepSpeed config")
    zero = ds.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    problems = []
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        value = ds.get(key, "auto")
        if value != "auto" and (type(value) is not int or value < 1):
            problems.append(f"{path}: {key} is {value!r}, expected auto or a whole number from 1")
    if ds.get("gradient_clipping", "auto") != "auto":
        problems.append(f"{path}: gradient_clipping belongs to the recipe: optim.clip")
    if type(stage) is not int or stage not in (1, 2, 3):
        problems.append(f"{path}: zero_optimization.stage is {stage}, expected 1, 2 or 3")
    elif zero and zero.get("compute_grad_norm", True) is not True:
        problems.append(f"{path}: zero_optimization.compute_grad_norm tells steps that must be left out; it stays true")
    bf16 = ds.get("bf16", {})
    if not isinstance(bf16, dict) or bf16.get("enabled", "auto") not in ("auto", True, False):
        problems.append(f'{path}: bf16 is {bf16!r}, expected {{"enabled": "auto"}}, true or false')
    for key in ("fp16", "amp"):
        section = ds.get(key, {"enabled": False})
        if not isinstance(section, dict) or section.get("enabled") is not False:
            problems.append(f"{path}: {key} is not supported; model.dtype of the recipe chooses bf16 or fp32")
    checkpoint = ds.get("checkpoint")
    if isinstance(checkpoint, dict) and checkpoint.get("writer"):
        problems.append(f"{path}: checkpoint.writer is not supported; train.async_checkpoints writes beside training")
    if "optimizer" in ds or "scheduler" in ds:
        problems.append(f"{path}: optimizer and scheduler belong to the recipe's `optim` section")
    if problems:
        raise UserError(*problems)
    return ds


def check_ds_config(ds: dict[str, Any], path: Path, triangle: Triangle, config: RunConfig) -> None:
    """Raise UserError where DeepSpeed's own checks refuse the file; it is asked before anything is built."""
    # width, device and process group are not there yet: stand-ins of the right kind
    auto = ds.get("bf16", {}).get("enabled") is True
    bf16 = {"auto": auto, "bf16": True, "fp32": False}[config.model.dtype]
    filled = fill_auto(ds, replace(triangle, world=1), config, hidden=64, bf16=bf16)
    try:
        DeepSpeedConfig(filled)
    except ValidationError as error:
        section = {"DeepSpeedZeroConfig": "zero_optimization", "DeepSpeedBF16Config": "bf16"}.get(error.title)
        raise UserError(
            *(f"{path}: {'.'.join(map(str, (section or error.title, *e['loc'])))}: {e['msg']}" for e in error.errors())
        ) from None
    except Exception as error:  # of many kinds, down to AttributeError
        raise UserError(f"{path}: DeepSpeed refuses it: {' '.join(str(error).split())}") from None


def fill_auto(ds: dict[str, Any], triangle: Triangle, config: RunConfig, hidden: int, bf16: bool) -> dict[str, Any]:
    """The DeepSpeed config with every `auto` replaced, and what the pipeline decides put in whether named or not.

    hidden: the language model's width.
    """
    if ds.get("bf16", {}).get("enabled", "auto") not in ("auto", bf16):
        raise UserError(f"bf16.enabled in the DeepSpeed file disagrees with model.dtype {config.model.dtype}")
    gpu = torch.cuda.is_available()
    decided: dict[str, Any] = {
        # DeepSpeed's own triangle counts slots; ours was checked against the file's explicit values
        "train_batch_size": triangle.micro_batch * triangle.accumulation * triangle.world,
        "train_micro_batch_size_per_gpu": triangle.micro_batch,
        "gradient_accumulation_steps": triangle.accumulation,
        "gradient_clipping": config.optim.clip,
        # a gradient that is no number is never applied
        "bf16": {**ds.get("bf16", {}), "enabled": bf16, "check_grad_overflow": True},
        # the optimizer is torch's AdamW, with or without offload
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    values: dict[str, Any] = {
        "zero_optimization.overlap_comm": gpu,
        "zero_optimization.reduce_bucket_size": max(hidden * hidden, 1_000_000),
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "zero_optimization.stage3_param_persistence_threshold": 10 * hidden,
        # settled by the memory forecast, once the model is there
        **{f"zero_optimization.{name}": 1_000_000_000 for name in RESIDENCY},
        "zero_optimization.offload_optimizer.pin_memory": gpu,
        "zero_optimization.offload_param.pin_memory": gpu,
    }

    def fill(node: dict[str, Any], prefix: str) -> dict[str, Any]:
        out = {}
        for key, value in node.items():
            name = prefix + key
            if isinstance(value, dict):
                out[key] = fill(value, name + ".")
            elif value == "auto":
                if name not in values:
                    raise UserError(f"DeepSpeed config: {name} cannot be auto")
                out[key] = values[name]
            else:
                out[key] = value
        return out

    return fill(ds | decided, "")
