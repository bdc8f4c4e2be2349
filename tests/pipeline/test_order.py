"""The order of samples, and the ranks' shares of it: every sample exactly once, whatever the shapes."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.loader import Share
from pipeline.order import BLOCK, EMPTY, EpochOrder, rank_share

SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=40)
SIZES = [7, 3, 0, 12, 5] * 8


def order(sizes: list[int] = SIZES, seed: int = 0, stage: int = 0, epoch: int = 0, **options: int) -> list[int]:
    """A whole epoch."""
    return EpochOrder(sizes, seed, stage, epoch, **options).take(0, sum(sizes)).tolist()


# ---- one epoch --------------------------------------------------------------------------------
@given(SHARDS, st.integers(0, 5), st.integers(0, 3), st.integers(0, 99), st.integers(1, 50))
def test_an_epoch_is_a_permutation(sizes: list[int], seed: int, stage: int, epoch: int, block: int) -> None:
    whole = EpochOrder(sizes, seed, stage, epoch, block)
    assert len(whole) == sum(sizes)
    assert sorted(order(sizes, seed, stage, epoch, block=block)) == list(range(sum(sizes)))


@given(SHARDS, st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 50))
def test_pieces_equal_the_whole(sizes: list[int], pieces: list[int], block: int) -> None:
    """Also past the end, and with a fresh object for each piece: an epoch resumes at any position."""
    whole = EpochOrder(sizes, 1, 2, 3, block).take(0, sum(pieces)).tolist()
    starts = np.cumsum([0, *pieces[:-1]]).tolist()
    resumed = [
        EpochOrder(sizes, 1, 2, 3, block).take(start, count) for start, count in zip(starts, pieces, strict=True)
    ]
    assert list(chain(*resumed)) == whole
    assert whole[sum(sizes) :] == [EMPTY] * max(0, sum(pieces) - sum(sizes))


def test_pieces_in_any_order() -> None:
    whole, one = order(), EpochOrder(SIZES, 0, 0, 0)
    for start in [200, 0, 170, 30, 215, 1]:
        assert one.take(start, 9).tolist() == [*whole, *[EMPTY] * 9][start : start + 9]


def test_past_the_end_and_nothing() -> None:
    one = EpochOrder([2, 1], 0, 0, 0)
    assert one.take(3, 2).tolist() == one.take(50, 2).tolist() == [EMPTY, EMPTY]
    assert one.take(1, 0).tolist() == []
    assert len(EpochOrder([], 0, 0, 0)) == len(EpochOrder([0, 0], 0, 0, 0)) == 0
    assert EpochOrder([], 0, 0, 0).take(0, 2).tolist() == EpochOrder([0], 0, 0, 0).take(0, 2).tolist() == [EMPTY, EMPTY]


def test_seeds_stages_and_epochs_differ() -> None:
    orders = {tuple(order(seed=a, stage=b, epoch=c)) for a in range(3) for b in range(3) for c in range(3)}
    assert len(orders) == 27
    assert order(seed=2, stage=1, epoch=4) == order(seed=2, stage=1, epoch=4)


def test_order_is_written_down() -> None:
    """The recorded order of a small epoch: a change would make checkpoints resume with other samples."""
    assert order([3, 2, 4], seed=5, stage=1, epoch=2, block=2) == RECORDED


RECORDED = [4, 7, 5, 6, 8, 3, 1, 0, 2]


def test_samples_of_a_block_of_shards_stay_together() -> None:
    """Reading stays local: only BLOCK shards are mixed at a time."""
    sizes = [5] * (BLOCK * 2 + 3)
    shards = [sample // 5 for sample in order(sizes)]
    blocks = [set(shards[i : i + 5 * BLOCK]) for i in range(0, len(shards), 5 * BLOCK)]
    assert [len(block) for block in blocks] == [BLOCK, BLOCK, 3]
    assert len(set(shards[: 5 * BLOCK // 4])) > 5, "the shards of a block are not mixed"


def test_every_position_is_equally_likely() -> None:
    """Over many epochs, sample 0 comes everywhere."""
    places = Counter(order([4, 4], epoch=epoch, block=1).index(0) for epoch in range(800))
    assert sorted(places) == list(range(8))
    assert all(50 < count < 150 for count in places.values())  # binomial: 100, standard deviation 9.4


# ---- the ranks' shares ------------------------------------------------------------------------
SHAPES = {"rows": st.integers(1, 40), "world": st.integers(1, 9), "micro_batch": st.integers(1, 12)}


def real(micro_batches: list[np.ndarray]) -> list[int]:
    return [int(row) for micro in micro_batches for row in micro if row != EMPTY]


@given(**SHAPES)
def test_the_union_of_the_shares_is_the_batch(rows: int, world: int, micro_batch: int) -> None:
    batch = np.arange(100, 100 + rows)
    shares = [real(rank_share(batch, rank, world, micro_batch)) for rank in range(world)]
    assert Counter(chain(*shares)) == Counter(batch.tolist())
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@given(**SHAPES)
def test_all_ranks_have_micro_batches_of_equal_shapes(rows: int, world: int, micro_batch: int) -> None:
    shares = [rank_share(np.arange(rows), rank, world, micro_batch) for rank in range(world)]
    shapes = [[micro.shape for micro in share] for share in shares]
    assert all(shape == shapes[0] for shape in shapes)
    assert len(shapes[0]) == Share(0, world, rows, micro_batch).accumulation
    slots = [shape[0] for shape in shapes[0]]
    assert sum(slots) == -(-rows // world), "no rank has a slot that none of them fills"
    assert set(slots[:-1]) <= {micro_batch} and 1 <= slots[-1] <= micro_batch


@given(SHARDS, st.integers(1, 24), st.integers(1, 9), st.integers(1, 7), st.booleans())
def test_an_epoch_reaches_every_sample_once(
    sizes: list[int], global_batch: int, world: int, micro_batch: int, drop: bool
) -> None:
    """All steps, all ranks, all micro-batches; with `drop` the last incomplete batch is what is missing."""
    whole, samples = EpochOrder(sizes, 3, 1, 0), sum(sizes)
    steps = samples // global_batch if drop else -(-samples // global_batch)
    seen: Counter[int] = Counter()
    for step in range(steps):
        batch = whole.take(step * global_batch, global_batch)
        for rank in range(world):
            seen.update(real(rank_share(batch, rank, world, micro_batch)))
    assert set(seen.values()) <= {1}
    assert sorted(seen) == sorted(whole.take(0, min(samples, steps * global_batch)).tolist())


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_a_steps_samples_do_not_depend_on_the_world(world: int) -> None:
    whole = EpochOrder(SIZES, 0, 0, 0)
    for step in range(3):
        batch = whole.take(step * 16, 16)
        assert sorted(chain(*(real(rank_share(batch, rank, world, 2)) for rank in range(world)))) == sorted(batch)
