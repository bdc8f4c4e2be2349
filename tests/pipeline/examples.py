"""Pictures and questions made by code."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from data_prep.example import Example


def picture(width: int = 56, height: int = 84, mode: str = "RGB", kind: str = "PNG", **options: Any) -> bytes:
    """A gradient, encoded."""
    image = Image.linear_gradient("L").resize((width, height)).convert(mode)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def make_example(**changes: Any) -> Example:
    """A question with a picture of 2 x 3 columns."""
    values: dict[str, Any] = {
        "id": "q1", "dataset": "own", "split": "train", "question": "Which fruit is it?",
        "choices": ("a fig", "a pear"), "answer": 1, "image": picture(),
        "rationale": "It is green. It has a stem. Only a pear has both.",
    }  # fmt: skip
    return Example(**values | changes)
