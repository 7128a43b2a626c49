"""Which of the paper's choices win among networks of about the same cost?

    python -m studies.choices.run pilot     # two networks with four recipes: decides RECIPE
    python -m studies.choices.run search    # 48 random networks, trained in the same way
    python -m studies.choices.run longer    # every fifth of them, for four times the epochs

Each command continues where it was interrupted, and writes its results to studies/choices. The
networks have 100,000 to 200,000 parameters and at most 20 million multiply-accumulates per image,
so that wide and deep networks are compared at similar cost. They are compared on 5,000 validation
images; test images are not read.

17 of the trials in trials.csv, the deepest ones but for trials 1 and 2, were trained on an NVIDIA
H200 by this code without Ray; nine began there; the others were trained on two CPU cores; all in
bfloat16. Trials 1 and 2 were trained on both: 85.38% and 83.32% on the CPU, which count, 85.64% and
82.56% on the GPU. The ten longer trainings (commit 2201f3e) ran on the H200.
"""

if __name__ == "__main__":
    from engine.script import run_script

    run_script("studies.choices.run")

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import utils
from config import PRESETS, Config
from data import load_dataset
from engine.progress import Row
from search.run import load_search, run_search
from search.space import PER_STAGE, SPACE, Search, Space, base_config
from search.trials import ENDED, METRIC
from train import train
from utils import CHECKPOINTS, DivergenceError, InputError, SearchError

FOLDER = Path("studies/choices")
# Changes to the paper's recipe in all trials: the augmentation of `fast`, without Cutout for so few
# epochs, and about as many steps.
COMMON = {
    "padding_mode": "reflect",
    "rotation_degrees": 0.0,
    "flip": "alternating",
    "batch_size": 256,
    "label_smoothing": 0.1,
}
RECIPES = {
    "muon 0.05": {"optimizer": "muon", "lr": 0.05, "momentum": 0.6},
    "muon 0.15": {"optimizer": "muon", "lr": 0.15, "momentum": 0.6},
    "sgd 0.1": {"optimizer": "sgd", "lr": 0.1, "nesterov": True},
    "sgd 0.3": {"optimizer": "sgd", "lr": 0.3, "nesterov": True},
}
RECIPE = "muon 0.05"  # the best one in pilot.csv for both networks
NETWORKS = {"wide": ((1, 1, 1), 20), "deep": ((5, 5, 5), 8)}  # in the pilot: blocks and C1
PILOT_EPOCHS = 4
EVERY, LONGER = 5, 4  # every fifth trial, for four times the epochs

# 2 stages are left out: with 100,000 parameters the smallest such network has 24 million MACs.
DRAWN = SPACE | {"num_stages": (3, 4), "num_blocks": range(1, 10), "c1": range(6, 33)}
OPTIONS = Search(
    name="choices",
    num_samples=48,
    epochs=12,
    grace_epochs=12,
    min_params=100_000,
    max_params=200_000,
    max_macs=20_000_000,
    val_size=5000,
)


def fixed(recipe: str) -> dict[str, object]:
    """The constants that all trials of a recipe share."""
    return COMMON | RECIPES[recipe]


def space() -> Space:
    """The space of the search, with the recipe as entries of a single value."""
    return DRAWN | {name: (value,) for name, value in fixed(RECIPE).items()}


def pilot_runs() -> list[tuple[Row, Config]]:
    """Two networks with each recipe, for a third of the epochs of the search."""
    base = replace(PRESETS["tpsnet"], epochs=PILOT_EPOCHS, val_size=OPTIONS.val_size)
    return [
        (
            {"recipe": recipe, "network": network},
            replace(
                base,
                **fixed(recipe),
                num_blocks=num_blocks,
                c1=c1,
                width=1,
                name=f"choices-pilot/{network}-{recipe.replace(' ', '-')}",
            ),
        )
        for recipe in RECIPES
        for network, (num_blocks, c1) in NETWORKS.items()
    ]


def search() -> None:
    """Start the search or continue it; copy its results."""
    run(OPTIONS, "tpsnet", space())
    for name in ("search.json", "trials.csv", "best.json"):
        with utils.atomic_path(FOLDER / name) as temporary:
            shutil.copy(CHECKPOINTS / OPTIONS.name / name, temporary)


def run(options: Search, preset: str, space: Space) -> list[Row]:
    """Start a search or continue it; returns the rows of its trials.csv.

    Raises:
        InputError: the search was started with other options.
        SearchError: a trial failed; the same command runs it again.
    """
    if (CHECKPOINTS / options.name / "search.json").exists():
        preset, options = load_search(replace(options, resume=options.name), space)
    rows = run_search(options, preset, space)
    if left := options.num_samples - sum(row["status"] in ENDED for row in rows):
        raise SearchError(f"{left} trials have not ended; the same command goes on with them")
    return rows


def longer() -> None:
    """Train every fifth network longer, counted from the most accurate to the least.

    Raises:
        InputError: there are no trials yet.
    """
    if not (FOLDER / "trials.csv").exists():
        raise InputError(f"part: {FOLDER / 'trials.csv'} does not exist; run `search` first")
    rows = whole(utils.read_csv(FOLDER / "trials.csv"))
    rows = sorted(rows, key=lambda row: -row[METRIC])[::EVERY]
    found = [({"trial": row["trial"], "short_accuracy": row[METRIC]}, again(row)) for row in rows]
    train_all(found, FOLDER / "longer.csv")


def whole(rows: list[Row]) -> list[Row]:
    """The trials that were trained to their last epoch."""
    return [row for row in rows if row["early_accuracy"] is not None]


def again(row: Row) -> Config:
    """The constants of a trial in trials.csv, with LONGER times the epochs."""
    base = base_config(replace(OPTIONS, epochs=LONGER * OPTIONS.epochs), "tpsnet")
    shape = {n: tuple(map(int, str(row[n]).split())) for n in PER_STAGE if n in row}
    shape |= {name: row[name] for name in ("c1", "width", "pool_kernel")}
    return replace(base, **fixed(RECIPE), **shape, name=f"choices-longer/{row['trial']:03d}")


def train_all(runs: Iterable[tuple[Row, Config]], path: Path) -> None:
    """Train each configuration or continue it; write their rows with epochs and accuracy."""
    found, data = [], None
    for row, config in runs:
        data = data or load_dataset(config, test=False)
        try:
            last = train(replace(config, wandb="disabled", resume=True), data)[0][-1]
        except DivergenceError:
            last = {"epoch": None, "val_accuracy": None}
        found.append(row | {"epochs": last["epoch"], METRIC: last["val_accuracy"]})
    utils.write_csv(path, found)


def study(part: Literal["pilot", "search", "longer"], /) -> None:
    """Run one of the three parts."""
    if part == "pilot":
        train_all(pilot_runs(), FOLDER / "pilot.csv")
    elif part == "search":
        search()
    else:
        longer()


def main(args: list[str]) -> None:
    """Parse the command line and run a part of the study."""
    import tyro

    tyro.cli(study, args=args, prog="python -m studies.choices.run", description=__doc__)
