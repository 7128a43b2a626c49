"""The output of a run: plan, progress bar, estimated time, a line per epoch; Weights & Biases."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from config import Config, image_size, images_per_epoch, steps_per_epoch
from data import Dataset
from engine.distributed import compute_dtype, dtype_name, is_main, num_processes
from engine.start import Start
from model import model_cost
from utils import duration, printable, warn

TIMED_STEPS = 4  # after the first two, for the estimate: a proxy learns in one of as many
FINISH_SECONDS = 60  # for Weights & Biases to send the rest
# Unless the environment says otherwise: no lines of its own, no copy of ours, and no reports about
# itself, which at exit wait for a silent server.
WANDB_QUIET = {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_ERROR_REPORTING": "false"}
Row = dict[str, float | None]  # of log.csv


def print_plan(
    config: Config,
    data: Dataset,
    device: torch.device,
    start: Start | None,
    position: str | None,
) -> None:
    """Print what is about to be trained, on what, and from where.

    Args:
        position: of a resumed run, `epoch 3, step 20`; None for a new one.
    """
    cost = model_cost(config)
    print(
        f"{config.name}: {cost.num_params:,} parameters; {cost.macs / 1e6:,.1f} M MACs and"
        f" {cost.activation_bytes / 1e6:,.1f} MB of activations per image"
    )
    print(
        f"{title(config, data)}: {len(data.train):,} training,"
        f" {len(data.val):,} validation and {len(data.test):,} test images"
    )
    if data.name == "folder":
        names = data.class_names
        shown = ", ".join(names) if len(names) <= 20 else f"{names[0]} to {names[-1]}"
        print(printable(f"{len(names):,} classes: {shown}"))
    processes = num_processes()
    number = f" in {processes} processes" if processes > 1 else ""
    dtype = dtype_name(compute_dtype(device, config.bfloat16))
    steps = steps_per_epoch(config, len(data.train))
    print(f"epochs: {config.epochs} of {steps:,} steps, on {device.type}{number}, {dtype}")
    if config.teacher:
        number = config.teacher_views
        views = (
            f"{number} view{'s' * (number > 1)} of each image" if number else "asked in every epoch"
        )
        print(printable(f"teacher: {config.teacher}, {views}"))
    if start:
        other = "" if start.has_classes(data.class_names) else " but the last layer's: new classes"
        print(printable(f"init: the weights of {start.name}{other}"))
    annealed, cycle = config.epochs - config.warmup_epochs, config.restart_epochs
    if config.schedule == "cosine_restarts" and annealed % cycle:
        warn(
            f"restart_epochs: the last cosine is cut off after {annealed % cycle} of its {cycle}"
            f" epochs; use a number that divides {annealed}"
        )
    if position:
        print(f"resume: going on after {position}")
    elif config.resume:
        print("resume: no saved state; starting at the beginning")


def title(config: Config, data: Dataset) -> str:
    """The name of a data set as it is printed; of the user's own pictures, their folder."""
    return printable(config.data_dir) if data.name == "folder" else data.name


class Progress:
    """The bar of an epoch, the estimated time and the line per epoch, from the main process.

    Args:
        num_images: training images.
    """

    def __init__(self, config: Config, num_images: int) -> None:
        self.epochs, self.images_per_epoch = config.epochs, images_per_epoch(config, num_images)
        # The time of an image is proportional to its pixels.
        self._pixels = [image_size(config, epoch) ** 2 for epoch in range(1, config.epochs + 1)]
        self._has_views = config.teacher_views > 0
        self._bar = tqdm(disable=True)
        self._timed: list[tuple[int, float]] = []  # images and end of this process's first steps

    def begin_epoch(self, epoch: int, seen: int) -> None:
        """Show the bar of an epoch (from 1), of which `seen` images are done."""
        self._bar = tqdm(
            total=self.images_per_epoch,
            initial=seen,
            desc=f"epoch {epoch}/{self.epochs}",
            unit="img",
            unit_scale=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {rate_fmt}, {remaining} left{postfix}",
            leave=False,
            dynamic_ncols=True,
            disable=None if is_main() else True,  # None: only in a terminal
        )

    def update(self, num_images: int) -> None:
        """Move the bar on by the images of a step."""
        self._bar.update(num_images)

    def show(self, loss: float, accuracy: float) -> None:
        """Show the running loss and accuracy (percent) beside the bar."""
        self._bar.set_postfix_str(f"loss={loss:.3f}, acc={accuracy:.1f}%")

    def estimate(self, epoch: int, seen: int, num_images: int) -> None:
        """Time a step of `num_images`; after the first few, print how long the rest will take."""
        if len(self._timed) > TIMED_STEPS + 1:
            return
        self._timed.append((num_images, time.perf_counter()))
        if len(self._timed) > TIMED_STEPS + 1 and is_main():
            _, (_, start), *rest = self._timed  # the first step warms up, and its state is saved
            pace = (rest[-1][1] - start) / sum(images for images, _ in rest)
            now, *later = self._pixels[epoch - 1 :]
            left = self.images_per_epoch * (1 + sum(later) / now) - seen
            if left:
                kept = " beside the teacher's answers" if self._has_views else ""
                tqdm.write(f"estimated time on this CPU: {duration(pace * left)}{kept}")
                sys.stdout.flush()  # a file shows it now, not at the end of the epoch

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()

    def print_epoch(self, row: Row) -> None:
        """Print a row of log.csv in one line."""
        width, val = len(str(self.epochs)), ""
        if row["val_loss"] is not None:
            val = f"  val {row['val_loss']:.4f} {row['val_accuracy']:6.2f}%"
        print(
            f"epoch {row['epoch']:{width}}/{self.epochs}  lr {row['lr']:.4f}"
            f"  train {row['train_loss']:.4f} {row['train_accuracy']:6.2f}%{val}"
            f"  {duration(row['seconds'])}",
            flush=True,
        )


# ---------------------------------------------------------------- Weights & Biases


class WandbRun:
    """A Weights & Biases run that can never stop the training.

    The library is imported only if it is used. The first failure, of whatever kind, prints one
    warning and switches it off. What W&B's own environment variables or settings files set, such
    as the project, wins over ours.

    Args:
        mode: `online`, `offline`, `disabled`, or `auto`: as W&B's own settings are, but offline
            instead of online if nobody is logged in; never a prompt.
        folder: the run folder; the library's own files go into `folder/wandb`, or to WANDB_DIR.
        config: shown as the configuration of the run.
        run_id: the id of the run to continue, or None for a new one.
        group: the group of the run, if any.
    """

    def __init__(
        self,
        mode: str,
        folder: Path,
        config: dict[str, object],
        run_id: str | None = None,
        group: str | None = None,
    ) -> None:
        self.id, self.group, self.folder = run_id, group, folder
        self.run = None
        if mode != "disabled":
            self._attempt(self._start, mode, config)

    def _start(self, mode: str, config: dict[str, object]) -> None:
        root = os.environ.get("WANDB_DIR") or self.folder
        # Its service logs to ~/.cache, and to stderr if that cannot be written.
        cache = {"WANDB_CACHE_DIR": str(Path(root).absolute())}
        os.environ.update(WANDB_QUIET | cache | os.environ)
        import wandb

        theirs = wandb.setup().settings  # of WANDB_... and of `wandb offline` and its like
        if mode == "auto":
            mode = theirs.mode
            if mode in ("online", "run", "shared") and not wandb.login(prompt=False, verify=False):
                mode = "offline"
        if mode == "disabled":
            return
        self.run = wandb.init(
            project=theirs.project or "tpsnet",
            name=theirs.run_name or self.folder.name,
            group=theirs.run_group or self.group,
            id=self.id,
            resume="allow",
            reinit="finish_previous",  # of this process, if it failed: it would get these rows, too
            mode=mode,
            dir=root,
            config=config,
            settings=wandb.Settings(
                init_timeout=30,
                finish_timeout=FINISH_SECONDS,  # at exit, too
                finish_timeout_raises=True,
            ),
        )
        self.id, self.files = self.run.id, Path(self.run.sync_dir).parent
        where = f"offline, in {self.files}" if self.run.offline else self.run.url
        print(f"Weights & Biases: run {self.id}, {where}")

    def log(self, row: Row) -> None:
        """Log one row of log.csv."""
        if self.run:
            shown = {key: value for key, value in row.items() if value is not None}
            self._attempt(self.run.log, shown, step=row["epoch"])

    def finish(self, summary: dict[str, float], curves: Path | None) -> None:
        """Log the final figures and the learning curves, if they were drawn, and end the run.

        The library waits for a silent server for FINISH_SECONDS, then gives up.
        """
        if self.run:
            sys.stdout.flush()  # the results come before the wait
            self._attempt(self._finish, summary, curves)

    def _finish(self, summary: dict[str, float], curves: Path | None) -> None:
        import wandb

        if curves:
            self.run.log({"curves": wandb.Image(str(curves))})
        self.run.summary.update(summary)
        try:
            self.run.finish()
        except TimeoutError:
            sync = f"wandb sync --include-online {self.files.as_posix()}"
            raise TimeoutError(f"not all was sent in time; `{sync}` sends it") from None

    def _attempt(self, action: Callable[..., None], *args: object, **options: object) -> None:
        try:
            action(*args, **options)
        except Exception as error:  # whatever it is, a logger must not cost a training run
            # Three lines of a wrong variable's message name it and its value.
            lines = str(error).strip().splitlines()[:3] or [type(error).__name__]
            warn(f"wandb: {' '.join(map(str.strip, lines))}; going on without it")
            self.run = None
