"""DeepSpeed: the config with its `auto` values filled, the model built under ZeRO, and the update's knobs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError
from torch import nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from data_prep.errors import UserError
from pipeline import distributed
from pipeline.backbones import BACKBONES
from pipeline.config import ModelConfig, OptimConfig, RunConfig, TrainConfig, load_json
from pipeline.latent.recompute import enable_checkpointing, has_dropout
from pipeline.latent.schedules import Schedule, choose_schedule
from pipeline.memory import RESIDENCY, Forecast, ModelSize, available_memory, forecast, residency, stays_resident
from pipeline.model import LatentModel, add_lora, decay_groups, resolve_dtype
from pipeline.prepare import in_a_line

LATENT_TOKEN = "<|latent|>"


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
    bf16 = ds.get("bf16", {})
    if not isinstance(bf16, dict) or bf16.get("enabled", "auto") not in ("auto", True, False):
        problems.append(f'{path}: bf16 is {bf16!r}, expected {{"enabled": "auto"}}, true or false')
    for key in ("fp16", "amp"):
        section = ds.get(key, {"enabled": False})
        if not isinstance(section, dict) or section.get("enabled") is not False:
            problems.append(f"{path}: {key} is not supported; model.dtype of the recipe chooses bf16 or fp32")
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
        "bf16": {**ds.get("bf16", {}), "enabled": bf16},
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


@dataclass(frozen=True)
class Built:
    """The engine, and what was decided on the way."""

    engine: deepspeed.DeepSpeedEngine
    schedule: Schedule
    size: ModelSize
    forecast: Forecast
    resident: bool
    """Whether parameters stay whole between the passes of a step"""


def build_engine(
    config: RunConfig, ds: dict[str, Any], base: Path | str, triangle: Triangle, tokenizer: Any, device: torch.device
) -> Built:
    """The model of folder or hub id `base` under DeepSpeed; the process group must exist.

    ZeRO-3 partitions parameters as they are created, so no rank ever holds the whole model.
    """
    model = config.model
    family = BACKBONES[model.backbone]
    dtype = resolve_dtype(model.dtype, device)
    undecided = [name for name in RESIDENCY if ds["zero_optimization"].get(name) == "auto"]
    ds = fill_auto(ds, triangle, config, family.hidden_size(base, model.revision), dtype is torch.bfloat16)
    # transformers looks this object up while it lives, and partitions what it builds
    hf_config = HfDeepSpeedConfig(ds) if ds["zero_optimization"]["stage"] == 3 else None
    backbone = family(load_model(config, base, dtype, tokenizer))

    zero, o = ds["zero_optimization"], config.optim
    size = ModelSize.of(backbone, backbone.decoder.config)
    memory = forecast(
        size,
        zero["stage"],
        triangle.world,
        columns=triangle.micro_batch * config.prompt.max_tokens,
        checkpointing=model.checkpointing,
        keeps_kv=config.latent.latent_grad == "bptt",
        available=min(distributed.gather(available_memory(device))),  # ranks must decide alike
    )
    zero.update({name: residency(memory.resident, size.parameters)[name] for name in undecided})
    resident = stays_resident(zero, size.parameters)
    schedule = choose_schedule(
        model.schedule,
        latent_grad=config.latent.latent_grad,
        checkpointing=model.checkpointing,
        dropout=has_dropout(backbone.decoder),
        gathers=triangle.world > 1 and not resident,
    )
    module = LatentModel(backbone, config.latent, schedule)
    groups = decay_groups(module, o.weight_decay, o.decay_vectors)
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds)
    engine.hf_config = hf_config
    return Built(engine, schedule, size, memory, resident)


def load_model(config: RunConfig, base: Path | str, dtype: torch.dtype, tokenizer: Any) -> Any:
    """The transformers model as it is trained: latent token, frozen parts, adapters, checkpointing."""
    model = config.model
    family = BACKBONES[model.backbone]
    torch.manual_seed(config.train.seed)
    vlm = load_base(model, base, dtype)
    add_latent_token(vlm, tokenizer)
    if model.freeze_vision:
        family(vlm).vision.requires_grad_(False)
    if model.lora:
        vlm = add_lora(vlm, model)
    if model.checkpointing:
        enable_checkpointing(vlm)
    return vlm


def load_base(model: ModelConfig, base: Path | str, dtype: torch.dtype) -> Any:
    """The base model, whole; ranks call it together.  Raises UserError, on every rank, where weights are missing."""
    problem, vlm = None, None
    try:
        vlm = BACKBONES[model.backbone].load(base, dtype, model.revision)
    except UserError as error:
        problem = error  # of a load that went to its end: the other ranks are here too
    except Exception as error:  # the libraries raise whatever a damaged file makes them raise
        raise UserError(f"the base model {base} cannot be loaded: {in_a_line(error)}") from None
    for found in distributed.gather(problem):
        if found is not None:
            raise found
    return vlm


def add_latent_token(vlm: Any, tokenizer: Any) -> None:
    """Give the tokenizer the latent token, and the model a row for it: the mean of the rows in use.

    A padded vocabulary (Qwen2-VL-7B: 152,064 rows for fewer tokens) is used as it is and never shrinks.
    """
    used = len(tokenizer)
    if not tokenizer.add_tokens([LATENT_TOKEN], special_tokens=True):
        return
    row = tokenizer.convert_tokens_to_ids(LATENT_TOKEN)
    rows = vlm.get_input_embeddings().num_embeddings
    if row >= rows:
        vlm.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    weights = {id(w): w for w in (vlm.get_input_embeddings().weight, vlm.get_output_embeddings().weight)}
    for weight in weights.values():
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0), torch.no_grad():
            if weight.shape[0] > row:  # gathered here
                # rows that a resize added are set too; those of a padded vocabulary stay as they came
                new = slice(rows, None) if row >= rows else slice(row, row + 1)
                weight[new] = weight[:used].float().mean(0).to(weight.dtype)


def gathered_weights(module: nn.Module, main: bool) -> dict[str, torch.Tensor]:
    """Every parameter and saved buffer whole, on the CPU of rank 0, whatever the ZeRO stage; empty on other ranks."""
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if main:
                weights[name] = parameter.detach().cpu().clone()
    if main:
        buffers = {name for name, _ in module.named_buffers()} & set(module.state_dict())
        weights |= {name: buffer.detach().cpu() for name, buffer in module.named_buffers() if name in buffers}
    return weights


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Rate of a step: a pure function, so that resuming needs no scheduler state."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.lr * warm
    done = min(1.0, step / max(1, steps))
    if config.schedule == "wsd":
        return config.lr * warm * min(1.0, max(0.05, (1 - done) / 0.3))
    return config.lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def set_hyperparameters(engine: deepspeed.DeepSpeedEngine, config: OptimConfig, lr: float) -> None:
    """Set every group's rate and decay for the coming step.

    A stage-3 load copies the first group's values to all, so both are set at each step from the config.
    """
    groups = engine.optimizer.param_groups
    decays = [config.weight_decay, 0.0] if len(groups) > 1 else [groups[0]["weight_decay"]]
    for group, decay in zip(groups, decays, strict=True):
        group["lr"], group["weight_decay"] = lr, decay


def reset_optimizer(engine: deepspeed.DeepSpeedEngine) -> None:
    """Forget AdamW's moments and step count (Coconut does so at each stage)."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    inner.state.clear()


def loss_scale(loss_norm: str, labels_here: int, labels_everywhere: int, triangle: Triangle) -> float:
    """What a micro-batch's sum of NLL is multiplied by before backward.

    DeepSpeed then averages over ranks and accumulation steps.  `global`: the result is the mean over all labelled
    tokens of the step, whatever the number of ranks.  `micro_batch`: a mean of micro-batch means (published), in
    which a micro-batch without any labelled token counts as 0.
    """
    if loss_norm == "micro_batch":
        return 1.0 / max(1, labels_here)
    return triangle.world * triangle.accumulation / max(1, labels_everywhere)
