"""Names of weights in released files, and which weights a model has."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from data_prep.errors import UserError

ADDED_TOKENS = ("<|start-latent|>", "<|end-latent|>", "<|latent|>")
WRAPPER, PEFT, ALIAS = "base_causallm.", "base_model.model.", "embedding.weight"
LORA = re.compile(r"(.+)\.lora_([AB])\.default\.weight")


@dataclass(frozen=True)
class Form:
    """What is one backbone's own in released files."""

    renamed: tuple[tuple[str, str], ...]
    """(start of today's module names, start of those of transformers 4.51, which files on the hub keep)"""
    recipes: str
    """Start of the names of its published recipes"""

    def hub_name(self, name: str) -> str:
        """The name of a weight or module on the hub; one that is such a name stays."""
        return _replace_start(name, self.renamed)

    def module_name(self, name: str) -> str:
        """Where a hub name is in today's model."""
        return _replace_start(name, [(hub, today) for today, hub in self.renamed])


def _replace_start(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


FORMS = {
    "qwen2_vl": Form((("model.visual.", "visual."), ("model.language_model.", "model.")), "qwen2vl"),
    "chameleon": Form((), "chameleon"),
}
"""By name of the backbone."""


def form_of(backbone: str, model: str) -> Form:
    """Raises UserError where the files of this backbone are not known."""
    if backbone not in FORMS:
        raise UserError(f"{model} is a {backbone} model; released files are known of {', '.join(FORMS)}")
    return FORMS[backbone]


@dataclass(frozen=True)
class Skeleton:
    """Which weights a model has, by hub name; a head that is tied to the embeddings does not count."""

    shapes: dict[str, tuple[int, ...]]
    embeddings: str
    head: str
    tied: bool

    @classmethod
    def of(cls, config: Any, form: Form) -> Skeleton:
        """config: transformers' of the model."""
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        names = {id(module): form.hub_name(name + ".weight") for name, module in model.named_modules()}
        embeddings, head = names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        shapes = {form.hub_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if tied:
            del shapes[head]
        return cls(shapes, embeddings, head, tied)

    @property
    def tables(self) -> tuple[str, ...]:
        """Weights with a row for each token."""
        return (self.embeddings,) if self.tied else (self.embeddings, self.head)
