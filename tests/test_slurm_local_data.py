"""slurm/local_data.py: a shard folder on a node's own disk."""

from __future__ import annotations

import runpy
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_prep import files
from data_prep.errors import UserError
from data_prep.index import read_manifest
from data_prep.making.verify import check_folder

PROGRAM = Path(__file__).resolve().parents[1] / "slurm" / "local_data.py"


@pytest.fixture
def copier() -> SimpleNamespace:
    """The program's names; its functions look theirs up in `main.__globals__`."""
    return SimpleNamespace(**runpy.run_path(str(PROGRAM)))


@pytest.fixture
def source(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "shared" / "shards"))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")


def test_a_whole_copy(
    copier: SimpleNamespace, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = tmp_path / "local" / "shards"
    copier.main(data=source, local=local)
    assert ", 0.0 MB were there" in capsys.readouterr().out
    check_folder(local)
    assert read_manifest(local)["hash"] == read_manifest(source)["hash"]
    before = {path: path.stat().st_mtime_ns for path in local.iterdir() if path.name != ".lock"}
    assert copier.copy_folder(source, local) == (0, size(source))
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_goes_on_where_it_was_stopped(copier: SimpleNamespace, source: Path, tmp_path: Path) -> None:
    """Whole files stay, what was cut short or changed since is copied again."""
    local = tmp_path / "shards"
    copier.copy_folder(source, local)
    shard, index, *_ = sorted(path for path in local.iterdir() if path.suffix in (".tar", ".npy"))[::-1]
    shard.unlink()
    files.temporary_path(shard).write_bytes(b"half")
    index.write_bytes(b"x" * index.stat().st_size)
    for absent in (local / "manifest.json", local / "local_data.json"):
        absent.unlink()
    again = (source / shard.name).stat().st_size + (source / index.name).stat().st_size
    assert copier.copy_folder(source, local) == (again, size(source) - again)
    check_folder(local)
    assert not list(local.glob("*.tmp"))
    # bytes that changed behind a finished copy
    changed = bytearray(shard.read_bytes())
    changed[600] ^= 1
    shard.write_bytes(changed)
    assert copier.copy_folder(source, local)[0] == shard.stat().st_size
    check_folder(local)


def test_two_at_once(copier: SimpleNamespace, source: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: copier.copy_folder(source, tmp_path / "shards"), range(2)))
    assert sorted(copied for copied, _ in done) == [0, size(source)]
    check_folder(tmp_path / "shards")


def test_what_is_refused(
    copier: SimpleNamespace, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="is not there"):
        copier.copy_folder(tmp_path / "nothing", tmp_path / "local")
    with pytest.raises(UserError, match="is the shard folder itself"):
        copier.main(data=source, local=source)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be copied to .*file/shards: "):
        copier.main(data=source, local=tmp_path / "file" / "shards")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
        with pytest.raises(UserError, match=r"local needs 0\.\d\d GB more, and 0\.00 GB are free"):
            copier.copy_folder(source, tmp_path / "local")
    shard = next(source.glob("train-*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=rf"{shard.name} is not as it was written; python -m data_prep.shard --verify"):
        copier.copy_folder(source, tmp_path / "local")
    assert not (tmp_path / "local" / "manifest.json").exists()
    assert not (tmp_path / "local" / shard.name).exists()
