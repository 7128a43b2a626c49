"""The search that the README tells of: 40 networks, small enough for two CPU cores.

    python -m docs.small_search    # 40 minutes on two cores; goes on where it was cut off

All trials are trained for the same epochs, none is stopped early, so that any two can be compared.
What was found is copied to docs/search, from which plots.py and docs/answers.py read it.
"""

import shutil
from pathlib import Path

import search
import utils
from train import CHECKPOINTS

# Narrower than search.py's: an image costs these networks a third of the multiplications that it
# costs those, and no trial spends its few steps on a rate from which nothing is learned in them.
NARROWED = {
    "num_blocks": range(1, 8),
    "c1": range(8, 21),
    "lr": search.LogUniform(3e-3, 1.0),
    "batch_size": (32, 64, 128),
}
OPTIONS = search.Search(
    name="small", num_samples=40, epochs=4, grace_period=4, train_size=2000, val_size=1000
)
FOLDER = Path("docs/search")


def run(options: search.Search, preset: str) -> list[dict[str, object]]:
    """Start a search or go on with it; returns the rows of its trials.csv."""
    if (CHECKPOINTS / options.name).exists():
        preset, options = search.load_search(search.Search(resume=options.name))
    return search.run_search(options, preset)


def main(_args: list[str]) -> None:
    """Search, or go on with it; copy what was found."""
    search.SPACE.update(NARROWED)
    run(OPTIONS, "tpsnet")
    FOLDER.mkdir(exist_ok=True)
    for name in ("search.json", "trials.csv", "best.json"):
        shutil.copy(CHECKPOINTS / OPTIONS.name / name, FOLDER)


if __name__ == "__main__":
    utils.run_script(main)
