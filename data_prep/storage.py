"""Where a shard folder lies: what reading it takes, and nothing else."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, Protocol

_OPEN_FILES = 64


class Storage(Protocol):
    """The files of one folder, by name. May be pickled and forked: every process opens its own."""

    def describe(self, name: str) -> str:
        """A file, or the folder for the empty name, as messages call it."""

    def size(self, name: str) -> int:
        """Bytes of a file.  Raises FileNotFoundError or another OSError."""

    def read(self, name: str) -> bytes:
        """A whole small file.  Raises FileNotFoundError or another OSError."""

    def read_at(self, name: str, offset: int, size: int) -> bytes:
        """A part of a file; shorter where the file ends before.  Raises OSError."""

    def local(self, name: str) -> Path:
        """A file of this machine with the content of `name`, to be mapped.  Raises OSError."""


class LocalStorage:
    """A folder of a local or network file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def describe(self, name: str) -> str:
        return str(self.folder / name)

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def read_at(self, name: str, offset: int, size: int) -> bytes:
        return self._open(name).read_at(offset, size)

    def local(self, name: str) -> Path:
        return self.folder / name

    @functools.cached_property
    def _open(self) -> Any:
        return functools.lru_cache(maxsize=_OPEN_FILES)(lambda name: _Descriptor(self.folder / name))

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}  # open files stay behind


class _Descriptor:
    """An open file that is read at given places, and closed when nobody refers to it any more."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_at(self, offset: int, size: int) -> bytes:
        return os.pread(self._file, size, offset)

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # not where opening failed
            os.close(self._file)


def open_storage(location: Path | str) -> Storage:
    """The storage of a folder."""
    return LocalStorage(Path(location))
