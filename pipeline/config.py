"""The typed run configuration: defaults <- recipe file <- command line, and every check, all problems at once.

Nothing here builds a model or a process group; what is wrong is said before any long work starts.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_prep.cli import unknown_options
from data_prep.errors import UserError
from pipeline.backbones import BACKBONES
from pipeline.curriculum import CurriculumConfig
from pipeline.latent.method import LatentConfig
from pipeline.prompt import PromptConfig
from pipeline.registry import load_plugin
from pipeline.user_files import read_yaml

ROOT = Path(__file__).resolve().parents[1]
DEMO_RECIPE = ROOT / "recipes" / "demo.yaml"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ScratchConfig(Section):
    """Shape of a model trained from scratch; its tokenizer is trained on the data."""

    hidden_size: int = Field(128, ge=16)
    intermediate_size: int = Field(352, ge=1)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    kv_heads: int = Field(4, ge=1)
    vision_layers: int = Field(1, ge=1)
    vision_size: int = Field(64, ge=4)
    vision_heads: int = Field(2, ge=1)
    image_size: int = Field(64, ge=8)
    """Chameleon: pixels a side of its images, 8 for each image column; Qwen's have their own size."""
    image_tokens: int = Field(256, ge=2)
    """Chameleon: different tokens that its image tokenizer makes."""
    vocab_size: int = Field(2000, ge=300)
    """Most entries of the tokenizer that is trained."""
    initializer_range: float = Field(0.02, gt=0)
    tie_embeddings: bool = True


class LoraConfig(Section):
    """LoRA on the language model's projections (published: these values)."""

    r: int = Field(64, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: list[Annotated[str, Field(pattern=r"^[\w.]+$")]] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1
    )
    """Module names inside the language model."""
    export: Literal["merged", "adapter"] = "merged"
    """Export one merged model, or the adapter beside its base's name."""


class ModelConfig(Section):
    """Which model, and what of it is trained."""

    backbone: Literal["qwen2_vl", "qwen2_5_vl", "chameleon"] = "qwen2_vl"
    path: str | None = None
    """Local folder or hub id of a pretrained model; none with `scratch`."""
    revision: str | None = None
    """Commit or tag on the hub."""
    scratch: ScratchConfig | None = None
    """Train this shape from random weights instead."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on GPUs that have it, else fp32."""
    lora: LoraConfig | None = None
    """None trains all parameters that are not frozen."""
    freeze_vision: bool = False
    """Keep the vision tower as it is."""
    checkpointing: bool = True
    """Recompute layers in backward instead of keeping their activations."""
    schedule: Literal["auto", "segmented", "prepass"] = "auto"
    """How latent passes are executed, with the same numbers (pipeline/latent/schedules.py); prepass: `detach` only."""


class MixedData(Section):
    """A data set of a mixture."""

    path: str = Field(min_length=1)
    """Shard folder."""
    weight: int = Field(ge=1, le=10_000)
    """Its rows among every so many as all weights are together."""


class DataConfig(Section):
    """Where rows come from and how they are read."""

    path: str | None = None
    """Shard folder made by data_prep.shard, or the URL of one (also --data)."""
    mix: list[MixedData] = []
    """Several shard folders in place of one: `[{path: data/a, weight: 3}, {path: data/b, weight: 1}]` takes 3 rows of a
    and 1 of b in every 4, evenly spread.  Each data set goes through its own epochs, every sample once in each; the
    stream of rows never ends, so that no batch is incomplete, and one of a stage's `epochs` is as many rows as all data
    sets have together.  Validation takes the val splits of all; evaluation, without --data, the first one's."""
    cache_gb: float | None = Field(None, ge=0)
    """Room for what is kept of a URL's shards (data_prep/storage/cache.py); 0: none; default IVTLR_CACHE_GB, or 8."""
    source: Literal["m3cot", "scienceqa", "jsonl", "webdataset", "trails"] | None = None
    """Make the folder from this source when it does not exist."""
    options: dict[str, str | int | float] = {}
    """That source's own options."""
    workers: int = Field(1, ge=0)
    """Processes a rank that decode and tokenise; 0 does it in the training process."""
    last_batch: Literal["drop", "pad"] = "drop"
    """What becomes of an epoch's last, incomplete batch."""
    group_by_length: int = Field(0, ge=0, le=10_000)
    """W: the samples of every W global batches are sorted by length, as far as the index tells it (image columns, and
    text bytes / 4), and cut into W batches anew, which come in random order: less padding, but batches of rows alike in
    length.  0 leaves the order random."""
    max_bad: int = Field(100, ge=0)
    """Stop when more samples than this could not be used (also --max_bad)."""


class OptimConfig(Section):
    """AdamW and what is done to its gradients."""

    lr: float = Field(4e-5, gt=0)
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """After warm-up: constant; a cosine down to 5% at the end of the last stage; or warm-up, stable, decay: constant,
    then a line down to 5% over the last 30% of all steps."""
    warmup_steps: int = Field(0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    decay_vectors: bool = False
    """Decay norms and biases too (published: true)."""
    clip: float = Field(0.7, ge=0)
    """Largest gradient norm; 0 does not clip."""
    loss_norm: Literal["global", "micro_batch"] = "global"
    """Mean over all labelled tokens of the step, or of each micro-batch (published)."""


class TrainConfig(Section):
    """Batch, cadences and reproducibility."""

    global_batch: int = Field(64, ge=1)
    """Rows of an optimizer step over all ranks: what is kept when the number of ranks changes."""
    micro_batch: int | None = Field(None, ge=1)
    """Rows that one rank computes at once; none: as `global_batch` and `accumulation` say, or its whole share."""
    accumulation: int | None = Field(None, ge=1)
    """Micro-batches of a step on one rank; none: as the others say."""
    seed: int = Field(0, ge=0, lt=2**63)
    checkpoint_every: int = Field(200, ge=0)
    """Steps between checkpoints inside a stage; 0: stage ends only."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of them are kept besides stage ends and the best."""
    async_checkpoints: bool = False
    """Copy what a checkpoint holds and write it while training goes on; each rank needs the memory of the copy."""
    validate_every: int = Field(200, ge=0)
    """Steps between validations; 0: stage ends only."""
    val_samples: int = Field(64, ge=0)
    """Rows of the fixed validation subset; 0 does not validate."""
    val_batch: int = Field(16, ge=1)
    """Rows that one rank decodes at once."""
    log_every: int = Field(10, ge=1)
    rollback_after: int = Field(5, ge=0)
    """A step whose loss or gradient is no number is left out.  After so many steps in a row that were, or that spiked,
    parameters and optimizer of the newest checkpoint before them are taken again, and training goes on with the rows
    behind them; where that does not help, it stops.  0: stop at the first."""
    spike: float = Field(20.0, ge=0, allow_inf_nan=False)
    """A loss more than so many (robust) deviations above the median of up to 64 steps before it counts as a spike; 0:
    none does."""
    hang_minutes: float = Field(30.0, ge=0, allow_inf_nan=False)
    """The run ends, naming the rank that hangs, when a part of a step (data, forward, ...) takes longer, or 20 times as
    long as ever before and 2 minutes; 0: never."""
    memory_check: Literal["error", "warn"] = "error"
    """When parameters and optimizer will not fit into memory by the forecast: stop before loading them, or go on."""
    trace: bool = False
    """Name the rows of every step in metrics.jsonl, in the order of the global batch."""
    export: Literal["stages", "last", "none"] = "stages"
    """Which stage ends are exported to Hugging Face format."""


class EvalConfig(Section):
    """Decoding at validation and, unless its own options say else, in pipeline.evaluate and pipeline.ask."""

    max_new_tokens: int = Field(512, ge=1)
    """Generated tokens of one answer (published: 512)."""


class RunConfig(Section):
    """Everything about a run that is not the machine it runs on."""

    name: str = "run"
    """Names the default run folder, runs/NAME."""
    plugin: str | None = None
    """A Python file of one's own that registers parts of the method (also --plugin; docs/new_method.md)."""
    model: ModelConfig = ModelConfig()
    prompt: PromptConfig = PromptConfig()
    latent: LatentConfig = LatentConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    def dump(self) -> str:
        """As YAML that is itself a recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def field_names(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, annotation) of everything that can be set."""
    for name, info in model.model_fields.items():
        kinds = (info.annotation, *get_args(info.annotation))
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if len(kinds) > 1 or not sections:  # a section that may be none can be set as a whole
            yield prefix + name, info.annotation
        for section in sections:
            if get_origin(info.annotation) is not list:
                yield from field_names(section, f"{prefix}{name}.")


def load_config(
    recipe: Path | Sequence[Path] | None, overrides: Mapping[str, str], also: Iterable[str] = ()
) -> RunConfig:
    """Defaults <- recipes, the first to the last <- overrides (dotted name -> text).

    `also` are the command's own options, to be suggested.  Raises UserError naming every unknown key (with the nearest
    right name) and every bad value.
    """
    recipes = [recipe] if isinstance(recipe, Path) else list(recipe or [])
    values = read_recipes(recipes)
    values = _without_other_data(values, [name.removeprefix("data.") for name in overrides])
    known = dict(field_names())
    problems = unknown_options(overrides, [*known, *also])
    for name, text in overrides.items():
        if name not in known:
            continue
        place = values
        *sections, last = name.split(".")
        for section in sections:
            inner = place.get(section)
            if inner is not None and not isinstance(inner, dict):
                break  # validation says what is wrong with it
            place[section] = place = dict(inner or {})
        else:
            place[last] = _value(text, known[name])
    if isinstance(plugin := values.get("plugin"), str):
        load_plugin(Path(plugin))  # before the names that it registers are checked
    try:
        config = validate(values, ",".join(map(str, recipes)) or "defaults")
    except UserError as error:
        raise UserError(*problems, *error.lines) from None
    if problems:
        raise UserError(*problems)
    return config


def validate(values: Mapping[str, Any], origin: str) -> RunConfig:
    """Typed config of nested values.  Raises UserError with one line for each problem."""
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        known = dict(field_names())
        raise UserError(*(f"{origin}: {explain(problem, known)}" for problem in error.errors())) from None
    if problems := list(inconsistencies(config)):
        raise UserError(*(f"{origin}: {line}" for line in problems))
    return config


def recipe_paths(names: str) -> list[Path]:
    """The files of a `--recipe` option, which has commas between several."""
    return [Path(name) for name in names.split(",")]


def merged(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of `over`, section by section; a list is replaced whole."""
    both = dict(values)
    for name, value in over.items():
        before = both.get(name)
        both[name] = merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return both


def read_recipes(paths: Iterable[Path]) -> dict[str, Any]:
    """Nested values of recipe files, laid over each other in order.  Raises UserError as `read_recipe`."""
    values: dict[str, Any] = {}
    for path in paths:
        over = read_recipe(path)
        given = over.get("data")
        values = merged(_without_other_data(values, given if isinstance(given, dict) else ()), over)
    return values


def _without_other_data(values: dict[str, Any], given: Collection[str]) -> dict[str, Any]:
    """`values` without the shard folders that those `given` later, of fields of `data`, take the place of."""
    replaced = {"path": "mix", "mix": "path"}
    gone = {other for name, other in replaced.items() if name in given and other not in given}
    data = values.get("data")
    if not gone or not isinstance(data, dict):
        return values
    return {**values, "data": {name: value for name, value in data.items() if name not in gone}}


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe file's nested values.  Raises UserError where it is missing or not YAML of a mapping."""
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"recipe {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe {path}: expected sections such as `train:`")
    return values


def inconsistencies(config: RunConfig) -> Iterator[str]:
    """What is wrong between fields, one line each."""
    model, train = config.model, config.train
    if (model.path is None) == (model.scratch is None):
        yield "give either model.path or model.scratch"
    yield from BACKBONES[model.backbone].problems(model, config.prompt)
    if model.scratch and model.scratch.heads % model.scratch.kv_heads:
        yield "model.scratch: heads must be a multiple of kv_heads"
    if model.scratch and model.lora:
        yield "model.lora: nothing would train the random base of model.scratch"
    if model.schedule == "prepass" and config.latent.latent_grad == "bptt":
        yield "model.schedule prepass needs latent.latent_grad detach: its latent passes keep no graph"
    if train.micro_batch and train.micro_batch > train.global_batch:
        yield f"train.micro_batch {train.micro_batch} is larger than train.global_batch {train.global_batch}"
    if config.data.path is None and config.data.source is None and not config.data.mix:
        yield "no data: give --data DIR, or data.source to make one, or data.mix"
    if config.data.path is not None and config.data.mix:
        yield "give either data.path (--data) or data.mix"
    folders = [Path(member.path).resolve() for member in config.data.mix]
    for i, member in enumerate(config.data.mix):
        if folders.index(folders[i]) < i:
            yield f"data.mix has {member.path} twice; add up its weights"
    latents = max(stage.latents for stage in config.curriculum.stages)
    columns = config.latent.step_columns
    if columns == 0 and latents:
        yield "latent.feedback none and latent.selection none: a latent step would have no column"
    if config.prompt.max_tokens <= latents * (columns or 0):
        yield "prompt.max_tokens leaves no room besides the latent columns"


def _value(text: str, annotation: Any) -> Any:
    """An option's text as YAML reads it, but text where text is wanted."""
    union = get_origin(annotation) in (Union, UnionType)
    kinds = get_args(annotation) if union else (annotation,)
    if str in kinds or any(get_origin(kind) is Literal for kind in kinds):
        return None if type(None) in kinds and text.lower() in ("none", "null") else text
    try:
        value = read_yaml(text)
    except ValueError:
        return text
    if isinstance(value, bool) and bool not in kinds:
        return text  # an option without a value, where a number was meant: validation refuses it
    return None if text.lower() == "none" else value


def explain(problem: Any, known: Iterable[str] = ()) -> str:
    """One of pydantic's errors in a line: the field's name and what is wrong; `known` names are suggested."""
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, known, n=1)
        return f"unknown key {name}" + (f"; did you mean {close[0]}?" if close else "")
    message = problem["msg"].removeprefix("Value error, ")
    given = problem.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{name}: {message}{shown}" if name else message
