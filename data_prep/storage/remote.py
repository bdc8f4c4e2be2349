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
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import fsspec
import numpy as np
from fsspec.asyn import sync

from data_prep.errors import UserError
from data_prep.files import sha256
from data_prep.storage import Part, persist
from data_prep.storage.cache import open_cache

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
CONNECT_SECONDS, SILENT_SECONDS = 10.0, 30.0
"""HTTP: for a connection, and between two pieces of an answer."""
PART_SECONDS, WHOLE_SECONDS = 60.0, 1800.0
"""For the answer with a part or a small file, and with a whole one."""
MOST_SMALL = 2**27
"""Bytes of a manifest: that of a folder of ten million samples has some 4 million."""
_MOST_TOLD = 2**20
"""Bytes of a page with which a server says what is wrong."""
_most: ContextVar[int] = ContextVar("most", default=MOST_SMALL)
"""HTTP: bytes that the answer to this request can have; a server may send them for ever."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT}
"""What this machine's disk says where nothing can be kept."""

T = TypeVar("T")


class _Whole(Exception):
    """A server gave a whole file where a part was asked for."""


class _OtherContent(OSError):
    """A file that came is not the one of the manifest."""


class RemoteStorage:
    """A folder of which fsspec knows the protocol: http and https, others with their packages."""

    def __init__(self, url: str, cache_gb: float | None = None) -> None:
        """cache_gb: as for `open_cache`.  Raises UserError where fsspec or a package of it cannot read the URL."""
        self.url = url
        self._cache = open_cache(cache_gb)
        self._server = "://".join(urlsplit(url)[:2])
        self._connection: _Connection | None = None
        try:
            self._connect()
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.describe('')} cannot be read here: {_in_a_line(error)}") from None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_connection": None}

    def describe(self, name: str) -> str:
        parts = urlsplit(self._file(name))
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))  # without secrets

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
        def ask(at: _Connection, path: str) -> bytes:
            content: bytes = at.files.cat_file(path, start=start, end=stop, **at.within(PART_SECONDS))
            if len(content) != stop - start:
                raise OSError(f"{len(content)} bytes came, not {stop - start}")
            return content

        try:
            return self._ask(shard["name"], ask, READ_SECONDS, stop - start)
        except _Whole:
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

        def ask(at: _Connection, path: str) -> None:
            at.files.get_file(path, str(to), **at.within(WHOLE_SECONDS))
            if sha256(to) != entry["sha256"]:
                raise _OtherContent("it is not the one of the manifest")

        self._ask(entry["name"], ask, seconds, most)

    def _keep(self, shard: ShardEntry, start: int, content: Any) -> None:
        """Blocks of a tar, from the one at `start`, for as long as the file `content` has some."""
        number = start // BLOCK
        while self._cache and (block := content.read(BLOCK)) and self._cache.put(_block(shard, number), block):
            number += 1

    def _ask(self, name: str, question: Callable[[_Connection, str], T], seconds: float, most: int) -> T:
        """`question` of (connection, path), asked until it is answered.  Raises OSError with a line that says why."""

        def ask() -> T:
            _most.set(most)  # fsspec's thread works in this one's context
            return question(self._connect(), self._file(name))

        try:
            answer = persist(ask, _passes, 0.0 if self._server in _LOST else seconds)
        except _Whole:
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

    def _connect(self) -> _Connection:
        """This process's own: neither sockets nor the thread behind them survive a fork."""
        if self._connection is None or self._connection.process != os.getpid():
            self.disconnect()
            self._connection = _Connection(self.url)
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
_PAST: list[Any] = []
"""File systems that are not used any more. What they do at their end would reach from a child into its parent."""


def _disconnect_all() -> None:
    for storage in list(_CONNECTED):
        storage.disconnect()
    _CONNECTED.clear()


os.register_at_fork(before=_disconnect_all)


@dataclass
class _Connection:
    """fsspec's file system of a URL, made by and for one process."""

    url: str
    process: int = field(default_factory=os.getpid)

    def __post_init__(self) -> None:
        self._session: Any = None
        options: dict[str, Any] = {}
        if self.url.startswith(("http://", "https://")):
            options = self._http()
        self.files, _ = fsspec.url_to_fs(self.url, skip_instance_cache=True, **options)

    def within(self, seconds: float) -> dict[str, Any]:
        """Arguments that bound a request's time; file systems without fsspec's thread have bounds of their own."""
        return {"timeout": seconds} if self.files.async_impl else {}

    def _http(self) -> dict[str, Any]:
        import aiohttp

        async def client(**arguments: Any) -> Any:
            self._session = aiohttp.ClientSession(**arguments)
            return self._session

        return {
            "get_client": client,
            "client_kwargs": {
                "timeout": aiohttp.ClientTimeout(None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS),
                "middlewares": (_only_parts, _bounded),
                "headers": {"Accept-Encoding": "identity"},  # else a part is one of something else
                "trust_env": True,  # proxies
            },
        }

    def close(self) -> None:
        _PAST.append(self.files)
        if self._session is not None and self.process == os.getpid():
            try:
                sync(self.files.loop, self._session.close, timeout=5)
            except Exception as error:
                logging.getLogger(__name__).debug("a connection could not be closed: %s", error)


class _Body:
    """The stream of an answer's body, which ends with an error where it is longer than `most` bytes."""

    def __init__(self, stream: Any, most: int) -> None:
        self._stream, self._left = stream, most

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def read(self, size: int = -1) -> bytes:
        if size >= 0:
            return self._counted(await self._stream.read(size))
        blocks = []
        while block := await self._stream.readany():
            blocks.append(self._counted(block))
        return b"".join(blocks)

    def _counted(self, block: bytes) -> bytes:
        self._left -= len(block)
        if self._left < 0:
            raise OSError("more bytes came than the file can have")
        return block


async def _bounded(request: Any, handler: Any) -> Any:
    """Of no answer is more read than it can have, whatever its head says, or unpacks to."""
    response = await handler(request)
    response.content = _Body(response.content, _most.get() if response.status in (200, 206) else _MOST_TOLD)
    return response


async def _only_parts(request: Any, handler: Any) -> Any:
    """Let no answer through, before its body comes, that is another part than was asked for."""
    response = await handler(request)
    wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
    if wanted is None or response.status not in (200, 206):
        return response
    start, size = int(wanted[1]), int(wanted[2]) - int(wanted[1]) + 1
    begins = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if response.status == 200 and not (start == 0 and response.content_length == size):
        response.close()
        raise _Whole
    if response.status == 206 and (begins is None or int(begins[1]) != start):
        response.close()
        raise OSError("another part of the file came")
    if response.content_length is not None and response.content_length > size:
        response.close()
        raise OSError(f"{response.content_length} bytes came, not {size}")
    return response


def _span(parts: Sequence[Part]) -> tuple[int, int]:
    """Where the first of them begins and the last ends."""
    some = [(offset, offset + size) for offset, size in parts if size] or [(0, 0)]
    return min(start for start, _ in some), max(stop for _, stop in some)


def _block(shard: ShardEntry, number: int) -> str:
    return f"{shard['sha256']}-{number}"


def _passes(error: Exception) -> bool:
    """Whether an error may be gone a moment later."""
    if isinstance(error, _Whole | FileNotFoundError | PermissionError | ssl.CertificateError):
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
