"""Pictures in files, of every format and kind, as the networks see them: 32x32 pixels."""

import contextlib
import functools
import io
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from utils import IMAGE_SIZE, first_line, warn

MAX_READERS = 4  # pictures decoded at once: each can take a gigabyte
# The operation that turns a picture upright, by its EXIF orientation. Pillow's exif_transpose also
# writes the other tags again, and fails at those that break the standard.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
HEIC_SUFFIXES = {".heic", ".heif", ".hif"}
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


def list_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """List the files in and below `folder`, sorted: those with a picture's suffix, and the others.

    Links are followed; hidden files and folders are skipped.
    """
    files = sorted(files_below(folder), key=Path.as_posix)
    suffixes = picture_suffixes()
    pictures = [path for path in files if path.suffix.lower() in suffixes]
    return pictures, [path for path in files if path.suffix.lower() not in suffixes]


def picture_suffixes() -> set[str]:
    """The suffixes, in lower case, of the files that are read as pictures."""
    formats, readable = Image.registered_extensions(), readable_formats()
    suffixes = {suffix for suffix, name in formats.items() if name in readable}
    return suffixes | HEIC_SUFFIXES | {".mpo"}  # of several JPEG images, whose reader takes it


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield the files in and below `folder`, and links to nothing, but for hidden ones.

    Args:
        above: folders that are being listed, to which a link may lead back.
    """
    above = (*above, folder.resolve())
    try:
        paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
        folders = {path for path in paths if path.is_dir()}
    except OSError as error:
        warn(f"{folder}: cannot be read ({error.strerror}); left out")
        return
    for path in paths:
        if path in folders:
            if path.resolve() not in above:
                yield from files_below(path, above)
        elif path.is_file() or not path.exists():  # neither a pipe nor a device
            yield path


def reader_threads() -> ThreadPoolExecutor:
    """Threads that read pictures at the same time, for a `with` block."""
    return ThreadPoolExecutor(min(MAX_READERS, os.cpu_count() or 1))


def read_or_explain(
    file: str | Path | Image.Image, resize: str = "crop"
) -> tuple[Tensor | None, str | None]:
    """Read a picture, (3, 32, 32) uint8, or explain in a line why it cannot be read.

    Args:
        file: A path, `-` for stdin, or a picture that Pillow has opened or made.
        resize: As in `read_picture`.
    """
    try:
        if isinstance(file, Image.Image):
            # Facts of the file, such as its bits per pixel, count only for pixels not yet loaded.
            picture = file if getattr(file, "tile", None) else file.copy()
            return shrink(to_rgb(picture), resize), None
        with open_file(file) as stream:
            return read_picture(stream, resize), None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS
        return None, f"has more than {limit:,} pixels; scale it down first"
    except Image.UnidentifiedImageError:
        return None, "is no picture that Pillow can read"
    except Exception as error:  # a foreign file can raise anything
        return None, f"cannot be read ({getattr(error, 'strerror', None) or first_line(error)})"


def open_file(file: str | Path) -> io.BufferedIOBase:
    """Open a file or stdin so that it is seekable, which pipes are not."""
    if file == "-":
        return io.BytesIO(sys.stdin.buffer.read())
    stream = Path(file).open("rb")  # noqa: SIM115 (the caller closes it)
    if stream.seekable():
        return stream
    with stream:
        return io.BytesIO(stream.read())


def read_picture(stream: io.BufferedIOBase, resize: str = "crop") -> Tensor:
    """Read a picture as the network sees it, (3, 32, 32) uint8 RGB: see `shrink`.

    Raises:
        ValueError: it is empty, or of a kind that is not read; Pillow raises other errors.
    """
    start = stream.read(40)
    stream.seek(0)
    if not start:
        raise ValueError("it is empty")
    # mif1 and msf1 are also the first brand of some AVIF files, which name avif behind it.
    is_heic = start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS and b"avif" not in start
    if is_heic and not heic_support():
        raise ValueError("HEIC needs `pip install pillow-heif`")
    return shrink(to_rgb(Image.open(stream, formats=readable_formats())), resize)


def shrink(image: Image.Image, resize: str) -> Tensor:
    """Scale an RGB image to what the network sees, (3, 32, 32) uint8.

    The middle square (`crop`), or the whole (`squash`), is scaled by a triangle filter as wide as a
    new pixel (Pillow's `BILINEAR`): without such antialiasing most photographs are not recognized.
    A picture of 32x32 pixels stays as it is.
    """
    if resize == "crop":
        side = min(image.size)
        left, upper = ((length - side) // 2 for length in image.size)
        image = image.crop((left, upper, left + side, upper + side))
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def readable_formats() -> list[str]:
    """All formats that Pillow reads except EPS: that is a program, which Ghostscript would run."""
    Image.init()
    return [name for name in Image.OPEN if name != "EPS"]


def to_rgb(file: Image.Image) -> Image.Image:
    """Convert the first frame to 8-bit RGB: upright by its EXIF, alpha over white, 16 bits to 8."""
    if file.format == "PNG" and "transparency" in file.info:
        scale_transparent_color(file)
    file.load()  # which turns a TIFF upright and drops the tag
    turn = None
    with contextlib.suppress(Exception):  # of many kinds: damaged EXIF turns nothing
        turn = UPRIGHT.get(file.getexif().get(ExifTags.Base.Orientation))
    image = file.copy() if turn is None else file.transpose(turn)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 bits")
    if image.mode.startswith("I"):  # gray of more than 8 bits, which `convert` would cut off at 255
        pixels = np.asarray(image)
        gray = (pixels / (largest_gray(file) / 255)).round().astype(np.uint8)
        gray[pixels == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(gray)
    if image.mode == "La":  # with premultiplied alpha, from which Pillow converts to LA alone
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def scale_transparent_color(file: Image.Image) -> None:
    """Scale the transparent color of a PNG to 8 bits, as Pillow scales the pixels when it loads."""
    color, layout = file.info["transparency"], file.tile[0].args
    if layout in ("L;2", "L;4"):
        file.info["transparency"] = color * {"L;2": 85, "L;4": 17}[layout]
    elif layout == "RGB;16B":
        file.info["transparency"] = tuple(value >> 8 for value in color)


def largest_gray(file: Image.Image) -> int:
    """The value of white in a file whose gray has more than 8 bits.

    Raises:
        ValueError: it is unknown.
    """
    if file.format == "TIFF" and file.tag_v2[ExifTags.Base.BitsPerSample] == (12,):
        return 4095
    if file.mode != "I" or file.format == "PPM":
        return 65535
    low, high = file.getextrema()  # of 32 bits few files use all
    if low < 0 or high > 65535:
        raise ValueError(f"its pixels are integers from {low} to {high}; save it with 8 bits")
    return 255 if high <= 255 else 65535


@functools.cache
def heic_support() -> bool:
    """Teach Pillow to read iPhones' HEIC; False if the library for it is not installed."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        return True
    return False
