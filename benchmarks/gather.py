"""Parameter traffic of a step under ZeRO-3: bytes that two ranks gather.  Started by `step_cost` on two gloo ranks.

Counted by wrapping the collective methods of DeepSpeed's communication backend.  `*_ckpt`: checkpointing; `*_resident`:
parameters stay gathered from the first pass to the end of backward (ds_configs/zero3_resident.json), else nothing is
kept (zero3_lean.json).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.comm.torch import TorchBackend
from torch import Tensor, nn

from benchmarks.cases import STEPS, make_batch, make_model, step_loss
from data_prep import cli
from data_prep.files import write_atomic
from pipeline import distributed
from pipeline.backbones.qwen2_vl import Qwen2VL
from pipeline.distributed import World
from pipeline.latent.method import LatentConfig

ROOT = Path(__file__).resolve().parents[1]
GATHERS = ("all_gather", "all_gather_into_tensor", "all_gather_coalesced")
VARIANTS: dict[str, dict[str, Any]] = {
    "": {"ds": "zero3_lean", "checkpointing": False, "lora": False},
    "_ckpt": {"ds": "zero3_lean", "checkpointing": True, "lora": False},
    "_lora_ckpt": {"ds": "zero3_lean", "checkpointing": True, "lora": True},
    "_resident": {"ds": "zero3_resident", "checkpointing": True, "lora": False},
}


class Steps(nn.Module):
    """The root module that DeepSpeed wraps: one call is one step's forward."""

    def __init__(self, backbone: Qwen2VL) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, name: str, batch: Any, config: LatentConfig) -> Tensor:
        return step_loss(name, self.backbone, batch, config)


class Traffic:
    """Bytes of every gathered tensor since the last reset."""

    def __init__(self) -> None:
        self.bytes = 0
        for name in GATHERS:
            setattr(TorchBackend, name, self._counting(getattr(TorchBackend, name)))

    def _counting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def counted(*args: Any, **kwargs: Any) -> Any:
            output = next(v for v in [*args[1:], *kwargs.values()])  # the first after self
            self.bytes += sum(t.nbytes for t in (output if isinstance(output, list) else [output]))
            return method(*args, **kwargs)

        return counted


TRACED = 4
"""Runs until DeepSpeed follows a step: one breaks the order of modules before it, one is recorded, two follow"""


def main(*, json_file: Path, latents: int = 3, shape: str = "small") -> None:
    """Write {step and variant: bytes}, and `parameters`: the bytes of all of them; --shape as of step_cost.

    The traffic does not depend on the number of columns: few are used.
    """
    world = World.from_environment()
    device = distributed.start(world)
    traffic = Traffic()
    batch = make_batch(latents, size=1, text=4, side=4, rest=4).to(device)
    config = LatentConfig(num_patches=2, latent_grad="detach")
    found: dict[str, int] = {}
    for suffix, variant in VARIANTS.items():
        engine = make_engine(**variant, shape=shape)
        for name in STEPS:
            for _ in range(TRACED):
                traffic.bytes = 0
                engine.backward(engine(name, batch, config))
                found[name + suffix] = traffic.bytes
                engine.step()
        found["parameters"] = sum(p.ds_numel * p.element_size() for p in engine.module.parameters())
        engine.destroy()
    if world.main:
        write_atomic(json_file, json.dumps(found) + "\n")
    distributed.stop()


def make_engine(ds: str, checkpointing: bool, lora: bool, shape: str) -> deepspeed.DeepSpeedEngine:
    """The benchmarks' model under ZeRO-3 with every parameter partitioned, however small."""
    config = json.loads((ROOT / "ds_configs" / f"{ds}.json").read_text())
    zero = config["zero_optimization"] | {"overlap_comm": False, "stage3_param_persistence_threshold": 0}
    zero |= {"reduce_bucket_size": 5_000_000, "stage3_prefetch_bucket_size": 0}
    micro = {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    config |= {"zero_optimization": zero, **micro, "gradient_clipping": 1.0, "steps_per_print": 10**9}
    config["bf16"] = {"enabled": False}
    module = Steps(make_model(lora=lora, checkpointing=checkpointing, shape=shape))
    trained = [p for p in module.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=module, optimizer=torch.optim.AdamW(trained, lr=1e-6), config=config)
    return engine


if __name__ == "__main__":
    cli.run(main)
