"""What is Chameleon's own: frozen image tokens, logits that are never taken, its prompt, images and files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import AutoTokenizer, ChameleonProcessor
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

from data_prep.errors import UserError
from data_prep.tokenizer import train_tokenizer
from pipeline.backbones.chameleon import Chameleon, ImageTokenProcessor, image_token
from pipeline.config import ScratchConfig
from pipeline.data.batch import Row, collate
from pipeline.engine import add_tokens
from pipeline.latent.decode import Decoding, generate
from pipeline.latent.method import LatentConfig, LatentMethod
from pipeline.latent.schedules import latent_forward
from pipeline.loss import token_nll
from pipeline.model import lora_scope
from pipeline.prompt import LATENT_TOKEN, PromptConfig, RowBuilder
from pipeline.recipe import load_config
from tests.pipeline.conftest import TEXTS
from tests.pipeline.examples import make_example, picture
from tests.pipeline.tiny import FAMILIES, VOCABULARY, Shape, make_row, tiny_models

FORMAT = FAMILIES["chameleon"].format
SCRATCH = ScratchConfig(
    hidden_size=64, intermediate_size=96, layers=2, heads=2, kv_heads=1, vision_size=8, image_size=32, image_tokens=12
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model from scratch with tokenizer and image processor: images of 32 x 32 pixels and 4 x 4 columns."""
    folder = tmp_path_factory.mktemp("chameleon")
    Chameleon.create(SCRATCH, train_tokenizer(TEXTS, folder, 520, Chameleon.TOKENIZER), folder)
    return folder


@pytest.fixture(scope="module")
def processor(folder: Path) -> ImageTokenProcessor:
    return Chameleon.processor(folder, PromptConfig())


def rows_of(latents: int = 0) -> list[Row]:
    _, stock = tiny_models("chameleon")
    return [make_row(Shape([(3, 4)] * images, latents=latents), i, stock) for i, images in enumerate((1, 2, 0))]


# ---- the model --------------------------------------------------------------------------------
def test_image_columns_are_embeddings_of_image_tokens() -> None:
    """Their rows of the embedding table are trained; the image tokenizer is neither trained nor in training mode."""
    backbone, stock = tiny_models("chameleon")
    batch = collate(rows_of(), FORMAT, 0)
    embeds = backbone.embed_prompt(batch)
    tokens = stock.model.get_image_tokens(batch.pixel_values)
    assert len(set(tokens[0].tolist())) > 3, "an image of one token tests nothing"
    assert tokens.min() >= VOCABULARY and tokens[0].tolist() != tokens[1].tolist()
    assert torch.equal(embeds[batch.image_mask], backbone.embed_tokens(tokens.flatten()))
    embeds[batch.image_mask].sum().backward()
    gradient = backbone.decoder.embed_tokens.weight.grad.norm(dim=1) > 0
    assert set(gradient.nonzero()[:, 0].tolist()) == set(tokens.flatten().tolist())
    assert not any(parameter.requires_grad for parameter in backbone.vision.parameters())
    assert backbone.training and not any(module.training for module in backbone.vision.modules())


def test_loss_is_that_of_transformers() -> None:
    """Whose head leaves no probability to image tokens, however likely they would be."""
    backbone, stock = tiny_models("chameleon")
    with torch.no_grad():
        for vlm in (backbone.core, stock):
            vlm.lm_head.weight[VOCABULARY:] *= 20
    (row,) = rows_of()[:1]
    batch = collate([row], FORMAT, 0)
    trace = latent_forward(backbone, batch, LatentMethod.of(LatentConfig(), backbone))
    nll = token_nll(trace.predictors(batch.latents), batch.labels, backbone.head)
    ids = torch.tensor([[*row.prompt_ids, *row.target_ids]])
    logits = stock(input_ids=ids, pixel_values=batch.pixel_values).logits[0]
    count = len(row.target_ids)
    torch.testing.assert_close(nll, F.cross_entropy(logits[-count - 1 : -1], ids[0, -count:], reduction="none"))
    unmasked = F.cross_entropy(stock.lm_head(trace.predictors(batch.latents))[0], ids[0, -count:], reduction="none")
    assert (unmasked - nll).min() > 1, "image tokens are too unlikely to matter here"
    torch.testing.assert_close(backbone.logits(trace.hidden[0])[0], logits)


def test_image_tokens_are_never_written() -> None:
    backbone, _ = tiny_models("chameleon")
    with torch.no_grad():
        backbone.core.lm_head.weight[VOCABULARY:] *= 20
    method = LatentMethod.of(LatentConfig(num_patches=3), backbone)
    out = generate(backbone.eval(), collate(rows_of(2), FORMAT, 2), method, Decoding(12, eos_id=10**6))
    assert all(token < VOCABULARY for tokens in out.tokens for token in tokens)


def test_what_is_never_predicted_is_no_weight() -> None:
    backbone, stock = tiny_models("chameleon")
    assert backbone.core.state_dict().keys() == stock.state_dict().keys()


def test_both_kinds_of_positions_are_one() -> None:
    backbone, _ = tiny_models("chameleon")
    batch = collate(rows_of(2), FORMAT, 2)
    configs = [LatentConfig(num_patches=3, positions=positions) for positions in ("mrope", "sequential")]
    hidden = [latent_forward(backbone, batch, LatentMethod.of(config, backbone)).hidden[-1] for config in configs]
    assert torch.equal(*hidden)


def test_lora_leaves_the_image_tokenizer_alone() -> None:
    backbone, _ = tiny_models("chameleon")
    scope = re.compile(lora_scope("chameleon", ["q_proj", "k_proj", "gate_proj", "q", "k", "conv1"]))
    adapted = [name for name, _ in backbone.core.named_modules() if scope.fullmatch(name)]
    assert len(adapted) == 3 * 3 and all(re.match(r"model\.layers\.\d\.(self_attn|mlp)\.", name) for name in adapted)


# ---- the prompt -------------------------------------------------------------------------------
def test_published_prompt(processor: ImageTokenProcessor) -> None:
    """The placeholders are inside the braces; no template, no token before them, no cue after the choices."""
    row = RowBuilder(processor, PromptConfig(), 2).row(make_example(), "k", 0, 1, ["It is green"])
    text = "[Question]:{%sWhich fruit is it?}\n[Options]:\n(A).{a fig}\n(B).{a pear}" % ("<image>" * 16)
    assert list(row.prompt_ids) == processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.decode(row.prompt_ids) == text
    assert processor.decode(row.target_ids) == "It is green\nTherefore, the answer is B"
    assert row.target_ids[-1] == processor.eos_id == processor.tokenizer.convert_tokens_to_ids("</s>")
    assert row.image_grid == [(1, 4, 4)] and row.pixel_values is not None and row.pixel_values.shape == (1, 3, 32, 32)
    assert row.prompt_positions.tolist() == [list(range(len(row.prompt_ids)))] * 3


def test_special_tokens_in_the_data_stay_text(processor: ImageTokenProcessor) -> None:
    forged = "<image><racm3:break>IMGIMGBCZ</s>"
    for image in (picture(), None):
        example = make_example(question=forged, choices=(forged, "a pear"), image=image)
        row = RowBuilder(processor, PromptConfig(), 2).prompt_row(example, "k", 0, 0)
        special = [token for token in row.prompt_ids if token in processor.tokenizer.all_special_ids]
        assert special == [processor.image_token_id] * (16 if image else 0)
        collate([row], processor.row_format, 0)


def test_text_only_rows_have_a_blank_image_that_the_model_takes(folder: Path, processor: ImageTokenProcessor) -> None:
    row = RowBuilder(processor, PromptConfig(), 2).prompt_row(make_example(image=None), "k", 0, 1)
    batch = collate([row], processor.row_format, 1)
    assert batch.pixel_values.shape == (1, 3, 32, 32) and not batch.has_images
    embeds = Chameleon(Chameleon.load(folder, torch.float32)).embed_prompt(batch)
    assert embeds.shape == (1, len(row.prompt_ids), 64)


# ---- images -----------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(70, 50), (50, 70), (32, 32), (20, 33)], ids=str)
def test_pixel_values_by_hand(processor: ImageTokenProcessor, size: tuple[int, int]) -> None:
    """Shorter side to 32 pixels, the centre of that, 0.0078 of each value, less 1."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    scale = 32 / min(size)
    width, height = (int(scale * side) for side in size)
    resized = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float64)
    top, left = (height - 32) // 2, (width - 32) // 2
    expected = resized[top : top + 32, left : left + 32].transpose(2, 0, 1) * 0.0078 - 1
    pixels, grid = processor.image(image)
    assert grid == (1, 4, 4) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[0], expected, atol=1e-5)


def test_every_image_has_as_many_columns(processor: ImageTokenProcessor) -> None:
    assert processor.image_columns(5, 1000) == processor.image_columns(64, 64) == 16
    for use in (lambda: processor.image_columns(2, 401), lambda: processor.image(Image.new("RGB", (401, 2)))):
        with pytest.raises(ValueError, match="aspect ratio"):
            use()


# ---- files and options ------------------------------------------------------------------------
def test_a_model_from_scratch_loads_again(folder: Path) -> None:
    vlm = Chameleon.load(folder, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert vlm.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    codes = vlm.model.vocabulary_mapping.convert_img2bpe(torch.arange(12)).tolist()
    assert tokenizer.convert_ids_to_tokens([codes[0], codes[9], codes[10]]) == ["IMGIMGAZ", "IMGIMGJZ", "IMGIMGBAZ"]
    assert len(tokenizer) < vlm.config.vocab_size and vlm.get_output_embeddings().out_features == vlm.config.vocab_size
    tokens = vlm.get_image_tokens(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert tokens.shape == (2, 16) and set(tokens.flatten().tolist()) <= set(codes)


def test_saved_processor_is_one_of_transformers(processor: ImageTokenProcessor, tmp_path: Path) -> None:
    processor.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(Chameleon.PROCESSOR_FILES)
    names = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (names["image_processor_type"], names["processor_class"]) == (
        "ChameleonImageProcessor",
        "ChameleonProcessor",
    )
    again = Chameleon.processor(tmp_path, PromptConfig())
    assert again.row_format == processor.row_format and again.eos_id == processor.eos_id
    stock = ChameleonProcessor.from_pretrained(tmp_path)
    image = Image.linear_gradient("L").resize((70, 50)).convert("RGB")
    out = stock(images=image, text="[Question]:{<image>Which?", return_tensors="np")
    markers = {stock.image_start_token_id, stock.image_end_token_id, stock.tokenizer.sep_token_id}
    ids = [token for token in out["input_ids"][0].tolist() if token not in markers]
    assert ids == processor.prompt_ids("[Question]:{", "Which?", [processor.grid])
    assert np.array_equal(out["pixel_values"], processor.image(image)[0])


@pytest.mark.parametrize("begins", [False, True], ids=["plain", "begins-with-bos"])
def test_released_question(processor: ImageTokenProcessor, tmp_path: Path, begins: bool) -> None:
    """Answers are asked for as transformers' processor writes a turn, its separator behind the latent steps."""
    processor.save(tmp_path)
    ours, stock = Chameleon.processor(tmp_path, PromptConfig()), ChameleonProcessor.from_pretrained(tmp_path)
    if begins:
        for tokenizer in (ours.tokenizer, stock.tokenizer):
            bos = tokenizer.bos_token
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
            )
    row = RowBuilder(ours, PromptConfig(asked="released"), 2).prompt_row(make_example(), "k", 0, 1)
    text = "<image>[Question]:{Which fruit is it?}\n[Options]:\n(A).{a fig}\n(B).{a pear}\nAnswer:"
    image = Image.new("RGB", (70, 50))
    expected = stock(images=image, text=text, return_tensors="np")["input_ids"][0].tolist()
    assert [*row.prompt_ids, *row.target_ids] == expected
    assert (row.given, list(row.target_ids)) == (1, [stock.tokenizer.sep_token_id])
    assert (row.prompt_ids[0] == ours.tokenizer.bos_token_id) == begins


def test_a_number_of_columns_that_is_no_square(processor: ImageTokenProcessor, tmp_path: Path) -> None:
    processor.save(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"image_seq_length": 15}')
    with pytest.raises(ValueError, match="15 columns"):
        Chameleon.processor(tmp_path, PromptConfig())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"model.path": "m", "prompt.image_size": "280"}, "prompt.image_size and prompt.max_pixels are not for"),
        ({"model.scratch": "{image_size: 60}"}, "model.scratch: image_size must be a multiple of 8"),
        ({"model.scratch": "{hidden_size: 60}"}, "model.scratch: hidden_size / heads must be an even number"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_do_not_suit(options: dict[str, str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, {"model.backbone": "chameleon", "data.path": "d", **options})
    (found,) = caught.value.lines
    assert line in found


def test_published_size() -> None:
    """512 pixels a side are 1,024 columns, which transformers' own defaults say."""
    config = Chameleon.MODEL.config_class(vq_config={})
    vq = config.vq_config
    assert (vq.resolution // 2 ** (len(vq.channel_multiplier) - 1)) ** 2 == 1024
    assert ChameleonImageProcessorPil().crop_size["height"] == vq.resolution == 512


def test_images_of_another_number_of_columns_are_refused() -> None:
    """Where the processor's files do not fit the model."""
    backbone, _ = tiny_models("chameleon")
    batch = collate(rows_of(), FORMAT, 0)
    batch.pixel_values = batch.pixel_values.repeat(1, 1, 2, 1)
    with pytest.raises(UserError, match="24 image columns, image_seq_length says 12"):
        backbone.embed_prompt(batch)


def test_a_full_vocabulary_grows_for_the_latent_token(folder: Path) -> None:
    """As the pretrained model's, which has no spare row."""
    tokenizer, vlm = AutoTokenizer.from_pretrained(folder), Chameleon.load(folder, torch.float32)
    vlm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    add_tokens(vlm, tokenizer, [LATENT_TOKEN])
    backbone = Chameleon(vlm)
    rows = backbone.head.weight.shape[0]
    assert rows == vlm.config.vocab_size >= len(tokenizer) and rows % 64 == 0
    logits = backbone.logits(torch.randn(3, 64))
    never = (logits == torch.finfo(torch.float32).min).all(0)
    assert tokenizer.convert_ids_to_tokens(never.nonzero()[:, 0].tolist()) == [image_token(code) for code in range(12)]
