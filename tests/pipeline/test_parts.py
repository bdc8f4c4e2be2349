"""The parts of a latent step against a plain definition of them; registering one's own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data_prep.errors import UserError
from pipeline.data.batch import Row, collate
from pipeline.export import PARTS as PARTS_FILE
from pipeline.latent.decode import Decoding, generate
from pipeline.latent.method import Backbone, LatentConfig, LatentMethod
from pipeline.latent.parts import (
    AUXILIARIES,
    FEEDBACKS,
    WEIGHTINGS,
    Auxiliary,
    Feedback,
    HiddenState,
    Reading,
    Weighting,
)
from pipeline.latent.recompute import enable_checkpointing
from pipeline.latent.schedules import Schedule, latent_forward
from pipeline.loaded import load_parts
from pipeline.loss import token_nll
from pipeline.model import LatentModel
from pipeline.recipe import load_config
from tests.pipeline.naive import NaiveRow, NaiveStep, full_pass, last_layers
from tests.pipeline.tiny import Shape, family_of, make_row, tiny_models

SCHEDULES = {
    "segmented": Schedule("segmented"),
    "prepass": Schedule("prepass"),
    "whole-layers": Schedule("segmented", whole_layers=True),
}
PARTS = [
    {"feedback": feedback, "selection": selection, "weighting": weighting}
    for feedback, selection, weighting in itertools.product(
        ("hidden", "pause", "none"), ("attention", "all", "none"), ("copy", "weighted")
    )
    if selection != "none" or (feedback != "none" and weighting == "copy")
]
WAYS = [("bptt", "segmented", False), ("bptt", "segmented", True)]
WAYS += [("detach", "segmented", False), ("detach", "prepass", True), ("detach", "whole-layers", True)]
NEW = 6


class NaiveParts(NaiveRow):
    """The definition with other parts: one row, every pass over its whole prefix again."""

    def __init__(self, vlm: nn.Module, row: Row, method: LatentMethod) -> None:
        self.method = method
        super().__init__(vlm, row, method.config)

    def take_step(self, step: int) -> None:
        config = self.config
        hidden, attention = full_pass(self.vlm, self.embeds, self.positions)
        scores, last = attention[:, :, -1, : len(self.prompt)].mean((0, 1)), hidden[-1]
        if config.latent_grad == "detach":
            scores, last = scores.detach(), last.detach()
        columns = sorted(self.free) if config.selection == "all" else self.choose(step, scores.detach())[0]
        self.steps.append(NaiveStep(columns, scores.detach(), 1.0))
        self.free = [column for column in self.free if column not in columns]
        share = scores[columns] / scores[columns].sum() * len(columns)
        factors = share if config.weighting == "weighted" else torch.ones(len(columns))
        new = [self.prompt[column] * factor for column, factor in zip(columns, factors, strict=True)]
        if config.feedback != "none":
            new.append(last if config.feedback == "hidden" else self.method.feedback.embedding[0])
        if new:
            self.append(torch.stack(new))


@pytest.fixture(scope="module", params=["qwen2_vl", "chameleon"])
def models(request: pytest.FixtureRequest) -> tuple[Backbone, nn.Module]:
    return tiny_models(request.param)


def rows_of(stock: nn.Module, latents: list[int]) -> list[Row]:
    """Pictures of two sizes, two pictures, none."""
    shapes = zip([[(3, 4)], [(2, 3)], [(2, 3), (5, 2)], []], [5, 2, 9, 4], [4, 7, 1, 3], latents, strict=True)
    return [make_row(Shape(*shape), number, stock) for number, shape in enumerate(shapes)]


def method_of(backbone: Backbone, **options: object) -> LatentMethod:
    torch.manual_seed(0)
    return LatentMethod.of(LatentConfig(num_patches=2, **options), backbone)


@contextmanager
def checkpointed(backbone: Backbone, enabled: bool) -> Iterator[None]:
    if enabled:
        enable_checkpointing(backbone.core)
    yield
    backbone.core.gradient_checkpointing_disable()


def gradients(modules: list[nn.Module], loss: Tensor) -> list[Tensor]:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join([way[0], way[1], "checkpointed" if way[2] else "plain"]))
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: " ".join(parts.values()))
def test_equals_the_definition(models: tuple[Backbone, nn.Module], parts: dict[str, str], way: tuple) -> None:
    """Loss and every gradient, the parts' own parameters included; rows of 2, 0, 3 and 1 steps in one batch."""
    backbone, stock = models
    latent_grad, schedule, checkpointing = way
    method = method_of(backbone, latent_grad=latent_grad, **parts)
    rows = rows_of(stock, [2, 0, 3, 1])
    batch = collate(rows, family_of(stock).format, 3)
    with checkpointed(backbone, checkpointing):
        trace = latent_forward(backbone, batch, method, SCHEDULES[schedule])
        nll = token_nll(trace.predictors(batch.latents), batch.labels, backbone.head)
        ours = gradients([backbone.core, method], nll.mean())
    expected = torch.cat([NaiveParts(stock, row, method).nll() for row in rows])
    torch.testing.assert_close(nll, expected, atol=5e-5, rtol=0)
    for found, gradient in zip(ours, gradients([stock, method], expected.mean()), strict=True):
        assert (found - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7
    if parts["feedback"] == "pause":
        assert ours[-1].abs().max() > 0


@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: " ".join(parts.values()))
def test_answers_equal_the_definition(models: tuple[Backbone, nn.Module], parts: dict[str, str]) -> None:
    backbone, stock = models
    method, rows = method_of(backbone, **parts), rows_of(stock, [2, 0, 3, 1])
    backbone.eval()
    with torch.no_grad():
        out = generate(backbone, collate(rows, family_of(stock).format, 3), method, Decoding(NEW, 10**6))
        expected = [NaiveParts(stock, row, method).answer(NEW, 10**6) for row in rows]
    backbone.train()
    assert out.tokens == expected
    assert out.forward_calls == 1 + 3 + NEW


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(way[:2]))
def test_given_tokens(models: tuple[Backbone, nn.Module], way: tuple) -> None:
    """Tokens between latent steps and text are read and not predicted, in training and in answers."""
    backbone, stock = models
    method = method_of(backbone, latent_grad=way[0])
    rows = [replace(row, given=2) for row in rows_of(stock, [2, 0, 3, 1])]
    rows[3].target_ids = rows[3].target_ids[:2]  # nothing but given tokens
    batch = collate(rows, family_of(stock).format, 3)
    with checkpointed(backbone, way[2]):
        trace = latent_forward(backbone, batch, method, SCHEDULES[way[1]])
        nll = token_nll(trace.predictors(batch.latents), batch.labels, backbone.head)
        ours = gradients([backbone.core], nll.mean())
    expected = torch.cat([NaiveParts(stock, row, method).nll()[2:] for row in rows])
    torch.testing.assert_close(nll, expected, atol=5e-5, rtol=0)
    for found, gradient in zip(ours, gradients([stock], expected.mean()), strict=True):
        assert (found - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7
    with torch.no_grad():
        backbone.eval()
        answers = generate(backbone, batch, method, Decoding(NEW, 10**6)).tokens
        backbone.train()
        for row, answer in zip(rows, answers, strict=True):
            naive = NaiveParts(stock, row, method)
            naive.append(naive.embed(torch.tensor(row.target_ids[:2])))
            assert answer == naive.answer(NEW, 10**6)


@pytest.mark.parametrize("latents", [[2, 2, 2, 2], [1, 0, 0, 1]], ids=["all-taken", "first-and-last"])
@pytest.mark.parametrize("images", [True, False], ids=["images", "text-only"])
def test_a_step_with_nothing_to_take(models: tuple[Backbone, nn.Module], images: bool, latents: list[int]) -> None:
    """All image columns are taken already, or there are none, and nothing is fed back."""
    backbone, stock = models
    method = method_of(backbone, feedback="none", selection="all")
    rows = [row if images else make_row(Shape([], 4, 3, row.latents), 9, stock) for row in rows_of(stock, latents)]
    batch = collate(rows, family_of(stock).format, 2)
    trace = latent_forward(backbone, batch, method)
    nll = token_nll(trace.predictors(batch.latents), batch.labels, backbone.head)
    expected = torch.cat([NaiveParts(stock, row, method).nll() for row in rows])
    torch.testing.assert_close(nll, expected, atol=5e-5, rtol=0)
    backbone.eval()
    with torch.no_grad():
        answers = generate(backbone, batch, method, Decoding(NEW, 10**6)).tokens
        assert answers == [NaiveParts(stock, row, method).answer(NEW, 10**6) for row in rows]
    backbone.train()


class Projection(Feedback):
    """A part with parameters, a buffer, and a type of its own."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.linear = nn.Linear(hidden_size, hidden_size)
        self.register_buffer("scale", torch.full((1,), 0.5))

    def forward(self, reading: Reading) -> Tensor:
        return self.linear(reading.tip)[:, None] * self.scale


def test_a_part_with_parameters_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is of the type of what is trained, its buffers are exported too, and it reads what another type computed."""
    monkeypatch.setitem(FEEDBACKS._parts, "projection", Projection)
    backbone, stock = tiny_models()
    backbone.vlm.bfloat16()
    model = LatentModel(backbone, LatentConfig(num_patches=2, feedback="projection"))
    assert {value.dtype for value in model.method.state_dict().values()} == {torch.bfloat16}
    batch = collate(rows_of(stock, [2, 0, 3, 1]), family_of(stock).format, 3)
    assert model(batch)[0].isfinite()
    model.method.float()  # as beside LoRA, which trains in fp32
    assert model(batch)[0].isfinite()
    save_file(model.method.state_dict(), tmp_path / PARTS_FILE)
    other = method_of(backbone, feedback="projection")
    load_parts(tmp_path, other)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.method.state_dict().items())


@pytest.mark.parametrize(
    ("options", "part", "said"),
    [
        ({"feedback": "odd"}, lambda *_: torch.zeros(4, 64), r"latent.feedback odd returned \(4, 64\) in place of"),
        ({"weighting": "odd"}, lambda s, c, f: torch.ones(4, 1), r"latent.weighting odd returned \(4, 1\) in place of"),
        (
            {"feedback": "odd"},
            lambda *_: None,
            r"latent.feedback odd returned None \(NoneType\) in place of a real ten",
        ),
        ({"auxiliary": "odd"}, lambda *_: torch.ones(4, 1), r"latent.auxiliary odd returned \(4, 1\) in place of"),
    ],
)
def test_results_of_another_shape_are_refused(models, monkeypatch, options, part, said) -> None:
    backbone, stock = models
    kinds = {"feedback": (FEEDBACKS, Feedback), "auxiliary": (AUXILIARIES, Auxiliary)}
    (kind,) = options
    if kind == "weighting":
        monkeypatch.setitem(WEIGHTINGS._parts, "odd", Weighting(part))
    else:
        parts, base = kinds[kind]
        monkeypatch.setitem(parts._parts, "odd", type("Odd", (base,), {"forward": lambda self, *given: part(*given)}))
    model = LatentModel(backbone, LatentConfig(num_patches=2, **options))
    with pytest.raises(UserError, match=said):
        model(collate(rows_of(stock, [2, 0, 3, 1]), family_of(stock).format, 3))


class Noisy(Feedback):
    """Draws, and counts how often."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.linear = nn.Linear(hidden_size, hidden_size)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.drawn: list[Tensor] = []

    def forward(self, reading: Reading) -> Tensor:
        self.calls += 1
        self.drawn.append(nn.functional.dropout(self.linear(reading.tip), 0.5, self.training))
        return self.drawn[-1][:, None]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join([way[0], way[1], "checkpointed" if way[2] else "plain"]))
def test_parts_run_once_a_step(models: tuple[Backbone, nn.Module], monkeypatch: pytest.MonkeyPatch, way: tuple) -> None:
    """Whatever the schedule: what a part draws is what every pass reads, and what backward goes through."""
    backbone, stock = models
    monkeypatch.setitem(FEEDBACKS._parts, "noisy", Noisy)
    method = method_of(backbone, latent_grad=way[0], feedback="noisy")
    batch = collate(rows_of(stock, [2, 0, 3, 1]), family_of(stock).format, 3)
    with checkpointed(backbone, way[2]):
        trace = latent_forward(backbone, batch, method, SCHEDULES[way[1]])
        nll = token_nll(trace.predictors(batch.latents), batch.labels, backbone.head)
        ours = gradients([method], nll.mean())
    assert method.feedback.calls == 3 and ours[0].abs().max() > 0
    for step, drawn, embeds in zip(trace.steps, method.feedback.drawn, trace.embeds[1:], strict=False):
        assert torch.equal(embeds[step.active, 2], drawn[step.active])
    drawn = iter(method.feedback.drawn)
    monkeypatch.setattr(Noisy, "forward", lambda self, reading: next(drawn).detach()[:, None])
    again = latent_forward(backbone, batch, method)
    expected = token_nll(again.predictors(batch.latents), batch.labels, backbone.head)
    torch.testing.assert_close(nll, expected, atol=1e-5, rtol=0)


def test_empty_slots_may_hold_no_numbers(models: tuple[Backbone, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of nothing is 0/0: of a row without a picture, or without a step."""
    backbone, stock = models
    odd = Weighting(lambda s, columns, filled: torch.where(filled, 1.0, torch.nan))
    monkeypatch.setitem(WEIGHTINGS._parts, "odd", odd)
    batch = collate(rows_of(stock, [2, 0, 3, 1]), family_of(stock).format, 3)
    losses = [
        LatentModel(backbone, LatentConfig(num_patches=2, weighting=name))(batch)[0].item() for name in ("copy", "odd")
    ]
    assert losses[0] == losses[1]


def test_weighted_patches_carry_gradient_to_the_attention(models: tuple[Backbone, nn.Module]) -> None:
    """Through s alone: with pause feedback nothing else joins the last pass to the query of the pass before."""
    backbone, stock = models
    batch = collate(rows_of(stock, [1, 1, 1, 1]), family_of(stock).format, 1)
    reached = {}
    for latent_grad in ("bptt", "detach"):
        method = method_of(backbone, feedback="pause", weighting="weighted", latent_grad=latent_grad)
        trace = latent_forward(backbone, batch, method)
        reached[latent_grad] = trace.steps[0].reading.saliency.requires_grad
    assert reached == {"bptt": True, "detach": False}


def test_norm_loss(models: tuple[Backbone, nn.Module]) -> None:
    """log(|h| / mean |embedding|)^2, mean over a row's steps; added to each of its labelled tokens' NLL."""
    backbone, stock = models
    rows = rows_of(stock, [2, 0, 3, 1])
    batch = collate(rows, family_of(stock).format, 3)
    plain, added = (
        LatentModel(backbone, LatentConfig(num_patches=2, auxiliary=name, auxiliary_weight=0.5))
        for name in ("none", "norm")
    )
    expected = 0.0
    for row in rows:
        naive = NaiveRow(stock, replace(row, latents=0), plain.latent)
        usual, terms = naive.prompt.norm(dim=-1).mean(), []
        for step in range(row.latents):
            hidden, _ = full_pass(stock, naive.embeds, naive.positions)
            terms.append((hidden[-1].norm() / usual).log() ** 2)
            naive.take_step(step)
        expected += 0.5 * float(sum(terms)) / max(1, len(terms)) * len(row.target_ids)
    difference = added(batch)[0] - plain(batch)[0]
    assert expected > 0.005
    assert float(difference) == pytest.approx(expected, rel=1e-4, abs=2e-5)


class MeanOfLayers(Feedback):
    read_layers = 2

    def forward(self, reading: Reading) -> Tensor:
        assert reading.layers is not None and reading.layers.shape[1] == 2
        assert reading.first == (len(reading.passes) == 1)
        return reading.layers.mean(1, keepdim=True)


class NaiveLayers(NaiveRow):
    """The definition with the mean of the last two layers' hidden states in place of h."""

    def append(self, embeds: Tensor) -> None:
        if len(self.steps) > getattr(self, "taken", 0):
            self.taken = len(self.steps)
            mean = last_layers(self.vlm, self.embeds, self.positions, 2).mean(0)
            embeds = torch.cat([embeds[:-1], (mean.detach() if self.config.latent_grad == "detach" else mean)[None]])
        super().append(embeds)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join([way[0], way[1], "checkpointed" if way[2] else "plain"]))
def test_hidden_states_of_layers(models: tuple[Backbone, nn.Module], monkeypatch, way: tuple) -> None:
    """Loss, every gradient and answers equal the definition's."""
    monkeypatch.setitem(FEEDBACKS._parts, "layers", MeanOfLayers)
    backbone, stock = models
    method = method_of(backbone, latent_grad=way[0], feedback="layers")
    rows = rows_of(stock, [2, 0, 3, 1])
    batch = collate(rows, family_of(stock).format, 3)
    with checkpointed(backbone, way[2]):
        trace = latent_forward(backbone, batch, method, SCHEDULES[way[1]])
        nll = token_nll(trace.predictors(batch.latents), batch.labels, backbone.head)
        ours = gradients([backbone.core], nll.mean())
    expected = torch.cat([NaiveLayers(stock, row, method.config).nll() for row in rows])
    torch.testing.assert_close(nll, expected, atol=5e-5, rtol=0)
    for found, gradient in zip(ours, gradients([stock], expected.mean()), strict=True):
        assert (found - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7
    backbone.eval()
    with torch.no_grad():
        answers = generate(backbone, batch, method, Decoding(NEW, 10**6)).tokens
        assert answers == [NaiveLayers(stock, row, method.config).answer(NEW, 10**6) for row in rows]
    backbone.train()


def test_layers_cost_nothing_unless_asked_for(models: tuple[Backbone, nn.Module], monkeypatch) -> None:
    """The last of them is h; True reads all; more than the model has are refused; others get none."""
    backbone, stock = models
    batch = collate(rows_of(stock, [2, 0, 3, 1]), family_of(stock).format, 3)
    reading = latent_forward(backbone, batch, method_of(backbone)).steps[2].reading
    assert reading.layers is None
    monkeypatch.setitem(FEEDBACKS._parts, "layers", type("All", (HiddenState,), {"read_layers": True}))
    reading = latent_forward(backbone, batch, method_of(backbone, feedback="layers")).steps[2].reading
    assert reading.layers is not None and reading.layers.shape == (4, 3, 64)
    assert torch.equal(reading.layers[:, -1], reading.tip)
    assert reading.to(torch.bfloat16).layers.dtype == torch.bfloat16 and reading.forget().layers is None
    assert reading.layers.requires_grad and not reading.detach().layers.requires_grad
    monkeypatch.setitem(FEEDBACKS._parts, "layers", type("Four", (HiddenState,), {"read_layers": 4}))
    with pytest.raises(UserError, match=r"latent.feedback layers reads 4 layers \(read_layers\), the model has 3"):
        method_of(backbone, feedback="layers")


def test_last_columns_of_a_reading(models: tuple[Backbone, nn.Module]) -> None:
    """The newest real columns of each row, across passes and past masked ones."""
    backbone, stock = models
    rows = rows_of(stock, [2, 0, 3, 1])
    trace = latent_forward(backbone, collate(rows, family_of(stock).format, 3), method_of(backbone))
    reading = trace.steps[2].reading
    hidden, there = reading.last(4)
    assert there.all()
    for i, row in enumerate(rows):
        naive = NaiveRow(stock, replace(row, latents=min(row.latents, 2)), LatentConfig(num_patches=2))
        expected = full_pass(stock, naive.embeds, naive.positions)[0][-4:]
        torch.testing.assert_close(hidden[i], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("parts", [{}, {"feedback": "none"}, {"feedback": "none", "selection": "all"}], ids=str)
def test_tips_of_a_reading(models: tuple[Backbone, nn.Module], parts: dict[str, str]) -> None:
    """Those of the trace, also where a step inserted nothing."""
    backbone, stock = models
    trace = latent_forward(
        backbone, collate(rows_of(stock, [2, 0, 3, 1]), family_of(stock).format, 3), method_of(backbone, **parts)
    )
    reading = trace.steps[2].reading
    assert reading.tips.shape[1] == 3 and torch.equal(reading.tips[:, -1], reading.tip)
    assert torch.equal(reading.tips, torch.stack(trace.tips[:3], dim=1))


class MeanOfFour(Feedback):
    def forward(self, reading: Reading) -> Tensor:
        hidden, there = reading.last(4)
        return (hidden * there[..., None]).sum(1, keepdim=True) / there.sum(1)[:, None, None]


def test_a_part_of_one_own_equals_itself_in_every_schedule(models: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, stock = models
    monkeypatch.setitem(FEEDBACKS._parts, "mean", MeanOfFour)
    batch = collate(rows_of(stock, [2, 0, 3, 1]), family_of(stock).format, 3)
    found = {}
    for way, schedule in SCHEDULES.items():
        method = method_of(backbone, feedback="mean", latent_grad="detach")
        with checkpointed(backbone, way == "whole-layers"):
            trace = latent_forward(backbone, batch, method, schedule)
            nll = token_nll(trace.predictors(batch.latents), batch.labels, backbone.head)
            found[way] = (nll, gradients([backbone.core], nll.mean()))
    for name in ("prepass", "whole-layers"):
        torch.testing.assert_close(found[name][0], found["segmented"][0], atol=1e-5, rtol=0)
        for ours, theirs in zip(found[name][1], found["segmented"][1], strict=True):
            assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max() + 1e-7


def test_a_step_without_a_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: {path: x}\ndata: {path: x}\nlatent: {feedback: none, selection: none}\n")
    with pytest.raises(UserError, match="a latent step would have no column"):
        load_config(tmp_path / "r.yaml", {})


def test_reading_is_all_that_a_part_sees() -> None:
    """docs/new_method.md lists these."""
    assert [*Reading.__dataclass_fields__] == [
        "step",
        "batch",
        "prompt_embeds",
        "passes",
        "mask",
        "tip",
        "saliency",
        "layers",
    ]
