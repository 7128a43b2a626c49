"""Train a residual network of at most 5 million parameters, by default TPSNet on CIFAR-10.

    python train.py                              # TPSNet: 300 epochs of the paper's recipe
    python train.py model1 --epochs 30 --lr 0.1  # another preset, any constant overridden
    python train.py demo                         # handwritten digits, no download, a minute
    python train.py --config best.json           # the constants that search.py or a run wrote
    torchrun --nproc-per-node 4 train.py         # one process per GPU

A run lives in checkpoints/NAME: config.json, log.csv, curves.png, last.pt (everything --resume
needs; previous.pt is the one before) and model.safetensors (what test.py and load_model need).
"""

import contextlib
import copy
import itertools
import json
import math
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import plots
import utils
from data import Augmentation, Dataset, load_dataset, train_batches
from model import MAX_PARAMS, BasicBlock, ResNet, check_budget, feature_size, model_cost, save_model
from utils import (
    IMAGE_SIZE,
    DivergenceError,
    InputError,
    Score,
    StoppedError,
    check_integer,
    check_number,
    first_line,
)

CHECKPOINTS = Path("checkpoints")
ADAM_BETAS = (0.9, 0.95)
SMALL_SIZE = 28  # pixels; after a whitening stem it pools to 27, 13, 6 and 3, as 32 to 3
PROXY_INTERVAL = 4  # steps: a proxy learns from the first of as many
# What a run writes, beside W&B's folder; the state comes first and goes last.
RUN_FILES = ("last.pt", utils.PREVIOUS, "config.json", "log.csv", "model.safetensors", "curves.png")
EPOCH_SAVE = 10  # seconds: an epoch that ends sooner after a save is not worth one of its own
LOG_INTERVAL = 20  # steps between looks at the running loss: each look waits for the device


@dataclass(frozen=True)
class Config:
    """Every constant of a run. The defaults are the paper's TPSNet and its recipe."""

    # The network: the paper's six free choices
    num_blocks: tuple[int, ...] = (13, 13, 13)
    """Residual blocks in each of the 1 to 4 stages."""
    c1: int = 16
    """Channels after the stem (C1)."""
    width: int = 2
    """Channels of the first stage as a multiple of C1; every further stage doubles them."""
    conv_kernel: int | tuple[int, ...] = 3
    """Kernel size of the blocks' convolutions, odd; one for all stages or one per stage."""
    skip_kernel: int | tuple[int, ...] = 1
    """Kernel size of the projection shortcuts, odd; one for all stages or one per stage."""
    pool_kernel: int = 8
    """Window of the average pooling, in pixels of the last feature map (8x8 for 3 stages)."""
    dropout: float = 0.0
    """Probability of dropping an activation between the two convolutions of a block."""
    classifier_dropout: float = 0.0
    """Probability of dropping a feature before the classifier, the last layer."""
    stem: Literal["conv", "whitening"] = "conv"
    """The first layer: a trained 3x3 convolution, or a frozen 2x2 one that whitens (C1 = 24)."""
    downsample: Literal["stride", "pool"] = "stride"
    """Halve the resolution by a stride, or begin every stage with a convolution and max pooling."""
    zero_gamma: bool = False
    """Begin with blocks that are their shortcuts: the scale of each one's last BN at 0."""
    max_params: int = MAX_PARAMS
    """Refuse a network with more parameters than this."""

    # The data
    dataset: Literal["cifar10", "digits"] = "cifar10"
    """CIFAR-10, or scikit-learn's handwritten digits, which need no download."""
    data_dir: str = "data"
    """Folder that holds CIFAR-10, or receives it."""
    download: bool = True
    """Fetch CIFAR-10 if it is not in data_dir."""
    val_size: int = 0
    """Training images set aside for validation; 0 trains on all of them."""
    train_size: int = 0
    """How many of the other training images to train on, for a quick comparison; 0 for all."""
    auto_augment: bool = False
    """Change every image first by AutoAugment's policy: up to two operations on shape or color."""
    crop_padding: int = 4
    """Pixels of padding on each side before a random 32x32 crop."""
    padding: Literal["zeros", "reflect"] = "zeros"
    """What the padding holds: black, or the image mirrored at its border."""
    rotation: float = 5.0
    """Random rotation, in degrees either way."""
    flip: Literal["none", "random", "alternating"] = "random"
    """Mirror no image, a random half in each epoch, or one half and the other in turn."""
    cutout: int = 0
    """Side of a square that is greyed out in every image, in pixels; 0 for none."""
    small_share: float = 0.0
    """Share of the epochs, the first ones, that see only the central 28x28 pixels of the images."""

    # The recipe
    epochs: int = 300
    """Passes over the training set."""
    batch_size: int = 128
    """Images per step, over all processes together."""
    keep: float = 1.0
    """Share of every batch that is trained on: what a narrow copy of the network finds hardest."""
    optimizer: Literal["sgd", "muon"] = "sgd"
    """SGD, or Muon for the convolutions and Adam for all else."""
    lr: float = 0.01
    """Learning rate of SGD or Muon at the start of the schedule."""
    momentum: float = 0.9
    """Momentum of SGD or Muon."""
    nesterov: bool = False
    """Nesterov's momentum (sgd only: Muon's always is)."""
    weight_decay: float = 5e-4
    """L2 penalty on all parameters (sgd only)."""
    adam_lr: float = 0.005
    """Learning rate of Adam at the start of the schedule (muon only)."""
    label_smoothing: float = 0.0
    """Share of each target spread evenly over all classes."""
    schedule: Literal["cosine", "cosine_restarts", "linear"] = "cosine"
    """Learning rate: a cosine to 0, several with warm restarts, both by the epoch; or a line."""
    restart_period: int = 50
    """Epochs from one warm restart to the next (cosine_restarts only)."""
    warmup: float = 0.0
    """Share of the epochs, the first ones, in which the learning rate rises from 0."""
    asam: float = 0.0
    """Radius of adaptive sharpness-aware minimisation, which doubles a step's time; 0 for none."""
    ema: float = 0.0
    """Keep, test and save a moving average of the weights, with this decay; 0 for the last ones."""

    # The run
    name: str = "tpsnet"
    """Folder of the run: checkpoints/NAME; GROUP/NAME makes it one of a group."""
    seed: int = 0
    """Decides the initial weights, the order of the images, the augmentation and the dropout."""
    seeds: int = 1
    """Networks to train one after the other, as NAME-0, NAME-1 and so on, with seeds from SEED."""
    resume: bool = False
    """Go on with the run in checkpoints/NAME from its last saved step."""
    overwrite: bool = False
    """Remove the run that is in checkpoints/NAME and start anew."""
    save_every: float = 5.0
    """Minutes between saves of the training state, beside those at epochs' ends; 0: each step."""
    bfloat16: bool = True
    """Compute in bfloat16 where the device is faster at it; weights and loss stay float32."""
    deterministic: bool = False
    """Same bits in every run on a GPU too, by slower kernels; a CPU's are always the same."""
    compile: bool = False
    """Run the network through torch.compile: a minute's wait, then faster steps on a GPU."""
    limit_steps: int = 0
    """Stop every epoch after this many steps, to rehearse a run; 0 for no limit."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; auto is online when logged in, else offline, and never asks."""

    def architecture(self) -> dict[str, object]:
        """The arguments of `ResNet`."""
        return {
            "num_blocks": self.num_blocks,
            "c1": self.c1,
            "width": self.width,
            "conv_kernel": self.conv_kernel,
            "skip_kernel": self.skip_kernel,
            "pool_kernel": self.pool_kernel,
            "dropout": self.dropout,
            "num_classes": 10,  # of CIFAR-10 and of the digits
            "stem": self.stem,
            "downsample": self.downsample,
            "classifier_dropout": self.classifier_dropout,
        }


PRESETS = {
    "tpsnet": Config(),
    "model1": Config(name="model1", num_blocks=(3, 3, 3), c1=34),
    "model2": Config(name="model2", num_blocks=(7, 7, 7), c1=22),
    "fast": Config(
        name="fast",
        num_blocks=(1, 1, 1),
        c1=24,
        width=4,
        stem="whitening",
        downsample="pool",
        pool_kernel=3,
        padding="reflect",
        rotation=0.0,
        flip="alternating",
        cutout=12,
        small_share=0.72,
        epochs=84,
        batch_size=2000,
        keep=0.5,
        optimizer="muon",
        lr=0.15,
        momentum=0.6,
        label_smoothing=0.2,
        schedule="linear",
    ),
    "best": Config(
        name="best",
        num_blocks=(4, 5, 3),
        c1=64,
        width=1,
        zero_gamma=True,
        rotation=0.0,
        auto_augment=True,
        cutout=8,
        lr=0.2,
        nesterov=True,
        warmup=0.02,
        ema=0.999,
    ),
    "demo": Config(
        name="demo",
        num_blocks=(1, 1, 1),
        c1=8,
        dataset="digits",
        crop_padding=0,  # a digit fills its image: a crop would cut strokes off
        flip="none",  # a mirrored digit is another sign
        epochs=15,
        batch_size=64,
        lr=0.1,
    ),
}


@dataclass
class Progress:
    """How far a run is, and what it saw on the way: all of it but what its parts learned."""

    log: list[dict[str, float | None]] = field(default_factory=list)  # a row per whole epoch
    step: int = 0  # steps taken since
    seen: int = 0  # images trained on in these steps
    loss: float = 0.0  # summed over these images
    correct: float = 0.0  # how many of them were classified right
    lr: float = 0.0  # at the start of the epoch
    seconds: float = 0.0  # that these steps took
    _unread: list[Tensor] = field(default_factory=list)  # (loss, correct) of the newest steps
    _clock: float = 0.0

    @property
    def epochs(self) -> int:
        """Whole epochs."""
        return len(self.log)

    @property
    def mean_loss(self) -> float:
        """Of an image of this epoch, as trained."""
        return self.loss / self.seen

    @property
    def accuracy(self) -> float:
        """Of this epoch, as trained, in percent."""
        return 100 * self.correct / self.seen

    def __str__(self) -> str:
        return f"epoch {self.epochs + 1}, step {self.step}" if self.step else f"epoch {self.epochs}"

    def start(self, lr: float) -> None:
        """Begin an epoch, or go on with one."""
        self.lr = self.lr if self.step else lr
        self._clock = time.perf_counter() - self.seconds

    def count(self, totals: Tensor, num_images: int) -> None:
        """Note a step: its summed loss and how many were right, (2,), left on the device."""
        self.step, self.seen = self.step + 1, self.seen + num_images
        self._unread.append(totals)

    def look(self) -> None:
        """Read what was noted since the last look, which waits for the device.

        One step after the other is added, so that the sums do not depend on when one looks.

        Raises:
            DivergenceError: the loss of a step is not finite.
        """
        self.seconds = time.perf_counter() - self._clock
        if not self._unread:
            return
        unread = utils.sum_over_processes(torch.stack(self._unread)).tolist()
        first = self.step - len(unread) + 1
        self._unread.clear()
        for step, (loss, correct) in enumerate(unread, start=first):
            if not math.isfinite(loss):
                raise DivergenceError(f"epoch {self.epochs + 1}, step {step}: the loss is {loss}")
            self.loss, self.correct = self.loss + loss, self.correct + correct

    def end_epoch(self, val: Score | None) -> None:
        """Turn what was seen in this epoch into a row of the log."""
        row = {
            "epoch": self.epochs + 1,
            "lr": self.lr,
            "train_loss": self.mean_loss,
            "train_accuracy": self.accuracy,
            "val_loss": val and val.loss,
            "val_accuracy": val and val.accuracy,
            "seconds": time.perf_counter() - self._clock,
        }
        self.log.append(row)
        self.step, self.seen, self.loss, self.correct, self.seconds = 0, 0, 0.0, 0.0, 0.0

    def state(self) -> dict[str, object]:
        """What `load_state` needs to be here again."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name[0] != "_"}

    def load_state(self, state: dict[str, object]) -> None:
        """Be where `state` was taken."""
        for name in self.state():
            setattr(self, name, state[name])


class Parts:
    """All that learns in a run: the network, its average, optimizers, schedules and proxy."""

    def __init__(
        self,
        config: Config,
        data: Dataset,
        device: torch.device,
        autocast: torch.autocast,
        steps: int,
    ) -> None:
        self.model = make_model(config, data, device)
        self.ema = make_average(self.model, config.ema) if config.ema else None
        self.final = self.ema.module if self.ema else self.model  # what is tested and saved
        self.optimizers = make_optimizers(self.model, config)
        self.schedulers = [make_scheduler(o, config, steps) for o in self.optimizers]
        self.proxy = Proxy(config, data, device, autocast, steps) if config.keep < 1 else None

    def share_buffers(self) -> None:
        """Give every process rank 0's BN statistics."""
        utils.share_buffers(self.model)
        if self.ema:
            utils.share_buffers(self.ema.module)

    def state(self) -> dict[str, object]:
        """What `load_state` needs."""
        proxy = self.proxy
        return {
            **get_state(self.model, self.optimizers, self.schedulers),
            "ema": self.ema and self.ema.state_dict(),
            "proxy": proxy and get_state(proxy.model, proxy.optimizers, proxy.schedulers),
        }

    def load_state(self, state: dict[str, object]) -> None:
        """Be as these parts were when `state` was taken."""
        set_state(state, self.model, self.optimizers, self.schedulers)
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        if self.proxy:
            proxy = self.proxy
            set_state(state["proxy"], proxy.model, proxy.optimizers, proxy.schedulers)


class Saver:
    """Writes a run's files: the training state every few minutes, the rest after every epoch."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        data: Dataset,
        parts: Parts,
        progress: Progress,
        stop: utils.StopSignals,
        wandb: utils.WandbRun | None,
    ) -> None:
        self.config, self.folder, self.data = config, folder, data
        self.parts, self.progress, self.stop, self.wandb = parts, progress, stop, wandb
        # Processes on GPUs agree now and then whether to save: each time they wait for each other.
        on_gpu = data.train.labels.device.type == "cuda"
        self.interval = LOG_INTERVAL if on_gpu and utils.num_processes() > 1 else 1  # steps
        self.saved_at = 0.0

    def after_step(self) -> None:
        """Save if it is time to.

        Raises:
            StoppedError: a signal asked to end.
        """
        if self.progress.step % self.interval == 0:
            due, number = utils.largest(self.is_due(), self.stop.received)
            if due or number:
                self.progress.look()
                self.save()
            self.end_if_asked(number)

    def after_epoch(self) -> None:
        """Log and print, and save unless that was done seconds ago.

        Raises:
            StoppedError: a signal asked to end.
        """
        last = self.progress.epochs == self.config.epochs
        due, number = utils.largest(last or self.is_due(EPOCH_SAVE), self.stop.received)
        if self.wandb:
            self.wandb.log(self.progress.log[-1])
        if due or number:
            self.save()
            self.write_model()
        if utils.is_main():
            utils.write_csv(self.folder / "log.csv", self.progress.log)
            print_epoch(self.progress.log[-1], self.config.epochs)
        if not last:
            self.end_if_asked(number)

    def finish(self, test: Score | None) -> None:
        """Write what a finished run leaves."""
        log, curves = self.progress.log, self.folder / "curves.png"
        self.write_model(test)
        utils.write_csv(self.folder / "log.csv", log)
        plots.learning_curves(log, curves, title=self.config.name)
        summary = {"test_loss": test.loss, "test_accuracy": test.accuracy} if test else {}
        self.wandb.finish(summary, curves)

    def save(self) -> None:
        """Write the training state.

        Raises:
            DivergenceError: it is not finite, and was not written.
        """
        state = self.parts.state()
        if not utils.all_finite(state):
            raise DivergenceError(f"{self.progress}: weights or gradients are not finite")
        if utils.is_main():
            utils.save_state(
                self.folder / "last.pt",
                {
                    "config": record(self.config),
                    "data_fingerprint": self.data.fingerprint,
                    **state,
                    **self.progress.state(),
                    "wandb_id": self.wandb.id,
                },
            )
        self.saved_at = time.monotonic()

    def write_model(self, test: Score | None = None) -> None:
        """Write the network."""
        if utils.is_main():
            described = metadata(self.config, self.data, self.progress.log, test)
            save_model(self.folder / "model.safetensors", self.parts.final, described)

    def is_due(self, seconds: float = math.inf) -> bool:
        """Whether `save_every`, or so many seconds, have passed since the last save."""
        seconds = min(seconds, 60 * self.config.save_every)
        return time.monotonic() - self.saved_at >= seconds

    def end_if_asked(self, number: int) -> None:
        """Raise StoppedError if a signal was received; 0 is none."""
        if number:
            name = signal.Signals(number).name
            raise StoppedError(
                number,
                f"stopped by {name} after {self.progress}, saved in {self.folder};"
                " the same command with --resume goes on from there",
            )


def train(
    config: Config,
    data: Dataset | None = None,
    report: Callable[[list[dict[str, float | None]]], None] | None = None,
) -> Score | None:
    """Train, save and test one network; returns its score on the test set.

    Runs on CUDA, MPS or the CPU, and data-parallel under torchrun. The last weights are tested,
    once, at the end: the test set chooses nothing. However the process ends, `resume` goes on from
    the last saved step, on the CPU to the same result, bit for bit.

    Args:
        data: what to train on instead of loading it; where it holds no test images, nothing is
            tested and None returned.
        report: called with the rows of log.csv after every epoch, and at once for a resumed run.

    Raises:
        InputError: the configuration, the data or the run folder is wrong; nothing was written. Or
            the disk is full; what was saved before is intact.
        DivergenceError: the loss or the weights are no longer finite; they were not saved.
        StoppedError: a signal asked to end; the state is saved.
    """
    check_config(config)
    if config.seeds > 1:
        raise InputError(f"seeds: {config.seeds} networks are not one; call train_seeds")
    device, rank, world_size = utils.init_processes(config.deterministic)
    is_main = utils.is_main()
    folder = CHECKPOINTS / config.name
    state = load_run(config, folder)
    if data is None:
        with utils.first_on_each_machine():
            data = load_dataset(
                config.dataset, config.data_dir, config.val_size, config.download, config.train_size
            )
    check_batches(config, len(data.train), world_size)
    check_data(state, data)
    data = data.to(device)

    dtype = compute_dtype(config, device)
    autocast = make_autocast(dtype, device)
    criterion = make_criterion(config)
    steps = math.ceil(len(data.train) / config.batch_size)
    steps = min(steps, config.limit_steps or steps)  # of an epoch
    num_images = min(steps * config.batch_size, len(data.train))
    num_images = round(config.keep * num_images)  # trained on in an epoch
    augmentation = make_augmentation(config)
    parts = Parts(config, data, device, autocast, steps)
    model, final, proxy = parts.model, parts.final, parts.proxy
    parallel = make_parallel(model)
    progress = Progress()
    if state:
        restore(state, folder, parts, progress)

    def batches(epoch: int, done: int = 0) -> Iterator[tuple[Tensor, Tensor, int]]:
        """What an epoch trains on, after its first `done` steps."""
        order = (config.batch_size, config.seed, epoch)
        size = SMALL_SIZE if epoch <= config.small_share * config.epochs else IMAGE_SIZE
        found = train_batches(data, augmentation, *order, rank, world_size, size, done)
        for step, batch in enumerate(itertools.islice(found, steps - done), start=done):
            # Reseeded in every step, so that dropout, like the batches, needs no saved state.
            torch.manual_seed(utils.derive_seed("dropout", config.seed, epoch, step, rank))
            yield batch

    with (
        utils.lock_folder(folder),
        utils.StopSignals() as stop,
        divergence_explained(folder, progress),
    ):
        wandb = None
        if is_main:
            prepare_folder(config, folder)
            print_plan(config, data, device, dtype, world_size, steps, progress)
            run_id = state and state["wandb_id"]
            wandb = utils.WandbRun(config.wandb, folder, record(config), run_id, group_of(config))
        saver = Saver(config, folder, data, parts, progress, stop, wandb)
        saver.save()
        if is_main:
            utils.write_json(folder / "config.json", record(config))
            if device.type == "cpu" and progress.epochs < config.epochs:
                estimate = estimate_seconds(config, parts, autocast, steps, progress, batches)
                print(f"estimated time on this CPU: {utils.duration(estimate)}", flush=True)

        if report and progress.log:
            report(progress.log)
        while progress.epochs < config.epochs:
            epoch = progress.epochs + 1
            progress.start(parts.optimizers[0].param_groups[0]["lr"])
            model.train()
            kept = batches(epoch, progress.step)
            if proxy:
                kept = proxy.hardest(kept, progress.step)
            with progress_bar(config, progress, num_images, is_main) as bar:
                train_one_epoch(
                    parallel,
                    criterion,
                    parts.optimizers,
                    parts.schedulers,
                    kept,
                    autocast,
                    progress,
                    bar,
                    config.asam,
                    parts.ema,
                    saver.after_step,
                )
            parts.share_buffers()
            val = None
            if len(data.val):
                logits = utils.evaluate(final, data.val.images, data.normalize)
                val = utils.score(logits, data.val.labels)
            progress.end_epoch(val)
            saver.after_epoch()
            if report:
                report(progress.log)

        test = None
        if len(data.test):
            logits = utils.evaluate(final, data.test.images, data.normalize)
            test = utils.score(logits, data.test.labels)
        if is_main:
            saver.finish(test)
        if is_main and test:
            print(f"test accuracy: {test}")
            print(f"next: python test.py {(folder / 'model.safetensors').as_posix()}")
    return test


def train_seeds(config: Config) -> list[Score]:
    """Train `config.seeds` networks that differ in their seed; their scores on the test set.

    Prints the mean and standard deviation of their accuracies, and the 95% interval of the mean by
    Student's t. With `resume`, a run that was cut off goes on and a finished one is only tested.

    Raises:
        InputError: one of them cannot be trained; nothing was written.
        DivergenceError: a loss is no longer finite; the runs before it are whole.
    """
    from scipy.stats import t as student_t  # here: it takes most of a second to load

    runs = []
    for seed in range(config.seed, config.seed + config.seeds):
        name = f"{config.name}-{seed}"
        started = seed == config.seed or has_state(CHECKPOINTS / name)
        resume = config.resume and started
        runs.append(replace(config, name=name, seed=seed, seeds=1, resume=resume))
        check_config(runs[-1])
        load_run(runs[-1], CHECKPOINTS / name)  # nothing may be in the way hours later
    scores = [train(run) for run in runs]
    accuracies = [score.accuracy for score in scores]
    mean, std = statistics.mean(accuracies), statistics.stdev(accuracies)
    low, high = student_t.interval(0.95, len(runs) - 1, mean, std / math.sqrt(len(runs)))
    if utils.is_main():
        print(
            f"{len(runs)} seeds: test accuracy {mean:.2f} ± {std:.2f}% (standard deviation); 95%"
            f" interval of the mean {low:.2f} to {high:.2f}"
        )
    return scores


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    schedulers: list[LRScheduler],
    batches: Iterable[tuple[Tensor, Tensor, int]],
    autocast: torch.autocast,
    progress: Progress,
    bar: tqdm,
    asam: float = 0.0,
    ema: AveragedModel | None = None,
    after_step: Callable[[], None] | None = None,
) -> None:
    """Step through `batches`; loss and accuracy, as trained, are counted in `progress`.

    Raises:
        DivergenceError: the loss is not finite.
    """

    def backward(images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
        """Leave the gradients in the network; returns the summed loss, and how many are right."""
        model.zero_grad()  # before the forward pass, whose end is the peak of memory
        with autocast:
            logits = model(images).float()
        loss = criterion(logits, labels)
        # DDP averages the gradients over the processes. Scaled like this, their mean is that of
        # the mean loss over the global batch, even where its images do not share out evenly.
        (loss * utils.num_processes() / batch_size).backward()
        return torch.stack([loss.detach(), (logits.argmax(1) == labels).sum()])

    for images, labels, batch_size in batches:
        totals = backward(images, labels, batch_size)
        if asam:
            with utils.uphill(model, asam):
                backward(images, labels, batch_size)
        for part in (*optimizers, *schedulers):
            part.step()
        if ema:
            ema.update_parameters(model)

        progress.count(totals, batch_size)
        bar.update(batch_size)
        if progress.step % LOG_INTERVAL == 0:
            progress.look()
            bar.set_postfix_str(f"loss={progress.mean_loss:.3f}, acc={progress.accuracy:.1f}%")
        if after_step:
            after_step()
    progress.look()


class Proxy:
    """A narrow copy of the network (width 1) that picks the images worth a step of the network.

    It looks at every batch and learns from every fourth (PROXY_INTERVAL), from what it picks: the
    images of the largest loss. Late in a training most are easy and would teach the network little
    (Jordan, airbench96_faster, github.com/KellerJordan/cifar10-airbench, 2024).
    """

    def __init__(
        self,
        config: Config,
        data: Dataset,
        device: torch.device,
        autocast: torch.autocast,
        steps: int,
    ) -> None:
        config = replace(config, width=1)
        self.keep, self.autocast = config.keep, autocast
        self.model = make_model(config, data, device)
        self.parallel = make_parallel(self.model)
        self.criterion = nn.CrossEntropyLoss(
            reduction="none", label_smoothing=config.label_smoothing
        )
        self.optimizers = make_optimizers(self.model, config)
        self.schedulers = [make_scheduler(o, config, steps) for o in self.optimizers]

    def hardest(
        self, batches: Iterable[tuple[Tensor, Tensor, int]], done: int = 0
    ) -> Iterator[tuple[Tensor, Tensor, int]]:
        """An epoch's batches, of each the share `keep` with the largest loss, hardest first.

        The first one is the epoch's batch number `done`. Under torchrun every process picks from
        its own share.
        """
        self.model.train()
        for step, (images, labels, batch_size) in enumerate(batches, start=done):
            learns = step % PROXY_INTERVAL == 0
            with torch.set_grad_enabled(learns):
                with self.autocast:
                    logits = self.parallel(images).float()
                losses, chosen = self.criterion(logits, labels).topk(self.kept(len(labels)))
            if learns:
                self.model.zero_grad()
                losses.mean().backward()
                for optimizer in self.optimizers:
                    optimizer.step()
            for scheduler in self.schedulers:
                scheduler.step()
            n = utils.num_processes()
            shares = (len(range(rank, batch_size, n)) for rank in range(n))
            yield images[chosen], labels[chosen], sum(map(self.kept, shares))

    def kept(self, num_images: int) -> int:
        """How many of `num_images` are trained on, at least one."""
        return max(1, round(self.keep * num_images))


def make_parallel(model: nn.Module) -> nn.Module:
    """`model`, under torchrun in the wrapper that averages the gradients of all processes."""
    return DistributedDataParallel(model) if utils.num_processes() > 1 else model


def make_model(config: Config, data: Dataset, device: torch.device) -> ResNet:
    """The network with its initial weights, as the seed has them."""
    torch.manual_seed(config.seed)
    model = ResNet(**config.architecture()).to(device, memory_format=torch.channels_last)
    if config.zero_gamma:  # Goyal et al., arXiv:1706.02677
        for block in model.modules():
            if isinstance(block, BasicBlock):
                nn.init.zeros_(block.bn2.weight)
    if config.stem == "whitening":
        model.set_whitening(data.normalize(data.train.images[:5000]))
    if config.compile:  # with CUDA graphs on a GPU, where launching the kernels takes time
        model.compile(mode="reduce-overhead" if device.type == "cuda" else "default")
    return model


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """What convolutions and matrix products compute in; weights are float32 always."""
    bfloat16 = config.bfloat16 and utils.has_bfloat16(device)
    return torch.bfloat16 if bfloat16 else torch.float32


def make_autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """The context in which the network computes in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def make_criterion(config: Config) -> nn.Module:
    """Cross entropy, summed over the images."""
    return nn.CrossEntropyLoss(reduction="sum", label_smoothing=config.label_smoothing)


def make_augmentation(config: Config) -> Augmentation:
    """What is done to the training images."""
    return Augmentation(
        config.crop_padding,
        config.padding,
        config.rotation,
        config.flip,
        config.cutout,
        config.auto_augment,
    )


def make_optimizers(model: nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """SGD for all parameters; or Muon for the convolutions' and Adam for the rest."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return [
            torch.optim.SGD(
                parameters,
                config.lr,
                config.momentum,
                weight_decay=config.weight_decay,
                nesterov=config.nesterov,
                fused=True,
            )
        ]
    filters = [p for p in parameters if p.ndim == 4]
    others = [p for p in parameters if p.ndim < 4]  # of batch normalisation and the linear layer
    return [
        utils.Muon(filters, config.lr, config.momentum),
        torch.optim.Adam(others, config.adam_lr, ADAM_BETAS, fused=True),
    ]


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of a network's weights and BN statistics.

    With each step it keeps `decay` of itself and takes the rest from the network.
    """
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: Config, steps_per_epoch: int
) -> LRScheduler:
    """The learning rate of every step, as a share of that at the start."""

    warmup = int(config.warmup * config.epochs)
    epochs = config.epochs - warmup  # of the schedule proper

    def factor(step: int) -> float:
        epoch = step / steps_per_epoch - warmup
        if epoch < 0:
            return (step + 1) / (warmup * steps_per_epoch)
        if config.schedule == "linear":
            return 1 - epoch / epochs
        # SGDR (Loshchilov & Hutter, arXiv:1608.03983), by whole epochs as the paper has it.
        period = epochs if config.schedule == "cosine" else config.restart_period
        return (1 + math.cos(math.pi * (int(epoch) % period) / period)) / 2

    return LambdaLR(optimizer, factor)


# ---------------------------------------------------------------- checks, before any work


def check_config(config: Config) -> None:
    """Raise InputError, naming the field, if this configuration cannot be trained."""
    for constant in fields(config):
        name, kind, value = constant.name, constant.type, getattr(config, constant.name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise InputError(f"{name}: {value!r} is not one of {', '.join(get_args(kind))}")
        if kind in (bool, str) and not isinstance(value, kind):
            raise InputError(f"{name}: {value!r} is no {kind.__name__}")
    plain = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
    if not re.fullmatch(f"({plain}/)?{plain}", config.name):
        raise InputError(
            f"name: {config.name!r} is no plain NAME or GROUP/NAME; use letters, digits and . _ -"
        )
    for name in ("epochs", "batch_size", "restart_period", "max_params", "seeds"):
        check_integer(name, getattr(config, name), 1)
    for name in ("val_size", "train_size", "limit_steps"):
        check_integer(name, getattr(config, name), 0)
    check_integer("seed", config.seed, 0, 2**32 - 1)
    check_integer("crop_padding", config.crop_padding, 0, 32)
    check_integer("cutout", config.cutout, 0, 32)
    check_number("keep", config.keep, 0.01, 1)
    check_number("small_share", config.small_share, 0, 1)
    check_number("lr", config.lr, 0, 1000)
    check_number("adam_lr", config.adam_lr, 0, 1000)
    check_number("label_smoothing", config.label_smoothing, 0, 1)
    check_number("momentum", config.momentum, 0, 1)
    if config.nesterov and not config.momentum:
        raise InputError("momentum: 0 with nesterov; give one over 0, or --no-nesterov")
    check_number("warmup", config.warmup, 0, 0.99)
    check_number("asam", config.asam, 0, 100)
    check_number("ema", config.ema, 0, 0.999999)
    check_number("weight_decay", config.weight_decay, 0, 1)
    check_number("rotation", config.rotation, 0, 180)
    check_number("save_every", config.save_every, 0, 1e6)
    moved = config.flip != "none" or config.crop_padding or config.auto_augment
    if config.dataset == "digits" and moved:
        raise InputError(
            "flip, crop_padding, auto_augment: they change what a digit means; add --flip none"
            " --crop-padding 0, or start from the demo preset"
        )
    check_budget(config.max_params, **config.architecture())
    sizes = (IMAGE_SIZE, SMALL_SIZE)
    shape = (len(config.num_blocks), config.stem, config.downsample)
    pooled, small = (feature_size(*shape, size) // config.pool_kernel for size in sizes)
    if config.small_share and small != pooled:
        raise InputError(
            f"small_share: {config.small_share} of the epochs on {SMALL_SIZE}x{SMALL_SIZE} pixels,"
            f" whose feature map does not suit a pool_kernel of {config.pool_kernel}; use 0"
        )


def check_batches(config: Config, num_images: int, world_size: int) -> None:
    """Raise InputError if `num_images` cannot be cut into batches that all processes share in."""
    if not world_size <= config.batch_size <= num_images:
        raise InputError(
            f"batch_size: {config.batch_size} for {num_images:,} training images and {world_size}"
            f" process{'es' * (world_size > 1)}; use {world_size} to {num_images:,}"
        )
    if 0 < num_images % config.batch_size < world_size:
        raise InputError(
            f"batch_size: {config.batch_size} leaves a last batch of"
            f" {num_images % config.batch_size} for {world_size} processes; use another"
        )


def load_run(config: Config, folder: Path) -> dict[str, object] | None:
    """The state of the run in `folder` if it is to be resumed; None for a new run.

    Raises:
        InputError: there is a run that would be overwritten, or none to resume, or it was
            trained with other constants.
    """
    if config.resume and config.overwrite:
        raise InputError(
            "overwrite: not with --resume, which goes on with the run; use one of both"
        )
    if not config.resume:
        check_new(config, folder)
        return None
    state = utils.load_state(folder / "last.pt")
    needed = {"config", "data_fingerprint", "model", "optimizers", "schedulers", "ema", "proxy"}
    needed |= {"wandb_id", *Progress().state()}
    if missing := needed - set(state):
        raise InputError(
            f"resume: {folder / 'last.pt'} lacks {', '.join(sorted(missing))}; restore a copy of"
            " the file, or train under another --name"
        )
    free = {"name", "data_dir", "download", "max_params", "resume", "overwrite", "save_every"}
    free |= {"wandb"}
    for constant in fields(config):
        name, new = constant.name, getattr(config, constant.name)
        # A constant that the run does not know came after it, with a default that changes nothing.
        old = state["config"].get(name, constant.default)
        longer = name == "epochs" and new > old  # the schedule is that of the longer run from here
        if old != new and not longer and name not in free:
            more = " or more" if name == "epochs" else ""
            raise InputError(
                f"{name}: {new!r}, but the run in {folder} was started with {old!r}; give"
                f" that{more}, or another --name"
            )
    return state


def has_state(folder: Path) -> bool:
    """Whether there is something to resume."""
    return any((folder / name).exists() for name in ("last.pt", utils.PREVIOUS))


def check_new(config: Config, folder: Path) -> None:
    """Raise InputError if `folder` holds a run that may not be overwritten."""
    found = [name for name in RUN_FILES if (folder / name).exists()]
    if found and not config.overwrite:
        raise InputError(
            f"name: {folder} holds a run already ({found[0]}); add --resume to go on with it,"
            " --overwrite to lose it, or give another --name"
        )


def check_data(state: dict[str, object] | None, data: Dataset) -> None:
    """Raise InputError if a run that is resumed was started on other images."""
    if state and state["data_fingerprint"] != data.fingerprint:
        raise InputError(
            "data_dir: it holds other images than this run was started on (SHA-256 of all images"
            " and labels); give their --data-dir, or another --name"
        )


def prepare_folder(config: Config, folder: Path) -> None:
    """Make the folder, which is locked by now, ready for what is about to be written there.

    Raises:
        InputError: another process has trained there since `load_run` looked.
    """
    if config.resume:
        utils.drop_damaged_state(folder / "last.pt")
        return
    check_new(config, folder)
    for name in reversed(RUN_FILES):
        (folder / name).unlink(missing_ok=True)


def get_state(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], schedulers: list[LRScheduler]
) -> dict[str, object]:
    """All that changes while these are trained."""
    return {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "schedulers": [scheduler.state_dict() for scheduler in schedulers],
    }


def set_state(
    state: dict[str, object],
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    schedulers: list[LRScheduler],
) -> None:
    """Load what `get_state` gave."""
    model.load_state_dict(state["model"])
    for name, parts in (("optimizers", optimizers), ("schedulers", schedulers)):
        for part, saved in zip(parts, state[name], strict=True):
            part.load_state_dict(saved)
    for scheduler in schedulers:  # the next step's rates: a run of more epochs has others
        for group, lr, factor in zip(
            scheduler.optimizer.param_groups,
            scheduler.base_lrs,
            scheduler.lr_lambdas,
            strict=True,
        ):
            group["lr"] = lr * factor(scheduler.last_epoch)


def restore(state: dict[str, object], folder: Path, parts: Parts, progress: Progress) -> None:
    """Load a training state into the parts it was taken from.

    Raises:
        InputError: it does not fit them.
    """
    try:
        parts.load_state(state)
        progress.load_state(state)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"resume: what is in {folder / 'last.pt'} does not fit ({first_line(error)});"
            " restore a copy of the file, or train under another --name"
        ) from None


@contextlib.contextmanager
def divergence_explained(folder: Path, progress: Progress) -> Iterator[None]:
    """In the block, a DivergenceError tells the learning rate too, and what can be done."""
    try:
        yield
    except DivergenceError as error:
        raise DivergenceError(
            f"{error} at lr {progress.lr:g}; the last good state is {folder / 'last.pt'}; start"
            " again with a lower --lr, under another --name"
        ) from None


# ---------------------------------------------------------------- what is printed and recorded


def print_plan(
    config: Config,
    data: Dataset,
    device: torch.device,
    dtype: torch.dtype,
    world_size: int,
    steps: int,
    progress: Progress,
) -> None:
    """Say what is about to be trained, on what, and from where."""
    cost = model_cost(**config.architecture())
    print(
        f"{config.name}: {cost.num_params:,} parameters; {cost.macs / 1e6:,.1f} M MACs and"
        f" {cost.activation_bytes / 1e6:,.1f} MB of activations per image"
    )
    print(
        f"{data.name}: {len(data.train):,} training, {len(data.val):,} validation and"
        f" {len(data.test):,} test images"
    )
    processes = f" in {world_size} processes" if world_size > 1 else ""
    resumed = ""
    if progress.epochs or progress.step:
        resumed = f", going on after {progress}"
    print(
        f"epochs: {config.epochs} of {steps:,} steps, on {device.type}{processes},"
        f" {utils.dtype_name(dtype)}{resumed}"
    )


def estimate_seconds(
    config: Config,
    parts: Parts,
    autocast: torch.autocast,
    steps: int,
    progress: Progress,
    batches: Callable[[int], Iterator[tuple[Tensor, Tensor, int]]],
) -> float:
    """About how long the rest of a run will take on this CPU."""
    passes = 2 if config.asam else 1
    small = max(0, int(config.small_share * config.epochs) - progress.epochs)
    whole = config.epochs - progress.epochs - small
    return (steps * passes) * sum(
        number * estimate_step(parts.model, parts.proxy, autocast, next(batches(epoch)))
        for epoch, number in ((1, small), (config.epochs, whole))
        if number
    )


def estimate_step(
    model: nn.Module,
    proxy: Proxy | None,
    autocast: torch.autocast,
    batch: tuple[Tensor, Tensor, int],
) -> float:
    """Seconds of a step on `batch`, without the optimizer."""
    images, labels, _ = batch
    if not proxy:
        return time_step(model, autocast, images, labels)
    # Going forward, as a proxy does in every step, is a third of one.
    share = (1 + 2 / PROXY_INTERVAL) / 3
    seconds = share * time_step(proxy.model, autocast, images, labels)
    kept = proxy.kept(len(labels))
    return seconds + time_step(model, autocast, images[:kept], labels[:kept])


def time_step(model: nn.Module, autocast: torch.autocast, images: Tensor, labels: Tensor) -> float:
    """Seconds of a forward and backward pass on a copy of `model`, the shortest of four."""
    model = copy.deepcopy(model).train()
    seconds = []
    for _ in range(4):  # the first ones warm up
        start = time.perf_counter()
        with autocast:
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def progress_bar(config: Config, progress: Progress, num_images: int, is_main: bool) -> tqdm:
    """A bar of one epoch's images; shown by the main process, where the output is a terminal."""
    return tqdm(
        total=num_images,
        initial=progress.seen,
        desc=f"epoch {progress.epochs + 1}/{config.epochs}",
        unit="img",
        unit_scale=True,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {rate_fmt}, {remaining} left{postfix}",
        leave=False,
        dynamic_ncols=True,
        disable=None if is_main else True,  # None: not where the output is no terminal
    )


def print_epoch(row: dict[str, float | None], epochs: int) -> None:
    """One line of the log."""
    val = ""
    if row["val_loss"] is not None:
        val = f"  val {row['val_loss']:.4f} {row['val_accuracy']:6.2f}%"
    print(
        f"epoch {row['epoch']:{len(str(epochs))}}/{epochs}  lr {row['lr']:.4f}"
        f"  train {row['train_loss']:.4f} {row['train_accuracy']:6.2f}%{val}"
        f"  {utils.duration(row['seconds'])}",
        flush=True,
    )


def metadata(
    config: Config, data: Dataset, log: list[dict[str, float | None]], test: Score | None = None
) -> dict[str, object]:
    """What a saved model says of itself, beside its architecture. `test` is None until the end."""
    same = [n for n, p in PRESETS.items() if p.architecture() == config.architecture()]
    return {
        "preset": same[0] if same else "custom",  # the named network, if it is one
        "dataset": data.name,
        "class_names": data.class_names,
        "mean": data.mean,
        "std": data.std,
        "epochs": len(log),
        "accuracy": {  # percent; train as seen while training, augmented
            "train": log[-1]["train_accuracy"],
            "val": log[-1]["val_accuracy"],
            "test": test and test.accuracy,
        },
        "seed": config.seed,
        "trained_in": utils.dtype_name(compute_dtype(config, data.train.labels.device)),
        "data_fingerprint": data.fingerprint,
        "unofficial_data_files": data.unofficial,
        "versions": utils.library_versions(),
        "git_commit": utils.git_commit(),
        "config": record(config),
    }


def group_of(config: Config) -> str | None:
    """The group that a run belongs to, if it does."""
    group, slash, _ = config.name.rpartition("/")
    return group if slash else None


def record(config: Config) -> dict[str, object]:
    """The constants of a run, without those that only tell how to begin."""
    return asdict(replace(config, resume=False, overwrite=False))


def make_config(constants: dict[str, object]) -> Config:
    """A configuration from what JSON made of its constants, which has no tuples."""
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in constants.items()})


def load_config(path: str) -> Config:
    """The constants in a config.json, or in a best.json of search.py.

    Raises:
        InputError: the file is missing, or holds something else or what cannot be trained.
    """
    try:
        config = make_config(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(
            f"config: cannot read {path!r} ({error.strerror}); name a config.json that train.py"
            " wrote, or a best.json of search.py"
        ) from None
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"config: {path} holds no constants of a run ({first_line(error)}); name a config.json"
            " that train.py wrote, or a best.json of search.py"
        ) from None
    check_config(config)
    return config


def main(args: list[str]) -> None:
    """Train what the command line asks for: a preset or file, then any constants to override."""
    preset, config = "tpsnet", None
    if args and args[0].split("=")[0] == "--config":
        option, *args = args
        path = option.partition("=")[2] or (args.pop(0) if args else "")
        config, preset = load_config(path), path
    elif args and not args[0].startswith("-"):
        preset, *args = args
    if not config and preset not in PRESETS:
        raise InputError(f"preset: {preset!r} is not one of {', '.join(PRESETS)}")
    config = utils.parse_command_line(
        Config,
        args,
        default=config or PRESETS[preset],
        prog=f"train.py [{'|'.join(PRESETS)}]",
        description=f"Train a network; the defaults shown are those of {preset}.\n\n"
        "In place of a preset, `--config FILE` takes those in a file.",
    )
    train_seeds(config) if config.seeds > 1 else train(config)


if __name__ == "__main__":
    utils.run_script(main)
