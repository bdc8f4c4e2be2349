"""What can be wrong with bytes and with values, drawn from a seeded generator."""

from __future__ import annotations

import json
import random
from typing import Any

ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, 2, -1, 7, 1.0, 1.5, 10**30, float("nan"), float("inf"), "", " ", "A", "b", "Z", "AB", "1",
    "yes", "\0", "a\0b", "\ud800", "\ufeffx", "x" * 100_000, "\U0001f600\u202e\u0301" * 50, "One. " * 500,
    "<|image_pad|>", "<|latent|>", "{" * 50, "\r\n", [],
    ["one"], ["a", "b"], ["a", None], ["a", ""], ["a", 5], ["a"] * 26, ["a"] * 27,
    [["a"], ["b"]], {}, {"a": "b"}, {"bytes": None, "path": None},
]  # fmt: skip
"""In place of a key's value."""

ODD_JSON = [
    "NaN", "-Infinity", "1e400", "-1e999", "9" * 5000, "01", "'x'", '"\\ud800"', '"\\u0000"', '"\\x"', '"', "tru", "",
    "[" * 5000, "[" * 5000 + "]" * 5000, '{"a":' * 2000, '{"a": 1, "a": 2}', '"x", "id": "again"', "1}{", "\ufeff1",
]  # fmt: skip
"""In place of a value's text."""

_WORDS = [b"\0", b"\0\0\0\0", b"\xff", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80", b"\n", b"\r\n",
          b'"', b"\\", b"\xef\xbb\xbf", b"\xc0\x80", b"\xed\xa0\x80", b"7777777777\0"]  # fmt: skip


def mutated(random: random.Random, content: bytes) -> bytes:
    """The bytes with one to four changes."""
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        at = random.randrange(len(content) + 1)
        size = min(random.choice([1, 1, 2, 4, 16, 512, 600]), len(content) - at)
        content = random.choice(_CHANGES)(random, content, at, size)
    return content


def _flip(random: random.Random, content: bytes, at: int, size: int) -> bytes:
    changed = bytearray(content)
    for place in range(at, at + min(size, 4)):
        changed[place] ^= 1 << random.randrange(8)
    return bytes(changed)


_CHANGES = [
    _flip,
    _flip,
    lambda random, content, at, size: content[:at] + random.randbytes(size) + content[at + size :],
    lambda random, content, at, size: content[:at] + bytes(size) + content[at + size :],
    lambda random, content, at, size: content[:at] + content[at + size :],
    lambda random, content, at, size: content[:at] + random.randbytes(size) + content[at:],
    lambda random, content, at, size: content[: at + size] + content[at:],
    lambda random, content, at, size: content[:at] + random.choice(_WORDS) + content[at:],
    lambda random, content, at, size: content[:at] + (word := random.choice(_WORDS)) + content[at + len(word) :],
    lambda random, content, at, size: content[:at],
]


def odd_json(random: random.Random, content: dict[str, Any]) -> str:
    """An object with one value that is odd, one key too few or too many, or a text that is none."""
    name = random.choice([*content, "extra"])
    if random.random() < 0.3:
        mark = "the place of a value"
        text = json.dumps(content | {name: mark})
        return text.replace(json.dumps(mark), random.choice(ODD_JSON))
    if random.random() < 0.1:
        return json.dumps({key: value for key, value in content.items() if key != name})
    return json.dumps(content | {name: random.choice(ODD_VALUES)}, ensure_ascii=random.random() < 0.8)
