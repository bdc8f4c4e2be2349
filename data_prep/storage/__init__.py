"""Where a shard folder lies: what reading it takes, and nothing else."""

from __future__ import annotations

import functools
import itertools
import os
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

import numpy as np

from data_prep.errors import passes

if TYPE_CHECKING:
    from data_prep.index import IndexEntry, ShardEntry

Location = Path | str
"""A folder's path, or its URL as text."""

Part = tuple[int, int]
"""Offset and size, in bytes."""

_OPEN_FILES = 64
_LOCAL_SECONDS = 5.0
"""How long a local file is tried."""
_LONGEST_PAUSE = 10.0
_JITTER = random.SystemRandom()  # not the generator that a training seeds

T = TypeVar("T")


class Storage(Protocol):
    """The files of one folder, by name. May be pickled and forked: every process opens its own."""

    def describe(self, name: str) -> str:
        """A file, or the folder for the empty name, as messages call it."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where that is asked when it is read.  Raises FileNotFoundError or another OSError."""

    def read(self, name: str) -> bytes:
        """A whole small file.  Raises FileNotFoundError or another OSError."""

    def read_parts(self, shard: ShardEntry, *parts: Part) -> list[bytes]:
        """Parts of a tar, each shorter where the file ends before.  Raises OSError."""

    def forget(self, shard: ShardEntry, *parts: Part) -> bool:
        """Drop what is kept of parts that hold other bytes than they should; whether there is sense in another try."""

    def array(self, index: IndexEntry, most: int) -> np.ndarray:
        """The array in a .npy file of at most so many bytes, mapped if possible.

        Raises OSError, or ValueError where it holds none.
        """


class LocalStorage:
    """A folder of a local or network file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def describe(self, name: str) -> str:
        return str(self.folder / name)

    def size(self, name: str) -> int:
        return self._persist(lambda: (self.folder / name).stat().st_size)

    def read(self, name: str) -> bytes:
        return self._persist((self.folder / name).read_bytes)

    def read_parts(self, shard: ShardEntry, *parts: Part) -> list[bytes]:
        return self.read_at(shard["name"], *parts)

    def read_at(self, name: str, *parts: Part) -> list[bytes]:
        """Parts of any file, each shorter where the file ends before.  Raises OSError."""
        try:
            return self._open(name).read(parts)
        except OSError:
            return self._persist(lambda: self._open(name).read(parts))

    def forget(self, shard: ShardEntry, *parts: Part) -> bool:
        return False

    def array(self, index: IndexEntry, most: int) -> np.ndarray:
        return self._persist(lambda: np.lib.format.open_memmap(self.folder / index["name"], mode="r"))

    def _persist(self, action: Callable[[], T]) -> T:
        return persist(action, self._passes, _LOCAL_SECONDS)

    def _passes(self, error: Exception) -> bool:
        if not passes(error):
            return False
        self._open.cache_clear()  # a stale handle stays so
        return True

    @functools.cached_property
    def _open(self) -> Any:
        return functools.lru_cache(maxsize=_OPEN_FILES)(lambda name: _Descriptor(self.folder / name))

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}  # open files stay behind


class _Descriptor:
    """An open file that is read at given places, and closed when nobody refers to it any more."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, parts: Iterable[Part]) -> list[bytes]:
        return [os.pread(self._file, size, offset) for offset, size in parts]

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # not where opening failed
            os.close(self._file)


def persist(action: Callable[[], T], passes: Callable[[Exception], bool], seconds: float) -> T:
    """What `action` returns; after an error that `passes` it is tried again, ever less often, for so many seconds."""
    end = time.monotonic() + seconds
    for attempt in itertools.count():
        try:
            return action()
        except Exception as error:
            pause = min(_LONGEST_PAUSE, 0.1 * 2**attempt) * _JITTER.uniform(0.5, 1)
            if not passes(error) or time.monotonic() + pause > end:
                raise
        time.sleep(pause)
    raise AssertionError  # the loop has no end


def is_url(location: Location) -> bool:
    """Whether a folder is reached by a URL."""
    return isinstance(location, str) and "://" in location


def shown(location: Location) -> str:
    """A folder as messages call it: a URL without what may be secret in it (user, password, query)."""
    if not is_url(location):
        return str(location)
    parts = urlsplit(str(location))
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def location_of(text: str) -> Location:
    """The folder that an option or a file names: a URL as it is, everything else as a path."""
    if text.startswith("file://"):
        return Path(unquote(urlsplit(text).path))
    return text if is_url(text) else Path(text).expanduser()


def open_storage(location: Location, cache_gb: float | None = None) -> Storage:
    """The storage of a folder; cache_gb: room for what is kept of a remote one (`data_prep.storage.cache`).

    Raises:
        UserError: a URL that nothing here can read.
    """
    place = location_of(location) if isinstance(location, str) else location
    if isinstance(place, Path):
        return LocalStorage(place)
    from data_prep.storage.remote import RemoteStorage  # its libraries take a second to import

    return RemoteStorage(place, cache_gb)
