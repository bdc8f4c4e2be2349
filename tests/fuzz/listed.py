"""What data sets are known to hold, each in many forms, and what must become of it: taken, or left out and named."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.example import MAX_PIXELS
from data_prep.index import write_manifest
from tests.fuzz import pictures
from tests.fuzz.kinds import PICTURE, Case, copied, member, question, sample, tar_of, with_picture

Random = random.Random


# ---- values ----------------------------------------------------------------------------------------------------
def _wrong_type(random: Random) -> dict[str, Any]:
    name = random.choice(["question", "choices", "answer", "rationale"])
    wrong = {"question": [7, ["x"], {"x": 1}, True], "choices": ["ab", 7, {"a": "b"}, ["x", 7], [["x"], "y"]],
             "answer": [1.5, [1], {"x": 1}, True, "yes"], "rationale": [7, ["x"], {"x": 1}, False]}  # fmt: skip
    return {name: random.choice(wrong[name])}


def _long_question(random: Random) -> dict[str, Any]:
    length = random.randrange(90_000, 110_000)
    text = random.choice(["x", "fig ", "ä", "<|image_pad|>", "1 + "])
    return {"question": (text * length)[:length]}


VALUES: dict[str, tuple[Callable[[Random], dict[str, Any]], bool]] = {
    "wrong types": (_wrong_type, False),
    "NaN answers": (lambda r: {"answer": float(r.choice(["nan", "inf", "-inf"]))}, False),
    "answer outside": (lambda r: {"answer": r.choice([*range(-3, 0), *range(2, 40), *"CDEXYZ", 10**20])}, False),
    "no choices": (lambda r: {"choices": r.choice([[], None])}, False),
    "one choice": (lambda r: {"choices": ["a fig" * r.randrange(1, 9)], "answer": r.choice([0, "A"])}, False),
    "empty rationale": (lambda r: {"rationale": r.choice(["", " ", "\n", None])}, True),
    "500 steps": (lambda r: {"rationale": "It is green. " * r.randrange(450, 550)}, True),
    "100,000 characters": (_long_question, True),
}
"""Name -> changes of a question, and whether it is to be taken"""


def _value(random: Random, folder: Path, changes: Callable[[Random], dict[str, Any]], good: bool) -> Case:
    lines = [question("first"), question("odd", **changes(random)), question("last")]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Case("jsonl", folder, 3, {"first", "last"} | ({"odd"} if good else set()), set() if good else {"odd"})


def _invalid_utf8(random: Random, folder: Path) -> Case:
    lines = [json.dumps(question(id)).encode() for id in ("first", "odd", "last")]
    at = lines[1].index(b"fruit") + random.randrange(5)
    broken = random.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\x80"])
    lines[1] = lines[1][:at] + broken + lines[1][at:]
    (folder / "train.jsonl").write_bytes(b"\n".join(lines))
    return Case("jsonl", folder, 3, {"first", "last"}, {"odd"})


# ---- pictures --------------------------------------------------------------------------------------------------
def _size(random: Random) -> tuple[int, int]:
    return random.randrange(1, 90), random.randrange(1, 90)


def _truncated(random: Random) -> bytes:
    whole = pictures.encoded(size=(60, 60), format=random.choice(pictures.FORMATS))
    return whole[: random.randrange(1, len(whole) // 2)]


def _bomb(random: Random) -> bytes:
    if random.random() < 0.1:
        return pictures.claiming(random.choice(["GIF", "BMP", "WEBP", "PNG"]))
    width = random.randrange(500, 2**24)
    return pictures.sized(width, MAX_PIXELS // width + random.randrange(1, 2**20))


def _rotated(random: Random) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = random.randrange(1, 9)
    return pictures.encoded(size=_size(random), format=random.choice(["JPEG", "PNG", "WEBP"]), exif=exif)


def _animated(random: Random) -> bytes:
    return pictures.frames(random.choice(["GIF", "PNG", "WEBP"]), random.randrange(1, 20))


def _thin(random: Random) -> bytes:
    size = random.randrange(201, 4000), 1
    return pictures.encoded(size=size[:: random.choice([1, -1])], format=random.choice(["JPEG", "PNG", "BMP"]))


PICTURES: dict[str, tuple[Callable[[Random], bytes], bool]] = {
    "zero-byte image": (lambda r: b"", False),
    "truncated image": (_truncated, False),
    "decompression bomb": (_bomb, False),
    "16-bit": (lambda r: pictures.encoded("I;16", _size(r)), True),
    "CMYK": (lambda r: pictures.encoded("CMYK", _size(r), "JPEG"), True),
    "palette": (lambda r: pictures.encoded("P", _size(r), r.choice(["PNG", "GIF", "BMP"])), True),
    "animated": (_animated, True),
    "EXIF-rotated": (_rotated, True),
    "1 x 1": (lambda r: pictures.encoded(r.choice(["L", "RGB"]), (1, 1), r.choice(pictures.FORMATS)), True),
    "absurd aspect ratio": (_thin, False),
}
"""Name -> bytes of a picture, and whether it is to be taken"""


def _picture(random: Random, folder: Path, make: Callable[[Random], bytes], good: bool) -> Case:
    return with_picture(random, folder, make(random), good)


# ---- tars ------------------------------------------------------------------------------------------------------
def _truncated_tar(random: Random, folder: Path) -> Case:
    whole = tar_of([sample(f"q{i}") for i in range(4)], tarfile.GNU_FORMAT)
    first = len(tar_of([sample("q0")], tarfile.GNU_FORMAT).rstrip(b"\0")) + 511
    last = len(whole.rstrip(b"\0"))
    (folder / "train.tar").write_bytes(whole[: random.randrange(first + 512, last)])
    return Case("webdataset", folder, None, {"q0"}, {"q3"})


def _garbage_tar(random: Random, folder: Path) -> Case:
    garbage = random.randbytes(random.randrange(1, 5000))
    begin = random.choice([b"", b"\0" * 512, tar_of([sample("odd")], tarfile.USTAR_FORMAT)[:300]])
    (folder / "train.tar").write_bytes(begin + garbage)
    return Case("webdataset", folder, None, set(), {"odd"})


def _in_tar(random: Random, folder: Path, odd: list[tuple[tarfile.TarInfo, bytes]]) -> Case:
    format = random.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    (folder / "train.tar").write_bytes(tar_of([sample("first"), odd, sample("last")], format))
    return Case("webdataset", folder, None, {"first", "last"}, {"odd"})


def _missing_member(random: Random, folder: Path) -> Case:
    others = [member("odd.txt", b"x"), member("odd.cls", b"1"), member("odd.jpg", PICTURE)]
    return _in_tar(random, folder, [sample("odd")[1], *others[: random.randrange(3)]])


def _named(random: Random, folder: Path, folders: list[str]) -> Case:
    begin = random.choice(folders)
    odd = [member(f"{begin}odd.{end}", content) for end, content in (("json", _json("odd")), ("png", PICTURE))]
    return _in_tar(random, folder, odd)


def _json(id: str) -> bytes:
    return json.dumps(question(id)).encode()


def _link(random: Random, folder: Path) -> Case:
    odd = sample("odd")
    place = random.randrange(2)
    info, _ = odd[place]
    info.type, info.size = random.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]), 0
    info.linkname = random.choice(["first.json", "first.png", "/etc/passwd", "../../etc/passwd", "odd.json", ""])
    odd[place] = info, b""
    return _in_tar(random, folder, odd)


# ---- finished folders ------------------------------------------------------------------------------------------
def _other_index(random: Random, folder: Path, template: Path) -> Case:
    """Records that do not fit the tar, under hashes that fit the records."""
    copy = copied(folder, template)
    records = np.load(copy / "train.index.npy")
    for _ in range(random.randrange(1, 4)):
        record, name = records[random.randrange(len(records)) :][:1], random.choice(records.dtype.names)
        if random.random() < 0.3:
            record[name] = records[random.randrange(len(records))][name]
        else:
            record[name] = np.frombuffer(random.randbytes(record[name].nbytes), record[name].dtype)
    out = io.BytesIO()
    np.save(out, records)
    (copy / "train.index.npy").write_bytes(out.getvalue())
    manifest = json.loads((copy / "manifest.json").read_text())
    part, start = manifest["splits"]["train"], 0
    for shard in part["shards"]:
        of_shard, start = records[start : start + shard["samples"]], start + shard["samples"]
        shard["index_sha256"] = hashlib.sha256(of_shard.tobytes()).hexdigest()
    part["index"]["sha256"] = hashlib.sha256(out.getvalue()).hexdigest()
    write_manifest(copy, manifest)
    return Case(path=copy)


Input = Callable[[Random, Path], Case]
INPUTS: dict[str, Input] = {
    **{name: functools.partial(_value, changes=changes, good=good) for name, (changes, good) in VALUES.items()},
    "invalid UTF-8": _invalid_utf8,
    **{name: functools.partial(_picture, make=make, good=good) for name, (make, good) in PICTURES.items()},
    "truncated tar": _truncated_tar, "garbage tar": _garbage_tar, "member missing": _missing_member,
    "names with ..": functools.partial(_named, folders=["../", "a/../../", "a/../", "./../"]),
    "absolute paths": functools.partial(_named, folders=["/", "//", "/etc/", "/a/b/"]),
    "links": _link,
}  # fmt: skip
FOLDERS: dict[str, Callable[[Random, Path, Path], Case]] = {"index of other places": _other_index}
