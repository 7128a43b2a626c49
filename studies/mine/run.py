"""How accurate `mine` is: from weights that have not seen the classes, and from scratch.

    python -m studies.mine.run weights   # `small` on five classes of CIFAR-10, for 15 epochs
    python -m studies.mine.run recipe    # candidates, by training images that no candidate sees
    python -m studies.mine.run table     # the recipe chosen, and the same from random weights

Question: with 20, 100 or 500 pictures of each of five classes that the weights have not seen, how
accurate is the preset `mine`, and how accurate is the same training from random weights? The
weights are of a network trained on the other five classes; the released ones have seen all ten. A
seed draws the pictures, too. The recipe is chosen by 2,500 training images that are not among the
pictures. The test images of the five classes are read once for each row of the table.

Record: recipe.csv and table.csv get a row per run; finished runs are not repeated,
and a run that is cut off goes on.
"""

if __name__ == "__main__":  # above the imports: a missing library or an old Python is one line
    from engine.script import run_script

    run_script("studies.mine.run")

import itertools
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

import utils
from config import PRESETS, Config
from data import Dataset, Split, load_dataset
from train import train
from utils import CHECKPOINTS, generator

SEEN = (0, 2, 4, 6, 8)  # classes of CIFAR-10: airplane, bird, deer, frog, ship
HELD_OUT = (1, 3, 5, 7, 9)  # automobile, cat, dog, horse, truck
NUM_CHOOSING = 500  # training images of a class by which the recipes are chosen
SEEDS = (0, 1, 2)
FOLDER = Path("studies/mine")
WEIGHTS = "mine-study-weights"
MINE = replace(
    PRESETS["mine"],
    dataset="cifar10",
    init=str(CHECKPOINTS / WEIGHTS),
    wandb="disabled",
    resume=True,
)
SHORT = replace(MINE, epochs=20)
ARMS = {
    "recipe": {
        "20-epochs": SHORT,
        "lr-0.01": replace(SHORT, lr=0.01),
        "lr-0.1": replace(SHORT, lr=0.1),
        "40-epochs": MINE,
        "batch-16": replace(SHORT, batch_size=16),
        "no-cutout": replace(SHORT, cutout_size=0),
        "scratch-20-epochs": replace(SHORT, init=""),
        "scratch-lr-0.15": replace(SHORT, init="", lr=0.15),
        "scratch-80-epochs": replace(MINE, init="", epochs=80),
    },
    "table": {"mine": MINE, "scratch": replace(MINE, init="")},
}
SIZES = {"recipe": (20, 100), "table": (20, 100, 500)}  # pictures of a class


def of_classes(split: Split, classes: tuple[int, ...]) -> Split:
    """The images of some classes, which are numbered anew."""
    chosen = split[torch.isin(split.labels, torch.tensor(classes))]
    return Split(chosen.images, torch.searchsorted(torch.tensor(classes), chosen.labels))


def first_of_each(split: Split, start: int, stop: int) -> Split:
    """The images of each class from its number `start` up to `stop`."""
    labels = split.labels.tolist()
    places = [[i for i, label in enumerate(labels) if label == c] for c in range(max(labels) + 1)]
    return split[torch.tensor([i for of_class in places for i in of_class[start:stop]])]


def pictures(cifar10: Dataset, number: int, seed: int, test: bool) -> Dataset:
    """`number` pictures of each class that is held out, and the images to test them on."""
    train = of_classes(cifar10.train, HELD_OUT)
    choosing = first_of_each(train, 0, NUM_CHOOSING)
    others = first_of_each(train, NUM_CHOOSING, len(train))
    order = torch.randperm(len(others), generator=generator("mine", seed))
    return replace(
        cifar10,
        class_names=tuple(cifar10.class_names[c] for c in HELD_OUT),
        train=first_of_each(others[order], 0, number),
        test=of_classes(cifar10.test, HELD_OUT) if test else choosing,
    )


def train_weights(cifar10: Dataset) -> None:
    """Train `small` on the other five classes."""
    config = replace(
        PRESETS["small"], epochs=15, name=WEIGHTS, wandb="disabled", resume=True, batch_size=1000
    )
    seen = of_classes(cifar10.train, SEEN)
    names = tuple(cifar10.class_names[c] for c in SEEN)
    train(config, replace(cifar10, class_names=names, train=seen, test=seen[:0]))


def run(cifar10: Dataset, stage: str, arm: str, number: int, seed: int) -> dict[str, object]:
    """Train and test one network; returns its row."""
    name = f"mine-study/{stage}-{arm}-{number}-{seed}"
    config = replace(ARMS[stage][arm], seed=seed, name=name)
    log, score = train(config, pictures(cifar10, number, seed, test=stage == "table"))
    return {
        "arm": arm,
        "pictures": number,
        "seed": seed,
        "train_accuracy": round(log[-1]["train_accuracy"], 2),
        "accuracy": round(score.accuracy, 2),
        "seconds": round(sum(row["seconds"] for row in log)),
    }


def study(stage: Literal["weights", "recipe", "table"], /) -> None:
    """Run a stage of the study; write its CSV file and print the means."""
    cifar10 = load_dataset(Config(wandb="disabled"), test=stage == "table")
    if stage == "weights":
        train_weights(cifar10)
        return
    path = FOLDER / f"{stage}.csv"
    rows = utils.read_csv(path) if path.exists() else []
    done = {(row["arm"], row["pictures"], row["seed"]) for row in rows}
    seeds = SEEDS if stage == "table" else SEEDS[:1]
    for number, seed, arm in itertools.product(SIZES[stage], seeds, ARMS[stage]):
        if (arm, number, seed) not in done:
            rows.append(run(cifar10, stage, arm, number, seed))
            utils.write_csv(path, rows)
    print("\n| arm | pictures of a class | accuracy |\n|---|---|---|")
    for arm, number in itertools.product(ARMS[stage], SIZES[stage]):
        each = [row["accuracy"] for row in rows if (row["arm"], row["pictures"]) == (arm, number)]
        spread = f" ± {statistics.stdev(each):.1f}" if len(each) > 1 else ""
        print(f"| {arm} | {number} | {statistics.mean(each):.1f}{spread}% |")


def main(args: list[str]) -> None:
    """Parse the command line and run a stage of the study."""
    import tyro

    tyro.cli(study, args=args, prog="python -m studies.mine.run", description=__doc__)
