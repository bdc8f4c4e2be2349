"""Qwen2-VL through transformers' own classes, and nothing else of the pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Qwen2VLForConditionalGeneration

from pipeline.backbones.qwen import QwenProcessor, QwenVL

if TYPE_CHECKING:
    from pipeline.config import ScratchConfig


class Qwen2VLProcessor(QwenProcessor):
    PROCESSOR_CLASS = "Qwen2VLProcessor"


class Qwen2VL(QwenVL):
    """A vision tower of full attention."""

    MODEL_TYPE = "qwen2_vl"
    MODEL = Qwen2VLForConditionalGeneration
    PROCESSOR = Qwen2VLProcessor

    @staticmethod
    def vision_config(scratch: ScratchConfig) -> dict[str, Any]:
        return {
            "depth": scratch.vision_layers,
            "embed_dim": scratch.vision_size,
            "num_heads": scratch.vision_heads,
            "mlp_ratio": 2,
            "hidden_size": scratch.hidden_size,
            "initializer_range": scratch.initializer_range,
        }
