"""What a search draws and what its trials leave: options, space, samples, rows and folders.

Trial N's sample is a pure function of the seed and N; with TPE, of the trials that ended too. Its
folder holds all that it did, so that a search can be put together again from its folders.
"""

import contextlib
import csv
import hashlib
import itertools
import json
import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch

import utils
from checkpoint import PREVIOUS, load_run
from config import CHECKPOINTS, PRESETS, Config, check_config, check_resumable
from model import (
    MAX_PARAMS,
    ResNet,
    check_budget,
    count_macs,
    feature_size,
    model_cost,
    pooled_size,
)
from utils import InputError, Range, check_fields, check_integer, first_line


class LogUniform(NamedTuple):
    """Numbers whose logarithm is as likely to be anywhere between the ends' logarithms."""

    low: float
    high: float


# What is drawn: the paper's choices, each value as likely as the others. Of num_blocks, conv_kernel
# and skip_kernel one is drawn for every stage. Any further constant of config.py can be added under
# its name: "lr": LogUniform(0.01, 1.0), or with one value for all: "optimizer": ("muon",).
SPACE = {
    "num_stages": (2, 3, 4),
    "same_blocks": (True, False),  # as many in all stages, or not
    "num_blocks": range(1, 17),
    "c1": range(8, 49),
    "width": (1, 2),
    "conv_kernel": (1, 3, 5),
    "skip_kernel": (1, 3),
    "pooled_size": (1, 2, 4),  # side of the pooled feature map; the pool kernel follows from it
}
RESTARTS = 2  # cosines in a training with the schedule cosine_restarts
MAX_REJECTED = 2000  # samples in a row
VAL_SIZE = {"cifar10": 5000, "digits": 200}  # images
CHANCE = 10.0  # percent: to TPE, the accuracy of a trial that diverged
METRIC = "val_accuracy"
ENDED = ("finished", "stopped", "diverged")  # for good
DAMAGED = "trials.csv.damaged"
STATUSES = (*ENDED, "running", "cut off", "failed")  # these go on with --resume
WEIGHTS = ("last.pt", PREVIOUS, "model.safetensors")

PER_STAGE = ("num_blocks", "conv_kernel", "skip_kernel")
SHAPE = ("num_stages", "same_blocks", *PER_STAGE, "pooled_size")  # the entries that are no constant
Space = dict[str, tuple | list | range | LogUniform]
Row = dict[str, object]  # of trials.csv, or of a log.csv
Sample = dict[str, object]  # a value for each of `entries`


@dataclass(frozen=True)
class Search:
    """What to search, for how long and where."""

    name: str = "search"
    """Folder of the search: checkpoints/NAME."""
    num_samples: Annotated[int, Range(1)] = 200
    """Trials."""
    epochs: Annotated[int, Range(1)] = 30
    """Epochs of a trial that is not stopped early."""
    grace_epochs: Annotated[int, Range(0)] = 0
    """Epochs that every trial gets; as many as EPOCHS to stop none; 0 for a sixth of them."""
    algorithm: Literal["random", "optuna"] = "random"
    """Draw independently, or by Optuna's TPE, which learns from the trials that ended."""
    min_params: Annotated[int, Range(0)] = 0
    """Refuse a network with fewer parameters than this, to compare those of a size."""
    max_params: Annotated[int, Range(1)] = MAX_PARAMS
    """Refuse a network with more."""
    max_macs: Annotated[int, Range(0)] = 0
    """Refuse a network with more multiply-accumulates per image (MACs); 0 for no limit."""
    val_size: Annotated[int, Range(0)] = 0
    """Training images that are set aside to choose by; 0 for 5,000 (of the digits, 200)."""
    train_size: Annotated[int, Range(0)] = 0
    """How many of the others to train on; 0 for all."""
    cpus_per_trial: Annotated[float, Range(0.01, 1024)] = 1.0
    """Processors of a trial."""
    gpus_per_trial: Annotated[float | None, Range(0, 1024)] = None
    """GPUs of a trial; 0.5 lets two share one. Default: 1 where there are any, else 0."""
    address: str = ""
    """HOST:PORT of a running Ray cluster, or `auto`; default: this machine alone."""
    max_minutes: Annotated[float, Range(0, 1e6)] = 0.0
    """Minutes after which all trials are cut off; 0 for no limit."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Decides what is drawn, and is the seed of all trainings."""
    data_dir: str = "data"
    """Folder that holds CIFAR-10, or receives it."""
    download: bool = True
    """Fetch CIFAR-10 if it is not in data_dir."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "disabled"
    """Weights & Biases: a run per trial, in a group of the search's name."""
    resume: str = ""
    """Name of a search to go on with, failed trials included; all else is as it was."""


def check_search(search: Search) -> None:
    """Raise InputError, naming the field, if this cannot be searched."""
    check_fields(search)
    check_integer("grace_epochs", search.grace_epochs, 0, search.epochs)
    check_integer("min_params", search.min_params, 0, search.max_params)
    if "/" in search.name:
        raise InputError(f"name: {search.name!r} must be a plain folder name; leave out the /")
    if search.algorithm == "optuna":
        try:
            import optuna  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"algorithm: optuna cannot be used ({first_line(error)}); run"
                " `pip install -r requirements.txt`"
            ) from None


def check_space(space: Space) -> None:
    """Raise InputError if an entry is empty, missing, unknown or nothing to draw from."""
    if missing := [name for name in SHAPE if name not in space]:
        raise InputError(f"SPACE: it lacks {', '.join(missing)}; add what trials.py came with")
    constants = {constant.name for constant in fields(Config)}
    for name, values in space.items():
        if name == "pool_kernel":
            raise InputError("SPACE: pool_kernel follows from pooled_size; give that")
        if name not in SHAPE and name not in constants:
            raise InputError(f"SPACE: {name!r} is not a constant of config.py; remove it")
        empty = not isinstance(values, tuple | list | range) or not len(values)
        if empty or (isinstance(values, LogUniform) and not 0 < values.low < values.high):
            raise InputError(
                f"SPACE: {name} is empty ({values!r}); give it a tuple, a range, or a LogUniform"
                " whose ends are in order"
            )


def base_config(search: Search, preset: str) -> Config:
    """What all trials have in common."""
    shared = "name epochs val_size train_size max_params seed data_dir download wandb"
    options = {name: getattr(search, name) for name in shared.split()}
    base = PRESETS[preset]
    return replace(
        base,
        restart_epochs=-(-search.epochs // RESTARTS),  # if odd, the last cosine lacks one
        warmup_epochs=base.warmup_epochs * search.epochs // base.epochs,
        small_fraction=0.0,  # not every network pools smaller images to as many features
        **options,
    )


def configuration(sample: Sample, base: Config) -> Config:
    """The constants that a sample stands for; what it lacks is `base`'s."""
    stages = sample["num_stages"]
    shape = {
        name: tuple(sample[f"{name}_{stage}"] for stage in range(1, stages + 1))
        for name in PER_STAGE
    }
    if sample["same_blocks"]:
        shape["num_blocks"] = shape["num_blocks"][:1] * stages
    size = feature_size(stages, base.stem, base.downsample)
    shape["pool_kernel"] = max(1, size // sample["pooled_size"])
    constants = {constant.name for constant in fields(Config)}
    return replace(base, **shape, **{n: v for n, v in sample.items() if n in constants})


# ---------------------------------------------------------------- drawing


def entries(space: Space) -> Space:
    """The space with an entry per stage where each stage has its own."""
    found = {}
    for name, values in space.items():
        stages = range(1, max(space["num_stages"]) + 1) if name in PER_STAGE else ()
        found |= {f"{name}_{stage}": values for stage in stages} or {name: values}
    return found


def random_samples(space: Space, seed: int) -> Iterator[Sample]:
    """Samples, each drawn independently."""
    rng = random.Random(seed)

    def draw(values: tuple | list | range | LogUniform) -> object:
        if isinstance(values, LogUniform):
            return math.exp(rng.uniform(math.log(values.low), math.log(values.high)))
        return rng.choice(values)

    while True:
        yield {name: draw(values) for name, values in entries(space).items()}


def tpe_samples(space: Space, seed: int, tried: list[tuple[Sample, float]]) -> Iterator[Sample]:
    """Samples that Optuna's TPE draws after learning from those `tried`, with their accuracies."""
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
        study.tell(trial, state=optuna.trial.TrialState.FAIL)  # of a refused one nothing is learned


def draw_trial(
    search: Search,
    base: Config,
    space: Space,
    number: int,
    tried: list[tuple[Sample, float]],
) -> tuple[Sample, int]:
    """The sample of trial `number`, and how many were refused before it, most for their size.

    The size is computed, nothing is allocated.

    Args:
        tried: the samples and accuracies that TPE learns from.

    Raises:
        InputError: none of MAX_REJECTED samples has the wanted size and can be trained.
    """
    seed = utils.derive_seed("search", search.seed, number)
    drawn = random_samples(space, seed)
    if search.algorithm == "optuna":
        drawn = tpe_samples(space, seed, tried)
    reason = ""
    for rejected, sample in enumerate(itertools.islice(drawn, MAX_REJECTED)):
        config = configuration(sample, base)
        try:
            check_size(config, search)
            check_config(config)
            return sample, rejected
        except InputError as error:
            reason = first_line(error)
    cost = f" and up to {search.max_macs:,} MACs" if search.max_macs else ""
    raise InputError(
        f"min_params: none of {MAX_REJECTED:,} samples can be trained and has"
        f" {search.min_params:,} to {search.max_params:,} parameters{cost} (the last one:"
        f" {reason}); give wider limits, or widen SPACE in trials.py"
    )


def check_size(config: Config, search: Search) -> None:
    """Raise InputError if a network is too small or too large for this search."""
    num_params = check_budget(config, search.max_params)
    if num_params < search.min_params:
        raise InputError(f"min_params: {num_params:,} parameters are too few")
    if search.max_macs:
        with torch.device("meta"):
            macs = count_macs(ResNet(config))
        if macs > search.max_macs:
            raise InputError(f"max_macs: {macs:,} MACs are too many")


# ---------------------------------------------------------------- the trials and their folders


def write_record(path: Path, values: dict[str, object]) -> None:
    """Write search.json or a trial.json, with the SHA-256 of all that it says."""
    utils.write_json(path, values | {"sha256": checksum(values)})


def read_record(path: Path) -> dict[str, object]:
    """What `write_record` wrote.

    Raises:
        OSError, TypeError, ValueError: it is missing, damaged or was edited.
    """
    values = dict(utils.read_json(path))
    if values.pop("sha256", None) not in (None, checksum(values)):  # older ones have none
        raise ValueError(f"{path.name} was damaged or edited: its SHA-256 is another")
    return values


def checksum(values: dict[str, object]) -> str:
    """SHA-256 of a record."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Trials:
    """The trials of a search. `rows`, by number, are those of trials.csv.

    A trial's row is in its trial.json too, with the `sample` that it drew.
    """

    def __init__(self, search: Search, preset: str, space: Space) -> None:
        self.search, self.space, self.base = search, space, base_config(search, preset)
        self.path, self.numbers = CHECKPOINTS / search.name, range(1, search.num_samples + 1)
        others = (name for name in space if name not in SHAPE)
        drawn = dict.fromkeys([*PER_STAGE, "pool_kernel", "c1", "width", *others])
        self.columns = (
            *("trial", "status", METRIC, "early_accuracy", "epochs", "seconds", "num_params"),
            *("macs", "num_stages", "pooled_size", *drawn, "rejected", "error"),
        )
        other = {name for name, values in space.items() if type(values[0]) not in (int, float)}
        self.numeric = set(self.columns) - {"status", "error", *PER_STAGE, *other}
        self.rows: dict[int, Row] = {}
        self.is_damaged = False  # trials.csv

    def folder(self, number: int) -> Path:
        """Where a trial's files are."""
        return self.path / f"{number:03d}"

    def config(self, row: Row) -> Config:
        """The constants of a trial."""
        name = f"{self.search.name}/{row['trial']:03d}"
        return replace(configuration(row["sample"], self.base), name=name)

    def blank(self, number: int) -> Row:
        """The row of a trial of which nothing is known."""
        return dict.fromkeys(self.columns) | {"trial": number, "epochs": 0, "sample": None}

    def draw(self, number: int) -> Row:
        """The row of a trial that has not begun.

        Raises:
            InputError: no sample has the wanted size.
        """
        tried = self.tried() if self.search.algorithm == "optuna" else []
        sample, rejected = draw_trial(self.search, self.base, self.space, number, tried)
        row = self.blank(number) | {"sample": sample, "rejected": rejected}
        config = self.config(row)
        for name in self.columns:
            value = getattr(config, name, sample.get(name, row[name]))
            row[name] = " ".join(map(str, value)) if isinstance(value, tuple) else value
        cost = model_cost(config)
        found = {"pooled_size": pooled_size(config), "num_params": cost.num_params}
        return row | found | {"epochs": 0, "macs": cost.macs}

    def tried(self) -> list[tuple[Sample, float]]:
        """Samples and accuracies of the trials that ended until now."""
        found = []
        for number in self.numbers:
            with contextlib.suppress(InputError):
                row = self.read(number)
                if row["status"] in ENDED:
                    found.append((row["sample"], row[METRIC] or CHANCE))
        return found

    def read(self, number: int) -> Row:
        """What a trial's folder tells.

        Raises:
            InputError: its trial.json is missing or damaged.
        """
        path = self.folder(number) / "trial.json"
        try:
            row = read_record(path)
            self.check(row)
            if row["trial"] != number or set(row["sample"]) != set(entries(self.space)):
                raise ValueError("it is another trial's")
            check_config(self.config(row))
            return row
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({first_line(error)})") from None

    def write(self, row: Row) -> None:
        """Have a trial's folder tell it; the weights go when it ends: so few epochs made them."""
        folder = self.folder(row["trial"])
        write_record(folder / "trial.json", row)
        for name in WEIGHTS if row["status"] in ENDED else ():
            (folder / name).unlink(missing_ok=True)

    def write_table(self) -> None:
        """Write trials.csv; one that was damaged is kept under another name."""
        path = self.path / "trials.csv"
        if self.is_damaged:
            with contextlib.suppress(OSError):  # then it cannot be written either
                path.replace(path.with_name(DAMAGED))
            self.is_damaged = False
        if self.rows:
            utils.write_csv(path, self.table())

    def check(self, row: Row) -> None:
        """Raise KeyError, TypeError or ValueError unless this is a row of trials.csv."""
        known = row["trial"] in self.numbers and row["status"] in STATUSES
        if not known or not set(self.columns) <= set(row):
            raise ValueError("no row of this search")
        check_integer("epochs", row["epochs"], 0)
        if row["status"] not in ENDED and row[METRIC] is None:
            return  # what it draws may be unknown
        if row["status"] != "diverged":
            utils.check_number(METRIC, row[METRIC], 0, 100)
        for name in PER_STAGE:
            _ = [int(number) for number in str(row[name]).split()]
        unknown = {name for name in (METRIC, "early_accuracy", "seconds") if row[name] is None}
        for name in self.numeric - unknown:
            utils.check_number(name, row[name], -1e15, 1e15)

    def load(self) -> None:
        """Know what the folders tell, and of a trial whose folder is damaged what trials.csv does.

        A damaged line of it costs that line.
        """
        path, header, lines = self.path / "trials.csv", b"", []
        if path.exists():
            with contextlib.suppress(OSError):
                header, *lines = path.read_bytes().splitlines() or [b""]
            lines = lines or [b""]  # there was one at least
        for line in lines:
            with contextlib.suppress(KeyError, TypeError, ValueError, RecursionError, csv.Error):
                names, cells = csv.reader([header.decode(), line.decode()])
                row = {
                    name: json.loads(cell) if cell and name in self.numeric else cell or None
                    for name, cell in zip(names, cells, strict=True)
                }
                self.check(row)
                # Of two lines of one trial, one is another trial's.
                self.rows[row["trial"]] = None if row["trial"] in self.rows else row
        self.rows = {number: row for number, row in self.rows.items() if row}
        self.is_damaged = len(self.rows) < len(lines)
        if self.is_damaged:
            utils.warn(f"{path} is damaged, kept as {DAMAGED}; the trials' folders tell the rest")
        for number in self.numbers:
            with contextlib.suppress(InputError):
                row = self.read(number)
                newer = {} if row["status"] in ENDED else self.rows.get(number, {})
                self.rows[number] = row | newer
        self.cut_off()

    def cut_off(self) -> None:
        """Note that no trial runs any more."""
        for row in self.rows.values():
            if row["status"] == "running":
                row["status"] = "cut off"

    def ended(self) -> set[int]:
        """The trials that have ended for good."""
        return {number for number, row in self.rows.items() if row["status"] in ENDED}

    def mend(self, number: int) -> None:
        """Remove what a trial left that has not ended, unless it can go on from there."""
        folder = self.folder(number)
        try:
            if folder.exists():
                config = self.config(self.read(number))
                if state := load_run(folder, resume=True, overwrite=False):
                    check_resumable(config, state["config"], folder)
        except InputError as error:
            if any(path.suffix in (".json", ".pt") for path in folder.iterdir()):  # else just made
                utils.warn(f"trial {number} starts anew: {first_line(error)}")
            shutil.rmtree(folder)

    def table(self) -> list[Row]:
        """The rows of trials.csv."""
        rows = (self.rows[number] for number in sorted(self.rows))
        return [{name: row[name] for name in self.columns} for row in rows]

    def best(self) -> Row | None:
        """The row with the highest validation accuracy, if one has any."""
        tried = (r for r in self.rows.values() if r[METRIC] is not None and r["status"] != "failed")
        return max(tried, key=lambda row: row[METRIC], default=None)
