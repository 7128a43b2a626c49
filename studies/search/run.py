"""Which of the paper's choices matter: 40 networks, small enough for two CPU cores.

    python -m studies.search.run    # 40 minutes on two cores; goes on where it was cut off

All trials are trained for the same epochs, none is stopped early, so that any two can be compared.
What is found goes to studies/search, from which studies/figures.py draws it and
studies/search/answers.py reads its conclusions; docs/search.md has them.

The record there was drawn before a trial's sample was a function of the seed and its number (commit
6308a9e, Ray 2.60.0, PyTorch 2.15.0, two cores of an Intel Xeon): today's trials are others from the
same space, `rejected` counts those of one trial and no longer those of all before it too, and the
constants in best.json and search.json have today's names. It is one search with one seed of
trainings so short that they tell how networks start.
"""

import script

import shutil
from dataclasses import replace
from pathlib import Path

import search
import utils
from config import CHECKPOINTS
from metrics import Row
from trials import ENDED, SPACE, LogUniform, Search, Space
from utils import SearchError

# Narrower than search.py's: an image costs these networks a quarter of the multiplications that it
# costs those, and no trial spends its few steps on a rate from which nothing is learned in them.
NARROWED = SPACE | {
    "num_blocks": range(1, 8),
    "c1": range(8, 21),
    "dropout": (0.0, 0.1, 0.2, 0.3),
    "classifier_dropout": (0.0, 0.1, 0.2, 0.3),
    "lr": LogUniform(3e-3, 1.0),
    "batch_size": (32, 64, 128),
    "optimizer": ("sgd", "muon"),
    "schedule": ("cosine", "cosine_restarts", "linear"),
}
OPTIONS = Search(
    name="small-search", num_samples=40, epochs=4, grace_epochs=4, train_size=2000, val_size=1000
)
FOLDER = Path("studies/search")


def run(options: Search, preset: str, space: Space) -> list[Row]:
    """Start a search or go on with it; returns the rows of its trials.csv.

    Raises:
        InputError: it was started with other options.
        SearchError: a trial failed; its work is kept.
    """
    if (CHECKPOINTS / options.name).exists():
        preset, options = search.load_search(replace(options, resume=options.name), space)
    rows = search.run_search(options, preset, space)
    if left := options.num_samples - sum(row["status"] in ENDED for row in rows):
        raise SearchError(f"{left} trials have not ended; the same command goes on with them")
    return rows


def keep(options: Search, folder: Path) -> None:
    """Copy what a search found to the folder of its study."""
    for name in ("search.json", "trials.csv", "best.json"):
        with utils.atomic_path(folder / name) as temporary:
            shutil.copy(CHECKPOINTS / options.name / name, temporary)


def main(_args: list[str]) -> None:
    """Search, or go on with it; copy what was found."""
    run(OPTIONS, "tpsnet", NARROWED)
    keep(OPTIONS, FOLDER)


if __name__ == "__main__":
    script.run_script(main)
