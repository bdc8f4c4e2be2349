"""Which samples fit the stages' `where`: found once a run, and kept in its folder.

The order of samples is made of these positions. Were they found again at each start, a sample that was damaged in the
meantime, or could just then not be read, would move all others: some would be trained on twice, some never.

    RUN/where/HASH      SHA-256 of the rest, 32 bytes; then a bit for each sample, 1 for one that fits
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.files import write_atomic
from pipeline import distributed
from pipeline.curriculum import CurriculumConfig
from pipeline.data.loader import Share, StageSteps
from pipeline.data.matching import Where, matching
from pipeline.data.mixture import Index, members_of
from pipeline.prompt import RowBuilder


def all_stages(
    index: Index,
    builder: RowBuilder,
    curriculum: CurriculumConfig,
    share: Share,
    seed: int,
    data: Any,
    log: Any,
    folder: Path,
) -> list[StageSteps]:
    """The data of every stage on this rank; ranks call it together.  data: `pipeline.config.DataConfig`.

    folder: where it is kept which samples fit; those are read once for all stages.  Raises UserError where that is
    damaged, where the index is and the order depends on its lengths, or where too few samples fit a stage.
    """
    if data.group_by_length:
        _check_lengths(index)
    wheres = list({repr(stage.where): stage.where for stage in curriculum.stages if stage.where}.values())
    found = fitting(index, wheres, folder, share, data.workers, log)
    return [
        StageSteps(
            index, builder, curriculum, number, share, seed, data.last_batch, data.group_by_length,
            found[wheres.index(stage.where)] if stage.where else None,
        )
        for number, stage in enumerate(curriculum.stages)
    ]  # fmt: skip


def fitting(
    index: Index, wheres: Sequence[Where], folder: Path, share: Share, workers: int, log: Any
) -> list[np.ndarray]:
    """`matching` as it was when the run first asked; ranks call it together.

    Raises UserError, on every rank, where a file in `folder` is damaged.
    """
    files = [folder / _name(index, where) for where in wheres]
    known: list[bytes | None] = []
    problem: UserError | None = None
    if share.rank == 0:
        try:
            known = [_read(file, len(index)) for file in files]
        except UserError as error:
            problem = error
    if share.world > 1:
        known, problem = distributed.from_main((known, problem))
    if problem is not None:
        raise problem
    new = [number for number, bits in enumerate(known) if bits is None]
    if new:
        log.info("reading %d samples for curriculum.stages.where", len(index))
        found = matching(index, [wheres[number] for number in new], workers, share.rank, share.world, log.info)
        for number, places in zip(new, found, strict=True):
            fits = np.zeros(len(index), dtype=bool)
            fits[places] = True
            bits = known[number] = np.packbits(fits).tobytes()
            if share.rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomic(files[number], hashlib.sha256(bits).digest() + bits)
    unpacked = (np.unpackbits(np.frombuffer(bits or b"", np.uint8), count=len(index)) for bits in known)
    return [np.flatnonzero(fits) for fits in unpacked]


def _name(index: Index, where: Where) -> str:
    wanted = {name: list(values) for name, values in where.items()}
    return hashlib.sha256(json.dumps([index.index_hash, wanted], sort_keys=True).encode()).hexdigest()[:32]


def _read(file: Path, samples: int) -> bytes | None:
    """The bits in a file, None where there is none.  Raises UserError where they are not as they were written."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from None
    bits = content[32:]
    if content[:32] != hashlib.sha256(bits).digest() or len(bits) != -(-samples // 8):
        raise UserError(
            f"{file} is damaged: it says which samples fit curriculum.stages.where; without it they are looked for"
            " anew, and a resumed run takes the same ones only if none was damaged since"
        )
    return bits


def _check_lengths(index: Index) -> None:
    """Raise UserError where a damaged index would sort samples in another way than a sound one does."""
    for member in members_of(index):
        for shard in range(len(member.index.shards)):
            if problem := member.index.problem_of_shard(shard):
                name = f"{member.name}: " if member.name else ""
                raise UserError(f"data.group_by_length needs a sound index, but {name}{problem}; make it again")
