"""Train a residual network of at most 5 million parameters, by default TPSNet on CIFAR-10.

    python train.py                              # TPSNet: 300 epochs of the paper's recipe
    python train.py model1 --epochs 30 --lr 0.1  # another preset, any constant overridden
    python train.py demo                         # handwritten digits, no download, two minutes
    python train.py --config best.json           # the constants that search.py or a run wrote
    torchrun --nproc-per-node 4 train.py         # one process per GPU

A run lives in checkpoints/NAME: config.json, log.csv, curves.png, last.pt (everything --resume
needs; previous.pt is the one before) and model.safetensors (what test.py and load_model need).
The constants are in config.py.
"""

import script

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

import distributed
import utils
from augment import Augmentation, train_batches
from checkpoint import (
    Checkpointer,
    check_images,
    divergence_explained,
    how_to_go_on,
    load_run,
    lock_folder,
    prepare_folder,
    restore,
)
from config import (
    CHECKPOINTS,
    CLAIMS,
    PRESETS,
    Config,
    check_batches,
    check_config,
    check_resumable,
    load_config,
    record,
)
from data import Dataset, Split, load_dataset
from learner import Batch, Learner, Proxy
from metrics import Metrics, Row, Score, WandbRun, evaluate, fit_temperature, score
from model import Architecture, model_cost
from utils import IMAGE_SIZE, InputError


def train(
    config: Config,
    data: Dataset | None = None,
    report: Callable[[list[Row]], None] | None = None,
) -> tuple[list[Row], Score | None]:
    """Train, save and test one network; returns the rows of its log and its score on the test set.

    Runs on CUDA, MPS or the CPU, and data-parallel under torchrun. The last weights are tested,
    once, at the end: the test set chooses nothing. However the process ends, `resume` goes on from
    the last saved step, on the CPU to the same result, bit for bit.

    Args:
        data: what to train on instead of loading it; where it holds no test images, nothing is
            tested and the score is None.
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
    device = distributed.init_processes(config.deterministic)
    folder = CHECKPOINTS / config.name
    saved_state(config)  # a verdict on it before any work
    if data is None:
        with distributed.first_on_each_machine():
            data = load_dataset(
                config.dataset, config.data_dir, config.val_size, config.download, config.train_size
            )
    check_batches(config, len(data.train), distributed.num_processes())
    if config.num_classes != len(data.class_names):
        raise InputError(
            f"num_classes: {config.num_classes}, but {data.name} has {len(data.class_names)}; use"
            " that"
        )

    data = data.to(device)
    steps = math.ceil(len(data.train) / config.batch_size)
    steps = min(steps, config.max_steps_per_epoch or steps)
    num_images = round(config.keep_fraction * min(steps * config.batch_size, len(data.train)))
    learner = Learner(config, data, device, steps)
    proxy = Proxy(config, data, device, steps) if config.keep_fraction < 1 else None
    pixels = [image_size(config, epoch) ** 2 for epoch in range(1, config.epochs + 1)]
    metrics = Metrics(num_images, pixels)
    parts = {"learner": learner, "metrics": metrics} | ({"proxy": proxy} if proxy else {})

    with (
        lock_folder(folder),
        distributed.StopSignals() as stop,
        divergence_explained(folder, metrics),
    ):
        state = saved_state(config)  # now that no other process can change it
        if state:
            check_images(state, data)
            restore(state, parts, folder)
        distributed.barrier()  # all have read it before anything is written
        if distributed.is_main():
            prepare_folder(folder, bool(state))
            print_plan(config, data, device, steps, metrics)
            run_id = state and state["metrics"]["wandb_id"]
            group = config.name.rpartition("/")[0] or None
            metrics.wandb = WandbRun(config.wandb, folder, record(config), run_id, group)
        started = {"config": record(config), "data_fingerprint": data.fingerprint}
        metadata = describe(config, data, device)
        checkpointer = Checkpointer(
            folder, parts, started, metadata, config.save_minutes, stop, config.resume
        )
        checkpointer.save()

        def classify(split: Split) -> Tensor:
            images, check = split.images, checkpointer.while_evaluating
            return evaluate(learner.eval_model, images, data.normalize, after_batch=check)

        def evaluated(split: Split) -> Score | None:
            return score(classify(split), split.labels) if len(split) else None

        if distributed.is_main():
            utils.write_json(folder / "config.json", record(config))
        if report and metrics.log:
            report(metrics.log)

        while metrics.epoch < config.epochs:
            with metrics.running(learner.lr):
                batches = epoch_batches(config, data, metrics.epoch + 1, metrics.step, steps)
                if proxy:
                    batches = proxy.hardest(batches, metrics.step)
                for images, labels, n in batches:
                    totals = learner.step(images, labels, n)  # forward, backward, update, EMA
                    metrics.update(totals, n)
                    checkpointer.after_step()
            learner.synchronize_buffers()
            metrics.end_epoch(evaluated(data.val))
            checkpointer.after_epoch()
            if report:
                report(metrics.log)

        temperature = None
        if len(data.val):
            temperature = fit_temperature(classify(data.val), data.val.labels)
        test = evaluated(data.test)
        checkpointer.finish(test, temperature)
        if distributed.is_main():
            if test:
                print(f"test accuracy: {test}")
                print(f"next: python test.py {(folder / 'model.safetensors').as_posix()}")
            scores = {"test_loss": test.loss, "test_accuracy": test.accuracy} if test else {}
            metrics.wandb.finish(scores, folder / "curves.png", stop)
    return metrics.log, test


def saved_state(config: Config) -> dict[str, object] | None:
    """The training state that the run goes on from; None for a new run.

    Raises:
        InputError: there is a run that may not be overwritten, or that these constants do not fit.
    """
    folder = CHECKPOINTS / config.name
    state = load_run(folder, config.resume, config.overwrite)
    if state:
        check_resumable(config, state["config"], folder)
    return state


def epoch_batches(
    config: Config, data: Dataset, epoch: int, first_step: int, steps: int
) -> Iterator[Batch]:
    """An epoch's augmented batches, from its step `first_step` on; each seeds its dropout."""
    augmentation = utils.part_of(config, Augmentation)
    order = (config.batch_size, config.seed, epoch, first_step)
    batches = train_batches(data, augmentation, *order, image_size(config, epoch))
    for step, batch in enumerate(itertools.islice(batches, steps - first_step), first_step):
        # Reseeded in every step, so that dropout, like the batches, needs no saved state.
        key = (config.seed, epoch, step, distributed.rank())
        torch.manual_seed(utils.derive_seed("dropout", *key))
        yield batch


def image_size(config: Config, epoch: int) -> int:
    """Side of the images of an epoch, which is counted from 1, in pixels."""
    small = epoch <= round(config.small_fraction * config.epochs, 6)  # .29 x 100 is below 29
    return config.small_size if small else IMAGE_SIZE


def train_seeds(config: Config) -> list[Score]:
    """Train `config.seeds` networks that differ in their seed; their scores on the test set.

    Prints the mean and standard deviation of their accuracies, and the 95% interval of the mean by
    Student's t. With `resume`, a run that was cut off goes on and a finished one is only tested.

    Raises:
        InputError: one of them cannot be trained; or a disk is full.
        DivergenceError: a loss is no longer finite; the runs before it are whole.
        StoppedError: a signal asked to end; --resume goes on.
    """
    from scipy.stats import t as student_t  # here: it takes most of a second to load

    runs = []
    for seed in range(config.seed, config.seed + config.seeds):
        runs.append(replace(config, name=f"{config.name}-{seed}", seed=seed, seeds=1))
        check_config(runs[-1])
        saved_state(runs[-1])  # nothing may be in the way hours later
    scores = []
    with distributed.StopSignals() as stop:
        for run in runs:
            stop.raise_if_received(f"before {run.name}; {how_to_go_on(config.resume)}")
            scores.append(train(run)[1])
    accuracies = [score.accuracy for score in scores]
    mean, std = statistics.mean(accuracies), statistics.stdev(accuracies)
    half = student_t.ppf(0.975, len(runs) - 1) * std / math.sqrt(len(runs))
    if distributed.is_main():
        print(
            f"{len(runs)} seeds: test accuracy {mean:.2f} ± {std:.2f}% (standard deviation); 95%"
            f" interval of the mean {mean - half:.2f} to {mean + half:.2f}"
        )
    return scores


def print_plan(
    config: Config, data: Dataset, device: torch.device, steps: int, metrics: Metrics
) -> None:
    """Say what is about to be trained, on what, and from where."""
    cost = model_cost(config)
    print(
        f"{config.name}: {cost.num_params:,} parameters; {cost.macs / 1e6:,.1f} M MACs and"
        f" {cost.activation_bytes / 1e6:,.1f} MB of activations per image"
    )
    print(
        f"{data.name}: {len(data.train):,} training, {len(data.val):,} validation and"
        f" {len(data.test):,} test images"
    )
    processes = distributed.num_processes()
    number = f" in {processes} processes" if processes > 1 else ""
    dtype = distributed.dtype_name(distributed.compute_dtype(device, config.bfloat16))
    print(f"epochs: {config.epochs} of {steps:,} steps, on {device.type}{number}, {dtype}")
    annealed, cycle = config.epochs - config.warmup_epochs, config.restart_epochs
    if config.schedule == "cosine_restarts" and annealed % cycle:
        utils.warn(
            f"restart_epochs: the last cosine is cut off after {annealed % cycle} of its {cycle}"
            f" epochs; use a number that divides {annealed}"
        )
    if metrics.epoch or metrics.step:
        print(f"resume: going on after {metrics}")
    elif config.resume:
        print("resume: nothing was saved before; from the start")


def describe(config: Config, data: Dataset, device: torch.device) -> dict[str, object]:
    """What a model file says of the run it comes from."""
    networks = {name: utils.part_of(preset, Architecture) for name, preset in PRESETS.items()}
    network = utils.part_of(config, Architecture)
    same = (name for name, preset in networks.items() if preset == network)
    return {
        "preset": next(same, "custom"),  # the named network, if it is one
        "dataset": data.name,
        "class_names": data.class_names,
        "mean": data.mean,
        "std": data.std,
        "seed": config.seed,
        "trained_in": distributed.dtype_name(distributed.compute_dtype(device, config.bfloat16)),
        "data_fingerprint": data.fingerprint,
        "unofficial_data_files": data.unofficial,
        "versions": utils.library_versions(),
        "git_commit": utils.git_commit(),
        "config": record(config),
    }


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
    claims = "\n".join(f"  {name:7} {claim}" for name, claim in CLAIMS.items())
    config = script.parse_command_line(
        Config,
        args,
        default=config or PRESETS[preset],
        prog=f"train.py [{'|'.join(PRESETS)}]",
        description=f"Train a network. Presets, and their test accuracy:\n\n{claims}\n\n"
        f"The defaults below are those of {preset}; `--config FILE` takes a file's.",
    )
    train_seeds(config) if config.seeds > 1 else train(config)


if __name__ == "__main__":
    script.run_script(main)
