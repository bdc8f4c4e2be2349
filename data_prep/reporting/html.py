"""Pieces of a self-contained page: no scripts, nothing from elsewhere.

Whatever comes from data goes through `text`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from string import Template

from data_prep.reporting.measure import Counts, quantile

BINS = 12
"""About as many bars as a histogram has."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")

STYLE = """
:root { --ink: #1b2430; --soft: #5d6878; --line: #dbe0e8; --page: #f4f6f9; --card: #fff; --latent: #7b3fc4;
  --right: #1c7c46; --bad: #b3261e; --note: #8a5a00; --s0: #2f6fde; --s1: #d97706; --s2: #15936b; --track: #e9edf3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9f1; --soft: #9aa6b8; --line: #323c4b; --page: #12171e;
  --card: #1b222c; --latent: #b78bf0; --right: #5cc98b; --bad: #f28b82; --note: #e8b45a; --s0: #6ea3ff;
  --s1: #f0a04b; --s2: #47c59b; --track: #2a3340; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 20px 16px 60px; }
h1 { font-size: 1.6em; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2em; margin: 36px 0 10px; }
h3 { font-size: 1em; margin: 0 0 6px; }
p { margin: 0 0 10px; max-width: 78ch; }
.soft, .unit { color: var(--soft); }
.unit { font-size: .85em; font-weight: normal; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px;
  margin: 0 0 14px; min-width: 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 14px; }
.grid > .card { margin: 0; }
.packed { columns: 330px; column-gap: 14px; } .packed > .card { break-inside: avoid; }
nav { margin: 10px 0 16px; display: flex; flex-wrap: wrap; gap: 4px 16px; }
a { color: var(--s0); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93em; width: 100%; }
th, td { padding: 4px 10px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; vertical-align: top; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
.grid table, .packed table { font-size: .85em; } .grid th, .grid td, .packed th, .packed td { padding: 3px 5px; }
.grid th:first-child, .grid td:first-child, .packed th:first-child, .packed td:first-child { padding-left: 0; }
.grid th:last-child, .grid td:last-child, .packed th:last-child, .packed td:last-child { padding-right: 0; }
tr:last-child > td { border-bottom: 0; }
th.left, td.left { text-align: left; }
td.wrap { white-space: normal; overflow-wrap: anywhere; min-width: 7em; }
td.odd { color: var(--bad); font-weight: 700; }
.bar { display: block; height: 5px; border-radius: 2px; margin-top: 2px; min-width: 1px; }
.s0 { background: var(--s0); fill: var(--s0); } .s1 { background: var(--s1); fill: var(--s1); }
.s2 { background: var(--s2); fill: var(--s2); }
.key { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin: 0 .35em 0 .1em; }
.legend span.item { margin-right: 1.1em; white-space: nowrap; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 9.5px system-ui, sans-serif; }
svg line { stroke: var(--line); }
ul { margin: 0; padding-left: 1.2em; } li { overflow-wrap: anywhere; }
.bad { color: var(--bad); } li.bad { color: inherit; } li.bad::marker { color: var(--bad); content: "▲ "; }
li.note::marker { color: var(--note); }
bdi { overflow-wrap: anywhere; }
details > summary { cursor: pointer; color: var(--soft); }
figure { margin: 0 0 10px; } figure img { max-width: 100%; height: auto; border-radius: 6px; background: #fff;
  border: 1px solid var(--line); display: block; }
.sample .id { font-size: .82em; color: var(--soft); margin-bottom: 8px; overflow-wrap: anywhere; }
.sample ol, .sample ul { margin: 6px 0 10px; padding-left: 0; list-style: none; }
.question { font-weight: 600; margin-bottom: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
.context { font-size: .9em; color: var(--soft); margin-bottom: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
.right { color: var(--right); font-weight: 600; }
.groups > li { display: flex; gap: 8px; margin-bottom: 6px; font-size: .92em; }
.groups .step { display: block; overflow-wrap: anywhere; }
.groups .step + .step { border-top: 1px dotted var(--line); }
.chip { display: inline-block; min-width: 1.7em; padding: 0 .45em; margin: 0 2px 2px 0; border-radius: 9px;
  border: 1px solid var(--line); text-align: center; font-size: .82em; line-height: 1.5; flex: none; height: 1.6em;
  white-space: nowrap; }
.chip.latent { background: var(--latent); border-color: var(--latent); color: var(--card); }
.chip.gone { color: var(--soft); text-decoration: line-through; border-style: dashed; }
.chip.answer { color: var(--right); border-color: var(--right); }
.stages td { padding: 3px 8px 3px 0; white-space: normal; } .stages td:last-child { white-space: nowrap; }
@media (max-width: 560px) { main { padding: 14px 10px 40px; } .card { padding: 12px; } th, td { padding: 4px 7px; } }
"""


def clean(value: object) -> str:
    """A text without control characters and lone surrogates, for a page or a terminal."""
    return _CONTROL.sub("\ufffd", str(value)).encode(errors="replace").decode()


def text(value: object, most: int = 1200) -> str:
    """Any text as HTML, with its end left out where it is longer than `most` characters."""
    whole = clean(value)
    more = f" … ({len(whole) - most:,} more characters)" if len(whole) > most else ""
    return html.escape(whole[:most] + more)


def isolated(value: object, most: int = 200) -> str:
    """A text of the data's own inside a line of ours, whichever direction it is written in."""
    return f"<bdi>{text(value, most) or '(empty)'}</bdi>"


def percent(part: float, whole: float = 1) -> str:
    """ "12.3%"; a dash of nothing."""
    return f"{part / whole:.1%}" if whole else "–"


def plural(number: int, thing: str) -> str:
    """ "1 split", "2 splits"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def card(title: str, content: str, unit: str = "", anchor: str = "") -> str:
    head = f"<h3>{title}{f' <span class=unit>{unit}</span>' if unit else ''}</h3>" if title else ""
    return f'<section class="card"{f" id={anchor}" if anchor else ""}>{head}{content}</section>\n'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1, kind: str = "") -> str:
    """Cells are HTML; the first `left` columns are words, the others figures.  A cell may be a whole `<td`."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            cell if cell.startswith("<td") else f"<{tag}{' class=left' if i < left else ''}>{cell}</{tag}>"
            for i, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>\n" for row in rows)
    top = f"<thead><tr>{cells(head, 'th')}</tr></thead>" if head else ""
    return f'<div class="scroll"><table{f" class={kind}" if kind else ""}>{top}<tbody>{body}</tbody></table></div>'


def legend(names: Sequence[str]) -> str:
    """Which colour is which split."""
    items = "".join(
        f'<span class="item"><span class="key s{i % 3}"></span>{text(name)}</span>' for i, name in enumerate(names)
    )
    return f'<p class="legend soft">{items}</p>'


def bars(shares: Sequence[float], largest: float) -> str:
    """A bar for each split, of which one of `largest` is as wide as there is room."""
    return "".join(
        f'<span class="bar s{i % 3}" style="width:{100 * share / largest:.1f}%"></span>'
        for i, share in enumerate(shares)
        if share
    )


def bin_width(values: Counts) -> int:
    """1, 2 or 5 times a power of ten, so that about `BINS` bars reach to the 99% quantile."""
    reach, width = quantile(values, 0.99) + 1 - min(values, default=0), 1
    while width * BINS < reach:
        width = width * 5 // 2 if str(width).startswith("2") else width * 2
    return width


def histogram(series: Mapping[str, Counts]) -> str:
    """An SVG: side by side, the share of each split's values in every bin; the last bin is open."""
    merged: Counts = sum(series.values(), Counts())
    if not merged:
        return '<p class="soft">none</p>'
    width = bin_width(merged)
    first = min(merged) // width
    last = min(max(merged) // width, first + BINS + 1)
    heights = {name: [0.0] * (last - first + 1) for name in series}
    for name, values in series.items():
        for value, often in values.items():
            heights[name][min(value // width, last) - first] += often / values.total()
    top, bins = max(max(column) for column in heights.values()), last - first + 1
    step, base, tall = min(340 / bins, 48), 128, 108
    drawn = [f'<line x1="10" x2="350" y1="{base}" y2="{base}"/>', f'<text x="10" y="12">{top:.0%}</text>']
    for b in range(bins):
        low, open_end = (first + b) * width, b == bins - 1 and max(merged) >= (first + b + 1) * width
        label = f"{low:,}" + ("+" if open_end else "")
        spaced = bins * (len(f"{last * width:,}") + 1) * 5.6 > 340
        if not spaced or b % 2 == 0:
            drawn.append(f'<text x="{10 + (b + 0.5) * step:.1f}" y="142" text-anchor="middle">{label}</text>')
        told = label if open_end or width == 1 else f"{low:,} to {low + width - 1:,}"
        one = step * 0.84 / len(series)
        for i, (name, column) in enumerate(heights.items()):
            high = tall * column[b] / top
            x = 10 + (b + 0.08) * step + i * one
            drawn.append(
                f'<rect class="s{i % 3}" x="{x:.1f}" y="{base - high:.1f}" width="{one * 0.92:.1f}"'
                f' height="{high:.1f}"><title>{text(name)}, {told}: {column[b]:.1%}</title></rect>'
            )
    return f'<svg viewBox="0 0 360 148" role="img" aria-label="histogram">{"".join(drawn)}</svg>'
