"""What `pipeline.data.preview` counts: a sample as a stage shows it, and a stage's sequences."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from data_prep.reporting.measure import Counts
from pipeline.curriculum import StageConfig


@dataclass(frozen=True)
class Seen:
    """A sample as a stage shows it."""

    trained: bool
    """Whether it is among the rows that the stage trains on"""
    latents: int
    kept: range
    """Numbers, from 0, of the groups of steps that remain"""
    dropped: int = 0
    """Trailing groups left out because the row was too long"""
    problem: str = ""
    """Why it is masked"""
    overlong: bool = False
    """Masked because it is too long"""
    prompt: int = 0
    """Columns of the question and image; 0 without a tokenizer"""
    inserted: int = 0
    """Columns of the latent steps; 0 without a tokenizer"""
    text: int = 0
    """Columns of what follows; words without a tokenizer"""

    @property
    def columns(self) -> int:
        """Of the whole sequence."""
        return self.prompt + self.inserted + self.text


@dataclass
class Padding:
    """Columns of some of a stage's micro-batches, in the order that training has."""

    micro_batch: int
    rows: int = 0
    real: int = 0
    padded: int = 0
    """Real ones and those that only fill up"""

    @property
    def waste(self) -> float:
        return 1 - self.real / self.padded if self.padded else 0.0


@dataclass
class StageMeasure:
    """What a stage's sequences look like, of the sampled rows that it trains on."""

    number: int
    stage: StageConfig
    rows: int = 0
    latents: Counts = field(default_factory=Counter)
    remaining: Counts = field(default_factory=Counter)
    """Groups of steps that are still written"""
    columns: Counts = field(default_factory=Counter)
    """Of usable rows; words of what follows the latent steps without a tokenizer"""
    shortened: int = 0
    """Rows that lose steps because they are too long"""
    overlong: int = 0
    """Rows that are skipped because they are too long"""
    unusable: Counter[str] = field(default_factory=Counter)
    """Why other rows are skipped -> rows"""
    samples: int | None = None
    """All samples that it trains on"""
    steps: int | None = None
    """Optimizer steps"""
    padding: Padding | None = None
    problem: str = ""
    """Why training would refuse the stage"""

    def add(self, seen: Seen) -> None:
        if not seen.trained:
            return
        self.rows += 1
        self.shortened += bool(seen.dropped)
        self.overlong += seen.overlong
        if seen.problem and not seen.overlong:
            self.unusable[seen.problem] += 1
        if not seen.problem:
            self.latents[seen.latents] += 1
            self.remaining[len(seen.kept)] += 1
            self.columns[seen.columns] += 1
