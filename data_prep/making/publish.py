"""How a finished folder comes about from parts (`data_prep.making.parts`), whenever a run is stopped.

A run writes nothing but `.parts/` in its folder until everything is there. Then the files are gathered in
`.parts/publish/`, the manifest last: with it the result is settled, and what is left is to rename them into the folder,
the manifest last again. A run that is stopped before it settled leaves an older folder as it was, and its shards for
the next run; one that is stopped later leaves the renaming to the next run.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import parse_json
from data_prep.index import read_manifest, write_manifest
from data_prep.making.parts import PARTS, Shard
from data_prep.sources import SPLITS

_TAR = re.compile(rf"({'|'.join(SPLITS)})-[0-9]{{6,}}\.tar")
_PATIENCE = 5.0
"""Seconds that a killed run's processes have to end."""


@contextlib.contextmanager
def locked(out: Path) -> Iterator[Connection]:
    """Keep other runs out of a folder, where its file system has locks; yields what holds the lock while it is open.

    Raises:
        UserError: another run is at work there.
    """
    # A folder needs no file for its lock; and a Connection can be handed to spawned processes.
    lock = Connection(os.open(out, os.O_RDONLY), writable=False)
    try:
        deadline = time.monotonic() + _PATIENCE
        while not _lock(lock):
            if time.monotonic() > deadline:
                raise UserError(f"--out {out}: another run is writing to this folder")
            time.sleep(0.05)
        yield lock
    finally:
        lock.close()


def _lock(lock: Connection) -> bool:
    try:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def publishing(out: Path) -> Path:
    """Where the files of a finished folder are gathered."""
    return out / PARTS / "publish"


def recover(out: Path, made_from: str) -> bool:
    """Go on from where a stopped run was, if there was one.

    A settled result is put into the folder; of everything else those parts stay that are whole by their names and
    `made_from` (`data_prep.making.made_from.fingerprint`).

    Returns:
        Whether a result was settled.
    """
    settled = (publishing(out) / "manifest.json").exists()
    if settled:
        put_in_place(out)
    for tar in publishing(out).glob("*.tar"):
        os.replace(tar, out / PARTS / tar.name)
    shutil.rmtree(publishing(out), ignore_errors=True)
    tidy(out, made_from)
    return settled


def check_ours(out: Path) -> None:
    """Raise UserError where tars are somebody else's that a finished folder's would replace, or remove."""
    if (out / "manifest.json").exists():
        return
    names = sorted(path.name for path in out.iterdir() if path.is_file())
    strangers = [name for name in names if _TAR.fullmatch(name) and f"{name.partition('-')[0]}.index.npy" not in names]
    if strangers:
        raise UserError(f"--out {out} holds {strangers[0]}, which this program did not write; choose another folder")


def settle(out: Path, shards: Iterable[Shard], content: dict[str, Any]) -> dict[str, Any]:
    """Add tars and the manifest of `content` to what is gathered, and put all of it in place; returns the manifest."""
    for shard in shards:
        tar = shard.path(".tar")
        os.replace(tar, publishing(out) / tar.name)
    manifest = write_manifest(publishing(out), content)
    put_in_place(out)
    return manifest


def put_in_place(out: Path) -> None:
    """Rename what is settled into the folder; may be stopped and called again."""
    manifest = read_manifest(publishing(out))
    for path in sorted(publishing(out).iterdir()):
        if path.name != "manifest.json":
            os.replace(path, out / path.name)
    # A reader that takes SPLIT-*.tar must not find the tars of an earlier, longer run.
    current = {shard["name"] for part in manifest["splits"].values() for shard in part["shards"]}
    for path in out.iterdir():
        if _TAR.fullmatch(path.name) and path.name not in current:
            path.unlink()
    os.replace(publishing(out) / "manifest.json", out / "manifest.json")


def tidy(out: Path, made_from: str) -> None:
    """Remove what is of no use to a later run: all but whole parts made from the same; and `PARTS` when it is empty."""
    parts = out / PARTS
    if not parts.exists():
        return
    kept: set[str] = set()
    for record in parts.glob("*.json"):
        if record.with_suffix(".tar").exists() and _made_from(record) == made_from:
            kept |= {record.with_suffix(suffix).name for suffix in (".tar", ".npy", ".json")}
    for path in parts.iterdir():
        if path.name not in kept and not path.is_dir():
            path.unlink()
    for folder in (publishing(out), parts):
        with contextlib.suppress(OSError):  # absent, or not empty
            folder.rmdir()


def remove_unfinished(out: Path) -> None:
    """Remove what ended processes were writing."""
    for path in (out / PARTS).glob("*.tmp"):
        path.unlink()


def _made_from(record: Path) -> Any:
    """What a part's record says that it was made from, without what was held out."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        return parse_json(record.read_bytes())["made_from"].partition("+")[0]
    return None
