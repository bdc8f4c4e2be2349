"""A rank's batches of every step: the same for any workers and resume, the same samples for any world."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from data_prep.errors import OwnFault, UserError
from data_prep.reader import ShardIndex, open_split
from data_prep.shard import build
from data_prep.tokenizer import texts_of_folder, train_tokenizer
from pipeline.backbones.qwen2_vl import Qwen2VLProcessor
from pipeline.curriculum import CurriculumConfig, StageConfig, view
from pipeline.data.batch import Batch, collate, masked_row
from pipeline.data.loader import Share, StageSteps, steps_from, training_row
from pipeline.data.matching import _Matches, matching
from pipeline.data.order import EpochOrder
from pipeline.data.workers import _outlast_signals, loaded, lost_workers_told
from pipeline.prompt import PromptConfig, RowBuilder
from tests.pipeline.examples import make_example, picture
from tests.server import dropped, serving

SAMPLES, GLOBAL_BATCH = 23, 8
STAGES = [StageConfig(latents=n, skip=n, epochs=2) for n in range(3)]
CURRICULUM = CurriculumConfig(stages=STAGES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 4 samples, each a picture of 3 x 3 columns."""
    out = tmp_path_factory.mktemp("shards")
    options = {"grid": 3, "colours": 6, "train": SAMPLES, "val": 0, "test": 0}
    build("trails", out, options=options, samples_per_shard=4)
    return out


@pytest.fixture(scope="module")
def builder(folder: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RowBuilder:
    words = tmp_path_factory.mktemp("words")
    train_tokenizer(texts_of_folder(folder), words, 500)
    shutil.copy(model_folder / "preprocessor_config.json", words)
    return RowBuilder(Qwen2VLProcessor(words), PromptConfig(), 2)


@pytest.fixture(scope="module")
def index(folder: Path) -> ShardIndex:
    return open_split(folder, "train")


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> ShardIndex:
    """The same shards with one byte of sample 9's text changed."""
    shutil.copytree(folder, tmp_path / "broken")
    index = open_split(tmp_path / "broken", "train")
    record = index.records[9]
    with open(tmp_path / "broken" / index.shards[record["shard"]]["name"], "r+b") as tar:
        tar.seek(int(record["json_offset"]) + 20)
        old = tar.read(1)
        tar.seek(-1, 1)
        tar.write(bytes([old[0] ^ 1]))
    return index


def steps(
    index: ShardIndex, builder: RowBuilder, *, rank: int = 0, world: int = 1, micro_batch: int = 3,
    stage: int = 1, seed: int = 0, last_batch: str = "pad", **curriculum: Any,
) -> StageSteps:  # fmt: skip
    share = Share(rank, world, GLOBAL_BATCH, micro_batch)
    config = CurriculumConfig(**{"stages": STAGES, **curriculum})
    return StageSteps(index, builder, config, stage, share, seed, last_batch)


def all_steps(dataset: StageSteps) -> list[list[Batch]]:
    return [dataset[step] for step in range(len(dataset))]


def same(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch)]
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def assert_same(actual: list[list[Batch]], expected: list[list[Batch]]) -> None:
    assert [len(step) for step in actual] == [len(step) for step in expected]
    assert all(same(a, b) for a, b in zip(chain(*actual), chain(*expected), strict=True))


def rows(step: list[Batch]) -> list[int]:
    """Samples with labels in a step of a rank."""
    return [int(i) for batch in step for i, mask in zip(batch.row_ids, batch.target_mask, strict=True) if mask.any()]


# ---- workers and resume -----------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_nothing(index: ShardIndex, builder: RowBuilder, workers: int) -> None:
    dataset = steps(index, builder, mix=0.5)
    assert_same(list(steps_from(dataset, 0, workers)), all_steps(dataset))


@pytest.mark.parametrize("cache_gb", [None, 0])
def test_workers_read_from_a_server(
    index: ShardIndex, builder: RowBuilder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    cache_gb: float | None,
) -> None:  # fmt: skip
    """Two of them, after their parent has read, from one that drops every fifth connection; then those of a copy."""
    monkeypatch.setenv("IVTLR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("data_prep.storage.remote.BLOCK", 3000)
    expected = all_steps(steps(index, builder))
    with serving(folder) as server:
        server.fault = lambda h: len(server.asked) % 5 == 0 and dropped(h)
        dataset = steps(open_split(server.url, "train", cache_gb), builder)
        assert_same([dataset[0]], expected[:1])
        for _ in range(2):
            assert_same(list(steps_from(dataset, 0, 2)), expected)
            assert_same([dataset[5]], expected[5:])


@pytest.mark.parametrize("start", range(7))
def test_resuming_gives_the_tail(index: ShardIndex, builder: RowBuilder, start: int) -> None:
    """Also in the second epoch, and at the end; the data set is a fresh one, as after a restart."""
    whole = all_steps(steps(index, builder))
    assert len(whole) == 6
    assert_same(list(steps_from(steps(index, builder), start, 0)), whole[start:])


def test_steps_can_be_asked_for_in_any_order(index: ShardIndex, builder: RowBuilder) -> None:
    dataset = steps(index, builder)
    backwards = [dataset[step] for step in reversed(range(len(dataset)))]
    assert_same(backwards[::-1], all_steps(steps(index, builder)))


# ---- ranks ------------------------------------------------------------------------------------
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("last_batch", ["pad", "drop"])
def test_a_steps_samples_do_not_depend_on_the_world(
    index: ShardIndex, builder: RowBuilder, world: int, last_batch: str
) -> None:
    ranks = [steps(index, builder, rank=rank, world=world, last_batch=last_batch) for rank in range(world)]
    alone = steps(index, builder, last_batch=last_batch)
    for step in range(len(alone)):
        shares = [dataset[step] for dataset in ranks]
        assert sorted(chain(*map(rows, shares))) == sorted(rows(alone[step]))
        shapes = [[batch.prompt_ids.shape[0] for batch in share] for share in shares]
        assert all(shape == shapes[0] for shape in shapes) and len(shapes[0]) == ranks[0].share.accumulation
        assert {batch.passes for share in shares for batch in share} == {1}


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 8, 20])
def test_accumulation(index: ShardIndex, builder: RowBuilder, micro_batch: int) -> None:
    dataset = steps(index, builder, micro_batch=micro_batch)
    sizes = [len(batch.keys) for batch in dataset[0]]
    assert sum(sizes) == GLOBAL_BATCH and len(sizes) == dataset.share.accumulation == -(-GLOBAL_BATCH // micro_batch)


def test_rows_are_those_of_the_order(index: ShardIndex, builder: RowBuilder) -> None:
    """Step 4 is the second batch of the second epoch of stage 1, each row as `training_row` builds it."""
    samples = EpochOrder(index.shard_sizes, 3, 1, 1).take(GLOBAL_BATCH, GLOBAL_BATCH)
    (batch,) = steps(index, builder, seed=3, micro_batch=8)[4]
    built = [training_row(index, builder, int(i), STAGES[1], CURRICULUM) for i in samples]
    assert same(batch, collate(built, builder.processor.row_format, 1))
    assert batch.row_ids.tolist() == samples.tolist() and batch.keys == [index.key(int(i)) for i in samples]


def test_seeds_epochs_and_stages_differ(index: ShardIndex, builder: RowBuilder) -> None:
    firsts = [
        tuple(chain(*(rows(steps(index, builder, seed=seed, stage=stage)[3 * epoch + s]) for s in range(3))))
        for seed in (0, 1) for stage in (0, 1) for epoch in (0, 1)
    ]  # fmt: skip
    assert len(set(firsts)) == 8 and all(sorted(first) == list(range(SAMPLES)) for first in firsts)


# ---- the last batch, and lengths --------------------------------------------------------------
def test_last_batch_is_padded(index: ShardIndex, builder: RowBuilder) -> None:
    dataset = steps(index, builder, last_batch="pad")
    assert dataset.order.steps_per_epoch == 3 and len(dataset) == 6
    epoch = [dataset[step] for step in range(3)]
    assert sorted(chain(*map(rows, epoch))) == list(range(SAMPLES))
    assert [sum(len(batch.keys) for batch in step) for step in epoch] == [8, 8, 8]
    assert len(rows(epoch[2])) == 7 and epoch[2][-1].keys[-1] == "" and not any(b.bad for b in epoch[2])


def test_last_batch_is_dropped(index: ShardIndex, builder: RowBuilder) -> None:
    dataset = steps(index, builder, last_batch="drop")
    assert dataset.order.steps_per_epoch == 2 and len(dataset) == 4
    counts = Counter(chain(rows(dataset[0]), rows(dataset[1])))
    assert len(counts) == 16 and set(counts.values()) == {1}
    other = Counter(chain(rows(dataset[2]), rows(dataset[3])))
    assert other != counts, "the next epoch leaves out the same samples"


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        ({"epochs": 1}, 3),
        ({"epochs": 0.5}, 2),
        ({"epochs": 0.01}, 1),
        ({"epochs": 2.34}, 7),
        ({"steps": 5}, 5),
    ],
    ids=str,
)
def test_lengths(index: ShardIndex, builder: RowBuilder, length: dict, expected: int) -> None:
    stages = [StageConfig(latents=0, skip=0, **length)]
    assert len(steps(index, builder, stage=0, stages=stages)) == expected


# ---- where -------------------------------------------------------------------------------------
def test_where_keeps_the_rows_that_match(index: ShardIndex, builder: RowBuilder) -> None:
    """An epoch is all of them once, and nothing else, for any world."""
    kinds = [index.read(i).fields["kind"] for i in range(SAMPLES)]
    wanted = [i for i, kind in enumerate(kinds) if kind in ("look", "follow")]
    assert 0 < len(wanted) < SAMPLES and len(set(kinds)) > 2
    stages = [StageConfig(latents=1, skip=1, epochs=2, where={"kind": ["look", "follow"]})]
    for world in (1, 3):
        ranks = [steps(index, builder, stage=0, stages=stages, rank=r, world=world) for r in range(world)]
        epoch = range(ranks[0].order.steps_per_epoch)
        assert len(epoch) == -(-len(wanted) // GLOBAL_BATCH) and len(ranks[0]) == 2 * len(epoch)
        assert sorted(chain(*(rows(rank[step]) for rank in ranks for step in epoch))) == wanted


def test_an_epoch_is_described(index: ShardIndex, builder: RowBuilder) -> None:
    """How many samples it takes, of how many, and why not all."""
    assert steps(index, builder).describe_epoch() == f"{SAMPLES} samples an epoch, of {SAMPLES} there are"
    assert steps(index, builder, last_batch="drop").describe_epoch() == f"16 samples an epoch, of {SAMPLES} there are"
    look = StageConfig(latents=0, skip=0, epochs=1, where={"kind": ["look", "follow"]})
    count = sum(index.read(i).fields["kind"] in ("look", "follow") for i in range(SAMPLES))
    assert steps(index, builder, stage=0, stages=[look]).describe_epoch() == (
        f"{count} samples an epoch, of the {count} whose kind is look or follow (curriculum.stages.where), of {SAMPLES}"
        " there are"
    )


def test_where_asks_for_every_field(index: ShardIndex, builder: RowBuilder) -> None:
    where = {"kind": ["look"], "absent": ["x"]}
    none, all_of_them = matching(index, [where, {}])
    assert len(none) == 0 and all_of_them.tolist() == list(range(SAMPLES))


@pytest.mark.parametrize("last_batch", ["pad", "drop"])
def test_too_few_rows_for_a_step_are_refused(index: ShardIndex, builder: RowBuilder, last_batch: str) -> None:
    """None at all, or with `drop` less than a global batch."""
    kinds = Counter(index.read(i).fields["kind"] for i in range(SAMPLES))
    kind, found = min(kinds.items(), key=lambda item: item[1]) if last_batch == "drop" else ("nope", 0)
    assert found < GLOBAL_BATCH
    stages = [StageConfig(latents=1, skip=1, epochs=1, where={"kind": [kind]})]
    with pytest.raises(UserError, match=f"stage 0: {found} training samples fit it"):
        steps(index, builder, stage=0, stages=stages, last_batch=last_batch)


def test_where_lets_bad_samples_through_to_be_counted(broken: ShardIndex) -> None:
    (found,) = matching(broken, [{"kind": ["no such kind"]}])
    assert found.tolist() == [9]


# ---- curriculum -------------------------------------------------------------------------------
def test_rows_are_as_the_stage_shows_them(index: ShardIndex, builder: RowBuilder) -> None:
    for stage, config in enumerate(STAGES):
        batch = steps(index, builder, stage=stage, micro_batch=8)[0][0]
        assert batch.latents.tolist() == [stage] * 8 and batch.passes == stage
        example = index.read(int(batch.row_ids[0]))
        shown = "".join(step + "\n" for step in view(example.rationale, config, 3).steps)
        text = builder.processor.tokenizer.decode(batch.target_ids[0][batch.target_mask[0]])
        assert text == f"{shown}Therefore, the answer is {'ABCD'[example.answer]}<|im_end|>"


def mixed(index: ShardIndex, builder: RowBuilder, **options: Any) -> Iterator[Batch]:
    yield from chain(*all_steps(steps(index, builder, stage=2, mix=0.5, **options)))


def test_mix(index: ShardIndex, builder: RowBuilder) -> None:
    """Rows of earlier stages in one batch; the number of passes stays that of the stage."""
    batches = list(mixed(index, builder))
    counts = Counter(int(n) for batch in batches for n in batch.latents[batch.target_mask.any(1)])
    assert set(counts) == {0, 1, 2} and sum(counts.values()) == 2 * SAMPLES
    assert {batch.passes for batch in batches} == {2}
    assert any(len(set(batch.latents.tolist())) > 1 for batch in batches)


def test_mix_does_not_depend_on_the_world(index: ShardIndex, builder: RowBuilder) -> None:
    def latents(batches: Iterator[Batch]) -> list[tuple[str, int]]:
        return sorted(
            (key, int(n)) for batch in batches for key, n in zip(batch.keys, batch.latents, strict=True) if key
        )

    shares = (mixed(index, builder, rank=rank, world=3, micro_batch=2) for rank in range(3))
    assert sorted(chain(*map(latents, shares))) == latents(mixed(index, builder))


def test_passes_with_mix_are_the_most_of_any_stage_so_far(index: ShardIndex, builder: RowBuilder) -> None:
    stages = [StageConfig(latents=n, skip=0, epochs=1) for n in (3, 1, 4)]
    assert steps(index, builder, stages=stages, stage=1).passes == 1
    assert steps(index, builder, stages=stages, stage=1, mix=0.5).passes == 3


# ---- bad samples ------------------------------------------------------------------------------
def test_a_corrupted_sample_is_a_masked_row(index: ShardIndex, broken: ShardIndex, builder: RowBuilder) -> None:
    """It keeps its slot, says its key and reason, and changes no other row."""
    sound, damaged = all_steps(steps(index, builder)), all_steps(steps(broken, builder))
    found = [row for step in damaged for batch in step for row in batch.bad]
    assert found == [("000000009", "its bytes in train-000002.tar are not those that were written")] * 2  # two epochs
    for before, after in zip(sound, damaged, strict=True):
        assert [b.keys for b in after] == [b.keys for b in before]
        assert rows(after) == [row for row in rows(before) if row != 9]
    assert 9 in rows(list(chain(*sound)))
    hit = next(batch for batch in chain(*damaged) if batch.bad)
    slot = hit.keys.index("000000009")
    assert hit.prompt_mask[slot].sum() == 1 and not hit.target_mask[slot].any() and hit.latents[slot] == 0


def test_bad_samples_cross_from_workers(broken: ShardIndex, builder: RowBuilder) -> None:
    dataset = steps(broken, builder)
    assert_same(list(steps_from(dataset, 0, 1)), all_steps(dataset))


def test_an_unusable_sample_is_a_masked_row(index: ShardIndex, builder: RowBuilder) -> None:
    greedy = RowBuilder(builder.processor, builder.config, num_patches=10)
    row = training_row(index, greedy, 4, STAGES[1], CURRICULUM)
    reason = "10 patches a step (latent.num_patches) of an image that has 9"
    assert (row.key, row.bad, list(row.target_ids)) == ("000000004", reason, [])
    assert training_row(index, greedy, 4, STAGES[0], CURRICULUM).bad == ""


def test_a_batch_of_bad_samples_is_still_a_batch(index: ShardIndex, builder: RowBuilder) -> None:
    greedy = RowBuilder(builder.processor, builder.config, num_patches=10)
    batch = steps(index, greedy)[0][0]
    assert len(batch.bad) == 3 and not batch.target_mask.any() and not batch.has_images and batch.passes == 1
    fmt = builder.processor.row_format
    assert same(batch, collate([masked_row(fmt, key, reason) for key, reason in batch.bad], fmt, 1))


class Ended(list[int]):
    """A data set whose reading is the end of the process, as a mapped file that was cut short makes it."""

    def __getitem__(self, item: Any) -> Any:
        os.kill(os.getpid(), signal.SIGBUS)


def test_a_worker_that_is_ended_is_one_line() -> None:
    with pytest.raises(OwnFault, match="worker process was ended from outside.*start the"), lost_workers_told():
        next(loaded(Ended([1]), range(1), 1))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="another"), lost_workers_told():
        raise RuntimeError("another")


ROTATED = Image.new("RGB", (60, 90)).getexif()
ROTATED[ExifTags.Base.Orientation] = 6
ODD: dict[str, tuple[dict[str, Any], str]] = {
    "a word of 100,000 letters": ({"question": "x" * 100_000}, "overlong"),
    "100,000 words": ({"question": "fig pear " * 50_000}, "overlong"),
    "500 steps": ({"rationale": " ".join(f"Step {n} is green." for n in range(500))}, ""),
    "empty rationale": ({"rationale": ""}, ""),
    "special tokens": ({"question": "<|image_pad|><|im_end|><|vision_start|>text"}, ""),
    "no picture": ({"image": None}, ""),
    "1 x 1": ({"image": picture(1, 1)}, "2 patches a step"),
    "1 x 60000": ({"image": picture(1, 60_000)}, "image too narrow"),
    "60000 x 1": ({"image": picture(60_000, 1)}, "image too narrow"),
    "16 bits": ({"image": picture(mode="I;16")}, ""),
    "CMYK": ({"image": picture(mode="CMYK", kind="JPEG")}, ""),
    "palette": ({"image": picture(mode="P")}, ""),
    "one bit": ({"image": picture(mode="1")}, ""),
    "animated": ({"image": picture(mode="P", kind="GIF", save_all=True, append_images=[Image.new("P", (56, 84))])}, ""),
    "rotated": ({"image": picture(60, 90, kind="JPEG", exif=ROTATED)}, ""),
    "64 megapixels": ({"image": picture(8192, 8192, mode="1")}, ""),
    "more megapixels": ({"image": picture(8192, 8193, mode="1")}, "image "),
    "200 megapixels": ({"image": picture(20_000, 10_000, mode="1")}, "image too large"),
    "cut short": ({"image": picture()[:-30]}, "image cannot be decoded"),
    "no image": ({"image": b"text"}, "unknown image format"),
    "no bytes": ({"image": b""}, "unknown image format"),
    "30 choices": ({"choices": tuple("x" * 30)}, "more than 26 choices"),
    "no choices": ({"choices": ()}, "fewer than 2 choices"),
    "no such answer": ({"answer": 9}, "answer outside the choices"),
    "an answer from behind": ({"answer": -1}, "answer outside the choices"),
    "an answer that is a letter": ({"answer": "B"}, "answer not a whole number"),
    "no rationale": ({"rationale": None}, "rationale not text"),
    "half a character": ({"question": "\ud800"}, "question not valid Unicode"),
    "fields of another kind": ({"fields": {"kind": [1]}}, "a field not text"),
}
"""Examples as another program may have written them into a sound tar, and how the masked row's reason begins."""


@pytest.mark.parametrize("name", ODD)
def test_odd_samples_are_rows_or_masked_rows(builder: RowBuilder, name: str) -> None:
    changes, reason = ODD[name]
    index: Any = SimpleNamespace(read=lambda sample: make_example(**changes), key=lambda sample: "k")
    processor = Qwen2VLProcessor(builder.processor.tokenizer.name_or_path, max_pixels=28 * 28 * 16)
    small = RowBuilder(processor, builder.config, 2)
    row = training_row(index, small, 0, STAGES[1], CURRICULUM)
    assert row.overlong == (reason == "overlong") and bool(row.target_ids) == (not reason)
    assert row.bad.startswith(reason) if reason and not row.overlong else not row.bad
    collate([row, masked_row(small.processor.row_format)], small.processor.row_format, 1)


def test_whatever_an_image_library_raises_is_a_reason(builder: RowBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    def image(self: Any, image: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Qwen2VLProcessor, "image", image)
    index: Any = SimpleNamespace(read=lambda sample: make_example(), key=lambda sample: "k")
    assert training_row(index, builder, 0, STAGES[1], CURRICULUM).bad == "image: MemoryError"


def test_where_does_not_trip_over_odd_fields() -> None:
    index: Any = SimpleNamespace(read=lambda sample: make_example(fields=None), key=lambda sample: "k")
    assert _Matches(index, [{"kind": ["look"]}], 0, 2)[0].tolist() == [[True, True]]


def test_a_worker_ends_at_its_ranks_sigterm_only():
    """Somebody else's (a launcher's, to the whole group) leaves it the time in which the rank saves."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def work():
        _outlast_signals(0)
        ready.set()
        time.sleep(60)

    for by_others in (False, True):
        ready.clear()
        worker = context.Process(target=work, daemon=True)
        worker.start()
        ready.wait(20)
        if by_others:
            subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
            worker.join(1)
            assert worker.is_alive()
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 0
