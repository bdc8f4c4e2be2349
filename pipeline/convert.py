"""Command: a checkpoint of the paper's authors -> an export of this pipeline, and back.

    python -m pipeline.convert --from released --weights F.pth --base NAME_OR_DIR --out DIR
    python -m pipeline.convert --to released --model EXPORT --out F.pth

Weights are read and written one at a time; `pipeline/released/` knows the files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from data_prep import cli
from data_prep.errors import UserError
from data_prep.files import atomic_folder
from pipeline.backbones import BACKBONES
from pipeline.config import ROOT, LoraConfig, RunConfig
from pipeline.export import Converted, ExportInfo
from pipeline.latent.method import LatentMethod
from pipeline.prepare import base_hash, check_base, data_name
from pipeline.recipe import load_config, read_recipes, recipe_paths
from pipeline.released.back import to_released
from pipeline.released.exporting import write_adapter, write_merged
from pipeline.released.files import ModelWeights, file_hash, local_folder, place_of, read_config, written
from pipeline.released.form import ADDED_TOKENS, FORMS, Skeleton, form_of
from pipeline.released.frozen import FrozenCheck
from pipeline.released.reading import ReleasedFile, read_released

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main(*, from_: Literal["released"] | None = None, to: Literal["released"] | None = None, **options: str) -> None:
    """Convert a checkpoint of the paper's authors, or back.

    --from released: --weights F.pth --base NAME_OR_DIR --out DIR; --export merged|adapter; --dtype auto|bf16|fp32 of
    merged weights (auto: as the file has them); --benchmark m3cot|scienceqa: which of the paper's settings the export
    records (prompt, latent steps, LoRA alpha 16), unless --recipe X.yaml, or several with commas, gives others;
    --stage: of the curriculum, the last without it; --data: shard folder; --SECTION.FIELD VALUE: any one setting
    (pipeline/config.py), such as --latent.num_patches 16 or --model.lora.alpha 32; --allow_changed_base true: take
    frozen weights that are not the base's as they are, merged.

    --to released: --model EXPORT --out F.pth, an fp32 state dict.
    """
    if (from_ is None) == (to is None):
        raise UserError("give either --from released or --to released")
    command: Callable[..., None] = from_released if from_ else to_released
    with cli.terminated_as_interrupted():
        command(**cli.bind(command, options))


def from_released(
    *,
    weights: Path,
    base: str,
    out: Path,
    export: Literal["merged", "adapter"] = "merged",
    dtype: Literal["auto", "bf16", "fp32"] = "auto",
    benchmark: Literal["m3cot", "scienceqa"] = "m3cot",
    recipe: str | None = None,
    stage: int | None = None,
    data: str | None = None,
    allow_changed_base: bool = False,
    **settings: str,
) -> None:
    """See `main`.  Raises UserError; `out` is then as it was."""
    problems = [f"--out {out} exists; choose another"] if out.exists() else []
    if export == "adapter" and dtype != "auto":
        problems.append("--dtype is for merged exports: an adapter keeps what the file has")
    if export == "adapter" and allow_changed_base:
        problems.append("--allow_changed_base is for merged exports: an adapter runs on the base's weights")
    if problems:
        raise UserError(*problems)
    folder = local_folder(base, settings.get("model.revision"))
    hf_config = read_config(folder)
    backbone = backbone_of(hf_config, base)
    form = form_of(backbone, base)
    config = read_settings(recipe, benchmark, settings, data, backbone, base)
    check_base(config.model.model_copy(update={"path": str(folder)}), config.prompt)
    if LatentMethod(config.latent, 1).state_dict():
        raise UserError(f"latent.feedback {config.latent.feedback}: a released file has no parameters for it")
    stage = stage_of(config, stage)
    processor = BACKBONES[backbone].processor(folder, config.prompt)
    tokens = len(processor.tokenizer)
    skeleton = Skeleton.of(hf_config, form)
    frozen = FrozenCheck(ModelWeights(folder, form).check(skeleton), skeleton.tables, tokens)
    released = read_released(weights, skeleton, form, tokens)
    if export == "adapter" and not released.lora:
        raise UserError(f"{weights} has no LoRA weights: there is no adapter to export")
    rows = len(released.weights[skeleton.embeddings])
    add_tokens(processor.tokenizer, rows)

    alpha = (config.model.lora or LoraConfig()).alpha
    with written(out), atomic_folder(out) as writing:
        if export == "merged":
            types = write_merged(writing, released, skeleton, frozen, alpha, DTYPES.get(dtype))
            hf_config.get_text_config().vocab_size = rows
            hf_config.dtype = max(types, key=lambda kind: kind.itemsize)
            hf_config.save_pretrained(writing)
            if (folder / "generation_config.json").is_file():
                shutil.copy(folder / "generation_config.json", writing)
        else:
            write_adapter(writing, released, skeleton, form, frozen, alpha, base)
        frozen.judge(base, export, allow_changed_base)
        processor.save(writing)
        export_info(released, frozen, config, stage, rows, base, export, alpha).write(writing)
    latent = config.latent
    print(f"{len(released.lora)} modules with LoRA of rank {released.rank}, alpha {alpha}; {frozen.describe(base)}")
    print(f"{config.curriculum.stages[stage].latents} latent steps of {latent.num_patches} patches,"
          f" positions {latent.positions}, answer as {config.prompt.answer}")  # fmt: skip
    print(f"{out}: {export} export; python -m pipeline.evaluate --model {out}")


def backbone_of(hf_config: Any, base: str) -> str:
    """Name of the backbone that a model is of.  Raises UserError."""
    for name, family in BACKBONES.items():
        if hf_config.model_type == family.MODEL_TYPE:
            return name
    raise UserError(f"--base {base} is a {hf_config.model_type} model; released files are known of {', '.join(FORMS)}")


def read_settings(
    recipe: str | None, benchmark: str, settings: Mapping[str, str], data: str | None, backbone: str, base: str
) -> RunConfig:
    """What a state dict does not say: published values, or a recipe's, then single options.

    A recipe's `model.path` is where it looks for the base model, which --base says here.  Raises UserError where other
    settings contradict the base.
    """
    published = ROOT / "recipes" / "published" / f"{FORMS[backbone].recipes}_{benchmark}.yaml"
    recipes = recipe_paths(recipe) if recipe else [published]
    problems = []
    if settings.get("model.path", base) != base:
        problems.append(f"--model.path {settings['model.path']}: --base {base} names the base model")
    model = read_recipes(recipes).get("model")
    said = settings.get("model.backbone") or (model.get("backbone") if isinstance(model, dict) else None)
    if said not in (None, backbone):
        problems.append(f"model.backbone {said}: --base {base} is {backbone}")
    if problems:
        raise UserError(*problems)
    values = {"model.scratch": "none", **settings, "model.backbone": backbone, "model.path": base}
    return load_config(recipes, values | ({"data.path": data} if data else {}))


def stage_of(config: RunConfig, stage: int | None) -> int:
    """The stage that the file is the end of; the last one where none is given.  Raises UserError."""
    last = len(config.curriculum.stages) - 1
    if stage is not None and not 0 <= stage <= last:
        raise UserError(f"--stage {stage}: the curriculum has stages 0 to {last}")
    return last if stage is None else stage


def add_tokens(tokenizer: Any, rows: int) -> None:
    """Give the tokenizer the tokens that the released trainer added, where the vocabulary has rows for them."""
    new = [token for token in ADDED_TOKENS if token not in tokenizer.get_vocab()]
    if len(tokenizer) + len(new) <= rows:
        tokenizer.add_tokens(new, special_tokens=True)


def export_info(
    released: ReleasedFile,
    frozen: FrozenCheck,
    config: RunConfig,
    stage: int,
    rows: int,
    base: str,
    export: str,
    alpha: int,
) -> ExportInfo:
    """What `latent_config.json` says of the export; hashes the base of an adapter."""
    as_adapter, revision = export == "adapter", config.model.revision
    where = place_of(base)
    return ExportInfo(
        backbone=config.model.backbone,
        latent=config.latent,
        prompt=config.prompt,
        latents=config.curriculum.stages[stage].latents,
        stage=stage,
        groups=config.curriculum.groups,
        adapter_of=where if as_adapter else None,
        revision=revision if as_adapter else None,
        base_hash=base_hash(base, weights=True, revision=revision) if as_adapter else None,
        data=data_name(config),
        max_new_tokens=config.eval.max_new_tokens,
        vocabulary=rows if as_adapter else None,
        converted=Converted(
            weights=released.path.name,
            weights_hash=file_hash(released.path),
            base=where,
            changed_base=bool(frozen.changed),
            lora_r=released.rank,
            lora_alpha=alpha,
            prefix=released.prefix,
            aliases=released.aliases,
        ),
    )


if __name__ == "__main__":
    cli.run(main, parts={"--from released": from_released, "--to released": to_released})
