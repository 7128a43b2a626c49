"""CIFAR-10 and scikit-learn's digits: whole in memory as uint8, augmented on the training device.

There are no worker processes: a batch is one gather from a tensor that is already there. Which
images a batch holds and how each is augmented is a pure function of (seed, epoch, step), so a
run can stop and go on anywhere, on any number of processes.
"""

import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from utils import IMAGE_SIZE, InputError, first_line, generator, warn

# Class names, and per channel the mean and std of all pixels of the training images, scaled to
# [0, 1]. The CIFAR-10 std that is copied everywhere, (0.2023, 0.1994, 0.2010), is not that: it is
# a mean of per-image stds.
FACTS = {
    "cifar10": (
        "airplane automobile bird cat deer dog frog horse ship truck".split(),
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    ),
    "digits": (list("0123456789"), (0.3053,) * 3, (0.3237,) * 3),
}

BINARY_FOLDER = "cifar-10-batches-bin"
BINARY_SHA1 = {  # of the official files
    "data_batch_1.bin": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
    "data_batch_2.bin": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
    "data_batch_3.bin": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
    "data_batch_4.bin": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
    "data_batch_5.bin": "26e2849e66a845b7f1e4614ae70f4889ae604628",
    "test_batch.bin": "67eb016db431130d61cd03c7ad570b013799c88c",
}
IMAGES_PER_FILE = 10_000
RECORD_BYTES = 1 + 3 * IMAGE_SIZE**2  # label, then the red, green and blue planes

# AutoAugment's policy for CIFAR-10: pairs of operations, each with the probability that it is
# applied and a level from 0 to 9, which means nothing to some.
AUTO_AUGMENT = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0)),
)

SPLIT_SEED = 0  # of the validation and digits splits: the same for every run, so runs compare


@dataclass(frozen=True)
class Split:
    """Labelled images."""

    images: Tensor  # (N, 3, 32, 32) uint8
    labels: Tensor  # (N,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: object) -> "Split":
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> "Split":
        """The same images on `device`."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A data set, whole, with what a checkpoint must know of it."""

    name: str
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]  # per channel, of images scaled to [0, 1]
    std: tuple[float, float, float]
    train: Split
    val: Split  # empty for val_size=0
    test: Split
    fingerprint: str  # SHA-256 of all images and labels, before the validation split
    unofficial: tuple[str, ...] = ()  # files that differ from the official release

    def to(self, device: torch.device) -> "Dataset":
        """The same data on `device`."""
        train, val, test = (split.to(device) for split in (self.train, self.val, self.test))
        return replace(self, train=train, val=val, test=test)

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and std, (3, 1, 1) each, on the data's device: made once, not in every step."""
        device = self.train.labels.device
        mean, std = (torch.tensor(v, device=device) for v in (self.mean, self.std))
        return mean[:, None, None], std[:, None, None]

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images, (N, 3, 32, 32), to float32 with about zero mean and unit variance."""
        mean, std = self.statistics
        return (images / 255 - mean) / std


# ---------------------------------------------------------------- loading


def load_dataset(
    name: str,
    data_dir: str | Path = "data",
    val_size: int = 0,
    download: bool = True,
    train_size: int = 0,
    test: bool = True,
) -> Dataset:
    """`cifar10` (from `data_dir`, fetched if need be) or `digits` (shipped inside scikit-learn).

    Args:
        val_size: training images to set aside for validation, the same share of every class.
        download: whether CIFAR-10 may be fetched.
        train_size: of the other training images, how many to keep, again of every class; 0 for all.
        test: whether to read the test images; else there are none.

    Raises:
        InputError: a file is missing, damaged or foreign, or a size is out of range.
    """
    if name not in FACTS:
        raise InputError(f"dataset: {name!r} is not one of {', '.join(FACTS)}")
    if name == "digits":
        dataset = load_digits(test)
    elif Path(data_dir, BINARY_FOLDER).is_dir():
        dataset = load_cifar10_binary(Path(data_dir, BINARY_FOLDER), test)
    else:
        dataset = load_cifar10_archive(Path(data_dir), download, test)
    return take_training(split_validation(dataset, val_size), train_size)


def load_cifar10_archive(data_dir: Path, download: bool, test: bool = True) -> Dataset:
    """CIFAR-10 from the official archive, by torchvision: its download, its extraction, its MD5."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    check_links(data_dir / CIFAR10.filename, *Path(data_dir, CIFAR10.base_folder).glob("*"))
    archive_is_here = check_integrity(data_dir / CIFAR10.filename, CIFAR10.tgz_md5)
    folder_is_new = not data_dir.exists()
    try:
        parts = [CIFAR10(data_dir, train=True, download=download or archive_is_here)]
        if test:
            parts.append(CIFAR10(data_dir, train=False))
    except (OSError, RuntimeError) as error:
        if folder_is_new:
            with contextlib.suppress(OSError):
                data_dir.rmdir()  # made for a download that brought nothing
        raise InputError(
            f"data_dir: no CIFAR-10 in {data_dir} ({first_line(error)}); put {CIFAR10.filename}"
            f" (MD5 {CIFAR10.tgz_md5}) there, or {BINARY_FOLDER}/; or run `python train.py demo`,"
            " which needs no download"
        ) from None
    splits = [
        Split(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(part.targets),
        )
        for part in parts
    ]
    return make_dataset("cifar10", *splits)


def load_cifar10_binary(folder: Path, test: bool = True) -> Dataset:
    """CIFAR-10 in the official binary layout: six files of 10,000 records, label then pixels.

    A file whose SHA-1 is not the official one is a one-line warning, and recorded.
    """
    check_links(*(folder / name for name in BINARY_SHA1))
    *training, last = BINARY_SHA1
    names = [*training, last] if test else training
    files = {name: read_binary(folder / name) for name in names}
    unofficial = tuple(
        name
        for name, records in files.items()
        if hashlib.sha1(records, usedforsecurity=False).hexdigest() != BINARY_SHA1[name]
    )
    if unofficial:
        warn(
            f"{folder}: {len(unofficial)} of {len(files)} files differ from the official CIFAR-10"
            " (SHA-1); recorded with the model"
        )
    batches = [torch.from_numpy(records) for records in files.values()]
    splits = [
        Split(records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), records[:, 0].long())
        for records in (torch.cat(batches[: len(training)]), *batches[len(training) :])
    ]
    return make_dataset("cifar10", *splits, unofficial=unofficial)


def check_links(*paths: Path) -> None:
    """Raise InputError if one is a link out of its folder: a download would write through it."""
    for path in paths:
        if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
            raise InputError(
                f"data_dir: {path} is a link to {path.resolve()}, outside its folder; put the file"
                " itself there, or link the whole folder"
            )


def read_binary(path: Path) -> np.ndarray:
    """The records of one binary file, (10000, 3073) uint8."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"data_dir: cannot read {path} ({error.strerror}); unpack CIFAR-10's binary version"
            " there again"
        ) from None
    expected = IMAGES_PER_FILE * RECORD_BYTES
    if len(content) != expected:
        raise InputError(
            f"data_dir: {path} has {len(content):,} bytes instead of {expected:,}; it is truncated"
            " or foreign: unpack CIFAR-10's binary version there again"
        )
    records = np.frombuffer(bytearray(content), np.uint8).reshape(-1, RECORD_BYTES)
    worst = int(records[:, 0].argmax())
    if records[worst, 0] > 9:
        raise InputError(
            f"data_dir: {path}, record {worst}: label {records[worst, 0]} is not 0 to 9; unpack"
            " CIFAR-10's binary version there again"
        )
    return records


def load_digits(test: bool = True) -> Dataset:
    """1,797 handwritten digits of 8x8 pixels, enlarged to 32x32x3, split 80/20 stratified."""
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)  # (1797, 64), 0 to 16
    small = torch.tensor(pixels.reshape(-1, 1, 8, 8) / 16, dtype=torch.float32)
    large = F.interpolate(small, size=(32, 32), mode="bilinear")
    images = (large * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    train, held_out = stratified(Split(images, torch.tensor(labels)), round(len(labels) / 5))
    return make_dataset("digits", train, held_out if test else None)


def make_dataset(
    name: str, train: Split, test: Split | None = None, unofficial: tuple[str, ...] = ()
) -> Dataset:
    """The Dataset of these splits, nothing set aside for validation yet."""
    test = train[:0] if test is None else test
    class_names, mean, std = FACTS[name]
    return Dataset(
        name=name,
        class_names=tuple(class_names),
        mean=mean,
        std=std,
        train=train,
        val=train[:0],
        test=test,
        fingerprint=fingerprint(train, test),
        unofficial=unofficial,
    )


def split_validation(dataset: Dataset, val_size: int) -> Dataset:
    """`dataset` with `val_size` of its training images moved to `val`, class by class."""
    if val_size == 0:
        return dataset
    check_size("val_size", val_size, dataset)
    train, val = stratified(dataset.train, val_size)
    return replace(dataset, train=train, val=val)


def take_training(dataset: Dataset, train_size: int) -> Dataset:
    """`dataset` with only `train_size` of its training images, of every class the same share."""
    if train_size in (0, len(dataset.train)):
        return dataset
    check_size("train_size", train_size, dataset)
    return replace(dataset, train=stratified(dataset.train, train_size)[1])


def check_size(name: str, size: int, dataset: Dataset) -> None:
    """Raise InputError unless both parts of a split at `size` can have images of every class."""
    num_classes, num_images = len(dataset.class_names), len(dataset.train)
    if not num_classes <= size <= num_images - num_classes:
        raise InputError(
            f"{name}: {size} of {num_images:,} training images; use 0, or {num_classes} to"
            f" {num_images - num_classes:,}"
        )


def stratified(split: Split, size: int) -> tuple[Split, Split]:
    """`split` without `size` of its images, and those, each with the same share of every class."""
    from sklearn.model_selection import train_test_split

    rest, held_out = train_test_split(
        np.arange(len(split)), test_size=size, stratify=split.labels, random_state=SPLIT_SEED
    )
    return split[np.sort(rest)], split[np.sort(held_out)]


def fingerprint(*splits: Split) -> str:
    """SHA-256 of images and labels: the same for the archive and the binary layout."""
    digest = hashlib.sha256()
    for split in splits:
        digest.update(split.images.numpy())
        digest.update(split.labels.to(torch.uint8).numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------- augmentation and batches


@dataclass(frozen=True)
class Augmentation:
    """AutoAugment, random crop, rotation, horizontal flip and Cutout, drawn per image."""

    crop_padding: int  # pixels added on each side before cropping back to 32x32
    padding: str  # `zeros`, or `reflect`: the image mirrored at its border
    rotation: float  # degrees, either way
    flip: str  # `none`, `random` or `alternating`
    cutout: int  # side of the square that is greyed out, in pixels; 0 for none
    auto: bool = False  # whether AutoAugment comes first

    def draw(self, indices: Tensor, seed: int, epoch: int) -> tuple[Tensor, ...]:
        """Shifts (N, 2), angles (N,), flips (N,) and Cutout's corners (N, 2) of `indices`.

        Alternating flips mirror a random half of the images in the first epoch, the other half in
        the second, and so on: two epochs show every image both ways (Jordan, arXiv:2404.00498).
        """
        rng, n = generator("augmentation", seed, epoch), len(indices)
        low, high = -self.crop_padding, self.crop_padding + 1
        shift = torch.randint(low, high, (n, 2), generator=rng)
        angle = (2 * torch.rand(n, generator=rng) - 1) * self.rotation
        flip = torch.rand(n, generator=rng) < 0.5 * (self.flip == "random")
        if self.flip == "alternating":
            first = torch.rand(n, generator=generator("flip", seed)) < 0.5  # of each image
            flip = first[indices] ^ (epoch % 2 == 0)
        corner = torch.randint(0, IMAGE_SIZE - self.cutout + 1, (n, 2), generator=rng)
        return shift, angle, flip, corner


def augment(
    images: Tensor, shift: Tensor, angle: Tensor, flip: Tensor, padding: str = "zeros"
) -> Tensor:
    """Crop, then rotate, then flip, each image its own way: one gather for the whole batch.

    Equal to torchvision's crop after padding, rotate (nearest pixel, zero fill) and
    horizontal_flip: every output pixel is traced back through the three to its source.

    Args:
        images: (N, C, S, S) uint8.
        shift: (N, 2) whole pixels: the crop's first row and column, counted from the image's.
        angle: (N,) degrees, counter-clockwise.
        flip: (N,) bool.
        padding: what a crop finds outside the image: `zeros`, or `reflect`, its mirror image.
    """
    n, channels, size, _ = images.shape
    center = (size - 1) / 2
    offset = torch.arange(size, device=images.device) - center  # pixels from the center
    y = offset[None, :, None]  # (1, S, 1)
    x = offset[None, None, :] * torch.where(flip, -1.0, 1.0)[:, None, None]  # (N, 1, S)
    radians = angle.deg2rad()[:, None, None]
    sin, cos = radians.sin(), radians.cos()
    row = (y * cos + x * sin + center).round().long()  # (N, S, S), in the cropped image
    column = (x * cos - y * sin + center).round().long()
    inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
    row, column = row + shift[:, 0, None, None], column + shift[:, 1, None, None]
    if padding == "reflect":
        last = size - 1
        row = (last - (last - row.abs()).abs()).clamp_(0)
        column = (last - (last - column.abs()).abs()).clamp_(0)
    else:
        inside &= (row >= 0) & (row < size) & (column >= 0) & (column < size)

    source = (row * size + column) * inside  # pixel 0 stands in for those outside
    source = source.view(n, 1, -1).expand(-1, channels, -1)
    pixels = images.reshape(n, channels, -1).gather(2, source).view_as(images)
    return pixels * inside[:, None]


def cut_out(images: Tensor, corner: Tensor, size: int) -> Tensor:
    """Set a square of each image to the mean, 0 (DeVries & Taylor, arXiv:1708.04552).

    Args:
        images: (N, C, S, S) normalised.
        corner: (N, 2) the square's first row and column.
        size: its side, in pixels.
    """
    place = torch.arange(images.shape[-1], device=images.device)
    inside = (place >= corner[:, :, None]) & (place < corner[:, :, None] + size)  # (N, 2, S)
    square = inside[:, 0, :, None] & inside[:, 1, None, :]  # (N, S, S)
    return images.masked_fill(square[:, None], 0)


def auto_augment(images: Tensor, pair: Tensor, chance: Tensor, side: Tensor) -> Tensor:
    """One of 25 pairs of operations on each image: AutoAugment (Cubuk et al., arXiv:1805.09501).

    torchvision's transform draws once for all images that it is given. Here each image has a draw
    of its own, and those that share it are changed together: 100 calls for any number of images.

    Args:
        images: (N, 3, S, S) uint8.
        pair: (N,) indices into AUTO_AUGMENT, on the CPU.
        chance: (N, 2) from 0 to 1: an operation is left out if its probability is smaller.
        side: (N, 2) from 0 to 1: up to 0.5, an operation that has a direction goes the other way.
    """
    operations, images = auto_operations(), images.clone()
    for i, j, sign in itertools.product(range(len(AUTO_AUGMENT)), range(2), (-1, 1)):
        name, probability, level = AUTO_AUGMENT[i][j]
        chosen = (pair == i) & (chance[:, j] <= probability) & ((side[:, j] <= 0.5) == (sign < 0))
        chosen = chosen.nonzero().flatten().to(images.device)
        if len(chosen):
            images[chosen] = operations[name](images[chosen], level, sign)
    return images


def draw_pairs(num_images: int, seed: int, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `auto_augment` does to each image of an epoch."""
    rng = generator("auto_augment", seed, epoch)
    pair = torch.randint(len(AUTO_AUGMENT), (num_images,), generator=rng)
    chance, side = torch.rand(2, num_images, 2, generator=rng)
    return pair, chance, side


def auto_operations() -> dict[str, Callable[[Tensor, int, int], Tensor]]:
    """AutoAugment's operations on (N, 3, S, S) images, with a level of 0 to 9 and a sign."""
    from torchvision.transforms.v2 import functional as v2

    far = 150 / 331 * IMAGE_SIZE  # pixels: 150 of ImageNet's, in the paper

    def affine(x: Tensor, right: float = 0, down: float = 0, shear: float = 0) -> Tensor:
        degrees = [0, math.degrees(math.atan(shear))]
        return v2.affine(x, 0, [int(right), int(down)], 1, degrees, center=[0, 0])

    def at(level: int, most: float) -> float:
        return torch.linspace(0, most, 10)[level].item()  # in float32, as torchvision has it

    return {
        "shear_y": lambda x, level, sign: affine(x, shear=sign * at(level, 0.3)),
        "translate_x": lambda x, level, sign: affine(x, right=sign * at(level, far)),
        "translate_y": lambda x, level, sign: affine(x, down=sign * at(level, far)),
        "rotate": lambda x, level, sign: v2.rotate(x, sign * at(level, 30)),
        "brightness": lambda x, level, sign: v2.adjust_brightness(x, 1 + sign * at(level, 0.9)),
        "color": lambda x, level, sign: v2.adjust_saturation(x, 1 + sign * at(level, 0.9)),
        "contrast": lambda x, level, sign: v2.adjust_contrast(x, 1 + sign * at(level, 0.9)),
        "sharpness": lambda x, level, sign: v2.adjust_sharpness(x, 1 + sign * at(level, 0.9)),
        "posterize": lambda x, level, _: v2.posterize(x, 8 - round(at(level, 4))),
        "solarize": lambda x, level, _: v2.solarize(x, 255 * (1 - at(level, 1))),
        "autocontrast": lambda x, *_: v2.autocontrast(x),
        "equalize": lambda x, *_: v2.equalize(x),
        "invert": lambda x, *_: v2.invert(x),
    }


def train_batches(
    data: Dataset,
    augmentation: Augmentation,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    size: int = IMAGE_SIZE,
    done: int = 0,
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Augmented, normalised images, labels and global size of an epoch's batches, on the device.

    Process `rank` gets every `world_size`-th image of each global batch, augmented as it would be
    in one process. The last batch holds what is left over. Only the central `size` pixels of the
    images' sides are given out. The first `done` batches are left out.
    """
    num_images, device = len(data.train), data.train.labels.device
    train = data.train
    if augmentation.auto:  # on the whole epoch: its calls are many, for any number of images
        changed = auto_augment(train.images, *draw_pairs(num_images, seed, epoch))
        train = replace(train, images=changed)
    order = torch.randperm(num_images, generator=generator("order", seed, epoch))
    draws = augmentation.draw(order, seed, epoch)
    # All that an epoch draws goes to the device at once: no step waits for a transfer.
    order, *draws = (tensor.to(device) for tensor in (order, *draws))
    margin = (IMAGE_SIZE - size) // 2
    center = slice(margin, margin + size)
    for start in range(done * batch_size, num_images, batch_size):
        stop = min(start + batch_size, num_images)
        share = slice(start + rank, stop, world_size)
        batch = train[order[share]]
        *crop, corner = (draw[share] for draw in draws)
        images = data.normalize(augment(batch.images, *crop, augmentation.padding))
        if augmentation.cutout:
            images = cut_out(images, corner, augmentation.cutout)
        yield images[:, :, center, center], batch.labels, stop - start
