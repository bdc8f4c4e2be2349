"""Vision-language models behind one interface: each file holds all that is one family's own."""

from __future__ import annotations

from typing import Any

from pipeline.backbones.chameleon import Chameleon
from pipeline.backbones.qwen2_5_vl import Qwen25VL
from pipeline.backbones.qwen2_vl import Qwen2VL

BACKBONES: dict[str, Any] = {"qwen2_vl": Qwen2VL, "qwen2_5_vl": Qwen25VL, "chameleon": Chameleon}
