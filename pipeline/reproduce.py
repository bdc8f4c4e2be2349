"""Command: a published result, from the data to a table beside the paper's figures.

    python -m pipeline.reproduce --recipe published/qwen2vl_m3cot --train
    python -m pipeline.reproduce --recipe published/qwen2vl_m3cot --from released --weights F.pth
    python -m pipeline.reproduce --recipe published/qwen2vl_m3cot --run runs/qwen2vl_m3cot

Each part is a command of its own (data_prep.shard, pipeline/train.py, pipeline.convert, pipeline.evaluate,
pipeline.score); this one calls them in order, and what is there already is not made again.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from data_prep import cli
from data_prep.errors import UserError
from pipeline import evaluate
from pipeline.config import ROOT, LoraConfig, RunConfig
from pipeline.export import FILE, ExportInfo
from pipeline.prepare import data_folder, make_data
from pipeline.recipe import load_config
from pipeline.released.files import file_hash, place_of
from pipeline.score import score_file
from pipeline.scoring.judges import Benchmark, JudgeName
from pipeline.scoring.report import Report, read_reports
from pipeline.scoring.stats import wilson_interval


@dataclass(frozen=True)
class Figures:
    """What the paper reports (arXiv 2510.12603, main table)."""

    accuracy: float
    """%, by the released code's own scorer"""
    steps: float
    """Autoregressive"""
    seconds: float
    """A question"""


PAPER = {
    ("qwen2_vl", "m3cot"): Figures(71.8, 10.0, 0.65),
    ("qwen2_vl", "scienceqa"): Figures(94.6, 11.0, 0.67),
    ("chameleon", "m3cot"): Figures(41.8, 10.0, 1.13),
    ("chameleon", "scienceqa"): Figures(64.0, 11.0, 1.14),
}
JUDGES: tuple[JudgeName, ...] = ("released", "strict", "official")


def main(
    *,
    recipe: str,
    train: bool = False,
    from_: Literal["released"] | None = None,
    weights: Path | None = None,
    run: Path | None = None,
    ranks: int | None = None,
    ds: Path = ROOT / "ds_configs" / "zero2.json",
    out: Path | None = None,
    split: str = "test",
    limit: int | None = None,
    batch: int = 16,
    **settings: str,
) -> None:
    """Data, weights, answers under the recipe's prompt, and a table of what three scorers make of them.

    --recipe: published/NAME or a file, several with commas between them; one of --train (trains here, with deepspeed on
    --ranks processes, all accelerators without it, and --ds FILE), --from released with --weights F.pth (a checkpoint
    of the paper's authors), --run DIR (a finished run); --out: folder of weights and answers, runs/NAME without it;
    --split, --limit and --batch as in pipeline.evaluate; --SECTION.FIELD VALUE: any one setting (pipeline/config.py),
    such as --model.path DIR.
    """
    released = from_ is not None
    problems = [] if released == (weights is not None) else ["--from released and --weights F.pth go together"]
    if not problems and [train, released, run is not None].count(True) != 1:
        problems.append("give one of --train, --from released --weights F.pth, and --run DIR")
    try:
        recipes = [recipe_file(name) for name in recipe.split(",")]
        config = load_config(recipes, settings, also=cli.options_of(main))
        benchmark = benchmark_of(config)
    except UserError as error:
        raise UserError(*problems, *error.lines) from None
    if problems:
        raise UserError(*problems)
    out = out or ROOT / "runs" / config.name
    say("data", f"{data_folder(config)}")
    make_data(config, print)
    if train:
        run = out
        train_run(recipes, settings, ds, out, ranks)
    if weights is not None:
        export = convert_weights(recipes, settings, config, weights, out / "released")
    else:
        assert run is not None
        export = evaluate.exports_of(run)[-1][1]
    check_export(export, config)
    answers = out / "evaluation" / split
    say("answers", f"{export} on {split}, asked {'as released' if config.prompt.asked == 'released' else 'as trained'}")
    evaluate.main(
        model=export, data=data_folder(config), split=split, limit=limit, batch=batch, out=answers,
        max_new_tokens=config.eval.max_new_tokens,
    )  # fmt: skip
    (report,) = read_reports(answers)
    print("\n" + "\n".join(table(config, benchmark, report, answers, limit)))


def say(part: str, what: str) -> None:
    """Announce a part of the work."""
    print(f"== {part}: {what}", flush=True)


def recipe_file(name: str) -> Path:
    """recipes/NAME.yaml, or a file.  Raises UserError naming the recipes there are."""
    for path in (ROOT / "recipes" / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    known = sorted(str(p.relative_to(ROOT / "recipes").with_suffix("")) for p in (ROOT / "recipes").rglob("*.yaml"))
    raise UserError(f"--recipe {name}: no such file, and none of {', '.join(known)}")


def benchmark_of(config: RunConfig) -> Benchmark:
    """The benchmark that the recipe's data come from.  Raises UserError for other data."""
    source = config.data.source
    if source not in get_args(Benchmark):
        raise UserError(f"data.source is {source}: expected one of {', '.join(get_args(Benchmark))}")
    return source  # type: ignore[return-value]


def check_export(export: Path, config: RunConfig) -> None:
    """Raise UserError where a model is not the recipe's: its figures would stand beside the paper's."""
    info, curriculum = ExportInfo.read(export), config.curriculum
    pairs = {
        "model.backbone": (info.backbone, config.model.backbone),
        "latent": (info.latent, config.latent),
        "prompt": (info.prompt, config.prompt),
        "the last stage": (info.stage, len(curriculum.stages) - 1),
        "its number of latent steps": (info.latents, curriculum.stages[-1].latents),
        "curriculum.groups": (info.groups, curriculum.groups),
    }
    problems = [f"{export}: {name} is not the recipe's ({is_}; {wanted})"
                for name, (is_, wanted) in pairs.items() if is_ != wanted]  # fmt: skip
    if problems:
        raise UserError(*problems)


def train_run(recipes: Sequence[Path], settings: Mapping[str, str], ds: Path, out: Path, ranks: int | None) -> None:
    """All stages, as `deepspeed pipeline/train.py` trains them.  Raises UserError where that fails."""
    from pipeline.distributed import free_port  # DeepSpeed's import takes its time

    command = ["deepspeed", "--master_port", str(free_port()), *(["--num_accelerators", str(ranks)] if ranks else [])]
    command += [str(ROOT / "pipeline" / "train.py")]
    command += ["--ds", str(ds), "--recipe", ",".join(map(str, recipes)), "--out", str(out)]
    command += [f"--{name}={value}" for name, value in settings.items()]
    say("training", shlex.join(command))
    try:
        status = subprocess.run(command).returncode
    except FileNotFoundError:
        raise UserError("deepspeed is not on the path: activate the environment that it is installed in") from None
    if status:
        raise UserError(f"training ended with status {status}; the same command goes on")


def convert_weights(
    recipes: Sequence[Path], settings: Mapping[str, str], config: RunConfig, weights: Path, out: Path
) -> Path:
    """The export that `pipeline.convert` makes of a released checkpoint, in `out`; one that is there is taken.

    Raises UserError where the one that is there was made of other weights, over another base, or with another alpha.
    """
    if config.model.path is None:
        raise UserError("--from released needs model.path, the base model")
    if (out / FILE).is_file():
        check_converted(out, config, weights)
        say("weights", f"{out} is there, made from {weights}; remove it to convert again")
        return out
    say("weights", f"{weights} over {config.model.path}")
    command = [sys.executable, "-m", "pipeline.convert", "--from", "released", "--weights", str(weights.resolve())]
    command += ["--base", place_of(config.model.path)]
    command += ["--recipe", ",".join(str(recipe.resolve()) for recipe in recipes), "--out", str(out.resolve())]
    command += [f"--{name}={value}" for name, value in settings.items() if name != "model.path"]
    if status := subprocess.run(command, cwd=ROOT).returncode:
        raise UserError(f"the weights could not be converted (status {status})")
    return out


def check_converted(export: Path, config: RunConfig, weights: Path) -> None:
    """Raise UserError where an export was not converted from `weights` as the settings say."""
    made = ExportInfo.read(export).converted
    assert config.model.path is not None
    if made is None:
        raise UserError(f"{export} was not converted from a released file; remove it, or choose another --out")
    pairs = {
        "the base model": (made.base, place_of(config.model.path)),
        "model.lora.alpha": (made.lora_alpha, (config.model.lora or LoraConfig()).alpha),
        f"SHA-256 of {weights}": (made.weights_hash, file_hash(weights)),
    }
    problems = [
        f"{export} was made from {made.weights}, and {name} is {wanted} now, was {before}; remove it, or choose another"
        " --out"
        for name, (before, wanted) in pairs.items()
        if before != wanted
    ]
    if problems:
        raise UserError(*problems)


def table(config: RunConfig, benchmark: Benchmark, report: Report, answers: Path, limit: int | None) -> list[str]:
    """The paper's line, and ours by each scorer."""
    (file,) = answers.glob("*/predictions.jsonl")
    lines = [f"{'':<28}{'accuracy (95% interval)':>28}{'autoregr. steps':>17}{'s/question':>12}"]
    if paper := PAPER.get((config.model.backbone, benchmark)):
        lines.append(f"{'paper':<28}{f'{paper.accuracy:.1f}%':>28}{paper.steps:>17.1f}{paper.seconds:>12.2f}")
    seconds = "" if report.seconds is None else f"{report.seconds:.2f}"
    for judge in JUDGES:
        rows, _ = score_file(file, benchmark, judge)
        right = sum(row.right for row in rows)
        low, high = wilson_interval(right, len(rows))
        accuracy = f"{right / len(rows):.1%} ({low:.1%} to {high:.1%})"
        lines.append(f"{f'here, {judge} scorer':<28}{accuracy:>28}{report.autoregressive_steps:>17.1f}{seconds:>12}")
    lines.append(f"{config.name}, {benchmark}: {report.questions} questions of the split"
                 + (f", drawn evenly (--limit {limit})" if limit else "") + f"; answers in {file}")  # fmt: skip
    return lines


if __name__ == "__main__":
    cli.run(main)
