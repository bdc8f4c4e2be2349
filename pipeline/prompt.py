"""Example -> token ids: the prompt as the backbone puts it, then the steps that remain and the answer.

Every piece (question, each step, answer) is tokenised on its own, as the released code does, so that removing a step
changes no other token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from data_prep.example import Example, InvalidExample, open_picture
from pipeline.data.batch import Row, RowFormat

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Grid = tuple[int, int, int]
"""Cells of an image in time, height, width, of which `RowFormat.merge` a side are an image column"""
ANSWER = "Therefore, the answer is "
LATENT_TOKEN = "<|latent|>"
MARKERS = ("<|start-latent|>", "<|end-latent|>")
"""Tokens around the latent steps, where `markers` asks for them"""


class PromptConfig(BaseModel):
    """How an example is written down."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    answer: Literal["letter", "index"] = "letter"
    """The answer as a letter (M3CoT) or as the 0-based index of the choice (ScienceQA)."""
    context: bool = False
    """Put the context or hint in front of the question (the published prompts leave it out)."""
    asked: Literal["as_trained", "released"] = "as_trained"
    """How a model is asked for an answer: with the prompt it was trained on, or with the released code's other one."""
    markers: bool = False
    """Put a token in front of the latent steps and one behind them (Coconut); with LoRA they are not trained."""
    image_size: int | None = Field(None, ge=28)
    """Resize every image to a square of so many pixels (published: 280); none keeps its shape."""
    max_pixels: int | None = Field(None, ge=28 * 28)
    """Most pixels of an image that keeps its shape; none: the image processor's own limit."""
    max_tokens: int = Field(3400, ge=16)
    """Most columns of a final sequence (published: 3400)."""
    overlong: Literal["drop_steps", "skip"] = "drop_steps"
    """Rows above the limit lose trailing steps, or are skipped; image, question and answer are never cut."""


PROMPTS: dict[str, dict[str, Any]] = {
    "default": {"context": False, "asked": "as_trained"},
    "released": {"context": False, "asked": "released"},
    "context": {"context": True, "asked": "as_trained"},
}
"""Values of the commands' option --prompt, and what they set."""


@dataclass(frozen=True)
class Layout:
    """What a backbone's prompts write around a question's choices."""

    option: str
    """In front of a choice; {} is its letter"""
    cue: str
    """At the end"""


class Processor(Protocol):
    """What row building needs of a backbone's processor; see `pipeline.backbones`."""

    tokenizer: Any
    """transformers' own"""

    @property
    def row_format(self) -> RowFormat: ...

    @property
    def eos_id(self) -> int: ...

    def text_ids(self, text: str) -> list[int]: ...

    def prompt_ids(self, opening: str, rest: str, grids: Sequence[Grid]) -> list[int]:
        """Ids of the whole prompt, its images where the backbone has them: before the text, or behind its opening."""
        ...

    def released_ids(self, opening: str, rest: str, grids: Sequence[Grid]) -> tuple[list[int], list[int]]:
        """Ids as the released code asks for an answer, and those that it puts behind the latent steps."""
        ...

    TRAINED: Layout
    """Of the published training prompt"""
    RELEASED: Layout
    """Of the released code's prompt for answers"""

    def image(self, image: Image.Image) -> tuple[np.ndarray, Grid]: ...

    def image_columns(self, width: int, height: int) -> int: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def positions(self, ids: Sequence[int], grids: Sequence[Grid]) -> np.ndarray: ...


class UnusableSample(ValueError):
    """A sample that cannot become a row; the message is the reason."""


class OverlongSample(UnusableSample):
    """A sound sample that does not fit `max_tokens`."""


def question_text(example: Example, layout: Layout, context: bool = False) -> tuple[str, str]:
    """A prompt's text up to the question's first word, and the rest.  Braces are literal."""
    options = "\n".join(f"{layout.option.format(LETTERS[i])}{{{choice}}}" for i, choice in enumerate(example.choices))
    before = f"[Context]:{{{example.context}}}\n" if context and example.context else ""
    return f"{before}[Question]:{{", f"{example.question}}}\n[Options]:\n{options}{layout.cue}"


def answer_label(example: Example, style: str) -> str:
    """What the answer sentence ends in: "B" or "1"."""
    return LETTERS[example.answer] if style == "letter" else str(example.answer)


def check_num_patches(image_columns: int, num_patches: int) -> None:
    """Raise UnusableSample where a latent step asks for more patches than the image has at all."""
    if image_columns < num_patches:
        raise UnusableSample(f"{num_patches} patches a step (latent.num_patches) of an image that has {image_columns}")


def open_image(data: bytes) -> Image.Image:
    """Decoded RGB image, turned as its EXIF says, on white where it is transparent.

    Raises UnusableSample for bytes that are not one.
    """
    try:
        return _to_rgb(open_picture(data))
    except InvalidExample as error:
        raise UnusableSample(str(error)) from error
    except Exception as error:  # of a mode that cannot be converted
        raise UnusableSample(f"image cannot be decoded: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """What a viewer shows.  PIL's own conversion cuts deep grey values off at 255 and ignores transparency."""
    if image.mode.startswith(("I", "F")):
        image = _to_eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Deep grey as 8-bit grey: integers count to 65535, floats to the first of 1, 255 and 65535 that holds them all."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    fits = [white for white in (1, 255) if values.max() <= white] if image.mode == "F" else []
    grey = np.rint(np.clip(values / (fits or [65535])[0], 0, 1) * 255).astype(np.uint8)
    if "transparency" in image.info:  # the one value that stands for "nothing here"
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


class RowBuilder:
    """Example -> Row, for one processor and set of options."""

    def __init__(self, processor: Processor, config: PromptConfig, num_patches: int | None) -> None:
        """num_patches: K of the latent steps; 0 where none takes any, None where one takes all."""
        self.processor, self.config, self.num_patches = processor, config, num_patches

    def question(self, example: Example, *, answer: bool = False) -> tuple[str, str]:
        """The question's text as the model reads it, its opening and the rest; answer: where it is asked for one."""
        released = answer and self.config.asked == "released"
        layout = self.processor.RELEASED if released else self.processor.TRAINED
        return question_text(example, layout, self.config.context)

    def prompt_row(self, example: Example, key: str, row_id: int, latents: int, *, answer: bool = True) -> Row:
        """The question alone, ready for `latents` latent steps; answer: as `prompt.asked` says, else as in training.

        Raises UnusableSample.
        """
        if len(example.choices) > len(LETTERS):
            raise UnusableSample(f"{len(example.choices)} choices, more than there are letters")
        pixels: np.ndarray | None = None
        grids: list[Grid] = []
        if example.image is not None:
            try:
                pixels, grid = self.processor.image(open_image(example.image))
            except UnusableSample:
                raise
            except Exception as error:  # no shape for the model, no memory, whatever its library makes of it
                raise UnusableSample(f"image: {str(error) or type(error).__name__}") from error
            grids = [grid]
        text, given = self.question(example, answer=answer), list[int]()
        if answer and self.config.asked == "released":
            ids, given = self.processor.released_ids(*text, grids)
        else:
            ids = self.processor.prompt_ids(*text, grids)
        if latents and grids:
            check_num_patches(self._image_columns(grids), self.num_patches or 0)
        if self.config.markers:
            opening, closing = self.processor.tokenizer.convert_tokens_to_ids(MARKERS)
            ids, given = [*ids, opening], [closing, *given]
        positions = self.processor.positions(ids, grids)
        return Row(key, row_id, ids, positions, given, latents, pixels, grids, given=len(given))

    def row(self, example: Example, key: str, row_id: int, latents: int, steps: list[str]) -> Row:
        """Question, `latents` latent steps, remaining `steps`, answer and eos.

        Raises OverlongSample where it stays longer than `max_tokens` without its trailing steps.
        """
        row = self.prompt_row(example, key, row_id, latents, answer=False)
        pieces = [self.processor.text_ids(step + "\n") for step in steps]
        answer = self.processor.text_ids(ANSWER + answer_label(example, self.config.answer)) + [self.processor.eos_id]
        all_patches = self._image_columns(row.image_grid)
        patches = all_patches if self.num_patches is None or not all_patches else self.num_patches
        taken = len(row.prompt_ids) + latents * (patches + 1) + row.given + len(answer)
        excess = taken + sum(map(len, pieces)) - self.config.max_tokens
        while excess > 0 and pieces and self.config.overlong == "drop_steps":
            excess -= len(pieces.pop())
        if excess > 0:
            raise OverlongSample(f"{excess} tokens over the limit of {self.config.max_tokens} (prompt.max_tokens)")
        row.dropped_steps = len(steps) - len(pieces)
        row.target_ids = [*row.target_ids, *(token for piece in pieces for token in piece), *answer]
        return row

    def _image_columns(self, grids: Sequence[Grid]) -> int:
        return sum(t * h * w for t, h, w in grids) // self.processor.row_format.merge**2
