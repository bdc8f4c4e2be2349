"""Command: what a recipe asks of the jobs of slurm/.  `python slurm/recipe.py --recipe X.yaml [--data DIR]`

Prints `stages=N` and `make_data=0|1`, whether the shard folder has to be made first.  With --make true it makes and
checks the folder, which needs no GPU; at SIGUSR1 it ends with status 75 if it got further, and can go on.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # started by path: the modules' root is the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.watching.watch import STOP, STOPPED

if __name__ == "__main__":  # before the imports below, which take seconds
    STOP.begin("stopped on request; the shards that are done stay")

from data_prep import cli
from data_prep.errors import UserError
from data_prep.making.publish import PARTS
from pipeline.config import RunConfig
from pipeline.prepare import check_data, data_folder, make_data, to_be_made
from pipeline.recipe import load_config, recipe_paths


def main(
    *,
    recipe: str,
    data: str | None = None,
    make: bool = False,
    max_bad: int | None = None,
    resume: Literal["auto", "elastic", "never"] = "auto",
    prompt: Literal["default", "released", "context"] | None = None,
    **options: str,
) -> None:
    """Say what a recipe asks of its jobs, or make its shard folder.

    --recipe, --data, --plugin and SECTION.FIELD as in pipeline/train.py, and --max_bad, --resume and --prompt, which
    are only checked; --make true makes the shard folder, where the recipe says from what and it is not there, and
    checks it.
    """
    settings = options | ({"data.path": data} if data else {})
    config = load_config(recipe_paths(recipe), settings, inspect.signature(main).parameters)
    if make:
        make_folder(config)
        rows = len(check_data(config)["train"])
        print(f"{data_folder(config)}: {rows} training samples")
    else:
        print(f"stages={len(config.curriculum.stages)}")
        print(f"make_data={to_be_made(config):d}")


def make_folder(config: RunConfig) -> None:
    """The shard folder.  Asked to stop, it ends with status 75 if one more shard is done; else raises UserError."""
    parts = Path(data_folder(config)) / PARTS
    before = newest_of(parts)
    try:
        make_data(config, print)
    except UserError:
        if not STOP.requested:
            raise
    else:
        return
    if newest_of(parts) <= before:
        raise UserError("asked to stop before one more shard was done; it needs more time")
    print("asked to stop; the shards that are done stay, and the next start goes on from them", flush=True)
    raise SystemExit(STOPPED)


def newest_of(parts: Path) -> int:
    """When the newest shard of a folder that is being made was done, in nanoseconds; 0 where there is none."""
    return max((path.stat().st_mtime_ns for path in parts.glob("*.json")), default=0)


if __name__ == "__main__":
    cli.run(main)
