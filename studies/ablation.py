"""How much each part of the preset `fast` contributes: one change at a time, two seeds.

    python -m studies.ablation    # 20 runs of 5 minutes on two CPU cores; writes ablation.csv

Question: what does the validation accuracy of `fast` lose without each of its parts, at half its
width and a twentieth of its cost? The base leaves out what is made for long trainings: Cutout,
small images and the proxy are one change each. A change that makes an epoch slower gets fewer
epochs, one that makes it faster gets more. Finished runs are not repeated.

Record: ablation.csv has a row per run (20 runs, commit de2f305, two cores of an AMD EPYC, PyTorch
2.15.0, Python 3.11.7); docs/fast.md has the table, the answer and what the study cannot tell: the
three parts above may lose accuracy in a short training and gain it in a long one.
"""

if __name__ == "__main__":  # above the imports: a missing library or an old Python is one line
    from engine.script import run_script

    run_script("studies.ablation")

import statistics
from dataclasses import replace
from pathlib import Path

import utils
from config import PRESETS, Config
from data import Dataset, load_dataset
from train import train

SEEDS = (0, 1)
BASE = {
    "width": 2,
    "cutout_size": 0,
    "small_fraction": 0.0,
    "keep_fraction": 1.0,
    "batch_size": 1000,
    "epochs": 6,
    "val_size": 5000,
    "wandb": "disabled",
}
CHANGES = {
    "base": {},
    "conv-stem": {"stem": "conv", "pool_kernel": 4, "epochs": 5},
    "stride": {"downsample": "stride", "pool_kernel": 8, "epochs": 3},
    "sgd": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9},
    "sgd-batch-250": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "batch_size": 250},
    "no-smoothing": {"label_smoothing": 0.0},
    "random-flip": {"flip": "random"},
    "cutout": {"cutout_size": 12},
    "small-images": {"small_fraction": 0.72, "epochs": 7},
    "proxy": {"keep_fraction": 0.5, "batch_size": 2000, "epochs": 8},
}


def configuration(change: str, seed: int) -> Config:
    """The configuration of one run."""
    constants = BASE | CHANGES[change] | {"name": f"ablation-{change}-{seed}", "seed": seed}
    return replace(PRESETS["fast"], **constants, resume=True)


def run(change: str, seed: int, data: Dataset) -> dict[str, object]:
    """Train one configuration; returns its row of ablation.csv."""
    log, _ = train(configuration(change, seed), data)
    return {
        "change": change,
        "seed": seed,
        "epochs": len(log),
        "minutes": round(sum(row["seconds"] for row in log) / 60, 1),
        "val_loss": round(log[-1]["val_loss"], 4),
        "val_accuracy": round(log[-1]["val_accuracy"], 2),
    }


def study() -> None:
    """Train every configuration, write ablation.csv and print the means."""
    data = load_dataset(configuration("base", SEEDS[0]), test=False)
    rows = [run(change, seed, data) for seed in SEEDS for change in CHANGES]
    utils.write_csv(Path("studies/ablation.csv"), rows)
    print("\n| change | epochs | minutes | validation accuracy | difference |")
    print("|---|---|---|---|---|")
    base = statistics.mean(row["val_accuracy"] for row in rows if row["change"] == "base")
    for change in CHANGES:
        found = [row for row in rows if row["change"] == change]
        each = [row["val_accuracy"] for row in found]
        minutes = min(row["minutes"] for row in found)  # of the seed with less load beside it
        print(
            f"| {change} | {found[0]['epochs']} | {minutes:.1f}"
            f" | {statistics.mean(each):.2f}% ({', '.join(f'{a:.2f}' for a in each)})"
            f" | {statistics.mean(each) - base:+.2f} |"
        )


def main(args: list[str]) -> None:
    """Parse the command line, which has no option but -h, and run the study."""
    import tyro

    tyro.cli(study, args=args, prog="python -m studies.ablation", description=__doc__)
