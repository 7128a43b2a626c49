"""The figures of a search, drawn from the rows of its trials.csv.

Accuracies are those after the grace period, which all trials of a search had.
"""

import textwrap
from collections.abc import Iterable
from dataclasses import fields
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from config import Config
from engine.evaluate import half_width
from engine.plots import BLUE, GREY, ORANGE, save
from model import MAX_PARAMS, Architecture, feature_size, num_parameters
from search.space import PER_STAGE

EFFECTS = (
    "num_block_inplane_effects.png",
    "hyperparameters_effects.png",
    "choices.png",
    "accuracy_and_cost.png",
    "importance.png",
)
MIN_TRIALS = 10  # with an accuracy; fewer give no figures
WORST = 10  # percent; the color scale starts here, so that a few bad trials do not stretch it
MAX_LEVELS = 6  # a choice with more values is drawn with a trend instead of a mean per value
WIDE = 30  # times the least value: over so wide a range another constant is drawn on a log scale
ODD = ("none", "some", "all")  # of the stages have an odd number of blocks
# The usual choices of a search, columns of trials.csv or of `with_derived`, with their labels.
CHOICES = {
    "lr": "learning rate",
    "batch_size": "batch size",
    "optimizer": "optimizer",
    "schedule": "schedule",
    "num_stages": "stages",
    "mean_blocks": "blocks per stage, mean",
    "odd": "odd blocks, in how many stages",
    "c1": "C1",
    "width": "width",
    "mean_channels": "channels per stage, mean",
    "mean_conv_kernel": "conv kernel, mean",
    "mean_skip_kernel": "skip kernel, mean",
    "pooled_size": "pooled map, side",
    "dropout": "dropout in blocks",
    "classifier_dropout": "dropout before classifier",
}
COSTS = {"num_params": "parameters, millions", "macs": "MACs per image, millions"}
LINES, MARKERS = ("--", "-", ":", "-."), "osD^"  # one per width


def effects(
    rows: list[dict[str, object]],
    directory: str | Path,
    caption: str,
    max_params: int | None = MAX_PARAMS,
) -> list[Path]:
    """Draw the five EFFECTS from the rows of a trials.csv; returns their paths.

    Trials that diverged within the grace period are left out. No figure is drawn for fewer than
    MIN_TRIALS others, or if these all have the same accuracy or the same choices.

    Args:
        caption: how the trials were trained.
        max_params: the budget of the search; None where `largest_depth` does not know its networks.
    """
    rows = [with_derived(row) for row in rows if row["early_accuracy"] is not None]
    same_accuracy = len({row["early_accuracy"] for row in rows}) == 1
    if len(rows) < MIN_TRIALS or same_accuracy or not differing(rows):
        return []
    depth_and_width = partial(blocks_and_channels, max_params=max_params)
    plots = (depth_and_width, parallel_coordinates, choices, accuracy_and_cost, importance)
    paths = [Path(directory, name) for name in EFFECTS]
    for plot, path in zip(plots, paths, strict=True):
        plot(rows, path, caption)
    return paths


def labels_of(rows: list[dict[str, object]]) -> dict[str, str]:
    """The choices, and the labels of these: CHOICES, and other constants that SPACE draws."""
    constants = {field.name for field in fields(Config)} - {*PER_STAGE, "pool_kernel", "epochs"}
    others = [name for name in rows[0] if name in constants and name not in CHOICES]
    return CHOICES | {name: name.replace("_", " ") for name in others}


def differing(rows: list[dict[str, object]], names: Iterable[str] = ()) -> list[str]:
    """The columns, of `names` or of all choices, in which trials differ."""
    names = names or labels_of(rows)
    return [name for name in names if len({row.get(name) for row in rows}) > 1]


def is_logarithmic(name: str, values: list) -> bool:
    """True for the learning rate, and for another constant than CHOICES of a wide range."""
    if name in CHOICES or isinstance(values[0], str):
        return name == "lr"
    return max(values) >= WIDE * min(values) > 0


def with_derived(row: dict[str, object]) -> dict[str, object]:
    """A row of trials.csv with columns that summarize its per-stage lists."""
    lists = {name: [int(n) for n in str(row[name]).split()] for name in PER_STAGE if name in row}
    odd = [n % 2 for n in lists["num_blocks"]]
    # Where the first stage keeps the stem's channels, its shortcut has no convolution.
    channels = lists.get("channels")
    keeps = channels[0] == row["c1"] if channels else row["width"] == 1
    skips = lists["skip_kernel"][keeps:] or [0]
    if row.get("downsample") == "pool":  # no shortcut has one
        skips = [0]
    return row | {
        "mean_blocks": np.mean(lists["num_blocks"]),
        "odd": ODD[any(odd) + all(odd)],
        "mean_conv_kernel": np.mean(lists["conv_kernel"]),
        "mean_skip_kernel": np.mean(skips),
        "mean_channels": np.mean(channels) if channels else None,
    }


def blocks_and_channels(
    rows: list[dict[str, object]], path: str | Path, caption: str, max_params: int | None
) -> None:
    """Plot accuracy over C1 and blocks per stage, with the budget; a panel per num_stages.

    Channels that were drawn for each stage are plotted by their mean, which sets no budget.
    """
    x = "c1" if "width" in rows[0] else "mean_channels"
    stages, widths = (sorted({row.get(name) for row in rows}) for name in ("num_stages", "width"))
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"Validation accuracy over depth and width; {caption}", fontsize=11)
    accuracy = [row["early_accuracy"] for row in rows]
    widest, deepest = (max(row[name] for row in rows) for name in (x, "mean_blocks"))
    c1 = np.unique(np.geomspace(2, 1.1 * widest, 20).astype(int))
    for axes, number in zip(
        figure.subplots(1, len(stages), sharey=True, squeeze=False)[0], stages, strict=True
    ):
        for width, style, marker in zip(widths, cycle(LINES), cycle(MARKERS), strict=False):
            if width and max_params:
                depth = np.array([largest_depth(n, number, width, max_params) for n in c1])
                axes.plot(
                    c1[depth >= 1], depth[depth >= 1], style, color=GREY, linewidth=1,
                    label=f"{max_params / 1e6:.3g}M parameters if 3x3, width {width}",
                )  # fmt: skip
            found = [
                row for row in rows if (row["num_stages"], row.get("width")) == (number, width)
            ]
            dots = axes.scatter(
                [row[x] for row in found],
                [row["mean_blocks"] for row in found],
                c=[row["early_accuracy"] for row in found],
                marker=marker, s=45, cmap="viridis", edgecolor="black", linewidth=0.4,
                vmin=np.percentile(accuracy, WORST), vmax=max(accuracy),
                label=f"width {width}" if width else "trial",
            )  # fmt: skip
        axes.set(xlabel=CHOICES[x], title=f"{number} stages")
        axes.set(xlim=(0, 1.1 * widest), ylim=(0, 1.1 * deepest), axisbelow=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="blocks per stage (mean)")
    figure.colorbar(dots, ax=figure.axes, label="validation accuracy, %", extend="min")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, path)


def largest_depth(c1: int, num_stages: int, width: int, max_params: int) -> float:
    """The blocks per stage, not rounded, at which a network of 3x3 blocks reaches the budget.

    With a plain stem, and strides.
    """
    pool_kernel = feature_size(Architecture((1,) * num_stages))
    one, two = (
        num_parameters(Architecture((n,) * num_stages, int(c1), width, pool_kernel=pool_kernel))
        for n in (1, 2)
    )
    return 1 + (max_params - one) / (two - one)  # every further block adds as many


def parallel_coordinates(rows: list[dict[str, object]], path: str | Path, caption: str) -> None:
    """Plot every trial as a line through its choices and costs to its accuracy on the right."""
    labels = labels_of(rows) | COSTS | {"early_accuracy": "accuracy, %"}
    shown = [name for name in differing(rows, labels) if name != "odd"]  # mean_blocks is similar
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    figure.suptitle(f"Every trial's choices and its validation accuracy; {caption}", fontsize=11)
    axes = figure.subplots()
    heights = [
        plot_axis(axes, place, name, [row[name] for row in rows])
        for place, name in enumerate(shown)
    ]
    accuracy = np.array([row["early_accuracy"] for row in rows])
    from_worst = np.argsort(accuracy)  # the best trials are drawn last, on top, and dark
    lines = LineCollection(
        [np.column_stack([range(len(shown)), line]) for line in np.array(heights).T[from_worst]],
        cmap="viridis_r", array=accuracy[from_worst], linewidths=[1.2] * (len(rows) - 1) + [3],
        alpha=0.75,
    )  # fmt: skip
    lines.set_clim(np.percentile(accuracy, WORST), accuracy.max())
    axes.add_collection(lines)
    axes.set(xlim=(-0.1, len(shown) - 0.7), ylim=(-0.06, 1.06), yticks=[])
    room = max(6, 110 // len(shown))  # characters per line
    names = [textwrap.fill(labels[name], room, break_long_words=False) for name in shown]
    axes.set_xticks(range(len(shown)), names, fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    label = "validation accuracy, %; the best one is thick"
    figure.colorbar(lines, ax=axes, label=label, extend="min")
    save(figure, path)


def plot_axis(axes: Axes, x: float, name: str, values: list) -> np.ndarray:
    """Draw a vertical axis with its ticks; returns the heights of the values on it, 0 to 1."""
    levels = sorted(set(values))
    numbers = {level: place for place, level in enumerate(levels)}
    if not isinstance(levels[0], str):
        scale = np.log if name in COSTS or is_logarithmic(name, values) else float
        numbers = {level: scale(level) for level in levels}
    low, high = numbers[levels[0]], numbers[levels[-1]]
    heights = {level: (number - low) / (high - low) for level, number in numbers.items()}
    is_discrete = len(levels) <= MAX_LEVELS
    axes.axvline(x, color="black", linewidth=0.8)
    for level in levels if is_discrete else (levels[0], levels[len(levels) // 2], levels[-1]):
        text = tick(level / 1e6 if name in COSTS else level)
        axes.annotate(
            text, (x, heights[level]), (3, 0), textcoords="offset points", va="center",
            fontsize=8, zorder=5, bbox={"facecolor": "white", "alpha": 0.7, "pad": 0.5, "lw": 0},
        )  # fmt: skip
    # Trials that share a value are drawn a little apart, so that they can be told from each other.
    jitter = np.random.default_rng(0).uniform(-0.025, 0.025, len(values)) * is_discrete
    return np.array([heights[value] for value in values]) + jitter


def tick(value: str | float) -> str:
    return value.replace("_", "\n") if isinstance(value, str) else f"{value:.3g}"


def choices(rows: list[dict[str, object]], path: str | Path, caption: str) -> None:
    """Plot accuracy over each choice: every trial, and means or a trend with 95% intervals."""
    accuracy = np.array([row["early_accuracy"] for row in rows])
    rng = np.random.default_rng(0)
    shown = differing(rows)
    height = -(-len(shown) // 4)
    figure = Figure(figsize=(10, 2.3 * height + 0.8), layout="constrained")
    figure.suptitle(f"Validation accuracy over each choice; {caption}", fontsize=11)
    panels = figure.subplots(height, 4, sharey=True, squeeze=False).flat
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    for axes, name in zip(panels, shown, strict=False):
        values = [row[name] for row in rows]
        levels = sorted(set(values), key=ODD.index if name == "odd" else None)
        if len(levels) > MAX_LEVELS:
            log = is_logarithmic(name, values)
            plot_trend(axes, np.array(values, dtype=float), accuracy, rng, log)
        else:
            plot_means(axes, values, levels, accuracy, rng)
        axes.set_title(labels_of(rows)[name], fontsize=10)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    for axes in figure.axes[::4]:
        axes.set_ylabel("accuracy, %", fontsize=9)
    figure.legend(
        handles=[
            Line2D([], [], color=BLUE, marker="o", linestyle="", label="a trial"),
            Line2D([], [], color=ORANGE, label="mean or trend, with its 95% interval"),
        ],
        loc="outside lower center", ncols=2, frameon=False,
    )  # fmt: skip
    save(figure, path)


def plot_trend(
    axes: Axes, x: np.ndarray, y: np.ndarray, rng: np.random.Generator, log: bool
) -> None:
    """Plot points and their least-squares parabola, with a 95% band by 1,000 bootstrap samples."""
    scale = np.log10 if log else np.asarray
    grid = np.linspace(scale(x).min(), scale(x).max(), 50)
    curves = []
    for _ in range(1000):
        drawn = rng.integers(0, len(x), len(x))
        if len(set(x[drawn])) > 2:  # a parabola needs three
            curves.append(np.polyval(np.polyfit(scale(x[drawn]), y[drawn], 2), grid))
    low, high = np.percentile(curves, [2.5, 97.5], axis=0)
    middle = np.polyval(np.polyfit(scale(x), y, 2), grid)
    places = 10**grid if log else grid
    axes.fill_between(places, low, high, color=ORANGE, alpha=0.2, linewidth=0)
    axes.plot(places, middle, color=ORANGE)
    axes.plot(x, y, "o", color=BLUE, markersize=3.5, alpha=0.7)
    axes.set_ylim(max(0, y.min() - 5), y.max() + 5)
    if log:
        axes.set_xscale("log")


def plot_means(
    axes: Axes, values: list, levels: list, y: np.ndarray, rng: np.random.Generator
) -> None:
    """Plot the points of each level, and their mean with its 95% interval (Student's t)."""
    for place, level in enumerate(levels):
        found = y[[value == level for value in values]]
        jitter = rng.uniform(-0.15, 0.15, len(found))
        axes.plot(place + jitter, found, "o", color=BLUE, markersize=3.5, alpha=0.7)
        if len(found) > 1:
            half = half_width(found.tolist())
            axes.errorbar(
                place + 0.3, found.mean(), half, fmt="_", color=ORANGE, capsize=3, markersize=9
            )
    axes.set_xticks(range(len(levels)), [tick(level) for level in levels])
    axes.set_xlim(-0.5, len(levels) - 0.4)


def accuracy_and_cost(rows: list[dict[str, object]], path: str | Path, caption: str) -> None:
    """Plot accuracy over parameters and over MACs, with the Pareto front of the trials."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    figure.suptitle(f"Validation accuracy and cost; {caption}", fontsize=11)
    for axes, (name, label) in zip(figure.subplots(1, 2, sharey=True), COSTS.items(), strict=True):
        cost = np.array([row[name] for row in rows]) / 1e6
        accuracy = np.array([row["early_accuracy"] for row in rows])
        front = pareto_front(cost, accuracy)
        axes.plot(cost, accuracy, "o", color=BLUE, markersize=4, alpha=0.6, label="trial")
        axes.step(
            cost[front], accuracy[front], "o-", where="post", color=ORANGE, markersize=5,
            label="Pareto front",
        )  # fmt: skip
        if cost.max() > 10 * cost.min():
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="validation accuracy, %")
    figure.axes[0].legend(frameon=False)
    save(figure, path)


def pareto_front(cost: np.ndarray, accuracy: np.ndarray) -> list[int]:
    """Indices, by increasing cost, of the trials that no trial of at most their cost beats."""
    front, best = [], -np.inf
    for i in np.lexsort((-accuracy, cost)):
        if accuracy[i] > best:
            front.append(int(i))
            best = accuracy[i]
    return front


def importance(rows: list[dict[str, object]], path: str | Path, caption: str) -> None:
    """Plot the permutation importance of each choice for a random forest's prediction."""
    names = differing(rows)
    drops, score = permutation_importance(rows, names)
    mean, spread = drops.mean(axis=0), drops.std(axis=0, ddof=1)
    order = np.argsort(mean)
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(order)), mean[order], xerr=spread[order], color=BLUE, capsize=2)
    axes.set_yticks(range(len(order)), [labels_of(rows)[names[i]] for i in order])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="squared error added by shuffling it, as a share of the variance; ± std")
    axes.set_title(
        f"Importance of each choice; {caption}\nrandom forest, R² on held-out trials {score:.2f}",
        fontsize=11,
    )
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def permutation_importance(
    rows: list[dict[str, object]], names: list[str]
) -> tuple[np.ndarray, float]:
    """The error that shuffling each choice adds, (folds, choices), and the R² over all folds.

    Breiman, "Random Forests", 2001. The error is the squared error of a random forest on held-out
    trials, in five-fold cross-validation repeated twice, as a fraction of the accuracies' variance.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance as shuffled
    from sklearn.model_selection import RepeatedKFold

    table = []
    for name in names:
        values = [row[name] for row in rows]
        if isinstance(values[0], str):
            values = [sorted(set(values)).index(value) for value in values]
        table.append(np.log(values) if is_logarithmic(name, values) else values)
    x, y = np.array(table, dtype=float).T, np.array([row["early_accuracy"] for row in rows])
    drops, errors, total = [], 0.0, 0.0
    for seen, held_out in RepeatedKFold(n_splits=5, n_repeats=2, random_state=0).split(x):
        forest = RandomForestRegressor(n_estimators=50, random_state=0).fit(x[seen], y[seen])
        new_x, new_y = x[held_out], y[held_out]
        found = shuffled(
            forest, new_x, new_y, n_repeats=5, scoring="neg_mean_squared_error", random_state=0
        )
        drops.append(found.importances_mean / y.var())
        errors += ((forest.predict(new_x) - new_y) ** 2).sum()
        total += ((y[seen].mean() - new_y) ** 2).sum()
    return np.array(drops), 1 - errors / total
