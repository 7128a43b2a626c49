"""Search at random for the network of at most 5 million parameters that trains best, on Ray Tune.

    python search.py                              # 200 trials of up to 30 epochs of CIFAR-10
    python search.py demo --num-samples 8 --epochs 4 --name try   # digits, no download
    python search.py --resume search              # goes on with one that was cut off
    python train.py --config checkpoints/search/best.json --epochs 300

Configurations are drawn from SPACE (trials.py). What has too many parameters is refused before it
becomes a trial; the rest is trained by train.py, as many at a time as there are processors, and
what does badly is stopped early (ASHA). Chosen is by validation accuracy: test images are not even
read.

What trial N is follows from the seed and N, and its folder checkpoints/NAME/NNN holds all that it
did: trial.json, and a run's config.json, log.csv and, until it ends, training state. So resuming
is running again: a trial that ended repeats to ASHA what it reported, one that was cut off goes on
from its last saved step. trials.csv has a row per trial, best.json what train.py takes.
"""

import script

import contextlib
import csv
import functools
import math
import os
import re
import secrets
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import filelock
import torch
from tqdm import tqdm

import distributed
import plots
import utils
from checkpoint import lock_folder
from config import CHECKPOINTS, PRESETS, check_batches, check_config, record
from data import Dataset, load_dataset
from train import train
from trials import (
    METRIC,
    SPACE,
    VAL_SIZE,
    Row,
    Search,
    Space,
    Trials,
    check_search,
    check_space,
    read_record,
    write_record,
)
from utils import DivergenceError, InputError, SearchError, StoppedError, first_line

# A search on this machine alone is for who has a random token, on the loopback address (LISTENS is
# 0 on Windows and macOS anyway). Ray reads these when it is imported.
LISTENS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
LOCAL = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), LISTENS: "0"}
if "ray" not in sys.modules and not any(arg.startswith("--address") for arg in sys.argv):
    os.environ.update(LOCAL | os.environ)
try:
    import ray
    from ray import tune
    from ray.exceptions import OutOfMemoryError, RayActorError, RayError
    from ray.tune.schedulers import ASHAScheduler
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:  # of Ray, or of one of the extras of ray[tune]
    cause = first_line(error.__cause__ or error)
    utils.print_error(f"error: ray: {cause}; run `pip install -r requirements.txt`")
    sys.exit(2)

REDUCTION = 4  # ASHA: of the trials that come to a rung, one in so many goes on to the next
MAX_FAILED = 3  # trials in a row, for one reason
LET_GO = 60  # seconds that a killed process may take to let go of its folder
START = 45  # seconds that a worker process may take to start


# ---------------------------------------------------------------- a trial


def run_trial(trial: dict[str, int], trials: Trials, root: str, data: Dataset) -> None:
    """Run one trial and report it, in a process of Ray's.

    One that ended repeats what ASHA compares, one that was cut off goes on from its last step.
    """
    distributed.give_back_memory()  # this process may have run a trial before
    os.chdir(root)
    torch.set_num_threads(max(1, int(trials.search.cpus_per_trial)))
    number = trial["number"]
    folder = trials.folder(number)
    if number in trials.ended():
        with contextlib.suppress(OSError, KeyError, TypeError, ValueError, csv.Error):  # damaged
            report_rungs(utils.read_csv(folder / "log.csv"), trials.search)
        tune.report({"epoch": trials.rows[number]["epochs"]})
        return
    row = trials.rows.get(number) or trials.blank(number)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / "run.lock", timeout=LET_GO):
            pass
        try:
            row = trials.read(number)
        except InputError:
            row = trials.draw(number)
        row |= {"status": "running", "error": None}
        trials.write(row)
        tune.report({"epoch": 0, "row": row})
        train_trial(row, trials, data)
        trials.write(row)
    except Exception as error:  # whatever a training can raise: the others go on
        row |= {"status": "failed", "error": f"{type(error).__name__}: {first_line(error)}"}
        with contextlib.suppress(OSError):
            (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        if "wandb" in sys.modules:  # ends the run of a trial that was stopped early
            with contextlib.suppress(Exception):
                sys.modules["wandb"].finish()
    tune.report({"epoch": row["epochs"], "row": row})


def train_trial(row: Row, trials: Trials, data: Dataset) -> None:
    """Train it, report each epoch but the last, and note in `row` how far it is and how it ends."""
    config, grace = trials.config(row), trials.search.grace_epochs
    row["epochs"] = 0

    def report(log: list[Row]) -> None:
        if len(log) > row["epochs"] + 1:  # it was resumed
            report_rungs(log[:-1], trials.search)
        row[METRIC], row["epochs"] = log[-1]["val_accuracy"], len(log)
        row["early_accuracy"] = log[grace - 1]["val_accuracy"] if len(log) >= grace else None
        row["seconds"] = round(sum(epoch["seconds"] for epoch in log), 1)
        if len(log) < config.epochs:  # the last report follows when all is written
            tune.report({"epoch": len(log), METRIC: row[METRIC], "row": row})

    try:
        train(replace(config, resume=True), data, report)
        row["status"] = "finished"
    except DivergenceError as error:
        row |= {METRIC: None, "status": "diverged", "error": first_line(error)}


def report_rungs(log: list[Row], search: Search) -> None:
    """Repeat what ASHA compares of epochs that were reported to a search that was cut off."""
    for epoch in (search.grace_epochs * REDUCTION**i for i in range(20)):
        if epoch <= len(log) and epoch < search.epochs:
            accuracy = float(log[epoch - 1]["val_accuracy"])
            tune.report({"epoch": epoch, METRIC: accuracy, "repeated": True})


# ---------------------------------------------------------------- what Ray Tune asks and tells


class ASHA(ASHAScheduler):
    """ASHA that compares with what is repeated, but stops no trial for it."""

    def on_trial_result(self, tune_controller: object, trial: object, result: dict) -> str:
        """Whether the trial goes on."""
        action = super().on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if result.get("repeated") else action


class Monitor(tune.Callback, tune.Stopper):
    """Keeps trials.csv up to date, prints a line when a trial ends, and stops all when need be."""

    def __init__(self, trials: Trials, stop: distributed.StopSignals) -> None:
        self.trials, self.ended, self.bar = trials, trials.ended(), None
        self.stop, self.problem, self.causes = stop, "", []
        self.deadline = time.monotonic() + (60 * trials.search.max_minutes or math.inf)

    def __getstate__(self) -> dict:
        return {}  # Ray Tune writes a copy that is never read

    def setup(self, **_: object) -> None:
        """Hear SIGUSR1 too; begin the bar of trials, shown where the output is a terminal."""
        with contextlib.suppress(AttributeError, ValueError):  # on Windows, or in a thread
            signal.signal(signal.SIGUSR1, signal.getsignal(signal.SIGINT))  # Ray Tune has its own
        print("trial  status    accuracy  epochs  params   MACs  blocks", flush=True)
        self.bar = tqdm(
            total=self.trials.search.num_samples,
            initial=len(self.ended),
            desc="trials",
            bar_format="{desc} {n_fmt}/{total_fmt}|{bar}| {elapsed}{postfix}",
            leave=False,
            dynamic_ncols=True,
            disable=None,
        )

    def __call__(self, trial_id: str, result: dict) -> bool:
        """Whether to stop one trial: that is ASHA's to say."""
        return False

    def stop_all(self) -> bool:
        """Whether to cut all trials off."""
        return bool(self.stop.received or self.problem or time.monotonic() > self.deadline)

    def on_trial_result(self, result: dict, **_: object) -> None:
        """Note how far a trial is."""
        if "row" in result:
            self.note(result["row"])

    def on_trial_complete(self, trial: object, **_: object) -> None:
        """Note how a trial ended: it tells so itself, unless ASHA has stopped it."""
        row = self.trials.rows[trial.config["number"]]
        if row["trial"] in self.ended or self.stop_all():
            return
        if row["status"] == "running":
            row["status"] = "stopped"
            self.trials.write(row)
        self.end(row)

    def on_trial_error(self, trial: object, **_: object) -> None:
        """Note that a trial's process died; what it saved stays, for --resume to go on from."""
        number = trial.config["number"]
        if number in self.ended:  # it was only to repeat what it reported
            return
        row = self.trials.rows.get(number) or self.trials.blank(number)
        lines = Path(trial.error_file).read_text(encoding="utf-8").splitlines()
        self.end(row | {"status": "failed", "error": lines[1].strip()})  # the first is a heading

    def note(self, row: Row) -> None:
        """Write trials.csv with a new row."""
        self.trials.rows[row["trial"]] = row
        try:
            self.trials.write_table()
        except InputError as error:
            self.problem = str(error)

    def end(self, row: Row) -> None:
        """Note and print the end of a trial; cut all off after some failures for one reason."""
        self.note(row)
        failed = row["status"] == "failed"
        accuracy = f"{row[METRIC]:.2f}%" if row[METRIC] is not None else ""
        drawn = ""
        if row.get("sample"):
            drawn = f"{row['num_params'] / 1e6:5.2f}M  {row['macs'] / 1e6:4.0f}M  "
            drawn += f"[{row['num_blocks']}] C1 {row['c1']}"
        error = f"  {row['error']}" if failed else ""
        start = f"{row['trial']:>5}  {row['status']:9} {accuracy:>8}  {row['epochs']:>6}"
        self.bar.write(f"{start}  {drawn}{error}")
        sys.stdout.flush()
        best = self.trials.best()
        self.bar.set_postfix_str(f"best {best[METRIC]:.2f}%, trial {best['trial']}" if best else "")
        self.bar.update()
        # Folders and sizes differ from trial to trial where the reason does not.
        self.causes.append(re.sub(r"\d+", "", row["error"]) if failed else "")
        if failed and self.causes[-MAX_FAILED:] == MAX_FAILED * self.causes[-1:]:
            self.problem = f"{MAX_FAILED} trials in a row failed, the last one with {row['error']}"


# ---------------------------------------------------------------- Ray


@contextlib.contextmanager
def ray_started(search: Search) -> Iterator[None]:
    """In the block, Ray runs: on this machine, or on the cluster at `search.address`.

    Raises:
        InputError: nothing answers there, or a machine cannot run a trial.
    """
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a trial without a GPU sees none
        "RAY_prestart_worker_first_driver": "0",  # else it waits for ever for those that die
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # data/ and checkpoints/ are below this folder
        "RAY_AIR_NEW_OUTPUT": "0",  # Monitor prints instead
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # StopSignals hears it
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # before its first epoch a trial has none
        "TUNE_MAX_PENDING_TRIALS_PG": "1",
    }
    os.environ.update(settings)
    if search.address:
        check_address(search.address)
    else:  # if Ray was imported before, so that it writes none into the home folder
        os.environ.setdefault("RAY_AUTH_TOKEN", LOCAL["RAY_AUTH_TOKEN"])
    path = os.pathsep.join([str(Path(__file__).resolve().parent), "${PYTHONPATH}"])
    # Signals to the whole group are this process's to answer, which ends Ray's others in its time;
    # of Ctrl-C Ray sees to it itself.
    posix = os.name == "posix"
    mask = posix and signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGTERM})
    try:
        ray.init(
            address=search.address or "local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="CRITICAL",
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
    except (OSError, RuntimeError, ValueError) as error:
        if not search.address:
            raise InputError(
                f"RAY_TMPDIR: Ray cannot start ({first_line(error)}); set it in the environment to"
                " a folder for Ray's files, instead of /tmp"
            ) from None
        raise InputError(
            f"address: no Ray cluster at {search.address!r} ({first_line(error)}); start one with"
            " `ray start --head`, or leave the option out; one that wants a token is joined with"
            " RAY_AUTH_MODE=token in the environment"
        ) from None
    finally:
        if posix:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        heed_memory_monitor()
        check_workers()
        yield
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Raise InputError unless something listens there: Ray itself would try for long."""
    host, _, port = address.rpartition(":")
    try:
        if address != "auto":
            socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"address: nothing answers at {address!r} ({first_line(error)}); give the HOST:PORT"
            " that `ray start --head` printed, or leave the option out"
        ) from None
    if os.environ.get(LISTENS) == "0":
        raise InputError(f"address: {LISTENS} is 0 in the environment; set it to 1")


@ray.remote(num_cpus=0, max_retries=0)
def sees(folder: str) -> bool:
    """Whether a process of Ray's, which has found this script, sees a folder."""
    import search  # noqa: F401  # by its name, as a trial's process does

    return Path(folder).is_dir()


def machines() -> list[dict]:
    """What Ray knows of the machines of its cluster."""
    return [node for node in ray.nodes() if node["Alive"]]


def check_workers() -> None:
    """Raise InputError if a machine cannot run trials: Ray would try for ever, and say nothing."""
    where = str(Path.cwd())
    there = (NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in machines())
    asked = [sees.options(scheduling_strategy=node).remote(where) for node in there]
    try:
        if not all(ray.get(asked, timeout=START)):
            raise InputError(f"address: a machine of the cluster does not see {where}; mount it")
    except RayError as error:
        raise InputError(
            f"address: no process of Ray's can train within {START} seconds"
            f" ({first_line(getattr(error, 'cause', error))}); look into"
            " /tmp/ray/session_latest/logs"
        ) from None


def resources(search: Search) -> dict[str, float]:
    """What Ray sets aside for a trial.

    Raises:
        InputError: no machine of the cluster has as much.
    """
    found = [node["Resources"] for node in machines()]
    any_gpus = any(resource.get("GPU") for resource in found)
    gpus = float(any_gpus) if search.gpus_per_trial is None else search.gpus_per_trial
    for name, unit, wanted in (("cpus", "CPU", search.cpus_per_trial), ("gpus", "GPU", gpus)):
        most = max(resource.get(unit, 0) for resource in found)
        if wanted > most:
            raise InputError(
                f"{name}_per_trial: {wanted:g}, but no machine has more than {most:g}; use up to"
                f" {most:g}"
            )
    return {"cpu": search.cpus_per_trial, "gpu": gpus}


# ---------------------------------------------------------------- what leans on Ray's insides


@functools.cache  # once for all searches of a process
def heed_memory_monitor() -> None:
    """Have Ray Tune record a trial that Ray killed before a machine ran out of memory as failed.

    To Ray Tune (as of 2.60) a process that died is a RayActorError, which the error of the memory
    monitor is not, and at any other error it ends the search; so it does without this class.
    """
    try:
        from ray.air.execution._internal.actor_manager import RayActorManager

        failed = RayActorManager._actor_task_failed
    except (ImportError, AttributeError):
        return

    def failed_as_died(self: object, tracked_actor_task: object, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = RayActorError(error_msg=str(exception))
        failed(self, tracked_actor_task, exception)

    RayActorManager._actor_task_failed = failed_as_died


# ---------------------------------------------------------------- the search


def load_search(search: Search, space: Space = SPACE) -> tuple[str, Search]:
    """The preset and the options of the search to resume; those that only say where are new.

    Raises:
        InputError: there is none, or an option that was given differs.
    """
    path = CHECKPOINTS / search.resume / "search.json"
    try:
        stored = read_record(path)
        stored["name"] = search.resume  # the folder may be a copy
        preset, drawn, stored = stored.pop("preset"), stored.pop("space"), Search(**stored)
        _ = PRESETS[preset]
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"resume: no search in {path.parent} ({first_line(error)}); give the --name of one"
        ) from None
    if drawn != repr(space):
        raise InputError(
            f"SPACE: it was {drawn} when the search {search.resume} was started; put it back, or"
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


def run_search(search: Search, preset: str, space: Space = SPACE) -> list[Row]:
    """Run all trials of a search, or those that are left; returns the rows of trials.csv.

    Raises:
        InputError: it cannot be run; nothing was written.
        SearchError: it cannot go on, or no trial succeeded.
        StoppedError: a signal asked to end; --resume goes on.
    """
    check_search(search)
    check_space(space)
    search = replace(
        search,
        grace_epochs=search.grace_epochs or max(1, search.epochs // 6),
        val_size=search.val_size or VAL_SIZE[PRESETS[preset].dataset],
    )
    trials, received = Trials(search, preset, space), 0
    budget = max(search.max_params, PRESETS[preset].max_params)
    check_config(replace(trials.base, max_params=budget))  # the preset's network is no trial's
    trials.draw(1)
    if search.resume:
        trials.load()
    elif trials.path.exists():
        raise InputError(
            f"name: {trials.path} is there already; --resume {search.name} goes on with a search,"
            " or give another --name"
        )
    if len(trials.ended()) < search.num_samples:
        base, sizes = trials.base, (search.val_size, search.download, search.train_size)
        data = load_dataset(base.dataset, search.data_dir, *sizes, test=False)
        largest = max(space.get("batch_size", [base.batch_size]))
        check_batches(replace(base, batch_size=largest), len(data.train))
        stop = distributed.StopSignals()
        with distributed.StopSignals(), ray_started(search), stop:  # Ray sets handlers of its own
            needs = resources(search)
            stop.raise_if_received("before a trial began")
            with lock_folder(trials.path):
                if not search.resume:
                    described = {"preset": preset, "space": repr(space), **asdict(search)}
                    write_record(trials.path / "search.json", described)
                print_plan(trials, preset, data, needs)
                received = fit(trials, data, needs, stop)
    try:
        with lock_folder(trials.path):
            trials.write_table()
            finish(trials, received)
    except InputError as error:
        raise SearchError(f"{error}; fix this, then --resume {search.name} goes on") from None
    return trials.table()


def fit(
    trials: Trials, data: Dataset, needs: dict[str, float], stop: distributed.StopSignals
) -> int:
    """Let Ray Tune run the trials that are left; returns the signal that asked to end, or 0.

    Args:
        stop: hears the signals.

    Raises:
        SearchError: it cannot go on.
    """
    search, ended = trials.search, trials.ended()
    left = [number for number in trials.numbers if number not in ended]
    for number in left:
        trials.mend(number)
    # First what ASHA compares with; where it stops none, it need not know.
    numbers = [*(sorted(ended) if search.grace_epochs < search.epochs else ()), *left]
    given = {"trials": trials, "root": str(Path.cwd()), "data": data}
    start, before, monitor = time.perf_counter(), seconds_trained(trials), Monitor(trials, stop)
    scratch = tempfile.TemporaryDirectory(  # there, since all machines must see it; it is not read
        prefix=utils.TEMPORARY, dir=trials.path.resolve(), ignore_cleanup_errors=True
    )
    with scratch:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, **given), needs),
            param_space={"number": tune.grid_search(numbers)},
            tune_config=tune.TuneConfig(
                scheduler=ASHA(
                    "epoch",
                    METRIC,
                    mode="max",
                    max_t=search.epochs,
                    grace_period=search.grace_epochs,
                    reduction_factor=REDUCTION,
                ),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="ray", storage_path=scratch.name, callbacks=[monitor], stop=monitor, verbose=0
            ),
        )
        try:
            tuner.fit()
        except Exception as error:  # whatever it is, --resume goes on
            monitor.problem = monitor.problem or f"{type(error).__name__}: {first_line(error)}"
        except KeyboardInterrupt:  # Ray's, which says nothing
            raise KeyboardInterrupt(f"interrupted; --resume {search.name} goes on") from None
        finally:
            if monitor.bar is not None:
                monitor.bar.close()
    trials.cut_off()
    if monitor.problem:
        raise SearchError(f"{monitor.problem}; fix this, then --resume {search.name} goes on")
    spent, trained = time.perf_counter() - start, seconds_trained(trials) - before
    print(f"{utils.duration(spent)} for {utils.duration(trained)} of training")
    return stop.received


def seconds_trained(trials: Trials) -> float:
    """How long the trials have trained until now, one after the other."""
    return sum(row["seconds"] or 0 for row in trials.rows.values())


def finish(trials: Trials, received: int) -> None:
    """Say how the trials ended; write best.json and the figures.

    Raises:
        StoppedError: a signal asked to end.
        SearchError: no trial succeeded.
    """
    search, rows, best = trials.search, trials.table(), trials.best()
    path = trials.path / "best.json"
    ends = ", ".join(f"{n} {status}" for status, n in Counter(r["status"] for r in rows).items())
    rejected = sum(row["rejected"] or 0 for row in rows)
    if best and best.get("sample"):
        # What is worth a long training is worth all images.
        new = {"name": f"{search.name}-best", "val_size": 0, "train_size": 0, "wandb": "auto"}
        utils.write_json(path, record(replace(trials.config(best), **new)))
    if rows:
        print(f"{len(rows)} trials: {ends}; {rejected:,} samples were not of the wanted size")
    if received:
        raise StoppedError(
            received,
            f"stopped by {signal.Signals(received).name}, saved in {trials.path};"
            f" --resume {search.name} goes on",
        )
    if left := search.num_samples - len(trials.ended()):
        print(f"{left} trials are left: --resume {search.name} goes on")
    failed = [row["error"] for row in rows if row["status"] == "failed"]
    if failed and not best:
        raise SearchError(f"no trial succeeded, the last one for {failed[-1]}")
    if best:
        print(
            f"best: trial {best['trial']}, {best[METRIC]:.2f}% of {search.val_size:,} validation"
            f" images after {best['epochs']} epochs, {best['num_params']:,} parameters"
        )
        if best.get("sample"):
            print(f"next: python train.py --config {path.as_posix()} --epochs 300")
        else:
            print(f"no {path.name}: {trials.folder(best['trial']) / 'trial.json'} is damaged")
    images = f" of {search.train_size:,} images" if search.train_size else ""
    caption = f"{len(rows)} trials, {search.grace_epochs} epochs{images}"
    if not plots.effects(rows, trials.path, caption, search.max_params):
        print(f"no figures: they take {plots.MIN_TRIALS} trials with an accuracy")


def print_plan(trials: Trials, preset: str, data: Dataset, needs: dict[str, float]) -> None:
    """Say what is about to be searched."""
    search, cluster = trials.search, ray.cluster_resources()
    at_once = int(min(cluster.get(unit.upper(), 0) / n for unit, n in needs.items() if n))
    epochs = f"{search.grace_epochs} to " if search.grace_epochs < search.epochs else ""
    print(
        f"{search.name}: {search.num_samples:,} trials around {preset}, {search.algorithm} search,"
        f" {epochs}{search.epochs} epochs each, {at_once} at a time"
    )
    print(
        f"{data.name}: {len(data.train):,} training and {len(data.val):,} validation images; no"
        " test images are read"
    )


def main(args: list[str], space: Space = SPACE) -> None:
    """Search as the command line asks: a preset for all that is not drawn, then options."""
    preset = None
    if args and not args[0].startswith("-"):
        preset, *args = args
    if preset not in (None, *PRESETS):
        raise InputError(f"preset: {preset!r} is not one of {', '.join(PRESETS)}")
    search = script.parse_command_line(
        Search,
        args,
        prog=f"search.py [{'|'.join(PRESETS)}]",
        description="Search for a network; all that is not drawn from SPACE is the preset's.",
    )
    if search.resume:
        given, (preset, search) = preset, load_search(search, space)
        if given not in (None, preset):
            raise InputError(
                f"preset: {given}, but the search {search.name} was started with {preset}; leave it"
                " out"
            )
    run_search(search, preset or "tpsnet", space)


if __name__ == "__main__":
    # As a module of its own name, not __main__: what Ray pickles is found again by its name.
    import search

    script.run_script(search.main)
