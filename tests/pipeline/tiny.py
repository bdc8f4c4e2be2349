"""Tiny random Qwen2-VL models and rows of random ids, for tests that need no words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from pipeline.backbones.qwen2_vl import Qwen2VL
from pipeline.batch import Row, RowFormat
from pipeline.latent.attention import ATTENTION_NAME

PAD, EOS, VISION_START, VISION_END, IMAGE, VIDEO, FIRST_WORD, VOCABULARY = 0, 1, 4, 5, 6, 7, 10, 96
FORMAT = RowFormat(pad_id=PAD, image_token_id=IMAGE, patch_dim=3 * 2 * 14 * 14, merge=2)


def tiny_config(window: int | None = None) -> Qwen2VLConfig:
    """window: the middle one of the three layers sees only so many columns."""
    return Qwen2VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "layer_types": [
                "full_attention",
                "sliding_attention" if window else "full_attention",
                "full_attention",
            ],
            "bos_token_id": PAD,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        },
        vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 64},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )


def spread(vlm: nn.Module, seed: int = 0) -> None:
    """Weights large enough that columns are attended to differently, biases and norms included."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if "norm" in name or ".ln_q" in name:
                parameter.copy_(name.endswith("weight") + 0.1 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def tiny_models(window: int | None = None) -> tuple[Qwen2VL, Qwen2VLForConditionalGeneration]:
    """Ours, and transformers' own with eager attention, of equal weights."""
    stock = Qwen2VLForConditionalGeneration._from_config(tiny_config(window), attn_implementation="eager")
    spread(stock)
    attention = {"text_config": ATTENTION_NAME, "vision_config": "sdpa"}
    ours = Qwen2VLForConditionalGeneration._from_config(tiny_config(window), attn_implementation=attention)
    ours.load_state_dict(stock.state_dict())
    return Qwen2VL(ours).train(), stock.train()


@dataclass(frozen=True)
class Shape:
    """What a row of random ids is like."""

    images: Sequence[tuple[int, int]] = ()
    """Height and width of each image, in columns"""
    text: int = 5
    """Words after the images"""
    targets: int = 4
    latents: int = 0


def make_row(shape: Shape, number: int, stock: nn.Module) -> Row:
    """Words, the images, words; positions as transformers' own `get_rope_index` gives them."""
    random = np.random.default_rng([number, 7])
    ids = words(random, 2)
    for height, width in shape.images:
        ids += [VISION_START, *[IMAGE] * (height * width), VISION_END, *words(random, 1)]
    ids += words(random, shape.text)
    grid = [(1, 2 * height, 2 * width) for height, width in shape.images]
    patches = sum(4 * height * width for height, width in shape.images)
    return Row(
        key=f"row {number}",
        row_id=number,
        prompt_ids=ids,
        prompt_positions=rope_index(stock, torch.tensor(ids) == IMAGE, grid).numpy(),
        target_ids=[*words(random, shape.targets - 1), EOS] if shape.targets else [],
        latents=shape.latents,
        pixel_values=random.standard_normal((patches, FORMAT.patch_dim), dtype=np.float32) if patches else None,
        image_grid=grid,
    )


def words(random: np.random.Generator, count: int) -> list[int]:
    return random.integers(FIRST_WORD, VOCABULARY, count).tolist()


def rope_index(stock: nn.Module, image: Tensor, grid: Sequence[tuple[int, int, int]]) -> Tensor:
    """transformers' own positions (3,P) of a prompt whose image columns are `image` (P,) bool."""
    grids, unused = torch.tensor(grid).view(-1, 3), torch.zeros(1, len(image), dtype=torch.int64)
    positions, _ = stock.model.get_rope_index(unused, image[None].int(), image_grid_thw=grids)
    return positions[:, 0]
