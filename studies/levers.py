"""What else could make `fast` more accurate or cheaper: a lever at a time, two seeds.

    python -m studies.levers    # 30 runs; goes on where it was cut off

Validation accuracy at half the preset's width, a third of its cost, and its full number of steps,
since what regularises changes sign with them. A lever that pays becomes a constant of config.py;
what the others need in code is here alone. A row of levers.csv for each run.

Twelve levers beside one base: one of them will lead by chance. A lever is taken if its mean is half
a point over the base's and two more seeds of both confirm it; or if it costs no accuracy and saves
a tenth of the time. All runs want one kind of machine, which decides between float32 and bfloat16;
docs/fast.md has what they gave.
"""

import script

import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

import learner
import train
import utils
from augment import cut_out
from config import PRESETS, Config
from data import Dataset, load_dataset
from learner import Batch, Learner, Proxy
from metrics import Row
from model import ResNet
from utils import IMAGE_SIZE, DivergenceError

SEEDS = (0, 1)
MORE = tuple(itertools.product((2, 3), ("base", "smoothing-0.3")))  # which led after a seed
BASE = replace(PRESETS["fast"], width=2, val_size=5000, wandb="disabled", resume=True)
STEPS = BASE.epochs * 23  # of 45,000 images in batches of 2,000
LOOKAHEAD_INTERVAL = 5  # steps
FOUND = ("val_loss", "val_accuracy")  # columns of levers.csv


# ---------------------------------------------------------------- levers that are not constants


def build(change: Callable[[ResNet], None]) -> contextlib.AbstractContextManager:
    """Every network is built with `change`, the proxy's too."""
    make_model = learner.make_model

    def changed(config: Config, data: Dataset, device: torch.device) -> ResNet:
        model = make_model(config, data, device)
        change(model)
        return model

    return patch.object(learner, "make_model", changed)


@torch.no_grad()
def dirac_init(model: ResNet) -> None:
    """Every convolution begins as the identity, its further filters at random (airbench)."""
    for layer in model.stages.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight[: layer.in_channels])


def scale_logits(factor: float) -> Callable[[ResNet], None]:
    """Logits times a factor."""

    def scale(model: ResNet) -> None:
        model.register_forward_hook(lambda _model, _inputs, logits: factor * logits)

    return scale


def pool_ceil(model: ResNet) -> None:
    """The last max pooling rounds up: the head sees 4x4 features instead of 3x3.

    Of whole images, that is; the smaller ones before have 3x3 in either way.
    """
    pools = [layer for layer in model.modules() if isinstance(layer, nn.MaxPool2d)]
    pools[-1].ceil_mode = True
    model.architecture = replace(model.architecture, pool_kernel=4)


def freeze_stage1() -> contextlib.AbstractContextManager:
    """The first stage learns no more in the last fifth of the steps, nor is its gradient taken."""
    forward = Learner.forward

    def frozen(self: Learner, images: Tensor) -> Tensor:
        for layer in (self.model.bn1, self.model.stages[0]):
            layer.requires_grad_(self.steps < 0.8 * STEPS)
        return forward(self, images)

    return patch.object(Learner, "forward", frozen)


class PlainProxy(Proxy):
    """A proxy that sees images without Cutout, which the network's get here, and whole labels."""

    def __init__(self, config: Config, *args: object) -> None:
        super().__init__(replace(config, label_smoothing=0.0), *args)

    def hardest(self, batches: Iterable[Batch], first_step: int = 0) -> Iterator[Batch]:
        """An epoch's batches; the corners are drawn with the seed of the step."""
        size = PRESETS["fast"].cutout_size
        for images, labels, n in super().hardest(batches, first_step):
            margin = (IMAGE_SIZE - images.shape[-1]) // 2  # which the small images are without
            corner = torch.randint(IMAGE_SIZE, (len(images), 2)) - size // 2 - margin
            yield cut_out(images, corner.to(images.device), size), labels, n


class Lookahead(torch.optim.SGD):
    """SGD whose weights are drawn back, every few steps, to where they were (airbench).

    Zhang et al., arXiv:1907.08610; how far grows with the steps, as airbench has it.
    """

    def step(self) -> None:
        """Update all parameters."""
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p].setdefault("slow", p.detach().clone())
            self.state[p]["steps"] = self.state[p].get("steps", 0) + 1
        super().step()
        with torch.no_grad():
            for p, state in self.state.items():
                if state["steps"] % LOOKAHEAD_INTERVAL == 0:
                    back = 0.95**LOOKAHEAD_INTERVAL * (state["steps"] / STEPS) ** 3
                    p.lerp_(state["slow"], back)
                    state["slow"].copy_(p)


def airbench_optimizers(
    model: nn.Module, _optimizer: str, lr: float, momentum: float, *args: object
) -> list[torch.optim.Optimizer]:
    """airbench's SGD: one for the filters and the head, and one for BN's biases, at `adam_lr`.

    BN's weights stay 1. The decay of a step is a constant, which L2 regularisation divided by the
    rate amounts to.
    """
    *_, weight_decay, bias_lr, _dtype = args
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.requires_grad_(False)
    biases = [norm.bias for norm in norms]
    chosen = set(biases)
    others = [p for p in model.parameters() if p.requires_grad and p not in chosen]
    return [
        Lookahead(params, rate, momentum, weight_decay=weight_decay / rate, nesterov=True)
        for params, rate in ((others, lr), (biases, bias_lr))
    ]


@contextlib.contextmanager
def airbench_sgd() -> Iterator[None]:
    """What moves the weights is airbench96_faster's, and so is the scale of the logits."""
    with (
        build(scale_logits(1 / 9)),
        patch.object(learner, "make_optimizers", airbench_optimizers),
    ):
        yield


# airbench96_faster's rates, for momentum .85 and the mean loss of 1,000 images, kept of 2,000.
SGD_SCALE = 1000 / (1024 * (1 + 1 / (1 - 0.85)))
AIRBENCH = {
    "optimizer": "sgd",
    "lr": 9.0 * SGD_SCALE,
    "momentum": 0.85,
    "adam_lr": 64 * 9.0 * SGD_SCALE,
    "weight_decay": 0.012 * 2 * SGD_SCALE,
    "warmup_epochs": 8,
}
# The constants that each lever changes.
LEVERS: dict[str, dict[str, object]] = {
    "base": {},
    "no-proxy": {"keep_fraction": 1.0, "batch_size": 1000, "epochs": 43},
    "lr-0.10": {"lr": 0.10},
    "lr-0.20": {"lr": 0.20},
    "scale-24": {"small_images": "scale", "small_size": 24, "small_fraction": 0.5},
    "scale-20": {"small_images": "scale", "small_size": 20, "small_fraction": 0.5},
    "dirac-init": {},
    "smoothing-0.3": {"label_smoothing": 0.3},
    "logits-1.5": {},
    "pool-ceil": {},
    "freeze-stage-1": {},
    "plain-proxy": {"cutout_size": 0},
    "airbench-sgd": AIRBENCH,
}
# And the contexts in which some of them train.
CODE: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "dirac-init": lambda: build(dirac_init),
    "logits-1.5": lambda: build(scale_logits(1.5)),
    "pool-ceil": lambda: build(pool_ceil),
    "freeze-stage-1": freeze_stage1,
    "plain-proxy": lambda: patch.object(train, "Proxy", PlainProxy),
    "airbench-sgd": airbench_sgd,
}


# ---------------------------------------------------------------- the study


def configuration(lever: str, seed: int) -> Config:
    """The constants of one run."""
    return replace(BASE, **LEVERS[lever], name=f"levers/{lever}-{seed}", seed=seed)


def run(lever: str, seed: int, data: Dataset) -> Row:
    """Train one network, or go on with it; returns its row of levers.csv, empty if it diverged."""
    config = configuration(lever, seed)
    try:
        with CODE.get(lever, contextlib.nullcontext)():
            log, _ = train.train(config, data)
    except DivergenceError:
        return {"lever": lever, "seed": seed} | dict.fromkeys(FOUND)
    return {
        "lever": lever,
        "seed": seed,
        "val_loss": round(log[-1]["val_loss"], 4),
        "val_accuracy": round(log[-1]["val_accuracy"], 2),
    }


def main(_args: list[str]) -> None:
    """Train with every lever, one seed after the other; write levers.csv, and print the means."""
    rows, data = [], load_dataset(BASE.dataset, BASE.data_dir, BASE.val_size, test=False)
    for seed, lever in (*itertools.product(SEEDS, LEVERS), *MORE):
        rows.append(run(lever, seed, data))
        utils.write_csv(Path("studies/levers.csv"), rows)
    print("\n| lever | validation accuracy |")
    print("|---|---|")
    for lever in LEVERS:
        each = [row["val_accuracy"] for row in rows if row["lever"] == lever]
        listed = ", ".join(
            "diverged" if accuracy is None else f"{accuracy:.2f}" for accuracy in each
        )
        mean = f"{statistics.mean(each):.2f}% " if None not in each else ""
        print(f"| {lever} | {mean}({listed}) |")


if __name__ == "__main__":
    script.run_script(main)
