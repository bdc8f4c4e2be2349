"""slurm/ on a real two-node Slurm on this machine: first with a stand-in for training, then with training."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from data_prep import cli
from data_prep.errors import UserError
from data_prep.files import sha256
from pipeline.recipe import load_config
from tests.slurm_cluster import Cluster, unavailable

ROOT = Path(__file__).resolve().parents[1]
STAGES = [0, 1, 2, 3]
SMALL = ("--gpus-per-node=2", "--ntasks-per-node=1", "--mem=1G")
"""Options of jobs of which several fit at once."""


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs inherit the environment: this one's settings are not what is tested."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("HEALTH_CHECK", "0")


# What PYTHON names in most tests.  Every rank meets rank 0 at MASTER_ADDR:MASTER_PORT, as in a process group,
# and leaves a record; STAND_IN says how it ends.
STAND_IN = """\
#!{python} -IS
import json, os, pathlib, shutil, signal, socket, sys, time
env = dict(os.environ)
option = dict(zip(sys.argv[2::2], sys.argv[3::2]))
program = sys.argv[1] if sys.argv[1] != "-m" else sys.argv[2]
if program == env.get("ASKED_IN") != "pipeline/train.py" and "SLURM_RESTART_COUNT" not in env:
    pathlib.Path(env["OUT"], "ready" + env["SLURM_PROCID"]).touch()
    time.sleep(60)
if program == "slurm/health.py":
    if sys.argv[2] == "judge":
        os.execv("{python}", ["{python}", "-IS", *sys.argv[1:]])
    folder, host = pathlib.Path(sys.argv[4]), socket.gethostname()
    (folder / host).write_text(sys.argv[6])
    unfit = env.get("UNFIT", "").partition(" ")
    problems = [unfit[2]] if unfit[0] in (host, "all") else []
    if problems == ["silent"]:
        time.sleep(60)
    print(json.dumps({{"node": host, "time": time.time(), "problems": problems}}))
    sys.exit(0)
if program != "pipeline/train.py":
    if program == "slurm/recipe.py" and option.get("--make") is None:
        print("stages=5")
        print("make_data=1")
    with open("programs", "a") as file:
        print(*sys.argv[1:], file=file)
    sys.exit(0)
asked = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda *_: asked.append(1))
rank, world = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
address = env["MASTER_ADDR"], int(env["MASTER_PORT"])
if rank == 0:
    server = socket.create_server(("", address[1]))
    peers = [server.accept()[0] for _ in range(world - 1)]
    met = sorted([0] + [int(peer.recv(9)) for peer in peers])
    for peer in peers:
        peer.sendall(json.dumps(met).encode())
        peer.close()
else:
    for _ in range(200):
        try:
            peer = socket.create_connection(address)
            break
        except OSError:
            time.sleep(0.05)
    peer.sendall(str(rank).encode())
    met = json.loads(peer.makefile().read())
out = pathlib.Path(option["--out"])
(out / "ranks").mkdir(parents=True, exist_ok=True)
record = {{"host": socket.gethostname(), "met": met, "argv": sys.argv[1:], "env": env, "cwd": os.getcwd()}}
(out / "ranks" / f"{{rank}}.json").write_text(json.dumps(record))
how = env.get("STAND_IN", "done")
if how.startswith("exit") or how.startswith("crash") and "SLURM_RESTART_COUNT" not in env:
    if rank == world - 1:
        status = int(how.split()[1])
        sys.exit(status) if status > 0 else os.kill(os.getpid(), -status)
    time.sleep(60)
if how == "cancelled":
    (out / f"ready{{rank}}").touch()
    while not asked:
        time.sleep(0.02)
    sys.exit(1)
if how.startswith("to and fro"):
    if rank:
        time.sleep(60)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    if int(env.get("SLURM_RESTART_COUNT", "0")) % 2 == 0:
        (out / "checkpoints" / "stage0-step000008").mkdir(parents=True)
        (out / "checkpoints" / "stage0-step000008" / "manifest.json").touch()
    sys.exit(1)
if how == "asked" and "SLURM_RESTART_COUNT" not in env:
    (out / f"ready{{rank}}").touch()
    while not asked:
        time.sleep(0.02)
    if rank == 0:
        (out / "checkpoints" / "stage0-step000003").mkdir(parents=True)
        (out / "checkpoints" / "stage0-step000003" / "manifest.json").touch()
        sys.exit(75)
    time.sleep(60)
if how.split()[0] in ("done", "asked", "crash") and rank == 0:
    (out / f"stage{{option['--stages']}}.done").write_text("{{}}")
print("trained")
"""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := unavailable():
        pytest.skip(reason)
    with Cluster(nodes=2, gpus=8) as cluster:
        yield cluster


@dataclass
class Project:
    """A checkout whose training is the stand-in."""

    root: Path
    cluster: Cluster

    def run(self, *command: str, **env: str) -> tuple[dict[str, str], str]:
        """sbatch, wait; the job's fields and its log."""
        env = {"PYTHON": str(self.root / "stand-in"), **env}
        fields = self.cluster.wait(self.cluster.submit(*command, env=env, cwd=self.root))
        log = self.root / "slurm" / "logs" / f"{fields['JobName']}-{fields['JobId']}.out"
        assert fields["StdOut"] == str(log)
        return fields, log.read_text()

    def ranks(self, out: str = "runs/demo") -> list[dict]:
        """What the ranks recorded, by rank."""
        files = sorted((self.root / out / "ranks").iterdir(), key=lambda path: int(path.stem))
        assert [int(path.stem) for path in files] == list(range(len(files)))
        return [json.loads(path.read_text()) for path in files]


def checkout(folder: Path) -> Path:
    """The launch scripts, unmodified, and as much of a project as they look for."""
    shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("*.out"))
    for name in ("pipeline/train.py", "ds_configs/zero3.json"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).touch()
    stand_in = folder / "stand-in"
    stand_in.write_text(STAND_IN.format(python=os.path.realpath(sys.executable)))
    stand_in.chmod(0o755)
    return folder


@pytest.fixture
def project(tmp_path: Path, cluster: Cluster) -> Project:
    return Project(checkout(tmp_path / "a project"), cluster)


# ---- what the job files ask for ----------------------------------------------------------------------------
@pytest.mark.parametrize("stage", STAGES)
def test_job_files_are_accepted_as_they_are(cluster: Cluster, stage: int) -> None:
    done = cluster.run("sbatch", "--test-only", f"slurm/stage{stage}.sbatch", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "using 128 processors on nodes node[1-2]" in done.stderr


def test_stages_differ_in_their_number_only() -> None:
    def settings(stage: int) -> str:
        lines = (ROOT / f"slurm/stage{stage}.sbatch").read_text().splitlines()
        code = [line for line in lines if not line.startswith("# ")]
        return "\n".join(code).replace(f"stage{stage}", "stageN").replace(f'" {stage} ', '" N ')

    assert settings(0).count("N") == 2
    assert {settings(stage) for stage in STAGES} == {settings(0)}


# ---- what reaches the ranks --------------------------------------------------------------------------------
def test_one_rank_per_gpu_on_both_nodes(project: Project) -> None:
    stale = {"RANK": "5", "LOCAL_RANK": "5", "WORLD_SIZE": "6"}
    options = ("--train.seed", "7", "--prompt.text", "two words, *")
    job, log = project.run("slurm/stage1.sbatch", *options, DATA="data/here", EXTRA="--optim.lr \n 1e-5\n", **stale)
    assert job["JobState"] == "COMPLETED", log
    assert (job["JobName"], job["NumNodes"], job["NumTasks"]) == ("ivtlr-stage1", "2", "16")
    assert job["TresPerNode"] == "gres:gpu:8"
    ranks = project.ranks()
    assert len(ranks) == 16
    port = str(20000 + int(job["JobId"]) % 12000)
    for rank, record in enumerate(ranks):
        env = record["env"]
        assert record["host"] == f"node{1 + rank // 8}"
        assert record["met"] == list(range(16))
        assert (env["SLURM_PROCID"], env["SLURM_LOCALID"], env["SLURM_NTASKS"]) == (
            str(rank), str(rank % 8), "16",
        )  # fmt: skip
        assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("node1", port)
        assert not stale.keys() & env.keys()
        assert env["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
        assert env["OMP_NUM_THREADS"] == "8"
        assert record["cwd"] == str(project.root)
        assert env["PATH"].split(":")[0] == str(project.root)
        assert record["argv"] == [
            "pipeline/train.py", "--ds", "ds_configs/zero3.json", "--recipe", "recipes/demo.yaml",
            "--out", "runs/demo", "--stages", "1", "--data", "data/here",
            "--optim.lr", "1e-5", *options,
        ]  # fmt: skip
    assert {f"{rank:2}: trained" for rank in range(16)} < set(log.splitlines())


def test_sbatch_options_and_variables_change_the_number_of_ranks(project: Project) -> None:
    (project.root / ".venv" / "bin").mkdir(parents=True)
    (project.root / ".venv" / "bin" / "python").symlink_to(project.root / "stand-in")
    shape = ("--nodes", "1", "--gpus-per-node", "2")
    env = {
        "PYTHON": "",
        "RECIPE": "recipes/a.b.yaml",
        "OMP_NUM_THREADS": "3",
        "SRUN_EXTRA": "--cpus-per-task=4",
    }
    job, log = project.run(*shape, "slurm/stage0.sbatch", **env)
    assert job["JobState"] == "COMPLETED", log
    ranks = project.ranks("runs/a.b")
    assert [record["host"] for record in ranks] == ["node1"] * 2
    env = ranks[1]["env"]
    assert (env["OMP_NUM_THREADS"], env["SLURM_CPUS_PER_TASK"], env["CUDA_VISIBLE_DEVICES"]) == (
        "3",
        "4",
        "0,1",
    )

    only = "--export=TASKS_PER_NODE=2,OUT=runs/cpu,HEALTH_CHECK=0,SLURM_DISTRIBUTION=cyclic"
    job, log = project.run("--gpus-per-node", "0", only, "slurm/stage0.sbatch")
    assert job["JobState"] == "COMPLETED", log
    ranks = project.ranks("runs/cpu")
    assert [record["host"] for record in ranks] == ["node1", "node1", "node2", "node2"]
    assert ranks[0]["env"]["SLURM_CPUS_PER_TASK"] == "32"

    job, log = project.run("--gpus-per-node", "0", "slurm/stage0.sbatch")
    assert job["ExitCode"] == "2:0"
    assert log.startswith("error: no GPUs in this job: "), log


# ---- how a job ends ----------------------------------------------------------------------------------------
def test_one_failing_rank_ends_the_job_and_the_stages_after_it(project: Project) -> None:
    env = {"PYTHON": str(project.root / "stand-in"), "STAND_IN": "exit 7"}
    submit = project.cluster.submit
    first = submit("--no-requeue", "slurm/stage0.sbatch", env=env, cwd=project.root)
    second = submit(f"--dependency=afterok:{first}", "slurm/stage1.sbatch", env=env, cwd=project.root)
    job = project.cluster.wait(first, seconds=30)
    log = Path(job["StdOut"]).read_text()
    assert job["JobState"] == "FAILED", log
    assert "srun: error: node2: task 15: Exited with exit code 7" in log.splitlines()
    assert log.splitlines()[-1].startswith("error: stage 0: training ended with status 7; ")
    assert job["Restarts"] == "0"
    assert project.cluster.wait(second)["JobState"] == "CANCELLED"


def test_no_marker_is_a_failure(project: Project) -> None:
    job, log = project.run("slurm/stage3.sbatch", STAND_IN="no marker")
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0")
    assert log.splitlines()[-1] == "error: stage 3: training ended without writing runs/demo/stage3.done"


# ---- going on by itself ------------------------------------------------------------------------------------
def asked_to_stop(project: Project, *signal: str, program: str = "pipeline/train.py", out: str = "") -> int:
    """A job of 2 ranks that got a signal while they were in a program; `scancel` with its options."""
    out = out or f"runs/{Path(program).stem}"
    env = {"PYTHON": str(project.root / "stand-in"), "STAND_IN": "asked", "TASKS_PER_NODE": "1", "OUT": out}
    env |= {"ASKED_IN": program, "HEALTH_CHECK": "30", "LOCAL_DATA": "/local", "DATA": "data"}
    (project.root / "data").mkdir(exist_ok=True)
    (project.root / "data" / "manifest.json").touch()
    job = project.cluster.submit(*SMALL, "slurm/stage0.sbatch", env=env, cwd=project.root)
    while not all((project.root / out / f"ready{rank}").exists() for rank in range(2)):
        assert project.cluster.job(job)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING")
        time.sleep(0.1)
    project.cluster.run("scancel", *signal, str(job))
    return job


def test_a_stage_that_was_asked_to_stop_goes_on_by_itself_and_a_cancelled_one_does_not(project: Project) -> None:
    """Before it handles signals, too: nobody's node is unfit for that."""
    programs = {"slurm/health.py": "its beginning", "slurm/local_data.py": "its beginning"}
    programs |= {"pipeline/train.py": "stage0-step000003"}
    jobs = {program: asked_to_stop(project, "--signal=USR1", program=program) for program in programs}
    cancelled = asked_to_stop(project, out="runs/cancelled")
    after = f"--dependency=afterok:{jobs['pipeline/train.py']}"
    second = project.cluster.submit("--wrap=true", "--output=/dev/null", after, "--kill-on-invalid-dep=yes")
    for program, job in jobs.items():
        fields = project.cluster.wait(job)
        log, out = Path(fields["StdOut"]).read_text(), f"runs/{Path(program).stem}"
        assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log
        assert f"training was asked to stop; queued again, to go on from {programs[program]}\n" in log
        # one log of both starts
        assert log.count(f"stage 0 of {out}, 2 nodes x 1 ranks") == 1 + (program == "pipeline/train.py")
        # a step number of its own: the srun of a start that was cut off would end one of the same number
        assert project.ranks(out)[0]["env"]["SLURM_STEP_ID"] == "5"
        names = {path.name for path in (project.root / out).iterdir() if not path.name.startswith("ready")}
        assert names - {"checkpoints"} == {"ranks", "slurm_restarts", "stage0.done"}
    assert project.cluster.wait(second)["JobState"] == "COMPLETED"
    fields = project.cluster.wait(cancelled)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0")


def test_restarts_without_a_new_checkpoint_end(project: Project) -> None:
    old = project.root / "runs" / "demo" / "checkpoints" / "stage0-step000004"
    old.mkdir(parents=True)
    (old / "manifest.json").touch()
    (old.parent / "stage0-step000005").mkdir()  # not complete
    (old.parents[1] / "slurm_restarts").write_text("1 9 stage0-step000004\n")  # another job's are not counted
    job, log = project.run("slurm/stage0.sbatch", STAND_IN="exit 75", MAX_FRUITLESS="1", TASKS_PER_NODE="1")
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "1"), log
    assert log.count("queued again, to go on from stage0-step000004") == 1
    assert log.splitlines()[-1].startswith(
        "error: stage 0: training was asked to stop; started 2 times without getting past stage0-step000004, so not"
    )


def test_a_stage_that_broke_down_goes_on_by_itself(project: Project) -> None:
    """An exception, a hang, a kill."""
    env = {"PYTHON": str(project.root / "stand-in"), "TASKS_PER_NODE": "1"}
    jobs = {}
    for status, ending in {1: 1, 70: 70, 137: -9}.items():
        own = env | {"STAND_IN": f"crash {ending}", "OUT": f"runs/{status}"}
        jobs[status] = project.cluster.submit(*SMALL, "slurm/stage0.sbatch", env=own, cwd=project.root)
    for status, job in jobs.items():
        fields = project.cluster.wait(job)
        log = Path(fields["StdOut"]).read_text()
        assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log
        told = f"training ended with status {status}; the ranks' own errors, or srun's, are above; queued again, to go"
        assert told in log


def test_one_that_breaks_down_again_and_again_does_not(project: Project) -> None:
    env = {"STAND_IN": "exit 1", "TASKS_PER_NODE": "1", "MAX_FRUITLESS": "1"}
    job, log = project.run("slurm/stage0.sbatch", **env)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "1"), log
    told = "training ended with status 1; the ranks' own errors, or srun's, are above"
    assert log.splitlines()[-1].startswith(f"error: stage 0: {told}; started 2 times without getting past its")


def test_restarts_by_slurm_itself_are_counted(project: Project) -> None:
    file = project.root / "runs" / "demo" / "slurm_restarts"
    file.parent.mkdir(parents=True)

    def run(counted: str) -> tuple[str, str]:
        env = {"PYTHON": str(project.root / "stand-in"), "SLURM_RESTART_COUNT": "1"}
        job = project.cluster.submit("--hold", "slurm/stage0.sbatch", env=env, cwd=project.root)
        file.write_text(f"{job} {counted} \n")
        project.cluster.run("scontrol", "release", str(job))
        fields = project.cluster.wait(job)
        return fields["ExitCode"], Path(fields["StdOut"]).read_text()

    code, log = run("3")
    assert code == "2:0"
    (line,) = log.splitlines()
    assert line.startswith("error: stage 0: started 4 times without getting past its beginning, so not again: ")
    # a damaged file counts nothing, and nothing in it is run
    code, log = run("UID[$(touch${IFS}ran)]")
    assert code == "0:0", log
    assert not (project.root / "ran").exists()


def test_a_checkpoint_that_is_lost_again_is_no_progress(project: Project) -> None:
    job, log = project.run(*SMALL, "slurm/stage0.sbatch", STAND_IN="to and fro", TASKS_PER_NODE="1", MAX_FRUITLESS="1")
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "2"), log
    assert "started 2 times without getting past stage0-step000008, so not again" in log


def test_one_that_crashes_when_it_is_cancelled_is_not_tried_again(project: Project) -> None:
    env = {"PYTHON": str(project.root / "stand-in"), "STAND_IN": "cancelled", "TASKS_PER_NODE": "1"}
    job = project.cluster.submit(*SMALL, "slurm/stage0.sbatch", env=env, cwd=project.root)
    deadline = time.monotonic() + 60
    while not all((project.root / "runs" / "demo" / f"ready{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    project.cluster.run("scancel", str(job))
    fields = project.cluster.wait(job)
    assert (fields["JobState"], fields["Restarts"]) == ("CANCELLED", "0"), Path(fields["StdOut"]).read_text()


def other_scontrol(project: Project, *lines: str) -> str:
    """A PATH whose scontrol runs `lines` first; in these, $real is Slurm's own."""
    folder = project.root / "other"
    folder.mkdir(exist_ok=True)
    real = f"real={shutil.which('scontrol')}"
    (folder / "scontrol").write_text("\n".join(["#!/bin/bash", real, *lines, 'exec "$real" "$@"', ""]))
    (folder / "scontrol").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_a_controller_that_is_away_for_a_while(project: Project) -> None:
    """A network that fails ends training, and keeps the job's script from Slurm; it waits."""
    asked = project.root / "asked"
    path = other_scontrol(
        project,
        f"if [[ $1 == show && $2 == job && ! -e {shlex.quote(str(asked))} ]]; then",
        f"  touch {shlex.quote(str(asked))}",
        '  echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2',
        "  exit 1",
        "fi",
    )
    job, log = project.run(*SMALL, "slurm/stage0.sbatch", STAND_IN="crash 1", TASKS_PER_NODE="1", PATH=path)
    assert asked.exists()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log


def test_a_job_that_is_just_being_told_a_signal(project: Project) -> None:
    """Slurm's word for its state is then another one, until each node has answered."""
    told = project.root / "told"
    path = other_scontrol(
        project,
        "if [[ $1 == show && $2 == job ]]; then",
        f'  "$real" "$@" | sed "s/ JobState=RUNNING / JobState=SIGNALING /" | tee -a {shlex.quote(str(told))}',
        "  exit",
        "fi",
    )
    for status in ("75", "1"):
        env = {"STAND_IN": f"crash {status}", "OUT": f"runs/{status}", "TASKS_PER_NODE": "1", "PATH": path}
        job, log = project.run(*SMALL, "slurm/stage0.sbatch", **env)
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
        assert " JobState=SIGNALING " in told.read_text()
        told.unlink()


def test_other_endings_are_not_tried_again(project: Project) -> None:
    job, log = project.run("slurm/stage0.sbatch", STAND_IN="exit 130", TASKS_PER_NODE="1")
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "130:0", "0"), log
    job, log = project.run("slurm/stage0.sbatch", STAND_IN="exit 2", TASKS_PER_NODE="1")
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), log
    job, log = project.run("--no-requeue", "slurm/stage0.sbatch", STAND_IN="exit 75", TASKS_PER_NODE="1")
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "75:0", "0"), log
    assert log.splitlines()[-1] == "stage 0: stopped on request; submit it again to go on"


# ---- nodes that are not fit ----------------------------------------------------------------------------------
def test_a_node_that_does_not_answer_is_left_out(project: Project) -> None:
    shape = ("--nodes=1", "slurm/stage0.sbatch")
    job, log = project.run(*shape, TASKS_PER_NODE="1", HEALTH_CHECK="3", UNFIT="node1 silent")
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log
    assert (job["NodeList"], job["ExcNodeList"]) == ("node2", "node1")
    told = "did not answer within 3 s"
    assert f"node node1 is not fit: {told}" in log.splitlines()
    out = project.root / "runs" / "demo"
    assert "node1 not fit for training (see runs/demo/bad_nodes); queued again, to go on from its beginning" in log
    (line,) = (out / "bad_nodes").read_text().splitlines()
    assert line.split("\t")[1:] == [f"job {job['JobId']}", "node1", told]
    assert sorted(path.name for path in out.glob("slurm*")) == ["slurm_restarts"]


def test_nodes_of_which_none_is_fit_end_the_job(project: Project) -> None:
    job, log = project.run("slurm/stage0.sbatch", TASKS_PER_NODE="1", UNFIT="all packages: no torch", HEALTH_CHECK="9")
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), log
    assert log.count("is not fit: packages: no torch") == 2
    assert log.splitlines()[-1].startswith(
        "error: stage 0: the nodes are not fit for training, and others would not be; "
    )
    job, log = project.run("slurm/stage0.sbatch", TASKS_PER_NODE="1", UNFIT="all packages: no torch", HEALTH_CHECK="0")
    assert job["JobState"] == "COMPLETED", log


def test_a_job_that_may_not_be_queued_again_names_the_node(project: Project) -> None:
    env = {"TASKS_PER_NODE": "1", "UNFIT": "node2 GPU: wrong", "HEALTH_CHECK": "9"}
    for option in ("--no-requeue", "--nodelist=node[1-2]"):
        job, log = project.run(option, "slurm/stage0.sbatch", **env)
        assert (job["JobState"], job["Restarts"]) == ("FAILED", "0"), log
        assert log.splitlines()[-1] == "error: stage 0: submit it again with --exclude=node2"


# ---- a whole run -------------------------------------------------------------------------------------------
def submit_all(project: Project, *options: str, **env: str) -> list[str]:
    env = {"PYTHON": str(project.root / "stand-in"), "TASKS_PER_NODE": "1", **env}
    root = project.root.name
    script = f"{root}/slurm/submit_all.sh"
    done = project.cluster.run(script, *options, env={"IVTLR_ROOT": root, **env}, cwd=project.root.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_dry_run_prints_what_would_be_submitted(project: Project) -> None:
    (project.root / "runs" / "demo").mkdir(parents=True)
    (project.root / "runs" / "demo" / "stage0.done").write_text("{}")
    lines = submit_all(project, "--dry_run", "--optim.lr", "1e-5", "--prompt.text", "a b", SBATCH_EXTRA="--nodes 1")
    after = "sbatch --parsable --dependency=afterok:{} --kill-on-invalid-dep=yes "
    options = "--optim.lr 1e-5 --prompt.text a\\ b"
    assert lines == [
        f"sbatch --parsable slurm/prep.sbatch {options}",
        "stage0: done already",
        f"{after.format('prep')}--nodes 1 slurm/stage1.sbatch {options}",
        f"{after.format('stage1')}--nodes 1 slurm/stage2.sbatch {options}",
        f"{after.format('stage2')}--nodes 1 slurm/stage3.sbatch {options}",
        f"{after.format('stage3')}--nodes 1 --job-name=ivtlr-stage4 slurm/stage.sbatch 4 {options}",
        f"{after.format('stage4')}slurm/evaluate.sbatch",
    ]
    assert not list((project.root / "slurm" / "logs").glob("*.out"))


def test_a_whole_run_is_prepared_trained_and_evaluated(project: Project) -> None:
    lines = submit_all(project, "--optim.lr=1e-5", DATA="data/x", EXTRA="--train.seed=7", EVALUATE_EXTRA="--limit 9")
    names = ["prep", "stage0", "stage1", "stage2", "stage3", "stage4", "evaluate"]
    jobs = [line.split(": job ") for line in lines[: len(names)]]
    assert [name for name, _ in jobs] == names
    assert lines[len(names) :] == [
        "watch: squeue --me",
        f"       tail -f slurm/logs/ivtlr-prep-{jobs[0][1]}.out",
        "       tensorboard --logdir runs/demo/tensorboard",
    ]
    for name, job in jobs:
        fields = project.cluster.wait(int(job))
        assert (fields["JobName"], fields["JobState"]) == (f"ivtlr-{name}", "COMPLETED")
    out = project.root / "runs" / "demo"
    assert {path.name for path in out.glob("stage?.done")} == {f"stage{stage}.done" for stage in range(5)}
    assert project.ranks()[0]["argv"][-4:] == ["--data", "data/x", "--train.seed=7", "--optim.lr=1e-5"]
    told = "--recipe recipes/demo.yaml --data data/x --train.seed=7 --optim.lr=1e-5"
    assert (project.root / "programs").read_text().splitlines() == [
        f"slurm/recipe.py {told}",
        f"slurm/recipe.py --make true {told}",
        "-m pipeline.evaluate --run runs/demo --data data/x --limit 9",
    ]


@pytest.mark.parametrize("script", ["prep.sbatch", "evaluate.sbatch", "stage.sbatch"])
def test_further_job_files_are_accepted_as_they_are(cluster: Cluster, script: str) -> None:
    done = cluster.run("sbatch", "--test-only", f"slurm/{script}", cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_run_folder_is_named_as_in_training(tmp_path: Path) -> None:
    """Recipes of one file name in two folders are two runs."""
    odd = tmp_path / "x.yaml"
    odd.write_text("train:\n  name: inner\nname: 'odd'  # really\r\n")
    best = "recipes/best/qwen2vl_m3cot.yaml"
    recipes = {best: best, "recipes/demo.yaml,recipes/methods/pause.yaml": "recipes/methods/pause.yaml"}
    for recipe, named in {**recipes, str(odd): str(odd)}.items():
        command = ". slurm/common.sh; recipe=$1; name_of_recipe"
        done = subprocess.run(
            ["bash", "-c", command, "x", recipe], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == yaml.safe_load((ROOT / named).read_text())["name"]


def test_what_a_recipe_asks_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "slurm" / "recipe.py"))["main"]
    own = {"recipe": str(ROOT / "tests" / "tiny.yaml"), "data": str(tmp_path / "data"), "train.val_samples": "0"}
    settings = own | {"data.options": "{grid: 3, colours: 6, train: 8, val: 0, test: 0}", "resume": "elastic"}
    main(**settings)
    assert capsys.readouterr().out == "stages=3\nmake_data=1\n"
    main(**settings, make=True)
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path / 'data'}: 8 training samples"
    main(**settings)
    assert capsys.readouterr().out == "stages=3\nmake_data=0\n"
    for name, meant in {"optim.lrr": "--optim.lr", "resum": "--resume"}.items():
        with pytest.raises(UserError, match=f"did you mean {meant}"):
            main(**settings, **{name: "1"})
    with pytest.raises(SystemExit):
        cli.run(main, [word for name, value in own.items() for word in (f"--{name}", value)] + ["--resume", "elsatic"])
    assert "error: --resume elsatic: expected one of" in capsys.readouterr().err


def processes_with(*words: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            given = (entry / "cmdline").read_bytes().decode().split("\0")
            found += [int(entry.name)] * all(word in given for word in words)
    return found


def test_preparation_goes_on_in_a_later_job_time(tmp_path: Path, cluster: Cluster) -> None:
    """As at its time limit: it is told before, keeps the shards that are done, and is queued again."""
    data = tmp_path / "data"
    env = {"PYTHON": sys.executable, "RECIPE": "tests/tiny.yaml", "DATA": str(data), "TASKS_PER_NODE": "1"}
    many = "--data.options={grid: 3, colours: 6, train: 4000, val: 16, test: 24}"
    prep = (f"--output={tmp_path}/prep.out", "slurm/prep.sbatch", many)
    job = cluster.submit(*prep, env=env, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list(data.glob(".parts/*.json")):
        assert time.monotonic() < deadline, (tmp_path / "prep.out").read_text()
        time.sleep(0.02)
    (maker,) = processes_with("data_prep.shard", str(data))
    os.kill(maker, signal.SIGSTOP)  # a fast machine would be done before the signal
    cluster.run("scancel", "--signal=USR1", "--batch", str(job))
    time.sleep(2)  # it is asked every half second
    os.kill(maker, signal.SIGCONT)
    fields, log = cluster.wait(job), (tmp_path / "prep.out").read_text()
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), log
    assert "the shards that are done stay, and the next start goes on from them" in log
    assert log.endswith(f"{data}: 4000 training samples\n")


def test_preparation_that_gets_no_further_is_not_queued_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = runpy.run_path(str(ROOT / "slurm" / "recipe.py"))["make_folder"]
    config = load_config(ROOT / "tests" / "tiny.yaml", {"data.path": str(tmp_path)})
    old, new = (tmp_path / ".parts" / f"train-00000{shard}.json" for shard in range(2))
    old.parent.mkdir()
    old.touch()
    done: list[Path] = []

    def stopped(*_: object) -> None:
        old.unlink(missing_ok=True)  # it was of other options
        for shard in done:
            shard.touch()
        raise UserError("could not be made")

    monkeypatch.setitem(make.__globals__, "make_data", stopped)
    with pytest.raises(UserError, match="could not be made"):
        make(config)
    monkeypatch.setattr(make.__globals__["STOP"], "requested", True)
    with pytest.raises(UserError, match="asked to stop before one more shard was done"):
        make(config)
    done.append(new)
    with pytest.raises(SystemExit, match="75"):
        make(config)


# ---- what is refused ---------------------------------------------------------------------------------------
def refused(folder: Path, script: str, *arguments: str, **env: str) -> str:
    """The error line of a script started outside of Slurm (or where `env` pretends)."""
    env = {"PATH": "/usr/bin:/bin", **env}
    command = ["bash", str(folder / "slurm" / script), *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    folder = checkout(tmp_path / "project")
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "node1", "SLURM_SUBMIT_DIR": str(folder)}
    here = {"IVTLR_ROOT": str(tmp_path)}
    script = "run_stage.sh"
    how = "not in a Slurm job; from the project root: sbatch slurm/stage2.sbatch"
    assert refused(folder, script, "2") == refused(folder, "stage2.sbatch") == f"error: {how}"
    assert refused(folder, script) == "error: give the stage's number: run_stage.sh STAGE [OPTION...]"
    where = f"error: {tmp_path} is not the project root; submit from there, or set IVTLR_ROOT"
    assert refused(folder, script, "2", **job | here) == where
    where = f"error: no {tmp_path}/slurm/run_stage.sh; submit from the project root, or set IVTLR_ROOT"
    assert refused(folder, "stage2.sbatch", **job | here) == where
    assert refused(folder, script, "2", **job, DS="no.json") == "error: no DeepSpeed config no.json; set DS"
    assert refused(folder, script, "2", **job, PYTHON="no/python") == "error: no Python at PYTHON=no/python"
    line = "error: a stage is one job, so not --array, nor one of parts"
    assert refused(folder, script, "2", **job, SLURM_ARRAY_JOB_ID="1") == line
    line = "error: MAX_FRUITLESS=few: expected a whole number"
    assert refused(folder, script, "2", **job, MAX_FRUITLESS="few") == line
    line = "error: HEALTH_CHECK=yes: expected seconds, or 0 for no check"
    assert refused(folder, script, "2", **job, HEALTH_CHECK="yes") == line
    assert "MAX_FRUITLESS=08: expected" in refused(folder, script, "2", **job, MAX_FRUITLESS="08")
    submit = "submit_all.sh"
    assert refused(folder, submit, DS="no.json") == "error: no DeepSpeed config no.json; set DS"
    line = "error: --recipe=x.yaml: the jobs take this from the variable RECIPE"
    assert refused(folder, submit, "--recipe=x.yaml") == line
    assert refused(folder, submit, "--stages", "1").startswith("error: --stages: this submits every stage ")
    bare = tmp_path / "bin"  # has bash, but no Python with DeepSpeed
    bare.mkdir()
    for program in ("bash", "dirname"):
        (bare / program).symlink_to(f"/bin/{program}")
    assert refused(folder, script, "2", **job, PATH=str(bare)) == (
        f"error: no Python environment: make .venv in {folder}, or set PYTHON to one that has DeepSpeed"
    )


# ---- the test cluster itself -------------------------------------------------------------------------------
def test_a_cluster_leaves_nothing_behind(cluster: Cluster) -> None:
    with pytest.raises(KeyboardInterrupt), Cluster(nodes=1, gpus=1) as other:
        job = other.submit("--output=/dev/null", "--wrap=sleep 60")
        assert other.job(job)["JobState"] in ("PENDING", "RUNNING")
        assert other.processes()
        raise KeyboardInterrupt
    assert not other.state.exists()
    assert not other.processes()


# ---- the real training program -----------------------------------------------------------------------------
def test_stages_train_one_after_another(tmp_path: Path, cluster: Cluster) -> None:
    out = tmp_path / "run"
    env = {
        "PYTHON": sys.executable,
        "RECIPE": "tests/tiny.yaml",
        "OUT": str(out),
        "DATA": str(tmp_path / "data"),
        "EXTRA": "--data.workers 0 --train.val_samples 0",
        "TASKS_PER_NODE": "1",
        "OMP_NUM_THREADS": "1",
    }

    def train(stage: int, **more: str) -> tuple[dict[str, str], str]:
        script = f"slurm/stage{stage}.sbatch"
        job = cluster.submit(f"--output={tmp_path}/%x.out", script, env=env | more, cwd=ROOT)
        fields = cluster.wait(job, seconds=120)
        return fields, (tmp_path / f"ivtlr-stage{stage}.out").read_text()

    job, log = train(0, HEALTH_CHECK="120")
    assert job["JobState"] == "COMPLETED", log
    assert "ZeRO-3 on 2 ranks" in log
    job, log = train(2)
    assert job["JobState"] == "FAILED", log
    assert [line for line in log.splitlines() if line.startswith("0: error: ")], log
    assert not (out / "stage2.done").exists()
    local = str(tmp_path / "local")
    digest = sha256(tmp_path / "data" / "manifest.json")[:12]  # not another folder of that name
    for stage in (1, 2):
        job, log = train(stage, LOCAL_DATA=local)
        assert log.count(f": {local}/data-{digest}: ") == 2  # a copy a node; here they share a disk
        assert job["JobState"] == "COMPLETED", log
        assert "resumed from" in log
        assert json.loads((out / f"stage{stage}.done").read_text())["stage"] == stage
