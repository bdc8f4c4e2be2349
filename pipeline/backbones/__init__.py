"""Vision-language models behind one interface: each file holds all that is one family's own."""

from __future__ import annotations

from pipeline.backbones.qwen2_vl import Qwen2VL

BACKBONES = {"qwen2_vl": Qwen2VL}
