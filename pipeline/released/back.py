"""A released file from an export: `python -m pipeline.convert --to released`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from data_prep.errors import UserError
from pipeline.backbones import BACKBONES
from pipeline.export import ADAPTER, TOKEN_ROWS, ExportInfo
from pipeline.loaded import check_base_of, check_files
from pipeline.released.files import Entry, ModelWeights, local_folder, read_config, write_state
from pipeline.released.form import ADDED_TOKENS, ALIAS, LORA, PEFT, WRAPPER, Form, Skeleton, form_of
from pipeline.user_files import load_json

Entries = dict[str, Entry]
"""By hub name"""


def to_released(*, model: Path, out: Path) -> None:
    """See `pipeline.convert.main`.  Raises UserError; `out` is then as it was."""
    if out.exists():
        raise UserError(f"--out {out} exists; choose another")
    info = ExportInfo.read(model)
    form = form_of(info.backbone, str(model))
    check_files(model, info)
    check_base_of(model, info)
    folder = local_folder(info.adapter_of, info.revision) if info.adapter_of else model
    skeleton = Skeleton.of(read_config(folder), form)
    weights = ModelWeights(folder, form).check(skeleton)
    entries = {name: Entry(shape, partial(weights.__getitem__, name)) for name, shape in skeleton.shapes.items()}
    prefix = info.converted.prefix if info.converted else WRAPPER + PEFT
    if info.adapter_of:
        entries |= tables(entries, model, info, skeleton, folder)
        entries = with_lora(entries, model, form)
        wrapper = prefix.removesuffix(PEFT).removesuffix(WRAPPER)
        aliases = [wrapper + ALIAS] + [prefix + skeleton.head] * skeleton.tied
        aliases = info.converted.aliases if info.converted else aliases
    else:
        prefix = prefix.removesuffix(PEFT)
        aliases = [prefix + skeleton.head] * skeleton.tied
    named = {prefix + name: entry for name, entry in entries.items()}
    write_state(out, named, dict.fromkeys(aliases, prefix + skeleton.embeddings))
    print(f"{out}: {len(named)} weights in fp32; names start with {prefix or 'nothing'}")


def with_lora(entries: Entries, model: Path, form: Form) -> Entries:
    """The entries under peft's names, with an adapter's LoRA.  Raises UserError."""
    told = load_json(model / "adapter_config.json", "adapter")
    r, alpha = told.get("r"), told.get("lora_alpha")
    print(f"LoRA of rank {r}, alpha {alpha}: a released file does not hold alpha, and its own code takes 16")
    file = safe_open(model / ADAPTER, "pt")
    lora: Entries = {}
    adapted = set()
    for key in file.keys():  # noqa: SIM118  (no mapping)
        name = form.hub_name(key.removeprefix(PEFT)).removesuffix(".weight") + ".default.weight"
        found = LORA.fullmatch(name)
        if not found or f"{found[1]}.weight" not in entries:
            raise UserError(f"{model / ADAPTER}: {key} is no LoRA weight of a module of the base")
        adapted.add(found[1])
        lora[name] = Entry(tuple(file.get_slice(key).get_shape()), partial(file.get_tensor, key))
    out: Entries = {}
    for name, entry in entries.items():
        module, _, leaf = name.rpartition(".")
        out[f"{module}.base_layer.{leaf}" if module in adapted else name] = entry
    return out | lora


def tables(entries: Entries, model: Path, info: ExportInfo, skeleton: Skeleton, base: Path) -> Entries:
    """The base's embeddings and head with as many rows as the released trainer's.

    A converted adapter has its own last rows.  Of one that was trained here, the rows of a padded vocabulary go which
    no token of the released tokenizer has.
    """
    last: dict[str, Tensor] = {}
    if info.vocabulary:
        file, vocabulary = safe_open(model / TOKEN_ROWS, "pt"), info.vocabulary
        last = {name: file.get_tensor(key) for key, name in zip(("input", "output"), skeleton.tables, strict=False)}
    else:
        tokens = len(BACKBONES[info.backbone].processor(base, info.prompt).tokenizer)
        vocabulary = tokens + len(ADDED_TOKENS)
    changed = {}
    for name in skeleton.tables:
        (there, width), read = entries[name].shape, entries[name].read
        rows = vocabulary if name in last else min(there, vocabulary)
        changed[name] = Entry((rows, width), partial(ending, read, rows, last.get(name)))
    return changed


def ending(read: Callable[[], Tensor], rows: int, last: Tensor | None) -> Tensor:
    """A table of so many rows; the last ones are `last`."""
    if last is None:
        return read()[:rows]
    return torch.cat([read()[: rows - len(last)].float(), last.float()])
