"""Say what is in pictures: the class that a saved network gives each, and how sure it is.

    python predict.py photo.jpg  # by the newest run, else a released model
    python predict.py photos 'more/*.png' --top 3 --csv answers.csv
    python predict.py - --checkpoint checkpoints/fast.safetensors < photo.jpg

Any picture gets one of the classes that the network knows, and one of something else may get it
with a high probability: the network cannot say "none of these". It sees 32x32 pixels.
"""

import script

import contextlib
import csv as csv_format
import functools
import glob
import io
import json as json_format
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

import utils
from config import CHECKPOINTS
from distributed import init_processes
from metrics import EVAL_BATCH, evaluate
from utils import IMAGE_SIZE, InputError, first_line, printable
from weights import find_checkpoint, load_model

MAX_READERS = 4  # pictures decoded at once: each can take a gigabyte
HEIC_SUFFIXES = {".heic", ".heif"}
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
Row = dict[str, object]  # of one picture: file, predictions, error


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
) -> int:
    """Say what is in pictures, one line each: classes and their probabilities, the best first.

    Any picture gets one of the network's classes, one of something else too: it cannot say "none
    of these". Probabilities are calibrated, for images like those it was trained on, if it was
    trained with --val-size.

    Args:
        images: Files, folders, "quoted globs" (** for all folders below), or - for stdin.
        checkpoint: A .safetensors file, or a folder: its newest run, else a released model.
        top: How many classes to name.
        resize: Crop the middle to a square before scaling it to 32x32, or squash the whole.
        tta: Average the logits with those of the mirrored picture (test-time augmentation).
        json: Also write the answers to this JSON file.
        csv: Also write the answers to this CSV file.
        batch_size: Pictures in memory at once.

    Returns:
        How many files could not be read; each is told on stderr.

    Raises:
        InputError: there is no such file, checkpoint or option; nothing was done.
    """
    utils.check_integer("batch_size", batch_size, 1, 100_000)
    for name, path in (("json", json), ("csv", csv)):
        utils.check_output(name, path)
    files = find_pictures(images)
    path = find_checkpoint(checkpoint)
    model, info = load_model(path)
    names, temperature = info["class_names"], info.get("temperature")
    utils.check_integer("top", top, 1, len(names))
    explain(path, names, temperature)

    device = init_processes()
    model, normalize = model.to(device), utils.normalizer(info["mean"], info["std"], device)
    failures = 0
    with contextlib.ExitStack() as stack:
        writers = [write_line]
        if json:
            header = {"checkpoint": path.as_posix(), "temperature": temperature, "tta": tta}
            writers.append(stack.enter_context(json_rows(Path(json), header)))
        if csv:
            writers.append(stack.enter_context(csv_rows(Path(csv), top)))
        readers = stack.enter_context(ThreadPoolExecutor(min(MAX_READERS, os.cpu_count() or 1)))
        bar = tqdm(total=len(files), unit="img", delay=1, leave=False, disable=None)
        stack.enter_context(bar)
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            read = list(readers.map(functools.partial(attempt, resize=resize), batch))
            pictures = [picture for picture in read if isinstance(picture, Tensor)]
            probabilities = iter(())
            if pictures:
                logits = evaluate(model, torch.stack(pictures).to(device), normalize, tta)
                probabilities = iter((logits / (temperature or 1)).softmax(1).cpu())
            for file, picture in zip(batch, read, strict=True):
                row = {"file": file, "predictions": [], "error": None}
                if isinstance(picture, Tensor):
                    row["predictions"] = best(next(probabilities), names, top)
                else:
                    row["error"], failures = picture, failures + 1
                for write in writers:
                    write(row)
            sys.stdout.flush()  # a pipe gets each batch at once, and says here if it is broken
            bar.update(len(batch))
    return failures


def explain(path: Path, names: list[str], temperature: float | None) -> None:
    """Say on stderr what the answers mean."""
    utils.print_error(
        f"{path.as_posix()}: any picture gets one of {', '.join(names)}"
        if len(names) <= 20
        else f"{path.as_posix()}: any picture gets one of {len(names)} classes"
    )
    utils.print_error(
        "probabilities: not calibrated; use their order, not their values"
        if temperature is None
        else f"probabilities: calibrated for images like its training's, temperature"
        f" {temperature:.3f}"
    )


def best(probabilities: Tensor, names: list[str], top: int) -> list[dict[str, object]]:
    """The most probable classes, of (C,) probabilities."""
    values, classes = probabilities.topk(top)
    return [
        {"class": names[i], "probability": round(value, 6)}
        for i, value in zip(classes.tolist(), values.tolist(), strict=True)
    ]


# ---------------------------------------------------------------- pictures


def find_pictures(arguments: tuple[str, ...]) -> list[str]:
    """The files that are named, in order, those of a folder or glob sorted; `-` is stdin.

    Raises:
        InputError: none is named, one is an address, or there is no such file.
    """
    if not arguments:
        raise InputError("images: none is named; name files, folders or globs, or - for stdin")
    files = []
    for argument in arguments:
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
            for path in map(Path, found):
                name = str(path) if str(path) != "-" else os.path.join(".", "-")  # noqa: PTH118
                files += pictures_in(path) if path.is_dir() else [name]
    return files


def pictures_in(folder: Path) -> list[str]:
    """The files in and below `folder` that have a picture's suffix; a warning counts the others.

    Raises:
        InputError: there are none.
    """
    formats, readable = Image.registered_extensions(), kinds()
    suffixes = {suffix for suffix, kind in formats.items() if kind in readable} | HEIC_SUFFIXES
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if not is_hidden(path.relative_to(folder))]
    pictures = [path for path in files if path.suffix.lower() in suffixes]
    if not pictures:
        raise InputError(f"images: {folder} holds no picture; name another folder, or files")
    if len(pictures) < len(files):
        others = [path.name for path in files if path.suffix.lower() not in suffixes]
        utils.warn(f"{folder}: {len(others):,} files left out that are no pictures: {others[0]}...")
    return [str(path) for path in pictures]


def is_hidden(path: Path) -> bool:
    """Whether a name in it begins with a dot, as those of thumbnails and settings do."""
    return any(part.startswith(".") for part in path.parts)


def attempt(file: str, resize: str) -> Tensor | str:
    """The picture in a file, (3, 32, 32) uint8; or, in a line, why there is none."""
    try:
        with open_file(file) as stream:
            return read_picture(stream, resize)
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS
        return f"has more than {limit:,} pixels; scale it down first"
    except Image.UnidentifiedImageError:
        return "is no picture that Pillow can read"
    except Exception as error:  # whatever a foreign file can raise
        return f"cannot be read ({getattr(error, 'strerror', None) or first_line(error)})"


def open_file(file: str) -> io.BufferedIOBase:
    """A file to read, or stdin, with a way back to its start, which pipes do not have."""
    if file == "-":
        return io.BytesIO(sys.stdin.buffer.read())
    stream = Path(file).open("rb")  # noqa: SIM115 (the caller closes it)
    if stream.seekable():
        return stream
    with stream:
        return io.BytesIO(stream.read())


def read_picture(stream: io.BufferedIOBase, resize: str = "crop") -> Tensor:
    """A picture as the network sees it, (3, 32, 32) uint8 RGB.

    Its middle square, or for `squash` the whole, is scaled by a triangle filter as wide as a new
    pixel (Pillow's `BILINEAR`): without such antialiasing most photographs are not recognised. A
    picture of 32x32 pixels stays as it is.
    """
    start = stream.read(12)
    stream.seek(0)
    if not start:
        raise ValueError("it is empty")
    is_heic = start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS
    if is_heic and not heic_support():
        raise ValueError("HEIC needs `pip install pillow-heif`")
    image = to_rgb(Image.open(stream, formats=kinds()))
    if resize == "crop":
        side = min(image.size)
        left, upper = ((length - side) // 2 for length in image.size)
        image = image.crop((left, upper, left + side, upper + side))
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def kinds() -> list[str]:
    """What Pillow can read, but for EPS: that is a program, which it has Ghostscript run."""
    Image.init()
    return [kind for kind in Image.OPEN if kind != "EPS"]


def to_rgb(image: Image.Image) -> Image.Image:
    """Its first frame in 8-bit RGB: upright by its EXIF, alpha over white, 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 bits")
    if image.mode.startswith("I"):  # grayscale of 16 bits, which `convert` would cut off at 255
        pixels = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        image = Image.fromarray(pixels.round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@functools.cache
def heic_support() -> bool:
    """Whether iPhones' HEIC can be read, by a library that is not among the requirements."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        return True
    return False


# ---------------------------------------------------------------- answers


def write_line(row: Row) -> None:
    """Print an answer on stdout, or on stderr why there is none, above the progress bar."""
    if row["error"]:
        tqdm.write(printable(f"error: {row['file']}: {row['error']}"), file=sys.stderr)
        return
    answers = (f"{one['class']} {100 * one['probability']:.1f}%" for one in row["predictions"])
    tqdm.write(printable(f"{row['file']}: {', '.join(answers)}"))


@contextlib.contextmanager
def json_rows(path: Path, header: dict[str, object]) -> Iterator[Callable[[Row], None]]:
    """In the block, a function that adds a row to `images` in a JSON file, which keeps none."""
    with utils.atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(json_format.dumps(header)[:-1] + ', "images": [')
        separators = (separator for separator in ("\n",))

        def write(row: Row) -> None:
            file.write(next(separators, ",\n") + json_format.dumps(row))

        yield write
        file.write("\n]}\n")


@contextlib.contextmanager
def csv_rows(path: Path, top: int) -> Iterator[Callable[[Row], None]]:
    """In the block, a function that adds a row to a CSV file: a class and its probability, ..."""
    with (
        utils.atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv_format.writer(file)
        columns = [f"{name}_{i}" for i in range(1, top + 1) for name in ("class", "probability")]
        writer.writerow(["file", *columns, "error"])

        def write(row: Row) -> None:
            cells = [cell for one in row["predictions"] for cell in one.values()]
            writer.writerow([row["file"], *(cells or [""] * len(columns)), row["error"] or ""])

        yield write


def main(args: list[str]) -> None:
    """Say what is in the pictures that the command line names; status 2 if one was not read."""
    warnings.filterwarnings("ignore", module="PIL")  # about what is odd in a file
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    failures = script.parse_command_line(predict, args, prog="predict.py")()
    if failures:
        utils.print_error(f"error: {failures:,} of the files could not be read")
        sys.exit(2)


if __name__ == "__main__":
    script.run_script(main)
