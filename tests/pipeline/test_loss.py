"""Cross-entropy at labelled columns: what it counts, and that chunks change nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import loss
from pipeline.data.batch import IGNORE
from pipeline.loss import LabelHead, token_nll

ROWS, COLUMNS, HIDDEN, VOCABULARY = 3, 9, 16, 50


@pytest.fixture
def head() -> LabelHead:
    torch.manual_seed(0)
    projection = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    LabelHead.install(projection)
    assert isinstance(projection, LabelHead)
    return projection


def tensors(labelled: int) -> tuple[Tensor, Tensor]:
    """Predictors (B,R,D) and labels with so many labelled columns at random places."""
    random = torch.Generator().manual_seed(1)
    predictors = torch.randn(ROWS, COLUMNS, HIDDEN, generator=random, requires_grad=True)
    labels = torch.randint(VOCABULARY, (ROWS * COLUMNS,), generator=random)
    labels[torch.randperm(ROWS * COLUMNS, generator=random)[labelled:]] = IGNORE
    return predictors, labels.view(ROWS, COLUMNS)


def result(head: LabelHead, labelled: int) -> tuple[Tensor, Tensor, Tensor]:
    """NLL by token, and the gradients of a weighted sum for head and predictors."""
    predictors, labels = tensors(labelled)
    nll = token_nll(predictors, labels, head)
    weights = torch.arange(1, labelled + 1, dtype=torch.float32)
    return nll, *torch.autograd.grad((nll * weights).sum(), [head.weight, predictors])


@pytest.mark.parametrize("labelled", [1, 20, ROWS * COLUMNS])
def test_equals_cross_entropy(head: LabelHead, labelled: int) -> None:
    predictors, labels = tensors(labelled)
    nll = token_nll(predictors, labels, head)
    logits = F.linear(predictors, head.weight)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    assert nll.shape == (labelled,) and nll.dtype == torch.float32
    torch.testing.assert_close(nll, expected[labels.flatten() != IGNORE])  # in row-major order
    torch.testing.assert_close(nll.mean(), F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("chunk", [1, 4, 7, 19, 20, 21])
def test_chunks_change_nothing(head: LabelHead, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    expected = result(head, 20)
    monkeypatch.setattr(loss, "CHUNK", chunk)
    for actual, whole in zip(result(head, 20), expected, strict=True):
        torch.testing.assert_close(actual, whole)
    with torch.no_grad():
        torch.testing.assert_close(token_nll(*tensors(20), head), expected[0].detach())


def test_logits_exist_for_one_chunk_at_a_time(head: LabelHead, monkeypatch: pytest.MonkeyPatch) -> None:
    """In forward, and again in backward; nothing of the vocabulary's size is kept in between."""
    monkeypatch.setattr(loss, "CHUNK", 6)
    made = []
    linear = F.linear
    monkeypatch.setattr(loss.F, "linear", lambda hidden, *rest: made.append(len(hidden)) or linear(hidden, *rest))
    predictors, labels = tensors(20)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        nll = token_nll(predictors, labels, head)
    assert made == [6, 6, 6, 2]
    assert not [t for t in saved if t.ndim and t.shape[-1] == VOCABULARY]
    nll.sum().backward()
    assert made[4:] and sum(made[4:]) == 20 and max(made[4:]) == 6


@pytest.mark.parametrize("chunk", [1, 1024])
def test_no_label(head: LabelHead, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Nothing to sum, and gradients that are zero, not absent."""
    monkeypatch.setattr(loss, "CHUNK", chunk)
    nll, of_head, of_predictors = result(head, 0)
    assert nll.shape == (0,) and nll.sum() == 0
    assert not of_head.any() and not of_predictors.any()


def test_unlabelled_columns_get_no_gradient(head: LabelHead) -> None:
    predictors, labels = tensors(5)
    (gradient,) = torch.autograd.grad(token_nll(predictors, labels, head).sum(), [predictors])
    assert torch.equal(gradient.abs().sum(-1) > 0, labels != IGNORE)


@pytest.mark.parametrize("chunk", [4, 1024])
def test_one_call_of_the_head(head: LabelHead, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """ZeRO-3 gathers parameters around module calls: one, however many chunks."""
    monkeypatch.setattr(loss, "CHUNK", chunk)
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    token_nll(*tensors(20), head)
    assert calls == [1]


def test_installed_head_still_gives_logits(head: LabelHead) -> None:
    hidden = torch.randn(2, 3, HIDDEN)
    assert torch.equal(head(hidden), F.linear(hidden, head.weight))
    assert list(dict(head.named_parameters())) == ["weight"]
    biased = nn.Linear(HIDDEN, VOCABULARY)
    expected = biased(hidden)
    LabelHead.install(biased)
    assert torch.equal(biased(hidden), expected)


def test_half_precision_is_summed_in_full() -> None:
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False).bfloat16()
    LabelHead.install(head)
    predictors, labels = tensors(20)
    nll = token_nll(predictors.bfloat16(), labels, head)
    assert nll.dtype == torch.float32
    logits = F.linear(predictors.bfloat16()[labels != IGNORE], head.weight)
    torch.testing.assert_close(nll, F.cross_entropy(logits.float(), labels[labels != IGNORE], reduction="none"))
