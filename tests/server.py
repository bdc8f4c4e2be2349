"""A web server for a folder, which misbehaves as it is told to."""

from __future__ import annotations

import contextlib
import gzip
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Server(ThreadingHTTPServer):
    """Serves a folder and parts of its files at `url`."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[tuple[str, str]] = []
        """(file, Range) of every request"""
        self.fault: Fault | None = None
        """Asked first; it returns whether it has answered"""
        self.ended = threading.Event()

    def break_tars(self, fault: Fault, times: int = 10**9) -> None:
        """Answer so many requests for tars by `fault`."""
        left = iter(range(times))
        self.fault = lambda h: h.name.endswith(".tar") and next(left, None) is not None and fault(h)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        self.name = unquote(urlsplit(self.path).path).lstrip("/")
        self.server.asked.append((self.name, self.headers.get("Range", "")))
        path = self.server.folder / self.name
        self.content = path.read_bytes() if path.is_file() else b""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.part = (int(match[1]), int(match[2]) + 1) if match else (0, len(self.content))
        if self.server.fault and self.server.fault(self):
            return
        if not path.is_file():
            self.answer(404, b"nothing here")
        elif match:
            self.answer(206, self.content[slice(*self.part)], self.part[0])
        else:
            self.answer(200, self.content)

    def answer(self, status: int, body: bytes, start: int | None = None, length: int | None = None) -> None:
        """Send it; length: what is promised where that is another number of bytes, after which the connection ends."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if start is not None:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(self.content)}")
        self.end_headers()
        with contextlib.suppress(OSError):  # the other side has left
            self.wfile.write(body)
        self.close_connection = length is not None and length > len(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


Fault = Callable[[Handler], bool]


def status(code: int) -> Fault:
    return lambda h: h.answer(code, b"a page that explains it") is None


def dropped(h: Handler) -> bool:
    """Half of the body, then the connection ends."""
    body = h.content[slice(*h.part)]
    h.answer(206, body[: len(body) // 2], h.part[0], len(body))
    return True


def hung_up(h: Handler) -> bool:
    """The connection ends without an answer."""
    h.close_connection = True
    return True


def silent(h: Handler) -> bool:
    """Nothing comes while the server runs."""
    h.server.ended.wait(60)
    return hung_up(h)


def short(h: Handler) -> bool:
    h.answer(206, h.content[slice(*h.part)][:-1], h.part[0])
    return True


def long(h: Handler) -> bool:
    h.answer(206, h.content[slice(*h.part)] + b"x", h.part[0])
    return True


def endless(h: Handler) -> bool:
    """More and more comes, of a length that was not told."""
    h.send_response(206 if h.headers.get("Range") else 200)
    h.send_header("Content-Range", f"bytes {h.part[0]}-{h.part[1] - 1}/{len(h.content)}")
    h.send_header("Transfer-Encoding", "chunked")
    h.end_headers()
    block = b"10000\r\n" + bytes(2**16) + b"\r\n"
    with contextlib.suppress(OSError):  # the other side has left
        for _ in range(2**14):  # a gigabyte
            h.wfile.write(block)
    return hung_up(h)


def packed(h: Handler) -> bool:
    """What unpacks to a hundred times as much."""
    body = gzip.compress(bytes(10**7))
    h.send_response(206 if h.headers.get("Range") else 200)
    h.send_header("Content-Range", f"bytes {h.part[0]}-{h.part[1] - 1}/{len(h.content)}")
    h.send_header("Content-Encoding", "gzip")
    h.send_header("Transfer-Encoding", "chunked")
    h.end_headers()
    with contextlib.suppress(OSError):
        h.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
    return hung_up(h)


def elsewhere(h: Handler) -> bool:
    """Another part of the right length."""
    h.answer(206, h.content[slice(*h.part)], h.part[0] + 1)
    return True


def changed(h: Handler) -> bool:
    """The right place and length, other bytes."""
    h.answer(206 if h.headers.get("Range") else 200, bytes(b ^ 1 for b in h.content[slice(*h.part)]), h.part[0])
    return True


def whole(h: Handler) -> bool:
    """No part, whatever was asked for."""
    h.answer(200, h.content)
    return True


def garbage(h: Handler) -> bool:
    """No HTTP."""
    h.wfile.write(b"\x16\x03\x01 not a protocol that anybody speaks\r\n\r\n")
    return hung_up(h)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server of the folder while the block runs."""
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()
