"""The run configuration: precedence, what is refused and how it is said, and the way back to a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from data_prep.errors import UserError
from pipeline.backbones import BACKBONES
from pipeline.config import ROOT, ModelConfig, RunConfig
from pipeline.recipe import field_names, load_config
from pipeline.user_files import load_json

RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "methods")
SOUND = {"model.path": "model", "data.path": "data"}


def load(recipe: Path | None = None, **overrides: str) -> RunConfig:
    """`__` in names for the dots."""
    return load_config(recipe, {**SOUND, **{name.replace("__", "."): text for name, text in overrides.items()}})


def problems(recipe: Path | None, overrides: dict[str, str]) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(recipe, overrides)
    return list(caught.value.lines)


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


# ---- precedence -------------------------------------------------------------------------------
def test_defaults_then_recipe_then_command_line(write) -> None:
    recipe = write("optim: {lr: 2.0e-3, clip: 3}\ntrain:\n  seed: 5\n")
    config = load(recipe, optim__clip="4")
    assert (config.optim.lr, config.optim.clip, config.train.seed) == (2e-3, 4.0, 5)
    assert config.optim.weight_decay == RunConfig().optim.weight_decay
    assert load().optim == RunConfig().optim


def test_command_line_keeps_the_rest_of_a_section(write) -> None:
    recipe = write("model: {lora: {r: 8, dropout: 0.1}}")
    config = load(recipe, model__lora__r="4")
    assert config.model.lora is not None
    assert (config.model.lora.r, config.model.lora.dropout) == (4, 0.1)


def test_command_line_opens_a_section_that_is_none() -> None:
    assert load().model.lora is None
    lora = load(model__lora__r="4").model.lora
    assert lora is not None and (lora.r, lora.alpha) == (4, 16)


def test_every_published_default() -> None:
    config = RunConfig()
    assert (config.optim.lr, config.optim.beta1, config.optim.weight_decay, config.optim.clip) == (
        4e-5,
        0.9,
        0.01,
        0.7,
    )
    assert (config.optim.schedule, config.optim.warmup_steps, config.train.seed) == ("constant", 0, 0)
    assert (config.train.global_batch, config.latent.num_patches, config.prompt.max_tokens) == (64, 32, 3400)
    assert config.eval.max_new_tokens == 512
    assert config.latent.model_dump() == {
        "num_patches": 32, "latent_grad": "bptt", "positions": "mrope", "patch_order": "position",
        "selection": "attention", "feedback": "hidden", "weighting": "copy", "auxiliary": "none",
        "auxiliary_weight": 1.0,
    }  # fmt: skip


# ---- values of the command line ---------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("optim.lr", "1e-4", 1e-4),
        ("optim.lr", "3", 3.0),
        ("train.seed", "7", 7),
        ("train.micro_batch", "none", None),
        ("train.micro_batch", "None", None),
        ("train.micro_batch", "4", 4),
        ("model.checkpointing", "false", False),
        ("model.revision", "none", None),
        ("model.revision", "1234567", "1234567"),
        ("model.revision", "1e10", "1e10"),
        ("model.lora", "none", None),
        ("model.dtype", "fp32", "fp32"),
        ("name", "2025_07_01", "2025_07_01"),
        ("name", "none", "none"),
        ("name", "yes", "yes"),
        ("data.source", "none", None),
        ("data.source", "trails", "trails"),
        ("latent.selection", "none", "none"),
        ("train.export", "none", "none"),
        ("data.options", "{hops: 2-3, grid: 3}", {"hops": "2-3", "grid": 3}),
        ("data.options", "{}", {}),
    ],
)
def test_values(name: str, text: str, expected: Any) -> None:
    assert value(load_config(None, {**SOUND, name: text}), name) == expected


def value(config: RunConfig, name: str) -> Any:
    found: Any = config
    for part in name.split("."):
        found = getattr(found, part)
    return found


def test_lists() -> None:
    config = load(model__lora__targets="[q_proj, v_proj]")
    assert config.model.lora is not None and config.model.lora.targets == ["q_proj", "v_proj"]
    config = load(curriculum__stages="[{latents: 1, skip: 2, steps: 3}, {latents: 2, skip: 2, epochs: 0.5}]")
    assert [(s.latents, s.skip, s.steps, s.epochs) for s in config.curriculum.stages] == [
        (1, 2, 3, None),
        (2, 2, None, 0.5),
    ]


def test_numbers_as_text_in_a_recipe(write) -> None:
    """YAML reads 1e-4 as text; it is a number all the same."""
    assert load(write("optim: {lr: 1e-4, eps: '1e-6'}")).optim.lr == 1e-4


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("optim.lr", "-1", "optim.lr: Input should be greater than 0 (given: -1)"),
        ("optim.lr", "fast", "optim.lr: Input should be a valid number"),
        ("optim.lr", "[1", "optim.lr: Input should be a valid number"),
        ("train.global_batch", "1.5", "train.global_batch: Input should be a valid integer"),
        ("train.global_batch", "none", "train.global_batch: Input should be a valid integer"),
        ("model.dtype", "fp16", "model.dtype: Input should be 'auto', 'bf16' or 'fp32' (given: 'fp16')"),
        ("model.checkpointing", "maybe", "model.checkpointing: Input should be a valid boolean"),
        ("curriculum.stages", "3", "curriculum.stages: Input should be a valid list"),
        ("curriculum.stages", "[{latents: 1, skip: 1}]", "curriculum.stages.0: give either epochs or steps"),
        (
            "prompt.image_size",
            "20",
            "prompt.image_size: Input should be greater than or equal to 28 (given: 20)",
        ),
    ],
)
def test_bad_values(name: str, text: str, message: str) -> None:
    (line,) = problems(None, {**SOUND, name: text})
    assert message in line


# ---- names ------------------------------------------------------------------------------------
def test_unknown_option_is_refused_with_the_nearest_name() -> None:
    assert problems(None, {**SOUND, "optim.lrr": "1"}) == ["unknown option --optim.lrr; did you mean --optim.lr?"]
    assert problems(None, {**SOUND, "zzzzzz": "1"}) == ["unknown option --zzzzzz"]


def test_unknown_key_of_a_recipe_is_refused_with_the_nearest_name(write) -> None:
    recipe = write("optim: {lrr: 1}\nmodle: {path: x}\nmodel: {lora: {rr: 3}}\n")
    lines = problems(recipe, SOUND)
    assert f"{recipe}: unknown key optim.lrr; did you mean optim.lr?" in lines
    assert f"{recipe}: unknown key model.lora.rr; did you mean model.lora.r?" in lines
    assert any(line.startswith(f"{recipe}: unknown key modle") for line in lines) and len(lines) == 3


def test_unknown_key_of_a_stage_is_refused(write) -> None:
    (line,) = problems(write("curriculum: {stages: [{latents: 1, skip: 1, epochs: 1, latent: 2}]}"), SOUND)
    assert "unknown key curriculum.stages.0.latent" in line


@pytest.mark.parametrize("name", ["model", "train", "optim", "curriculum.stages.latents", "data.options.hops"])
def test_what_is_no_single_setting_cannot_be_set(name: str) -> None:
    (line,) = problems(None, {**SOUND, name: "1"})
    assert line.startswith(f"unknown option --{name}; did you mean --")


def test_the_commands_own_options_are_suggested() -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, {**SOUND, "resum": "auto"}, also=["resume", "out"])
    assert caught.value.lines == ("unknown option --resum; did you mean --resume?",)


def test_every_name_can_be_set() -> None:
    """Each listed name is a setting: its dumped default is accepted under that name."""
    config = load()
    flat = {name: value(config, name) for name, _ in field_names() if reachable(config, name)}
    assert {"train.seed", "latent.num_patches", "model.lora", "curriculum.stages"} <= flat.keys()
    for name, default in flat.items():
        text = (
            "none" if default is None else default if isinstance(default, str) else yaml.safe_dump(dumped(config, name))
        )
        assert load_config(None, {**SOUND, name: text}) == config, name


def reachable(config: RunConfig, name: str) -> bool:
    found: Any = config
    for part in name.split(".")[:-1]:
        found = getattr(found, part)
    return found is not None


def dumped(config: RunConfig, name: str) -> Any:
    found: Any = config.model_dump(mode="json")
    for part in name.split("."):
        found = found[part]
    return found


# ---- all problems at once ---------------------------------------------------------------------
def test_all_problems_are_said_at_once(write) -> None:
    recipe = write("train: {global_batch: 0, sede: 1}\noptim: {lr: -1}\n")
    lines = problems(recipe, {"latent.num_patches": "-3", "optim.clp": "1"})
    assert len(lines) == 5
    for part in ("--optim.clp", "train.global_batch", "train.sede", "optim.lr", "latent.num_patches"):
        assert sum(part in line for line in lines) == 1
    assert not any("\n" in line for line in lines)


def test_inconsistencies_are_said_at_once() -> None:
    scratch = "{hidden_size: 100, heads: 6, kv_heads: 4, vision_size: 30}"
    lines = problems(None, {"model.scratch": scratch, "model.lora": "{}", "train.micro_batch": "65"})
    assert [line.removeprefix("defaults: ") for line in lines] == [
        "model.scratch: hidden_size / heads must be a multiple of 16 (rotary sections)",
        "model.scratch: vision_size / vision_heads must be a multiple of 4",
        "model.scratch: heads must be a multiple of kv_heads",
        "model.lora: nothing would train the random base of model.scratch",
        "train.micro_batch 65 is larger than train.global_batch 64",
        "no data: give --data DIR, or data.source to make one, or data.mix",
    ]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"data.path": "d"}, "give either model.path or model.scratch"),
        (
            {"data.path": "d", "model.path": "m", "model.scratch": "{}"},
            "give either model.path or model.scratch",
        ),
        ({**SOUND, "prompt.max_tokens": "99"}, "prompt.max_tokens leaves no room besides the latent columns"),
    ],
)
def test_one_inconsistency(overrides: dict[str, str], line: str) -> None:
    assert problems(None, overrides) == [f"defaults: {line}"]


def test_room_besides_the_latent_columns() -> None:
    assert load(prompt__max_tokens="100").prompt.max_tokens == 100  # 3 steps of 33


# ---- files ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not YAML"),
        ("- a\n- b\n", "expected sections"),
        ("", "expected sections"),
        ("just words", "expected sections"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_what_is_no_recipe(write, text: str, message: str) -> None:
    (line,) = problems(write(text), SOUND)
    assert "recipe.yaml" in line and message in line


def test_missing_and_unreadable_recipes(tmp_path: Path) -> None:
    (line,) = problems(tmp_path / "none.yaml", SOUND)
    assert "none.yaml: No such file" in line
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    (line,) = problems(tmp_path / "latin.yaml", SOUND)
    assert "not YAML" in line


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert load_json(path, "settings") == {"a": 1}
    for text, message in [("[1]", "expected an object"), ("{", "not JSON")]:
        path.write_text(text)
        with pytest.raises(UserError, match=f"settings .*x.json: {message}"):
            load_json(path, "settings")
    with pytest.raises(UserError, match=r"settings .*y\.json: No such file"):
        load_json(tmp_path / "y.json", "settings")


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model.lora": "{r: 8, targets: [q_proj]}", "train.micro_batch": "4", "model.revision": "1e5"},
        {
            "name": "no",
            "optim.lr": "1e-4",
            "optim.eps": "1e-12",
            "latent.selection": "none",
            "train.export": "none",
        },
        {"data.source": "trails", "data.options": "{hops: 2-3, mix: 'look:1.0', seed: 1, share: 0.5}"},
        {
            "curriculum.stages": "[{latents: 0, skip: 0, epochs: 0.5},"
            " {latents: 2, skip: 1, steps: 9, where: {kind: [look, 'no']}}]"
        },
    ],
    ids=["defaults", "lora", "words", "source", "stages"],
)
def test_dump_is_a_recipe_of_the_same_config(write, overrides: dict[str, str]) -> None:
    config = load_config(None, {**SOUND, **overrides})
    assert load_config(write(config.dump()), {}) == config


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipes_load(recipe: Path, write) -> None:
    config = load_config(recipe, {"data.path": "data"})
    assert load_config(write(config.dump()), {}) == config


def test_recipes_found() -> None:
    assert RECIPES


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().train.seed = 3  # type: ignore[misc]


# ---- YAML as people mean it -------------------------------------------------------------------
@pytest.mark.parametrize("text", ["train: {seed: 1}\noptim: {lr: 1}\ntrain: {seed: 2}\n", "train: {seed: 1, seed: 2}"])
def test_a_key_given_twice_is_refused(write, text: str) -> None:
    (line,) = problems(write(text), SOUND)
    assert "is given twice" in line and "recipe.yaml" in line


def test_a_merged_key_may_be_given_again(write) -> None:
    stages = "[&one {latents: 1, skip: 1, steps: 4}, &two {<<: *one, steps: 5}, {<<: *two, latents: 2}]"
    config = load(write(f"curriculum: {{stages: {stages}}}"))
    assert [(s.latents, s.steps) for s in config.curriculum.stages] == [(1, 4), (1, 5), (2, 5)]


def test_no_base_60(write) -> None:
    """YAML 1.1 reads 1:30 as 90."""
    for recipe, overrides in ((None, {"train.global_batch": "1:30"}), (write("train: {global_batch: 1:30}"), {})):
        (line,) = problems(recipe, {**SOUND, **overrides})
        assert "train.global_batch: Input should be a valid integer" in line


@pytest.mark.parametrize("text", ["[" * 5000, "name: 2025-13-45"], ids=["deep", "no date"])
def test_yaml_that_no_reader_takes(write, text: str) -> None:
    (line,) = problems(write(text), SOUND)
    assert "not YAML" in line
    (line,) = problems(None, {**SOUND, "data.options": text.removeprefix("name: ")})
    assert "data.options: Input should be a valid dictionary" in line


# ---- bounds -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model.scratch.hidden_size", "0"),
        ("model.scratch.hidden_size", "-64"),
        ("model.scratch.intermediate_size", "0"),
        ("model.scratch.vision_size", "-4"),
        ("model.scratch.vision_heads", "0"),
        ("model.scratch.initializer_range", "-1"),
        ("model.lora.alpha", "0"),
        ("model.lora.targets", "[]"),
        ("model.lora.targets", "['q_(']"),
        ("train.seed", "1" * 23),
        ("curriculum.stages", "[{latents: 0, skip: 0, epochs: 1.0e+300}]"),
        ("curriculum.stages", "[{latents: 0, skip: 0, steps: 1000000000000000000000}]"),
    ],
)
def test_bounds(name: str, text: str) -> None:
    model = {"model.scratch": "{}"} if "scratch" in name else {"model.path": "m"}
    (line,) = problems(None, {"data.path": "d", **model, name: text})
    assert name in line


def test_backbones_of_the_config_are_those_there_are() -> None:
    assert get_args(ModelConfig.model_fields["backbone"].annotation) == tuple(BACKBONES)
