"""The answers of studies/choices to the questions of the paper, one line each.

    python -m studies.choices.answers    # prints them, from trials.csv and longer.csv

Every number has a 95% interval, by bootstrap over the trials, and the number of trials. Under a
budget the choices depend on each other (wide networks are shallow), so a correlation with accuracy
does not show a cause. Networks with only 1x1 convolutions, which see neighboring pixels only in the
stem and the shortcuts, are far less accurate: they are left out, except where the question is about
them, about all networks, or about longer trainings.
"""

if __name__ == "__main__":
    from engine.script import run_script

    run_script("studies.choices.answers")

from collections.abc import Callable, Iterable

import numpy as np
from scipy.stats import rankdata

import utils
from engine.progress import Row
from search.figures import with_derived
from search.trials import METRIC
from studies.choices.run import FOLDER, whole

DRAWS = 2000  # bootstrap samples
ON_GPU = (3, 5, 6, 7, 8, 9, 12, 13, 25, 33, 36, 38, 41, 42, 43, 44, 48)  # trials, of the record
Number = Callable[[Row], float]


def load() -> list[Row]:
    """The trials with an accuracy; `longer` is the accuracy after longer training, or None."""
    path = FOLDER / "longer.csv"
    longer = {row["trial"]: row[METRIC] for row in utils.read_csv(path)} if path.exists() else {}
    rows = whole(utils.read_csv(FOLDER / "trials.csv"))
    rows = [with_derived(row) | {"longer": longer.get(row["trial"])} for row in rows]
    return [
        row
        | {
            "squared_blocks": row["mean_blocks"] ** 2,
            "only_1x1": row["mean_conv_kernel"] == 1,
            "on_gpu": row["trial"] in ON_GPU,
        }
        for row in rows
    ]


def with_interval(statistic: Callable[..., np.ndarray], *columns: np.ndarray) -> np.ndarray:
    """A statistic of columns and the ends of its 95% interval.

    Args:
        statistic: a function of arrays, over their last dimension.
    """
    n = len(columns[0])
    draws = np.random.default_rng(0).integers(0, n, (DRAWS, n))
    with np.errstate(invalid="ignore"):  # some samples contain one value only
        drawn = statistic(*(column[draws] for column in columns))
        return np.array([statistic(*columns), *np.nanpercentile(drawn, [2.5, 97.5])])


def difference(
    rows: list[Row], name: str, ones: Iterable, others: Iterable, equal: Iterable[str] = ()
) -> str:
    """The mean accuracy of the trials with values in `ones` minus that of those in `others`.

    Args:
        equal: columns to adjust for, by a linear fit, since choices depend on each other under a
            budget. (Networks with an odd number of blocks in all stages are shallower, since 1 is
            the most frequent odd number; with the squared depth among the columns, an optimum at
            medium depth is adjusted for, too.)
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
    """Spearman's rank correlation, partial with respect to the numbers in `equal`."""
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
    """The residuals of a linear fit of `y` to columns; 0 for those within rounding errors."""
    factors = np.stack([np.ones_like(y), *columns], axis=-1)
    rest = y - (factors @ (np.linalg.pinv(factors) @ y[..., None]))[..., 0]
    return np.where(np.abs(rest) < 1e-9 * np.abs(y).max(), 0, rest)


def share_of(kernel: int) -> Number:
    """The share of a trial's stages with convolutions of this size."""
    return lambda row: np.mean([int(k) == kernel for k in str(row["conv_kernel"]).split()])


def answers() -> list[str]:
    """One line per question."""
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
        "3 stages against 4, at an equal machine": difference(
            rows, "num_stages", [3], [4], equal=["on_gpu"]
        ),
        "3 stages against 4, at equal MACs and machine": difference(
            rows, "num_stages", [3], [4], equal=["macs", "on_gpu"]
        ),
        "3 stages against 4, of all trials": difference(everything, "num_stages", [3], [4]),
        "odd blocks in all stages against the rest, at equal depth": difference(
            rows, "odd", ["all"], ["some", "none"], equal=depth
        ),
        "pooled to 1x1 against 2x2 and 4x4": difference(rows, "pooled_size", [1], [2, 4]),
    }
    sizes = {
        "blocks per stage": lambda row: row["mean_blocks"],
        "channels of the first stage": lambda row: row["c1"] * row["width"],
    }
    others = [share_of(1), lambda row: row["num_stages"]]  # three stages are wider than four
    for name, number in sizes.items():
        lines[f"rank correlation with {name}, at equal stages and share of 1x1 convolutions"] = (
            rank_correlation(rows, number, equal=others)
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


def study() -> None:
    """Print the answers."""
    print("\n".join(answers()))


def main(args: list[str]) -> None:
    """Parse the command line, which has no option but -h, and print the answers."""
    import tyro

    tyro.cli(study, args=args, prog="python -m studies.choices.answers", description=__doc__)
