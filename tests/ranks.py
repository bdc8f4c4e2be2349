"""Ranks of a test: this process forked, so that nothing is imported anew, over gloo."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch

from pipeline import distributed
from pipeline.distributed import World
from tests.launch import free_port


def on_ranks(world: int, function: Callable[[World], Any], meet: bool = True, seconds: float = 120) -> list[Any]:
    """What `function` gives on each rank; an exception that it raises is given in its place.

    meet: before `function` is called, which else does it itself.
    """
    context = multiprocessing.get_context("fork")
    port, ends = str(free_port()), []
    for rank in range(world):
        ours, theirs = context.Pipe()
        context.Process(target=_rank, args=(theirs, function, rank, world, port, meet), daemon=True).start()
        theirs.close()
        ends.append(ours)
    answers = []
    for end in ends:
        assert end.poll(seconds), f"a rank has not answered after {seconds:.0f} s"
        answers.append(end.recv())
    return answers


def _rank(end: Any, function: Callable[[World], Any], rank: int, size: int, port: str, meet: bool) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    try:
        world = World.from_environment()
        if meet:
            distributed.start(world)
        end.send(function(world))
        if meet:
            distributed.stop()
    except Exception as error:
        end.send(error)
