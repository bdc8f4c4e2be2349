"""Vectors recorded from the released code against ours: every case in a folder is run and reported by name.

`IVTLR_GOLDEN` names another folder of the same form; the default is two cases kept with the tests.  The released code
inserts patches in an order that belongs to its device, so selections are compared as sets and then replayed.
Where the released code departs from the method in a row (a patch taken twice, patches put inside the text of a row
with fewer latents) only what comes before the departure is compared there, and the row is checked against itself run
alone.  What a case does not hold, and so was not compared, is said beside its name.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.backbones.qwen2_vl import Qwen2VL
from pipeline.data.batch import Row, RowFormat, collate
from pipeline.latent.decode import Decoding, generate
from pipeline.latent.method import LatentConfig, LatentMethod
from pipeline.latent.schedules import latent_forward
from pipeline.latent.select import select_patches
from pipeline.loss import token_nll
from pipeline.prompt import check_num_patches

GOLDEN = Path(os.environ.get("IVTLR_GOLDEN") or Path(__file__).parent / "golden")
CASES = sorted(p.stem for p in GOLDEN.glob("*.json") if p.with_suffix(".safetensors").exists())
TRAINING = [name for name in CASES if not name.startswith("gen")]
PASS_TENSORS = ("selected_abs", "scores", "last_hidden")
GENERATION = [name for name in CASES if name.startswith("gen")]


def load(name):
    return json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")


def new_name(name):
    """Parameter name of transformers 4.51 -> that of 5."""
    for old, new in (("visual.", "model.visual."), ("model.", "model.language_model.")):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


@pytest.fixture(scope="module")
def backbone():
    return Qwen2VL(Qwen2VL.load(GOLDEN, torch.float32)).train()


def options(case):
    return LatentConfig(num_patches=case["K"], latent_grad="detach", positions="sequential", patch_order="score")


def rows_of(case, data, config):
    """The collated batch taken apart to rows; (rows, format, left padding of each row in the recorded batch)."""
    special = case["special_ids"]
    fmt = RowFormat(special["pad"], special["image"], (4, data["pixel_values"].shape[-1]), (1, 2, 2), 2)
    pixels = data["pixel_values"].reshape(len(data["image_grid_thw"]), -1, fmt.blank_shape[1])
    rows, left = [], []
    for i, ids in enumerate(data["input_ids"]):
        mask = data.get("attention_mask", torch.ones_like(data["input_ids"]))[i].bool()
        real = ids[mask]
        labels = data["labels"][i][mask] if "labels" in data else torch.full_like(real, -100)
        latent = (real == special["latent"]).nonzero()[:, 0]
        labelled = (labels != -100).nonzero()[:, 0]
        if len(latent):
            start, end = int(latent[0]), int(latent[-1]) + 1
        else:
            start = end = int(labelled[0]) if len(labelled) else len(real)
        if end - start != len(latent):
            raise ValueError("latent tokens are not next to each other")
        if "labels" in data and (len(labelled) != len(real) - end or len(labelled) and int(labelled[0]) != end):
            raise ValueError("labels are not exactly the tokens after the latents")
        prompt = real[:start].tolist()
        if len(latent):
            check_num_patches(prompt.count(fmt.image_token_id), config.num_patches)
        grid = tuple(data["image_grid_thw"][i].tolist())
        rows.append(
            Row(
                key=f"row {i}",
                row_id=i,
                prompt_ids=prompt,
                prompt_positions=torch.arange(start).expand(3, -1).numpy(),
                target_ids=real[end:].tolist(),
                latents=len(latent),
                pixel_values=pixels[i].numpy(),
                image_grid=[grid],
            )
        )
        left.append(int(mask.int().argmax()))
    return rows, fmt, left


class Recorded:
    """Replays recorded selections, comparing each with our own; in a row, up to where the released code departs."""

    def __init__(self, case, data, batch, left, config):
        self.case, self.data, self.batch, self.left, self.config = case, data, batch, left, config
        self.taken = [set() for _ in left]
        self.departed = {}  # row -> step in which the released code took patches a second time
        self.given = []
        width = batch.prompt_ids.shape[1]
        self.shift = [width - int(m.sum()) - pad for m, pad in zip(batch.prompt_mask, left, strict=True)]

    def recorded(self, step):
        if f"pass{step}.selected_abs" in self.data:
            return self.data[f"pass{step}.selected_abs"].tolist()
        return None

    def __call__(self, step, saliency):
        candidates = self.batch.image_mask.clone()
        for row, taken in enumerate(self.taken):
            candidates[row, list(taken)] = False
        ours, filled = select_patches(saliency, candidates, self.config.num_patches, patch_order="score")
        recorded = self.recorded(step)
        for row, slots in enumerate(recorded or []):
            if int(self.batch.latents[row]) <= step or row in self.departed:
                continue
            columns = [c + self.shift[row] for c in slots if c >= 0]  # below 0: no patch was left for the slot
            fresh = [c for c in dict.fromkeys(columns) if candidates[row, c]]
            assert set(fresh) == set(ours[row][filled[row]].tolist()), f"pass {step}, row {row}: other patches"
            if len(fresh) < len(columns):
                self.departed[row] = step
            ours[row] = torch.tensor(fresh + [0] * (len(slots) - len(fresh)))
            filled[row] = torch.arange(len(slots)) < len(fresh)
        for row in range(len(self.taken)):
            if int(self.batch.latents[row]) > step:
                self.taken[row] |= set(ours[row][filled[row]].tolist())
        self.given.append((ours, filled))
        return ours, filled


def close(actual, expected, tolerance, what):
    error = (actual - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance, f"{what}: off by {error:.2e}, allowed {tolerance:.0e}"


def parse(case, data, config, record_property):
    """`rows_of`; nothing for a case that the method refuses, which is reported as refused."""
    try:
        return rows_of(case, data, config)
    except ValueError as refused:
        record_property("golden", f"refused: {refused}")
        return None


@pytest.mark.parametrize("name", TRAINING)
def test_training_case(name, backbone, record_property):
    case, data = load(name)
    config = options(case)
    parsed = parse(case, data, config, record_property)
    if parsed is None:
        return
    not_compared = compare(case, data, config, backbone, *parsed)
    if not_compared:
        record_property("golden", f"passed as far as compared; not compared: {', '.join(not_compared)}")


def compare(case, data, config, backbone, rows, fmt, left):
    """A training case against our run of it; returns what it gave no way to compare."""
    counted = [row.latents for row in rows]
    assert case.get("n_latent_per_sample", counted) == counted, "numbers of latents: in the JSON, and in the ids"
    passes = max(row.latents for row in rows)
    batch = collate(rows, fmt, passes)
    replay = Recorded(case, data, batch, left, config)
    backbone.zero_grad()
    trace = latent_forward(backbone, batch, LatentMethod.of(config, backbone), replay=replay)
    not_compared = compare_passes(data, trace, batch, replay)
    not_compared += [name for name in ["final_inputs_embeds"] if name not in data]
    nll = token_nll(trace.predictors(batch.latents), batch.labels, backbone.head)
    nll.mean().backward()

    hidden = torch.cat(trace.hidden, dim=1)
    mask = torch.cat([batch.prompt_mask, *[columns_of(step) for step in trace.steps], batch.target_mask], dim=1)
    logits, embeds = backbone.logits(hidden.detach()), torch.cat(trace.embeds, dim=1).detach()
    departed = sorted({i for i, row in enumerate(rows) if row.latents < passes} | replay.departed.keys())
    for i in set(range(len(rows))) - set(departed):
        recorded = data["final_attention_mask"][i].bool()
        if "final_inputs_embeds" in data:
            close(embeds[i][mask[i]], data["final_inputs_embeds"][i][recorded], 1e-4, f"embeddings of row {i}")
        close(logits[i][mask[i]], data["final_logits"][i][recorded], 1e-4, f"logits of row {i}")
    if departed:
        numbers = ", ".join(map(str, departed))
        not_compared.append(f"loss, gradients, and rows {numbers} from where the released code leaves the method")
    else:
        close(nll.mean(), data["loss"][0], 1e-5, "loss")
        not_compared += compare_gradients(case, data, backbone)
    check_rows_alone(rows, fmt, config, backbone, logits, mask, replay)
    return not_compared


def columns_of(step):
    return torch.cat([step.filled, step.active[:, None]], dim=1)


def compare_passes(data, trace, batch, replay):
    """Scores and latent text of every pass of every row, as far as the released code follows the method there.

    Returns the names of what is not recorded.
    """
    names = [f"pass{step}.{what}" for step in range(len(trace.steps)) for what in PASS_TENSORS]
    for step, latent in enumerate(trace.steps):
        scores, hidden = data.get(f"pass{step}.scores"), data.get(f"pass{step}.last_hidden")
        for row, latents in enumerate(batch.latents.tolist()):
            # the step that departs still read its scores and h before it
            if latents <= step or replay.departed.get(row, step) < step:
                continue
            if scores is not None:
                ours = latent.saliency[row].masked_fill(~latent.candidates[row], float("-inf"))[batch.image_mask[row]]
                free = ~ours.isinf()
                assert torch.equal(free, ~scores[row].isinf()), f"pass {step}, row {row}: other columns were free"
                close(ours[free], scores[row][free], 1e-5, f"scores of pass {step}, row {row}")
            if hidden is not None:
                close(latent.latent[row], hidden[row], 1e-4, f"h of pass {step}, row {row}")
    return [name for name in names if name not in data]


def compare_gradients(case, data, backbone):
    """Every recorded norm and gradient; returns a word on parameters without a recorded norm."""
    parameters = dict(backbone.core.named_parameters())
    latent = case["special_ids"]["latent"]
    for name, expected in case["grad_norms"].items():
        if name == "model.embed_tokens.weight":
            continue  # compared by rows below: the released code puts a meaningless gradient in the latent's row
        norm = parameters[new_name(name)].grad.norm().item()
        assert abs(norm - expected) <= 1e-4 * expected + 1e-9, f"gradient norm of {name}: {norm} for {expected}"
    for key, expected in data.items():
        if key.startswith("grad.") and "embed_tokens" not in key:
            actual = parameters[new_name(key.removeprefix("grad."))].grad
            close(actual, expected, 1e-4 * max(1.0, expected.abs().max().item()), key)
    rows = parameters["model.language_model.embed_tokens.weight"].grad.norm(dim=1)
    expected = data["grad.embed_tokens.rownorms"].clone()
    rows[latent] = expected[latent] = 0
    close(rows, expected, 1e-4 * max(1.0, expected.max().item()), "gradient of the embedding rows")
    trained = {name for name, parameter in parameters.items() if parameter.grad is not None}
    without = trained - {new_name(name) for name in case["grad_norms"]}
    return [f"gradient norms of {len(without)} of {len(trained)} parameters"] if without else []


def check_rows_alone(rows, fmt, config, backbone, logits, mask, replay):
    """A row of the batch gives what it gives alone."""
    for i, row in enumerate(rows):
        batch = collate([row], fmt, row.latents)
        chosen = iter(replay_of_row(replay, i, row))
        with torch.no_grad():
            trace = latent_forward(
                backbone, batch, LatentMethod.of(config, backbone), replay=lambda step, s, chosen=chosen: next(chosen)
            )
            alone = backbone.logits(torch.cat(trace.hidden, dim=1))[0]
        real = torch.cat([batch.prompt_mask, *map(columns_of, trace.steps), batch.target_mask], dim=1)[0]
        close(logits[i][mask[i]], alone[real], 2e-4, f"row {i} in its batch and alone")


def replay_of_row(replay, row, parsed):
    """The selections that a row was given in its batch, in its own columns."""
    shift = replay.batch.prompt_ids.shape[1] - len(parsed.prompt_ids)
    # an empty slot holds column 0 of the batch, which a shorter row does not have
    return [((columns[row : row + 1] - shift).clamp(min=0), filled[row : row + 1]) for columns, filled in replay.given]


@pytest.mark.parametrize("name", GENERATION)
def test_generation_case(name, backbone, record_property):
    case, data = load(name)
    config = options(case)
    parsed = parse(case, data, config, record_property)
    if parsed is None:
        return
    rows, fmt, _ = parsed
    assert [row.latents for row in rows] == [case["n_latent"]]
    batch = collate(rows, fmt, case["n_latent"])
    replay = RecordedEmbeddings(case, data, batch, backbone)
    backbone.eval()
    out = generate(
        backbone,
        batch,
        LatentMethod.of(config, backbone),
        Decoding(case["max_new_tokens"], case["special_ids"]["eos"]),
        replay,
    )
    backbone.train()
    if replay.exhausted:
        record_property("golden", "compared up to where the released code takes patches twice")
        return
    assert out.tokens[0] == case["generated"]
    assert out.autoregressive_steps(0) == case["n_latent"] + len(case["generated"])
    # one more than the released code's: the last column goes through the model again as generate's own first
    assert len(case["forward_calls"]) == case["n_latent"] + len(case["generated"])
    assert out.forward_calls == 1 + case["n_latent"] + len(case["generated"])


class RecordedEmbeddings:
    """Replays a generation's patches; their order is recorded as embeddings, so each is matched with its column."""

    def __init__(self, case, data, batch, backbone):
        self.inserted, self.k = data["final_inputs_embeds"][0], case["K"]
        with torch.no_grad():
            self.prompt = backbone.embed_prompt(batch)[0]
        self.free = batch.image_mask.clone()
        self.exhausted = False

    def __call__(self, step, saliency):
        ours, filled = select_patches(saliency, self.free, self.k, patch_order="score")
        if not self.exhausted:
            start = len(self.prompt) + step * (self.k + 1)
            inserted = self.inserted[start : start + self.k]
            columns = torch.cdist(inserted, self.prompt).argmin(1)
            close(self.prompt[columns], inserted, 1e-5, f"embeddings inserted in pass {step}")
            fresh = [c for c in dict.fromkeys(columns.tolist()) if self.free[0, c]]
            assert set(fresh) == set(ours[0][filled[0]].tolist()), f"pass {step}: other patches"
            self.exhausted = len(fresh) < self.k
            ours = torch.tensor([fresh + [0] * (self.k - len(fresh))])
            filled = torch.arange(self.k)[None] < len(fresh)
        self.free[0, ours[0][filled[0]]] = False
        return ours, filled


def test_cases_found():
    """There is something to run, and every description has its tensors."""
    assert CASES, f"no cases in {GOLDEN}"
    described = [p for p in GOLDEN.glob("*.json") if "case" in json.loads(p.read_text())]
    assert not [p.name for p in described if p.stem not in CASES], "cases without their .safetensors"
