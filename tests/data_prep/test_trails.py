from __future__ import annotations

import io
import itertools
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data_prep.errors import UserError
from data_prep.example import Example
from data_prep.sources.flags import DIRECTIONS, PALETTE
from data_prep.sources.trails import Trails, TrailsOptions

NAMES = {rgb: name for name, rgb in PALETTE.items()}


def seen(example: Example) -> dict[str, tuple[int, int]]:
    """The flags of a picture and their places, read from its pixels."""
    grid = int(example.fields["grid"])
    pixels = np.asarray(Image.open(io.BytesIO(example.image or b"")).convert("RGB"))
    cell = pixels.shape[0] // grid
    places = {}
    for row, column in itertools.product(range(grid), repeat=2):
        top, left = row * cell + 2, column * cell + 2
        colours = [NAMES[tuple(pixels[top, x].tolist())] for x in (left, left + cell - 5)]
        places[" ".join(colours)] = (row, column)
    return places


def sentences(example: Example) -> list[str]:
    assert example.rationale.endswith(".")
    return example.rationale[:-1].split(". ")


def read_sentence(sentence: str) -> tuple[str, str, str]:
    match = re.fullmatch(r"(\w+ \w+) points (\w+) to (\w+ \w+)", sentence)
    assert match, sentence
    return match[1], match[2], match[3]


def examples(kind: str, count: int = 60, split: str = "train", **options: object) -> list[Example]:
    source = Trails(TrailsOptions(mix=f"{kind}:1", **options))  # type: ignore[arg-type]
    return [source.example(split, row) for row in range(count)]


@pytest.mark.parametrize("kind", ["follow", "look", "neighbour", "describe"])
def test_every_kind_is_sound(kind: str) -> None:
    for example in examples(kind):
        example.validate()
        places = seen(example)
        assert len(places) == 16  # no two flags alike
        assert len(set(example.choices)) == 4
        assert set(example.choices) <= (set(DIRECTIONS) if kind == "look" else set(places))


@pytest.mark.parametrize("kind", ["follow", "look", "neighbour"])
def test_sentences_are_true(kind: str) -> None:
    for example in examples(kind):
        places = seen(example)
        for flag, direction, target in map(read_sentence, sentences(example)):
            (row, column), (down, right) = places[flag], DIRECTIONS[direction]
            assert places[target] == (row + down, column + right)


def test_follow() -> None:
    for example in examples("follow", hops="2-4"):
        steps = [read_sentence(sentence) for sentence in sentences(example)]
        hops = int(example.fields["hops"])
        start = re.fullmatch(
            r"Start at the (\w+ \w+) flag and follow (\d) arrows\. Which flag is reached\?", example.question
        )
        assert start
        assert (start[1], int(start[2])) == (steps[0][0], hops) and len(steps) == hops
        assert all(before[2] == after[0] for before, after in itertools.pairwise(steps))
        visited = [steps[0][0], *(step[2] for step in steps)]
        assert len(set(visited)) == hops + 1
        assert example.choices[example.answer] == visited[-1]
        assert steps[0][0] not in example.choices
        # The wrong choices are no easier: on cells of the right parity, and not too far to be reached.
        places = seen(example)
        row, column = places[visited[0]]
        for choice in example.choices:
            distance = abs(places[choice][0] - row) + abs(places[choice][1] - column)
            assert distance <= hops and distance % 2 == hops % 2


def test_wrong_choices_are_ends_of_other_trails() -> None:
    import random

    from data_prep.sources.flags import Layout
    from data_prep.sources.trails import _follow

    rng = random.Random(0)
    found = 0
    while found < 50:
        layout = Layout.draw(rng, 4, 8)
        asked = _follow(layout, rng, 3)
        if asked is not None:
            found += 1
            trails = [layout.path(start, 3) for start in range(16)]
            ends = {layout.name(trail[-1]) for trail in trails if len(set(trail)) == 4}
            assert {asked.right, *asked.wrong} <= ends


@pytest.mark.parametrize("kind", ["look", "neighbour"])
def test_the_asked_flag_comes_last(kind: str) -> None:
    for example in examples(kind):
        steps = [read_sentence(sentence) for sentence in sentences(example)]
        asked = re.search(r"the (\w+ \w+) flag point", example.question)
        assert asked and asked[1] == steps[-1][0]
        assert len(steps) == 16
        assert example.choices[example.answer] == steps[-1][1 if kind == "look" else 2]


def test_describe() -> None:
    for example in examples("describe"):
        rows = sentences(example)
        place = re.fullmatch(r"Which flag is in row (\d), column (\d)\?", example.question)
        assert place and len(rows) == 4
        flag = rows[int(place[1]) - 1].split(", ")[int(place[2]) - 1]
        assert flag.rsplit(" ", 1)[0] == example.choices[example.answer]


def test_random_access_and_seed() -> None:
    source, again, other = Trails(), Trails(TrailsOptions(train=5)), Trails(TrailsOptions(seed=1))
    assert source.example("train", 7) == again.example("train", 7)
    assert source.example("train", 7) != other.example("train", 7)
    assert source.example("train", 7) != source.example("test", 7)


def test_splits_share_no_picture() -> None:
    source = Trails()
    pictures = {split: {source.example(split, row).image for row in range(150)} for split in source.splits()}
    assert not pictures["train"] & pictures["val"]
    assert not pictures["train"] & pictures["test"]
    assert not pictures["val"] & pictures["test"]


def test_balance() -> None:
    source = Trails()
    many = [source.example("train", row) for row in range(800)]
    assert Counter(e.fields["kind"] for e in many) == {
        "describe": 160,
        "look": 240,
        "neighbour": 160,
        "follow": 240,
    }
    for kind in ("describe", "look", "neighbour", "follow"):
        positions = Counter(e.answer for e in many if e.fields["kind"] == kind)
        assert max(positions.values()) - min(positions.values()) <= 1
    hops = Counter((e.fields["hops"], e.answer) for e in many if e.fields["kind"] == "follow")
    assert set(hops.values()) == {30}
    directions = Counter((e.choices[e.answer], e.answer) for e in many if e.fields["kind"] == "look")
    assert set(directions.values()) == {60} and len(directions) == 4  # the choices keep their order


def test_sizes() -> None:
    source = Trails(TrailsOptions(grid=3, cell=16, colours=4, train=2, val=0))
    assert source.splits() == ["train", "test"]
    with Image.open(io.BytesIO(source.example("train", 0).image or b"")) as image:
        assert image.size == (48, 48)


def test_mistakes() -> None:
    with pytest.raises(UserError) as caught:
        Trails(TrailsOptions(grid=5, colours=4, hops="3-2", mix="follow:0.5", seed=-1))
    assert len(caught.value.lines) == 4
    for mix in ("look:inf", "look:nan", "look:1e8", "look:2,follow:-1", "look:1,follow:-1", "look:0.6,follow:0.5"):
        with pytest.raises(UserError, match=f"--mix {mix}: expected KIND:SHARE"):
            Trails(TrailsOptions(mix=mix))
    with pytest.raises(UserError, match="--hops 1-99999999999999999999: expected 1 or more"):
        Trails(TrailsOptions(hops="1-99999999999999999999"))
    with pytest.raises(UserError, match="--hops 14 is too many"):
        Trails(TrailsOptions(grid=3, hops="14", mix="follow:1")).example("train", 0)
