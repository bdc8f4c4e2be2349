"""The family's own parts: image columns, positions and processor files against transformers' own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pipeline.backbones.qwen2_vl import Qwen2VLProcessor
from pipeline.prompt import PromptConfig, RowBuilder
from tests.pipeline.examples import make_example
from tests.pipeline.tiny import rope_index, tiny_config, tiny_models


@pytest.fixture(scope="module")
def stock() -> Qwen2VLForConditionalGeneration:
    return Qwen2VLForConditionalGeneration(tiny_config())


# ---- positions --------------------------------------------------------------------------------
def ids_of(processor: Qwen2VLProcessor, texts: list[int], images: list[tuple[int, int]]) -> list[int]:
    """So many words, image, so many words, image, ...; images by height and width in columns."""
    ids = []
    for count, (height, width) in zip(texts, [*images, (0, 0)], strict=True):
        ids += [3] * count + [processor.image_token_id] * (height * width)
    return ids


SIDE = st.integers(1, 7)


@given(st.integers(1, 9), st.lists(st.tuples(SIDE, SIDE, st.integers(1, 9)), max_size=4))
def test_positions_equal_those_of_transformers(
    processor: Qwen2VLProcessor,
    stock: Qwen2VLForConditionalGeneration,
    first: int,
    parts: list[tuple[int, int, int]],
) -> None:
    ids = ids_of(processor, [first, *(text for _, _, text in parts)], [(h, w) for h, w, _ in parts])
    grids = [(1, 2 * h, 2 * w) for h, w, _ in parts]
    expected = rope_index(stock, torch.tensor(ids) == processor.image_token_id, grids)
    assert processor.positions(ids, grids).tolist() == expected.tolist()


def test_positions_by_hand(processor: Qwen2VLProcessor) -> None:
    """Two words, an image of 2 x 3 columns, a word: text goes on behind the image's longer side."""
    positions = processor.positions(ids_of(processor, [2, 1], [(2, 3)]), [(1, 4, 6)])
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]


@pytest.mark.parametrize("grids", [[], [(1, 4, 4)], [(1, 2, 8), (1, 6, 4)]], ids=["none", "one", "two"])
def test_positions_of_whole_prompts(
    processor: Qwen2VLProcessor, stock: Qwen2VLForConditionalGeneration, grids: list[tuple[int, int, int]]
) -> None:
    ids = processor.prompt_ids("[Question]:{", "Which fruit is it?}", grids)
    assert ids.count(processor.image_token_id) == sum(h * w // 4 for _, h, w in grids)
    expected = rope_index(stock, torch.tensor(ids) == processor.image_token_id, grids)
    assert processor.positions(ids, grids).tolist() == expected.tolist()


def test_positions_of_a_row(processor: Qwen2VLProcessor, stock: Qwen2VLForConditionalGeneration) -> None:
    row = RowBuilder(processor, PromptConfig(), 2).prompt_row(make_example(), "k", 0, 1)
    expected = rope_index(stock, torch.tensor(row.prompt_ids) == processor.image_token_id, row.image_grid)
    assert row.prompt_positions.tolist() == expected.tolist()


# ---- images -----------------------------------------------------------------------------------
OPTIONS = {
    "own": {},
    "square": {"image_size": 56},
    "not-a-multiple": {"image_size": 70},
    "limited": {"max_pixels": 30_000},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@settings(max_examples=25)
@given(width=st.integers(1, 400), height=st.integers(1, 400))
def test_image_columns_are_those_of_the_image(
    model_folder: Path, options: dict[str, int], width: int, height: int
) -> None:
    """Without decoding, and refusing the same shapes."""
    processor = Qwen2VLProcessor(model_folder, **options)
    try:
        pixels, (t, h, w) = processor.image(Image.new("RGB", (width, height)))
    except ValueError:
        with pytest.raises(ValueError, match="aspect ratio"):
            processor.image_columns(width, height)
        return
    assert processor.image_columns(width, height) == t * h * w // 4
    assert pixels.shape == (t * h * w, processor.row_format.blank_shape[1]) and pixels.dtype == np.float32


def test_published_image(model_folder: Path) -> None:
    processor = Qwen2VLProcessor(model_folder, image_size=280)
    assert processor.image_columns(123, 456) == 100
    _, grid = processor.image(Image.new("RGB", (123, 456)))
    assert grid == (1, 20, 20)


def test_max_pixels_only_lowers_the_limit_above(model_folder: Path) -> None:
    large = Qwen2VLProcessor(model_folder, max_pixels=28 * 28 * 5)
    assert large.image_columns(600, 600) == 4 and large.image_columns(28, 28) == 1
    tiny = Qwen2VLProcessor(model_folder, max_pixels=28 * 28)  # below what the processor wants at least
    assert tiny.image_columns(600, 600) == tiny.image_columns(28, 28) == 1


# ---- files ------------------------------------------------------------------------------------
def test_saved_processor_gives_the_same_rows(processor: Qwen2VLProcessor, tmp_path: Path) -> None:
    processor.save(tmp_path)
    again, example = Qwen2VLProcessor(tmp_path), make_example()
    rows = [RowBuilder(p, PromptConfig(), 2).row(example, "k", 0, 1, ["It is green"]) for p in (processor, again)]
    assert rows[0].prompt_ids == rows[1].prompt_ids and rows[0].target_ids == rows[1].target_ids
    assert np.array_equal(rows[0].pixel_values, rows[1].pixel_values)
    assert again.row_format == processor.row_format and again.eos_id == processor.eos_id


def test_saved_processor_is_one_of_transformers(processor: Qwen2VLProcessor, tmp_path: Path) -> None:
    processor.save(tmp_path)
    names = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (names["image_processor_type"], names["processor_class"]) == (
        "Qwen2VLImageProcessor",
        "Qwen2VLProcessor",
    )
    image = Image.new("RGB", (70, 90), "red")
    loaded = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)(images=[image], return_tensors="np")
    assert np.array_equal(loaded["pixel_values"], processor.image(image)[0])
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which fruit is it?"}]}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert processor.prompt_ids("Which ", "fruit is it?", [(1, 2, 2)]) == expected


def test_sliding_window() -> None:
    assert tiny_models()[0].sliding_window is None
    assert tiny_models(window=5)[0].sliding_window == 5
