"""The page of `data_prep.report`: how what was measured looks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from data_prep.reporting.charts import answers, breakdown, lengths, pictures, stages
from data_prep.reporting.gallery import sample_html
from data_prep.reporting.html import PAGE, STYLE, card, isolated, table, text

if TYPE_CHECKING:
    from data_prep.report import Report


def page(report: Report) -> str:
    """The whole file."""
    sections = {
        "Splits": _splits(report),
        "Breakdown": breakdown(report),
        "Lengths": lengths(report),
        "Pictures": pictures(report),
        "Answers": answers(report),
        "Stages": stages(report),
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
        for entry in sorted(report.folder.rejects, key=lambda entry: _place(report, entry.get("split", "")))
    ]  # fmt: skip
    lines = card("Reasons", table(["split", "reason", "rows"], rows, left=2))
    if not examples:
        return lines + '<p class="soft">Their list, rejects.jsonl, is not in the folder.</p>'
    return lines + card("Examples", table(["split", "row", "id", "reason"], examples, left=4))


def _place(report: Report, split: str) -> int:
    names = [*report.folder.splits]
    return names.index(split) if split in names else len(names)


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
