"""Gradient checkpointing of the decoder's layers, aware of latent passes.

Ordinarily a layer is run again in backward for each pass.  With `latent_grad: detach` the passes are joined only by
keys and values, so the gradient is that of one pass over the whole sequence: then the passes run without a graph, a
`LayerTape` records what every layer put out, and one whole pass takes these outputs in place of computing them.  In
backward each layer runs once, over all columns: work, memory and parameter gathers are those of an ordinary
checkpointed step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Output = Tensor | tuple[Tensor]
"""Of a layer: a tensor, or a tuple of one"""


class LayerTape:
    """Outputs (B,L,D) of the decoder's layers, in the order of their calls; given back as whole sequences (B,T,D).

    Some decoders' layers put out a tuple of one tensor; it is given back as one.
    """

    def __init__(self) -> None:
        self._passes: list[list[Output]] = []
        self.whole = False
        """Whether the passes are over and layers take their outputs from here."""

    def start_pass(self) -> None:
        self._passes.append([])

    def record(self, output: Output) -> None:
        self._passes[-1].append(output)

    def take(self) -> Output:
        """The next layer's output over all passes, which is forgotten here."""
        outputs = [outputs.pop(0) for outputs in self._passes]
        whole = torch.cat([output[0] if isinstance(output, tuple) else output for output in outputs], dim=1)
        return (whole,) if isinstance(outputs[0], tuple) else whole


def run_layer(layer: Callable[..., Output], hidden: Tensor, *args: Any) -> Output:
    """A layer's checkpointing function; transformers calls it with the layer's keyword arguments bound in `layer`."""
    latent = getattr(layer, "keywords", {}).get("latent")
    tape = latent.tape if latent is not None else None
    if tape is None:
        return checkpoint(layer, hidden, *args, use_reentrant=False)
    if not tape.whole:
        output = layer(hidden, *args)
        tape.record(output)
        return output
    known = [tape.take()]

    def recorded_or_run(hidden: Tensor) -> Output:
        # the reentrant kind calls this twice: now, without a graph, and in backward, with one
        return layer(hidden, *args) if torch.is_grad_enabled() else known.pop()

    return checkpoint(recorded_or_run, hidden, use_reentrant=True, preserve_rng_state=False)


def enable_checkpointing(vlm: Any) -> None:
    """Checkpoint every layer of a transformers model, or of one that peft has wrapped, through `run_layer`."""
    vlm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in vlm.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = run_layer


def has_dropout(module: nn.Module) -> bool:
    """Whether two runs of `module` in training may differ.

    Recomputing whole layers would draw other masks than the passes did.
    """
    attention = any(getattr(m, "attention_dropout", 0.0) for m in module.modules())
    return attention or any(isinstance(m, nn.Dropout) and m.p > 0 for m in module.modules())
