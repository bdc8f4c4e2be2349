"""Command: one question about one picture.

python -m pipeline.ask --run DIR | --model EXPORT --image F --question Q --choice A --choice B ...
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from data_prep import cli
from data_prep.errors import UserError
from data_prep.example import Example, InvalidExample
from pipeline.evaluate import exports_of, generate_rows, read_sampling
from pipeline.latent.decode import Decoding
from pipeline.loaded import load_export
from pipeline.prompt import LETTERS, PROMPTS, Grid, UnusableSample
from pipeline.registry import load_plugin
from pipeline.scoring.judges import strict_choice


def main(
    *,
    question: str,
    choice: list[str],
    run: Path | None = None,
    model: Path | None = None,
    image: Path | None = None,
    context: str = "",
    latents: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    prompt: Literal["default", "released", "context"] | None = None,
    plugin: Path | None = None,
    allow_changed_plugin: bool = False,
) -> None:
    """Answer one multiple-choice question, and show which patches each latent step took.

    --run: a run folder (its last stage answers) or --model: one export; --image: a picture file; --choice: once for
    each choice, at least twice; --latents: other number of latent steps than trained; --temperature: 0 takes the
    likeliest token, above it tokens are drawn with --seed, among the --top_k likeliest (0: all) and those with
    probability --top_p together; --prompt: as in pipeline.evaluate; --plugin: the file that the model's method came
    from, with another text than then only under --allow_changed_plugin true; --max_new_tokens: of the answer at most,
    as the model's recipe says without it.
    """
    if plugin:
        load_plugin(plugin)
    if (run is None) == (model is None):
        raise UserError("give either --run DIR or --model EXPORT")
    if latents is not None and latents < 0:
        raise UserError(f"--latents {latents}: expected 0 or more")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {max_new_tokens}: expected 1 or more")
    sampling = read_sampling(temperature, top_p, top_k, seed)
    folder = exports_of(run)[-1][1] if run else model
    assert folder is not None
    try:
        picture = image.read_bytes() if image else None
        example = Example("question", "ask", "ask", question, tuple(choice), 0, "", context=context, image=picture)
        example.validate()
    except OSError as error:
        raise UserError(f"--image {image}: {error.strerror}") from None
    except InvalidExample as error:
        raise UserError(str(error)) from None
    loaded = load_export(folder, allow_changed_plugin=allow_changed_plugin)
    if prompt:
        loaded = loaded.asked(**PROMPTS[prompt])
    if context:  # what is given is shown, whether or not the model was trained with one
        loaded = loaded.asked(context=True)
    n = loaded.info.latents if latents is None else latents
    start = time.perf_counter()
    try:
        row = loaded.builder.prompt_row(example, "question", 0, n)
    except UnusableSample as error:
        raise UserError(str(error)) from None
    torch.manual_seed(seed)
    tokens = max_new_tokens or loaded.info.max_new_tokens
    out = generate_rows(loaded, [row], n, Decoding(tokens, loaded.processor.eos_id, sampling))
    seconds = time.perf_counter() - start

    text = loaded.processor.decode(out.tokens[0])
    picked = strict_choice(text, len(choice), loaded.info.prompt.answer)
    fmt = loaded.processor.row_format
    first = next((i for i, token in enumerate(row.prompt_ids) if token == fmt.image_token_id), 0)
    for number, step in enumerate(out.steps, 1):
        patches = (step.columns[0][step.filled[0]] - first).tolist()
        print(f"latent step {number}: {describe(patches, row.image_grid, fmt.merge)}")
    print(f"text: {text}")
    named = f"{LETTERS[picked]} ({choice[picked]})" if picked is not None else "none of the choices"
    print(f"answer: {named}; {out.autoregressive_steps(0)} autoregressive steps, {seconds:.2f} s")


def describe(patches: list[int], grid: Sequence[Grid], merge: int) -> str:
    """Patches as (row, column) of the picture's grid, from 1."""
    if not patches:
        return "no patches"
    _, height, width = grid[0]
    width, height = width // merge, height // merge
    places = ", ".join(f"({p // width + 1},{p % width + 1})" for p in patches)
    return f"patches (row,column) of {height}x{width}: {places}"


if __name__ == "__main__":
    cli.run(main)
