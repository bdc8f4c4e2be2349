"""What is said of a run that will not fit into memory: what is needed, what there is, and what would fit, computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from data_prep.errors import UserError
from pipeline.memory import USABLE, Forecast, ModelSize, Room, Use, activation_bytes, forecast

MOST_RANKS = 4096


@dataclass(frozen=True)
class Measure:
    """A change that a user can make."""

    name: str
    size: Callable[[ModelSize], ModelSize]
    use: Callable[[Use], Use]


def problem_of_states(size: ModelSize, use: Use, room: Room, lora: ModelSize | None) -> str:
    """Why training cannot begin, with what would do; nothing where it can.  lora: the model's size with LoRA."""
    now = forecast(size, use, room)
    if now.states_fit:
        return ""
    where = "its GPU" if room.host else "this rank's share of the machine's memory"
    line = (
        f"out of memory before the first step: parameters, gradients and optimizer of {size.parameters / 1e9:.2f}"
        f" billion parameters ({size.trained / 1e9:.2f} trained) take {_gb(now.states)} a rank under"
        f" ZeRO-{use.zero_stage} on {_ranks(use.world)}; {where} has {_gb(room.device)}"
    )
    if now.offloaded:
        line += f", and offloading takes {_gb(now.offloaded)} a rank of {_gb(room.host)} in the machine's"
    found = list(remedies(size, use, room, lora))
    advice = f"would fit with: {'; '.join(found)}" if found else f"not even {_ranks(MOST_RANKS)} would do"
    return f"{line}; {advice} (train.memory_check warn goes on all the same)"


def remedies(size: ModelSize, use: Use, room: Room, lora: ModelSize | None) -> Iterator[str]:
    """What would make the states fit: single measures, or else two or three together; and how many ranks."""
    measures = list(possible(size, use, room, lora))
    for together in range(1, len(measures) + 1):
        fitting = []
        for chosen in combinations(measures, together):
            changed, used = size, use
            for measure in chosen:
                changed, used = measure.size(changed), measure.use(used)
            after = forecast(changed, used, room)
            if after.states_fit:
                fitting.append(f"{' and '.join(measure.name for measure in chosen)} ({_a_rank(after)})")
        yield from fitting
        if fitting:
            break
    for stage in dict.fromkeys((use.zero_stage, 3)):
        if ranks := ranks_needed(size, replace(use, zero_stage=stage), room):
            on_more = forecast(size, replace(use, zero_stage=stage, world=ranks), room)
            under = "" if stage == use.zero_stage else f"ZeRO-{stage} on "
            yield f"{under}{_ranks(ranks)} of as much memory each ({_a_rank(on_more)})"
            break


def possible(size: ModelSize, use: Use, room: Room, lora: ModelSize | None) -> Iterator[Measure]:
    """Measures that this run has not taken yet."""
    if use.zero_stage < 3 and use.world > 1:
        yield Measure("ZeRO-3", _same, lambda use: replace(use, zero_stage=3))
    if room.host and use.optimizer_on == "none":
        yield Measure("optimizer offload", _same, lambda use: replace(use, optimizer_on="cpu"))
    if room.host and use.parameters_on == "none" and use.zero_stage == 3:
        yield Measure("parameter offload", _same, lambda use: replace(use, parameters_on="cpu"))
    if lora is not None:
        parameters, trained = lora.parameters, lora.trained
        yield Measure("LoRA", lambda size: replace(size, parameters=parameters, trained=trained), _same)
    if size.width > 2:
        yield Measure("model.dtype bf16", lambda size: replace(size, width=2), _same)


def ranks_needed(size: ModelSize, use: Use, room: Room) -> int:
    """The fewest ranks with as much memory each on which the states fit; 0 where none would do."""
    low, high = use.world, MOST_RANKS
    if not forecast(size, replace(use, world=high), room).states_fit:
        return 0
    while low + 1 < high:  # on `low` they do not fit, on `high` they do
        middle = (low + high) // 2
        if forecast(size, replace(use, world=middle), room).states_fit:
            high = middle
        else:
            low = middle
    return high


def warning_of_activations(size: ModelSize, use: Use, room: Room) -> str:
    """What to do where the longest rows may not fit beside the states; nothing where they do."""
    now = forecast(size, use, room)
    if now.fits or not now.states_fit:
        return ""
    column, logits = activation_bytes(size, use)
    left = USABLE * room.device - now.states - logits
    advice = []
    rows = int(left // (column * use.row_columns))
    if 1 <= rows < use.rows:
        advice.append(f"train.micro_batch {rows} (the global batch stays: more micro-batches)")
    elif (columns := int(left // column)) > 0:
        advice.append(("train.micro_batch 1 and " if use.rows > 1 else "") + f"prompt.max_tokens {columns}")
    if not use.checkpointing:
        after = forecast(size, replace(use, checkpointing=True), room)
        advice.append(f"model.checkpointing true ({_gb(after.activations)})")
    return (
        f"the longest rows may not fit: {use.rows} rows of {use.row_columns} columns take up to"
        f" {_gb(now.activations)} for activations beside {_gb(now.states)} for parameters and optimizer, of"
        f" {_gb(room.device)}" + (f"; would fit with: {'; or '.join(advice)}" if advice else "")
    )


@contextmanager
def lack_of_memory_told(trained: Callable[[], bool]) -> Iterator[None]:
    """Turn a GPU's lack of memory before a start's first step is done into one line.  Raises UserError.

    Later it is left as it is: memory that was cut up may suffice to the next start.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if trained():
            raise
        said = str(error).partition(" Of the allocated memory")[0].rstrip(". ")
        raise UserError(
            f"out of memory before the first step was done: {' '.join(said.split())}; less is taken by a smaller"
            " train.micro_batch or prompt.max_tokens, model.checkpointing true, ZeRO-3, offloading (the DeepSpeed"
            " file), more ranks"
        ) from None


def _same(value):  # type: ignore[no-untyped-def]
    return value


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def _a_rank(after: Forecast) -> str:
    beside = f" and {_gb(after.offloaded)} of the machine's memory" if after.offloaded else ""
    return f"{_gb(after.states)}{beside} a rank"
