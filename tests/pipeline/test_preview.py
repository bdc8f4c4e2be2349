"""What a recipe makes of rows, as `data_prep.report` tells it, against the trainer's own batches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_prep.example import Example
from data_prep.reader import open_split
from data_prep.report import findings, make_report, summary
from data_prep.reporting.page import page
from pipeline.data.loader import Share, StageSteps
from pipeline.data.preview import OncePrompted, Preview, open_preview
from pipeline.prompt import RowBuilder
from tests.launch import TINY
from tests.pipeline.examples import make_example


def preview_of(data: Path, **options: str) -> Preview:
    overrides = {name.replace("__", "."): value for name, value in options.items()}
    return open_preview(str(data), [TINY], overrides, open_split(data, "train"), rows=1000)


def first_epoch(steps: StageSteps) -> list[int]:
    return [step for step in range(len(steps)) if steps.samples(step)[0] == 0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt__max_tokens": "150"},
        {"prompt__max_tokens": "150", "prompt__overlong": "skip"},
        {"train__micro_batch": "3", "train__global_batch": "10", "data__last_batch": "pad"},
        {"curriculum__mix": "0.5", "curriculum__count": "replaced"},
        {"latent__selection": "none"},
    ],
)
def test_stages_are_those_of_the_trainer(data: Path, options: dict[str, str]) -> None:
    """Rows, what is cut, and padding, of two ranks' batches as they are really made."""
    preview, index = preview_of(data, **options), open_split(data, "train")
    config = preview.config
    assert preview.builder is not None and preview.processor is not None and preview.unit == "tokens"
    for measure in preview.measure(index, 1000, ranks=2):
        padding = measure.padding
        assert padding is not None and measure.samples == measure.rows == 120
        builder = RowBuilder(preview.processor, config.prompt, config.latent.patches_taken)
        batches = []
        for rank in range(2):
            share = Share(rank, 2, config.train.global_batch, padding.micro_batch)
            steps = StageSteps(
                index, builder, config.curriculum, measure.number, share, config.train.seed, config.data.last_batch
            )
            batches += [batch for step in first_epoch(steps) for batch in steps[step]]
        each = config.latent.step_columns
        assert padding.rows == sum(bool(mask.any()) for batch in batches for mask in batch.target_mask)
        real = [
            int(prompt.sum() + target.sum()) + int(latents) * each
            for batch in batches
            for prompt, target, latents in zip(batch.prompt_mask, batch.target_mask, batch.latents, strict=True)
            if target.any()
        ]
        widths = [batch.prompt_ids.shape[1] + batch.target_ids.shape[1] + batch.passes * each for batch in batches]
        assert padding.real == sum(real)
        assert padding.padded == sum(w * len(batch.keys) for w, batch in zip(widths, batches, strict=True))
        if len(real) == 120 and not config.curriculum.mix:
            assert measure.columns == Counter(real)
        if config.prompt.max_tokens == 150:
            assert bool(measure.overlong) == bool(sum(batch.overlong for batch in batches))
            assert bool(measure.shortened) == bool(sum(batch.dropped_steps for batch in batches))


def test_a_sample_at_every_stage(data: Path) -> None:
    """Grouped as the curriculum does; too long, it loses its last groups, and then the row."""
    rationale = "One is. Two is. Three is. Four is."  # groups of 2, 1, 1
    example = make_example(rationale=rationale)
    seen = preview_of(data).show(example, "k")
    assert [(s.latents, s.kept, s.dropped) for s in seen] == [
        (0, range(3), 0), (1, range(1, 3), 0), (2, range(2, 3), 0)
    ]  # fmt: skip
    assert [s.inserted for s in seen] == [0, 3, 6] and seen[0].prompt == seen[2].prompt
    limit = str(seen[0].columns - 1)
    first = preview_of(data, prompt__max_tokens=limit).show(example, "k")[0]
    assert (first.kept, first.dropped, first.problem) == (range(2), 1, "")
    first = preview_of(data, prompt__max_tokens=limit, prompt__overlong="skip").show(example, "k")[0]
    assert first.overlong and "over the limit" in first.problem
    seen = preview_of(data, latent__num_patches="9").show(example, "k")
    assert [bool(s.problem) for s in seen] == [False, True, True]
    assert not seen[1].overlong and "9 patches a step" in seen[1].problem


def test_words_where_no_tokenizer_can_be_had(data: Path) -> None:
    options = {"model.path": "no-such/model", "model.scratch": "none"}
    made = make_report(str(data), [TINY], options, 1000, 2, 0, ranks=1)
    assert made.preview is not None and made.unit == "words" and made.folder.splits["train"].rows == 120
    assert "neither a folder nor in the cache" in made.tokenizer
    assert [stage.rows for stage in made.stages] == [120] * 3 and made.stages[0].padding is None
    assert "neither a folder nor in the cache" in page(made)
    assert any("words" in line for line in summary(made))


def test_a_page_with_stages(data: Path) -> None:
    options = {"prompt.max_tokens": "150", "curriculum.stages": "[{latents: 0, skip: 0, steps: 8},"
               " {latents: 2, skip: 2, steps: 9, where: {kind: [look]}}, {latents: 1, skip: 1, epochs: 1,"
               " where: {kind: [no such]}}]"}  # fmt: skip
    made = make_report(str(data), [TINY], options, 1000, 3, 0, ranks=1)
    index = open_split(data, "train")
    looks = sum(index.read(i).fields["kind"] == "look" for i in range(120))
    assert [(stage.samples, stage.steps) for stage in made.stages] == [(120, 8), (looks, 9), (None, None)]
    assert [stage.rows for stage in made.stages] == [120, looks, 0]
    told = [line for _, line in findings(made)]
    assert any("0 training samples fit it" in line for line in told)
    assert any(line.startswith("stage 0: of the rows") and "longer than 150" in line for line in told)
    shown = page(made)
    assert '<span class="chip latent" title="latent step">~</span>' * 2 in shown
    assert "(not trained on)" in shown and "only rows whose" in shown and "nan" not in shown


def test_fewer_rows_than_there_are(data: Path) -> None:
    preview = open_preview(str(data), [TINY], {}, open_split(data, "train"), rows=30)
    assert "from 30 of 120 rows" in preview.note
    measures = preview.measure(open_split(data, "train"), 30, ranks=1)
    assert [m.rows for m in measures] == [30] * 3
    assert [m.padding.rows for m in measures if m.padding] == [16] * 3  # a third of 30 in global batches of 8


def test_a_sample_that_breaks_the_libraries(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is counted and named, in numbers and gallery alike."""
    index, whole = open_split(data, "train"), OncePrompted.row

    def row(self: OncePrompted, example: Example, *args: Any) -> Any:
        if example.id == index.read(3).id:
            raise OverflowError("too far")
        return whole(self, example, *args)

    monkeypatch.setattr(OncePrompted, "row", row)
    made = make_report(str(data), [TINY], {}, 1000, 120, 0, ranks=1)
    assert [stage.unusable for stage in made.stages] == [{"OverflowError: too far": 1}] * 3
    assert [s.key for s in made.gallery if s.problem] == [index.key(3)]
    assert any("stage 1: 0.8% of the rows cannot be used" in line for line in summary(made))
