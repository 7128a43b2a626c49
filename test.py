"""Test a saved network on the test set of its data set.

    python test.py                                   # the newest run, else a released model
    python test.py checkpoints/try/model.safetensors --tta --json result.json
    python test.py checkpoints/try-0 --compare checkpoints/try-1  # is one of them better?

All that it needs is in the checkpoint: no constant of config.py is used.
"""

import script

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import plots
import utils
from config import CHECKPOINTS
from data import Dataset, load_dataset
from distributed import init_processes
from metrics import Score, calibrate, evaluate, score
from model import model_cost
from utils import InputError, printable
from weights import find_checkpoint, load_model

NUM_MISTAKES = 24  # in their figure


def test(
    checkpoint: Path = CHECKPOINTS,
    /,
    tta: bool = False,
    compare: str = "",
    json: str = "",
    data_dir: str = "data",
    download: bool = True,
) -> dict[str, object]:
    """Accuracy, loss, calibration, confusion matrix and cost of a saved network.

    Args:
        checkpoint: A .safetensors file, or a folder: its newest run, else a released model.
        tta: Also test with test-time augmentation: logits averaged with the flipped view's.
        compare: Another checkpoint, file or folder: do the two differ by more than chance?
        json: Also write the result to this file.
        data_dir: Folder of CIFAR-10, which is downloaded into it if it is not there.
        download: Download CIFAR-10 if it is not in data_dir.

    Returns:
        The content of the JSON file.

    Raises:
        InputError: the checkpoint or the data is missing, damaged or of another project.
    """
    path = find_checkpoint(checkpoint)
    other_path = find_checkpoint(Path(compare)) if compare else None
    utils.check_output("json", json)
    model, info = load_model(path)
    other, other_info = load_model(other_path) if compare else (None, None)
    data = load_dataset(info.get("dataset"), data_dir, download=download)
    check_data(path, info, data)
    if compare:
        check_data(other_path, other_info, data)

    data = data.to(init_processes())
    cost = model_cost(model.architecture)
    print(
        f"{shown(path)}: {printable(info.get('preset'))} network, {cost.num_params:,} parameters,"
        f" {cost.macs / 1e6:,.1f} M MACs, {printable(info.get('epochs'))} epochs of {data.name}"
    )
    logits = classify(model, info, data)
    labels = data.test.labels
    plain = score(logits, labels)
    print(f"test accuracy: {plain}")
    mirrored = None
    if tta:
        mirrored = score(classify(model, info, data, flip_tta=True), labels)
        print(f"with the flipped view (TTA): {mirrored}")
    bins = calibrate(logits, labels)
    print(f"expected calibration error: {bins}")
    calibrated = None
    if temperature := info.get("temperature"):
        calibrated = calibrate(logits / temperature, labels)
        print(f"with the temperature of its validation images, {temperature:.3f}: {calibrated}")
    counts = confusion(logits.argmax(1), labels, len(data.class_names))
    print_per_class(counts, data.class_names)

    comparison = None
    if compare:
        other_logits = classify(other, other_info, data)
        comparison = mcnemar(logits, other_logits, labels)
        print(f"{shown(other_path)}: {score(other_logits, labels)}")
        print(
            f"right with the first alone {comparison['only_first']:,}, with the second alone"
            f" {comparison['only_second']:,}\nMcNemar's exact test: p = {comparison['p']:.2g}\n"
        )

    result = {
        "checkpoint": path.as_posix(),
        **summary(plain),
        "tta": mirrored and summary(mirrored),
        "mean_confidence": bins.mean_confidence,  # percent
        "calibration_error": bins.error,  # points
        "temperature": temperature,  # None if no validation images were set aside
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
        utils.write_json(Path(json), result)
    draw(
        path,
        f"{path.as_posix()}: {plain.accuracy:.2f}%",
        confusion=partial(plots.confusion_matrix, counts.numpy(), data.class_names),
        calibration=partial(plots.calibration, bins),
        mistakes=partial(plots.mistakes, *worst_mistakes(logits, data)),
    )
    return result


def draw(path: Path, title: str, **drawings: Callable[[Path, str], None]) -> None:
    """Draw figures beside a checkpoint; one that cannot be is a warning: the numbers are told."""
    for name, drawing in drawings.items():
        figure = path.with_name(f"{path.stem}_{name}.png")
        try:
            drawing(figure, title)
            print(f"figure: {shown(figure)}")
        except InputError as error:
            utils.warn(f"no figure: {error}")


def shown(path: Path) -> str:
    """A path as it is printed."""
    return printable(path.as_posix())


def check_data(path: Path, info: dict[str, object], data: Dataset) -> None:
    """Raise InputError if the model has other classes than `data`; warn if its copy differs."""
    if info["class_names"] != list(data.class_names):
        raise InputError(f"checkpoint: {path} knows other classes than {data.name} has")
    if not data.is_known_as(info.get("data_fingerprint")):
        utils.warn(f"this copy of {data.name} is not the one that {path} was trained with")


def classify(
    model: nn.Module, info: dict[str, object], data: Dataset, flip_tta: bool = False
) -> Tensor:
    """Logits of the test images, (N, C), normalised by the mean and std in the metadata."""
    images = data.test.images
    normalize = utils.normalizer(info["mean"], info["std"], images.device)
    return evaluate(model.to(images.device), images, normalize, flip_tta)


def summary(found: Score) -> dict[str, object]:
    """A score as JSON values; accuracy and its 95% interval in percent."""
    return {"accuracy": found.accuracy, "interval": found.interval} | asdict(found)


def mcnemar(first: Tensor, second: Tensor, labels: Tensor) -> dict[str, float]:
    """Whether the accuracies of two models on the same images differ by more than chance.

    McNemar's exact test (1947): of the images that only one of them gets right, each is either's
    with probability 1/2 if both are equally good. It compares two networks, not their recipes,
    which takes several seeds of each.

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


def confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Confusion matrix: counts of (true class, predicted class), (C, C) int64, on the CPU."""
    pairs = labels * num_classes + predicted
    return torch.bincount(pairs.cpu(), minlength=num_classes**2).view(num_classes, num_classes)


def print_per_class(counts: Tensor, class_names: tuple[str, ...]) -> None:
    """Print each class's accuracy, and the class that it is most often taken for."""
    width = max(map(len, class_names))
    print(f"\n{'class':{width}}  correct     of  accuracy  most often taken for")
    for i, name in enumerate(class_names):
        wrong = counts[i].clone()
        wrong[i] = 0
        confused = f"{class_names[wrong.argmax()]} ({wrong.max()})" if wrong.any() else "-"
        total = counts[i].sum().item()
        accuracy = f"{100 * counts[i, i].item() / max(total, 1):.2f}%"
        print(f"{name:{width}}  {counts[i, i]:7,d}  {total:5,d}  {accuracy:>8}  {confused}")
    print()


def main(args: list[str]) -> None:
    """Test the checkpoint that the command line names."""
    script.parse_command_line(test, args, prog="test.py")()


if __name__ == "__main__":
    script.run_script(main)
