"""Chameleon through transformers' own classes, and nothing else of the pipeline.

An image is a fixed number of discrete tokens, made by a frozen tokenizer of its own (VQ); they share the embedding
table with the text, and are never predicted.

Shapes: B rows, P question columns, L columns of a pass, D hidden size, S pixels a side of an image.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

from data_prep.errors import UserError
from data_prep.files import write_atomic
from pipeline.backbones.weights import load_whole
from pipeline.data.batch import Batch, RowFormat
from pipeline.latent.attention import ATTENTION_NAME, Pass
from pipeline.loss import LabelHead
from pipeline.prompt import Grid, Layout, PromptConfig

if TYPE_CHECKING:
    from pipeline.config import ModelConfig, ScratchConfig

IMAGE = "<image>"
IMAGE_MARKERS = ["<racm3:break>", "<eoss>"]
SCRATCH_LEVELS = 4
"""Resolutions of the image tokenizer of a model from scratch; each after the first halves the sides."""
SCRATCH_CELL = 2 ** (SCRATCH_LEVELS - 1)
"""Pixels a side of its image tokens."""


class Chameleon(nn.Module):
    """The model as the latent forward sees it: embed, decode a pass, project."""

    MODEL_TYPE = "chameleon"
    """What transformers' configs of this family say."""
    MODEL = ChameleonForConditionalGeneration
    TOKENIZER = "chameleon"
    """Kind of tokenizer of a model from scratch, one of `data_prep.tokenizer`."""
    LORA_SCOPE = r".*model\.layers\..*\.({names})"
    """Regular expression of modules that LoRA may adapt: the decoder's, never the image tokenizer's."""
    PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
    """What the processor's `save` writes, all of it needed."""

    def __init__(self, vlm: Any) -> None:
        """vlm: a ChameleonForConditionalGeneration, or one that peft has wrapped; its image tokenizer is frozen."""
        super().__init__()
        self.vlm = vlm
        LabelHead.install(self.core.lm_head, torch.tensor(self.decoder.vocabulary_mapping.image_tokens))
        self.vision.requires_grad_(False)

    # ---- loading ----------------------------------------------------------------------------------------------
    @staticmethod
    def load(path: str | Path, dtype: torch.dtype, revision: str | None = None) -> Any:
        """The pretrained model of a local folder or hub id, with the latent attention installed.

        Raises UserError where weights are missing or of another shape; under ZeRO-3 a shape is seen by rank 0 alone.
        """
        return load_whole(ChameleonForConditionalGeneration, path, dtype, ATTENTION_NAME, revision)

    @staticmethod
    def problems(model: ModelConfig, prompt: PromptConfig) -> Iterator[str]:
        """What in a run's options does not suit this family, a line each."""
        if prompt.image_size is not None or prompt.max_pixels is not None:
            yield "prompt.image_size and prompt.max_pixels are not for chameleon, whose images all have one size"
        scratch = model.scratch
        if scratch is None:
            return
        if scratch.hidden_size % (2 * scratch.heads):
            yield "model.scratch: hidden_size / heads must be an even number"
        if scratch.image_size % SCRATCH_CELL:
            yield f"model.scratch: image_size must be a multiple of {SCRATCH_CELL}"

    @staticmethod
    def create(scratch: ScratchConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Any:
        """Save a randomly initialised model of this shape beside its tokenizer in `folder`; returns the model.

        The tokenizer gets the image tokens, and is saved with them.
        """
        names = [image_token(code) for code in range(scratch.image_tokens)]
        tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
        tokenizer.save_pretrained(folder)
        config = ChameleonConfig(
            vocab_size=-(-(len(tokenizer) + 1) // 64) * 64,
            hidden_size=scratch.hidden_size,
            intermediate_size=scratch.intermediate_size,
            num_hidden_layers=scratch.layers,
            num_attention_heads=scratch.heads,
            num_key_value_heads=scratch.kv_heads,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=scratch.tie_embeddings,
            initializer_range=scratch.initializer_range,
            vocabulary_map={name: tokenizer.convert_tokens_to_ids(name) for name in [IMAGE, *names]},
            vq_config={
                "embed_dim": scratch.vision_size,
                "latent_channels": scratch.vision_size,
                "num_embeddings": scratch.image_tokens,
                "resolution": scratch.image_size,
                "base_channels": 32,  # its norms have so many groups
                "channel_multiplier": [1] * SCRATCH_LEVELS,
                "num_res_blocks": scratch.vision_layers,
            },
        )
        vlm = ChameleonForConditionalGeneration(config)
        vlm.save_pretrained(folder)
        side = scratch.image_size
        processor = ChameleonImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        save_processor(processor, (side // SCRATCH_CELL) ** 2, folder)
        return vlm

    @staticmethod
    def processor(path: str | Path, prompt: PromptConfig, revision: str | None = None) -> ImageTokenProcessor:
        return ImageTokenProcessor(path, revision)

    # ---- what the latent forward calls ------------------------------------------------------------------------
    @property
    def core(self) -> Any:
        """The transformers model, inside peft's wrapper or not."""
        return self.vlm.get_base_model() if hasattr(self.vlm, "get_base_model") else self.vlm

    @property
    def decoder(self) -> Any:
        return self.core.model

    @property
    def vision(self) -> Any:
        return self.core.model.vqmodel

    @property
    def sliding_window(self) -> None:
        """No layer slides."""

    def train(self, mode: bool = True) -> Chameleon:
        """Training mode of all but the image tokenizer."""
        super().train(mode)
        self.vision.eval()
        return self

    def embed_tokens(self, ids: Tensor) -> Tensor:
        return self.decoder.embed_tokens(ids)

    def embed_prompt(self, batch: Batch) -> Tensor:
        """Token embeddings, those of the image tokens on the image columns, (B,P,D).

        The image tokenizer runs in every batch: under ZeRO-3 all ranks must gather the same parameters.
        Raises UserError where it makes another number of tokens than the processor says.
        """
        ids = batch.prompt_ids
        with torch.no_grad():
            tokens = self.core.get_image_tokens(batch.pixel_values.to(self.vision.quant_conv.weight.dtype))
        if batch.has_images:
            if (said := int(batch.image_mask.sum()) // len(tokens)) != tokens.shape[1]:
                raise UserError(f"the model makes {tokens.shape[1]} image columns, image_seq_length says {said}")
            ids = ids.masked_scatter(batch.image_mask, tokens.to(ids.dtype))
        return self.embed_tokens(ids)

    def position_ids(self, positions: Tensor) -> Tensor:
        """(3,B,L), alike on all axes, as the decoder takes them: (B,L)."""
        return positions[0]

    def decode(self, embeds: Tensor, positions: Tensor, masks: dict[str, Tensor], latent: Pass) -> Tensor:
        """Final hidden states (B,L,D), after the last norm, of one pass's columns; positions (3,B,L)."""
        where = self.position_ids(positions)
        return latent.run(
            self.decoder, inputs_embeds=embeds, position_ids=where, attention_mask=masks["full_attention"]
        )

    @property
    def head(self) -> LabelHead:
        return self.core.lm_head

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)


class ImageTokenProcessor:
    """Tokenizer, image processor and positions: what turns an example's parts into a row.  Needs no torchvision."""

    TRAINED, RELEASED = Layout("({}).", ""), Layout("({}).", "\nAnswer:")
    MAX_ASPECT = 200
    """An image whose sides differ by more would be resized to a picture that fills the memory."""

    def __init__(self, path: str | Path, revision: str | None = None) -> None:
        """Raises ValueError where the processor's number of image columns is no square."""
        self.tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        self.image_processor = ChameleonImageProcessorPil.from_pretrained(path, revision=revision)
        described, _ = ChameleonProcessor.get_processor_dict(path, revision=revision)
        self.columns = described.get("image_seq_length", 1024)
        side = isqrt(self.columns)
        if side**2 != self.columns:
            raise ValueError(f"an image has {self.columns} columns (image_seq_length), which is no square")
        self.grid: Grid = (1, side, side)
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(IMAGE)

    @property
    def row_format(self) -> RowFormat:
        crop, pad = self.image_processor.crop_size, self.tokenizer.pad_token_id
        blank = (1, 3, crop["height"], crop["width"])
        return RowFormat(self.eos_id if pad is None else pad, self.image_token_id, blank, self.grid, merge=1)

    @property
    def eos_id(self) -> int:
        """The token that ends an answer."""
        return self.tokenizer.eos_token_id

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text; special-token strings inside it stay text, so data cannot forge an image."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def prompt_ids(self, opening: str, rest: str, grids: Sequence[Grid]) -> list[int]:
        """The text with its images' placeholders behind its opening: no template, no token that begins it."""
        return [*self.text_ids(opening), *[self.image_token_id] * (self.columns * len(grids)), *self.text_ids(rest)]

    def released_ids(self, opening: str, rest: str, grids: Sequence[Grid]) -> tuple[list[int], list[int]]:
        """What transformers' processor makes of `<image>TEXT`; the separator that ends it comes after the latents."""
        begin, end = self.tokenizer.convert_tokens_to_ids(IMAGE_MARKERS)
        image = [begin, *[self.image_token_id] * self.columns, end]
        first = self.tokenizer("")["input_ids"]  # the published tokenizer begins with <s>
        return [*first, *image * len(grids), *self.text_ids(opening + rest)], [self.tokenizer.sep_token_id]

    def image(self, image: Image.Image) -> tuple[np.ndarray, Grid]:
        """Pixel values (1,3,S,S) fp32 of the image's centre, and its grid of columns.

        Raises ValueError for an aspect ratio above `MAX_ASPECT`.
        """
        self.image_columns(*image.size)
        out = self.image_processor(images=[image.convert("RGB")], return_tensors="np")
        return np.ascontiguousarray(out["pixel_values"], dtype=np.float32), self.grid

    def image_columns(self, width: int, height: int) -> int:
        """Columns that an image of this size takes."""
        if max(width, height) > self.MAX_ASPECT * min(width, height):
            raise ValueError(f"aspect ratio of {width} x {height} is above {self.MAX_ASPECT}")
        return self.columns

    def positions(self, ids: Sequence[int], grids: Sequence[Grid]) -> np.ndarray:
        """(3,P): one-dimensional positions, the same on all axes."""
        return np.tile(np.arange(len(ids)), (3, 1))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Tokenizer and image processor, in a form that transformers' own processor loads."""
        self.tokenizer.save_pretrained(folder)
        save_processor(self.image_processor, self.columns, folder)


def image_token(code: int) -> str:
    """Name in the vocabulary of the image tokenizer's `code`: its digits as letters, A for 0."""
    return f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(code))}Z"


def save_processor(image_processor: Any, columns: int, folder: Path) -> None:
    """Image processor and number of columns of an image, as transformers' ChameleonProcessor reads them."""
    image_processor.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    kind = {"processor_class": "ChameleonProcessor"}
    described = json.loads(path.read_text()) | kind | {"image_processor_type": "ChameleonImageProcessor"}
    counted = kind | {"image_seq_length": columns, "image_token": IMAGE}
    for place, values in ((path, described), (folder / "processor_config.json", counted)):
        write_atomic(place, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())
