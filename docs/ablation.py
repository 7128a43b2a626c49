"""What the parts of the preset `fast` pay: one change at a time, two seeds, validation accuracy.

    python -m docs.ablation    # 20 runs of 5 minutes on two CPU cores; writes docs/ablation.csv

The base is the preset half as wide, at a twentieth of its cost, without what is made for a long
training: Cutout, small images and the proxy are one change each. A change that makes an epoch cost
more gets fewer epochs, one that makes it cost less gets more. A finished run is not repeated, one
that was cut off goes on.
"""

import statistics
from dataclasses import replace
from pathlib import Path

import utils
from train import CHECKPOINTS, PRESETS, Config, has_state, train

SEEDS = (0, 1)
BASE = {
    "width": 2,
    "cutout": 0,
    "small_share": 0.0,
    "keep": 1.0,
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
    "cutout": {"cutout": 12},
    "small-images": {"small_share": 0.72, "epochs": 7},
    "proxy": {"keep": 0.5, "batch_size": 2000, "epochs": 8},
}


def configuration(change: str, seed: int) -> Config:
    """The run of one change and seed."""
    name = f"ablation-{change}-{seed}"
    resume = has_state(CHECKPOINTS / name)
    constants = BASE | CHANGES[change]
    return replace(PRESETS["fast"], **constants, name=name, seed=seed, resume=resume)


def run(change: str, seed: int) -> dict[str, object]:
    """Train it; what its log says."""
    config = configuration(change, seed)
    train(config)
    log = utils.read_csv(CHECKPOINTS / config.name / "log.csv")
    minutes = sum(float(row["seconds"]) for row in log) / 60
    return {
        "change": change,
        "seed": seed,
        "epochs": len(log),
        "minutes": round(minutes, 1),
        "val_loss": round(float(log[-1]["val_loss"]), 4),
        "val_accuracy": round(float(log[-1]["val_accuracy"]), 2),
    }


def main(_args: list[str]) -> None:
    """Run all of it; write every run to docs/ablation.csv and print the means."""
    rows = [run(change, seed) for seed in SEEDS for change in CHANGES]
    utils.write_csv(Path("docs/ablation.csv"), rows)
    print("\n| change | epochs | minutes | validation accuracy | against the base |")
    print("|---|---|---|---|---|")
    base = statistics.mean(row["val_accuracy"] for row in rows if row["change"] == "base")
    for change in CHANGES:
        found = [row for row in rows if row["change"] == change]
        each = [row["val_accuracy"] for row in found]
        minutes = min(row["minutes"] for row in found)  # of the seed with less beside it
        print(
            f"| {change} | {found[0]['epochs']} | {minutes:.1f}"
            f" | {statistics.mean(each):.2f}% ({', '.join(f'{a:.2f}' for a in each)})"
            f" | {statistics.mean(each) - base:+.2f} |"
        )


if __name__ == "__main__":
    utils.run_script(main)
