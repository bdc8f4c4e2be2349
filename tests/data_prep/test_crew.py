from __future__ import annotations

import functools
import multiprocessing.resource_tracker
import multiprocessing.spawn
import os
import threading

import pytest
from tqdm import tqdm  # type: ignore[import-untyped]

from data_prep.errors import UserError
from data_prep.making.crew import Progress, crew


def square(_: bytes, number: int, progress: Progress) -> int:
    progress(2)
    if number == 1000:
        os.abort()
    return number**2


work = functools.partial(square, bytes(2**20))  # more than a pipe holds


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_jobs_as_needed(workers: int) -> None:
    taken: list[int] = []

    def jobs() -> object:
        for number in range(100):
            taken.append(number)
            yield number

    with tqdm(total=200, disable=True) as bar, crew(work, workers, bar) as map_in_order:
        results = map_in_order(jobs())  # type: ignore[arg-type]
        assert next(results) == 0 and len(taken) < 20
        assert list(results) == [number**2 for number in range(1, 100)]
        assert list(map_in_order([7])) == [49]


def test_a_worker_that_dies_at_work() -> None:
    with (
        pytest.raises(UserError, match="a worker process was ended from outside"),
        tqdm(disable=True) as bar,
        crew(work, 2, bar) as map_in_order,
    ):
        list(map_in_order([1, 2, 1000, 3]))


def test_workers_that_die_as_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    multiprocessing.resource_tracker.ensure_running()
    monkeypatch.setattr(multiprocessing.spawn, "_python_exe", b"/bin/false")
    errors: list[UserError] = []

    def run() -> None:
        try:
            with tqdm(disable=True) as bar, crew(work, 2, bar) as map_in_order:
                list(map_in_order([1, 2]))
        except UserError as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert "ended from outside" in str(errors)
