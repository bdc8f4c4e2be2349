"""A real Slurm cluster of virtual nodes on this machine, for tests.

The controller and every node have their own host name, network address, processes and shared memory; the
nodes claim GPUs and CPUs that are not there, so that job files for GPU clusters are accepted as they are.
Everything lives in namespaces under one process that dies with this one, and in one temporary folder.
Needs Linux, root and `apt install slurm-wlm munge iproute2`.

    with Cluster(nodes=2) as cluster:
        job = cluster.submit("slurm/stage0.sbatch")
        print(cluster.wait(job)["JobState"])
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAMS = [
    "sbatch",
    "scontrol",
    "sinfo",
    "slurmctld",
    "slurmd",
    "munged",
    "ip",
    "unshare",
    "nsenter",
    "setpriv",
]
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # where daemons are
UNSHARE = ["unshare", "--net", "--uts", "--mount", "--pid", "--kill-child", "--mount-proc"]
ACTIVE = {"PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING"}

# cred_expire: how long a job that is queued again must wait, in seconds; 5 is the least, 120 the default.
# SlurmdTimeout: a node that is silent for two or three times as many seconds is down, and its jobs are queued again.
CONFIG = """\
ClusterName=test
SlurmctldHost=control(10.213.0.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={state}/munge.socket,cred_expire=5
StateSaveLocation={state}/control
SlurmdSpoolDir={state}/spool.%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd.%n.pid
SlurmctldLogFile={state}/log/slurmctld
SlurmdLogFile={state}/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
GresTypes=gpu
MinJobAge=3600
KillWait=2
ReturnToService=1
SlurmdTimeout=5
MessageTimeout=5
TCPTimeout=1
NodeName=node[1-{nodes}] NodeAddr=10.213.0.[1-{nodes}] CPUs={cpus} RealMemory=500000 Gres=gpu:{gpus}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def unavailable() -> str | None:
    """Why no cluster can be started here, or None."""
    if absent := [name for name in PROGRAMS if not shutil.which(name, path=PATH)]:
        return f"no {', '.join(absent)} on this machine (apt install slurm-wlm munge iproute2)"
    if os.geteuid() != 0:
        return "a test cluster needs root"
    probe = [*UNSHARE, "ip", "link", "add", "t0", "type", "veth", "peer", "name", "t1"]
    if subprocess.run(probe, capture_output=True, env=os.environ | {"PATH": PATH}, check=False).returncode:
        return "this machine does not allow new namespaces"
    return None


class Cluster:
    """One controller and `nodes` nodes, up between __enter__ and __exit__."""

    def __init__(self, nodes: int = 2, gpus: int = 8, cpus: int = 64) -> None:
        self.nodes, self.gpus, self.cpus = nodes, gpus, cpus

    def __enter__(self) -> Cluster:
        self.state = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: socket paths are limited
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_world"):
            self._world.kill()
            self._world.wait()
        for _attempt in range(100):  # the kernel ends what is in the namespaces a moment later; until then it may write
            shutil.rmtree(self.state, ignore_errors=True)
            if not self.state.exists() and not self.processes():
                break
            time.sleep(0.1)

    def processes(self) -> list[str]:
        """Commands of its daemons and nodes that run."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has just ended
                found.append(path.read_bytes().decode(errors="replace"))
        return [command for command in found if str(self.state) in command]

    def run(
        self, *command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the controller (a login node) and return it with its output."""
        enter = ["nsenter", f"--target={self._world.pid}", "--net", "--uts", "--mount"]
        if cwd is not None:
            enter.append(f"--wd={cwd}")
        own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))}
        own |= {"SLURM_CONF": str(self.state / "slurm.conf"), **(env or {})}
        return subprocess.run([*enter, *command], env=own, capture_output=True, text=True, timeout=60, check=False)

    def submit(self, *command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> int:
        """`sbatch COMMAND...`; return the job's id."""
        done = self.run("sbatch", "--parsable", *command, env=env, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """What `scontrol show job` says, by field."""
        shown = self.run("scontrol", "show", "job", "--oneliner", str(job))
        assert shown.returncode == 0, shown.stderr
        fields = re.split(r"\s+(?=[\w:/]+=)", shown.stdout.strip())  # values may hold blanks
        return dict(field.split("=", 1) for field in fields)

    def wait(self, job: int, seconds: float = 60) -> dict[str, str]:
        """The job's fields once it has ended.  A job that has not is cancelled, and an error."""
        deadline = time.monotonic() + seconds
        while (fields := self.job(job))["JobState"] in ACTIVE:
            if time.monotonic() > deadline:
                self.run("scancel", str(job))
                raise TimeoutError(f"job {job} is {fields['JobState']} after {seconds} s ({fields['Reason']})")
            time.sleep(0.1)
        return fields

    # ---- faults ------------------------------------------------------------------------------------------------
    def power_off(self, node: str) -> None:
        """Kill all that runs on a node, at once."""
        self._order("off", node)

    def power_on(self, node: str) -> None:
        """Boot a node that was powered off, and put it back into service."""
        self._order("on", node)
        self._until_up(node)

    def pull_cable(self, node: str) -> None:
        """Cut a node's network; what runs there runs on, and shares the disk."""
        self._link(node, "down")

    def plug_cable(self, node: str) -> None:
        """Give a node its network back."""
        self._link(node, "up")
        self._until_up(node)

    def node_state(self, node: str) -> str:
        """Such as IDLE, ALLOCATED, DOWN+NOT_RESPONDING."""
        return re.findall(r"State=(\S+)", self.run("scontrol", "show", "node", node).stdout)[0]

    def _link(self, node: str, state: str) -> None:
        done = self.run("ip", "link", "set", f"v{node.removeprefix('node')}", state)
        assert done.returncode == 0, done.stderr

    def _order(self, order: str, node: str) -> None:
        done = self.state / f"{order}.{node}.{time.monotonic_ns()}"
        (self.state / "orders").write_text(f"{order} {node.removeprefix('node')} {done}\n")
        _until(done.exists, f"{node} is not {order}")

    def _until_up(self, node: str) -> None:
        def up() -> bool:
            state = self.node_state(node)
            if "DOWN" in state and "NOT_RESPONDING" not in state:  # as an administrator does
                self.run("scontrol", "update", f"nodename={node}", "state=resume")
            return not {"DOWN", "NOT_RESPONDING", "DOWN*"} & set(re.split(r"\+", state))

        _until(up, f"{node} does not come back")

    def _start(self) -> None:
        state = self.state
        (state / "log").mkdir()
        key = state / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        addresses = "".join(f"10.213.0.{n} node{n}\n" for n in range(1, self.nodes + 1))
        (state / "hosts").write_text(f"127.0.0.1 localhost\n10.213.0.254 control\n{addresses}")
        devices = [state / f"gpu{n}" for n in range(self.gpus)]
        for device in devices:  # Slurm wants device files: twins of /dev/null
            os.mknod(device, 0o20666, os.makedev(1, 3))
        shape = {"nodes": self.nodes, "gpus": self.gpus, "cpus": self.cpus}
        (state / "slurm.conf").write_text(CONFIG.format(state=state, **shape))
        files = f"{state}/gpu[0-{self.gpus - 1}]"
        (state / "gres.conf").write_text(f"AutoDetect=off\nName=gpu Count={self.gpus} File={files}\n")

        # killed with this process, however that ends
        command = ["setpriv", "--pdeathsig", "KILL", *UNSHARE, "bash", str(HERE / "world.sh"), str(state)]
        command.append(str(self.nodes))
        with (state / "log" / "world").open("w") as log:
            self._world = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | {"PATH": PATH}
            )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and self._world.poll() is None:
            if (state / "started").exists():  # before that, nsenter would stay outside
                idle = self.run("timeout", "5", "sinfo", "--noheader", "--states=idle", "--format=%D").stdout
                if idle.strip() == str(self.nodes):
                    return
            time.sleep(0.1)
        logs = "".join(f"== {p.name}\n{p.read_text()[-2000:]}\n" for p in sorted((state / "log").iterdir()))
        raise RuntimeError(f"the test cluster did not come up:\n{logs}")


def _until(true: Callable[[], bool], otherwise: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)
