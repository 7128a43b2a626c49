"""What a training step costs on a GPU: launched kernel by kernel, as a CUDA graph, and compiled.

    python -m studies.gpu                 # all but demo, within two and a half minutes
    python -m studies.gpu tpsnet best     # some of them
    python -m studies.gpu --check tpsnet  # does a graph learn what launched kernels learn?

A row is a preset and a size of its images. For a preset with a proxy, a step includes the proxy's
share; its FLOPs are not counted. The images are noise, so no data set is needed. `--check` trains
for twenty steps under deterministic algorithms, launched, recorded, and stopped and resumed, and
compares the weights bit by bit.
"""

if __name__ == "__main__":  # above the imports: a missing library or an old Python is one line
    from engine.script import run_script

    run_script("studies.gpu")

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from config import PRESETS, Config, image_size
from data import Batch, train_batches
from engine.distributed import init_processes
from engine.recorded import WARM_UPS
from learner import PROXY_INTERVAL, Learner, Proxy
from model import model_cost
from studies.benchmark import machine, matmul_peak
from studies.contestants import noise, synchronize
from utils import InputError, duration

SECONDS = 140  # for all rows; compiled ones come last, and are left out if they may take longer
ROUNDS, STEPS = 5, 20  # a time is the median of so many rounds of so many steps
CHECKED_STEPS, RESUMED_AT = 20, 7  # of --check; a proxy learns in five, the last two recorded


class Trainer:
    """A preset's learner, its proxy if it has one, and a batch of the images of one epoch."""

    def __init__(self, config: Config, epoch: int, device: torch.device) -> None:
        data = noise(max(5000, 2 * config.batch_size)).to(device)
        self.batch = next(train_batches(data, replace(config, auto_augment=False), epoch))
        self.learner = Learner(config, data, device)
        self.proxy = Proxy(config, data, device) if config.keep_fraction < 1 else None

    def record(self, enabled: bool) -> None:
        """Let the following steps be recorded, or launched kernel by kernel."""
        for part in (self.learner, self.proxy):
            if part:
                part.recorded.enabled = enabled

    def milliseconds(self, num_steps: int) -> float:
        """Train for some steps; returns the time of one."""
        device = self.batch[0].device
        synchronize(device)
        start = time.perf_counter()
        self.steps(itertools.repeat(self.batch, num_steps))
        synchronize(device)
        return 1000 * (time.perf_counter() - start) / num_steps

    def steps(self, batches: Iterable[Batch], first_step: int = 0) -> None:
        """Train for a step per batch."""
        if self.proxy:
            batches = self.proxy.hardest(batches, first_step)
        for images, targets, n in batches:
            self.learner.step(images, targets, n)

    def median(self) -> float:
        """Milliseconds of a step, after as many as it takes to record it."""
        self.milliseconds((WARM_UPS + 1) * (PROXY_INTERVAL if self.proxy else 1))
        return statistics.median(self.milliseconds(STEPS) for _ in range(ROUNDS))


def measure(config: Config, epoch: int, peak: float, device: torch.device) -> None:
    """Print a row for the images of an epoch.

    Args:
        peak: FLOP/s of the largest matrix product.
    """
    gc.collect()  # the trainer of the row before
    torch.cuda.reset_peak_memory_stats()
    trainer, size = Trainer(config, epoch, device), image_size(config, epoch)
    first = trainer.milliseconds(1) / 1000
    times = {}
    for kind, enabled in (("launched", False), ("recorded", True)):
        if kind == "launched" and config.compile:
            continue
        trainer.record(enabled)
        times[kind] = trainer.median()
    with torch.profiler.profile() as profile:
        trainer.milliseconds(PROXY_INTERVAL)
    on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [e for e in on_gpu if not e.is_user_annotation]  # as of an optimizer's launched step
    busy = sum(kernel.time_range.elapsed_us() for kernel in kernels) / 1000 / PROXY_INTERVAL
    macs = model_cost(config).macs * (size / 32) ** 2
    flops = 6 * macs * config.keep_fraction * config.batch_size / (times["recorded"] / 1000)
    shown = ", ".join(f"{kind} {value:.2f} ms" for kind, value in times.items())
    compiled = "compiled, " if config.compile else ""
    memory = torch.cuda.max_memory_allocated() / 1e9
    print(
        f"{config.name:8}{size:3} px {compiled}{shown}; GPU busy {busy:.2f} ms in"
        f" {len(kernels) / PROXY_INTERVAL:,.0f} kernels; {flops / 1e12:.1f} TFLOP/s,"
        f" {100 * flops / peak:.0f}% of the largest product; {memory:.2f} GB;"
        f" first step {first:.1f} s",
        flush=True,
    )


def check(config: Config, device: torch.device) -> None:
    """Print whether recorded and resumed steps end with the weights of launched ones."""
    config = replace(config, deterministic=True, auto_augment=False, warmup_epochs=0)
    data = noise(CHECKED_STEPS * config.batch_size).to(device)
    batches = list(itertools.islice(train_batches(data, config, 1), CHECKED_STEPS))
    # The learning rate falls after every other of these few steps.
    config = replace(config, epochs=CHECKED_STEPS // 2, max_steps_per_epoch=2)
    trained = {}
    for kind in ("launched", "recorded", "resumed"):
        trainer = Trainer(config, 1, device)
        trainer.record(kind != "launched")
        if kind == "resumed":
            trainer.steps(batches[:RESUMED_AT])
            states = [part and part.state_dict() for part in (trainer.learner, trainer.proxy)]
            trainer = Trainer(config, 1, device)
            for part, state in zip((trainer.learner, trainer.proxy), states, strict=True):
                if part:
                    part.load_state_dict(state)
            trainer.steps(batches[RESUMED_AT:], RESUMED_AT)
        else:
            trainer.steps(batches)
        trained[kind] = flat_weights(trainer.learner)
    for kind in ("recorded", "resumed"):
        difference = (trained[kind] - trained["launched"]).abs().max().item()
        same = torch.equal(trained[kind], trained["launched"])
        verdict = "the same bits as launched" if same else f"differs by up to {difference:.1e}"
        print(f"{config.name}, {kind}: {verdict}", flush=True)


def flat_weights(learner: Learner) -> Tensor:
    """All parameters of a network as one vector."""
    return torch.cat([p.detach().flatten() for p in learner.model.parameters()])


def main(args: list[str]) -> None:
    """Measure or check the presets that the command line names.

    Raises:
        InputError: there is no such preset, or no CUDA device.
    """
    # argparse, since machines with a GPU for a short time may lack tyro.
    parser = argparse.ArgumentParser("python -m studies.gpu", description=__doc__.split("\n\n")[0])
    names = [name for name in PRESETS if name != "demo"]
    parser.add_argument("presets", nargs="*", metavar="PRESET", help=", ".join(names))
    parser.add_argument("--check", action="store_true", help="compare the weights, bit by bit")
    options = parser.parse_args(args)
    if unknown := [name for name in options.presets if name not in names]:
        raise InputError(f"preset: {unknown[0]!r} is not one of {', '.join(names)}")
    device, start = init_processes(options.check), time.perf_counter()
    if device.type != "cuda":
        raise InputError("device: this study needs an NVIDIA GPU, and there is none here")
    configs = [PRESETS[name] for name in options.presets or names]
    if options.check:
        for config in configs:
            check(config, device)
        return
    peak = matmul_peak(torch.bfloat16, device)
    print(f"{machine(device)}\nlargest product in bfloat16: {peak / 1e12:.0f} TFLOP/s")
    for compiled in (False, True):
        slowest = 0.0  # seconds of a row
        for config in configs:
            config = replace(config, compile=compiled)
            for epoch in sorted({1, config.epochs} if config.small_fraction else {1}):
                began = time.perf_counter()
                if (spent := began - start) + slowest > SECONDS:
                    print(f"{config.name}: left out after {duration(spent)}")
                    continue
                measure(config, epoch, peak, device)
                slowest = max(slowest, time.perf_counter() - began)
