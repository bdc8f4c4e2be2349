"""What a start of training is going to do, decided and checked before a process group or model exists."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_prep.errors import UserError
from data_prep.files import write_atomic
from pipeline.checkpoint import Checkpoint, Checkpoints
from pipeline.config import RunConfig
from pipeline.engine import Triangle, batch_triangle, load_ds_config
from pipeline.prepare import check_base, check_data, check_made_from, data_folder

FREE = {
    "name", "model.checkpointing", "model.schedule", "data.path", "data.source", "data.options", "data.workers",
    "data.max_bad", "train.micro_batch", "train.accumulation", "train.checkpoint_every", "train.keep_checkpoints",
    "train.validate_every", "train.val_samples", "train.val_batch", "train.log_every", "train.export",
    "eval.max_new_tokens",
}  # fmt: skip
"""Settings that may differ between starts of one run: the numbers do not depend on them."""


@dataclass(frozen=True)
class Plan:
    """A checked start: what, where, and from which checkpoint."""

    config: RunConfig
    ds: dict[str, Any]
    out: Path
    stages: list[int]
    """Stages to train, those that are done left out"""
    start: Checkpoint | None
    """Where the first of them begins; None is the base model"""
    triangle: Triangle

    @property
    def start_step(self) -> int:
        """Steps of the first stage that are done already."""
        if self.start is None or self.start.state.stage != self.stages[0]:
            return 0
        return self.start.state.step


def make_plan(config: RunConfig, ds_path: Path, out: Path | None, stages: str | None, resume: str, world: int) -> Plan:
    """Check everything that needs no model.  Raises UserError with all problems, one line each."""
    out = out or Path("runs") / config.name
    problems: list[str] = []

    def attempt(check: Any, *args: Any) -> Any:
        try:
            return check(*args)
        except UserError as error:
            problems.extend(error.lines)
            return None

    ds = attempt(load_ds_config, ds_path)
    triangle = attempt(batch_triangle, config.train, world, ds or {})
    wanted = attempt(parse_stages, stages, len(config.curriculum.stages))
    attempt(check_base, config.model, config.prompt)
    folder = data_folder(config)
    if (folder / "manifest.json").exists() or config.data.source is None:
        splits = ["train"] + (["val"] if config.train.val_samples else [])
        indexes = attempt(check_data, folder, splits)
        if indexes and config.data.last_batch == "drop" and triangle and len(indexes["train"]) < triangle.global_batch:
            problems.append(
                f"{folder}: {len(indexes['train'])} training samples are less than one global batch of"
                f" {triangle.global_batch}; lower train.global_batch or set data.last_batch to pad"
            )
        attempt(check_made_from, config)
    attempt(check_same_run, config, out)
    start = None
    if wanted is not None and ds is not None:
        wanted, start = attempt(where_to_start, Checkpoints(out), wanted, resume, world, ds) or (wanted, None)
    if problems:
        raise UserError(*problems)
    return Plan(config, ds, out, wanted, start, triangle)


def parse_stages(text: str | None, count: int) -> list[int]:
    """ "0-3", "2" or nothing (all) -> stage numbers.  Raises UserError."""
    if text is None:
        return list(range(count))
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last or last >= count:
        raise UserError(f"--stages {text}: expected one of 0 to {count - 1}, or a range such as 0-{count - 1}")
    return list(range(first, last + 1))


def where_to_start(
    checkpoints: Checkpoints, stages: list[int], resume: str, world: int, ds: Mapping[str, Any]
) -> tuple[list[int], Checkpoint | None]:
    """Stages that are left, and the checkpoint to begin with.  Raises UserError where an earlier stage is missing."""
    if resume == "never" and checkpoints.all():
        raise UserError(f"{checkpoints.run} holds a run; --resume auto goes on with it, or choose another --out")
    # a stage is done when its marker says so: its last checkpoint alone may lack the export
    left = [stage for stage in stages if not done_marker(checkpoints.run, stage).exists()]
    if not left:
        return [], None
    first = left[0]
    start = checkpoints.newest(first)
    if start is None and first > 0:
        start = checkpoints.stage_end(first - 1)
        if start is None:
            raise UserError(
                f"stage {first} starts from the end of stage {first - 1}, which {checkpoints.run} does not"
                f" have; train it first: --stages {first - 1}"
            )
    if start is not None:
        state, zero = start.state, ds["zero_optimization"]["stage"]
        if (state.world, state.zero_stage) != (world, zero):
            raise UserError(
                f"{start.path} was written by {state.world} ranks under ZeRO-{state.zero_stage};"
                f" it cannot be resumed by {world} ranks under ZeRO-{zero}"
            )
    return left, start


def done_marker(run: Path, stage: int) -> Path:
    """The file that says that a stage is complete, checkpoint and export; written last."""
    return run / f"stage{stage}.done"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections -> dotted names."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("options", "where"):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def fixed_settings(config: RunConfig) -> dict[str, Any]:
    """Settings that the numbers of a run depend on."""
    free = FREE
    if config.optim.loss_norm == "micro_batch":
        free = FREE - {"train.micro_batch", "train.accumulation"}
    return {k: v for k, v in flatten(config.model_dump(mode="json")).items() if k not in free}


def check_same_run(config: RunConfig, out: Path) -> None:
    """Raise UserError naming every setting that differs from those the run folder was started with."""
    path = out / "config.yaml"
    if not path.exists() or not Checkpoints(out).all():
        return
    try:
        before = fixed_settings(RunConfig.model_validate(yaml.safe_load(path.read_text())))
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"{path} cannot be read: the run folder is damaged; choose another --out") from None
    now = fixed_settings(config)
    different = [k for k in sorted(before | now) if before.get(k) != now.get(k)]
    if different:
        raise UserError(
            *(
                f"{k} is {now.get(k)} but {out} was trained with {before.get(k)}; choose another --out"
                for k in different
            )
        )


def write_config(config: RunConfig, out: Path) -> None:
    """The resolved settings, as a recipe, in the run folder."""
    write_atomic(out / "config.yaml", config.dump())
