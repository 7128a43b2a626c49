"""CIFAR-10 and scikit-learn's digits: loaded whole as uint8, checked, and split."""

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from utils import IMAGE_SIZE, InputError, first_line, normalizer, warn

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
    train_fingerprint: str = ""  # of the training images alone: that of a run which read no others

    def is_known_as(self, fingerprint: object) -> bool:
        """Whether a run that noted this fingerprint had these images."""
        return fingerprint in (self.fingerprint, self.train_fingerprint)

    def to(self, device: torch.device) -> "Dataset":
        """The same data on `device`."""
        train, val, test = (split.to(device) for split in (self.train, self.val, self.test))
        return replace(self, train=train, val=val, test=test)

    @cached_property
    def normalize(self) -> Callable[[Tensor], Tensor]:
        """What makes uint8 images on the data's device what a network takes."""
        return normalizer(self.mean, self.std, self.train.labels.device)


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
    data_dir = Path(data_dir).expanduser()  # torchvision would, for its download alone
    if name == "digits":
        dataset = load_digits(test)
    elif (data_dir / BINARY_FOLDER).is_dir():
        dataset = load_cifar10_binary(data_dir / BINARY_FOLDER, test)
    else:
        dataset = load_cifar10_archive(data_dir, download, test)
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
    train_fingerprint, whole_fingerprint = fingerprints(train, test)
    return Dataset(
        name=name,
        class_names=tuple(class_names),
        mean=mean,
        std=std,
        train=train,
        val=train[:0],
        test=test,
        fingerprint=whole_fingerprint,
        unofficial=unofficial,
        train_fingerprint=train_fingerprint,
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


def fingerprints(*splits: Split) -> list[str]:
    """SHA-256 of images and labels, of the first split, of the first two, and so on.

    The same for the archive and the binary layout.
    """
    digest, found = hashlib.sha256(), []
    for split in splits:
        digest.update(split.images.numpy())
        digest.update(split.labels.to(torch.uint8).numpy())
        found.append(digest.hexdigest())
    return found
