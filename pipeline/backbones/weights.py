"""Loading a pretrained model whole, and what is said of one whose weights are not all there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from data_prep.errors import UserError


def load_whole(
    model_class: Any, path: str | Path, dtype: torch.dtype, attention: str | dict[str, str], revision: str | None
) -> Any:
    """A model of transformers' `model_class` from a local folder or hub id, with these attention functions.

    Raises UserError where it is another model, or weights are missing or of another shape; under ZeRO-3 a shape is
    seen by rank 0 alone.
    """
    # its own class would take the 7B model's values for those that a config lacks
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    if not isinstance(config, model_class.config_class):
        raise UserError(f"{path} is a {config.model_type} model, not {model_class.config_class.model_type}")
    try:
        vlm, found = model_class.from_pretrained(
            path,
            config=config,
            revision=revision,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are named below; they would be random, as missing ones
        )
    except RuntimeError as error:
        if shapes := re.findall(r"size mismatch for ([^\s:]+)", str(error)):  # ZeRO-3's own way of loading
            raise incomplete(path, shapes) from None
        raise
    if lacking := found["missing_keys"] | {name for name, *_ in found["mismatched_keys"]}:
        raise incomplete(path, lacking)
    return vlm


def text_config(path: str | Path, revision: str | None = None) -> Any:
    """transformers' config of the language model, without the model."""
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    return config.get_text_config()


def incomplete(path: str | Path, names: Iterable[str]) -> UserError:
    """That the weights `names` are missing in `path`, or of another shape than its config says."""
    every = sorted(set(names))
    more = f" and {len(every) - 3} more" if len(every) > 3 else ""
    return UserError(f"{path}: {len(every)} weights missing or of another shape: {', '.join(every[:3])}{more}")
