"""What each part of the preset `fast` contributes: one change at a time, two seeds.

    python -m studies.ablation    # 20 runs of 5 minutes on two CPU cores; writes ablation.csv

Validation accuracy of the preset at half its width and a twentieth of its cost, without what is
made for a long training: Cutout, small images and the proxy are one change each. A change that
makes an epoch slower gets fewer epochs, one that makes it faster gets more. docs/fast.md has the
results. Running it again repeats no finished run.
"""

import script

import statistics
from dataclasses import replace
from pathlib import Path

import utils
from config import PRESETS, Config
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


def run(change: str, seed: int) -> dict[str, object]:
    """Train one configuration; returns its row of ablation.csv."""
    log, _ = train(configuration(change, seed))
    return {
        "change": change,
        "seed": seed,
        "epochs": len(log),
        "minutes": round(sum(row["seconds"] for row in log) / 60, 1),
        "val_loss": round(log[-1]["val_loss"], 4),
        "val_accuracy": round(log[-1]["val_accuracy"], 2),
    }


def main(_args: list[str]) -> None:
    """Train every configuration, write a row of each to ablation.csv, and print the means."""
    rows = [run(change, seed) for seed in SEEDS for change in CHANGES]
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


if __name__ == "__main__":
    script.run_script(main)
