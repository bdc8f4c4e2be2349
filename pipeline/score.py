"""Command: score a file of answers.  `python -m pipeline.score --benchmark m3cot --predictions FILE`

In `pipeline.scoring`, `judges` says what counts as an answer, `answers` which files are read, `tally` what is counted,
`stats` what the intervals and tests are.
"""

from __future__ import annotations

import json as json_format
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep import cli
from data_prep.errors import UserError
from data_prep.files import write_atomic
from data_prep.storage import Location
from pipeline.scoring.answers import Notes, Question, read_gold, read_predictions
from pipeline.scoring.judges import Benchmark, JudgeName
from pipeline.scoring.report import breakdown
from pipeline.scoring.stats import ChiSquare, Comparison, bootstrap_interval, compare
from pipeline.scoring.tally import Scored, columns, domains, position_bias, score_one, topics


def main(
    *,
    predictions: Path,
    benchmark: Benchmark,
    gold: Location | None = None,
    split: str = "test",
    judge: JudgeName = "official",
    against: Path | None = None,
    seed: int = 0,
    json: Path | None = None,
) -> None:
    """Score answers to M3CoT or ScienceQA, or to questions of that form, as their published results are scored.

    --predictions: predictions.jsonl of an evaluation, M3CoT's published form, or ScienceQA's result file; --gold: right
    answers where the predictions lack them: lines of the same form, problems.json, or a shard folder; --split: of
    --gold; --judge: official is the benchmark's own, strict takes the trained answer sentence alone, released is the
    lenient rule of the paper's code; --against: other predictions, compared on the questions that both have; --seed:
    of the bootstrap; --json: file for the same figures.
    """
    check_options(predictions, gold, against, seed, json)
    answers = None if gold is None else gold_answers(gold, split)
    rows, notes = score_file(predictions, benchmark, judge, answers)
    report = figures(rows, benchmark, judge, seed)
    report["notes"] = {kind: len(places) for kind, places in notes.kinds.items()}
    table = columns_table if benchmark == "scienceqa" else groups_table
    text = [
        f"{predictions}: {benchmark}, {judge} judge",
        table(rows, seed),
        f"no choice found in {report['failed']} of {len(rows)} answers, counted as wrong",
        position_table(rows),
    ]
    if answers is not None:
        report["unanswered"] = len(answers) - len(rows)
        text.append(f"questions of --gold without an answer here, not counted: {report['unanswered']}")
    if against is not None:
        others, _ = score_file(against, benchmark, judge, answers)
        comparison = compare_rows(rows, others, predictions, against, seed)
        report["against"] = asdict(comparison)
        text.append(comparison_text(comparison, against))
    if json is not None:
        write_json(json, report)
    print("\n".join(text))


def check_options(predictions: Path, gold: Location | None, against: Path | None, seed: int, json: Path | None) -> None:
    """Raise UserError for all that can be seen before anything is read."""
    files = {"predictions": predictions, "gold": gold, "against": against}
    problems = [
        f"--{name} {path}: no such file" for name, path in files.items() if isinstance(path, Path) and not path.exists()
    ]
    if json is not None and (json.is_dir() or not json.parent.is_dir()):
        problems.append(f"--json {json}: expected a file in a folder that exists")
    if seed < 0:
        problems.append(f"--seed {seed}: expected 0 or more")
    if problems:
        raise UserError(*problems)


def warn(notes: Notes) -> None:
    """Say what was odd about a file."""
    for line in notes.lines():
        print(f"warning: {line}", file=sys.stderr)


def gold_answers(path: Location, split: str) -> dict[str, Question]:
    """`read_gold`, with warnings of what was odd."""
    notes = Notes(path)
    answers = read_gold(path, split, notes)
    warn(notes)
    return answers


def score_file(
    path: Path, benchmark: Benchmark, judge: JudgeName, gold: dict[str, Question] | None = None
) -> tuple[list[Scored], Notes]:
    """Judge every usable prediction of a file, with warnings of what was odd.

    Raises UserError where it has none, or none that the judge can read.
    """
    notes = Notes(path)
    predictions = read_predictions(path, gold, notes)
    if not predictions:
        raise UserError(*notes.lines(), f"{path}: no question to score")
    if judge != "official" and any(prediction.index is not None for prediction in predictions):
        raise UserError(f"{path} is a result file: it has no texts for --judge {judge}, only --judge official is left")
    warn(notes)
    return [score_one(prediction, benchmark, judge) for prediction in predictions], notes


def figures(rows: Sequence[Scored], benchmark: Benchmark, judge: JudgeName, seed: int) -> dict[str, Any]:
    """What --json holds: accuracies and intervals in % to two decimals."""
    right = sum(row.right for row in rows)
    low, high = bootstrap_interval(right, len(rows), seed)
    groups = (
        {"columns": columns(rows)} if benchmark == "scienceqa" else {"domain": domains(rows), "topic": topics(rows)}
    )
    return {
        "total": {"accuracy": percent(right, len(rows)), "correct": right, "questions": len(rows)},
        **{
            kind: {name: {"accuracy": percent(*counts), "questions": counts[1]} for name, counts in found.items()}
            for kind, found in groups.items()
        },
        "benchmark": benchmark,
        "judge": judge,
        "interval": [round(100 * low, 2), round(100 * high, 2)],
        "failed": sum(row.choice is None for row in rows),
        "position": asdict(position_bias(rows)),
    }


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write the figures.  Raises UserError."""
    try:
        write_atomic(path, json_format.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}") from None


def percent(right: int, total: int) -> float | None:
    """Accuracy in % to two decimals; None of nothing."""
    return round(100 * right / total, 2) if total else None


def groups_table(rows: Sequence[Scored], seed: int) -> str:
    """Total, domains and their topics, a line each."""
    lines = [f"{'':<32}{'questions':>10}{'right':>8}{'accuracy':>10}{'95% bootstrap':>18}"]
    groups = [("total", (sum(row.right for row in rows), len(rows)))]
    for domain, counts in domains(rows).items():
        inside = breakdown((row.question.topic, row.right) for row in rows if row.question.domain == domain)
        groups.append((domain or "(no domain)", counts))
        groups += [(f"  {topic}", of) for topic, of in inside.items() if topic]
    for name, (right, total) in groups:
        interval = interval_text(right, total, seed)
        lines.append(f"{name:<32}{total:>10}{right:>8}{100 * right / total:>9.2f}%{interval:>18}")
    return "\n".join(lines)


def columns_table(rows: Sequence[Scored], seed: int) -> str:
    """ScienceQA's nine columns: accuracy, its interval, questions."""
    found = columns(rows)
    lines = [f"{'':<14}" + "".join(f"{name:>11}" for name in found)]
    cells = {
        "accuracy": [f"{100 * right / total:.2f}%" if total else "-" for right, total in found.values()],
        "95% bootstrap": [interval_text(*counts, seed) if counts[1] else "-" for counts in found.values()],
        "questions": [str(total) if total else "-" for _, total in found.values()],
    }
    lines += [f"{name:<14}" + "".join(f"{cell:>11}" for cell in row) for name, row in cells.items()]
    if not found["TXT"][1] + found["IMG"][1] + found["NO"][1]:
        lines.append("TXT, IMG and NO need to know hints and images: give --gold")
    return "\n".join(lines)


def interval_text(right: int, total: int, seed: int) -> str:
    """Bootstrap interval in %."""
    low, high = bootstrap_interval(right, total, seed)
    return f"{100 * low:.1f}-{100 * high:.1f}"


def position_table(rows: Sequence[Scored]) -> str:
    """Shares of every letter in gold and predictions, and the accuracy where it is right."""
    bias = position_bias(rows)
    shares = {
        "gold": [f"{gold / len(rows):.1%}" for gold in bias.gold.values()],
        "predicted": [f"{predicted / len(rows):.1%}" for predicted in bias.predicted.values()],
        "accuracy": [f"{bias.right[x] / gold:.1%}" if gold else "-" for x, gold in bias.gold.items()],
    }
    lines = [f"{'by position':<14}" + "".join(f"{letter:>8}" for letter in bias.gold)]
    lines += [f"  {name:<12}" + "".join(f"{cell:>8}" for cell in cells) for name, cells in shares.items()]
    lines += [f"  answers that name a letter beyond these: {bias.outside}"] if bias.outside else []
    lines.append(f"  predictions as gold: {chi_square_text(bias.predicted_as_gold)}")
    lines.append(f"  one accuracy: {chi_square_text(bias.equally_right)}")
    return "\n".join(lines)


def chi_square_text(test: ChiSquare) -> str:
    """Statistic, degrees of freedom, p-value."""
    return f"chi-square {test.statistic:.2f}, {test.freedom} degrees of freedom, p {p_text(test.p_value)}"


def p_text(p: float) -> str:
    """`= 0.012`, or a bound where the value is too small for a float."""
    return f"= {p:.2g}" if p > 1e-300 else "< 1e-300"


def compare_rows(
    rows: Sequence[Scored], others: Sequence[Scored], path: Path, other_path: Path, seed: int
) -> Comparison:
    """Compare two files' answers on the ids that both have.  Raises UserError where there is none."""
    theirs = {row.question.id: row for row in others}
    pairs = [(row, theirs[row.question.id]) for row in rows if row.question.id in theirs]
    if not pairs:
        raise UserError(f"{path} and {other_path} have no question in common")
    if unlike := [a.question.id for a, b in pairs if a.question.answer != b.question.answer]:
        print(
            f"warning: {other_path}: other right answers to {len(unlike)} questions: {unlike[0]} ...", file=sys.stderr
        )
    return compare([a.right for a, _ in pairs], [b.right for _, b in pairs], seed)


def comparison_text(c: Comparison, against: Path) -> str:
    """A comparison in one line."""
    low, high = c.interval
    return (
        f"against {against}: {c.questions} shared questions, difference {100 * c.difference:+.2f} points"
        f" ({100 * low:+.1f} to {100 * high:+.1f}); right here alone {c.only_first}, there alone {c.only_second},"
        f" McNemar's exact p {p_text(c.p_value)}"
    )


if __name__ == "__main__":
    cli.run(main)
