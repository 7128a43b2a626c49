"""Test a saved network on the test set of its data set, or compare two networks or recipes.

    python test.py                                   # the newest run, else a released network
    python test.py checkpoints/try/model.safetensors --tta --json result.json
    python test.py checkpoints/try-0 --compare checkpoints/try-1  # is one of them better?
    python test.py A --compare B      # is one recipe better? A-0, A-1, ... against B-0, B-1, ...

The checkpoint holds all that is needed: no constant of config.py is used.
"""

if __name__ == "__main__":  # above the imports: a missing library or an old Python is one line
    from engine.script import run_script

    run_script("test")

import glob
import statistics
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from config import Recipe
from data import Dataset, Normalize, check_data, load_data_of
from engine import plots
from engine.checkpoint import find_checkpoint, load_model
from engine.distributed import init_processes
from engine.evaluate import (
    Score,
    calibrate,
    classify,
    difference_interval,
    mean_interval,
    score,
    summary,
)
from engine.script import plain_arguments
from model import Architecture, model_cost
from utils import (
    CHECKPOINTS,
    InputError,
    check_output,
    first_line,
    printable,
    quoted,
    read_csv,
    warn,
    write_json,
)

NUM_MISTAKES = 24  # in the figure of the mistakes
MAX_ROWS = 20  # of the table of classes


def test(
    checkpoint: Path = CHECKPOINTS,
    /,
    tta: bool = False,
    compare: str = "",
    json: str = "",
    data_dir: str = "",
    download: bool = True,
) -> dict[str, object]:
    """Accuracy, loss, calibration, confusion matrix and cost of a saved network.

    Args:
        checkpoint: A file, a network's name, or a folder: its newest run, else a released network.
        tta: Also test with test-time augmentation: average the logits with the flipped view's.
        compare: Another checkpoint, or NAME of NAME-0, NAME-1, ...: do they differ beyond chance?
        json: Also write the result to this file.
        data_dir: Folder of the data; by default `data`, or where your own pictures were.
        download: Download CIFAR if it is not in data_dir.

    Returns:
        The content of the JSON file.

    Raises:
        InputError: the checkpoint or the data is missing, damaged or of another project.
    """
    check_output("json", json)
    names = [Path(checkpoint), Path(compare)]
    if compare and (groups := find_groups(names)):
        if tta:
            raise InputError("tta: groups are compared by their runs' accuracies; leave it out")
        return compare_groups(names, groups, json)
    path = find_checkpoint(checkpoint)
    other_path = find_checkpoint(Path(compare)) if compare else None
    model, info = load_model(path)
    other, other_info = load_model(other_path) if compare else (None, None)
    data = load_data_of(path, info, data_dir, download)
    if compare:
        check_data(other_path, other_info, data)

    data = data.to(init_processes())
    cost = model_cost(model.architecture)
    print(
        f"{shown(path)}: {printable(info.get('preset'))} network, {cost.num_params:,} parameters,"
        f" {cost.macs / 1e6:,.1f} M MACs, {printable(info.get('epochs'))} epochs of"
        f" {'your pictures' if data.name == 'folder' else data.name}"
    )
    labels = data.test.labels
    logits = logits_of(model, info, data)
    plain = score(logits, labels)
    print(f"test accuracy: {plain}")
    flipped = None
    if tta:
        flipped = score(logits_of(model, info, data, flip_tta=True), labels)
        print(f"with the flipped view (TTA): {flipped}")
    bins = calibrate(logits, labels)
    print(f"expected calibration error: {bins}")
    calibrated = None
    if temperature := info.get("temperature"):
        calibrated = calibrate(logits / temperature, labels)
        print(f"with its temperature, {temperature:.3f}: {calibrated}")
    counts = confusion_matrix(logits, labels)
    print_per_class(counts, data.class_names)

    comparison = None
    if compare:
        other_logits = logits_of(other, other_info, data)
        comparison = mcnemar(logits, other_logits, labels)
        print(f"{shown(other_path)}: {score(other_logits, labels)}")
        print(
            f"right with the first alone {comparison['only_first']:,}, with the second alone"
            f" {comparison['only_second']:,}\nMcNemar's exact test: p = {comparison['p']:.2g}\n"
        )

    result = {
        "checkpoint": path.as_posix(),
        **as_json(plain),
        "tta": flipped and as_json(flipped),
        "mean_confidence": bins.mean_confidence,  # percent
        "calibration_error": bins.error,  # points
        "temperature": temperature,  # None if none was fitted
        "calibrated_mean_confidence": calibrated and calibrated.mean_confidence,
        "calibrated_error": calibrated and calibrated.error,
        "compared_with": comparison and {"checkpoint": other_path.as_posix(), **comparison},
        **asdict(cost),
        "dataset": data.name,
        "data_fingerprint": data.fingerprint,
        "unofficial_data_files": data.unofficial,
        "class_names": data.class_names,
        "confusion": counts.tolist(),  # [true class][predicted class]
    }
    if json:
        write_json(Path(json), result)

    title = f"{path.as_posix()}: {plain.accuracy:.2f}%"
    figures = {
        "confusion": partial(plots.confusion_matrix, counts, data.class_names),
        "calibration": partial(plots.calibration, bins),
        "mistakes": partial(plots.mistakes, *worst_mistakes(logits, data)),
    }
    for name, plot in figures.items():
        figure = path.with_name(f"{path.stem}_{name}.png")
        try:
            plot(figure, title)
            print(f"figure: {shown(figure)}")
        except InputError as error:  # the numbers are printed, and need no figure
            warn(f"no figure: {error}")
    return result


def shown(path: Path) -> str:
    """A path as it is printed."""
    return printable(path.as_posix())


def logits_of(
    model: nn.Module, info: dict[str, object], data: Dataset, flip_tta: bool = False
) -> Tensor:
    """Logits of the test images, (N, C), normalized by the mean and std in the metadata."""
    images = data.test.images
    normalize = Normalize(info["mean"], info["std"]).to(images.device)
    return classify(model.to(images.device), images, normalize, flip_tta)


def as_json(found: Score) -> dict[str, object]:
    """A score as JSON values; accuracy and its 95% interval in percent."""
    return {"accuracy": found.accuracy, "interval": found.interval} | asdict(found)


def mcnemar(first: Tensor, second: Tensor, labels: Tensor) -> dict[str, float]:
    """McNemar's exact test (1947): do two networks' accuracies differ by more than chance?

    Only the images that one of the two alone gets right are counted. If both networks are equally
    good, each of these images is as likely to be the first's as the second's. The test compares
    two networks; to compare their recipes takes several seeds of each.

    Args:
        first, second: logits of the same images, (N, C).

    Returns:
        only_first, only_second: number of images that only this one gets right. p: two-sided.
    """
    from scipy.stats import binomtest

    right, other_right = first.argmax(1) == labels, second.argmax(1) == labels
    only_first = (right & ~other_right).sum().item()
    only_second = (other_right & ~right).sum().item()
    either = only_first + only_second
    p = binomtest(only_first, either).pvalue if either else 1.0
    return {"only_first": only_first, "only_second": only_second, "p": float(p)}


def worst_mistakes(logits: Tensor, data: Dataset) -> tuple[np.ndarray, list[str]]:
    """The most confident wrong predictions: images, (M, 32, 32, 3) uint8, and captions."""
    confidence, predicted = logits.softmax(1).max(1)
    wrong = (predicted != data.test.labels).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:NUM_MISTAKES]
    names = data.class_names
    captions = [
        f"{names[data.test.labels[i]]},\ntaken for {names[predicted[i]]}"
        f" ({100 * confidence[i]:.0f}%)"
        for i in worst.tolist()
    ]
    return data.test.images[worst].permute(0, 2, 3, 1).cpu().numpy(), captions


def confusion_matrix(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Counts of (true class, predicted class), (C, C)."""
    num_classes = logits.shape[1]
    pairs = (num_classes * labels + logits.argmax(1)).cpu()
    return pairs.bincount(minlength=num_classes**2).view(num_classes, -1).numpy()


def print_per_class(counts: np.ndarray, class_names: tuple[str, ...]) -> None:
    """Print each class's accuracy, and the class that it is most often taken for.

    Of many classes, those of the lowest accuracies are printed.
    """
    totals, right = counts.sum(axis=1), counts.diagonal()
    classes = range(len(class_names))
    if len(classes) > MAX_ROWS:
        classes = np.argsort(right / totals.clip(min=1), kind="stable")[:MAX_ROWS]
        print(f"\nthe {MAX_ROWS} of {len(class_names):,} classes with the lowest accuracies:")
    width = max(len(class_names[i]) for i in classes)
    print(f"\n{'class':{width}}  correct     of  accuracy  most often taken for")
    for i in classes:
        wrong = counts[i].copy()
        wrong[i] = 0
        confused = f"{class_names[wrong.argmax()]} ({wrong.max()})" if wrong.any() else "-"
        accuracy = f"{100 * right[i] / max(totals[i], 1):.2f}%"
        line = (
            f"{class_names[i]:{width}}  {right[i]:7,d}  {totals[i]:5,d}  {accuracy:>8}  {confused}"
        )
        print(printable(line))
    print()


# ---------------------------------------------------------------- groups of runs


def find_groups(names: list[Path]) -> list[list[Path]] | None:
    """The runs that two names stand for, if both stand for several; None for two networks.

    Raises:
        InputError: only one of them stands for several runs, and for no network.
    """
    groups = [runs_of(name) for name in names]
    if all(groups):
        return groups
    for name, runs, other in zip(names, groups, reversed(names), strict=True):
        if runs and not find_checkpoint(name).exists():
            raise InputError(
                f"compare: {name.as_posix()} stands for {len(runs)} runs, but there are no two runs"
                f" {other.as_posix()}-0, {other.as_posix()}-1, ...; train them with --seeds, or"
                " name two networks"
            )
    return None


def runs_of(name: Path) -> list[Path]:
    """The runs NAME-0, NAME-1, ... of `train.py --seeds`, by seed, if there are two or more."""
    for path in (name, CHECKPOINTS / name):
        runs = {}
        for run in path.parent.glob(f"{glob.escape(path.name)}-*"):
            seed = run.name.removeprefix(f"{path.name}-")
            is_run = (run / "model.safetensors").exists() or (run / "last.pt").exists()
            if seed.isdecimal() and is_run:
                runs[int(seed)] = run
        if len(runs) > 1:
            return [runs[seed] for seed in sorted(runs)]
    return []


def compare_groups(names: list[Path], groups: list[list[Path]], json: str) -> dict[str, object]:
    """Compare the mean accuracies of two groups of runs, which differ in their seeds.

    The accuracies are those in the model files: of the validation images if all runs have some,
    else of the test images. No image is read.

    Returns:
        The content of the JSON file.

    Raises:
        InputError: a run is not finished, those of a group differ in more than their seeds, or the
            groups have other data sets or classes.
    """
    infos = [load_group(runs) for runs in groups]
    first, second = ((info[0]["dataset"], info[0]["class_names"]) for info in infos)
    if first != second:
        raise InputError(
            f"compare: {names[1].as_posix()} has other classes than {names[0].as_posix()}; name"
            " runs on the same data"
        )
    everyone = infos[0] + infos[1]
    if len({(info["data_fingerprint"], info["config"]["val_size"]) for info in everyone}) > 1:
        warn("the two groups were not trained and validated on the same images")
    split = "test" if any(info["accuracy"]["val"] is None for info in everyone) else "val"
    if any(info["accuracy"][split] is None for info in everyone):
        raise InputError(
            f"compare: {names[0].as_posix()} and {names[1].as_posix()} have no accuracy in common:"
            " one of the validation images, the other of the test images; name other runs"
        )
    kind = {"val": "validation accuracy", "test": "test accuracy"}[split]
    accuracies = [[info["accuracy"][split] for info in group] for group in infos]
    for name, found in zip(names, accuracies, strict=True):
        print(f"{shown(name)}, {len(found)} seeds: {kind} {summary(found)}")
    difference = statistics.mean(accuracies[0]) - statistics.mean(accuracies[1])
    interval = difference_interval(*accuracies)
    told = "no interval, since the runs of each group are equal"
    if interval:
        told = "95% interval {:+.2f} to {:+.2f} (Welch's t)".format(*interval)
    print(f"{shown(names[0])} - {shown(names[1])}: {difference:+.2f} points; {told}")

    result = {
        "accuracy": kind,
        "groups": [
            {
                "name": name.as_posix(),
                "runs": [run.as_posix() for run in runs],
                "accuracies": found,  # percent
                "mean": statistics.mean(found),
                "std": statistics.stdev(found),
                "interval": mean_interval(found),
            }
            for name, runs, found in zip(names, groups, accuracies, strict=True)
        ],
        "difference": difference,  # points, the first group's mean less the second's
        "interval": interval,
    }
    if json:
        write_json(Path(json), result)

    figure = groups[0][0].with_name(f"{names[0].name}_vs_{names[1].name}.png")
    try:
        logs = [[read_csv(run / "log.csv") for run in runs] for runs in groups]
        drawn = dict(zip(map(shown, names), logs, strict=True))
        plots.compared_curves(drawn, {"val": "val", "test": "train"}[split], figure)
        print(f"figure: {shown(figure)}")
    # The numbers are printed, and need no figure.
    except (InputError, OSError, KeyError, TypeError, ValueError) as error:
        warn(f"no figure: {first_line(error)}")
    return result


def load_group(runs: list[Path]) -> list[dict[str, object]]:
    """The metadata of finished runs that differ in their seed, and in nothing else.

    Raises:
        InputError: one is not finished or cannot be read, two have the same seed, or they differ in
            another constant.
    """
    infos = []
    for run in runs:
        info = load_model(find_checkpoint(run))[1]
        infos.append(info)
        accuracy = info.get("accuracy", {})
        unfinished = info["epochs"] < info["config"]["epochs"]
        if unfinished or accuracy.get("val") is accuracy.get("test") is None:
            raise InputError(
                f"checkpoint: the run in {run.as_posix()} is not finished; go on with it by `python"
                f" train.py --config {quoted(run / 'config.json')} --resume`, or move it away"
            )
    for constant in (*fields(Architecture), *fields(Recipe)):
        values = [info["config"].get(constant.name, constant.default) for info in infos]
        values = [tuple(value) if isinstance(value, list) else value for value in values]  # of JSON
        for run, value in zip(runs, values, strict=True):
            if constant.name != "seed" and value != values[0]:
                raise InputError(
                    f"{constant.name}: {value!r} in {run.as_posix()}, but {values[0]!r} in"
                    f" {runs[0].as_posix()}; the runs of a group differ in their seed alone: move"
                    " away those that do not belong"
                )
    seeds = [info["config"]["seed"] for info in infos]
    for run, seed in zip(runs, seeds, strict=True):
        if (twin := runs[seeds.index(seed)]) != run:
            raise InputError(
                f"seed: {seed} in {run.as_posix()} and in {twin.as_posix()}; the runs of a group"
                " need different seeds: train one again with another --seed, or move it away"
            )
    return infos


def main(args: list[str]) -> None:
    """Test the checkpoint that the command line names."""
    import tyro

    tyro.cli(test, args=plain_arguments(args, test), prog="test.py")
