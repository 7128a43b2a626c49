"""What a run leaves on the disk: training state, run folder and its lock; resuming."""

import contextlib
import hashlib
import io
import math
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import torch
from torch import Tensor

import plots
from data import Dataset
from distributed import StopSignals, all_reduce_max, broadcast_from_main, is_main, num_processes
from metrics import LOG_INTERVAL, Metrics, Score
from utils import (
    DivergenceError,
    InputError,
    atomic_path,
    first_line,
    remove_temporaries,
    warn,
    write_csv,
)
from weights import save_model

PREVIOUS = "previous.pt"  # the training state that was saved before the last one
# What a run writes, beside W&B's folder; the state comes first and goes last.
RUN_FILES = (
    *("last.pt", PREVIOUS, "config.json", "log.csv", "model.safetensors", "curves.png"),
    *("model_confusion.png", "model_calibration.png", "model_mistakes.png"),  # by test.py
)
EPOCH_SECONDS = 10  # an epoch that ends sooner after a save is not worth one of its own


# ---------------------------------------------------------------- the training state


def save_state(path: Path, state: dict[str, object]) -> None:
    """Write a training state of tensors and plain values, then its SHA-256, whole or not at all.

    The state that was there becomes `previous.pt`.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()  # not getbuffer: a failed write crashed Python 3.12.1 later
    with (
        atomic_path(path, keep=path.with_name(PREVIOUS)) as temporary,
        temporary.open("wb") as file,
    ):
        file.write(content)
        file.write(hashlib.sha256(content).digest())


def load_state(path: Path) -> dict[str, object]:
    """Read what `save_state` wrote, on the CPU; if it is damaged, the state before.

    Nothing in the file is executed.

    Raises:
        InputError: both are missing, damaged, or hold more than tensors and plain values.
    """
    previous = path.with_name(PREVIOUS)
    if not path.exists() and not previous.exists():
        raise InputError(f"resume: {path} does not exist; train without --resume first")
    with contextlib.suppress(ValueError):
        return read_state(path)
    problem = "is damaged" if path.exists() else "is missing"
    try:
        return read_state(previous)
    except ValueError:
        raise InputError(
            f"resume: {path} {problem} or was not written by train.py, and there is no sound"
            f" {PREVIOUS}; restore a copy of it, train under another --name, or --overwrite it"
        ) from None


def drop_damaged_state(path: Path) -> None:
    """If the state in `path` is damaged or missing, put the previous one there, with a warning.

    Else the next save would make the damaged one the previous one.
    """
    try:
        read_state(path)
    except ValueError:
        problem = "is damaged" if path.exists() else "is missing"
        warn(f"{path} {problem}; going on from {PREVIOUS}, the state that was saved before it")
        path.with_name(PREVIOUS).replace(path)


def tensors_of(state: object) -> Iterator[Tensor]:
    """Every tensor in these nested dictionaries and lists, once."""
    seen, left = set(), [state]
    while left:
        value = left.pop()
        if id(value) in seen:  # a file of a few bytes can name one list a billion times
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple):
            left.extend(value.values() if isinstance(value, dict) else value)


def all_finite(state: object) -> bool:
    """Whether every tensor in these nested dictionaries and lists is finite."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors_of(state))


def read_state(path: Path) -> dict[str, object]:
    """The state in one file.

    Raises:
        ValueError: it is missing, damaged, or holds more than tensors and plain values.
    """
    try:
        content = path.read_bytes()
        content, digest = content[:-32], content[-32:]
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("its SHA-256 is another")
        # torch.save packs nothing: a file that takes more memory than it has bytes is no state.
        with zipfile.ZipFile(io.BytesIO(content)) as records:
            if sum(record.file_size for record in records.infolist()) > len(content):
                raise ValueError("its records unpack to more than the file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles: they are refused
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError("it holds no dictionary")
        if sum(tensor.nbytes for tensor in tensors_of(state)) > len(content):
            raise ValueError("its tensors are larger than the file")
        return state
    except Exception as error:  # whatever a foreign file can raise
        raise ValueError(f"{path}: {first_line(error)}") from None


def has_state(folder: Path) -> bool:
    """Whether there is something to resume."""
    return any((folder / name).exists() for name in ("last.pt", PREVIOUS))


# ---------------------------------------------------------------- the run folder


def load_run(folder: Path, resume: bool, overwrite: bool) -> dict[str, object] | None:
    """The state of the run in `folder` if there is one and it is to be resumed, else None.

    Raises:
        InputError: there is a run that would be overwritten, or its state cannot be read.
    """
    if not (resume and has_state(folder)):
        check_new(folder, resume, overwrite)
        return None
    state = load_state(folder / "last.pt")
    parts = {"config": dict, "data_fingerprint": str, "learner": dict, "metrics": dict}
    if missing := [name for name, kind in parts.items() if not isinstance(state.get(name), kind)]:
        raise InputError(
            f"resume: {folder / 'last.pt'} lacks {', '.join(missing)}; restore a copy of the file,"
            " or train under another --name"
        )
    return state


def check_new(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise InputError if `folder` holds a run that may not be overwritten."""
    found = [name for name in RUN_FILES if (folder / name).exists()]
    if found and not overwrite:
        holds, remedy = "a run already", "add --resume to go on with it, --overwrite to lose it"
        if resume:
            holds, remedy = "a run without its last.pt", "restore that, or --overwrite the run"
        raise InputError(f"name: {folder} holds {holds} ({found[0]}); {remedy}, or another --name")


def check_images(state: dict[str, object], data: Dataset) -> None:
    """Raise InputError if the run was started on other images."""
    if not data.is_known_as(state["data_fingerprint"]):
        raise InputError(
            "data_dir: it holds other images than this run was started on (SHA-256 of all images"
            " and labels); give their --data-dir, or another --name"
        )


def prepare_folder(folder: Path, resumed: bool) -> None:
    """Make the folder, which is locked by now, ready for what is about to be written there."""
    if resumed:
        drop_damaged_state(folder / "last.pt")
        return
    for name in reversed(RUN_FILES):
        (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Have `folder`, made if need be, to ourselves. A lock ends with its process, however it ends.

    Raises:
        InputError: another process has it, or it cannot be written.
    """
    problem, lock = None, filelock.FileLock(folder / "run.lock", blocking=False)
    if is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            remove_temporaries(folder)
        except filelock.Timeout:
            problem = f"name: another process is training in {folder}; give another --name"
        except OSError as error:
            problem = f"name: {folder} cannot be written ({error.strerror})"
    if problem := broadcast_from_main(problem):
        raise InputError(problem)
    try:
        yield
    finally:
        lock.release()


def restore(state: dict[str, object], parts: dict[str, object], folder: Path) -> None:
    """Load a training state into the parts it was taken from.

    Raises:
        InputError: it does not fit them.
    """
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"resume: what is in {folder / 'last.pt'} does not fit ({first_line(error)});"
            " restore a copy of the file, or train under another --name"
        ) from None


def how_to_go_on(resume: bool) -> str:
    """What to do after a stop; a command that resumes (all studies do) is given again as it is."""
    return f"the same command{'' if resume else ' with --resume'} goes on from there"


class Checkpointer:
    """Saves a run: the training state every few minutes, the rest after every epoch.

    Args:
        parts: all that has a state: `learner`, `metrics`, and `proxy` if there is one.
        started: the constants and the data's fingerprint, which --resume compares.
        metadata: of the model file, but for what the training brings.
        save_minutes: between saves of the state.
        stop: tells whether a signal asked to end.
        resume: whether the command goes on by itself when it is given again.
    """

    def __init__(
        self,
        folder: Path,
        parts: dict[str, object],
        started: dict[str, object],
        metadata: dict[str, object],
        save_minutes: float,
        stop: StopSignals,
        resume: bool,
    ) -> None:
        self.folder, self.parts, self.started, self.metadata = folder, parts, started, metadata
        self.save_minutes, self.stop, self.saved_at = save_minutes, stop, 0.0
        self.remedy = how_to_go_on(resume)
        self.metrics: Metrics = parts["metrics"]

    def after_step(self) -> None:
        """Save if it is time to.

        Raises:
            StoppedError: a signal asked to end.
        """
        # Processes on GPUs agree now and then whether to save: each time they wait for each other.
        interval = LOG_INTERVAL if torch.cuda.is_available() and num_processes() > 1 else 1
        if self.metrics.step % interval == 0:
            due, number = all_reduce_max(self.is_due(), self.stop.received)
            if due or number:
                self.metrics.synchronize()
                self.save()
            self.end_if_asked(number)

    def after_epoch(self) -> None:
        """Write log.csv, print its new row, and save unless that was done seconds ago.

        Raises:
            StoppedError: a signal asked to end.
        """
        last = self.metrics.epoch == self.metrics.epochs
        due, number = all_reduce_max(last or self.is_due(EPOCH_SECONDS), self.stop.received)
        if due or number:
            self.save()
            self.write_model()
        if is_main():
            try:
                write_csv(self.folder / "log.csv", self.metrics.log)
            except InputError as error:  # on Windows, of a spreadsheet that shows it
                warn(str(error))
            self.metrics.print_epoch()
        self.end_if_asked(number)

    def finish(self, test: Score | None, temperature: float | None) -> None:
        """Write what a finished run leaves."""
        self.write_model(test, temperature)
        if is_main():
            write_csv(self.folder / "log.csv", self.metrics.log)
            plots.learning_curves(self.metrics.log, self.folder / "curves.png", self.folder.name)

    def save(self) -> None:
        """Write the training state.

        Raises:
            DivergenceError: it is not finite, and was not written.
        """
        state = {name: part.state_dict() for name, part in self.parts.items()}
        if not all_finite(state):
            raise DivergenceError(f"{self.metrics}: weights or gradients are not finite")
        if is_main():
            save_state(self.folder / "last.pt", self.started | state)
        self.saved_at = time.monotonic()

    def write_model(self, test: Score | None = None, temperature: float | None = None) -> None:
        """Write the network, with how it did: accuracies in percent; both None until the end."""
        last = self.metrics.log[-1]
        accuracy = {
            "train": last["train_accuracy"],  # as seen while training, augmented
            "val": last["val_accuracy"],
            "test": test and test.accuracy,
        }
        described = self.metadata | {
            "epochs": self.metrics.epoch,
            "accuracy": accuracy,
            "temperature": temperature,  # of the validation images, for calibrated probabilities
        }
        if is_main():
            model = self.parts["learner"].eval_model
            save_model(self.folder / "model.safetensors", model, described)

    def is_due(self, seconds: float = math.inf) -> bool:
        """Whether `save_minutes`, or so many seconds, have passed since the last save."""
        seconds = min(seconds, 60 * self.save_minutes)
        return time.monotonic() - self.saved_at >= seconds

    def end_if_asked(self, number: int) -> None:
        """Raise StoppedError if the number is a signal's; 0 is none."""
        self.stop.raise_if_received(
            f"after {self.metrics}, saved in {self.folder}; {self.remedy}", number
        )

    def while_evaluating(self) -> None:
        """Between two batches of an evaluation, save and end if a signal asked to.

        One process alone: several would have to ask each other each time, and share the work.

        Raises:
            StoppedError: a signal asked to end.
        """
        if self.stop.received and num_processes() == 1:
            if self.metrics.step:  # else the end of the last epoch is saved
                self.save()
            self.end_if_asked(self.stop.received)


@contextlib.contextmanager
def divergence_explained(folder: Path, metrics: Metrics) -> Iterator[None]:
    """In the block, a DivergenceError tells the learning rate too, and what can be done."""
    try:
        yield
    except DivergenceError as error:
        raise DivergenceError(
            f"{error} at lr {metrics.lr:g}; the last good state is {folder / 'last.pt'}; start"
            " again with a lower --lr, under another --name"
        ) from None
