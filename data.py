"""Images: CIFAR, scikit-learn's digits or your own; loaded, checked, split, given out in batches.

A data set is held whole, as uint8, on the device. There are no worker processes: a batch is one
gather. The images of a batch and their augmentation are a pure function of (seed, epoch, step), so
a run can stop and go on anywhere, on any number of processes.
"""

import contextlib
import hashlib
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import augment
from config import Config, image_size, steps_per_epoch, view_of
from engine.distributed import num_processes, rank
from utils import (
    IMAGE_SIZE,
    InputError,
    check_fields,
    expanded,
    first_line,
    generator,
    printable,
    warn,
)

# Class names, and the mean and std per channel over all pixels of the training images, scaled to
# [0, 1]. The std that many repositories copy for CIFAR-10, (0.2023, 0.1994, 0.2010), is another
# quantity: the mean of the std of each image.
FACTS = {
    "cifar10": (
        "airplane automobile bird cat deer dog frog horse ship truck".split(),
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": (
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus"
        " butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach"
        " couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster"
        " house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree"
        " motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear"
        " pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road"
        " rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel"
        " streetcar sunflower sweet_pepper table tank telephone television tiger tractor train"
        " trout tulip turtle wardrobe whale willow_tree wolf woman worm".split(),
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
    ),
    "digits": (list("0123456789"), (0.3053,) * 3, (0.3237,) * 3),
}


@dataclass(frozen=True)
class Release:
    """The official files of CIFAR-10 or CIFAR-100, in the layout for Python and the binary one."""

    title: str
    python_folder: str  # in the archive that torchvision downloads
    binary_folder: str
    binary_archive: str
    binary_md5: str  # of that archive
    binary_files: dict[str, tuple[int, str]]  # number of images, SHA-1; the last is for the test
    label_bytes: int  # of a record; the last of them is the label
    python_labels: str  # the name of the labels in a pickle

    @property
    def torchvision(self) -> type:
        """The class of torchvision, with the address and the MD5 of each file for Python."""
        from torchvision import datasets

        return getattr(datasets, self.title.replace("-", ""))

    @property
    def record_bytes(self) -> int:
        """Labels, then the red, green and blue planes."""
        return self.label_bytes + 3 * IMAGE_SIZE**2


RELEASES = {
    "cifar10": Release(
        title="CIFAR-10",
        python_folder="cifar-10-batches-py",
        binary_folder="cifar-10-batches-bin",
        binary_archive="cifar-10-binary.tar.gz",
        binary_md5="c32a1d4ab5d03f1284b67883e8d87530",
        binary_files={
            "data_batch_1.bin": (10_000, "aadd24acce27caa71bf4b10992e9e7b2d74c2540"),
            "data_batch_2.bin": (10_000, "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795"),
            "data_batch_3.bin": (10_000, "1dd00a74ab1d17a6e7d73e185b69dbf31242f295"),
            "data_batch_4.bin": (10_000, "aab85764eb3584312d3c7f65fd2fd016e36a258e"),
            "data_batch_5.bin": (10_000, "26e2849e66a845b7f1e4614ae70f4889ae604628"),
            "test_batch.bin": (10_000, "67eb016db431130d61cd03c7ad570b013799c88c"),
        },
        label_bytes=1,
        python_labels="labels",
    ),
    "cifar100": Release(
        title="CIFAR-100",
        python_folder="cifar-100-python",
        binary_folder="cifar-100-binary",
        binary_archive="cifar-100-binary.tar.gz",
        binary_md5="03b5dce01913d631647c71ecec9e9cb8",
        binary_files={
            "train.bin": (50_000, "e207cd2e05b73b1393c74c7f5e7bea451d63e08e"),
            "test.bin": (10_000, "8fb6623e830365ff53cf14adec797474f5478006"),
        },
        label_bytes=2,  # one of 20 superclasses, then one of 100 classes
        python_labels="fine_labels",
    ),
}
# The fingerprint of the copy that the released networks were trained on. Of its images, 81 for
# training and 23 for the test were decoded from JPEG; the others are the official ones.
APPROXIMATE_COPY = "feb1a89863ee464b208bbb4ee2921ef600c46cbc0372b6b68e8966be7599e65f"

SPLIT_SEED = 0  # of every stratified split; the same in every run, so runs compare
EVAL_BATCH = 100  # images, few enough for a cache

Batch = tuple[Tensor, Tensor, int]  # images, targets (N, C), size of the global batch
Answers = Callable[[Tensor, Tensor], Tensor]  # augmented images and indices to targets (N, C)


@dataclass(frozen=True)
class Split:
    """Labeled images."""

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
    """The splits of a data set, and the facts about it that a checkpoint records."""

    name: str
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]  # per channel, of images scaled to [0, 1]
    std: tuple[float, float, float]
    train: Split
    val: Split  # empty for val_size=0
    test: Split
    fingerprint: str  # SHA-256 of all images and labels that were read, before the validation split
    unofficial: tuple[str, ...] = ()  # files that differ from the official release

    def to(self, device: torch.device) -> "Dataset":
        """The same data on `device`."""
        train, val, test = (split.to(device) for split in (self.train, self.val, self.test))
        return replace(self, train=train, val=val, test=test)

    @cached_property
    def normalize(self) -> "Normalize":
        """The normalization of these images, on their device."""
        return Normalize(self.mean, self.std).to(self.train.labels.device)


class Normalize(nn.Module):
    """RGB in [0, 1], (N, 3, S, S), to about zero mean and unit variance, as the networks take it.

    Args:
        mean, std: per channel, of images scaled to [0, 1].
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # Whatever defaults the user's program has set.
        make = partial(torch.tensor, dtype=torch.float32, device="cpu")
        self.register_buffer("mean", make(mean)[:, None, None], persistent=False)
        self.register_buffer("std", make(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(images - mean) / std."""
        return (images - self.mean) / self.std


# ---------------------------------------------------------------- batches


def train_batches(
    data: Dataset,
    config: Config,
    epoch: int,
    first_step: int = 0,
    answers: Answers | None = None,
) -> Iterator[Batch]:
    """Yield an epoch's batches: augmented, normalized images, their targets, the global batch size.

    A target is a probability for each class: the label, smoothed, or the answer of a teacher. The
    last batch holds what is left over (config.left_over). Under torchrun each process gets every
    n-th image of each global batch, augmented as it would be in one process.

    Args:
        epoch: from 1.
        first_step: the step to begin with, from 0.
        answers: the targets of the teacher for the images of this epoch.
    """
    num_images, device = len(data.train), data.train.labels.device
    labels = soft_labels(data.train.labels, config)
    views = augment.apply_policy(config, data.train.images, view_of(config, epoch))  # all at once
    order = epoch_order(config, num_images, epoch)
    # The draws of an epoch go to the device at once, so that no step waits for a transfer.
    order, *draws = (values.to(device) for values in (order, *augment.draw(config, order, epoch)))
    for step in range(first_step, steps_per_epoch(config, num_images)):
        start = step * config.batch_size
        stop = min(start + config.batch_size, num_images)
        share = slice(start + rank(), stop, num_processes())
        chosen = order[share]
        drawn = [values[share] for values in draws]
        images = augment.apply(config, views[chosen], drawn, data.normalize)
        targets = answers(images, chosen) if answers else labels[chosen]
        images = augment.shrink(config, images, image_size(config, epoch))
        if config.mixing:
            images, targets = augment.mix(config, images, targets, epoch, step)
        yield images, targets, stop - start


def epoch_order(config: Config, num_images: int, epoch: int) -> Tensor:
    """The indices of all training images in the order of an epoch (from 1), (N,)."""
    return torch.randperm(num_images, generator=generator("order", config.seed, epoch))


def soft_labels(labels: Tensor, config: Config) -> Tensor:
    """(N,) labels to (N, C) probabilities; `label_smoothing` is spread evenly over all classes."""
    hard = F.one_hot(labels, config.num_classes).float()
    return hard * (1 - config.label_smoothing) + config.label_smoothing / config.num_classes


# ---------------------------------------------------------------- loading


def class_names_of(config: Config) -> tuple[str, ...]:
    """The class names of a configuration's data set, by listing folders, without reading images.

    Raises:
        InputError: there is no such data set, or the class folders are wrong (engine/folders.py).
    """
    check_fields(config)
    if config.dataset == "folder":
        from engine.folders import class_names, find_splits  # torch.hub lacks their libraries

        return class_names(find_splits(expanded(config.data_dir))[0])
    return tuple(FACTS[config.dataset][0])


def load_data_of(path: Path, info: dict[str, object], data_dir: str, download: bool) -> Dataset:
    """Load the data set that a network was trained on, by the metadata of its file.

    Another copy of it is reported.

    Args:
        path: of the network, for the messages.
        data_dir: where the data is; "" for `data`, or where the user's own pictures were.

    Raises:
        InputError: the pictures have moved, their classes are others, or as in `load_dataset`.
    """
    trained_in = info.get("data_dir")
    # Path.exists raises if a folder above may not be searched, as in another user's home.
    if not data_dir and trained_in and not os.path.exists(trained_in):  # noqa: PTH110
        raise InputError(
            f"data_dir: {trained_in}, whose pictures {path} was trained on, does not exist; name"
            " the folder where they are now with --data-dir"
        )
    data_dir = data_dir or trained_in or Config.data_dir
    config = Config(dataset=info.get("dataset"), data_dir=data_dir, download=download)
    check_classes(path, info, config.dataset, class_names_of(config))
    data = load_dataset(config)
    check_data(path, info, data)
    return data


def check_data(path: Path, info: dict[str, object], data: Dataset) -> None:
    """Raise InputError if the network has other classes than `data`; report another copy of it."""
    check_classes(path, info, data.name, data.class_names)
    trained_with = info.get("data_fingerprint")
    # A search reads no test images, so the fingerprint of its networks is that of the others.
    if trained_with == data.fingerprint or trained_with == fingerprint(data.train):
        return
    if data.name == "folder":
        warn(
            f"the pictures are not those that {path} was trained with; some that it was trained on"
            " may be in the test now"
        )
        return
    theirs = "official" if info.get("unofficial_data_files") == [] else trained_with
    ours = data.fingerprint if data.unofficial else "official"
    if {theirs, ours} == {"official", APPROXIMATE_COPY}:
        print(
            f"{printable(path.as_posix())}: trained on another copy of CIFAR-10; 104 of the 60,000"
            " images, 23 of them in the test set, differ slightly"
        )
    else:
        warn(f"this copy of {data.name} is not the one that {path} was trained with")


def check_classes(
    path: Path, info: dict[str, object], dataset: str, class_names: Sequence[str]
) -> None:
    """Raise InputError if a network has other classes than a data set."""
    if info["class_names"] != list(class_names):
        source, remedy = dataset, "name another checkpoint"
        if dataset == "folder":
            source = "the folders of the pictures"
            remedy = "name its own pictures with --data-dir, or another checkpoint"
        raise InputError(f"checkpoint: {path} has other classes than {source}; {remedy}")


def load_dataset(config: Config, test: bool = True) -> Dataset:
    """Load the data set of a configuration and split it.

    `data_dir` holds pictures of the user's own, or CIFAR, which is downloaded into it if need be;
    the digits come with scikit-learn. `val_size` images are set aside, and `train_size` of the
    others are kept, with the same share of every class.

    Args:
        test: read the test images; otherwise the test split is empty.

    Raises:
        InputError: a file is missing, damaged or foreign, or a size is out of range.
    """
    check_fields(config)
    data_dir = expanded(config.data_dir)  # torchvision does so for its download alone
    if config.dataset == "digits":
        dataset = load_digits(test)
    elif config.dataset == "folder":
        dataset = load_folder(data_dir, test)
    else:
        dataset = load_cifar(config.dataset, data_dir, config.download, test)
    return take_training(split_validation(dataset, config.val_size), config.train_size)


def load_cifar(name: str, data_dir: Path, download: bool, test: bool) -> Dataset:
    """Load the unpacked files of CIFAR; without them, first unpack an archive or download it.

    Args:
        name: of RELEASES.
    """
    if data_dir.name in (RELEASES[name].python_folder, RELEASES[name].binary_folder):
        data_dir = data_dir.parent
    try:
        dataset = load_unpacked(name, data_dir, test)
        if dataset is None:
            with one_at_a_time(data_dir):
                dataset = load_unpacked(name, data_dir, test)  # another may have unpacked it
                if dataset is None:
                    unpack_archive(RELEASES[name], data_dir, download)
                    dataset = load_unpacked(name, data_dir, test)
    except OSError as error:
        raise InputError(
            f"data_dir: {error.filename or data_dir} cannot be read or written ({error.strerror});"
            " change that, or name another folder"
        ) from None
    return dataset


def load_unpacked(name: str, data_dir: Path, test: bool) -> Dataset | None:
    """Load the unpacked files in `data_dir`; None if none are there that could be loaded."""
    release = RELEASES[name]
    for folder in places(data_dir, release.binary_folder):
        if any(is_there(folder / file) for file in release.binary_files):
            try:
                return load_binary(name, folder, test)
            except InputError:  # an unpacking that was killed is done again
                from torchvision.datasets import utils  # takes seconds to import

                archive = data_dir / release.binary_archive
                if not utils.check_integrity(archive, release.binary_md5):
                    raise
    for folder in places(data_dir, release.python_folder):
        if not python_damage(release, folder):
            return load_python(name, folder, test)
    return None


def places(data_dir: Path, name: str) -> tuple[Path, ...]:
    """Folders that may hold the files: `name`, also unpacked into its own name, or `data_dir`."""
    return data_dir / name, data_dir / name / name, data_dir


def is_there(path: Path) -> bool:
    """True if `path` exists.

    Raises:
        OSError: a folder above it may not be searched, which `Path.exists` hides in Python 3.14.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process at a time run the block, of all that share the folder, if it has locks.

    Two that download to one file would cut off what the other one has written.
    """
    import filelock

    new = [path for path in (folder, *folder.parents) if not is_there(path)]
    lock = filelock.FileLock(folder / "download.lock", fallback_to_soft=False)
    with contextlib.suppress(OSError):  # the block reports what cannot be written
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            print(f"waiting for another process that downloads to {folder} or unpacks in it")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            (folder / "download.lock").unlink(missing_ok=True)
            for path in new:
                path.rmdir()  # unless there is something in it


def unpack_archive(release: Release, data_dir: Path, download: bool) -> None:
    """Unpack an official archive in `data_dir`; without a sound one, download it.

    Raises:
        InputError: there is none, and it may not or could not be downloaded.
        OSError: it cannot be read or unpacked.
    """
    from torchvision.datasets import utils

    from engine.folders import holds_classes

    official, problems = release.torchvision, []
    archives = (release.binary_archive, release.binary_md5), (official.filename, official.tgz_md5)
    for name, md5 in archives:
        if utils.check_integrity(data_dir / name, md5):
            utils.extract_archive(data_dir / name, data_dir)
            return
        if is_there(data_dir / name):
            problems.append(f"{data_dir / name} is damaged (its MD5 is not the official one)")
    for folder in places(data_dir, release.python_folder):
        if any(is_there(folder / name) for name, _ in official.train_list):
            problems.append(python_damage(release, folder))
    if not problems and holds_classes(data_dir):
        raise InputError(
            f"data_dir: {data_dir} holds no {release.title}, but folders of pictures; train on"
            " those with --dataset folder or the preset mine, or name another folder"
        )
    problem = problems[0] if problems else f"no {release.title} in {data_dir}"
    if download:
        if problems:
            warn(f"data_dir: {problem}; downloading {release.title} again")
        try:
            utils.download_and_extract_archive(official.url, data_dir, md5=official.tgz_md5)
            return
        except (OSError, RuntimeError) as error:
            problem += f", and the download failed ({first_line(error)})"
    raise InputError(
        f"data_dir: {problem}; {'' if download else 'allow its download, or '}put"
        f" {official.filename} (MD5 {official.tgz_md5}) or {release.binary_folder}/ into"
        f" {data_dir}; or run `python train.py demo`, which needs no download"
    )


def python_damage(release: Release, folder: Path) -> str | None:
    """Describe what is wrong with a file of the layout for Python; None if all are official."""
    from torchvision.datasets import utils

    for name, md5 in (*release.torchvision.train_list, *release.torchvision.test_list):
        path = folder / name
        if not is_there(path):
            return f"{path} is missing"
        if not utils.check_integrity(path, md5):
            return f"{path} is damaged (its MD5 is not the official one)"
    return None


def load_python(name: str, folder: Path, test: bool) -> Dataset:
    """Load CIFAR in the layout for Python: pickles, which must be known to be official."""
    release, splits = RELEASES[name], []
    for files in (release.torchvision.train_list, release.torchvision.test_list)[: 1 + test]:
        with warnings.catch_warnings(action="ignore"):  # NumPy 2.4.0 to 2.4.4 warn
            batches = [
                pickle.loads((folder / file).read_bytes(), encoding="latin1") for file, _ in files
            ]
        images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        labels = [label for batch in batches for label in batch[release.python_labels]]
        splits.append(Split(torch.from_numpy(images), torch.tensor(labels)))
    return make_dataset(name, *splits)


def load_binary(name: str, folder: Path, test: bool) -> Dataset:
    """Load CIFAR in the official binary layout: files of records, labels then pixels.

    Files whose SHA-1 is not the official one are reported in a warning, and recorded.
    """
    release = RELEASES[name]
    *training, last = release.binary_files
    groups = (training, [last])[: 1 + test]
    files = {file: read_binary(name, folder / file) for group in groups for file in group}
    unofficial = tuple(
        file
        for file, records in files.items()
        if hashlib.sha1(records, usedforsecurity=False).hexdigest() != release.binary_files[file][1]
    )
    if unofficial:
        warn(
            f"{folder}: {len(unofficial)} of {len(files)} files differ from the official"
            f" {release.title} (SHA-1); recorded with the model"
        )
    splits = []
    for group in groups:
        records = torch.from_numpy(np.concatenate([files[file] for file in group]))
        images = records[:, release.label_bytes :].reshape(-1, 3, 32, 32).contiguous()
        splits.append(Split(images, records[:, release.label_bytes - 1].long()))
    return make_dataset(name, *splits, unofficial=unofficial)


def read_binary(name: str, path: Path) -> np.ndarray:
    """Read the records of a binary file, such as (10000, 3073) uint8.

    Raises:
        InputError: the file cannot be read, is truncated, or holds something else.
    """
    release = RELEASES[name]
    again = f"unpack {release.title}'s binary version there again"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"data_dir: cannot read {path} ({error.strerror}); {again}") from None
    expected = release.binary_files[path.name][0] * release.record_bytes
    if len(content) != expected:
        raise InputError(
            f"data_dir: {path} has {len(content):,} bytes instead of {expected:,}; it is truncated"
            f" or foreign: {again}"
        )
    records = np.frombuffer(bytearray(content), np.uint8).reshape(-1, release.record_bytes)
    labels, highest = records[:, release.label_bytes - 1], len(FACTS[name][0]) - 1
    worst = int(labels.argmax())
    if labels[worst] > highest:
        raise InputError(
            f"data_dir: {path}, record {worst}: label {labels[worst]} is not 0 to {highest};"
            f" {again}"
        )
    return records


def load_digits(test: bool) -> Dataset:
    """1,797 handwritten digits of 8x8 pixels, enlarged to 32x32x3, split 80/20 stratified."""
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)  # (1797, 64), 0 to 16
    small = torch.tensor(pixels.reshape(-1, 1, 8, 8) / 16, dtype=torch.float32)
    large = F.interpolate(small, size=(32, 32), mode="bilinear")
    images = (large * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    train, held_out = stratified(Split(images, torch.tensor(labels)), round(len(labels) / 5))
    return make_dataset("digits", train, held_out if test else None)


def load_folder(data_dir: Path, test: bool) -> Dataset:
    """Load pictures of the user's own from a folder for each class.

    Without test folders, a fifth of each class is set aside. Mean and std are those of the training
    images.
    """
    from engine.folders import find_splits, folders_in, read_splits

    train_folder, test_folder = find_splits(data_dir)
    for name in folders_in(data_dir) if test_folder else ():
        if data_dir / name not in (train_folder, test_folder):
            warn(
                f"{data_dir / name}: not used beside {test_folder.name}; --val-size sets training"
                " images aside"
            )
    names, found = read_splits(train_folder, test_folder, with_test=test)
    every, *tests = (Split(*pair) for pair in found)
    order = random_order(every)
    if test_folder is None:
        held_out = first_fifth(every.labels[order])
        tests = [every[order[held_out]]] if test else []
        order = order[~held_out]
    else:
        tests = [split[random_order(split)] for split in tests]
    train = every[order]
    facts = (names, *mean_and_std(train.images))
    return make_dataset("folder", train, *tests, facts=facts)


def random_order(split: Split) -> Tensor:
    """The indices of all images in the order of the hashes of their pixels.

    The order is random, so that the first images are a sample. It is the same in every run, and new
    pictures do not change that of the others: few move into the test or out of it.
    """
    hashes = [hashlib.sha256(image.numpy()).digest() for image in split.images]
    return torch.tensor(sorted(range(len(hashes)), key=hashes.__getitem__))


def first_fifth(labels: Tensor) -> Tensor:
    """Mark the first fifth of each class, at least one image, (N,) bool."""
    marked = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        (places,) = (labels == label).nonzero(as_tuple=True)
        marked[places[: max(1, round(len(places) / 5))]] = True
    return marked


def mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel over all pixels of (N, 3, S, S) uint8 images, scaled to [0, 1]."""
    sums, squares = torch.zeros(2, 3, dtype=torch.long)  # exact, however many images there are
    for batch in images.split(EVAL_BATCH):
        values = batch.transpose(0, 1).flatten(1).long()
        sums, squares = sums + values.sum(1), squares + (values**2).sum(1)
    number = images[:, 0].numel()
    mean = sums.double() / number
    std = (squares.double() / number - mean**2).clamp(min=1).sqrt()  # of a single color: 1
    return tuple(
        tuple(round(value, 4) for value in (moment / 255).tolist()) for moment in (mean, std)
    )


def make_dataset(
    name: str,
    train: Split,
    test: Split | None = None,
    facts: tuple[Sequence[str], Sequence[float], Sequence[float]] | None = None,
    unofficial: tuple[str, ...] = (),
) -> Dataset:
    """Make a Dataset without a validation split.

    Args:
        facts: class names, mean and std, if they are not among FACTS.
    """
    test = train[:0] if test is None else test
    class_names, mean, std = facts or FACTS[name]
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
    """Move `val_size` training images to the validation split, stratified by class."""
    if val_size == 0:
        return dataset
    check_size("val_size", val_size, dataset)
    train, val = stratified(dataset.train, val_size)
    check_every_class("val_size", val_size, train, dataset, "a smaller one")
    return replace(dataset, train=train, val=val)


def take_training(dataset: Dataset, train_size: int) -> Dataset:
    """Keep `train_size` of the training images, stratified by class; 0 keeps all."""
    if train_size in (0, len(dataset.train)):
        return dataset
    check_size("train_size", train_size, dataset)
    _, train = stratified(dataset.train, train_size)
    check_every_class("train_size", train_size, train, dataset, "a larger one")
    return replace(dataset, train=train)


def check_size(name: str, size: int, dataset: Dataset) -> None:
    """Raise InputError unless both parts of the split can have images of every class."""
    num_classes, num_images = len(dataset.class_names), len(dataset.train)
    numbers = dataset.train.labels.bincount(minlength=num_classes)
    if numbers.min() < 2:
        raise InputError(
            f"{name}: {size}, but there is one training image alone of"
            f" {dataset.class_names[numbers.argmin()]}, which cannot be divided; add some"
        )
    if not num_classes <= size <= num_images - num_classes:
        raise InputError(
            f"{name}: {size} of {num_images:,} training images; use 0, or {num_classes} to"
            f" {num_images - num_classes:,}"
        )


def check_every_class(name: str, size: int, train: Split, dataset: Dataset, remedy: str) -> None:
    """Raise InputError if a split leaves a rare class without an image to train on."""
    numbers = train.labels.bincount(minlength=len(dataset.class_names))
    if numbers.min() == 0:
        raise InputError(
            f"{name}: {size} of {len(dataset.train):,} training images leaves none of"
            f" {dataset.class_names[numbers.argmin()]} to train on; use {remedy}"
        )


def stratified(split: Split, size: int) -> tuple[Split, Split]:
    """Split off `size` images, stratified by class. Returns (rest, split off)."""
    from sklearn.model_selection import train_test_split

    rest, held_out = train_test_split(
        np.arange(len(split)), test_size=size, stratify=split.labels, random_state=SPLIT_SEED
    )
    return split[np.sort(rest)], split[np.sort(held_out)]


def fingerprint(*splits: Split) -> str:
    """SHA-256 of images and labels, the same for the archive and the binary layout."""
    digest = hashlib.sha256()
    for split in splits:
        digest.update(split.images.numpy())
        kind = torch.int16 if (split.labels > 255).any() else torch.uint8
        digest.update(split.labels.to(kind).numpy())
    return digest.hexdigest()
