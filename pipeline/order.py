"""Which sample is where: a pure function of (seed, stage, epoch), the same for every world size and worker count.

Global batch i of an epoch is positions i*G .. i*G+G-1 of a permutation that mixes shards in blocks, for locality.
A rank takes every world-th row of it.  So the state of a run is a number of steps, and resuming is arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

BLOCK = 16
"""Shards whose samples are mixed with each other."""
EMPTY = -1
"""Index of a slot that no sample fills."""


class EpochOrder:
    """The permutation of one epoch, computed block by block as it is asked for."""

    def __init__(self, shard_sizes: Sequence[int], seed: int, stage: int, epoch: int, block: int = BLOCK) -> None:
        """shard_sizes: samples of each shard, in index order."""
        self._key = (seed, stage, epoch)
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        first = np.concatenate([[0], sizes.cumsum()])[:-1]
        shards = self._rng(0).permutation(len(sizes))
        self._blocks = [shards[i : i + block] for i in range(0, len(shards), block)]
        self._first, self._sizes = first, sizes
        self._ends = np.cumsum([sizes[b].sum() for b in self._blocks])
        self._permuted = lru_cache(maxsize=2)(self._permute)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _rng(self, block: int) -> np.random.Generator:
        return np.random.default_rng([*self._key, block])

    def _permute(self, block: int) -> np.ndarray:
        samples = [np.arange(self._first[s], self._first[s] + self._sizes[s]) for s in self._blocks[block]]
        return self._rng(block + 1).permutation(np.concatenate(samples))

    def take(self, start: int, count: int) -> np.ndarray:
        """Sample indices at positions start .. start+count-1, EMPTY past the end."""
        out = np.full(count, EMPTY, dtype=np.int64)
        position, stop = start, min(start + count, len(self))
        while position < stop:
            block = int(np.searchsorted(self._ends, position, side="right"))
            begin = int(self._ends[block - 1]) if block else 0
            end = min(int(self._ends[block]), stop)
            out[position - start : end - start] = self._permuted(block)[position - begin : end - begin]
            position = end
        return out


def rank_share(batch: np.ndarray, rank: int, world: int, micro_batch: int) -> list[np.ndarray]:
    """A rank's rows of a global batch, as micro-batches; the same number of equally filled slots on every rank.

    Shares differ by at most one row; a short rank gets EMPTY slots.
    """
    share = -(-len(batch) // world)
    slots = -(-share // micro_batch) * micro_batch
    rows = np.full(slots, EMPTY, dtype=np.int64)
    mine = batch[rank::world]
    rows[: len(mine)] = mine
    micro = [rows[i : i + micro_batch] for i in range(0, slots, micro_batch)]
    return [m[: max(1, share - i * micro_batch)] for i, m in enumerate(micro)]
