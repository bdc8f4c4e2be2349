"""The weights of an export, from those of a released file; the frozen ones are compared with the base on the way."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from pipeline.export import ADAPTER, TOKEN_ROWS
from pipeline.released.form import PEFT, Form, Skeleton
from pipeline.released.frozen import FrozenCheck
from pipeline.released.reading import ReleasedFile

SHARD = "5GB"
"""Most bytes of a weights file, and of what is held in memory at once."""


def write_merged(
    folder: Path, released: ReleasedFile, skeleton: Skeleton, frozen: FrozenCheck, alpha: int, dtype: torch.dtype | None
) -> set[torch.dtype]:
    """Write W + alpha/r B A of every weight as safetensors, a file at a time, and have the frozen ones compared.

    dtype: of the result; None takes the wider one of what is added.  Returns the types written.
    """

    def kind(name: str) -> torch.dtype:
        weight, pair = released.weights[name], released.lora.get(name.removesuffix(".weight"))
        return dtype or (torch.promote_types(weight.dtype, pair["A"].dtype) if pair else weight.dtype)

    def merged(name: str) -> Tensor:
        weight, pair = released.weights[name], released.lora.get(name.removesuffix(".weight"))
        frozen.see(name, weight)
        if pair:
            weight = weight.float() + alpha / released.rank * (pair["B"].float() @ pair["A"].float())
        return weight.to(kind(name)).contiguous()

    sizes = {n: torch.empty(released.weights[n].shape, dtype=kind(n), device="meta") for n in skeleton.shapes}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD)
    with tqdm(total=len(sizes), desc="weights", unit="tensor", mininterval=2) as progress:
        for file, names in plan.filename_to_tensors.items():
            shard = {}
            for name in names:
                shard[name] = merged(name)
                progress.update()
            save_file(shard, folder / file, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n")
    return {size.dtype for size in sizes.values()}


def write_adapter(
    folder: Path, released: ReleasedFile, skeleton: Skeleton, form: Form, frozen: FrozenCheck, alpha: int, base: str
) -> None:
    """Write peft's adapter and the rows of the tokens that the trainer added; have the frozen weights compared."""
    from peft import LoraConfig as PeftConfig

    for name in tqdm(skeleton.shapes, desc="weights", unit="tensor", mininterval=2):
        frozen.see(name, released.weights[name])
    modules = {form.module_name(module): pair for module, pair in sorted(released.lora.items())}
    adapter = {
        f"{PEFT}{module}.lora_{factor}.weight": pair[factor].contiguous()
        for module, pair in modules.items()
        for factor in ("A", "B")
    }
    save_file(adapter, folder / ADAPTER, {"format": "pt"})
    rows = {key: released.weights[table] for key, table in zip(("input", "output"), skeleton.tables, strict=False)}
    last = {key: table[frozen.tokens :].contiguous() for key, table in rows.items()}
    save_file(last, folder / TOKEN_ROWS, {"format": "pt"})
    PeftConfig(
        r=released.rank,
        lora_alpha=alpha,
        target_modules=list(modules),
        inference_mode=True,
        base_model_name_or_path=base,
    ).save_pretrained(folder)
