"""A shard folder behind a URL, through fsspec: parts of files, asked for until they come, and kept in a cache.

What comes is not trusted: tars and indexes are checked against the manifest's hashes, so a server's mistake costs time
and never gives other samples.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import io
import logging
import os
import re
import ssl
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from data_prep.errors import UserError
from data_prep.files import sha256
from data_prep.storage import Part, persist, shown
from data_prep.storage.cache import open_cache
from data_prep.storage.connection import MOST, MOST_SMALL, Connection, WholeFile

if TYPE_CHECKING:
    from data_prep.index import IndexEntry, ShardEntry

BLOCK = 2**20
"""Bytes of a tar that are fetched and kept together."""
_GAP = 2**16
"""Bytes between parts that are asked for with them rather than left out."""
OPEN_SECONDS = 30.0
"""How long a manifest or index is asked for before the server counts as out of reach."""
READ_SECONDS = 300.0
"""The same for a part of a tar."""
PART_SECONDS, WHOLE_SECONDS = 60.0, 1800.0
"""For the answer with a part or a small file, and with a whole one."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT}
"""What this machine's disk says where nothing can be kept."""

T = TypeVar("T")


class _OtherContent(OSError):
    """A file that came is not the one of the manifest."""


class RemoteStorage:
    """A folder of which fsspec knows the protocol: http and https, others with their packages."""

    def __init__(self, url: str, cache_gb: float | None = None) -> None:
        """cache_gb: as for `open_cache`.  Raises UserError where fsspec or a package of it cannot read the URL."""
        self.url = url
        self._cache = open_cache(cache_gb)
        self._server = "://".join(urlsplit(url)[:2])
        self._connection: Connection | None = None
        try:
            self._connect()
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.describe('')} cannot be read here: {_in_a_line(error)}") from None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_connection": None}

    def describe(self, name: str) -> str:
        return shown(self._file(name))

    def size(self, name: str) -> None:
        return None  # a request for every tar: thousands would take minutes

    def read(self, name: str) -> bytes:
        """A whole small file, or the last one that came where the server is out of reach."""
        kept = f"last-{hashlib.sha256(self._file(name).encode()).hexdigest()}"
        try:
            content = self._small(name, MOST_SMALL)
        except FileNotFoundError:
            raise
        except OSError as error:
            last = self._cache.read(kept) if self._server in _LOST and self._cache else None
            if last is None:
                raise
            told = "%s: %s; going on with the last one that came, and with what else is in the cache"
            logging.getLogger(__name__).warning(told, self.describe(name), error)
            return last
        if self._cache and self._cache.read(kept) != content:
            self._cache.put(kept, content)
        return content

    def read_parts(self, shard: ShardEntry, *parts: Part) -> list[bytes]:
        start, stop = _span(parts)
        if stop - start > sum(size for _, size in parts) + _GAP:
            return [self._read(shard, offset, offset + size) for offset, size in parts]
        together = self._read(shard, start, stop)
        return [together[offset - start : offset - start + size] if size else b"" for offset, size in parts]

    def _read(self, shard: ShardEntry, offset: int, stop: int) -> bytes:
        """A part from the cache, or in one request."""
        stop = min(stop, shard["bytes"])
        if offset >= stop:
            return b""
        numbers = range(offset // BLOCK, (stop - 1) // BLOCK + 1)
        pieces: dict[int, bytes | None] = dict.fromkeys(numbers)
        if self._cache:
            for n in numbers:
                start = n * BLOCK
                inside = max(offset, start) - start, min(stop, start + BLOCK) - start
                pieces[n] = self._cache.read(_block(shard, n), *inside)
        missing = [n for n, piece in pieces.items() if piece is None]
        if not missing:
            return b"".join(filter(None, pieces.values()))
        if self._cache is None or not self._cache.writable:
            return self._part(shard, offset, stop)
        start = missing[0] * BLOCK
        content = self._part(shard, start, min((missing[-1] + 1) * BLOCK, shard["bytes"]))
        self._keep(shard, start, io.BytesIO(content))
        for n in range(missing[0], missing[-1] + 1):
            pieces[n] = content[max(offset, n * BLOCK) - start : min(stop, (n + 1) * BLOCK) - start]
        return b"".join(filter(None, pieces.values()))

    def forget(self, shard: ShardEntry, *parts: Part) -> bool:
        if self._cache:
            start, stop = _span(parts)
            for n in range(start // BLOCK, stop // BLOCK + 1):
                self._cache.remove(_block(shard, n))
        return self._server not in _LOST

    def array(self, index: IndexEntry, most: int) -> np.ndarray:
        if self._cache is None:
            return self._array_in_memory(index, most)
        path = self._cache.folder / index["sha256"]
        with contextlib.suppress(OSError):  # it is not there, or others just make room
            if sha256(path) == index["sha256"]:
                self._cache.read(path.name, 0, 0)  # it is used
                return np.lib.format.open_memmap(path, mode="r")
        try:
            with self._cache.temporary() as temporary:
                self._whole(index, temporary, OPEN_SECONDS, most)
                mapped = np.lib.format.open_memmap(temporary, mode="r")  # stays when the file goes
                self._cache.adopt(path.name, temporary)
                return mapped
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
        return self._array_in_memory(index, most)

    def _array_in_memory(self, index: IndexEntry, most: int) -> np.ndarray:
        content = self._small(index["name"], most)
        if hashlib.sha256(content).hexdigest() != index["sha256"]:
            raise _OtherContent("it is not the one of the manifest")
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)

    def _small(self, name: str, most: int) -> bytes:
        """A file that fits into memory."""
        return self._ask(name, lambda at, path: at.files.cat_file(path, **at.within(PART_SECONDS)), OPEN_SECONDS, most)

    def _part(self, shard: ShardEntry, start: int, stop: int) -> bytes:
        def ask(at: Connection, path: str) -> bytes:
            content: bytes = at.files.cat_file(path, start=start, end=stop, **at.within(PART_SECONDS))
            if len(content) != stop - start:
                raise OSError(f"{len(content)} bytes came, not {stop - start}")
            return content

        try:
            return self._ask(shard["name"], ask, READ_SECONDS, stop - start)
        except WholeFile:
            return self._part_of_whole(shard, start, stop)

    def _part_of_whole(self, shard: ShardEntry, start: int, stop: int) -> bytes:
        """The part from a server that gives whole files only: its tars go through the cache once."""
        if self._cache is None or not self._cache.writable or shard["bytes"] > self._cache.limit // 2:
            raise OSError("the server gives no parts of files (HTTP Range), and there is no room in the cache for all")
        with self._cache.temporary() as temporary:
            self._whole(shard, temporary, READ_SECONDS, shard["bytes"])
            with open(temporary, "rb") as file:
                self._keep(shard, 0, file)
                return os.pread(file.fileno(), stop - start, start)

    def _whole(self, entry: IndexEntry | ShardEntry, to: Path, seconds: float, most: int) -> None:
        """Fetch a file and check its hash."""

        def ask(at: Connection, path: str) -> None:
            at.files.get_file(path, str(to), **at.within(WHOLE_SECONDS))
            if sha256(to) != entry["sha256"]:
                raise _OtherContent("it is not the one of the manifest")

        self._ask(entry["name"], ask, seconds, most)

    def _keep(self, shard: ShardEntry, start: int, content: Any) -> None:
        """Blocks of a tar, from the one at `start`, for as long as the file `content` has some."""
        number = start // BLOCK
        while self._cache and (block := content.read(BLOCK)) and self._cache.put(_block(shard, number), block):
            number += 1

    def _ask(self, name: str, question: Callable[[Connection, str], T], seconds: float, most: int) -> T:
        """`question` of (connection, path), asked until it is answered.  Raises OSError with a line that says why."""

        def ask() -> T:
            MOST.set(most)  # fsspec's thread works in this one's context
            return question(self._connect(), self._file(name))

        try:
            answer = persist(ask, _passes, 0.0 if self._server in _LOST else seconds)
        except WholeFile:
            raise
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "there is no such file") from None
        except Exception as error:  # the libraries of a protocol have kinds of their own
            if _passes(error) and not isinstance(error, _OtherContent):
                _LOST.add(self._server)
            known = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)  # this machine's disk
            raise OSError(error.errno if known else None, _in_a_line(error)) from error  # type: ignore[attr-defined]
        _LOST.discard(self._server)
        return answer

    def _file(self, name: str) -> str:
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}" if name else parts.path))

    def _connect(self) -> Connection:
        """This process's own: neither sockets nor the thread behind them survive a fork."""
        if self._connection is None or self._connection.process != os.getpid():
            self.disconnect()
            self._connection = Connection(self.url)
            _CONNECTED.add(self)
        return self._connection

    def disconnect(self) -> None:
        """Close what is open; the next request opens it anew."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


_LOST: set[str] = set()
"""Servers that were asked in vain for as long. They are asked once at a time until something comes."""
_CONNECTED: weakref.WeakSet[RemoteStorage] = weakref.WeakSet()


def _disconnect_all() -> None:
    for storage in list(_CONNECTED):
        storage.disconnect()
    _CONNECTED.clear()


os.register_at_fork(before=_disconnect_all)


def _span(parts: Sequence[Part]) -> tuple[int, int]:
    """Where the first of them begins and the last ends."""
    some = [(offset, offset + size) for offset, size in parts if size] or [(0, 0)]
    return min(start for start, _ in some), max(stop for _, stop in some)


def _block(shard: ShardEntry, number: int) -> str:
    return f"{shard['sha256']}-{number}"


def _passes(error: Exception) -> bool:
    """Whether an error may be gone a moment later."""
    if isinstance(error, WholeFile | FileNotFoundError | PermissionError | ssl.CertificateError):
        return False
    if isinstance(error, ValueError | TypeError | AttributeError | ImportError | NotImplementedError):
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return False
    status = getattr(error, "status", None)
    return not (isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429))


def _in_a_line(error: Exception) -> str:
    """What a library's exception says."""
    status = getattr(error, "status", None)
    text = re.sub(r"^\[Errno \d+\] ", "", str(error))
    if isinstance(status, int):
        text = f"HTTP {status} {getattr(error, 'message', '')}" if status else type(error).__name__  # such as redirects
    elif isinstance(error, TimeoutError | asyncio.TimeoutError):
        text = "no answer in time"
    return " ".join(text.split()) or type(error).__name__
