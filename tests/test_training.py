"""Training through the public command on real DeepSpeed ranks (gloo): the numbers, resume, and bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from data_prep.errors import UserError
from data_prep.reader import open_split
from pipeline.backbones import BACKBONES
from pipeline.data.batch import collate
from pipeline.data.loader import Share, StageSteps
from pipeline.engine import add_tokens, learning_rate
from pipeline.keeping.checkpoint import Checkpoints
from pipeline.keeping.lease import Lease
from pipeline.latent.decode import Decoding
from pipeline.loaded import load_export
from pipeline.model import LatentModel, add_lora, decay_groups
from pipeline.plan import settings_hash
from pipeline.prepare import base_hash
from pipeline.prompt import LATENT_TOKEN, RowBuilder
from pipeline.recipe import load_config
from pipeline.watching.heartbeat import read_beat
from pipeline.watching.watchdog import HUNG
from tests import launch
from tests.launch import TINY, losses, train, try_train


def plain_losses(out, data, *, steps, **overrides):
    """The same training by plain PyTorch: one process, whole batches, no DeepSpeed.  Starts from OUT/base."""
    config = load_config(TINY, {"data.path": str(data), **overrides})
    base = config.model.path or out / "base"
    family = BACKBONES[config.model.backbone]
    processor = family.processor(base, config.prompt)
    vlm = family.load(base, torch.float32)
    torch.manual_seed(config.train.seed)
    add_tokens(vlm, processor.tokenizer, [LATENT_TOKEN])
    if config.model.lora:
        vlm = add_lora(vlm, config.model)
    model = LatentModel(family(vlm), config.latent).train()
    o = config.optim
    groups = decay_groups(model, o.weight_decay, o.decay_vectors)
    optimizer = torch.optim.AdamW(groups, betas=(o.beta1, o.beta2), eps=o.eps)
    builder = RowBuilder(processor, config.prompt, config.latent.num_patches)
    index = open_split(data, "train")
    size = config.train.global_batch
    stages = [
        StageSteps(index, builder, config.curriculum, stage, Share(0, 1, size, size), config.train.seed, "drop")
        for stage in range(len(config.curriculum.stages))
    ]
    batches = [batch for stage in stages for step in range(len(stage)) for batch in stage[step]]
    found = []
    for step, batch in enumerate(batches[:steps]):
        nll, _ = model(batch)
        loss = nll / int(batch.label_mask.sum())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], o.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(o, step, len(batches))
        optimizer.step()
        found.append(loss.item())
    return found


def assert_losses(actual, expected, tolerance):
    assert len(actual) >= len(expected)
    errors = [abs(actual[step] - loss) for step, loss in enumerate(expected)]
    assert max(errors) <= tolerance, f"losses differ by {max(errors):.2e} at step {errors.index(max(errors))}"


def test_zero3_equals_plain_pytorch(whole_run, data):
    """20 steps over two stage changes, every parameter trained."""
    expected = plain_losses(whole_run, data, steps=20)
    assert expected[-1] < expected[0]
    assert_losses(losses(whole_run), expected, 1e-5)


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name != "qwen2_vl"])
def test_other_backbones_equal_plain_pytorch(backbone, data, tmp_path):
    """Three short stages from random weights, split over two ranks; the last export answers with its latent steps."""
    out = tmp_path / "run"
    stages = "[{latents: 0, skip: 0, steps: 3}, {latents: 1, skip: 1, steps: 2}, {latents: 2, skip: 2, steps: 2}]"
    settings = {"model.backbone": backbone, "curriculum.stages": stages, "train.export": "last"}
    train(out, data, *options_of(settings), ranks=2, ds="zero3_lean")
    assert_losses(losses(out), plain_losses(out, data, steps=7, **settings), 1e-5)
    loaded, index = load_export(out / "export" / "stage2"), open_split(data, "test")
    row = loaded.builder.prompt_row(index.read(0), index.key(0), 0, loaded.info.latents)
    batch = collate([row], loaded.processor.row_format, 2)
    answer = loaded.model.answer(batch, Decoding(5, loaded.processor.eos_id))
    assert len(answer.steps) == 2 and all(step.filled.all() for step in answer.steps)
    assert type(loaded.model.backbone) is BACKBONES[backbone] and answer.autoregressive_steps(0) <= 2 + 5


def test_zero3_equals_plain_pytorch_lora(whole_run, data, tmp_path):
    """The same with LoRA, in two starts: frozen weights are not in the checkpoint, and must come from the base."""
    lora = lora_settings(whole_run)
    out = tmp_path / "lora"
    for stages in ("0", "1-2"):
        train(out, data, "--stages", stages, *options_of(lora), ranks=2)
    expected = plain_losses(out, data, steps=20, **lora)
    assert expected[-1] < expected[0]
    assert_losses(losses(out), expected, 1e-5)
    state = Checkpoints(out).all()[-1].state
    assert len(state.base_hash) == 64, "a LoRA checkpoint names its base"
    sizes = sum(p.stat().st_size for p in Checkpoints(out).all()[-1].path.rglob("*model_states.pt"))
    assert sizes < (whole_run / "export" / "stage0" / "model.safetensors").stat().st_size, "frozen weights are stored"


@pytest.mark.parametrize(
    ("schedule", "ds"),
    [("whole layers", "zero3"), ("whole layers", "zero3_lean"), ("prepass", "zero3_lean"), ("segmented", "zero3")],
)
def test_zero3_equals_plain_pytorch_detached(whole_run, data, tmp_path, schedule, ds):
    """Every schedule of `detach`, whether parameters stay gathered between the passes or not."""
    settings = {
        "latent.latent_grad": "detach",
        "model.schedule": "prepass" if schedule == "prepass" else "auto",
        "model.checkpointing": str(schedule != "segmented").lower(),
        "train.val_samples": "0",
    }
    if schedule == "segmented":
        settings["model.schedule"] = "segmented"
    out = tmp_path / "run"
    shutil.copytree(whole_run / "base", out / "base")
    train(out, data, *options_of(settings), ranks=2, ds=ds)
    log = (out / "logs" / "rank0.log").read_text()
    assert f"schedule: {'prepass' if schedule == 'prepass' else 'segmented'}" in log
    assert ("whole layers" in log) == (schedule == "whole layers")
    assert ("stay gathered" if ds == "zero3" else "gathered anew") in log
    assert_losses(losses(out), plain_losses(out, data, steps=20, **settings), 1e-5)


def lora_settings(run, **more):
    """LoRA on a pretrained folder: the first export of `run`."""
    return {
        "model.scratch": "none",
        "model.path": str(run / "export" / "stage0"),
        "model.lora": "{r: 4, alpha: 8, dropout: 0}",
        "optim.lr": "0.01",
        **more,
    }


def options_of(settings):
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def test_lora_export_merged_and_adapter(whole_run, data, tmp_path):
    """Both forms give the same hidden states, and others than the base."""
    loaded = {}
    for form in ("merged", "adapter"):
        lora = lora_settings(whole_run, **{"model.lora": f"{{r: 4, alpha: 8, dropout: 0, export: {form}}}"})
        train(tmp_path / form, data, "--stages", "0", *options_of(lora))
        loaded[form] = load_export(tmp_path / form / "export" / "stage0")
    assert (tmp_path / "adapter" / "export" / "stage0" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter" / "export" / "stage0" / "model.safetensors").exists()
    loaded["base"] = load_export(whole_run / "export" / "stage0")
    ids = torch.arange(20, 60)[None]
    hidden = {k: v.model.backbone.core(input_ids=ids).logits for k, v in loaded.items()}
    assert (hidden["merged"] - hidden["adapter"]).abs().max() < 1e-4
    assert (hidden["merged"] - hidden["base"]).abs().max() > 1e-2


def test_changed_base_is_refused(whole_run, data, tmp_path):
    """A LoRA checkpoint on another base than it was trained with would silently be another model."""
    base = tmp_path / "base"
    shutil.copytree(whole_run / "export" / "stage0", base)
    lora = lora_settings(whole_run, **{"model.path": str(base)})
    train(tmp_path / "run", data, "--stages", "0", *options_of(lora))
    shutil.copy(whole_run / "export" / "stage2" / "model.safetensors", base)
    code, log = try_train(tmp_path / "run", data, "--stages", "1", *options_of(lora))
    assert code == 2
    assert "the base model is not the one that" in log


@pytest.mark.parametrize("change", ["missing", "shape"])
@pytest.mark.parametrize("ds", ["zero2", "zero3"])
def test_base_without_all_weights(whole_run, data, tmp_path, ds, change):
    """Both ranks end, with one line: missing weights would be drawn at random (ZeRO-3: only rank 0 sees shapes)."""
    base = shutil.copytree(whole_run / "export" / "stage0", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    last = weights.pop("model.layers.1.mlp.down_proj.weight")
    if change == "shape":
        weights["model.layers.1.mlp.down_proj.weight"] = last[:7].clone()
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    out = tmp_path / "run"
    process = launch.launch(out, data, "--model.scratch", "none", "--model.path", str(base), ds=ds)
    try:
        assert launch.wait(process, out, 120) != 0
    finally:
        launch.kill_tree(process)
    log = Path(f"{out}.log").read_text()
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    assert log.count(f"error: {base}: 1 weights missing or of another shape: {name}\n") == 1
    assert "Traceback" not in log


@pytest.mark.parametrize(("padded", "markers"), [(True, 2), (False, 0)], ids=["room", "full"])
def test_new_tokens_under_zero3(whole_run, data, tmp_path, padded, markers):
    """A new token's row is the mean of the rows in use; a vocabulary grows only when it is full, never shrinks."""
    tokenizer = AutoTokenizer.from_pretrained(whole_run / "base")
    vlm = Qwen2VLForConditionalGeneration.from_pretrained(whole_run / "base")
    used, rows = len(tokenizer), vlm.get_input_embeddings().num_embeddings
    base = tmp_path / "base"
    shutil.copytree(whole_run / "base", base)
    if not padded:
        vlm.resize_token_embeddings(used)
        vlm.save_pretrained(base)
    before = vlm.get_input_embeddings().weight.detach().clone()
    train(
        tmp_path / "run", data, "--stages", "0", "--model.scratch", "none", "--model.path", str(base),
        "--optim.lr", "1e-12", "--optim.weight_decay", "0", "--train.val_samples", "0",
        "--curriculum.stages", "[{latents: 0, skip: 0, steps: 1}]", "--prompt.markers", str(bool(markers)), ranks=2,
    )  # fmt: skip
    after = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "run" / "export" / "stage0")
    weight = after.get_input_embeddings().weight.detach()
    assert len(weight) == (rows if padded else -(-(used + 1) // 64) * 64)
    assert torch.allclose(weight[:used], before[:used], atol=1e-6)
    new = used + 1 + markers
    assert torch.allclose(weight[used:new], before[:used].mean(0).expand(1 + markers, -1), atol=1e-6)
    if padded:
        assert rows > new
        assert torch.allclose(weight[new:], before[new:], atol=1e-6)


def test_asked_to_stop(whole_run, data, tmp_path):
    """SIGUSR1 to one rank: both save at the same step and end with 75; the next start goes on.

    A checkpoint is being written at any moment.
    """
    out = tmp_path / "run"
    process = launch.launch(out, data, "--train.async_checkpoints", "true", "--train.checkpoint_every", "1")
    launch.wait_for_step(out, 9, process)
    os.kill(launch.rank_processes(out)[-1], signal.SIGUSR1)
    try:
        assert launch.wait(process, out, 120) == 75
    finally:
        launch.kill_tree(process)
    assert "stopped on request at stage 1" in Path(f"{out}.log").read_text()
    beat = read_beat(out)
    assert (beat.phase, beat.ranks, beat.restarts, beat.where.stage) == ("stopped", 2, 0, 1)
    assert (out / "checkpoints" / beat.checkpoint).is_dir() and beat.where.loss == losses(out)[max(losses(out))]
    train(out, data, ranks=2)
    assert losses(out) == losses(whole_run)
    beat = read_beat(out)
    assert (beat.phase, beat.restarts) == ("done", 1)
    assert (beat.where.stage, beat.where.step, beat.where.steps, beat.where.global_step) == (2, 8, 8, 24)


@pytest.mark.parametrize("ds", ["zero1", "zero2", "zero3_offload"])
def test_other_zero_stages(whole_run, data, tmp_path, ds):
    train(tmp_path / "run", data, "--stages", "0", ranks=2, ds=ds)
    expected = [loss for step, loss in losses(whole_run).items() if step < 8]
    assert_losses(losses(tmp_path / "run"), expected, 1e-5)


@pytest.mark.parametrize("ranks, options", [(1, ["--train.micro_batch", "3"]), (3, [])])
def test_any_world_size(whole_run, data, tmp_path, ranks, options):
    """8 rows over 3 ranks, or in micro-batches of 3: short shares get masked rows, the loss stays."""
    train(tmp_path / "run", data, "--stages", "0-1", *options, ranks=ranks)
    expected = [loss for step, loss in losses(whole_run).items() if step < 16]
    assert_losses(losses(tmp_path / "run"), expected, 1e-5)


def test_one_stage_at_a_time(whole_run, data, tmp_path):
    """Three starts of one stage each give what one start of three gives; a stage without its predecessor does not."""
    out = tmp_path / "run"
    code, log = try_train(out, data, "--stages", "1", ranks=2)
    assert code == 2
    assert "error: stage 1 starts from the end of stage 0" in log
    for stage in "012":
        train(out, data, "--stages", stage, ranks=2)
    assert losses(out) == losses(whole_run)
    assert all((out / f"stage{stage}.done").exists() for stage in range(3))


def test_reset_optimizer_in_one_launch_or_two(data, tmp_path):
    for out, starts in ((tmp_path / "one", ["0-1"]), (tmp_path / "two", ["0", "1"])):
        for stages in starts:
            train(out, data, "--stages", stages, "--curriculum.reset_optimizer", "true")
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


def test_nothing_stays_in_shared_memory():
    port = str(launch.free_port())
    code = "from pipeline import distributed; distributed.start(distributed.World()); distributed.stop()"
    environment = launch.environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LOCAL_SIZE="1")
    subprocess.run([sys.executable, "-c", code], cwd=launch.ROOT, env=environment, check=True, timeout=120)
    assert not list(Path("/dev/shm").glob(f"*{port}*"))


IMPATIENT = """
from pipeline.keeping.lease import Lease
from pipeline.latent.parts import FEEDBACKS, Feedback

Lease.acquire.__defaults__ = (0.1,)  # seconds to wait for one that may be about to stop

@FEEDBACKS.add("same")
class Same(Feedback):
    def forward(self, reading):
        return reading.tip[:, None]
"""


def test_run_folder_in_use(data, tmp_path):
    plugin, lease = tmp_path / "impatient.py", Lease(tmp_path / "run")
    plugin.write_text(IMPATIENT)
    lease.acquire()
    try:
        code, log = try_train(tmp_path / "run", data, "--plugin", str(plugin))
    finally:
        lease.release()
    assert code == 2 and f"error: {tmp_path / 'run'} is in use by process {os.getpid()}" in log
    assert not list(tmp_path.glob("run/stage*"))


def test_stage_without_its_marker_is_ended_again(data, tmp_path):
    """Killed between the last checkpoint and the export: the next start makes export and marker, and trains nothing."""
    out = tmp_path / "run"
    train(out, data, "--stages", "0")
    before = losses(out)
    (out / "stage0.done").unlink()
    shutil.rmtree(out / "export")
    train(out, data, "--stages", "0")
    assert (out / "stage0.done").exists() and load_export(out / "export" / "stage0").info.stage == 0
    assert losses(out) == before


def test_stages_left_with_a_gap_between_them(whole_run, data, tmp_path):
    """A stage that lacks its marker, and a later one that lacks its end: each goes on from its own checkpoint."""
    out = tmp_path / "run"
    shutil.copytree(whole_run, out)
    for name in ("stage0.done", "stage2.done", "best-stage0.json"):
        (out / name).unlink()
    for checkpoint in Checkpoints(out).all():
        if checkpoint.state.stage == 2:
            shutil.rmtree(checkpoint.path)
    train(out, data, ranks=2)
    assert losses(out) == losses(whole_run)
    assert all((out / f"stage{stage}.done").exists() for stage in range(3))
    assert (out / "best-stage0.json").read_text() == (whole_run / "best-stage0.json").read_text()


def test_asked_to_stop_while_starting(data, tmp_path):
    """A signal during imports is remembered."""
    command = [sys.executable, *launch.arguments(tmp_path / "run", data)]
    process = subprocess.Popen(command, cwd=launch.ROOT, env=launch.environment(), stderr=subprocess.PIPE, text=True)
    status = Path(f"/proc/{process.pid}/status")
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) >> signal.SIGUSR1 - 1 & 1:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGUSR1)
    _, log = process.communicate(timeout=120)
    assert process.returncode == 75, log
    assert "stopped on request before the first step" in log
    assert json.loads((tmp_path / "run" / "lease.json").read_text())["released"]


def test_old_checkpoints_go(data, tmp_path):
    """Of those inside a stage only the newest are kept, besides the stage's end and the best."""
    out = tmp_path / "run"
    options = ["--stages", "0", "--train.checkpoint_every", "1", "--train.keep_checkpoints", "2"]
    train(out, data, *options, "--train.validate_every", "3")
    kept = {c.state.step for c in Checkpoints(out).all()}
    best = json.loads((out / "best-stage0.json").read_text())["step"]
    newest = sorted(set(range(1, 8)) - {best})[-2:]
    assert kept == {*newest, 8, best}


def test_finished_run_does_nothing(whole_run, data):
    before = (whole_run / "metrics.jsonl").read_text()
    code, log = try_train(whole_run, data)
    assert code == 0 and "nothing to do" in log
    assert (whole_run / "metrics.jsonl").read_text() == before


BAD = {
    "unknown option": (["--optim.lrr", "1"], "unknown option --optim.lrr; did you mean --optim.lr?"),
    "bad value": (["--optim.lr", "fast"], "optim.lr: Input should be a valid number"),
    "batch sizes": (
        ["--train.micro_batch", "3", "--train.accumulation", "1"],
        "micro-batch 3 x accumulation 1 x 1 ranks = 3 does not fit the global batch of 8",
    ),
    "stages": (["--stages", "0-9"], "--stages 0-9: expected one of 0 to 2"),
    "recipe": (["--model.scratch", "none"], "give either model.path or model.scratch"),
    "patches": (["--latent.num_patches", "10"], "latent.num_patches 10 is more than the 9 patches of a 84x84 image"),
    "no model": (
        ["--model.scratch", "none", "--model.path", "/nowhere/model"],
        "model.path /nowhere/model: no such folder",
    ),
    "nothing fits a stage": (
        ["--curriculum.stages", "[{latents: 0, skip: 0, steps: 1, where: {kind: [nothing]}}]"],
        "stage 0: 0 training samples fit it",
    ),
    "no data": (
        ["--data", "/nowhere/at/all", "--data.source", "none"],
        "the shard folder /nowhere/at/all is not there",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(whole_run, data, tmp_path, case):
    options, message = BAD[case]
    code, log = try_train(tmp_path / "run", None if "--data" in options else data, *options)
    assert code == 2, log
    assert f"error: {message}" in log.replace(f"{TINY}: ", "")
    assert "Traceback" not in log
    assert "ZeRO-3 on" not in log, "the engine was built first"


def test_other_settings_in_a_used_folder(whole_run, data):
    code, log = try_train(whole_run, data, "--train.seed", "5")
    assert code == 2
    assert "train.seed is 5 but" in log and "was trained with 0" in log


def test_index_that_disagrees_with_its_manifest(data, tmp_path):
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    index = broken / "train.index.npy"
    index.write_bytes(index.read_bytes()[:-1] + b"\x01")
    code, log = try_train(tmp_path / "run", broken)
    assert code == 2
    assert "the index of train-000000.tar is not the one that was written" in log


def test_corrupt_image_is_skipped_by_name(data, tmp_path):
    """A sample that went bad since preparation keeps its slot as a masked row, and is named."""
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    index = open_split(broken, "train")
    record = index.records[7]
    with open(broken / index.shards[0]["name"], "r+b") as tar:
        tar.seek(int(record["image_offset"]) + 40)
        tar.write(b"garbage")
    log = train(tmp_path / "run", broken, "--stages", "0", "--curriculum.stages", "[{latents: 0, skip: 0, epochs: 1}]")
    assert f"skipped {index.key(7)}: its bytes in" in log
    code, log = try_train(
        tmp_path / "strict", broken, "--curriculum.stages", "[{latents: 0, skip: 0, epochs: 1}]", "--data.max_bad", "0"
    )
    assert code == 2
    assert "error: 1 samples could not be used, more than data.max_bad 0" in log


def test_overlong_rows_are_counted(data, tmp_path):
    """Rows above the limit lose steps, or are left out by option: both said, neither counted as bad."""
    look = "[{latents: 0, skip: 0, steps: 2, where: {kind: [look]}}]"
    short = ["--curriculum.stages", look, "--prompt.max_tokens", "130", "--train.val_samples", "0"]
    log = train(tmp_path / "cut", data, *short)
    assert re.search(r"so far 0 bad samples, 0 rows too long, [1-9][0-9]* reasoning steps cut to fit", log)
    code, log = try_train(tmp_path / "skipped", data, *short, "--prompt.overlong", "skip")
    assert code == 2
    assert "error: no row of step 1 can be trained on: 8 are longer than prompt.max_tokens 130" in log


def test_damaged_checkpoint_is_passed_over(data, tmp_path):
    """Refused where the stage asked for starts from it; then its own stage goes on from the one before, on 2 ranks."""
    out = tmp_path / "run"
    train(out, data, "--stages", "0", ranks=2)
    before = losses(out)
    *_, one_before, newest = Checkpoints(out).all()
    victim = sorted(newest.path.rglob("*optim_states.pt"))[-1]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    code, log = try_train(out, data, "--stages", "1", ranks=2)
    assert code == 2
    assert f"error: checkpoint {newest.path}: {victim.name} is damaged; set aside as damaged-{newest.path.name}" in log
    assert "error: stage 1 starts from the end of stage 0" in log
    log = train(out, data, "--stages", "0", ranks=2)
    assert f"resumed from {one_before.path}" in log and one_before.state.step == 6
    assert losses(out) == before and newest.path.exists()


def test_tensorboard(whole_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole_run / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    for name in [
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "speed/tokens_per_s",
        "speed/samples_per_s",
        "time/data_wait",
        "time/forward",
        "time/backward",
        "time/step",
        "memory/allocated_gb",
        "curriculum/stage",
        "latent/norm",
        "latent/selection_entropy",
        "latent/coverage",
        "val/loss",
        "val/accuracy",
    ]:
        assert name in tags, name
    assert [e.value for e in events.Scalars("curriculum/stage")] == [0] * 4 + [1] * 4 + [2] * 4
    last = events.Scalars("latent/coverage")[-1].value
    assert last == pytest.approx(4 / 9), "two steps of two patches of nine"


def test_checkpoint_names_its_base_and_settings(whole_run, data):
    """What resuming compares; config.yaml says the same settings."""
    state = Checkpoints(whole_run).all()[-1].state
    assert state.base_hash == base_hash(whole_run / "base", weights=False)
    assert state.settings_hash == settings_hash(load_config(whole_run / "config.yaml", {}))


def test_best_comes_from_validation(whole_run):
    best = json.loads((whole_run / "best-stage2.json").read_text())
    assert (whole_run / "checkpoints" / best["checkpoint"] / "manifest.json").exists()


def test_timing_of_lease(tmp_path):
    """A holder that no longer exists is replaced at once; a living one is not."""
    first = Lease(tmp_path)
    first.acquire()
    with pytest.raises(UserError, match=r"is in use by process \d+ on .*, which renewed its lease \d+ s ago; stop it"):
        Lease(tmp_path).acquire(grace=0.1)
    content = json.loads((tmp_path / "lease.json").read_text())
    content["started"] = "0"  # another process had this number
    (tmp_path / "lease.json").write_text(json.dumps(content))
    began = time.monotonic()
    second = Lease(tmp_path)
    second.acquire()
    assert time.monotonic() - began < 5
    second.release()
    assert json.loads((tmp_path / "lease.json").read_text())["released"]


HANGING = """
import os, time
from pathlib import Path
from pipeline.latent.parts import FEEDBACKS, Feedback

@FEEDBACKS.add("hanging")
class Hanging(Feedback):
    def forward(self, reading):
        steps = Path("{out}/metrics.jsonl")
        while os.environ["RANK"] == "1" and steps.exists() and steps.read_text().count("global_step") >= 2:
            time.sleep(1)
        return reading.tip[:, None]
"""


def test_a_rank_that_hangs_ends_the_run(data, tmp_path):
    """One rank never comes back from forward; the other waits for it.  Both say so, and end."""
    out, plugin = tmp_path / "run", tmp_path / "hanging.py"
    plugin.write_text(HANGING.format(out=out))
    stages = "[{latents: 1, skip: 1, steps: 8}]"
    code, log = try_train(
        out, data, "--plugin", str(plugin), "--latent.feedback", "hanging", "--curriculum.stages", stages,
        "--train.hang_minutes", "0.1", "--train.val_samples", "0", "--train.checkpoint_every", "0", ranks=2,
    )  # fmt: skip
    assert code == HUNG, log[-4000:]
    rank1 = r"rank 1 on \S+ hangs: training \(forward\) for 0\.\d min, since [\d:]+"
    logs = [(out / "logs" / f"rank{rank}.log").read_text() for rank in (0, 1)]
    culprit = re.search(rank1 + r"; 1 of 2 ranks wait for that; a part may take 0\.1 min", logs[0])
    assert culprit and culprit[0] in log, "rank 0's screen names the rank that the others wait for"
    assert re.search(rank1, logs[1]) and "waits" not in logs[1]
    assert f'"{plugin}", line' in logs[1] and f'"{plugin}", line 10' not in logs[0]
    beat = read_beat(out)
    assert beat.phase == "failed" and culprit[0] in beat.reason and beat.where.step in (2, 3)


POISONED = """
import os, torch
from pathlib import Path
from pipeline.latent.parts import FEEDBACKS, Feedback

@FEEDBACKS.add("poisoned")
class Poisoned(Feedback):
    def forward(self, reading):
        steps = Path("{out}/metrics.jsonl")
        done = steps.read_text().count("global_step") if steps.exists() else 0
        bursts = [list(map(int, burst.split("-"))) for burst in os.environ["POISON"].split()]
        # of the first rank alone: the others learn of it
        bad = any(first <= done <= last for first, last in bursts)
        bad = bad and os.environ["RANK"] == "0" and torch.is_grad_enabled()
        return reading.tip[:, None] * (torch.nan if bad else 1.0)
"""


@pytest.fixture
def poisoned(data, tmp_path, monkeypatch):
    """Start a run of which some steps (the first is 0) meet what is no number, on one rank."""
    out, plugin = tmp_path / "run", tmp_path / "poisoned.py"
    plugin.write_text(POISONED.format(out=out))

    def run(steps, *options, rollback_after=3, stages="[{latents: 1, skip: 1, steps: 16}]", ds="zero3"):
        monkeypatch.setenv("POISON", steps)
        code, log = try_train(
            out, data, "--plugin", str(plugin), "--latent.feedback", "poisoned", "--curriculum.stages", stages,
            "--train.rollback_after", str(rollback_after), "--train.export", "none", *options, ranks=2, ds=ds,
        )  # fmt: skip
        entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [entry["global_step"] for entry in entries] == list(range(len(entries)))
        return code, log, entries, out

    return run


@pytest.mark.parametrize("ds", ["zero2", "zero3"])
def test_steps_that_are_no_number_are_left_out_or_undone(poisoned, ds):
    """Five steps: the first three are left out, then the checkpoint before them is taken again; two more, and on."""
    code, log, entries, out = poisoned("8-12", ds=ds)
    assert code == 0, log[-4000:]
    wrong = [entry for entry in entries if "wrong" in entry]
    assert [entry["step"] for entry in wrong] == [9, 10, 11, 12, 13] and len(entries) == 16
    assert all(entry["loss"] is None and len(entry["keys"]) == 8 for entry in wrong)
    assert all(entry["loss"] > 0 and "keys" not in entry for entry in entries if entry not in wrong)
    assert "rolled back: went back to stage0-step000006; training goes on behind step 11" in log
    assert f"stage 0 step 9 went wrong: loss nan, gradient norm inf: not applied; rows {wrong[0]['keys'][0]}" in log
    last = Checkpoints(out).all()[-1].state
    assert (last.step, last.guard.skipped, last.guard.rollbacks, last.guard.in_a_row) == (16, 5, 1, 0)
    steps = {checkpoint.state.step for checkpoint in Checkpoints(out).all()}
    assert steps == {6, 15, 16}, "of steps 9 and 12, which went wrong, there is none"
    assert read_beat(out).where.skipped == 5


def test_steps_that_stay_no_number_stop_the_run(poisoned):
    code, log, entries, out = poisoned("8-99")
    assert code == 2, log[-4000:]
    assert len(entries) == 14
    assert "error: stage 0 step 14: loss nan, gradient norm inf: not applied, at a learning rate of" in log
    assert "3 in a row went wrong" in log and "going back to stage0-step000006 did not help" in log
    assert "Traceback" not in log
    # the rows were to blame, say; they are gone: the same command goes on where it was right
    code, log, entries, out = poisoned("99-99")
    assert code == 0 and "resumed from" in log and len(entries) == 16
    assert not any("wrong" in entry for entry in entries)


def test_two_faults_that_have_nothing_to_do_with_each_other(poisoned):
    """Both go back to the same checkpoint, the end of the stage before, as no other is due between them."""
    stages = "[{latents: 0, skip: 0, steps: 2}, {latents: 1, skip: 1, steps: 26}]"
    code, log, entries, out = poisoned("3-5 22-24", "--train.checkpoint_every", "0", stages=stages)
    assert code == 0, log[-4000:]
    told = [line for line in log.splitlines() if "rolled back: " in line]
    assert ["went back to stage0-step000002; training goes on behind step 4" in told[0], len(told)] == [True, 2], told
    assert "went back to stage0-step000002; training goes on behind step 23" in told[1]
    assert [entry["global_step"] for entry in entries if "wrong" in entry] == [3, 4, 5, 22, 23, 24]
    last = Checkpoints(out).all()[-1].state
    assert (last.stage, last.step, last.guard.skipped, last.guard.rollbacks) == (1, 26, 6, 2)


def test_nothing_to_go_back_to(poisoned):
    code, log, entries, _ = poisoned("0-99", rollback_after=0)
    assert code == 2 and len(entries) == 1
    assert "error: stage 0 step 1: loss nan" in log
