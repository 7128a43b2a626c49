"""The figures of a run and of a test are drawn; what they show is seen by looking."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine import plots
from engine.evaluate import calibrate
from utils import generator


@pytest.fixture
def blank_figures():
    """Here they are rendered."""


def log(epochs, val):
    return [
        {
            "epoch": epoch,
            "train_loss": 2.0 / epoch,
            "train_accuracy": 10.0 * epoch,
            "val_loss": 3.0 / epoch if val else None,
            "val_accuracy": 9.0 * epoch if val else None,
        }
        for epoch in range(1, epochs + 1)
    ]


def bins():
    logits = torch.randn(50, 10, generator=generator(0))
    return calibrate(logits, torch.arange(50) % 10)


NO_FORMULA = r"$\frac{1$"  # although Matplotlib would take it for one, and fail
PICTURES = np.arange(8 * 32 * 32 * 3, dtype=np.uint8).reshape(8, 32, 32, 3)
COUNTS = np.array([[5, 0, 1], [2, 3, 0], [0, 0, 0]])  # no image of the last class
FIGURES = {
    "curves": lambda path: plots.learning_curves(log(5, val=True), path, NO_FORMULA),
    "curves without validation": lambda path: plots.learning_curves(log(40, False), path, "a_b"),
    "one epoch": lambda path: plots.learning_curves(log(1, val=False), path, "a run"),
    "two groups": lambda path: plots.compared_curves(
        {NO_FORMULA: [log(9, True), log(8, True)], "_B": [log(40, True)] * 3}, "val", path
    ),
    "confusion": lambda path: plots.confusion_matrix(
        COUNTS, ["\N{CAT}", "dog" * 99, "eel"], path, NO_FORMULA
    ),
    "confusion of many": lambda path: plots.confusion_matrix(
        np.eye(100, dtype=int) + 1, [f"{NO_FORMULA}{i}" for i in range(100)], path, "title"
    ),
    "calibration": lambda path: plots.calibration(bins(), path, NO_FORMULA),
    "mistakes": lambda path: plots.mistakes(PICTURES, [f"cat {i}" for i in range(8)], path, "all"),
    "no mistakes": lambda path: plots.mistakes(PICTURES[:0], [], path, "none"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_figure_is_a_png_file(draw, tmp_path):
    path = tmp_path / "new" / "figure.png"
    draw(path)
    assert [p.name for p in path.parent.iterdir()] == ["figure.png"]
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert np.ptp(np.asarray(image.convert("L"))) > 100  # something is drawn on the white
