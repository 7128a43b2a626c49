"""How a small network learns best from a large one: the loss, regularization, the views to keep.

    python -m studies.teacher.run loss   # 8 runs: labels, and three losses with the teacher
    python -m studies.teacher.run less   # 6 more: less Cutout, none, and then less weight decay
    python -m studies.teacher.run views  # 6: 10 views, 40, and new ones in every epoch

Question: which loss, how much regularization and how many views give the shape of `best`, at a
quarter of its width (16, 32 and 64 channels), the highest validation accuracy in 60 epochs, taught
by `best`? The teacher has seen all training images, also those that are set aside here, so the arms
that it teaches can be compared with each other only; `labels` has not, and may be behind for that
reason alone. 45,000 images to train on, 5,000 for validation, no test image is read, two seeds.
Runs that are in trial.csv are not repeated, and a run that is cut off goes on.

Record: trial-cropped.csv has seed 0 of the stage loss (commit 76a32e1, an AMD EPYC) and of two arms
of less (26b67a0 and 6210d15, an Intel Xeon with AMX), in bfloat16 and beside other work, which
alone decides nothing. Then a view was always shown with the same crop, flip and Cutout, and the
teacher answered to that; now these are new in every epoch, and it answers to the whole view.
Nothing has been run since, but for crops.csv: the logs of two trainings that compare the two
(docs/family.md has their commands). In `new-views` alone the teacher sees the crop, too.
tiny-alone.csv is the log of a network without a teacher, to compare with: the first 126 of 300
epochs of `python train.py best --c1 16 --cutout-size 0 --epochs 300 --warmup-epochs 45` (commit
6799a59, two cores of an AMD EPYC in float32, beside other work; its state is lost).

The network that was taught for 300 epochs is checkpoints/tiny.safetensors, and docs/family.md has
what it shows.
"""

if __name__ == "__main__":  # above the imports: a missing library or an old Python is one line
    from engine.script import run_script

    run_script("studies.teacher.run")

import itertools
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

import utils
from config import PRESETS, Config
from data import Dataset, load_dataset, train_batches
from engine import distributed
from engine.evaluate import evaluate
from engine.run import Run
from engine.teacher import Teacher
from learner import Learner

SEEDS = (0, 1)
CSV = Path("studies/teacher/trial.csv")
BASE = replace(
    PRESETS["best"],
    c1=16,
    epochs=60,
    warmup_epochs=9,
    val_size=5000,
    label_smoothing=0.0,
    teacher="checkpoints/best.safetensors",
    teacher_views=20,
    wandb="disabled",
    resume=True,
)


class Sharper(Teacher):
    """A teacher whose probabilities are those at temperature 2/3."""

    def targets(self, logits: Tensor) -> Tensor:
        return (1.5 * logits).softmax(1)


class Logits(Teacher):
    """A teacher that gives its logits, for `LogitLearner`."""

    def targets(self, logits: Tensor) -> Tensor:
        return logits


class LogitLearner(Learner):
    """A learner of logits, whose loss is half the squared distance from them."""

    def _learn(self, images: Tensor, targets: Tensor, n: int) -> tuple[Tensor]:
        logits = self.forward(images)
        loss = F.mse_loss(logits, targets, reduction="sum") / 2
        self.update(loss / n)
        return (torch.stack([loss.detach(), (logits.argmax(1) == targets.argmax(1)).sum()]),)


LABELS = {"teacher": "", "teacher_views": 0, "label_smoothing": 0.1}
ARMS = {  # by stage: changes of BASE, the kinds of teacher and learner
    "loss": {
        "labels": (LABELS, Teacher, Learner),
        "probabilities": ({}, Teacher, Learner),
        "temperature-0.667": ({}, Sharper, Learner),
        "logits": ({}, Logits, LogitLearner),
    },
    # The winner of `loss` is the base of what follows: put its classes here.
    "less": {  # than `best` has, which has sixteen times the parameters
        "cutout-8": ({"cutout_size": 8}, Teacher, Learner),
        "no-cutout": ({"cutout_size": 0}, Teacher, Learner),
        "no-cutout-less-decay": ({"cutout_size": 0, "weight_decay": 1e-4}, Teacher, Learner),
    },
    "views": {
        "views-10": ({"teacher_views": 10}, Teacher, Learner),
        "views-40": ({"teacher_views": 40}, Teacher, Learner),
        "new-views": ({"teacher_views": 0}, Teacher, Learner),
    },
}


def configuration(stage: str, arm: str, seed: int) -> Config:
    """The configuration of one run."""
    changes, *_ = ARMS[stage][arm]
    return replace(BASE, **changes, seed=seed, name=f"teacher/{arm}-{seed}")


def train(stage: str, arm: str, seed: int, data: Dataset) -> dict[str, object]:
    """Train or continue one network, by the loop of train.py; returns its row of trial.csv."""
    config = configuration(stage, arm, seed)
    _, kind_of_teacher, kind_of_learner = ARMS[stage][arm]
    device = distributed.init_processes()
    run = Run(config)
    data = data.to(device)
    learner = kind_of_learner(config, data, device)
    teacher = kind_of_teacher(config) if config.teacher else None
    if teacher:
        teacher.prepare(data, device)
    with run.opened(data, learner, teacher=teacher):
        while run.epoch < config.epochs:
            epoch = run.begin_epoch()
            answers = teacher.answers(epoch, run.stop_if_asked) if teacher else None
            batches = train_batches(data, config, epoch, run.step, answers)
            for images, targets, n in run.steps(batches):
                run.add(learner.step(images, targets, n), n)
            run.end_epoch(evaluate(learner.eval_model, data.val, data.normalize, run.stop_if_asked))
    return {
        "arm": arm,
        "seed": seed,
        "epochs": run.epoch,
        "minutes": round(sum(row["seconds"] for row in run.log) / 60, 1),
        "val_loss": round(run.log[-1]["val_loss"], 4),
        "val_accuracy": round(run.log[-1]["val_accuracy"], 2),
    }


def study(stage: Literal["loss", "less", "views"], /) -> None:
    """Train the arms of a stage, one seed after the other; write trial.csv and print the means."""
    data = load_dataset(BASE, test=False)
    rows = utils.read_csv(CSV) if CSV.exists() else []
    done = {(row["arm"], row["seed"]) for row in rows}
    for seed, arm in itertools.product(SEEDS, ARMS[stage]):
        if (arm, seed) not in done:
            rows.append(train(stage, arm, seed, data))
            utils.write_csv(CSV, rows)
    print("\n| arm | validation accuracy |\n|---|---|")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        each = [row["val_accuracy"] for row in rows if row["arm"] == arm]
        print(f"| {arm} | {statistics.mean(each):.2f}% ({', '.join(f'{a:.2f}' for a in each)}) |")


def main(args: list[str]) -> None:
    """Parse the command line and run a stage of the study."""
    import tyro

    tyro.cli(study, args=args, prog="python -m studies.teacher.run", description=__doc__)
