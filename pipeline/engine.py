"""DeepSpeed's engine: the model built under ZeRO, and the update's knobs."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from data_prep.errors import UserError
from pipeline import distributed
from pipeline.backbones import BACKBONES
from pipeline.backbones.weights import text_config
from pipeline.config import ModelConfig, OptimConfig, RunConfig
from pipeline.ds_config import Triangle, fill_auto
from pipeline.latent.method import LatentMethod
from pipeline.latent.recompute import enable_checkpointing, has_dropout
from pipeline.latent.schedules import Schedule, choose_schedule
from pipeline.memory import RESIDENCY, Forecast, ModelSize, Use, residency, stays_resident
from pipeline.model import LatentModel, add_lora, decay_groups, embedding_weights, resolve_dtype, set_to_mean
from pipeline.prepare import in_a_line
from pipeline.prompt import LATENT_TOKEN, MARKERS


@dataclass(frozen=True)
class Built:
    """The engine, and what was decided on the way."""

    engine: deepspeed.DeepSpeedEngine
    schedule: Schedule
    size: ModelSize
    forecast: Forecast
    resident: bool
    """Whether parameters stay whole between the passes of a step"""


def expected_size(config: RunConfig, base: Path | str, dtype: torch.dtype, tokenizer: Any) -> ModelSize:
    """Size of the model as it will be trained, from its config alone: no weights are read or made."""
    family, model = BACKBONES[config.model.backbone], config.model
    shape = AutoConfig.from_pretrained(base, revision=model.revision, trust_remote_code=False)
    with torch.device("meta"):
        vlm = AutoModelForImageTextToText.from_config(shape, dtype=dtype)
        backbone = family(as_trained(vlm, config, copy.deepcopy(tokenizer)))
    return ModelSize.of(backbone, backbone.decoder.config)


def use_of(config: RunConfig, ds: Mapping[str, Any], triangle: Triangle) -> Use:
    """What else memory depends on.  ds: the DeepSpeed file, filled or not."""
    zero = ds["zero_optimization"]
    optimizer, parameters = (zero.get(f"offload_{what}") or {} for what in ("optimizer", "param"))
    return Use(
        zero["stage"],
        triangle.world,
        triangle.micro_batch,
        config.prompt.max_tokens,
        checkpointing=config.model.checkpointing,
        keeps_kv=config.latent.latent_grad == "bptt",
        optimizer_on=optimizer.get("device", "none"),
        parameters_on=parameters.get("device", "none"),
    )


def build_engine(
    config: RunConfig,
    ds: dict[str, Any],
    base: Path | str,
    triangle: Triangle,
    tokenizer: Any,
    device: torch.device,
    size: ModelSize,
    memory: Forecast,
) -> Built:
    """The model of folder or hub id `base` under DeepSpeed; the process group must exist.  size: `expected_size`.

    ZeRO-3 partitions parameters as they are created, so no rank ever holds the whole model.
    """
    model = config.model
    family = BACKBONES[model.backbone]
    dtype = resolve_dtype(model.dtype, device)
    undecided = [name for name in RESIDENCY if ds["zero_optimization"].get(name) == "auto"]
    text = text_config(base, model.revision)
    # refused before the model takes its time
    check_parts(LatentMethod(config.latent, text.hidden_size, text.num_hidden_layers))
    ds = fill_auto(ds, triangle, config, text.hidden_size, dtype is torch.bfloat16)
    # transformers looks this object up while it lives, and partitions what it builds
    hf_config = HfDeepSpeedConfig(ds) if ds["zero_optimization"]["stage"] == 3 else None
    backbone = family(load_model(config, base, dtype, tokenizer))

    zero, o = ds["zero_optimization"], config.optim
    zero.update({name: residency(memory.resident, size.parameters)[name] for name in undecided})
    resident = stays_resident(zero, size.parameters)
    torch.manual_seed(config.train.seed)  # the parts' parameters begin alike on all ranks
    module = LatentModel(backbone, config.latent)
    module.schedule = schedule = choose_schedule(
        model.schedule,
        latent_grad=config.latent.latent_grad,
        checkpointing=model.checkpointing,
        dropout=has_dropout(backbone.decoder),
        gathers=triangle.world > 1 and not resident,
    )
    groups = decay_groups(module, o.weight_decay, o.decay_vectors)
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds)
    engine.hf_config = hf_config
    return Built(engine, schedule, size, memory, resident)


def check_parts(method: LatentMethod) -> None:
    """Raise UserError where DeepSpeed, which sends parameters between ranks as bytes, cannot train a part's."""
    problems = []
    for name, parameter in method.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            problems.append(f"latent.{name} has no shape before it is used (a lazy module); hidden_size gives it one")
        elif parameter.ndim == 0:
            problems.append(f"latent.{name} is a parameter without dimensions; make it a vector of one: torch.ones(1)")
    if problems:
        raise UserError(*problems)


def load_model(config: RunConfig, base: Path | str, dtype: torch.dtype, tokenizer: Any) -> Any:
    """The transformers model of `base` as it is trained."""
    torch.manual_seed(config.train.seed)
    return as_trained(load_base(config.model, base, dtype), config, tokenizer)


def as_trained(vlm: Any, config: RunConfig, tokenizer: Any) -> Any:
    """A base model with what training adds: latent token, frozen parts, adapters, checkpointing."""
    model = config.model
    family = BACKBONES[model.backbone]
    add_tokens(vlm, tokenizer, [LATENT_TOKEN, *(MARKERS if config.prompt.markers else ())])
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


def add_tokens(vlm: Any, tokenizer: Any, tokens: Sequence[str]) -> None:
    """Give the tokenizer these special tokens, and the model a row for each it did not have: the mean of those in use.

    A padded vocabulary (Qwen2-VL-7B: 152,064 rows for fewer tokens) is used as it is and never shrinks.
    """
    used = len(tokenizer)
    added = tokenizer.add_tokens(list(tokens), special_tokens=True)
    if not added:
        return
    rows = vlm.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        vlm.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    # rows that a resize added are set too; those of a padded vocabulary stay as they came
    new = slice(used, None if len(tokenizer) > rows else len(tokenizer))
    for weight in embedding_weights(vlm):
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            if weight.shape[0] > used:  # gathered here
                set_to_mean(weight, used, new)


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


def was_applied(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether the last step updated anything: DeepSpeed leaves out one whose gradient norm is no number."""
    return not engine.optimizer.overflow


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
