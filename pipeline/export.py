"""Models in Hugging Face form: weights as safetensors, tokenizer, image processor, and how we trained them.

An export loads with transformers alone (without torchvision); `latent_config.json`, written last, holds what decoding
with latent steps needs.  A LoRA run is exported merged, or as the adapter beside its base's name.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging as transformers_logging

from data_prep.errors import UserError
from pipeline.backbones import BACKBONES
from pipeline.backbones.weights import incomplete
from pipeline.config import LoraConfig, RunConfig
from pipeline.latent.method import LatentConfig, LatentMethod
from pipeline.model import LatentModel, embedding_weights, set_to_mean
from pipeline.prepare import base_hash, data_name, in_a_line
from pipeline.prompt import LATENT_TOKEN, PromptConfig, RowBuilder
from pipeline.recipe import explain
from pipeline.registry import PLUGIN, load_plugin, loaded_plugins
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


@dataclass
class LoadedModel:
    """An export ready to answer."""

    info: ExportInfo
    model: LatentModel
    processor: Any
    device: torch.device

    def asked(self, **settings: Any) -> LoadedModel:
        """The same with other prompt settings, such as `context=True`."""
        prompt = self.info.prompt.model_copy(update=settings)
        return replace(self, info=self.info.model_copy(update={"prompt": prompt}))

    @property
    def builder(self) -> RowBuilder:
        return RowBuilder(self.processor, self.info.prompt, self.info.latent.patches_taken)


def load_export(folder: Path, dtype: torch.dtype | None = None, *, allow_changed_plugin: bool = False) -> LoadedModel:
    """Load an export for decoding, on the GPU where there is one.

    allow_changed_plugin: warn of a plugin with another text than in training, and take it.
    Raises UserError where `folder` is not one of ours or lacks something, or an adapter's base or a plugin is another.
    """
    info = ExportInfo.read(folder)
    check_plugin(folder, info, allow_changed_plugin)
    family = BACKBONES[info.backbone]
    check_files(folder, info)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    transformers_logging.disable_progress_bar()
    try:
        check_base_of(folder, info)
        vlm = family.load(info.adapter_of or folder, dtype, info.revision)
        processor = family.processor(folder, info.prompt)
        if info.adapter_of:
            from peft import PeftModel

            if info.vocabulary:
                set_token_rows(folder, vlm, info.vocabulary)
            elif len(processor.tokenizer) > vlm.get_input_embeddings().num_embeddings:
                vlm.resize_token_embeddings(len(processor.tokenizer), pad_to_multiple_of=64, mean_resizing=False)
            if info.prompt.markers:  # frozen, and so not in the adapter: as training made them
                used = processor.tokenizer.convert_tokens_to_ids(LATENT_TOKEN)
                for weight in embedding_weights(vlm):
                    set_to_mean(weight, used, slice(used, len(processor.tokenizer)))
            vlm = PeftModel.from_pretrained(vlm, folder)
            check_adapter(folder, vlm)
    except UserError:
        raise
    except Exception as error:  # the libraries raise whatever a damaged file makes them raise
        raise UserError(f"export {folder} cannot be loaded: {in_a_line(error)}") from None
    model = LatentModel(family(vlm), info.latent)
    load_parts(folder, model.method)
    model = model.eval().to(device)
    return LoadedModel(info, model, processor, device)


def load_parts(folder: Path, method: LatentMethod) -> None:
    """Fill the parameters of the method's parts.  Raises UserError where the export has others."""
    wanted = {name: value.shape for name, value in method.state_dict().items()}
    path = folder / PARTS
    try:
        found = load_file(path) if path.is_file() else {}
    except Exception as error:  # safetensors has no exception of its own that is public
        raise UserError(f"{path} is damaged: {in_a_line(error)}") from None
    if {name: weight.shape for name, weight in found.items()} != wanted:
        raise UserError(
            f"{path} holds {sorted(found) or 'nothing'}, the method's parts have {sorted(wanted) or 'no parameters'}"
        )
    method.load_state_dict(found)


def check_files(folder: Path, info: ExportInfo) -> None:
    """Raise UserError naming the files that an export lacks; libraries would look for them elsewhere, or do without."""
    needed = ["adapter_config.json", ADAPTER] if info.adapter_of else ["config.json"]
    needed += [TOKEN_ROWS] if info.vocabulary else []
    needed += BACKBONES[info.backbone].PROCESSOR_FILES
    if lacking := [name for name in needed if not (folder / name).is_file()]:
        raise UserError(f"export {folder} is not complete: it lacks {', '.join(lacking)}")


def check_plugin(folder: Path, info: ExportInfo, allow_changed: bool) -> None:
    """Raise UserError, or warn with `allow_changed`, where the method's file has changed since training."""
    texts = {plugin.sha256: plugin.path for plugin in loaded_plugins()}
    if info.plugin_hash is None or not texts or info.plugin_hash in texts:
        return
    line = (
        f"{', '.join(map(str, texts.values()))} is not the text of {info.plugin} that {folder} was trained with"
        f" (its run folder keeps that as {PLUGIN})"
    )
    if not allow_changed:
        raise UserError(f"{line}; --allow_changed_plugin true answers with it all the same")
    print(f"warning: {line}", file=sys.stderr)


def check_base_of(folder: Path, info: ExportInfo) -> None:
    """Raise UserError where the base of an adapter is not here, or has other weights than it was trained on."""
    base = info.adapter_of
    if base is None:
        return
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(f"{folder} is an adapter of {base}, which is not here; adapter_of in its {FILE} may be changed")
    if info.base_hash is None:
        raise UserError(f"{folder / FILE} does not say which weights the adapter's base has (base_hash)")
    if base_hash(base, weights=True, revision=info.revision) != info.base_hash:
        raise UserError(f"{folder} is an adapter of {base}, whose weights are not those that it was trained on")


def set_token_rows(folder: Path, vlm: Any, vocabulary: int) -> None:
    """Give the base of an adapter a vocabulary of so many rows, the last of them from the adapter's folder."""
    vlm.resize_token_embeddings(vocabulary, mean_resizing=False)
    with safe_open(folder / TOKEN_ROWS, "pt") as file, torch.no_grad():
        for name, table in (("input", vlm.get_input_embeddings()), ("output", vlm.get_output_embeddings())):
            if name in file.keys():  # noqa: SIM118  (no mapping)
                rows = file.get_tensor(name)
                table.weight[vocabulary - len(rows) :] = rows.to(table.weight.dtype)


def check_adapter(folder: Path, vlm: Any) -> None:
    """Raise UserError where weights of the adapter are missing in its file; peft would leave them as they began."""
    from peft import get_peft_model_state_dict

    with safe_open(folder / ADAPTER, "pt") as file:
        lacking = get_peft_model_state_dict(vlm, save_embedding_layers=False).keys() - set(file.keys())
    if lacking:
        raise incomplete(folder / ADAPTER, lacking)
