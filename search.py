"""Search at random for the network of at most 5 million parameters that trains best, on Ray Tune.

    python search.py                              # 200 trials of up to 30 epochs of CIFAR-10
    python search.py demo --num-samples 8 --epochs 4 --name try   # digits, no download
    python search.py --resume search              # goes on with one that was cut off
    python train.py --config checkpoints/search/best.json --epochs 300

Configurations are drawn from SPACE. What has too many parameters is refused before it becomes a
trial; the rest is trained by train.py, as many at a time as there are processors, and what does
badly is stopped early (ASHA). Chosen is by validation accuracy: test images are not even read.

A search lives in checkpoints/NAME: trials.csv (a row per trial), best.json (what train.py takes),
figures, a folder with config.json and log.csv per trial, and Ray Tune's own state in ray/.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import filelock
import numpy as np
import torch
from tqdm import tqdm

import plots
import utils
from data import Dataset, load_dataset
from model import check_budget, feature_size, model_cost
from train import (
    CHECKPOINTS,
    PRESETS,
    Config,
    check_batches,
    check_config,
    has_state,
    load_config,
    make_config,
    record,
    train,
)
from utils import (
    DivergenceError,
    InputError,
    StoppedError,
    check_integer,
    check_number,
    first_line,
)

try:
    import ray
    from ray import cloudpickle, tune
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search import Searcher
except ModuleNotFoundError as error:
    print(
        f"error: {error.name}: not installed; run `pip install -r requirements.txt`",
        file=sys.stderr,
    )
    sys.exit(2)


class LogUniform(NamedTuple):
    """Numbers whose logarithm is as likely to be anywhere between the ends' logarithms."""

    low: float
    high: float


# What is drawn, each value as likely as the others. Of num_blocks, conv_kernel and skip_kernel one
# is drawn for every stage. Any further constant of train.py can be added under its name.
SPACE = {
    "num_stages": (2, 3, 4),
    "same_blocks": (True, False),  # as many in all stages, or not
    "num_blocks": range(1, 17),
    "c1": range(8, 49),
    "width": (1, 2),
    "conv_kernel": (1, 3, 5),
    "skip_kernel": (1, 3),
    "pooled_size": (1, 2, 4),  # side of the pooled feature map; the pool kernel follows from it
    "dropout": (0.0, 0.1, 0.2, 0.3),
    "classifier_dropout": (0.0, 0.1, 0.2, 0.3),
    "lr": LogUniform(1e-4, 1.0),
    "batch_size": (32, 64, 128, 256),
    "optimizer": ("sgd", "muon"),
    "schedule": ("cosine", "cosine_restarts", "linear"),
}
RESTARTS = 2  # cosines in a training with the schedule cosine_restarts
REDUCTION = 4  # ASHA: of the trials that come to a rung, one in so many goes on to the next
MAX_REJECTED = 2000  # samples in a row
LET_GO = 60  # seconds
VAL_SIZE = {"cifar10": 5000, "digits": 200}  # images

PER_STAGE = ("num_blocks", "conv_kernel", "skip_kernel")
SHAPE = ("num_stages", "same_blocks", *PER_STAGE, "pooled_size")  # the entries that are no constant
METRIC = "val_accuracy"
WEIGHTS = ("last.pt", utils.PREVIOUS, "model.safetensors")
# Ray Tune's: of the trials, of how many were made, and of the searcher, UnderBudget.
STATE_FILES = ("experiment_state-*.json", "search_gen_state-*.json", "searcher-state-*.pkl")
RECEIVED = []  # signals that asked to end


@dataclass(frozen=True)
class Search:
    """What to search, for how long and where."""

    name: str = "search"
    """Folder of the search: checkpoints/NAME."""
    num_samples: int = 200
    """Trials."""
    epochs: int = 30
    """Epochs of a trial that is not stopped early."""
    grace_period: int = 0
    """Epochs that every trial gets; as many as EPOCHS to stop none; 0 for a sixth of them."""
    algorithm: Literal["random", "optuna"] = "random"
    """Draw independently, or by Optuna's TPE, which learns from the trials that ended."""
    min_params: int = 0
    """Refuse a network with fewer parameters too, to stay close under the budget."""
    val_size: int = 0
    """Training images that are set aside to choose by; 0 for 5,000 (of the digits, 200)."""
    train_size: int = 0
    """How many of the others to train on; 0 for all."""
    cpus_per_trial: float = 1.0
    """Processors of a trial."""
    gpus_per_trial: float | None = None
    """GPUs of a trial; 0.5 lets two share one. Default: 1 where there are any, else 0."""
    address: str = ""
    """HOST:PORT of a running Ray cluster, or `auto`; default: this machine alone."""
    time_budget: float = 0.0
    """Minutes after which all trials are stopped and the search is over; 0 for no limit."""
    seed: int = 0
    """Decides what is drawn, and is the seed of all trainings."""
    data_dir: str = "data"
    """Folder that holds CIFAR-10, or receives it."""
    download: bool = True
    """Fetch CIFAR-10 if it is not in data_dir."""
    wandb: Literal["auto", "online", "offline", "disabled"] = "disabled"
    """Weights & Biases: a run per trial, in a group of the search's name."""
    resume: str = ""
    """Name of a search to go on with, failed trials included; all else is as it was."""


# ---------------------------------------------------------------- the space


def domains() -> dict[str, object]:
    """SPACE in Ray Tune's terms, with one entry per stage where each stage has its own.

    Raises:
        InputError: an entry is empty, missing, unknown or nothing to draw from.
    """
    if missing := [name for name in SHAPE if name not in SPACE]:
        raise InputError(f"SPACE: it lacks {', '.join(missing)}; add what search.py came with")
    constants = {constant.name for constant in fields(Config)}
    found = {}
    for name, values in SPACE.items():
        if name not in SHAPE and name not in constants:
            raise InputError(f"SPACE: {name!r} is no constant of train.py; remove it")
        is_interval = isinstance(values, LogUniform)
        empty = not isinstance(values, tuple | list | range) or not len(values)
        if empty or (is_interval and not 0 < values.low < values.high):
            raise InputError(
                f"SPACE: {name} is empty ({values!r}); give it a tuple, a range, or a LogUniform"
                " whose ends are in order"
            )
        if is_interval:
            domain = tune.loguniform(*values)
        elif isinstance(values, range) and values.step == 1:
            domain = tune.randint(values.start, values.stop)
        else:
            domain = tune.choice(list(values))
        stages = range(1, max(SPACE["num_stages"]) + 1) if name in PER_STAGE else ()
        found |= {f"{name}_{stage}": domain for stage in stages} or {name: domain}
    return found


def configuration(sample: dict[str, object], base: Config) -> Config:
    """The constants that a sample of `domains()` stands for; what it lacks is `base`'s."""
    stages = sample["num_stages"]
    shape = {
        name: tuple(sample[f"{name}_{stage}"] for stage in range(1, stages + 1))
        for name in PER_STAGE
    }
    if sample["same_blocks"]:
        shape["num_blocks"] = shape["num_blocks"][:1] * stages
    size = feature_size(stages, base.stem, base.downsample)
    shape["pool_kernel"] = max(1, size // sample["pooled_size"])
    others = {name: value for name, value in sample.items() if name in SPACE and name not in SHAPE}
    return replace(base, **shape, **others)


class RandomSearch(Searcher):
    """Draws every sample independently."""

    def __init__(self, seed: int) -> None:
        super().__init__(metric=METRIC, mode="max")
        self.domains, self.rng = domains(), np.random.default_rng(seed)

    def suggest(self, trial_id: str) -> dict[str, object]:
        """A sample."""
        return {name: domain.sample(random_state=self.rng) for name, domain in self.domains.items()}

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        """It learns nothing."""


def make_searcher(search: Search) -> Searcher:
    """What draws the samples."""
    if search.algorithm == "random":
        return RandomSearch(search.seed)
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = OptunaSearch.convert_search_space(domains())
    return OptunaSearch(space, metric=METRIC, mode="max", seed=search.seed)


class UnderBudget(Searcher):
    """Makes trials of those samples of another searcher whose network has the wanted size.

    The size is computed, nothing is built. To the other searcher a refused sample is one that
    failed, from which it learns nothing.
    """

    def __init__(self, samples: Searcher, base: Config, min_params: int) -> None:
        super().__init__(metric=METRIC, mode="max")
        self.samples, self.base, self.min_params = samples, base, min_params
        self.number = self.rejected = 0  # trials and refused samples so far
        self.sample_ids = {}  # of each trial

    def suggest(self, trial_id: str) -> dict[str, object]:
        """The next trial: its number, constants and cost, and how many were refused until then.

        Raises:
            InputError: none of MAX_REJECTED samples in a row has the wanted size.
        """
        for attempt in range(MAX_REJECTED):
            sample_id = f"{trial_id}-{attempt}"
            sample = self.samples.suggest(sample_id)
            config = configuration(sample, self.base)
            try:
                num_params = check_budget(config.max_params, **config.architecture())
                if num_params >= self.min_params:
                    break
                reason = f"{num_params:,} parameters are too few"
            except InputError as error:
                reason = first_line(error)
            self.samples.on_trial_complete(sample_id, error=True)
            self.rejected += 1
        else:
            raise InputError(
                f"min_params: none of {MAX_REJECTED:,} samples has {self.min_params:,} to"
                f" {self.base.max_params:,} parameters (the last one: {reason}); give fewer"
                " --min-params, or widen SPACE in search.py"
            )
        self.number += 1
        self.sample_ids[trial_id] = sample_id
        config = replace(config, name=f"{self.base.name}/{self.number:03d}")
        check_config(config)
        return {
            "number": self.number,
            "rejected": self.rejected,
            "num_params": num_params,
            "macs": model_cost(**config.architecture()).macs,
            "num_stages": sample["num_stages"],
            "pooled_size": sample["pooled_size"],
            "constants": asdict(config),
        }

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        """Hand on what an epoch brought."""
        self.samples.on_trial_result(self.sample_ids[trial_id], result)

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        """Hand on how a trial ended."""
        self.samples.on_trial_complete(self.sample_ids[trial_id], result, error)

    def save(self, checkpoint_path: str) -> None:
        """Write all that `restore` needs."""
        Path(checkpoint_path).write_bytes(cloudpickle.dumps(self.__dict__))

    def restore(self, checkpoint_path: str) -> None:
        """Be as when it was saved."""
        self.__dict__.update(cloudpickle.loads(Path(checkpoint_path).read_bytes()))


# ---------------------------------------------------------------- a trial


def run_trial(trial: dict[str, object], search: Search, root: str, data: Dataset) -> None:
    """Train one configuration and report its epochs, in a process of Ray's.

    A trial that was cut off goes on from its last saved step.
    """
    utils.give_back_memory()  # this process may have run a trial before
    os.chdir(root)
    torch.set_num_threads(max(1, int(search.cpus_per_trial)))
    config = make_config(trial["constants"])
    folder = CHECKPOINTS / config.name
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "run.lock", timeout=LET_GO):
        pass  # the process of a search that was killed may hold it for some seconds yet
    known = has_state(folder) and record(load_config(str(folder / "config.json"))) == record(config)
    config = replace(config, resume=known, overwrite=not known)
    rows = []

    def report(log: list[dict[str, float | None]]) -> None:
        rows[:] = log
        if len(log) < config.epochs:  # the last one follows when all is written
            tune.report(summary(log, search))

    try:
        train(config, data, report)
        tune.report(summary(rows, search))
    except DivergenceError as error:
        chance = 100 / len(data.class_names)  # for the searcher to learn from
        tune.report({"epoch": len(rows), METRIC: chance, "diverged": first_line(error)})
    finally:
        if "wandb" in sys.modules:  # ends the run of a trial that was stopped early
            with contextlib.suppress(Exception):
                sys.modules["wandb"].finish()


def summary(log: list[dict[str, float | None]], search: Search) -> dict[str, float | None]:
    """What the scheduler, the searcher and trials.csv learn from a log."""
    grace = search.grace_period
    return {
        "epoch": len(log),
        METRIC: log[-1]["val_accuracy"],
        "early_accuracy": log[grace - 1]["val_accuracy"] if len(log) >= grace else None,
        "seconds": sum(row["seconds"] for row in log),
    }


# ---------------------------------------------------------------- what is recorded


class Record(tune.Callback):
    """Keeps trials.csv up to date, and prints a line when a trial ends.

    Ray Tune calls a trial what it was until after these calls, so they say what it is now.
    """

    def __init__(self, search: Search) -> None:
        self.search, self.bar = search, None

    def setup(self, **_: object) -> None:
        """Begin the bar of trials, shown where the output is a terminal; hear signals."""
        print("trial  status    accuracy  epochs  params  blocks", flush=True)
        self.bar = tqdm(
            total=self.search.num_samples,
            desc="trials",
            bar_format="{desc} {n_fmt}/{total_fmt}|{bar}| {elapsed}{postfix}",
            leave=False,
            dynamic_ncols=True,
            disable=None,
        )
        tune_stops = signal.getsignal(signal.SIGINT)  # Ray Tune saves its state and ends

        def stop(number: int, frame: object) -> None:
            RECEIVED.append(number)
            tune_stops(number, frame)

        for name in utils.StopSignals.NAMES:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), stop)

    def on_trial_start(self, iteration: int, trials: list, trial: object, **_: object) -> None:
        """Note it."""
        self.write(trials, {trial.trial_id: "RUNNING"})

    def on_trial_result(self, iteration: int, trials: list, trial: object, **_: object) -> None:
        """Note it."""
        self.write(trials)

    def on_trial_complete(self, iteration: int, trials: list, trial: object, **_: object) -> None:
        """Note it and drop its weights, which a few epochs have trained."""
        self.end(trials, trial, "TERMINATED")
        keep_state(CHECKPOINTS / self.search.name / "ray")
        folder = CHECKPOINTS / trial.config["constants"]["name"]
        for name in WEIGHTS:
            (folder / name).unlink(missing_ok=True)

    def on_trial_error(self, iteration: int, trials: list, trial: object, **_: object) -> None:
        """Note it; what it saved stays, for --resume to go on from."""
        self.end(trials, trial, "ERROR")

    def end(self, trials: list, trial: object, status: str) -> None:
        """Note and print the end of a trial."""
        rows = self.write(trials, {trial.trial_id: status})
        row = next(row for row in rows if row["trial"] == trial.config["number"])
        accuracy = f"{row[METRIC]:.2f}%" if row[METRIC] else ""
        lr = trial.config["constants"]["lr"]
        self.bar.write(
            f"{row['trial']:>5}  {row['status']:9} {accuracy:>8}  {row['epochs']:>6}"
            f"  {row['num_params'] / 1e6:5.2f}M  [{row['num_blocks']}] C1 {row['c1']}, lr {lr:.2g}"
        )
        sys.stdout.flush()
        ended = [row for row in rows if row["status"] not in ("pending", "running")]
        best = best_of(rows)
        self.bar.n = len(ended)
        self.bar.set_postfix_str(f"best {best[METRIC]:.2f}%, trial {best['trial']}" if best else "")

    def write(
        self, trials: list, statuses: dict[str, str] = MappingProxyType({})
    ) -> list[dict[str, object]]:
        """Write trials.csv; returns its rows. `statuses` are newer than the trials' own."""
        rows = [describe(t, statuses.get(t.trial_id, t.status), self.search) for t in trials]
        rows.sort(key=lambda row: row["trial"])
        utils.write_csv(CHECKPOINTS / self.search.name / "trials.csv", rows)
        return rows

    def on_experiment_end(self, trials: list, **_: object) -> None:
        """Take the bar away; note what the end of the time has stopped."""
        self.bar.close()
        if not RECEIVED:
            self.write(trials)

    def __getstate__(self) -> dict[str, object]:
        return {"search": self.search, "bar": None}


def describe(trial: object, status: str, search: Search) -> dict[str, object]:
    """A row of trials.csv: what a trial of Ray Tune's is, and how far it is."""
    config, result = trial.config, trial.last_result or {}
    constants = config["constants"]
    epochs, diverged = result.get("epoch", 0), result.get("diverged", "")
    if status == "TERMINATED":
        status = "finished" if epochs == search.epochs else "stopped"
        status = "diverged" if diverged else status
    else:
        status = {"ERROR": "failed", "PENDING": "pending"}.get(status, "running")
    others = (name for name in SPACE if name not in SHAPE)
    drawn = dict.fromkeys([*PER_STAGE, "pool_kernel", "c1", "width", *others])
    return {
        "trial": config["number"],
        "status": status,
        METRIC: None if diverged else result.get(METRIC),
        "early_accuracy": result.get("early_accuracy"),
        "epochs": epochs,
        "seconds": round(result["seconds"], 1) if "seconds" in result else None,
        **{name: config[name] for name in ("num_params", "macs", "num_stages", "pooled_size")},
        **{
            name: " ".join(map(str, value)) if isinstance(value, tuple | list) else value
            for name, value in ((name, constants[name]) for name in drawn)
        },
        "rejected": config["rejected"],
        "error": diverged or (error_of(trial) if status == "failed" else ""),
    }


def error_of(trial: object) -> str:
    """What a trial failed with, in a line; ray/NNN/error.txt has all of it."""
    error = trial.get_pickled_error()
    cause = getattr(error, "cause", None) or error  # of an error that its process could still tell
    return f"{type(cause).__name__}: {first_line(cause)}"


def best_of(rows: list[dict[str, object]]) -> dict[str, object] | None:
    """The trial with the highest validation accuracy, if one has any."""
    tried = [row for row in rows if row[METRIC] is not None]
    return max(tried, key=lambda row: row[METRIC], default=None)


# ---------------------------------------------------------------- Ray


@contextlib.contextmanager
def ray_started(search: Search) -> Iterator[None]:
    """In the block, Ray runs: on this machine, or the cluster at `search.address`.

    Raises:
        InputError: nothing answers there, or no machine of it has what a trial needs.
    """
    quiet = {
        "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # data/ and checkpoints/ are below this folder
        "RAY_AIR_NEW_OUTPUT": "0",  # Record prints instead
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": "1",  # seconds between saves: a kill loses no more
    }
    os.environ.update(quiet)
    if search.address and search.address != "auto":
        check_address(search.address)
    try:
        ray.init(
            address=search.address or "local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="CRITICAL",  # Record tells what ends a trial, ray/NNN/error.txt all of it
            runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parent)}},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"address: no Ray cluster at {search.address!r} ({first_line(error)}); start one with"
            " `ray start --head`, or leave the option out; one that wants a token is joined with"
            " RAY_AUTH_MODE=token in the environment"
        ) from None
    heed_memory_monitor()
    try:
        yield
    finally:
        ray.shutdown()


@functools.cache  # once for all searches of a process
def heed_memory_monitor() -> None:
    """Have Ray Tune record a trial that Ray killed before a machine ran out of memory as failed.

    To Ray Tune (as of 2.60) a process that died is a RayActorError, which the error of the memory
    monitor is not, and at any other error it ends the search.
    """
    failed = RayActorManager._actor_task_failed

    def failed_as_died(
        self: RayActorManager, tracked_actor_task: object, exception: Exception
    ) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=str(exception))
        failed(self, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = failed_as_died


def check_address(address: str) -> None:
    """Raise InputError unless something listens there: Ray itself would try for long."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"address: nothing answers at {address!r} ({first_line(error)}); give the HOST:PORT"
            " that `ray start --head` printed, or leave the option out"
        ) from None


def resources(search: Search) -> dict[str, float]:
    """What Ray sets aside for a trial.

    Raises:
        InputError: no machine of the cluster has as much.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    any_gpus = any(machine.get("GPU") for machine in machines)
    gpus = float(any_gpus) if search.gpus_per_trial is None else search.gpus_per_trial
    for name, unit, wanted in (("cpus", "CPU", search.cpus_per_trial), ("gpus", "GPU", gpus)):
        most = max(machine.get(unit, 0) for machine in machines)
        if wanted > most:
            raise InputError(
                f"{name}_per_trial: {wanted:g}, but no machine has more than {most:g}; use up to"
                f" {most:g}"
            )
    return {"cpu": search.cpus_per_trial, "gpu": gpus}


# ---------------------------------------------------------------- the search


def check_search(search: Search) -> None:
    """Raise InputError, naming the field, if this cannot be searched."""
    for name in ("num_samples", "epochs"):
        check_integer(name, getattr(search, name), 1)
    for name in ("val_size", "min_params"):
        check_integer(name, getattr(search, name), 0)
    check_integer("grace_period", search.grace_period, 0, search.epochs)
    check_number("cpus_per_trial", search.cpus_per_trial, 0.01, 1024)
    if search.gpus_per_trial is not None:
        check_number("gpus_per_trial", search.gpus_per_trial, 0, 1024)
    check_number("time_budget", search.time_budget, 0, 1e6)
    if "/" in search.name:
        raise InputError(f"name: {search.name!r} is no plain folder name; leave out the /")


def load_search(search: Search) -> tuple[str, Search]:
    """The preset and the options of the search to resume; those that only say where are new.

    Raises:
        InputError: there is none, or an option that was given differs.
    """
    path = CHECKPOINTS / search.resume / "search.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        preset, space, stored = stored.pop("preset"), stored.pop("space"), Search(**stored)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"resume: no search in {path.parent} ({first_line(error)}); give the --name of one"
        ) from None
    if space != repr(SPACE):
        raise InputError(
            f"SPACE: it was {space} when the search {search.resume} was started; put it back, or"
            " start another search"
        )
    new = {"resume": search.resume, "address": search.address}
    for option in fields(Search):
        given, old = getattr(search, option.name), getattr(stored, option.name)
        if option.name not in new and given not in (option.default, old):
            raise InputError(
                f"{option.name}: {given!r}, but the search {search.resume} was started with"
                f" {old!r}; leave the option out"
            )
    return preset, replace(stored, **new)


def base_config(search: Search, preset: str) -> Config:
    """What all trials have in common."""
    return replace(
        PRESETS[preset],
        name=search.name,
        epochs=search.epochs,
        restart_period=max(1, search.epochs // RESTARTS),
        val_size=search.val_size,
        train_size=search.train_size,
        seed=search.seed,
        data_dir=search.data_dir,
        download=search.download,
        wandb=search.wandb,
    )


def run_search(search: Search, preset: str) -> list[dict[str, object]]:
    """Run all trials of a search, or those that are left; returns the rows of trials.csv.

    Raises:
        InputError: it cannot be run; nothing was written.
        StoppedError: a signal asked to end; --resume goes on.
    """
    check_search(search)
    search = replace(
        search,
        grace_period=search.grace_period or max(1, search.epochs // 6),
        val_size=search.val_size or VAL_SIZE[PRESETS[preset].dataset],
    )
    base = base_config(search, preset)
    check_config(base)
    UnderBudget(make_searcher(search), base, search.min_params).suggest("first")
    folder = CHECKPOINTS / search.name
    if not search.resume and folder.exists():
        raise InputError(
            f"name: {folder} is there already; --resume {search.name} goes on with a search, or"
            " give another --name"
        )
    data = load_dataset(
        base.dataset,
        search.data_dir,
        search.val_size,
        search.download,
        search.train_size,
        test=False,
    )
    check_batches(
        replace(base, batch_size=max(SPACE.get("batch_size", [base.batch_size]))),
        len(data.train),
        world_size=1,
    )
    with ray_started(search):
        needs = resources(search)
        with utils.lock_folder(folder):
            if not search.resume:
                described = {"preset": preset, "space": repr(SPACE), **asdict(search)}
                utils.write_json(folder / "search.json", described)
            print_plan(search, preset, data, needs)
            fit(search, base, data, needs)
    return finish(search)


def fit(search: Search, base: Config, data: Dataset, needs: dict[str, float]) -> None:
    """Let Ray Tune run the trials that are left."""
    folder = (CHECKPOINTS / search.name).resolve()
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, search=search, root=str(Path.cwd()), data=data), needs
    )
    mend_state(folder / "ray")
    if state_is_whole(folder / "ray"):
        # Not restart_errored: it gives a trial a new id, which the searcher does not know.
        tuner = tune.Tuner.restore(str(folder / "ray"), trainable, resume_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
                num_samples=search.num_samples,
                search_alg=UnderBudget(make_searcher(search), base, search.min_params),
                scheduler=ASHAScheduler(
                    time_attr="epoch",
                    max_t=search.epochs,
                    grace_period=search.grace_period,
                    reduction_factor=REDUCTION,
                ),
                time_budget_s=60 * search.time_budget or None,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: f"{trial.config['number']:03d}",
            ),
            run_config=tune.RunConfig(
                name="ray",
                storage_path=str(folder),
                callbacks=[Record(search)],
                verbose=0,
            ),
        )
    start, before = time.perf_counter(), seconds_trained(search)
    with utils.StopSignals():  # puts the handlers back that Ray Tune and Record change
        tuner.fit()
    spent, trained = time.perf_counter() - start, seconds_trained(search) - before
    print(f"{utils.duration(spent)} for {utils.duration(trained)} of training")


def read_trials(search: Search) -> list[dict[str, object]]:
    """The rows of trials.csv."""
    path = CHECKPOINTS / search.name / "trials.csv"
    return utils.read_numbers(path) if path.exists() else []


def state_is_whole(folder: Path) -> bool:
    """Whether Ray Tune's state can be restored: its newest files tell of the same trials."""
    try:
        controller, generator, searcher = (
            max(folder.glob(pattern)).read_bytes() for pattern in STATE_FILES
        )
        trials = json.loads(controller)["trial_data"]
        counter = cloudpickle.loads(generator)["counter"]
        return len(trials) == counter == cloudpickle.loads(searcher)["number"]
    except Exception:  # whatever half a file can raise
        return False


def keep_state(folder: Path) -> None:
    """Keep a copy of Ray Tune's state if it is whole: it is written in place, file by file."""
    if not state_is_whole(folder):
        return
    kept, new = folder / "kept", folder / "kept.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    for pattern in STATE_FILES:
        shutil.copy2(max(folder.glob(pattern)), new)
    shutil.rmtree(kept, ignore_errors=True)
    new.rename(kept)


def mend_state(folder: Path) -> None:
    """If a kill has left half a state, put the copy in its place."""
    if not state_is_whole(folder) and (folder / "kept").is_dir():
        for pattern in STATE_FILES:
            for path in folder.glob(pattern):
                path.unlink()
        for path in (folder / "kept").iterdir():
            shutil.copy2(path, folder)


def seconds_trained(search: Search) -> float:
    """How long the trials have trained until now, one after the other."""
    return sum(row["seconds"] or 0 for row in read_trials(search))


def finish(search: Search) -> list[dict[str, object]]:
    """Say how the trials ended; write best.json and the figures.

    Raises:
        StoppedError: some are left to run.
    """
    folder = CHECKPOINTS / search.name
    rows = read_trials(search)
    count = Counter(row["status"] for row in rows)
    best = best_of(rows)
    if best:
        config = load_config(str(folder / f"{best['trial']:03d}" / "config.json"))
        # What is worth a long training is worth all images.
        config = replace(config, name=f"{search.name}-best", val_size=0, train_size=0, wandb="auto")
        utils.write_json(folder / "best.json", record(config))
    rejected = max((row["rejected"] for row in rows), default=0)
    ends = ", ".join(f"{number} {status}" for status, number in count.items())
    print(f"{len(rows)} trials: {ends}; {rejected:,} samples were not of the wanted size")
    if RECEIVED:
        raise StoppedError(
            RECEIVED[0],
            f"stopped by {signal.Signals(RECEIVED[0]).name}, saved in {folder};"
            f" --resume {search.name} goes on",
        )
    if best:
        print(
            f"best: trial {best['trial']}, {best[METRIC]:.2f}% of {search.val_size:,} validation"
            f" images after {best['epochs']} epochs, {best['num_params']:,} parameters"
        )
        print(f"next: python train.py --config {(folder / 'best.json').as_posix()} --epochs 300")
    images = f" of {search.train_size:,} images" if search.train_size else ""
    if not plots.effects(rows, folder, f"{len(rows)} trials, {search.grace_period} epochs{images}"):
        print(f"no figures: they take {plots.MIN_TRIALS} trials with an accuracy")
    return rows


def print_plan(search: Search, preset: str, data: Dataset, needs: dict[str, float]) -> None:
    """Say what is about to be searched."""
    cluster = ray.cluster_resources()
    at_once = int(min(cluster.get(unit.upper(), 0) / n for unit, n in needs.items() if n))
    epochs = f"{search.grace_period} to " if search.grace_period < search.epochs else ""
    print(
        f"{search.name}: {search.num_samples:,} trials around {preset}, {search.algorithm} search,"
        f" {epochs}{search.epochs} epochs each, {at_once} at a time"
    )
    print(
        f"{data.name}: {len(data.train):,} training and {len(data.val):,} validation images; no"
        " test images are read"
    )


def main(args: list[str]) -> None:
    """Search as the command line asks: a preset for all that is not drawn, then options."""
    preset = "tpsnet"
    if args and not args[0].startswith("-"):
        preset, *args = args
    if preset not in PRESETS:
        raise InputError(f"preset: {preset!r} is not one of {', '.join(PRESETS)}")
    search = utils.parse_command_line(
        Search,
        args,
        prog=f"search.py [{'|'.join(PRESETS)}]",
        description="Search for a network; all that is not drawn from SPACE is the preset's.",
    )
    if search.resume:
        preset, search = load_search(search)
    run_search(search, preset)


if __name__ == "__main__":
    # As a module of its own name, not __main__: what Ray pickles is found again by its name.
    import search

    utils.run_script(search.main)
