"""A tiny tokenizer and image processor, trained on the words that the tests use."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data_prep.tokenizer import train_tokenizer
from pipeline.backbones.qwen2_vl import Qwen2VLProcessor

TEXTS = [
    "[Context]:{A hint}\n[Question]:{Which fruit is it?}\n[Options]:\n(A).{a fig}\n(B).{a pear}\nAnswer:\n",
    "It is green. It has a stem. Only a pear has both.",
    "Therefore, the answer is B",
    "assistant user assistant",
] * 20


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and image processor as they lie beside a model; one column for each 28 x 28 pixels."""
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(TEXTS, folder, 520)
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 100}
    Qwen2VLImageProcessorPil(size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def processor(model_folder: Path) -> Qwen2VLProcessor:
    return Qwen2VLProcessor(model_folder)
