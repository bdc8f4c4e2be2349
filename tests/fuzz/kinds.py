"""One function for each kind of case: it writes an input, or damages a finished shard folder."""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.index import write_manifest
from data_prep.sources.jsonl import MAX_LINE
from tests.data_prep.conftest import m3cot_row, scienceqa_problem, write_parquet
from tests.fuzz import pictures
from tests.fuzz.mutate import ODD_VALUES, mutated, odd_json

PICTURE = pictures.encoded(size=(56, 84))


@dataclass
class Case:
    """An input, or a finished folder, and what is known of it."""

    source: str = ""
    """Empty where `path` is a shard folder to be read."""
    path: Path = Path()
    rows: int | None = None
    """How many there are, where the damage leaves no doubt."""
    sound: set[str] = field(default_factory=set)
    """Ids that must come out."""
    bad: set[str] = field(default_factory=set)
    """Ids that must not."""


def question(id: str, **changes: Any) -> dict[str, Any]:
    """A line of the jsonl source."""
    return {
        "id": id, "question": "Which fruit is it?", "choices": ["a fig", "a pear"], "answer": "B",
        "rationale": "It is green. It has a stem.", "topic": "food", "split": "train",
    } | changes  # fmt: skip


# ---- JSON lines ------------------------------------------------------------------------------------------------
def odd_line(random: random.Random, folder: Path) -> Case:
    """One line of three with an odd value."""
    (folder / "a.png").write_bytes(PICTURE)
    lines = [json.dumps(question(id, image="a.png")).encode() for id in ("first", "last")]
    odd = odd_json(random, question("odd", image="a.png")).encode("utf-8", "surrogatepass").replace(b"\n", b" ")
    if random.random() < 0.02:
        odd += b" " * MAX_LINE
    end = random.choice([b"\n", b"\r\n", b"\n\n \n"])
    begin = random.choice([b"", b"\xef\xbb\xbf"])
    (folder / "own.jsonl").write_bytes(begin + end.join([lines[0], odd, lines[1]]) + random.choice([b"", end]))
    return Case("jsonl", folder / "own.jsonl", 3, {"first", "last"})


def odd_lines(random: random.Random, folder: Path) -> Case:
    """A file of lines with damaged bytes."""
    (folder / "a.png").write_bytes(PICTURE)
    lines = [json.dumps(question(f"q{i}", image=random.choice(["a.png", None]))) for i in range(4)]
    (folder / "train.jsonl").write_bytes(mutated(random, "\n".join(lines).encode()))
    return Case("jsonl", folder)


# ---- ScienceQA's problems --------------------------------------------------------------------------------------
def odd_problem(random: random.Random, folder: Path) -> Case:
    """One problem of three with an odd value, or another shape of the whole."""
    problems = {id: json.dumps(scienceqa_problem(image="image.png")) for id in ("first", "odd", "last")}
    for id in problems:
        place = folder / "images" / "train" / id
        place.mkdir(parents=True)
        (place / "image.png").write_bytes(PICTURE)
    problems["odd"] = odd_json(random, scienceqa_problem(image="image.png"))
    if random.random() < 0.1:
        problems["odd"] = json.dumps(random.choice(ODD_VALUES))
    text = "{" + ", ".join(f'"{id}": {problem}' for id, problem in problems.items()) + "}"
    sound = {"first", "last"} if is_json(text) else set()
    if random.random() < 0.3:
        splits = {"train": [*problems, *random.sample(ODD_VALUES, 2)], "dev": ["first"]}
        if random.random() < 0.5:
            splits[random.choice(["train", "val"])] = random.choice(ODD_VALUES)
        (folder / "pid_splits.json").write_text(json.dumps(splits))
        sound = set()
    (folder / "problems.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    return Case("scienceqa", folder, None if not sound else 3, sound)


def is_json(text: str) -> bool:
    """Whether the whole is one object of three problems of the split train: if not, it may be refused."""
    try:
        found = json.loads(text.encode("utf-8", "surrogatepass"))
        odd = found["odd"]
        twice = '"a": 1, "a": 2' in text or text.count('"id"') > 1
        return len(found) == 3 and not twice and (not isinstance(odd, dict) or odd.get("split", "train") == "train")
    except (ValueError, RecursionError):
        return False


def odd_problems(random: random.Random, folder: Path) -> Case:
    """Damaged bytes in the problems or in the list of splits."""
    problems = {str(i): scienceqa_problem(split=random.choice(["train", "val"])) for i in range(3)}
    splits = {"train": ["0", "1"], "val": ["2"]}
    for name, content in (("problems.json", problems), ("pid_splits.json", splits)):
        text = json.dumps(content).encode()
        (folder / name).write_bytes(mutated(random, text) if random.random() < 0.6 else text)
    return Case("scienceqa", folder)


# ---- parquet ---------------------------------------------------------------------------------------------------
def table_row(name: str, id: str, **changes: Any) -> dict[str, Any]:
    made = m3cot_row(0, id=id) if name == "m3cot" else scienceqa_problem(hint=id)
    return made | {"image": {"bytes": PICTURE, "path": None}} | changes


def odd_cell(random: random.Random, folder: Path) -> Case:
    """A column of another type, or one odd cell among sound ones."""
    import pyarrow
    import pyarrow.parquet

    name = random.choice(["m3cot", "scienceqa"])
    rows = [table_row(name, id) for id in ("first", "odd", "last")]
    column = random.choice(list(rows[0]))
    value = random.choice([value for value in ODD_VALUES if value != {}])  # parquet has no objects without keys
    for row in rows if random.random() < 0.5 else rows[1:2]:
        row[column] = value
    columns: dict[str, Any] = {}
    for key in rows[0]:
        cells = [row[key] for row in rows]
        try:
            columns[key] = pyarrow.array(cells)
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
            as_text = [None if cell is None else str(cell).encode("utf-8", "surrogatepass") for cell in cells]
            columns[key] = pyarrow.array(as_text)
            if random.random() < 0.5:  # text that is no UTF-8
                broken = pyarrow.array([b"\xff\xfe", *as_text[1:]], pyarrow.binary())
                columns[key] = pyarrow.Array.from_buffers(pyarrow.string(), 3, broken.buffers())
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "train.parquet")
    return Case(name, folder)


_TABLES: dict[str, bytes] = {}


def odd_parquet(random: random.Random, folder: Path) -> Case:
    """A parquet file with damaged bytes."""
    name = random.choice(["m3cot", "scienceqa"])
    path = folder / "train.parquet"
    if name not in _TABLES:
        write_parquet(path, [table_row(name, f"q{i}") for i in range(3)])
        _TABLES[name] = path.read_bytes()
    path.write_bytes(mutated(random, _TABLES[name]))
    return Case(name, folder)


# ---- tars ------------------------------------------------------------------------------------------------------
def tar_of(samples: list[list[tuple[tarfile.TarInfo, bytes]]], format: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for info, content in (member for sample in samples for member in sample):
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def member(name: str, content: bytes, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def sample(id: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [member(f"{id}.json", json.dumps(question(id)).encode()), member(f"{id}.png", PICTURE)]


_ODD_TYPES = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE, b"V", b"Z"]
_ODD_NAMES = [
    "../odd.json", "/odd.png", "a/../../odd.json", "odd.pkl", "odd.pyd", "odd.tar", "odd", ".json", "odd.json.gz",
    "..", ".", "odd.txt", "a/b/odd.cls", "odd" * 80 + ".xyz", "\udcff.bin", "odd.__key__",
]  # fmt: skip


def odd_member(random: random.Random, folder: Path) -> Case:
    """A sample whose members are of another name, type, number or content, between two sound ones."""
    wrong = random.randrange(5)
    odd = sample("odd")
    sound, bad = {"first", "last"}, {"odd"} if wrong < 4 else set()
    if wrong == 0:
        place, name = random.randrange(2), random.choice(_ODD_NAMES)
        odd[place] = member(name, b"x")
        if place == 1 and name.partition(".")[0] != "odd":  # a sample of its own behind one without a picture
            sound, bad = sound | bad, set()
    elif wrong == 1:
        info, content = odd[random.randrange(2)]
        info.type, info.linkname = random.choice(_ODD_TYPES), "first.png"
        info.size = len(content) if info.type in _ODD_TYPES[4:] else 0
    elif wrong == 2:
        odd.insert(random.randrange(3), random.choice(sample("odd")))
    elif wrong == 3:
        odd = [odd[1]] if random.random() < 0.5 else [odd[0], member("odd.png", random.choice([b"", PICTURE[:60]]))]
    else:
        odd[0] = member("odd.json", odd_json(random, question("odd")).encode("utf-8", "surrogatepass"))
    samples = [sample("first"), odd, sample("last")]
    format = random.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    if format == tarfile.USTAR_FORMAT and any(len(info.name) > 90 or "\udcff" in info.name for info, _ in odd):
        format = tarfile.GNU_FORMAT
    (folder / "train-000000.tar").write_bytes(tar_of(samples, format))
    return Case("webdataset", folder, None, sound, bad)


def odd_tar(random: random.Random, folder: Path) -> Case:
    """A tar with damaged bytes, half of them in a header that is then given a fitting checksum."""
    content = bytearray(tar_of([sample(f"q{i}") for i in range(4)], tarfile.PAX_FORMAT))
    if random.random() < 0.5:
        at = random.choice([i for i in range(0, len(content), 512) if content[i + 257 : i + 262] == b"ustar"])
        header = bytearray(mutated(random, bytes(content[at : at + 512])).ljust(512, b"\0")[:512])
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        content[at : at + 512] = header
    else:
        content = bytearray(mutated(random, bytes(content)))
    (folder / "train.tar").write_bytes(content)
    return Case("webdataset", folder / "train.tar")


# ---- pictures --------------------------------------------------------------------------------------------------
def with_picture(random: random.Random, folder: Path, picture: bytes, good: bool | None) -> Case:
    """Between two sound questions one with this picture, to be taken or not (None: it may be), in lines or a tar."""
    sound, bad = {"first", "last"} | ({"odd"} if good else set()), {"odd"} if good is False else set()
    if random.random() < 0.5:
        odd = [member("odd.json", json.dumps(question("odd")).encode()), member("odd.jpg", picture)]
        (folder / "train.tar").write_bytes(tar_of([sample("first"), odd, sample("last")], tarfile.USTAR_FORMAT))
        return Case("webdataset", folder, 3, sound, bad)
    (folder / "a.png").write_bytes(PICTURE)
    (folder / "odd.png").write_bytes(picture)
    lines = [question("first", image="a.png"), question("odd", image="odd.png"), question("last", image="a.png")]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Case("jsonl", folder, 3, sound, bad)


def odd_picture(random: random.Random, folder: Path) -> Case:
    """A rare, harmful or half picture."""
    return with_picture(random, folder, *pictures.odd(random))


def damaged_picture(random: random.Random, folder: Path) -> Case:
    """Damaged bytes in a picture of any format."""
    name = random.choice([name for name in pictures.GOOD if "unknown" not in name])
    return with_picture(random, folder, mutated(random, pictures.made(name)), None)


# ---- finished folders ------------------------------------------------------------------------------------------
def copied(folder: Path, template: Path) -> Path:
    """A copy of the finished folder, to be damaged."""
    return Path(shutil.copytree(template, folder / "copy"))


def damaged_index(random: random.Random, folder: Path, template: Path) -> Case:
    """Damaged bytes in the index."""
    copy = copied(folder, template)
    path = copy / "train.index.npy"
    path.write_bytes(mutated(random, path.read_bytes()))
    return Case(path=copy)


def damaged_shard(random: random.Random, folder: Path, template: Path) -> Case:
    """Damaged bytes in a tar, mostly without changing its size."""
    copy = copied(folder, template)
    path = random.choice(sorted(copy.glob("train-*.tar")))
    content = path.read_bytes()
    changed = mutated(random, content)
    path.write_bytes(changed[: len(content)].ljust(len(content), b"\0") if random.random() < 0.9 else changed)
    return Case(path=copy)


def damaged_manifest(random: random.Random, folder: Path, template: Path) -> Case:
    """Damaged bytes in the manifest, or an odd value under a hash that fits."""
    copy = copied(folder, template)
    path = copy / "manifest.json"
    if random.random() < 0.4:
        path.write_bytes(mutated(random, path.read_bytes()))
        return Case(path=copy)
    inner = manifest = json.loads(path.read_text())
    *way, last = random.choice(_places(manifest))
    for key in way:
        inner = inner[key]
    inner[last] = random.choice(ODD_VALUES)
    write_manifest(copy, manifest)
    return Case(path=copy)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of keys to everything inside."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, child in inner for place in [(*path, key), *_places(child, (*path, key))]]


INPUTS: dict[str, Callable[[random.Random, Path], Case]] = {
    "jsonl: a value": odd_line, "jsonl: bytes": odd_lines,
    "problems: a value": odd_problem, "problems: bytes": odd_problems,
    "parquet: a value": odd_cell, "parquet: bytes": odd_parquet,
    "tar: a member": odd_member, "tar: bytes": odd_tar,
    "picture: odd": odd_picture, "picture: bytes": damaged_picture,
}  # fmt: skip
FOLDERS: dict[str, Callable[[random.Random, Path, Path], Case]] = {
    "folder: index": damaged_index, "folder: tar": damaged_shard, "folder: manifest": damaged_manifest,
}  # fmt: skip
