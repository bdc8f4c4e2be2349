"""What a start of training is going to do, decided and checked before a process group or model exists."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import write_atomic
from pipeline.config import RunConfig
from pipeline.ds_config import Triangle, batch_triangle, check_ds_config, load_ds_config
from pipeline.keeping.checkpoint import Checkpoints
from pipeline.keeping.state import Checkpoint
from pipeline.prepare import check_base, check_data, check_made_from, data_folder, to_be_made
from pipeline.registry import PLUGIN, load_plugin, plugin_hash
from pipeline.user_files import read_yaml

FREE = {
    "name", "model.checkpointing", "model.schedule", "data.path", "data.mix", "data.source", "data.options",
    "data.workers", "data.max_bad", "data.cache_gb", "train.micro_batch", "train.accumulation",
    "train.checkpoint_every", "train.keep_checkpoints", "train.async_checkpoints", "train.validate_every",
    "train.val_samples", "train.val_batch", "train.log_every", "train.rollback_after", "train.spike",
    "train.hang_minutes", "train.memory_check", "train.trace", "train.export", "eval.max_new_tokens",
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
    starts: dict[int, Checkpoint]
    """What a stage begins with; one that is not here goes on from the stage before it, or from the base model"""
    triangle: Triangle
    asked: list[int]
    """Stages asked for, those that are done included"""
    resume: str

    @property
    def zero_stage(self) -> int:
        return int(self.ds["zero_optimization"]["stage"])

    def fits(self, start: Checkpoint) -> bool:
        """Whether a checkpoint is of as many ranks and the same ZeRO stage, so that each rank takes its own share."""
        return (start.state.world, start.state.zero_stage) == (self.triangle.world, self.zero_stage)

    def again(self) -> Plan:
        """The plan of what the run folder holds now.  Raises UserError where a stage can no longer begin."""
        stages, starts = where_to_start(
            Checkpoints(self.out), self.asked, len(self.config.curriculum.stages), self.resume,
            self.triangle.world, self.zero_stage,
        )  # fmt: skip
        check_split(self.config, starts, self.triangle.world)
        return replace(self, stages=stages, starts=starts)

    def start_step(self, stage: int) -> int:
        """Steps of a stage that are done already."""
        start = self.starts.get(stage)
        return start.state.step if start is not None and start.state.stage == stage else 0


def make_plan(config: RunConfig, ds_path: Path, out: Path | None, stages: str | None, resume: str, world: int) -> Plan:
    """Check everything that needs no model.  Raises UserError with all problems, one line each."""
    out = out or Path("runs") / config.name
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--out {out}: {there} is a file")
    if set(str(out)) & set("*?["):
        raise UserError(f"--out {out}: DeepSpeed takes * ? [ for a pattern and would not find its checkpoints there")
    problems: list[str] = []

    def attempt(check: Any, *args: Any) -> Any:
        try:
            return check(*args)
        except UserError as error:
            problems.extend(error.lines)
            return None

    ds = attempt(load_ds_config, ds_path)
    triangle = attempt(batch_triangle, config.train, world, ds or {})
    if ds is not None and triangle is not None:
        config = resolved(config, triangle)
        attempt(check_ds_config, ds, ds_path, triangle, config)
    wanted = attempt(parse_stages, stages, len(config.curriculum.stages))
    attempt(check_base, config.model, config.prompt)
    folder, data = data_folder(config), config.data
    if not to_be_made(config):
        indexes = attempt(check_data, config)
        dropped = data.last_batch == "drop" and not data.mix
        if indexes and dropped and triangle and len(indexes["train"]) < triangle.global_batch:
            problems.append(
                f"{folder}: {len(indexes['train'])} training samples are less than one global batch of"
                f" {triangle.global_batch}; lower train.global_batch or set data.last_batch to pad"
            )
        attempt(check_made_from, config)
    attempt(check_same_run, config, out)
    left, starts = wanted, dict[int, Checkpoint]()
    if wanted is not None and ds is not None:
        count, zero = len(config.curriculum.stages), ds["zero_optimization"]["stage"]
        found = attempt(where_to_start, Checkpoints(out), wanted, count, resume, world, zero)
        left, starts = found or (wanted, starts)
        attempt(check_split, config, starts, world)
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return Plan(config, ds, out, left, starts, triangle, wanted, resume)


def resolved(config: RunConfig, triangle: Triangle) -> RunConfig:
    """With the batch that the numbers depend on, wherever it was given: a run's config.yaml and hash hold this."""
    batch = {"global_batch": triangle.global_batch}
    if config.optim.loss_norm == "micro_batch":
        batch |= {"micro_batch": triangle.micro_batch, "accumulation": triangle.accumulation}
    return config.model_copy(update={"train": config.train.model_copy(update=batch)})


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
    checkpoints: Checkpoints, stages: list[int], count: int, resume: str, world: int, zero: int
) -> tuple[list[int], dict[int, Checkpoint]]:
    """Stages of `stages` that are left, and the checkpoints that they begin with (`Plan.starts`).

    count: stages of the curriculum; zero: ZeRO stage.  Raises UserError where a stage cannot begin.
    """
    run, newest = checkpoints.run, checkpoints.newest()
    done = stages_done(run, newest, count)
    if resume == "never" and (newest or done):
        raise UserError(f"{run} holds a run; --resume auto goes on with it, or choose another --out")
    checkpoints.refuse_none_left()
    left = [stage for stage in stages if stage not in done]
    starts: dict[int, Checkpoint] = {}
    for stage in left:
        start = newest.get(stage)
        trains = start is None or not start.state.stage_done
        begun = [later for later in range(stage + 1, count) if later in done or later in newest]
        if trains and begun:
            raise UserError(
                f"stage {stage} is not complete in {run}, but stage {begun[0]}, which goes on from its end, has begun;"
                f" leave stage {stage} out, or remove checkpoints/stage{begun[0]}-* and stage{begun[0]}.done first"
            )
        if start is None and stage > 0 and stage - 1 not in left:
            start = newest.get(stage - 1)
            if start is None or not start.state.stage_done:
                raise UserError(
                    f"stage {stage} starts from the end of stage {stage - 1}, which {run} does not have;"
                    f" train it first: --stages {stage - 1}"
                )
        if start is not None:
            starts[stage], state = start, start.state
            if (state.world, state.zero_stage) != (world, zero) and resume != "elastic":
                raise UserError(
                    f"{start.path} was written by {state.world} ranks under ZeRO-{state.zero_stage};"
                    f" it cannot be resumed by {world} ranks under ZeRO-{zero} without --resume elastic"
                )
    return left, starts


def check_split(config: RunConfig, starts: Mapping[int, Checkpoint], world: int) -> None:
    """Raise UserError where other ranks would change the loss, which is a mean over micro-batches."""
    others = [start for start in starts.values() if start.state.world != world]
    if others and config.optim.loss_norm == "micro_batch":
        raise UserError(
            f"{others[0].path} was written by {others[0].state.world} ranks, and optim.loss_norm micro_batch depends on"
            f" how ranks split the rows; go on with as many"
        )


def stages_done(run: Path, newest: Mapping[int, Checkpoint], count: int) -> set[int]:
    """Stages whose marker is there, and their last checkpoint where the next stage still has to begin with it.

    The checkpoint alone does not do: it may lack the export.
    """
    done: set[int] = set()
    for stage in reversed(range(count)):
        ended = stage in newest and newest[stage].state.stage_done
        needed = stage + 1 < count and stage + 1 not in done and stage + 1 not in newest
        if done_marker(run, stage).exists() and (ended or not needed):
            done.add(stage)
    return done


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
    settings = {k: v for k, v in flatten(config.model_dump(mode="json")).items() if k not in free}
    if config.plugin:
        settings["plugin"] = plugin_hash(Path(config.plugin)) or config.plugin  # what it says, wherever it is
    return settings


def settings_hash(config: RunConfig) -> str:
    """Identity of the settings that the numbers of a run depend on; config: `resolved`."""
    return hashlib.sha256(json.dumps(fixed_settings(config), sort_keys=True).encode()).hexdigest()


def check_same_run(config: RunConfig, out: Path) -> None:
    """Raise UserError where a checkpoint of the run folder was trained with other settings; config: `resolved`.

    Checkpoints hold a hash, which decides; config.yaml, which anybody may have edited or removed, names the settings.
    """
    now = settings_hash(config)
    others = [c for c in Checkpoints(out).all() if c.state.settings_hash != now]
    if others:
        last, seed = others[-1], config.train.seed
        what = f"the settings, or the text of {config.plugin}," if config.plugin else "the settings"
        line = f"{what} are not those that {last.path} was trained with; choose another --out"
        if last.state.seed != seed:
            line = f"train.seed is {seed} but {last.path} was trained with {last.state.seed}; choose another --out"
        raise UserError(*different_settings(config, out) or [line])


def different_settings(config: RunConfig, out: Path) -> list[str]:
    """A line for every setting that differs from the run folder's config.yaml; none where it cannot be read."""
    try:
        written = read_yaml((out / "config.yaml").read_text(encoding="utf-8"))
        before = fixed_settings(RunConfig.model_validate(written))
    except (OSError, ValueError):
        return []
    now = fixed_settings(config)
    return [
        f"{k} is {now.get(k)} but {out} was trained with {before.get(k)}; choose another --out"
        for k in sorted(before | now)
        if before.get(k) != now.get(k)
    ]


def write_config(config: RunConfig, out: Path) -> None:
    """The resolved settings, as a recipe, in the run folder, and the text of their plugin."""
    write_atomic(out / "config.yaml", config.dump())
    if config.plugin:
        write_atomic(out / PLUGIN, load_plugin(Path(config.plugin)).source)
