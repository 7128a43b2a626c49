"""What is measured and shown: accuracy, calibration, the running metrics of an epoch, W&B."""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from distributed import StopSignals, all_reduce_sum, is_main, num_processes, rank
from utils import DivergenceError, duration, first_line, warn
from weights import TEMPERATURES

EVAL_BATCH = 500  # images; one size everywhere, so that all scripts agree to rounding
CALIBRATION_BINS = 15  # as in Guo et al., arXiv:1706.04599
LOG_INTERVAL = 20  # steps between looks at the running loss: each look waits for the device
TIMED_STEPS = 4  # after the first one, to estimate the whole time: a proxy learns in one of them
FINISH_SECONDS = 60  # for W&B to send the rest: a server that says nothing, it tries for ever
LET_GO_SECONDS = 1  # more, or after a signal
# No lines of its own, and no reports about itself: these wait at exit for a silent server, too.
WANDB_QUIET = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
Row = dict[str, float | None]  # of log.csv


# ---------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    images: Tensor,
    normalize: Callable[[Tensor], Tensor],
    flip_tta: bool = False,
    after_batch: Callable[[], None] | None = None,
) -> Tensor:
    """Logits of every image, (N, num_classes) float32, on the images' device.

    Under torchrun each process takes every n-th batch and all get all logits: on CPUs the same to
    the last bit for any number of processes, since the batches are the same.

    Args:
        model: a `ResNet`; evaluated in eval mode, and put back into the mode that it was in.
        images: (N, 3, 32, 32) uint8.
        normalize: turns uint8 images into what the model takes.
        flip_tta: average the logits with those of the mirrored images (test-time augmentation).
        after_batch: called after each batch, and may end it all by an exception.
    """
    was_training = model.training
    model.eval()
    logits = torch.zeros(len(images), model.linear.out_features, device=images.device)
    batches = list(zip(images.split(EVAL_BATCH), logits.split(EVAL_BATCH), strict=True))
    for batch, out in batches[rank() :: num_processes()]:
        x = normalize(batch)
        out.copy_((model(x) + model(x.flip(-1))) / 2 if flip_tta else model(x))
        if after_batch:
            after_batch()
    model.train(was_training)
    return all_reduce_sum(logits)


@dataclass(frozen=True)
class Score:
    """How a model did on a labelled set."""

    loss: float  # mean cross entropy, nats
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Top-1, in percent."""
        return 100 * self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95% confidence interval of the accuracy, in percent (Wilson's score interval, 1927)."""
        z, n, p = 1.959964, self.total, self.correct / self.total
        center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return 100 * (center - half), 100 * (center + half)

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.accuracy:.2f}% ({self.correct:,} of {self.total:,};"
            f" 95% interval {low:.2f} to {high:.2f}), loss {self.loss:.4f}"
        )


def score(logits: Tensor, labels: Tensor) -> Score:
    """Mean cross entropy and top-1 of (N, num_classes) logits against (N,) labels."""
    correct = (logits.argmax(1) == labels).sum().item()
    return Score(F.cross_entropy(logits, labels).item(), correct, len(labels))


@dataclass(frozen=True)
class Calibration:
    """Images in bins of equal width by confidence, which is the probability of the prediction."""

    count: np.ndarray  # (CALIBRATION_BINS,) images in each bin
    confidence: np.ndarray  # (CALIBRATION_BINS,) their mean confidence, percent; 0 if empty
    accuracy: np.ndarray  # (CALIBRATION_BINS,) how many of them are right, percent; 0 if empty

    @property
    def mean_confidence(self) -> float:
        """Mean confidence of all images, percent; over the accuracy if the model is too sure."""
        return float(np.average(self.confidence, weights=self.count))

    @property
    def error(self) -> float:
        """Expected calibration error: the gap between the two, in points, mean of the images."""
        return float(np.average(np.abs(self.accuracy - self.confidence), weights=self.count))

    def __str__(self) -> str:
        return f"{self.error:.2f} points (mean confidence {self.mean_confidence:.2f}%)"


def calibrate(logits: Tensor, labels: Tensor) -> Calibration:
    """How far a model's probabilities can be believed (Guo et al., arXiv:1706.04599)."""
    confidence, predicted = logits.cpu().double().softmax(1).max(1)
    right = predicted == labels.cpu()
    # Bins are closed above, so that certainty falls into the last one.
    place = (confidence * CALIBRATION_BINS).ceil().long().clamp(1) - 1
    count = np.bincount(place, minlength=CALIBRATION_BINS)
    means = (
        100 * np.bincount(place, values, CALIBRATION_BINS) / count.clip(1)
        for values in (confidence, right)
    )
    return Calibration(count, *means)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The number that logits are divided by, so that their softmax can be believed.

    It has the least cross entropy on these images, which must not be those that the network was
    trained on (temperature scaling; Guo et al., arXiv:1706.04599).
    """
    logits, labels = logits.cpu().double(), labels.cpu()
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS([log_scale], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        lbfgs.zero_grad()
        value = F.cross_entropy(logits * log_scale.exp(), labels)
        value.backward()
        return value

    lbfgs.step(loss)
    low, high = TEMPERATURES  # where every image is right, ever lower ones are better
    return min(max(math.exp(-log_scale.item()), low), high)


# ---------------------------------------------------------------- running metrics


class Metrics:
    """Position of a run and its running metrics: what log.csv, the progress bar and W&B show."""

    def __init__(self, images_per_epoch: int, pixels: list[int]) -> None:
        self.epochs, self.images_per_epoch = len(pixels), images_per_epoch
        self.pixels = pixels  # of an image, by epoch: what its time is proportional to
        self.wandb: WandbRun | None = None
        self.log: list[Row] = []  # a row per whole epoch
        self.step = 0  # steps taken since
        self.seen = 0  # images trained on in these steps
        self.loss = 0.0  # summed over these images
        self.correct = 0.0  # how many of them were classified right
        self.lr = 0.0  # at the start of the epoch
        self.seconds = 0.0  # that these steps took
        self._unread: list[Tensor] = []  # (loss, correct) of the newest steps, on the device
        self._bar, self._clock = tqdm(disable=True), 0.0
        self._timed: list[tuple[int, float]] = []  # images and end of this process's first steps

    STATE = ("log", "step", "seen", "loss", "correct", "lr", "seconds")

    @property
    def epoch(self) -> int:
        """Whole epochs."""
        return len(self.log)

    def __str__(self) -> str:
        return f"epoch {self.epoch + 1}, step {self.step}" if self.step else f"epoch {self.epoch}"

    @contextlib.contextmanager
    def running(self, lr: float) -> Iterator[None]:
        """In the block an epoch is trained, or the rest of it: the clock runs, the bar is shown."""
        self.lr = self.lr if self.step else lr
        self._clock = time.perf_counter() - self.seconds
        with tqdm(
            total=self.images_per_epoch,
            initial=self.seen,
            desc=f"epoch {self.epoch + 1}/{self.epochs}",
            unit="img",
            unit_scale=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {rate_fmt}, {remaining} left{postfix}",
            leave=False,
            dynamic_ncols=True,
            disable=None if is_main() else True,  # None: not where the output is no terminal
        ) as self._bar:
            yield
            self.synchronize()

    def update(self, totals: Tensor, num_images: int) -> None:
        """Note a step: its summed loss and how many were right, (2,), left on the device."""
        self.step, self.seen = self.step + 1, self.seen + num_images
        self._unread.append(totals)
        self._bar.update(num_images)
        if self.step % LOG_INTERVAL == 0:
            self.synchronize()
            loss, accuracy = self.loss / self.seen, 100 * self.correct / self.seen
            self._bar.set_postfix_str(f"loss={loss:.3f}, acc={accuracy:.1f}%")
        if totals.device.type == "cpu" and len(self._timed) <= TIMED_STEPS:
            self._estimate(num_images)

    def _estimate(self, num_images: int) -> None:
        """After the first steps, say how long the rest will take at their pace."""
        self._timed.append((num_images, time.perf_counter()))
        if len(self._timed) > TIMED_STEPS and is_main():
            (_, start), *rest = self._timed  # the first one warms up
            pace = (rest[-1][1] - start) / sum(images for images, _ in rest)
            now, *later = self.pixels[self.epoch :]
            left = self.images_per_epoch * (1 + sum(later) / now) - self.seen
            if left:
                tqdm.write(f"estimated time on this CPU: {duration(pace * left)}")
                sys.stdout.flush()  # a file shows it now too, and not at the end of the epoch

    def synchronize(self) -> None:
        """Read what was noted since the last time, which waits for the device.

        One step after the other is added, so that the sums do not depend on when one looks.

        Raises:
            DivergenceError: the loss of a step is not finite.
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

    def end_epoch(self, val: Score | None) -> Row:
        """Turn the running metrics into a row of the log; returns it."""
        row = {
            "epoch": self.epoch + 1,
            "lr": self.lr,
            "train_loss": self.loss / self.seen,
            "train_accuracy": 100 * self.correct / self.seen,  # percent, as trained
            "val_loss": val and val.loss,
            "val_accuracy": val and val.accuracy,
            "seconds": time.perf_counter() - self._clock,
        }
        self.log.append(row)
        self.step, self.seen, self.loss, self.correct, self.seconds = 0, 0, 0.0, 0.0, 0.0
        if self.wandb:
            self.wandb.log(row)
        return row

    def print_epoch(self) -> None:
        """One line of the log."""
        row, width = self.log[-1], len(str(self.epochs))
        val = ""
        if row["val_loss"] is not None:
            val = f"  val {row['val_loss']:.4f} {row['val_accuracy']:6.2f}%"
        print(
            f"epoch {row['epoch']:{width}}/{self.epochs}  lr {row['lr']:.4f}"
            f"  train {row['train_loss']:.4f} {row['train_accuracy']:6.2f}%{val}"
            f"  {duration(row['seconds'])}",
            flush=True,
        )

    def state_dict(self) -> dict[str, object]:
        """What `load_state_dict` needs to be here again."""
        state = {name: getattr(self, name) for name in self.STATE}
        return state | {"wandb_id": self.wandb and self.wandb.id}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Be where `state` was taken."""
        for name in self.STATE:
            setattr(self, name, state[name])


# ---------------------------------------------------------------- Weights & Biases


class WandbRun:
    """A Weights & Biases run that can never stop the training.

    The library is imported only if it is used. The first failure, of whatever kind, prints one
    warning and switches it off.

    Args:
        mode: `auto` (online when logged in, else offline; never a prompt), `online`, `offline`
            or `disabled`.
        folder: the run folder; the library's own files go into `folder/wandb`.
        config: what to show as the run's configuration.
        run_id: the id of the run to go on with, or None for a new one.
        group: what the run is one of, if it is.
    """

    def __init__(
        self,
        mode: str,
        folder: Path,
        config: dict,
        run_id: str | None = None,
        group: str | None = None,
    ) -> None:
        self.id = run_id
        self.group = group
        self.run = None
        if mode != "disabled":
            self._attempt(self._start, mode, folder, config)

    def _start(self, mode: str, folder: Path, config: dict) -> None:
        os.environ.update(WANDB_QUIET | os.environ)
        import wandb

        if mode == "auto":
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        self.run = wandb.init(
            project="tpsnet",
            name=folder.name,
            group=self.group,
            id=self.id,
            resume="allow",
            mode=mode,
            dir=folder,
            config=config,
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=30,
                finish_timeout=FINISH_SECONDS,  # at exit, too
                finish_timeout_raises=True,
            ),
        )
        self.id = self.run.id
        where = self.run.url if mode == "online" else f"offline, in {folder / 'wandb'}"
        print(f"Weights & Biases: run {self.id}, {where}")

    def log(self, row: dict[str, float | None]) -> None:
        """Log one row of log.csv."""
        if self.run:
            metrics = {key: value for key, value in row.items() if value is not None}
            self._attempt(self.run.log, metrics, step=row["epoch"])

    def finish(self, summary: dict[str, float], curves: Path, stop: StopSignals) -> None:
        """Log the final figures and the learning curves, and end the run, within FINISH_SECONDS.

        Args:
            stop: what notes the signals, of which any ends the wait for the server.
        """
        if self.run:
            sys.stdout.flush()  # the results, before what may take its time
            self._attempt(self._finish, summary, curves, stop)

    def _finish(self, summary: dict[str, float], curves: Path, stop: StopSignals) -> None:
        import wandb

        errors = []

        def send() -> None:
            try:
                self.run.log({"curves": wandb.Image(str(curves))})
                self.run.summary.update(summary)
                self.run.finish()
            except Exception as error:
                errors.append(error)

        # In a thread, since finish() goes on waiting after a signal that is only noted.
        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        end = time.monotonic() + FINISH_SECONDS
        while thread.is_alive() and not stop.received and time.monotonic() < end:
            thread.join(0.1)
        thread.join(LET_GO_SECONDS)
        if thread.is_alive():  # else wandb would wait again when Python exits
            teardown = threading.Thread(target=wandb.teardown, daemon=True)
            teardown.start()
            teardown.join(LET_GO_SECONDS)
            errors = [TimeoutError()]
        if errors and isinstance(errors[0], TimeoutError):
            command = f"wandb sync --include-online {(curves.parent / 'wandb').as_posix()}/run-*"
            raise TimeoutError(f"not all was sent in time; `{command}` sends it")
        if errors:
            raise errors[0]

    def _attempt(self, action: Callable[..., None], *args: object, **options: object) -> None:
        try:
            action(*args, **options)
        except Exception as error:  # whatever it is, a logger must not cost a training run
            warn(f"wandb: {first_line(error)}; going on without it")
            self.run = None
