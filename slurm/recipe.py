"""Command: what a recipe asks of the jobs of slurm/.  `python slurm/recipe.py --recipe X.yaml [--data DIR]`

Prints `stages=N` and `make_data=0|1`, whether the shard folder has to be made first.  With --make true it makes and
checks the folder, which needs no GPU; at SIGUSR1, which Slurm sends before a job's time limit, the job is queued again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":  # started by path: the modules' root is the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_prep import cli
from data_prep.errors import UserError
from data_prep.making.publish import PARTS
from pipeline.config import RunConfig
from pipeline.prepare import check_data, data_folder, make_data, to_be_made
from pipeline.recipe import load_config, recipe_paths
from pipeline.watching.watch import STOP, STOPPED

OF_TRAINING = {"max_bad", "resume", "prompt"}
"""Options of pipeline/train.py that are no settings, and that do not matter here."""


def main(*, recipe: str, data: str | None = None, make: bool = False, **options: str) -> None:
    """Say what a recipe asks of its jobs, or make its shard folder.

    --recipe, --data, --plugin and SECTION.FIELD as in pipeline/train.py; --make true makes the shard folder, where the
    recipe says from what and it is not there, and checks it.
    """
    settings = {name: value for name, value in options.items() if name not in OF_TRAINING}
    config = load_config(recipe_paths(recipe), settings | ({"data.path": data} if data else {}), OF_TRAINING)
    if make:
        make_folder(config)
        rows = len(check_data(config)["train"])
        print(f"{data_folder(config)}: {rows} training samples")
    else:
        print(f"stages={len(config.curriculum.stages)}")
        print(f"make_data={to_be_made(config):d}")


def make_folder(config: RunConfig) -> None:
    """The shard folder.  Asked to stop, it ends with status 75; a batch job that got further is queued again first."""
    parts = Path(data_folder(config)) / PARTS
    before = shards_in(parts)
    try:
        make_data(config, print)
    except UserError:
        if not STOP.requested:
            raise
    else:
        return
    job, done = os.environ.get("SLURM_JOB_ID"), shards_in(parts)
    if job and done == before:
        raise UserError("asked to stop before one more shard was done, so not queued again; ask for more time")
    print(f"asked to stop; {done} shards are done, and the next start goes on from them", flush=True)
    if job and subprocess.run(["scontrol", "requeue", job], check=False).returncode:
        raise UserError("Slurm did not queue the job again; submit it anew")
    raise SystemExit(STOPPED)


def shards_in(parts: Path) -> int:
    """Shards that are done of a folder that is being made."""
    return len(list(parts.glob("*.json")))


if __name__ == "__main__":
    STOP.begin()
    cli.run(main)
