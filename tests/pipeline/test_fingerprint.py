"""Fingerprints of weights: however they are split the same, and another for whatever is changed."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from data_prep.errors import UserError
from pipeline.distributed import World
from pipeline.keeping import fingerprint
from pipeline.keeping.checkpoint import Checkpoints
from pipeline.keeping.fingerprint import Piece, check_loaded, check_ranks, checksum, parameter_pieces, weights_of
from pipeline.keeping.keep import Keeper
from pipeline.keeping.state import Checkpoint
from tests.pipeline.test_plan import STATE
from tests.ranks import on_ranks


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small tensors have several."""
    monkeypatch.setattr(fingerprint, "CHUNK", 16)
    fingerprint._table.cache_clear()


def of(values: torch.Tensor, name: str = "weight") -> int:
    return int(checksum([Piece(name, 0, values.reshape(-1), tuple(values.shape))], "cpu"))


numbers = st.lists(st.floats(width=32), min_size=1, max_size=50)


@given(numbers, st.lists(st.integers(0, 50), max_size=4))
def test_any_split_gives_the_same(values: list[float], cuts: list[int]) -> None:
    whole = torch.tensor(values)
    edges = sorted({0, len(values), *(min(cut, len(values)) for cut in cuts)})
    pieces = [Piece("weight", a, whole[a:b], tuple(whole.shape)) for a, b in pairwise(edges)]
    assert int(checksum(reversed(pieces), "cpu")) == of(whole)


@given(numbers, st.data())
def test_any_change_gives_another(values: list[float], data: st.DataObject) -> None:
    whole = torch.tensor(values)
    place = data.draw(st.integers(0, len(values) - 1))
    bit = data.draw(st.integers(0, 31))
    changed = whole.clone()
    changed.view(torch.int32)[place] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    assert of(changed) != of(whole), "a bit"
    other = data.draw(st.integers(0, len(values) - 1))
    swapped = whole.clone()
    swapped[[place, other]] = whole[[other, place]]
    same = torch.equal(swapped.view(torch.int32), whole.view(torch.int32))
    assert (of(swapped) == of(whole)) is same, "two places"
    assert of(whole, "bias") != of(whole), "the name"
    assert of(whole[None]) != of(whole), "the shape"
    assert of(torch.cat([whole, torch.zeros(1)])) != of(whole), "the length"


def test_two_parameters_swapped() -> None:
    a, b = torch.ones(40), torch.full((40,), 2.0)
    both = [Piece("a", 0, a, (40,)), Piece("b", 0, b, (40,))]
    assert checksum(both, "cpu") == checksum(both[::-1], "cpu")
    swapped = [Piece("a", 0, b, (40,)), Piece("b", 0, a, (40,))]
    assert checksum(both, "cpu") != checksum(swapped, "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_types_count_as_their_fp32_values(dtype: torch.dtype) -> None:
    values = torch.randn(40).to(dtype)
    assert of(values) == of(values.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool])
def test_other_types_of_buffers(dtype: torch.dtype) -> None:
    values = torch.tensor([0, 1, 0, 1]).to(dtype)
    kept = values.clone()
    assert of(values) != of(values.flip(0)) and torch.equal(values, kept)


def test_the_multipliers_are_odd_and_different() -> None:
    fingerprint.CHUNK = 2**18
    fingerprint._table.cache_clear()
    table = fingerprint._table("cpu")
    assert (table % 2 != 0).all() and len(table.unique()) == len(table)


# ---- engines ------------------------------------------------------------------------------------------------
class Odd(nn.Module):
    """Sizes that no world divides, one smaller than any; frozen weights, and a buffer that is saved and one not."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = ((7, 5), (5,), (1,), (11, 5), (2,), (3,))
        a, b, one, frozen, little, kept = (torch.randn(shape, generator=generator) for shape in shapes)
        self.a, self.b, self.one = nn.Parameter(a), nn.Parameter(b), nn.Parameter(one)
        self.frozen, self.little = nn.Parameter(frozen, False), nn.Parameter(little, False)
        self.register_buffer("kept", kept)
        self.register_buffer("made", torch.arange(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x @ self.a.T).sum() + (self.b * x).sum()) * self.one.sum() + (x @ self.frozen.T).sum()


def engine_of(stage: int, dtype: torch.dtype) -> Any:
    ds = {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": dtype is torch.bfloat16},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 6},
    }  # fmt: skip
    module = Odd().to(dtype)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds)
    return engine


def refused(check: Any, *arguments: Any) -> str:
    try:
        check(*arguments)
    except UserError as error:
        return str(error)
    return ""


def behaviour(world: World) -> list[Any]:
    """Fingerprints under every stage and both types, before a step; what is said afterwards."""
    found: list[Any] = []
    for stage in (1, 2, 3):
        for dtype in (torch.float32, torch.bfloat16)[: 2 if stage > 1 else 1]:
            engine = engine_of(stage, dtype)
            before = check_ranks(engine)
            engine.backward(engine(torch.ones(2, 5, dtype=dtype)))
            engine.step()
            after = weights_of(engine)
            said = [refused(check_loaded, engine, after.found, "CHECKPOINT")]
            said.append(refused(check_loaded, engine, before, "CHECKPOINT"))
            with torch.no_grad():
                if world.rank == world.size - 1:
                    next(parameter_pieces([("frozen", engine.module.frozen)])).values[-1] += 1
                    engine.module.kept += world.rank
            said += [refused(check_loaded, engine, after.found, "CHECKPOINT"), refused(check_ranks, engine)]
            with torch.no_grad():
                next(parameter_pieces([("a", engine.module.a)])).values[0] += 1
            said.append(refused(check_loaded, engine, after.found, "CHECKPOINT"))
            found.append((stage, str(dtype), before, after, said))
    return found


def test_ranks_and_stages_agree() -> None:
    runs = {world: on_ranks(world, behaviour) for world in (1, 2, 3)}
    for world, ranks in runs.items():
        for answers in ranks:
            assert not isinstance(answers, Exception), answers
            for stage, dtype, before, after, (same, other, frozen, at_start, torn) in answers:
                case = f"{world} ranks, ZeRO-{stage}, {dtype}"
                module = Odd().to(torch.bfloat16 if "bfloat16" in dtype else torch.float32)
                named = dict(module.named_parameters())
                trained = {name: named[name] for name in ("a", "b", "one")}
                rest = {name: named[name] for name in ("frozen", "little")}
                assert before.trained == digits(trained) and before.frozen == digits(rest), case
                assert before.buffers == fingerprint._digits(of(module.kept, "kept")), case
                assert after.found.trained != before.trained and after.computed_with == after.rounded, case
                assert (after.found.frozen, after.found.buffers) == (before.frozen, before.buffers), case
                assert same == "" and other.count("\n") == 0, case
                assert other.startswith("the trained weights are not those that CHECKPOINT was written with: "), case
                assert frozen.startswith("the frozen weights are not those that CHECKPOINT was written with: "), case
                assert "optimizer goes on with" in torn, case
                if world > 1:
                    lines = at_start.splitlines()
                    assert lines[-1].startswith(f"the buffers of rank {2 if world == 3 else 1} are not those of rank 0")
                    assert ("the frozen weights of rank" in at_start) is (stage < 3), case
    assert len({str(answers) for answers in runs[2]}) == 1


def test_a_load_that_went_wrong_is_refused(tmp_path: Path) -> None:
    """By the keeper, through DeepSpeed's own files: whole they load; then a frozen weight is another."""

    def load(world: World) -> list[str]:
        engine = engine_of(2, torch.float32)
        state = replace(STATE, weights=weights_of(engine).found)
        checkpoint = Checkpoint(Checkpoints(tmp_path).path_of(state), state, checked=True)
        folder, name = checkpoint.path.parent, checkpoint.path.name
        engine.save_checkpoint(str(folder), tag=name, save_latest=False, exclude_frozen_parameters=True)
        model: Any = SimpleNamespace(lora=None, freeze_vision=True)
        plan: Any = SimpleNamespace(config=SimpleNamespace(model=model), out=tmp_path, fits=lambda start: True)
        log: Any = SimpleNamespace(info=lambda *words: None)
        lease: Any = SimpleNamespace(check=lambda: None, lost="")
        keeper = Keeper(plan, SimpleNamespace(engine=engine), world, lease, log)  # type: ignore[arg-type]
        said = [refused(keeper.load, checkpoint)]
        with torch.no_grad():
            engine.module.a += 1  # which the load puts right
            said.append(refused(keeper.load, checkpoint))
            engine.module.frozen += 1  # which is not in the checkpoint
            said.append(refused(keeper.load, checkpoint))
        return said

    ((whole, trained, frozen),) = on_ranks(1, load)
    assert whole == trained == ""
    assert frozen.startswith(f"the frozen weights are not those that {tmp_path}/checkpoints/stage0-step000008 was")


def digits(parameters: dict[str, nn.Parameter]) -> str:
    return fingerprint._digits(int(checksum(parameter_pieces(parameters.items()), "cpu")))
