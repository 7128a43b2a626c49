"""The study of levers: each does to a training what it says."""

from dataclasses import replace

import pytest
import torch

import train
import utils
from config import check_config
from data import Dataset, Split
from learner import Learner
from model import ResNet
from studies import levers
from utils import generator


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """The study at half its width, 4 epochs of 5 steps."""
    base = replace(levers.BASE, width=1, epochs=4, batch_size=16, val_size=0)
    monkeypatch.setattr(levers, "BASE", base)
    monkeypatch.setattr(levers, "STEPS", 4 * 5)
    unpicked = levers.LEVERS["no-proxy"] | {"batch_size": 8, "epochs": 4}
    monkeypatch.setitem(levers.LEVERS, "no-proxy", unpicked)
    monkeypatch.setitem(levers.LEVERS, "airbench-sgd", levers.AIRBENCH | {"warmup_epochs": 1})


@pytest.fixture(scope="module")
def noise():
    """80 images to train on, and 10 to compare by."""
    images = torch.randint(256, (90, 3, 32, 32), generator=generator(0), dtype=torch.uint8)
    split = Split(images, torch.arange(90) % 10)
    names = tuple("abcdefghij")
    parts = (split[:80], split[80:], split[:0])
    return Dataset("cifar10", names, (0.5,) * 3, (0.25,) * 3, *parts, "")


@pytest.mark.slow  # 14 trainings
def test_every_lever_changes_the_training_and_nothing_after_it(noise):
    def losses(lever):
        levers.run(lever, 0, noise)
        path = train.CHECKPOINTS / "levers" / f"{lever}-0" / "log.csv"
        return [row["train_loss"] for row in utils.read_csv(path)]

    found = {lever: losses(lever) for lever in levers.LEVERS}
    assert len({tuple(found[lever]) for lever in found}) == len(levers.LEVERS)
    for lever in ("freeze-stage-1", "scale-20"):  # late, and from the start
        same = [a == b for a, b in zip(found[lever], found["base"], strict=True)]
        assert same == ([True] * 3 + [False] if lever == "freeze-stage-1" else [False] * 4)
    (train.CHECKPOINTS / "levers" / "base-0").rename("before")
    assert losses("base") == found["base"]


def test_dirac_network_begins_as_the_identity():
    model = ResNet(levers.configuration("base", 0))
    levers.dirac_init(model)
    block, x = model.stages[0][1], torch.randn(2, 24, 5, 5, generator=generator(0))
    assert torch.equal(block.conv1(x), x)
    wider = model.stages[1][0][0](x)  # to 48 channels
    assert torch.equal(wider[:, :24], x)
    assert wider[:, 24:].std() > 0.1


def test_pooling_that_rounds_up_shows_the_head_four_by_four_features():
    model = ResNet(levers.configuration("base", 0)).eval()
    seen = []
    model.stages.register_forward_hook(lambda _m, _x, out: seen.append(out.shape[-1]))
    images = torch.randn(2, 3, 32, 32, generator=generator(0))
    model(images)
    levers.pool_ceil(model)
    logits = model(images)
    assert seen == [3, 4]
    features = model.stages(model.relu(model.bn1(model.conv1(images)))).mean((2, 3))
    torch.testing.assert_close(logits, model.linear(features))


def test_frozen_stage_costs_no_gradient(noise):
    learner = Learner(levers.configuration("base", 0), noise, torch.device("cpu"), 5)
    batch = noise.normalize(noise.train.images[:16]), noise.train.labels[:16], 16
    with levers.freeze_stage1():
        learner.steps = 15
        learner.step(*batch)
        stages = [
            [p.detach().clone() for p in stage.parameters()] for stage in learner.model.stages
        ]
        learner.steps = 16
        learner.step(*batch)
    for stage, before in zip(learner.model.stages, stages, strict=True):
        moved = [not torch.equal(p, q) for p, q in zip(stage.parameters(), before, strict=True)]
        assert any(moved) == all(moved) == (stage is not learner.model.stages[0])


def test_lookahead_goes_back_every_fifth_step(monkeypatch):
    monkeypatch.setattr(levers, "STEPS", 10)
    ahead, plain = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizers = levers.Lookahead([ahead], 1.0), torch.optim.SGD([plain], 1.0)
    found = []
    for _ in range(10):
        for p, optimizer in zip((ahead, plain), optimizers, strict=True):
            p.grad = -torch.ones(1)
            optimizer.step()
        found.append(ahead.item())
    first = 5 * (1 - 0.95**5 / 8)  # the cube of a half
    second = first + 5 * (1 - 0.95**5)
    assert found[:4] == [1, 2, 3, 4]
    assert found[4] == pytest.approx(first)
    assert found[9] == pytest.approx(second)


def test_proxy_sees_whole_images_and_the_network_cut_ones(noise, monkeypatch):
    seen, learned = [], []
    choose, step = levers.Proxy.hardest, Learner.step

    def hardest(self, batches, first_step=0):
        def watched():
            for images, labels, n in batches:
                seen.append(images)
                yield images, labels, n

        return choose(self, watched(), first_step)

    monkeypatch.setattr(levers.Proxy, "hardest", hardest)
    monkeypatch.setattr(
        Learner, "step", lambda self, x, *a: (learned.append(x), step(self, x, *a))[1]
    )
    levers.run("plain-proxy", 0, noise)
    for images, cut in zip(seen, learned, strict=True):
        assert (images == 0).float().mean() < 0.01
        # 12x12 of 28x28 or 32x32 pixels, whose border can hide a part of it.
        assert 0.1 < (cut == 0).all(1).float().mean() < 0.19


@pytest.mark.parametrize("lever", levers.LEVERS)
def test_every_run_can_be_trained(lever):
    config = levers.configuration(lever, seed=1)
    check_config(config)
    assert (config.seed, config.resume) == (1, True)
    assert config.keep_fraction == (1.0 if lever == "no-proxy" else 0.5)


def test_what_diverges_leaves_an_empty_row(noise, monkeypatch):
    base = replace(levers.BASE, optimizer="sgd", lr=1000.0, epochs=8)
    monkeypatch.setattr(levers, "BASE", base)
    row = levers.run("base", 0, noise)
    assert row == {
        "lever": "base",
        "seed": 0,
        "val_loss": None,
        "val_accuracy": None,
    }


def test_sgd_moves_no_bn_weight_and_biases_at_their_own_rate(noise):
    config = replace(levers.configuration("airbench-sgd", 0), warmup_epochs=0, bfloat16=False)
    with levers.airbench_sgd():
        learner = Learner(config, noise, torch.device("cpu"), 5)
        images = noise.normalize(noise.train.images[:8])
        logits = learner.forward(images)
    weights, biases = learner.optimizers
    assert weights.param_groups[0]["lr"] == pytest.approx(1.146, abs=1e-3)
    assert biases.param_groups[0]["lr"] == pytest.approx(64 * 1.146, abs=0.1)
    for optimizer in learner.optimizers:
        (group,) = optimizer.param_groups
        assert group["lr"] * group["weight_decay"] == pytest.approx(config.weight_decay)
    moved = {id(p) for o in learner.optimizers for g in o.param_groups for p in g["params"]}
    still = {name for name, p in learner.model.named_parameters() if id(p) not in moved}
    norms = {f"{n}.weight" for n, m in learner.model.named_modules() if hasattr(m, "running_mean")}
    assert still == norms | {"conv1.weight"}
    torch.testing.assert_close(9 * logits, learner.model.forward(images))  # without the hook
