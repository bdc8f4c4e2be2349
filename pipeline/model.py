"""The trained module: a backbone, the latent forward over a batch, and the loss as sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.backbones import BACKBONES
from pipeline.config import ModelConfig
from pipeline.data.batch import Batch
from pipeline.latent.decode import Decoding, Generation, generate
from pipeline.latent.method import Backbone, LatentConfig, LatentMethod
from pipeline.latent.schedules import Schedule, latent_forward
from pipeline.loss import token_nll


class LatentModel(nn.Module):
    """What DeepSpeed wraps: one call is all passes of a micro-batch."""

    backbone: Backbone

    def __init__(self, backbone: Backbone, latent: LatentConfig, schedule: Schedule | None = None) -> None:
        """backbone: one of `pipeline.backbones`, an nn.Module; schedule: how training runs the passes."""
        super().__init__()
        self.backbone, self.latent, self.schedule = backbone, latent, schedule
        # parts are trained beside the model's own weights: ZeRO-3 joins them, and they must be of one type
        weights = list(backbone.vlm.parameters())
        trained = next((weight for weight in weights if weight.requires_grad), weights[0])
        self.method = LatentMethod.of(latent, backbone).to(trained.dtype)

    def forward(
        self, batch: Batch, answer: Decoding | None = None
    ) -> tuple[Tensor, dict[str, Tensor]] | tuple[list[list[int]], list[int]]:
        """(sum of NLL over labelled tokens, in training with the auxiliary loss of each; monitoring sums).

        With `answer`: (generated ids, autoregressive steps) of each row instead.  Both go through this one call,
        because ZeRO-3 follows the root module's calls.
        """
        if answer is not None:
            out = self.answer(batch, answer)
            return out.tokens, [out.autoregressive_steps(row) for row in range(len(out.tokens))]
        trace = latent_forward(self.backbone, batch, self.method, self.schedule)
        nll = token_nll(trace.predictors(batch.latents), batch.labels, self.backbone.head)
        loss, sums = nll.sum(), trace.statistics(batch)
        if self.training:
            # a row's share of the loss is its labels', as that of its NLL: the sum then needs no other divisor
            added = (self.method.added(trace, batch) * batch.label_mask.sum(1)).sum()
            loss = loss + self.latent.auxiliary_weight * added
            sums |= {"auxiliary": added.detach(), "labels": batch.label_mask.sum().float()}
        return loss, sums

    def answer(self, batch: Batch, decoding: Decoding) -> Generation:
        """Answers to the batch's questions, with every latent step's patches."""
        return generate(self.backbone, batch, self.method, decoding)


def add_lora(vlm: nn.Module, config: ModelConfig) -> nn.Module:
    """Wrap `vlm` with LoRA on the language model's projections; everything else is frozen."""
    from peft import LoraConfig, get_peft_model

    assert config.lora is not None
    lora = LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=lora_scope(config.backbone, config.lora.targets),
    )
    return get_peft_model(vlm, lora)


def lora_scope(backbone: str, targets: Sequence[str]) -> str:
    """Regular expression of the modules that LoRA adapts."""
    return BACKBONES[backbone].LORA_SCOPE.format(names="|".join(targets))


def embedding_weights(vlm: Any) -> list[nn.Parameter]:
    """Input and output embeddings (vocab,D); one where they are tied."""
    weights = (vlm.get_input_embeddings().weight, vlm.get_output_embeddings().weight)
    return list({id(weight): weight for weight in weights}.values())


@torch.no_grad()
def set_to_mean(weight: Tensor, used: int, new: slice) -> None:
    """Set `new` rows of an embedding (vocab,D) to the mean of the first `used`."""
    weight[new] = weight[:used].float().mean(0).to(weight.dtype)


def resolve_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """The parameters' type: `auto` is bf16 on a GPU that has it, else fp32."""
    if name == "auto":
        on_gpu = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if on_gpu else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def decay_groups(model: nn.Module, weight_decay: float, decay_vectors: bool) -> list[dict]:
    """Two parameter groups for AdamW: decayed (matrices) and not (norms, biases); empty ones are left out."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            # ZeRO-3 keeps a partitioned parameter's own shape aside
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decayed if len(shape) > 1 or decay_vectors else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
