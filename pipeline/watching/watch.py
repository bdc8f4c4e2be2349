"""Ending well: a rank stops at a step boundary when asked to, and never outlives the launcher that started it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

STOPPED = 75
"""Exit status of a run that was asked to stop, saved, and can go on (EX_TEMPFAIL)."""


class StopRequest:
    """Signals that set a flag; the ranks agree on it at the next step."""

    def __init__(self) -> None:
        self.requested = False

    def note(self, *numbers: signal.Signals) -> None:
        """From now on these signals ask for a stop."""
        for number in numbers:
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        self.requested = True


STOP = StopRequest()
"""This process's."""


def ancestors() -> list[tuple[int, str]]:
    """(pid, start time) of the launchers above this process: its parent, and DeepSpeed's runner above that."""
    found: list[tuple[int, str]] = []
    pid = os.getppid()
    while pid > 1 and (stat := _stat(pid)) is not None:
        if found and "deepspeed" not in _command(pid):
            break
        found.append((pid, stat[19]))
        pid = int(stat[1])
    return found


def exit_with_launcher(interval: float = 0.5) -> None:
    """End this process when one of its launchers is gone.  Without a launcher (a terminal, srun) nothing is watched."""
    if "deepspeed" not in _command(os.getppid()) and "torch.distributed" not in _command(os.getppid()):
        return
    watched = ancestors()

    def watch() -> None:
        while True:
            for pid, started in watched:
                stat = _stat(pid)
                if stat is None or stat[19] != started or stat[0] in "ZX":
                    os.write(2, b"launcher is gone: this rank stops\n")
                    os._exit(143)
            time.sleep(interval)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def run_rank(main: Callable[..., None], first: bool) -> None:
    """Run a command so that of all ranks only the first tells a user's mistake."""
    from data_prep import cli  # not above: a trainer imports this module before all else, to note signals

    if first:
        return cli.run(main)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            cli.run(main)
    except SystemExit as end:
        if end.code == 2:
            # a launcher stops all ranks at the first exit: rank 0 must have spoken by then
            signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
            time.sleep(30)
            # it has not: the mistake is this rank's alone, such as its node's full disk
            sys.stderr.writelines(line for line in said.getvalue().splitlines(True) if line.startswith("error: "))
        raise


def run_to_end(command: Sequence[str], **options: Any) -> tuple[int, str]:
    """Run a program that rank 0 needs; gives its status, and what it said on a piped stderr.

    It inherits what is blocked here, so that a SIGUSR1 to the whole job, which asks the trainer to stop, does not kill
    it.  options: Popen's.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        child = subprocess.Popen(command, **options, text=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        _, said = child.communicate()
    except BaseException:
        child.kill()
        raise
    return child.returncode, said or ""


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat after the name: state, parent, ..., start time at 19."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
