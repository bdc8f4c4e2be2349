"""Attention of one pass over its own columns and those kept from earlier passes.

A latent step needs several passes over a growing sequence.  Each pass feeds only its new columns (a *segment*); the
keys and values of earlier segments are kept in the autograd graph, so every column goes through the decoder once and
the numbers are those of recomputing the whole prefix.

Shapes: B rows, H query heads, G key/value heads, D head size, L columns of this segment, T columns so far.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from pipeline.latent.recompute import LayerTape

ATTENTION_NAME = "latent"


class KeptSegments:
    """Keys and values of the passes so far, by layer.

    Writing is idempotent: the first write of a (layer, pass) wins.  Gradient checkpointing runs a layer again in
    backward, long after later passes have been kept, and must then neither append nor overwrite.
    """

    def __init__(self) -> None:
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def extend(self, index: int, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep segment `index` of `layer`; return keys and values (B,G,T,D) of all segments up to it."""
        kept = self._kept.setdefault(layer, [])
        if len(kept) == index:
            kept.append((key, value))
        if index == 0:
            return key, value
        earlier = kept[:index]
        return (
            torch.cat([k for k, _ in earlier] + [key], dim=2),
            torch.cat([v for _, v in earlier] + [value], dim=2),
        )

    def tensors(self) -> list[Tensor]:
        """Every kept tensor, for counting live memory."""
        return [t for segments in self._kept.values() for pair in segments for t in pair]


class CachedSegments(KeptSegments):
    """The same without gradients, in a cache of transformers' that `generate` can go on with."""

    def __init__(self) -> None:
        super().__init__()
        # without a config, layers with a window keep all their columns as the others do
        self.cache = DynamicCache()

    def extend(self, index: int, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.update(key, value, layer)

    def tensors(self) -> list[Tensor]:
        return [t for layer in self.cache.layers for t in (layer.keys, layer.values) if t is not None]

    def take_last(self, mask: Tensor) -> Tensor:
        """Drop each row's last real column, and move its others to the right, behind padding.

        Keys carry their position, so the move changes no score; and a window that counts columns, as transformers'
        masks do, then counts real ones.  mask (B,T) bool, real columns.  Returns (B,W): the mask of the columns now
        kept and of the dropped one, which is to come back as the last.
        """
        real = mask.sum(1)
        width = int(real.max())
        order = mask.long().argsort(dim=1, stable=True)[:, mask.shape[1] - width : -1]
        for layer in self.cache.layers:
            assert layer.keys is not None and layer.values is not None
            index = order[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
        return torch.arange(width, device=mask.device) >= (width - real)[:, None]


@dataclass
class Pass:
    """What one pass hands to every layer: its number, the kept segments, and what to read."""

    index: int = 0
    kept: KeptSegments | None = None
    """None: the pass has every column itself"""
    read_columns: int = 0
    """Read the last query row's attention over the first so many columns (the question's); 0 reads nothing."""
    saliency: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> (B, read_columns) mean over query heads of the last row's softmax, fp32."""
    read_gradient: bool = False
    """Whether what is read stays in the graph."""
    read_layers: int = 0
    """Read the hidden states of so many of the last layers at the last column"""
    tape: LayerTape | None = None
    """Layers' outputs, recorded or given back; see `pipeline.latent.recompute`."""
    _biases: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _layers: list[Tensor] = field(default_factory=list)

    def bias(self, mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        """`attention_bias` of a mask that many layers share, made once; forgotten when the last layer has run."""
        if id(mask) not in self._biases:
            self._biases[id(mask)] = mask, attention_bias(mask, heads, dtype)  # with the mask: ids are given anew
        return self._biases[id(mask)][1]

    def run(self, decoder: Callable[..., Any], **inputs: Any) -> Tensor:
        """Run a transformers decoder on the pass's columns; its final hidden states (B,L,D), after the last norm."""
        wanted = list(range(-self.read_layers, 0))
        out = decoder(**inputs, use_cache=False, latent=self, output_hidden_states=wanted or False)
        if wanted:  # copied: a view would hold all columns
            self._layers.append(torch.stack([out.hidden_states[layer][:, -1] for layer in wanted], dim=1))
        self._biases.clear()  # with checkpointing, what this holds is held until backward
        return out.last_hidden_state

    def take_layers(self) -> Tensor:
        """Hidden states (B, read_layers, hidden size) of the last layers at the last column, which are forgotten here.

        The graph holds this object where layers are checkpointed: it must not hold the graph.
        """
        return self._layers.pop()

    def mean_saliency(self) -> Tensor:
        """s of the paper: plain mean over all layers and query heads, (B, read_columns) fp32."""
        return torch.stack([self.saliency[layer] for layer in sorted(self.saliency)]).mean(0)


def attention_bias(mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """What `grouped_attention` adds to its scores, (B,1,heads*L,T), for `heads` query heads on each key head.

    mask (B,1,L,T) bool.  SDPA would make the same of a mask in every layer, and keep it there for backward.
    """
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    return bias.repeat(1, 1, heads, 1)


def grouped_attention(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, dropout: float = 0.0, scaling: float | None = None
) -> Tensor:
    """SDPA of H query heads on G key/value heads, (B,H,L,D); bias: `attention_bias` of H/G heads.

    The query heads of a group become more rows on its one key head: a fused kernel on every device, where grouped heads
    with a mask have none on CUDA, and no copy of keys and values for each query head.
    """
    batch, heads, length, size = query.shape
    rows = query.reshape(batch, keys.shape[1], -1, size)
    out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=bias, dropout_p=dropout, scale=scaling)
    return out.view(batch, heads, length, size)


def last_row_saliency(query: Tensor, keys: Tensor, mask: Tensor, scaling: float, columns: int) -> Tensor:
    """Post-softmax attention of the last query row, mean over query heads, fp32, (B, columns).

    Only one row is explicit: (B,H,1,T) a layer, never an attention map.
    """
    batch, heads, _, size = query.shape
    groups = keys.shape[1]
    row = query[:, :, -1].float().view(batch, groups, heads // groups, size)
    logits = row @ keys.float().transpose(2, 3) * scaling
    logits = logits.masked_fill(~mask[:, :, -1:], float("-inf"))
    return logits.softmax(-1).mean((1, 2))[:, :columns]


def latent_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    latent: Pass | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention function in transformers' interface; `latent` comes through the decoder's keyword arguments.

    query (B,H,L,D), key and value (B,G,L,D), attention_mask (B,1,L,T) bool.  Returns (B,L,H,D).
    Without `latent` it is transformers' own SDPA attention.
    """
    if latent is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert attention_mask is not None, "a pass comes with its mask"
    layer = cast(int, module.layer_idx)
    keys, values = key, value
    if latent.kept is not None:
        keys, values = latent.kept.extend(latent.index, layer, key, value)
    if latent.read_columns and (layer not in latent.saliency or latent.read_gradient):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        with torch.set_grad_enabled(latent.read_gradient and torch.is_grad_enabled()):
            read = last_row_saliency(query, keys, attention_mask, scale, latent.read_columns)
        latent.saliency.setdefault(layer, read)  # run again in backward, a layer must not replace what was read
    bias = latent.bias(attention_mask, query.shape[1] // keys.shape[1], query.dtype)
    out = grouped_attention(query, keys, values, bias, dropout, scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, latent_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def segment_mask(column_mask: Tensor, length: int, window: int | None = None) -> Tensor:
    """Which columns the last `length` columns may see.

    column_mask (B,T) bool, real columns; window counts real columns (None: no limit).  Returns (B,1,length,T) bool:
    causal over real columns.  A masked column sees itself alone, so that its softmax is finite; nothing sees it.
    """
    total = column_mask.shape[1]
    columns = torch.arange(total, device=column_mask.device)
    queries = columns[total - length :]
    causal = columns[None, :] <= queries[:, None]
    allowed = causal[None] & column_mask[:, None, :]
    if window is not None:
        order = column_mask.cumsum(1)
        allowed &= order[:, total - length :, None] - order[:, None, :] < window
    itself = columns[None, :] == queries[:, None]
    return (allowed | itself[None])[:, None]
