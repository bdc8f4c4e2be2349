"""Cross-entropy at labelled columns only, as sums, so that any normalisation can follow.

Logits of every column of a 152k vocabulary would cost more memory than the activations; here they exist for one chunk
of labelled columns at a time, and are computed again in backward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pipeline.data.batch import IGNORE

CHUNK = 1024
"""Labelled columns whose logits exist at once (1024 x 152k in fp32 = 0.6 GB)."""


class LabelHead(nn.Linear):
    """A model's output projection that can also give the loss, chunk by chunk, within one module call.

    One call means one parameter gather under ZeRO-3 however many chunks a rank has; ranks differ in that number.
    """

    never: Tensor | None
    """Token ids that are never predicted, (n,) int64: their logits are as low as the type has"""

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (...,vocab) of hidden (...,D); with targets (N,): their negative log-likelihood (N,), fp32."""
        if targets is None:
            return self._logits(hidden)
        if len(targets) <= CHUNK:
            return self._nll(hidden, targets)
        chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([self._nll(h, t) for h, t in chunks])
        return torch.cat([checkpoint(self._nll, h, t, use_reentrant=False) for h, t in chunks])

    def _nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self._logits(hidden).float(), targets, reduction="none")

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.weight, self.bias)
        if self.never is None:
            return logits
        return logits.index_fill_(-1, self.never, torch.finfo(logits.dtype).min)

    @classmethod
    def install(cls, head: nn.Linear, never: Tensor | None = None) -> None:
        """Give an existing projection this class: same parameters, same names in checkpoints."""
        head.__class__ = cls
        head.register_buffer("never", never, persistent=False)


def token_nll(predictors: Tensor, labels: Tensor, head: LabelHead) -> Tensor:
    """Negative log-likelihood of each labelled token, fp32, (labelled,), in row-major order.

    predictors (B,R,D): final hidden states, each the one that predicts its column; labels (B,R), IGNORE for none.
    """
    labelled = labels != IGNORE
    return head(predictors[labelled], labels[labelled])
