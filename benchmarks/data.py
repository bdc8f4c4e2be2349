"""Reading data: samples a second beside plain WebDataset, and the first batch of ten million samples.  `make bench`

Throughput: the same tars of photographs are read by `wds.WebDataset` from their beginning to their end and by this
project in its shuffled order, every sample checked by its hash; both parse the same JSON and decode and shrink the
same pictures, in as many DataLoader workers.  Pairs are measured in turns; the ratio's 95% interval is Student's, of
the pairs' logarithms.

First batch: from a folder's name to the first batch of token ids and pixels, in a fresh process with one worker, at
three places of an epoch; and the memory that a process has more afterwards.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json as json_module
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds  # type: ignore[import-untyped]
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from benchmarks.step_cost import write_json
from data_prep import cli
from data_prep.errors import UserError
from data_prep.example import Example
from data_prep.files import sha256
from data_prep.index import read_manifest, write_manifest
from data_prep.reader import ShardIndex, open_split
from data_prep.shard import build
from data_prep.tokenizer import texts_of_folder, train_tokenizer
from pipeline.backbones.qwen2_vl import Qwen2VLProcessor
from pipeline.curriculum import CurriculumConfig, StageConfig
from pipeline.data.loader import Share, StageSteps, steps_from
from pipeline.data.order import EpochOrder
from pipeline.prepare import check_patches
from pipeline.prompt import PromptConfig, RowBuilder, open_image

BATCH = 8
PHOTO, SHRUNK = (640, 480), (280, 280)
STUDENT = {3: 4.303, 5: 2.776, 7: 2.447, 9: 2.306, 15: 2.145}
"""Two-sided 95% points of Student's t for so many pairs"""
PLACES = (0, 50, 99)


def main(
    *, pairs: int = 7, samples: int = 1000, large: int = 10_000_000, workers: str = "1,2", json: Path | None = None
) -> None:
    """Print the figures; --json FILE writes them.

    --pairs: 3, 5, 7, 9 or 15 measurements of each; --samples: photographs; --large: samples of the synthetic index.
    """
    if pairs not in STUDENT or samples < 4 * BATCH or large < 1000:
        raise UserError(f"--pairs is one of {list(STUDENT)}, --samples at least {4 * BATCH}, --large at least 1000")
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result |= throughput(make_photographs(folder / "photographs", samples), workers, pairs)
        result |= first_batches(make_large(folder, large), folder / "words")
    if json:
        write_json(json, result)


# ---- throughput -----------------------------------------------------------------------------------------------------
def make_photographs(folder: Path, samples: int) -> Path:
    """Shards of 100 questions, each with a JPEG of some 50 kB."""
    folder.mkdir()
    random = np.random.default_rng(0)
    pictures = [photograph(random) for _ in range(min(samples, 100))]
    with open(folder / "train.jsonl", "w") as file:
        for i in range(samples):
            picture = folder / f"{i % len(pictures)}.jpg"
            if i < len(pictures):
                picture.write_bytes(pictures[i])
            line = question(i) | {"image": picture.name}
            file.write(json_module.dumps(line) + "\n")
    build("jsonl", folder / "shards", input=str(folder), samples_per_shard=100)
    return folder / "shards"


def question(number: int) -> dict[str, Any]:
    """A row of the jsonl source."""
    return {
        "id": f"q{number}", "question": f"What is number {number}?", "choices": ["a fig", "a pear", "a plum"],
        "answer": number % 3, "rationale": "It is green. It has a stem. Only one of them has both.",
    }  # fmt: skip


def photograph(random: np.random.Generator) -> bytes:
    """A JPEG with detail at several scales."""
    picture = np.zeros((*PHOTO[::-1], 3))
    for cells, height in ((6, 90), (24, 50), (96, 30)):
        noise = random.integers(0, 2 * height, (cells, cells, 3), dtype=np.uint8)
        picture += np.asarray(Image.fromarray(noise).resize(PHOTO, Image.Resampling.BICUBIC))
    out = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=92)
    return out.getvalue()


def decoded(example: Example) -> tuple[str, np.ndarray]:
    """What both readers make of a sample."""
    assert example.image is not None
    return example.question, np.asarray(open_image(example.image).resize(SHRUNK))


class Shuffled(Dataset):
    """Batches of an epoch in this project's order."""

    def __init__(self, index: ShardIndex) -> None:
        self.index, self.order = index, EpochOrder(index.shard_sizes, seed=0, stage=0, epoch=0)

    def __getitem__(self, batch: int) -> list[Any]:
        return [decoded(self.index.read(int(i))) for i in self.order.take(batch * BATCH, BATCH)]

    def __len__(self) -> int:
        return len(self.index) // BATCH


def ours(folder: Path, workers: int) -> Iterable[list[Any]]:
    batches = Shuffled(open_split(folder, "train"))
    return DataLoader(batches, batch_size=None, sampler=range(len(batches)), num_workers=workers, prefetch_factor=4)


def webdataset(folder: Path, workers: int) -> Iterable[list[Any]]:
    def decode(sample: dict[str, Any]) -> tuple[str, np.ndarray]:
        return decoded(Example.from_record(json_module.loads(sample["json"]), sample["jpg"]))

    tars = [str(path) for path in sorted(folder.glob("train-*.tar"))]
    batches = wds.WebDataset(tars, shardshuffle=False).map(decode).batched(BATCH, collation_fn=list)
    return DataLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=4)


def samples_per_second(batches: Iterable[list[Any]]) -> float:
    """From the first batch on, which waits for the workers to start."""
    running: Iterator[list[Any]] = iter(batches)
    next(running)
    start = time.perf_counter()
    count = sum(len(batch) for batch in running)
    return count / (time.perf_counter() - start)


def throughput(folder: Path, workers: str, pairs: int) -> dict[str, Any]:
    """Medians of both readers, and intervals of their ratio."""
    found: dict[str, Any] = {"samples_per_second": {}, "ratio_interval": {}}
    readers = {"ours": ours, "webdataset": webdataset}
    print(f"{'workers':<9}{'ours/s':>9}{'webdataset/s':>14}{'ratio':>8}  95% interval of {pairs} pairs")
    for count in map(int, workers.split(",")):
        rates: dict[str, list[float]] = {name: [] for name in readers}
        for pair in range(pairs):
            for name in list(readers)[:: 1 if pair % 2 else -1]:
                rates[name].append(samples_per_second(readers[name](folder, count)))
        ratio, low, high = ratio_interval(rates["ours"], rates["webdataset"])
        for name, values in rates.items():
            found["samples_per_second"][f"{name}_w{count}"] = statistics.median(values)
        found["ratio_interval"][f"w{count}"] = [low, high]
        shown = [found["samples_per_second"][f"{name}_w{count}"] for name in readers]
        print(f"{count:<9}{shown[0]:>9.0f}{shown[1]:>14.0f}{ratio:>8.3f}  {low:.3f} to {high:.3f}", flush=True)
    return found


def ratio_interval(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Geometric mean of the pairs' ratios, and its 95% interval."""
    logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    middle = statistics.mean(logs)
    half = STUDENT[len(logs)] * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


# ---- the first batch ------------------------------------------------------------------------------------------------
def make_large(folder: Path, samples: int) -> Path:
    """A folder of `samples` samples in shards of 1,000: one real shard under many names, and a full index."""
    small, large = folder / "small", folder / "large"
    small.mkdir()
    Image.new("RGB", (56, 56), "green").save(small / "green.png")
    lines = (json_module.dumps(question(i) | {"image": "green.png"}) + "\n" for i in range(1000))
    (small / "train.jsonl").write_text("".join(lines))
    build("jsonl", large, input=str(small), samples_per_shard=1000)
    manifest = read_manifest(large)
    part = manifest["splits"]["train"]
    (one,) = part["shards"]
    records = np.load(large / "train.index.npy")
    shards = samples // 1000
    whole = np.lib.format.open_memmap(large / "train.index.npy", mode="w+", dtype=records.dtype, shape=(shards * 1000,))
    part["shards"] = []
    for shard in range(shards):
        name = f"train-{shard:06d}.tar"
        if shard:
            os.link(large / one["name"], large / name)
        records["shard"] = shard
        whole[shard * 1000 : (shard + 1) * 1000] = records
        digest = hashlib.sha256(records.tobytes()).hexdigest()
        part["shards"].append(one | {"name": name, "index_sha256": digest})
    whole.flush()
    part["index"]["sha256"], part["samples"] = sha256(large / "train.index.npy"), shards * 1000
    write_manifest(large, manifest)
    return large


def first_batches(large: Path, words: Path) -> dict[str, Any]:
    """Seconds to the first batch at each place, and bytes a sample."""
    train_tokenizer(itertools.islice(texts_of_folder(large), 500), words, 400)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56}).save_pretrained(words)
    seconds, memory, samples = {}, [], len(open_split(large, "train"))
    for place in PLACES:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            seconds[str(place)], grown = fresh.submit(first_batch, large, words, place).result()
            memory.append(grown)
    mapped = (large / "train.index.npy").stat().st_size
    each = (mapped + max(memory)) / samples
    print(f"first batch of {samples:,} samples at " + ", ".join(f"{p}%: {s:.2f} s" for p, s in seconds.items()))
    print(f"{each:.1f} bytes a sample: {mapped / samples:.1f} mapped from the index's file, the rest a process's own")
    return {"resume_seconds": seconds, "index_bytes_per_sample": each}


def first_batch(large: Path, words: Path, place: int) -> tuple[float, int]:
    """Seconds, and bytes that this process has more than before; `place` in percent of an epoch."""
    multiprocessing.set_start_method("fork", force=True)  # as training has it; spawned processes spawn theirs
    builder = RowBuilder(Qwen2VLProcessor(words), PromptConfig(), 2)
    curriculum = CurriculumConfig(stages=[StageConfig(latents=1, skip=1, epochs=1)])
    before, start = own_memory(), time.perf_counter()
    index = open_split(large, "train")
    check_patches(index, builder.processor, 2)
    steps = StageSteps(index, builder, curriculum, 0, Share(0, 1, BATCH, BATCH), 0, "drop")
    batches = steps_from(steps, len(steps) * place // 100, workers=1)
    next(batches)
    return time.perf_counter() - start, own_memory() - before


def own_memory() -> int:
    """Bytes of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise UserError("this benchmark needs Linux: /proc/self/status has no RssAnon")


if __name__ == "__main__":
    cli.run(main)
