"""Several data sets in one run: which rows they are, what they are called, and what is refused."""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.reader import ShardIndex, open_split
from data_prep.shard import build
from data_prep.tokenizer import texts_of_folder, train_tokenizer
from pipeline import distributed
from pipeline.backbones.qwen2_vl import Qwen2VLProcessor
from pipeline.config import RunConfig
from pipeline.curriculum import CurriculumConfig, StageConfig
from pipeline.data import matching as matching_module
from pipeline.data.fitting import all_stages
from pipeline.data.loader import Share, StageSteps, steps_from
from pipeline.data.matching import matching
from pipeline.data.mixture import Mixture
from pipeline.data.order import EpochOrder
from pipeline.prepare import check_data, check_patches, spread
from pipeline.prompt import PromptConfig, RowBuilder
from pipeline.recipe import load_config
from pipeline.validate import subset
from tests.pipeline.test_loader import assert_same

STAGES = [StageConfig(latents=0, skip=0, epochs=2), StageConfig(latents=1, skip=1, steps=9)]
SIZES = {"a": 18, "b": 7}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shard folders, of 18 and 7 training samples in shards of 4."""
    root = tmp_path_factory.mktemp("data")
    for seed, (name, train) in enumerate(SIZES.items()):
        options = {"grid": 3, "colours": 6, "train": train, "val": 3 + seed, "test": 0, "seed": seed}
        build("trails", root / name, options=options, samples_per_shard=4)
    return root


@pytest.fixture(scope="module")
def builder(root: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RowBuilder:
    words = tmp_path_factory.mktemp("words")
    train_tokenizer(texts_of_folder(root / "a"), words, 500)
    shutil.copy(model_folder / "preprocessor_config.json", words)
    return RowBuilder(Qwen2VLProcessor(words), PromptConfig(), 2)


def settings(root: Path, *members: tuple[str, int], **overrides: str) -> RunConfig:
    mix = ", ".join(f"{{path: {root / name}, weight: {weight}}}" for name, weight in members)
    return load_config(None, {"model.path": "m", "data.mix": f"[{mix}]", **overrides})


def mixture(root: Path, *members: tuple[str, int]) -> Any:
    return check_data(settings(root, *(members or (("a", 3), ("b", 1)))))["train"]


def steps(index: Any, builder: RowBuilder, stage: int = 0, **options: Any) -> StageSteps:
    share = Share(options.pop("rank", 0), options.pop("world", 1), 8, 3)
    curriculum = CurriculumConfig(**{"stages": STAGES, **options.pop("curriculum", {})})
    return StageSteps(index, builder, curriculum, stage, share, 5, "drop", **options)


def keys(dataset: StageSteps) -> list[str]:
    return [key for step in range(len(dataset)) for batch in dataset[step] for key in batch.keys]


# ---- rows -------------------------------------------------------------------------------------
def test_rows_name_their_data_set_and_keep_their_share(root: Path, builder: RowBuilder) -> None:
    """Two epochs are 6 batches of 8, of which a quarter is b's; row ids differ wherever samples do."""
    dataset = steps(mixture(root), builder)
    assert len(dataset) == 6 and [dataset.epoch_of(step) for step in range(6)] == [0, 0, 0, 0, 1, 1]
    found = keys(dataset)
    counts = Counter(found)
    assert Counter(key.split("/")[0] for key in found) == {"a": 36, "b": 12}
    assert [counts[key] for key in counts if key[0] == "a"] == [2] * 18
    assert sorted(counts[key] for key in counts if key[0] == "b") == [1, 1, 2, 2, 2, 2, 2]
    batches = [batch for step in range(6) for batch in dataset[step]]
    ids = set(chain(*(zip(batch.row_ids.tolist(), batch.keys, strict=True) for batch in batches)))
    assert len(ids) == len({row for row, _ in ids}) == len({key for _, key in ids}) == 25


def test_a_data_set_has_the_same_order_wherever_it_stands(root: Path, builder: RowBuilder) -> None:
    one, other = mixture(root, ("a", 1), ("b", 1)), mixture(root, ("b", 1), ("a", 1))
    for name in SIZES:
        orders = [[key for key in keys(steps(index, builder)) if key[0] == name] for index in (one, other)]
        assert orders[0] == orders[1]
    first = [[key[2:] for key in keys(steps(one, builder)) if key[0] == name] for name in SIZES]
    assert first[0][:7] != first[1][:7]


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("start", [0, 4])
def test_workers_and_resume_change_nothing(root: Path, builder: RowBuilder, workers: int, start: int) -> None:
    index, options = mixture(root), {"group_by_length": 2, "curriculum": {"mix": 0.5}}
    whole = steps(index, builder, stage=1, **options)
    again = pickle.loads(pickle.dumps(steps(index, builder, stage=1, **options)))  # as `spawn` sends it
    assert_same(list(steps_from(again, start, workers)), [whole[step] for step in range(start, len(whole))])


@pytest.mark.parametrize("world", [2, 3])
def test_the_world_changes_nothing(root: Path, builder: RowBuilder, world: int) -> None:
    alone = keys(steps(mixture(root), builder))
    ranks = [keys(steps(mixture(root), builder, rank=rank, world=world)) for rank in range(world)]
    assert sorted(key for key in chain(*ranks) if key) == sorted(alone)


def test_a_stage_is_described(root: Path, builder: RowBuilder) -> None:
    said = steps(mixture(root), builder).describe_epoch()
    assert said == "25 samples an epoch, of 25 there are: a 18 (3 of 4 rows), b 7 (1 of 4 rows)"
    one = steps(open_split(root / "a", "train"), builder)
    assert one.describe_epoch() == "16 samples an epoch, of 18 there are"
    assert one.describe_last_batch().startswith("the last 2 samples of every epoch's order are dropped")
    share = Share(0, 1, 8, 3)
    padded = StageSteps(one.index, builder, one.curriculum, 0, share, 0, "pad")
    assert padded.describe_last_batch() == "6 slots of every epoch's last batch are padded"


def test_validation_takes_rows_of_all(root: Path) -> None:
    """In turns; and of a single data set as it always did."""
    val: Any = check_data(settings(root, ("a", 3), ("b", 1)))["val"]
    assert [val.key(int(i))[0] for i in subset(val, 5)] == ["a", "b", "a", "b", "a"]
    assert sorted(subset(val, 100)) == list(range(3 + 4))
    one = open_split(root / "a", "val")
    assert subset(one, 2).tolist() == EpochOrder(one.shard_sizes, 1, 0, 0).take(0, 2).tolist()


def test_a_bad_sample_is_named_with_its_data_set(root: Path, builder: RowBuilder) -> None:
    greedy = RowBuilder(builder.processor, builder.config, 10)
    dataset = steps(mixture(root), greedy, stage=1)
    bad = [row for step in range(len(dataset)) for batch in dataset[step] for row in batch.bad]
    assert {key[:2] for key, _ in bad} == {"a/", "b/"}
    assert all(key[2:].startswith("0000000") and "10 patches a step" in reason for key, reason in bad)


# ---- identity ---------------------------------------------------------------------------------
def test_identity_covers_members_order_and_weights(root: Path) -> None:
    mixes = [(("a", 3), ("b", 1)), (("b", 1), ("a", 3)), (("a", 3), ("b", 2)), (("a", 3),)]
    assert len({mixture(root, *mix).index_hash for mix in mixes}) == 4
    assert mixture(root, *mixes[0]).index_hash == mixture(root, *mixes[0]).index_hash


def test_names_that_are_not_unique_are_paths(root: Path) -> None:
    index = open_split(root / "a", "train")
    assert [member.name for member in Mixture(["x/a", "y/a", "b"], [index] * 3, [1] * 3).members] == ["x/a", "y/a", "b"]
    urls = ["https://me:secret@host/a?key=secret", "https://host/b"]
    assert [member.name for member in Mixture(urls, [index] * 2, [1] * 2).members] == ["a", "b"]


# ---- what is refused --------------------------------------------------------------------------
def refused(root: Path, *members: tuple[str, int], **overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        check_data(settings(root, *members, **overrides))
    return [line.replace(str(root), "ROOT") for line in caught.value.lines]


def test_mistakes_are_said_at_once(root: Path, tmp_path: Path) -> None:
    nowhere, empty = refused(root, ("nowhere", 1), ("a", 1), ("c", 1))
    assert nowhere.startswith("the shard folder ROOT/nowhere is not there") and "ROOT/c is not there" in empty
    shutil.copytree(root / "a", tmp_path / "copy")
    (line,) = refused(root, ("a", 1), (str(tmp_path / "copy"), 1))
    assert line == f"data.mix: {tmp_path / 'copy'} holds the same samples as ROOT/a; leave one out"


def test_weights_and_doubles(root: Path) -> None:
    lines = refused(root, ("a", 0), ("b", -1))
    assert [line.split(": ")[1] for line in lines] == ["data.mix.0.weight", "data.mix.1.weight"]
    with pytest.raises(UserError, match=r"data.mix.0.weight: Field required"):
        load_config(None, {"model.path": "m", "data.mix": "[{path: a}]"})
    (line,) = refused(root, ("a", 1), ("b", 1), ("a", 2))
    assert line == "defaults: data.mix has ROOT/a twice; add up its weights"
    (line,) = refused(root, ("a", 1), **{"data.path": "x"})
    assert line == "defaults: give either data.path (--data) or data.mix"


def test_a_data_set_without_a_fitting_sample(root: Path, builder: RowBuilder) -> None:
    stages = [StageConfig(latents=0, skip=0, epochs=1, where={"kind": ["look"]})]
    index = mixture(root)
    chosen = np.arange(SIZES["a"])
    with pytest.raises(UserError, match="stage 0: no training sample of b fits it"):
        steps(index, builder, curriculum={"stages": stages}, chosen=chosen)


def test_what_is_given_later_replaces_the_other(tmp_path: Path) -> None:
    """A recipe's folder by a mixture, a mixture by --data."""
    one, mixed = tmp_path / "one.yaml", tmp_path / "mixed.yaml"
    one.write_text("model: {path: m}\ndata: {path: x, source: trails}\n")
    mixed.write_text("data: {mix: [{path: a, weight: 2}]}\n")
    data = load_config([one, mixed], {}).data
    assert data.path is None and [member.path for member in data.mix] == ["a"]
    data = load_config([one, mixed], {"data.path": "y"}).data
    assert data.path == "y" and not data.mix
    data = load_config(one, {"data.mix": "[{path: a, weight: 2}, {path: b, weight: 1}]"}).data
    assert data.path is None and [member.weight for member in data.mix] == [2, 1]


# ---- reading once -----------------------------------------------------------------------------
class Counted:
    """An index that counts what is read."""

    def __init__(self, index: ShardIndex) -> None:
        self.index, self.reads = index, Counter[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.index, name)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, position: int) -> Any:
        self.reads[position] += 1
        return self.index.read(position)


def test_samples_are_read_once_for_all_stages(root: Path, builder: RowBuilder, tmp_path: Path) -> None:
    kinds = [{"kind": ["look"]}, {}, {"kind": ["describe", "follow", "neighbour"]}, {"kind": ["look"]}]
    stages = [StageConfig(latents=0, skip=0, steps=1, where=where) for where in kinds]
    index, said = Counted(open_split(root / "a", "train")), list[Any]()
    data = SimpleNamespace(workers=0, last_batch="pad", group_by_length=0)
    log = SimpleNamespace(info=lambda *args: said.append(args))
    found = all_stages(index, builder, CurriculumConfig(stages=stages), Share(0, 1, 8, 8), 0, data, log, tmp_path)  # type: ignore[arg-type]
    assert set(index.reads.values()) == {1} and len(index.reads) == SIZES["a"] and said
    look, rest = found[0].chosen, found[2].chosen
    assert look is not None and rest is not None and found[1].chosen is None
    assert sorted([*look, *rest]) == list(range(SIZES["a"])) and found[3].chosen is look
    assert all(index.index.read(int(i)).fields["kind"] == "look" for i in look)


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_read_a_part_each(root: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    index, where = mixture(root), [{"kind": ["look"]}, {"kind": ["follow"]}]
    monkeypatch.setattr(matching_module, "STRETCH", 4)
    parts: list[Any] = []
    monkeypatch.setattr(distributed, "gather", lambda part: parts.append(part) or [part] * 3)
    for rank in range(3):
        matching(index, where, workers, rank, 3)
    monkeypatch.setattr(distributed, "gather", lambda part: parts)
    found = matching(index, where, workers, 0, 3)
    assert [rows.tolist() for rows in found] == [rows.tolist() for rows in matching(index, where)]
    assert sum(map(len, found)) > 0


def stages_of(folder: Path, kept: Path, builder: RowBuilder, where: Any, window: int = 0) -> list[StageSteps]:
    data = SimpleNamespace(workers=0, last_batch="pad", group_by_length=window)
    curriculum = CurriculumConfig(stages=[StageConfig(latents=0, skip=0, epochs=1, where=where)])
    log: Any = SimpleNamespace(info=lambda *args: None)
    return all_stages(open_split(folder, "train"), builder, curriculum, Share(0, 1, 8, 8), 0, data, log, kept)


def test_samples_that_go_bad_later_move_no_others(root: Path, builder: RowBuilder, tmp_path: Path) -> None:
    """A resumed run finds those that fit as they were at first, although one that did not fit is unreadable now."""
    where, folder, kept = {"kind": ["look"]}, tmp_path / "a", tmp_path / "where"
    shutil.copytree(root / "a", folder)
    before = stages_of(folder, kept, builder, where)[0]
    other = next(i for i in range(18) if before.index.read(i).fields["kind"] != "look")
    tar = folder / before.index.shards[before.index.shard_of(other)]["name"]
    content = bytearray(tar.read_bytes())
    content[int(before.index.records[other]["json_offset"])] ^= 1
    tar.write_bytes(content)
    after = stages_of(folder, kept, builder, where)[0]
    assert [after.slots(step) for step in range(len(after))] == [before.slots(step) for step in range(len(before))]
    assert other in stages_of(folder, tmp_path / "anew", builder, where)[0].chosen  # type: ignore[operator]

    (file,) = kept.iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(UserError, match="is damaged: it says which samples fit"):
        stages_of(folder, kept, builder, where)
    assert len(stages_of(folder, kept, builder, {"kind": ["follow", "describe", "neighbour"]})) == 1


def test_a_damaged_index_does_not_sort_samples(root: Path, builder: RowBuilder, tmp_path: Path) -> None:
    """Without groups it costs a shard; with them it would give other batches than before, or than on other nodes."""
    shutil.copytree(root / "a", tmp_path / "a")
    index = np.lib.format.open_memmap(tmp_path / "a" / "train.index.npy", mode="r+")
    index["json_size"][5] ^= 1
    index.flush()
    assert len(stages_of(tmp_path / "a", tmp_path / "where", builder, {})[0])
    with pytest.raises(
        UserError, match="group_by_length needs a sound index, but the index of train-000001.tar is not"
    ):
        stages_of(tmp_path / "a", tmp_path / "where", builder, {}, window=2)


# ---- the check of the pictures' sizes ---------------------------------------------------------
def test_a_large_split_is_looked_at_in_places(root: Path, builder: RowBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert spread(100_000).tolist() == list(range(100_000))
    places = spread(10_000_000)
    assert len(set(places)) == len(places) == 100_000 and (places[0], places[-1]) == (0, 9_999_999)
    assert np.diff(places).max() < 10_000_000 / 40
    with pytest.raises(UserError, match=r"more than the 9 patches of a 84x84 image \(25 images of train are too small"):
        check_patches(mixture(root), builder.processor, 10)
