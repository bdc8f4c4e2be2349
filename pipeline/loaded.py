"""Exports, loaded to answer with; and whether all is there that one needs, as it was in training."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from data_prep.errors import UserError
from pipeline.backbones import BACKBONES
from pipeline.backbones.weights import incomplete
from pipeline.export import ADAPTER, FILE, PARTS, TOKEN_ROWS, ExportInfo
from pipeline.latent.method import LatentMethod
from pipeline.model import LatentModel, embedding_weights, set_to_mean
from pipeline.prepare import base_hash, in_a_line
from pipeline.prompt import LATENT_TOKEN, RowBuilder
from pipeline.registry import PLUGIN, loaded_plugins


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
