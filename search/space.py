"""The options of a search, the space of networks, and the sample drawn for each trial.

Trial N's sample is a pure function of the seed and N. With TPE it also depends on the trials that
had ended when it was drawn.
"""

import itertools
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal, NamedTuple

import torch

from config import PLAIN_NAME, PRESETS, Config, check_config
from data import class_names_of
from engine.folders import count_pictures
from model import MAX_PARAMS, WHITENING_C1, ResNet, count_macs, count_parameters, feature_size
from utils import (
    InputError,
    Range,
    check_fields,
    check_integer,
    derive_seed,
    expanded,
    first_line,
)


class LogUniform(NamedTuple):
    """An entry of SPACE: a number from `low` to `high`, uniform on a logarithmic scale."""

    low: float
    high: float


# The paper's choices; every value is equally likely. Those in PER_STAGE are drawn once per stage.
# Any other constant of config.py can be added under its name, such as "lr": LogUniform(0.01, 1.0),
# or with a single value that all trials share: "optimizer": ("muon",). "channels": range(16, 129)
# in place of "width" draws the channels of each stage.
SPACE = {
    "num_stages": (2, 3, 4),
    "same_blocks": (True, False),  # the same number of blocks in all stages, or one for each
    "num_blocks": range(1, 17),
    "c1": range(8, 49),
    "width": (1, 2),
    "conv_kernel": (1, 3, 5),
    "skip_kernel": (1, 3),
    "pooled_size": (1, 2, 4),  # side of the pooled feature map; it determines pool_kernel
}
PER_STAGE = ("num_blocks", "channels", "conv_kernel", "skip_kernel")
# The entries that every space needs.
SHAPE = ("num_stages", "same_blocks", "num_blocks", "conv_kernel", "skip_kernel", "pooled_size")

MAX_REJECTED = 2000  # samples in a row outside the limits, after which the search gives up
VAL_SIZE = {"cifar10": 5000, "cifar100": 5000, "digits": 200}  # images
RESTARTS = 2  # cosines in a training with the schedule cosine_restarts

Space = dict[str, tuple | list | range | LogUniform]
Sample = dict[str, object]  # a value for each key of `entries(space)`


@dataclass(frozen=True)
class Search:
    """The options of a search."""

    name: str = "search"
    """Folder of the search: checkpoints/NAME."""
    num_samples: Annotated[int, Range(1)] = 200
    """Number of trials."""
    epochs: Annotated[int, Range(1)] = 30
    """Epochs of a trial that is not stopped early."""
    grace_epochs: Annotated[int, Range(0)] = 0
    """Epochs before a trial can be stopped early: EPOCHS to stop none, 0 for a sixth of EPOCHS."""
    algorithm: Literal["random", "optuna"] = "random"
    """Draw independently, or with Optuna's TPE, which learns from the trials that have ended."""
    min_params: Annotated[int, Range(0)] = 0
    """Reject networks with fewer parameters, to compare networks of similar size."""
    max_params: Annotated[int, Range(1)] = MAX_PARAMS
    """Reject networks with more parameters."""
    max_macs: Annotated[int, Range(0)] = 0
    """Reject networks with more multiply-accumulates (MACs) per image; 0 for no limit."""
    val_size: Annotated[int, Range(0)] = 0
    """Training images held out to compare trials; 0: 5,000, 200 digits, a fifth of your own."""
    train_size: Annotated[int, Range(0)] = 0
    """Number of the other training images to train on; 0 for all."""
    cpus_per_trial: Annotated[float, Range(0.01, 1024)] = 1.0
    """CPU cores per trial."""
    gpus_per_trial: Annotated[float | None, Range(0, 1024)] = None
    """GPUs per trial; with 0.5, two trials share one. Default: 1 if there is a GPU, else 0."""
    address: str = ""
    """HOST:PORT of a running Ray cluster, or `auto`. Default: only this machine."""
    max_minutes: Annotated[float, Range(0, 1e6)] = 0.0
    """Minutes after which all running trials are interrupted; 0 for no limit."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Seed of the samples and of every training."""
    dataset: Literal["cifar10", "cifar100", "digits", "folder"] | None = None
    """Data set to train on. Default: that of the preset."""
    data_dir: str = ""
    """Folder of CIFAR, or of the class folders of your own pictures. Default: the preset's."""
    download: bool = True
    """Download CIFAR into data_dir if it is not there."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "disabled"
    """Weights & Biases: one run per trial, grouped under the name of the search."""
    resume: str = ""
    """Name of a search to continue; failed trials are run again. Its options stay as they were."""


def check_search(search: Search) -> None:
    """Raise InputError, naming the field, if the options are invalid."""
    check_fields(search)
    check_integer("grace_epochs", search.grace_epochs, 0, search.epochs)
    check_integer("min_params", search.min_params, 0, search.max_params)
    if "/" in search.name:
        raise InputError(f"name: {search.name!r} must be a plain folder name; leave out the /")
    longest = search.name if search.resume else f"{search.name}-best"  # the network to train then
    if not re.fullmatch(PLAIN_NAME, longest):
        raise InputError(
            f"name: {search.name!r} must be 1 to 95 letters, digits and . _ -, and not begin"
            " with . or -"
        )
    if search.algorithm == "optuna":
        try:
            import optuna  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"algorithm: optuna cannot be imported ({first_line(error)}); run"
                " `pip install -r requirements-dev.txt`"
            ) from None


def check_space(space: Space) -> None:
    """Raise InputError, naming the entry, if the space is invalid."""
    if missing := [name for name in SHAPE if name not in space]:
        raise InputError(f"SPACE: {', '.join(missing)} missing; restore them in search/space.py")
    constants = {constant.name for constant in fields(Config)}
    for name, values in space.items():
        if name == "pool_kernel":
            raise InputError("SPACE: pool_kernel is determined by pooled_size; set that instead")
        if name not in SHAPE and name not in constants:
            raise InputError(f"SPACE: {name!r} is not a constant of config.py; remove it")
        if name == "width" and "channels" in space:
            raise InputError("SPACE: width changes nothing beside channels; remove one of the two")
        empty = not isinstance(values, tuple | list | range) or not len(values)
        if empty or (isinstance(values, LogUniform) and not 0 < values.low < values.high):
            raise InputError(
                f"SPACE: {name} is {values!r}, which has no values; use a tuple, a range, or a"
                " LogUniform with 0 < low < high"
            )


def with_defaults(search: Search, preset: str) -> Search:
    """The options, with the values that 0 and nothing stand for.

    Raises:
        InputError: the class folders are wrong (engine/folders.py).
    """
    base = PRESETS[preset]
    same_data = search.dataset in (None, base.dataset)
    search = replace(
        search,
        grace_epochs=search.grace_epochs or max(1, search.epochs // 6),
        dataset=search.dataset or base.dataset,
        data_dir=search.data_dir or (base if same_data else Config).data_dir,
    )
    if search.val_size:
        return search
    if search.dataset != "folder":
        return replace(search, val_size=VAL_SIZE[search.dataset])
    classes = count_pictures(expanded(search.data_dir))
    return replace(search, val_size=max(len(classes), sum(classes.values()) // 5))


def with_epochs(config: Config, epochs: int) -> Config:
    """The same training in `epochs` epochs: warm-up and restarts in proportion."""
    warmup = min(math.ceil(config.warmup_epochs * epochs / config.epochs), epochs - 1)
    return replace(
        config,
        epochs=epochs,
        warmup_epochs=warmup,
        restart_epochs=math.ceil((epochs - warmup) / RESTARTS),  # the last cosine may be shorter
    )


def base_config(search: Search, preset: str) -> Config:
    """The constants that all trials share."""
    base = PRESETS[preset]
    base = replace(
        with_epochs(base, search.epochs),
        name=search.name,
        val_size=search.val_size,
        train_size=search.train_size,
        max_params=search.max_params,
        seed=search.seed,
        dataset=search.dataset or base.dataset,
        data_dir=search.data_dir or base.data_dir,
        download=search.download,
        wandb=search.wandb,
        init="",  # whose weights fit one network alone
        teacher="",  # which has seen the validation images
        teacher_views=0,
        small_fraction=0.0,  # some networks would pool smaller images to fewer features
    )
    return replace(base, num_classes=len(class_names_of(base)))


def configuration(sample: Sample, base: Config) -> Config:
    """The constants of a sample; those that were not drawn come from `base`."""
    stages = sample["num_stages"]
    shape = {
        name: tuple(sample[f"{name}_{stage}"] for stage in range(1, stages + 1))
        for name in PER_STAGE
        if f"{name}_1" in sample
    }
    if sample["same_blocks"]:
        shape["num_blocks"] = shape["num_blocks"][:1] * stages
    constants = {constant.name for constant in fields(Config)}
    config = replace(base, **shape, **{n: v for n, v in sample.items() if n in constants})
    return replace(config, pool_kernel=max(1, feature_size(config) // sample["pooled_size"]))


# ---------------------------------------------------------------- drawing


def entries(space: Space) -> Space:
    """The space with one entry per stage for PER_STAGE: num_blocks_1, num_blocks_2, ..."""
    found, stages = {}, range(1, max(space["num_stages"]) + 1)
    for name, values in space.items():
        if name in PER_STAGE:
            found |= {f"{name}_{stage}": values for stage in stages}
        else:
            found[name] = values
    return found


def random_samples(space: Space, seed: int) -> Iterator[Sample]:
    """Yield independent samples."""
    rng = random.Random(seed)

    def choose(values: tuple | list | range | LogUniform) -> object:
        if isinstance(values, LogUniform):
            return math.exp(rng.uniform(math.log(values.low), math.log(values.high)))
        return rng.choice(values)

    while True:
        yield {name: choose(values) for name, values in entries(space).items()}


def tpe_samples(space: Space, seed: int, tried: list[tuple[Sample, float]]) -> Iterator[Sample]:
    """Yield samples of Optuna's TPE, fitted to the samples in `tried` and their accuracies."""
    import optuna
    from optuna import distributions as of

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    domains = {}
    for name, values in entries(space).items():
        if isinstance(values, LogUniform):
            domains[name] = of.FloatDistribution(*values, log=True)
        elif isinstance(values, range):
            domains[name] = of.IntDistribution(values[0], values[-1], step=values.step)
        else:
            domains[name] = of.CategoricalDistribution(values)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    for sample, accuracy in tried:
        study.add_trial(
            optuna.trial.create_trial(params=sample, distributions=domains, value=accuracy)
        )
    while True:
        trial = study.ask(domains)
        yield trial.params
        study.tell(trial, state=optuna.trial.TrialState.FAIL)  # TPE ignores rejected samples


def draw_sample(
    search: Search, base: Config, space: Space, number: int, tried: list[tuple[Sample, float]]
) -> tuple[Sample, int]:
    """Draw the sample of trial `number`; returns it and how many were rejected before it.

    A sample is rejected if its network is outside the limits of the search or cannot be trained.
    The size is computed without allocating the network.

    Args:
        tried: samples and accuracies that TPE learns from.

    Raises:
        InputError: MAX_REJECTED samples in a row were rejected.
    """
    seed = derive_seed("search", search.seed, number)
    if base.stem == "whitening" and WHITENING_C1 in space.get("c1", ()) and "stem" not in space:
        space = space | {"c1": (WHITENING_C1,)}  # or nearly all samples would be rejected
    if search.algorithm == "optuna":
        samples = tpe_samples(space, seed, tried)
    else:
        samples = random_samples(space, seed)
    reason = ""
    for rejected, sample in enumerate(itertools.islice(samples, MAX_REJECTED)):
        config = configuration(sample, base)
        try:
            check_limits(config, search)
            check_config(config)
            return sample, rejected
        except InputError as error:
            reason = first_line(error)
    macs = f" and at most {search.max_macs:,} MACs" if search.max_macs else ""
    raise InputError(
        f"min_params: none of {MAX_REJECTED:,} samples has {search.min_params:,} to"
        f" {search.max_params:,} parameters{macs} and can be trained (the last one: {reason});"
        " use wider limits, or widen SPACE in search/space.py"
    )


def check_limits(config: Config, search: Search) -> None:
    """Raise InputError if a network has too few or too many parameters or MACs for the search."""
    with torch.device("meta"):
        network = ResNet(config)
    num_params = count_parameters(network)
    if num_params > search.max_params:
        raise InputError(f"max_params: {num_params:,} parameters are too many")
    if num_params < search.min_params:
        raise InputError(f"min_params: {num_params:,} parameters are too few")
    if search.max_macs and (macs := count_macs(network)) > search.max_macs:
        raise InputError(f"max_macs: {macs:,} MACs are too many")
