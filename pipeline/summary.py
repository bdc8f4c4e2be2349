"""Command: what a run came to, as one short table.  `python -m pipeline.summary --run DIR`"""

from __future__ import annotations

from pathlib import Path

from data_prep import cli
from data_prep.errors import UserError
from data_prep.files import parse_json
from pipeline.scoring.report import read_reports


def main(*, run: Path, split: str = "test") -> None:
    """Print each stage's last loss, the evaluation of a split with its breakdowns, and where everything lies."""
    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"{run} is not a run folder: it has no metrics.jsonl")
    print("\n".join(lines(run, split)))


def lines(run: Path, split: str) -> list[str]:
    """The table's lines."""
    steps, loss = stage_losses(run)
    reports = {r.stage: r for r in read_reports(run / "evaluation" / split)}
    out = [
        f"{'stage':<8}{'steps':>7}{'loss':>9}{'accuracy (95% interval)':>28}{'autoregr. steps':>17}{'s/question':>12}"
    ]
    for stage in sorted(steps):
        row = f"{stage:<8}{steps[stage]:>7}{loss[stage]:>9.4f}"
        if stage in reports:
            r = reports[stage]
            low, high = r.interval
            row += f"{f'{r.accuracy:.1%} ({low:.1%} to {high:.1%})':>28}{r.autoregressive_steps:>17.1f}"
            row += f"{'' if r.seconds is None else format(r.seconds, '.3f'):>12}  {r.name}, N={r.questions}"
        out.append(row)
    out += [line for stage in sorted(reports) for line in reports[stage].breakdowns()]
    out.append(f"TensorBoard:    tensorboard --logdir {run / 'tensorboard'}")
    exports = [run / "export" / f"stage{s}" for s in sorted(steps) if (run / "export" / f"stage{s}").is_dir()]
    out += [f"exported model: {exports[-1]}"] if exports else []
    out += [f"predictions:    {run / 'evaluation' / split}/*/predictions.jsonl"] if reports else []
    return out


def stage_losses(run: Path) -> tuple[dict[int, int], dict[int, float]]:
    """By stage: steps done, and the mean loss of the last 10.  Raises UserError for a damaged line."""
    found: dict[int, list[float]] = {}
    path = run / "metrics.jsonl"
    # what follows the last line end is a line that was cut, or is being written
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            entry = parse_json(line)
            stage, value = int(entry["stage"]), float(entry["loss"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged in line {number} ({type(error).__name__}: {error})") from None
        found.setdefault(stage, []).append(value)
    last = {stage: losses[-10:] for stage, losses in found.items()}
    return {s: len(x) for s, x in found.items()}, {s: sum(x) / len(x) for s, x in last.items()}


if __name__ == "__main__":
    cli.run(main)
