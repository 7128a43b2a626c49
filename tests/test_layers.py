"""The faster convolution and batch normalization compute what PyTorch's do."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from config import PRESETS
from data import load_dataset, train_batches
from engine import distributed, layers
from engine.layers import FasterLayers, MatmulConv, folded_batch_norm
from learner import Learner
from model import ResNet
from utils import generator


@pytest.fixture
def amx(monkeypatch):
    """As on a CPU with AMX, without which convolutions are PyTorch's own."""
    monkeypatch.setattr(layers, "HAS_AMX", True)


def noise(*shape, dtype=torch.bfloat16):
    """(N, C, S, S), with the channels last in memory."""
    x = 3 * torch.randn(shape, generator=generator(shape)) + 1
    return x.to(dtype, memory_format=torch.channels_last)


def functions(output):
    """Names of the functions that autograd will go through."""
    found, queue = set(), [output.grad_fn]
    while queue:
        node = queue.pop()
        if node and node not in found:
            found.add(node)
            queue += [parent for parent, _ in node.next_functions]
    return {node.name().removesuffix("Backward") for node in found}


def trained(layer, x, grad, mode):
    """Output of a layer and the gradients of its input and parameters, in float32."""
    x = x.clone().requires_grad_()
    with mode, torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    gradients = torch.autograd.grad(output, (x, *layer.parameters()), grad)
    return [tensor.detach().float() for tensor in (output, *gradients)], functions(output)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("channels", "size"), [(96, 7), (256, 3)])  # the second's forward, too
def test_convolution_is_pytorchs_within_rounding(amx, kernel, channels, size):
    conv = nn.Conv2d(channels, 32, kernel, padding=kernel // 2, bias=False)
    x, grad = noise(4, channels, size, size), noise(4, 32, size, size)
    ours, used = trained(conv, x, grad, FasterLayers())
    theirs, _ = trained(conv.double(), x.double(), grad.double(), torch.enable_grad())
    assert "MatmulConv" in used
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < 0.01 * other.norm()  # bfloat16 has 8 bits


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize(("channels", "size"), [(96, 8), (256, 3)])
def test_convolution_by_matrix_products_is_exact(kernel, channels, size):
    x = noise(2, channels, size, size, dtype=torch.float64).requires_grad_()
    weight = noise(4, channels, kernel, kernel, dtype=torch.float64).requires_grad_()
    grad = noise(2, 4, size, size, dtype=torch.float64)
    expected, output = F.conv2d(x, weight, padding=kernel // 2), MatmulConv.apply(x, weight)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(
        torch.autograd.grad(output, (x, weight), grad),
        torch.autograd.grad(expected, (x, weight), grad),
    )


@pytest.mark.parametrize("momentum", [0.1, 0.6, None])
def test_batch_norm_is_pytorchs_within_rounding(momentum):
    ours = nn.BatchNorm2d(24, momentum=momentum)
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    theirs = copy.deepcopy(ours)
    for size in (6, 4):  # of momentum None, the second step weighs as much as the first
        x, grad = noise(4, 24, size, size), noise(2, 24, size, size).repeat(2, 1, 1, 1)
        results, used = trained(ours, x, grad, FasterLayers())
        expected, _ = trained(theirs, x, grad, torch.enable_grad())
        assert "FoldedBatchNorm" in used
        for one, other in zip(results, expected, strict=True):
            assert (one - other).norm() < 0.01 * other.norm()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-4, atol=1e-5)


def test_folded_batch_norm_is_exact():
    """Before an in-place ReLU, as in the network."""
    x, grad = (noise(2, 24, 6, 6, dtype=torch.float64) for _ in range(2))
    x, grad = x.requires_grad_(), grad.flip(0)
    weight, bias = torch.randn(2, 24, dtype=torch.float64).unbind()
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    running = [torch.ones(2, 24, dtype=torch.float64) for _ in range(2)]
    results = []
    for function, statistics in zip((folded_batch_norm, F.batch_norm), running, strict=True):
        output = F.relu(function(x, *statistics, weight, bias, True, 0.3, 1e-5), inplace=True)
        results.append((output, *torch.autograd.grad(output, (x, weight, bias), grad)))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*running)


CONV = nn.Conv2d(96, 8, 3, padding=1, bias=False)
NORM = nn.BatchNorm2d(24)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (CONV, noise(2, 96, 7, 7)[..., :6]),  # not square
        (CONV, noise(2, 96, 8, 8)),
        (nn.Conv2d(95, 8, 3, padding=1, bias=False), noise(2, 95, 7, 7)),
        (nn.Conv2d(96, 8, 3, padding=1), noise(2, 96, 7, 7)),  # with a bias
        (nn.Conv2d(96, 8, 3, padding=0, bias=False), noise(2, 96, 7, 7)),
        (nn.Conv2d(96, 8, 3, padding="same", bias=False), noise(2, 96, 7, 7)),
        (nn.Conv2d(96, 8, 3, 2, padding=1, bias=False), noise(2, 96, 7, 7)),
        (nn.Conv2d(96, 8, 3, padding=2, dilation=2, bias=False), noise(2, 96, 7, 7)),
        (nn.Conv2d(96, 96, 3, padding=1, groups=96, bias=False), noise(2, 96, 7, 7)),
        (nn.Conv2d(96, 8, 5, padding=2, bias=False), noise(2, 96, 7, 7)),
        (nn.Conv2d(96, 8, (3, 1), padding=(1, 0), bias=False), noise(2, 96, 7, 7)),
        (nn.Conv2d(96, 8, (3, 1), bias=False), noise(2, 96, 7, 7)),
        (NORM, noise(2, 24, 2, 2).float()),
        (NORM, noise(2, 24, 2, 2).contiguous()),
        (NORM, noise(1, 24, 1, 2)),  # two pixels cannot be folded to fours
        (nn.BatchNorm2d(24).eval(), noise(2, 24, 2, 2)),
        (nn.BatchNorm2d(24, affine=False), noise(2, 24, 2, 2)),
        (nn.BatchNorm2d(16), noise(2, 16, 2, 2)),
    ],
    ids=lambda value: str(value if isinstance(value, nn.Module) else tuple(value.shape)),
)
def test_all_else_is_pytorchs_own(amx, layer, x):
    x = x.requires_grad_()
    with FasterLayers(), torch.autocast("cpu", torch.bfloat16):
        output = copy.deepcopy(layer)(x)
    assert not functions(output) & {"MatmulConv", "FoldedBatchNorm"}


def test_arguments_that_are_left_out_are_pytorchs_defaults(amx):
    x, weight = noise(2, 96, 3, 3), noise(8, 96, 1, 1)
    with FasterLayers():
        assert torch.equal(F.conv2d(x, weight), F.conv2d(x, weight, padding=0))


def test_convolution_is_pytorchs_own_without_amx(monkeypatch):
    monkeypatch.setattr(layers, "HAS_AMX", False)
    with FasterLayers():
        assert "MatmulConv" not in functions(CONV.bfloat16()(noise(2, 96, 7, 7)))


@pytest.mark.parametrize(
    ("layer", "name"),
    [(nn.Conv2d(96, 24, 1, bias=False), "MatmulConv"), (nn.BatchNorm2d(24), "FoldedBatchNorm")],
)
def test_hooks_fire_and_second_derivatives_are_refused(amx, layer, name):
    seen = []
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    x = noise(2, layer.weight.shape[1] if layer.weight.ndim == 4 else 24, 4, 4).requires_grad_()
    with FasterLayers(), torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert name in functions(output)
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    assert seen == ["forward", "backward"]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_network_of_a_learner_keeps_none_of_it(amx, monkeypatch):
    """Trained with the faster layers, and then used outside, copied and loaded elsewhere."""
    fast = PRESETS["fast"]
    config = replace(fast, width=1, dataset="digits", batch_size=4, epochs=2)
    digits = load_dataset(config)
    monkeypatch.setattr(distributed, "has_bfloat16", lambda device: True)
    learner = Learner(config, digits, torch.device("cpu"))
    batch = next(train_batches(digits, config, 1))
    used = functions(learner.forward(batch[0]))
    assert used >= {"MatmulConv", "FoldedBatchNorm"}
    learner.step(*batch)

    elsewhere = ResNet(config)
    elsewhere.load_state_dict(learner.model.state_dict())
    copies = copy.deepcopy(learner.model), pickle.loads(pickle.dumps(learner.model)), elsewhere
    for network in (learner.model, *copies):
        with torch.autocast("cpu", torch.bfloat16):
            used = functions(network.train()(batch[0]))
        assert not used & {"MatmulConv", "FoldedBatchNorm"}
        assert not any("forward" in vars(layer) for layer in network.modules())


def test_block_ends_with_an_error_too(amx):
    with pytest.raises(ZeroDivisionError), FasterLayers():
        raise ZeroDivisionError
    with FasterLayers(), FasterLayers():  # as of a network and its proxy
        pass
    assert "MatmulConv" not in functions(CONV.bfloat16()(noise(2, 96, 7, 7)))
