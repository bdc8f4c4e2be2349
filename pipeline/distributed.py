"""Ranks: who this process is, and the few things ranks agree on."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed import ops as deepspeed_ops
from deepspeed.accelerator import get_accelerator
from transformers.utils import logging as transformers_logging

from data_prep.errors import UserError
from pipeline.watching.activity import ACTIVITY

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)
"""How long ranks wait for rank 0 to prepare data or a base model."""


@dataclass(frozen=True)
class World:
    """This process among all of them, from the environment that its launcher set."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> World:
        """RANK, LOCAL_RANK and WORLD_SIZE (deepspeed, torchrun), or SLURM's own variables inside `srun`."""
        env = os.environ
        if "RANK" not in env and "SLURM_PROCID" in env and "MASTER_ADDR" in env:
            env.update(RANK=env["SLURM_PROCID"], LOCAL_RANK=env["SLURM_LOCALID"], WORLD_SIZE=env["SLURM_NTASKS"])
        rank, size = int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))
        return cls(rank, int(env.get("LOCAL_RANK", 0)), size)


def start(world: World) -> torch.device:
    """Create the process group and return this rank's device.  Raises UserError where the ranks' port is taken."""
    if world.size == 1:
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            os.environ.setdefault(name, value)
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    transformers_logging.disable_progress_bar()
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(world.local_rank)
    backend = accelerator.communication_backend_name()
    # its all-reduce through shared memory serves inference alone; set up, it leaves 66 MB a rank in /dev/shm for ever
    deepspeed_ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed's CPU backend names oneCCL, which needs its own packages; gloo comes with torch
    try:
        deepspeed.init_distributed(
            dist_backend="gloo" if accelerator.device_name() == "cpu" else backend,
            timeout=TIMEOUT,
            verbose=False,
        )
    except torch.distributed.DistNetworkError as error:
        raise UserError(
            f"ranks cannot meet at {os.environ.get('MASTER_ADDR')}, port {os.environ.get('MASTER_PORT')}"
            f" ({str(error).splitlines()[0]}); beside another training, start with deepspeed --master_port N"
        ) from None
    return torch.device(accelerator.current_device_name())


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def stop() -> None:
    """End the process group, after all ranks have finished."""
    dist.destroy_process_group()


def barrier() -> None:
    with ACTIVITY.part("collective"):
        dist.barrier()


def total(values: Sequence[float | torch.Tensor], device: torch.device) -> list[float]:
    """Sums over all ranks, in fp64: one small collective, and one wait for the device, which tensors may be on."""
    if any(isinstance(value, torch.Tensor) for value in values):
        tensor = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    else:
        tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    with ACTIVITY.part("collective"):
        dist.all_reduce(tensor)
        return tensor.tolist()


def from_main(value: T) -> T:
    """Rank 0's value on every rank."""
    box = [value]
    with ACTIVITY.part("collective"):
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """Every rank's value, on every rank."""
    box: list = [None] * dist.get_world_size()
    with ACTIVITY.part("collective"):
        torch.distributed.all_gather_object(box, value)
    return box
