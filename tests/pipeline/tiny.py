"""Tiny random models of every backbone and rows of random ids, for tests that need no words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ChameleonConfig

from pipeline.backbones.chameleon import Chameleon, image_token
from pipeline.backbones.qwen import QwenVL
from pipeline.backbones.qwen2_5_vl import Qwen25VL
from pipeline.backbones.qwen2_vl import Qwen2VL
from pipeline.data.batch import Batch, Row, RowFormat
from pipeline.latent.attention import ATTENTION_NAME

PAD, EOS, VISION_START, VISION_END, IMAGE, VIDEO, FIRST_WORD, VOCABULARY = 0, 1, 4, 5, 6, 7, 10, 96
FORMAT = RowFormat(pad_id=PAD, image_token_id=IMAGE, blank_shape=(4, 3 * 2 * 14 * 14), blank_grid=(1, 2, 2), merge=2)
Grid = tuple[int, int, int]


class TinyQwen:
    """Qwen2-VL or Qwen2.5-VL, and the parts of transformers' own model that the definition calls."""

    format, axes = FORMAT, 3
    attention = {"text_config": ATTENTION_NAME, "vision_config": "sdpa"}

    def __init__(self, backbone: type[QwenVL], vision: dict[str, Any], seed: int) -> None:
        """seed: of the rows' ids and pixels, such that no two scores are too close to be ranked."""
        self.backbone, self.vision, self.seed = backbone, vision, seed

    def config(self, window: int | None = None) -> Any:
        """window: the middle one of the three layers sees only so many columns."""
        return self.backbone.MODEL.config_class(
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
            vision_config=self.vision,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=VISION_START,
            vision_end_token_id=VISION_END,
            tie_word_embeddings=False,
        )

    def image(self, height: int, width: int) -> tuple[list[int], Grid]:
        """Ids and grid of an image of so many columns."""
        return [VISION_START, *[IMAGE] * (height * width), VISION_END], (1, 2 * height, 2 * width)

    def pixels(self, grids: Sequence[Grid]) -> tuple[int, ...]:
        """Shape of the pixel values of these images."""
        return sum(t * h * w for t, h, w in grids), FORMAT.blank_shape[1]

    def positions(self, stock: nn.Module, ids: list[int], grids: Sequence[Grid]) -> Tensor:
        return rope_index(stock, torch.tensor(ids) == IMAGE, grids)

    def embed(self, stock: nn.Module, ids: Tensor) -> Tensor:
        return stock.model.language_model.embed_tokens(ids)

    def features(self, stock: nn.Module, row: Row) -> Tensor:
        """Input embeddings of a row's image columns, (columns,D)."""
        images = stock.model.get_image_features(torch.from_numpy(row.pixel_values), torch.tensor(row.image_grid))
        return torch.cat(images.pooler_output)

    def decode(self, stock: nn.Module, embeds: Tensor, positions: Tensor, masks: dict[str, Tensor]) -> Any:
        """Final hidden states and attention maps of a whole prefix; positions (3,T), additive masks (1,1,T,T)."""
        return stock.model.language_model(
            inputs_embeds=embeds[None],
            position_ids=positions[:, None],
            attention_mask=masks,
            use_cache=False,
            output_attentions=True,
            output_hidden_states=True,
        )

    def generate_images(self, stock: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What transformers' own `generate` wants of a batch's images."""
        stock.model.rope_deltas = None  # left over from the batch before
        kinds = batch.image_mask.int()
        return {"pixel_values": batch.pixel_values, "image_grid_thw": batch.image_grid, "mm_token_type_ids": kinds}

    def logits(self, stock: nn.Module, hidden: Tensor) -> Tensor:
        return stock.lm_head(hidden)


class TinyChameleon:
    """Chameleon, whose image tokens end the vocabulary; every image is of 3 x 4 columns."""

    backbone, attention, grid = Chameleon, ATTENTION_NAME, (1, 3, 4)
    axes, image_tokens, seed = 1, 32, 7
    format = RowFormat(pad_id=PAD, image_token_id=IMAGE, blank_shape=(1, 3, 6, 8), blank_grid=(1, 3, 4), merge=1)

    def config(self, window: None = None) -> Any:
        names = {image_token(code): VOCABULARY + code for code in range(self.image_tokens)}
        return ChameleonConfig(
            vocab_size=VOCABULARY + self.image_tokens,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=PAD,
            eos_token_id=EOS,
            pad_token_id=PAD,
            vocabulary_map={"<image>": IMAGE, **names},
            vq_config={
                "embed_dim": 8,
                "latent_channels": 8,
                "num_embeddings": self.image_tokens,
                "resolution": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
            },
        )

    def image(self, height: int, width: int) -> tuple[list[int], Grid]:
        """Ids and grid of an image; its size is not a matter of choice."""
        return [IMAGE] * 12, self.grid

    def pixels(self, grids: Sequence[Grid]) -> tuple[int, ...]:
        return len(grids), 3, 6, 8

    def positions(self, stock: nn.Module, ids: list[int], grids: Sequence[Grid]) -> Tensor:
        return torch.arange(len(ids)).expand(3, -1)

    def embed(self, stock: nn.Module, ids: Tensor) -> Tensor:
        return stock.model.embed_tokens(ids)

    def features(self, stock: nn.Module, row: Row) -> Tensor:
        return stock.model.get_image_features(torch.from_numpy(row.pixel_values)).pooler_output.flatten(0, 1)

    def decode(self, stock: nn.Module, embeds: Tensor, positions: Tensor, masks: dict[str, Tensor]) -> Any:
        return stock.model(
            inputs_embeds=embeds[None],
            position_ids=positions[:1],
            attention_mask=masks["full_attention"],
            use_cache=False,
            output_attentions=True,
            output_hidden_states=True,
        )

    def logits(self, stock: nn.Module, hidden: Tensor) -> Tensor:
        """Those of image tokens, the last of the vocabulary, are as low as they can be."""
        words = stock.lm_head(hidden)[:, :VOCABULARY]
        lowest = torch.full((len(hidden), self.image_tokens), torch.finfo(words.dtype).min)
        return torch.cat([words, lowest], dim=1)

    def generate_images(self, stock: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"pixel_values": batch.pixel_values}


FAMILIES: dict[str, Any] = {
    "qwen2_vl": TinyQwen(Qwen2VL, {"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 64}, 7),
    # windows of 2 x 2 columns in the first layer, full attention in the second
    "qwen2_5_vl": TinyQwen(
        Qwen25VL,
        {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
         "window_size": 56, "fullatt_block_indexes": [1]}, 9,
    ),
    "chameleon": TinyChameleon(),
}  # fmt: skip
SLIDING = ["qwen2_vl", "qwen2_5_vl"]
"""Those whose layers may see a window only."""


def family_of(vlm: Any) -> Any:
    """The tiny family of a transformers model, or of our backbone around one."""
    return FAMILIES[getattr(vlm, "core", vlm).config.model_type]


def tiny_config(window: int | None = None) -> Any:
    return FAMILIES["qwen2_vl"].config(window)


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


def tiny_models(name: str = "qwen2_vl", window: int | None = None) -> tuple[Any, Any]:
    """Ours, and transformers' own with eager attention, of equal weights, of which the same are trained."""
    family = FAMILIES[name]
    model = family.backbone.MODEL
    stock = model._from_config(family.config(window), attn_implementation="eager")
    spread(stock)
    ours = model._from_config(family.config(window), attn_implementation=family.attention)
    ours.load_state_dict(stock.state_dict())
    backbone = family.backbone(ours).train()
    for own, parameter in zip(stock.parameters(), ours.parameters(), strict=True):
        own.requires_grad_(parameter.requires_grad)
    return backbone, stock.train()


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
    """Words, the images, words; positions as transformers' own model gives them."""
    family = family_of(stock)
    random = np.random.default_rng([number, family.seed])
    ids, grids = words(random, 2), []
    for height, width in shape.images:
        columns, grid = family.image(height, width)
        ids += [*columns, *words(random, 1)]
        grids.append(grid)
    ids += words(random, shape.text)
    return Row(
        key=f"row {number}",
        row_id=number,
        prompt_ids=ids,
        prompt_positions=family.positions(stock, ids, grids).numpy(),
        target_ids=[*words(random, shape.targets - 1), EOS] if shape.targets else [],
        latents=shape.latents,
        pixel_values=random.standard_normal(family.pixels(grids), dtype=np.float32) if grids else None,
        image_grid=grids,
    )


def words(random: np.random.Generator, count: int) -> list[int]:
    return random.integers(FIRST_WORD, VOCABULARY, count).tolist()


def rope_index(stock: nn.Module, image: Tensor, grid: Sequence[tuple[int, int, int]]) -> Tensor:
    """transformers' own positions (3,P) of a prompt whose image columns are `image` (P,) bool."""
    grids, unused = torch.tensor(grid).view(-1, 3), torch.zeros(1, len(image), dtype=torch.int64)
    positions, _ = stock.model.get_rope_index(unused, image[None].int(), image_grid_thw=grids)
    return positions[:, 0]
