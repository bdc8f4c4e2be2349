"""What all ranks must have in common before a start does anything long: code, settings, data, versions.

Ranks on several nodes may find another copy of the code, another environment or another file under the same name, and
would train a mixture of both or wait for each other for ever.  They compare in one exchange, and all end with the same
lines.  Everything counts, also what cannot change a number (a cadence, Python's patch level): one rule is easier to
keep than a list of exceptions, and ranks that differ in a cadence do not meet in the next collective.  GPUs may be of
different models.
"""

from __future__ import annotations

import contextlib
import json
import platform
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

import data_prep
from data_prep.errors import UserError, kind_of_all
from data_prep.files import sha256
from pipeline import distributed
from pipeline.data.mixture import Index
from pipeline.distributed import World
from pipeline.model import resolve_dtype
from pipeline.plan import Plan, flatten
from pipeline.prepare import base_hash
from pipeline.registry import loaded_plugins

CODE = (Path(__file__).parent, Path(data_prep.__file__).parent)
"""Packages whose text counts."""
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "numpy", "safetensors", "tokenizers")
SHOWN = 12
"""Lines of differences at most."""
ABSENT = "nothing"

Facts = dict[str, Any]


@contextlib.contextmanager
def agreed() -> Iterator[Facts]:
    """What ranks put in inside must be equal on all, and a mistake that one finds there is raised on every one.

    Ranks come together; nothing inside may wait for another rank.  Raises UserError with a line for each difference.
    """
    facts: Facts = {}
    problem: UserError | None = None
    try:
        yield facts
    except UserError as error:
        problem = error
    told = distributed.gather((socket.gethostname(), facts, problem))
    lines = disagreements([(host, found, error.lines if error else ()) for host, found, error in told])
    if lines:
        raise kind_of_all([error for *_, error in told if error is not None])(*lines)


@contextlib.contextmanager
def mistakes_shared(world: World) -> Iterator[None]:
    """Around what comes before the process group: a mistake that only one rank finds is raised on every one."""
    try:
        yield
    except UserError as error:
        if world.size > 1:
            try:
                distributed.start(world)
            except UserError:
                raise error from None  # it explains more than that ranks cannot meet
            with agreed():  # where the others compare their facts
                raise error
        raise


# ---- what is compared -------------------------------------------------------------------------------------------
def facts_of_start(plan: Plan, device: torch.device) -> Facts:
    """All that a rank knows before data and model are made."""
    config = plan.config
    return {
        **{f"the text of {name}": digest for name, digest in code_hashes().items()},
        **{f"the text of {plugin.path.name}": plugin.sha256[:12] for plugin in loaded_plugins()},
        **versions(),
        **flatten(config.model_dump(mode="json")),
        **{f"{name} of the DeepSpeed file": value for name, value in flatten(plan.ds).items()},
        "--out": str(plan.out.absolute()),
        "--stages": plan.asked,
        "--resume": plan.resume,
        "the number of ranks": plan.triangle.world,
        "the kind of device": get_accelerator().device_name(),
        "the model's type": str(resolve_dtype(config.model.dtype, device)),
    }


def facts_of_inputs(indexes: Mapping[str, Index], base: Path | str, revision: str | None) -> Facts:
    """Data and base model as this rank sees them; of the weights only the files' sizes, not what takes minutes."""
    facts: Facts = {f"the {split} split of the data": index.index_hash for split, index in indexes.items()}
    facts["the base model's config and tokenizer"] = base_hash(base, weights=False, revision=revision)
    if Path(base).is_dir():
        weights = (path for path in Path(base).iterdir() if path.suffix in (".safetensors", ".bin"))
        facts |= {f"the bytes of the base model's {path.name}": path.stat().st_size for path in weights}
    return facts


def code_hashes() -> dict[str, str]:
    """File -> beginning of its hash, of the code that this rank runs."""
    files = [(f"{root.name}/{path.relative_to(root)}", path) for root in CODE for path in root.rglob("*.py")]
    return {name: sha256(path)[:12] for name, path in sorted(files)}


def versions() -> dict[str, str]:
    found = {"the version of Python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[f"the version of {package}"] = version(package)
    return found


# ---- how differences are told -----------------------------------------------------------------------------------
def disagreements(everywhere: Sequence[tuple[str, Facts, Sequence[str]]]) -> list[str]:
    """Lines of what (host, facts, mistakes) of the ranks do not have in common, mistakes first; none if all agree."""
    hosts = [host for host, _, _ in everywhere]
    lines = []
    for line in dict.fromkeys(line for _, _, mistakes in everywhere for line in mistakes):
        ranks = [rank for rank, (_, _, mistakes) in enumerate(everywhere) if line in mistakes]
        lines.append(line if ranks[0] == 0 else f"on {_named(ranks, hosts)}: {line}")
    # a rank with a mistake may not have got as far as its facts
    told = {rank: facts for rank, (_, facts, mistakes) in enumerate(everywhere) if not mistakes}
    different = []
    for name in dict.fromkeys(name for facts in told.values() for name in facts):
        by_value: dict[str, list[int]] = {}
        for rank, facts in told.items():
            by_value.setdefault(_shown(facts[name]) if name in facts else ABSENT, []).append(rank)
        if len(by_value) > 1:
            values = (f"{value} on {_named(ranks, hosts)}" for value, ranks in by_value.items())
            different.append(f"ranks differ in {name}: {'; '.join(values)}")
    if len(different) > SHOWN:
        different[SHOWN:] = [f"ranks differ in {len(different) - SHOWN} more settings or files"]
    return lines + different


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _named(ranks: Iterable[int], hosts: Sequence[str]) -> str:
    """ "ranks 0-2, 5 (node1, node2)" """
    ranks = list(ranks)
    runs = [[rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda pair: pair[1] - pair[0])]
    numbers = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    nodes = list(dict.fromkeys(hosts[rank] for rank in ranks))
    more = f" and {len(nodes) - 3} more" if len(nodes) > 3 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers} ({', '.join(nodes[:3])}{more})"
