"""Several shard folders as one index: positions, keys and an identity over all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.example import Example
from data_prep.reader import ShardIndex
from data_prep.storage import shown


@dataclass(frozen=True)
class Member:
    """A data set of a mixture."""

    name: str
    """In front of its keys: its folder's name, or its whole path where two folders have the same name"""
    index: ShardIndex
    weight: int
    first: int
    """Position of its first sample among those of all"""

    @property
    def salt(self) -> list[int]:
        """What its order depends on besides the seed: the samples themselves, wherever the mixture names them."""
        return [int(self.index.index_hash[at : at + 8], 16) for at in (0, 8)]


class Mixture:
    """The samples of a split of several data sets by position, one data set behind the other."""

    def __init__(self, folders: Sequence[Path | str], indexes: Sequence[ShardIndex], weights: Sequence[int]) -> None:
        places = [shown(folder) for folder in folders]
        names = [Path(place).name for place in places]
        names = [name if names.count(name) == 1 else places[i] for i, name in enumerate(names)]
        self._starts = np.cumsum([0, *map(len, indexes)])
        self.members = [
            Member(name, index, weight, int(first))
            for name, index, weight, first in zip(names, indexes, weights, self._starts, strict=False)
        ]
        self.split = indexes[0].split
        identity = json.dumps([[member.index.index_hash, member.weight] for member in self.members])
        self.index_hash = hashlib.sha256(identity.encode()).hexdigest()
        """Equal for the same data sets in the same order with the same weights."""

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _of(self, position: int) -> tuple[Member, int]:
        """(its data set, its position there)"""
        member = self.members[int(np.searchsorted(self._starts, position, side="right")) - 1]
        return member, position - member.first

    def key(self, position: int) -> str:
        """The name of a sample in its tar, behind that of its data set."""
        member, place = self._of(position)
        return f"{member.name}/{member.index.key(place)}"

    def read(self, position: int) -> Example:
        """The Example at a position.  Raises BadSample, whose key is that of the data set."""
        member, place = self._of(position)
        return member.index.read(place)


Index = ShardIndex | Mixture


def members_of(index: Index) -> list[Member]:
    """The data sets of an index; a single one as a mixture of itself alone."""
    return index.members if isinstance(index, Mixture) else [Member("", index, 1, 0)]


def record_values(index: Index, positions: np.ndarray, *names: str) -> np.ndarray:
    """Fields of the index records at `positions`, as int64 (fields, positions)."""
    values = np.empty((len(names), len(positions)), dtype=np.int64)
    for member in members_of(index):
        mine = (positions >= member.first) & (positions < member.first + len(member.index))
        found = member.index.records[positions[mine] - member.first]
        for row, name in enumerate(names):
            values[row, mine] = found[name]
    return values
