"""Memory a rank will need, forecast before the model is loaded, and whether ZeRO-3 can keep parameters between passes.

A latent step passes through the decoder several times.  Parameters that stay gathered from the first pass to the end of
backward are gathered once a step; that takes a whole copy of them on every rank.
"""

from __future__ import annotations

import contextlib
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from pipeline import distributed
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
        """model: its parameters, partitioned, on the meta device or here; text_config: of the language model."""
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad, p.element_size()) for p in model.parameters()]
        head = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
        widths: Counter[int] = Counter()
        for n, _, width in sizes:
            widths[width] += n
        return cls(
            parameters=sum(n for n, _, _ in sizes),
            trained=sum(n for n, on, _ in sizes if on),
            layers=text_config.num_hidden_layers,
            hidden=text_config.hidden_size,
            intermediate=text_config.intermediate_size,
            kv_width=head * text_config.num_key_value_heads,
            vocabulary=text_config.vocab_size,
            # most of them: adapters come in fp32, and DeepSpeed makes them what the others are
            width=max(widths, key=lambda width: widths[width]),
        )


@dataclass(frozen=True)
class Use:
    """What a forecast depends on besides the model."""

    zero_stage: int
    world: int
    rows: int
    """Of a micro-batch"""
    row_columns: int
    """Of a row at most"""
    checkpointing: bool
    keeps_kv: bool
    """Passes' keys and values stay in the graph under checkpointing"""
    optimizer_on: str = "none"
    """DeepSpeed's offload_optimizer.device: none, cpu or nvme"""
    parameters_on: str = "none"
    """offload_param.device"""


@dataclass(frozen=True)
class Room:
    """Bytes a rank may use."""

    device: int
    """Its GPU's; without one its share of the machine's"""
    host: int
    """Its share of the machine's memory beside a GPU; 0 where it computes there"""


@dataclass(frozen=True)
class Forecast:
    """Bytes on one rank at the peak of a step of the longest rows."""

    states: int
    """Parameters, gradients, fp32 master copy and moments: this rank's part"""
    activations: int
    gathered: int
    """A whole copy of the parameters, where ZeRO-3 splits them over ranks"""
    offloaded: int
    """Of the states, what lies in the machine's memory beside a GPU"""
    room: Room

    @property
    def resident(self) -> bool:
        """Whether the whole copy fits beside the rest."""
        return self.states + self.activations + self.gathered <= USABLE * self.room.device

    @property
    def states_fit(self) -> bool:
        """Whether training can begin at all."""
        return self.states <= USABLE * self.room.device and self.offloaded <= USABLE * self.room.host

    @property
    def fits(self) -> bool:
        """Whether a step of the longest rows fits, too."""
        return self.states_fit and self.states + self.activations <= USABLE * self.room.device


def forecast(size: ModelSize, use: Use, room: Room) -> Forecast:
    """Bytes on each rank; offloading is none where a rank computes in the machine's own memory."""
    world, stage = use.world, use.zero_stage
    optimizer = 12 * size.trained // world
    gradients = size.width * size.trained // (world if stage >= 2 else 1)
    parameters = size.width * size.parameters // (world if stage == 3 else 1)
    offloaded = 0
    if room.host and use.optimizer_on != "none":
        # with the optimizer go the gradients, as fp32; ZeRO-1 keeps its own besides
        offloaded += optimizer + 4 * size.trained // world if use.optimizer_on == "cpu" else 0
        optimizer, gradients = 0, gradients if stage == 1 else 0
    if room.host and use.parameters_on != "none" and stage == 3:
        offloaded += parameters if use.parameters_on == "cpu" else 0
        parameters = 0
    column, logits = activation_bytes(size, use)
    gathered = size.width * size.parameters if stage == 3 and world > 1 else 0
    activations = use.rows * use.row_columns * column + logits
    return Forecast(optimizer + gradients + parameters, activations, gathered, offloaded, room)


def activation_bytes(size: ModelSize, use: Use) -> tuple[int, int]:
    """Bytes of activations: of each column of a micro-batch, and of the logits, which are made in chunks."""
    # inside a layer about ten tensors of the hidden width, four of the MLP's, and keys and values twice
    layer = size.width * (10 * size.hidden + 4 * size.intermediate + 4 * size.kv_width)
    kept = size.layers * (size.width * size.hidden) + layer if use.checkpointing else size.layers * layer
    kept += size.layers * size.width * 2 * size.kv_width if use.checkpointing and use.keeps_kv else 0
    return kept, 3 * 4 * size.vocabulary * min(CHUNK, use.rows * use.row_columns)


def snapshot_bytes(size: ModelSize, zero_stage: int, world: int, without_frozen: bool) -> int:
    """Bytes of a rank's copy of what its files of a checkpoint hold, at most (train.async_checkpoints)."""
    stored = size.width * (size.parameters - size.trained) * (not without_frozen)
    # below ZeRO-3 one rank writes the weights whole
    weights = stored // world if zero_stage == 3 else stored + size.width * size.trained
    return 12 * size.trained // world + weights


# ---- what there is ----------------------------------------------------------------------------------------------
def smallest_room(device: torch.device) -> Room:
    """What every rank has at least, so that all decide alike; ranks call it together."""
    ranks_here = distributed.gather(socket.gethostname()).count(socket.gethostname())
    host, on_gpu = machine_memory() // ranks_here, device.type == "cuda"
    mine = Room(torch.cuda.get_device_properties(device).total_memory, host) if on_gpu else Room(host, 0)
    rooms = distributed.gather(mine)
    return Room(min(room.device for room in rooms), min(room.host for room in rooms))


def machine_memory() -> int:
    """Bytes that this machine has, or lets this container or job have."""
    return min(psutil.virtual_memory().total, *cgroup_limits())


def cgroup_limits(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Memory limits of the control groups that this process is in, of version 1 or 2, and of those above them."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        group = top / path.lstrip("/")
        # inside a container the path may be the machine's, and only the top be there
        for folder in (group, *(above for above in group.parents if above.is_relative_to(top))):
            with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                yield int((folder / name).read_text())


# ---- what follows for ZeRO-3 ------------------------------------------------------------------------------------
def residency(resident: bool, parameters: int) -> dict[str, int]:
    """Values of DeepSpeed's two limits: everything stays, or an eighth of the model at most."""
    limit = parameters + 1 if resident else min(parameters // 8, 1_000_000_000)
    return dict.fromkeys(RESIDENCY, limit)


def stays_resident(zero: Mapping[str, Any], parameters: int) -> bool:
    """Whether a filled `zero_optimization` section keeps all parameters gathered between the passes of a step."""
    return zero["stage"] < 3 or all(zero.get(name, 1_000_000_000) >= parameters for name in RESIDENCY)
