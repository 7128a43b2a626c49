"""The arithmetic of a training step: SGD, Muon, schedules, average, proxy."""

import copy
import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TINY
from faults import digest
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from config import PRESETS, Config
from data import load_dataset, train_batches
from engine import distributed
from learner import (
    Learner,
    Muon,
    Proxy,
    lr_factor,
    make_model,
    make_optimizers,
    memory_format,
    orthogonalize,
    update_average,
)
from model import Architecture, ResNet
from utils import generator

CPU = torch.device("cpu")
EXACT = replace(TINY, bfloat16=False)


@pytest.fixture(scope="module")
def digits():
    return load_dataset(TINY)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


# ---------------------------------------------------------------- the recipe


def test_defaults_are_the_papers_recipe():
    config = Config()
    assert (config.num_blocks, config.c1, config.dropout) == ((13, 13, 13), 16, 0)
    assert (config.lr, config.momentum, config.weight_decay) == (0.01, 0.9, 5e-4)
    assert (config.batch_size, config.epochs, config.schedule) == (128, 300, "cosine")
    assert (config.crop_padding, config.padding_mode, config.rotation_degrees) == (4, "zeros", 5.0)
    assert (config.flip, config.optimizer, config.label_smoothing) == ("random", "sgd", 0)
    assert (config.dataset, config.val_size) == ("cifar10", 0)


def learning_rates(config):
    """The learning rate of every step, of two in an epoch."""
    return [config.lr * lr_factor(config, step, 2) for step in range(2 * config.epochs)]


def test_schedules():
    expected = [0.01 * (1 + math.cos(math.pi * epoch / 300)) / 2 for epoch in range(300)]
    rates = learning_rates(Config())
    assert rates[::2] == rates[1::2] == pytest.approx(expected)
    restarts = Config(schedule="cosine_restarts", restart_epochs=20, epochs=60)
    cycle = [0.01 * (1 + math.cos(math.pi * epoch / 20)) / 2 for epoch in range(20)]
    assert learning_rates(restarts)[::2] == pytest.approx(3 * cycle)
    linear = learning_rates(Config(schedule="linear", epochs=2))
    assert linear == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    warm = learning_rates(Config(warmup_epochs=3, epochs=303))
    assert warm[:6] == pytest.approx([0.01 * step / 6 for step in range(1, 7)])
    assert warm[6:] == pytest.approx(rates)
    line = learning_rates(Config(lr=1.0, schedule="linear", warmup_epochs=2, epochs=4))
    assert line == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25])
    restarts = Config(lr=1.0, schedule="cosine_restarts", restart_epochs=2)
    rates = learning_rates(replace(restarts, warmup_epochs=1, epochs=5))
    assert rates == pytest.approx([0.5, 1] + 2 * [1, 1, 0.5, 0.5])


# ---------------------------------------------------------------- the initial weights


def test_initial_weights_are_those_of_the_seed(digits):
    def initial(seed):
        torch.manual_seed(99)
        return make_model(replace(TINY, seed=seed), digits, CPU).linear.weight

    assert torch.equal(initial(0), initial(0))
    assert not torch.equal(initial(0), initial(1))


def test_whitening_stem_is_filled_from_the_normalized_training_images(digits):
    config = replace(TINY, stem="whitening", c1=24, pool_kernel=4)
    expected = ResNet(config)
    few = replace(digits, train=digits.train[:100])
    expected.set_whitening(digits.normalize(few.train.images / 255))
    weight = make_model(config, few, CPU).conv1.weight
    torch.testing.assert_close(weight, expected.conv1.weight)


# ---------------------------------------------------------------- a step


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay_norms", [False, True])
def test_a_step_is_sgd_on_the_mean_cross_entropy(digits, nesterov, decay_norms):
    """Three steps, the last over fewer images, against the plainest possible loop."""
    config = replace(EXACT, lr=0.02, momentum=0.8, weight_decay=0.01, label_smoothing=0.1)
    config = replace(config, batch_size=64, nesterov=nesterov, decay_norms=decay_norms, epochs=1)
    few = replace(digits, train=digits.train[:150])
    learner = Learner(config, few, CPU)
    expected = copy.deepcopy(learner.model)
    velocity = [torch.zeros_like(p) for p in expected.parameters()]
    for images, targets, n in train_batches(few, config, 1):
        totals = learner.step(images, targets, n)
        logits, labels = expected(images), targets.argmax(1)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for p, v, g in zip(expected.parameters(), velocity, gradients, strict=True):
                g = g + config.weight_decay * p * (decay_norms or p.ndim > 1)
                v.mul_(config.momentum).add_(g)
                p.sub_(config.lr * (g + config.momentum * v if nesterov else v))
        right = (logits.argmax(1) == labels).sum().item()
        assert totals.tolist() == pytest.approx([n * loss.item(), right], rel=1e-4)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(learner.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_every_step_is_taken_at_its_rate(digits, optimizer):
    """Of both optimizers, and after loading a state of a shorter schedule too."""
    config = replace(TINY, schedule="linear", epochs=2, max_steps_per_epoch=2, adam_lr=0.01)
    config = replace(config, optimizer=optimizer)
    batch = next(train_batches(digits, config, 1))
    short = Learner(config, digits, CPU)
    long = Learner(replace(config, epochs=4), digits, CPU)

    def rates(learner):
        learner.step(*batch)
        return [group["lr"] for o in learner.optimizers for group in o.param_groups]

    both = [0.1, 0.01][: len(short.optimizers)]
    assert [rates(short), rates(short)] == [both, pytest.approx([0.75 * lr for lr in both])]
    long.load_state_dict(short.state_dict())
    assert long.lr == pytest.approx(0.1 * 6 / 8)
    assert rates(long) == pytest.approx([lr * 6 / 8 for lr in both])


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_restored_learner_has_the_state_that_was_saved(digits, optimizer):
    config = replace(TINY, optimizer=optimizer, schedule="linear", ema_decay=0.9)
    one, other = (Learner(config, digits, CPU) for _ in range(2))
    for epoch in (1, 2):
        one.step(*next(train_batches(digits, config, epoch)))
    other.load_state_dict(one.state_dict())
    assert digest(other.state_dict()) == digest(one.state_dict())


def test_dropout_is_drawn_anew_in_each_step_and_by_the_seed_alone(digits, monkeypatch):
    """And in each of several processes, so that their shares of a batch do not lack the same."""
    config = replace(EXACT, dropout=0.2)
    images, *_ = next(train_batches(digits, config, 1))

    def outputs(seed):
        learner = Learner(replace(config, seed=seed), digits, CPU)
        learner.model.load_state_dict(weights)
        torch.manual_seed(99)
        found = []
        for learner.steps in (0, 1):
            learner.begin_step()
            found.append(learner.forward(images).detach())
        return found

    weights = Learner(config, digits, CPU).model.state_dict()
    (first, second), again, (other, _) = outputs(0), outputs(0), outputs(1)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert not torch.equal(first, outputs(0)[0])


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_state_of_another_memory_format_is_the_same(digits, optimizer):
    """As when a narrow network, whose format depends on the device, moves from a GPU to a CPU."""
    config = replace(EXACT, c1=3, optimizer=optimizer, adam_lr=0.01)
    batch = next(train_batches(digits, config, 1))
    one, other = (Learner(config, digits, CPU) for _ in range(2))
    one.step(*batch)
    state = copy.deepcopy(one.state_dict())
    for kept in state["optimizers"][0]["state"].values():
        if kept["momentum_buffer"].ndim == 4:
            moved = kept["momentum_buffer"].contiguous(memory_format=torch.channels_last)
            kept["momentum_buffer"] = moved
    other.load_state_dict(state)
    for learner in (one, other):
        learner.step(*batch)
    assert same(other.model.state_dict(), one.model.state_dict())


@pytest.mark.slow
def test_narrow_network_learns_where_onednn_writes_past_its_memory(digits):
    """As on CPUs with AVX2 alone, where channels that come last crashed the process."""
    config = replace(TINY, c1=3, num_blocks=(1, 1), width=2, pool_kernel=16, epochs=1)
    code = f"import train; train.train(train.{config!r})"
    env = os.environ | {"PYTHONPATH": str(ROOT), "ONEDNN_MAX_CPU_ISA": "AVX2"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for c1 in (3, 4):
        weight = make_model(replace(config, c1=c1), digits, CPU).stages[0][0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == (c1 == 4)


def test_channels_come_last_but_on_apples_gpus():
    """There they make gradients wrong (github.com/pytorch/pytorch/issues/175189)."""
    network = ResNet(Architecture())
    for device, expected in (("cpu", True), ("cuda", True), ("mps", False)):
        last = memory_format(network, torch.device(device)) == torch.channels_last
        assert last == expected, device


# ---------------------------------------------------------------- Muon


def test_orthogonalize_moves_all_singular_values_to_about_1():
    for shape in ((2, 6, 40), (2, 40, 6)):
        scales = torch.tensor([1e-3, 100.0])[:, None, None]
        matrices = torch.randn(shape, generator=generator(0)) * scales
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        singular = u.mT @ orthogonalize(matrices) @ v.mT  # (2, 6, 6), diagonal
        diagonal = singular.diagonal(dim1=1, dim2=2)
        assert 0.5 < diagonal.min() < diagonal.max() < 1.5
        torch.testing.assert_close(singular, diagonal.diag_embed(), atol=1e-4, rtol=0)


def test_orthogonalize_lifts_small_singular_values_and_the_least_41_fold():
    """By three steps, each of which multiplies a value near 0 by 3.4445."""
    values = torch.tensor([1.0, 0.1, 0.02, 1e-4])
    found = orthogonalize(torch.diag(values)[None])[0].diagonal()
    assert 0.5 < found[:3].min() < found[:3].max() < 1.2
    assert 40 < found[3] / values[3] < 41.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_turns_weights_of_constant_norm_along_nesterovs_momentum(dtype):
    weight = nn.Parameter(torch.randn(4, 2, 3, 3, generator=generator(0)))
    optimizer = Muon([weight], lr=0.1, momentum=0.5, dtype=dtype)
    one, two = (torch.randn(weight.shape, generator=generator(i)) for i in (1, 2))
    expected = weight.detach().clone()
    for gradient, update in ((one, 1.5 * one), (two, two + 0.5 * (two + 0.5 * one))):
        weight.grad = gradient
        optimizer.step()
        matrix = orthogonalize(update.flatten(1)[None].to(dtype))  # its products are in this type
        expected = expected * 2 / expected.norm()  # sqrt(4 filters)
        expected = expected - 0.1 * matrix.float().view_as(weight)
        torch.testing.assert_close(weight.detach(), expected)


def test_muon_leaves_a_frozen_layer_as_it_is():
    frozen, trained = (nn.Parameter(torch.ones(2, 2, 1, 1)) for _ in range(2))
    optimizer = Muon([frozen, trained], lr=0.1, momentum=0.5)
    for weight in (frozen, trained):
        weight.grad = torch.eye(2)[..., None, None]
    optimizer.step()
    before, frozen.grad = frozen.detach().clone(), None  # as zero_grad leaves it
    optimizer.step()
    assert torch.equal(frozen, before)
    assert not torch.equal(trained, before)


def test_muon_gets_the_convolutions_and_adam_the_rest():
    model = ResNet(PRESETS["small"])
    muon, adam = make_optimizers(model, replace(PRESETS["small"], momentum=0.3))
    assert muon.param_groups[0]["momentum"] == 0.3
    assert adam.param_groups[0]["betas"] == (0.9, 0.95)
    filters, others = (o.param_groups[0]["params"] for o in (muon, adam))
    assert {p.ndim for p in filters} == {4}
    assert {p.ndim for p in others} == {1, 2}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in filters + others} == {id(p) for p in trained}
    assert id(model.conv1.weight) not in {id(p) for p in filters}  # a frozen stem


# ---------------------------------------------------------------- the average


def test_average_keeps_more_and_more_up_to_its_decay():
    model, decay = nn.BatchNorm1d(3), 0.4
    average = AveragedModel(model)
    steps = [torch.randn(3, generator=generator(i)) for i in range(7)]
    for values in steps:
        with torch.no_grad():
            model.weight.copy_(values)
            model.running_mean.copy_(-values)
        update_average(average, model, decay)
    expected = steps[0]  # the first step starts it
    for kept, values in zip((2 / 11, 3 / 12, 4 / 13, 5 / 14, 0.4, 0.4), steps[1:], strict=True):
        expected = kept * expected + (1 - kept) * values
    torch.testing.assert_close(average.module.weight.detach(), expected)
    torch.testing.assert_close(average.module.running_mean, -expected)


def test_average_follows_each_step_and_is_what_is_evaluated(digits):
    learner = Learner(replace(EXACT, ema_decay=0.7), digits, CPU)
    start = learner.model.linear.weight.detach().clone()
    weights = []
    for batch in itertools.islice(train_batches(digits, learner.config, 1), 3):
        learner.step(*batch)
        weights.append(learner.model.linear.weight.detach().clone())
    expected = 3 / 12 * (2 / 11 * weights[0] + 9 / 11 * weights[1]) + 9 / 12 * weights[2]
    torch.testing.assert_close(learner.eval_model.linear.weight.detach(), expected)
    assert not torch.equal(weights[0], start)
    plain = Learner(EXACT, digits, CPU)
    assert plain.eval_model is plain.model


# ---------------------------------------------------------------- the proxy


@pytest.fixture
def make_proxy(digits):
    """A proxy for the digits, and nine batches of them."""

    def make(keep_fraction, **changes):
        config = replace(EXACT, keep_fraction=keep_fraction, batch_size=40, max_steps_per_epoch=9)
        config = replace(config, **changes, channels=(8,) * len(config.num_blocks))
        return Proxy(config, digits, CPU), list(train_batches(digits, config, 1))

    return make


@pytest.mark.parametrize("label_smoothing", [0.0, 0.8])
def test_proxy_keeps_the_images_of_the_largest_loss(make_proxy, label_smoothing):
    proxy, batches = make_proxy(0.25, label_smoothing=label_smoothing)
    before = copy.deepcopy(proxy.learner.model)
    assert (before.architecture.width, before.architecture.channels) == (1, ())
    images, labels, batch_size = next(proxy.hardest(batches))
    assert len(images) == len(labels) == batch_size == 10
    losses = F.cross_entropy(before(batches[0][0]), batches[0][1], reduction="none")
    order = losses.argsort(descending=True)[:10]
    assert torch.equal(images, batches[0][0][order])
    assert torch.equal(labels, batches[0][1][order])


@pytest.mark.parametrize(("channels", "is_narrower"), [((), True), ((8, 16, 32), False)])
def test_proxy_that_saves_no_time_is_reported(channels, is_narrower, digits, capsys):
    config = replace(
        EXACT, num_blocks=(1, 1, 1), c1=8, width=2, channels=channels, keep_fraction=0.5
    )
    Proxy(config, digits, CPU)
    assert ("keep_fraction: 0.5 saves no time" in capsys.readouterr().err) == (not is_narrower)


@pytest.mark.parametrize("first_step", [0, 5])
def test_proxy_learns_from_every_fourth_batch(make_proxy, first_step):
    """By its number in the epoch, which a resumed run does not begin at 0."""
    proxy, batches = make_proxy(0.5)
    weights = [proxy.learner.model.linear.weight.detach().clone()]
    for _ in proxy.hardest(batches[first_step:], first_step):
        weights.append(proxy.learner.model.linear.weight.detach().clone())
    changed = [not torch.equal(one, other) for one, other in itertools.pairwise(weights)]
    assert changed == [step % 4 == 0 for step in range(first_step, 9)]


def test_proxy_follows_the_schedule_also_in_steps_in_which_it_does_not_learn(digits):
    config = replace(TINY, schedule="linear", epochs=2, max_steps_per_epoch=2, keep_fraction=0.5)
    proxy = Proxy(config, digits, CPU)
    rates = [
        proxy.learner.optimizers[0].param_groups[0]["lr"]
        for epoch in (1, 2)
        for _ in proxy.hardest(train_batches(digits, config, epoch))
    ]
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_proxies_of_two_processes_learn_from_the_mean_over_all_that_is_kept(
    make_proxy, monkeypatch
):
    """Of 21 images one has 11 and keeps 6, the other has 10 and keeps 5."""
    images, labels, _ = make_proxy(0.5)[1][0]
    monkeypatch.setattr(distributed, "num_processes", lambda: 2)
    gradients, losses = [], []
    for share, number in ((slice(0, 21, 2), 6), (slice(1, 21, 2), 5)):
        proxy, _ = make_proxy(0.5)
        weight, before = proxy.learner.model.linear.bias, copy.deepcopy(proxy.learner.model)
        own = F.cross_entropy(before(images[share]), labels[share], reduction="none")
        losses.append(own.topk(number).values.sum())
        (batch,) = proxy.hardest([(images[share], labels[share], 21)])
        assert (len(batch[0]), batch[2]) == (number, 11)
        step = before.linear.bias.detach() - weight.detach()
        gradients.append(step / EXACT.lr - EXACT.weight_decay * before.linear.bias.detach())
        (expected,) = torch.autograd.grad(losses[-1] / 11, before.linear.bias)
        torch.testing.assert_close(gradients[-1], expected, rtol=1e-3, atol=1e-5)
