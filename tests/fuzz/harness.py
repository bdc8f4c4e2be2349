"""A case through preparation and loading, and what must hold whatever it is."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import io
import json
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data_prep.errors import UserError
from data_prep.example import Example
from data_prep.reader import BadSample, open_split
from data_prep.shard import build
from data_prep.sources import open_source
from data_prep.tokenizer import train_tokenizer
from pipeline.backbones.qwen2_vl import Qwen2VLProcessor
from pipeline.curriculum import CurriculumConfig, StageConfig
from pipeline.data.batch import collate
from pipeline.data.loader import training_row
from pipeline.prompt import PromptConfig, RowBuilder
from tests.fuzz import kinds, listed
from tests.fuzz.kinds import PICTURE, Case, question
from tests.pipeline.conftest import TEXTS

INPUTS, FOLDERS = kinds.INPUTS | listed.INPUTS, kinds.FOLDERS | listed.FOLDERS
KINDS = (*INPUTS, *FOLDERS)
SECONDS = 20
"""No case takes so long."""
CURRICULUM = CurriculumConfig(stages=[StageConfig(latents=2, skip=2, epochs=1)])


class Stalled(Exception):
    """A case took more than `SECONDS`."""


@dataclass
class Counts:
    """What became of the rows of a kind's cases; refused counts cases."""

    cases: int = 0
    accepted: int = 0
    rejected: int = 0
    refused: int = 0


class Harness:
    """Runs cases; `folder` is for what they share."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.seed = seed
        self.template = folder / "template"
        lines = [json.dumps(question(f"q{i}", image="a.png" if i % 3 else None)) for i in range(7)]
        (folder / "a.png").write_bytes(PICTURE)
        (folder / "train.jsonl").write_text("\n".join(lines))
        with contextlib.redirect_stderr(io.StringIO()):
            build("jsonl", self.template, input=str(folder / "train.jsonl"), samples_per_shard=3)
        index = open_split(self.template, "train")
        self.written = [index.read(i) for i in range(len(index))]
        train_tokenizer(TEXTS, folder / "model", 520)
        size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
        Qwen2VLImageProcessorPil(size=size).save_pretrained(folder / "model")
        self.builder = RowBuilder(Qwen2VLProcessor(folder / "model"), PromptConfig(max_tokens=400), 2)

    def run(self, kind: str, number: int, counts: Counts) -> None:
        """Make and check a case; it depends on the seed, the kind and the number alone.

        Raises:
            AssertionError, or whatever else a case must not raise.
        """
        rng = random.Random(f"{self.seed} {kind} {number}")
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        try:
            make = INPUTS.get(kind) or functools.partial(FOLDERS[kind], template=self.template)
            (folder / "in").mkdir()
            case = make(rng, folder / "in")
            with _time_limit(), _quiet(folder):
                if case.source:
                    self._prepare(case, folder / "out", counts)
                else:
                    self._load_damaged(case, counts)
        finally:
            shutil.rmtree(folder)
        counts.cases += 1

    def _prepare(self, case: Case, out: Path, counts: Counts) -> None:
        try:
            manifest = build(case.source, out, input=str(case.path), samples_per_shard=2)
        except UserError as error:
            assert not case.sound, f"refused in spite of sound rows: {error}"
            counts.refused += 1
            return
        table = open_source(case.source, str(case.path))
        rows = {split: table.rows(split) for split in table.splits()}
        assert case.rows is None or sum(rows.values()) == case.rows, f"{rows}, not {case.rows}"
        rejects = [json.loads(line) for path in out.glob("*rejects.jsonl") for line in path.read_text().splitlines()]
        accepted = 0
        for split in manifest["splits"]:
            accepted += self._load(out, split, case)
        assert accepted + len(rejects) == sum(rows.values()), f"{accepted} and {len(rejects)} of {rows}"
        counts.accepted += accepted
        counts.rejected += len(rejects)

    def _load(self, out: Path, split: str, case: Case) -> int:
        """Read every sample of a sound folder, and make rows and a batch of them; returns how many."""
        index = open_split(out, split)
        examples = [index.read(i) for i in range(len(index))]
        for example in examples:
            example.validate()
        ids = {example.id for example in examples}
        assert case.sound <= ids, f"sound rows are missing: {case.sound - ids}"
        assert not case.bad & ids, f"bad rows came through: {case.bad & ids}"
        self._rows(index, examples)
        return len(examples)

    def _rows(self, index: Any, examples: list[Example]) -> None:
        stage = CURRICULUM.stages[0]
        rows = [training_row(index, self.builder, i, stage, CURRICULUM) for i in range(len(examples))]
        undecoded = [row.bad for row in rows if "image" in row.bad and "patches" not in row.bad]
        assert not undecoded, f"training refuses what preparation took: {undecoded}"
        collate(rows, self.builder.processor.row_format, stage.latents)

    def _load_damaged(self, case: Case, counts: Counts) -> None:
        """Of a damaged folder every sample is the one that was written, or none."""
        try:
            index = open_split(case.path, "train")
        except UserError:
            counts.refused += 1
            return
        assert len(index) <= len(self.written)
        for i in range(len(index)):
            try:
                assert index.read(i) == self.written[i], f"sample {i} is another one"
                counts.accepted += 1
            except BadSample:
                counts.rejected += 1
            training_row(index, self.builder, i, CURRICULUM.stages[0], CURRICULUM)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Raise Stalled, or where nothing of Python's runs, print the stacks and end the process."""

    def stalled(*_: object) -> None:
        raise Stalled

    before = signal.signal(signal.SIGALRM, stalled)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _quiet(folder: Path) -> Iterator[None]:
    """Progress bars go nowhere; the datasets library's cache goes away with the case."""
    import datasets

    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder / "cache"
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before
