"""What Qwen2-VL and Qwen2.5-VL have in common: language model, M-RoPE positions, processor.

Shapes: B rows, P question columns, L columns of a pass, T columns so far, D hidden size.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pipeline.backbones.weights import load_whole
from pipeline.data.batch import Batch, RowFormat
from pipeline.latent.attention import ATTENTION_NAME, Pass
from pipeline.loss import LabelHead
from pipeline.prompt import Layout, PromptConfig

if TYPE_CHECKING:
    from pipeline.config import ModelConfig, ScratchConfig


class QwenVL(nn.Module, ABC):
    """The model as the latent forward sees it: embed, decode a pass, project.  A family fills in the first block."""

    MODEL_TYPE: ClassVar[str]
    """What transformers' configs of this family say."""
    MODEL: ClassVar[Any]
    """transformers' class of the whole model."""
    PROCESSOR: ClassVar[type[QwenProcessor]]

    @staticmethod
    @abstractmethod
    def vision_config(scratch: ScratchConfig) -> dict[str, Any]:
        """The vision tower of a model from scratch."""

    TOKENIZER = "qwen"
    """Kind of tokenizer of a model from scratch, one of `data_prep.tokenizer`."""
    LORA_SCOPE = r".*language_model\..*\.({names})"
    """Regular expression of modules that LoRA may adapt: the language model's, never the vision tower's."""
    PROCESSOR_FILES = ("chat_template.jinja", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
    """What the processor's `save` writes, all of it needed."""

    def __init__(self, vlm: Any) -> None:
        """vlm: a model of transformers' class, or one that peft has wrapped."""
        super().__init__()
        self.vlm = vlm
        LabelHead.install(self.core.lm_head)

    # ---- loading ----------------------------------------------------------------------------------------------
    @classmethod
    def load(cls, path: str | Path, dtype: torch.dtype, revision: str | None = None) -> Any:
        """The pretrained model of a local folder or hub id, with the latent attention installed.

        Raises UserError where weights are missing or of another shape; under ZeRO-3 a shape is seen by rank 0 alone.
        """
        attention = {"text_config": ATTENTION_NAME, "vision_config": "sdpa"}
        return load_whole(cls.MODEL, path, dtype, attention, revision)

    @staticmethod
    def problems(model: ModelConfig, prompt: PromptConfig) -> Iterator[str]:
        """What in a run's options does not suit this family, a line each."""
        scratch = model.scratch
        if scratch is None:
            return
        if scratch.hidden_size % scratch.heads or (scratch.hidden_size // scratch.heads) % 16:
            yield "model.scratch: hidden_size / heads must be a multiple of 16 (rotary sections)"
        if scratch.vision_size % scratch.vision_heads or (scratch.vision_size // scratch.vision_heads) % 4:
            yield "model.scratch: vision_size / vision_heads must be a multiple of 4"

    @classmethod
    def create(cls, scratch: ScratchConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Any:
        """Save a randomly initialised model of this shape beside its tokenizer in `folder`; returns the model."""
        token = tokenizer.convert_tokens_to_ids
        half = scratch.hidden_size // scratch.heads // 2
        third = half * 3 // 8
        config = cls.MODEL.config_class(
            text_config={
                "vocab_size": -(-(len(tokenizer) + 1) // 64) * 64,
                "hidden_size": scratch.hidden_size,
                "intermediate_size": scratch.intermediate_size,
                "num_hidden_layers": scratch.layers,
                "num_attention_heads": scratch.heads,
                "num_key_value_heads": scratch.kv_heads,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": [half - 2 * third, third, third],
                },
                "bos_token_id": tokenizer.pad_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                "initializer_range": scratch.initializer_range,
            },
            vision_config=cls.vision_config(scratch),
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
            tie_word_embeddings=scratch.tie_embeddings,
            initializer_range=scratch.initializer_range,
        )
        vlm = cls.MODEL(config)
        vlm.save_pretrained(folder)
        # small pictures keep their size: one column for each 28 x 28 pixels
        limits = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 1280}
        Qwen2VLImageProcessorPil(size=limits).save_pretrained(folder)
        return vlm

    @classmethod
    def processor(cls, path: str | Path, prompt: PromptConfig, revision: str | None = None) -> QwenProcessor:
        return cls.PROCESSOR(path, prompt.image_size, prompt.max_pixels, revision)

    # ---- what the latent forward calls ------------------------------------------------------------------------
    @property
    def core(self) -> Any:
        """The transformers model, inside peft's wrapper or not."""
        return self.vlm.get_base_model() if hasattr(self.vlm, "get_base_model") else self.vlm

    @property
    def decoder(self) -> Any:
        return self.core.model.language_model

    @property
    def vision(self) -> Any:
        return self.core.model.visual

    @property
    def sliding_window(self) -> int | None:
        """Columns a sliding layer sees; None where no layer slides."""
        config = self.decoder.config
        return config.sliding_window if "sliding_attention" in config.layer_types else None

    def embed_tokens(self, ids: Tensor) -> Tensor:
        return self.decoder.embed_tokens(ids)

    def embed_prompt(self, batch: Batch) -> Tensor:
        """Token embeddings with the vision tower's output on the image columns, (B,P,D).

        The tower runs in every batch: under ZeRO-3 all ranks must gather the same parameters.
        """
        embeds = self.embed_tokens(batch.prompt_ids)
        images = self.core.model.get_image_features(batch.pixel_values, batch.image_grid, return_dict=True)
        features = torch.cat(images.pooler_output).to(embeds.dtype)
        if not batch.has_images:
            return embeds + 0.0 * features.sum()
        return embeds.masked_scatter(batch.image_mask[..., None], features)

    def position_ids(self, positions: Tensor) -> Tensor:
        """(3,B,L) as the decoder takes them."""
        return positions

    def decode(self, embeds: Tensor, positions: Tensor, masks: dict[str, Tensor], latent: Pass) -> Tensor:
        """Final hidden states (B,L,D), after the last norm, of one pass's columns; positions (3,B,L)."""
        where = self.position_ids(positions)
        return latent.run(self.decoder, inputs_embeds=embeds, position_ids=where, attention_mask=masks)

    @property
    def head(self) -> LabelHead:
        return self.core.lm_head

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)


class QwenProcessor:
    """Tokenizer, image processor and positions: what turns an example's parts into a row.  Needs no torchvision."""

    PROCESSOR_CLASS: ClassVar[str]
    """What transformers calls the processor of this family."""
    TRAINED, RELEASED = Layout("({}).", "\nAnswer:\n"), Layout("{}.", "\nAnswer:")
    IMAGE, TEXT = "<|image_pad|>", "\x00text\x00"

    def __init__(
        self,
        path: str | Path,
        image_size: int | None = None,
        max_pixels: int | None = None,
        revision: str | None = None,
    ) -> None:
        """image_size: every image is resized to that square; None keeps its shape, at most `max_pixels`.

        Raises ValueError where the chat template is none for images.
        """
        self.tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(path, revision=revision)
        self.image_size = image_size
        if max_pixels is not None:
            self.image_processor.size = {
                "shortest_edge": min(self.image_processor.size["shortest_edge"], max_pixels),
                "longest_edge": max_pixels,
            }
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(self.IMAGE)
        self.merge = self.image_processor.merge_size
        if not self.tokenizer.chat_template:
            raise ValueError("it has no chat template (chat_template.jinja)")
        if self._turn(1)[0].count(self.IMAGE) != 1:
            raise ValueError("its chat template leaves images out")

    @property
    def row_format(self) -> RowFormat:
        p = self.image_processor
        patch_dim = 3 * p.temporal_patch_size * p.patch_size**2
        blank, grid = (self.merge**2, patch_dim), (1, self.merge, self.merge)
        return RowFormat(self.tokenizer.pad_token_id, self.image_token_id, blank, grid, self.merge)

    @property
    def eos_id(self) -> int:
        """The token that ends an answer."""
        return self.tokenizer.eos_token_id

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text; special-token strings inside it stay text, so data cannot forge an image."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def prompt_ids(self, opening: str, rest: str, grids: Sequence[tuple[int, int, int]]) -> list[int]:
        """One user turn, images first, then the text, then the assistant's opening, as the chat template puts it."""
        before, after = self._turn(len(grids))
        ids: list[int] = []
        columns = iter([t * h * w // self.merge**2 for t, h, w in grids])
        for token in self.tokenizer(before, add_special_tokens=False)["input_ids"]:
            ids += [token] * (next(columns) if token == self.image_token_id else 1)
        return ids + self.text_ids(opening + rest) + self.tokenizer(after, add_special_tokens=False)["input_ids"]

    def released_ids(
        self, opening: str, rest: str, grids: Sequence[tuple[int, int, int]]
    ) -> tuple[list[int], list[int]]:
        """The same turn; nothing stands behind the latent steps."""
        return self.prompt_ids(opening, rest, grids), []

    def _turn(self, images: int) -> list[str]:
        """What the chat template puts before and after the text of a turn."""
        content = [{"type": "image"}] * images + [{"type": "text", "text": self.TEXT}]
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        if rendered.count(self.TEXT) != 1:
            raise ValueError("its chat template leaves the text out")
        return rendered.split(self.TEXT)

    def image(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Vision patches (patches, patch_dim) fp32 and their grid (time, height, width).

        Raises ValueError for an aspect ratio above 200.
        """
        image = image.convert("RGB")
        if self.image_size is not None:
            image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        out = self.image_processor(images=[image], return_tensors="np")
        t, h, w = (int(x) for x in out["image_grid_thw"][0])
        return np.ascontiguousarray(out["pixel_values"], dtype=np.float32), (t, h, w)

    def image_columns(self, width: int, height: int) -> int:
        """Columns that an image of this size takes, without decoding it."""
        if self.image_size is not None:
            width = height = self.image_size
        size = self.image_processor.size
        limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        return self.image_processor.get_number_of_image_patches(height, width, limits) // self.merge**2

    def positions(self, ids: Sequence[int], grids: Iterable[tuple[int, int, int]]) -> np.ndarray:
        """M-RoPE positions (3, P) of a prompt: text counts on all axes, an image spans (time, height, width)."""
        out = np.empty((3, len(ids)), dtype=np.int64)
        remaining, column, position = iter(grids), 0, 0
        image = np.asarray(ids) == self.image_token_id
        while column < len(ids):
            if not image[column]:
                out[:, column] = position
                column, position = column + 1, position + 1
                continue
            t, h, w = next(remaining)
            h, w = h // self.merge, w // self.merge
            out[:, column : column + t * h * w] = np.indices((t, h, w)).reshape(3, -1) + position
            column, position = column + t * h * w, position + max(h, w)
        return out

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Tokenizer, chat template and image processor, in a form that loads with or without torchvision."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        path = folder / "preprocessor_config.json"
        config = json.loads(path.read_text())
        config["image_processor_type"] = "Qwen2VLImageProcessor"
        config["processor_class"] = self.PROCESSOR_CLASS
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
