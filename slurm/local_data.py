"""Command: a copy of a shard folder on this node's own disk.  `python slurm/local_data.py --data DIR --local DIR`

slurm/run_stage.sh starts it once on every node where LOCAL_DATA is set.  Every file is compared with the hash that the
manifest has of it while it is copied, and takes its name when it is whole; the manifest comes last.  Started again it
copies what is not there yet.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: the modules' root is the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_prep import cli
from data_prep.errors import UserError
from data_prep.files import atomic_path, sha256, write_atomic
from data_prep.index import read_manifest

AT_ONCE = 4
"""Files that are copied at the same time."""
_SEEN = "local_data.json"


@dataclass(frozen=True)
class File:
    """A file of a shard folder, as its manifest has it."""

    name: str
    sha256: str


def files_of(manifest: dict[str, Any]) -> Iterator[File]:
    for part in manifest["splits"].values():
        yield File(part["index"]["name"], part["index"]["sha256"])
        for shard in part["shards"]:
            yield File(shard["name"], shard["sha256"])
    if rejects := manifest.get("rejects"):
        yield File(rejects["name"], rejects["sha256"])


def main(*, data: Path, local: Path) -> None:
    """Copy the shard folder --data to the folder --local, and check it.

    Raises UserError: no shard folder, too little space, or a file that is not as it was written.
    """
    began = time.monotonic()
    copied, kept = copy_folder(data, local)
    print(
        f"{socket.gethostname()}: {local}: {copied / 1e6:.1f} MB copied, {kept / 1e6:.1f} MB were there,"
        f" {time.monotonic() - began:.0f} s"
    )


def copy_folder(source: Path, folder: Path) -> tuple[int, int]:
    """Bytes that were copied, and that were there already.  Another copier of the same folder is waited for."""
    manifest = read_manifest(source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder.samefile(source):
            raise UserError(f"{folder} is the shard folder itself; set LOCAL_DATA to a folder of the node's own disk")
        with open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return _copy(source, folder, manifest)
    except OSError as error:
        raise UserError(f"{socket.gethostname()}: {source} cannot be copied to {folder}: {error}") from None


def _copy(source: Path, folder: Path, manifest: dict[str, Any]) -> tuple[int, int]:
    seen = _read_seen(folder)
    sizes = {file: (source / file.name).stat().st_size for file in files_of(manifest)}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        there = pool.map(lambda file: _is_there(folder / file.name, file.sha256, seen), sizes)
        missing = [file for file, found in zip(sizes, there, strict=True) if not found]
        needed = sum(sizes[file] for file in missing)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"{socket.gethostname()}: {folder} needs {needed / 1e9:.2f} GB more, and {free / 1e9:.2f} GB are free"
            )
        if missing:
            (folder / "manifest.json").unlink(missing_ok=True)  # not a finished folder meanwhile
        for _ in pool.map(lambda file: _copy_file(source / file.name, folder / file.name, file.sha256), missing):
            pass
    shown = (source / "manifest.json").read_bytes()
    if not missing and (folder / "manifest.json").exists() and (folder / "manifest.json").read_bytes() == shown:
        return 0, sum(sizes.values())
    # so that the next start need not read everything again
    write_atomic(folder / _SEEN, json.dumps({file.name: _stamp(folder / file.name, file.sha256) for file in sizes}))
    write_atomic(folder / "manifest.json", shown)
    return needed, sum(sizes.values()) - needed


def _copy_file(source: Path, target: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with open(source, "rb") as file, atomic_path(target) as temporary, open(temporary, "wb") as copy:
        while block := file.read(2**22):
            digest.update(block)
            copy.write(block)
        if digest.hexdigest() != expected:
            raise UserError(f"{source} is not as it was written; python -m data_prep.shard --verify tells more")


def _is_there(path: Path, expected: str, seen: dict[str, Any]) -> bool:
    """Whether a copy is whole: unchanged since it was compared with its hash, or compared now."""
    try:
        return seen.get(path.name) == _stamp(path, expected) or sha256(path) == expected
    except FileNotFoundError:
        return False


def _stamp(path: Path, digest: str) -> list[Any]:
    stat = path.stat()
    return [digest, stat.st_size, stat.st_mtime_ns]


def _read_seen(folder: Path) -> dict[str, Any]:
    try:
        seen = json.loads((folder / _SEEN).read_bytes())
    except (OSError, ValueError):
        return {}
    return seen if isinstance(seen, dict) else {}


if __name__ == "__main__":
    cli.run(main)
