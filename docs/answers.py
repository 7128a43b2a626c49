"""What the search in docs/search tells, and how far its short trainings can be trusted.

    python -m docs.answers longer    # trains some of its configurations four times as long
    python -m docs.answers           # prints the answers that the README gives

`longer` takes every fifth trial, from the most accurate to the least, and trains its network as the
search did, but for four times the epochs; it writes docs/search/longer.csv. What was trained before
is not trained again, what was cut off goes on.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

import plots
import search
import utils
from data import load_dataset
from train import CHECKPOINTS, Config, has_state, train
from utils import InputError

FOLDER = Path("docs/search")
EVERY, LONGER = 5, 4
DROPOUT = [share for share in search.SPACE["dropout"] if share]
DRAWS = 10_000  # of a bootstrap


def load() -> tuple[str, search.Search, list[dict[str, object]]]:
    """The search's preset and options, and its trials with an accuracy, the highest first."""
    options = json.loads((FOLDER / "search.json").read_text(encoding="utf-8"))
    preset, _ = options.pop("preset"), options.pop("space")
    rows = utils.read_numbers(FOLDER / "trials.csv")
    rows = [plots.with_derived(row) for row in rows if row["early_accuracy"] is not None]
    return preset, search.Search(**options), sorted(rows, key=lambda r: -r["early_accuracy"])


def configuration(preset: str, options: search.Search, row: dict[str, object]) -> Config:
    """How a trial was trained, but for LONGER times the epochs."""
    options = replace(options, epochs=LONGER * options.epochs)
    drawn = {name: row[name] for name in search.SPACE if name not in search.SHAPE}
    for name in search.PER_STAGE:
        drawn[name] = tuple(map(int, str(row[name]).split()))
    name = f"longer-{row['trial']}"
    resume = has_state(CHECKPOINTS / name)
    base = search.base_config(options, preset)
    return replace(base, **drawn, pool_kernel=row["pool_kernel"], name=name, resume=resume)


def train_longer() -> None:
    """Train every fifth trial's network longer; write docs/search/longer.csv."""
    preset, options, rows = load()
    configs = [(row, configuration(preset, options, row)) for row in rows[::EVERY]]
    base = configs[0][1]
    data = load_dataset(
        base.dataset, base.data_dir, base.val_size, base.download, base.train_size, test=False
    )
    found = []
    for row, config in configs:
        train(config, data)
        last = utils.read_numbers(CHECKPOINTS / config.name / "log.csv")[-1]
        short = {"short_epochs": options.epochs, "short_accuracy": row[search.METRIC]}
        long = {"long_epochs": last["epoch"], "long_accuracy": last["val_accuracy"]}
        found.append({"trial": row["trial"], **short, **long})
        utils.write_csv(FOLDER / "longer.csv", found)


def at_equal_rate(rows: list[dict[str, object]]) -> np.ndarray:
    """Accuracies less what the learning rate explains: a parabola in its logarithm per optimizer.

    The rate decides most and each optimizer has its own best one. The mean is put back.
    """
    accuracy = np.array([row["early_accuracy"] for row in rows])
    rest = accuracy.copy()
    for optimizer in {row["optimizer"] for row in rows}:
        chosen = np.array([row["optimizer"] == optimizer for row in rows])
        lr = np.log10([row["lr"] for row in rows])[chosen]
        rest[chosen] -= np.polyval(np.polyfit(lr, accuracy[chosen], 2), lr)
    return rest + accuracy.mean()


def difference(a: np.ndarray, b: np.ndarray) -> str:
    """Difference of two means, with its 95% interval by bootstrap."""
    rng = np.random.default_rng(0)
    drawn = [rng.choice(x, (DRAWS, len(x))).mean(axis=1) for x in (a, b)]
    low, high = np.percentile(drawn[0] - drawn[1], [2.5, 97.5])
    return (
        f"{a.mean() - b.mean():+.1f} points ({low:+.1f} to {high:+.1f}; {len(a)} trials"
        f" against {len(b)})"
    )


def rank_correlation(x: np.ndarray, y: np.ndarray) -> str:
    """Spearman's coefficient, with its 95% interval by bootstrap."""
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS // 10):
        chosen = rng.integers(0, len(x), len(x))
        if len(set(x[chosen])) > 1 and len(set(y[chosen])) > 1:
            drawn.append(spearmanr(x[chosen], y[chosen]).statistic)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return f"{spearmanr(x, y).statistic:+.2f} ({low:+.2f} to {high:+.2f}; {len(x)} trials)"


def answers() -> list[str]:
    """A line per question."""
    _, _, rows = load()
    rest = at_equal_rate(rows)

    def where(name: str, *values: object) -> np.ndarray:
        return rest[[row[name] in values for row in rows]]

    def column(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows], dtype=float)

    pairs = {
        "3 stages against 2": (where("num_stages", 3), where("num_stages", 2)),
        "3 stages against 4": (where("num_stages", 3), where("num_stages", 4)),
        "odd blocks in all stages against the rest": (
            where("odd", "all"),
            where("odd", "some", "none"),
        ),
        "dropout in blocks against none": (where("dropout", *DROPOUT), where("dropout", 0)),
        "dropout before the classifier against none": (
            where("classifier_dropout", *DROPOUT),
            where("classifier_dropout", 0),
        ),
    }
    lines = [f"{question}: {difference(*pair)}" for question, pair in pairs.items()]
    channels = column("c1") * column("width")
    depth, width = rank_correlation(column("mean_blocks"), rest), rank_correlation(channels, rest)
    lines.append(f"rank correlation with blocks per stage: {depth}")
    lines.append(f"rank correlation with channels of the first stage: {width}")
    if (FOLDER / "longer.csv").exists():
        longer = utils.read_numbers(FOLDER / "longer.csv")
        pairs = [
            np.array([row[f"{name}_accuracy"] for row in longer]) for name in ("short", "long")
        ]
        lines.append(f"rank correlation of short and longer training: {rank_correlation(*pairs)}")
    return lines


def main(args: list[str]) -> None:
    """Train longer, or print the answers."""
    if args not in ([], ["longer"]):
        raise InputError(
            f"arguments: {' '.join(args)!r} is not `longer`; leave it out, or give that"
        )
    if args:
        train_longer()
    print("\n".join(answers()))


if __name__ == "__main__":
    utils.run_script(main)
