"""Figures of runs and of a test: learning curves, confusion matrix, calibration, mistakes.

They are drawn without pyplot, which would touch window systems and global state.
"""

import warnings
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from engine.evaluate import Calibration, Score
from utils import atomic_path

MAX_NAME = 24  # characters of a class name at the confusion matrix
Log = list[dict[str, float | None]]  # the rows of a log.csv

# Okabe & Ito's palette, for color-blind readers too (jfly.uni-koeln.de/color).
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as a PNG file at 150 dpi, whole or not at all."""
    with atomic_path(path) as temporary, warnings.catch_warnings(action="ignore"):
        figure.savefig(temporary, dpi=150, format="png")  # warns of signs that the font lacks


def learning_curves(log: Log, path: str | Path, title: str) -> None:
    """Training and validation loss and accuracy over the epochs of a run."""
    lines = [(log, "train", BLUE, "training (augmented)"), (log, "val", ORANGE, "validation")]
    draw_curves(lines, path, title)


def compared_curves(groups: dict[str, list[Log]], split: str, path: str | Path) -> None:
    """Loss and accuracy over the epochs of two groups of runs: a line per run.

    Args:
        groups: the logs of each group, by its name.
        split: `train` or `val`, the images whose loss and accuracy are drawn.
    """
    lines = [
        (log, split, color, f"{len(logs)} runs of {name}" if i == 0 else None)
        for (name, logs), color in zip(groups.items(), (BLUE, ORANGE), strict=False)
        for i, log in enumerate(logs)
    ]
    images = {"train": "training images (augmented)", "val": "validation images"}[split]
    draw_curves(lines, path, f"{' and '.join(groups)}: {images}")


def draw_curves(
    lines: list[tuple[Log, str, str, str | None]], path: str | Path, title: str
) -> None:
    """Loss and accuracy over the epochs; for each line its log, split, color and label, if any."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title, parse_math=False)  # a $ in a path is no formula
    for axes, name, label in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), ("cross entropy", "accuracy, %"), strict=True
    ):
        for log, split, color, text in lines:
            values = [row[f"{split}_{name}"] for row in log]
            if None not in values:
                epochs = [row["epoch"] for row in log]
                marker = "o" if len(log) < 30 else None
                axes.plot(epochs, values, color=color, marker=marker, markersize=3, label=text)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        for entry in axes.legend(frameon=False).get_texts():
            entry.set_parse_math(False)
    save(figure, path)


def confusion_matrix(
    counts: np.ndarray, class_names: list[str], path: str | Path, title: str
) -> None:
    """Counts of (true class, predicted class), (C, C), shaded by fraction of the true class."""
    fractions = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    number = len(class_names)
    many = number > 20  # then the counts would not be legible
    side = min(6.2 + 0.08 * number * many, 24)  # inches
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    # The square root spreads out the few percent in which classes differ.
    axes.imshow(np.sqrt(fractions), cmap="Blues", vmin=0, vmax=1)
    cells = () if many else np.ndenumerate(counts)
    for (true, predicted), count in cells:
        if count:
            dark = np.sqrt(fractions[true, predicted]) > 0.6
            axes.text(
                predicted, true, str(count), ha="center", va="center", fontsize=9,
                color="white" if dark else "black",
            )  # fmt: skip
    ticks = range(0, number, 1 + number // 150)
    names = [class_names[i] for i in ticks]
    names = [name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 3]}..." for name in names]
    style = {"fontsize": 5 if many else None, "parse_math": False}
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    if many:
        turned = {"rotation": 90}
    axes.set_xticks(ticks, names, **turned, **style)
    axes.set_yticks(ticks, names, **style)
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
    height = 1.93 * max(1, -(-len(images) // 6)) + 0.4  # inches
    figure = Figure(figsize=(10, height))
    figure.suptitle(f"{title}; its most confident mistakes", y=1 - 0.08 / height, parse_math=False)
    # One for all images, in inches from the top left: axes of their own would take a second more.
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 10), ylim=(height, 0))
    axes.axis("off")
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = 0.06 + 1.666 * (i % 6), 0.7 + 1.93 * (i // 6)
        axes.imshow(image, extent=(left, left + 1.55, top + 1.55, top), aspect="auto")
        size = 8 * min(1, 26 / max(map(len, caption.splitlines())))  # so that it fits
        axes.text(left + 0.775, top - 0.07, caption, ha="center", fontsize=size, parse_math=False)
    save(figure, path)
