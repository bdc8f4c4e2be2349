"""The pictures of the trails source: a grid of two-coloured flags, each with an arrow to a neighbour."""

from __future__ import annotations

import functools
import hashlib
import io
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

PALETTE = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (250, 225, 50),
    "pink": (255, 150, 195), "brown": (125, 75, 30), "orange": (255, 145, 0), "purple": (145, 50, 175),
}  # fmt: skip
DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}

_COLOURS, ARROWS = tuple(PALETTE), tuple(DIRECTIONS)
_BLACK, _WHITE = len(PALETTE), len(PALETTE) + 1


@dataclass(frozen=True)
class Layout:
    """What a picture shows; cells are numbered in reading order."""

    grid: int
    flags: tuple[tuple[int, int], ...]
    """(left, right) colour of each cell, as positions in the palette."""
    arrows: tuple[int, ...]
    """Direction of each cell, as positions in `DIRECTIONS`."""

    @classmethod
    def draw(cls, rng: random.Random, grid: int, colours: int) -> Layout:
        """Flags without repetition, arrows that stay in the grid."""
        flags = rng.sample(_flag_pairs(colours), grid**2)
        return cls(grid, tuple(flags), tuple([rng.choice(allowed) for allowed in _allowed_arrows(grid)]))

    def split(self) -> str:
        """The split that this picture may be in: 8, 1 and 1 of 10 are train, val and test."""
        shown = bytes([colour for flag in self.flags for colour in flag]) + bytes(self.arrows)
        tenth = int.from_bytes(hashlib.blake2b(shown, digest_size=8).digest(), "big") % 10
        return "train" if tenth < 8 else "val" if tenth == 8 else "test"

    def name(self, cell: int) -> str:
        """Such as "red blue"."""
        left, right = self.flags[cell]
        return f"{_COLOURS[left]} {_COLOURS[right]}"

    def target(self, cell: int) -> int:
        """The cell that a cell's arrow points to."""
        return neighbours(self.grid)[cell][self.arrows[cell]]

    def path(self, start: int, hops: int) -> list[int]:
        """The `hops` + 1 cells from `start` on."""
        cells = [start]
        for _ in range(hops):
            cells.append(self.target(cells[-1]))
        return cells

    def sentence(self, cell: int) -> str:
        """Such as "red blue points right to green pink"."""
        return f"{self.name(cell)} points {ARROWS[self.arrows[cell]]} to {self.name(self.target(cell))}"

    def picture(self, cell: int) -> bytes:
        """PNG of `grid` x `grid` cells of `cell` pixels."""
        tiles = np.stack([_tile(*flag, arrow, cell) for flag, arrow in zip(self.flags, self.arrows, strict=True)])
        side = self.grid * cell
        pixels = tiles.reshape(self.grid, self.grid, cell, cell).swapaxes(1, 2).reshape(side, side)
        image = Image.fromarray(np.ascontiguousarray(pixels))
        image.putpalette([value for rgb in (*PALETTE.values(), (0, 0, 0), (255, 255, 255)) for value in rgb])
        out = io.BytesIO()
        image.save(out, "PNG", compress_level=1)
        return out.getvalue()


@functools.cache
def _flag_pairs(colours: int) -> list[tuple[int, int]]:
    return [(left, right) for left in range(colours) for right in range(colours) if left != right]


@functools.cache
def neighbours(grid: int) -> list[tuple[int, ...]]:
    """For each cell the cell in each direction, -1 where that is outside."""
    table = []
    for cell in range(grid**2):
        places = [(cell // grid + down, cell % grid + right) for down, right in DIRECTIONS.values()]
        inside = [0 <= row < grid and 0 <= column < grid for row, column in places]
        table.append(tuple(row * grid + column if ok else -1 for (row, column), ok in zip(places, inside, strict=True)))
    return table


@functools.cache
def _allowed_arrows(grid: int) -> list[list[int]]:
    """For each cell the directions that stay inside."""
    return [[arrow for arrow, cell in enumerate(cells) if cell >= 0] for cells in neighbours(grid)]


@functools.cache
def _tile(left: int, right: int, arrow: int, size: int) -> np.ndarray:
    """One flag as palette positions, (size, size) uint8: two halves, a frame, an arrow with a black edge."""
    tile = Image.new("L", (size, size), left)
    draw = ImageDraw.Draw(tile)
    draw.rectangle((size // 2, 0, size, size), fill=right)
    draw.rectangle((0, 0, size - 1, size - 1), outline=_BLACK)
    down, across = DIRECTIONS[ARROWS[arrow]]
    # The arrow in a frame where it points along x, both axes from -1 to 1.
    points = [(-0.75, -0.2), (0.05, -0.2), (0.05, -0.6), (0.75, 0), (0.05, 0.6), (0.05, 0.2), (-0.75, 0.2)]
    centre = (size - 1) / 2
    turned = [(x * across - y * down, x * down + y * across) for x, y in points]
    outline = [(centre * (1 + x), centre * (1 + y)) for x, y in turned]
    draw.polygon(outline, fill=_WHITE, outline=_BLACK, width=max(1, size // 16))
    return np.asarray(tile)
