"""Qwen2.5-VL through transformers' own classes, and nothing else of the pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Qwen2_5_VLForConditionalGeneration

from pipeline.backbones.qwen import QwenProcessor, QwenVL

if TYPE_CHECKING:
    from pipeline.config import ScratchConfig


class Qwen25VLProcessor(QwenProcessor):
    PROCESSOR_CLASS = "Qwen2_5_VLProcessor"


class Qwen25VL(QwenVL):
    """A vision tower whose layers attend within windows, but for a few of full attention."""

    MODEL_TYPE = "qwen2_5_vl"
    MODEL = Qwen2_5_VLForConditionalGeneration
    PROCESSOR = Qwen25VLProcessor

    @staticmethod
    def vision_config(scratch: ScratchConfig) -> dict[str, Any]:
        return {
            "depth": scratch.vision_layers,
            "hidden_size": scratch.vision_size,
            "intermediate_size": 2 * scratch.vision_size,
            "num_heads": scratch.vision_heads,
            "out_hidden_size": scratch.hidden_size,
            "fullatt_block_indexes": [scratch.vision_layers - 1],
            "initializer_range": scratch.initializer_range,
        }
