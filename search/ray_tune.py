"""Run the trials of a search on Ray Tune, once `cluster.ray_started` has started Ray.

Ray's worker processes import this module by its name.
"""

import contextlib
import csv
import math
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import filelock
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from tqdm import tqdm

import utils
from data import Dataset
from engine.distributed import give_back_memory
from engine.script import stop_signals
from search.space import Search
from search.trials import METRIC, Row, Trials
from train import train
from utils import DivergenceError, InputError, SearchError, first_line

REDUCTION = 4  # ASHA: at each rung, one trial in four continues
MAX_FAILED = 3  # consecutive failures for the same reason, after which the search stops
LOCK_TIMEOUT = 60  # seconds for a killed process to release the lock of its trial's folder


# ---------------------------------------------------------------- in Ray's worker processes


def folder_exists(folder: str) -> bool:
    """True if this process sees the folder. A worker must import this module to call it."""
    return Path(folder).is_dir()


def run_trial(trial: dict[str, int], trials: Trials, root: str, data: Dataset) -> None:
    """Run one trial and report its epochs.

    A trial that has ended only repeats the accuracies that ASHA compares; an interrupted one
    continues from its last saved step.
    """
    give_back_memory()  # of an earlier trial in this process
    os.chdir(root)
    torch.set_num_threads(max(1, int(trials.search.cpus_per_trial)))
    number = trial["number"]
    folder = trials.folder(number)
    if number in trials.ended():
        with contextlib.suppress(OSError, KeyError, TypeError, ValueError, csv.Error):  # damaged
            report_rungs(utils.read_csv(folder / "log.csv"), trials.search)
        tune.report({"epoch": trials.rows[number]["epochs"]})
        return
    row = trials.blank(number)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / "run.lock", timeout=LOCK_TIMEOUT):
            pass
        try:
            row = trials.read(number)
        except InputError:
            row = trials.draw(number)
        row |= {"status": "running", "error": None}
        trials.write(row)
        (folder / "error.txt").unlink(missing_ok=True)
        tune.report({"epoch": 0, "row": row})
        train_trial(row, trials, data)
        trials.write(row)
    except Exception as error:  # any error of the training; the other trials go on
        row |= {"status": "failed", "error": f"{type(error).__name__}: {first_line(error)}"}
        with contextlib.suppress(OSError):
            (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        with contextlib.suppress(InputError):
            trials.write(row)
    finally:
        if "wandb" in sys.modules:  # ends the W&B run of a trial that ASHA has stopped
            with contextlib.suppress(Exception):
                sys.modules["wandb"].finish()
    tune.report({"epoch": row["epochs"], "row": row})


def train_trial(row: Row, trials: Trials, data: Dataset) -> None:
    """Train a trial, reporting every epoch but the last; store its progress and end in `row`."""
    config, grace = trials.config(row), trials.search.grace_epochs
    row["epochs"] = 0

    def report(log: list[Row]) -> None:
        if len(log) > row["epochs"] + 1:  # the trial was resumed
            report_rungs(log[:-1], trials.search)
        row[METRIC], row["epochs"] = log[-1]["val_accuracy"], len(log)
        row["early_accuracy"] = log[grace - 1]["val_accuracy"] if len(log) >= grace else None
        row["seconds"] = round(sum(epoch["seconds"] for epoch in log), 1)
        if len(log) < config.epochs:  # run_trial reports the last epoch, when all is written
            trials.write(row)
            tune.report({"epoch": len(log), METRIC: row[METRIC], "row": row})

    try:
        train(replace(config, resume=True), data, report)
        row["status"] = "finished"
    except DivergenceError as error:
        row |= {METRIC: None, "status": "diverged", "error": first_line(error)}


def report_rungs(log: list[Row], search: Search) -> None:
    """Repeat the accuracies that ASHA compares, of epochs that an interrupted search has run."""
    for epoch in (search.grace_epochs * REDUCTION**i for i in range(20)):
        if epoch <= len(log) and epoch < search.epochs:
            accuracy = float(log[epoch - 1]["val_accuracy"])
            tune.report({"epoch": epoch, METRIC: accuracy, "repeated": True})


# ---------------------------------------------------------------- in the process of the search


class ASHA(ASHAScheduler):
    """ASHA that records repeated reports for its comparisons, but stops no trial for them."""

    def on_trial_result(self, tune_controller: object, trial: object, result: dict) -> str:
        action = super().on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if result.get("repeated") else action


class Monitor(tune.Callback, tune.Stopper):
    """Ray Tune's callback and stopper: trials.csv, a line per trial that ends, and the stop."""

    def __init__(self, trials: Trials) -> None:
        self.trials, self.ended, self.bar = trials, trials.ended(), None
        self.problem, self.causes = "", []
        self.deadline = time.monotonic() + (60 * trials.search.max_minutes or math.inf)

    def __getstate__(self) -> dict:
        return {}  # Ray Tune writes a copy that is never read

    def setup(self, **_: object) -> None:
        """Handle SIGUSR1, whose handler Ray Tune has replaced, and show the progress bar."""
        with contextlib.suppress(AttributeError, ValueError):  # on Windows, or in a thread
            signal.signal(signal.SIGUSR1, signal.getsignal(signal.SIGINT))
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
        return False  # single trials are stopped by ASHA

    def stop_all(self) -> bool:
        return bool(stop_signals.received or self.problem or time.monotonic() > self.deadline)

    def on_trial_result(self, result: dict, **_: object) -> None:
        if "row" in result:
            self.update(result["row"])

    def on_trial_complete(self, trial: object, **_: object) -> None:
        """Record the end of a trial; the status of one that ASHA stopped is set here."""
        row = self.trials.rows[trial.config["number"]]
        if row["trial"] in self.ended or self.stop_all():
            return
        if row["status"] == "running":
            row["status"] = "stopped"
            self.trials.write(row)
        self.end(row)

    def on_trial_error(self, trial: object, **_: object) -> None:
        """Record that the process of a trial died; --resume continues from what it saved."""
        number = trial.config["number"]
        if number in self.ended:  # it was only repeating its reports
            return
        row = self.trials.rows.get(number) or self.trials.blank(number)
        lines = Path(trial.error_file).read_text(encoding="utf-8").splitlines()
        row |= {"status": "failed", "error": lines[1].strip()}  # the first line is a heading
        self.trials.write(row)
        self.end(row)

    def update(self, row: Row) -> None:
        """Replace a trial's row, and write trials.csv."""
        self.trials.rows[row["trial"]] = row
        try:
            self.trials.write_table()
        except InputError as error:
            self.problem = str(error)

    def end(self, row: Row) -> None:
        """Record and print the end of a trial; stop the search after MAX_FAILED failures."""
        self.update(row)
        failed = row["status"] == "failed"
        accuracy = f"{row[METRIC]:.2f}%" if row[METRIC] is not None else ""
        network = ""
        if row["sample"]:
            network = f"{row['num_params'] / 1e6:5.2f}M  {row['macs'] / 1e6:4.0f}M  "
            network += f"[{row['num_blocks']}] C1 {row['c1']}"
        error = f"  {row['error']}" if failed else ""
        start = f"{row['trial']:>5}  {row['status']:9} {accuracy:>8}  {row['epochs']:>6}"
        self.bar.write(f"{start}  {network}{error}")
        sys.stdout.flush()
        best = self.trials.best()
        self.bar.set_postfix_str(f"best {best[METRIC]:.2f}%, trial {best['trial']}" if best else "")
        self.bar.update()
        # Without numbers: folders and sizes differ from trial to trial, the reason does not.
        self.causes.append(re.sub(r"\d+", "", row["error"]) if failed else "")
        if failed and self.causes[-MAX_FAILED:] == MAX_FAILED * self.causes[-1:]:
            self.problem = f"{MAX_FAILED} trials in a row failed, the last one with {row['error']}"


def run_trials(trials: Trials, data: Dataset, resources: dict[str, float]) -> None:
    """Run the trials that have not ended, until all have ended or a signal stops the search.

    Args:
        resources: reserved for each trial.

    Raises:
        SearchError: the search cannot go on.
    """
    search, ended = trials.search, trials.ended()
    numbers = [number for number in trials.numbers if number not in ended]
    if search.grace_epochs < search.epochs:  # ASHA first needs the accuracies to compare with
        numbers = [*sorted(ended), *numbers]
    monitor = Monitor(trials)
    trainable = tune.with_parameters(run_trial, trials=trials, root=str(Path.cwd()), data=data)
    with tempfile.TemporaryDirectory(  # in the folder that all machines share; never read
        prefix=utils.TEMPORARY, dir=trials.path.resolve(), ignore_cleanup_errors=True
    ) as scratch:
        tuner = tune.Tuner(
            tune.with_resources(trainable, resources),
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
                name="ray", storage_path=scratch, callbacks=[monitor], stop=monitor, verbose=0
            ),
        )
        try:
            tuner.fit()
        except Exception as error:  # whatever it is, --resume goes on
            monitor.problem = monitor.problem or f"{type(error).__name__}: {first_line(error)}"
        except KeyboardInterrupt:  # Ray's own has no message
            raise KeyboardInterrupt(f"interrupted; --resume {search.name} goes on") from None
        finally:
            if monitor.bar is not None:
                monitor.bar.close()
            trials.mark_interrupted()
            with contextlib.suppress(InputError):  # of a full disk, which is the problem already
                trials.write_table()
    if monitor.problem:
        raise SearchError(f"{monitor.problem}; fix this, then --resume {search.name} goes on")
