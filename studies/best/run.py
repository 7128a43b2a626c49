"""How much the recipe of the preset `best` gains: one change at a time, two seeds.

    python -m studies.best.run      # both seeds, one after the other; writes best.csv
    python -m studies.best.run 0    # seed 0 alone, beside a process for seed 1; writes no CSV

Question: do AutoAugment and Cutout raise the validation accuracy of a small network that sees 4,000
training images often, as the changes are made for long trainings? One thread per process, so that
two seeds can run side by side on two cores. Finished runs are not repeated.

Record: best.csv has a row per run (10 runs, commit 6d7df56, an Intel Xeon); docs/best.md has the
table, the answer and what the study cannot tell. best.csv keeps the rows of zero-gamma, which has
no code any more. candidates.csv has an earlier study whose code is lost.
"""

if __name__ == "__main__":  # above the imports: a missing library or an old Python is one line
    from engine.script import run_script

    run_script("studies.best.run")

from dataclasses import replace
from pathlib import Path

import torch

import utils
from config import Config
from data import Dataset, load_dataset
from train import train

SEEDS = (0, 1)
CSV = Path("studies/best/best.csv")
BASE = Config(
    num_blocks=(2, 2, 2),
    c1=24,
    width=1,
    stem="whitening",
    downsample="pool",
    pool_kernel=3,
    val_size=5000,
    train_size=4000,
    rotation_degrees=0.0,
    epochs=50,
    lr=0.2,
    warmup_epochs=3,
    wandb="disabled",
)
CHANGES = {
    "base": {},
    "base-100": {"epochs": 100},
    "auto-augment-100": {"epochs": 100, "auto_augment": True},
    "auto-augment-cutout-100": {"epochs": 100, "auto_augment": True, "cutout_size": 8},
}


def configuration(change: str, seed: int) -> Config:
    """The configuration of one run."""
    name = f"candidate-{change}-{seed}"
    return replace(BASE, **CHANGES[change], name=name, seed=seed, resume=True)


def run(change: str, seed: int, data: Dataset) -> dict[str, object]:
    """Train one configuration; returns its row of best.csv."""
    log, _ = train(configuration(change, seed), data)
    return {
        "change": change,
        "seed": seed,
        "epochs": len(log),
        "train_accuracy": round(log[-1]["train_accuracy"], 2),
        "val_loss": round(log[-1]["val_loss"], 4),
        "val_accuracy": round(log[-1]["val_accuracy"], 2),
    }


def study(seeds: tuple[int, ...] = SEEDS, /) -> None:
    """Train the configurations of the given seeds; with all seeds, write best.csv."""
    torch.set_num_threads(1)
    data = load_dataset(BASE, test=False)
    rows = [run(change, seed, data) for change in CHANGES for seed in seeds]
    if sorted(seeds) == sorted(SEEDS):
        # Keep the rows of changes that have no code any more.
        rows += [row for row in utils.read_csv(CSV) if row["change"] not in CHANGES]
        utils.write_csv(CSV, rows)


def main(args: list[str]) -> None:
    """Parse the command line and run the study."""
    import tyro

    tyro.cli(study, args=args, prog="python -m studies.best.run", description=__doc__)
