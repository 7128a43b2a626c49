import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import plots
import utils
from config import PRESETS
from metrics import Calibration, Score
from model import MAX_PARAMS, Architecture, ResNet, model_cost
from studies import figures as readme
from utils import InputError


@pytest.fixture
def blank_figures():
    """Here they are rendered."""


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    saved = []
    monkeypatch.setattr(plots, "save", lambda figure, path: saved.append(figure))
    return saved


def log(epochs, val):
    return [
        {
            "epoch": i + 1,
            "train_loss": 2.0 / (i + 1),
            "train_accuracy": 10.0 * i,
            "val_loss": 3.0 / (i + 1) if val else None,
            "val_accuracy": 9.0 * i if val else None,
        }
        for i in range(epochs)
    ]


@pytest.mark.parametrize("val", [False, True])
def test_learning_curves_show_the_log(figures, val):
    rows = log(5, val)
    plots.learning_curves(rows, "curves.png", "a run")
    for axes, name in zip(figures[0].axes, ("loss", "accuracy"), strict=True):
        splits = ["train", "val"] if val else ["train"]
        assert len(axes.lines) == len(splits)
        for line, split in zip(axes.lines, splits, strict=True):
            assert list(line.get_xdata()) == [1, 2, 3, 4, 5]
            assert list(line.get_ydata()) == [row[f"{split}_{name}"] for row in rows]
        assert [text.get_text().split()[0] for text in axes.get_legend().get_texts()] == [
            {"train": "training", "val": "validation"}[split] for split in splits
        ]


def test_accuracy_over_time_adds_up_the_epochs_and_projects_the_rest(figures):
    fast = [{"seconds": 60.0, "val_accuracy": 70.5}, {"seconds": 120.0, "val_accuracy": 80}]
    tpsnet = [{"seconds": 600.0, "val_accuracy": 40.0}]
    options = {"epochs": 300, "published": 94.84, "best": (20.0, 96.85), "path": "fast.png"}
    readme.accuracy_over_time(fast, tpsnet, **options)
    ours, paper, projected, end, best = figures[0].axes[0].lines
    assert (list(ours.get_xdata()), list(ours.get_ydata())) == ([1, 3], [70.5, 80])
    assert (list(paper.get_xdata()), list(paper.get_ydata())) == ([10], [40])
    assert (list(projected.get_xdata()), list(projected.get_ydata())) == ([10, 3000], [40, 94.84])
    assert end.get_xdata() == [3000]
    assert (list(best.get_xdata()), list(best.get_ydata())) == ([1200], [96.85])
    texts = " ".join(text.get_text() for text in figures[0].axes[0].texts)
    for part in ("80.00%", "3 minutes", "94.84%", "50 hours", "best: 96.85%", "20 hours"):
        assert part in texts


def test_confusion_matrix_writes_every_count_in_its_cell(figures):
    counts = np.array([[5, 0, 1], [2, 3, 0], [0, 0, 0]])
    plots.confusion_matrix(counts, ["cat", "dog", "eel"], "confusion.png", "title")
    axes = figures[0].axes[0]
    cells = {text.get_position(): int(text.get_text()) for text in axes.texts}
    assert cells == {(0, 0): 5, (2, 0): 1, (0, 1): 2, (1, 1): 3}  # x is the predicted class
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "eel"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


def test_calibration_is_drawn_for_bins_that_hold_images(figures):
    count, confidence, accuracy = map(np.array, ([2, 0, 5], [30.0, 0.0, 90.0], [50.0, 0.0, 60.0]))
    plots.calibration(Calibration(count, confidence, accuracy), "calibration.png", "title")
    top, bottom = figures[0].axes
    assert [bar.get_height() for bar in top.patches] == [50, 0, 60]
    assert [bar.get_height() for bar in bottom.patches] == [2, 0, 5]
    at_mean, lower, upper, diagonal = top.lines
    assert (list(at_mean.get_xdata()), list(at_mean.get_ydata())) == ([30, 90], [50, 60])
    for i, score in enumerate((Score(0.0, 1, 2), Score(0.0, 3, 5))):
        ends = [line.get_ydata()[i] for line in (lower, upper)]
        assert ends == pytest.approx(score.interval)
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 100]


@pytest.mark.parametrize("number", [0, 1, 8])
def test_mistakes_stand_under_their_captions(figures, number):
    images = np.arange(number * 32 * 32 * 3, dtype=np.uint8).reshape(number, 32, 32, 3)
    plots.mistakes(images, [f"cat {i}" for i in range(number)], "m.png", "title")
    shown = [axes for axes in figures[0].axes if axes.images]
    assert len(shown) == number
    for i, axes in enumerate(shown):
        assert (axes.images[0].get_array() == images[i]).all()
        assert axes.get_title() == f"cat {i}"


@pytest.mark.parametrize(
    "arguments",
    [{}, {"num_blocks": (2,), "width": 1, "c1": 8}, {"num_blocks": (1, 2, 1, 1), "pool_kernel": 2}],
    ids=str,
)
def test_architecture_is_drawn_from_the_model(figures, arguments):
    model = ResNet(Architecture(**arguments))
    readme.architecture(model, "architecture.png", "title")
    texts = [text.get_text() for text in figures[0].axes[0].texts]
    drawn = sum(int(n.replace(",", "")) for n in re.findall(r"([\d,]+) param", " ".join(texts)))
    assert drawn == sum(p.numel() for p in model.parameters())
    for i, stage in enumerate(model.stages):
        side = 32 // 2**i
        assert any(t.startswith(f"{stage[-1].conv2.out_channels}x{side}x{side}") for t in texts)
    assert texts.count("identity") == 1


def test_our_log_is_drawn_beside_the_paper_s(figures):
    paper = utils.read_csv(ROOT / "studies/tpsnet/paper.csv")
    ours = [{"train_loss": 1.7, "train_accuracy": 37.0}, {"train_loss": 1.2, "train_accuracy": 57}]
    readme.beside_the_paper(ours, paper, "tpsnet.png")
    loss, accuracy = ([line.get_ydata() for line in axes.lines] for axes in figures[0].axes)
    assert [len(y) for y in loss] == [len(y) for y in accuracy] == [300, 2]
    assert (loss[0][0], list(loss[1])) == (pytest.approx(1.7158, abs=1e-4), [1.7, 1.2])
    assert (accuracy[0][9], list(accuracy[1])) == (pytest.approx(84.48, abs=0.01), [37, 57])


def test_family_stands_beside_published_networks(figures):
    others = utils.read_csv(ROOT / "studies/family.csv")
    ours = [
        {"network": name, "num_params": n, "macs": 50 * n, "accuracy": accuracy}
        for name, n, accuracy in (("large", 4_000_000, 95.0), ("small", 300_000, 91.0))
    ]
    readme.family(ours, others, "family.png")
    for axes, cost in zip(figures[0].axes, ("num_params", "macs"), strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        assert list(lines["this repository"].get_xdata()) == [o[cost] / 1e6 for o in ours[::-1]]
        drawn = sum(len(line.get_xdata()) for line in axes.lines)
        assert drawn == len(others) + len(ours)
        assert [text.get_text() for text in axes.texts] == ["small 91.00", "large 95.00"]


def test_published_networks_have_our_cost_where_they_are_ours():
    rows = {
        row["network"].split(":")[0]: row for row in utils.read_csv(ROOT / "studies/family.csv")
    }
    names = {"tpsnet": "TPSNet", "model1": "Model 1", "model2": "Model 2"}
    for preset, name in names.items():
        cost = model_cost(PRESETS[preset])
        assert (rows[name]["num_params"], rows[name]["macs"]) == (cost.num_params, cost.macs)


def test_output_shapes_leave_no_hook_behind():
    model = ResNet(Architecture((1,), 2, pool_kernel=32))
    shapes = readme.output_shapes(model)
    assert shapes["stages.0"] == (4, 32, 32)
    assert not any(module._forward_hooks for module in model.modules())


def test_benchmark_shows_medians_from_the_smallest_batch_to_the_largest(figures):
    result = {
        "preset": "tpsnet",
        "num_params": 4_959_770,
        "macs": 724e6,
        "batch_size": 128,
        "contestants": ["ours", "classical script"],
        "images_per_second": {
            name: [[80, 82, 90], [34, 35, 30]] for name in ("data", "step", "epoch", "evaluate")
        },
        "memory_bytes": [1.1e9, 2.2e9],
        "scaling": {32: [[60, 61, 62], [30, 31, 32]], 128: [[70, 71, 72], [33, 34, 35]]},
    }
    readme.benchmark(json.loads(json.dumps(result)), "benchmark.png")
    speed, memory, scaling = figures[0].axes
    assert [bar.get_height() for bar in speed.patches] == [82] * 3 + [34] * 3
    assert [bar.get_height() for bar in memory.patches] == [1.1, 2.2]
    for line, medians in zip(scaling.lines, ([61, 71], [31, 34]), strict=True):
        assert (list(line.get_xdata()), list(line.get_ydata())) == ([32, 128], medians)
    assert scaling.get_legend_handles_labels()[1] == ["ours", "classical script"]


def test_quick_benchmark_is_not_drawn(monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "save", lambda *_: None)
    utils.write_json(tmp_path / "studies/benchmark.json", {"scaling": {}, "threads": {}})
    with pytest.raises(InputError, match=r"json is of --quick; measure again without it"):
        readme.main([])


def test_every_figure_of_the_readme_can_be_drawn_again(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(path.as_posix()))
    monkeypatch.chdir(ROOT)
    readme.main([])
    assert {"images/architecture.png", "images/fast.png"} < set(drawn)
    assert {f"images/{name}" for name in plots.EFFECTS} < set(drawn)
    assert ("images/benchmark.png" in drawn) == Path("studies/benchmark.json").exists()
    assert all(Path(path).exists() for path in drawn)


def test_figures_are_png_files(tmp_path):
    plots.learning_curves(log(2, True), tmp_path / "new" / "curves.png", "a run")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["curves.png"]
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")
