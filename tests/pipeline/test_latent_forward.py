"""The latent forward against the definition (naive.py): loss, selections, every gradient.

The options meet in a pairwise-covering matrix: every two values of different axes are tried together.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pipeline.data.batch import Row, collate, masked_row
from pipeline.latent.attention import ATTENTION_NAME
from pipeline.latent.forward import Trace
from pipeline.latent.method import LatentConfig, LatentMethod
from pipeline.latent.recompute import enable_checkpointing, has_dropout
from pipeline.latent.schedules import Schedule, choose_schedule, latent_forward
from pipeline.latent.select import select_patches
from pipeline.loss import token_nll
from tests.pipeline.naive import NaiveRow, full_pass
from tests.pipeline.tiny import FAMILIES, SLIDING, Shape, family_of, make_row, tiny_models

WIDE, TALL, SMALL = (3, 4), (5, 2), (2, 3)
IMAGES = {
    "one-size": [[WIDE], [WIDE], [WIDE], [WIDE]],
    "sizes-differ": [[SMALL], [WIDE], [TALL], [(4, 4)]],
    "several-per-row": [[SMALL, TALL], [WIDE], [SMALL, SMALL, SMALL], [TALL, WIDE]],
    "text-mixed-in": [[WIDE], [], [TALL], []],
    "all-text": [[], [], [], []],
}
LATENTS = {"n0": [0] * 4, "n1": [1] * 4, "n2": [2] * 4, "n3": [3] * 4, "n-mixed": [2, 0, 3, 1]}
TEXT, TARGETS = [5, 2, 9, 4], [4, 7, 1, 3]
AXES = {
    "latents": list(LATENTS),
    "latent_grad": ["bptt", "detach"],
    "positions": ["mrope", "sequential"],
    "patch_order": ["position", "score"],
    "images": list(IMAGES),
    "num_patches": [2, 5],  # 5: three steps want more than most rows have
    "checkpointing": ["checkpointed", "plain"],
    "schedule": ["segmented", "prepass", "whole-layers"],
}
SCHEDULES = {
    "segmented": Schedule("segmented"),
    "prepass": Schedule("prepass"),
    "whole-layers": Schedule("segmented", whole_layers=True),
}


def possible(case: dict[str, Any]) -> bool:
    """Without gradient through h every schedule; whole layers are run again by checkpointing."""
    if case["schedule"] == "segmented":
        return True
    return case["latent_grad"] == "detach" and (
        case["schedule"] == "prepass" or case["checkpointing"] == "checkpointed"
    )


def pairwise(axes: dict[str, list]) -> Iterator[dict[str, Any]]:
    """Few combinations that have every pair of values of two axes: each time the one with most new pairs."""

    def pairs(combination: tuple) -> set:
        return set(itertools.combinations(zip(axes, combination, strict=True), 2))

    product = itertools.product(*axes.values())
    everything = [values for values in product if possible(dict(zip(axes, values, strict=True)))]
    random.Random(0).shuffle(everything)  # else ties go to the first values
    missing = set().union(*map(pairs, everything))
    while missing:
        best = max(everything, key=lambda combination: len(pairs(combination) & missing))
        missing -= pairs(best)
        yield dict(zip(axes, best, strict=True))


def case_id(case: dict[str, Any]) -> str:
    return " ".join(f"K{value}" if name == "num_patches" else value for name, value in case.items())


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest) -> tuple[Any, nn.Module]:
    return tiny_models(request.param)


def rows_of(stock: nn.Module, images: str, latents: str, seed: int = 0) -> list[Row]:
    parts = zip(IMAGES[images], TEXT, TARGETS, LATENTS[latents], strict=True)
    return [make_row(Shape(*part), seed + number, stock) for number, part in enumerate(parts)]


@contextmanager
def checkpointed(backbone: Any, enabled: bool) -> Iterator[None]:
    if enabled:
        enable_checkpointing(backbone.core)
    yield
    backbone.core.gradient_checkpointing_disable()


def ours(
    backbone: Any,
    rows: list[Row],
    config: LatentConfig,
    passes: int | None = None,
    schedule: Schedule | None = None,
) -> tuple[Trace, Tensor]:
    """The trace of the padded batch, and the NLL of every target token in row-major order."""
    batch = collate(rows, family_of(backbone).format, max(row.latents for row in rows) if passes is None else passes)
    trace = latent_forward(backbone, batch, LatentMethod.of(config, backbone), schedule)
    return trace, token_nll(trace.predictors(batch.latents), batch.labels, backbone.head)


def gradients(vlm: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every trained parameter; zero where the loss does not depend on it."""
    trained = {name: p for name, p in vlm.named_parameters() if p.requires_grad}
    vlm.zero_grad()
    loss.backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}
    vlm.zero_grad()
    return found


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-4) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error, largest = (actual[name] - gradient).abs().max().item(), gradient.abs().max().item()
        assert error <= relative * largest + 1e-7, f"{name}: off by {error:.1e} of {largest:.1e}"


def taken(trace: Trace, rows: list[Row], row: int) -> list[list[int]]:
    """Question columns of a row's latent steps, in the row's own numbers and in inserted order."""
    left = trace.steps[0].candidates.shape[1] - len(rows[row].prompt_ids) if trace.steps else 0
    steps = trace.steps[: rows[row].latents]
    return [(step.columns[row][step.filled[row]] - left).tolist() for step in steps]


def assert_same(
    backbone: Any, stock: nn.Module, rows: list[Row], config: LatentConfig, schedule: Schedule | None = None
) -> None:
    """The padded batch gives the naive rows' loss, selections and gradients."""
    trace, nll = ours(backbone, rows, config, schedule=schedule)
    replayed = config.selection == "random"
    naive = []
    for i, row in enumerate(rows):
        chosen = taken(trace, rows, i)
        naive.append(NaiveRow(stock, row, config, chosen.__getitem__ if replayed else None))
        assert min([step.gap for step in naive[i].steps], default=1) > 1e-5, "scores too close to be ranked"
        assert chosen == [step.columns for step in naive[i].steps], f"{row.key}: other patches"
        for ours_step, step in zip(trace.steps, naive[i].steps, strict=False):
            torch.testing.assert_close(ours_step.saliency[i, -len(step.scores) :], step.scores, atol=1e-5, rtol=0)
    expected = torch.cat([row.nll() for row in naive])
    torch.testing.assert_close(nll, expected, atol=5e-5, rtol=0)
    torch.testing.assert_close(nll.mean(), expected.mean(), atol=1e-5, rtol=0)
    assert_same_gradients(gradients(backbone.core, nll.mean()), gradients(stock, expected.mean()))


@pytest.mark.parametrize("case", list(pairwise(AXES)), ids=case_id)
def test_equals_the_definition(models: tuple[Any, nn.Module], case: dict[str, Any]) -> None:
    backbone, stock = models
    options = {name: case[name] for name in ("latent_grad", "positions", "patch_order", "num_patches")}
    with checkpointed(backbone, case["checkpointing"] == "checkpointed"):
        rows = rows_of(stock, case["images"], case["latents"])
        assert_same(backbone, stock, rows, LatentConfig(**options), SCHEDULES[case["schedule"]])


@pytest.mark.parametrize("patch_order", ["position", "score"])
@pytest.mark.parametrize("selection", ["least", "uniform", "random", "none"])
def test_controls_equal_the_definition(models: tuple[Any, nn.Module], selection: str, patch_order: str) -> None:
    config = LatentConfig(num_patches=4, selection=selection, patch_order=patch_order)
    assert_same(*models, rows_of(models[1], "several-per-row", "n-mixed"), config)


CUT = {"latent_grad": "detach"}
WAYS = {
    "bptt plain": ({}, False, "segmented"),
    "bptt checkpointed": ({}, True, "segmented"),
    "detach plain": (CUT, False, "segmented"),
    "detach checkpointed": (CUT, True, "segmented"),
    "whole-layers checkpointed": (CUT, True, "whole-layers"),
    "prepass plain": (CUT, False, "prepass"),
    "prepass checkpointed": (CUT, True, "prepass"),
}
"""Options of the latent step, checkpointing, schedule"""


@pytest.mark.parametrize("name", SLIDING)
@pytest.mark.parametrize("way", list(WAYS))
def test_sliding_window_equals_the_definition(way: str, name: str) -> None:
    backbone, stock = tiny_models(name, window=6)
    assert backbone.sliding_window == 6
    options, checkpointing, schedule = WAYS[way]
    with checkpointed(backbone, checkpointing):
        config = LatentConfig(num_patches=5, **options)
        assert_same(backbone, stock, rows_of(stock, "sizes-differ", "n-mixed"), config, SCHEDULES[schedule])


def test_a_question_that_ends_in_its_image(models: tuple[Any, nn.Module]) -> None:
    """The next position is above every axis, here the height, which is ahead of the last column's others."""
    backbone, stock = models
    rows = [make_row(Shape([(5, 2)], latents=2), 0, stock), make_row(Shape([WIDE], latents=1), 1, stock)]
    end = len(rows[0].prompt_ids) - rows[0].prompt_ids[::-1].index(family_of(stock).format.image_token_id)
    rows[0].prompt_ids, rows[0].prompt_positions = rows[0].prompt_ids[:end], rows[0].prompt_positions[:, :end]
    assert len(set(rows[0].prompt_positions[:, -1])) == family_of(stock).axes
    assert_same(backbone, stock, rows, LatentConfig(num_patches=3))


@pytest.mark.parametrize("name", SLIDING)
@pytest.mark.parametrize("window", [None, 6], ids=["full", "sliding"])
def test_the_definition_has_the_masks_of_transformers(name: str, window: int | None) -> None:
    _, stock = tiny_models(name, window)
    embeds = torch.randn(15, 64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(15).expand(3, -1)
    own = stock.model.language_model(inputs_embeds=embeds[None], position_ids=positions[:, None], use_cache=False)
    torch.testing.assert_close(full_pass(stock, embeds, positions)[0], own.last_hidden_state[0])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("way", list(WAYS))
def test_lora_equals_the_definition(way: str, name: str) -> None:
    backbone, stock = lora_models(name)
    adapted = {name for name, p in backbone.core.named_parameters() if p.requires_grad}
    assert len(adapted) == 3 * 7 * 2  # layers, projections, A and B
    layers = next(name for name, module in backbone.core.named_modules() if module is backbone.decoder.layers)
    assert all(parameter.startswith(f"{layers}.") for parameter in adapted)
    options, checkpointing, schedule = WAYS[way]
    with checkpointed(backbone, checkpointing):
        config = LatentConfig(num_patches=4, **options)
        assert_same(backbone, stock, rows_of(stock, "sizes-differ", "n-mixed"), config, SCHEDULES[schedule])


def lora_models(family: str) -> tuple[Any, nn.Module]:
    """Both models with the same random adapters on all projections of the language model."""
    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    backbone, stock = tiny_models(family)
    scope = backbone.LORA_SCOPE.format(names=names)
    adapters = LoraConfig(r=4, lora_dropout=0.0, target_modules=scope)
    wrapped = [get_peft_model(vlm, adapters) for vlm in (backbone.vlm, stock)]
    for vlm in wrapped:
        generator = torch.Generator().manual_seed(1)
        for parameter in filter(lambda p: p.requires_grad, vlm.parameters()):
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return type(backbone)(wrapped[0]), wrapped[1].get_base_model()


@pytest.mark.parametrize(
    ("latent_grad", "schedule"), [("bptt", "segmented"), ("detach", "segmented"), ("detach", "prepass")]
)
def test_checkpointing_changes_no_bit(models: tuple[Any, nn.Module], latent_grad: str, schedule: str) -> None:
    """Of the same schedule; whole layers sum over columns in another order, and are compared with the definition."""
    backbone, stock = models
    rows = rows_of(stock, "several-per-row", "n-mixed")
    config = LatentConfig(num_patches=5, latent_grad=latent_grad)
    results = []
    for enabled in (False, True):
        with checkpointed(backbone, enabled):
            _, nll = ours(backbone, rows, config, schedule=SCHEDULES[schedule])
            results.append(gradients(backbone.core, nll.mean()))
    assert all(torch.equal(results[1][name], gradient) for name, gradient in results[0].items())


def test_whole_layers_change_no_bit_of_the_loss(models: tuple[Any, nn.Module]) -> None:
    backbone, stock = models
    rows, config = rows_of(stock, "several-per-row", "n-mixed"), LatentConfig(num_patches=5, **CUT)
    with checkpointed(backbone, True):
        losses = [ours(backbone, rows, config, schedule=SCHEDULES[s])[1] for s in ("segmented", "whole-layers")]
    assert torch.equal(*losses)


def test_whole_layers_run_once_forward_and_once_backward(models: tuple[Any, nn.Module]) -> None:
    backbone, stock = models
    rows, config, columns = rows_of(stock, "one-size", "n3"), LatentConfig(num_patches=4, **CUT), []
    layer = backbone.decoder.layers[0].mlp
    handle = layer.register_forward_pre_hook(lambda _, args: columns.append(args[0].shape[1]))
    with checkpointed(backbone, True):
        _, nll = ours(backbone, rows, config, schedule=SCHEDULES["whole-layers"])
        forward = list(columns)
        gradients(backbone.core, nll.mean())
    handle.remove()
    total = max(len(row.prompt_ids) for row in rows) + 3 * 5 + max(TARGETS)
    assert sum(forward) == total and len(forward) == 4
    assert columns[4:] == [total]


@pytest.mark.parametrize(
    ("options", "name", "whole"),
    [
        ({}, "segmented", True),
        ({"latent_grad": "bptt"}, "segmented", False),
        ({"checkpointing": False}, "segmented", False),
        ({"checkpointing": False, "gathers": True}, "prepass", False),
        ({"dropout": True}, "segmented", False),
        ({"dropout": True, "gathers": True}, "prepass", False),
        ({"gathers": True}, "segmented", True),
        ({"wanted": "prepass"}, "prepass", False),
        ({"wanted": "segmented", "dropout": True, "gathers": True}, "segmented", False),
    ],
    ids=str,
)
def test_schedule_is_chosen_for_the_run(options: dict[str, Any], name: str, whole: bool) -> None:
    usual = {"wanted": "auto", "latent_grad": "detach", "checkpointing": True, "dropout": False, "gathers": False}
    chosen = choose_schedule(**usual | options)
    assert (chosen.name, chosen.whole_layers) == (name, whole) and chosen.reason


def test_dropout_is_seen() -> None:
    backbone, _ = tiny_models()
    assert not has_dropout(backbone.decoder)
    assert has_dropout(get_peft_model(backbone.vlm, LoraConfig(lora_dropout=0.05, target_modules=["q_proj"])))
    backbone, _ = tiny_models()
    backbone.decoder.layers[1].self_attn.attention_dropout = 0.1
    assert has_dropout(backbone.decoder)


@pytest.mark.parametrize("selection", ["attention", "random", "uniform", "least", "none"])
def test_rows_equal_rows_alone(models: tuple[Any, nn.Module], selection: str) -> None:
    backbone, stock = models
    rows, config = (
        rows_of(stock, "several-per-row", "n-mixed", seed=20),
        LatentConfig(num_patches=4, selection=selection),
    )
    together, nll = ours(backbone, rows, config)
    alone = [ours(backbone, [row], config) for row in rows]
    torch.testing.assert_close(nll, torch.cat([nll for _, nll in alone]), atol=5e-5, rtol=0)
    for i, (trace, _) in enumerate(alone):
        assert taken(together, rows, i) == taken(trace, [rows[i]], 0)
    summed = gradients(backbone.core, sum(nll.sum() for _, nll in alone))
    assert_same_gradients(gradients(backbone.core, nll.sum()), summed)


def test_passes_that_no_row_takes_change_nothing(models: tuple[Any, nn.Module]) -> None:
    backbone, stock = models
    rows, config = rows_of(stock, "text-mixed-in", "n1"), LatentConfig(num_patches=4)
    trace, nll = ours(backbone, rows, config, passes=3)
    _, expected = ours(backbone, rows, config, passes=1)
    assert len(trace.steps) == 3 and not any(step.filled.any() or step.active.any() for step in trace.steps[1:])
    torch.testing.assert_close(nll, expected, atol=5e-5, rtol=0)
    assert_same_gradients(gradients(backbone.core, nll.mean()), gradients(backbone.core, expected.mean()))


@pytest.mark.parametrize("images", ["one-size", "all-text"])
def test_masked_rows_change_nothing(models: tuple[Any, nn.Module], images: str) -> None:
    backbone, stock = models
    rows, config = rows_of(stock, images, "n2"), LatentConfig(num_patches=4)
    _, expected = ours(backbone, rows, config)
    _, nll = ours(
        backbone, [masked_row(family_of(backbone).format), *rows, masked_row(family_of(backbone).format)], config
    )
    torch.testing.assert_close(nll, expected, atol=5e-5, rtol=0)
    assert_same_gradients(gradients(backbone.core, nll.mean()), gradients(backbone.core, expected.mean()))


def test_a_batch_of_masked_rows_has_zero_gradients(models: tuple[Any, nn.Module]) -> None:
    backbone, _ = models
    _, nll = ours(backbone, [masked_row(family_of(backbone).format)] * 2, LatentConfig(num_patches=4), passes=2)
    assert nll.shape == (0,)
    trained = [parameter for parameter in backbone.vlm.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(nll.sum(), trained)  # every parameter takes part, as ZeRO-3 needs
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found)


def test_text_only_batch_runs_the_vision_tower(models: tuple[Any, nn.Module]) -> None:
    backbone, stock = models
    calls = []
    first = next(backbone.vision.children())  # some towers have another entrance than `forward`
    handle = first.register_forward_hook(lambda *_: calls.append(1))
    _, nll = ours(backbone, rows_of(stock, "all-text", "n1"), LatentConfig(num_patches=4))
    handle.remove()
    assert calls == [1]
    trained = [parameter for parameter in backbone.vision.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(nll.mean(), trained) if trained else []
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in found)


def test_every_column_goes_through_the_decoder_once(models: tuple[Any, nn.Module]) -> None:
    backbone, stock = models
    columns = []
    handle = backbone.decoder.layers[0].register_forward_pre_hook(lambda _, args: columns.append(args[0].shape[1]))
    rows, latents, patches = rows_of(stock, "one-size", "n3"), 3, 4
    trace, _ = ours(backbone, rows, LatentConfig(num_patches=patches))
    handle.remove()
    question, targets = max(len(row.prompt_ids) for row in rows), max(TARGETS)
    step = patches + 1
    assert columns == [question, step, step, step + targets]
    assert torch.cat(trace.hidden, dim=1).shape[1] == sum(columns) == question + latents * step + targets


def test_inserted_embeddings_are_the_image_columns_and_h(models: tuple[Any, nn.Module]) -> None:
    """V comes before h, and both are inputs: the vision tower's output and the last hidden state."""
    backbone, stock = models
    rows = rows_of(stock, "one-size", "n2")
    batch = collate(rows, family_of(backbone).format, 2)
    trace = latent_forward(backbone, batch, LatentMethod.of(LatentConfig(num_patches=3), backbone))
    prompt = backbone.embed_prompt(batch)
    for number, step in enumerate(trace.steps):
        inserted = trace.embeds[number + 1][:, :4]
        for row in range(len(rows)):
            torch.testing.assert_close(inserted[row, :3], prompt[row, step.columns[row]])
            torch.testing.assert_close(inserted[row, 3], trace.hidden[number][row, -1])


def test_statistics(models: tuple[Any, nn.Module]) -> None:
    backbone, stock = models
    rows = rows_of(stock, "text-mixed-in", "n-mixed")  # 12, 0, 10, 0 image columns; 2, 0, 3, 1 steps
    batch = collate(rows, family_of(backbone).format, 3)
    trace = latent_forward(backbone, batch, LatentMethod.of(LatentConfig(num_patches=5), backbone))
    sums = {name: float(value) for name, value in trace.statistics(batch).items()}
    assert sums["latent_steps"] == 6 and sums["rows_with_latents"] == 2
    assert sums["coverage"] == pytest.approx(10 / 12 + 10 / 10)
    norms = [trace.steps[s].latent[r].norm().item() for r, n in enumerate([2, 0, 3, 1]) for s in range(n)]
    assert sums["latent_norm"] == pytest.approx(sum(norms), rel=1e-5)
    entropy = 0.0
    for row, count in enumerate([2, 0, 3, 1]):
        for step in trace.steps[:count]:
            weights = step.saliency[row][step.candidates[row]].double()
            weights = weights / weights.sum()
            entropy -= (weights * weights.log()).sum().item()
    assert sums["selection_entropy"] == pytest.approx(entropy, rel=1e-5)


def test_without_a_pass_the_attention_is_the_stock_one(models: tuple[Any, nn.Module]) -> None:
    """The installed attention function does not disturb a plain transformers call, padding included."""
    backbone, stock = models
    ids = torch.randint(10, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    assert backbone.decoder.config._attn_implementation == ATTENTION_NAME
    with torch.no_grad():
        ours_logits, expected = (vlm(input_ids=ids, attention_mask=mask).logits for vlm in (backbone.core, stock))
    torch.testing.assert_close(ours_logits[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=0)


def test_bf16_is_close(models: tuple[Any, nn.Module]) -> None:
    """The same path in half precision: finite, near, and the scores still in full precision."""
    half, _ = tiny_models(models[0].MODEL_TYPE)
    half.vlm.bfloat16()
    rows, config = (
        rows_of(models[1], "several-per-row", "n-mixed"),
        LatentConfig(num_patches=20),
    )  # takes everything
    (trace, nll), (_, expected) = ours(half, rows, config), ours(models[0], rows, config)
    assert nll.dtype == trace.steps[0].saliency.dtype == torch.float32
    assert trace.hidden[0].dtype == torch.bfloat16
    torch.testing.assert_close(nll.mean(), expected.mean(), rtol=0.02, atol=0)
    assert all(gradient.isfinite().all() for gradient in gradients(half.core, nll.mean()).values())


def test_bf16_selects_the_patches_of_fp32() -> None:
    """Where the K-th and the next score differ by more than 1%, which 9 of 10 steps do; each step after fp32's own."""
    full, stock = tiny_models()
    half, _ = tiny_models()
    half.vlm.bfloat16()
    for exact, rounded in zip(full.vlm.parameters(), half.vlm.parameters(), strict=True):
        exact.data = rounded.data.float()
    patches, clear, same, steps = 2, 0, 0, 0
    for seed in range(0, 240, 8):
        rows = [make_row(Shape([SMALL], 5, 1, 3), 1000 + seed + i, stock) for i in range(8)]
        batch = collate(rows, family_of(stock).format, 3)
        with torch.no_grad():
            method = LatentMethod.of(LatentConfig(num_patches=patches), full)
            expected = latent_forward(full, batch, method).steps
            taken = [(step.columns, step.filled) for step in expected]
            found = latent_forward(half, batch, method, replay=lambda i, _, t=taken: t[i]).steps
        for step, rounded in zip(expected, found, strict=True):
            left = int(step.candidates[0].sum())
            if left <= patches:
                continue  # nothing to choose
            scores = step.saliency.masked_fill(~step.candidates, -1).sort(1, descending=True).values
            wide = (scores[:, patches - 1] - scores[:, patches]) / scores[:, patches - 1] > 0.01
            chosen, _ = select_patches(rounded.saliency, step.candidates, patches)
            steps, clear = steps + len(rows), clear + int(wide.sum())
            same += int(((chosen == step.columns).all(1) & wide).sum())
    assert steps >= 400 and clear >= 0.9 * steps
    assert same > 0.99 * clear, f"{same} of {clear}"
