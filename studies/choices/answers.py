"""What the search in studies/choices tells of the paper's claims: a line per question.

    python -m studies.choices.answers    # prints them, from trials.csv and longer.csv

Every number comes with its 95% interval, by bootstrap over the trials, of which one in twenty
misses; and with the number of trials behind it. Within a budget choices come together, as wide
and shallow do: a correlation says what goes with accuracy, not what makes it.
"""

import script

from collections.abc import Callable, Iterable

import numpy as np
from scipy.stats import rankdata

import plots
import utils
from metrics import Row
from studies.choices.run import FOLDER, whole
from trials import METRIC

DRAWS = 2000  # of a bootstrap
Number = Callable[[Row], float]


def load() -> list[Row]:
    """The trials with an accuracy; those trained longer have a `longer` too."""
    path = FOLDER / "longer.csv"
    longer = {row["trial"]: row[METRIC] for row in utils.read_csv(path)} if path.exists() else {}
    rows = whole(utils.read_csv(FOLDER / "trials.csv"))
    rows = [plots.with_derived(row) | {"longer": longer.get(row["trial"])} for row in rows]
    return [row | {"squared_blocks": row["mean_blocks"] ** 2} for row in rows]


def with_interval(statistic: Callable[..., np.ndarray], *columns: np.ndarray) -> np.ndarray:
    """A statistic of some columns, and the two ends of its 95% interval.

    Args:
        statistic: of the last dimension of its arguments.
    """
    n = len(columns[0])
    draws = np.random.default_rng(0).integers(0, n, (DRAWS, n))
    with np.errstate(invalid="ignore"):  # in some draws the trials are all alike
        drawn = statistic(*(column[draws] for column in columns))
        return np.array([statistic(*columns), *np.nanpercentile(drawn, [2.5, 97.5])])


def difference(
    rows: list[Row], name: str, ones: Iterable, others: Iterable, equal: Iterable[str] = ()
) -> str:
    """Mean accuracy of the trials with one of some values, less that of those with the others.

    Args:
        equal: the columns at whose equal values the two are compared, by a linear fit: within the
            budget a choice comes with others. Where all stages have an odd number of blocks,
            these are fewer, for one block is the most frequent of the odd numbers; with the square
            of the depth among the columns, what is best in between is no advantage of the others.
    """
    rows = [row for row in rows if row[name] in (*ones, *others)]
    group = np.array([float(row[name] in ones) for row in rows])
    if group.all() or not group.any():
        return "no trials to compare"

    def statistic(accuracy: np.ndarray, *columns: np.ndarray) -> np.ndarray:
        factors = np.stack([np.ones_like(accuracy), *columns], axis=-1)
        slopes = np.linalg.pinv(factors) @ accuracy[..., None]
        alike = np.ptp(columns[-1], axis=-1) == 0  # nothing to compare
        return np.where(alike, np.nan, slopes[..., -1, 0])

    columns = [np.array([float(row[column]) for row in rows]) for column in (METRIC, *equal)]
    found, low, high = with_interval(statistic, *columns, group)
    a = int(group.sum())
    b = len(group) - a
    return f"{found:+.1f} points ({low:+.1f} to {high:+.1f}; {a} trials against {b})"


def rank_correlation(rows: list[Row], x: Number, y: Number = lambda row: row[METRIC]) -> str:
    """Spearman's coefficient."""
    columns = [np.array([number(row) for row in rows], dtype=float) for number in (x, y)]
    if any(len(set(column)) == 1 for column in columns):
        return "all trials are alike"

    def statistic(*columns: np.ndarray) -> np.ndarray:
        x, y = (rankdata(column, axis=-1) for column in columns)
        x, y = (ranks - ranks.mean(-1, keepdims=True) for ranks in (x, y))
        return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))

    found, low, high = with_interval(statistic, *columns)
    return f"{found:+.2f} ({low:+.2f} to {high:+.2f}; {len(rows)} trials)"


def share_of(kernel: int) -> Number:
    """What share of a trial's stages has convolutions of this size."""
    return lambda row: np.mean([int(k) == kernel for k in str(row["conv_kernel"]).split()])


def answers() -> list[str]:
    """A line per question."""
    rows = load()
    accuracy = np.array([row[METRIC] for row in rows])
    lines = {
        "validation accuracy": f"{accuracy.min():.1f}% to {accuracy.max():.1f}%, median"
        f" {np.median(accuracy):.1f}% ({len(rows)} trials)",
        "3 stages against 4": difference(rows, "num_stages", [3], [4]),
        "odd blocks in all stages against the rest, at equal depth": difference(
            rows,
            "odd",
            ["all"],
            ["some", "none"],
            equal=("mean_blocks", "squared_blocks", "num_stages"),
        ),
        "pooled to 1x1 against 2x2 and 4x4": difference(rows, "pooled_size", [1], [2, 4]),
    }
    numbers = {
        "blocks per stage": lambda row: row["mean_blocks"],
        "channels of the first stage": lambda row: row["c1"] * row["width"],
        **{f"the share of {k}x{k} convolutions": share_of(k) for k in (1, 3, 5)},
        "the skip kernel": lambda row: row["mean_skip_kernel"],
        "parameters": lambda row: row["num_params"],
        "MACs": lambda row: row["macs"],
    }
    for name, number in numbers.items():
        lines[f"rank correlation with {name}"] = rank_correlation(rows, number)
    if longer := [row for row in rows if row["longer"] is not None]:
        lines["rank correlation of short and longer training"] = rank_correlation(
            longer, lambda row: row["longer"]
        )
        lines["rank correlation of what longer training adds with blocks per stage"] = (
            rank_correlation(longer, numbers["blocks per stage"], lambda r: r["longer"] - r[METRIC])
        )
    return [f"{question}: {answer}" for question, answer in lines.items()]


def main(_args: list[str]) -> None:
    """Print the answers."""
    print("\n".join(answers()))


if __name__ == "__main__":
    script.run_script(main)
