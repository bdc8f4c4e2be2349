"""Shard folders behind a URL: the same samples as from a folder, whatever the server and the cache's disk do."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep import cli, storage, tokenizer
from data_prep.errors import UserError
from data_prep.example import Example
from data_prep.index import read_manifest
from data_prep.reader import BadSample, ShardIndex, open_split
from data_prep.shard import build
from data_prep.storage import cache, connection, location_of, open_storage, remote
from data_prep.storage.cache import Cache, open_cache
from tests.data_prep.conftest import TRAILS
from tests.server import (
    Fault,
    Server,
    changed,
    dropped,
    elsewhere,
    endless,
    garbage,
    hung_up,
    long,
    packed,
    serving,
    short,
    silent,
    status,
    whole,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars of 10 samples, each of about 10 blocks."""
    out = tmp_path_factory.mktemp("trails")
    build("trails", out, options=TRAILS, samples_per_shard=10)
    return out


@pytest.fixture(scope="module")
def examples(folder: Path) -> list[Example]:
    index = open_split(folder, "train")
    return [index.read(i) for i in range(len(index))]


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, short waits, and a cache of the test's own."""
    monkeypatch.setenv("IVTLR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(remote, "BLOCK", 3000)
    monkeypatch.setattr(remote, "OPEN_SECONDS", 0.5)
    monkeypatch.setattr(remote, "READ_SECONDS", 0.5)
    monkeypatch.setattr(connection, "SILENT_SECONDS", 0.4)
    monkeypatch.setattr(storage, "_LONGEST_PAUSE", 0.02)


@pytest.fixture
def patient(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests in which every answer comes at last: a busy machine does not make them fail."""
    monkeypatch.setattr(remote, "OPEN_SECONDS", 60.0)
    monkeypatch.setattr(remote, "READ_SECONDS", 60.0)
    monkeypatch.setattr(connection, "SILENT_SECONDS", 30.0)


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as running:
        yield running


def all_of(index: ShardIndex) -> list[Example]:
    return [index.read(i) for i in range(len(index))]


def files_of(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.name != "total"]


# ---- what is read ------------------------------------------------------------------------------
@pytest.mark.parametrize("cache_gb", [None, 0])
def test_the_same_samples_as_from_a_folder(
    server: Server, folder: Path, examples: list[Example], cache_gb: float | None
) -> None:
    index, local = open_split(server.url, "train", cache_gb), open_split(folder, "train")
    assert all_of(index) == examples
    assert (index.index_hash, index.manifest_hash) == (local.index_hash, local.manifest_hash)
    assert read_manifest(server.url) == read_manifest(folder)


def test_a_sample_is_one_request_without_a_cache(server: Server, examples: list[Example]) -> None:
    index = open_split(server.url, "train", 0)
    del server.asked[:]
    assert index.read(7) == examples[7]
    assert [name for name, _ in server.asked] == ["train-000000.tar"]


def test_a_second_reader_asks_for_the_manifest_alone(server: Server, examples: list[Example]) -> None:
    """Ranks, runs and other addresses of the same folder share what is kept: it is named after its content."""
    all_of(open_split(server.url, "train"))
    asked = Counter(server.asked)
    assert max(asked.values()) == 1 and asked["train.index.npy", ""] == 1
    for url in (server.url, server.url.replace("127.0.0.1", "localhost") + "/"):
        del server.asked[:]
        assert all_of(open_split(url, "train")) == examples
        assert server.asked == [("manifest.json", "")]


def test_an_index_crosses_processes(server: Server, examples: list[Example]) -> None:
    index = open_split(server.url, "train", 0)
    index.read(0)
    assert pickle.loads(pickle.dumps(index)).read(3) == examples[3]


def test_other_protocols(folder: Path, examples: list[Example]) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/shards/{path.name}", path.read_bytes())
    for _ in range(2):
        assert all_of(open_split("memory://shards", "train")) == examples
    assert all_of(open_split("memory://shards", "train", 0)) == examples
    assert all_of(open_split(f"file://{folder}", "train")) == examples


# ---- what a server does ------------------------------------------------------------------------
FAULTS = {
    "500": status(500), "503": status(503), "429": status(429), "dropped": dropped, "hung up": hung_up,
    "silent": silent, "short": short, "long": long, "elsewhere": elsewhere,
}  # fmt: skip


@pytest.mark.parametrize("cache_gb", [None, 0])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_faults_that_pass_cost_time_only(
    server: Server, examples: list[Example], fault: Fault, cache_gb: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "READ_SECONDS", 20.0)
    index = open_split(server.url, "train", cache_gb)
    server.break_tars(fault, times=2)
    assert all_of(index) == examples


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (status(500), "HTTP 500"), (dropped, ""), (hung_up, ""), (silent, "no answer in time"), (garbage, ""),
        (short, "bytes came, not"), (long, "bytes came, not"), (elsewhere, "another part of the file came"),
        (changed, "are not those that were written"), (status(404), "there is no such file"),
        (status(403), "HTTP 403"), (status(410), "HTTP 410"),
    ],
)  # fmt: skip
def test_faults_that_stay_are_bad_samples(
    server: Server, examples: list[Example], fault: Fault, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault is not silent:  # on a busy machine an answer takes a while
        monkeypatch.setattr(connection, "SILENT_SECONDS", 30.0)
    index = open_split(server.url, "train")
    server.break_tars(fault)
    with pytest.raises(BadSample) as caught:
        index.read(13)
    assert caught.value.key == "000000013" and "train-000001.tar" in caught.value.reason
    assert told in caught.value.reason and "\n" not in caught.value.reason
    server.fault = None
    assert all_of(index) == examples


@pytest.mark.parametrize(("fault", "asked"), [(status(503), 1), (hung_up, 2), (status(403), 1), (changed, 2)])
def test_after_waiting_in_vain_nobody_waits_again(server: Server, fault: Fault, asked: int) -> None:
    """Else every sample of a run would wait for a server that has gone."""
    index = open_split(server.url, "train")
    server.break_tars(fault)
    for sample in (3, 13):
        del server.asked[:]
        with pytest.raises(BadSample):
            index.read(sample)
    assert len(server.asked) <= asked


def test_other_bytes_are_asked_for_once_more(server: Server, examples: list[Example]) -> None:
    """A proxy's mistake: it does not stay in the cache."""
    index = open_split(server.url, "train")
    server.break_tars(changed, times=1)
    assert all_of(index) == examples
    assert all_of(open_split(server.url, "train")) == examples


def test_a_tar_that_changes_is_noticed(server: Server, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    build("trails", other, options=TRAILS | {"seed": 7}, samples_per_shard=10)
    for name in ("manifest.json", "train.index.npy"):
        (other / name).write_bytes((folder / name).read_bytes())
    server.folder = other
    index = open_split(server.url, "train")
    with pytest.raises(BadSample, match="are not those that were written"):
        index.read(4)
    assert not [path for path in files_of(tmp_path / "cache") if path.name.startswith(index.shards[0]["sha256"])]


def test_whole_files_only(server: Server, examples: list[Example]) -> None:
    """Each tar is fetched once, and comes out of the cache from then on; without one that is refused."""
    server.break_tars(whole)
    index = open_split(server.url, "train")
    assert all_of(index) == examples
    assert Counter(name for name, asked in server.asked if not asked and name.endswith(".tar")) == {
        f"train-00000{n}.tar": 1 for n in range(3)
    }
    for too_small in (0, 30e-6):
        with pytest.raises(BadSample, match="gives no parts of files"):
            open_split(server.url, "test", too_small).read(0)


@pytest.mark.parametrize("fault", [endless, packed])
@pytest.mark.parametrize("cache_gb", [None, 0])
def test_no_more_is_read_than_a_file_can_have(
    server: Server, monkeypatch: pytest.MonkeyPatch, fault: Fault, cache_gb: float | None, tmp_path: Path
) -> None:
    """Whatever its head says: neither memory nor disk are the server's to fill."""
    monkeypatch.setattr(remote, "MOST_SMALL", 10**6)
    monkeypatch.setattr(connection, "SILENT_SECONDS", 5.0)
    index = open_split(server.url, "train", cache_gb)
    told = "more bytes came than the file can have"
    server.break_tars(fault)
    with pytest.raises(BadSample, match=told):
        index.read(3)
    server.fault = lambda h: h.name == "val.index.npy" and fault(h)
    with pytest.raises(UserError, match=told):
        open_split(server.url, "val", cache_gb)
    server.fault = fault
    other = server.url.replace("127.0.0.1", "localhost")  # of which no manifest is kept
    with pytest.raises(UserError, match=told):
        open_split(other, "train", cache_gb)
    assert sum(path.stat().st_size for path in tmp_path.glob("cache/*")) < 10**6


# ---- opening -----------------------------------------------------------------------------------
def refusal(url: str, capsys: pytest.CaptureFixture[str], out: Path) -> str:
    """The line with which a command ends."""
    with pytest.raises(SystemExit, match="2"):
        cli.run(tokenizer.main, ["--data", url, "--vocab_size", "500", "--out", str(out)])
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_server_out_of_reach_is_one_line(server: Server, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def told(url: str = f"{server.url}/") -> str:
        return refusal(url, capsys, tmp_path / "words")

    for fault, reason in [
        (status(503), "HTTP 503"), (status(403), "HTTP 403"), (silent, "no answer in time"), (hung_up, ""),
        (status(404), "has no manifest.json"), (garbage, ""),
        (lambda h: h.answer(200, b"<html>") is None, "cannot be read (Expecting value"),
    ]:  # fmt: skip
        server.fault = fault
        line = told()
        assert line.startswith(f"error: {server.url}") and reason in line
    server.fault = None
    assert "train.index.npy cannot be read (it is not the one of the manifest)" in told_of_index(server, told)
    assert "has no manifest.json" in told(f"{server.url}/nowhere")
    assert "Cannot connect to host" in told("http://127.0.0.1:1/shards?key=secret")
    assert "secret" not in told("http://user:secret@127.0.0.1:1/shards?key=secret")
    assert "cannot be read here: Protocol not known: nonsense" in told("nonsense://host/x")


def told_of_index(server: Server, told: Any) -> str:
    server.fault = lambda h: h.name.endswith(".npy") and changed(h)
    try:
        return told()
    finally:
        server.fault = None


def test_offline_what_is_kept_is_read(server: Server, examples: list[Example], caplog: Any) -> None:
    index = open_split(server.url, "train")
    assert [index.read(i) for i in range(10)] == examples[:10]
    server.fault = hung_up
    again = open_split(server.url, "train")
    assert "going on with the last one that came" in caplog.text
    assert [again.read(i) for i in range(10)] == examples[:10]
    with pytest.raises(BadSample, match="cannot be read"):
        again.read(20)
    with pytest.raises(UserError, match="cannot be read"):
        open_split(server.url, "val")  # its index never came
    server.fault = status(404)
    with pytest.raises(UserError, match="no manifest"):  # somebody took it away
        open_split(server.url, "train")


# ---- processes ---------------------------------------------------------------------------------
def in_processes(count: int, work: Any, method: str = "fork") -> list[Any]:
    """What `work`, given a number, returns in as many processes at once."""
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()

    def run(n: int) -> None:
        try:
            queue.put((n, work(n)))
        except BaseException as error:
            queue.put((n, error))

    processes = [context.Process(target=run, args=(n,), daemon=True) for n in range(count)]
    for process in processes:
        process.start()
    answers = dict(queue.get() for _ in processes)
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    return [answers[n] for n in range(count)]


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("cache_gb", [None, 0, 30e-6])
def test_forked_workers_have_connections_of_their_own(
    server: Server, examples: list[Example], cache_gb: float | None
) -> None:
    """Parent and children read before, during and after each other, through one cache that is partly too small."""
    index = open_split(server.url, "train", cache_gb)
    assert index.read(0) == examples[0]
    for _ in range(2):
        assert in_processes(3, lambda n: all_of(index)[n:]) == [examples[n:] for n in range(3)]
        assert all_of(index) == examples


@pytest.mark.usefixtures("patient")
def test_a_fork_leaves_the_parents_requests_alone(server: Server, examples: list[Example]) -> None:
    index = open_split(server.url, "train", 0)
    child = 1
    for sample in range(5):
        assert index.read(sample) == examples[sample]
        child = os.fork()
        if not child:
            ok = index.read(sample + 5) == examples[sample + 5]
            os._exit(0 if ok else 1)
        assert index.read(sample + 1) == examples[sample + 1]
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.usefixtures("patient")
# ---- the cache ---------------------------------------------------------------------------------
def test_the_bound_is_kept(server: Server, examples: list[Example], tmp_path: Path) -> None:
    limit = 50_000

    def work(n: int) -> bool:
        index = open_split(server.url, "train", limit / 1e9)
        for example in range(n, 25, 2):
            if index.read(example) != examples[example]:
                return False
            sizes = []
            for path in files_of(tmp_path / "cache"):
                try:
                    sizes.append(path.stat().st_size if path.suffix != ".tmp" else 0)
                except FileNotFoundError:
                    continue
            if sum(sizes) > limit:
                return False
        return True

    assert in_processes(2, work) == [True, True]
    assert sum(path.stat().st_size for path in files_of(tmp_path / "cache")) <= limit


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    kept = Cache(tmp_path, 100)
    for n in range(10):
        assert kept.put(str(n), bytes([n]) * 10)
        os.utime(tmp_path / str(n), (1000 + n, 1000 + n))
    assert kept.read("0") == bytes(10)  # used now
    assert kept.put("new", b"x" * 10)
    assert {path.name for path in files_of(tmp_path)} == {"0", "3", "4", "5", "6", "7", "8", "9", "new"}
    assert kept.read("1") is None and kept.read("5", 2, 4) == b"\5\5" and kept.read("5", 2, 11) is None
    assert not kept.put("large", b"x" * 101) and kept.read("new") == b"x" * 10


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    kept = Cache(tmp_path, 100)
    for name, age in (("left.tmp", 10**6), ("writing.tmp", 0)):
        (tmp_path / name).write_bytes(b"x" * 50)
        if age:
            os.utime(tmp_path / name, (age, age))
    (tmp_path / "total").write_text("99999 nonsense")
    assert kept.put("a", b"x" * 60)
    assert {path.name for path in files_of(tmp_path)} == {"a", "writing.tmp"}


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_more(
    server: Server, examples: list[Example], monkeypatch: pytest.MonkeyPatch, caplog: Any, error: int
) -> None:
    """Reading goes on, with as much as is asked for and no more."""

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(cache.tempfile, "mkstemp", full)
    index = open_split(server.url, "train")
    assert all_of(index) == examples
    assert caplog.text.count("reading on without the cache") == 1
    assert len(server.asked) == 2 + len(index)


def test_a_disk_that_becomes_full_meanwhile(
    server: Server, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_split(server.url, "train")
    all_of_first = [index.read(i) for i in range(10)]

    def full(self: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert all_of_first + [index.read(i) for i in range(10, 25)] == examples


def test_a_cache_that_cannot_be_made(server: Server, examples: list[Example], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert open_cache() is None
    assert all_of(open_split(server.url, "train")) == examples


def test_others_that_keep_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_LOCK_SECONDS", 0.05)
    kept, other = Cache(tmp_path, 100), Cache(tmp_path, 100)
    with other._locked():
        assert not kept.put("a", b"x")
    assert kept.put("a", b"x")


def test_a_damaged_cache_is_read_anew(server: Server, examples: list[Example], tmp_path: Path) -> None:
    all_of(open_split(server.url, "train"))
    for path in files_of(tmp_path / "cache"):
        content = path.read_bytes()
        path.write_bytes(bytes(len(content)) if path.name.endswith("1") else content[: len(content) // 2])
    assert all_of(open_split(server.url, "train")) == examples


def test_a_link_in_a_shared_cache_is_not_followed(tmp_path: Path) -> None:
    """Nor written through: `put` and `adopt` only ever rename."""
    for name in ("total", "block"):
        (tmp_path / f"my-{name}").write_text("mine")
        (tmp_path / "cache").mkdir(exist_ok=True)
        (tmp_path / "cache" / name).symlink_to(tmp_path / f"my-{name}")
    cache = Cache(tmp_path / "cache", 10**6)
    assert not cache.put("block", b"x" * 10) and not cache.writable
    assert [(tmp_path / f"my-{name}").read_text() for name in ("total", "block")] == ["mine", "mine"]


def test_the_cache_is_where_and_as_large_as_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = open_cache()
    assert made is not None and (made.folder, made.limit) == (tmp_path / "cache", 8 * 10**9)
    monkeypatch.setenv("IVTLR_CACHE_GB", "0.5")
    made = open_cache()
    assert made is not None and made.limit == 5 * 10**8
    monkeypatch.setenv("IVTLR_CACHE_GB", "lots")
    with pytest.raises(UserError, match="IVTLR_CACHE_GB lots: expected a number"):
        open_cache()
    assert open_cache(0) is None
    monkeypatch.delenv("IVTLR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    made = open_cache(1)
    assert made is not None and made.folder == tmp_path / "xdg" / "ivt-lr"


# ---- locations ---------------------------------------------------------------------------------
def test_locations() -> None:
    assert location_of("https://host/a?b=c") == "https://host/a?b=c"
    assert location_of("data/x") == Path("data/x") and location_of("file:///a%20b/c") == Path("/a b/c")
    assert location_of("~/x") == Path.home() / "x"
    named = open_storage("https://me:pw@host:80/a/b/?key=1", 0)
    assert named.describe("x.tar") == "https://host:80/a/b/x.tar"
    assert named._file("x.tar") == "https://me:pw@host:80/a/b/x.tar?key=1"  # type: ignore[attr-defined]
