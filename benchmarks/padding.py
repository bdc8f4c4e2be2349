"""What grouping by length saves.  `python -m benchmarks.padding`

Columns of one epoch's micro-batches, real and padded, of tokenised rows under `data.group_by_length`: the generated
task with small pictures, and a mixture of small and large ones.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.step_cost import write_json
from data_prep import cli
from data_prep.reader import open_split
from data_prep.shard import build
from data_prep.tokenizer import texts_of_folder, train_tokenizer
from pipeline.backbones.qwen2_vl import Qwen2VLProcessor
from pipeline.curriculum import CurriculumConfig, StageConfig
from pipeline.data.loader import Share, StageSteps
from pipeline.data.mixture import Index, Mixture
from pipeline.prompt import PromptConfig, RowBuilder

CURRICULUM = CurriculumConfig(stages=[StageConfig(latents=0, skip=0, epochs=1)])


def main(*, rows: int = 4_000, batch: int = 32, json: Path | None = None) -> None:
    """Print the table; --json FILE writes it.

    --rows: of each data set; --batch: rows of a global batch, of which a micro-batch is a quarter.
    """
    with tempfile.TemporaryDirectory() as name:
        figures = padding(Path(name), rows, batch)
    if json:
        write_json(json, figures)


def row_builder(folder: Path, data: Path) -> RowBuilder:
    """With a tokenizer trained on a shard folder; one column for each 28 x 28 pixels."""
    train_tokenizer(texts_of_folder(data), folder, 700)
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 1280}
    Qwen2VLImageProcessorPil(size=size).save_pretrained(folder)
    return RowBuilder(Qwen2VLProcessor(folder), PromptConfig(), 1)


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
