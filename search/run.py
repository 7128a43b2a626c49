"""A search from its options to best.json: start or resume it, run its trials, show the result."""

import contextlib
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, fields, replace

import utils
from config import PRESETS, check_batches, check_config, record
from data import Dataset, load_dataset
from engine.progress import title
from engine.run import end_by_signal, lock_folder
from engine.script import named_options, plain_arguments, stop_signals
from search import figures
from search.cluster import ray_started, trial_resources, trials_at_once
from search.space import (
    SPACE,
    Search,
    Space,
    check_search,
    check_space,
    with_defaults,
    with_epochs,
)
from search.trials import METRIC, Row, Trials, read_record, write_record
from utils import CHECKPOINTS, InputError, SearchError, first_line, quoted

LONG = 300  # epochs of the training that is advised for the best network


def main(args: list[str], space: Space = SPACE) -> None:
    """Run the search of a command line: a preset for all that is not drawn, then options."""
    preset = None
    if args and not args[0].startswith("-"):
        preset, *args = args
    if preset not in (None, *PRESETS):
        raise InputError(f"preset: {preset!r} is not one of {', '.join(PRESETS)}")
    import tyro

    search = tyro.cli(
        Search,
        args=plain_arguments(args, Search),
        prog="python -m search [PRESET]",
        description="Search for a network. Constants that are not in SPACE (search/space.py) are\n"
        f"  those of PRESET, by default tpsnet.\n  Presets: {', '.join(PRESETS)}",
    )
    if search.resume:
        given, (preset, search) = preset, load_search(search, space, named_options(args))
        if given not in (None, preset):
            raise InputError(
                f"preset: {given}, but the search {search.name} was started with {preset}; leave it"
                " out"
            )
    run_search(search, preset or "tpsnet", space)


def load_search(
    search: Search, space: Space = SPACE, named: Collection[str] = ()
) -> tuple[str, Search]:
    """Read the preset and the options of the search to resume; only its address may be new.

    Args:
        named: options that were given; those that have another value than by default were, too.

    Raises:
        InputError: there is no such search, or an option or the space differs.
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
            f"SPACE: the search {search.resume} was started with {drawn}; restore it in"
            " search/space.py, or start another search"
        )
    new = {"resume": search.resume, "address": search.address}
    for option in fields(Search):
        given, old = getattr(search, option.name), getattr(stored, option.name)
        is_given = option.name in named or given != option.default
        if option.name not in new and is_given and given != old:
            raise InputError(
                f"{option.name}: {given!r}, but the search {search.resume} was started with"
                f" {old!r}; leave the option out"
            )
    return preset, replace(stored, **new)


def run_search(search: Search, preset: str, space: Space = SPACE) -> list[Row]:
    """Run all trials of a search, or those that are left; returns the rows of trials.csv.

    Raises:
        InputError: the search cannot be run; nothing was written.
        SearchError: the search cannot go on, or no trial succeeded.
        StoppedError: a signal stopped the search; --resume goes on if a trial had begun.
    """
    check_search(search)
    check_space(space)
    search = with_defaults(search, preset)
    trials, received = Trials(search, preset, space), 0
    # Check the preset's other constants; its own network may be over the budget of the search.
    budget = max(search.max_params, PRESETS[preset].max_params)
    with naming_the_preset(preset):
        check_config(replace(trials.base, max_params=budget))
    trials.draw(1)  # are there networks within the limits?
    if search.resume:
        trials.load()
    elif trials.have_begun:
        raise InputError(
            f"name: {trials.path} exists already; continue that search with --resume"
            f" {search.name}, or give another --name"
        )
    if len(trials.ended()) < search.num_samples:
        data = load_dataset(trials.base, test=False)
        largest = max(space.get("batch_size", [trials.base.batch_size]))
        with naming_the_preset(preset):
            check_batches(replace(trials.base, batch_size=largest), len(data.train))
        received = run_on_ray(trials, data)
    try:
        with lock_folder(trials.path):
            trials.write_table()
            finish(trials, received)
    except InputError as error:
        raise SearchError(f"{error}; fix this, then --resume {search.name} goes on") from None
    return trials.table()


@contextlib.contextmanager
def naming_the_preset(preset: str) -> Iterator[None]:
    """Add to the InputError of a constant, which no option of a search sets, where it is set."""
    try:
        yield
    except InputError as error:
        raise InputError(
            f"{error}: in SPACE (search/space.py), or by another preset than {preset}, such as in"
            " `python -m search demo` or `mine`"
        ) from None


def run_on_ray(trials: Trials, data: Dataset) -> int:
    """Start Ray and run the trials that are left; returns the signal that stopped them, or 0."""
    search = trials.search
    with stop_signals, ray_started(search), stop_signals:  # Ray replaces the handlers as it starts
        from search.ray_tune import run_trials

        resources = trial_resources(search)
        if stop_signals.received:
            end_by_signal(stop_signals.received, "before a trial began")
        with lock_folder(trials.path):
            if not search.resume:
                described = {"preset": trials.preset, "space": repr(trials.space)}
                write_record(trials.path / "search.json", described | asdict(search))
            for number in set(trials.numbers) - trials.ended():
                trials.remove_unless_resumable(number)
            print_plan(trials, data, trials_at_once(resources))
            start, before = time.perf_counter(), seconds_trained(trials)
            run_trials(trials, data, resources)
            spent, trained = time.perf_counter() - start, seconds_trained(trials) - before
            print(f"{utils.duration(spent)} for {utils.duration(trained)} of training")
        return stop_signals.received


def seconds_trained(trials: Trials) -> float:
    """Training time of all trials together."""
    return sum(row["seconds"] or 0 for row in trials.rows.values())


def print_plan(trials: Trials, data: Dataset, at_once: int) -> None:
    search = trials.search
    epochs = f"{search.grace_epochs} to " if search.grace_epochs < search.epochs else ""
    print(
        f"{search.name}: {search.num_samples:,} trials around {trials.preset}, {search.algorithm}"
        f" search, {epochs}{search.epochs} epochs each, {at_once} at a time"
    )
    print(
        f"{title(trials.base, data)}: {len(data.train):,} training and {len(data.val):,} validation"
        " images; no test images are read"
    )


def finish(trials: Trials, received: int) -> None:
    """Print the result of a search; write best.json and the figures.

    Args:
        received: the signal that stopped the search, or 0.

    Raises:
        StoppedError: a signal stopped it.
        SearchError: no trial succeeded.
    """
    search, rows, best = trials.search, trials.table(), trials.best()
    path = trials.path / "best.json"
    if best:
        # A long training of the best network uses all images.
        new = {"name": f"{search.name}-best", "val_size": 0, "train_size": 0, "wandb": "auto"}
        utils.write_json(path, record(replace(trials.config(best), **new)))
    if rows:
        counts = Counter(row["status"] for row in rows)
        ends = ", ".join(f"{n} {status}" for status, n in counts.items())
        rejected = sum(row["rejected"] or 0 for row in rows)
        print(f"{len(rows)} trials: {ends}; {rejected:,} samples were rejected before they ran")
    if received:
        end_by_signal(received, f"and saved in {trials.path}; --resume {search.name} goes on")
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
        long, options = trials.config(best), f"--epochs {LONG}"
        if "warmup_epochs" not in trials.space:  # that of the trials was rounded up
            preset = PRESETS[trials.preset]
            long = replace(long, epochs=preset.epochs, warmup_epochs=preset.warmup_epochs)
        long = with_epochs(long, LONG)
        if long.warmup_epochs:
            options += f" --warmup-epochs {long.warmup_epochs}"
        if long.schedule == "cosine_restarts":
            options += f" --restart-epochs {long.restart_epochs}"
        print(f"next: python train.py --config {quoted(path)} {options}")
    images = f" of {search.train_size:,} images" if search.train_size else ""
    drawn = sum(row["early_accuracy"] is not None for row in rows)
    epochs = "1 epoch" if search.grace_epochs == 1 else f"{search.grace_epochs} epochs"
    caption = f"{drawn} trials, {epochs}{images}"
    is_plain = (trials.base.stem, trials.base.downsample) == ("conv", "stride")
    budget = search.max_params if is_plain else None
    rows = [{"downsample": trials.base.downsample} | row for row in rows]
    if not figures.effects(rows, trials.path, caption, budget):
        print(f"no figures: at least {figures.MIN_TRIALS} trials with different accuracies needed")
