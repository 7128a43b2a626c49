"""Every figure: learning curves, confusion matrix, benchmark, search effects, architecture.

    python plots.py    # redraws what the README shows, but for benchmark.py's figure

Figures are made without pyplot, so no window system, global state or backend is touched.
"""

import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon
from matplotlib.ticker import MaxNLocator
from torch import nn

from utils import Score, atomic_path, read_csv, read_numbers, run_script

# Okabe & Ito's palette, told apart by colour-blind readers too (jfly.uni-koeln.de/color).
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"

EFFECTS = (  # the figures of a search
    "num_block_inplane_effects.png",
    "hyperparameters_effects.png",
    "accuracy_and_cost.png",
    "importance.png",
)
MAX_PARAMS = 5_000_000  # the budget, drawn into the figures of a search
MIN_TRIALS = 10  # for a figure to say anything
MAX_LEVELS = 6  # of a choice that is drawn by its means, not as a trend
LOGARITHMIC = ("lr",)
ODD = ("none", "some", "all")  # of the stages have an odd number of blocks
# What a search chooses, from trials.csv and `with_derived`.
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


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG at 150 dots per inch, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def learning_curves(log: list[dict[str, float | None]], path: str | Path, title: str) -> None:
    """Loss and accuracy over the epochs, training beside validation.

    Args:
        log: the rows of log.csv.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
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
    """Counts of (true class, predicted class), (C, C); shaded by the share of the true class."""
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    figure = Figure(figsize=(7, 6.2), layout="constrained")
    axes = figure.subplots()
    # The square root spreads out the few percent in which classes differ.
    axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)
    for (true, predicted), count in np.ndenumerate(counts):
        if count:
            dark = np.sqrt(shares[true, predicted]) > 0.6
            axes.text(
                predicted, true, str(count), ha="center", va="center", fontsize=9,
                color="white" if dark else "black",
            )  # fmt: skip
    ticks = range(len(class_names))
    axes.set_xticks(ticks, class_names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(ticks, class_names)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    save(figure, path)


def calibration(
    count: np.ndarray, confidence: np.ndarray, accuracy: np.ndarray, path: str | Path, title: str
) -> None:
    """Accuracy over confidence, on the diagonal where a model is well calibrated; and how many.

    Args:
        count: (B,) images in each of B bins of equal width by confidence.
        confidence: (B,) their mean confidence, percent.
        accuracy: (B,) how many of them are right, percent.
    """
    figure = Figure(figsize=(5.4, 5), layout="constrained")
    figure.suptitle(title, fontsize=10)
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
    """The images, (N, S, S, 3) uint8, in rows of six, each under its caption."""
    rows = max(1, -(-len(images) // 6))
    figure = Figure(figsize=(10, 1.9 * rows + 0.5), layout="constrained")
    figure.suptitle(f"{title}; its most confident mistakes")
    for axes in figure.subplots(rows, 6, squeeze=False).flat:
        axes.axis("off")
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(image)
        axes.set_title(caption, fontsize=8)
    save(figure, path)


def benchmark(result: dict[str, object], path: str | Path) -> None:
    """Speed and memory of our loop beside the classical script's, as benchmark.py measured them."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    figure.suptitle(
        f"{result['preset']}: {result['num_params'] / 1e6:.2f}M parameters,"
        f" {result['macs'] / 1e6:,.0f} M MACs per image; medians, smallest to largest"
    )
    speed, memory, scaling = figure.subplots(1, 3, width_ratios=(1.2, 0.7, 1.2))
    colors, names = (BLUE, ORANGE), result["contestants"]

    shown = {"step": "training\nstep", "epoch": "whole\nepoch", "evaluate": "evaluation"}
    for i, (name, color) in enumerate(zip(names, colors, strict=True)):
        rates = np.array([result["images_per_second"][key][i] for key in shown])
        middle = np.median(rates, axis=1)
        errors = np.stack([middle - rates.min(axis=1), rates.max(axis=1) - middle])
        places = np.arange(len(shown)) + 0.38 * (i - 0.5)
        bars = speed.bar(places, middle, 0.36, yerr=errors, color=color, label=name, capsize=2)
        speed.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    speed.set_xticks(range(len(shown)), shown.values())
    speed.set(title=f"images/s at batch {result['batch_size']}")
    speed.margins(y=0.15)

    bars = memory.bar(names, [m / 1e9 for m in result["memory_bytes"]], color=colors)
    memory.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    memory.set_xticks(range(2), [name.replace(" ", "\n") for name in names])
    memory.set(title="peak memory, GB\nabove the bare process")
    memory.margins(y=0.1)

    sizes = list(result["scaling"])
    for i, (name, color) in enumerate(zip(names, colors, strict=True)):
        rates = np.array([result["scaling"][size][i] for size in sizes])
        scaling.fill_between(sizes, rates.min(axis=1), rates.max(axis=1), color=color, alpha=0.2)
        scaling.plot(sizes, np.median(rates, axis=1), "o-", color=color, markersize=4, label=name)
    scaling.set_xscale("log", base=2)
    scaling.set_xticks(sizes, sizes)
    scaling.minorticks_off()
    scaling.set_ylim(bottom=0)
    scaling.set(title="training step, images/s", xlabel="batch size")
    scaling.legend(frameon=False, loc="center right")
    for axes in (speed, memory, scaling):
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def accuracy_over_time(
    fast: list[dict[str, str]],
    tpsnet: list[dict[str, str]],
    epochs: int,
    published: float,
    path: str | Path,
) -> None:
    """Validation accuracy over the minutes of training: the preset `fast` and the paper's recipe.

    Args:
        fast: the rows of the log of a whole run, with its validation accuracy.
        tpsnet: the first rows of the paper's recipe on the same machine.
        epochs: of the paper's recipe, from which the rest of its time is projected.
        published: its accuracy after those, in percent.
    """
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    ends = []
    for rows, color, label in (
        (fast, BLUE, f"fast: {len(fast)} epochs"),
        (tpsnet, ORANGE, f"tpsnet: the first {len(tpsnet)} of {epochs} epochs"),
    ):
        minutes = np.cumsum([float(row["seconds"]) for row in rows]) / 60
        accuracy = [float(row["val_accuracy"]) for row in rows]
        axes.plot(minutes, accuracy, "o-", color=color, markersize=3, label=label)
        ends.append((minutes[-1], accuracy[-1]))
    (start, accuracy), total = ends[1], ends[1][0] * epochs / len(tpsnet)
    axes.plot([start, total], [accuracy, published], ":", color=ORANGE)
    axes.plot(total, published, "o", color=ORANGE, fillstyle="none")
    axes.annotate(
        f"{published}% as published\n(on the test set),\n{total / 60:.0f} hours as projected",
        (total, published), xytext=(36, -60), textcoords="offset points", ha="right", va="top",
    )  # fmt: skip
    axes.annotate(
        f"{ends[0][1]:.2f}%\n{ends[0][0]:.0f} minutes", ends[0],
        xytext=(6, -8), textcoords="offset points", va="top",
    )  # fmt: skip
    axes.set_xscale("log")
    ticks = {1: "1 min", 10: "10 min", 60: "1 h", 600: "10 h", 6000: "100 h"}
    axes.set_xticks(list(ticks), ticks.values())
    axes.minorticks_off()
    axes.set(xlabel="training time", ylabel="validation accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    save(figure, path)


def effects(rows: list[dict[str, object]], directory: str | Path, caption: str) -> list[Path]:
    """All figures of a search, from the rows of its trials.csv; returns where they are.

    Compared is the accuracy after the grace period, which all trials had. What diverged had none
    and is left out.

    Args:
        caption: how the trials were trained.
    """
    rows = [with_derived(row) for row in rows if row["early_accuracy"] is not None]
    if len(rows) < MIN_TRIALS:
        return []
    draws = (blocks_and_channels, hyperparameters, accuracy_and_cost, importance)
    paths = [Path(directory, name) for name in EFFECTS]
    for draw, path in zip(draws, paths, strict=True):
        draw(rows, path, caption)
    return paths


def with_derived(row: dict[str, object]) -> dict[str, object]:
    """A row of trials.csv with what its lists of a value per stage come to."""
    lists = {
        name: [int(n) for n in str(row[name]).split()]
        for name in ("num_blocks", "conv_kernel", "skip_kernel")
    }
    odd = [n % 2 for n in lists["num_blocks"]]
    return row | {
        "mean_blocks": np.mean(lists["num_blocks"]),
        "odd": ODD[any(odd) + all(odd)],
        "mean_conv_kernel": np.mean(lists["conv_kernel"]),
        "mean_skip_kernel": np.mean(lists["skip_kernel"]),
    }


def blocks_and_channels(rows: list[dict[str, object]], path: str | Path, caption: str) -> None:
    """Accuracy over blocks per stage and C1, a panel per number of stages, below the budget."""
    stages = sorted({row["num_stages"] for row in rows})
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"Validation accuracy over depth and width; {caption}", fontsize=11)
    accuracy = [row["early_accuracy"] for row in rows]
    widest, deepest = (max(row[name] for row in rows) for name in ("c1", "mean_blocks"))
    depths = range(1, int(deepest) + 2)
    for axes, number in zip(
        figure.subplots(1, len(stages), sharey=True, squeeze=False)[0], stages, strict=True
    ):
        for width, style in ((1, "--"), (2, "-")):
            limit = [largest_c1((depth,) * number, width) for depth in depths]
            axes.plot(
                limit, depths, style, color=GREY, linewidth=1,
                label=f"{MAX_PARAMS / 1e6:.0f}M parameters if 3x3, width {width}",
            )  # fmt: skip
            found = [row for row in rows if (row["num_stages"], row["width"]) == (number, width)]
            dots = axes.scatter(
                [row["c1"] for row in found],
                [row["mean_blocks"] for row in found],
                c=[row["early_accuracy"] for row in found],
                marker="os"[width - 1], s=45, cmap="viridis", edgecolor="black", linewidth=0.4,
                vmin=min(accuracy), vmax=max(accuracy), label=f"width {width}",
            )  # fmt: skip
        axes.set(xlabel="C1", title=f"{number} stages")
        axes.set(xlim=(0, 1.1 * widest), ylim=(0, 1.1 * deepest), axisbelow=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="blocks per stage (mean)")
    figure.colorbar(dots, ax=figure.axes, label="validation accuracy, %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, path)


def largest_c1(num_blocks: tuple[int, ...], width: int) -> float:
    """The C1, not rounded, at which a network of 3x3 blocks reaches the budget."""
    from model import check_budget  # here: as a library, this file imports no model

    pool = 32 // 2 ** (len(num_blocks) - 1)
    shape = {"num_blocks": num_blocks, "width": width, "pool_kernel": pool}
    # A layer's parameters grow with the square of C1, or with C1: the sum is a parabola.
    three = [check_budget(MAX_PARAMS, c1=c1, **shape) for c1 in (1, 2, 3)]
    return max(np.roots(np.polyfit((1, 2, 3), three, 2) - (0, 0, MAX_PARAMS)))


def hyperparameters(rows: list[dict[str, object]], path: str | Path, caption: str) -> None:
    """Accuracy over each choice: every trial, and the trend with its 95% interval."""
    figure = Figure(figsize=(10, 10), layout="constrained")
    figure.suptitle(f"Validation accuracy over each choice; {caption}", fontsize=11)
    accuracy = np.array([row["early_accuracy"] for row in rows])
    rng = np.random.default_rng(0)
    shown = {name: label for name, label in CHOICES.items() if name in rows[0]}
    panels = figure.subplots(4, 4, sharey=True).flat
    for axes in panels:
        axes.set_visible(False)
    for axes, (name, label) in zip(figure.axes, shown.items(), strict=False):
        axes.set_visible(True)
        values = [row[name] for row in rows]
        levels = sorted(set(values), key=ODD.index if name == "odd" else None)
        if len(levels) > MAX_LEVELS:
            draw_trend(axes, np.array(values, dtype=float), accuracy, rng, log=name in LOGARITHMIC)
        else:
            draw_means(axes, values, levels, accuracy, rng)
        axes.set_title(label, fontsize=10)
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
    """Points and a parabola through them, with the 95% band of 1,000 bootstrap samples."""
    scale = np.log10 if log else np.asarray
    grid = np.linspace(scale(x).min(), scale(x).max(), 50)
    curves = []
    for _ in range(1000):
        drawn = rng.integers(0, len(x), len(x))
        if len(set(x[drawn])) > 2:  # a parabola takes three
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
    """Points beside each other per level, and its mean with the 95% interval by Student's t."""
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
    axes.set_xticks(range(len(levels)), [str(level).replace("_", "\n") for level in levels])
    axes.set_xlim(-0.5, len(levels) - 0.4)


def accuracy_and_cost(rows: list[dict[str, object]], path: str | Path, caption: str) -> None:
    """Accuracy over parameters and over MACs, with what no other trial beats in both."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    figure.suptitle(f"Validation accuracy and cost; {caption}", fontsize=11)
    names = {"num_params": "parameters, millions", "macs": "MACs per image, millions"}
    for axes, (name, label) in zip(figure.subplots(1, 2, sharey=True), names.items(), strict=True):
        cost = np.array([row[name] for row in rows]) / 1e6
        accuracy = np.array([row["early_accuracy"] for row in rows])
        front = pareto_front(cost, accuracy)
        axes.plot(cost, accuracy, "o", color=BLUE, markersize=4, alpha=0.6, label="trial")
        axes.step(
            cost[front], accuracy[front], "o-", where="post", color=ORANGE, markersize=5,
            label="Pareto front",
        )  # fmt: skip
        axes.set_xscale("log")
        axes.set(xlabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="validation accuracy, %")
    figure.axes[0].legend(frameon=False)
    save(figure, path)


def pareto_front(cost: np.ndarray, accuracy: np.ndarray) -> list[int]:
    """Indices of those that are more accurate than all that cost as much or less, by cost."""
    front, best = [], -np.inf
    for i in np.lexsort((-accuracy, cost)):
        if accuracy[i] > best:
            front.append(int(i))
            best = accuracy[i]
    return front


def importance(rows: list[dict[str, object]], path: str | Path, caption: str) -> None:
    """How much worse a random forest predicts the accuracy when one choice is shuffled."""
    names = [name for name in CHOICES if name in rows[0] and len({r[name] for r in rows}) > 1]
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
    """Error added by shuffling each choice, (folds, choices), and the R² of all folds together.

    Measured on the fifth of the trials that a forest has not seen (Breiman, "Random Forests",
    2001), in five-fold cross-validation of two seeds. 1 is the variance of all accuracies.
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


def architecture(model: nn.Module, path: str | Path, title: str) -> None:
    """The network as feature maps drawn to scale, from a real `ResNet`, and its two kinds of block.

    A map's height follows the square root of its side, its width that of its channels.
    """
    shapes = output_shapes(model)
    arguments = model.architecture
    depths = arguments["num_blocks"]
    kernels = [stage[0].conv1.kernel_size[0] for stage in model.stages]
    maps = [("image", "", shapes["image"])]
    maps.append(("stem", f"3x3 conv\n{parameters(model.conv1, model.bn1)}", shapes["relu"]))
    for i, stage in enumerate(model.stages):
        text = f"{depths[i]} blocks, {kernels[i]}x{kernels[i]}\n{parameters(stage)}"
        maps.append((f"stage {i + 1}", text, shapes[f"stages.{i}"]))
    window = arguments["pool_kernel"]
    maps.append(("pool", f"{window}x{window} average\n", shapes["pool"]))
    maps.append(("linear", f"logits\n{parameters(model.linear)}", shapes["linear"]))

    figure = Figure(figsize=(10, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 100), ylim=(-1, 51), aspect="equal")
    axes.axis("off")
    axes.text(1, 49.5, title, fontsize=13, weight="bold", va="center")
    pitch = 100 / len(maps)
    right = 0.0  # edge of the map before
    for i, (name, text, shape) in enumerate(maps):
        channels, side = shape[0], shape[1] if len(shape) > 1 else 1
        center = pitch * (i + 0.5)
        width, height = 0.75 * channels**0.5, 2.5 * side**0.5
        if i:
            draw_arrow(axes, (right + 0.4, 35), (center - width / 2 - 0.4, 35))
        right = draw_map(axes, center, 35, width, height, BLUE if "stage" in name else GREY)
        size = "x".join(str(n) for n in shape)
        axes.text(center, 25, name, ha="center", va="top", weight="bold", fontsize=10)
        axes.text(
            center, 22.8, f"{size}\n{text}", ha="center", va="top", fontsize=8.5, linespacing=1.35
        )

    branch = [
        f"{kernels[0]}x{kernels[0]} conv",
        "BN",
        "ReLU",
        f"{kernels[0]}x{kernels[0]} conv",
        "BN",
    ]
    if arguments["dropout"]:
        branch.insert(3, f"dropout {arguments['dropout']:g}")
    draw_block(axes, 1, "block", branch, "identity")
    projections = [s[0].shortcut for s in model.stages if isinstance(s[0].shortcut, nn.Sequential)]
    if projections:
        skip = projections[0][0].kernel_size[0]
        draw_block(axes, 51, "first block of a stage", branch, f"{skip}x{skip} conv, BN")
    save(figure, path)


def output_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every module's output for one image, without the batch dimension.

    A module that is used more than once (the stem's ReLU is not) shows its last use.
    """
    shapes = {"image": (3, 32, 32)}
    handles = [
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: shapes.__setitem__(name, output.shape[1:])
        )
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        parameter = next(model.parameters())
        model.eval()(torch.zeros(1, *shapes["image"], device=parameter.device))
    for handle in handles:
        handle.remove()
    return {name: tuple(shape) for name, shape in shapes.items()}


def parameters(*modules: nn.Module) -> str:
    """The modules' parameter count, in words."""
    count = sum(p.numel() for module in modules for p in module.parameters())
    return f"{count:,} param."


def draw_map(axes: Axes, x: float, y: float, width: float, height: float, color: str) -> float:
    """A feature map as a box centered on (x, y); returns its right edge at that height."""
    skew = np.array([0.28, 0.2]) * height
    left, low = x - width / 2, y - height / 2
    corners = np.array(
        [[left, low], [left + width, low], [left + width, low + height], [left, low + height]]
    )
    top = [corners[3], corners[2], corners[2] + skew, corners[3] + skew]
    side = [corners[1], corners[2], corners[2] + skew, corners[1] + skew]
    for face, shade in ((corners, 0.85), (top, 0.45), (side, 0.65)):
        axes.add_patch(
            Polygon(face, facecolor=color, alpha=shade, edgecolor="white", linewidth=0.8)
        )
    return left + width + skew[0]


def draw_arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = "black"
) -> None:
    """A thin arrow."""
    arrow = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=8, color=color, linewidth=1,
        shrinkA=0, shrinkB=0,
    )  # fmt: skip
    axes.add_patch(arrow)


def draw_block(axes: Axes, x: float, name: str, branch: list[str], shortcut: str) -> None:
    """A residual block from left to right, 47 units wide: its branch below, its shortcut above."""
    axes.text(x, 12, name, fontsize=10, weight="bold", va="center")
    y, skip_y, left = 1, 7, x + 3
    gap = (36 - sum(map(box_width, branch))) / len(branch)
    draw_arrow(axes, (x, y), (left, y))
    for part in branch:
        right = draw_box(axes, left, y, part, BLUE)
        left = right + gap
        draw_arrow(axes, (right, y), (left, y))
    plus = left + 0.9
    axes.text(plus, y, "+", ha="center", va="center", fontsize=11)
    draw_arrow(axes, (plus + 0.9, y), (plus + 2.5, y))
    draw_box(axes, plus + 2.5, y, "ReLU", BLUE)
    # The shortcut leaves before the branch and comes back at the sum.
    axes.plot([x + 1.2, x + 1.2, plus], [y, skip_y, skip_y], color=ORANGE, linewidth=1.2)
    draw_arrow(axes, (plus, skip_y), (plus, y + 1.2), ORANGE)
    draw_box(axes, (x + plus - box_width(shortcut)) / 2, skip_y, shortcut, ORANGE)


def box_width(text: str) -> float:
    """Width of a box around `text`."""
    return 0.95 * len(text) + 1.3


def draw_box(axes: Axes, x: float, y: float, text: str, color: str) -> float:
    """A rounded, labelled box from x on, centered on height y; returns its right edge."""
    box = FancyBboxPatch(
        (x, y - 1.5), box_width(text), 3, boxstyle="round,pad=0,rounding_size=0.8",
        facecolor="white", edgecolor=color, linewidth=1.2, zorder=3,
    )  # fmt: skip
    axes.add_patch(box)
    center = x + box_width(text) / 2
    axes.text(center, y, text, ha="center", va="center", fontsize=8.5, zorder=4)
    return x + box_width(text)


def main(_args: list[str]) -> None:
    """Draw the figures that the README shows."""
    from model import ResNet  # here: as a library, this file imports no model

    architecture(ResNet(), "images/architecture.png", "TPSNet: [13, 13, 13] blocks, C1 = 16")
    logs = [read_csv(f"docs/{name}-validation.csv") for name in ("fast", "tpsnet")]
    accuracy_over_time(*logs, epochs=300, published=94.84, path="images/fast.png")
    options = json.loads(Path("docs/search/search.json").read_text(encoding="utf-8"))
    caption = "{num_samples} trials, {epochs} epochs of {train_size:,} images".format_map(options)
    effects(read_numbers("docs/search/trials.csv"), "images", caption)


if __name__ == "__main__":
    run_script(main)
