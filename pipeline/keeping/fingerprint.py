"""Fingerprints of an engine's weights: the same for any number of ranks, ZeRO stage and device, another for any change.

A fingerprint is an exact sum of integers: the fp32 bits of every element, times an odd 64-bit number that depends on
the parameter's name and the element's place in it, modulo 2^64.  A sum does not ask who adds what: each rank adds up
the pieces that it holds, without gathering any, and one all-reduce adds up the ranks.  It finds faults, not forgers.
One core takes half a billion elements a second, 2 GB/s in fp32 (measured on x86-64).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import deepspeed
import numpy as np
import torch
from deepspeed import comm as dist
from torch import Tensor, nn

from data_prep.errors import UserError
from pipeline import distributed

CHUNK = 2**18
"""Elements that share a table of multipliers, 2 MiB; each such stretch of a parameter has a factor of its own."""


class Piece(NamedTuple):
    """A stretch of a parameter or buffer that this rank holds."""

    name: str
    start: int
    """Place of its first element in the whole, flattened"""
    values: Tensor
    """(n,)"""
    whole: tuple[int, ...]
    """Shape of the whole"""


@dataclass(frozen=True)
class Fingerprints:
    """16 hexadecimal digits each."""

    trained: str
    """What the optimizer holds, in fp32: exact, whatever the type that the model computes in"""
    frozen: str
    """Weights that are not trained"""
    buffers: str
    """Saved buffers; every rank's own"""

    def __str__(self) -> str:
        return f"trained {self.trained}, frozen {self.frozen}, buffers {self.buffers}"


@dataclass(frozen=True)
class Weights:
    """What an engine holds at a moment."""

    found: Fingerprints
    computed_with: str
    """Trained weights in the model's own type"""
    rounded: str
    """`found.trained`'s weights rounded to that type: the same, unless the two were torn apart"""


# ---- the sum ----------------------------------------------------------------------------------------------------
def checksum(pieces: Iterable[Piece], device: torch.device | str) -> Tensor:
    """Sum over `pieces`, modulo 2^64, as an int64 without dimensions on `device`."""
    sums, names = [torch.zeros((), dtype=torch.int64, device=device)], 0
    for name, start, values, whole in pieces:
        if start == 0:  # once for each parameter: also one of zeros, or of another shape, counts
            names += _odd(name, *whole)
        for first in range(start - start % CHUNK, start + len(values), CHUNK):
            low, high = max(first, start), min(first + CHUNK, start + len(values))
            # to the device of the sum: an offloaded piece comes in chunks
            bits = _bits(values[low - start : high - start].to(device))
            table = _table(str(bits.device))[low - first : high - first]
            sums.append(bits.mul_(table).sum() * _odd(name, first))
    sums.append(torch.tensor((names + 2**63) % 2**64 - 2**63, device=device))
    return torch.stack(sums).sum()


def _bits(values: Tensor) -> Tensor:
    """A new int64 tensor that differs wherever `values` do; types below fp32 give what their fp32 values give."""
    if values.dtype is torch.float64:
        return values.view(torch.int64).clone()
    if values.is_floating_point():
        return values.float().view(torch.int32).to(torch.int64)
    return values.to(torch.int64, copy=True)


@lru_cache(maxsize=4)
def _table(device: str) -> Tensor:
    """(CHUNK,) odd multipliers, int64: SplitMix64 of the place."""
    z = np.arange(1, CHUNK + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)).to(device)


def _odd(name: str, *place: int) -> int:
    """An odd number of 64 bits, signed, from a name and a place."""
    digest = hashlib.sha256(repr((name, *place)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True) | 1


def _digits(value: int) -> str:
    return f"{value % 2**64:016x}"


# ---- what a rank holds ------------------------------------------------------------------------------------------
def parameter_pieces(parameters: Iterable[tuple[str, Any]]) -> Iterator[Piece]:
    """This rank's piece of each named parameter: the whole, or under ZeRO-3 its part without the padding."""
    for name, parameter in parameters:
        if hasattr(parameter, "ds_tensor"):
            yield _part(name, parameter, parameter.ds_tensor.detach().view(-1))
        else:
            yield Piece(name, 0, parameter.detach().reshape(-1), tuple(parameter.shape))


def _part(name: str, parameter: Any, values: Tensor) -> Piece:
    """The piece that ZeRO-3 keeps here of a parameter; `values`: its part, padded to be as long as all others."""
    start = len(values) * dist.get_rank(parameter.ds_process_group)
    real = max(0, min(len(values), parameter.ds_numel - start))
    return Piece(name, start, values[:real], tuple(parameter.ds_shape))


def master_pieces(engine: deepspeed.DeepSpeedEngine, rounded: bool = False) -> Iterator[Piece]:
    """This rank's pieces of what the optimizer holds; rounded: to the type of the model's own copy."""
    for name, parameter in _parameters(engine.module, trained=True):
        if hasattr(parameter, "ds_tensor"):
            piece = _part(name, parameter, engine.optimizer.get_local_fp32_param(parameter).view(-1))
        elif (mapping := parameter._hp_mapping) is not None:
            values = mapping.get_hp_fragment().detach()
            piece = Piece(name, mapping.lp_fragment_address.start, values, tuple(parameter.shape))
        else:
            continue  # the optimizer of another rank holds all of it
        yield piece._replace(values=piece.values.to(parameter.dtype)) if rounded else piece


def buffer_pieces(module: nn.Module) -> Iterator[Piece]:
    """Buffers that a checkpoint holds."""
    saved = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name in saved:
            yield Piece(name, 0, buffer.detach().reshape(-1), tuple(buffer.shape))


def _parameters(module: nn.Module, trained: bool) -> Iterator[tuple[str, Any]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad is trained)


# ---- an engine's ------------------------------------------------------------------------------------------------
def weights_of(engine: deepspeed.DeepSpeedEngine) -> Weights:
    """Fingerprints of what an engine holds; ranks call it together.  Under ZeRO-1 and 2 each names its own copies."""
    module, device = engine.module, engine.device
    low = any(p.dtype is not torch.float32 for _, p in _parameters(module, trained=True))
    master = checksum(master_pieces(engine), device)
    rounded = checksum(master_pieces(engine, rounded=True), device) if low else master
    copy = checksum(parameter_pieces(_parameters(module, trained=True)), device)
    frozen = checksum(parameter_pieces(_parameters(module, trained=False)), device)
    split = torch.stack([master, rounded, copy, frozen])
    whole = split.clone()
    dist.all_reduce(whole)
    if engine.zero_optimization_stage() < 3:
        whole[2:] = split[2:]
    master_sum, rounded_sum, copy_sum, frozen_sum = map(_digits, whole.tolist())
    buffers = _digits(int(checksum(buffer_pieces(module), device)))
    return Weights(Fingerprints(master_sum, frozen_sum, buffers), copy_sum, rounded_sum)


def check_ranks(engine: deepspeed.DeepSpeedEngine) -> Fingerprints:
    """Fingerprints of a model just built.  Raises UserError, on every rank, where ranks begin with different ones."""
    weights = weights_of(engine)
    everywhere = distributed.gather(weights)
    problems = []
    for what, values in {
        "trained weights": [w.computed_with for w in everywhere],
        "frozen weights": [w.found.frozen for w in everywhere],
        "buffers": [w.found.buffers for w in everywhere],
    }.items():
        others = [rank for rank, value in enumerate(values) if value != values[0]]
        if others:
            problems.append(
                f"the {what} of rank {others[0]} are not those of rank 0 (fingerprints {values[others[0]]} and"
                f" {values[0]}): do all ranks read the same base model, whole?"
            )
    if problems:
        raise UserError(*problems)
    return weights.found


def check_loaded(engine: deepspeed.DeepSpeedEngine, saved: Fingerprints, where: object) -> None:
    """Raise UserError, on every rank, unless the engine holds what a checkpoint was written from; ranks together.

    where: the checkpoint, for the message.
    """
    problems = []
    for rank, weights in enumerate(distributed.gather(weights_of(engine))):
        found = weights.found
        for what, here, there in (
            ("trained weights", found.trained, saved.trained),
            ("frozen weights", found.frozen, saved.frozen),
            # ranks may have buffers of their own; a checkpoint names rank 0's
            ("buffers", found.buffers if rank == 0 else saved.buffers, saved.buffers),
        ):
            if here != there:
                problems.append(f"the {what} are not those that {where} was written with: {here} here, {there} there")
        if weights.computed_with != weights.rounded:
            problems.append(f"the weights loaded from {where} are not those that its optimizer goes on with")
    if problems:
        raise UserError(*dict.fromkeys(problems))
