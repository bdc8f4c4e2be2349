"""The order of samples, and the ranks' shares of it: every sample exactly once, whatever the shapes."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.index import RECORD
from pipeline.curriculum import CurriculumConfig, StageConfig
from pipeline.data.loader import Share, StageSteps
from pipeline.data.mixture import Mixture
from pipeline.data.order import BLOCK, EMPTY, BatchOrder, DataState, EpochOrder, Stream, Turns, rank_share

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


# ---- data sets in turns -----------------------------------------------------------------------
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 500), st.integers(1, 200))
def test_turns_are_exact_and_even(weights: list[int], start: int, count: int) -> None:
    """After any number of positions, everybody has had their share of turns, give or take two; of a cycle, exactly."""
    turns, cycle = Turns(weights), sum(weights)
    who, before = (part[start:] for part in turns.take(0, start + count))
    assert all((a == b).all() for a, b in zip(turns.take(start, count), (who, before), strict=True))
    whole, _ = turns.take(0, cycle * 3)
    for number, weight in enumerate(weights):
        had = np.cumsum(whole == number)
        assert had[cycle - 1 :: cycle].tolist() == [weight, 2 * weight, 3 * weight]
        assert np.abs(had - np.arange(1, len(had) + 1) * weight / cycle).max() < 2
        mine = before[who == number]
        assert mine.tolist() == list(range(mine[0], mine[0] + len(mine))) if len(mine) else True


def test_turns_are_written_down() -> None:
    """A change would make checkpoints resume with other samples."""
    assert Turns([3, 1, 2]).take(0, 8)[0].tolist() == [0, 2, 0, 1, 2, 0, 0, 2]
    assert Turns([300, 100]).take(0, 5)[0].tolist() == Turns([3, 1]).take(0, 5)[0].tolist() == [0, 0, 1, 0, 0]


@given(SHARDS, st.integers(0, 200), st.integers(1, 50))
@settings(max_examples=50)
def test_a_stream_is_its_epochs(sizes: list[int], start: int, count: int) -> None:
    assume(sum(sizes))
    epochs, samples = Stream(sizes, 1, 2, first=50).take(start, count)
    whole = [50 + n for epoch in range((start + count) // sum(sizes) + 1) for n in order(sizes, 1, 2, epoch)]
    assert samples.tolist() == whole[start : start + count]
    assert epochs.tolist() == [n // sum(sizes) for n in range(start, start + count)]


# ---- everything at once -----------------------------------------------------------------------
class FakeIndex:
    """An index without a folder: shards of given sizes, records with given lengths."""

    split = "train"

    def __init__(self, sizes: list[int], number: int = 0) -> None:
        self.shard_sizes, self.index_hash = sizes, f"{number + 1:064x}"
        self.records = np.zeros(sum(sizes), dtype=RECORD)
        self.records["json_size"] = np.random.default_rng(number).integers(4, 4000, sum(sizes))
        self.records["width"] = self.records["height"] = 28 * (1 + number)

    def __len__(self) -> int:
        return sum(self.shard_sizes)


BUILDER: Any = SimpleNamespace(processor=SimpleNamespace(image_columns=lambda width, height: width * height // 784))


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    """Data sets, their weights and samples that fit; batch, windows, drop or pad; two worlds, and where they change."""
    member = st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any)
    sizes = draw(st.lists(member, min_size=1, max_size=3))
    total = sum(map(sum, sizes))
    chosen = None
    if draw(st.booleans()):
        keep = np.random.default_rng(draw(st.integers(0, 99))).random(total) < 0.5
        firsts = np.cumsum([0, *map(sum, sizes)])[:-1].tolist()  # something of every data set
        chosen = np.array(sorted({*np.flatnonzero(keep).tolist(), *firsts}), dtype=np.int64)
    return {
        "sizes": sizes,
        "weights": draw(st.lists(st.integers(1, 5), min_size=len(sizes), max_size=len(sizes))),
        "chosen": chosen,
        "batch": draw(st.integers(1, 12)),
        "window": draw(st.integers(0, 4)),
        "last_batch": draw(st.sampled_from(["drop", "pad"])),
        "seed": draw(st.integers(0, 3)),
        "stage": draw(st.integers(0, 2)),
        "worlds": draw(st.tuples(st.integers(1, 9), st.integers(1, 9))),
        "micro": draw(st.tuples(st.integers(1, 5), st.integers(1, 5))),
        "resumed": draw(st.integers(0, 30)),
    }


def ranks_of(case: dict[str, Any], start: int = 0) -> list[StageSteps]:
    """Every rank's data of a start, the first or the second, which has another world and micro-batch."""
    indexes: list[Any] = [FakeIndex(sizes, number) for number, sizes in enumerate(case["sizes"])]
    folders = [f"data/{number}" for number in range(len(indexes))]
    index = Mixture(folders, indexes, case["weights"]) if len(indexes) > 1 else indexes[0]
    world, micro = case["worlds"][start], case["micro"][start]
    stages = [StageConfig(latents=0, skip=0, epochs=2, where={"kind": ["x"]})] * 3
    chosen = np.arange(len(index)) if case["chosen"] is None else case["chosen"]
    first = StageSteps(
        index, BUILDER, CurriculumConfig(stages=stages), case["stage"], Share(0, world, case["batch"], micro),
        case["seed"], case["last_batch"], case["window"], chosen,
    )  # fmt: skip
    ranks = [copy.copy(first) for _ in range(world)]
    for rank, steps in enumerate(ranks):
        vars(steps).update(order=first.order, share=replace(first.share, rank=rank))
    return ranks


def seen(ranks: list[StageSteps], step: int) -> Counter[tuple[int, int]]:
    """(sample, epoch) of all rows of all ranks; their micro-batches have equal shapes."""
    slots = [rank.slots(step) for rank in ranks]
    shapes = [[len(micro) for micro in rank] for rank in slots]
    assert all(shape == shapes[0] for shape in shapes) and len(shapes[0]) == ranks[0].share.accumulation
    return Counter(slot for rank in slots for micro in rank for slot in micro if slot[0] != EMPTY)


def check_exactly_once(case: dict[str, Any]) -> None:
    first, second = ranks_of(case, 0), ranks_of(case, 1)
    fits = range(len(first[0].index)) if case["chosen"] is None else case["chosen"].tolist()
    order, mixed, steps = first[0].order, len(case["sizes"]) > 1, len(first[0])
    if mixed and case["window"]:
        steps = -(-steps // case["window"]) * case["window"]  # whole windows
    change = min(case["resumed"], steps)
    batches = [seen(first if step < change else second, step) for step in range(steps)]
    rows = Counter(chain(*(batch.elements() for batch in batches)))
    assert not rows or max(rows.values()) == 1, "a sample twice in an epoch"
    assert {sample for sample, _ in rows} <= set(fits)
    for step, batch in enumerate(batches):  # whoever computes it, and what came before, changes nothing
        epoch, samples = second[0].samples(step)
        assert sorted(samples[samples != EMPTY].tolist()) == sorted(sample for sample, _ in batch)
        assert second[0].state(step) == DataState(
            case["stage"], epoch, step * case["batch"], case["seed"], first[0].index.index_hash
        )
    if mixed:
        check_proportions(case, rows, len(batches) * case["batch"], list(fits))
        return
    whole, left = divmod(len(fits), case["batch"])
    per_epoch = whole * case["batch"] if case["last_batch"] == "drop" else len(fits)
    assert (order.dropped, order.padded) == (
        (left, 0) if case["last_batch"] == "drop" else (0, -len(fits) % case["batch"])
    )
    for epoch in range(2):
        assert sum(at == epoch for _, at in rows) == per_epoch


def check_proportions(case: dict[str, Any], rows: Counter[tuple[int, int]], count: int, fits: list[int]) -> None:
    """Each data set has its share of the rows, and has finished an epoch before it begins the next."""
    assert rows.total() == count
    ends = np.cumsum([0, *map(sum, case["sizes"])]).tolist()
    for number, weight in enumerate(case["weights"]):
        mine = [slot for slot in rows if ends[number] <= slot[0] < ends[number + 1]]
        assert abs(len(mine) - count * weight / sum(case["weights"])) < 2
        epoch = sum(ends[number] <= sample < ends[number + 1] for sample in fits)
        found = Counter(at for _, at in mine)
        assert [found[at] for at in range(len(mine) // epoch)] == [epoch] * (len(mine) // epoch)
        assert sum(found.values()) == len(mine) and max(found, default=0) <= len(mine) // epoch


def test_every_sample_exactly_once() -> None:
    """For all shapes at once, from a first start to a resumed one on another number of ranks."""
    ran: Counter[str] = Counter()

    @settings(max_examples=1150, database=None)
    @given(cases())
    def check(case: dict[str, Any]) -> None:
        if len(case["sizes"]) == 1 and case["last_batch"] == "drop":
            fits = sum(case["sizes"][0]) if case["chosen"] is None else len(case["chosen"])
            if fits < case["batch"]:
                with pytest.raises(UserError, match="less than one global batch"):
                    ranks_of(case)
                ran["refused"] += 1
                return
        check_exactly_once(case)
        ran["mixtures" if len(case["sizes"]) > 1 else case["last_batch"]] += 1

    check()
    print(f"\nexactly once: {ran.total()} cases ({', '.join(f'{n} {name}' for name, n in sorted(ran.items()))})")
    assert ran.total() >= 1000 and min(ran["mixtures"], ran["drop"], ran["pad"]) >= 50


# ---- batches of equal lengths -----------------------------------------------------------------
def test_windows_are_cut_by_length() -> None:
    """A window has the samples that it would have, in batches whose lengths do not overlap, in random order."""
    length = np.random.default_rng(0).permutation(60)
    plain = BatchOrder([Stream([20, 20, 20], 0, 0)], [1], 5, "drop", [0, 0])
    grouped = BatchOrder([Stream([20, 20, 20], 0, 0)], [1], 5, "drop", [0, 0], 4, lambda samples: length[samples])
    for window in range(0, 12, 4):
        before = np.concatenate([plain.take(step)[1] for step in range(window, window + 4)])
        batches = [grouped.take(step)[1] for step in range(window, window + 4)]
        assert sorted(np.concatenate(batches)) == sorted(before)
        ranges = sorted((length[batch].min(), length[batch].max()) for batch in batches)
        assert all(a[1] < b[0] for a, b in zip(ranges, ranges[1:], strict=False))
    order = [int(length[grouped.take(step)[1]].min()) for step in range(120)]
    windows = [order[at : at + 4] for at in range(0, 120, 4)]
    assert sum(window == sorted(window) for window in windows) < 10, "the batches are not shuffled"


def test_a_padded_window_keeps_its_empty_slots_together() -> None:
    grouped = BatchOrder([Stream([13], 0, 0)], [1], 5, "pad", [0, 0], 8, lambda samples: samples)
    empty = sorted(int((grouped.take(step)[1] == EMPTY).sum()) for step in range(3))
    assert empty == [0, 0, 2] and grouped.padded == 2


# ---- scale ------------------------------------------------------------------------------------
class Untouched(FakeIndex):
    """Ten million samples whose records nobody may look at."""

    def __init__(self) -> None:
        self.shard_sizes, self.index_hash = [1000] * 10_000, "0" * 64

    @property
    def records(self) -> Any:
        raise AssertionError("the index is read")

    @records.setter
    def records(self, value: Any) -> None: ...


def test_a_stage_opens_without_looking_at_its_samples() -> None:
    index: Any = Untouched()
    stages = [StageConfig(latents=0, skip=0, epochs=1)]
    steps = StageSteps(index, BUILDER, CurriculumConfig(stages=stages), 0, Share(0, 1, 64, 64), 0, "pad")
    batches = [steps.samples(int(len(steps) * at))[1] for at in (0, 0.5, 0.99)]
    assert len({int(sample) for batch in batches for sample in batch}) == 3 * 64
    held = [value for value in vars(steps.order.streams[0]).values() if isinstance(value, np.ndarray)]
    assert not held and steps.chosen is None
