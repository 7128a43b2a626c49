"""The life of one run: its folder and lock, position and log, saves, stops and resuming."""

import contextlib
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import filelock
import torch
from torch import Tensor

from config import PRESETS, Config, check_resumable, record
from data import Batch, Dataset
from engine import plots
from engine.checkpoint import (
    PREVIOUS,
    all_finite,
    load_model,
    load_state,
    save_model,
    save_state,
)
from engine.distributed import (
    all_reduce_max,
    all_reduce_sum,
    barrier,
    broadcast_from_main,
    compute_dtype,
    dtype_name,
    is_main,
    num_processes,
)
from engine.evaluate import Score
from engine.progress import Progress, Row, WandbRun, print_plan
from engine.script import stop_signals
from engine.start import Start
from engine.teacher import Teacher
from learner import Learner, Proxy
from model import Architecture
from utils import (
    CHECKPOINTS,
    DivergenceError,
    InputError,
    StoppedError,
    expanded,
    first_line,
    git_commit,
    library_versions,
    part_of,
    remove_temporaries,
    rename,
    warn,
    write_csv,
    write_json,
)

# Everything in a run folder but wandb/ and the lock. The state, named first, is deleted last.
RUN_FILES = (
    *("last.pt", PREVIOUS, "config.json", "log.csv", "model.safetensors", "curves.png"),
    *("model_confusion.png", "model_calibration.png", "model_mistakes.png"),  # by test.py
)
EPOCH_SECONDS = 10  # no state is written at the end of an epoch so soon after another one
LOG_INTERVAL = 20  # steps between reads of the running loss, each of which waits for the device


class Run:
    """A run in checkpoints/NAME, new or resumed.

    The constructor reads the saved state, if it is to be resumed, and checks that it fits the
    constants. It changes nothing on the disk.

    Args:
        report: called with the rows of log.csv after every epoch, and at once for a resumed run.

    Attributes:
        log: a row for each whole epoch, as in log.csv.
        step: steps of the current epoch; `seen` (images), `loss`, `correct` and `seconds` are sums
            over them.

    Raises:
        InputError: the run may not be overwritten, its state cannot be read, or it was started with
            other constants.
    """

    def __init__(self, config: Config, report: Callable[[list[Row]], None] | None = None) -> None:
        self.config, self.report = config, report
        self.folder = CHECKPOINTS / config.name
        self.log: list[Row] = []
        self.step = 0
        self.seen = 0
        self.loss = 0.0
        self.correct = 0.0
        self.lr = 0.0  # at the start of the epoch
        self.seconds = 0.0
        self.wandb: WandbRun | None = None  # in the main process
        self.wandb_id: str | None = None
        self._unread: list[Tensor] = []  # (loss, correct) of the newest steps, on the device
        self._has_learned = False  # in this process
        self._clock = 0.0
        self._saved_at = -math.inf  # by this process
        self._resumed = False
        self._load()

    @property
    def epoch(self) -> int:
        """Whole epochs."""
        return len(self.log)

    def __str__(self) -> str:
        return f"epoch {self.epoch + 1}, step {self.step}" if self.step else f"epoch {self.epoch}"

    # ------------------------------------------------------------ beginning and resuming

    def _load(self) -> None:
        """Load the state to resume, or check that a new run may begin."""
        self._stamp = self._files()
        self._state, self._is_previous = None, False
        path = self.folder / "last.pt"
        if not self.config.resume or not any(p.exists() for p in (path, path.with_name(PREVIOUS))):
            self._check_new()
            return
        self._state, self._is_previous = load_state(path)
        parts = {"config": dict, "data_fingerprint": str, "learner": dict, "metrics": dict}
        lacking = [n for n, kind in parts.items() if not isinstance(self._state.get(n), kind)]
        if lacking:
            raise InputError(
                f"resume: {path} lacks {', '.join(lacking)}; restore a copy of the file, or train"
                " under another --name"
            )
        check_resumable(self.config, self._state["config"], self.folder)

    def _files(self) -> list[tuple]:
        """The files of the run, with what changes when one is written."""
        paths = [self.folder / name for name in RUN_FILES]
        return [(p.name, p.stat().st_ino, p.stat().st_mtime_ns) for p in paths if p.exists()]

    def _check_new(self) -> None:
        if self._stamp and not self.config.overwrite:
            holds, remedy = "a run already", "add --resume to continue it, --overwrite to lose it"
            if self.config.resume:
                holds, remedy = "a run without its last.pt", "restore that, or --overwrite the run"
            found = self._stamp[0][0]
            raise InputError(
                f"name: {self.folder} holds {holds} ({found}); {remedy}, or give another --name"
            )

    @contextlib.contextmanager
    def opened(
        self,
        data: Dataset,
        learner: Learner,
        proxy: Proxy | None = None,
        teacher: Teacher | None = None,
        start: Start | None = None,
    ) -> Iterator[None]:
        """Within the block, the folder is locked, and stop signals are noted.

        A resumed run continues from its saved state. A new one replaces what was in the folder when
        it saves its first state.

        Raises:
            InputError: the folder cannot be written or is in use, or the state does not fit.
            DivergenceError: the loss or the weights are no longer finite; they were not saved.
            StoppedError: a signal asked to end; the state, if there is one, is saved.
        """
        self.data, self.learner = data, learner
        parts = {"learner": learner, "proxy": proxy, "teacher": teacher, "start": start}
        self._parts = {name: part for name, part in parts.items() if part}
        self.progress = Progress(self.config, len(data.train))
        with lock_folder(self.folder), stop_signals:
            if self._files() != self._stamp:  # another process has trained here in the meantime
                self._load()
            self._restore()
            barrier()  # all have read the state before anything is written
            try:
                self._begin()
                yield
            except DivergenceError as error:
                if self._has_state and self.log:
                    self._write_log()
                last = self.folder / "last.pt"
                good = f" the last good state is {last};" if self._has_state else ""
                raise DivergenceError(
                    f"{error} at lr {self.lr:g};{good} start again with a lower --lr, under another"
                    " --name"
                ) from None
            finally:
                self.progress.close()

    def _restore(self) -> None:
        found = self._state and self._state["metrics"]
        if any(all_reduce_max(int(found != broadcast_from_main(found)))):
            raise InputError(
                f"resume: the processes do not find the same state in {self.folder}; the folder"
                " must be one that all nodes share"
            )
        if not self._state:
            return
        if self._state["data_fingerprint"] != self.data.fingerprint:
            raise InputError(
                "data_dir: these are not the images that this run was started on (SHA-256 of all"
                " images and labels); give their --data-dir, or another --name"
            )
        try:
            for name, part in self._parts.items():
                part.load_state_dict(self._state[name])
            for name in (*self._position(), "wandb_id"):
                setattr(self, name, self._state["metrics"][name])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"resume: the state in {self.folder / 'last.pt'} does not fit"
                f" ({first_line(error)}); restore a copy of the file, or train under another --name"
            ) from None

    def _begin(self) -> None:
        """Print the plan. The files of a new run are written with its first state."""
        last, self._resumed = self.folder / "last.pt", self._state is not None
        self._state = None  # its memory is needed
        if is_main():
            git_commit()  # cached now: the commit that the run starts with is recorded
            if self._is_previous:  # or the next save would make the damaged one the previous one
                problem = "is damaged" if last.exists() else "is missing"
                warn(f"{last} {problem}; going on from {PREVIOUS}, the state that was saved before")
                rename(last.with_name(PREVIOUS), last)
            position = str(self) if self.epoch or self.step else None
            device, start = self.data.train.labels.device, self._parts.get("start")
            print_plan(self.config, self.data, device, start, position)
            for part in (start, self._parts.get("teacher")):
                if part:
                    part.warn_of_seen_images(self.data)
            group = self.config.name.rpartition("/")[0] or None
            self.wandb = WandbRun(
                self.config.wandb, self.folder, record(self.config), self.wandb_id, group
            )
        if self.report and self.log:
            self._write_log()  # a kill may have come between the state and its log
            self.report(self.log)

    # ------------------------------------------------------------ an epoch

    def begin_epoch(self) -> int:
        """Start the clock of the next epoch, or of the rest of one; returns its number, from 1."""
        self._clock = time.perf_counter() - self.seconds
        return self.epoch + 1

    def steps(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches of an epoch, or the rest of it; save and stop between two steps.

        Raises:
            DivergenceError, StoppedError: see `opened`.
        """
        if not self.step:
            self.lr = self.learner.lr
        self.progress.begin_epoch(self.epoch + 1, self.seen)
        for batch in batches:
            yield batch
            self._after_step()
        self._read_totals()
        self.progress.close()

    def add(self, totals: Tensor, num_images: int) -> None:
        """Add a step of `num_images` images.

        Args:
            totals: its summed loss and number of correct predictions, (2,), on the device.
        """
        self._has_learned = True
        self.step, self.seen = self.step + 1, self.seen + num_images
        self._unread.append(totals)
        self.progress.update(num_images)
        if self.step % LOG_INTERVAL == 0:
            self._read_totals()
            self.progress.show(self.loss / self.seen, 100 * self.correct / self.seen)
        if totals.device.type == "cpu":
            self.progress.estimate(self.epoch + 1, self.seen, num_images)

    def _read_totals(self) -> None:
        """Add up the totals of the newest steps, which waits for the device.

        They are added one by one, so that the sums do not depend on when this is called.
        """
        self.seconds = time.perf_counter() - self._clock
        if not self._unread:
            return
        unread = all_reduce_sum(torch.stack(self._unread)).tolist()
        first = self.step - len(unread) + 1
        self._unread.clear()
        for step, (loss, correct) in enumerate(unread, start=first):
            if not math.isfinite(loss):
                raise DivergenceError(f"epoch {self.epoch + 1}, step {step}: the loss is {loss}")
            self.loss, self.correct = self.loss + loss, self.correct + correct

    def _after_step(self) -> None:
        """Save if it is time to, and end if a signal asked to."""
        # Processes on GPUs agree only now and then, because they wait for each other to do so.
        on_gpu = self.data.train.labels.device.type == "cuda"
        interval = LOG_INTERVAL if on_gpu and num_processes() > 1 else 1
        if self.step % interval == 0:
            due, number = all_reduce_max(self._is_due(), stop_signals.received)
            if due or number:
                self._read_totals()
                self._save()
            self._end_if_asked(number)

    def end_epoch(self, val: Score | None) -> None:
        """Log the epoch; save the state, network and log, unless it was done just before; report.

        Args:
            val: how the network does on the validation images, if there are any.

        Raises:
            DivergenceError, StoppedError: see `opened`.
        """
        row = {
            "epoch": self.epoch + 1,
            "lr": self.lr,
            "train_loss": self.loss / self.seen,
            # Percent of the augmented images; with a teacher, agreement with its likeliest class.
            "train_accuracy": 100 * self.correct / self.seen,
            "val_loss": val and val.loss,
            "val_accuracy": val and val.accuracy,
            "seconds": time.perf_counter() - self._clock,
        }
        self.log.append(row)
        self.step, self.seen, self.loss, self.correct, self.seconds = 0, 0, 0.0, 0.0, 0.0
        last = self.epoch == self.config.epochs
        due, number = all_reduce_max(last or self._is_due(EPOCH_SECONDS), stop_signals.received)
        if due or number:
            self._save()
            self._write_model()
        if due or self.report:  # whoever gets the report may end the process
            self._write_log()
        if is_main():
            self.wandb.log(row)
            self.progress.print_epoch(row)
        self._end_if_asked(number)
        if self.report:
            self.report(self.log)

    def finish(self, test: Score | None, temperature: float | None) -> None:
        """Write the network with its test result, the log and the curves; print the result."""
        self._write_model(test, temperature)
        self._write_log()
        if not is_main():
            return
        if test:
            print(f"test accuracy: {test}")
        curves = self.folder / "curves.png"
        try:
            plots.learning_curves(self.log, curves, self.folder.name)
        except InputError as error:  # on Windows, if a viewer has it open
            warn(f"no figure: {error}")
            curves = None
        summary = {"test_loss": test.loss, "test_accuracy": test.accuracy} if test else {}
        self.wandb.finish(summary, curves)

    # ------------------------------------------------------------ saving and stopping

    @property
    def _has_state(self) -> bool:
        """True if the folder holds a state of this run."""
        return self._resumed or self._saved_at > -math.inf

    def _position(self) -> dict[str, object]:
        names = ("log", "step", "seen", "loss", "correct", "lr", "seconds")
        return {name: getattr(self, name) for name in names}

    def _save(self) -> None:
        """Write last.pt, unless the state is not finite.

        The first state of a new run replaces what was in the folder. So a run that ends before its
        first step is none, and the run that it was to overwrite is left as it was; also if that
        state cannot be written.
        """
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        if not all_finite(parts):
            raise DivergenceError(f"{self}: weights or gradients are not finite")
        if is_main():
            started = {"config": record(self.config), "data_fingerprint": self.data.fingerprint}
            position = self._position() | {"wandb_id": self.wandb.id}
            save_state(self.folder / "last.pt", started | {"metrics": position} | parts)
            if not self._has_state:
                self.remove_old_run(but="last.pt")
            if self._saved_at == -math.inf:
                write_json(self.folder / "config.json", started["config"])
        self._saved_at = time.monotonic()

    def remove_old_run(self, but: str = "") -> None:
        """Remove a run's files `but` one, and the W&B logs of others than this run.

        Raises:
            InputError: a state or a network cannot be removed; --resume could take it for new.
        """
        for path in (self.folder / name for name in reversed(RUN_FILES) if name != but):
            try:
                path.unlink(missing_ok=True)
            except PermissionError as error:  # on Windows, if a program has it open
                problem = f"{path}: still that of the old run ({error.strerror})"
                if path.suffix not in (".csv", ".png"):
                    raise InputError(f"{problem}; close the program that has it open") from None
                warn(problem)
        logs = self.folder / "wandb"
        if not logs.is_symlink():
            for log in logs.glob("*run-*"):
                if not (self.wandb and log.name.endswith(f"-{self.wandb.id}")):
                    shutil.rmtree(log, ignore_errors=True)

    def _write_log(self) -> None:
        if is_main():
            try:
                write_csv(self.folder / "log.csv", self.log)
            except InputError as error:  # on Windows, if a spreadsheet has it open
                warn(str(error))

    def _write_model(self, test: Score | None = None, temperature: float | None = None) -> None:
        """Write model.safetensors; the test result and the temperature are None until the end."""
        if not is_main():
            return
        config, data, last, start = self.config, self.data, self.log[-1], self._parts.get("start")
        same = (n for n, preset in PRESETS.items() if same_network(preset, config))
        data_dir = str(expanded(config.data_dir).absolute())
        accuracy = {  # percent
            "train": last["train_accuracy"],  # as in the log: while training
            "val": last["val_accuracy"],
            "test": test and test.accuracy,
        }
        metadata = {
            "preset": next(same, "custom"),  # the preset with this architecture, if there is one
            "dataset": data.name,
            **({"data_dir": data_dir} if data.name == "folder" else {}),
            "class_names": data.class_names,
            "mean": data.mean,
            "std": data.std,
            "seed": config.seed,
            "data_fingerprint": data.fingerprint,
            "teacher_sha256": self._parts["teacher"].sha256 if config.teacher else None,
            **({"init": {"name": start.name, "sha256": start.sha256}} if start else {}),
            "unofficial_data_files": data.unofficial,
            **self._origin(),
            "config": record(config),
            "epochs": self.epoch,
            "accuracy": accuracy,
            "temperature": temperature,  # fitted to the validation images
        }
        save_model(self.folder / "model.safetensors", self.learner.eval_model, metadata)

    def _origin(self) -> dict[str, object]:
        """Precision, versions and commit of the training; kept if it is only tested again."""
        dtype = compute_dtype(self.data.train.labels.device, self.config.bfloat16)
        origin = {
            "trained_in": dtype_name(dtype),
            "versions": library_versions(),
            "git_commit": git_commit(),
        }
        if not self._has_learned:
            with contextlib.suppress(InputError):
                _, before = load_model(self.folder / "model.safetensors")
                origin |= {name: before[name] for name in origin if name in before}
        return origin

    def _is_due(self, seconds: float = math.inf) -> bool:
        """True if `save_minutes`, or `seconds` if that is less, have passed since the last save."""
        seconds = min(seconds, 60 * self.config.save_minutes)
        return time.monotonic() - self._saved_at >= seconds

    def _end_if_asked(self, number: int) -> None:
        """Raise StoppedError if `number` is that of a signal; 0 is none."""
        if not number:
            return
        if self._has_state and self.log:
            self._write_log()
        where, remedy = f"after {self}, saved in {self.folder}", how_to_go_on(self.config)
        if not self._has_state:
            where = "before the first step"
            if self._stamp:  # --resume would go on with the old run, which is left
                remedy = "the same command starts it again"
        end_by_signal(number, f"{where}; {remedy}")

    def stop_if_asked(self) -> None:
        """Save and end if a signal asked to, between two batches of an evaluation or a teacher.

        Only in a single process: several would have to agree, and wait for each other, every time.

        Raises:
            StoppedError: the state, if there is one, is saved.
        """
        if stop_signals.received and num_processes() == 1:
            if self.step or 0 < self.epoch < self.config.epochs:  # the last epoch's end is saved
                self._save()
            self._end_if_asked(stop_signals.received)


def remove_runs(runs: list[Run]) -> None:
    """Remove the old runs in the folders of several runs that overwrite them.

    All before the first training: after a stop, --resume would take one that is left for its own.

    Raises:
        InputError: one of the folders is in use, or cannot be written, and nothing was removed; or
            an old state cannot be removed.
    """
    with contextlib.ExitStack() as locks:
        for run in runs:
            locks.enter_context(lock_folder(run.folder))
        if is_main():
            for run in runs:
                run.remove_old_run()
        barrier()


def same_network(one: Config, other: Config) -> bool:
    """True if two configurations have the same network but for the number of classes."""
    one = replace(one, num_classes=other.num_classes)
    return part_of(one, Architecture) == part_of(other, Architecture)


def how_to_go_on(config: Config) -> str:
    """The advice printed after a stop. A command that resumes is simply given again."""
    added = " with --resume in place of --overwrite" if config.overwrite else " with --resume"
    return f"the same command{'' if config.resume else added} goes on from there"


def end_by_signal(number: int, where: str) -> None:
    """Raise StoppedError for the signal `number`; `where` ends its message."""
    cause = "the end of torchrun" if stop_signals.orphaned else signal.Signals(number).name
    raise StoppedError(number, f"stopped by {cause} {where}")


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Create `folder` and lock it for the block.

    The operating system releases the lock when the process ends, even if it is killed. On a file
    system without locks filelock would make a file instead, which a killed process leaves behind.

    Raises:
        InputError: another process holds the lock, or the folder cannot be written or locked.
    """
    problem, is_new = None, not folder.exists()
    lock = filelock.FileLock(folder / "run.lock", blocking=False, fallback_to_soft=False)
    if is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            remove_temporaries(folder)
        except filelock.Timeout:
            problem = f"name: another process is training in {folder}; give another --name"
            tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
            if tasks != "1" and num_processes() == 1:
                problem += (
                    f"; if it is another of srun's {tasks} tasks, use --ntasks=1, or torchrun"
                )
        except OSError as error:
            problem = f"name: {folder} {why_unusable(folder, error)}"
            if is_new:
                with contextlib.suppress(OSError):
                    (folder / "run.lock").unlink(missing_ok=True)
                    folder.rmdir()
    if problem := broadcast_from_main(problem):
        raise InputError(problem)
    try:
        yield
    finally:
        lock.release()


def why_unusable(folder: Path, error: OSError) -> str:
    """Explain why a folder cannot be created, written or locked, with the remedy."""
    for path in (folder, *folder.parents):
        if path.is_symlink() and not path.exists():
            to = path.readlink()
            return f"cannot be written: {path} is a link to {to}, which is missing; create that"
    return (
        f"cannot be written and locked ({error.strerror}); set the environment variable"
        " TPSNET_CHECKPOINTS to another folder for all runs"
    )
