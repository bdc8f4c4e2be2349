"""Small data sets in the sources' own formats, made by code."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_prep.example import Example
from data_prep.shard import build

datasets = pytest.importorskip("datasets")


TRAILS = {"train": 25, "val": 5, "test": 4}


def picture(colour: str = "red", size: tuple[int, int] = (40, 30), format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, format, **options)
    return out.getvalue()


def make_example(**changes: Any) -> Example:
    values: dict[str, Any] = {
        "id": "q1", "dataset": "own", "split": "train", "question": "Which fruit is it?",
        "choices": ("a fig", "a pear"), "answer": 1, "rationale": "It is green. It has a stem.",
        "image": picture(), "fields": {"topic": "food"},
    }  # fmt: skip
    return Example(**values | changes)


@pytest.fixture(scope="session", autouse=True)
def own_datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the datasets library out of the user's cache."""
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


def m3cot_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "id": f"topic-{number}", "category": "Trees", "image_id": str(number),
        "question": f"How old is tree {number}?", "choices": ["one year", "ten years", "a century"],
        "context": "", "answer": "B", "rationale": "It is tall.\nIts bark is rough. So it is ten years old.",
        "split": "train", "image": {"bytes": picture("green"), "path": f"{number}.png"},
        "domain": "science", "topic": "biology",
    }  # fmt: skip
    return row | changes


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))
    table.to_parquet(path)


@pytest.fixture
def m3cot_folder(tmp_path: Path) -> Path:
    """Six training rows, of which one has a damaged picture, one no answer and one no picture."""
    folder = tmp_path / "m3cot"
    damaged = {"bytes": picture("blue")[:60], "path": "damaged.png"}
    train = [m3cot_row(0), m3cot_row(1, image=damaged), m3cot_row(2, answer=None), m3cot_row(3, image=None)]
    train += [m3cot_row(4, image={"bytes": picture(format="JPEG"), "path": "4.png"}), m3cot_row(5)]
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", train)
    write_parquet(folder / "data" / "validation-00000-of-00001.parquet", [m3cot_row(10)])
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", [m3cot_row(20), m3cot_row(21)])
    return folder


def scienceqa_problem(**changes: Any) -> dict[str, Any]:
    problem = {
        "question": "Which is a liquid?", "choices": ["ice", "water"], "answer": 1, "hint": "Think of it.",
        "image": None, "task": "closed choice", "grade": "grade2", "subject": "natural science",
        "topic": "physics", "category": "States", "skill": "Name states", "lecture": "Liquids flow.",
        "solution": "Water flows.", "split": "train",
    }  # fmt: skip
    return problem | changes


@pytest.fixture
def scienceqa_folder(tmp_path: Path) -> Path:
    """The original layout: problem 2 has a picture, problem 3 names one that is missing."""
    folder = tmp_path / "scienceqa"
    problems = {
        "1": scienceqa_problem(),
        "2": scienceqa_problem(image="image.png", lecture=""),
        "3": scienceqa_problem(image="image.png"),
        "4": scienceqa_problem(split="val", solution="", lecture=""),
        "5": scienceqa_problem(split="test"),
    }
    (folder / "images" / "train" / "2").mkdir(parents=True)
    (folder / "images" / "train" / "2" / "image.png").write_bytes(picture())
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": ["1", "2", "3"], "val": ["4"], "test": ["5"]}))
    return folder


@pytest.fixture
def trails(tmp_path: Path) -> Path:
    build("trails", tmp_path / "trails", options=TRAILS, samples_per_shard=10)
    return tmp_path / "trails"
