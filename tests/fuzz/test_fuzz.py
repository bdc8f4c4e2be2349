"""A few cases of every kind, and every odd picture; `python -m tests.fuzz` runs thousands."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import pytest

from data_prep.example import InvalidExample, check_image, image_size
from pipeline.prompt import UnusableSample, open_image
from tests.fuzz import pictures
from tests.fuzz.harness import INPUTS, KINDS, Counts, Harness
from tests.fuzz.kinds import FOLDERS as DAMAGED
from tests.fuzz.kinds import INPUTS as MUTATED


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    return Harness(tmp_path_factory.mktemp("fuzz"), seed=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_cases(harness: Harness, kind: str) -> None:
    counts = Counts()
    for number in range(12 if kind in MUTATED | DAMAGED and not kind.startswith("parquet") else 5):
        harness.run(kind, number, counts)
    assert counts.accepted + counts.rejected + counts.refused >= counts.cases


def test_a_lost_row_would_be_noticed(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.harness.Harness._load", lambda *_: 1)
    with pytest.raises(AssertionError, match="1 and [01] of {'train': 3}"):
        for number in range(10):
            harness.run("picture: odd", number, Counts())


@pytest.mark.parametrize("name", pictures.GOOD)
def test_rare_pictures_are_taken(name: str) -> None:
    """By preparation and training alike, and without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_image(pictures.made(name))
        assert image_size(pictures.made(name)) == open_image(pictures.made(name)).size


@pytest.mark.parametrize("name", pictures.BAD)
def test_harmful_pictures_are_refused(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InvalidExample) as caught:
            check_image(pictures.made(name))
        with pytest.raises(UnusableSample, match="image"):
            open_image(pictures.made(name))
    assert " at 0x" not in str(caught.value)  # the same reason in every run


def test_only_five_decoders_see_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where leading bytes of another format pass for one of the five."""
    from PIL import EpsImagePlugin, Image

    Image.init()
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("a program is run"))
    monkeypatch.setattr("data_prep.example.image_extension", lambda _: "jpg")
    for format in pictures.OTHERS:
        with pytest.raises(InvalidExample, match="image cannot be decoded: jpg"):
            check_image(pictures.encoded(format=format))


def test_cases_depend_on_their_number_alone(harness: Harness, tmp_path: Path) -> None:
    def content(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    for kind, make in INPUTS.items():
        for number in range(3):
            made = []
            for again in range(2):
                folder = tmp_path / f"{kind} {number} {again}"
                folder.mkdir()
                make(random.Random(f"{kind} {number}"), folder)
                made.append(content(folder))
            assert made[0] == made[1]
