"""M3CoT and ScienceQA from raw files in their own formats to evaluated predictions, by the public commands."""

from __future__ import annotations

import json

import pytest
from PIL import Image, ImageDraw

from tests import launch
from tests.data_prep.conftest import m3cot_row, picture, scienceqa_problem, write_parquet
from tests.test_commands import command

COLOURS = ("red", "green", "blue", "black")
STAGES = "[{latents: 0, skip: 0, steps: 2}, {latents: 2, skip: 2, steps: 2}]"


def m3cot_files(folder):
    """Parquet files with text-only, JPEG and large pictures among the rows."""

    def rows(split, count):
        for i in range(count):
            colour = COLOURS[i % 4]
            image = {"bytes": picture(colour, (60 + 7 * i, 50)), "path": f"{i}.png"}
            image = None if i % 5 == 4 else image
            yield m3cot_row(
                i, id=f"{split}-{i}", question="Which colour is it?", choices=list(COLOURS), answer="ABCD"[i % 4],
                rationale=f"It is a picture. It has one colour.\nThat is {colour}. Nothing else is there.",
                context="Look well." if i % 2 else "", split=split, image=image,
                domain=("science", "commonsense")[i % 2],
            )  # fmt: skip

    for split, count in (("train", 12), ("validation", 4), ("test", 10)):
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", list(rows(split, count)))
    return folder


def scienceqa_files(folder):
    """problems.json, pid_splits.json and images/SPLIT/ID/image.png."""
    problems, splits = {}, {"train": [], "val": [], "test": []}
    for i in range(24):
        split = ("train", "val", "test")[0 if i < 12 else 1 if i < 16 else 2]
        has_image = i % 3 != 2
        problems[str(i)] = scienceqa_problem(
            question="How many lines?", choices=["none", "one"], answer=i % 2, split=split,
            grade=f"grade{1 + i % 2}", subject=("natural science", "language science")[i % 2],
            image="image.png" if has_image else None, solution=f"I count. I see {i % 2}.",
        )  # fmt: skip
        splits[split].append(str(i))
        if has_image:
            place = folder / "images" / split / str(i)
            place.mkdir(parents=True)
            image = Image.new("RGB", (64, 48), "white")
            if i % 2:
                ImageDraw.Draw(image).line((5, 5, 60, 40), fill="black", width=3)
            image.save(place / "image.png")
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    return folder


@pytest.mark.parametrize("source", ["m3cot", "scienceqa"])
def test_from_raw_files_to_predictions(tmp_path, source):
    raw = tmp_path / "raw"
    raw.mkdir()
    if source == "m3cot":
        m3cot_files(raw)
    else:
        scienceqa_files(raw)
    shards = tmp_path / "shards"
    code, out, err = command("data_prep.shard", "--source", source, "--input", raw, "--out", shards)
    assert code == 0, err
    answer = "letter" if source == "m3cot" else "index"
    launch.train(
        tmp_path / "run", shards, "--data.source", "none", "--prompt.image_size", "84", "--prompt.answer", answer,
        "--curriculum.stages", STAGES, "--train.global_batch", "4", "--optim.warmup_steps", "0", ranks=2,
    )  # fmt: skip
    code, out, err = command(
        "pipeline.evaluate", "--run", tmp_path / "run", "--timed", "1", "--max_new_tokens", "12", "--batch", "4"
    )
    assert code == 0, err
    lines = (tmp_path / "run" / "evaluation" / "test" / "latent" / "predictions.jsonl").read_text().splitlines()
    predictions = [json.loads(line) for line in lines]
    assert len(predictions) == (10 if source == "m3cot" else 8)
    assert all(p["answer"] in "ABCD" and len(p["messages"]) == 2 for p in predictions)
    if source == "m3cot":
        assert {p["domain"] for p in predictions} == {"science", "commonsense"}
        assert "latent by domain" in out
    else:
        assert "latent by subject" in out and "latent by grade" in out
