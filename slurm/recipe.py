"""Command: what a recipe asks of the jobs of slurm/.  `python slurm/recipe.py --recipe X.yaml [--data DIR]`

Prints `stages=N` and `make_data=0|1`, whether the shard folder has to be made first.  With --make true it makes and
checks the folder, which needs no GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started by path: the modules' root is the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data_prep import cli
from pipeline.config import load_config, recipe_paths
from pipeline.prepare import check_data, data_folder, make_data, to_be_made

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
        make_data(config, print)
        rows = len(check_data(config)["train"])
        print(f"{data_folder(config)}: {rows} training samples")
    else:
        print(f"stages={len(config.curriculum.stages)}")
        print(f"make_data={to_be_made(config):d}")


if __name__ == "__main__":
    cli.run(main)
