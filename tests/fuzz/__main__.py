"""Command: thousands of cases, and a table of what became of them."""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from pathlib import Path

import datasets
from tqdm import tqdm

from data_prep import cli
from data_prep.errors import UserError
from tests.fuzz.harness import KINDS, Counts, Harness


def main(*, cases: int = 20_000, seed: int = 0, kind: str | None = None, number: int | None = None) -> None:
    """Run cases of every kind; a case depends on its seed, kind and number alone.

    --kind: this one only; --number: this case of it only, with its traceback. Faster with TMPDIR in memory.

    Example: TMPDIR=/dev/shm python -m tests.fuzz --cases 20000 --seed 0
    """
    if kind not in (None, *KINDS):
        raise UserError(f"--kind {kind}: expected one of {', '.join(KINDS)}")
    kinds = KINDS if kind is None else (kind,)
    datasets.disable_progress_bars()
    numbers = range(-(-cases // len(kinds))) if number is None else [number]
    table = {kind: Counts() for kind in kinds}
    failures: list[str] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(Path(folder), seed)
        for n in tqdm(numbers, unit=" rounds"):
            for kind in kinds:
                try:
                    harness.run(kind, n, table[kind])
                except Exception:
                    failures.append(f"--seed {seed} --kind '{kind}' --number {n}\n{traceback.format_exc()}")
                    tqdm.write(failures[-1])
    print(f"{'kind':24}{'cases':>8}{'accepted':>10}{'rejected':>10}{'refused':>10}")
    for kind, counts in table.items():
        print(f"{kind:24}{counts.cases:8}{counts.accepted:10}{counts.rejected:10}{counts.refused:10}")
    print(f"{sum(c.cases for c in table.values())} cases in {time.monotonic() - began:.0f} s; {len(failures)} failed")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
