"""What a recipe makes of a shard folder's rows, before anything is trained: each stage's sequences, their lengths and
what is lost.  For `data_prep.report`; rows are built and ordered by the trainer's own code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub
from tqdm import tqdm

from data_prep.errors import UserError
from data_prep.example import Example
from data_prep.reader import BadSample, ShardIndex
from data_prep.reporting.measure import spread
from data_prep.steps import merge_steps, split_steps
from data_prep.tokenizer import train_tokenizer, training_texts
from pipeline.backbones import BACKBONES
from pipeline.config import RunConfig
from pipeline.curriculum import stage_of_row, view
from pipeline.data.batch import Row
from pipeline.data.loader import Share, StageSteps
from pipeline.data.order import EMPTY, rank_share
from pipeline.data.stage_measure import Padding, Seen, StageMeasure
from pipeline.latent.parts import FEEDBACKS
from pipeline.prepare import READER_FILES, in_a_line
from pipeline.prompt import (
    LETTERS,
    MARKERS,
    OverlongSample,
    Processor,
    RowBuilder,
    UnusableSample,
    answer_label,
    check_num_patches,
)
from pipeline.recipe import load_config


class OncePrompted(RowBuilder):
    """Builds the prompt, and so decodes the picture, once for all stages that show a sample one after the other."""

    _last: Row | None = None

    def prompt_row(self, example: Example, key: str, row_id: int, latents: int, *, answer: bool = True) -> Row:
        if self._last is None or self._last.key != key:
            self._last = super().prompt_row(example, key, row_id, 0, answer=answer)
        if latents and self._last.image_grid:
            check_num_patches(self._image_columns(self._last.image_grid), self.num_patches or 0)
        return replace(self._last, latents=latents)

    def columns(self, row: Row, latents: int) -> int:
        """Columns that so many latent steps take of the row's image."""
        image = self._image_columns(row.image_grid)
        return image * bool(latents) if self.num_patches is None else min(image, self.num_patches) * latents


class Preview:
    """Rows of a folder as a recipe's stages show them; made by `open_preview`."""

    def __init__(self, config: RunConfig, processor: Processor | None, note: str) -> None:
        self.config, self.processor, self.note = config, processor, note
        """note: which tokenizer counts, or why none does"""
        self.groups = config.curriculum.groups
        self.unit = "tokens" if processor else "words"
        self.builder = OncePrompted(processor, config.prompt, config.latent.patches_taken) if processor else None
        self._width = FEEDBACKS[config.latent.feedback].width

    def count(self, text: str) -> int:
        """Tokens, or words, of a text."""
        return len(self.processor.text_ids(text) if self.processor else text.split())

    def answer(self, example: Example) -> str:
        """The right choice as the model is to write it; empty where there are more choices than letters."""
        letters = len(example.choices) <= len(LETTERS)
        return answer_label(example, self.config.prompt.answer) if letters else ""

    def image_columns(self, width: int, height: int) -> int | None:
        """Columns of a picture; None where they are not known, 0 where the model takes none of this shape."""
        try:
            return self.processor.image_columns(width, height) if self.processor else None
        except ValueError:
            return 0

    def show(self, example: Example, key: str) -> list[Seen]:
        """An example at every stage."""
        curriculum = self.config.curriculum
        seen = []
        for stage in curriculum.stages:
            trained = all(example.fields.get(name) in values for name, values in stage.where.items())
            shown = view(example.rationale, stage, curriculum.groups, curriculum.count)
            all_groups = len(merge_steps(split_steps(example.rationale), curriculum.groups))
            whole = Seen(trained, shown.latents, range(all_groups - len(shown.steps), all_groups))
            if self.builder is None:
                seen.append(replace(whole, text=sum(self.count(step) for step in shown.steps)))
                continue
            try:
                row = self.builder.row(example, key, 0, shown.latents, shown.steps)
            except UnusableSample as error:
                seen.append(replace(whole, problem=str(error), overlong=isinstance(error, OverlongSample)))
                continue
            seen.append(
                replace(
                    whole,
                    kept=range(whole.kept.start, whole.kept.stop - row.dropped_steps),
                    dropped=row.dropped_steps,
                    prompt=len(row.prompt_ids),
                    inserted=self.builder.columns(row, row.latents) + row.latents * self._width,
                    text=len(row.target_ids),
                )
            )
        return seen

    def measure(self, index: ShardIndex, rows: int, ranks: int) -> list[StageMeasure]:
        """Every stage: of an even sample of `rows` rows, and of about as many in the order of training."""
        known: dict[int, list[Seen]] = {}

        def look(position: int) -> list[Seen]:
            if position not in known:
                known[position] = self._look(index, position)
            return known[position]

        measures = [StageMeasure(number, stage) for number, stage in enumerate(self.config.curriculum.stages)]
        for position in tqdm(spread(len(index), rows), desc="stages", unit=" rows", delay=1):
            for measure, seen in zip(measures, look(int(position)), strict=True):
                measure.add(seen)
        if self.builder is not None:
            for measure in tqdm(measures, desc="order", unit=" stages", delay=1):
                try:
                    self._in_order(index, measure, rows, ranks, look)
                except UserError as error:
                    measure.problem = str(error)
        return measures

    def _look(self, index: ShardIndex, position: int) -> list[Seen]:
        try:
            return self.show(index.read(position), index.key(position))
        except BadSample as error:
            reason = error.reason
        except Exception as error:  # of many kinds: what odd texts and pictures make the libraries raise
            reason = in_a_line(error)
        return [Seen(True, 0, range(0), problem=reason)] * len(self.config.curriculum.stages)

    def _in_order(self, index: ShardIndex, measure: StageMeasure, rows: int, ranks: int, look: Any) -> None:
        """Fill in what depends on the order of rows: the first epoch, or its beginning where it has more rows."""
        config, train = self.config, self.config.train
        assert self.builder is not None
        # as `ds_config.batch_triangle` settles it where the DeepSpeed file says nothing
        micro_batch = train.micro_batch or math.ceil(math.ceil(train.global_batch / ranks) / (train.accumulation or 1))
        share = Share(0, ranks, train.global_batch, micro_batch)
        steps = StageSteps(
            index, self.builder, config.curriculum, measure.number, share, train.seed, config.data.last_batch,
            config.data.group_by_length,
        )  # fmt: skip
        measure.samples = len(index) if steps.chosen is None else len(steps.chosen)
        measure.steps = len(steps)
        measure.padding = padding = Padding(micro_batch)
        most = rows if len(index) <= rows else rows // len(config.curriculum.stages)
        for step in range(min(len(steps), math.ceil(most / train.global_batch))):
            epoch, samples = steps.samples(step)
            if epoch:
                break
            for rank in range(ranks):
                for micro in rank_share(samples, rank, ranks, micro_batch):
                    self._pad(padding, [
                        look(int(i))[stage_of_row(config.curriculum, measure.number, train.seed, epoch, int(i))]
                        for i in micro if i != EMPTY
                    ], len(micro), steps.passes)  # fmt: skip

    def _pad(self, padding: Padding, rows: Sequence[Seen], slots: int, passes: int) -> None:
        """Add a micro-batch of so many slots, those without a usable row masked (see `batch.collate`)."""
        usable = [seen for seen in rows if not seen.problem]
        assert self.builder is not None
        patches = self.builder.num_patches
        inserted = max((seen.inserted - seen.latents * self._width for seen in usable), default=0)
        inserted = (inserted if patches is None else passes * patches) + passes * self._width
        width = max((seen.prompt for seen in usable), default=1) + max((seen.text for seen in usable), default=1)
        padding.rows += len(usable)
        padding.real += sum(seen.columns for seen in usable)
        padding.padded += slots * (width + inserted)


def open_preview(
    data: str, recipes: Sequence[Path], overrides: Mapping[str, str], train: ShardIndex | None, rows: int, own: Any = ()
) -> Preview:
    """The preview of a recipe on a shard folder.

    Args:
        data: the folder; overrides: as in `load_config`; own: the command's own options.
        train: its train split; rows: from how many of its rows a tokenizer is trained where the recipe's model is from
            scratch; from all, and then it is the trainer's own, where it has no more.

    Raises:
        UserError: no such recipe, or a bad one.  A tokenizer that cannot be had is no error: words are counted.
    """
    config = load_config(recipes, {**overrides, "data.path": data}, also=own)
    try:
        processor, note = _processor(config, train, rows)
    except Exception as error:  # the libraries raise whatever a damaged file makes them raise
        why = str(error) if isinstance(error, UserError) else in_a_line(error)
        return Preview(config, None, f"words are counted, for want of a tokenizer: {why}")
    if config.prompt.markers:
        processor.tokenizer.add_tokens(list(MARKERS), special_tokens=True)
    return Preview(config, processor, note)


def _processor(config: RunConfig, train: ShardIndex | None, rows: int) -> tuple[Processor, str]:
    """The base model's processor and where it comes from.  Raises whatever it cannot be had for."""
    model, family = config.model, BACKBONES[config.model.backbone]
    if model.path is not None:
        folder = model.path
        if not Path(folder).is_dir():
            try:
                folder = huggingface_hub.snapshot_download(
                    folder, revision=model.revision, local_files_only=True, allow_patterns=list(READER_FILES)
                )
            except Exception:  # of several kinds: not cached, or no name of the hub
                raise UserError(f"model.path {model.path} is neither a folder nor in the cache of the hub") from None
        return family.processor(folder, config.prompt), f"tokens are those of {model.path}"
    assert model.scratch is not None
    if train is None:
        raise UserError("a model from scratch learns its tokenizer on a train split, which is not here")
    with TemporaryDirectory() as temporary:
        positions = spread(len(train), rows)
        tokenizer = train_tokenizer(
            _texts(train, positions), Path(temporary), model.scratch.vocab_size, family.TOKENIZER
        )
        family.create(model.scratch.model_copy(update={"layers": 1}), tokenizer, Path(temporary))
        part = "" if len(positions) == len(train) else f", from {len(positions):,} of {len(train):,} rows"
        return (
            family.processor(temporary, config.prompt),
            f"tokens are those of the tokenizer that training would make{part}",
        )


def _texts(index: ShardIndex, positions: Any) -> Any:
    for position in tqdm(positions, desc="tokenizer", unit=" rows", delay=1):
        try:
            yield from training_texts(index.read(int(position)))
        except BadSample:
            continue
