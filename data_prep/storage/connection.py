"""One process's connection to a server: fsspec's file system, and for HTTP what no answer may do.

Of an answer no more is read than it can have, and none is let through that is another part than was asked for.
"""

from __future__ import annotations

import logging
import os
import re
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import fsspec
from fsspec.asyn import sync

CONNECT_SECONDS, SILENT_SECONDS = 10.0, 30.0
"""HTTP: for a connection, and between two pieces of an answer."""
MOST_SMALL = 2**27
"""Bytes of a manifest: that of a folder of ten million samples has some 4 million."""
_MOST_TOLD = 2**20
"""Bytes of a page with which a server says what is wrong."""
MOST: ContextVar[int] = ContextVar("most", default=MOST_SMALL)
"""HTTP: bytes that the answer to this request can have; a server may send them for ever."""

_PAST: list[Any] = []
"""File systems that are not used any more. What they do at their end would reach from a child into its parent."""


class WholeFile(Exception):
    """A server gave a whole file where a part was asked for."""


@dataclass
class Connection:
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
    response.content = _Body(response.content, MOST.get() if response.status in (200, 206) else _MOST_TOLD)
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
        raise WholeFile
    if response.status == 206 and (begins is None or int(begins[1]) != start):
        response.close()
        raise OSError("another part of the file came")
    if response.content_length is not None and response.content_length > size:
        response.close()
        raise OSError(f"{response.content_length} bytes came, not {size}")
    return response
