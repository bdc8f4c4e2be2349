"""The page of `data_prep.report`: how what was measured looks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from data_prep.gallery import LETTERS, sample_html
from data_prep.html_parts import (
    PAGE, STYLE, bars, card, histogram, isolated, legend, percent, table, text,
)  # fmt: skip
from data_prep.measure import Counts, SplitMeasure, mean, quantile

if TYPE_CHECKING:
    from data_prep.report import Report
    from pipeline.preview import StageMeasure

MOST_VALUES = 12
"""Values of a breakdown field that have a bar; the others are added up."""
MOST_SIZES = 8
MOST_GROUPS = 8
"""Numbers of choices that have a row."""


def page(report: Report) -> str:
    """The whole file."""
    sections = {
        "Splits": _splits(report),
        "Breakdown": _fields(report),
        "Lengths": _lengths(report),
        "Pictures": _pictures(report),
        "Answers": _answers(report),
        "Stages": _stages(report),
        "Duplicates": _duplicates(report),
        "Rejects": _rejects(report),
        "Samples": _samples(report),
    }
    name = f"Data report: {text(report.name)}"
    links = "".join(f'<a href="#{title.lower()}">{title}</a>' for title in sections)
    body = [f"<h1>{name}</h1>", *(f'<p class="soft">{text(line)}</p>' for line in report.notes), _findings(report)]
    body += [f"<nav>{links}</nav>"]
    body += [f'<h2 id="{title.lower()}">{title}</h2>\n{content}' for title, content in sections.items()]
    return PAGE.substitute(title=name, style=STYLE, body="\n".join(body))


def _findings(report: Report) -> str:
    items = "".join(f'<li class="{level}">{text(line, 600)}</li>' for level, line in report.findings)
    return card("Worth a look", f"<ul>{items}</ul>" if items else "<p>Nothing stood out.</p>")


def _splits(report: Report) -> str:
    head = ["split", "samples", "shards", "MB", "without picture", "without rationale", "repeated ids", "skipped",
            "rejected", "rows read", "bad"]  # fmt: skip
    rows = []
    for split in report.folder.splits.values():
        counts = split.counts
        named = [f"{counts.get(key, 0):,}" for key in ("without_image", "without_rationale", "repeated_ids", "skipped")]
        rejected = sum(counts.get("rejected", {}).values())
        bad = f'<td class="odd">{split.bad:,}</td>' if split.bad else "0"
        rows.append([text(split.name), f"{split.samples:,}", f"{split.shards:,}", f"{split.bytes / 1e6:,.1f}", *named,
                     f"{rejected:,}", f"{split.rows:,}", bad])  # fmt: skip
    named_bad = [line for split in report.folder.splits.values() for line in split.bad_named]
    more = "".join(f"<li>{text(line, 300)}</li>" for line in [*report.folder.broken, *named_bad])
    return card("", table(head, rows)) + (card("Cannot be read", f"<ul>{more}</ul>") if more else "")


def _values(title: str, series: Mapping[str, Counter[str]]) -> str:
    """A card with a bar for each value and split, the commonest first."""
    merged: Counter[str] = sum(series.values(), Counter())
    common = [value for value, _ in merged.most_common(MOST_VALUES)]
    counts = [(isolated(value, 60), [part[value] for part in series.values()]) for value in common]
    if others := len(merged) - len(common):
        rest = [part.total() - sum(part[value] for value in common) for part in series.values()]
        counts.append((f'<span class="soft">{others:,} others</span>', rest))
    totals = [part.total() for part in series.values()]
    shares = [[n / total if total else 0.0 for n, total in zip(row, totals, strict=True)] for _, row in counts]
    largest = max((max(row) for row in shares), default=0.0)
    rows = [
        [f'<td class="left wrap">{value}</td>', bars(row, largest), *map(percent, row)]
        for (value, _), row in zip(counts, shares, strict=True)
    ]
    unit = f"{len(merged):,} values" if len(merged) > 1 else "1 value"
    return card(title, table(["value", "", *map(text, series)], rows, left=2), unit)


def _fields(report: Report) -> str:
    splits = report.folder.splits
    names = dict.fromkeys(name for split in splits.values() for name in split.fields)
    if not names:
        return '<p class="soft">The rows have no breakdown fields.</p>'
    cards = [
        _values(isolated(name, 60), {s.name: s.fields.get(name, Counter()) for s in splits.values()}) for name in names
    ]
    told = f'<p class="soft">Share of each split\'s rows{_of_read(report)}.</p>'
    return told + legend([*splits]) + f'<div class="grid">{"".join(cards)}</div>'


def _of_read(report: Report) -> str:
    return ", of those that were read" if report.sampled else ""


def _distribution(title: str, unit: str, series: Mapping[str, Counts]) -> str:
    rows = [
        [text(name), f"{values.total():,}", f"{mean(values):,.1f}", *(f"{quantile(values, q):,}" for q in (0.5, 0.95, 1))]
        for name, values in series.items()
    ]
    figures = table(["split", "rows", "mean", "median", "95%", "most"], rows)
    return card(title, histogram(series) + figures, unit)


def _lengths(report: Report) -> str:
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


def _pictures(report: Report) -> str:
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
        [f"{w:,} x {h:,}", f"{often:,}", percent(often, total)]
        for (w, h), often in all_sizes.most_common(MOST_SIZES)
    ]
    cards.append(card("Commonest sizes", table(["pixels", "pictures", "share"], rows), f"{len(all_sizes):,} sizes"))
    return legend([*splits]) + f'<div class="grid">{"".join(cards)}</div>'


def _answers(report: Report) -> str:
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
            cells = [
                f'<td{" class=odd" if abs(z_score(found[i], total, number)) > 4 else ""}>{percent(found[i], total)}</td>'
                if i < number else ""
                for i in range(most)
            ]  # fmt: skip
            rows.append([f"{number}", text(split.name), f"{total:,}", percent(1, number), *cells])
    positions = table(["choices", "split", "rows", "by chance", *LETTERS[:most]], rows, left=2)
    told = '<p class="soft">Shares far from chance (more than 4 standard errors) are marked.</p>'
    return legend([*splits]) + (
        f'<div class="grid">{_distribution("Number of choices", "", choices)}</div><br>'
        + card("Position of the right choice", told + positions, "among rows of so many choices")
    )


def z_score(right: int, total: int, choices: int) -> float:
    """By how many standard errors a position's share differs from chance."""
    chance = 1 / choices
    return (right / total - chance) / (chance * (1 - chance) / total) ** 0.5 if choices > 1 else 0.0


def _stages(report: Report) -> str:
    preview = report.preview
    if preview is None or not report.stages:
        return f'<p class="soft">{text(report.no_stages)}</p>'
    counted = preview.builder is not None
    head = ["stage", "latent steps", "steps skipped", "trains on", "optimizer steps", "latent steps a row",
            "groups of steps left", *(["median", "95%", "most", "lose steps", "too long", "unusable", "padding"]
            if counted else ["words: median", "95%", "most"])]  # fmt: skip
    rows = [_stage(report, stage, counted) for stage in report.stages]
    told = (
        f"What the train split becomes with {text(report.recipe)}: {text(preview.groups)} groups of steps at most"
        f"{_of_read(report)}. "
    )
    if counted:
        told += (
            f"Median, 95% and most are columns of a whole sequence (image, text, latent steps), at most"
            f" {preview.config.prompt.max_tokens:,} (prompt.max_tokens): rows above lose their last steps, or are"
            f" skipped. Padding is the share of columns that only fill up micro-batches of"
            f" {report.stages[0].padding.micro_batch if report.stages[0].padding else '–'} rows, on {report.ranks}"
            " ranks, in the order of training."
        )
    else:
        told += "Words are those of the steps that remain."
    problems = "".join(
        f"<li>stage {stage.number}: {text(reason, 300)} ({often:,} rows)</li>"
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
           *(f"{quantile(stage.columns, q):,}" for q in (0.5, 0.95, 1))]  # fmt: skip
    if counted:
        waste = percent(stage.padding.waste) if stage.padding and stage.padding.padded else "–"
        row += [share(stage.shortened), share(stage.overlong), share(stage.unusable.total()), waste]
    return row


def _length(stage: StageMeasure) -> str:
    return f"{stage.stage.steps:,}" if stage.stage.steps else f"{stage.stage.epochs:g} epochs"


def _duplicates(report: Report) -> str:
    folder = report.folder
    rows = [
        [text(name), f"{folder.splits[name].samples:,}", f"{folder.duplicates.get(name, 0):,}",
         *("" if name == other else f"{folder.also_in.get((name, other), 0):,}" for other in folder.splits)]
        for name in folder.splits
    ]  # fmt: skip
    told = (
        '<p class="soft">Two samples are duplicates if their question and picture are the same, byte for byte; without'
        " a picture, if their question, context and choices are.</p>"
    )
    head = ["split", "samples", "duplicates in it", *(f"also in {text(name)}" for name in folder.splits)]
    return card("", told + table(head, rows))


def _rejects(report: Report) -> str:
    rows: list[list[str]] = []
    for name, split in report.folder.splits.items():
        reasons = Counter(split.counts.get("rejected", {})) + Counter(
            {"skipped": split.counts.get("skipped", 0)} if split.counts.get("skipped") else {}
        )
        rows += [[text(name), isolated(reason, 200), f"{often:,}"] for reason, often in reasons.most_common()]
    if not rows:
        return '<p class="soft">No row was rejected or skipped.</p>'
    examples = [
        [text(entry.get("split", "")), text(entry.get("key", entry.get("row", ""))), isolated(entry.get("id", ""), 80),
         f'<td class="left wrap">{isolated(entry.get("reason", ""), 300)}</td>']
        for entry in report.folder.rejects
    ]  # fmt: skip
    lines = card("Reasons", table(["split", "reason", "rows"], rows, left=2))
    if not examples:
        return lines + '<p class="soft">Their list, rejects.jsonl, is not in the folder.</p>'
    return lines + card("Examples", table(["split", "row", "id", "reason"], examples, left=4))


def _samples(report: Report) -> str:
    return "".join(_gallery(report)) or '<p class="soft">none</p>'


def _gallery(report: Report) -> Iterator[str]:
    if report.preview:
        yield (
            '<p class="soft legend"><span class="item"><span class="chip latent">~</span> latent step</span>'
            '<span class="item"><span class="chip">2</span> group of written steps</span>'
            '<span class="item"><span class="chip gone">3</span> left out: too long</span>'
            '<span class="item"><span class="chip answer">B</span> answer</span></p>'
        )
    for name in report.folder.splits:
        cards = "".join(sample_html(sample, report.preview) for sample in report.gallery if sample.split == name)
        if cards:
            yield f'<h3>{text(name)}</h3><div class="grid">{cards}</div><br>'
