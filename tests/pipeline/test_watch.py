"""What signals do to a rank before, while and after ranks can agree; each in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from pipeline.watching import watch
from pipeline.watching.watch import AT_ONCE, STOPPED, run_to_end
from tests.launch import ROOT, environment

BEGIN = "import os, signal, sys, time; from pipeline.watching.watch import STOP; STOP.begin(); me = os.getpid(); "
AGREE = "STOP.agree(); "
SEND = "os.kill(me, signal.SIG{}); "
SOON = "import threading; threading.Timer(0.3, lambda: os.kill(me, signal.SIG{})).start(); "
DEAF = "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT}); "
"""Then another thread takes the signal, and this one notices as little as in foreign code."""


def run(code: str, rank: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env=environment(RANK=str(rank)), stderr=subprocess.PIPE, text=True, timeout=60
    )


LEFT = "stopped on request before the first step; start again to go on\n"
SAVES = "interrupted: it saves after this step, and ends; a second Ctrl-C ends it at once\n"
LOST = "interrupted again: it ends at once; steps since the last checkpoint are lost\n"
GOES_ON = "sys.exit(10 + STOP.requested)"
LONG = "time.sleep(100)"


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        (BEGIN + SEND.format("TERM") + LONG, STOPPED, LEFT),
        (BEGIN + SEND.format("INT") + LONG, STOPPED, LEFT),
        (BEGIN + SEND.format("USR1") * 2 + GOES_ON, 11, ""),
        (BEGIN + SOON.format("TERM") + DEAF + LONG, STOPPED, LEFT),
        (BEGIN + f"\ntry:\n {SEND.format('TERM')}{LONG}\nfinally:\n {SEND.format('TERM')}{SEND.format('INT')}",
         STOPPED, LEFT),
        (BEGIN + AGREE + SEND.format("USR1") + SEND.format("TERM") * 3 + GOES_ON, 11, ""),
        (BEGIN + AGREE + GOES_ON, 10, ""),
        (BEGIN + AGREE + SEND.format("INT") + "time.sleep(0.2); " + GOES_ON, 11, SAVES),
        (BEGIN + AGREE + SOON.format("INT") + "time.sleep(1); " + SOON.format("INT") + DEAF + LONG, AT_ONCE,
         SAVES + LOST),
        # a worker process that gets the signal too, and notes nothing in its parent
        (BEGIN + AGREE + "child = os.fork()\nif not child:\n signal.signal(signal.SIGINT, lambda *_: os._exit(0));"
         f" os.kill(os.getpid(), signal.SIGINT); {LONG}\nos.waitpid(child, 0); " + GOES_ON, 10, ""),
        # other signals with handlers, such as the SIGCHLD of torch's loader
        (BEGIN + "signal.signal(signal.SIGCHLD, lambda *_: None); " + SEND.format("CHLD") + "time.sleep(0.2); "
         + GOES_ON, 10, ""),
        (BEGIN + AGREE + "STOP.over(); " + "".join(map(SEND.format, ("USR1", "TERM", "INT", "INT"))) + GOES_ON, 10, ""),
    ],
)  # fmt: skip
def test_signals(code: str, status: int, said: str) -> None:
    done = run(code)
    assert (done.returncode, done.stderr) == (status, said)


def test_the_first_rank_alone_says_it() -> None:
    done = run(BEGIN + SEND.format("TERM") + LONG, rank=1)
    assert (done.returncode, done.stderr) == (STOPPED, "")


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [("UserError", 2, ""), ("PassingFault", 1, ""), ("OwnFault", 1, "error: told once\n")],
)
def test_another_rank_waits_with_a_mistake_and_not_with_a_fault_of_its_own(kind: str, status: int, said: str) -> None:
    """With a mistake, which the first rank is to tell; it is ended meanwhile."""
    fails = f"\ndef main():\n from data_prep.errors import {kind}\n raise {kind}('told once')\n"
    done = run("import sys; sys.argv = ['x']; " + BEGIN + SOON.format("TERM").replace("0.3", "3") + fails
               + "from pipeline.watching.watch import run_rank; run_rank(main, False)", rank=1)  # fmt: skip
    assert (done.returncode, done.stderr) == (status, said)


def test_a_stop_that_a_mistake_led_to_is_a_stop() -> None:
    """Such as the end of a program that rank 0 waited for, by the same signal: no rank waits for another's words."""
    stops = """
def main():
 from data_prep.errors import UserError
 try:
  raise UserError("ended")
 except UserError:
  raise SystemExit(75)
"""
    done = run("import sys; sys.argv = ['x']; " + BEGIN + SOON.format("TERM").replace("0.3", "3") + stops
               + "from pipeline.watching.watch import run_rank; run_rank(main, False)", rank=1)  # fmt: skip
    assert (done.returncode, done.stderr) == (75, "")


def test_a_program_that_is_waited_for_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the preparation of data, which goes on at the next start."""
    monkeypatch.setattr(watch, "STOP", watch.StopRequest())
    began = time.monotonic()
    assert run_to_end([sys.executable, "-c", "raise SystemExit(3)"]) == (3, "")
    watch.STOP.requested = True
    code = "import time, sys; print('said', file=sys.stderr, flush=True); time.sleep(1000)"
    status, said = run_to_end([sys.executable, "-c", code], stderr=subprocess.PIPE)
    assert status == -signal.SIGTERM and said in ("said\n", "") and time.monotonic() - began < 500
