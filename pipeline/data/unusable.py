"""Samples and rows that training cannot use: counted over all ranks, named once, too many refused."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import UserError
from pipeline import distributed
from pipeline.data.batch import Batch
from pipeline.watching.monitor import Sparing


class Unusable:
    """What could not be used since this start."""

    def __init__(self, max_bad: int, log: logging.Logger, folder: Path) -> None:
        """max_bad: of different samples, past which training stops; folder: of the logs, for the message."""
        self.max_bad, self.log, self.folder = max_bad, log, folder
        self.sparing = Sparing(log.warning)
        self.bad_keys: set[str] = set()
        self.overlong = self.dropped_steps = 0

    @staticmethod
    def counts(micro_batches: Sequence[Batch]) -> list[int]:
        """This rank's bad samples, rows that are too long, and reasoning steps cut to fit: `note` takes their sums."""
        return [
            sum(len(batch.bad) for batch in micro_batches),
            sum(batch.overlong for batch in micro_batches),
            sum(batch.dropped_steps for batch in micro_batches),
        ]

    def note(self, micro_batches: Sequence[Batch], bad: int, overlong: int, dropped: int) -> None:
        """Count a step's; ranks call it together.  Raises UserError past `max_bad` samples."""
        self.overlong, self.dropped_steps = self.overlong + overlong, self.dropped_steps + dropped
        if not bad:
            return
        found = dict(row for part in distributed.gather([row for b in micro_batches for row in b.bad]) for row in part)
        for key in sorted(found.keys() - self.bad_keys):
            self.sparing("skipped %s: %s", key, found[key])
        self.bad_keys |= found.keys()
        if len(self.bad_keys) > self.max_bad:
            self.sparing.tell_rest()
            raise UserError(
                f"{len(self.bad_keys)} samples could not be used, more than data.max_bad {self.max_bad};"
                f" keys and reasons are in {self.folder}"
            )

    def scalars(self) -> dict[str, float]:
        return {
            "data/bad_samples": len(self.bad_keys),
            "data/overlong_rows": self.overlong,
            "data/dropped_steps": self.dropped_steps,
        }

    def tell(self) -> None:
        """A line where there is anything to say."""
        self.sparing.tell_rest()
        if self.bad_keys or self.overlong or self.dropped_steps:
            self.log.info("so far %d bad samples, %d rows too long, %d reasoning steps cut to fit",
                          len(self.bad_keys), self.overlong, self.dropped_steps)  # fmt: skip
