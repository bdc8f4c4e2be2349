"""A released file, checked against the model that it is to fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from data_prep.errors import UserError
from pipeline.released.files import load_state, some
from pipeline.released.form import ALIAS, LORA, Form, Skeleton


@dataclass
class ReleasedFile:
    """A released state dict, its tensors on disk until they are used."""

    path: Path
    prefix: str
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Hub name -> as stored; of a module with LoRA, its base weight"""
    lora: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Hub name of a module -> {"A": (r,in), "B": (out,r)}"""
    aliases: list[str] = field(default_factory=list)
    """Other names of the embeddings, as they stand in the file"""

    @property
    def rank(self) -> int:
        """r of its LoRA; 0 without."""
        return next((len(pair["A"]) for pair in self.lora.values()), 0)


def read_released(path: Path, skeleton: Skeleton, form: Form, tokens: int) -> ReleasedFile:
    """Open a released file that is to fit a base model with `tokens` tokens.

    Raises UserError, all problems at once, where it is no state dict, has code in it, or does not fit the model.
    """
    state = load_state(path)
    found = ReleasedFile(path, find_prefix(state, skeleton, form, path))
    wrapped: set[str] = set()
    unknown, twice = [], []
    for name, tensor in state.items():
        stem = form.hub_name(name.removeprefix(found.prefix))
        if factor := LORA.fullmatch(stem):
            found.lora.setdefault(factor[1], {})[factor[2]] = tensor
            known = f"{factor[1]}.weight" in skeleton.shapes
        else:
            plain = stem.replace(".base_layer.", ".")
            wrapped |= {stem.partition(".base_layer.")[0]} if plain != stem else set()
            known = plain in skeleton.shapes or plain == skeleton.head
            if not known and re.search(rf"(^|\.){re.escape(ALIAS)}$", name):
                found.aliases.append(name)
                continue
            if plain in found.weights:
                twice.append(name)
            found.weights[plain] = tensor
        if not known or not name.startswith(found.prefix):
            unknown.append(name)
    problems = [f"{path}: {some(unknown)} in no model like the base"] if unknown else []
    problems += [f"{path}: {some(twice)} there under another name too"] if twice else []
    if skeleton.tied and skeleton.head in found.weights:
        head = found.weights.pop(skeleton.head)
        found.weights.setdefault(skeleton.embeddings, head)
        found.aliases += [name for name in state if form.hub_name(name.removeprefix(found.prefix)) == skeleton.head]
    problems += [f"{path}: {line}" for line in misfits(found, skeleton, wrapped, tokens)]
    table = found.weights.get(skeleton.embeddings)
    problems += [
        f"{path}: {name} is not equal to {skeleton.embeddings}"
        for name in found.aliases
        if table is not None and not torch.equal(state[name], table)
    ]
    if problems:
        raise UserError(*problems)
    return found


def find_prefix(names: Iterable[str], skeleton: Skeleton, form: Form, path: Path) -> str:
    """What stands in front of every hub name.  Raises UserError where the file has no embeddings and no head."""
    for anchor in (form.module_name(skeleton.embeddings), skeleton.embeddings, skeleton.head):
        for name in names:
            if name == anchor or name.endswith("." + anchor):
                return name.removesuffix(anchor)
    raise UserError(
        f"{path}: no name ends in {skeleton.embeddings} or {skeleton.head}: it is no model like the base,"
        f" or is not whole (it has {some(names)})"
    )


def misfits(found: ReleasedFile, skeleton: Skeleton, wrapped: set[str], tokens: int) -> Iterable[str]:
    """What of a file is missing, no weight, or of another shape than the model's, one line a kind."""
    missing = [name for name in skeleton.shapes if name not in found.weights]
    for module in sorted(wrapped | found.lora.keys()):
        missing += [f"{module}.lora_{factor}" for factor in "AB" if factor not in found.lora.get(module, {})]
    if missing:
        yield f"{some(missing)} missing"
    if strange := [name for name, tensor in found.weights.items() if not is_plain(tensor)]:
        yield f"{some(strange)} of a type that is no model's ({found.weights[strange[0]].dtype})"
    shapes = []
    for name, tensor in found.weights.items():
        wanted = skeleton.shapes.get(name)
        if name in skeleton.tables and wanted is not None and tensor.ndim == 2:
            wanted = (len(tensor), wanted[1])
        if wanted is not None and tuple(tensor.shape) != wanted:
            shapes.append(f"{name} {tuple(tensor.shape)} in place of {wanted}")
    broken = [f"{module}.lora_{factor}" for module, pair in found.lora.items() for factor, tensor in pair.items()
              if not is_factor(tensor) or len(skeleton.shapes.get(f"{module}.weight", (0, 0))) != 2]  # fmt: skip
    if broken:
        yield f"{some(broken)} no finite matrix of floats for a matrix"
        return
    ranks = {module: _rows(pair["A"]) for module, pair in found.lora.items() if "A" in pair}
    for module, rank in ranks.items():
        out, into = skeleton.shapes.get(f"{module}.weight", (0, 0))[:2]
        for factor, wanted in (("A", (rank, into)), ("B", (out, rank))):
            given = tuple(found.lora[module].get(factor, torch.empty(wanted)).shape)
            if out and given != wanted:
                shapes.append(f"{module}.lora_{factor} {given} in place of {wanted}")
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 0
    if odd := [f"{module} ({rank})" for module, rank in ranks.items() if rank != usual]:
        yield f"{some(odd)} of another LoRA rank than the rest ({usual})"
    if shapes:
        yield f"{some(shapes)} of another shape than the base asks for"
    rows = {name: _rows(found.weights[name]) for name in skeleton.tables if name in found.weights}
    if len(set(rows.values())) > 1:
        yield "embeddings and head have " + " and ".join(map(str, rows.values())) + " rows"
    elif rows and min(rows.values()) < tokens:
        yield f"its vocabulary has {min(rows.values())} rows, but the base's tokenizer has {tokens} tokens"


def is_plain(tensor: Tensor) -> bool:
    """Whether this is an ordinary tensor of floats that has its values."""
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return tensor.dtype in kinds and tensor.layout == torch.strided and tensor.device.type == "cpu"


def is_factor(tensor: Tensor) -> bool:
    """Whether this can be an A or B of LoRA: a finite matrix that has values and a rank."""
    return is_plain(tensor) and tensor.ndim == 2 and tensor.numel() > 0 and bool(tensor.isfinite().all())


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.ndim else 0
