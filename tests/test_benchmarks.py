"""The benchmarks' commands, and the counts that do not depend on the machine: work, memory, traffic, calls."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import data, step_cost
from benchmarks.cases import make_batch, make_model
from benchmarks.padding import padding
from benchmarks.step_cost import VARIANTS, Bench, kept_bytes
from data_prep import cli
from pipeline.latent.method import LatentConfig
from tests.launch import ROOT, environment


def run(module: str, out: Path, *options: str) -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", f"benchmarks.{module}", "--shape", "tiny", "--repeats", "1", *options]
    done = subprocess.run([*command, "--json", str(out)], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ratio" in done.stdout or "to latent" in done.stdout
    return json.loads(out.read_text())


def bench(variant: str) -> Bench:
    return Bench(make_model(**VARIANTS[variant]), make_batch(3), LatentConfig(latent_grad="detach"))


def test_work_of_a_step() -> None:
    """In FLOPs: every column once."""
    counted = bench("plain")
    ordinary = counted.flops("ordinary")
    assert counted.flops("segmented") <= 1.01 * ordinary
    assert counted.flops("segmented_bptt") <= 1.01 * ordinary
    assert counted.flops("prepass") <= 1.45 * ordinary
    assert counted.flops("naive") > 2 * ordinary


@pytest.mark.parametrize("variant", ["ckpt", "lora_ckpt"])
def test_live_memory_of_a_checkpointed_step(variant: str) -> None:
    """Between forward and backward: layers' inputs as in an ordinary step, and with bptt the kept keys and values."""
    counted = bench(variant)
    ordinary = counted.live_bytes("ordinary")
    assert counted.live_bytes("prepass") <= 1.02 * ordinary
    assert counted.live_bytes("segmented") <= 1.05 * ordinary
    kept = kept_bytes(counted.backbone, counted.batch, counted.config)
    assert ordinary < counted.live_bytes("segmented_bptt") <= 1.05 * ordinary + kept
    assert counted.live_bytes("naive") > 2 * ordinary


def test_step_cost_and_traffic(tmp_path: Path) -> None:
    """Parameters gathered by one of two ranks under ZeRO-3: once a step where they stay, else a pass at a time."""
    found = run(
        "step_cost", tmp_path / "step.json", "--variants", "plain,ckpt", "--batch", "1", "--text", "20", "--rest", "20"
    )
    for measure in ("flops", "live_bytes", "gather_bytes", "seconds"):
        assert {"ordinary", "naive", "segmented", "prepass", "segmented_ckpt"} <= found[measure].keys()
    gathered = found["gather_bytes"]
    for name in ("segmented", "segmented_bptt", "prepass"):
        assert gathered[f"{name}_resident"] <= 1.05 * gathered["ordinary_resident"]
    assert gathered["ordinary_resident"] <= 1.01 * gathered["parameters"]
    assert gathered["prepass"] <= 2.45 * gathered["ordinary"]
    assert gathered["prepass_ckpt"] <= 2.45 * gathered["ordinary_ckpt"]
    assert gathered["segmented_ckpt"] <= 2.45 * gathered["ordinary_ckpt"]
    assert gathered["segmented_ckpt"] < gathered["segmented_bptt_ckpt"]


def test_decode_cost(tmp_path: Path) -> None:
    found = run("decode_cost", tmp_path / "decode.json")
    assert found["seconds"].keys() == found["forward_calls"].keys()
    assert found["forward_calls"]["latent_b1"] == found["forward_calls"]["latent_b8"] == 1 + 3 + 10
    assert found["forward_calls"]["cot100_b1"] == 100 and found["forward_calls"]["cot180_b8"] == 180


def test_checkpoint_cost(tmp_path: Path) -> None:
    """Collectives: none where nothing is saved, and fewer where training does not wait."""
    out = tmp_path / "checkpoint.json"
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--shape", "tiny", "--pairs", "1", "--steps", "4"]
    done = subprocess.run([*command, "--json", str(out)], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())["collectives"]
    assert found["none"] == 0 < found["beside"] < found["at once"] <= 11


def test_cost_of_watching(tmp_path: Path) -> None:
    """Two small sums a step: of labels, which the loss is divided by, and of the numbers by which it is judged."""
    out = tmp_path / "guards.json"
    command = [sys.executable, "-m", "benchmarks.guards", "--steps", "3", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    step = json.loads(out.read_text())["step"]
    assert (step["sums"], step["waits of ours"]) == (2, 4) and step["collectives"] >= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "plain,cpkt"], "--variants cpkt: expected some of plain, ckpt, lora, lora_ckpt"),
        (["--repeats", "0"], "--repeats must be 1 or more"),
        (["--shape", "7b"], "two ranks of it do not fit"),
    ],
)
def test_wrong_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.run(step_cost.main, options)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both readers give every sample; the index's bytes a sample are its record's and little more."""
    monkeypatch.setattr(data, "PLACES", (50,))  # each place is a process of its own
    data.main(pairs=3, samples=40, large=50_000, workers="1", json=tmp_path / "data.json")
    found = json.loads((tmp_path / "data.json").read_text())
    assert found["samples_per_second"].keys() == {"ours_w1", "webdataset_w1"}
    assert found["resume_seconds"].keys() == {"50"}
    low, high = found["ratio_interval"]["w1"]
    assert 0 < low <= high
    folder = data.make_photographs(tmp_path / "photographs", 40)
    batches = [sorted(question for batch in read(folder, 1) for question, _ in batch) for read in READERS]
    assert batches[0] == batches[1] and len(batches[0]) == 40


READERS = (data.ours, data.webdataset)


def test_padding(tmp_path: Path) -> None:
    """The longer the windows, the less padding, of the same rows where none are left over."""
    found = padding(tmp_path, 128, 16)
    one, two = ([row for name, row in found.items() if name.startswith(size)] for size in ("one", "two"))
    assert len({row["real"] for row in one}) == 1 and len(one) == len(two) == 4
    for rows in (one, two):
        padded = [row["padded"] for row in rows]
        assert padded[0] > 1.5 * padded[1] > 1.5 * padded[-1] > 0
