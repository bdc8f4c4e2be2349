"""Released checkpoints of Chameleon: names as they were, its image tokenizer frozen among the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, ChameleonForConditionalGeneration

from data_prep.errors import UserError
from data_prep.tokenizer import train_tokenizer
from pipeline.backbones.chameleon import Chameleon
from pipeline.config import ROOT, ScratchConfig
from pipeline.convert import main
from pipeline.data.batch import collate
from pipeline.export import ExportInfo
from pipeline.latent.attention import ATTENTION_NAME
from pipeline.latent.method import LatentMethod
from pipeline.latent.schedules import latent_forward
from pipeline.loaded import load_export
from pipeline.prompt import RowBuilder
from pipeline.recipe import load_config
from tests.pipeline.conftest import TEXTS
from tests.pipeline.examples import make_example

SCRATCH = ScratchConfig(
    hidden_size=64, intermediate_size=96, layers=2, heads=2, kv_heads=1, vision_size=8, image_size=32, image_tokens=12,
    tie_embeddings=False,
)  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PREFIX = "base_causallm.base_model.model."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    Chameleon.create(SCRATCH, train_tokenizer(TEXTS, folder, 520, Chameleon.TOKENIZER), folder)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path) -> torch.nn.Module:
    """As the released trainer leaves it: LoRA, three tokens more."""
    vlm = ChameleonForConditionalGeneration.from_pretrained(base, attn_implementation=ATTENTION_NAME)
    model = get_peft_model(vlm, LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS))
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(base)) + 3, mean_resizing=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def convert(base: Path, weights: Path, out: Path, **options: str) -> None:
    words = {"from_": "released", "weights": str(weights), "base": str(base), "out": str(out)}
    main(**words, **{"benchmark": "scienceqa", "latent.num_patches": "2"}, **options)


@pytest.mark.parametrize("export", ["merged", "adapter"])
def test_same_logits(base: Path, trained: torch.nn.Module, tmp_path: Path, export: str) -> None:
    weights, out = tmp_path / "f.pth", tmp_path / "out"
    state = {PREFIX + name.removeprefix("base_model.model."): tensor for name, tensor in trained.state_dict().items()}
    torch.save(state, weights)
    convert(base, weights, out, export=export)
    published = load_config(ROOT / "recipes" / "published" / "chameleon_scienceqa.yaml", {})
    loaded = load_export(out, torch.float32)
    assert ExportInfo.read(out).prompt == published.prompt
    builder = RowBuilder(loaded.processor, published.prompt, 2)
    batch = collate([builder.row(make_example(), "k", 0, 2, ["It is green"])], loaded.processor.row_format, 2)
    logits = []
    for model in (trained, loaded.model.backbone.vlm):
        backbone = Chameleon(model)
        with torch.no_grad():
            trace = latent_forward(backbone, batch, LatentMethod.of(loaded.info.latent, backbone))
            logits.append(backbone.logits(trace.predictors(batch.latents)))
    assert logits[0].shape == logits[1].shape
    assert (logits[0] - logits[1]).abs().max() < 1e-5
    if export == "adapter":
        main(to="released", model=str(out), out=str(tmp_path / "back.pth"))
        back = torch.load(tmp_path / "back.pth", weights_only=True)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_a_changed_image_tokenizer_is_refused(base: Path, trained: torch.nn.Module, tmp_path: Path) -> None:
    name = "model.vqmodel.quantize.embedding.weight"
    state = {PREFIX + key.removeprefix("base_model.model."): value for key, value in trained.state_dict().items()}
    state[PREFIX + name] = state[PREFIX + name] + 1e-3
    torch.save(state, tmp_path / "f.pth")
    with pytest.raises(UserError, match=f"1 of .* frozen weights are not those of .*: {name}"):
        convert(base, tmp_path / "f.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()
