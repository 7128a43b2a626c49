"""What the search in studies/search tells, and how far its short trainings can be trusted.

    python -m studies.search.answers longer    # trains some of its networks four times as long
    python -m studies.search.answers           # prints the answers that docs/search.md gives

`longer` takes every fifth trial, from the most accurate to the least, and trains its network as the
search did, but for four times the epochs; it writes longer.csv. What was trained before is not
trained again, what was cut off goes on.
"""

import script

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np

import plots
import trials
import utils
from config import Config
from data import load_dataset
from metrics import Row
from studies.search.run import FOLDER, NARROWED
from train import train
from trials import METRIC, Search
from utils import DivergenceError, InputError

EVERY, LONGER = 5, 4
DRAWS = 2000  # of a bootstrap


def load() -> tuple[str, Search, list[Row]]:
    """The search's preset and options, and its trials with an accuracy, the highest first."""
    options = trials.read_record(FOLDER / "search.json")
    preset, _ = options.pop("preset"), options.pop("space")
    rows = utils.read_csv(FOLDER / "trials.csv")
    rows = [plots.with_derived(row) for row in rows if row["early_accuracy"] is not None]
    return preset, Search(**options), sorted(rows, key=lambda r: -r["early_accuracy"])


def configuration(preset: str, options: Search, row: Row) -> Config:
    """How a trial was trained, but for LONGER times the epochs."""
    options = replace(options, epochs=LONGER * options.epochs)
    drawn = {name: row[name] for name in NARROWED if name not in trials.SHAPE}
    for name in trials.PER_STAGE:
        drawn[name] = tuple(map(int, str(row[name]).split()))
    drawn |= {"pool_kernel": row["pool_kernel"], "name": f"longer-{row['trial']}"}
    return replace(trials.base_config(options, preset), **drawn, resume=True)


def train_longer() -> None:
    """Train every fifth trial's network longer; write studies/search/longer.csv."""
    preset, options, rows = load()
    configs = [(row, configuration(preset, options, row)) for row in rows[::EVERY]]
    base = configs[0][1]
    data = load_dataset(
        base.dataset, base.data_dir, base.val_size, base.download, base.train_size, test=False
    )
    found = []
    for row, config in configs:
        try:
            last = train(config, data)[0][-1]
        except DivergenceError:
            continue
        short = {"short_epochs": options.epochs, "short_accuracy": row[METRIC]}
        long = {"long_epochs": last["epoch"], "long_accuracy": last["val_accuracy"]}
        found.append({"trial": row["trial"], **short, **long})
        utils.write_csv(FOLDER / "longer.csv", found)


def at_equal_rate(rows: list[Row]) -> np.ndarray:
    """Accuracies less what the learning rate explains: a parabola in its logarithm per optimizer.

    The rate decides much, and each optimizer has its own best one. The mean is put back.
    """
    accuracy = np.array([row["early_accuracy"] for row in rows])
    rest = accuracy.copy()
    for optimizer in {row["optimizer"] for row in rows}:
        chosen = np.array([row["optimizer"] == optimizer for row in rows])
        lr = np.log10([row["lr"] for row in rows])[chosen]
        rest[chosen] -= np.polyval(np.polyfit(lr, accuracy[chosen], 2), lr)
    return rest + accuracy.mean()


def difference(rows: list[Row], name: str, ones: Collection, others: Collection) -> str:
    """Mean of the trials with one of some values less that of those with one of others."""

    def statistic(rows: list[Row]) -> float:
        rest = at_equal_rate(rows)
        means = [rest[[row[name] in values for row in rows]].mean() for values in (ones, others)]
        return means[0] - means[1]

    found, low, high = with_interval(statistic, rows)
    a, b = (sum(row[name] in values for row in rows) for values in (ones, others))
    return f"{found:+.1f} points ({low:+.1f} to {high:+.1f}; {a} trials against {b})"


def rank_correlation(
    rows: list[Row],
    x: Callable[[Row], float],
    y: Callable[[list[Row]], np.ndarray] = at_equal_rate,
) -> str:
    """Spearman's coefficient."""
    from scipy.stats import spearmanr

    def statistic(rows: list[Row]) -> float:
        return spearmanr([x(row) for row in rows], y(rows)).statistic

    found, low, high = with_interval(statistic, rows)
    return f"{found:+.2f} ({low:+.2f} to {high:+.2f}; {len(rows)} trials)"


def with_interval(
    statistic: Callable[[list[Row]], float], rows: list[Row]
) -> tuple[float, float, float]:
    """A statistic of the trials, and its 95% interval by bootstrap."""
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(rows), (DRAWS, len(rows)))
    drawn = [statistic([rows[i] for i in draw]) for draw in draws if len(set(draw)) > 2]
    return statistic(rows), *np.nanpercentile(drawn, [2.5, 97.5])


def answers() -> list[str]:
    """A line per question."""
    _, _, rows = load()
    drops = [share for share in NARROWED["dropout"] if share]
    questions = {
        "3 stages against 2": ("num_stages", [3], [2]),
        "3 stages against 4": ("num_stages", [3], [4]),
        "odd blocks in all stages against the rest": ("odd", ["all"], ["some", "none"]),
        "dropout in blocks against none": ("dropout", drops, [0]),
        "dropout before the classifier against none": ("classifier_dropout", drops, [0]),
    }
    lines = [f"{asked}: {difference(rows, *what)}" for asked, what in questions.items()]
    depth = rank_correlation(rows, lambda row: row["mean_blocks"])
    width = rank_correlation(rows, lambda row: row["c1"] * row["width"])
    lines.append(f"rank correlation with blocks per stage: {depth}")
    lines.append(f"rank correlation with channels of the first stage: {width}")
    if (FOLDER / "longer.csv").exists():
        both = rank_correlation(
            utils.read_csv(FOLDER / "longer.csv"),
            lambda row: row["short_accuracy"],
            lambda rows: np.array([row["long_accuracy"] for row in rows]),
        )
        lines.append(f"rank correlation of short and longer training: {both}")
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
    script.run_script(main)
