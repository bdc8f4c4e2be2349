"""The order of samples at scale, and what grouping by length saves.  `python -m benchmarks.data_order`

seconds, bytes    to open a stage of --samples samples in shards of 1,000, and to get its first step's rows at 0%,
                  50% and 99%; the memory that this takes for each sample, mapped pages of the index included
padding           columns of one epoch's micro-batches, real and padded, of tokenised rows: two data sets of the
                  generated task, of small and of large pictures, under `data.group_by_length`
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data_prep import cli
from data_prep.files import write_atomic
from data_prep.index import read_manifest, write_index, write_manifest
from data_prep.reader import open_split
from data_prep.shard import build
from data_prep.tokenizer import texts_of_folder, train_tokenizer
from pipeline.backbones.qwen2_vl import Qwen2VLProcessor
from pipeline.curriculum import CurriculumConfig, StageConfig
from pipeline.loader import Share, StageSteps
from pipeline.mixture import Index, Mixture
from pipeline.prepare import check_patches
from pipeline.prompt import PromptConfig, RowBuilder

SHARD = 1000
CURRICULUM = CurriculumConfig(stages=[StageConfig(latents=0, skip=0, epochs=1)])


def main(*, samples: int = 10_000_000, rows: int = 4_000, batch: int = 32, json: Path | None = None) -> None:
    """Print both tables; --samples: of the first, in thousands of one real shard; --rows: of the second.

    --batch: rows of a global batch, of which a micro-batch is a quarter; --json: file for the figures.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = {"scale": scale(folder, samples, batch), "padding": padding(folder, rows, batch)}
    if json is not None:
        write_figures(json, figures)


def write_figures(path: Path, figures: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(figures, indent=1) + "\n")


def row_builder(folder: Path, data: Path) -> RowBuilder:
    """With a tokenizer trained on a shard folder; one column for each 28 x 28 pixels."""
    train_tokenizer(texts_of_folder(data), folder, 700)
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 1280}
    Qwen2VLImageProcessorPil(size=size).save_pretrained(folder)
    return RowBuilder(Qwen2VLProcessor(folder), PromptConfig(), 1)


def repeated(folder: Path, samples: int) -> Path:
    """A sound shard folder of `samples` samples: one real shard under many names."""
    one, many = folder / "one", folder / "many"
    build("trails", one, options={"grid": 3, "colours": 6, "train": SHARD, "val": 0, "test": 0})
    many.mkdir()
    manifest = read_manifest(one)
    part = manifest["splits"]["train"]
    (entry,) = part["shards"]
    records = open_split(one, "train").records
    repeats = []
    shards = []
    for shard in range(samples // SHARD):
        name = f"train-{shard:06d}.tar"
        os.link(one / entry["name"], many / name)
        mine = records.copy()
        mine["shard"] = shard
        repeats.append(mine)
        shards.append({**entry, "name": name, "index_sha256": hashlib.sha256(mine.tobytes()).hexdigest()})
    write_index(many / part["index"]["name"], np.concatenate(repeats))
    part |= {"shards": shards, "samples": len(shards) * SHARD}
    write_manifest(many, {name: value for name, value in manifest.items() if name != "hash"})
    return many


def scale(folder: Path, samples: int, batch: int) -> dict[str, float]:
    """Seconds and bytes a sample of opening a stage and of its first rows at three places."""
    data = repeated(folder, samples)
    builder = row_builder(folder / "words", folder / "one")
    process, figures, began = psutil.Process(), dict[str, float](), time.perf_counter()
    before = process.memory_info()

    def measured(name: str) -> None:
        nonlocal began
        figures[name] = time.perf_counter() - began
        began = time.perf_counter()

    index = open_split(data, "train")
    measured("open the folder")
    check_patches(index, builder.processor, 1)
    measured("look at the pictures' sizes")
    share = Share(0, 1, batch, batch)
    for place in (0, 50, 99):
        steps = StageSteps(index, builder, CURRICULUM, 0, share, place, "pad")  # another seed: nothing is there yet
        (rows,) = steps[len(steps) * place // 100]
        assert not rows.bad and len(set(rows.row_ids.tolist())) == batch
        measured(f"open a stage, rows of a step at {place}%")
    after = process.memory_info()
    figures["bytes a sample"] = (after.rss - before.rss) / len(index)
    figures["bytes a sample of the index file, shared"] = (after.shared - before.shared) / len(index)
    print(f"{len(index):,} samples in {len(index.shards):,} shards, global batch {batch}")
    for name, value in figures.items():
        print(f"    {name:<40} {value:8.3f}{'' if name.startswith('bytes') else ' s'}")
    return figures


def padding(folder: Path, rows: int, batch: int) -> dict[str, dict[str, int]]:
    """By window: real columns of an epoch, and those that its micro-batches pad."""
    folders = []
    for grid in (3, 7):
        folders.append(folder / f"grid{grid}")
        build("trails", folders[-1], options={"grid": grid, "train": rows // 2, "val": 0, "test": 0})
    builder = row_builder(folder / "padding", folders[0])
    small, large = (open_split(folder, "train") for folder in folders)
    figures = {}
    for name, index in (("one size", small), ("two sizes", Mixture(folders, [small, large], [1, 1]))):
        print(f"{len(index):,} rows with pictures of {name}, global batch {batch}, micro-batches of {batch // 4}")
        for window in (0, 2, 8, 32):
            real, padded = epoch_columns(index, builder, batch, window)
            figures[f"{name}, {window}"] = {"real": real, "padded": padded}
            print(
                f"    group_by_length {window:<4} {real:>10,} real {padded:>10,} padded {padded / (real + padded):8.1%}"
            )
    return figures


def epoch_columns(index: Index, builder: RowBuilder, batch: int, window: int) -> tuple[int, int]:
    """(real, padded) columns of all micro-batches of an epoch."""
    steps = StageSteps(index, builder, CURRICULUM, 0, Share(0, 1, batch, batch // 4), 0, "drop", window)
    real = padded = 0
    for step in range(len(steps)):
        for micro in steps[step]:
            real += micro.columns
            padded += micro.prompt_mask.numel() + micro.target_mask.numel() - micro.columns
    return real, padded


if __name__ == "__main__":
    cli.run(main)
