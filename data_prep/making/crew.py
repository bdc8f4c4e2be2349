"""Work that is shared among processes: results in order, progress by the row, and no process left behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from tqdm import tqdm  # type: ignore[import-untyped]

from data_prep.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
Progress = Callable[[int], object]
"""Is told how many more rows are done."""

_AHEAD = 4
"""Jobs per worker that are handed out or done before their turn."""
_POLL = 0.2
"""Seconds between two looks at the progress."""


@contextlib.contextmanager
def crew(
    work: Callable[[Job, Progress], Result], workers: int, bar: tqdm, keep_open: Connection | None = None
) -> Iterator[Callable[[Iterable[Job]], Iterator[Result]]]:
    """Yield a function that works on jobs, in this process or in `workers` others, and yields the results in order.

    Jobs are taken as they are needed, so that there may be any number. `work` and jobs are sent to spawned
    processes. `keep_open` stays open in these, too: what it locks is locked until the last of them has ended.

    Raises:
        UserError: a process was ended from outside; and whatever `work` raises.
    """
    if workers == 1:
        yield lambda jobs: (work(job, bar.update) for job in jobs)
        return
    # Not forked: the caller may have threads.
    context = multiprocessing.get_context("spawn")
    # Nothing is sent. Only this process holds the second end, so its death, too, tells the workers to end.
    told, end = context.Pipe(duplex=False)
    done = context.Value("q", 0)
    sent = _send(work)
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(sent, done, told, keep_open))

    def hand_out(job: Job) -> Future[Result]:
        try:
            return pool.submit(_work, job)
        except (OSError, ValueError, RuntimeError) as error:  # the pool finds itself broken, at a moment of its own
            raise BrokenProcessPool from error

    def map_in_order(jobs: Iterable[Job]) -> Iterator[Result]:
        waiting = iter(jobs)
        handed_out: deque[Future[Result]] = deque()
        while True:
            while len(handed_out) < _AHEAD * workers and (job := next(waiting, None)) is not None:
                handed_out.append(hand_out(job))
            if not handed_out:
                return
            while not wait([handed_out[0]], timeout=_POLL).done:
                bar.update(done.get_obj().value - bar.n)  # without the lock: a killed worker may have held it
            bar.update(done.get_obj().value - bar.n)
            yield handed_out.popleft().result()

    try:
        yield map_in_order
        pool.shutdown()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was ended from outside, by a signal or for want of memory;"
            " start the same command again, with fewer --workers if memory is short"
        ) from None
    finally:
        end.close()
        pool.shutdown(cancel_futures=True)
        told.close()
        sent.close()


def _send(work: Any) -> Connection:
    """`work` in a file of the memory, for processes that are handed the open file.

    Not among the arguments of a process: if it is long and the process dies as it starts, multiprocessing waits for
    ever for it to be read.
    """
    file = Connection(os.memfd_create("work"))  # a Connection because these cross to spawned processes
    with open(file.fileno(), "wb", closefd=False) as writer:
        pickle.dump(work, writer)
    return file


_work_of_this_process: Callable[[Any], Any]


def _start(sent: Connection, done: Any, told: Connection, keep_open: Connection | None) -> None:
    global _work_of_this_process
    work = pickle.loads(os.pread(sent.fileno(), os.fstat(sent.fileno()).st_size, 0))

    def progress(rows: int) -> None:
        with done.get_lock():
            done.get_obj().value += rows

    def work_and_tell(job: Any) -> Any:
        return work(job, progress)

    _work_of_this_process = work_and_tell
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which then ends the pool
    threading.Thread(target=_end_when_told, args=(told, keep_open), daemon=True).start()


def _end_when_told(told: Connection, keep_open: Connection | None) -> None:
    told.poll(None)  # until the other end is closed
    os._exit(1)


def _work(job: Any) -> Any:
    return _work_of_this_process(job)
