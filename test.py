"""Test a saved network on the test set of the data it was trained for.

    python test.py                                   # the newest run, else a released model
    python test.py checkpoints/try/model.safetensors --tta --json result.json

Everything it needs is in the checkpoint; the Config that trained it is not consulted.
"""

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

import plots
import utils
from data import load_dataset
from model import load_model, model_cost
from utils import InputError, Score

CHECKPOINTS = Path("checkpoints")


def test(
    checkpoint: Path = CHECKPOINTS,
    /,
    tta: bool = False,
    json: str = "",
    data_dir: str = "data",
    download: bool = True,
) -> dict[str, object]:
    """Accuracy, loss and cost of a saved network, per class and as a confusion matrix.

    Args:
        checkpoint: A .safetensors file, or a folder: its newest run, else a released model.
        tta: Also test with the flipped view, logits averaged; reported apart.
        json: Also write the result to this file.
        data_dir: Folder that holds CIFAR-10, or receives it.
        download: Fetch CIFAR-10 if it is not in data_dir.

    Returns:
        What --json writes.

    Raises:
        InputError: the checkpoint or the data is missing, damaged or foreign.
    """
    path = find_checkpoint(checkpoint)
    model, info = load_model(path)
    if json and Path(json).is_dir():
        raise InputError(f"json: {json} is a folder; name a file")
    data = load_dataset(info.get("dataset"), data_dir, download=download)
    if info["class_names"] != list(data.class_names):
        raise InputError(f"checkpoint: {path} knows other classes than {data.name} has")
    if info.get("data_fingerprint") != data.fingerprint:
        utils.warn(f"this copy of {data.name} is not the one that {path} was trained with")

    device, _, _ = utils.init_processes()
    model = model.to(device)
    data = replace(data, mean=tuple(info["mean"]), std=tuple(info["std"])).to(device)
    cost = model_cost(**model.architecture)
    print(
        f"{path.as_posix()}: {info.get('preset')} network, {cost.num_params:,} parameters,"
        f" {cost.macs / 1e6:,.1f} M MACs, {info.get('epochs')} epochs of {data.name}"
    )
    logits = utils.evaluate(model, data.test.images, data.normalize)
    plain = utils.score(logits, data.test.labels)
    print(f"test accuracy: {plain}")
    mirrored = None
    if tta:
        both = utils.evaluate(model, data.test.images, data.normalize, flip_tta=True)
        mirrored = utils.score(both, data.test.labels)
        print(f"with the flipped view (TTA): {mirrored}")

    counts = confusion(logits.argmax(1), data.test.labels, len(data.class_names))
    print_per_class(counts, data.class_names)
    figure = path.with_name(f"{path.stem}_confusion.png")
    title = f"{path.as_posix()}: {plain.accuracy:.2f}%"
    plots.confusion_matrix(counts.numpy(), data.class_names, figure, title)
    print(f"confusion matrix: {figure.as_posix()}")

    result = {
        "checkpoint": path.as_posix(),
        **summary(plain),
        "tta": mirrored and summary(mirrored),
        **asdict(cost),
        "dataset": data.name,
        "data_fingerprint": data.fingerprint,
        "unofficial_data_files": data.unofficial,
        "class_names": data.class_names,
        "confusion": counts.tolist(),  # [true class][predicted class]
    }
    if json:
        utils.write_json(Path(json), result)
    return result


def find_checkpoint(path: Path) -> Path:
    """The file that `path` means: itself, or of a folder the newest run, else a released model.

    Raises:
        InputError: the folder holds none.
    """
    if not path.is_dir():
        return path
    runs = [*path.glob("model.safetensors"), *path.glob("*/model.safetensors")]
    if runs:
        return max(runs, key=lambda run: run.stat().st_mtime)
    if released := sorted(path.glob("*.safetensors")):
        return released[0]
    raise InputError(
        f"checkpoint: {path.as_posix()} holds no run and no released model; train one with"
        " `python train.py demo`, or name a file"
    )


def summary(score: Score) -> dict[str, object]:
    """A score as JSON values; accuracy and its 95% interval in percent."""
    return {"accuracy": score.accuracy, "interval": score.interval} | asdict(score)


def confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts of (true class, predicted class), (C, C) int64, on the CPU."""
    pairs = labels * num_classes + predicted
    return torch.bincount(pairs.cpu(), minlength=num_classes**2).view(num_classes, num_classes)


def print_per_class(counts: Tensor, class_names: tuple[str, ...]) -> None:
    """A line per class: how many of its images are right, and what the rest is taken for."""
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
    """Test what the command line names."""
    utils.parse_command_line(test, args, prog="test.py")()


if __name__ == "__main__":
    utils.run_script(main)
