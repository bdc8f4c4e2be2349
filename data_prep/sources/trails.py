"""Generated source: grids of two-coloured flags whose arrows make trails to follow.

A picture shows `grid` x `grid` flags, each with a left and a right colour (no two flags of a picture are
alike) and an arrow to a neighbouring flag. A `follow` question needs `hops` looks in a row, each depending on
the last; the other kinds need one look, and give a rationale in which the asked flag comes last:

    follow     "Start at the red blue flag and follow 3 arrows. Which flag is reached?"
    look       "Which way does the red blue flag point?"
    neighbour  "Which flag does the red blue flag point to?"
    describe   "Which flag is in row 1, column 3?"

Example `i` of a split is a pure function of (options, split, i). Train, val and test share no picture: a hash
of what a picture shows decides which split it may be in.
"""

from __future__ import annotations

import functools
import random
import re
from dataclasses import dataclass

from data_prep.errors import UserError
from data_prep.example import Example
from data_prep.sources import SPLITS
from data_prep.sources.flags import ARROWS, PALETTE, Layout, neighbours

KINDS = ("follow", "look", "neighbour", "describe")
CHOICES = 4

_DECK = 100
"""Kinds are dealt from shuffled decks of this many examples, each with the exact mix."""
_MAX_REDRAWS = 20_000
"""More redraws than that mean that the options cannot be met."""


@dataclass(frozen=True)
class TrailsOptions:
    """What the pictures and questions are like."""

    grid: int = 4
    """Flags per row and column."""
    cell: int = 28
    """Width and height of a flag in pixels."""
    hops: str = "2-3"
    """Arrows to follow in a `follow` question: a number or a range, both ends included."""
    colours: int = 8
    """How many of the palette's colours are used."""
    mix: str = "describe:0.2,look:0.3,neighbour:0.2,follow:0.3"
    """Share of each kind of question, in hundredths that add up to 1."""
    seed: int = 0
    """Another seed gives other examples."""
    train: int = 20_000
    """Number of examples of the split."""
    val: int = 500
    """Number of examples of the split."""
    test: int = 1_000
    """Number of examples of the split."""

    def hop_range(self) -> range:
        """`hops` as numbers."""
        match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", self.hops)
        return range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)

    def deck(self) -> list[str]:
        """`mix` as `_DECK` kinds in a fixed order; of another length if the shares are not parts that add up to 1."""
        shares = {kind: float(share) for kind, _, share in (part.partition(":") for part in self.mix.split(","))}
        if not all(0 <= share <= 1 for share in shares.values()):
            return []  # before a list of 1e8 hundreds is made
        return [kind for kind, share in sorted(shares.items()) for _ in range(round(share * _DECK))]

    def problems(self) -> list[str]:
        """One line for each option that cannot be met."""
        hops, cells = self.hop_range(), self.grid**2
        try:
            deck = self.deck()
        except ValueError:
            deck = []
        checks = {
            "--grid: expected 3 or more": self.grid >= 3,
            "--cell: expected 12 to 256 pixels": 12 <= self.cell <= 256,
            f"--hops {self.hops}: expected 1 or more, or a range such as 2-3": bool(hops) and hops[0] >= 1,
            f"--colours: expected 2 to {len(PALETTE)}": 2 <= self.colours <= len(PALETTE),
            f"--grid {self.grid} needs {cells} different flags; --colours {self.colours} gives "
            f"{self.colours * (self.colours - 1)}": self.colours * (self.colours - 1) >= cells,
            f"--mix {self.mix}: expected KIND:SHARE,... of {', '.join(KINDS)}, hundredths that add up to 1":
                len(deck) == _DECK and set(deck) <= set(KINDS),
            "--seed: expected 0 or more": self.seed >= 0,
            "--train, --val, --test: expected 0 or more": min(self.train, self.val, self.test) >= 0,
        }  # fmt: skip
        return [line for line, met in checks.items() if not met]


class Trails:
    """The source; see the module's header.

    Raises:
        UserError: options that cannot be met.
    """

    name = "trails"

    def __init__(self, options: TrailsOptions | None = None) -> None:
        self.options = options or TrailsOptions()
        if problems := self.options.problems():
            raise UserError(*problems)

    def input(self) -> None:
        return None

    def splits(self) -> list[str]:
        return [split for split in SPLITS if self.rows(split)]

    def rows(self, split: str) -> int:
        return {"train": self.options.train, "val": self.options.val, "test": self.options.test}[split]

    def example(self, split: str, row: int) -> Example:
        """Example `row` of a split; any row from 0 on is defined, the split's size does not matter."""
        options = self.options
        rng = random.Random(f"trails {options.seed} {split} {row}")
        kind, ordinal = self._deal(split, row)
        # Examples of a kind cycle through the answer's position, then through what else is to be balanced.
        cycle, position = divmod(ordinal, CHOICES)
        hops = options.hop_range()
        for _ in range(_MAX_REDRAWS):
            layout = Layout.draw(rng, options.grid, options.colours)
            while layout.split() != split:
                layout = Layout.draw(rng, options.grid, options.colours)
            if kind == "follow":
                asked = _follow(layout, rng, hops[cycle % len(hops)])
            elif kind == "look":
                asked = _look(layout, rng, position)
            elif kind == "neighbour":
                asked = _neighbour(layout, rng)
            else:
                asked = _describe(layout, rng)
            if asked is not None:
                return self._example(split, row, kind, position, layout, asked)
        raise UserError(f"--hops {options.hops} is too many for --grid {options.grid}: no picture has 4 such trails")

    def _deal(self, split: str, row: int) -> tuple[str, int]:
        """The kind of a row, and how many rows of that kind the split has before it."""
        number, offset = divmod(row, _DECK)
        deck = _shuffled_deck(self.options, split, number)
        kind = deck[offset]
        return kind, number * deck.count(kind) + deck[:offset].count(kind)

    def _example(self, split: str, row: int, kind: str, position: int, layout: Layout, asked: _Asked) -> Example:
        choices = list(asked.wrong)
        choices.insert(position, asked.right)
        return Example(
            id=f"{split}-{row:09d}", dataset=self.name, split=split,
            question=asked.question, choices=tuple(choices), answer=position, rationale=asked.rationale,
            image=layout.picture(self.options.cell),
            fields={"kind": kind, "hops": str(asked.hops), "grid": str(layout.grid)},
        )  # fmt: skip


Options = TrailsOptions
open_table = Trails


@dataclass(frozen=True)
class _Asked:
    """A question about a layout; `wrong` holds `CHOICES` - 1 texts, `hops` counts the arrows to follow."""

    question: str
    right: str
    wrong: list[str]
    rationale: str
    hops: int


def _follow(layout: Layout, rng: random.Random, hops: int) -> _Asked | None:
    """Follow `hops` arrows; None if the picture has no start that gives a fair question.

    Fair: no cell is visited twice, and the wrong choices are where other such trails of the same length end,
    as near to the start and on cells of the same checkerboard colour as the right one, so that nothing but
    the arrows tells.
    """
    paths = [layout.path(start, hops) for start in range(layout.grid**2)]
    trails = [path for path in paths if len(set(path)) == len(path)]
    ends = {path[-1] for path in trails}
    by_end: dict[int, list[tuple[int, list[int]]]] = {}
    for path in trails:
        fair = sorted(end for end in ends if end != path[0] and _reachable(layout.grid, path[0], end, hops))
        if len(fair) >= CHOICES:
            by_end.setdefault(path[-1], []).append((path[0], fair))
    if not by_end:
        return None
    # By end, not by start: else the flag with the most arrows towards it is right too often.
    end = rng.choice(sorted(by_end))
    start, fair = rng.choice(by_end[end])
    wrong = rng.sample([other for other in fair if other != end], CHOICES - 1)
    plural = "s" if hops > 1 else ""
    return _Asked(
        f"Start at the {layout.name(start)} flag and follow {hops} arrow{plural}. Which flag is reached?",
        layout.name(end),
        [layout.name(cell) for cell in wrong],
        _sentences([layout.sentence(cell) for cell in layout.path(start, hops)[:-1]]),
        hops,
    )


def _look(layout: Layout, rng: random.Random, arrow: int) -> _Asked | None:
    """Name the direction of one arrow, which is to be `arrow`; None if the picture has no such arrow."""
    cells = [cell for cell in range(layout.grid**2) if layout.arrows[cell] == arrow]
    if not cells:
        return None
    cell = rng.choice(cells)
    # the choices stay in this order, so that a small model can learn what a letter means without matching texts
    wrong = [name for name in ARROWS if name != ARROWS[arrow]]
    question = f"Which way does the {layout.name(cell)} flag point?"
    return _Asked(question, ARROWS[arrow], wrong, _sentences_ending_at(layout, cell, rng), 0)


def _neighbour(layout: Layout, rng: random.Random) -> _Asked:
    """Name the flag that one arrow points to, among the flags around it as far as there are enough."""
    cell = rng.randrange(layout.grid**2)
    right = layout.target(cell)
    around = [other for other in neighbours(layout.grid)[cell] if other not in (-1, right)]
    others = [other for other in range(layout.grid**2) if other not in (cell, right, *around)]
    wrong = [*around, *rng.sample(others, CHOICES - 1 - len(around))]
    rng.shuffle(wrong)
    question = f"Which flag does the {layout.name(cell)} flag point to?"
    names = [layout.name(other) for other in wrong]
    return _Asked(question, layout.name(right), names, _sentences_ending_at(layout, cell, rng), 1)


def _describe(layout: Layout, rng: random.Random) -> _Asked:
    """Name the flag at a place; the rationale describes the whole picture, a sentence for each row."""
    cell, *wrong = rng.sample(range(layout.grid**2), CHOICES)
    row, column = divmod(cell, layout.grid)
    cells = [f"{layout.name(cell)} {ARROWS[layout.arrows[cell]]}" for cell in range(layout.grid**2)]
    rows = [", ".join(cells[start : start + layout.grid]) for start in range(0, len(cells), layout.grid)]
    question = f"Which flag is in row {row + 1}, column {column + 1}?"
    return _Asked(question, layout.name(cell), [layout.name(other) for other in wrong], _sentences(rows), 0)


def _sentences(sentences: list[str]) -> str:
    return ". ".join(sentences) + "."


def _sentences_ending_at(layout: Layout, last: int, rng: random.Random) -> str:
    cells = [cell for cell in range(layout.grid**2) if cell != last]
    rng.shuffle(cells)
    return _sentences([layout.sentence(cell) for cell in (*cells, last)])


def _reachable(grid: int, start: int, end: int, hops: int) -> bool:
    """Whether some trail of `hops` arrows could lead from start to end, for all that their places tell."""
    distance = abs(start // grid - end // grid) + abs(start % grid - end % grid)
    return distance <= hops and distance % 2 == hops % 2


@functools.lru_cache(maxsize=64)
def _shuffled_deck(options: TrailsOptions, split: str, number: int) -> list[str]:
    deck = options.deck()
    random.Random(f"trails deck {options.seed} {split} {number}").shuffle(deck)
    return deck
