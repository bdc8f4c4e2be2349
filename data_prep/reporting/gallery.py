"""Some samples of every split as they are, and as each stage of a recipe shows them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from data_prep.example import IMAGE_EXTENSIONS, MAX_PIXELS, Example
from data_prep.reader import BadSample, ShardIndex
from data_prep.reporting.html import isolated, table, text
from data_prep.steps import SEPARATOR, merge_steps, split_steps

if TYPE_CHECKING:
    from pipeline.data.preview import Preview
    from pipeline.data.stage_measure import Seen

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SIDE = 320
"""Most pixels a side of a shown picture."""
MOST_STEPS, MOST_CHOICES, MOST_FIELDS = 30, 26, 8
"""What is shown of one sample."""


@dataclass
class Sample:
    """A sample of the gallery."""

    split: str
    key: str
    example: Example | None
    problem: str = ""
    seen: Sequence[Seen] = ()
    """At every stage; empty without a recipe"""


def pick(index: ShardIndex, number: int, seed: int, preview: Preview | None) -> list[Sample]:
    """At most `number` samples of a split, a function of its name, its size and the seed alone, in the tars' order."""
    rng = np.random.default_rng([seed, *index.split.encode()])
    picked = []
    for position in sorted(rng.choice(len(index), min(number, len(index)), replace=False).tolist()):
        key = index.key(position)
        try:
            example = index.read(position)
            seen = preview.show(example, key) if preview else []
            picked.append(Sample(index.split, key, example, seen=seen))
        except BadSample as error:
            picked.append(Sample(index.split, key, None, str(error)))
        except Exception as error:  # of many kinds: what odd records make the libraries raise
            picked.append(Sample(index.split, key, None, f"{key}: {error}"))
    return picked


def data_uri(image: bytes) -> tuple[str, int, int]:
    """A picture scaled down, in a form that goes into a page, and its own width and height.

    Raises ValueError for one that cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(image), formats=["JPEG", *map(str.upper, IMAGE_EXTENSIONS[1:])]) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} pixels")
            picture = ImageOps.exif_transpose(opened)
            size = picture.size
            if picture.mode.startswith(("I", "F")):  # deep greys: conversion would cut them off
                values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
                picture = Image.fromarray((values * (255 / max(1.0, values.max()))).clip(0, 255).astype(np.uint8))
            picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
            picture.thumbnail((SIDE, SIDE))
            out = io.BytesIO()
            # small drawings stay sharp, photographs stay small
            picture.save(out, "PNG" if max(size) <= SIDE else "WEBP", quality=80)
    except Exception as error:  # PIL's decoders raise whatever a broken file makes them raise
        raise ValueError(f"cannot be decoded: {error}") from error
    kind = "png" if max(size) <= SIDE else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}", *size


def sample_html(sample: Sample, preview: Preview | None) -> str:
    """One sample's card."""
    example = sample.example
    if example is None:
        return f'<article class="card sample"><div class="bad">{text(sample.problem)}</div></article>\n'
    shown = list(example.fields.items())[:MOST_FIELDS]
    fields = ", ".join(f"{isolated(name, 40)}: {isolated(value, 80)}" for name, value in shown)
    named = f"{isolated(example.id, 80)} · {text(sample.split)} {text(sample.key)}{' · ' if fields else ''}{fields}"
    question = f'<div class="question" dir="auto">{text(example.question, 700)}</div>'
    parts = [
        f'<div class="id">{named}</div>',
        _picture(example),
        _context(example, preview),
        question,
        _choices(example),
    ]
    return f'<article class="card sample">{"".join(parts)}{_steps(example, sample, preview)}</article>\n'


def _picture(example: Example) -> str:
    if example.image is None:
        return '<p class="soft">no picture</p>'
    try:
        uri, width, height = data_uri(example.image)
    except ValueError as error:
        return f'<p class="bad">picture {text(error, 200)}</p>'
    return (
        f'<figure><img src="{uri}" alt="" loading="lazy"><span class="unit">{width} x {height} pixels</span></figure>'
    )


def _context(example: Example, preview: Preview | None) -> str:
    left_out = preview is not None and not preview.config.prompt.context
    note = '<span class="unit">Context, not in the prompt (prompt.context):</span><br>' if left_out else ""
    return f'<div class="context" dir="auto">{note}{text(example.context, 400)}</div>' if example.context else ""


def _choices(example: Example) -> str:
    lines = []
    for i, choice in enumerate(example.choices[:MOST_CHOICES]):
        right = i == example.answer
        mark = ' <span aria-label="right answer">✓</span>' if right else ""
        lines.append(f"<li{' class=right' if right else ''}>{LETTERS[i]}. {isolated(choice, 300)}{mark}</li>")
    more = len(example.choices) - len(lines)
    return f"<ul>{''.join(lines)}{f'<li>and {more} more</li>' if more > 0 else ''}</ul>"


def _steps(example: Example, sample: Sample, preview: Preview | None) -> str:
    """The rationale's steps in their groups, and what every stage leaves of them."""
    steps = split_steps(example.rationale)
    merged = merge_steps(steps, preview.groups) if preview else steps
    groups = [group.split(SEPARATOR) for group in merged]  # no step holds a separator
    shown, left = [], MOST_STEPS
    for number, group in enumerate(groups, 1):
        told = "".join(f'<span class="step" dir="auto">{text(step, 400)}</span>' for step in group[:left])
        shown.append(f'<li><span class="chip">{number}</span><span>{told}</span></li>' if told else "")
        left = max(0, left - len(group))
    more = len(steps) - MOST_STEPS
    rest = f'<p class="soft">and {more} more steps</p>' if more > 0 else ""
    body = f'<ul class="groups">{"".join(shown)}</ul>{rest}' if steps else '<p class="soft">no rationale</p>'
    label = preview.answer(example) if preview else ""
    rows = [
        (f"stage&nbsp;{number}", _chips(seen, len(groups), label), _size(seen, preview))
        for number, seen in enumerate(sample.seen)
    ]
    return body + (table([], rows, left=2, kind="stages") if rows else "")


def _chips(seen: Seen, groups: int, label: str) -> str:
    if seen.problem:
        return f'<span class="bad">skipped: {text(seen.problem, 200)}</span>'
    latent = '<span class="chip latent" title="latent step">~</span>' * seen.latents
    kept = "".join(f'<span class="chip">{i + 1}</span>' for i in seen.kept)
    cut = "".join(f'<span class="chip gone" title="left out: too long">{i + 1}</span>'
                  for i in range(groups - seen.dropped, groups))  # fmt: skip
    untrained = "" if seen.trained else ' <span class="soft">(not trained on)</span>'
    return f'{latent}{kept}{cut}<span class="chip answer">{label}</span>{untrained}'


def _size(seen: Seen, preview: Preview | None) -> str:
    known = preview is not None and preview.builder is not None and not seen.problem
    return f'<span class="unit">{seen.columns:,} columns</span>' if known else ""
