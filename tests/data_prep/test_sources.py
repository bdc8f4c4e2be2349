from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import UserError
from data_prep.example import InvalidExample
from data_prep.sources import Rejected, Source, open_source
from tests.data_prep.conftest import m3cot_row, picture, scienceqa_problem, write_parquet

datasets = pytest.importorskip("datasets")


def reason(source: Source, split: str, row: int) -> tuple[str, str]:
    with pytest.raises(Rejected) as caught:
        source.example(split, row)
    return caught.value.id, caught.value.reason


def test_m3cot(m3cot_folder: Path) -> None:
    before = sorted(m3cot_folder.rglob("*"))
    source = open_source("m3cot", str(m3cot_folder))
    assert [(split, source.rows(split)) for split in source.splits()] == [
        ("train", 6),
        ("val", 1),
        ("test", 2),
    ]
    example = source.example("train", 4)
    example.validate()
    assert example.image == picture(format="JPEG")  # as found, not encoded again
    assert (example.id, example.split, example.answer) == ("topic-4", "train", 1)
    assert example.choices == ("one year", "ten years", "a century")
    assert example.fields == {"domain": "science", "topic": "biology", "category": "Trees", "image_id": "4"}
    assert source.example("train", 3).image is None
    assert reason(source, "train", 2)[0] == "topic-2"
    assert sorted(m3cot_folder.rglob("*")) == before


def test_m3cot_sees_a_changed_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", [m3cot_row(0)])
    assert open_source("m3cot", str(tmp_path)).rows("test") == 1
    write_parquet(tmp_path / "test.parquet", [m3cot_row(0), m3cot_row(1)])
    assert open_source("m3cot", str(tmp_path)).rows("test") == 2


def test_parquet_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        open_source("m3cot", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no parquet files"):
        open_source("m3cot", str(tmp_path))
    write_parquet(tmp_path / "part-0.parquet", [m3cot_row(0)])
    with pytest.raises(UserError, match=r"cannot tell the split of part-0\.parquet"):
        open_source("m3cot", str(tmp_path))
    (tmp_path / "part-0.parquet").unlink()
    write_parquet(tmp_path / "train.parquet", [{"image": None, "question": "?"}])
    with pytest.raises(UserError, match="the split train has no column answer, category"):
        open_source("m3cot", str(tmp_path))
    datasets.Dataset.from_list([m3cot_row(0, image=5)]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="the column image of the split train holds no pictures"):
        open_source("m3cot", str(tmp_path))
    null_column = datasets.Dataset.from_list([m3cot_row(0, context=None)])
    null_column.to_parquet(tmp_path / "train.parquet")
    write_parquet(tmp_path / "val.parquet", [m3cot_row(1)])
    with pytest.raises(UserError, match=r"cannot be loaded \(TypeError: Couldn't cast array of type string to null\)"):
        open_source("m3cot", str(tmp_path))
    (tmp_path / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match="cannot be loaded"):
        open_source("m3cot", str(tmp_path))


def write_empty_parquet(path: Path) -> None:
    import pyarrow.parquet

    write_parquet(path, [m3cot_row(0)])
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).slice(0, 0), path)


def test_parquet_files_without_rows(tmp_path: Path) -> None:
    write_empty_parquet(tmp_path / "val.parquet")
    assert open_source("m3cot", str(tmp_path)).splits() == []
    write_empty_parquet(tmp_path / "train-0.parquet")
    write_parquet(tmp_path / "train-1.parquet", [m3cot_row(7)])
    source = open_source("m3cot", str(tmp_path))
    assert source.splits() == ["train"]
    assert source.example("train", 0).id == "topic-7"
    assert set(source.input() or ()) == {"train-0.parquet", "train-1.parquet", "val.parquet"}


PARQUET_ROWS = pytest.mark.parametrize(("name", "row"), [("m3cot", m3cot_row(0)), ("scienceqa", scienceqa_problem())])


@PARQUET_ROWS
@pytest.mark.parametrize("plain", [True, False])
def test_parquet_paths_of_pictures(tmp_path: Path, name: str, row: dict[str, Any], plain: bool) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    paths = [str(tmp_path / "a.png"), "a.png", "gone.png", None]
    rows = [row | {"image": path if plain else {"path": path, "bytes": None}} for path in paths]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    source = open_source(name, str(tmp_path))
    assert [source.example("train", i).image for i in (0, 1, 3)] == [picture(), picture(), None]
    assert reason(source, "train", 2)[1] == "image file cannot be read: gone.png, No such file or directory"


@PARQUET_ROWS
def test_parquet_choices_of_text(tmp_path: Path, name: str, row: dict[str, Any]) -> None:
    write_parquet(tmp_path / "train.parquet", [row | {"choices": "figs"}])
    assert reason(open_source(name, str(tmp_path)), "train", 0)[1] == "choices is no list"


def test_parquet_cells_that_cannot_be_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    write_parquet(tmp_path / "train.parquet", [m3cot_row(0), m3cot_row(1)])
    table = pyarrow.parquet.read_table(tmp_path / "train.parquet")
    broken = pyarrow.array([b"\xff", b"Why?"], pyarrow.binary())
    column = pyarrow.Array.from_buffers(table.schema.field("question").type, 2, broken.buffers())
    table = table.set_column(table.column_names.index("question"), "question", column)
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    source = open_source("m3cot", str(tmp_path))
    id, told = reason(source, "train", 0)
    assert id == "train-0" and told.startswith("row cannot be read")
    assert source.example("train", 1).question == "Why?"


def test_parquet_files_do_not_choose_a_decoder(tmp_path: Path) -> None:
    """The datasets library decodes what a file declares to be a picture, with any of Pillow's decoders."""
    cells = {"bytes": picture(format="EPS"), "path": None}
    rows = [m3cot_row(0, question=cells, extra=cells)]
    table = datasets.Dataset.from_list(rows)
    for column in ("image", "question", "extra"):
        table = table.cast_column(column, datasets.Image(decode=True))
    table.to_parquet(tmp_path / "train.parquet")
    example = open_source("m3cot", str(tmp_path)).example("train", 0)
    assert example.question == cells and example.image == picture("green")
    with pytest.raises(InvalidExample, match="question not text: dict"):
        example.validate()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"topic": ["a"]}, "a field neither text nor number: 'topic', list"),
        ({"id": ["a"]}, "id neither text nor number: list"),
        ({"answer": 1.0}, None),
        ({"choices": ["a", None]}, None),
    ],
)
def test_m3cot_cells_of_wrong_types(tmp_path: Path, changes: dict[str, Any], told: str | None) -> None:
    write_parquet(tmp_path / "train.parquet", [m3cot_row(0, **changes)])
    source = open_source("m3cot", str(tmp_path))
    if told:
        assert reason(source, "train", 0)[1] == told
    else:
        with pytest.raises(InvalidExample):
            source.example("train", 0).validate()


def test_a_number_that_is_none_is_a_missing_field(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [m3cot_row(0, image_id=float("nan")), m3cot_row(1, image_id=2.0)])
    source = open_source("m3cot", str(tmp_path))
    assert [source.example("train", row).fields["image_id"] for row in (0, 1)] == ["", "2.0"]


def test_scienceqa_original_layout(scienceqa_folder: Path) -> None:
    source = open_source("scienceqa", str(scienceqa_folder))
    assert source.splits() == ["train", "val", "test"]
    text_only, with_picture = source.example("train", 0), source.example("train", 1)
    assert text_only.image is None
    assert text_only.rationale == "Liquids flow. Water flows."
    assert text_only.context == "Think of it."
    assert text_only.answer == 1
    assert text_only.fields["subject"] == "natural science"
    assert with_picture.image == picture()
    assert with_picture.rationale == "Water flows."
    assert source.example("val", 0).rationale == ""
    assert reason(source, "train", 2) == (
        "3",
        "image file cannot be read: image.png, No such file or directory",
    )


def test_scienceqa_problems_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    problems = {
        "7": scienceqa_problem(split="test"),
        "8": scienceqa_problem(),
        "9": scienceqa_problem(answer=None),
    }
    path.write_text(json.dumps(problems))
    source = open_source("scienceqa", str(path))
    assert source.splits() == ["train", "test"]
    assert source.example("test", 0).id == "7"
    assert reason(source, "train", 1)[0] == "9"
    path.write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        open_source("scienceqa", str(path))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"choices": 5}, "choices is no list"),
        ({"choices": "ab"}, "choices is no list"),
        ({"image": 5}, "image not a file name"),
        ({"image": "\0.png"}, "image file cannot be read"),
        ({"lecture": ["Liquids", "flow"]}, "lecture not text: list"),
        ({"solution": float("nan")}, "solution not text: float"),
        ({"topic": {"a": 1}}, "a field neither text nor number: 'topic', dict"),
    ],
)
def test_scienceqa_bad_problems(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps({"7": scienceqa_problem(**change)}))
    id, found = reason(open_source("scienceqa", str(path)), "train", 0)
    assert id == "7"
    assert found.startswith(told)


def test_scienceqa_problems_that_are_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps({"7": ["x"], "8": scienceqa_problem(split="test")}))
    source = open_source("scienceqa", str(path))
    assert reason(source, "train", 0) == ("7", "problem not a JSON object: list")
    assert source.example("test", 0).id == "8"
    path.write_text('{"7": {}, "7": {}}')
    with pytest.raises(UserError, match="the key '7' is there twice"):
        open_source("scienceqa", str(path))


@pytest.mark.parametrize("id", ["../../../x", "..", ".", "", "a/b", "a\\b"])
def test_scienceqa_ids_that_lead_out_of_the_images(tmp_path: Path, id: str) -> None:
    (tmp_path / "in" / "images" / "train").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "in" / "images", tmp_path / "in" / "images" / "train"):
        (folder / "x").mkdir()
        (folder / "image.png").write_bytes(picture())
        (folder / "x" / "image.png").write_bytes(picture())
    path = tmp_path / "in" / "problems.json"
    path.write_text(json.dumps({id: scienceqa_problem(image="image.png")}))
    found = reason(open_source("scienceqa", str(path)), "train", 0)
    assert found == (id, f"id not the name of a folder: {id!r}")


@pytest.mark.parametrize("listed", [["1"], {"train": "12"}, {"train": 5}])
def test_scienceqa_bad_split_files(scienceqa_folder: Path, listed: Any) -> None:
    (scienceqa_folder / "pid_splits.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match=r"pid_splits\.json: expected one JSON object of lists of ids"):
        open_source("scienceqa", str(scienceqa_folder))


@pytest.mark.parametrize("split", ["dev", ["train"], {}, None])
def test_scienceqa_problems_of_no_split(tmp_path: Path, split: Any) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps({"7": scienceqa_problem(split=split)}))
    with pytest.raises(UserError, match="problems of the split"):
        open_source("scienceqa", str(path))


def test_scienceqa_parquet_equals_original(tmp_path: Path) -> None:
    problem = scienceqa_problem(split="validation")
    write_parquet(tmp_path / "validation.parquet", [problem | {"image": {"bytes": picture(), "path": None}}])
    example = open_source("scienceqa", str(tmp_path)).example("val", 0)
    assert example.id == "val-0"
    assert example.rationale == "Liquids flow. Water flows."
    assert example.image == picture()
    assert example.fields["skill"] == "Name states"


def jsonl_line(**changes: Any) -> str:
    content = {
        "id": "a",
        "question": "Up?",
        "choices": ["yes", "no"],
        "answer": "B",
        "rationale": "It falls.",
    }
    return json.dumps(content | changes) + "\n"


def test_jsonl_file(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(picture())
    path = tmp_path / "own.jsonl"
    path.write_text(
        jsonl_line(image="pictures/a.png", level=3, tag=None)
        + "\n"
        + jsonl_line(id=2, split="test", answer=0, context="Gravity.")
        + jsonl_line(id="late", image=str(tmp_path / "pictures" / "a.png"))
    )
    source = open_source("jsonl", str(path))
    assert [(split, source.rows(split)) for split in source.splits()] == [("train", 2), ("test", 1)]
    first, late, test = source.example("train", 0), source.example("train", 1), source.example("test", 0)
    assert (first.answer, first.fields, first.image) == (1, {"level": "3"}, picture())
    assert (late.id, late.image) == ("late", picture())
    assert (test.id, test.answer, test.context) == ("2", 0, "Gravity.")


@pytest.mark.parametrize(
    ("line", "id", "told"),
    [
        (b"{bad\n", "own.jsonl:2", "not valid JSON"),
        (b'{"id": "\xff"}\n', "own.jsonl:2", "not valid JSON"),
        (b'{"id": NaN}\n', "own.jsonl:2", "not valid JSON: NaN is no number"),
        (b'{"id": 1e400}\n', "own.jsonl:2", "not valid JSON: 1e400 is no number"),
        (b'{"id": "y", "id": "z"}\n', "own.jsonl:2", "not valid JSON: the key 'id' is there twice"),
        (b'{"id": ' + b"9" * 5000 + b"}\n", "own.jsonl:2", "not valid JSON"),
        (jsonl_line(id="z", x="x" * 2**22).encode(), "own.jsonl:2", "more than 4194304 bytes of JSON"),
        (jsonl_line(id=["z"]).encode(), "own.jsonl:2", "id neither text nor number: list"),
        (jsonl_line(id=True).encode(), "own.jsonl:2", "id neither text nor number: bool"),
        (b"[" * 100_000 + b"\n", "own.jsonl:2", "not valid JSON"),
        (b"[1]\n", "own.jsonl:2", "not a JSON object"),
        (jsonl_line(id="z", split="dev").encode(), "z", "wrong split: 'dev'"),
        (jsonl_line(id="z", choices="ab").encode(), "z", "choices is no list"),
        (jsonl_line(id="z", answer="yes").encode(), "z", "no answer"),
        (jsonl_line(id="z", image="../x.png").encode(), "z", "image outside the folder"),
        (jsonl_line(id="z", image="/etc/hosts").encode(), "z", "image outside the folder"),
        (jsonl_line(id="z", image="gone.png").encode(), "z", "image file cannot be read"),
        (jsonl_line(id="z", image=["x"]).encode(), "z", "image not a file name"),
        (jsonl_line(id="z", extra={"deep": 1}).encode(), "z", "a field neither text nor number: 'extra', dict"),
    ],
)
def test_jsonl_bad_lines(tmp_path: Path, line: bytes, id: str, told: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_bytes(jsonl_line().encode() + line + jsonl_line(id="b").encode())
    source = open_source("jsonl", str(path))
    assert source.rows("train") == 3
    found = reason(source, "train", 1)
    assert found[0] == id
    assert found[1].startswith(told)
    assert source.example("train", 2).id == "b"


def test_jsonl_lines_of_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is read in parts of the limit's size; CRLF, a BOM and a last line without end are as good."""
    monkeypatch.setattr("data_prep.sources.jsonl.MAX_LINE", 300)
    good = [jsonl_line(id=f"{i}").encode().strip() for i in range(4)]
    just = jsonl_line(id="just", x="x" * (299 - len(jsonl_line(id="just", x="")))).encode().strip()
    assert len(just) == 298
    path = tmp_path / "own.jsonl"
    parts = [b"\xef\xbb\xbf" + good[0], b"{" * 301, just, b"{" * 2000, good[1], b"", b"\xff\xfe", good[2], b"{" * 900]
    path.write_bytes(b"\r\n".join([*parts, good[3]]))
    source = open_source("jsonl", str(path))
    assert source.rows("train") == 9
    assert [source.example("train", row).id for row in (0, 2, 4, 6, 8)] == ["0", "just", "1", "2", "3"]
    for row, told in [(1, "own.jsonl:2"), (3, "own.jsonl:4"), (5, "own.jsonl:7"), (7, "own.jsonl:9")]:
        found = reason(source, "train", row)
        assert found[0] == told
        assert found[1].startswith("not valid JSON" if row == 5 else "more than 300 bytes of JSON")


def test_pictures_that_are_no_files(tmp_path: Path) -> None:
    """A pipe would make the reader wait for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(64 * 2**20 + 1)
    names = ["pipe.png", "folder.png", "large.png", "n" * 5000]
    (tmp_path / "train.jsonl").write_text("".join(jsonl_line(image=name) for name in names))
    source = open_source("jsonl", str(tmp_path))
    found = [reason(source, "train", row)[1] for row in range(4)]
    assert found[:3] == [
        "image file cannot be read: pipe.png, not a regular file",
        "image file cannot be read: folder.png, Is a directory",
        "image too large: 67108865 bytes",
    ]
    assert found[3].endswith("File name too long") and len(found[3]) < 310


def test_jsonl_links(tmp_path: Path) -> None:
    """A link is no way out of the folder; the folder itself may be one."""
    (tmp_path / "secret.png").write_bytes(picture())
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture())
    (folder / "file.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "inside.png").symlink_to("a.png")
    names = ["file.png", "up/secret.png", "inside.png", "nul\0.png", "\ud800.png"]
    (folder / "train.jsonl").write_text("".join(jsonl_line(image=name) for name in names))
    (tmp_path / "link").symlink_to(folder)
    source = open_source("jsonl", str(tmp_path / "link"))
    for row in (0, 1):
        assert reason(source, "train", row)[1] == f"image outside the folder: {names[row]}"
    assert source.example("train", 2).image == picture()
    for row in (3, 4):
        assert reason(source, "train", row)[1].startswith("image file cannot be read")
    (folder / "train.jsonl").unlink()
    with pytest.raises(UserError, match="cannot be read any more"):
        source.example("train", 2)


def test_jsonl_missing_ids(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    no_id = {name: value for name, value in json.loads(jsonl_line()).items() if name != "id"}
    path.write_text(json.dumps(no_id) + "\n" + jsonl_line(id=None) + jsonl_line(id=None, choices=5))
    source = open_source("jsonl", str(path))
    assert source.example("train", 0) == source.example("train", 1)
    with pytest.raises(InvalidExample, match="no id"):
        source.example("train", 1).validate()
    assert reason(source, "train", 2)[0] == "own.jsonl:3"


def test_jsonl_folder(tmp_path: Path) -> None:
    (tmp_path / "val.jsonl").write_text(jsonl_line() + jsonl_line(split="train", id="stray"))
    source = open_source("jsonl", str(tmp_path))
    assert source.splits() == ["val"]
    assert source.example("val", 0).split == "val"
    assert reason(source, "val", 1) == ("stray", "wrong split: 'train'")


def test_source_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean m3cot"):
        open_source("m3co")
    with pytest.raises(UserError, match="jsonl has no option --grid"):
        open_source("jsonl", str(tmp_path), {"grid": "4"})
    with pytest.raises(UserError, match="no such file"):
        open_source("jsonl", str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="reads nothing"):
        open_source("trails", "somewhere")
