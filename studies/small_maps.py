"""How much time engine/layers.py saves a training on a CPU with AMX: by layer, and in whole steps.

    python -m studies.small_maps    # an idle CPU with AMX; ten minutes

Question: on which shapes are MatmulConv and FoldedBatchNorm faster than PyTorch's layers, and what
does a training step gain from both? The limits in engine/layers.py come from such layers.

Record: docs/fast.md has the tables, the answer and what the study cannot tell (commit 20350b2, two
cores of an Intel Xeon with AMX, bfloat16, PyTorch 2.14.1, Python 3.11.7; medians of nine rounds).
"""

if __name__ == "__main__":  # above the imports: a missing library or an old Python is one line
    from engine.script import run_script

    run_script("studies.small_maps")

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from config import PRESETS
from data import train_batches
from engine.distributed import init_processes
from engine.layers import HAS_AMX, FasterLayers, FoldedBatchNorm, MatmulConv
from learner import PROXY_INTERVAL, Learner, Proxy
from studies import contestants
from studies.benchmark import machine, matmul_peak
from utils import InputError

ROUNDS = 9
LAYERS = (  # images, channels in and out, side of the map
    (1000, 96, 192, 15),  # `fast`
    (1000, 192, 384, 7),
    (1000, 384, 384, 3),
    (2000, 48, 48, 7),  # its proxy
    (2000, 96, 96, 3),
    (128, 256, 256, 8),  # `best`
    (128, 128, 128, 8),  # `tpsnet`
)
NORMS = (  # images, channels, side of the map
    (1000, 24, 31),  # the stem of `fast`
    (2000, 24, 31),  # and of its proxy
    (2000, 24, 15),
    (128, 16, 32),  # the stem of `tpsnet`
)
TRAININGS = (("fast", 1), ("fast", 84), ("small", 84))  # preset, epoch


def layer_seconds(images: int, channels: int, filters: int, size: int) -> list[list[float]]:
    """Seconds of a 3x3 convolution and its gradients in each round: oneDNN's and MatmulConv's."""
    x = noise(images, channels, size, size).requires_grad_()
    weight = noise(filters, channels, 3, 3).requires_grad_()
    grad = noise(images, filters, size, size)

    def both_ways(convolution: Callable) -> None:
        torch.autograd.grad(convolution(x, weight), (x, weight), grad)

    return by_turns(
        lambda: both_ways(lambda x, weight: F.conv2d(x, weight, padding=1)),
        lambda: both_ways(MatmulConv.apply),
    )


def norm_seconds(images: int, channels: int, size: int) -> list[list[float]]:
    """Seconds of batch normalization and its gradients: PyTorch's and FoldedBatchNorm's."""
    x, grad = (noise(images, channels, size, size) for _ in range(2))
    weight, bias = torch.ones(channels), torch.zeros(channels)
    for leaf in (x, weight, bias):
        leaf.requires_grad_()

    def both_ways(normalize: Callable) -> None:
        torch.autograd.grad(normalize(x, weight, bias), (x, weight, bias), grad)

    return by_turns(
        lambda: both_ways(lambda x, *affine: F.batch_norm(x, None, None, *affine, True)),
        lambda: both_ways(lambda *inputs: FoldedBatchNorm.apply(*inputs, 1e-5)[0]),
    )


def noise(*shape: int) -> torch.Tensor:
    """Channels-last maps or filters, in bfloat16."""
    return torch.randn(shape).to(torch.bfloat16, memory_format=torch.channels_last)


def step_seconds(preset: str, epoch: int) -> list[list[float]]:
    """Seconds of a training step in each round: by PyTorch's layers, and as train.py does it."""
    config, data, device = PRESETS[preset], contestants.noise(50_000), init_processes()
    learner, proxy, num_steps = Learner(config, data, device), None, 1
    batches = itertools.chain.from_iterable(
        train_batches(data, config, epoch) for _ in itertools.count()
    )
    if config.keep_fraction < 1:
        proxy, num_steps = Proxy(config, data, device), PROXY_INTERVAL
        batches = proxy.hardest(batches)

    def train(layers: contextlib.AbstractContextManager) -> None:
        for one in (learner, proxy.learner) if proxy else (learner,):
            one.faster_layers = layers
        for batch in itertools.islice(batches, num_steps):
            learner.step(*batch)

    rounds = by_turns(lambda: train(contextlib.nullcontext()), lambda: train(FasterLayers()))
    return [[seconds / num_steps for seconds in times] for times in rounds]


def by_turns(*actions: Callable[[], None]) -> list[list[float]]:
    """Seconds of each action in each round, after one to warm up."""
    times = [[] for _ in actions]
    for _ in range(1 + ROUNDS):
        for action, spent in zip(actions, times, strict=True):
            start = time.perf_counter()
            action()
            spent.append(time.perf_counter() - start)
    return [spent[1:] for spent in times]


def print_row(label: str, times: list[list[float]]) -> None:
    """Print the median times, and the median, smallest and largest of the rounds' ratios."""
    before, after = (f"{1000 * statistics.median(spent):,.0f} ms" for spent in times)
    ratios = [old / new for old, new in zip(*times, strict=True)]
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"| {label} | {before} | {after} | {ratio} |", flush=True)


def study() -> None:
    """Measure and print the three tables."""
    if not HAS_AMX:
        raise InputError("machine: this CPU has no AMX; run it on one that has, as newer Xeons do")
    device = init_processes()
    peak = matmul_peak(torch.bfloat16, device) / 1e9
    print(f"{machine(device)}\nmatmul peak: {peak:,.0f} GFLOP/s in bfloat16\n")
    print("| 3x3 convolution and its gradients | oneDNN | MatmulConv | ratio |\n|---|---|---|---|")
    for images, channels, filters, size in LAYERS:
        label = f"{images:,} images of {size}x{size} pixels, {channels} to {filters} channels"
        print_row(label, layer_seconds(images, channels, filters, size))
    print("\n| batch normalization and its gradients | PyTorch | FoldedBatchNorm | ratio |")
    print("|---|---|---|---|")
    for images, channels, size in NORMS:
        label = f"{images:,} images of {size}x{size} pixels, {channels} channels"
        print_row(label, norm_seconds(images, channels, size))
    print("\n| training step | PyTorch's layers | with both | ratio |\n|---|---|---|---|")
    for preset, epoch in TRAININGS:
        print_row(f"`{preset}`, epoch {epoch}", step_seconds(preset, epoch))


def main(args: list[str]) -> None:
    """Parse the command line, which has no option but -h, and run the study."""
    import tyro

    tyro.cli(study, args=args, prog="python -m studies.small_maps", description=__doc__)
