"""What a shard folder is made from: a source, its input by content, settings; and in which way two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from data_prep.errors import UserError
from data_prep.files import sha256
from data_prep.index import FORMAT
from data_prep.sources import Input, Source, source_options

MadeFrom = dict[str, Any]
"""The manifest's `source` (name, input, options) and the settings that decide what is written."""


def made_from(table: Source, options: Mapping[str, Any], **settings: Any) -> MadeFrom:
    """What a folder made from `table` with `options` of the source and `settings` of the command is made from.

    Raises:
        UserError: the input cannot be read.
    """
    given = {name: str(value) for name, value in options.items()}
    source = {"name": table.name, "input": _identity(table.input()), "options": source_options(table.name) | given}
    return {"source": source, **settings}


def fingerprint(made: MadeFrom) -> str:
    """Digest that two runs share only if they write the same bytes: of `made`, the format, and this package's code."""
    digest = hashlib.sha256(json.dumps([FORMAT, made], sort_keys=True).encode())
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)} {sha256(path)}".encode())
    return digest.hexdigest()


def difference(made: MadeFrom, wanted: MadeFrom) -> str | None:
    """In which way a folder was made other than is wanted now, None if in none."""
    before, now = made["source"], wanted["source"]
    options = [f"source option {name}" for name in now["options"]]
    pairs = [
        *((name, made.get(name), wanted[name]) for name in wanted if name != "source"),
        ("source", before["name"], now["name"]),
        *zip(options, map(before["options"].get, now["options"]), now["options"].values(), strict=True),
    ]
    for name, there, here in pairs:
        if there != here:
            return f"with {name} {there}, not {here}"
    if before["input"] == now["input"]:
        return None
    if not isinstance(before["input"], list) or not isinstance(now["input"], list):
        there, here = ("files" if isinstance(input, list) else input for input in (before["input"], now["input"]))
        return f"from the input {there}, not {here}"
    changes = list(_changes(before["input"], now["input"]))
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    return f"from another input: {', '.join(changes[:3])}{more}"


def _identity(input: Input) -> str | list[dict[str, Any]] | None:
    """What a manifest says of an input: of files their names, sizes and hashes, so that equal ones give equal bytes."""
    if not isinstance(input, dict):
        return input
    entries = []
    try:
        sizes = {name: path.stat().st_size for name, path in sorted(input.items())}
        with tqdm(total=sum(sizes.values()), desc="input", unit="B", unit_scale=True, delay=1) as progress:
            for name, size in sizes.items():
                entries.append({"name": name, "bytes": size, "sha256": sha256(input[name], progress.update)})
    except OSError as error:
        raise UserError(f"--input: cannot be read ({error})") from None
    return entries


def _changes(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> Iterator[str]:
    """What became of each file of an input that is not as it was."""
    there, here = ({entry["name"]: entry for entry in entries} for entries in (before, now))
    for name in sorted(there.keys() | here.keys()):
        if name not in here:
            yield f"{name} is missing now"
        elif name not in there:
            yield f"{name} is new"
        elif there[name]["bytes"] != here[name]["bytes"]:
            yield f"{name} has {here[name]['bytes']} bytes now, not {there[name]['bytes']}"
        elif there[name] != here[name]:
            yield f"{name} has other content now"
