"""Train a residual network of at most 5 million parameters, by default TPSNet on CIFAR-10.

    python train.py                              # TPSNet: 300 epochs of the paper's recipe
    python train.py model1 --epochs 30 --lr 0.1  # another preset, with any constant overridden
    python train.py demo                         # handwritten digits: no download, two minutes
    python train.py mine --data-dir photos       # your own pictures, in a folder for each class
    python train.py --config best.json           # the constants of a search or of another run
    torchrun --nproc-per-node 4 train.py         # one process per GPU

A run lives in checkpoints/NAME: config.json, log.csv, curves.png, last.pt (the state that --resume
continues; previous.pt is the one before) and model.safetensors (the network, for test.py and
predict.py). The constants are in config.py.
"""

if __name__ == "__main__":  # above the imports: a missing library or an old Python is one line
    from engine.script import run_script

    run_script("train")

from collections.abc import Callable
from dataclasses import replace

import torch

from config import Config, check_batches, check_config, parse_command_line
from data import Dataset, class_names_of, load_dataset, train_batches
from engine import distributed
from engine.evaluate import Score, classify, evaluate, fit_temperature, summary
from engine.progress import Row
from engine.run import Run, end_by_signal, how_to_go_on, remove_runs
from engine.script import stop_signals
from engine.start import Start
from engine.teacher import Teacher
from learner import Learner, Proxy, check_compiler
from model import check_budget
from utils import CHECKPOINTS, InputError, quoted


def train(
    config: Config,
    data: Dataset | None = None,
    report: Callable[[list[Row]], None] | None = None,
) -> tuple[list[Row], Score | None]:
    """Train, save and test one network; returns the rows of its log and its score on the test set.

    Runs on CUDA, MPS or the CPU, and data-parallel under torchrun. The last weights, or their
    average (`ema_decay`), are tested once, at the end: the test set chooses nothing. However the
    process ends, `resume` continues from the last saved step; on the CPU the result is the same,
    bit for bit.

    Args:
        data: the images, instead of loading them; without test images the score is None.
        report: called with the rows of log.csv after every epoch, and at once for a resumed run.

    Raises:
        InputError: the configuration, the data or the run folder is wrong, and nothing was written;
            or the disk is full, and what was saved before is intact.
        DivergenceError: the loss or the weights are no longer finite; they were not saved.
        StoppedError: a signal asked to end; the state, if there is one, is saved.
    """
    check_config(config)
    if config.seeds > 1:
        raise InputError(f"seeds: train takes one, not {config.seeds}; call train_seeds")
    config = with_classes(config, data)
    device = distributed.init_processes(config.deterministic)
    run = Run(config, report)  # refuses at once to overwrite a run, or to mix up two
    start = Start(config) if config.init else None
    teacher = Teacher(config) if config.teacher else None
    data = load(config, device, start, teacher, data)

    learner = Learner(config, data, device, start)
    proxy = Proxy(config, data, device) if config.keep_fraction < 1 else None
    with run.opened(data, learner, proxy, teacher, start):  # locked, and resumed from a saved state
        while run.epoch < config.epochs:
            epoch = run.begin_epoch()
            answers = teacher.answers(epoch, run.stop_if_asked) if teacher else None
            batches = train_batches(data, config, epoch, run.step, answers)
            if proxy:
                batches = proxy.hardest(batches, run.step)
            for images, targets, n in run.steps(batches):  # saves and stops between two steps
                run.add(learner.step(images, targets, n), n)  # forward, backward, update
            learner.synchronize()
            run.end_epoch(evaluate(learner.eval_model, data.val, data.normalize, run.stop_if_asked))

        model, temperature = learner.eval_model, None
        if len(data.val):
            logits = classify(model, data.val.images, data.normalize, after_batch=run.stop_if_asked)
            temperature = fit_temperature(logits, data.val.labels)
        test = evaluate(model, data.test, data.normalize, run.stop_if_asked)
        run.finish(test, temperature)
    return run.log, test


def load(
    config: Config,
    device: torch.device,
    start: Start | None,
    teacher: Teacher | None,
    data: Dataset | None = None,
) -> Dataset:
    """Load the data, unless it is given, to `device`, and check what else depends on it.

    Raises:
        InputError: it cannot be read, or does not fit the batches or the teacher.
    """
    if data is None:
        with distributed.first_on_each_machine():
            data = load_dataset(config)
    check_batches(config, len(data.train), distributed.num_processes())
    data = start.normalized(data).to(device) if start else data.to(device)
    if teacher:
        teacher.prepare(data, device)
    return data


def with_classes(config: Config, data: Dataset | None = None) -> Config:
    """The configuration with the number of classes that its data has.

    Raises:
        InputError: the classes cannot be found, or are so many that the network is over the budget.
    """
    class_names = data.class_names if data else class_names_of(config)
    config = replace(config, num_classes=len(class_names))
    check_budget(config, config.max_params)
    return config


def train_seeds(config: Config) -> list[Score]:
    """Train `config.seeds` networks that differ in their seed; returns their test scores.

    Prints the mean and standard deviation of the accuracies, and the 95% interval of the mean by
    Student's t: those of the validation images, if there are any, then those of the test images.
    With `resume`, a run that was cut off goes on and a finished one is only tested. With
    `overwrite`, the old runs of all seeds are removed before the first is trained.

    Raises:
        InputError: one of them cannot be trained, and no old run was removed; or a disk is full.
        DivergenceError: a loss is no longer finite; the runs before it are complete.
        StoppedError: a signal asked to end; --resume goes on.
    """
    config, configs, runs = with_classes(config), [], []
    device = distributed.init_processes(config.deterministic)
    for seed in range(config.seed, config.seed + config.seeds):
        configs.append(replace(config, name=f"{config.name}-{seed}", seed=seed, seeds=1))
        check_config(configs[-1])
        runs.append(Run(configs[-1]))  # what is wrong is reported now, not hours later
        start = Start(configs[-1]) if config.init else None
        teacher = Teacher(configs[-1]) if config.teacher else None
    data = load(config, device, start, teacher)
    if config.compile:
        check_compiler(device)
    if config.overwrite:
        remove_runs(runs)
    del runs, start, teacher  # their memory is needed
    scores, val = [], []
    with stop_signals:
        for one in configs:
            if number := max(distributed.all_reduce_max(stop_signals.received)):
                end_by_signal(number, f"before {one.name}; {how_to_go_on(config)}")
            log, score = train(one, data)
            scores.append(score)
            val.append(log[-1]["val_accuracy"])
            distributed.give_back_memory()
    if distributed.is_main():
        if config.val_size:
            print(f"{len(configs)} seeds: validation accuracy {summary(val)}")
        test = [score.accuracy for score in scores]
        print(f"{len(configs)} seeds: test accuracy {summary(test)}")
    return scores


def main(args: list[str]) -> None:
    """Train what the command line asks for."""
    config = parse_command_line(args)
    if config.seeds > 1:
        train_seeds(config)
        return
    train(config)
    if distributed.is_main():
        path = CHECKPOINTS / config.name / "model.safetensors"
        print(f"next: python test.py {quoted(path)}")
