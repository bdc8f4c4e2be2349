"""Models in Hugging Face form: weights as safetensors, tokenizer, image processor, and how we trained them.

An export loads with transformers alone (without torchvision); `latent_config.json`, written last, holds what decoding
with latent steps needs.  A LoRA run is exported merged, or as the adapter beside its base's name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors.torch import save_file
from torch import Tensor

from data_prep.errors import UserError
from pipeline.backbones import BACKBONES
from pipeline.config import LoraConfig, RunConfig
from pipeline.latent.method import LatentConfig
from pipeline.model import LatentModel
from pipeline.prepare import data_name
from pipeline.prompt import PromptConfig
from pipeline.recipe import explain
from pipeline.registry import load_plugin
from pipeline.user_files import load_json

FORMAT = 1
FILE = "latent_config.json"
ADAPTER = "adapter_model.safetensors"
PARTS = "latent_parts.safetensors"
"""Parameters of the method's parts, where they have any"""
TOKEN_ROWS = "token_rows.safetensors"


class Converted(BaseModel):
    """Where a converted export comes from, as `pipeline.convert` needs it to go back."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: str
    """Name of the released file"""
    weights_hash: str | None = None
    """Its SHA-256"""
    base: str
    """Folder or hub id of the model that its frozen weights were compared with"""
    changed_base: bool
    """Whether other weights than the base's were taken, as --allow_changed_base says"""
    lora_r: int
    """0: the file had no LoRA"""
    lora_alpha: int
    prefix: str
    """What stood in front of every name"""
    aliases: list[str]
    """Other names of the embeddings"""


class ExportInfo(BaseModel):
    """What `latent_config.json` says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: str
    latent: LatentConfig
    prompt: PromptConfig
    latents: int = Field(ge=0)
    """n: latent steps to take before the answer"""
    stage: int = Field(ge=0)
    groups: int = Field(ge=1)
    adapter_of: str | None
    """Base model's folder or hub id, where the weights are an adapter"""
    revision: str | None
    """Commit or tag of the base on the hub"""
    base_hash: str | None = None
    """Identity of the base's weights (`prepare.base_hash`), where the weights are an adapter"""
    data: str
    """Shard folder it was trained on"""
    plugin: str | None = None
    """Name of the user's file that its method came from; answering takes it by --plugin again"""
    plugin_hash: str | None = None
    """SHA-256 of that file as it was run"""
    max_new_tokens: int = Field(512, ge=1)
    """Generated tokens of an answer at most, as `eval.max_new_tokens` said"""
    vocabulary: int | None = None
    """Rows of an adapter's embeddings, where not the base's; TOKEN_ROWS holds the last of them"""
    converted: Converted | None = None

    @classmethod
    def read(cls, folder: Path) -> ExportInfo:
        """Raises UserError where `folder` is no export of this pipeline."""
        if not (folder / FILE).is_file():
            raise UserError(f"{folder} is not an export of this pipeline: it has no {FILE}")
        value = load_json(folder / FILE, "export")
        if value.pop("format", None) != FORMAT:
            raise UserError(f"{folder / FILE} is not of format {FORMAT}")
        try:
            return cls.model_validate(value, strict=True)
        except ValidationError as error:
            needs = f" (it was trained with --plugin {value['plugin']})" if isinstance(value.get("plugin"), str) else ""
            raise UserError(
                *(f"{folder / FILE} cannot be used: {explain(problem)}{needs}" for problem in error.errors())
            ) from None

    @field_validator("backbone")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in BACKBONES:
            raise ValueError(f"expected one of {', '.join(BACKBONES)}")
        return name

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps({"format": FORMAT, **self.model_dump()}, indent=1) + "\n")


def merge_lora(weights: dict[str, Tensor], lora: LoraConfig) -> dict[str, Tensor]:
    """Plain weights of a LoRA model's: W + alpha/r B A, in fp32, under the base model's names."""
    merged = {}
    for name, weight in weights.items():
        if ".lora_" in name:
            continue
        stem = name.removeprefix("base_model.model.")
        if ".base_layer." in stem and name.endswith(".base_layer.weight"):
            a = weights[name.replace(".base_layer.weight", ".lora_A.default.weight")].float()
            b = weights[name.replace(".base_layer.weight", ".lora_B.default.weight")].float()
            weight = (weight.float() + lora.alpha / lora.r * (b @ a)).to(weight.dtype)
        merged[stem.replace(".base_layer.", ".")] = weight
    return merged


def write_export(
    model: LatentModel,
    weights: dict[str, Tensor],
    parts: dict[str, Tensor],
    processor: Any,
    config: RunConfig,
    stage: int,
    folder: Path,
    base: Path | str,
    base_hash: str,
) -> None:
    """Write the export of a stage from whole weights (`engine.gathered_weights`) to an empty or new `folder`.

    parts: parameters of the method's parts; base_hash: of the base's weights, where they are frozen.
    """
    vlm, lora = model.backbone.vlm, config.model.lora
    folder.mkdir(parents=True, exist_ok=True)
    as_adapter = lora is not None and lora.export == "adapter"
    if as_adapter:
        vlm.save_pretrained(folder, state_dict=weights, safe_serialization=True)
    else:
        core = model.backbone.core
        core._weight_conversions = None  # what loading under ZeRO-3 keeps there would save `model.` as `model.model.`
        core.save_pretrained(folder, state_dict=merge_lora(weights, lora) if lora else weights)
    if parts:
        save_file({name: weight.contiguous() for name, weight in parts.items()}, folder / PARTS)
    processor.save(folder)
    plugin = load_plugin(Path(config.plugin)) if config.plugin else None
    ExportInfo(
        backbone=config.model.backbone,
        latent=config.latent,
        prompt=config.prompt,
        latents=config.curriculum.stages[stage].latents,
        stage=stage,
        groups=config.curriculum.groups,
        adapter_of=(str(Path(base).resolve()) if Path(base).is_dir() else str(base)) if as_adapter else None,
        revision=config.model.revision if as_adapter else None,
        base_hash=base_hash if as_adapter else None,
        data=data_name(config),
        plugin=plugin.path.name if plugin else None,
        plugin_hash=plugin.sha256 if plugin else None,
        max_new_tokens=config.eval.max_new_tokens,
    ).write(folder)
