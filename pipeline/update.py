"""The update: one optimizer step of all ranks, with two small sums over them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import torch

from data_prep.errors import UserError
from pipeline import distributed
from pipeline.build import Parts
from pipeline.data.batch import Batch
from pipeline.data.unusable import Unusable
from pipeline.distributed import World, total
from pipeline.engine import loss_scale, set_hyperparameters, was_applied
from pipeline.keeping.keep import Keeper
from pipeline.plan import Plan
from pipeline.watching.monitor import StepResult, Stopwatch
from pipeline.watching.watch import StopRequest


class Update:
    """Called once a step, by all ranks together."""

    def __init__(
        self, plan: Plan, parts: Parts, world: World, keeper: Keeper, unusable: Unusable, stop: StopRequest
    ) -> None:
        self.config, self.triangle, self.engine = plan.config, plan.triangle, parts.engine
        self.world, self.keeper, self.unusable, self.stop = world, keeper, unusable, stop

    def __call__(
        self, micro_batches: Sequence[Batch], lr: float, global_step: int, watch: Stopwatch, device: torch.device
    ) -> StepResult:
        """Forward, backward, step for each micro-batch; DeepSpeed updates at the last, unless a gradient is no number.

        Raises UserError where no row has anything to learn, or a checkpoint that was being written has failed.
        """
        engine, triangle, norm = self.engine, self.triangle, self.config.optim.loss_norm
        # dropout depends on (seed, step, rank) alone, so that a resumed run draws what the first would have
        torch.manual_seed(step_seed(self.config.train.seed, global_step, self.world.rank))
        set_hyperparameters(engine, self.config.optim, lr)
        labels = [int(batch.label_mask.sum()) for batch in micro_batches]
        everywhere, columns, stopping = self._agree(micro_batches, sum(labels), global_step, device)
        losses = torch.zeros((), device=device)
        statistics: dict[str, torch.Tensor] = {}
        for batch, labels_here in zip(micro_batches, labels, strict=True):
            with watch("forward"):
                nll, sums = engine(batch.to(device))
            with watch("backward"):
                loss = nll * loss_scale(norm, labels_here, everywhere, triangle)
                engine.backward(loss)
            with watch("step"):
                engine.step()
            losses += loss.detach().float() / (triangle.world * triangle.accumulation)
            statistics = {name: value + statistics.get(name, 0.0) for name, value in sums.items()}
        names = sorted(statistics)
        loss, *summed = total([losses, *(statistics[name] for name in names)], device)
        grad_norm = float(engine.get_global_grad_norm() or 0.0)
        found = dict(zip(names, summed, strict=True))
        return StepResult(loss, grad_norm, was_applied(engine), columns, stopping, found)

    def _agree(
        self, micro_batches: Sequence[Batch], labels: int, global_step: int, device: torch.device
    ) -> tuple[int, int, bool]:
        """What ranks must know of each other before a step, in one sum: labels, real columns, whether to stop."""
        columns = sum(batch.columns for batch in micro_batches)
        mine = [labels, columns, *Unusable.counts(micro_batches), self.stop.requested, self.keeper.report()]
        labels, columns, bad, overlong, dropped, stopping, reports = (int(n) for n in total(mine, device))
        self.keeper.agree(reports)
        try:
            self.unusable.note(micro_batches, bad, overlong, dropped)
        except UserError as error:
            self.keeper.give_up(*error.lines)
        if not labels and not bad:  # bad rows have a limit of their own
            self.keeper.give_up(
                f"no row of step {global_step + 1} can be trained on: {overlong} are longer than prompt.max_tokens"
                f" {self.config.prompt.max_tokens}; raise it"
            )
        return labels, columns, stopping > 0


def step_seed(seed: int, global_step: int, rank: int) -> int:
    """Seed of a rank's draws in a step, 63 bits."""
    low, high = np.random.SeedSequence([seed, global_step, rank]).generate_state(2)
    return (int(high) << 32 | int(low)) >> 1


def rows_of_step(micro_batches: Sequence[Batch]) -> list[str]:
    """Keys of a step's rows in the order of the global batch, of which a rank has every world-th; ranks together."""
    parts = distributed.gather([key for batch in micro_batches for key in batch.keys])
    return [key for rows in zip_longest(*parts, fillvalue="") for key in rows if key]
