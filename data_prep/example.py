"""The one record that every source yields: a picture, a question with choices, a rationale and an answer.

In a tar an Example is two members: `KEY.json` (canonical: sorted keys, UTF-8) and, if it has a picture,
`KEY.EXT` with the picture's bytes as they were found.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, field
from typing import Any

from PIL import ExifTags, Image

MAX_PIXELS = 64 * 2**20
"""Pictures with more pixels are refused before they are decoded."""

IMAGE_EXTENSIONS = ("jpg", "png", "webp", "gif", "bmp")
"""What a picture's bytes may be; the index stores 1 + the position in this tuple, 0 for no picture."""

HASH_BYTES = 16
"""Length of a content hash."""


class InvalidExample(ValueError):
    """An Example or its stored form breaks a rule; the message is the reason, as "KIND" or "KIND: DETAIL"."""


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
    """At least two."""
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
        if not all(choice.strip() for choice in self.choices):
            raise InvalidExample("an empty choice")
        if not 0 <= self.answer < len(self.choices):
            raise InvalidExample(f"answer outside the choices: {self.answer} of {len(self.choices)}")
        if self.image is not None:
            check_image(self.image, max_pixels)

    def _check_types(self) -> None:
        if type(self.answer) is not int:  # a bool is an int to isinstance
            raise InvalidExample(f"answer not a whole number: {self.answer!r}")
        if not isinstance(self.image, bytes | None):
            raise InvalidExample(f"image not bytes: {type(self.image).__name__}")
        if not isinstance(self.choices, tuple) or not isinstance(self.fields, dict):
            raise InvalidExample("choices must be a tuple and fields a dict")
        texts = {name: getattr(self, name) for name in _TEXTS}
        texts |= {f"choice {i}": choice for i, choice in enumerate(self.choices)}
        texts |= {f"field {name!r}": value for name, value in self.fields.items()}
        texts |= {f"name of field {i}": name for i, name in enumerate(self.fields)}
        for name, text in texts.items():
            if not isinstance(text, str):
                raise InvalidExample(f"{name} not text: {type(text).__name__}")
            if not _is_unicode(text):
                raise InvalidExample(f"{name} not valid Unicode")

    def to_record(self) -> dict[str, Any]:
        """The content of `KEY.json`: everything but the picture."""
        texts = {name: getattr(self, name) for name in _TEXTS}
        return texts | {"answer": self.answer, "choices": list(self.choices), "fields": dict(self.fields)}

    @classmethod
    def from_record(cls, record: dict[str, Any], image: bytes | None) -> Example:
        """The inverse of `to_record`.

        Raises:
            InvalidExample: keys are missing or unknown.
        """
        if not isinstance(record, dict) or record.keys() != _RECORD_KEYS:
            raise InvalidExample(f"the record's keys are not {', '.join(sorted(_RECORD_KEYS))}")
        return cls(**record | {"choices": tuple(record["choices"])}, image=image)

    def to_json(self) -> bytes:
        """`to_record` as canonical JSON in UTF-8: equal Examples give equal bytes."""
        text = json.dumps(self.to_record(), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return text.encode()

    def content_hash(self) -> bytes:
        """Digest of `HASH_BYTES` bytes of the two members' content."""
        return content_hash(self.to_json(), self.image or b"")


_TEXTS = ("id", "dataset", "split", "question", "rationale", "context")
_RECORD_KEYS = {*_TEXTS, "answer", "choices", "fields"}


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
    """(width, height) in pixels as the picture is meant to be seen, i.e. after its EXIF orientation."""
    with Image.open(io.BytesIO(image)) as picture:
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        width, height = picture.size
    return (height, width) if turned else (width, height)


def check_image(image: bytes, max_pixels: int = MAX_PIXELS) -> None:
    """Decode the whole picture once.

    Raises:
        InvalidExample: unknown format, too many pixels, or damaged.
    """
    extension = image_extension(image)
    try:
        with Image.open(io.BytesIO(image)) as picture:
            if picture.width * picture.height > max_pixels:
                raise InvalidExample(f"image too large: {picture.width} x {picture.height} pixels")
            picture.load()
    except InvalidExample:
        raise
    except Exception as error:  # damaged bytes make PIL's decoders raise errors of many kinds
        raise InvalidExample(f"image cannot be decoded: {extension}, {error}") from error


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True
