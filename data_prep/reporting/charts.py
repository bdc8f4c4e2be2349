"""The parts of `data_prep.report`'s page that draw: breakdowns, lengths, pictures, answers, stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from data_prep.reporting.gallery import LETTERS
from data_prep.reporting.html import bars, card, histogram, isolated, legend, percent, plural, table, text
from data_prep.reporting.measure import ODD, Counts, SplitMeasure, mean, quantile, z_score

if TYPE_CHECKING:
    from data_prep.report import Report
    from pipeline.data.stage_measure import StageMeasure

MOST_VALUES = 12
"""Values of a breakdown field that have a bar; the others are added up."""
MOST_SIZES = 8
MOST_GROUPS = 8
"""Numbers of choices that have rows."""


def _values(title: str, series: Mapping[str, Counter[str]]) -> str:
    """A card with bars for each value, the commonest first; none where nearly every row has a value of its own."""
    merged: Counter[str] = sum(series.values(), Counter())
    told = plural(len(merged), "value")
    if len(merged) > max(MOST_VALUES, merged.total() / 2):
        return card(title, '<p class="soft">Nearly every row has a value of its own.</p>', told)
    common = [value for value, _ in merged.most_common(MOST_VALUES)]
    shares = {value: [part[value] / max(1, part.total()) for part in series.values()] for value in common}
    largest = max(max(row) for row in shares.values())
    rows = [
        [f'<td class="left wrap">{isolated(value, 80)}{bars(row, largest)}</td>', *map(percent, row)]
        for value, row in shares.items()
    ]
    if others := len(merged) - len(common):
        rest = [
            sum(n for value, n in part.items() if value not in shares) / max(1, part.total())
            for part in series.values()
        ]
        rows.append([f'<td class="left soft">{plural(others, "other")}</td>', *map(percent, rest)])
    return card(title, table(["", *map(text, series)], rows), told)


def breakdown(report: Report) -> str:
    """Bars of the rows' breakdown fields."""
    splits = report.folder.splits
    names = dict.fromkeys(name for split in splits.values() for name in split.fields)
    if not names:
        return '<p class="soft">The rows have no breakdown fields.</p>'
    cards = [
        _values(isolated(name, 60), {s.name: s.fields.get(name, Counter()) for s in splits.values()}) for name in names
    ]
    told = f'<p class="soft">Share of each split\'s rows{report.of_read}.</p>'
    return told + legend([*splits]) + f'<div class="packed">{"".join(cards)}</div>'


def _distribution(title: str, unit: str, series: Mapping[str, Counts]) -> str:
    rows = [
        [text(name), f"{values.total():,}", f"{mean(values):,.1f}", *_quantiles(values)]
        for name, values in series.items()
    ]
    figures = table(["split", "rows", "mean", "median", "95%", "most"], rows)
    return card(title, histogram(series) + figures, unit)


def _quantiles(values: Counts) -> list[str]:
    """Median, 95% and largest."""
    return [f"{quantile(values, share):,}" for share in (0.5, 0.95, 1)]


def lengths(report: Report) -> str:
    """Lengths of texts and rationales."""
    splits, unit = report.folder.splits, report.unit
    kinds = ("question", "context", "choices", "rationale", "answer")
    titles = {"answer": "Right choice", "choices": "All choices"}
    cards = [
        _distribution(titles.get(kind, kind.capitalize()), unit, _series(splits, kind))
        for kind in kinds
        if any(kind in split.lengths for split in splits.values())
    ]
    cards.append(_distribution("Reasoning steps", "of all samples", {s.name: s.steps for s in splits.values()}))
    told = (
        f"{text(report.tokenizer)[:1].upper()}{text(report.tokenizer)[1:]}. A bar is the share of a split's rows; the"
        " figure below it is the lower end of its range."
    )
    return f'<p class="soft">{told}</p>' + legend([*splits]) + f'<div class="grid">{"".join(cards)}</div>'


def _series(splits: Mapping[str, SplitMeasure], kind: str) -> dict[str, Counts]:
    return {split.name: split.lengths.get(kind, Counter()) for split in splits.values()}


def pictures(report: Report) -> str:
    """Sizes of pictures, and what they take of a sequence."""
    splits = report.folder.splits
    if not any(split.sizes for split in splits.values()):
        return '<p class="soft">All questions are text alone.</p>'
    sides: dict[str, Counts] = {name: Counter() for name in splits}
    columns: dict[str, Counts] = {name: Counter() for name in splits}
    all_sizes: Counter[tuple[int, int]] = Counter()
    for name, split in splits.items():
        all_sizes.update(split.sizes)
        for size, often in split.sizes.items():
            sides[name][max(size)] += often
            if report.preview and (taken := report.preview.image_columns(*size)) is not None:
                columns[name][taken] += often
    cards = [_distribution("Longer side", "pixels", sides)]
    if any(columns.values()):
        cards.append(_distribution("Image columns", "of the recipe's model", columns))
    total = all_sizes.total()
    rows = [
        [f"{w:,} x {h:,}", f"{often:,}", percent(often, total)] for (w, h), often in all_sizes.most_common(MOST_SIZES)
    ]
    cards.append(card("Commonest sizes", table(["pixels", "pictures", "share"], rows), plural(len(all_sizes), "size")))
    return legend([*splits]) + f'<div class="grid">{"".join(cards)}</div>'


def answers(report: Report) -> str:
    """Where the right answers are."""
    splits = report.folder.splits
    choices = {name: Counter({n: c.total() for n, c in split.answers.items()}) for name, split in splits.items()}
    numbers: Counts = sum(choices.values(), Counter())
    if not numbers:
        return '<p class="soft">No row was read.</p>'
    most = min(max(numbers), len(LETTERS))
    rows = []
    for number in sorted(n for n, _ in numbers.most_common(MOST_GROUPS)):
        for split in splits.values():
            if not (found := split.answers.get(number)):
                continue
            total = found.total()
            cells = [_position(found[i], total, number) for i in range(min(number, most))] + [""] * (most - number)
            rows.append([f"{number}", text(split.name), f"{total:,}", percent(1, number), *cells])
    positions = table(["choices", "split", "rows", "by chance", *LETTERS[:most]], rows, left=2)
    told = f'<p class="soft">Shares far from chance (more than {ODD} standard errors) are marked.</p>'
    return legend([*splits]) + (
        f'<div class="grid">{_distribution("Number of choices", "", choices)}</div><br>'
        + card("Position of the right choice", told + positions, "among rows of so many choices")
    )


def _position(right: int, rows: int, choices: int) -> str:
    odd = abs(z_score(right, rows, choices)) > ODD
    return f'<td class="odd">{percent(right, rows)}</td>' if odd else percent(right, rows)


def stages(report: Report) -> str:
    """What a recipe's stages make of the train split."""
    preview = report.preview
    if preview is None or not report.stages:
        return f'<p class="soft">{text(report.no_stages)}</p>'
    counted = preview.builder is not None
    head = ["stage", "latent steps", "steps skipped", "trains on", "optimizer steps", "latent steps a row",
            "groups of steps left", *(["median", "95%", "most", "lose steps", "too long", "unusable", "padding"]
            if counted else ["words: median", "95%", "most"])]  # fmt: skip
    rows = [_stage(report, stage, counted) for stage in report.stages]
    groups = plural(preview.groups, "group")
    told = f"What {plural(report.stage_rows, 'row')} of the train split become, with at most {groups} of steps each. "
    padding = next((stage.padding for stage in report.stages if stage.padding), None)
    if not counted:
        told += "Words are those of the steps that remain."
    else:
        told += (
            "Median, 95% and most are columns of a whole sequence (image, text, latent steps); rows above"
            f" {preview.config.prompt.max_tokens:,} (prompt.max_tokens) lose their last steps, or are skipped. "
        )
    if padding:
        told += (
            f"Padding is the share of columns that only fill up micro-batches of {plural(padding.micro_batch, 'row')},"
            f" on {plural(report.ranks, 'rank')}, in the order of training; a skipped row's slot is padding too."
        )
    problems = "".join(
        f"<li>stage {stage.number}: {text(reason, 300)} ({plural(often, 'row')})</li>"
        for stage in report.stages
        for reason, often in ([(stage.problem, stage.rows)] if stage.problem else []) + stage.unusable.most_common(3)
    )
    where = "".join(
        f"<li>stage {stage.number}: only rows whose {isolated(name, 60)} is {isolated(', '.join(values), 200)}</li>"
        for stage in report.stages for name, values in stage.stage.where.items()
    )  # fmt: skip
    series = {f"stage {stage.number}": stage.columns for stage in report.stages}
    drawn = "".join(card(text(name), histogram({name: counts})) for name, counts in series.items())
    return (
        f'<p class="soft">{told}</p>{card("", table(head, rows))}'
        + (card("", f"<ul>{where}{problems}</ul>") if where or problems else "")
        + f'<h3>Sequence lengths <span class="unit">{"columns" if counted else "words"}</span></h3>'
        f'<div class="grid">{drawn}</div>'
    )


def _stage(report: Report, stage: StageMeasure, counted: bool) -> list[str]:
    def share(part: int) -> str:
        return f'<td class="odd">{percent(part, stage.rows)}</td>' if part else percent(0, stage.rows)

    trained = f"{stage.samples:,}" if stage.samples is not None else f"{percent(stage.rows, report.stage_rows)}"
    length = f"{stage.steps:,}" if stage.steps is not None else _length(stage)
    row = [f"{stage.number}", f"{stage.stage.latents}", f"{stage.stage.skip}", trained, length,
           f"{mean(stage.latents):.2f}", f"{mean(stage.remaining):.2f}",
           *_quantiles(stage.columns)]  # fmt: skip
    if counted:
        waste = percent(stage.padding.waste) if stage.padding and stage.padding.padded else "–"
        row += [share(stage.shortened), share(stage.overlong), share(stage.unusable.total()), waste]
    return row


def _length(stage: StageMeasure) -> str:
    return f"{stage.stage.steps:,}" if stage.stage.steps else f"{stage.stage.epochs:g} epochs"
