"""The one record that every source yields: a picture, a question with choices, a rationale and an answer.

In a tar an Example is two members: `KEY.json` (canonical: sorted keys, UTF-8) and, if it has a picture,
`KEY.EXT` with the picture's bytes as they were found.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError

MAX_PIXELS = 64 * 2**20
"""Pictures with more pixels are refused before they are decoded."""

MAX_BYTES = 64 * 2**20
"""Pictures of more bytes are refused."""

MAX_RATIO = 200
"""Pictures more than so many times as long as they are wide are refused, as Qwen2-VL's processor does in training."""

MAX_RECORD = 2**20
"""Bytes of an Example's texts, as JSON; longer ones are refused, what training cannot take is its own matter."""

MAX_CHOICES = 26
"""There are no more letters to answer with."""

IMAGE_EXTENSIONS = ("jpg", "png", "webp", "gif", "bmp")
"""What a picture's bytes may be; the index stores 1 + the position in this tuple, 0 for no picture."""

HASH_BYTES = 16
"""Length of a content hash."""


class InvalidExample(ValueError):
    """An Example or its stored form breaks a rule; the message is the reason, as "KIND" or "KIND: DETAIL".

    Kinds are counted, so that none quotes the data; a long detail is cut.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(shortened(reason))


@dataclass(frozen=True)
class Example:
    """One multiple-choice question."""

    id: str
    """Name of the question in its source, unique in its split."""
    dataset: str
    """Name of the source."""
    split: str
    """train, val or test."""
    question: str
    choices: tuple[str, ...]
    """Two to `MAX_CHOICES`."""
    answer: int
    """0-based position in `choices`."""
    rationale: str
    """Chain of thought; empty where the source has none."""
    context: str = ""
    """Text that belongs to the question (context in M3CoT, hint in ScienceQA); empty where there is none."""
    image: bytes | None = None
    """The encoded picture as found, or None for a text-only question."""
    fields: dict[str, str] = field(default_factory=dict)
    """What results are broken down by, such as subject or topic."""

    def validate(self, max_pixels: int = MAX_PIXELS) -> None:
        """Check everything, the picture's decoding included.

        Raises:
            InvalidExample: with the first reason found.
        """
        self._check_types()
        for name in ("id", "dataset", "split", "question"):
            if not getattr(self, name).strip():
                raise InvalidExample(f"no {name}")
        if len(self.choices) < 2:
            raise InvalidExample(f"fewer than 2 choices: {len(self.choices)}")
        if len(self.choices) > MAX_CHOICES:
            raise InvalidExample(f"more than {MAX_CHOICES} choices: {len(self.choices)}")
        if not all(choice.strip() for choice in self.choices):
            raise InvalidExample("an empty choice")
        if not 0 <= self.answer < len(self.choices):
            raise InvalidExample(f"answer outside the choices: {self.answer} of {len(self.choices)}")
        if (size := len(self.to_json())) > MAX_RECORD:
            raise InvalidExample(f"texts too long: {size} bytes")
        if self.image is not None:
            check_image(self.image, max_pixels)

    def _check_types(self) -> None:
        if type(self.answer) is not int:  # a bool is an int to isinstance
            raise InvalidExample(f"answer not a whole number: {self.answer!r}")
        if not isinstance(self.image, bytes | None):
            raise InvalidExample(f"image not bytes: {type(self.image).__name__}")
        if not isinstance(self.choices, tuple) or not isinstance(self.fields, dict):
            raise InvalidExample("choices must be a tuple and fields a dict")
        for kind, detail, text in self._texts():
            if not isinstance(text, str):
                raise InvalidExample(f"{kind} not text: {detail}{type(text).__name__}")
            if not _is_unicode(text):
                raise InvalidExample(f"{kind} not valid Unicode: {detail}{text!r}")
            if "\0" in text:
                raise InvalidExample(f"{kind} holds a NUL character: {detail}{text!r}")

    def _texts(self) -> Iterator[tuple[str, str, Any]]:
        """Every text with what it is, and which one of them."""
        for name in _TEXTS:
            yield name, "", getattr(self, name)
        for number, choice in enumerate(self.choices):
            yield "a choice", f"{number}, ", choice
        for name, value in self.fields.items():
            yield "the name of a field", "", name
            yield "a field", f"{name!r}, ", value

    def to_record(self) -> dict[str, Any]:
        """The content of `KEY.json`: everything but the picture."""
        texts = {name: getattr(self, name) for name in _TEXTS}
        return texts | {"answer": self.answer, "choices": list(self.choices), "fields": dict(self.fields)}

    @classmethod
    def from_record(cls, record: dict[str, Any], image: bytes | None) -> Example:
        """The inverse of `to_record`.

        Raises:
            InvalidExample: keys are missing or unknown, or the choices no list.
        """
        if not isinstance(record, dict) or record.keys() != RECORD_KEYS:
            raise InvalidExample(f"the record's keys are not {', '.join(sorted(RECORD_KEYS))}")
        if not isinstance(record["choices"], list):
            raise InvalidExample("choices is no list")
        return cls(**record | {"choices": tuple(record["choices"])}, image=image)

    def to_json(self) -> bytes:
        """`to_record` as canonical JSON in UTF-8: equal Examples give equal bytes."""
        text = json.dumps(self.to_record(), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return text.encode()

    def content_hash(self) -> bytes:
        """Digest of `HASH_BYTES` bytes of the two members' content."""
        return content_hash(self.to_json(), self.image or b"")


_TEXTS = ("id", "dataset", "split", "question", "rationale", "context")
RECORD_KEYS = {*_TEXTS, "answer", "choices", "fields"}


def content_hash(json_member: bytes, image_member: bytes) -> bytes:
    """Digest of an Example's two members as they lie in a tar (`image_member` empty for a text-only one)."""
    return hashlib.blake2b(json_member + image_member, digest_size=HASH_BYTES).digest()


def question_hash(record: dict[str, Any], image_member: bytes) -> bytes:
    """Digest of what is asked, whatever its id, rationale or answer: two Examples with equal ones are duplicates.

    That is the question and the picture's bytes; without a picture also the context and the choices, because many
    text-only questions share their wording ("Which of these is a complete sentence?").
    """
    rest = [] if image_member else [record["context"], record["choices"]]
    asked = json.dumps([record["question"], *rest], ensure_ascii=False).encode()
    return hashlib.blake2b(asked + image_member, digest_size=HASH_BYTES).digest()


def image_extension(image: bytes) -> str:
    """One of `IMAGE_EXTENSIONS`, by the leading bytes.

    Raises:
        InvalidExample: none of them fits.
    """
    if image.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        return "webp"
    if image.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if image.startswith(b"BM"):
        return "bmp"
    raise InvalidExample(f"unknown image format: none of {', '.join(IMAGE_EXTENSIONS)}")


def image_size(image: bytes) -> tuple[int, int]:
    """(width, height) in pixels as the picture is meant to be seen, i.e. after its EXIF orientation.

    Raises:
        InvalidExample: as `open_picture`, as far as the head of the file tells.
    """
    with _decoding(image) as picture:
        width, height = picture.size
        return (height, width) if _orientation(picture) in (5, 6, 7, 8) else (width, height)


def check_image(image: bytes, max_pixels: int = MAX_PIXELS) -> None:
    """Decode the whole picture once.

    Raises:
        InvalidExample: as `open_picture`.
    """
    open_picture(image, max_pixels)


def open_picture(image: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The decoded picture, turned as its EXIF says, in the mode that it has; of an animation the first frame.

    Raises:
        InvalidExample: unknown format, too large or too narrow, built to be slow, or damaged.
    """
    with _decoding(image, max_pixels) as picture:
        picture.load()
        turn = _TURNS.get(_orientation(picture))
        return picture if turn is None else picture.transpose(turn)


@contextlib.contextmanager
def _decoding(image: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The opened picture; whatever goes wrong inside, Pillow's errors of many kinds, is an InvalidExample."""
    extension = image_extension(image)
    if len(image) > MAX_BYTES:
        raise InvalidExample(f"image too large: {len(image)} bytes")
    for mark, most in _SLOW.items():
        if extension == "jpg" and image.count(mark) > most:
            raise InvalidExample(f"image too slow to decode: {image.count(mark)} times {mark!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes that are refused here
            picture = Image.open(io.BytesIO(image), formats=[_DECODERS[extension]])
            width, height = picture.size
            if width * height > max_pixels:
                raise InvalidExample(f"image too large: {width} x {height} pixels")
            if not min(width, height) or max(width, height) > MAX_RATIO * min(width, height):
                raise InvalidExample(f"image too narrow: {width} x {height} pixels")
            yield picture
    except InvalidExample:
        raise
    except Image.DecompressionBombError as error:
        raise InvalidExample(f"image too large: {error}") from error
    except UnidentifiedImageError as error:  # whose text has a memory address
        raise InvalidExample(f"image cannot be decoded: {extension}, bad head") from error
    except Exception as error:
        raise InvalidExample(f"image cannot be decoded: {extension}, {error}") from error


_DECODERS = dict(zip(IMAGE_EXTENSIONS, ("JPEG", "PNG", "WEBP", "GIF", "BMP"), strict=True))
"""The only ones of Pillow's that may see the bytes; it has dozens, and one runs programs."""

_SLOW = {b"\xff\xda": 100, b"Exif\0\0": 1000}
"""Bytes of which a JPEG has few (scans, metadata): one with 10,000 scans is small and takes minutes."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""By EXIF orientation, what makes a picture upright."""


def _orientation(picture: Image.Image) -> Any:
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata around a sound picture
        return 1


def shortened(text: str, most: int = 300) -> str:
    """The beginning of a text that is quoted from the data."""
    return text if len(text) <= most else f"{text[:most]}..."


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True
