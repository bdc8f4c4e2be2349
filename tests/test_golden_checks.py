"""What the comparison with recorded vectors refuses and what it lets pass: right and wrong cases made here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2VLForConditionalGeneration

from pipeline.backbones.qwen2_vl import Qwen2VL
from pipeline.data.batch import Row
from tests import test_reference_parity as parity
from tests.pipeline.naive import NaiveRow

KEPT = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def backbone():
    return Qwen2VL(Qwen2VL.load(KEPT, torch.float32)).train()


@pytest.fixture
def recorded():
    """The kept case of two rows of two latents."""
    return json.loads((KEPT / "b2_n2_k4.json").read_text()), load_file(KEPT / "b2_n2_k4.safetensors")


def compared(case, data, backbone):
    config = parity.options(case)
    return parity.compare(case, data, config, backbone, *parity.rows_of(case, data, config))


def shorten(case, data):
    """Row 1 with one latent: all that was recorded of its first pass stays true."""
    case["n_latent_per_sample"] = [2, 1]
    at = int((data["input_ids"][1] == case["special_ids"]["latent"]).nonzero()[-1])
    for name, empty in (("input_ids", case["special_ids"]["pad"]), ("labels", -100), ("attention_mask", 0)):
        row = data[name][1]
        data[name][1] = torch.cat([row[:at], row[at + 1 :], torch.tensor([empty])])


@pytest.mark.parametrize("name", ["pass0.scores", "pass0.last_hidden"])
def test_every_row_of_a_pass_is_compared(recorded, backbone, name):
    """Also the row with fewer latents, as far as it goes; not what the released code does to it afterwards."""
    case, data = recorded
    shorten(case, data)
    data["pass1.scores"][1] = data["pass1.last_hidden"][1] = 9.0
    (left,) = compared(case, data, backbone)
    assert "rows 1 from" in left
    data[name][1] += 0.01
    with pytest.raises(AssertionError, match="of pass 0, row 1: off by"):
        compared(case, data, backbone)


def test_numbers_of_latents_are_compared(recorded, backbone):
    case, data = recorded
    assert compared(case, data, backbone) == []
    case["n_latent_per_sample"] = [3, 3]
    with pytest.raises(AssertionError, match="numbers of latents"):
        compared(case, data, backbone)


def test_final_embeddings_are_compared(recorded, backbone):
    case, data = recorded
    data["final_inputs_embeds"][0, 30, 3] += 0.01
    with pytest.raises(AssertionError, match="embeddings of row 0"):
        compared(case, data, backbone)


def test_what_is_absent_is_said(recorded, backbone):
    case, data = recorded
    case["grad_norms"] = {}
    del data["pass1.scores"]
    assert compared(case, data, backbone) == ["pass1.scores", "gradient norms of 70 of 70 parameters"]


def running_out(case, pixels):
    """Two prompts of unequal length that run out of patches, by the method's definition; (case, tensors)."""
    vlm = Qwen2VLForConditionalGeneration.from_pretrained(KEPT, attn_implementation="eager").train()
    case = {**case, "K": 8, "n_latent_per_sample": [3, 3], "grad_norms": {}}
    image, start, end, latent = (case["special_ids"][n] for n in ("image", "vision_start", "vision_end", "latent"))
    random = np.random.default_rng(3)
    data = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 8, 10]] * 2)}
    ids, labels, rows, losses, finals = [], [], [], [], []
    for i, before in enumerate((2, 6)):
        prompt = [*random.integers(10, 400, before), start, *[image] * 20, end, *random.integers(10, 400, 4)]
        target = [*random.integers(10, 400, 5), case["special_ids"]["eos"]]
        row = Row("", i, prompt, np.zeros((3, len(prompt)), int), target, 3, pixels[i].numpy(), [(1, 8, 10)])
        naive = NaiveRow(vlm, row, parity.options(case))
        losses.append(naive.nll())
        finals.append((naive.embeds.detach(), naive.logits().detach()))
        rows.append(naive)
        # left padding is in the first row alone: the second one is the longer by 4
        ids.append([0] * (6 - before) + prompt + [latent] * 3 + target)
        labels.append([-100] * (len(ids[-1]) - len(target)) + target)
    for step in range(3):
        taken = [[c + 4 - 4 * i for c in row.steps[step].columns] for i, row in enumerate(rows)]
        data[f"pass{step}.selected_abs"] = torch.tensor([columns + [-1] * (8 - len(columns)) for columns in taken])
        data[f"pass{step}.scores"] = torch.stack([scores_of(row, step, image) for row in rows])
        ends = [len(r.prompt) + sum(len(s.columns) + 1 for s in r.steps[: step + 1]) - 1 for r in rows]
        data[f"pass{step}.last_hidden"] = torch.stack([r.embeds[at].detach() for r, at in zip(rows, ends, strict=True)])
    data["input_ids"], data["labels"] = torch.tensor(ids), torch.tensor(labels)
    data["attention_mask"] = torch.tensor([[0] * (4 - 4 * i) + [1] * (len(ids[0]) - 4 + 4 * i) for i in range(2)])
    data["final_inputs_embeds"] = pad_sequence([embeds for embeds, _ in finals], batch_first=True)
    data["final_logits"] = pad_sequence([logits for _, logits in finals], batch_first=True)
    data["final_attention_mask"] = pad_sequence([torch.ones(len(embeds)) for embeds, _ in finals], batch_first=True)
    loss = torch.cat(losses).mean()
    loss.backward()
    data["loss"] = loss.detach()[None]
    data["grad.embed_tokens.rownorms"] = vlm.get_input_embeddings().weight.grad.norm(dim=1)
    return case, data


def scores_of(row, step, image):
    """Scores of a step over the image, -inf where a patch was taken before."""
    scores = row.steps[step].scores.clone()
    scores[[column for earlier in row.steps[:step] for column in earlier.columns]] = float("-inf")
    return scores[torch.tensor(row.row.prompt_ids) == image]


def test_patches_run_out_in_rows_of_unequal_length(recorded, backbone):
    """Slots that stay empty follow the method, and all is compared; a patch taken twice departs from it in its row."""
    case, data = running_out(recorded[0], recorded[1]["pixel_values"])
    assert compared(case, data, backbone) == ["gradient norms of 70 of 70 parameters"]
    data["pass2.selected_abs"][0, 4:] = data["pass0.selected_abs"][0, :4]
    (left,) = compared(case, data, backbone)
    assert "rows 0 from" in left
    data["pass2.scores"][1] += 0.01
    with pytest.raises(AssertionError, match="scores of pass 2, row 1"):
        compared(case, data, backbone)
    data["pass2.selected_abs"][1, 0] = data["pass0.selected_abs"][1, 0]
    with pytest.raises(AssertionError, match="pass 2, row 1: other patches"):
        compared(case, data, backbone)
