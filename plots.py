"""Every figure: learning curves, confusion matrix, architecture.

    python plots.py    # redraws images/architecture.png from TPSNet

Figures are made without pyplot, so no window system, global state or backend is touched.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon
from matplotlib.ticker import MaxNLocator
from torch import nn

from utils import atomic_path

# Okabe & Ito's palette, told apart by colour-blind readers too (jfly.uni-koeln.de/color).
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"


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
