"""Command: one page about a shard folder, to look at before training (`python -m data_prep.report --help`)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep import cli
from data_prep.errors import UserError
from data_prep.files import write_atomic
from data_prep.reporting.gallery import LETTERS, Sample, pick
from data_prep.reporting.html import clean, percent, plural
from data_prep.reporting.measure import (
    ODD,
    Folder,
    measure_index,
    measure_rows,
    open_folder,
    quantile,
    read_rejects,
    z_score,
)
from data_prep.reporting.page import page

if TYPE_CHECKING:
    from pipeline.data.preview import Preview
    from pipeline.data.stage_measure import StageMeasure

WASTE = 0.3
"""Share of padding above which a stage is worth a look."""
DEMO_RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "demo.yaml"


@dataclass
class Report:
    """All that is shown."""

    name: str
    folder: Folder
    preview: Preview | None
    recipe: str
    rows: int
    """Most rows of a split that were read"""
    ranks: int
    stages: list[StageMeasure] = field(default_factory=list)
    no_stages: str = ""
    """Why there are none"""
    gallery: list[Sample] = field(default_factory=list)
    findings: list[tuple[str, str]] = field(default_factory=list)
    """("bad" or "note", a line)"""

    @property
    def unit(self) -> str:
        return self.preview.unit if self.preview else "words"

    @property
    def tokenizer(self) -> str:
        """What lengths are counted in."""
        return self.preview.note if self.preview else "words are counted, as no recipe says which tokenizer to take"

    @property
    def sampled(self) -> bool:
        """Whether not all rows were read."""
        return any(split.samples > self.rows for split in self.folder.splits.values())

    @property
    def of_read(self) -> str:
        """Said of figures that not all rows went into."""
        return ", of those that were read" if self.sampled else ""

    @property
    def stage_rows(self) -> int:
        """Rows that the stages were shown."""
        train = self.folder.splits.get("train")
        return min(self.rows, train.samples) if train else 0

    @property
    def notes(self) -> list[str]:
        """What stands at the page's head."""
        folder, splits = self.folder, self.folder.splits.values()
        samples, size = sum(split.samples for split in splits), sum(split.bytes for split in splits)
        made = folder.manifest.get("source")
        source = f", made from {made['name']}" if isinstance(made, dict) and "name" in made else ""
        read = f"; {self.rows:,} evenly spread rows of each split were read" if self.sampled else ""
        held = f"{plural(samples, 'sample')} in {plural(len(splits), 'split')}, {size / 1e6:,.1f} MB"
        what = f"{folder.location}: {held}{source}{read}."
        return [what, *([f"Recipe: {self.recipe}."] if self.preview else [])]


def make_report(
    data: str, recipes: list[Path], options: dict[str, str], rows: int, samples: int, seed: int, ranks: int
) -> Report:
    """Measure a shard folder.  Raises UserError where it is none, or the recipe is none."""
    folder = open_folder(data)
    preview: Preview | None = None
    train = folder.indexes.get("train")
    if recipes:
        from pipeline.data.preview import (
            open_preview,  # the trainer's libraries, for those who want to know of training
        )

        own = inspect.signature(main).parameters
        preview = open_preview(data, recipes, options, train, rows, own)
    name = data.rstrip("/").rpartition("/")[2] or data
    report = Report(name, folder, preview, ", ".join(map(_near, recipes)), rows, ranks)
    count = preview.count if preview else lambda text: len(text.split())
    for split, index in folder.indexes.items():
        measure_index(index, folder.splits[split])
        measure_rows(index, folder.splits[split], rows, count)
        report.gallery += pick(index, samples, seed, preview)
    folder.rejects = list(read_rejects(folder))
    if preview is not None and train is not None:
        report.stages = preview.measure(train, rows, ranks)
    report.no_stages = "There is no train split." if preview else "No recipe was given (--recipe)."
    report.findings = list(findings(report))
    return report


def _near(path: Path) -> str:
    """As it is called from here."""
    near = str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    return f"{near} (--recipe takes another)" if path == DEMO_RECIPE else near


def findings(report: Report) -> Iterator[tuple[str, str]]:
    """What a user should know before training."""
    folder = report.folder
    yield from (("bad", line) for line in folder.broken)
    for name, split in folder.splits.items():
        if split.bad:
            yield "bad", f"{name}: {plural(split.bad, 'row')} cannot be read, such as {split.bad_named[0]}"
        if not split.samples:
            yield "bad", f"{name}: the split is empty"
        if rejected := sum(split.counts.get("rejected", {}).values()):
            yield "note", f"{name}: {plural(rejected, 'source row')} rejected when the folder was made"
        if repeated := split.counts.get("repeated_ids", 0):
            yield "note", f"{name}: {plural(repeated, 'repeated id')}"
        if name == "train" and (without := split.counts.get("without_rationale", 0)):
            yield "note", f"{name}: {plural(without, 'sample')} ({percent(without, split.samples)}) without a rationale"
        if found := folder.duplicates.get(name, 0):
            yield (
                "note",
                f"{name}: {plural(found, 'duplicate')} ({percent(found, split.samples)}) of other samples in it",
            )
        for choices, answers in sorted(split.answers.items()):
            for position in range(min(choices, len(LETTERS))):
                right, total = answers[position], answers.total()
                if abs(z_score(right, total, choices)) > ODD:
                    told = f"{LETTERS[position]} is right in {percent(right, total)} of {total:,} rows"
                    yield "note", f"{name}: of {choices} choices, {told}, by chance {percent(1, choices)}"
    for (one, other), found in folder.also_in.items():
        if found and one == "train":
            told = f"{plural(found, 'sample')} of train also in {other}"
            yield "bad", f"{told} (same question and picture): results on {other} would be too good"
    for stage in report.stages:
        yield from _stage_findings(report, stage)


def _stage_findings(report: Report, stage: StageMeasure) -> Iterator[tuple[str, str]]:
    if stage.problem:
        yield "bad", f"training would refuse it: {stage.problem}"
    limit = report.preview.config.prompt.max_tokens if report.preview else 0
    parts = {"lose steps": stage.shortened, "are skipped": stage.overlong}
    if told := " and ".join(f"{percent(part, stage.rows)} {what}" for what, part in parts.items() if part):
        yield "note", f"stage {stage.number}: of the rows {told}: longer than {limit:,} (prompt.max_tokens)"
    for reason, often in stage.unusable.most_common(1):
        unusable = percent(stage.unusable.total(), stage.rows)
        yield "bad", f"stage {stage.number}: {unusable} of the rows cannot be used, such as: {reason} ({often:,})"
    if stage.padding and stage.padding.waste > WASTE:
        told = f"micro-batches of {stage.padding.micro_batch:,} rows are {percent(stage.padding.waste)} padding"
        yield "note", f"stage {stage.number}: {told}; smaller ones waste less"


def summary(report: Report) -> Iterator[str]:
    """The lines that the command prints at its end."""
    yield from (clean(line) for line in report.notes)
    yield (
        f"{'split':<8}{'samples':>10}{'no picture':>12}{'bad':>6}{'duplicates':>12}{'steps':>7}"
        + "".join(f"{kind:>11}" for kind in ("question", "rationale"))
        + f"   (median; {report.unit})"
    )
    for name, split in report.folder.splits.items():
        lengths = "".join(
            f"{quantile(split.lengths[kind], 0.5) if kind in split.lengths else 0:>11,}"
            for kind in ("question", "rationale")
        )
        yield (
            f"{clean(name):<8}{split.samples:>10,}{split.counts.get('without_image', 0):>12,}{split.bad:>6,}"
            f"{report.folder.duplicates.get(name, 0):>12,}{quantile(split.steps, 0.5):>7,}{lengths}"
        )
    if report.stages and report.preview and report.preview.builder:
        yield f"{'stage':<8}{'columns: median':>18}{'95%':>8}{'most':>8}{'lose steps':>12}{'skipped':>9}{'padding':>9}"
        for stage in report.stages:
            columns = "".join(f"{quantile(stage.columns, q):>{w},}" for q, w in ((0.5, 18), (0.95, 8), (1, 8)))
            skipped = percent(stage.overlong + stage.unusable.total(), stage.rows)
            waste = percent(stage.padding.waste) if stage.padding and stage.padding.padded else "–"
            yield f"{stage.number:<8}{columns}{percent(stage.shortened, stage.rows):>12}{skipped:>9}{waste:>9}"
    yield clean(report.tokenizer)
    if report.findings:
        yield "worth a look:"
        yield from (f"  {clean(line)}" for _, line in report.findings)


def main(
    *,
    data: str,
    out: Path | None = None,
    recipe: str | None = None,
    sample: int = 5000,
    gallery: int = 12,
    seed: int = 0,
    ranks: int = 1,
    **options: str,
) -> None:
    """Write one HTML file about a shard folder: counts, lengths, pictures, duplicates, what each stage of a recipe will
    show, and some samples; print the same in short.

    --data: the folder; --out: the file, DATA-report.html without it; --recipe: recipes/*.yaml, the demo without it,
    several with commas between them, `none` leaves the stages out; --sample: most rows of a split that are read, evenly
    spread; --gallery: samples of a split that are shown, drawn with --seed; --ranks: of the training whose padding is
    counted; --SECTION.FIELD VALUE: a setting of the recipe, such as --prompt.max_tokens 400.

    Example: python -m data_prep.report --data data/m3cot --recipe recipes/best/qwen2vl_m3cot.yaml
    """
    for name, value, least in (("sample", sample, 1), ("gallery", gallery, 0), ("seed", seed, 0), ("ranks", ranks, 1)):
        if value < least:
            raise UserError(f"--{name} {value}: expected {least} or more")
    recipes = [] if recipe == "none" else [Path(name) for name in recipe.split(",")] if recipe else [DEMO_RECIPE]
    if not recipes and (problems := cli.unknown_options(options, inspect.signature(main).parameters)):
        raise UserError(*problems)
    place = out or Path(f"{data.rstrip('/').rpartition('/')[2] if '://' in data else data.rstrip('/')}-report.html")
    with cli.terminated_as_interrupted():
        report = make_report(data, recipes, options, sample, gallery, seed, ranks)
        try:
            write_atomic(place, page(report))
        except OSError as error:
            raise UserError(f"--out {place}: cannot be written ({error.strerror or error})") from None
    for line in summary(report):
        print(line)
    print(f"written to {place}")


if __name__ == "__main__":
    cli.run(main)
