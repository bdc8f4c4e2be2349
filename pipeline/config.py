"""The typed run configuration: every setting with its default, bounds and meaning.  pipeline/recipe.py reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from pipeline.backbones import BACKBONES
from pipeline.curriculum import CurriculumConfig
from pipeline.latent.method import LatentConfig
from pipeline.prompt import PromptConfig

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
    behind them.  Where that does not help (the next time within 16 good steps, or a fourth time from there), it stops.
    0: stop at the first."""
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
