import copy
import inspect
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_LINE, run_main
from faults import FAST, SMALL
from torch.nn import functional as F

import distributed
import metrics
import optim
import train as train_script
import utils
from augment import Augmentation, train_batches
from checkpoint import load_state, save_state
from config import CLAIMS, PRESETS, Config, Recipe, Run, record
from data import load_dataset
from learner import Learner, Proxy, make_model
from metrics import Score
from model import Architecture, ResNet
from optim import lr_factor, make_average
from train import main, train, train_seeds
from utils import InputError, generator, part_of
from weights import load_model


def read_log(name):
    return utils.read_csv(f"checkpoints/{name}/log.csv")


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
    annealing = (config.epochs, config.schedule, config.warmup_epochs, config.restart_epochs)
    return [config.lr * lr_factor(step, 2, *annealing) for step in range(2 * config.epochs)]


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


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_every_step_is_taken_at_its_rate(tiny, optimizer):
    """Of both optimizers, and after loading a state of a shorter schedule too."""
    data, cpu = load_dataset("digits"), torch.device("cpu")
    batch = next(train_batches(data, part_of(tiny, Augmentation), 8, 0, 1))
    config = replace(tiny, schedule="linear", epochs=2, optimizer=optimizer, adam_lr=0.01)
    short = Learner(config, data, cpu, steps_per_epoch=2)
    long = Learner(replace(config, epochs=4), data, cpu, steps_per_epoch=2)

    def rates(learner):
        learner.step(*batch)
        return [group["lr"] for o in learner.optimizers for group in o.param_groups]

    both = [0.1, 0.01][: len(short.optimizers)]
    assert [rates(short), rates(short)] == [both, pytest.approx([0.75 * lr for lr in both])]
    long.load_state_dict(short.state_dict())
    assert long.lr == pytest.approx(0.1 * 6 / 8)
    assert rates(long) == pytest.approx([lr * 6 / 8 for lr in both])


@pytest.mark.parametrize("nesterov", [False, True])
def test_training_is_sgd_on_the_mean_cross_entropy(tiny, nesterov):
    """Two steps against the plainest possible loop, on the same batches."""
    config = replace(
        tiny, epochs=1, max_steps_per_epoch=2, lr=0.02, momentum=0.8, weight_decay=0.01
    )
    config = replace(config, batch_size=64, nesterov=nesterov, bfloat16=False)
    train(config)
    trained, _ = load_model("checkpoints/tiny/model.safetensors")

    torch.manual_seed(config.seed)
    expected = ResNet(config).to(memory_format=torch.channels_last)
    velocity = [torch.zeros_like(p) for p in expected.parameters()]
    augmentation = Augmentation(0, "zeros", config.rotation_degrees, "none", 0)
    batches = train_batches(load_dataset("digits"), augmentation, config.batch_size, 0, 1)
    for _ in range(2):
        images, labels, _ = next(batches)
        loss = F.cross_entropy(expected(images), labels)
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for p, v, g in zip(expected.parameters(), velocity, gradients, strict=True):
                g = g + config.weight_decay * p
                v.mul_(config.momentum).add_(g)
                p.sub_(config.lr * (g + config.momentum * v if nesterov else v))
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_images_of_best_are_augmented_as_its_constants_say():
    augmentation = part_of(PRESETS["best"], Augmentation)
    assert augmentation == Augmentation(4, "reflect", 0.0, "alternating", 16, True, "scale")


def test_orthogonalize_moves_all_singular_values_to_about_1():
    for shape in ((2, 6, 40), (2, 40, 6)):
        scales = torch.tensor([1e-3, 100.0])[:, None, None]
        matrices = torch.randn(shape, generator=generator(0)) * scales
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        singular = u.mT @ optim.orthogonalize(matrices) @ v.mT  # (2, 6, 6), diagonal
        diagonal = singular.diagonal(dim1=1, dim2=2)
        assert 0.5 < diagonal.min() < diagonal.max() < 1.5
        torch.testing.assert_close(singular, diagonal.diag_embed(), atol=1e-4, rtol=0)


def test_muon_turns_weights_of_constant_norm_along_nesterovs_momentum(monkeypatch):
    monkeypatch.setattr(optim, "orthogonalize", lambda matrices: matrices)  # on its own above
    weight = torch.nn.Parameter(torch.randn(4, 2, 3, 3, generator=generator(0)))
    optimizer = optim.Muon([weight], lr=0.1, momentum=0.5)
    gradients = [torch.randn(weight.shape, generator=generator(i)) for i in (1, 2)]
    expected = weight.detach().clone()
    for gradient, update in zip(
        gradients,
        (1.5 * gradients[0], gradients[1] + 0.5 * (gradients[1] + 0.5 * gradients[0])),
        strict=True,
    ):
        weight.grad = gradient
        optimizer.step()
        expected = expected * 2 / expected.norm() - 0.1 * update  # sqrt(4 filters) = 2
        torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_multiplies_matrices_in_the_runs_dtype(monkeypatch, dtype):
    seen = []
    monkeypatch.setattr(optim, "orthogonalize", lambda matrices: seen.append(matrices) or matrices)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(3, 2))
    muon, _ = optim.make_optimizers(model, "muon", 0.1, 0.5, False, 0.0, 0.1, dtype)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    muon.step()
    assert [matrices.dtype for matrices in seen] == [dtype]


def test_muon_leaves_a_frozen_layer_as_it_is():
    frozen, trained = (torch.nn.Parameter(torch.ones(2, 2, 1, 1)) for _ in range(2))
    optimizer = optim.Muon([frozen, trained], lr=0.1, momentum=0.5)
    for weight in (frozen, trained):
        weight.grad = torch.eye(2)[..., None, None]
    optimizer.step()
    before, frozen.grad = frozen.detach().clone(), None  # as zero_grad leaves it
    optimizer.step()
    assert torch.equal(frozen, before)
    assert not torch.equal(trained, before)


def test_muon_gets_the_convolutions_and_adam_the_rest():
    model = ResNet(PRESETS["fast"])
    muon, adam = optim.make_optimizers(model, "muon", 0.1, 0.9, False, 0.0, 0.01)
    filters, others = (o.param_groups[0]["params"] for o in (muon, adam))
    assert {p.ndim for p in filters} == {4}
    assert {p.ndim for p in others} == {1, 2}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in filters + others} == {id(p) for p in trained}
    assert id(model.conv1.weight) not in {id(p) for p in filters}


def test_average_has_its_closed_form():
    model, decay = torch.nn.BatchNorm1d(3), 0.8
    average = make_average(model, decay)
    steps = [torch.randn(3, generator=generator(i)) for i in range(6)]
    for values in steps:
        with torch.no_grad():
            model.weight.copy_(values)
            model.running_mean.copy_(-values)
        average.update_parameters(model)
    # The first step starts it; the t-th of T counts (1 - decay) decay^(T - t).
    expected = decay**5 * steps[0] + sum(
        (1 - decay) * decay ** (5 - t) * steps[t] for t in range(1, 6)
    )
    torch.testing.assert_close(average.module.weight.detach(), expected)
    torch.testing.assert_close(average.module.running_mean, -expected)


def test_average_is_what_is_validated_tested_and_saved(tiny):
    _, score = train(replace(tiny, ema_decay=0.7, val_size=200))
    state = load_state(Path("checkpoints/tiny/last.pt"))
    saved = weights("tiny")
    averaged = {
        key.removeprefix("module."): value for key, value in state["learner"]["ema"].items()
    }
    assert averaged.pop("n_averaged") == 9
    assert same(saved, averaged)
    assert not same(saved, state["learner"]["model"])
    model, _ = load_model("checkpoints/tiny/model.safetensors")
    digits = load_dataset("digits", val_size=200)
    val, test = (
        metrics.score(metrics.evaluate(model, split.images, digits.normalize), split.labels)
        for split in (digits.val, digits.test)
    )
    # Where channels come last, as while training, some CPUs add up in another order.
    assert (test.correct, test.total) == (score.correct, score.total)
    assert test.loss == pytest.approx(score.loss, rel=1e-5)
    assert read_log("tiny")[-1]["val_loss"] == pytest.approx(val.loss)


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_state_of_another_memory_format_is_the_same(tiny, optimizer):
    """As when a narrow network, whose format depends on the device, moves from a GPU to a CPU."""
    config = replace(tiny, c1=3, optimizer=optimizer, adam_lr=0.01, bfloat16=False)
    digits, cpu = load_dataset("digits"), torch.device("cpu")
    batch = next(train_batches(digits, part_of(config, Augmentation), 8, 0, 1))
    one, other = (Learner(config, digits, cpu, steps_per_epoch=9) for _ in range(2))
    one.step(*batch)
    state = copy.deepcopy(one.state_dict())
    for kept in state["optimizers"][0]["state"].values():
        buffer = kept["momentum_buffer"]
        if buffer.ndim == 4:
            kept["momentum_buffer"] = buffer.contiguous(memory_format=torch.channels_last)
    other.load_state_dict(state)
    for learner in (one, other):
        learner.step(*batch)
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], tensor)


@pytest.mark.parametrize(("c1", "last"), [(3, False), (4, True)])
def test_narrow_network_learns_where_onednn_writes_past_its_memory(tiny, c1, last):
    """As on CPUs with AVX2 alone, where channels that come last crashed the process."""
    config = replace(tiny, c1=c1, num_blocks=(1, 1), width=2, pool_kernel=16, epochs=1)
    result = subprocess.run(
        [sys.executable, "-c", f"import train; train.train(train.{config!r})"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    weights = make_model(config, load_dataset("digits"), torch.device("cpu")).stages[0][0].conv1
    assert weights.weight.is_contiguous(memory_format=torch.channels_last) == last


def test_first_loss_of_tpsnet_is_near_ln_10_and_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = ResNet()
    loss = F.cross_entropy(model(torch.randn(32, 3, 32, 32)), torch.arange(32) % 10)
    loss.backward()
    # Above ln 10 = 2.30, not at it: 39 blocks each add their variance, and torch's default
    # initialisation, the paper's, does not damp them.
    assert abs(loss.item() - math.log(10)) < 1
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


# ---------------------------------------------------------------- a run, as a newcomer sees it


@pytest.mark.slow
def test_demo_is_as_accurate_as_it_claims():
    assert train(replace(PRESETS["demo"], wandb="disabled"))[1].accuracy >= 99


def test_demo_reaches_97_percent_and_says_what_to_run_next(demo):
    folder, output = demo
    _, info = load_model(folder / "model.safetensors")
    assert info["accuracy"]["test"] >= 97
    last_line = output.splitlines()[-1]
    assert last_line == "next: python test.py checkpoints/demo/model.safetensors"
    assert f"test accuracy: {info['accuracy']['test']:.2f}% (" in output


def test_run_folder_holds_what_the_readme_promises(demo):
    folder, _ = demo
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "log.csv", "last.pt", "model.safetensors", "curves.png"}
    assert not [name for name in names if name.startswith(".")]  # no temporary left behind
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((folder / "config.json").read_text())
    assert config == json.loads(
        json.dumps(asdict(replace(PRESETS["demo"], epochs=6, wandb="offline")))
    )
    rows = utils.read_csv(folder / "log.csv")
    assert list(rows[0]) == [
        "epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds",
    ]  # fmt: skip
    assert [row["epoch"] for row in rows] == list(range(1, 7))
    assert rows[0]["train_loss"] > rows[-1]["train_loss"]
    state = load_state(folder / "last.pt")
    assert set(state) == {"config", "data_fingerprint", "learner", "metrics"}
    assert set(state["learner"]) == {"model", "optimizers", "ema", "steps"}


def test_model_file_explains_itself(demo):
    folder, _ = demo
    _, info = load_model(folder / "model.safetensors")
    digits = load_dataset("digits")
    network = part_of(PRESETS["demo"], Architecture)
    assert info["architecture"] == json.loads(json.dumps(asdict(network)))
    assert info["preset"] == "demo"
    assert info["dataset"] == "digits"
    assert tuple(info["mean"]) == digits.mean
    assert tuple(info["std"]) == digits.std
    assert info["class_names"] == list("0123456789")
    assert info["data_fingerprint"] == digits.fingerprint
    assert info["epochs"] == 6
    assert info["seed"] == 0
    assert info["versions"]["torch"] == torch.__version__
    assert info["git_commit"] == utils.git_commit()
    assert 0 < info["accuracy"]["train"] <= 100
    assert info["accuracy"]["val"] is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
def test_compiled_network_learns_the_same_and_is_saved_under_plain_names(tiny):
    small = {"num_blocks": (1,), "c1": 2, "pool_kernel": 32}  # compiled in seconds
    config = replace(tiny, **small, epochs=1, bfloat16=False)
    _, plain = train(replace(config, name="plain"))
    torch._dynamo.utils.counters.clear()
    _, compiled = train(replace(config, name="compiled", compile=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-3)
    assert list(weights("compiled")) == list(weights("plain"))


def test_a_last_cosine_that_is_cut_off_is_told(tiny, capsys):
    for epochs, cycle in ((2, 1), (2, 2), (3, 2)):
        name = f"{epochs}-{cycle}"
        config = replace(tiny, name=name, schedule="cosine_restarts", restart_epochs=cycle)
        train(replace(config, epochs=epochs, max_steps_per_epoch=1))
    assert capsys.readouterr().err == (
        "warning: restart_epochs: the last cosine is cut off after 1 of its 2 epochs; use a number"
        " that divides 3\n"
    )


def test_no_progress_bar_where_the_output_is_no_terminal(tiny, capsys):
    train(replace(tiny, val_size=50))
    captured = capsys.readouterr()
    assert captured.err == ""
    epochs = [line for line in captured.out.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 3
    assert all(len(line) < 80 and " val " in line for line in epochs)
    assert "estimated time on this CPU" in captured.out


def test_estimate_reaches_a_file_within_the_epoch(monkeypatch):
    """With a second epoch whose images have four times the pixels."""
    clock = itertools.count()
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: 60.0 * next(clock))
    with Path("out.txt").open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        running = metrics.Metrics(images_per_epoch=100, pixels=[16**2, 32**2])
        with running.running(lr=0.1):
            for _ in range(metrics.TIMED_STEPS + 1):
                running.update(torch.tensor([2.0, 1.0]), 10)
            # 50 images are left, and what counts as 400: a minute for 10 of them.
            assert Path("out.txt").read_text() == "estimated time on this CPU: 45.0 min\n"


def test_edited_network_is_not_called_by_a_presets_name(tiny):
    train(replace(tiny, c1=5, epochs=1))
    assert load_model("checkpoints/tiny/model.safetensors")[1]["preset"] == "custom"


def test_command_line_overrides_a_preset(monkeypatch):
    seen = []
    monkeypatch.setattr(train_script, "train", seen.append)
    line = "model1 --epochs 30 --lr 0.1 --num-blocks 1 2 --conv-kernel 3 5 --flip none --name try"
    assert run_main(main, *line.split(), monkeypatch=monkeypatch) == 0
    assert run_main(main, monkeypatch=monkeypatch) == 0
    changes = {"epochs": 30, "lr": 0.1, "num_blocks": (1, 2), "conv_kernel": (3, 5)}
    assert seen == [
        replace(PRESETS["model1"], **changes, flip="none", name="try"),
        PRESETS["tpsnet"],
    ]


def test_help_explains_every_constant(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert run_main(main, "-h", monkeypatch=monkeypatch) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.replace("│", " ").split())
    assert all(f"{name} {claim}" in words for name, claim in CLAIMS.items())
    sources = [inspect.getsource(kind) for kind in (Architecture, Recipe, Run)]
    explained = re.findall(r'    (\w+): .*\n    """(.*)"""', "".join(sources))
    assert [name for name, _ in explained] == [field.name for field in fields(Config)]
    for name, explanation in explained:
        assert f"--{name.replace('_', '-')}" in words
        assert explanation in words


# ---------------------------------------------------------------- seeds and resuming


def weights(name):
    return load_model(f"checkpoints/{name}/model.safetensors")[0].state_dict()


def same(a, b):
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_a_seed_decides_everything_and_nothing_else_does(tiny):
    config = replace(tiny, dropout=0.2)
    train(replace(config, name="a"))
    torch.manual_seed(99)
    train(replace(config, name="b"))
    train(replace(config, name="c", seed=1))
    assert same(weights("a"), weights("b"))
    assert not same(weights("a"), weights("c"))


@pytest.mark.parametrize("changes", [{}, FAST], ids=["tpsnet", "fast"])
def test_deterministic_kernels_are_asked_for_and_exist(tiny, monkeypatch, changes):
    """On a GPU they make a difference; here it is seen that no operation lacks one."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    config = replace(tiny, **changes)
    _, expected = train(replace(config, name="other"))
    assert not torch.are_deterministic_algorithms_enabled()
    assert train(replace(config, deterministic=True))[1] == expected
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    distributed.init_processes()
    assert not torch.are_deterministic_algorithms_enabled()


# ---------------------------------------------------------------- the proxy


def make_proxy(tiny, keep):
    """A proxy for the digits, and an epoch of them in batches."""
    data, cpu = load_dataset("digits"), torch.device("cpu")
    config = replace(tiny, keep_fraction=keep)
    proxy = Proxy(replace(config, bfloat16=False), data, cpu, steps_per_epoch=9)
    augmentation = part_of(config, Augmentation)
    return proxy, list(itertools.islice(train_batches(data, augmentation, 40, 0, 1), 9))


def test_proxy_keeps_the_images_of_the_largest_loss(tiny):
    proxy, batches = make_proxy(tiny, 0.25)
    before = copy.deepcopy(proxy.learner.model)
    images, labels, batch_size = next(proxy.hardest(batches))
    assert len(images) == len(labels) == batch_size == 10
    losses = F.cross_entropy(before(batches[0][0]), batches[0][1], reduction="none")
    order = losses.argsort(descending=True)[:10]
    assert torch.equal(images, batches[0][0][order])
    assert torch.equal(labels, batches[0][1][order])


def test_proxy_learns_from_every_fourth_batch(tiny):
    proxy, batches = make_proxy(tiny, 0.5)
    weights = [proxy.learner.model.linear.weight.detach().clone()]
    for _ in proxy.hardest(batches):
        weights.append(proxy.learner.model.linear.weight.detach().clone())
    changed = [not torch.equal(one, other) for one, other in itertools.pairwise(weights)]
    assert changed == [True, False, False, False, True, False, False, False, True]


def test_proxies_of_two_processes_learn_from_the_mean_over_all_that_is_kept(tiny, monkeypatch):
    """Of 21 images one has 11 and keeps 6, the other has 10 and keeps 5."""
    proxy, batches = make_proxy(tiny, 0.5)
    images, labels, _ = batches[0]
    monkeypatch.setattr(distributed, "num_processes", lambda: 2)
    learned, kept = [], []
    monkeypatch.setattr(proxy.learner, "update", lambda loss: learned.append(loss.item()))
    for share, number in ((slice(0, 21, 2), 6), (slice(1, 21, 2), 5)):
        losses = F.cross_entropy(
            proxy.learner.model(images[share]), labels[share], reduction="none"
        )
        kept += losses.topk(number).values.tolist()
        (batch,) = proxy.hardest([(images[share], labels[share], 21)])
        assert (len(batch[0]), batch[2]) == (number, 11)
    assert sum(learned) / 2 == pytest.approx(sum(kept) / 11)


@pytest.fixture
def sizes(monkeypatch):
    """A list that gets the side of the images of every training step."""
    seen, forward = [], ResNet.forward

    def spy(model, x):
        if model.training and not x.is_meta:
            seen.append(x.shape[-1])
        return forward(model, x)

    monkeypatch.setattr(ResNet, "forward", spy)
    return seen


def test_small_fraction_of_the_epochs_sees_the_centre_alone(tiny, sizes):
    recipe = FAST | {"keep_fraction": 1.0, "small_fraction": 0.5}
    train(replace(tiny, **recipe, epochs=4, max_steps_per_epoch=2))
    assert sizes == [28] * 4 + [32] * 4


def test_a_fraction_of_the_epochs_loses_none_to_rounding(tiny):
    config = replace(tiny, epochs=100, small_fraction=0.29, small_size=20)  # .29 x 100 < 29
    assert [train_script.image_size(config, epoch) for epoch in (29, 30)] == [20, 32]


def test_recipe_of_best_scales_its_first_images_down(tiny, sizes):
    """Its window of 8 pixels takes all 6 of the smaller map."""
    small = {name: getattr(PRESETS["best"], name) for name in SMALL}
    train(replace(tiny, **small, epochs=4, max_steps_per_epoch=2))
    assert sizes == [24] * 4 + [32] * 4


def test_seeds_are_trained_in_turn_and_summed_up(tiny, monkeypatch, capsys):
    results = {3: 7000, 4: 7100, 5: 7300}
    trained = []

    def fake_train(config):
        trained.append(config)
        return [], Score(0.5, results[config.seed], 10_000)

    monkeypatch.setattr(train_script, "train", fake_train)
    config = replace(tiny, seed=3, seeds=3)
    assert train_seeds(config) == [Score(0.5, n, 10_000) for n in results.values()]
    assert trained == [replace(tiny, name=f"tiny-{seed}", seed=seed) for seed in (3, 4, 5)]
    # By hand: a standard deviation of 1.5275, and 4.3027 standard errors in two degrees of freedom.
    assert capsys.readouterr().out == (
        "3 seeds: test accuracy 71.33 ± 1.53% (standard deviation);"
        " 95% interval of the mean 67.54 to 75.13\n"
    )


def test_seeds_that_come_to_the_same_have_an_interval_too(tiny, monkeypatch, capsys):
    monkeypatch.setattr(train_script, "train", lambda _config: ([], Score(0.5, 358, 359)))
    train_seeds(replace(tiny, seeds=2))
    assert capsys.readouterr().out.endswith(
        "99.72 ± 0.00% (standard deviation); 95% interval of the mean 99.72 to 99.72\n"
    )


def test_seeds_go_on_where_they_were_cut_off(tiny, monkeypatch, capsys):
    config = replace(tiny, seeds=2, epochs=2)
    line = [*TINY_LINE, "--seeds", "2", "--epochs", "2"]
    train(replace(config, name="tiny-0", seeds=1))
    log = read_log("tiny-0")
    assert run_main(main, *line, monkeypatch=monkeypatch) == 2  # nothing is overwritten
    assert not Path("checkpoints/tiny-1").exists()
    assert run_main(main, *line, "--resume", monkeypatch=monkeypatch) == 0
    assert "2 seeds: test accuracy" in capsys.readouterr().out
    assert read_log("tiny-0") == log
    assert len(read_log("tiny-1")) == 2
    _, info = load_model("checkpoints/tiny-1/model.safetensors")
    assert info["seed"] == 1


def test_one_training_is_of_one_seed(tiny):
    with pytest.raises(InputError, match=r"seeds: 2 .* train_seeds"):
        train(replace(tiny, seeds=2))


def test_training_without_test_images_reports_its_epochs_and_tests_nothing(tiny, capsys):
    data = load_dataset("digits", val_size=100, test=False)
    reported = []
    config = replace(tiny, name="group/one")
    assert train(config, data, lambda log: reported.append(list(log))) == (reported[-1], None)
    assert [len(log) for log in reported] == [1, 2, 3]
    assert reported[-1] == utils.read_csv("checkpoints/group/one/log.csv")
    assert "test accuracy" not in capsys.readouterr().out
    _, info = load_model("checkpoints/group/one/model.safetensors")
    assert info["accuracy"]["test"] is None
    again = []
    train(replace(config, epochs=4, resume=True), data, lambda log: again.append(list(log)))
    assert [len(log) for log in again] == [3, 4]  # what was there, at once
    assert again[0] == reported[-1]


def test_constants_come_from_a_file_too(tiny, monkeypatch):
    trained = []
    monkeypatch.setattr(train_script, "train", trained.append)
    utils.write_json(Path("best.json"), record(replace(tiny, c1=5)))
    for line in ("--config best.json --epochs 300", "--config=best.json --epochs 300"):
        assert run_main(train_script.main, *line.split(), monkeypatch=monkeypatch) == 0
        assert trained.pop() == replace(tiny, c1=5, epochs=300)


def test_finished_run_resumed_only_tests_again(tiny, capsys):
    first = train(tiny)
    capsys.readouterr()
    assert train(replace(tiny, resume=True)) == first
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]


def test_run_from_before_a_constant_existed_goes_on(tiny):
    train(tiny)
    path = Path("checkpoints/tiny/last.pt")
    state = load_state(path)
    del state["config"]["cutout_size"]
    save_state(path, state)
    train(replace(tiny, resume=True))
    with pytest.raises(InputError, match=r"cutout_size: 4, but .* started with 0"):
        train(replace(tiny, resume=True, cutout_size=4))


def test_rehearsal_takes_exactly_so_many_steps(tiny, monkeypatch):
    steps = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda *args: (steps.append(1), step(*args)))
    train(replace(tiny, epochs=2, max_steps_per_epoch=5))
    assert len(steps) == 10


# ---------------------------------------------------------------- divergence


def test_diverged_run_stops_with_one_line_and_status_1(monkeypatch, capsys):
    line = "demo --lr 900 --momentum 0.99 --epochs 9 --wandb disabled --name wild"
    assert run_main(main, *line.split(), monkeypatch=monkeypatch) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: epoch ")
    assert "the loss is" in error
    assert "--lr" in error
