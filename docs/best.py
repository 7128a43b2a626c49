"""What the preset `best` took over: one change at a time, two seeds, validation accuracy.

    python -m docs.best    # both seeds one after the other; `... 0` and `... 1` do one each

4,000 training images, seen often, since the changes are made for long trainings. Writes
docs/best.csv. A finished run is not repeated, one that was cut off goes on.
"""

from dataclasses import replace
from pathlib import Path

import torch

import utils
from train import CHECKPOINTS, Config, has_state, train

SEEDS = (0, 1)
BASE = Config(
    num_blocks=(2, 2, 2),
    c1=24,
    width=1,
    stem="whitening",
    downsample="pool",
    pool_kernel=3,
    val_size=5000,
    train_size=4000,
    rotation=0.0,
    epochs=50,
    lr=0.2,
    warmup=0.06,
    wandb="disabled",
)
LONG = {"epochs": 100, "warmup": 0.03}
CHANGES = {
    "base": {},
    "zero-gamma": {"zero_gamma": True},
    "base-100": LONG,
    "auto-augment-100": LONG | {"auto_augment": True},
    "auto-augment-cutout-100": LONG | {"auto_augment": True, "cutout": 8},
}


def configuration(change: str, seed: int) -> Config:
    """The run of one change and seed."""
    name = f"candidate-{change}-{seed}"
    resume = has_state(CHECKPOINTS / name)
    return replace(BASE, **CHANGES[change], name=name, seed=seed, resume=resume)


def run(change: str, seed: int) -> dict[str, object]:
    """Train it; what the last row of its log says."""
    config = configuration(change, seed)
    train(config)
    last = utils.read_csv(CHECKPOINTS / config.name / "log.csv")[-1]
    return {
        "change": change,
        "seed": seed,
        "epochs": config.epochs,
        "train_accuracy": round(float(last["train_accuracy"]), 2),
        "val_loss": round(float(last["val_loss"]), 4),
        "val_accuracy": round(float(last["val_accuracy"]), 2),
    }


def main(args: list[str]) -> None:
    """Run what is left of the given seeds; with all of them done, write docs/best.csv."""
    seeds = [int(seed) for seed in args] or SEEDS
    rows = [run(change, seed) for change in CHANGES for seed in seeds]
    if len(seeds) == len(SEEDS):
        utils.write_csv(Path("docs/best.csv"), rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    utils.run_script(main)
