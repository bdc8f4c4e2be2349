"""Somebody else's tars: what is sound in them is read in place, everything else is a reject that says why."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import UserError
from data_prep.reader import open_split
from data_prep.shard import build
from data_prep.sources import Rejected, Source, open_source
from data_prep.sources.tar import DamagedTar, Tar
from tests.data_prep.conftest import TRAILS, picture


def question(**changes: Any) -> bytes:
    content = {"id": "q", "question": "Up?", "choices": ["yes", "no"], "answer": "B", "rationale": "It falls."}
    return json.dumps(content | changes).encode()


def member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def sample(key: str, **changes: Any) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [member(f"{key}.json", question(id=key, **changes)), member(f"{key}.png", picture())]


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    with tarfile.open(path, "w", format=format) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


def outcome(path: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Ids of the examples and (id, reason) of the rejects of the split train."""
    source: Source = open_source("webdataset", str(path))
    good, bad = [], []
    for row in range(source.rows("train")):
        try:
            good.append(source.example("train", row).id)
        except Rejected as error:
            bad.append((error.id, error.reason))
    return good, bad


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples(tmp_path: Path, format: int) -> None:
    """Long names and pax headers are read; folders are no samples; a missing id is the key."""
    far = "folder/" * 13 + "far" * 5  # more than a header's 100 bytes
    write_tar(
        tmp_path / "train-000000.tar",
        member("folder", type=tarfile.DIRTYPE),
        member("./a.json", question(id=7, level=3), mtime=1.5 if format == tarfile.PAX_FORMAT else 1),
        member("./a.JPEG", picture(format="JPEG")),
        member("b.json", question(id=None)),
        member(f"{far}.png", picture()),
        member(f"{far}.json", question(id="far", answer=0, image="x.png")),
        format=format,
    )
    (tmp_path / "test").mkdir()
    write_tar(tmp_path / "test" / "0.tar", *sample("t", split="test"))
    source = open_source("webdataset", str(tmp_path))
    assert [(split, source.rows(split)) for split in source.splits()] == [("train", 3), ("test", 1)]
    assert set(source.input() or ()) == {"train-000000.tar", "test/0.tar"}
    source = pickle.loads(pickle.dumps(source))
    first, second, third = (source.example("train", row) for row in range(3))
    for example in (first, second, third):
        example.validate()
    assert (first.id, first.image, first.fields) == ("7", picture(format="JPEG"), {"level": "3"})
    assert (second.id, second.image, second.answer) == ("b", None, 1)
    assert (third.id, third.image, third.answer) == ("far", picture(), 0)


def test_own_shards_come_back_byte_for_byte(trails: Path, tmp_path: Path) -> None:
    build("webdataset", tmp_path / "again", input=str(trails), samples_per_shard=10)
    for split, count in TRAILS.items():
        for tar in trails.glob(f"{split}-*.tar"):
            assert (tmp_path / "again" / tar.name).read_bytes() == tar.read_bytes()
        assert len(open_split(tmp_path / "again", split)) == count


SPARSE = "GNU.sparse.major"


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([member("../x.json", question())], "member outside the tar: ../x.json"),
        ([member("a/../../x.json", question())], "member outside the tar: a/../../x.json"),
        ([member("/x.json", question())], "member outside the tar: /x.json"),
        (
            [member("x.json", question()), member("x.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
            "member no plain file: x.png, a link",
        ),
        ([member("x.json", type=tarfile.LNKTYPE, linkname="a.json")], "member no plain file: x.json, a link"),
        ([member("x.json", type=tarfile.CHRTYPE, devmajor=1)], "member no plain file: x.json, a device"),
        ([member("x.json", type=tarfile.FIFOTYPE)], "member no plain file: x.json, a pipe"),
        ([member("x.json", b"data", type=b"V")], "member no plain file: x.json, of type b'V'"),
        (
            [member("x.json", question(), pax_headers={SPARSE: "1", "GNU.sparse.realsize": "99"})],
            "member no plain file: x.json, a sparse file",
        ),
        ([member("x.json", b"\0" * 1024, type=tarfile.GNUTYPE_SPARSE)], "member no plain file: x.json, a sparse file"),
        ([member("x.json", question()), member("x.pkl", b"\x80\x04.")], "member of unknown kind: x.pkl"),
        ([member("x.pyd", b"1")], "member of unknown kind: x.pyd"),
        ([member("x", question())], "member of unknown kind: x"),
        ([member(".json", question())], "member of unknown kind: .json"),
        ([member("a/._x.json", question())], "member of unknown kind: a/._x.json"),
        ([member("x.json", question()), member("x.cls.json", b"1")], "member of unknown kind: x.cls.json"),
        (2 * [member("x.json", question())], "more than one JSON in a sample: x.json"),
        (
            [*sample("x"), member("x.jpg", picture(format="JPEG"))],
            "more than one picture in a sample: x.jpg",
        ),
        ([member("x.png", picture())], "no JSON in a sample: only x.png"),
        ([member("x.json", question(image="x.png"))], "picture missing in the tar: x.png"),
        ([member("x.json", question(split="val"))], "wrong split: 'val'"),
        ([member("x.json", b"")], "not valid JSON"),
        ([member("x.json", b" " * (4 * 2**20 + 1))], "member too large: x.json, 4194305 bytes"),
    ],
)
def test_bad_samples(tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]], told: str) -> None:
    """The one is a reject, and its neighbours are none the worse."""
    write_tar(tmp_path / "train.tar", *sample("a"), *members, *sample("z"))
    good, bad = outcome(tmp_path)
    assert good == ["a", "z"]
    assert len(bad) == 1 and bad[0][1].startswith(told)


def test_a_key_twice_spoils_both(tmp_path: Path) -> None:
    """Which picture is whose cannot be known; in another tar the key may come again."""
    write_tar(tmp_path / "train-0.tar", member("x.json", question()), *sample("a"), member("x.png", picture()))
    write_tar(tmp_path / "train-1.tar", *sample("x"))
    good, bad = outcome(tmp_path)
    assert good == ["a", "x"]
    assert bad == [("x", "key twice in a tar: train-0.tar")] * 2


def member_start(path: Path, name: str) -> int:
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset


@pytest.mark.parametrize(
    ("change", "good", "told"),
    [
        (lambda tar, at: tar[: at("b.png") + 600], ["a"], "tar cut off: 88 of .*; b and what follows is lost"),
        (lambda tar, at: tar[: at("b.png")], ["a"], "tar cut off.*; b and what follows is lost"),
        (lambda tar, at: tar[: at("c.json")], ["a", "b"], "tar cut off.*; what follows b is lost"),
        (lambda tar, at: tar[: at("c.json") + 100], ["a", "b"], "tar cut off.*; what follows b is lost"),
        (lambda tar, at: tar[: at("c.json")] + b"\xff" * 512 + tar[at("c.json") + 512 :], ["a", "b"], "tar damaged"),
        (lambda tar, at: with_size(tar, at("b.png"), 8**11 - 1), ["a"], "tar cut off: .* of 8589934591 bytes"),
        (lambda tar, at: with_size(tar, at("b.png"), -1000), ["a"], "tar damaged: a size that is none at byte"),
        (lambda tar, at: tar + tar, ["a", "b", "c"], "something behind the end of the tar: .*; what follows c is lost"),
        (lambda tar, at: tar + bytes(2**21), ["a", "b", "c"], "something behind the end of the tar"),
        (lambda tar, at: b"garbage " * 1000, [], "tar damaged: .*; nothing of it can be used"),
        (lambda tar, at: gzip.compress(tar), [], "tar compressed: unpack it with gzip first"),
        (lambda tar, at: b"", [], "tar cut off: 0 bytes, not 512 or more"),
    ],
)
def test_a_damaged_tar_costs_one_reject(
    tmp_path: Path, change: Callable[[bytes, Callable[[str], int]], bytes], good: list[str], told: str
) -> None:
    """What is in front of the damage is used; of a sample at its edge nobody knows whether it was whole."""
    path = tmp_path / "train-000000.tar"
    tar = write_tar(path, *sample("a"), *sample("b"), *sample("c"))
    changed = change(tar, lambda name: member_start(path, name))
    path.write_bytes(changed)
    write_tar(tmp_path / "train-000001.tar", *sample("other"))
    found, bad = outcome(tmp_path)
    assert found == [*good, "other"]
    ((name, reason),) = bad
    assert name == "train-000000.tar"
    assert re.match(told, reason), reason


def with_size(tar: bytes, start: int, size: int) -> bytes:
    """The tar whose member at `start` claims another size, with a checksum that fits."""
    header = tarfile.TarInfo.frombuf(tar[start : start + 512], "utf-8", "strict")
    header.size = size
    return tar[:start] + header.tobuf(tarfile.GNU_FORMAT) + tar[start + 512 :]


def test_extension_headers_are_bounded(tmp_path: Path) -> None:
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        tar = write_tar(tmp_path / "train.tar", member("x", bytes(70_000), type=kind), *sample("a"))
        assert len(tar) > 70_000
        with pytest.raises(DamagedTar, match="an extension header of 70000 bytes at byte 0"):
            list(Tar(tmp_path / "train.tar").members())
    for records in (b"12 path=x", b"99999999999 path=x\n", b"x", b"0 path=x\n", b"9 pathxx\n"):
        write_tar(tmp_path / "train.tar", member("x", records, type=tarfile.XHDTYPE), *sample("a"))
        with pytest.raises(DamagedTar, match="a pax header that is none"):
            list(Tar(tmp_path / "train.tar").members())


def test_nothing_usable_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.tar").write_bytes(gzip.compress(b"x"))
    with pytest.raises(UserError, match="nothing of the split train could be used: 1 x tar compressed"):
        build("webdataset", tmp_path / "out", input=str(tmp_path / "train.tar"))
    write_tar(tmp_path / "train.tar")
    with pytest.raises(UserError, match="has no rows"):
        build("webdataset", tmp_path / "out", input=str(tmp_path / "train.tar"))


def test_mistakes(tmp_path: Path) -> None:
    for input, told in [
        (None, "--input is missing"),
        (str(tmp_path / "gone.tar"), "no such file or folder"),
        (str(tmp_path), "no tar files in this folder"),
    ]:
        with pytest.raises(UserError, match=told):
            open_source("webdataset", input)
    write_tar(tmp_path / "part.tar", *sample("a"))
    for input in (tmp_path, tmp_path / "part.tar"):
        with pytest.raises(UserError, match=r"cannot tell the split of part\.tar"):
            open_source("webdataset", str(input))
    (tmp_path / "part.tar").rename(tmp_path / "train.tar.gz")
    with pytest.raises(UserError, match=r"train\.tar\.gz is compressed; unpack it"):
        open_source("webdataset", str(tmp_path))


@pytest.mark.parametrize("out", ["", "..", "link"])
def test_the_input_is_not_written_over(tmp_path: Path, out: str) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    before = write_tar(folder / "train-000007.tar", *sample("a"))
    (folder / "link").symlink_to(folder)
    with pytest.raises(UserError, match=r"--out .* holds the input train-000007\.tar"):
        build("webdataset", folder / out, input=str(folder))
    assert (folder / "train-000007.tar").read_bytes() == before


def test_a_tar_that_goes_away(tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", *sample("a"))
    source = pickle.loads(pickle.dumps(open_source("webdataset", str(tmp_path))))
    (tmp_path / "train.tar").write_bytes(bytes(1024))
    with pytest.raises(Rejected, match="tar changed while it was read"):
        source.example("train", 0)
    source = open_source("webdataset", str(tmp_path / "train.tar"))
    assert source.splits() == []
    write_tar(tmp_path / "train.tar", *sample("a"))
    source = pickle.loads(pickle.dumps(open_source("webdataset", str(tmp_path))))
    (tmp_path / "train.tar").unlink()
    with pytest.raises(UserError, match="cannot be read any more"):
        source.example("train", 0)
