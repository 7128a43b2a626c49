"""What else could make `fast` more accurate or cheaper: a lever at a time, two seeds.

    python -m studies.levers    # 18 runs; continues where it was cut off

Question: does a lever raise the validation accuracy of `fast` at half its width (a third of its
cost) with its full number of steps, or save time without a loss? The number of steps stays, because
regularization that hurts a short training may help a long one.

The rule was fixed beforehand: with twelve levers beside one base, one will lead by chance. So a
lever is taken if its mean is half a point above the base's and two more seeds of both confirm it,
or if it costs no accuracy and saves a tenth of the time. All runs need one kind of machine, which
decides between float32 and bfloat16.

Record: levers.csv has a row per run (30 runs, commit 0724ffa, one NVIDIA H200, PyTorch 2.11.0,
Python 3.12.3); docs/fast.md has the table, the answer and what the study cannot tell. Here are the
levers that are constants. The six others needed code, which no preset uses: dirac-init, logits-1.5,
pool-ceil, freeze-stage-1, plain-proxy and airbench-sgd are in studies/levers.py of commit 6799a59.
"""

if __name__ == "__main__":  # above the imports: a missing library or an old Python is one line
    from engine.script import run_script

    run_script("studies.levers")

import itertools
import statistics
from dataclasses import replace
from pathlib import Path

import utils
from config import PRESETS, Config
from data import Dataset, load_dataset
from train import train
from utils import DivergenceError

SEEDS = (0, 1)
MORE = tuple(itertools.product((2, 3), ("base", "smoothing-0.3")))  # which led after a seed
CSV = Path("studies/levers.csv")
BASE = replace(PRESETS["fast"], width=2, val_size=5000, wandb="disabled", resume=True)
LEVERS = {
    "base": {},
    "no-proxy": {"keep_fraction": 1.0, "batch_size": 1000, "epochs": 43},
    "lr-0.10": {"lr": 0.10},
    "lr-0.20": {"lr": 0.20},
    "scale-24": {"small_images": "scale", "small_size": 24, "small_fraction": 0.5},
    "scale-20": {"small_images": "scale", "small_size": 20, "small_fraction": 0.5},
    "smoothing-0.3": {"label_smoothing": 0.3},
}


def configuration(lever: str, seed: int) -> Config:
    """The configuration of one run."""
    return replace(BASE, **LEVERS[lever], name=f"levers/{lever}-{seed}", seed=seed)


def run(lever: str, seed: int, data: Dataset) -> dict[str, object]:
    """Train or continue one network; returns its row of levers.csv, empty if it diverged."""
    try:
        log, _ = train(configuration(lever, seed), data)
        found = round(log[-1]["val_loss"], 4), round(log[-1]["val_accuracy"], 2)
    except DivergenceError:
        found = None, None
    return {"lever": lever, "seed": seed, "val_loss": found[0], "val_accuracy": found[1]}


def study() -> None:
    """Train with every lever, one seed after the other; write levers.csv and print the means."""
    # Keep the rows of levers that have no code any more.
    kept = [row for row in utils.read_csv(CSV) if row["lever"] not in LEVERS]
    rows, data = [], load_dataset(BASE, test=False)
    for seed, lever in (*itertools.product(SEEDS, LEVERS), *MORE):
        rows.append(run(lever, seed, data))
    utils.write_csv(CSV, rows + kept)
    print("\n| lever | validation accuracy |\n|---|---|")
    for lever in LEVERS:
        each = [row["val_accuracy"] for row in rows if row["lever"] == lever]
        listed = ", ".join("diverged" if a is None else f"{a:.2f}" for a in each)
        mean = "" if None in each else f"{statistics.mean(each):.2f}% "
        print(f"| {lever} | {mean}({listed}) |")


def main(args: list[str]) -> None:
    """Parse the command line, which has no option but -h, and run the study."""
    import tyro

    tyro.cli(study, args=args, prog="python -m studies.levers", description=__doc__)
