"""The worker processes that read for a rank: how they start, how they end, and what is said of one that was lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from data_prep.errors import OwnFault

LAST_SECONDS = 30
"""How long a worker outlives a SIGTERM that did not come from its rank."""


def _as_it_is(item: Any) -> Any:
    return item


def loaded(dataset: Dataset, sampler: range, workers: int) -> Iterator[Any]:
    """Items of a data set, in the sampler's order, made by worker processes; by none, in this one."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            collate_fn=_as_it_is,
            sampler=sampler,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,  # others import for seconds, and again every stage
            prefetch_factor=4 if workers else None,
            worker_init_fn=_outlast_signals,
        )
    )


def _outlast_signals(worker: int) -> None:
    """A signal to the whole process group asks the rank to stop: its workers go on while it saves, but not for ever."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_on_term, args=(os.getppid(),), daemon=True).start()


def _end_on_term(rank: int) -> None:
    """End at the rank's own SIGTERM; after somebody else's, `LAST_SECONDS` later at most."""
    if signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
        signal.sigtimedwait({signal.SIGTERM}, LAST_SECONDS)
    os._exit(0)


@contextlib.contextmanager
def lost_workers_told() -> Iterator[None]:
    """Turn the end of a loader's worker process, which torch tells at any place, into a line.  Raises OwnFault."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise OwnFault(
            f"a loader's worker process was ended from outside, by a signal or for want of memory ({error}); start the"
            " same command again, with fewer data.workers if memory is short"
        ) from None
