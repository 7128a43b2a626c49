"""Shared helpers: errors and checks, text, whole files, seeds, provenance."""

import contextlib
import csv
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch

IMAGE_SIZE = 32  # pixels, both sides
TEMPORARY = ".tmp-"  # prefix of the folders in which files are written before they are renamed


def expanded(path: str) -> Path:
    """A path whose `~` is the home folder; `~name` stays where there is no such user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # Path.expanduser raises there


CHECKPOINTS = expanded(os.environ.get("TPSNET_CHECKPOINTS") or "checkpoints")  # of runs


# ---------------------------------------------------------------- errors and checks


class InputError(ValueError):
    """Bad input, as one line: `field: value, problem; remedy`."""


class DivergenceError(RuntimeError):
    """Training produced a loss or weights that are not finite."""


class SearchError(RuntimeError):
    """A search cannot continue, or none of its trials succeeded."""


class StoppedError(Exception):
    """A signal ended the training early; the state, if there is one, is saved."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number  # of the signal


class Range(NamedTuple):
    """Inclusive bounds of a dataclass field, `Annotated[int, Range(1)]`, or of its elements."""

    low: float
    high: float | None = None


def check_fields(instance: object) -> None:
    """Raise InputError if a dataclass field is not of its type, its Literal or its Range."""
    for name, hint in get_type_hints(type(instance), include_extras=True).items():
        value = getattr(instance, name)
        kind, *bounds = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        if value is None and NoneType in kinds:
            continue
        if get_origin(kinds[0]) is Literal and value not in get_args(kinds[0]):
            raise InputError(f"{name}: {value!r} is not one of {', '.join(get_args(kinds[0]))}")
        if kind in (bool, str) and not isinstance(value, kind):
            raise InputError(f"{name}: {value!r} must be a {kind.__name__}")
        if not bounds:
            continue
        is_tuple = isinstance(value, tuple)
        if kinds == (tuple[int, ...],) and not is_tuple:
            raise InputError(f"{name}: {value!r} must be a list of integers")
        check = check_number if float in kinds else check_integer
        for number in value if is_tuple and tuple[int, ...] in kinds else (value,):
            check(name, number, *bounds[0])


def check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise InputError, naming the field, unless `value` is an integer from `low` to `high`."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < low or (high is not None and value > high):
        bounds = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{name}: {value!r} must be an integer {bounds}")


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raise InputError, naming the field, unless `value` is a number from `low` to `high`."""
    is_number = isinstance(value, int | float) and type(value) is not bool
    if not (is_number and low <= value <= high):  # nan compares false
        raise InputError(f"{name}: {value!r} must be a number from {low} to {high}")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def has_control_characters(text: str) -> bool:
    """True if the text holds control characters or line separators, or is no UTF-8."""
    return any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in text)


def printable(text: object) -> str:
    """Replace control characters, so that text from a file sends no escape codes to a terminal."""
    return "".join(char if char.isprintable() else "?" for char in str(text))


def quoted(path: Path) -> str:
    """A path as an argument in a command that is printed."""
    return printable(shlex.quote(path.as_posix()))


def print_error(message: str, own: bool = False) -> None:
    """Print one line on stderr, under torchrun only from the first process of each machine.

    Args:
        own: the other processes may not have this error: print it from each, with its rank.
    """
    local_rank = os.environ.get("LOCAL_RANK", "0")
    if own and os.environ.get("WORLD_SIZE", "1") != "1":
        print(printable(f"rank {os.environ.get('RANK')}: {message}"), file=sys.stderr)
    elif not local_rank.isdecimal() or int(local_rank) == 0:  # all report a bad value
        print(printable(message), file=sys.stderr)


def warn(message: str) -> None:
    """Print a one-line warning, once per machine."""
    print_error(f"warning: {message}")


def duration(seconds: float) -> str:
    """Format a time in its natural unit: 4.2 s, 12.3 min, 3.4 h, 5.6 days."""
    for unit, size in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < 100 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def atomic_path(path: str | Path, keep: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path; after the block, flush it to the disk and rename it to `path`.

    Whatever happens, `path` holds all of its old content or all of its new content.

    Args:
        keep: a path to move the old content to; for a moment it is only there.

    Raises:
        InputError: the folder cannot be written, or is full.
    """
    path, folder = Path(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not mkdtemp: on Windows it tries two billion names where it may not write, and what is
        # made in its folder stays closed to other users.
        folder = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        folder.mkdir()
        temporary = folder / path.name
        yield temporary
        flush_to_disk(temporary)
        if keep and path.exists():
            rename(path, keep)
        rename(temporary, path)
        with contextlib.suppress(OSError):  # some network file systems refuse it
            flush_to_disk(path.parent)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or first_line(error)}); what was there"
            " before is intact"
        ) from None
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def check_output(name: str, path: str) -> None:
    """Raise InputError unless the option `name` can write the file `path`; it may be empty.

    A file that is there must have its suffix: in `predict.py --csv *.jpg` the first picture is the
    file.
    """
    if not path:
        return
    file = Path(path)
    if file.is_dir():
        raise InputError(f"{name}: {path} is a folder; name a file")
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise InputError(f"{name}: {path} is a link, pipe or device; name a file")
    if file.exists() and file.suffix.lower() != f".{name}":
        raise InputError(
            f"{name}: {path} is there, and no .{name} file; name another, or remove it"
        )
    check_writable(name, file.parent)


def check_writable(name: str, folder: Path) -> None:
    """Raise InputError unless files can be written into `folder`, which may not be there yet."""
    path = folder.absolute()
    places = (place for place in (path, *path.parents) if os.path.exists(place))  # noqa: PTH110
    there = next(places, path)  # on Windows a whole drive may be missing
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{name}: {there} is no folder that can be written to; name another place")


def rename(path: Path, to: Path) -> None:
    """Rename a file, in place of one that may be there.

    On Windows, wait up to two seconds for a program that has one of the two open: a virus scanner,
    an indexer, a reader.
    """
    for delay in (0.05, 0.1, 0.2, 0.5, 1) if sys.platform == "win32" else ():
        try:
            path.replace(to)
            return
        except PermissionError:
            time.sleep(delay)
    path.replace(to)


def flush_to_disk(path: Path) -> None:
    """Flush a file's content, or a folder's entries, so that they survive a power cut."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened on Windows
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary folders that a killed process left in `folder`."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> object:
    """Read a JSON file in UTF-8, with or without a byte order mark.

    Raises:
        OSError, ValueError: the file cannot be read, is no JSON, or nests too deep.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError("it nests too deep") from None


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    """Write rows with the same keys to a CSV file with a header, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: str | Path) -> list[dict[str, int | float | str | None]]:
    """Read a CSV file with a header; cells become int or float where possible, None if empty."""

    def value(text: str) -> int | float | str | None:
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
        return text or None

    with Path(path).open(newline="", encoding="utf-8") as file:
        return [{name: value(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def part_of(config: object, kind: type) -> object:
    """Build the dataclass `kind` from the fields of the same names in `config`."""
    return kind(**{field.name: getattr(config, field.name) for field in fields(kind)})


# ---------------------------------------------------------------- seeds and provenance


def derive_seed(*key: object) -> int:
    """Derive a 32-bit seed as a pure function of `key`, such as ("augmentation", seed, epoch)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")


def generator(*key: object) -> torch.Generator:
    """Make a CPU random generator whose seed is a pure function of `key`."""
    return torch.Generator().manual_seed(derive_seed(*key))


@functools.cache
def git_commit() -> str:
    """The commit of these scripts, followed by `-dirty` if they were edited; or `unknown`."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = Path(__file__).resolve().parent
    # Neither a repository around this folder nor the one of a git hook that runs this counts.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env["GIT_CEILING_DIRECTORIES"] = str(folder.parent)
    options = {"cwd": folder, "env": env, "capture_output": True, "text": True, "errors": "replace"}
    try:
        answer = subprocess.run(command, **options)
    except OSError:
        return "unknown"
    if remedy := re.search(r"git config .*safe\.directory.*", answer.stderr):
        warn(
            f"git: {folder} belongs to another user, so the commit is recorded as unknown;"
            f" `{remedy.group()}` allows git to read it"
        )
    return answer.stdout.strip() or "unknown"


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that affect a result."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return versions | {name: importlib.metadata.version(name) for name in ("torchvision", "numpy")}
