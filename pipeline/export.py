"""Models in Hugging Face form: weights as safetensors, tokenizer, image processor, and how we trained them.

An export loads with transformers alone (without torchvision); `latent_config.json`, written last, holds what decoding
with latent steps needs.  A LoRA run is exported merged, or as the adapter beside its base's name.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import logging as transformers_logging

from data_prep.errors import UserError
from pipeline.backbones import BACKBONES
from pipeline.config import LoraConfig, RunConfig, load_json
from pipeline.latent.forward import LatentConfig
from pipeline.model import LatentModel
from pipeline.prepare import data_folder
from pipeline.prompt import PromptConfig, RowBuilder

FORMAT = 1
FILE = "latent_config.json"


@dataclass(frozen=True)
class ExportInfo:
    """What `latent_config.json` says."""

    backbone: str
    latent: LatentConfig
    prompt: PromptConfig
    latents: int
    """n: latent steps to take before the answer"""
    stage: int
    groups: int
    adapter_of: str | None
    """Base model's folder or hub id, where the weights are an adapter"""
    revision: str | None
    """Commit or tag of the base on the hub"""
    data: str
    """Shard folder it was trained on"""

    @classmethod
    def read(cls, folder: Path) -> ExportInfo:
        """Raises UserError where `folder` is no export of this pipeline."""
        if not (folder / FILE).is_file():
            raise UserError(f"{folder} is not an export of this pipeline: it has no {FILE}")
        value = load_json(folder / FILE, "export")
        if value.pop("format", None) != FORMAT:
            raise UserError(f"{folder / FILE} is not of format {FORMAT}")
        try:
            latent, prompt = LatentConfig(**value.pop("latent")), PromptConfig(**value.pop("prompt"))
            info = cls(latent=latent, prompt=prompt, **value)
            BACKBONES[info.backbone]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / FILE} is damaged: {' '.join(str(error).split())}") from None
        return info

    def write(self, folder: Path) -> None:
        value = {**vars(self), "latent": self.latent.model_dump(), "prompt": self.prompt.model_dump()}
        (folder / FILE).write_text(json.dumps({"format": FORMAT, **value}, indent=1) + "\n")


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
    processor: Any,
    config: RunConfig,
    stage: int,
    folder: Path,
    base: Path | str,
) -> None:
    """Write the export of a stage from whole weights (`engine.gathered_weights`); replaces an earlier one."""
    vlm, lora = model.backbone.vlm, config.model.lora
    writing = folder.with_name(folder.name + ".writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    as_adapter = lora is not None and lora.export == "adapter"
    if as_adapter:
        vlm.save_pretrained(writing, state_dict=weights, safe_serialization=True)
    else:
        model.backbone.core.save_pretrained(writing, state_dict=merge_lora(weights, lora) if lora else weights)
    processor.save(writing)
    ExportInfo(
        backbone=config.model.backbone,
        latent=config.latent,
        prompt=config.prompt,
        latents=config.curriculum.stages[stage].latents,
        stage=stage,
        groups=config.curriculum.groups,
        adapter_of=(str(Path(base).resolve()) if Path(base).is_dir() else str(base)) if as_adapter else None,
        revision=config.model.revision if as_adapter else None,
        data=str(data_folder(config).resolve()),
    ).write(writing)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(writing, folder)


@dataclass
class LoadedModel:
    """An export ready to answer."""

    info: ExportInfo
    model: LatentModel
    processor: Any
    device: torch.device

    @property
    def builder(self) -> RowBuilder:
        return RowBuilder(self.processor, self.info.prompt, self.info.latent.patches_taken)


def load_export(folder: Path, dtype: torch.dtype | None = None) -> LoadedModel:
    """Load an export for decoding, on the GPU where there is one.

    Raises UserError where `folder` is not one of ours or lacks something.
    """
    info = ExportInfo.read(folder)
    family = BACKBONES[info.backbone]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    transformers_logging.disable_progress_bar()
    try:
        vlm = family.load(info.adapter_of or folder, dtype, info.revision)
        processor = family.processor(folder, info.prompt)
        if info.adapter_of:
            from peft import PeftModel

            if len(processor.tokenizer) > vlm.get_input_embeddings().num_embeddings:
                vlm.resize_token_embeddings(len(processor.tokenizer), pad_to_multiple_of=64, mean_resizing=False)
            vlm = PeftModel.from_pretrained(vlm, folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"export {folder} cannot be loaded: {' '.join(str(error).split())}") from None
    model = LatentModel(family(vlm), info.latent).eval().to(device)
    return LoadedModel(info, model, processor, device)
