"""What is Qwen2.5-VL's own: windows in its vision tower, positions and files as transformers has them, LoRA's scope."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data_prep.errors import UserError
from pipeline.backbones.qwen2_5_vl import Qwen25VL, Qwen25VLProcessor
from pipeline.backbones.qwen2_vl import Qwen2VL
from pipeline.config import ScratchConfig
from pipeline.model import lora_scope
from pipeline.prompt import PromptConfig, RowBuilder
from tests.pipeline.examples import make_example
from tests.pipeline.tiny import rope_index, tiny_models

SCRATCH = ScratchConfig(hidden_size=64, intermediate_size=96, layers=2, heads=2, kv_heads=1, vision_layers=2)


@pytest.fixture(scope="module")
def processor(model_folder: Path) -> Qwen25VLProcessor:
    return Qwen25VLProcessor(model_folder)


@pytest.mark.parametrize("grids", [[], [(1, 4, 4)], [(1, 2, 8), (1, 6, 4)]], ids=["none", "one", "two"])
def test_positions_are_its_own(processor: Qwen25VLProcessor, grids: list[tuple[int, int, int]]) -> None:
    """An image's time axis does not count seconds, as a video's does."""
    _, stock = tiny_models("qwen2_5_vl")
    ids = processor.prompt_ids("[Question]:{", "Which fruit is it?}", grids)
    expected = rope_index(stock, torch.tensor(ids) == processor.image_token_id, grids)
    assert processor.positions(ids, grids).tolist() == expected.tolist()


def test_lora_leaves_the_vision_tower_alone() -> None:
    """Its MLP has projections of the same names."""
    backbone, _ = tiny_models("qwen2_5_vl")
    names = [name for name, _ in backbone.core.named_modules()]
    assert any(name.startswith("model.visual.") and name.endswith(".gate_proj") for name in names)
    scope = re.compile(lora_scope("qwen2_5_vl", ["q_proj", "gate_proj", "up_proj", "down_proj"]))
    adapted = [name for name in names if scope.fullmatch(name)]
    assert len(adapted) == 3 * 4 and all(name.startswith("model.language_model.layers.") for name in adapted)


def test_windows_of_the_vision_tower() -> None:
    """A first layer of windows: a patch of one window changes nothing in another; the layer of full attention does."""
    backbone, _ = tiny_models("qwen2_5_vl")
    pixels = torch.randn(4 * 4 * 4, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    changed = pixels.clone()
    changed[0] += 1
    grid, moved = torch.tensor([[1, 8, 8]]), {}
    for full in ([0, 1], []):
        backbone.vision.fullatt_block_indexes = full
        with torch.no_grad():
            a, b = (backbone.vision(p, grid).pooler_output for p in (pixels, changed))
        moved[bool(full)] = (a != b).any(1).view(4, 4)
    assert moved[True].all()
    assert moved[False].nonzero().max() == 1, "more than the first window of 2 x 2 columns"


def test_a_model_from_scratch_loads_again(model_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    made = Qwen25VL.create(SCRATCH, tokenizer, tmp_path)
    loaded = Qwen25VL.load(tmp_path, torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(made.parameters(), loaded.parameters(), strict=True))
    assert loaded.config.vision_config.window_size == 112
    tokenizer.save_pretrained(tmp_path)
    row = RowBuilder(Qwen25VL.processor(tmp_path, PromptConfig()), PromptConfig(), 2).prompt_row(
        make_example(), "k", 0, 1
    )
    assert row.image_grid == [(1, 6, 4)]


def test_the_two_families_are_told_apart(model_folder: Path, tmp_path: Path) -> None:
    Qwen25VL.create(SCRATCH, AutoTokenizer.from_pretrained(model_folder), tmp_path)
    with pytest.raises(UserError, match="is a qwen2_5_vl model, not qwen2_vl"):
        Qwen2VL.load(tmp_path, torch.float32)


def test_saved_processor_is_one_of_transformers(processor: Qwen25VLProcessor, tmp_path: Path) -> None:
    processor.save(tmp_path)
    names = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (names["image_processor_type"], names["processor_class"]) == ("Qwen2VLImageProcessor", "Qwen2_5_VLProcessor")
    image = Image.new("RGB", (70, 90), "red")
    loaded = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)(images=[image], return_tensors="np")
    assert (loaded["pixel_values"] == processor.image(image)[0]).all()
