"""The members of somebody else's tar, read in place: nothing is extracted, and nothing is believed unchecked.

The standard library's reader ends quietly at a damaged header, keeps an object for each member, and takes extension
headers of any size. This one reads header after header, keeps nothing, and says where and why it cannot go on.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.storage import LocalStorage

_BLOCK = tarfile.BLOCKSIZE
_MOST_EXTENSION = 64 * 2**10
"""Bytes of an extension header (a long name, pax values)."""
_MOST_PADDING = 2**20
"""Zero bytes behind the end mark."""
_KINDS = {
    tarfile.LNKTYPE: "a link", tarfile.SYMTYPE: "a link", tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe", tarfile.GNUTYPE_SPARSE: "a sparse file",
}  # fmt: skip
_PACKERS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}


class DamagedTar(Exception):
    """The tar cannot be followed any further; the message is the reason, as "KIND" or "KIND: DETAIL"."""


@dataclass(frozen=True)
class Member:
    """An entry of a tar."""

    name: str
    """Without a leading `./`; undecodable bytes are lone surrogates."""
    start: int
    """Offset of its first header."""
    offset: int
    """Where its `size` bytes lie."""
    size: int
    problem: str = ""
    """Why it must not be used, as "KIND" or "KIND: DETAIL"; empty for a plain file."""

    @property
    def key(self) -> str:
        """What the members of a sample have in common: the name up to the first dot behind the folders."""
        folder, slash, name = self.name.rpartition("/")
        return f"{folder}{slash}{name.partition('.')[0]}"

    @property
    def suffix(self) -> str:
        """The rest, in lower case, such as `json` or `cls.txt`."""
        return self.name[len(self.key) + 1 :].lower()


class Tar:
    """A tar of this machine; may be pickled."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._storage = LocalStorage(path.parent)

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at a place.  Raises DamagedTar where they are not there, OSError where they cannot be read."""
        (content,) = self._storage.read_at(self.path.name, (offset, size))
        if len(content) < size:
            raise DamagedTar(f"tar cut off: {offset + len(content)} bytes, not {offset + size} or more")
        return content

    def members(self, start: int = 0) -> Iterator[Member]:
        """The files from a member's first header on, directories left out, in order.

        Raises:
            DamagedTar: a header is damaged, the tar ends early, or something follows its end.
            OSError: it cannot be read.
        """
        length = self.path.stat().st_size
        first, told = start, _Told()
        while True:
            header = self._header(start)
            if header is None:
                self._check_end(start, length)
                return
            at = start + _BLOCK
            if header.type == tarfile.GNUTYPE_SPARSE:
                at = self._behind_sparse_map(start)
            extension = header.type in _EXTENSIONS
            size = header.size if extension or told.size is None else told.size
            if size < 0:
                raise DamagedTar(f"tar damaged: a size that is none at byte {start}")
            if not (extension or header.isreg() or header.type not in tarfile.SUPPORTED_TYPES):
                size = 0  # links, devices and folders have no data, whatever they say
            if at + size > length:
                raise DamagedTar(f"tar cut off: {max(0, length - at)} of {size} bytes of a member are there")
            start = at + -(-size // _BLOCK) * _BLOCK
            if extension:
                self._extension(told, header.type, at, size)
                continue
            name = (header.name if told.name is None else told.name).removeprefix("./")
            if not header.isdir():
                yield Member(name, first, at, size, _problem(name, header, told))
            first, told = start, _Told()

    def _header(self, start: int) -> tarfile.TarInfo | None:
        """The header at a place, None for the end mark."""
        (magic,) = [b""] if start else self._storage.read_at(self.path.name, (0, 8))
        if packer := next((name for begin, name in _PACKERS.items() if magic.startswith(begin)), None):
            raise DamagedTar(f"tar compressed: unpack it with {packer} first")
        block = self.read(start, _BLOCK)
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return None
        except (tarfile.HeaderError, ValueError) as error:
            raise DamagedTar(f"tar damaged: {error} at byte {start}") from error

    def _check_end(self, start: int, length: int) -> None:
        padding = length - start
        if padding > _MOST_PADDING or self.read(start, padding).strip(b"\0"):
            raise DamagedTar(f"something behind the end of the tar: {padding} bytes (tars joined by cat?)")

    def _behind_sparse_map(self, start: int) -> int:
        """Where the data of an old sparse file begins."""
        more, at = self.read(start + 482, 1), start + _BLOCK
        while more != b"\0":
            more, at = self.read(at + 504, 1), at + _BLOCK
        return at

    def _extension(self, told: _Told, kind: bytes, offset: int, size: int) -> None:
        if kind not in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            return  # a link's long name; values for all members, of which none matters
        if size > _MOST_EXTENSION:
            raise DamagedTar(f"tar damaged: an extension header of {size} bytes at byte {offset - _BLOCK}")
        content = self.read(offset, size)
        if kind == tarfile.GNUTYPE_LONGNAME:
            told.name = content.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            return
        for key, value in _pax_values(content):
            if key == b"path":
                told.name = value.decode("utf-8", "surrogateescape")
            elif key == b"size":
                told.size = int(value) if value.isdigit() and len(value) < 19 else -1
            told.sparse |= key.startswith(b"GNU.sparse.")


_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip


@dataclass
class _Told:
    """What extension headers say of the member behind them."""

    name: str | None = None
    size: int | None = None
    sparse: bool = False


def _pax_values(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The records `LENGTH KEY=VALUE` of a pax header."""
    while content.strip(b"\0"):
        digits, _, _ = content.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 9 else 0
        key, equals, value = content[len(digits) + 1 : length].partition(b"=")
        if not equals or not value.endswith(b"\n") or length > len(content):
            raise DamagedTar("tar damaged: a pax header that is none")
        yield key, value[:-1]
        content = content[length:]


def _problem(name: str, header: tarfile.TarInfo, told: _Told) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        return f"member outside the tar: {name}"
    if told.sparse or header.type in _KINDS:
        return f"member no plain file: {name}, {'a sparse file' if told.sparse else _KINDS[header.type]}"
    if not header.isreg():
        return f"member no plain file: {name}, of type {header.type!r}"
    return ""
