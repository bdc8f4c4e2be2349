from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep.example import Example, InvalidExample, check_image, image_extension, image_size
from data_prep.steps import merge_steps, split_steps
from tests.data_prep.conftest import make_example, picture


def test_a_good_example_is_valid() -> None:
    make_example().validate()
    make_example(image=None, rationale="").validate()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"question": " "}, "no question"),
        ({"question": None}, "question not text"),
        ({"rationale": float("nan")}, "rationale not text"),
        ({"choices": ("one",)}, "fewer than 2 choices"),
        ({"choices": ("one", "")}, "an empty choice"),
        ({"choices": ("one", 2)}, "a choice not text: 1, int"),
        ({"choices": ("one",) * 27}, "more than 26 choices: 27"),
        ({"choices": ("one", "tw\0o")}, "a choice holds a NUL character: 1, 'tw"),
        ({"answer": 2}, "answer outside the choices"),
        ({"answer": -1}, "answer outside the choices"),
        ({"answer": True}, "answer not a whole number"),
        ({"answer": 1.0}, "answer not a whole number"),
        ({"context": "\ud800"}, "context not valid Unicode"),
        ({"fields": {"topic": 3}}, "a field not text: 'topic', int"),
        ({"fields": {3: "topic"}}, "the name of a field not text: int"),
        ({"question": "why? " * 300_000}, "texts too long: 15001[0-9]{2} bytes"),
        ({"image": b""}, "unknown image format"),
        ({"image": picture()[:50]}, "image cannot be decoded"),
        ({"image": picture(format="JPEG")[:200]}, "image cannot be decoded"),
    ],
)
def test_bad_examples(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidExample, match=reason):
        make_example(**changes).validate()


def test_large_pictures_are_refused_undecoded() -> None:
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(InvalidExample, match="image too large: 40 x 30"):
        check_image(picture(), max_pixels=1199)
    check_image(picture(), max_pixels=1200)
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_formats(format: str) -> None:
    image = picture(format=format)
    assert image_extension(image) == {"JPEG": "jpg"}.get(format, format.lower())
    assert image_size(image) == (40, 30)
    check_image(image)


def test_size_after_exif_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert image_size(picture(format="JPEG", exif=exif)) == (30, 40)


TEXT = st.text(min_size=1)


@given(
    question=TEXT,
    choices=st.lists(TEXT, min_size=2, max_size=5),
    rationale=st.text(),
    fields=st.dictionaries(TEXT, TEXT),
)
def test_record_round_trip(question: str, choices: list[str], rationale: str, fields: dict[str, str]) -> None:
    import json

    example = make_example(question=question, choices=tuple(choices), answer=0, rationale=rationale, fields=fields)
    again = Example.from_record(json.loads(example.to_json()), example.image)
    assert again == example
    assert again.content_hash() == example.content_hash()


def test_hash_depends_on_text_and_picture() -> None:
    hashes = {
        make_example(**changes).content_hash()
        for changes in ({}, {"answer": 0}, {"image": None}, {"image": picture("blue")})
    }
    assert len(hashes) == 4
    assert len(next(iter(hashes))) == 16


def test_from_record_refuses_other_keys() -> None:
    with pytest.raises(InvalidExample, match="keys"):
        Example.from_record({"id": "x"}, None)


def test_picture_bytes_are_kept() -> None:
    image = picture(format="JPEG", quality=31)
    with Image.open(io.BytesIO(image)) as opened:
        assert opened.format == "JPEG"
    assert make_example(image=image).image == image


@pytest.mark.parametrize(
    ("rationale", "steps"),
    [
        ("One. Two. Three.", ["One", "Two", "Three."]),
        ("One.\nTwo\nlines. ", ["One", "Two lines"]),
        ("3.14 is pi.  . End", ["3.14 is pi", "End"]),
        ("One only", ["One only"]),
        ("", []),
        (" \n ", []),
    ],
)
def test_steps(rationale: str, steps: list[str]) -> None:
    assert split_steps(rationale) == steps


def test_merging() -> None:
    letters = list("abcdefgh")
    assert merge_steps(letters[:3]) == ["a", "b", "c"]
    assert merge_steps(letters[:4]) == ["a. b", "c", "d"]
    assert merge_steps(letters) == ["a. b. c", "d. e. f", "g. h"]
    assert merge_steps(letters, 1) == ["a. b. c. d. e. f. g. h"]
    assert merge_steps([]) == []
