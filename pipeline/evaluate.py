"""Command: answer a split's questions and score them.  `python -m pipeline.evaluate --run DIR | --model EXPORT`

With --run, two models answer: the last stage's with its latent steps, and stage 0's with its written rationale
(explicit CoT).  They are not matched in training budget: the first was trained for more steps.  A model is called
latent where it takes latent steps, whatever its stage, else explicit.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from data_prep import cli
from data_prep.errors import UserError
from data_prep.example import Example
from data_prep.files import write_atomic
from data_prep.reader import BadSample, ShardIndex, open_split
from data_prep.storage import Location, location_of
from pipeline.data.batch import collate
from pipeline.export import FILE, ExportInfo
from pipeline.latent.decode import Decoding, Generation, Sampling
from pipeline.loaded import LoadedModel, load_export
from pipeline.prompt import LETTERS, PROMPTS, UnusableSample
from pipeline.registry import load_plugin
from pipeline.scoring.judges import strict_choice
from pipeline.scoring.report import Report, breakdown, breakdown_fields, write_reports


def main(
    *,
    run: Path | None = None,
    model: Path | None = None,
    data: Location | None = None,
    split: str = "test",
    limit: int | None = None,
    batch: int = 16,
    timed: int = 16,
    max_new_tokens: int | None = None,
    latents: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    plugin: Path | None = None,
    allow_changed_plugin: bool = False,
    prompt: Literal["default", "released", "context"] | None = None,
    out: Path | None = None,
) -> None:
    """Answer the questions of a split and report strict accuracy, autoregressive steps and seconds a question.

    --run: a run folder (latent and explicit) or --model: one export; --data: shard folder, the training one without
    it; --limit: so many questions, drawn evenly; --batch: questions decoded at once; --timed: questions answered one
    by one for the time; --max_new_tokens: of an answer at most, as the model's recipe says without it; --latents: other
    number of latent steps than trained, for the last stage's model; --temperature: 0 takes the likeliest token, above
    it tokens are drawn, among the --top_k likeliest (0: all) and those with probability --top_p together; --seed: of
    the draws, each model's anew; --out: folder for predictions and report, RUN/evaluation/SPLIT or
    EXPORT/evaluation/SPLIT without it; --plugin: the file that the model's method came from, with another text than
    then only under --allow_changed_plugin true; --prompt: as in training, as the released code asks, or with the
    context or hint; as the model's recipe says without it.

    Without a temperature, an answer depends neither on --batch nor on the other questions, but for rounding.  With one,
    all draws come from one generator: the same seed, batch size and limit give the same answers.
    """
    if plugin:
        load_plugin(plugin)
    if (run is None) == (model is None):
        raise UserError("give either --run DIR or --model EXPORT")
    for name, value in (("batch", batch), ("max_new_tokens", max_new_tokens), ("limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: expected 1 or more")
    for name, number in (("latents", latents), ("timed", timed)):
        if number is not None and number < 0:
            raise UserError(f"--{name} {number}: expected 0 or more")
    sampling = read_sampling(temperature, top_p, top_k, seed)
    folder = run or model
    assert folder is not None
    models = exports_of(run) if run else [(kind_of(folder), folder)]
    out = out or folder / "evaluation" / split
    reports = []
    for name, export in models:
        loaded = load_export(export, allow_changed_plugin=allow_changed_plugin)
        if prompt:
            loaded = loaded.asked(**PROMPTS[prompt])
        n = loaded.info.latents
        if latents is not None and export == models[-1][1]:
            name, n = f"{name} n={latents}", latents
        index = open_data(loaded, data, split)
        make_folders(out, name)
        tokens = max_new_tokens or loaded.info.max_new_tokens
        decoding = Decoding(tokens, loaded.processor.eos_id, sampling)
        answers = answer_all(loaded, index, limit, batch, n, decoding, seed)
        seconds = seconds_alone(loaded, index, timed, n, decoding)
        report = write_answers(name, answers, loaded, out, seconds)
        drawn = f", seed {seed}, batch {batch}" if temperature else ""
        reports.append(replace(report, decoding=sampling.describe() + drawn))
    write_reports(reports, out)
    print(table(reports))
    print(f"predictions: {out}/*/predictions.jsonl")


def exports_of(run: Path) -> list[tuple[str, Path]]:
    """(name, folder) of the models of a run to compare, the last stage's last.  Raises UserError where it has none."""
    named = [(re.fullmatch(r"stage(\d+)", p.name), p) for p in run.glob("export/stage*") if (p / FILE).is_file()]
    found = {int(stage[1]): p for stage, p in named if stage}
    if not found:
        raise UserError(f"{run} has no export: train a stage to its end with train.export set to stages or last")
    stages = sorted({0, max(found)} & found.keys())
    kinds = [kind_of(found[stage]) for stage in stages]
    alike = len(set(kinds)) < len(kinds)
    names = [f"{kind} stage {stage}" if alike else kind for kind, stage in zip(kinds, stages, strict=True)]
    return [(name, found[stage]) for name, stage in zip(names, stages, strict=True)]


def kind_of(export: Path) -> str:
    """What a model is called: `latent` where it takes latent steps before its answer, else `explicit`."""
    return "latent" if ExportInfo.read(export).latents else "explicit"


def answers_folder(out: Path, name: str) -> Path:
    """Where the predictions of the model `name` go."""
    return out / name.replace(" ", "-")


def make_folders(out: Path, name: str) -> None:
    """Make the folders of report and predictions.  Raises UserError, before the answers and not after them."""
    for folder in (out, answers_folder(out, name)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"{folder} cannot be written: {error.strerror}; choose another --out") from None


def read_sampling(temperature: float, top_p: float, top_k: int, seed: int) -> Sampling:
    """The options of a command.  Raises UserError."""
    sampling = Sampling(temperature, top_p, top_k)
    problems = sampling.problems()
    if not 0 <= seed < 2**63:
        problems.append(f"--seed {seed}: expected 0 or more, below 2^63")
    if problems:
        raise UserError(*problems)
    return sampling


def open_data(loaded: LoadedModel, data: Location | None, split: str) -> ShardIndex:
    """The split to answer.  Raises UserError."""
    folder = data or location_of(loaded.info.data)
    if data is None and isinstance(folder, Path) and not folder.exists():
        raise UserError(f"the shards {folder} are not here; give --data DIR")
    return open_split(folder, split)


@dataclass
class Answered:
    """One question and what the model said."""

    key: str
    example: Example | None
    """None for a sample that could not be used"""
    text: str = ""
    steps: int = 0
    reason: str = ""


def answer_all(
    loaded: LoadedModel,
    index: ShardIndex,
    limit: int | None,
    batch: int,
    latents: int,
    decoding: Decoding,
    seed: int,
) -> Iterator[Answered]:
    """Answers in the split's order after `latents` latent steps; a bad sample is yielded with its reason."""
    torch.manual_seed(seed)  # runs as the first answer is asked for: whatever was drawn before has no part in it
    count = min(limit or len(index), len(index))
    chosen = [i * len(index) // count for i in range(count)]
    for start in tqdm(range(0, count, batch), desc=f"stage {loaded.info.stage}", unit="batch", mininterval=2):
        rows, examples = [], []
        for i in chosen[start : start + batch]:
            try:
                example = index.read(i)
                rows.append(loaded.builder.prompt_row(example, index.key(i), i, latents))
                examples.append(example)
            except (BadSample, UnusableSample) as error:
                yield Answered(index.key(i), None, reason=str(error))
        if not rows:
            continue
        out = generate_rows(loaded, rows, latents, decoding)
        for row, example in enumerate(examples):
            text = loaded.processor.decode(out.tokens[row])
            yield Answered(rows[row].key, example, text, out.autoregressive_steps(row))


def generate_rows(loaded: LoadedModel, rows: list, latents: int, decoding: Decoding) -> Generation:
    """Decode the rows as one batch."""
    batch = collate(rows, loaded.processor.row_format, latents).to(loaded.device)
    return loaded.model.answer(batch, decoding)


def seconds_alone(loaded: LoadedModel, index: ShardIndex, timed: int, latents: int, decoding: Decoding) -> float | None:
    """Median seconds of a question answered alone, image and text preparation included."""
    seconds = []
    for i in range(min(timed, len(index))):
        try:
            example = index.read(i)
            start = time.perf_counter()
            row = loaded.builder.prompt_row(example, index.key(i), i, latents)
            generate_rows(loaded, [row], latents, decoding)  # ends in host values: nothing is left running
            seconds.append(time.perf_counter() - start)
        except (BadSample, UnusableSample):
            continue
    return statistics.median(seconds) if seconds else None


def write_answers(
    name: str, answers: Iterator[Answered], loaded: LoadedModel, out: Path, seconds: float | None
) -> Report:
    """Predictions in M3CoT's result format, one line a question, and the report over them."""
    style, lines, results, steps, skipped = loaded.info.prompt.answer, [], [], [], 0
    for answer in answers:
        example = answer.example
        if example is None:
            tqdm.write(f"skipped {answer.key}: {answer.reason}")
            skipped += 1
            continue
        choice = strict_choice(answer.text, len(example.choices), style)
        results.append((example, choice == example.answer))
        steps.append(answer.steps)
        lines.append(json.dumps(prediction(example, answer, choice, loaded), ensure_ascii=False) + "\n")
    if not results:
        raise UserError(f"none of the {skipped} samples could be used")
    write_atomic(answers_folder(out, name) / "predictions.jsonl", "".join(lines))
    present = breakdown_fields([example.fields for example, _ in results])
    return Report(
        name=name,
        stage=loaded.info.stage,
        questions=len(results),
        right=sum(right for _, right in results),
        skipped=skipped,
        autoregressive_steps=sum(steps) / max(1, len(steps)),
        seconds=seconds,
        groups={f: breakdown((e.fields.get(f, ""), right) for e, right in results) for f in present},
    )


def prediction(example: Example, answer: Answered, choice: int | None, loaded: LoadedModel) -> dict:
    """A line of predictions.jsonl: M3CoT's fields, and what we know besides."""
    return {
        "id": example.id,
        "choices": list(example.choices),
        "answer": LETTERS[example.answer],
        "domain": example.fields.get("domain", example.dataset),
        "topic": example.fields.get("topic", ""),
        "context": example.context,
        "image": example.image is not None,
        "messages": ["".join(loaded.builder.question(example, answer=True)), answer.text],
        "answer_style": loaded.info.prompt.answer,
        "predicted": None if choice is None else LETTERS[choice],
        "autoregressive_steps": answer.steps,
        "fields": example.fields,
    }


def table(reports: list[Report]) -> str:
    """The reports as text: totals, then each breakdown field."""
    width = max(14, *(len(r.name) + 2 for r in reports))
    head = f"{'model':<{width}}{'questions':>10}{'accuracy':>10}{'95% interval':>16}{'steps':>8}{'s/question':>12}"
    lines = [head]
    for r in reports:
        low, high = r.interval
        seconds = "" if r.seconds is None else f"{r.seconds:.3f}"
        interval = f"{low:.1%}-{high:.1%}"
        lines.append(
            f"{r.name:<{width}}{r.questions:>10}{r.accuracy:>10.1%}{interval:>16}{r.autoregressive_steps:>8.1f}{seconds:>12}"
        )
        lines += [f"  {r.skipped} samples could not be used"] if r.skipped else []
        lines += [f"  tokens drawn: {r.decoding}"] if r.decoding != "greedy" else []
    lines += [line for r in reports for line in r.breakdowns()]
    if len(reports) > 1:
        first, last = reports[0], reports[-1]
        lines.append(
            f"{first.name} is the stage-{first.stage} model: it was trained for fewer steps than the {last.name} one"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
