"""Memory a rank will need, forecast before training, and whether ZeRO-3 can keep parameters between passes.

A latent step passes through the decoder several times.  Parameters that stay gathered from the first pass to the end of
backward are gathered once a step; that takes a whole copy of them on every rank.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from pipeline.loss import CHUNK

RESIDENCY = ("stage3_max_live_parameters", "stage3_max_reuse_distance")
"""DeepSpeed's two limits, in parameters: how many stay gathered, and until how far before their next use."""
USABLE = 0.9
"""Share of the memory that a forecast may fill; the rest is fragments, buckets and what it leaves out."""


@dataclass(frozen=True)
class ModelSize:
    """What the forecast needs of a model."""

    parameters: int
    trained: int
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    """Key/value heads x head size"""
    vocabulary: int
    width: int
    """Bytes of a parameter"""

    @classmethod
    def of(cls, model: nn.Module, text_config: Any) -> ModelSize:
        """model: its parameters, partitioned or not; text_config: transformers' config of the language model."""
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad, p.element_size()) for p in model.parameters()]
        head = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
        return cls(
            parameters=sum(n for n, _, _ in sizes),
            trained=sum(n for n, on, _ in sizes if on),
            layers=text_config.num_hidden_layers,
            hidden=text_config.hidden_size,
            intermediate=text_config.intermediate_size,
            kv_width=head * text_config.num_key_value_heads,
            vocabulary=text_config.vocab_size,
            width=max(size for _, _, size in sizes),
        )


@dataclass(frozen=True)
class Forecast:
    """Bytes on one rank at the peak of a step of the longest rows."""

    states: int
    """Parameters, gradients, fp32 master copy and moments: this rank's part"""
    activations: int
    gathered: int
    """A whole copy of the parameters, where ZeRO-3 splits them over ranks"""
    available: int

    @property
    def resident(self) -> bool:
        """Whether the whole copy fits beside the rest."""
        return self.states + self.activations + self.gathered <= USABLE * self.available


def forecast(
    size: ModelSize, zero_stage: int, world: int, columns: int, checkpointing: bool, keeps_kv: bool, available: int
) -> Forecast:
    """columns: of a micro-batch at most; keeps_kv: passes' keys and values stay in the graph under checkpointing."""
    optimizer, gradients = 12 * size.trained, size.width * size.trained
    parameters = size.width * size.parameters
    states = (
        optimizer // world
        + gradients // (world if zero_stage >= 2 else 1)
        + parameters // (world if zero_stage == 3 else 1)
    )
    # inside a layer about ten tensors of the hidden width, four of the MLP's, and keys and values twice
    layer = size.width * (10 * size.hidden + 4 * size.intermediate + 4 * size.kv_width)
    kept = size.layers * (size.width * size.hidden) + layer if checkpointing else size.layers * layer
    kept += size.layers * size.width * 2 * size.kv_width if checkpointing and keeps_kv else 0
    logits = 3 * 4 * size.vocabulary * min(CHUNK, columns)
    gathered = parameters if zero_stage == 3 and world > 1 else 0
    return Forecast(states, columns * kept + logits, gathered, available)


def snapshot_bytes(size: ModelSize, zero_stage: int, world: int, without_frozen: bool) -> int:
    """Bytes of a rank's copy of what its files of a checkpoint hold, at most (train.async_checkpoints)."""
    stored = size.width * (size.parameters - size.trained) * (not without_frozen)
    # below ZeRO-3 one rank writes the weights whole
    weights = stored // world if zero_stage == 3 else stored + size.width * size.trained
    return 12 * size.trained // world + weights


def available_memory(device: torch.device) -> int:
    """Bytes this rank may use: its GPU's, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    return psutil.virtual_memory().total // ranks_here


def residency(resident: bool, parameters: int) -> dict[str, int]:
    """Values of DeepSpeed's two limits: everything stays, or an eighth of the model at most."""
    limit = parameters + 1 if resident else min(parameters // 8, 1_000_000_000)
    return dict.fromkeys(RESIDENCY, limit)


def stays_resident(zero: Mapping[str, Any], parameters: int) -> bool:
    """Whether a filled `zero_optimization` section keeps all parameters gathered between the passes of a step."""
    return zero["stage"] < 3 or all(zero.get(name, 1_000_000_000) >= parameters for name in RESIDENCY)
