"""Which samples have the values of breakdown fields that a stage's `where` lists: read once, by several processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch.utils.data import Dataset

from data_prep.example import Example, InvalidExample
from data_prep.reader import BadSample
from pipeline import distributed
from pipeline.data.mixture import Index
from pipeline.data.workers import loaded

Where = Mapping[str, Collection[str]]
"""Breakdown fields -> the values that are wanted"""
STRETCH = 256
"""Samples that `matching` reads at a time."""
PROGRESS_SECONDS = 10


def read_sound(index: Index, sample: int) -> Example:
    """The Example at a position; its picture may still be one that cannot be decoded.

    Raises BadSample, also where it breaks a rule that `data_prep.shard` keeps: another program wrote it.
    """
    example = index.read(sample)
    try:
        replace(example, image=None).validate()
    except InvalidExample as error:
        raise BadSample(index.key(sample), str(error)) from error
    return example


class _Matches(Dataset):
    """Stretches of samples -> which of them each of `wheres` keeps, (wheres, samples) bool."""

    def __init__(self, index: Index, wheres: Sequence[Where], start: int, stop: int) -> None:
        self.index, self.wheres, self.places = index, wheres, range(start, stop)

    def __len__(self) -> int:
        return -(-len(self.places) // STRETCH)

    def __getitem__(self, number: int) -> np.ndarray:
        places = self.places[number * STRETCH : (number + 1) * STRETCH]
        return np.array([self._matches(place) for place in places]).T

    def _matches(self, place: int) -> list[bool]:
        try:
            fields = read_sound(self.index, place).fields
        except BadSample:
            return [True] * len(self.wheres)
        return [all(fields.get(name) in values for name, values in where.items()) for where in self.wheres]


def matching(
    index: Index,
    wheres: Sequence[Where],
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    say: Callable[..., None] = lambda *_: None,
) -> list[np.ndarray]:
    """For each of `wheres`: positions of the samples whose breakdown fields have the values that it lists.

    Reads every sample once.  A bad sample matches: it is to be counted as bad.  Several ranks, which call it together,
    read a part each.
    """
    dataset = _Matches(index, wheres, len(index) * rank // world, len(index) * (rank + 1) // world)
    found, told = [np.zeros((len(wheres), 0), dtype=bool)], time.monotonic()
    for number, part in enumerate(loaded(dataset, range(len(dataset)), workers)):
        found.append(part)
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            say("looking for the samples that fit: %d%%", 100 * number // len(dataset))
    mine = np.concatenate(found, axis=1)
    if world > 1:
        parts = distributed.gather((np.packbits(mine, axis=1), mine.shape[1]))
        mine = np.concatenate([np.unpackbits(bits, axis=1, count=count) for bits, count in parts], axis=1)
    return [np.flatnonzero(row) for row in mine]
