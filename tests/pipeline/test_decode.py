"""Decoding against the definition, against transformers' own generate, and batches against single rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from pipeline.config import LoraConfig, ModelConfig
from pipeline.data.batch import Row, collate, masked_row
from pipeline.latent.decode import CachedSegments, Decoding, Generation, Sampling, generate
from pipeline.latent.method import LatentConfig, LatentMethod
from pipeline.model import add_lora
from tests.pipeline.naive import NaiveRow
from tests.pipeline.tiny import EOS, FAMILIES, PAD, SLIDING, Shape, family_of, make_row, tiny_models

NO_EOS = 10**6
"""No token: decoding goes on to its limit."""
NEW = 8
"""Tokens of an answer; the random models are of no mind to stop."""


WINDOWS = [pytest.param(name, None, id=f"{name} full") for name in FAMILIES]
WINDOWS += [pytest.param(name, 6, id=f"{name} sliding") for name in SLIDING]


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest) -> tuple[Any, nn.Module]:
    backbone, stock = tiny_models(request.param)
    return backbone.eval(), stock.eval()


def rows_of(stock: nn.Module, latents: tuple[int, ...] = (2, 0, 3, 1)) -> list[Row]:
    images = [[(3, 4)], [(2, 3), (3, 3)], [], [(5, 2)]]
    parts = zip(images, (5, 2, 9, 4), latents, strict=True)
    return [make_row(Shape(image, text, 0, n), i, stock) for i, (image, text, n) in enumerate(parts)]


def answers(
    backbone: Any,
    rows: list[Row],
    eos: int = NO_EOS,
    passes: int | None = None,
    count: int = NEW,
    config: dict[str, Any] | None = None,
    **sampling: Any,
) -> Generation:
    batch = collate(rows, family_of(backbone).format, max(row.latents for row in rows) if passes is None else passes)
    decoding = Decoding(count, eos, Sampling(**sampling))
    method = LatentMethod.of(LatentConfig(num_patches=4, **(config or {})), backbone)
    return generate(backbone, batch, method, decoding)


@pytest.mark.parametrize("positions", ["mrope", "sequential"])
@pytest.mark.parametrize(("name", "window"), WINDOWS)
def test_equals_the_definition(name: str, window: int | None, positions: str) -> None:
    """Rows of 2, 0, 3 and 1 latents in one batch give what each prefix, computed from nothing, predicts."""
    backbone, stock = tiny_models(name, window)
    backbone.eval()
    rows = rows_of(stock)
    config = {"positions": positions}
    out = answers(backbone, rows, config=config)
    with torch.no_grad():
        expected = [NaiveRow(stock, row, LatentConfig(num_patches=4, **config)).answer(NEW, NO_EOS) for row in rows]
    assert out.tokens == expected
    assert len({tuple(tokens) for tokens in expected}) == len(rows), "the rows have one answer: nothing is tested"


@pytest.mark.parametrize("latents", [(0, 0, 0, 0), (2, 2, 2, 2), (2, 0, 3, 1)], ids=str)
def test_batch_equals_singles(models: tuple[Any, nn.Module], latents: tuple[int, ...]) -> None:
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


@pytest.mark.parametrize(("name", "window"), WINDOWS)
def test_without_latents_equals_transformers_generate(name: str, window: int | None) -> None:
    """Rows with images, with two, and with none: in one batch, and each alone."""
    backbone, stock = tiny_models(name, window)
    rows = rows_of(stock.eval(), (0,) * 4)
    expected = [stock_answers(stock, [row])[0] for row in rows]
    assert answers(backbone.eval(), rows).tokens == expected == stock_answers(stock, rows)
    assert [answers(backbone, [row]).tokens[0] for row in rows] == expected
    text = [make_row(Shape(text=text), i, stock) for i, text in enumerate((3, 9, 1))]
    assert answers(backbone, text).tokens == stock_answers(stock, text)


def stock_answers(stock: nn.Module, rows: list[Row], count: int = NEW, **options: Any) -> list[list[int]]:
    """What transformers' own model answers to rows of one batch."""
    family = family_of(stock)
    batch = collate(rows, family.format, 0)
    images = family.generate_images(stock, batch)
    out = stock.generate(
        input_ids=batch.prompt_ids, attention_mask=batch.prompt_mask.long(), max_new_tokens=count,
        eos_token_id=NO_EOS, pad_token_id=PAD, **{"do_sample": False, **options},
        **(images if batch.has_images else {}),
    )  # fmt: skip
    return out[:, batch.prompt_ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_peft_wrapped_model_answers_with_its_adapter(name: str) -> None:
    backbone, stock = tiny_models(name)
    rows = rows_of(stock, (2, 0, 3, 1))
    plain = answers(backbone.eval(), rows)
    lora = ModelConfig.model_validate({"backbone": name, "path": "x", "lora": LoraConfig(r=2, alpha=64)})
    wrapped = type(backbone)(add_lora(backbone.vlm, lora)).eval()
    assert answers(wrapped, rows).tokens == plain.tokens, "an adapter at its start is none"
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.vlm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    adapted = answers(wrapped, rows)
    assert adapted.tokens != plain.tokens and adapted.forward_calls == 1 + 3 + NEW
    assert answers(type(backbone)(wrapped.vlm.merge_and_unload()).eval(), rows).tokens == adapted.tokens


def test_a_row_stops_at_its_eos_and_the_others_go_on(models: tuple[Any, nn.Module]) -> None:
    backbone, stock = models
    rows = rows_of(stock)
    free = answers(backbone, rows).tokens
    eos = free[2][3]
    stopped = answers(backbone, rows, eos=eos)
    expected = [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in free]
    assert stopped.tokens == expected
    assert len(stopped.tokens[2]) <= 4 and max(map(len, expected)) == NEW, "no row stops before another"
    assert stopped.autoregressive_steps(2) == 3 + len(expected[2])


def test_forward_calls(models: tuple[Any, nn.Module]) -> None:
    """The question, one call a latent step, one a token; no call once every row has its eos."""
    backbone, stock = models
    rows = rows_of(stock)
    calls: list[int] = []
    handle = backbone.decoder.register_forward_pre_hook(lambda *_: calls.append(1))
    out = answers(backbone, rows)
    assert out.forward_calls == len(calls) == 1 + 3 + NEW
    eos = out.tokens[2][3]
    calls.clear()
    alone = answers(backbone, rows[2:3], eos=eos)
    handle.remove()
    length = out.tokens[2].index(eos) + 1
    assert alone.tokens == [out.tokens[2][:length]]
    assert alone.forward_calls == len(calls) == 1 + 3 + length


def test_each_call_feeds_new_columns_only(models: tuple[Any, nn.Module]) -> None:
    backbone, stock = models
    rows, fed = rows_of(stock), []
    handle = backbone.decoder.layers[0].register_forward_pre_hook(lambda _, args: fed.append(args[0].shape[1]))
    answers(backbone, rows)
    handle.remove()
    assert fed == [max(len(row.prompt_ids) for row in rows), 5, 5, 5] + [1] * NEW


def test_a_finished_rank_goes_on_until_all_are(models: tuple[Any, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO-3 a rank whose rows have ended runs along, and its answers stay as they were."""
    backbone, stock = models
    rows = rows_of(stock)[2:3]
    eos = answers(backbone, rows).tokens[0][1]
    alone = answers(backbone, rows, eos=eos)
    asked: list[bool] = []

    def add_the_other_rank(unfinished: torch.Tensor, **_: Any) -> None:
        asked.append(not unfinished)
        unfinished += len(asked) <= NEW  # it writes NEW tokens

    monkeypatch.setattr(torch.distributed, "all_reduce", add_the_other_rank)
    batch = collate(rows, family_of(backbone).format, 3)
    along = generate(
        backbone, batch, LatentMethod.of(LatentConfig(num_patches=4), backbone), Decoding(NEW, eos, synced=True)
    )
    assert alone.tokens == along.tokens and len(along.tokens[0]) <= 2
    assert along.forward_calls == 1 + 3 + NEW > alone.forward_calls
    assert asked == [n >= len(along.tokens[0]) for n in range(NEW + 1)]


def test_one_new_token(models: tuple[Any, nn.Module]) -> None:
    backbone, stock = models
    rows = rows_of(stock)
    out = answers(backbone, rows, count=1)
    assert out.tokens == [tokens[:1] for tokens in answers(backbone, rows).tokens]
    assert out.forward_calls == 1 + 3 + 1


def test_the_last_column_is_taken_out_and_padding_goes_left() -> None:
    kept = CachedSegments()
    columns = torch.arange(12.0).view(2, 1, 6, 1)
    kept.extend(0, 0, columns[:, :, :4], -columns[:, :, :4])
    kept.extend(1, 0, columns[:, :, 4:], -columns[:, :, 4:])
    mask = kept.take_last(torch.tensor([[0, 1, 1, 0, 1, 1], [0, 0, 1, 1, 0, 0]], dtype=torch.bool))
    assert mask.tolist() == [[True] * 4, [False, False, True, True]]
    keys, values = kept.tensors()
    assert keys[0].flatten().tolist() == [1, 2, 4] and keys[1, 0, -1] == 8
    assert torch.equal(values, -keys)


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.7}, {"top_k": 3}, {"top_p": 0.8, "top_k": 5}], ids=str)
def test_sampling_is_transformers_own(models: tuple[Any, nn.Module], sampling: dict[str, float]) -> None:
    """The same draws as transformers' generate makes from the same seed and options; another seed, other draws."""
    backbone, stock = models
    rows = rows_of(stock, (0,) * 4)
    options = {"temperature": 2.0, **sampling}

    def ours(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return answers(backbone, rows, **options).tokens

    torch.manual_seed(5)
    expected = stock_answers(stock, rows, **{"top_p": 1.0, "top_k": 0, "do_sample": True, **options})
    assert ours(5) == ours(5) == expected != ours(6)


def test_sampling_after_latent_steps(models: tuple[Any, nn.Module]) -> None:
    """Cold, almost all of the mass cut off, or one token left: the likeliest token, as greedy decoding takes it."""
    backbone, stock = models
    rows = rows_of(stock)
    greedy = answers(backbone, rows).tokens
    torch.manual_seed(0)
    assert answers(backbone, rows, temperature=1e-4).tokens == greedy
    assert answers(backbone, rows, temperature=3.0, top_p=1e-6).tokens == greedy
    assert answers(backbone, rows, temperature=3.0, top_k=1).tokens == greedy
    assert answers(backbone, rows, temperature=3.0).tokens != greedy


def test_a_checkpoints_own_generation_config_has_no_part(models: tuple[Any, nn.Module]) -> None:
    """Qwen2-VL's asks for sampling; others penalise or forbid tokens."""
    backbone, stock = models
    rows = rows_of(stock)
    greedy = answers(backbone, rows).tokens
    own = backbone.core.generation_config
    changed = GenerationConfig(do_sample=True, temperature=5.0, max_length=7, suppress_tokens=greedy[0])
    backbone.core.generation_config = changed
    try:
        assert answers(backbone, rows).tokens == greedy
        assert backbone.core.generation_config is changed
    finally:
        backbone.core.generation_config = own


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"temperature": 1e-9}, "--temperature 1e-09"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top_p 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "--top_p 1.5"),
        ({"temperature": 1.0, "top_k": -1}, "--top_k -1"),
        ({"top_p": 0.9}, "give --temperature"),
    ],
)
def test_bad_sampling(values: dict[str, float], message: str) -> None:
    (problem,) = Sampling(**values).problems()  # type: ignore[arg-type]
    assert message in problem
    assert not Sampling().problems() + Sampling(0.7, 0.9, 20).problems()


def test_masked_rows_alone(models: tuple[Any, nn.Module]) -> None:
    """Every rank answers, one whose rows are all masked too: its cache is empty when generate begins."""
    backbone, _ = models
    assert len(answers(backbone, [masked_row(family_of(backbone).format)]).tokens[0]) == NEW
    out = answers(backbone, [masked_row(family_of(backbone).format), masked_row(family_of(backbone).format)], passes=2)
    assert out.forward_calls == 1 + 2 + NEW and out.autoregressive_steps(0) == NEW


def test_masked_rows_and_further_passes_change_no_answer(models: tuple[Any, nn.Module]) -> None:
    backbone, stock = models
    rows = rows_of(stock, (1, 0, 2, 1))
    out = answers(backbone, [masked_row(family_of(backbone).format), *rows], passes=4)
    assert out.tokens[1:] == answers(backbone, rows).tokens
    assert [out.autoregressive_steps(i + 1) for i in range(4)] == [row.latents + NEW for row in rows]


def test_targets_are_not_looked_at(models: tuple[Any, nn.Module]) -> None:
    backbone, stock = models
    rows = rows_of(stock)
    expected = answers(backbone, rows).tokens
    for row in rows:
        row.target_ids = [20, 30, EOS]
    assert answers(backbone, rows).tokens == expected
