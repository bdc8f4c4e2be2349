"""What is kept on this machine of remote shard folders: files named after the content that they hold a part of.

Any number of processes, runs and nodes may share a cache's folder. A file appears whole and never changes, so readers
need no lock; writers take one to keep the folder within its limit. Nothing is flushed: who reads checks.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import UserError

DEFAULT_GB = 8.0
"""Room for the cache, 10^9 bytes each."""
_LOCK_SECONDS = 2.0
"""How long a writer waits for the others before it does without the cache."""
_TOUCHED_AFTER = 60.0
"""Seconds after which a file counts as used again."""
_TOTAL = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
"""How the file with the total is opened: it is written over, so a link that somebody else put there is not followed."""
_LEFT_AFTER = 3600.0
"""Seconds after which a temporary file belongs to nobody."""


class Cache:
    """Files by name, the least recently used of which go where room is needed."""

    def __init__(self, folder: Path, limit: int) -> None:
        """limit: bytes of all files.  Raises OSError where the folder cannot be made."""
        self.folder, self.limit = folder, limit
        self.writable = True
        """False once something could not be written, such as on a full disk: nothing more is kept by this process."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """Bytes of a file, counted as used; None where it is not there or has fewer than `stop`."""
        try:
            with open(self.folder / name, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                end = status.st_size if stop is None else stop
                content = os.pread(file.fileno(), end - start, start)
                if time.time() - status.st_mtime > _TOUCHED_AFTER:
                    os.utime(file.fileno())
        except OSError:
            return None
        return content if len(content) == end - start else None

    def put(self, name: str, content: bytes) -> bool:
        """Keep a file; whether it could be."""
        if not self.writable or len(content) > self.limit:
            return False
        try:
            with self.temporary() as path:
                path.write_bytes(content)
                return self.adopt(name, path)
        except OSError as error:
            self._give_up(error)
            return False

    def adopt(self, name: str, path: Path) -> bool:
        """Take over a file of `temporary`; whether it could be."""
        size = path.stat().st_size
        if size > self.limit:
            return False
        try:
            with self._locked() as lock:
                text = os.pread(lock, 32, 0)
                total = int(text) if text.isdigit() else self.limit
                total = total + size if total + size <= self.limit else self._make_room(size) + size
                os.ftruncate(lock, 0)
                os.pwrite(lock, str(total).encode(), 0)  # before the file is there: an end between them counts too much
                os.replace(path, self.folder / name)
        except OSError as error:
            self._give_up(error)
            return False
        return True

    def remove(self, name: str) -> None:
        """Drop a file, if it is there."""
        with contextlib.suppress(OSError):
            (self.folder / name).unlink()

    @contextlib.contextmanager
    def temporary(self) -> Iterator[Path]:
        """A new file in the folder, which is gone afterwards unless it was adopted.  Raises OSError."""
        handle, name = tempfile.mkstemp(".tmp", dir=self.folder)
        os.close(handle)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The descriptor of the file that says how much there is.  Raises OSError where others keep it too long."""
        handle = os.open(self.folder / "total", _TOTAL, 0o600)
        end = time.monotonic() + _LOCK_SECONDS
        try:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise
                time.sleep(0.01)
            yield handle
        finally:
            os.close(handle)

    def _make_room(self, wanted: int) -> int:
        """Remove what was not used for longest, down to nine tenths of the limit; the bytes that are left."""
        found, total = [], 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    if entry.name == "total":
                        continue
                    if not entry.name.endswith(".tmp"):  # those are being written
                        total += status.st_size
                        found.append((status.st_mtime, status.st_size, entry.path))
                    elif time.time() - status.st_mtime > _LEFT_AFTER:
                        Path(entry.path).unlink()
        for _, size, path in sorted(found):
            if total + wanted <= max(wanted, 0.9 * self.limit):
                break
            with contextlib.suppress(FileNotFoundError):
                Path(path).unlink()
            total -= size
        return total

    def _give_up(self, error: OSError) -> None:
        if not isinstance(error, BlockingIOError):  # that is others' turn, and passes
            self.writable = False
            _warn(self.folder, error)


def open_cache(gigabytes: float | None = None) -> Cache | None:
    """The cache of this user: IVTLR_CACHE or ~/.cache/ivt-lr, of IVTLR_CACHE_GB or `DEFAULT_GB`; None without room.

    Raises:
        UserError: IVTLR_CACHE_GB is no number.
    """
    if gigabytes is None:
        text = os.environ.get("IVTLR_CACHE_GB", str(DEFAULT_GB))
        try:
            gigabytes = float(text)
        except ValueError:
            raise UserError(f"IVTLR_CACHE_GB {text}: expected a number") from None
    if not gigabytes > 0:
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ivt-lr"
    folder = Path(os.environ.get("IVTLR_CACHE") or home).expanduser()
    try:
        return Cache(folder, int(min(gigabytes, 1e9) * 1e9))
    except OSError as error:
        _warn(folder, error)
        return None


def _warn(folder: Path, error: OSError) -> None:
    logging.getLogger(__name__).warning("reading on without the cache %s: %s", folder, error.strerror or error)
