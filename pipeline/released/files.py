"""Weights on disk, one at a time: state dicts of torch.save, and the safetensors of a model folder."""

from __future__ import annotations

import contextlib
import mmap
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm
from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from data_prep.errors import UserError
from data_prep.files import atomic_path, sha256
from pipeline.backbones.weights import incomplete
from pipeline.keeping.writing import full_disk_told
from pipeline.prepare import in_a_line
from pipeline.released.form import Form, Skeleton
from pipeline.user_files import load_json


def place_of(model: str) -> str:
    """A model's folder, whole, or its hub id."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def file_hash(path: Path) -> str:
    """SHA-256 of a file of many GB.  Raises UserError where it cannot be read."""
    try:
        size = path.stat().st_size
        with tqdm(total=size, desc=f"hash of {path.name}", unit="B", unit_scale=True, mininterval=2) as progress:
            return sha256(path, progress.update)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


class ModelWeights:
    """Weights of a model folder's safetensors files by hub name, read one at a time."""

    def __init__(self, folder: Path, form: Form) -> None:
        """Raises UserError where there are none or a file is damaged."""
        self.folder = folder
        self._place: dict[str, tuple[Any, str]] = {}
        for path in self._files():
            try:
                file = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read ({error})") from None
            self._place |= {form.hub_name(name): (file, name) for name in file.keys()}  # noqa: SIM118  (no mapping)

    def _files(self) -> list[Path]:
        if (self.folder / SAFE_WEIGHTS_NAME).is_file():
            return [self.folder / SAFE_WEIGHTS_NAME]
        index = self.folder / SAFE_WEIGHTS_INDEX_NAME
        if not index.is_file():
            raise UserError(f"{self.folder} has no weights as safetensors ({SAFE_WEIGHTS_NAME})")
        parts = load_json(index, "index of weights").get("weight_map")
        if not isinstance(parts, dict):
            raise UserError(f"index of weights {index}: it has no weight_map")
        return [self.folder / str(part) for part in sorted(set(parts.values()))]

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._place[name]
        return file.get_tensor(stored)

    def check(self, skeleton: Skeleton) -> ModelWeights:
        """Itself.  Raises UserError where weights are missing or of another shape than the config says."""
        if lacking := [name for name, shape in skeleton.shapes.items() if self.shape(name) != shape]:
            raise incomplete(self.folder, lacking)
        return self

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None where the weight is missing."""
        if name not in self._place:
            return None
        file, stored = self._place[name]
        return tuple(file.get_slice(stored).get_shape())


def local_folder(base: str, revision: str | None) -> Path:
    """The base model's files: a local folder, or fetched from the hub.  Raises UserError."""
    if Path(base).is_dir():
        return Path(base)
    if base.startswith(("/", ".", "~")) or not base:
        raise UserError(f"--base {base}: no such folder")
    try:
        kinds = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
        return Path(snapshot_download(base, revision=revision, allow_patterns=kinds))
    except Exception as error:  # of many kinds, the network's among them
        raise UserError(f"--base {base} is no folder, nor to be had from the hub: {in_a_line(error)}") from None


def read_config(folder: Path) -> Any:
    """transformers' config of a model folder.  Raises UserError."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the library raises whatever a damaged file makes it raise
        raise UserError(f"{folder} cannot be loaded: {in_a_line(error)}") from None


def load_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, mapped into memory.  Raises UserError; never runs what a pickle holds."""
    if not path.is_file():
        raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a file of torch.save, or is cut short")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever a foreign or damaged file makes it raise
        said = re.search(r"Unsupported \w+[^.]*|GLOBAL [\w.]+", str(error))
        reason = f"it holds code, not tensors alone ({said[0]})" if said else in_a_line(error)[:200]
        raise UserError(f"{path} is not read: {reason}") from None
    if not isinstance(state, dict) or not state:
        raise UserError(f"{path} is no state dict: it holds a {type(state).__name__}, not names and tensors")
    other = [str(name) for name, value in state.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if other:
        raise UserError(f"{path} is no state dict: {some(other)} no tensors")
    return state


@dataclass(frozen=True)
class Entry:
    """A weight that is to be written."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def write_state(path: Path, entries: Mapping[str, Entry], aliases: Mapping[str, str]) -> None:
    """Write a state dict of fp32 tensors, one at a time: the file is laid out first, then filled through a mapping.

    aliases: second name -> name whose values it shares.  The checksums inside the archive, which torch.load does not
    look at, are those of the empty file.  Raises UserError where `path` cannot be written.
    """
    with FakeTensorMode():
        empty = {name: torch.empty(entry.shape, dtype=torch.float32) for name, entry in entries.items()}
        empty |= {alias: empty[name] for alias, name in aliases.items()}
    with written(path), atomic_path(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(empty, temporary)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            there = torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)
        for name, entry in tqdm(entries.items(), desc=path.name, unit="tensor", mininterval=2):
            there[name].copy_(entry.read())
        del there


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Turn what the system says against writing into one line.  Raises UserError."""
    try:
        with full_disk_told(path):
            yield
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror or error}") from None


def some(names: Iterable[str], most: int = 3) -> str:
    """The first names, how many more there are, and the verb."""
    every = [name if name.isprintable() else ascii(name) for name in names]
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return f"{', '.join(every[:most])}{more} {'is' if len(every) == 1 else 'are'}"
