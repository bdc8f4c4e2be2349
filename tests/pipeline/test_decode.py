"""Decoding against the definition, against transformers' own generate, and batches against single rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.backbones.qwen2_vl import Qwen2VL
from pipeline.batch import Row, collate, masked_row
from pipeline.latent.decode import Generation, generate
from pipeline.latent.forward import LatentConfig
from tests.pipeline.naive import NaiveRow
from tests.pipeline.tiny import EOS, FORMAT, PAD, Shape, make_row, tiny_models

NO_EOS = 10**6
"""No token: decoding goes on to its limit."""
NEW = 8
"""Tokens of an answer; the random models are of no mind to stop."""


@pytest.fixture(scope="module")
def models() -> tuple[Qwen2VL, nn.Module]:
    backbone, stock = tiny_models()
    return backbone.eval(), stock.eval()


def rows_of(stock: nn.Module, latents: tuple[int, ...] = (2, 0, 3, 1)) -> list[Row]:
    images = [[(3, 4)], [(2, 3), (3, 3)], [], [(5, 2)]]
    parts = zip(images, (5, 2, 9, 4), latents, strict=True)
    return [make_row(Shape(image, text, 0, n), i, stock) for i, (image, text, n) in enumerate(parts)]


def answers(
    backbone: Qwen2VL, rows: list[Row], eos: int = NO_EOS, passes: int | None = None, **options: Any
) -> Generation:
    batch = collate(rows, FORMAT, max(row.latents for row in rows) if passes is None else passes)
    config = LatentConfig(num_patches=4, **options.pop("config", {}))
    return generate(backbone, batch, config, **{"max_new_tokens": NEW, "eos_id": eos, **options})


@pytest.mark.parametrize("positions", ["mrope", "sequential"])
@pytest.mark.parametrize("window", [None, 6], ids=["full", "sliding"])
def test_equals_the_definition(window: int | None, positions: str) -> None:
    """Rows of 2, 0, 3 and 1 latents in one batch give what each prefix, computed from nothing, predicts."""
    backbone, stock = tiny_models(window)
    rows = rows_of(stock)
    config = {"positions": positions}
    out = answers(backbone, rows, config=config)
    with torch.no_grad():
        expected = [NaiveRow(stock, row, LatentConfig(num_patches=4, **config)).answer(NEW, NO_EOS) for row in rows]
    assert out.tokens == expected
    assert len({tuple(tokens) for tokens in expected}) == len(rows), "the rows have one answer: nothing is tested"


@pytest.mark.parametrize("latents", [(0, 0, 0, 0), (2, 2, 2, 2), (2, 0, 3, 1)], ids=str)
def test_batch_equals_singles(models: tuple[Qwen2VL, nn.Module], latents: tuple[int, ...]) -> None:
    backbone, stock = models
    rows = rows_of(stock, latents)
    together = answers(backbone, rows)
    for i, row in enumerate(rows):
        alone = answers(backbone, [row])
        assert together.tokens[i] == alone.tokens[0]
        assert together.autoregressive_steps(i) == alone.autoregressive_steps(0) == row.latents + NEW
        assert chosen(together, rows, i) == chosen(alone, [row], 0)


def chosen(out: Generation, rows: list[Row], row: int) -> list[list[int]]:
    """Question columns of the row's latent steps, in its own numbers."""
    left = max(len(r.prompt_ids) for r in rows) - len(rows[row].prompt_ids)
    return [(s.columns[row][s.filled[row]] - left).tolist() for s in out.steps[: rows[row].latents]]


def test_without_latents_equals_transformers_generate(models: tuple[Qwen2VL, nn.Module]) -> None:
    backbone, stock = models
    for row, tokens in zip(rows_of(stock, (0,) * 4), answers(backbone, rows_of(stock, (0,) * 4)).tokens, strict=True):
        assert tokens == stock_answer(stock, row)


def stock_answer(stock: nn.Module, row: Row) -> list[int]:
    ids = torch.tensor([row.prompt_ids])
    images = {}
    if row.pixel_values is not None:
        images = {
            "pixel_values": torch.from_numpy(row.pixel_values),
            "image_grid_thw": torch.tensor(row.image_grid),
            "mm_token_type_ids": (ids == FORMAT.image_token_id).int(),
        }
    stock.model.rope_deltas = None  # left over from the row before
    out = stock.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
        eos_token_id=NO_EOS, pad_token_id=PAD, **images,
    )  # fmt: skip
    return out[0, ids.shape[1] :].tolist()


def test_a_row_stops_at_its_eos_and_the_others_go_on(models: tuple[Qwen2VL, nn.Module]) -> None:
    backbone, stock = models
    rows = rows_of(stock)
    free = answers(backbone, rows).tokens
    eos = free[2][3]
    stopped = answers(backbone, rows, eos=eos)
    expected = [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in free]
    assert stopped.tokens == expected
    assert len(stopped.tokens[2]) <= 4 and max(map(len, expected)) == NEW, "no row stops before another"
    assert stopped.autoregressive_steps(2) == 3 + len(expected[2])


def test_forward_calls(models: tuple[Qwen2VL, nn.Module]) -> None:
    """The question, one call a latent step, one a token but the first; no call once every row has its eos."""
    backbone, stock = models
    rows = rows_of(stock)
    calls = []
    handle = backbone.decoder.register_forward_pre_hook(lambda *_: calls.append(1))
    out = answers(backbone, rows)
    assert out.forward_calls == len(calls) == 1 + 3 + NEW - 1
    eos = out.tokens[2][3]
    calls.clear()
    alone = answers(backbone, rows[2:3], eos=eos)
    handle.remove()
    length = out.tokens[2].index(eos) + 1
    assert alone.tokens == [out.tokens[2][:length]]
    assert alone.forward_calls == len(calls) == 1 + 3 + length - 1


def test_each_call_feeds_new_columns_only(models: tuple[Qwen2VL, nn.Module]) -> None:
    backbone, stock = models
    rows, fed = rows_of(stock), []
    handle = backbone.decoder.layers[0].register_forward_pre_hook(lambda _, args: fed.append(args[0].shape[1]))
    answers(backbone, rows)
    handle.remove()
    assert fed == [max(len(row.prompt_ids) for row in rows), 5, 5, 5] + [1] * (NEW - 1)


def test_a_finished_rank_goes_on_until_all_are(models: tuple[Qwen2VL, nn.Module]) -> None:
    """Under ZeRO-3 a rank whose rows have ended runs along, and its answers stay as they were."""
    backbone, stock = models
    rows = rows_of(stock)[2:3]
    eos = answers(backbone, rows).tokens[0][1]
    alone = answers(backbone, rows, eos=eos)
    asked = []
    along = answers(backbone, rows, eos=eos, all_finished=lambda done: asked.append(done))
    assert alone.tokens == along.tokens and len(along.tokens[0]) <= 2
    assert along.forward_calls == 1 + 3 + NEW - 1 > alone.forward_calls
    assert asked == [n >= len(along.tokens[0]) for n in range(1, NEW)]


def test_one_new_token(models: tuple[Qwen2VL, nn.Module]) -> None:
    backbone, stock = models
    rows = rows_of(stock)
    out = answers(backbone, rows, max_new_tokens=1)
    assert out.tokens == [tokens[:1] for tokens in answers(backbone, rows).tokens]
    assert out.forward_calls == 4


def test_masked_rows_and_further_passes_change_no_answer(models: tuple[Qwen2VL, nn.Module]) -> None:
    backbone, stock = models
    rows = rows_of(stock, (1, 0, 2, 1))
    out = answers(backbone, [masked_row(FORMAT), *rows], passes=4)
    assert out.tokens[1:] == answers(backbone, rows).tokens
    assert [out.autoregressive_steps(i + 1) for i in range(4)] == [row.latents + NEW for row in rows]


def test_targets_are_not_looked_at(models: tuple[Qwen2VL, nn.Module]) -> None:
    backbone, stock = models
    rows = rows_of(stock)
    expected = answers(backbone, rows).tokens
    for row in rows:
        row.target_ids = [20, 30, EOS]
    assert answers(backbone, rows).tokens == expected
