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


AT_ONCE = 130
"""Exit status of one that was interrupted a second time, and did not wait for its checkpoint."""
PATIENCE = 3.0
"""Seconds in which a process that is to end at once may clean up; in foreign code it would notice no signal."""


BEFORE = "stopped on request before the first step; start again to go on"


class StopRequest:
    """Signals that ask for a stop.

    While a rank starts, SIGTERM and Ctrl-C end it, since there is nothing to save and ranks cannot agree yet; SIGUSR1
    sets a flag.  From `agree` on all of them do, and the ranks look at it together; a second Ctrl-C ends at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._words = BEFORE
        self._agreeing = self._leaving = False
        self._interrupts = 0
        self._unsaid = threading.Lock()

    def begin(self, words: str = BEFORE) -> None:
        """To be called before the imports, which take seconds: a signal in them counts, too.

        words: what is said where it ends the process.
        """
        self._words = words
        end, numbers = os.pipe()
        os.set_blocking(numbers, False)
        signal.set_wakeup_fd(numbers, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a worker's signals are its own
        threading.Thread(target=self._watch, args=(end,), name="signals", daemon=True).start()
        signal.signal(signal.SIGUSR1, self._note)
        signal.signal(signal.SIGTERM, self._leave)
        signal.signal(signal.SIGINT, self._leave)

    def agree(self) -> None:
        """From now on the ranks agree on stopping, at a step's end."""
        self._agreeing = True
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def over(self) -> None:
        """To be called last: a signal while the interpreter ends would change the exit status."""
        self._agreeing = True
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    def _note(self, *_: object) -> None:
        self.requested = True

    def _leave(self, *_: object) -> None:
        if not self._leaving:
            self._leaving = True
            self._say_left()
            raise SystemExit(STOPPED)

    def _say_left(self) -> None:
        if self._unsaid.acquire(blocking=False):  # once
            _say(self._words)

    def _watch(self, end: int) -> None:
        """On a thread of its own: it notices signals while the main thread is in foreign code."""
        while True:
            number = os.read(end, 1)[0]
            if number not in (signal.SIGTERM, signal.SIGINT):  # every signal that has a handler comes by
                continue
            if not self._agreeing:
                self._say_left()
                time.sleep(PATIENCE)
                os._exit(STOPPED)
            if number == signal.SIGTERM:
                continue
            self._interrupts += 1
            if self._interrupts > 1:
                _say("interrupted again: it ends at once; steps since the last checkpoint are lost")
                os._exit(AT_ONCE)
            _say("interrupted: it saves after this step, and ends; a second Ctrl-C ends it at once")


STOP = StopRequest()
"""This process's."""


def _say(text: str) -> None:
    """A line on the screen, of the first rank alone."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        os.write(2, f"{text}\n".encode())


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

    try:
        _run_rank(main, first, cli.run)
    finally:
        STOP.over()


def _run_rank(main: Callable[..., None], first: bool, run: Callable[[Callable[..., None]], None]) -> None:
    from data_prep.errors import OwnFault, UserError

    if first:
        return run(main)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            run(main)
    except SystemExit as end:
        mistake = end.__context__
        if isinstance(mistake, UserError) and end.code == mistake.status:  # no stop, which a mistake may lead to
            if not isinstance(mistake, OwnFault):
                # a launcher stops all ranks at the first exit: rank 0, of the same mistake, must have spoken by then
                signal.signal(signal.SIGTERM, lambda *_: os._exit(mistake.status))
                time.sleep(30)
            # it has not, or never will: this rank's alone, such as its node's full disk
            sys.stderr.writelines(line for line in said.getvalue().splitlines(True) if line.startswith("error: "))
        raise


def run_to_end(command: Sequence[str], **options: Any) -> tuple[int, str]:
    """Run a program that rank 0 needs; gives its status, and what it said on a piped stderr.

    It inherits what is blocked here, so that a SIGUSR1 to the whole job, which asks the trainer to stop, does not kill
    it; it is ended when this process has noticed.  options: Popen's.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        child = subprocess.Popen(command, **options, text=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, said = child.communicate(timeout=0.5)
                break
            if STOP.requested:
                child.terminate()
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
