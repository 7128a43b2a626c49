"""What the search in studies/choices tells of the paper's claims: a line per question.

    python -m studies.choices.answers    # prints them, from trials.csv and longer.csv

Every number comes with its 95% interval, by bootstrap over the trials, of which one in twenty
misses; and with the number of trials behind it. Within a budget choices come together, as wide
and shallow do: a correlation says what goes with accuracy, not what makes it. Networks of 1x1
convolutions alone, which behind the stem see a pixel's neighbours only by their shortcuts, are so
far below that they answer one question and are left out of the others.
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
    return [
        row
        | {
            "squared_blocks": row["mean_blocks"] ** 2,
            "only_1x1": row["mean_conv_kernel"] == 1,
        }
        for row in rows
    ]


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

    def statistic(accuracy: np.ndarray, group: np.ndarray, *columns: np.ndarray) -> np.ndarray:
        accuracy, group = without(accuracy, columns), without(group, columns)
        return (group * accuracy).sum(-1) / (group**2).sum(-1)

    accuracy, *columns = (np.array([float(row[name]) for row in rows]) for name in (METRIC, *equal))
    found, low, high = with_interval(statistic, accuracy, group, *columns)
    a = int(group.sum())
    b = len(group) - a
    return f"{found:+.1f} points ({low:+.1f} to {high:+.1f}; {a} trials against {b})"


def rank_correlation(
    rows: list[Row],
    x: Number,
    y: Number = lambda row: row[METRIC],
    equal: Iterable[Number] = (),
) -> str:
    """Spearman's coefficient; with `equal`, of what these numbers' ranks leave of both."""
    columns = [np.array([number(row) for row in rows], dtype=float) for number in (x, y, *equal)]
    if any(len(set(column)) == 1 for column in columns):
        return "all trials are alike"

    def statistic(*columns: np.ndarray) -> np.ndarray:
        x, y, *rest = (rankdata(column, axis=-1) for column in columns)
        x, y = without(x, rest), without(y, rest)
        return (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))

    found, low, high = with_interval(statistic, *columns)
    return f"{found:+.2f} ({low:+.2f} to {high:+.2f}; {len(rows)} trials)"


def without(y: np.ndarray, columns: Iterable[np.ndarray]) -> np.ndarray:
    """What a linear fit to some columns leaves of `y`; 0 where it leaves but rounding errors."""
    factors = np.stack([np.ones_like(y), *columns], axis=-1)
    rest = y - (factors @ (np.linalg.pinv(factors) @ y[..., None]))[..., 0]
    return np.where(np.abs(rest) < 1e-9 * np.abs(y).max(), 0, rest)


def share_of(kernel: int) -> Number:
    """What share of a trial's stages has convolutions of this size."""
    return lambda row: np.mean([int(k) == kernel for k in str(row["conv_kernel"]).split()])


def answers() -> list[str]:
    """A line per question."""
    everything = load()
    rows = [row for row in everything if not row["only_1x1"]]
    accuracy = np.array([row[METRIC] for row in everything])
    depth = ("mean_blocks", "squared_blocks", "num_stages")
    lines = {
        "validation accuracy": f"{accuracy.min():.1f}% to {accuracy.max():.1f}%, median"
        f" {np.median(accuracy):.1f}% ({len(everything)} trials)",
        "1x1 convolutions alone against the rest": difference(
            everything, "only_1x1", [True], [False]
        ),
        "3 stages against 4": difference(rows, "num_stages", [3], [4]),
        "3 stages against 4, at equal MACs": difference(
            rows, "num_stages", [3], [4], equal=["macs"]
        ),
        "odd blocks in all stages against the rest, at equal depth": difference(
            rows, "odd", ["all"], ["some", "none"], equal=depth
        ),
        "pooled to 1x1 against 2x2 and 4x4": difference(rows, "pooled_size", [1], [2, 4]),
    }
    sizes = {
        "blocks per stage": lambda row: row["mean_blocks"],
        "channels of the first stage": lambda row: row["c1"] * row["width"],
    }
    for name, number in sizes.items():
        lines[f"rank correlation with {name}, at an equal share of 1x1 convolutions"] = (
            rank_correlation(rows, number, equal=[share_of(1)])
        )
    numbers = {
        **{f"the share of {k}x{k} convolutions": share_of(k) for k in (1, 3, 5)},
        "the skip kernel": lambda row: row["mean_skip_kernel"],
        "parameters": lambda row: row["num_params"],
        "MACs": lambda row: row["macs"],
    }
    for name, number in numbers.items():
        lines[f"rank correlation with {name}"] = rank_correlation(rows, number)
    if longer := [row for row in everything if row["longer"] is not None]:
        lines["rank correlation of short and longer training"] = rank_correlation(
            longer, lambda row: row["longer"]
        )
        lines["rank correlation of what longer training adds with blocks per stage"] = (
            rank_correlation(longer, sizes["blocks per stage"], lambda r: r["longer"] - r[METRIC])
        )
    return [f"{question}: {answer}" for question, answer in lines.items()]


def main(_args: list[str]) -> None:
    """Print the answers."""
    print("\n".join(answers()))


if __name__ == "__main__":
    script.run_script(main)
