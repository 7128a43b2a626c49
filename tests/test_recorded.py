"""A step that is recorded once and replayed does what the step itself does.

No GPU is needed: `Tape` notes every operation with its tensors and numbers and repeats them, as a
CUDA graph does; Python is not run again.
"""

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import learner
from engine import recorded
from engine.checkpoint import load_state
from studies import gpu
from train import train
from utils import InputError


class Tape(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self):
        super().__init__()
        self.operations, self.before, self.own, self.replays = [], {}, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero"), f"{name} waits"
        if name.startswith(("prim::", "profiler::")):
            return function(*args, **kwargs)
        inputs = {t.untyped_storage().data_ptr(): t for t in tensors((args, kwargs))}
        for place, tensor in inputs.items():  # what was there before, to be put back
            if place not in self.own and place not in self.before:
                self.before[place] = (tensor.untyped_storage(), tensor.untyped_storage().clone())
        results = function(*args, **kwargs)
        made = [t for t in tensors(results) if t.untyped_storage().data_ptr() not in inputs]
        self.own |= {t.untyped_storage().data_ptr() for t in made}
        self.operations.append((function, args, kwargs, results))
        return results

    def __enter__(self):
        self.random = torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.set_rng_state(self.random)
        for storage, content in self.before.values():
            storage.copy_(content)  # a recording runs nothing
        self.before.clear()

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, results in self.operations:
            inputs = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            again = function(*args, **kwargs)
            for kept, new in zip(tensors(results), tensors(again), strict=True):
                if kept.untyped_storage().data_ptr() not in inputs:
                    kept.untyped_storage().copy_(new.untyped_storage())


def tensors(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@pytest.fixture
def recording(monkeypatch):
    """Record on the CPU, with learning rates in tensors as on a GPU; returns the tapes."""
    tapes, make = [], learner.make_optimizers

    def with_tensors(*args):
        optimizers = make(*args)
        for group in (group for o in optimizers for group in o.param_groups):
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
        return optimizers

    monkeypatch.setattr(learner, "make_optimizers", with_tensors)
    monkeypatch.setattr(recorded, "can_record", lambda device: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: tapes.append(Tape()) or tapes[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda tape, pool: tape)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    return tapes


RECIPES = {
    "sgd": {"nesterov": True, "label_smoothing": 0.1, "warmup_epochs": 1, "dropout": 0.2},
    "average": {"ema_decay": 0.9, "schedule": "linear", "mixing": 0.5, "decay_norms": False},
    "muon": {
        "optimizer": "muon",
        "adam_lr": 0.01,
        "schedule": "linear",
        "keep_fraction": 0.5,
        "width": 2,
        "small_fraction": 0.5,
        "small_size": 16,
        "small_images": "scale",
        "cutout_size": 4,
    },
}


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name != "muon")) for name in RECIPES]
)
def recipe(tiny, request):
    network = {"num_blocks": (1,), "pool_kernel": 32, "c1": 4}
    size = {"batch_size": 50, "epochs": 4, "max_steps_per_epoch": 0, "train_size": 220, "lr": 0.05}
    return replace(tiny, **network, **size, **RECIPES[request.param])


class KilledError(Exception):
    """Ends a training after some epochs."""


def rows(log):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in log]


def weights(name):
    return load_state(Path("checkpoints", name, "last.pt"))[0]["learner"]["model"]


def test_recorded_steps_learn_the_same_and_resume_both_ways(recipe, recording, monkeypatch):
    def stop(log):
        if len(log) == 3:
            raise KilledError

    def begin(name):
        with pytest.raises(KilledError):
            train(replace(recipe, name=name, save_minutes=0.0), report=stop)

    results = {"recorded": train(replace(recipe, name="recorded"))}
    assert sum(tape.replays for tape in recording) > 10
    begin("resumed")
    results["resumed"] = train(replace(recipe, name="resumed", resume=True))
    begin("launched-later")
    monkeypatch.setattr(recorded, "can_record", lambda device: False)
    results["launched-later"] = train(replace(recipe, name="launched-later", resume=True))
    log, score = train(replace(recipe, name="launched"))
    for name, (other_log, other_score) in results.items():
        assert rows(other_log) == rows(log), name
        assert other_score == score, name
        for key, weight in weights("launched").items():
            assert torch.equal(weight, weights(name)[key]), (name, key)


class FailingTape(Tape):
    """Fails in the middle of a backward pass, and again at its end, as a CUDA graph does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return super().__torch_dispatch__(function, types, args, kwargs)

    def __exit__(self, *error):
        super().__exit__(*error)
        if error[0]:
            raise RuntimeError("CUDA error: operation failed due to a previous error")


@pytest.mark.parametrize("recipe", ["muon"], indirect=True)
def test_training_goes_on_launched_if_it_cannot_be_recorded(recipe, recording, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FailingTape)
    _, score = train(replace(recipe, name="failing"))
    problem = "cuda graph: operation not permitted when stream is capturing; going on"
    assert problem in capsys.readouterr().err
    monkeypatch.setattr(recorded, "can_record", lambda device: False)
    assert train(replace(recipe, name="launched"))[1] == score


def test_a_failed_recording_is_deleted_before_the_function_is_called_again(recording, monkeypatch):
    """PyTorch then takes its random generator out of the recording."""
    alive = []

    def function(x):
        alive.append([tape() is not None for tape in tapes])
        return (torch.nn.functional.conv2d(x, x.detach()).sum().backward(),)

    def make():
        tape = FailingTape()
        tapes.append(weakref.ref(tape))
        return tape

    tapes, call = [], recorded.Recorded(function)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    for _ in range(5):
        call(torch.ones(1, 1, 2, 2, requires_grad=True))
    assert alive == [[], [], [], [True], [False], [False]]


def test_graphs_share_memory_with_those_of_the_same_function_alone(recording, monkeypatch):
    handles, used = iter(range(1, 9)), []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "graph", lambda tape, pool: used.append(pool) or tape)
    for _ in range(2):
        double = recorded.Recorded(lambda x: (2 * x,))
        for n in (1, 1, 1, 1, 2, 2, 2, 2):
            assert double(torch.ones(n))[0].tolist() == [2] * n
    assert used == [1, 1, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["muon"], indirect=True)
def test_the_check_for_gpus_compares_recorded_and_resumed_steps(recipe, recording, capsys):
    gpu.check(recipe, torch.device("cpu"))
    assert capsys.readouterr().out.splitlines() == [
        f"tiny, {kind}: the same bits as launched" for kind in ("recorded", "resumed")
    ]
    assert all(tape.replays for tape in recording)  # a proxy's, too, whether it learns or not


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["muon"], indirect=True)
def test_the_check_for_gpus_notices_a_constant_learning_rate(
    recipe, recording, monkeypatch, capsys
):
    set_lr = learner.set_lr

    def in_a_new_tensor(optimizer, lr):
        for group in optimizer.param_groups:
            group["lr"] = group["lr"].clone()
        set_lr(optimizer, lr)

    monkeypatch.setattr(learner, "set_lr", in_a_new_tensor)
    gpu.check(recipe, torch.device("cpu"))
    assert "recorded: differs" in capsys.readouterr().out


def test_the_study_of_gpus_needs_one_and_names_its_presets(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device: this study needs an NVIDIA GPU"):
        gpu.main(["--check", "tpsnet"])
    with pytest.raises(InputError, match="preset: 'huge' is not one of tpsnet, "):
        gpu.main(["huge"])


def test_steps_are_recorded_on_a_gpu_where_one_process_trains_alone(monkeypatch):
    gpu = torch.device("cuda")
    assert recorded.can_record(gpu)
    assert not recorded.can_record(torch.device("cpu"))
    monkeypatch.setattr(recorded, "num_processes", lambda: 2)
    assert not recorded.can_record(gpu)


@pytest.mark.parametrize("recipe", ["muon"], indirect=True)
def test_nothing_is_recorded_on_a_cpu(recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", None)
    train(recipe)
