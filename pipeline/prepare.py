"""What a run needs before its model exists: shards, a base model folder, and the checks that need them.

Made once by rank 0; found as it is by every later start.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from data_prep.errors import UserError
from data_prep.files import atomic_folder, sha256
from data_prep.index import read_manifest
from data_prep.reader import ShardIndex, open_split
from data_prep.storage import Location, location_of, shown
from data_prep.tokenizer import texts_of_folder, train_tokenizer
from pipeline.backbones import BACKBONES
from pipeline.config import ROOT, ModelConfig, RunConfig
from pipeline.data.mixture import Index, Mixture, record_values
from pipeline.model import lora_scope
from pipeline.prompt import Processor, PromptConfig
from pipeline.user_files import load_json
from pipeline.watching.watch import run_to_end

READER_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "chat_template.json", "chat_template.jinja",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""Files of a base model that decide what a row looks like to it."""


def data_folder(config: RunConfig) -> Location:
    """--data, or data/NAME of the recipe that makes its own; of a mixture the first."""
    return data_folders(config)[0]


def data_folders(config: RunConfig) -> list[Location]:
    """The folder that is trained on, or all of `data.mix`."""
    mixed = [location_of(member.path) for member in config.data.mix]
    return mixed or [location_of(config.data.path or f"data/{config.name}")]


def data_name(config: RunConfig) -> str:
    """The same as another working directory can find it."""
    folder = data_folder(config)
    return folder if isinstance(folder, str) else str(folder.resolve())


def to_be_made(config: RunConfig) -> bool:
    """Whether the shard folder has to be made first: a local one that is not there, of a known source."""
    folder, data = data_folder(config), config.data
    if isinstance(folder, str) or data.source is None or data.mix:
        return False
    return not (folder / "manifest.json").exists()


def make_data(config: RunConfig, say: Any) -> None:
    """Make the shard folder where the recipe says from what and it does not exist."""
    if not to_be_made(config):
        return
    folder, data = Path(data_folder(config)).absolute(), config.data
    assert data.source is not None
    words = [f"--{name}={value}" for name, value in data.options.items()]
    command = [sys.executable, "-m", "data_prep.shard", "--source", data.source, "--out", str(folder), *words]
    command += ["--workers", str(min(8, os.cpu_count() or 1))]
    say(f"making {folder}: {shlex.join(command[1:])}")
    # a process of its own, whose workers then do not import the trainer
    status, _ = run_to_end(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    if status:
        raise UserError(f"{folder} could not be made from {data.source}")


def check_made_from(config: RunConfig) -> None:
    """Raise UserError where the recipe's source made the shard folder with other options than the recipe says."""
    folder, data = data_folder(config), config.data
    if data.mix:
        return
    made = read_manifest(folder)["source"]
    if made["name"] != data.source:
        return  # somebody's own data in place of what the recipe would make
    there = made["options"]
    different = [name for name, value in data.options.items() if there.get(name, str(value)) != str(value)]
    if different:
        raise UserError(
            *(
                f"data.options.{name} is {data.options[name]} but {folder} was made with {there[name]}"
                for name in different
            )
        )


def make_base(config: RunConfig, run: Path, say: Any) -> Path | str:
    """The base model: the pretrained one's name, or a folder with a new tokenizer and random weights."""
    if config.model.path is not None:
        return config.model.path
    base, scratch = run / "base", config.model.scratch
    if base.exists() and any((run / "checkpoints").glob("stage*-step*")):
        return base  # what the checkpoints began with
    assert scratch is not None
    family = BACKBONES[config.model.backbone]
    shutil.rmtree(base, ignore_errors=True)
    with atomic_folder(base) as writing:
        texts = chain.from_iterable(texts_of_folder(folder, config.data.cache_gb) for folder in data_folders(config))
        tokenizer = train_tokenizer(texts, writing, scratch.vocab_size, family.TOKENIZER)
        torch.manual_seed(config.train.seed)
        vlm = family.create(scratch, tokenizer, writing)
        parameters = sum(p.numel() for p in vlm.parameters())
        say(f"made a base model of {parameters:,} parameters and {len(tokenizer)} tokens in {base}")
    return base


def check_base(model: ModelConfig, prompt: PromptConfig) -> None:
    """Raise UserError where the pretrained model's config, tokenizer or image processor cannot be had.

    Of a local folder's weights it looks at the files' headers, and LoRA must find its modules.
    """
    if model.path is None:
        return
    if model.path.startswith(("/", ".", "~")) and not Path(model.path).is_dir():
        raise UserError(f"model.path {model.path}: no such folder")
    family = BACKBONES[model.backbone]
    try:
        found = AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=False)
        if found.model_type != family.MODEL_TYPE:
            raise UserError(f"model.path {model.path} is a {found.model_type} model, not {family.MODEL_TYPE}")
        family.processor(model.path, prompt, model.revision)
        if Path(model.path).is_dir():
            check_weights(Path(model.path))
        check_lora(model, found)
    except UserError:
        raise
    except Exception as error:  # the libraries raise whatever a damaged file makes them raise
        raise UserError(f"model.path {model.path} cannot be loaded: {in_a_line(error)}") from None


def in_a_line(error: Exception) -> str:
    """What a library's exception says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def check_weights(folder: Path) -> None:
    """Raise UserError where a local model has no weights, or a safetensors file is missing or cut short."""
    files = [folder / name for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME) if (folder / name).is_file()]
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        if not files and (folder / name).is_file():
            parts = load_json(folder / name, "index of weights").get("weight_map")
            if not isinstance(parts, dict):
                raise UserError(f"index of weights {folder / name}: it has no weight_map")
            files = [folder / str(part) for part in sorted(set(parts.values()))]
    if not files:
        raise UserError(f"model.path {folder} has no weights ({SAFE_WEIGHTS_NAME})")
    for file in files:
        if not file.is_file():
            raise UserError(f"model.path {folder}: {file.name} is missing")
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
        except SafetensorError as error:
            raise UserError(f"model.path {folder}: {file.name} is damaged or cut short ({error})") from None


def check_lora(model: ModelConfig, config: Any) -> None:
    """Raise UserError naming LoRA targets that match no module; config: transformers' of the base model."""
    if model.lora is None:
        return
    with torch.device("meta"):
        names = [name for name, _ in AutoModelForImageTextToText.from_config(config).named_modules()]
    scopes = {target: re.compile(lora_scope(model.backbone, [target])) for target in model.lora.targets}
    missing = [target for target, scope in scopes.items() if not any(map(scope.fullmatch, names))]
    if missing:
        raise UserError(f"model.lora.targets: no module of the language model is called {', '.join(missing)}")


def base_hash(base: Path | str, weights: bool, revision: str | None = None) -> str:
    """What identifies the base as checkpoints need it: a hash of a local folder's files, or a hub id with its commit.

    weights: they count too, because checkpoints leave frozen ones out.
    """
    if not Path(base).is_dir():
        return f"{base}@{AutoConfig.from_pretrained(base, revision=revision)._commit_hash}"
    suffixes = (".safetensors", ".bin") if weights else ()
    files = sorted(p for p in Path(base).iterdir() if p.name in READER_FILES or p.suffix in suffixes)
    return hashlib.sha256("".join(f"{p.name}:{sha256(p)}\n" for p in files).encode()).hexdigest()


def check_data(config: RunConfig) -> dict[str, Index]:
    """The indexes of the splits that a run needs: train, and val where validation is on.

    Raises UserError for everything that is missing, empty, inconsistent or in a mixture twice.
    """
    folders, problems = data_folders(config), list[str]()
    splits = ["train"] + (["val"] if config.train.val_samples else [])
    opened: dict[str, list[ShardIndex]] = {split: [] for split in splits}
    for folder in folders:
        for split in splits:
            try:
                opened[split].append(open_split(folder, split, config.data.cache_gb))
                if not len(opened[split][-1]):
                    problems.append(f"{shown(folder)}: split {split} is empty")
            except UserError as error:
                problems += error.lines
    if not problems:
        hashes = [index.index_hash for index in opened["train"]]
        problems += [
            f"data.mix: {shown(folders[i])} holds the same samples as {shown(folders[first])}; leave one out"
            for i, found in enumerate(hashes)
            if (first := hashes.index(found)) < i
        ]
    if problems:
        raise UserError(*dict.fromkeys(problems))
    if not config.data.mix:
        return {split: indexes[0] for split, indexes in opened.items()}
    weights = [member.weight for member in config.data.mix]
    return {split: Mixture(folders, indexes, weights) for split, indexes in opened.items()}


LOOKED_AT, RUN = 100_000, 2_000
"""Index records that `check_patches` looks at, at most about, and how many of them lie side by side."""


def spread(samples: int) -> np.ndarray:
    """Evenly spread positions among `samples`, all of them where they are few; in runs, so that little is read."""
    if samples <= LOOKED_AT:
        return np.arange(samples)
    starts = np.linspace(0, samples - RUN, LOOKED_AT // RUN).astype(np.int64)
    return (starts[:, None] + np.arange(RUN)).reshape(-1)


def check_patches(index: Index, processor: Processor, num_patches: int) -> None:
    """Raise UserError where a latent step asks for more patches than some image of the split has.

    Sizes come from the index; no image is decoded.  Of a large split it looks at about `LOOKED_AT` samples: where the
    others have an image that is too small, its row is masked and counted when it comes up.
    """
    places = spread(len(index))
    sizes = record_values(index, places, "width", "height").T
    unique, first, counts = np.unique(sizes, axis=0, return_index=True, return_counts=True)

    def columns_of(width: int, height: int) -> int:
        try:
            return processor.image_columns(width, height) if width and height else num_patches
        except ValueError:  # no shape for the model: such a row is a bad sample when it comes up
            return num_patches

    columns = [columns_of(int(w), int(h)) for w, h in unique]
    short = [i for i, n in enumerate(columns) if n < num_patches]
    if short:
        i = min(short, key=lambda j: columns[j])
        w, h = unique[i]
        raise UserError(
            f"latent.num_patches {num_patches} is more than the {columns[i]} patches of a {w}x{h} image"
            f" ({sum(int(counts[j]) for j in short)} images of {index.split} are too small,"
            f" for example {index.key(int(places[first[i]]))}); lower it, or set prompt.image_size"
        )
