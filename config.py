"""The constants of a run, which are what people edit, and the presets.

`Config` is flat: the network (`Architecture`, in model.py), how it is trained (`Recipe`) and how
the run is done (`Run`). The defaults are the paper's TPSNet; a preset names what it changes, so
an edited default changes every preset that does not set it. All are options of train.py too.
"""

import re
import reprlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from model import MAX_PARAMS, Architecture, check_budget, feature_size, pooled_size
from utils import IMAGE_SIZE, InputError, Range, check_fields, first_line, from_json, read_json

CHECKPOINTS = Path("checkpoints")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. With the architecture and the seed it decides the result."""

    # The data
    dataset: Literal["cifar10", "digits"] = "cifar10"
    """CIFAR-10, or scikit-learn's handwritten digits, which need no download."""
    val_size: Annotated[int, Range(0)] = 0
    """Training images set aside for validation; 0 trains on all of them."""
    train_size: Annotated[int, Range(0)] = 0
    """How many of the other training images to train on, for a quick comparison; 0 for all."""
    auto_augment: bool = False
    """Change every image first by AutoAugment's policy: up to two operations on shape or color."""
    crop_padding: Annotated[int, Range(0, 32)] = 4
    """Pixels of padding on each side before a random 32x32 crop."""
    padding_mode: Literal["zeros", "reflect"] = "zeros"
    """What the padding holds: black, or the image mirrored at its border."""
    rotation_degrees: Annotated[float, Range(0, 180)] = 5.0
    """Random rotation, in degrees either way."""
    flip: Literal["none", "random", "alternating"] = "random"
    """Mirror no image, a random half in each epoch, or one half and the other in turn."""
    cutout_size: Annotated[int, Range(0, 32)] = 0
    """Side of a square that is greyed out in every image, in pixels; 0 for none."""
    small_fraction: Annotated[float, Range(0, 1)] = 0.0
    """Fraction of the epochs, the first ones, that train on smaller images, in less time."""
    small_size: Annotated[int, Range(8, 32)] = 28
    """Side of these smaller images, in pixels."""
    small_images: Literal["crop", "scale"] = "crop"
    """What they are: the central pixels alone, or whole images that are scaled down."""

    # The optimization
    epochs: Annotated[int, Range(1)] = 300
    """Passes over the training set."""
    batch_size: Annotated[int, Range(1)] = 128
    """Images per step, over all processes together."""
    keep_fraction: Annotated[float, Range(0.01, 1)] = 1.0
    """Fraction of every batch to train on: what a narrow copy of the network finds hardest."""
    optimizer: Literal["sgd", "muon"] = "sgd"
    """SGD, or Muon for the convolutions and Adam for all else."""
    lr: Annotated[float, Range(0, 1000)] = 0.01
    """Learning rate of SGD or Muon at the start of the schedule."""
    momentum: Annotated[float, Range(0, 1)] = 0.9
    """Momentum of SGD or Muon."""
    nesterov: bool = False
    """Nesterov's momentum (sgd only: Muon's always is)."""
    weight_decay: Annotated[float, Range(0, 1)] = 5e-4
    """L2 penalty on all parameters (sgd only)."""
    adam_lr: Annotated[float, Range(0, 1000)] = 0.005
    """Learning rate of Adam at the start of the schedule (muon only)."""
    label_smoothing: Annotated[float, Range(0, 1)] = 0.0
    """Fraction of each target spread evenly over all classes."""
    schedule: Literal["cosine", "cosine_restarts", "linear"] = "cosine"
    """Learning rate: a cosine to 0, several with warm restarts, both by the epoch; or a line."""
    restart_epochs: Annotated[int, Range(1)] = 50
    """Epochs from one warm restart to the next (cosine_restarts only)."""
    warmup_epochs: Annotated[int, Range(0)] = 0
    """Epochs, the first ones, in which the learning rate rises from 0."""
    ema_decay: Annotated[float, Range(0, 0.999999)] = 0.0
    """Keep, test and save a moving average of the weights, with this decay; 0 for the last ones."""
    max_steps_per_epoch: Annotated[int, Range(0)] = 0
    """Stop every epoch after this many steps, to rehearse a run; 0 for no limit."""

    # The arithmetic
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Decides the initial weights, the order of the images, the augmentation and the dropout."""
    bfloat16: bool = True
    """Compute in bfloat16 where the device is faster at it; weights and loss stay float32."""
    deterministic: bool = False
    """Same bits in every run on a GPU too, by slower kernels; a CPU's are always the same."""


@dataclass(frozen=True)
class Run:
    """How a run is done. It changes no result but by rounding, so --resume lets it change."""

    name: str = "tpsnet"
    """Folder of the run: checkpoints/NAME; GROUP/NAME makes it one of a group."""
    seeds: Annotated[int, Range(1)] = 1
    """Networks to train one after the other, with seeds from SEED on, each as NAME-ITS_SEED."""
    resume: bool = False
    """Go on with the run in checkpoints/NAME from its last saved step, or start it."""
    overwrite: bool = False
    """Remove the run that is in checkpoints/NAME and start anew."""
    save_minutes: Annotated[float, Range(0, 1e6)] = 5.0
    """Minutes between saves of the training state beside those at epochs' ends; 0: every step."""
    compile: bool = False
    """Run the network through torch.compile, which rounds otherwise; not tried on a GPU yet."""
    data_dir: str = "data"
    """Folder that holds CIFAR-10, or receives it."""
    download: bool = True
    """Fetch CIFAR-10 if it is not in data_dir."""
    max_params: Annotated[int, Range(1)] = MAX_PARAMS
    """Refuse a network with more parameters than this."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; auto is online when logged in, else offline, and never asks."""


@dataclass(frozen=True)
class Config(Run, Recipe, Architecture):  # a dataclass lists the fields of its last base first
    """Every constant of a run. The defaults are the paper's TPSNet and its recipe."""


FAST = Config(
    name="fast",
    num_blocks=(1, 1, 1),
    c1=24,
    width=4,
    stem="whitening",
    downsample="pool",
    pool_kernel=3,
    padding_mode="reflect",
    rotation_degrees=0.0,
    flip="alternating",
    cutout_size=12,
    small_fraction=0.72,
    epochs=84,
    batch_size=2000,
    keep_fraction=0.5,
    optimizer="muon",
    lr=0.15,
    momentum=0.6,
    label_smoothing=0.2,
    schedule="linear",
)
PRESETS = {
    "tpsnet": Config(),
    "model1": Config(name="model1", num_blocks=(3, 3, 3), c1=34),
    "model2": Config(name="model2", num_blocks=(7, 7, 7), c1=22),
    "fast": FAST,
    "small": replace(FAST, name="small", width=2),
    # The proxy would be as wide as the network, and save nothing.
    "tiny": replace(FAST, name="tiny", width=1, epochs=43, batch_size=1000, keep_fraction=1.0),
    "best": Config(
        name="best",
        num_blocks=(3, 3, 3),
        c1=64,
        width=1,
        auto_augment=True,
        padding_mode="reflect",
        rotation_degrees=0.0,
        flip="alternating",
        cutout_size=16,
        small_fraction=0.5,
        small_size=24,
        small_images="scale",
        epochs=180,
        batch_size=512,
        lr=0.4,
        nesterov=True,
        label_smoothing=0.1,
        warmup_epochs=27,
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
# What `python train.py NAME` gives: test accuracy, number of runs, time and machine.
CLAIMS = {
    "tpsnet": "94.84% as published, not repeated here yet: the paper's network",
    "model1": "94.02% as published, not repeated here yet: wider, [3, 3, 3] blocks",
    "model2": "94.24% as published, not repeated here yet: [7, 7, 7] blocks",
    "fast": "94.90 ± 0.16% (3 seeds on an NVIDIA H200, commit 0724ffa)",
    "small": "93.72% (1 run on an NVIDIA H200, commit 0724ffa)",
    "tiny": "89.98% (1 run, 42 min on two cores of an AMD EPYC, commit 6eb31fe)",
    "best": "96.77 ± 0.07% (3 seeds on an NVIDIA H200): the highest accuracy",
    "demo": "99.72% of the digits (1 run, under 2 min on two cores of an EPYC)",
}


# ---------------------------------------------------------------- checks, before any work


def check_config(config: Config) -> None:
    """Raise InputError, naming the field, if this configuration cannot be trained."""
    check_fields(config)
    plain = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
    if not re.fullmatch(f"({plain}/)?{plain}", config.name):
        raise InputError(
            f"name: {config.name!r} must be NAME or GROUP/NAME; use letters, digits and . _ -"
        )
    if config.resume and config.overwrite:
        raise InputError("overwrite: not with --resume, which goes on with the run; use one")
    if config.warmup_epochs >= config.epochs:
        raise InputError(
            f"warmup_epochs: {config.warmup_epochs} of {config.epochs} epochs; use 0 to"
            f" {config.epochs - 1}"
        )
    if config.nesterov and not config.momentum:
        raise InputError("momentum: 0 with nesterov; give one over 0, or --no-nesterov")
    moved = config.flip != "none" or config.crop_padding or config.auto_augment
    if config.dataset == "digits" and moved:
        raise InputError(
            "flip, crop_padding, auto_augment: they change what a digit means; add --flip none"
            " --crop-padding 0, or start from the demo preset"
        )
    check_budget(config, config.max_params)
    pooled, small = (pooled_size(config, size) for size in (IMAGE_SIZE, config.small_size))
    if config.small_fraction and small != pooled:
        raise InputError(
            f"small_size: images of {config.small_size}x{config.small_size} pixels are pooled to"
            f" {small}x{small}, those of {IMAGE_SIZE}x{IMAGE_SIZE} to {pooled}x{pooled}; use"
            " another, or a small_fraction of 0"
        )


def check_batches(config: Config, num_images: int, num_processes: int = 1) -> None:
    """Raise InputError if `num_images` cannot be cut into batches that all processes share in."""
    if not num_processes <= config.batch_size <= num_images:
        raise InputError(
            f"batch_size: {config.batch_size} for {num_images:,} training images and"
            f" {num_processes} process{'es' * (num_processes > 1)}; use {num_processes} to"
            f" {num_images:,}"
        )
    if 0 < num_images % config.batch_size < num_processes:
        raise InputError(
            f"batch_size: {config.batch_size} leaves a last batch of"
            f" {num_images % config.batch_size} for {num_processes} processes; use another"
        )
    last = (num_images % config.batch_size or config.batch_size) // num_processes
    network = (len(config.num_blocks), config.stem, config.downsample)
    smallest = config.small_size if config.small_fraction else IMAGE_SIZE
    if round(config.keep_fraction * last) < 2 and feature_size(*network, smallest) == 1:
        raise InputError(
            f"batch_size: {config.batch_size} leaves a batch of one image to train on, from which"
            " batch normalization learns nothing where a feature map is one pixel; use another"
        )


def check_resumable(config: Config, stored: dict[str, object], folder: Path) -> None:
    """Raise InputError if a run that was started with other constants cannot go on with these.

    `Run` may change, and `epochs` may grow: the schedule is the longer run's from there on.

    Args:
        stored: the constants that the run was started with.
        folder: the run's, for the message.
    """
    for constant in (*fields(Architecture), *fields(Recipe)):
        name, new = constant.name, getattr(config, constant.name)
        # A constant that the run does not know came after it, with a default that changes nothing.
        old = stored.get(name, constant.default)
        longer = name == "epochs" and new > old
        if old != new and not longer:
            more = " or more" if name == "epochs" else ""
            raise InputError(
                f"{name}: {new!r}, but the run in {folder} was started with {reprlib.repr(old)};"
                f" give that{more}, or another --name"
            )


# ---------------------------------------------------------------- JSON


def record(config: Config) -> dict[str, object]:
    """The constants of a run, without those that only tell how to begin."""
    return asdict(replace(config, resume=False, overwrite=False))


def load_config(path: str | Path) -> Config:
    """The constants in a config.json, or in a best.json of search.py.

    Raises:
        InputError: the file is missing, or holds something else or what cannot be trained.
    """
    remedy = "name a config.json that train.py wrote, or a best.json of search.py"
    try:
        config = from_json(Config, read_json(path))
    except OSError as error:
        raise InputError(
            f"config: cannot read {str(path)!r} ({error.strerror}); {remedy}"
        ) from None
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"config: {path} holds no constants of a run ({first_line(error)}); {remedy}"
        ) from None
    check_config(config)
    return config
