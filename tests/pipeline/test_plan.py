"""What a start is going to do: stages that are left, where they begin, and what may not have changed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from data_prep.errors import UserError
from pipeline.config import RunConfig
from pipeline.ds_config import Triangle
from pipeline.keeping.checkpoint import Checkpoints
from pipeline.keeping.fingerprint import Fingerprints
from pipeline.keeping.state import RunState
from pipeline.plan import (
    check_same_run,
    check_split,
    done_marker,
    make_plan,
    resolved,
    settings_hash,
    where_to_start,
    write_config,
)
from pipeline.recipe import load_config

STATE = RunState(
    stage=0, step=8, stage_steps=8, global_step=8, samples=64, epoch=0, seed=0, world=1, zero_stage=2, index_hash="i",
    base_hash="b", settings_hash="s", weights=Fingerprints("t", "f", "b"),
)  # fmt: skip


def run_folder(out: Path, *ends: int, inside: dict[int, int] | None = None, done: tuple[int, ...] = ()) -> Checkpoints:
    """Stage ends and checkpoints inside stages (stage -> step), and markers."""
    for stage, step in [*((stage, 8) for stage in ends), *(inside or {}).items()]:
        write_checkpoint(out, replace(STATE, stage=stage, step=step))
    for stage in done:
        done_marker(out, stage).write_text("{}")
    return Checkpoints(out)


def write_checkpoint(out: Path, state: RunState) -> Path:
    folder = Checkpoints(out).path_of(state)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(asdict(state)))
    (folder / "manifest.json").write_text("{}")
    return folder


def begins(checkpoints: Checkpoints, stages: range | list[int] = range(3)) -> dict[int, tuple[int, int] | None]:
    """Stage -> (stage, step) of the checkpoint that it begins with, if any."""
    left, starts = where_to_start(checkpoints, list(stages), 3, "auto", 1, 2)
    return {s: (starts[s].state.stage, starts[s].state.step) if s in starts else None for s in left}


# ---- which stages, and from where -------------------------------------------------------------
def test_nothing_yet(tmp_path: Path) -> None:
    assert begins(Checkpoints(tmp_path)) == {0: None, 1: None, 2: None}


def test_inside_a_stage(tmp_path: Path) -> None:
    assert begins(run_folder(tmp_path, 0, inside={1: 3}, done=(0,))) == {1: (1, 3), 2: None}


def test_next_stage(tmp_path: Path) -> None:
    assert begins(run_folder(tmp_path, 0, done=(0,))) == {1: (0, 8), 2: None}


def test_all_done(tmp_path: Path) -> None:
    assert begins(run_folder(tmp_path, 0, 1, 2, done=(0, 1, 2))) == {}


def test_markers_removed_before_a_stage_that_is_done(tmp_path: Path) -> None:
    """Every stage begins with its own weights, not with those of the last one in memory."""
    assert begins(run_folder(tmp_path, 0, 1, done=(1,))) == {0: (0, 8), 2: (1, 8)}


def test_marker_removed_before_a_stage_that_has_begun(tmp_path: Path) -> None:
    assert begins(run_folder(tmp_path, 0, inside={1: 3})) == {0: (0, 8), 1: (1, 3), 2: None}


def test_training_under_a_later_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stage 0 is not complete in .*, but stage 2, .* has begun; leave stage 0 out"):
        begins(run_folder(tmp_path, 2, inside={0: 3}, done=(2,)))


def test_removed_stage_end_is_trained_again(tmp_path: Path) -> None:
    """As the line about a damaged checkpoint advises: the marker alone does not make the stage done."""
    checkpoints = run_folder(tmp_path, inside={0: 6}, done=(0,))
    assert begins(checkpoints) == {0: (0, 6), 1: None, 2: None}
    with pytest.raises(UserError, match="train it first: --stages 0"):
        begins(checkpoints, [1])
    assert begins(checkpoints, [0]) == {0: (0, 6)}


def test_stage_end_that_nothing_needs_any_more(tmp_path: Path) -> None:
    assert begins(run_folder(tmp_path, inside={1: 3}, done=(0,))) == {1: (1, 3), 2: None}
    done_marker(tmp_path, 1).write_text("{}")
    done_marker(tmp_path, 2).write_text("{}")
    assert begins(Checkpoints(tmp_path)) == {}


def test_removed_stage_end_under_an_empty_marker(tmp_path: Path) -> None:
    """Without its end, and nothing begun after it, a marker of the next stage is no obstacle either."""
    assert begins(run_folder(tmp_path, inside={0: 6}, done=(0, 1))) == {0: (0, 6), 1: None, 2: None}


def test_resume_never(tmp_path: Path) -> None:
    for number, checkpoints in enumerate([run_folder(tmp_path / "a", 0), run_folder(tmp_path / "b", 2, done=(2,))]):
        with pytest.raises(UserError, match="holds a run"):
            where_to_start(checkpoints, [number], 3, "never", 1, 2)


def test_other_ranks_or_zero_stage(tmp_path: Path) -> None:
    checkpoints = run_folder(tmp_path, 0, inside={1: 3})
    for world, zero in ((2, 2), (1, 3)):
        refusal = f"cannot be resumed by {world} ranks under ZeRO-{zero} without --resume elastic"
        with pytest.raises(UserError, match=refusal):
            where_to_start(checkpoints, [1], 3, "auto", world, zero)
        left, starts = where_to_start(checkpoints, [1], 3, "elastic", world, zero)
        assert left == [1] and (starts[1].state.stage, starts[1].state.step) == (1, 3)


def test_other_ranks_where_the_loss_depends_on_them(tmp_path: Path) -> None:
    starts = run_folder(tmp_path, 0).newest()
    check_split(settings(), starts, 2)
    published = settings(**{"optim.loss_norm": "micro_batch"})
    check_split(published, starts, 1)
    with pytest.raises(UserError, match="written by 1 ranks, and optim.loss_norm micro_batch depends on"):
        check_split(published, starts, 2)


# ---- the same settings ------------------------------------------------------------------------
def settings(**overrides: str) -> RunConfig:
    return load_config(None, {"model.path": "m", "data.path": "d", **overrides})


def trained(out: Path, config: RunConfig) -> None:
    write_checkpoint(out, replace(STATE, settings_hash=settings_hash(config)))
    write_config(config, out)


def test_same_settings(tmp_path: Path) -> None:
    trained(tmp_path, settings())
    check_same_run(settings(**{"train.log_every": "3"}), tmp_path)
    (tmp_path / "config.yaml").write_text("[")  # it names settings; the hash decides
    check_same_run(settings(), tmp_path)


def test_changed_setting_is_named(tmp_path: Path) -> None:
    trained(tmp_path, settings())
    with pytest.raises(UserError, match=r"optim.lr is 0.5 but .* was trained with 4e-05"):
        check_same_run(settings(**{"optim.lr": "0.5"}), tmp_path)


@pytest.mark.parametrize("written", ["edited too", "removed", "damaged"])
def test_changed_setting_without_the_file_that_would_name_it(tmp_path: Path, written: str) -> None:
    trained(tmp_path, settings())
    other = settings(**{"optim.lr": "0.5"})
    path = tmp_path / "config.yaml"
    if written == "edited too":
        path.write_text(other.dump())
    elif written == "removed":
        path.unlink()
    else:
        path.write_text("[")
    with pytest.raises(UserError, match="the settings are not those that .*stage0-step000008 was trained with"):
        check_same_run(other, tmp_path)


def test_batch_of_the_deepspeed_file_counts(tmp_path: Path) -> None:
    """What decides which rows a step has is compared wherever it was given."""
    trained(tmp_path, resolved(settings(), Triangle(24, 2, 12, 1)))
    assert "global_batch: 24" in (tmp_path / "config.yaml").read_text()
    check_same_run(resolved(settings(), Triangle(24, 4, 6, 1)), tmp_path)
    with pytest.raises(UserError, match="train.global_batch is 32 but .* was trained with 24"):
        check_same_run(resolved(settings(), Triangle(32, 2, 16, 1)), tmp_path)


def test_micro_batch_counts_where_the_loss_depends_on_it(tmp_path: Path) -> None:
    published = settings(**{"optim.loss_norm": "micro_batch"})
    trained(tmp_path, resolved(published, Triangle(24, 2, 12, 1)))
    with pytest.raises(UserError, match="train.micro_batch is 4 but .* was trained with 2"):
        check_same_run(resolved(published, Triangle(24, 4, 6, 1)), tmp_path)


def test_out_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"--out .*: .*/file is a file"):
            make_plan(settings(), Path("ds_configs/zero2.json"), out, None, "auto", 1)


def test_out_is_a_pattern(tmp_path: Path) -> None:
    """DeepSpeed would write checkpoints there, and not find them again."""
    with pytest.raises(UserError, match=r"--out .*run\[1\]: DeepSpeed takes \* \? \[ for a pattern"):
        make_plan(settings(), Path("ds_configs/zero2.json"), tmp_path / "run[1]", None, "auto", 1)


def test_changed_seed_is_named_without_the_file(tmp_path: Path) -> None:
    trained(tmp_path, settings())
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"train.seed is 5 but .*stage0-step000008 was trained with 0; choose another"):
        check_same_run(settings(**{"train.seed": "5"}), tmp_path)
