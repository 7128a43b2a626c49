"""Pictures of your own, in a folder for each class: found, checked and read.

The layout is that of torchvision's ImageFolder: the sorted names of the folders are the classes,
and whatever lies below a class's folder belongs to it. The class folders are in the folder that is
named, or in its train/ and its test/ (or val/).
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from engine.distributed import is_main
from engine.pictures import list_files, picture_suffixes, read_or_explain, reader_threads
from utils import IMAGE_SIZE, InputError, has_control_characters, warn

MAX_CLASSES = 1000
CHUNK = 500  # pictures that are given to the threads at once
VALIDATIONS = {"val", "valid", "validation"}
TESTS = {"test", "testing"} | VALIDATIONS  # no classes
SPLITS = {"train", "training"} | TESTS
LAYOUT = "a folder of pictures for each class"


def find_splits(data_dir: Path) -> tuple[Path, Path | None]:
    """The folders that hold the class folders: those to train on, and those to test on, if any.

    Raises:
        InputError: there is no such folder, or it is divided in another way.
    """
    names = folders_in(data_dir)
    for name in ("train", "test", "val"):
        if (data_dir / name).is_file():
            raise InputError(
                f"data_dir: {data_dir / name} is a file where a folder should be; unpack or remove"
                " it"
            )
    tests = [name for name in ("test", "val") if name in names]
    others = [name for name in names if name not in ("train", "test", "val")]
    unused = tests and all(name.lower() in VALIDATIONS for name in others)
    if "train" in names and (not others or unused):
        return data_dir / "train", data_dir / tests[0] if tests else None
    if "train" in names and tests:
        raise InputError(
            f"data_dir: {data_dir} holds {others[0]} beside train and {tests[0]}; move it into"
            " train, or out of there"
        )
    if names and all(name.lower() in SPLITS for name in names):
        raise InputError(
            f"data_dir: {data_dir} holds {' and '.join(names)}; put the class folders into folders"
            " named train and test (or val)"
        )
    if tests := [name for name in names if name.lower() in TESTS]:
        name = next(name for name in names if name.lower() not in SPLITS)
        raise InputError(
            f"data_dir: {data_dir} holds {tests[0]} beside {name}; put the class folders into a"
            f" folder named train, or move {tests[0]} out of there"
        )
    for name in names:  # "train" may be a class beside others
        folder = data_dir / name
        if name.lower() in SPLITS and folders_in(folder) and not pictures_in(folder):
            other = next(other for other in names if other != name)
            raise InputError(
                f"data_dir: {data_dir} holds {other} beside {name}, whose pictures are in folders;"
                f" name {other} test, or move it out of there; or, if {name} is a class, put its"
                f" pictures into {name} itself"
            )
    return data_dir, None


def holds_classes(data_dir: Path) -> bool:
    """True if each class folder in `data_dir` has pictures, so that it is likely a data set."""
    try:
        folder, _ = find_splits(data_dir)
        return all(pictures_in(folder / name) for name in class_names(folder))
    except (InputError, OSError):  # one cannot be read, such as lost+found
        return False


def pictures_in(folder: Path) -> list[str]:
    """The sorted names of the pictures in `folder` itself.

    Raises:
        OSError: it cannot be read.
    """
    suffixes = picture_suffixes()
    return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in suffixes and p.is_file())


def class_names(folder: Path) -> tuple[str, ...]:
    """The sorted names of the class folders in `folder`.

    Raises:
        InputError: they are not 2 to 1,000, or a name cannot be printed.
    """
    names = folders_in(folder)
    if not names:
        raise InputError(f"data_dir: {folder} holds no class folder; put {LAYOUT} there")
    if len(names) == 1:
        raise InputError(
            f"data_dir: {folder} holds one class folder alone, {names[0]}; add another class"
        )
    if len(names) > MAX_CLASSES:
        raise InputError(
            f"data_dir: {folder} holds {len(names):,} class folders; use 2 to {MAX_CLASSES:,}"
        )
    for name in names:
        if has_control_characters(name):
            raise InputError(
                f"data_dir: {folder} holds a class folder {name!r}, whose name has control"
                " characters or is no UTF-8; rename it"
            )
    return tuple(names)


def folders_in(folder: Path) -> list[str]:
    """The sorted names of the folders in `folder`, but for hidden ones.

    Raises:
        InputError: it is missing, is a file, cannot be read, or holds a link to nothing.
    """
    try:
        paths = [path for path in folder.iterdir() if path.name[0] != "."]
        for path in paths:
            if path.is_symlink() and not path.exists():  # it may be a class
                raise InputError(
                    f"data_dir: {path} is a link to nothing; restore what it leads to, or remove it"
                )
        return sorted(path.name for path in paths if path.is_dir())
    except FileNotFoundError:
        problem = "does not exist"
    except NotADirectoryError:
        problem = "is a file where a folder should be"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    raise InputError(f"data_dir: {folder} {problem}; name a folder that holds {LAYOUT}")


def count_pictures(data_dir: Path) -> dict[str, int]:
    """Count the files of each class that are not in the test folder and look like pictures.

    Raises:
        InputError: there are no class folders.
    """
    train, _ = find_splits(data_dir)
    return {name: len(list_files(train / name)[0]) for name in class_names(train)}


def read_splits(
    train: Path, test: Path | None, with_test: bool
) -> tuple[tuple[str, ...], list[tuple[Tensor, Tensor]]]:
    """Read the class folders to train on and, `with_test`, those to test on, if there are any.

    A file that is no picture, or in no class folder, is left out with a warning.

    Returns:
        The class names, and for each split its images, (N, 3, 32, 32) uint8, and labels, (N,).

    Raises:
        InputError: the folders differ in their classes, or a class has too few pictures.
    """
    names = class_names(train)
    if test and (other := set(names) ^ set(class_names(test))):
        name = min(other)
        has, lacks = (train, test) if name in names else (test, train)
        raise InputError(
            f"data_dir: {has / name} has no counterpart in {lacks}; both must have the same classes"
        )
    splits = [(train, 2), (test, 1)][: 2 if test and with_test else 1]
    listed = [list_classes(folder, names, fewest) for folder, fewest in splits]
    others = [path for _, paths in listed for path in paths]
    for folder, _ in splits:
        warn_of_loose_pictures(folder)
    for path in others:
        warn(f"{path}: is no picture by its name; left out")
    read = [
        read_classes(folder, names, fewest, classes)
        for (folder, fewest), (classes, _) in zip(splits, listed, strict=True)
    ]
    num_files = len(others) + sum(len(files) for classes, _ in listed for files in classes)
    if left_out := num_files - sum(len(labels) for _, labels in read):
        warn(f"data_dir: {left_out:,} of {num_files:,} files are no pictures, and are left out")
    return names, read


def warn_of_loose_pictures(folder: Path) -> None:
    """Warn about pictures beside the class folders in `folder`, which are of no class."""
    if loose := pictures_in(folder):
        pictures = "1 picture is" if len(loose) == 1 else f"{len(loose):,} pictures are"
        warn(f"{folder}: {pictures} beside the class folders, in none ({loose[0]}); left out")


def list_classes(
    folder: Path, names: tuple[str, ...], fewest: int
) -> tuple[list[list[Path]], list[Path]]:
    """List the pictures of each class, and the files of another kind.

    Raises:
        InputError: a class has fewer than `fewest` pictures.
    """
    classes, others = [], []
    for name in names:
        pictures, rest = list_files(folder / name)
        check_number_of_pictures(folder / name, len(pictures), fewest)
        classes.append(pictures)
        others += rest
    return classes, others


def check_number_of_pictures(folder: Path, number: int, fewest: int) -> None:
    """Raise InputError if a class has fewer pictures than `fewest`."""
    if number < fewest:
        holds = "one picture alone" if number else "no picture that can be read"
        raise InputError(
            f"data_dir: {folder} holds {holds}; put at least {fewest} there, or remove the folder"
        )


def read_classes(
    folder: Path, names: tuple[str, ...], fewest: int, classes: list[list[Path]]
) -> tuple[Tensor, Tensor]:
    """Read the pictures of each class: images, (N, 3, 32, 32) uint8, and labels, (N,).

    Raises:
        InputError: fewer than `fewest` of a class can be read.
    """
    files = [path for pictures in classes for path in pictures]
    labels = torch.arange(len(names)).repeat_interleave(torch.tensor(list(map(len, classes))))
    images, errors = read_pictures(files)
    for path, error in zip(files, errors, strict=True):
        if error:
            warn(f"{path}: {error}; left out")
    kept = torch.tensor([error is None for error in errors])
    for name, number in zip(names, labels[kept].bincount(minlength=len(names)), strict=True):
        check_number_of_pictures(folder / name, int(number), fewest)
    return (images, labels) if kept.all() else (images[kept], labels[kept])


def read_pictures(files: list[Path]) -> tuple[Tensor, list[str | None]]:
    """Read pictures on several threads, (N, 3, 32, 32) uint8, with the problem of each, if any."""
    images = torch.zeros(len(files), 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    errors = []
    with (
        warnings.catch_warnings(action="ignore"),  # Pillow's, about oddities of a file
        reader_threads() as readers,
        tqdm(
            total=len(files),
            desc="reading pictures",
            unit="img",
            leave=False,
            dynamic_ncols=True,
            disable=None if is_main() else True,  # None: only in a terminal
        ) as bar,
    ):
        for start in range(0, len(files), CHUNK):
            chunk = files[start : start + CHUNK]
            for i, (image, error) in enumerate(readers.map(read_or_explain, chunk), start):
                errors.append(error)
                if image is not None:
                    images[i] = image
                bar.update()
    return images, errors
