"""Which sample is where: a pure function of (seed, stage, epoch), the same for every world size and worker count.

Global batch i of an epoch is positions i*G .. i*G+G-1 of a permutation that mixes shards in blocks, for locality.
A rank takes every world-th row of it.  So the state of a run is a number of steps, and resuming is arithmetic.

A mixture has no epochs of its own: its stream of positions never ends, and a fixed cycle gives each position to one of
its data sets, which goes through its own epochs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

BLOCK = 16
"""Shards whose samples are mixed with each other."""
EMPTY = -1
"""Index of a slot that no sample fills."""


@dataclass(frozen=True)
class DataState:
    """How far a stage has come in its data: enough to go on at the next sample on any number of ranks."""

    stage: int
    epoch: int
    """The one that the next sample belongs to"""
    samples: int
    """Slots of global batches that are done, over all epochs of the stage"""
    seed: int
    index_hash: str
    """What the samples are: of a mixture, all of its data sets and their weights"""


class EpochOrder:
    """The permutation of one epoch, computed block by block as it is asked for."""

    def __init__(
        self,
        shard_sizes: Sequence[int],
        seed: int,
        stage: int,
        epoch: int,
        block: int = BLOCK,
        salt: Sequence[int] = (),
    ) -> None:
        """shard_sizes: samples of each shard, in index order; salt: what else the order depends on."""
        self._key, self._salt = (seed, stage, epoch), salt
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
        return np.random.default_rng([*self._key, block, *self._salt])

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


class Stream:
    """The samples of one data set that fit a stage, epoch after epoch without end; each is once in each epoch."""

    def __init__(
        self,
        shard_sizes: Sequence[int],
        seed: int,
        stage: int,
        chosen: np.ndarray | None = None,
        first: int = 0,
        salt: Sequence[int] = (),
    ) -> None:
        """chosen: positions in the data set of those that fit, ascending; None for all.  first: added to positions."""
        if chosen is not None:
            ends = np.searchsorted(chosen, np.cumsum([0, *shard_sizes]))
            shard_sizes = np.diff(ends).tolist()
        self._chosen, self._first, self._length = chosen, first, sum(shard_sizes)
        self._epoch = lru_cache(maxsize=2)(lambda epoch: EpochOrder(shard_sizes, seed, stage, epoch, salt=salt))

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self._length

    def of_epoch(self, epoch: int, start: int, count: int) -> np.ndarray:
        """Samples at positions start .. start+count-1 of an epoch, EMPTY past its end."""
        places = self._epoch(epoch).take(start, count)
        samples = places if self._chosen is None else self._chosen[np.maximum(places, 0)]
        return np.where(places == EMPTY, EMPTY, samples + self._first)

    def take(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples) at positions start .. start+count-1 of the endless stream."""
        epochs = np.arange(start, start + count) // self._length
        samples = [
            self.of_epoch(epoch, max(0, start - epoch * self._length), int((epochs == epoch).sum()))
            for epoch in range(start // self._length, -(-(start + count) // self._length))
        ]
        return epochs, np.concatenate(samples)


class Turns:
    """Whose turn each position of a mixture is: a cycle in which everyone has `weight` turns, evenly spread."""

    def __init__(self, weights: Sequence[int]) -> None:
        """weights: whole numbers above 0; the cycle is as long as their sum over their greatest common divisor."""
        self._weights = np.asarray(weights) // np.gcd.reduce(weights)
        who = np.repeat(np.arange(len(weights)), self._weights)
        turn = np.concatenate([np.arange(weight) for weight in self._weights])
        order = np.lexsort((who, (2 * turn + 1) / self._weights[who]))  # the k-th of w turns: at (k + 1/2) / w
        self._who, self._turn = who[order], turn[order]

    def take(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Of positions start .. start+count-1: (whose it is, how many turns they had before)."""
        cycle, place = np.divmod(np.arange(start, start + count), len(self._who))
        who = self._who[place]
        return who, cycle * self._weights[who] + self._turn[place]


class BatchOrder:
    """The global batches of a stage by number: of one data set, epoch by epoch; of a mixture, without end."""

    def __init__(
        self,
        streams: Sequence[Stream],
        weights: Sequence[int],
        batch: int,
        last_batch: str,
        key: Sequence[int],
        window: int = 0,
        lengths: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        """batch: samples of a global batch; last_batch: of one data set's epoch, "drop" or "pad".

        window: batches whose samples are sorted by `lengths` (of samples) and cut anew; key: what their order depends
        on; 0 keeps the order of the streams.
        """
        self.streams, self.batch, self._key, self._lengths = streams, batch, tuple(key), lengths
        self._turns = Turns(weights) if len(streams) > 1 else None
        self._many = max(1, window)
        self.epoch_samples = sum(map(len, streams))
        """Samples of an epoch; of a mixture's, as many as all its data sets have together"""
        whole, left = divmod(self.epoch_samples, batch)
        self.steps_per_epoch = self.epoch_samples / batch
        """Global batches of an epoch, of a mixture not a whole number"""
        self.dropped = self.padded = 0
        """Samples that an epoch leaves out, slots of an epoch that stay empty"""
        self._lap = sys.maxsize
        if self._turns is None:
            self._lap = self.steps_per_epoch = whole if last_batch == "drop" or not left else whole + 1
            self.dropped = left if last_batch == "drop" else 0
            self.padded = self._lap * batch - self.epoch_samples + self.dropped
        self._window = lru_cache(maxsize=2)(self._cut_window)

    def epoch_of(self, step: int) -> int:
        """The epoch in which a step begins."""
        return step // self._lap if self._turns is None else step * self.batch // self.epoch_samples

    def take(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples) of the rows of a step's global batch, EMPTY where no sample is."""
        lap, number = divmod(step, self._lap)
        epochs, samples = self._window(lap, number - number % self._many)
        return epochs[number % self._many], samples[number % self._many]

    def _cut_window(self, lap: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, samples), each (batches, batch), of the window of batches that begins at `first` of a lap."""
        shape = min(self._many, self._lap - first), self.batch
        start, count = first * self.batch, shape[0] * shape[1]
        if self._turns is None:
            epochs, samples = np.full(count, lap), self.streams[0].of_epoch(lap, start, count)
        else:
            epochs, samples = self._mixed(start, count)
        if self._lengths is None or self._many == 1:
            return epochs.reshape(shape), samples.reshape(shape)
        lengths = np.full(count, np.iinfo(np.int64).max)  # empty slots come behind the longest
        real = samples != EMPTY
        lengths[real] = self._lengths(samples[real])
        order = np.argsort(lengths, kind="stable").reshape(shape)
        order = np.random.default_rng([*self._key, lap, first]).permutation(order)
        return epochs[order], samples[order]

    def _mixed(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        assert self._turns is not None
        who, turns = self._turns.take(start, count)
        epochs, samples = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        for number, stream in enumerate(self.streams):
            mine = who == number
            if mine.any():  # a data set's turns among consecutive positions are consecutive
                epochs[mine], samples[mine] = stream.take(int(turns[mine][0]), int(mine.sum()))
        return epochs, samples


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
