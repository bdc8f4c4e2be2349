"""The published recipes, token by token: three samples at every stage, and the questions as answers are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data_prep.tokenizer import train_tokenizer
from pipeline.backbones import BACKBONES
from pipeline.backbones.chameleon import Chameleon
from pipeline.config import RunConfig, ScratchConfig
from pipeline.curriculum import view
from pipeline.data.batch import IGNORE, collate
from pipeline.prompt import RowBuilder
from pipeline.recipe import load_config
from tests.launch import ROOT
from tests.pipeline.conftest import TEXTS
from tests.pipeline.examples import make_example, picture

RECIPES = ["qwen2vl_m3cot", "qwen2vl_scienceqa", "chameleon_m3cot", "chameleon_scienceqa"]
SCRATCH = ScratchConfig(
    hidden_size=32, intermediate_size=32, layers=1, heads=2, kv_heads=1, vision_size=8, image_size=80, image_tokens=12
)
"""80 x 80 pixels and 10 x 10 columns: room for K = 64"""
SAMPLES: list[dict[str, Any]] = [
    {"rationale": "It is green. It has a stem. Only a pear has both.", "answer": 1},
    {"rationale": "It is green. It has a stem.\nIt is green. It has a stem. Only a pear has both.", "answer": 1},
    {"rationale": "Only a pear has both.", "answer": 0, "choices": ("a pear", "a fig", "a stem")},
]
# `_` is a space in front of a word, `\n` a newline
GREEN, STEM, BOTH = "It _is _green \\n", "It _has _a _stem \\n", "Only _a _pear _has _both . \\n"
TWO = "It _is _green . _It _has _a _stem \\n"
STEPS = [  # by sample and stage
    [f"{GREEN} {STEM} {BOTH}", f"{STEM} {BOTH}", BOTH, ""],
    [f"{TWO} {TWO} {BOTH}", f"{TWO} {BOTH}", BOTH, ""],
    [BOTH, "", "", ""],
]
QUESTION = "Which _fruit _is _it ? } \\n [ Options ] : \\n"
PICTURE = "<|image_pad|> " * 100
TURN, REST = "<|im_start|> user \\n <|vision_start|>", "<|im_end|> \\n <|im_start|> assistant \\n"
TRAINED = {
    "qwen2vl": [
        f"{TURN} {PICTURE} <|vision_end|> [ Question ] : {{ {QUESTION} {options} \\n Answer : \\n {REST}"
        for options in ("( A ) . { a _fig } \\n ( B ) . { a _pear }",) * 2
        + ("( A ) . { a _pear } \\n ( B ) . { a _fig } \\n ( C ) . { a _stem }",)
    ],
    "chameleon": [
        f"[ Question ] : {{ {'<image> ' * 100} {QUESTION} {options}"
        for options in ("( A ) . { a _fig } \\n ( B ) . { a _pear }",) * 2
        + ("( A ) . { a _pear } \\n ( B ) . { a _fig } \\n ( C ) . { a _stem }",)
    ],
}
ASKED = {
    "qwen2vl": f"{TURN} {PICTURE} <|vision_end|> [ Question ] : {{ {QUESTION}"
    f" A . {{ a _fig }} \\n B . {{ a _pear }} \\n Answer : {REST}",
    "chameleon": f"<racm3:break> {'<image> ' * 100} <eoss> [ Question ] : {{ {QUESTION}"
    " ( A ) . { a _fig } \\n ( B ) . { a _pear } \\n Answer :",
}
LABELS = {
    "qwen2vl_m3cot": ["_B <|im_end|>", "_B <|im_end|>", "_A <|im_end|>"],
    "qwen2vl_scienceqa": ["_ 1 <|im_end|>", "_ 1 <|im_end|>", "_ 0 <|im_end|>"],
    "chameleon_m3cot": ["_B </s>", "_B </s>", "_A </s>"],
    "chameleon_scienceqa": ["_ 1 </s>", "_ 1 </s>", "_ 0 </s>"],
}


def pieces(written: str) -> list[str]:
    return [piece if "<" in piece else piece.replace("_", " ").replace("\\n", "\n") for piece in written.split()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizer and image processor of each backbone, as they lie beside a model."""
    root = tmp_path_factory.mktemp("published")
    texts = [*TEXTS, *["the answer is 0 1 2 A B C"] * 20]
    train_tokenizer(texts, root / "qwen2vl", 540)
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 1280}
    Qwen2VLImageProcessorPil(size=size).save_pretrained(root / "qwen2vl")
    chameleon = root / "chameleon"
    Chameleon.create(SCRATCH, train_tokenizer(texts, chameleon, 540, Chameleon.TOKENIZER), chameleon)
    return {name: root / name for name in ("qwen2vl", "chameleon")}


def published(name: str, folders: dict[str, Path]) -> tuple[RunConfig, RowBuilder]:
    config = load_config(ROOT / "recipes" / "published" / f"{name}.yaml", {})
    processor = BACKBONES[config.model.backbone].processor(folders[name.split("_")[0]], config.prompt)
    return config, RowBuilder(processor, config.prompt, config.latent.patches_taken)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("name", RECIPES)
def test_rows_of_training(name: str, stage: int, folders: dict[str, Path]) -> None:
    config, builder = published(name, folders)
    ids = builder.processor.tokenizer.convert_tokens_to_ids
    rows = []
    for number, changes in enumerate(SAMPLES):
        example = make_example(image=picture(300, 200), **changes)
        shown = view(example.rationale, config.curriculum.stages[stage], config.curriculum.groups)
        row = builder.row(example, str(number), number, shown.latents, shown.steps)
        answer = f"Therefore , _the _answer _is {LABELS[name][number]}"
        assert list(row.prompt_ids) == ids(pieces(TRAINED[name.split("_")[0]][number]))
        assert list(row.target_ids) == ids(pieces(f"{STEPS[number][stage]} {answer}"))
        assert row.latents == stage and row.given == 0
        rows.append(row)
    batch = collate(rows, builder.processor.row_format, stage)
    width = max(len(row.target_ids) for row in rows)
    expected = [[*row.target_ids, *[IGNORE] * (width - len(row.target_ids))] for row in rows]
    assert batch.labels.tolist() == expected  # every target is a label, and nothing else
    assert batch.image_mask.sum(1).tolist() == [100] * 3


@pytest.mark.parametrize("name", RECIPES)
def test_questions_that_answers_are_asked_with(name: str, folders: dict[str, Path]) -> None:
    config, builder = published(name, folders)
    family, ids = name.split("_")[0], builder.processor.tokenizer.convert_tokens_to_ids
    row = builder.prompt_row(make_example(image=picture(300, 200)), "k", 0, 3)
    assert list(row.prompt_ids) == ids(pieces(ASKED[family]))
    assert list(row.target_ids) == (ids(["<reserved08706>"]) if family == "chameleon" else [])
    sequential = np.arange(len(row.prompt_ids))
    if family == "chameleon":
        assert (row.prompt_positions == sequential).all()
    assert config.latent.positions == "sequential"


@pytest.mark.parametrize("name", RECIPES)
def test_settings_as_published(name: str) -> None:
    """LoRA, optimizer and schedule of the paper and its code."""
    config = load_config(ROOT / "recipes" / "published" / f"{name}.yaml", {})
    qwen = name.startswith("qwen2vl")
    assert config.latent.model_dump(include={"num_patches", "latent_grad", "positions", "patch_order"}) == {
        "num_patches": 32 if qwen else 64, "latent_grad": "detach", "positions": "sequential", "patch_order": "score",
    }  # fmt: skip
    assert config.latent.feedback == "hidden" and config.latent.selection == "attention"
    assert [(s.latents, s.skip, s.epochs) for s in config.curriculum.stages] == [(n, n, 4) for n in range(4)]
    assert config.curriculum.mix == 0 and not config.curriculum.reset_optimizer and config.curriculum.groups == 3
    optim, train, lora = config.optim, config.train, config.model.lora
    assert (optim.lr, optim.schedule, optim.warmup_steps, optim.beta1, optim.beta2) == (4e-5, "constant", 0, 0.9, 0.999)
    assert (optim.weight_decay, optim.decay_vectors, optim.clip, optim.loss_norm) == (0.01, True, 0.7, "micro_batch")
    assert (train.global_batch, train.micro_batch, train.seed) == (64, 2, 0)
    assert lora is not None and (lora.r, lora.alpha, lora.dropout) == (64, 16, 0.05)
    assert lora.targets == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert (config.prompt.max_tokens, config.prompt.image_size) == ((3400, 280) if qwen else (1400, None))
    assert config.eval.max_new_tokens == 512 and config.data.options == {"text_only": "skip"}


@pytest.mark.parametrize("name", RECIPES)
def test_best_differs_where_it_says(name: str) -> None:
    both = [load_config(ROOT / "recipes" / kind / f"{name}.yaml", {}).model_dump() for kind in ("published", "best")]
    changed = {
        f"{section}.{field}"
        for section, values in both[0].items()
        if isinstance(values, dict)
        for field in values
        if values[field] != both[1][section][field]
    }
    assert changed == {
        "prompt.asked", "latent.latent_grad", "latent.positions", "latent.patch_order", "optim.decay_vectors",
        "optim.loss_norm",
    }  # fmt: skip
