"""The constants of a run: edit them here, or override them on the command line of train.py.

`Config` is flat. Its fields come in groups: the network (`Architecture`, in model.py), the data,
the optimization and the arithmetic, which together decide the result; and the execution, which
does not. The defaults are the paper's TPSNet and its recipe. A preset lists only what it changes,
so an edited default changes every preset that does not set it.
"""

import itertools
import re
import reprlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from engine.script import named_options, plain_arguments
from model import MAX_PARAMS, Architecture, check_budget, feature_size, pooled_size
from utils import (
    CHECKPOINTS,
    IMAGE_SIZE,
    InputError,
    Range,
    check_fields,
    first_line,
    has_control_characters,
    part_of,
    quoted,
    read_json,
)


@dataclass(frozen=True)
class Data:
    """The images that a network is trained on, and how they are augmented."""

    dataset: Literal["cifar10", "cifar100", "digits", "folder"] = "cifar10"
    """CIFAR; scikit-learn's handwritten digits; or your own pictures in a folder for each class."""
    val_size: Annotated[int, Range(0)] = 0
    """Training images set aside for validation; 0 trains on all of them."""
    train_size: Annotated[int, Range(0)] = 0
    """How many of the other training images to train on, for a quick comparison; 0 for all."""
    auto_augment: bool = False
    """Apply AutoAugment's policy for CIFAR-10 first: up to two operations on shape or color."""
    trivial_augment: bool = False
    """Apply TrivialAugment first: one operation of any strength; in place of AutoAugment."""
    crop_padding: Annotated[int, Range(0, 32)] = 4
    """Pixels of padding on each side before a random 32x32 crop."""
    padding_mode: Literal["zeros", "reflect"] = "zeros"
    """Fill the padding with black, or with the image mirrored at its border."""
    rotation_degrees: Annotated[float, Range(0, 180)] = 5.0
    """Random rotation, in degrees either way."""
    flip: Literal["none", "random", "alternating"] = "random"
    """Mirror no image, a random half in every epoch, or one half and the other in turn."""
    cutout_size: Annotated[int, Range(0, 32)] = 0
    """Side of the square that Cutout sets to gray in every image, in pixels; 0 for none."""
    small_fraction: Annotated[float, Range(0, 1)] = 0.0
    """Fraction of the epochs, the first ones, that train on smaller images to save time."""
    small_size: Annotated[int, Range(8, 32)] = 28
    """Side of the smaller images, in pixels."""
    small_images: Literal["crop", "scale"] = "crop"
    """Make the smaller images by cropping to the center, or by scaling the whole image down."""
    mixing: Annotated[float, Range(0, 1)] = 0.0
    """Fraction of the batches whose images are mixed in pairs: half by mixup, half by CutMix."""


@dataclass(frozen=True)
class Optimization:
    """How the network learns."""

    epochs: Annotated[int, Range(1)] = 300
    """Passes over the training set."""
    batch_size: Annotated[int, Range(1)] = 128
    """Images per step, over all processes; for SGD, scale lr with it (arXiv:1706.02677)."""
    keep_fraction: Annotated[float, Range(0.01, 1)] = 1.0
    """Fraction of every batch to train on: what the proxy, a narrow copy, finds hardest."""
    optimizer: Literal["sgd", "muon"] = "sgd"
    """SGD, or Muon for the convolutions and Adam for the rest."""
    lr: Annotated[float, Range(0, 1000)] = 0.01
    """Learning rate of SGD or Muon at the start of the schedule."""
    momentum: Annotated[float, Range(0, 1)] = 0.9
    """Momentum of SGD or Muon."""
    nesterov: bool = False
    """Use Nesterov's momentum (sgd only; Muon always does)."""
    weight_decay: Annotated[float, Range(0, 1)] = 5e-4
    """L2 penalty on the parameters (sgd only)."""
    decay_norms: bool = True
    """Apply weight_decay to biases and batch normalization, too, as the paper does."""
    adam_lr: Annotated[float, Range(0, 1000)] = 0.005
    """Learning rate of Adam at the start of the schedule (muon only)."""
    init: str = ""
    """Start from the weights of a network: a file, a run or a name; else from random ones."""
    teacher: str = ""
    """A network (file, run or name) whose predictions are the targets, instead of the labels."""
    teacher_views: Annotated[int, Range(0, 10_000)] = 0
    """Keep the teacher's answers to so many uncropped views of an image; 0: ask in every epoch."""
    label_smoothing: Annotated[float, Range(0, 1)] = 0.0
    """Fraction of each target spread evenly over all classes."""
    schedule: Literal["cosine", "cosine_restarts", "linear"] = "cosine"
    """The lr falls as one cosine (the authors' code), several (their text), or a line, to 0."""
    restart_epochs: Annotated[int, Range(1)] = 50
    """Epochs from one warm restart to the next (cosine_restarts only)."""
    warmup_epochs: Annotated[int, Range(0)] = 0
    """Number of first epochs in which the learning rate rises from 0."""
    ema_decay: Annotated[float, Range(0, 0.999999)] = 0.0
    """Test and save a moving average of the weights with this decay; 0 for the last weights."""
    max_steps_per_epoch: Annotated[int, Range(0)] = 0
    """End every epoch after this many steps, to rehearse a run; 0 for no limit."""


@dataclass(frozen=True)
class Arithmetic:
    """The random numbers and the precision."""

    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Seed of the initial weights, the order of the images, the augmentation and the dropout."""
    bfloat16: bool = True
    """Compute in bfloat16 where that is faster; weights and loss stay float32."""
    deterministic: bool = False
    """Reproduce every bit on a GPU too, by slower kernels; a CPU always does."""


@dataclass(frozen=True)
class Recipe(Arithmetic, Optimization, Data):  # fields are listed from the last base to the first
    """How a network is trained. Together with the architecture it decides the result."""


@dataclass(frozen=True)
class Execution:
    """How the run is carried out. It changes a result by rounding at most."""

    name: str = "tpsnet"
    """Folder of the run: checkpoints/NAME; GROUP/NAME makes it one of a group."""
    seeds: Annotated[int, Range(1)] = 1
    """Train this many networks in turn, with the seeds from SEED on, each as NAME-ITS_SEED."""
    resume: bool = False
    """Continue the run in checkpoints/NAME from its last saved step, or start it."""
    overwrite: bool = False
    """Delete the run in checkpoints/NAME and start anew."""
    save_minutes: Annotated[float, Range(0, 1e6)] = 5.0
    """Minutes between saves within an epoch; 0 saves after every step."""
    compile: bool = False
    """Use torch.compile, which rounds differently: faster with AMX, but not `fast` and `small`."""
    data_dir: str = "data"
    """Folder of CIFAR, or of the class folders of your own pictures."""
    download: bool = True
    """Download CIFAR into data_dir if it is not there."""
    max_params: Annotated[int, Range(1)] = MAX_PARAMS
    """Refuse a network with more parameters than this."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; auto: as WANDB_MODE says, else online if logged in, else offline."""


@dataclass(frozen=True)
class Config(Execution, Recipe, Architecture):
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
SMALL = replace(FAST, name="small", width=2)
BEST = Config(
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
)
PRESETS = {
    "tpsnet": Config(),
    "model1": Config(name="model1", num_blocks=(3, 3, 3), c1=34),
    "model2": Config(name="model2", num_blocks=(7, 7, 7), c1=22),
    "fast": FAST,
    "small": SMALL,
    "best": BEST,
    # A quarter as wide, and taught by it: docs/family.md.
    "tiny": replace(
        BEST,
        name="tiny",
        c1=16,
        cutout_size=0,
        epochs=300,
        teacher="best.safetensors",
        teacher_views=10,
        label_smoothing=0.0,
        warmup_epochs=45,
    ),
    # The longer a training, the less weight decay it needs, and the more augmentation.
    "marathon": replace(
        BEST,
        name="marathon",
        mixing=0.5,
        epochs=700,
        weight_decay=2e-4,
        warmup_epochs=1,
        ema_decay=0.999,
    ),
    "mine": replace(
        SMALL,
        name="mine",
        dataset="folder",
        data_dir="photos",
        init="small.safetensors",
        small_fraction=0.0,
        epochs=40,
        batch_size=32,
        keep_fraction=1.0,
        lr=0.03,
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
# The test accuracy of `python train.py NAME`, with the number of runs and the machine.
CLAIMS = {
    "tpsnet": "94.84% as published, not repeated here yet: the paper's network",
    "model1": "94.02% as published, not repeated here yet: wider, [3, 3, 3] blocks",
    "model2": "94.24% as published, not repeated here yet: [7, 7, 7] blocks",
    "fast": "94.90 ± 0.16% (3 seeds on an NVIDIA H200)",
    "small": "93.72% (1 run on an NVIDIA H200)",
    "best": "96.77 ± 0.07% (3 seeds on an NVIDIA H200): the highest accuracy",
    "tiny": "93.97% (1 run, 6.8 h on two CPU cores): taught by `best`",
    "marathon": "not trained yet: `best` for four times as long",
    "mine": "your own pictures, from `small`: docs/own-pictures.md",
    "demo": "99.72% of the digits (1 run, under 2 min on two cores of an EPYC)",
}


# ---------------------------------------------------------------- schedules


def steps_per_epoch(config: Config, num_images: int) -> int:
    """Steps of an epoch of `num_images` training images."""
    steps = num_images // config.batch_size + (left_over(config, num_images) > 0)
    return min(steps, config.max_steps_per_epoch or steps)


def left_over(config: Config, num_images: int) -> int:
    """Size of the last, smaller batch of an epoch; 0 if there is none.

    It has at least an eighth of a batch. Fewer images are left out, different ones in each epoch:
    the statistics that batch normalization takes from one or two images cost accuracy
    (docs/own-pictures.md).
    """
    rest = num_images % config.batch_size
    return rest if 8 * rest >= config.batch_size else 0


def images_per_epoch(config: Config, num_images: int) -> int:
    """How many of the training images an epoch trains on."""
    offered = min(steps_per_epoch(config, num_images) * config.batch_size, num_images)
    return round(config.keep_fraction * offered)


def image_size(config: Config, epoch: int) -> int:
    """Side of the images of an epoch (from 1), in pixels."""
    small = epoch <= round(config.small_fraction * config.epochs, 6)  # .29 x 100 is below 29
    return config.small_size if small else IMAGE_SIZE


def view_of(config: Config, epoch: int) -> int:
    """The epoch (from 1) whose draw from AutoAugment or TrivialAugment `epoch` trains on."""
    return (epoch - 1) % config.teacher_views + 1 if config.teacher_views else epoch


# ---------------------------------------------------------------- checks, before any work

PLAIN_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"  # of a folder of runs


def check_config(config: Config) -> None:
    """Raise InputError, naming the field, if this configuration cannot be trained."""
    check_fields(config)
    if not re.fullmatch(f"({PLAIN_NAME}/)?{PLAIN_NAME}", config.name):
        raise InputError(
            f"name: {config.name!r} must be NAME or GROUP/NAME, each of at most 100 letters, digits"
            " and . _ -, and not begin with . or -"
        )
    if config.resume and config.overwrite:
        raise InputError("overwrite: not with --resume, which goes on with the run; use one")
    if config.warmup_epochs >= config.epochs:
        raise InputError(
            f"warmup_epochs: {config.warmup_epochs} of {config.epochs} epochs; use 0 to"
            f" {config.epochs - 1}"
        )
    if config.teacher and config.label_smoothing:
        raise InputError(
            f"label_smoothing: {config.label_smoothing} with a teacher, whose answers are soft"
            " already; use 0"
        )
    if config.teacher_views and not config.teacher:
        raise InputError(
            f"teacher_views: {config.teacher_views} without a teacher; give a --teacher, or 0"
        )
    if config.nesterov and not config.momentum:
        raise InputError("momentum: 0 with nesterov; give one over 0, or --no-nesterov")
    policies = config.auto_augment, config.trivial_augment
    if all(policies):
        raise InputError("trivial_augment: not with auto_augment, which it replaces; use one")
    if config.teacher_views > 1 and not any(policies):
        raise InputError(
            f"teacher_views: {config.teacher_views}, but all views of an image are alike without"
            " auto_augment or trivial_augment; use one of them, or 1"
        )
    moved = config.flip != "none" or config.crop_padding or any(policies)
    if config.dataset == "digits" and moved:
        raise InputError(
            "flip, crop_padding, auto_augment, trivial_augment: a digit may become another sign;"
            " add --flip none --crop-padding 0 --no-auto-augment --no-trivial-augment, or start"
            " from the demo preset"
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
    """Raise InputError if `num_images` cannot be divided into batches for all processes."""
    if not num_processes <= config.batch_size <= num_images:
        raise InputError(
            f"batch_size: {config.batch_size} for {num_images:,} training images and"
            f" {num_processes} process{'es' * (num_processes > 1)}; use {num_processes} to"
            f" {num_images:,}"
        )
    last = left_over(config, num_images) or config.batch_size
    if last < num_processes:
        raise InputError(
            f"batch_size: {config.batch_size} leaves a last batch of {last} for"
            f" {num_processes} processes; use another"
        )
    smallest = config.small_size if config.small_fraction else IMAGE_SIZE
    side = feature_size(config, smallest)
    if round(config.keep_fraction * (last // num_processes)) < 2 and side == 1:
        raise InputError(
            f"batch_size: {config.batch_size} leaves a batch of one image to train on, from which"
            " batch normalization learns nothing where a feature map is one pixel; use another"
        )


def check_resumable(config: Config, stored: dict[str, object], folder: Path) -> None:
    """Raise InputError if a run that was started with other constants cannot continue with these.

    The fields of `Execution` may change, and `epochs` may grow; from there on the schedule is that
    of the longer run. `init` and `teacher` may name the same weights in another place.

    Args:
        stored: the constants that the run was started with.
        folder: of the run, for the message.
    """
    for constant in (*fields(Architecture), *fields(Recipe)):
        name, new = constant.name, getattr(config, constant.name)
        # A constant that is not stored is newer than the run; its default changes nothing.
        old = stored.get(name, constant.default)
        old = tuple(old) if isinstance(old, list) else old  # of a notebook, by an older version
        if new == old or (name == "epochs" and new > old):
            continue
        if name in ("init", "teacher") and old and new:  # the state has their weights' hash
            continue
        if name == "num_classes":  # follows from the data
            raise InputError(
                f"data_dir: {new:,} classes, but the run in {folder} was started with {old:,}; give"
                " it the same data, or another --name"
            )
        more = " or more" if name == "epochs" else ""
        raise InputError(
            f"{name}: {new!r}, but the run in {folder} was started with {reprlib.repr(old)};"
            f" give that{more}, or another --name"
        )


# ---------------------------------------------------------------- JSON


def record(config: Config) -> dict[str, object]:
    """The constants of a run as JSON values, with `resume` and `overwrite` off."""
    return asdict(replace(config, resume=False, overwrite=False))


def load_config(path: str | Path) -> Config:
    """Read the constants in a config.json, or in the best.json of a search.

    Raises:
        InputError: the file is missing, holds something else, or its constants cannot be trained.
    """
    remedy = "name a config.json that train.py wrote, or the best.json of a search"
    try:
        config = Config(**read_json(path))
    except OSError as error:
        raise InputError(
            f"config: cannot read {str(path)!r} ({error.strerror}); {remedy}"
        ) from None
    except (TypeError, ValueError) as error:
        raise InputError(
            f"config: {path} holds no constants of a run ({first_line(error)}); {remedy}"
        ) from None
    for name, value in asdict(config).items():
        if isinstance(value, str) and has_control_characters(value):  # -h prints it
            raise InputError(f"config: {path} has control characters in its {name}; {remedy}")
    check_config(config)
    return config


# ---------------------------------------------------------------- the command line of train.py

GROUPS = (Architecture, Data, Optimization, Arithmetic, Execution)  # the headings of -h


def parse_command_line(args: list[str]) -> Config:
    """The constants of the preset or file that the arguments name, with their overrides.

    Raises:
        InputError: both are named, the file is wrong (see `load_config`), --resume is given a
            value, or two options contradict each other.
    """
    args = plain_arguments(args, Config)
    for option, value in itertools.pairwise(args):
        if option == "--resume" and value not in PRESETS and not value.startswith("-"):
            raise InputError(f"resume: {value!r}, but --resume takes no value; {resuming(value)}")
    for place, (before, arg) in enumerate(itertools.pairwise(args), start=1):
        is_value = before.startswith("-") or args[0] in PRESETS
        if arg in PRESETS and not is_value:  # it would be taken for one more value of a list
            args = [arg, *args[:place], *args[place + 1 :]]
    # Parsed once to find the preset or file, and once more with its constants as the defaults.
    bare = [arg for arg in args if arg not in ("-h", "--help")]
    preset, path, *_ = parse(bare, "tpsnet", "")
    if path and preset == parse(bare, "demo", "")[0]:  # the same for two defaults, so it was named
        raise InputError(f"config: {path!r} beside the preset {preset}; leave one of them out")
    *_, config = parse(args, preset, path)
    return config


def resuming(run: str) -> str:
    """The command that resumes a run, given as its name, its folder or a file in it."""
    for folder in (Path(run), CHECKPOINTS / run, Path(run).parent):
        if (file := folder / "config.json").exists():
            return f"`python train.py --config {quoted(file)} --resume` goes on with that run"
    return "repeat the command that started the run, with --resume alone"


def parse(args: list[str], preset: str, path: str) -> tuple[str, str, Config]:
    """The preset, the path of the file and all constants; what `args` lack is as given."""
    import tyro

    @dataclass
    class CommandLine:
        preset: Annotated[Literal[tuple(PRESETS)], tyro.conf.Positional]
        """Constants to start from."""
        config: str
        """Start from the constants of a file instead: a run's config.json, a search's best.json."""
        network: Architecture
        data: Data
        optimization: Optimization
        arithmetic: Arithmetic
        run: Execution

    start = load_config(path) if path else PRESETS[preset]
    claims = "\n".join(f"  {name:8} {claim}" for name, claim in CLAIMS.items())
    parsed = tyro.cli(
        CommandLine,
        args=args,
        default=CommandLine(preset, path, *(part_of(start, group) for group in GROUPS)),
        prog="train.py",
        description="Train a network. Presets, and their test accuracy, mean ± standard deviation:"
        f"\n\n{claims}\n\nThe defaults below are those of {path or preset}.",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    groups = (parsed.network, parsed.data, parsed.optimization, parsed.arithmetic, parsed.run)
    constants = {k: v for group in groups for k, v in vars(group).items()}
    given = named_options(args)
    if parsed.network.channels and "width" in given:
        raise InputError(
            f"width: {parsed.network.width} beside channels, which replace it; leave one of the two"
            " out; --channels without a value drops those of --config"
        )
    if "num_classes" in given:
        raise InputError("num_classes: follows from the data; leave --num-classes out")
    if start.dataset == "folder" != parsed.data.dataset and "data_dir" not in given:
        raise InputError(
            f"data_dir: {start.data_dir} is for your own pictures, not for {parsed.data.dataset};"
            f" add --data-dir {Config.data_dir}"
        )
    return parsed.preset, parsed.config, Config(**constants)
