"""The scripts' figures: learning curves, confusion matrix, calibration, mistakes, search effects.

Made without pyplot, so that no window system, global state or backend is touched. What only the
README shows is drawn by studies/figures.py.
"""

import textwrap
from collections.abc import Iterable
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from metrics import Calibration, Score
from model import MAX_PARAMS, Architecture, check_budget, feature_size
from utils import atomic_path

# Okabe & Ito's palette, which colour-blind readers can tell apart (jfly.uni-koeln.de/color).
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"

EFFECTS = (  # the figures of a search
    "num_block_inplane_effects.png",
    "hyperparameters_effects.png",
    "choices.png",
    "accuracy_and_cost.png",
    "importance.png",
)
MIN_TRIALS = 10  # for the figures of a search
WORST = 10  # percent of the trials, the worst ones, share a colour: others are told apart by theirs
MAX_LEVELS = 6  # a choice with more values is drawn as a trend, not by its means
LOGARITHMIC = ("lr",)
ODD = ("none", "some", "all")  # of the stages have an odd number of blocks
# Columns of trials.csv and of `with_derived` that a search chooses, and their labels.
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
    "mean_conv_kernel": "conv kernel, mean",
    "mean_skip_kernel": "skip kernel, mean",
    "pooled_size": "pooled map, side",
    "dropout": "dropout in blocks",
    "classifier_dropout": "dropout before classifier",
}
LINES, MARKERS = ("--", "-", ":", "-."), "osD^"  # of the widths, in turn
COSTS = {"num_params": "parameters, millions", "macs": "MACs per image, millions"}


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as a PNG file at 150 dpi, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def learning_curves(log: list[dict[str, float | None]], path: str | Path, title: str) -> None:
    """Training and validation loss and accuracy over the epochs; `log` has the rows of log.csv."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title, parse_math=False)  # a $ in a path is no formula
    epochs = [row["epoch"] for row in log]
    for axes, name, label in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), ("cross entropy", "accuracy, %"), strict=True
    ):
        for split, color in (("train", BLUE), ("val", ORANGE)):
            values = [row[f"{split}_{name}"] for row in log]
            if None not in values:
                marker = "o" if len(log) < 30 else None
                text = {"train": "training (augmented)", "val": "validation"}[split]
                axes.plot(epochs, values, color=color, marker=marker, markersize=3, label=text)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    save(figure, path)


def confusion_matrix(
    counts: np.ndarray, class_names: list[str], path: str | Path, title: str
) -> None:
    """Counts of (true class, predicted class), (C, C), shaded by fraction of the true class."""
    fractions = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    figure = Figure(figsize=(7, 6.2), layout="constrained")
    axes = figure.subplots()
    # The square root spreads out the few percent in which classes differ.
    axes.imshow(np.sqrt(fractions), cmap="Blues", vmin=0, vmax=1)
    for (true, predicted), count in np.ndenumerate(counts):
        if count:
            dark = np.sqrt(fractions[true, predicted]) > 0.6
            axes.text(
                predicted, true, str(count), ha="center", va="center", fontsize=9,
                color="white" if dark else "black",
            )  # fmt: skip
    ticks = range(len(class_names))
    axes.set_xticks(ticks, class_names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, class_names)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(title, parse_math=False)
    save(figure, path)


def calibration(bins: Calibration, path: str | Path, title: str) -> None:
    """Reliability diagram: accuracy over confidence, and the number of images in each bin."""
    count, confidence, accuracy = bins.count, bins.confidence, bins.accuracy
    figure = Figure(figsize=(5.4, 5), layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = 100 / len(count)
    middle = width * (np.arange(len(count)) + 0.5)
    filled = count > 0
    right = (count * accuracy / 100).round().astype(int)
    ends = [Score(0.0, *pair).interval for pair in zip(right[filled], count[filled], strict=True)]
    reach = np.abs(np.array(ends).T - accuracy[filled])
    top.bar(middle, accuracy, 0.9 * width, color=BLUE, alpha=0.4, label="right")
    top.errorbar(
        confidence[filled], accuracy[filled], reach, fmt="o", color=BLUE, capsize=2,
        label="at the mean confidence, 95% interval",
    )  # fmt: skip
    top.plot([0, 100], [0, 100], "--", color=GREY, label="well calibrated")
    top.set(ylabel="right, %", ylim=(0, 102), xlim=(0, 102))
    top.legend(
        frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1),
        handletextpad=0.4, columnspacing=1,
    )  # fmt: skip
    bottom.bar(middle, count, 0.9 * width, color=GREY)
    bottom.set(xlabel="confidence, %", ylabel="images")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def mistakes(images: np.ndarray, captions: list[str], path: str | Path, title: str) -> None:
    """Images, (N, S, S, 3) uint8, in rows of six, each below its caption."""
    rows = max(1, -(-len(images) // 6))
    figure = Figure(figsize=(10, 1.9 * rows + 0.5), layout="constrained")
    figure.suptitle(f"{title}; its most confident mistakes", parse_math=False)
    for axes in figure.subplots(rows, 6, squeeze=False).flat:
        axes.axis("off")
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(image)
        axes.set_title(caption, fontsize=8)
    save(figure, path)


def effects(
    rows: list[dict[str, object]],
    directory: str | Path,
    caption: str,
    max_params: int = MAX_PARAMS,
) -> list[Path]:
    """Draw the figures of a search from the rows of its trials.csv; returns their paths.

    Trials are compared by their accuracy after the grace period, which they all had. Those that
    diverged in it are left out; fewer than MIN_TRIALS, or those that are all alike, make no figure,
    and neither do those that differ in none of CHOICES.

    Args:
        caption: how the trials were trained.
        max_params: the budget of the search.
    """
    rows = [with_derived(row) for row in rows if row["early_accuracy"] is not None]
    alike = len({row["early_accuracy"] for row in rows}) == 1
    if len(rows) < MIN_TRIALS or alike or not differing(rows):
        return []
    shape = partial(blocks_and_channels, max_params=max_params)
    draws = (shape, parallel_coordinates, choices, accuracy_and_cost, importance)
    paths = [Path(directory, name) for name in EFFECTS]
    for draw, path in zip(draws, paths, strict=True):
        draw(rows, path, caption)
    return paths


def differing(rows: list[dict[str, object]], names: Iterable[str] = CHOICES) -> list[str]:
    """Those of some columns in which trials differ."""
    return [name for name in names if len({row.get(name) for row in rows}) > 1]


def with_derived(row: dict[str, object]) -> dict[str, object]:
    """A row of trials.csv, with columns that summarise its per-stage lists."""
    lists = {
        name: [int(n) for n in str(row[name]).split()]
        for name in ("num_blocks", "conv_kernel", "skip_kernel")
    }
    odd = [n % 2 for n in lists["num_blocks"]]
    # The first stage of a network of width 1 keeps its channels, and needs no convolution to skip.
    skips = lists["skip_kernel"][row["width"] == 1 :] or [0]
    return row | {
        "mean_blocks": np.mean(lists["num_blocks"]),
        "odd": ODD[any(odd) + all(odd)],
        "mean_conv_kernel": np.mean(lists["conv_kernel"]),
        "mean_skip_kernel": np.mean(skips),
    }


def blocks_and_channels(
    rows: list[dict[str, object]], path: str | Path, caption: str, max_params: int
) -> None:
    """Accuracy over blocks per stage and C1, with the budget; a panel per number of stages."""
    stages, widths = (sorted({row[name] for row in rows}) for name in ("num_stages", "width"))
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"Validation accuracy over depth and width; {caption}", fontsize=11)
    accuracy = [row["early_accuracy"] for row in rows]
    widest, deepest = (max(row[name] for row in rows) for name in ("c1", "mean_blocks"))
    depths = range(1, int(deepest) + 2)
    for axes, number in zip(
        figure.subplots(1, len(stages), sharey=True, squeeze=False)[0], stages, strict=True
    ):
        for width, style, marker in zip(widths, cycle(LINES), cycle(MARKERS), strict=False):
            limit = largest_c1(depths, number, width, max_params)
            axes.plot(
                limit, depths, style, color=GREY, linewidth=1,
                label=f"{max_params / 1e6:.3g}M parameters if 3x3, width {width}",
            )  # fmt: skip
            found = [row for row in rows if (row["num_stages"], row["width"]) == (number, width)]
            dots = axes.scatter(
                [row["c1"] for row in found],
                [row["mean_blocks"] for row in found],
                c=[row["early_accuracy"] for row in found],
                marker=marker, s=45, cmap="viridis", edgecolor="black", linewidth=0.4,
                vmin=np.percentile(accuracy, WORST), vmax=max(accuracy), label=f"width {width}",
            )  # fmt: skip
        axes.set(xlabel="C1", title=f"{number} stages")
        axes.set(xlim=(0, 1.1 * widest), ylim=(0, 1.1 * deepest), axisbelow=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="blocks per stage (mean)")
    figure.colorbar(dots, ax=figure.axes, label="validation accuracy, %", extend="min")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, path)


def largest_c1(depths: Iterable[int], num_stages: int, width: int, max_params: int) -> list[float]:
    """The C1, not rounded, at which networks of so many 3x3 blocks per stage reach the budget."""
    pool = feature_size(num_stages, "conv", "stride")
    # A layer's parameters grow with the square of C1, or with C1: each block adds a parabola.
    one, two = (
        [
            check_budget(Architecture((depth,) * num_stages, c1, width, pool_kernel=pool))
            for c1 in (1, 2, 3)
        ]
        for depth in (1, 2)
    )
    first, further = np.polyfit((1, 2, 3), np.transpose([one, np.subtract(two, one)]), 2).T
    parabolas = (first + (depth - 1) * further - (0, 0, max_params) for depth in depths)
    return [max(np.roots(parabola)) for parabola in parabolas]


def parallel_coordinates(rows: list[dict[str, object]], path: str | Path, caption: str) -> None:
    """Every trial as a line through its choices and costs, to its accuracy on the right."""
    shown = CHOICES | COSTS | {"early_accuracy": "accuracy, %"}
    columns = {name: [row[name] for row in rows] for name in differing(rows, shown)}
    columns.pop("odd", None)  # the blocks tell it
    order, is_flipped = side_by_side(columns)
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    figure.suptitle(f"Every trial's choices and its validation accuracy; {caption}", fontsize=11)
    axes = figure.subplots()
    heights = [
        draw_axis(axes, place, name, columns[name], is_flipped[name])
        for place, name in enumerate(order)
    ]
    accuracy = np.array(columns["early_accuracy"])
    from_worst = np.argsort(accuracy)  # the best lie on top, and are dark, for the page is white
    drawn = LineCollection(
        [np.column_stack([range(len(order)), line]) for line in np.array(heights).T[from_worst]],
        cmap="viridis_r", array=accuracy[from_worst], linewidths=[1.2] * (len(rows) - 1) + [3],
        alpha=0.75,
    )  # fmt: skip
    drawn.set_clim(np.percentile(accuracy, WORST), accuracy.max())
    axes.add_collection(drawn)
    axes.set(xlim=(-0.1, len(order) - 0.7), ylim=(-0.06, 1.06), yticks=[])
    room = max(6, 110 // len(order))  # letters, on a line
    names = [textwrap.fill(shown[name], room, break_long_words=False) for name in order]
    axes.set_xticks(range(len(order)), names, fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    label = "validation accuracy, %; the best one is thick"
    figure.colorbar(drawn, ax=axes, label=label, extend="min")
    save(figure, path)


def draw_axis(axes: Axes, x: float, name: str, values: list, is_flipped: bool) -> np.ndarray:
    """Draw an upright axis with its marks, from 0 to 1; returns where on it the values lie."""
    levels = sorted(set(values))
    numbers = {level: place for place, level in enumerate(levels)}
    if not isinstance(levels[0], str):
        scale = np.log if name in (*LOGARITHMIC, *COSTS) else float
        numbers = {level: scale(level) for level in levels}
    low, high = numbers[levels[0]], numbers[levels[-1]]
    heights = {level: abs(is_flipped - (n - low) / (high - low)) for level, n in numbers.items()}
    is_discrete = len(levels) <= MAX_LEVELS
    axes.axvline(x, color="black", linewidth=0.8)
    for level in levels if is_discrete else (levels[0], levels[len(levels) // 2], levels[-1]):
        text = mark(level / 1e6 if name in COSTS else level)
        axes.annotate(
            text, (x, heights[level]), (3, 0), textcoords="offset points", va="center",
            fontsize=8, zorder=5, bbox={"facecolor": "white", "alpha": 0.7, "pad": 0.5, "lw": 0},
        )  # fmt: skip
    # Trials that share a value lie a little apart, so that they can be counted.
    jitter = np.random.default_rng(0).uniform(-0.025, 0.025, len(values)) * is_discrete
    return np.array([heights[value] for value in values]) + jitter


def mark(value: str | float) -> str:
    """A value as an axis shows it."""
    return value.replace("_", "\n") if isinstance(value, str) else f"{value:.3g}"


def side_by_side(columns: dict[str, list]) -> tuple[list[str], dict[str, bool]]:
    """An order of columns that ends with the last one, and which to turn upside down.

    So few lines cross: left of each column stands the one of the others whose rank correlation
    with it is strongest, turned if it is negative.
    """
    from scipy.stats import spearmanr  # here: it takes most of a second to load

    ranks = {
        name: [sorted(set(values)).index(value) for value in values]
        for name, values in columns.items()
    }
    *left, last = columns
    order, is_flipped = [last], {last: False}
    while left:
        rho = {name: spearmanr(ranks[name], ranks[order[0]]).statistic for name in left}
        nearest = max(left, key=lambda name: abs(rho[name]))
        is_flipped[nearest] = is_flipped[order[0]] != (rho[nearest] < 0)
        order.insert(0, nearest)
        left.remove(nearest)
    return order, is_flipped


def choices(rows: list[dict[str, object]], path: str | Path, caption: str) -> None:
    """Accuracy over each choice: every trial, and the mean or trend with its 95% interval."""
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
            draw_trend(axes, np.array(values, dtype=float), accuracy, rng, log=name in LOGARITHMIC)
        else:
            draw_means(axes, values, levels, accuracy, rng)
        axes.set_title(CHOICES[name], fontsize=10)
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


def draw_trend(
    axes: Axes, x: np.ndarray, y: np.ndarray, rng: np.random.Generator, log: bool
) -> None:
    """Points and their least-squares parabola, with the 95% band of 1,000 bootstrap samples."""
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


def draw_means(
    axes: Axes, values: list, levels: list, y: np.ndarray, rng: np.random.Generator
) -> None:
    """The points of each level, and their mean with its 95% interval (Student's t)."""
    from scipy.stats import t as student_t  # here: it takes most of a second to load

    for place, level in enumerate(levels):
        found = y[[value == level for value in values]]
        jitter = rng.uniform(-0.15, 0.15, len(found))
        axes.plot(place + jitter, found, "o", color=BLUE, markersize=3.5, alpha=0.7)
        if len(found) > 1:
            half = student_t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / len(found) ** 0.5
            axes.errorbar(
                place + 0.3, found.mean(), half, fmt="_", color=ORANGE, capsize=3, markersize=9
            )
    axes.set_xticks(range(len(levels)), [mark(level) for level in levels])
    axes.set_xlim(-0.5, len(levels) - 0.4)


def accuracy_and_cost(rows: list[dict[str, object]], path: str | Path, caption: str) -> None:
    """Accuracy over parameters and over MACs, with the Pareto front of the trials."""
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
    """Indices, by cost, of what is more accurate than everything that costs no more."""
    front, best = [], -np.inf
    for i in np.lexsort((-accuracy, cost)):
        if accuracy[i] > best:
            front.append(int(i))
            best = accuracy[i]
    return front


def importance(rows: list[dict[str, object]], path: str | Path, caption: str) -> None:
    """Permutation importance: what shuffling one choice costs a random forest's prediction."""
    names = differing(rows)
    drops, score = permutation_importance(rows, names)
    mean, spread = drops.mean(axis=0), drops.std(axis=0, ddof=1)
    order = np.argsort(mean)
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(order)), mean[order], xerr=spread[order], color=BLUE, capsize=2)
    axes.set_yticks(range(len(order)), [CHOICES[names[i]] for i in order])
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
    """Error added by shuffling each choice, (folds, choices), and the R² over all folds.

    Measured on held-out trials (Breiman, "Random Forests", 2001) in five-fold cross-validation,
    repeated twice, as a fraction of the variance of all accuracies.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance as shuffled
    from sklearn.model_selection import RepeatedKFold

    table = []
    for name in names:
        values = [row[name] for row in rows]
        if isinstance(values[0], str):
            values = [sorted(set(values)).index(value) for value in values]
        table.append(np.log(values) if name in LOGARITHMIC else values)
    x, y = np.array(table, dtype=float).T, np.array([row["early_accuracy"] for row in rows])
    drops, errors, total = [], 0.0, 0.0
    for seen, held_out in RepeatedKFold(n_splits=5, n_repeats=2, random_state=0).split(x):
        forest = RandomForestRegressor(n_estimators=50, random_state=0).fit(x[seen], y[seen])
        rest = (x[held_out], y[held_out])
        found = shuffled(
            forest, *rest, n_repeats=5, scoring="neg_mean_squared_error", random_state=0
        )
        drops.append(found.importances_mean / y.var())
        errors += ((forest.predict(rest[0]) - rest[1]) ** 2).sum()
        total += ((y[seen].mean() - rest[1]) ** 2).sum()
    return np.array(drops), 1 - errors / total
