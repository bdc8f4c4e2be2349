"""Lost nodes on a real Slurm, with real training.  `python -m tests.slurm_faults` has more of them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import launch
from tests.slurm_cluster import Cluster, unavailable
from tests.slurm_faults import Job, PowerOff, PulledCable, check, survive

STEPS = 16


@pytest.mark.skipif(bool(unavailable()), reason=str(unavailable()))
def test_a_lost_node_and_a_pulled_cable(tmp_path: Path, data: Path) -> None:
    """Two jobs of two ranks: one's second node loses power, the other's rank 0 its network, but not the disk."""
    with Cluster(nodes=6) as cluster, ThreadPoolExecutor(3) as pool:
        lost, cut = (
            Job(cluster, tmp_path / name, data, nodes=2, steps=STEPS, env={"HEALTH_CHECK": "0"})
            for name in ("lost", "cut")
        )
        cable = PulledCable(0)
        ended = {job: pool.submit(survive, job, fault) for job, fault in ((lost, PowerOff(-1)), (cut, cable))}
        cut.until(lambda: hasattr(cable, "node") or ended[cut].done(), "the fault")
        # while Slurm waits for the silent nodes
        launch.train(tmp_path / "undisturbed", data, *lost.options, ranks=2)
        reference = launch.losses(tmp_path / "undisturbed")
        for job, future in ended.items():
            survived = future.result()
            assert survived.starts == 2
            check(job, reference, survived)
    lease = json.loads((tmp_path / "cut" / "lease.json").read_text())
    assert lease["host"] != cable.node
    assert lease["job"] == f"{cut.id}@test"
