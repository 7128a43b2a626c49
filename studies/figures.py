"""Draw the figures of the README and docs/ that come from files in studies/ and checkpoints/.

    python -m studies.figures    # writes images/*.png

Needs no data set and trains nothing; takes about a minute.
"""

if __name__ == "__main__":  # above the imports: a missing library or an old Python is one line
    from engine.script import run_script

    run_script("studies.figures")

from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon
from torch import nn

import utils
from engine import plots
from engine.checkpoint import RELEASED, load_model
from engine.plots import BLUE, GREY, ORANGE
from model import ResNet, model_cost, pooled_size
from search.figures import COSTS, effects
from utils import InputError

FAST_TEST = 94.56  # percent of the test images, of the run in fast-validation.csv (docs/fast.md)
TPSNET_TEST, TPSNET_EPOCHS = 94.84, 300  # as published
# In images/family.png, where a network's name would cover something on the left of its point.
LABEL_PLACES = {
    ("best", "num_params"): ((-9, 2), "right"),
    ("best", "macs"): ((-9, 2), "right"),
    ("fast", "macs"): ((9, -5), "left"),
    ("tiny", "num_params"): ((-9, -5), "right"),
    ("tiny", "macs"): ((-9, -5), "right"),
    ("small", "num_params"): ((-4, -14), "left"),
    ("small", "macs"): ((2, -14), "left"),
}


def architecture(model: ResNet, path: str | Path, title: str) -> None:
    """Draw a network's feature maps to scale, and its two kinds of block.

    A map's height is proportional to the square root of its side, its width to that of its
    channels.
    """
    shapes = output_shapes(model)
    arguments = model.architecture
    kernels = [stage[0].conv1.kernel_size[0] for stage in model.stages]
    maps = [("image", "", shapes["image"])]
    maps.append(("stem", f"3x3 conv\n{parameters(model.conv1, model.bn1)}", shapes["relu"]))
    for i, stage in enumerate(model.stages):
        text = f"{arguments.num_blocks[i]} blocks, {kernels[i]}x{kernels[i]}\n{parameters(stage)}"
        maps.append((f"stage {i + 1}", text, shapes[f"stages.{i}"]))
    window = arguments.pool_kernel
    side = pooled_size(arguments)
    pooled = (model.linear.in_features // side**2, side, side)
    maps.append(("pool", f"{window}x{window} average\n", pooled))
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

    conv = f"{kernels[0]}x{kernels[0]} conv"
    branch = [conv, "BN", "ReLU", conv, "BN"]
    if arguments.dropout:
        branch.insert(3, f"dropout {arguments.dropout:g}")
    draw_block(axes, 1, "block", branch, "identity")
    projections = [s[0].shortcut for s in model.stages if isinstance(s[0].shortcut, nn.Sequential)]
    if projections:
        skip = projections[0][0].kernel_size[0]
        draw_block(axes, 51, "first block of a stage", branch, f"{skip}x{skip} conv, BN")
    plots.save(figure, path)


def output_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every module's last output for one image, without the batch dimension, by name."""
    shapes = {"image": (3, 32, 32)}
    handles = [
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: shapes.__setitem__(name, output.shape[1:])
        )
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shapes["image"]))
    for handle in handles:
        handle.remove()
    return {name: tuple(shape) for name, shape in shapes.items()}


def parameters(*modules: nn.Module) -> str:
    """The label with the modules' parameter count."""
    count = sum(p.numel() for module in modules for p in module.parameters())
    return f"{count:,} param."


def draw_map(axes: Axes, x: float, y: float, width: float, height: float, color: str) -> float:
    """Draw a feature map as a box centered on (x, y); returns the x of its right edge."""
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
    """Draw a thin arrow."""
    arrow = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=8, color=color, linewidth=1,
        shrinkA=0, shrinkB=0,
    )  # fmt: skip
    axes.add_patch(arrow)


def draw_block(axes: Axes, x: float, name: str, branch: list[str], shortcut: str) -> None:
    """Draw a residual block, 47 units wide: its branch below, its shortcut above."""
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
    """Draw a rounded, labelled box from x, centered on height y; returns its right edge."""
    box = FancyBboxPatch(
        (x, y - 1.5), box_width(text), 3, boxstyle="round,pad=0,rounding_size=0.8",
        facecolor="white", edgecolor=color, linewidth=1.2, zorder=3,
    )  # fmt: skip
    axes.add_patch(box)
    center = x + box_width(text) / 2
    axes.text(center, y, text, ha="center", va="center", fontsize=8.5, zorder=4)
    return x + box_width(text)


def benchmark(result: dict[str, object], path: str | Path) -> None:
    """Draw the speed and memory of the contestants, from the JSON file of studies/benchmark.py."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    figure.suptitle(
        f"{result['preset']}: {result['num_params'] / 1e6:.2f}M parameters,"
        f" {result['macs'] / 1e6:,.0f} M MACs per image; medians, smallest to largest"
    )
    speed, memory, scaling = figure.subplots(1, 3, width_ratios=(1.2, 0.7, 1.2))
    names = result["contestants"]
    colors, width = (BLUE, ORANGE, GREY)[: len(names)], 0.76 / len(names)

    shown = {"step": "training\nstep", "epoch": "whole\nepoch", "evaluate": "evaluation"}
    for i, color in enumerate(colors):
        rates = np.array([result["images_per_second"][key][i] for key in shown])
        middle = np.median(rates, axis=1)
        errors = np.stack([middle - rates.min(axis=1), rates.max(axis=1) - middle])
        places = np.arange(len(shown)) + width * (i - (len(names) - 1) / 2)
        bars = speed.bar(places, middle, width - 0.02, yerr=errors, color=color, capsize=2)
        speed.bar_label(bars, fmt="%.0f", fontsize=8, padding=2)
    speed.set_xticks(range(len(shown)), shown.values())
    speed.set(title=f"images/s at batch {result['batch_size']}")
    speed.margins(y=0.15)

    bars = memory.bar(names, [m / 1e9 for m in result["memory_bytes"]], color=colors)
    memory.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    memory.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names], fontsize=9)
    memory.set(title="peak memory, GB\nabove the bare process")
    memory.margins(y=0.1)

    sizes = [int(size) for size in result["scaling"]]  # strings in JSON
    for i, (name, color) in enumerate(zip(names, colors, strict=True)):
        rates = np.array([each[i] for each in result["scaling"].values()])
        scaling.fill_between(sizes, rates.min(axis=1), rates.max(axis=1), color=color, alpha=0.2)
        scaling.plot(sizes, np.median(rates, axis=1), "o-", color=color, markersize=4, label=name)
    scaling.set_xscale("log", base=2)
    scaling.set_xticks(sizes, sizes)
    scaling.minorticks_off()
    scaling.set_ylim(bottom=0)
    scaling.set(title="training step, images/s", xlabel="batch size")
    scaling.legend(frameon=False)
    for axes in (speed, memory, scaling):
        axes.spines[["top", "right"]].set_visible(False)
    plots.save(figure, path)


def accuracy_over_time(
    fast: list[dict[str, float | None]],
    tpsnet: list[dict[str, float | None]],
    tested: dict[str, tuple[float, float, str]],
    path: str | Path,
) -> None:
    """Draw accuracy over training time: `fast` and the first epochs of the paper's recipe.

    The validation accuracies of the two runs are in one panel. Test accuracies, of whole trainings,
    are in another one.

    Args:
        fast: log of a whole run.
        tpsnet: log of the first epochs of the paper's recipe, on the same machine.
        tested: hours of a training on that machine, test accuracy and a note, by preset.
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    validation, test = figure.subplots(1, 2, width_ratios=(1.5, 1))
    for rows, color, label in (
        (fast, BLUE, f"fast: {len(fast)} epochs"),
        (tpsnet, ORANGE, f"tpsnet: the first {len(tpsnet)} of {TPSNET_EPOCHS} epochs"),
    ):
        hours = np.cumsum([row["seconds"] for row in rows]) / 3600
        accuracy = [row["val_accuracy"] for row in rows]
        validation.plot(hours, accuracy, "o-", color=color, markersize=3, label=label)
        validation.annotate(
            f"{accuracy[-1]:.2f}%\n{60 * hours[-1]:.0f} min", (hours[-1], accuracy[-1]),
            xytext=(6, -4), textcoords="offset points", va="top", fontsize=9,
        )  # fmt: skip
    validation.set(title="while training", ylabel="validation accuracy, %")
    validation.legend(frameon=False, loc="lower right")
    for name, (hours, accuracy, note) in tested.items():
        color = ORANGE if name == "tpsnet" else BLUE
        test.plot(hours, accuracy, "s", color=color)
        test.annotate(
            f"{name} {accuracy:.2f}%\n{note}", (hours, accuracy), xytext=(-7, 0),
            textcoords="offset points", ha="right", va="center", fontsize=9,
        )  # fmt: skip
    test.set(title="after the whole training", ylabel="test accuracy, %", ylim=(94, 95.4))
    ticks = {1 / 60: "1 min", 1 / 6: "10 min", 1: "1 h", 10: "10 h", 100: "100 h"}
    for axes, least in ((validation, 0.013), (test, 0.1)):
        axes.set_xscale("log")
        axes.set_xlim(left=least)
        shown = {tick: text for tick, text in ticks.items() if tick >= least}
        axes.set_xticks(list(shown), shown.values())
        axes.minorticks_off()
        axes.set(xlabel="training time on two CPU cores")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    validation.set_xlim(right=4)
    test.set_xlim(right=100)
    plots.save(figure, path)


def beside_the_paper(
    ours: list[dict[str, float | None]], paper: list[dict[str, float]], path: str | Path
) -> None:
    """Draw the loss and accuracy on the training images, as logged while TPSNet is trained.

    Args:
        ours: log.csv of the first epochs of a run.
        paper: the authors' own log, a row per epoch.
    """
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = {"loss": ("train_loss", "train_loss"), "accuracy, %": ("train_acc", "train_accuracy")}
    for axes, (label, (theirs, name)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for rows, column, style, legend in (
            (paper, theirs, {"color": GREY}, f"the authors' log: {len(paper)} epochs"),
            (ours, name, {"color": BLUE, "marker": "o"}, f"ours: {len(ours)} epochs"),
        ):
            epochs = range(1, len(rows) + 1)
            axes.plot(epochs, [row[column] for row in rows], markersize=3, label=legend, **style)
        axes.set_xscale("log")
        ticks = [1, 3, 10, 30, 100, 300]
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.set(xlabel="epoch", ylabel=f"training {label}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False, fontsize=9)
    plots.save(figure, path)


def family(ours: list[dict], others: list[dict], path: str | Path) -> None:
    """Draw test accuracy over parameters and MACs: our released networks beside published ones.

    A line joins networks of the same shape and of different widths.

    Args:
        ours: a row per network, with its name as `network`, its `shape`, `num_params`, `macs` and
            `accuracy`.
        others: the same, and the `family` that each belongs to.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    names = list(dict.fromkeys(row["family"] for row in others))
    styles = {name: (GREY, marker, "--") for name, marker in zip(names, "Dsv^P*", strict=True)}
    styles[names[0]] = (ORANGE, "D", "")
    for axes, (cost, label) in zip(figure.subplots(1, 2, sharey=True), COSTS.items(), strict=True):
        for name, (color, marker, line) in styles.items():
            rows = [row for row in others if row["family"] == name]
            axes.plot(
                [row[cost] / 1e6 for row in rows], [row["accuracy"] for row in rows],
                color=color, marker=marker, linestyle=line, linewidth=0.8, markersize=5, label=name,
            )  # fmt: skip
        label_of_ours = "this repository"
        for shape in dict.fromkeys(row["shape"] for row in ours):
            rows = sorted((row for row in ours if row["shape"] == shape), key=itemgetter(cost))
            x, y = [row[cost] / 1e6 for row in rows], [row["accuracy"] for row in rows]
            axes.plot(x, y, "o-", color=BLUE, label=label_of_ours)
            label_of_ours = None  # once is enough
        for row in ours:
            where, side = LABEL_PLACES.get((row["network"], cost), ((-9, 2), "right"))
            place = row[cost] / 1e6, row["accuracy"]
            axes.annotate(
                f"{row['network']} {row['accuracy']:.2f}", place, where, color=BLUE,
                textcoords="offset points", ha=side, fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )  # fmt: skip
        axes.set_xscale("log")
        axes.margins(x=0.12, y=0.12)  # the names need it
        low, high = axes.get_xlim()
        ticks = [tick for tick in (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000) if low < tick < high]
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.set(xlabel=label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="test accuracy on CIFAR-10, %")
    figure.axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    plots.save(figure, path)


def released() -> list[dict]:
    """A row per released network for `family`, from the metadata of its model file."""
    rows = []
    for path in sorted(RELEASED.glob("*.safetensors")):
        model, info = load_model(path)
        cost = model_cost(model.architecture)
        shape = model.architecture.num_blocks, model.architecture.downsample
        figures = {"num_params": cost.num_params, "macs": cost.macs, "shape": shape}
        rows.append({"network": path.stem, "accuracy": info["accuracy"]["test"], **figures})
    return rows


def draw_all() -> None:
    """Read all files, then draw the figures."""
    images, studies = Path("images"), Path("studies")
    result = utils.read_json(studies / "benchmark.json")
    if not result["scaling"]:
        raise InputError("benchmark: studies/benchmark.json is of --quick; measure without it")
    fast, tpsnet = (
        utils.read_csv(studies / f"fast/{n}-validation.csv") for n in ("fast", "tpsnet")
    )
    log, paper = (utils.read_csv(studies / f"tpsnet/{name}.csv") for name in ("log", "paper"))
    networks, others = released(), utils.read_csv(studies / "family.csv")
    rows = utils.read_csv(studies / "choices/trials.csv")
    options = utils.read_json(studies / "choices/search.json")

    architecture(ResNet(), images / "architecture.png", "TPSNet: [13, 13, 13] blocks, C1 = 16")
    benchmark(result, images / "benchmark.png")
    hours = [sum(row["seconds"] for row in run) / 3600 for run in (fast, tpsnet)]
    hours[1] *= TPSNET_EPOCHS / len(tpsnet)
    tested = {
        "fast": (hours[0], FAST_TEST, f"this run, {60 * hours[0]:.0f} min"),
        "tpsnet": (hours[1], TPSNET_TEST, f"as published,\n{hours[1]:.0f} h as projected"),
    }
    accuracy_over_time(fast, tpsnet, tested, images / "fast.png")
    beside_the_paper(log, paper, images / "tpsnet.png")
    family(networks, others, images / "family.png")
    ended = sum(row["early_accuracy"] is not None for row in rows)
    caption = (
        f"{ended} trials, {options['epochs']} epochs of {50_000 - options['val_size']:,} images"
    )
    effects(rows, images, caption, options["max_params"])


def main(args: list[str]) -> None:
    """Parse the command line, which has no option but -h, and draw the figures."""
    import tyro

    tyro.cli(draw_all, args=args, prog="python -m studies.figures", description=__doc__)
