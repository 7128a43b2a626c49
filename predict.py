"""Classify pictures with a saved network.

    python predict.py photo.jpg  # by the newest run, else a released network
    python predict.py photos 'more/*.png' --top 3 --csv answers.csv
    python predict.py - --checkpoint checkpoints/fast.safetensors < photo.jpg

From Python, `classify(["photo.jpg"], "fast")` returns the probabilities of the classes.

The network sees 32x32 pixels. It always answers with one of its classes, often confidently, even
if the picture shows something else.
"""

if __name__ == "__main__":  # above the imports: a missing library or an old Python is one line
    from engine.script import run_script

    run_script("predict")

import functools
import glob
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import EVAL_BATCH, Normalize
from engine import evaluate
from engine.checkpoint import find_checkpoint, load_model
from engine.distributed import init_processes
from engine.pictures import list_files, read_or_explain, reader_threads
from engine.script import plain_arguments
from utils import (
    CHECKPOINTS,
    InputError,
    check_integer,
    check_output,
    print_error,
    printable,
    warn,
    write_csv,
    write_json,
)

Answer = dict[str, object]  # for one picture: file, predictions (best first), error (or None)


def predict(
    images: tuple[str, ...],
    /,
    checkpoint: Path = CHECKPOINTS,
    top: int = 2,
    resize: Literal["crop", "squash"] = "crop",
    tta: bool = False,
    json: str = "",
    csv: str = "",
    batch_size: int = EVAL_BATCH,
) -> list[Answer]:
    """Classify pictures: print a line for each, the most probable classes first.

    The answer is always one of the network's classes, whatever a picture shows.

    Args:
        images: Files, folders, "quoted globs" (** for all folders below), or - for stdin.
        checkpoint: A file, a network's name, or a folder: its newest run, else a released network.
        top: How many classes to print.
        resize: Crop the middle to a square before scaling it to 32x32, or squash the whole.
        tta: Average the logits with those of the mirrored picture (test-time augmentation).
        json: Also write the answers to this JSON file.
        csv: Also write the answers to this CSV file.
        batch_size: Pictures in memory at once.

    Returns:
        The answers, one for each file; a file that cannot be read has an error instead.

    Raises:
        InputError: there is no such file, checkpoint or option; nothing was done.
    """
    if isinstance(images, str | Path):
        raise InputError(f"images: {str(images)!r} is one path; put it into a list")
    check_integer("batch_size", batch_size, 1, 100_000)
    check_output("json", json)
    check_output("csv", csv)
    if csv and Path(csv).absolute() == Path(json).absolute():
        raise InputError(f"csv: {csv} is the file of --json too; name another")
    files = find_pictures(images)
    path = find_checkpoint(checkpoint)
    model, info = load_model(path)
    names, temperature = info["class_names"], info.get("temperature")
    check_integer("top", top, 1, len(names))
    print_notes(path, names, temperature)

    device = init_processes()
    model, normalize = model.to(device), Normalize(info["mean"], info["std"]).to(device)
    answers = []
    with (
        reader_threads() as readers,
        tqdm(total=len(files), unit="img", delay=1, leave=False, disable=None) as bar,
    ):
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            read = readers.map(functools.partial(read_or_explain, resize=resize), batch)
            pictures, errors = zip(*read, strict=True)
            readable = [picture for picture in pictures if picture is not None]
            predictions = iter(())
            if readable:
                logits = evaluate.classify(model, torch.stack(readable).to(device), normalize, tta)
                probabilities = (logits / (temperature or 1)).softmax(1).cpu()
                predictions = (best(one, names, top) for one in probabilities)
            for file, error in zip(batch, errors, strict=True):
                found = [] if error else next(predictions)
                answers.append({"file": file, "predictions": found, "error": error})
                print_answer(answers[-1])
            sys.stdout.flush()  # a pipe gets each batch at once, and reports here if it is broken
            bar.update(len(batch))
    if json:
        header = {"checkpoint": path.as_posix(), "temperature": temperature, "tta": tta}
        write_json(Path(json), header | {"images": answers})
    if csv:
        write_csv(Path(csv), [csv_row(answer, top) for answer in answers])
    return answers


def classify(
    images: Iterable[str | Path | Image.Image], checkpoint: str | Path = CHECKPOINTS
) -> list[dict[str, float]]:
    """Classify pictures from Python, on the CPU; the settings of your process stay as they are.

    Args:
        images: Paths of files, or pictures that Pillow has opened or made.
        checkpoint: A file, a network's name, or a folder: its newest run, else a released network.

    Returns:
        For each picture the probability of every class by its name, the most probable one first.

    Raises:
        InputError: there is no such checkpoint, or a picture cannot be read.
    """
    if isinstance(images, str | Path | Image.Image):
        raise InputError(f"images: {images!r} is one picture; put it into a list")
    model, info = load_model(find_checkpoint(Path(checkpoint)))
    pictures = []
    for image in images:
        picture, error = read_or_explain(image if isinstance(image, Image.Image) else Path(image))
        if error:
            raise InputError(f"images: {image} {error}; leave it out")
        pictures.append(picture)
    if not pictures:
        return []
    normalize = Normalize(info["mean"], info["std"])
    logits = evaluate.classify(model, torch.stack(pictures), normalize, shared=False)
    probabilities = (logits / (info.get("temperature") or 1)).softmax(1)
    names = info["class_names"]
    found = [best(one, names, len(names)) for one in probabilities]
    return [{one["class"]: one["probability"] for one in answer} for answer in found]


def print_notes(path: Path, names: list[str], temperature: float | None) -> None:
    """Print on stderr which classes there are and what the probabilities mean."""
    classes = ", ".join(names) if len(names) <= 20 else f"{len(names)} classes"
    print_error(f"{path.as_posix()}: any picture gets one of {classes}")
    print_error(
        "probabilities: not calibrated; use their order, not their values"
        if temperature is None
        else "probabilities: calibrated for images like those it was trained on, temperature"
        f" {temperature:.3f}"
    )


def print_answer(answer: Answer) -> None:
    """Print a line above the progress bar: classes on stdout, or an error on stderr."""
    if answer["error"]:
        tqdm.write(printable(f"error: {answer['file']}: {answer['error']}"), file=sys.stderr)
        return
    classes = (f"{one['class']} {100 * one['probability']:.1f}%" for one in answer["predictions"])
    tqdm.write(printable(f"{answer['file']}: {', '.join(classes)}"))


def csv_row(answer: Answer, top: int) -> dict[str, object]:
    """An answer as a flat row: file, class_1, probability_1, ..., error."""
    # A name may hold any bytes, but the CSV file is UTF-8.
    row = {"file": os.fsencode(answer["file"]).decode(errors="replace")}
    for i in range(top):
        found = answer["predictions"][i] if answer["predictions"] else {}
        for key in ("class", "probability"):
            row[f"{key}_{i + 1}"] = found.get(key, "")
    return row | {"error": answer["error"] or ""}


def best(probabilities: Tensor, names: list[str], top: int) -> list[dict[str, object]]:
    """The most probable classes, of (C,) probabilities."""
    values, classes = probabilities.topk(top)
    return [
        {"class": names[i], "probability": round(value, 6)}
        for i, value in zip(classes.tolist(), values.tolist(), strict=True)
    ]


# ---------------------------------------------------------------- pictures


def find_pictures(arguments: tuple[str, ...]) -> list[str]:
    """List the files that are named, in order; those of a folder or glob are sorted.

    Stdin is `-`, and a file of that name `./-`.

    Raises:
        InputError: none is named, one is an address, stdin is named twice, there is no such file,
            or a folder holds no picture.
    """
    if not arguments:
        raise InputError("images: none is named; name files, folders or globs, or - for stdin")
    files = []
    for argument in arguments:
        argument = "./-" if argument == Path("-") else str(argument)
        if argument == "-":
            if argument in files:
                raise InputError("images: stdin, `-`, can be read only once")
            files.append(argument)
        elif "://" in argument:
            raise InputError(f"images: {argument!r} is an address; download the picture first")
        else:
            found = [argument]
            if not os.path.lexists(argument):
                found = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207 (absolute ones)
            if not found:
                raise InputError(f"images: {argument!r} does not exist, and matches no file")
            names = []
            for path in map(Path, found):
                name = str(path) if str(path) != "-" else os.path.join(".", "-")  # noqa: PTH118
                names += pictures_below(path) if path.is_dir() else [name]
            if not names:
                raise InputError(
                    f"images: {argument} holds no picture; name another folder, or files"
                )
            files += dict.fromkeys(names)  # `**` matches a folder, and again what is in it
    return files


def pictures_below(folder: Path) -> list[str]:
    """List the pictures in and below `folder`, and warn about other files."""
    pictures, others = list_files(folder)
    if others:
        what = f"{len(others):,} files that are no pictures were"
        if len(others) == 1:
            what = "1 file that is no picture was"
        warn(f"{folder}: {what} left out ({others[0].name})")
    return [str(path) for path in pictures]


def main(args: list[str]) -> None:
    """Classify the pictures that the command line names.

    Raises:
        InputError: some of the pictures could not be read; the others are answered.
    """
    import tyro

    warnings.filterwarnings("ignore", module="PIL")  # about oddities of a file
    answers = tyro.cli(predict, args=plain_arguments(args, predict), prog="predict.py")
    if failures := sum(answer["error"] is not None for answer in answers):
        raise InputError(f"images: {failures:,} of {len(answers):,} could not be read")
