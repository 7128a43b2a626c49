"""Speed and memory of our training loop beside the classical script's, in one run.

    python benchmark.py --json studies/benchmark.json  # tpsnet; studies/figures.py draws it
    python benchmark.py fast
    python benchmark.py --quick  # only the whole epoch, the step and the memory: two minutes

The classical script does what most such repositories do: torchvision transforms on PIL images in
DataLoader workers, float32 in the default memory format, `loss.item()` in every step. Both train
the same network on the same noise, in two processes that take turns; printed are the median of the
rounds and, in brackets, the smallest and the largest. No data set is needed. Images per second
count the images that are trained on: for a preset with a proxy, our time includes the proxy's.
"""

import script

import contextlib
import itertools
import multiprocessing
import os
import platform
import re
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import utils
from augment import Augmentation, train_batches
from config import PRESETS, Config
from data import FACTS, Dataset, Split
from distributed import compute_dtype, dtype_name, init_processes
from learner import PROXY_INTERVAL, Learner, Proxy
from metrics import LOG_INTERVAL, evaluate
from model import ModelCost, ResNet, model_cost
from utils import InputError

ROUNDS = 5  # of the measurements below
SHORT_ROUNDS = 3  # of the others
BATCH_SIZES = (32, 64, 128, 256, 512, 1024)
SECONDS = 3.0  # of one measurement: as many steps as fit, at least one
NUM_WORKERS = 2  # of the classical DataLoader, as in PyTorch's CIFAR-10 tutorial
WARM_BATCHES = 20  # more than its workers prefetch
EVAL_IMAGES = 500
MEASUREMENTS = {  # the first one tells how long the others will take
    "epoch": "whole epoch",
    "step": "training step",
    "data": "data pipeline",
    "evaluate": "evaluation",
}
QUICK = ("epoch", "step")  # those of --quick


def noise(num_images: int) -> Dataset:
    """A data set of noise in CIFAR-10's shape: speed does not depend on the pixels."""
    rng = utils.generator("benchmark")
    images = torch.randint(0, 256, (num_images, 3, 32, 32), dtype=torch.uint8, generator=rng)
    split = Split(images, torch.randint(0, 10, (num_images,), generator=rng))
    names, mean, std = FACTS["cifar10"]
    return Dataset("noise", tuple(names), mean, std, split, split[:0], split[:EVAL_IMAGES], "")


# ---------------------------------------------------------------- the two contestants


class Ours:
    """What train.py steps with: the learner, and the proxy if the preset has one."""

    def __init__(self, config: Config) -> None:
        self.device = init_processes()
        self.data = noise(50_000).to(self.device)
        self.augmentation = utils.part_of(config, Augmentation)
        self.keep_fraction = config.keep_fraction
        # So many steps per epoch that the learning rate hardly falls in a measurement.
        parts = (config, self.data, self.device, 10_000)
        self.learner = Learner(*parts)
        self.model = self.learner.model
        self.proxy = Proxy(*parts) if self.keep_fraction < 1 else None
        self.fixed = {}

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Augmented batches without end; `batch_size` images of each are trained on."""
        num_images = round(batch_size / self.keep_fraction)
        for epoch in itertools.count(1):
            for batch in train_batches(self.data, self.augmentation, num_images, 0, epoch):
                if batch[2] == num_images:
                    yield batch

    def same_batch(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """The same batch without end: the step without the data pipeline."""
        if batch_size not in self.fixed:
            self.fixed = {batch_size: next(self.batches(batch_size))}
        return itertools.repeat(self.fixed[batch_size])

    def steps(self, batches: Iterator, num_steps: int) -> None:
        """Train for `num_steps` steps."""
        batches = itertools.islice(batches, num_steps)
        if self.proxy:
            batches = self.proxy.hardest(batches, self.proxy.learner.steps)
        unread = []  # as the metrics of a run leave them on the device for some steps
        for images, labels, n in batches:
            unread.append(self.learner.step(images, labels, n))
            if len(unread) == LOG_INTERVAL:
                torch.stack(unread).tolist()
                unread.clear()

    def evaluate(self) -> None:
        """Classify the test images."""
        evaluate(self.model, self.data.test.images, self.data.normalize)


class Classical:
    """The classical script's loop, on the same network."""

    def __init__(self, config: Config) -> None:
        from torchvision import transforms

        on_mac = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if on_mac else "cpu"
        self.device = torch.device(name)
        self.pixels = noise(50_000).train.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.data = noise(max(BATCH_SIZES))
        self.model = ResNet(config).to(self.device)
        if config.stem == "whitening":
            self.model.set_whitening(self.data.normalize(self.data.train.images[:100]))
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, 0.01, 0.9, weight_decay=5e-4)
        self.criterion = nn.CrossEntropyLoss()
        normalize = [transforms.ToTensor(), transforms.Normalize(self.data.mean, self.data.std)]
        degrees = config.rotation_degrees
        self.train_transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=config.crop_padding),
                *([transforms.RandomRotation(degrees)] if degrees else []),
                transforms.RandomHorizontalFlip(),
                *normalize,
            ]
        )
        self.test_transform = transforms.Compose(normalize)
        self.fixed = {}

    def loader(self, num_images: int, transform: Callable, **options: object) -> Iterable:
        """A DataLoader of the first `num_images` images, with worker processes."""
        dataset = PILDataset(self.pixels[:num_images], [0] * num_images, transform)
        if sys.platform == "linux":
            options["multiprocessing_context"] = "fork"  # as in a script started by hand
        return torch.utils.data.DataLoader(
            dataset, num_workers=NUM_WORKERS, pin_memory=self.device.type == "cuda", **options
        )

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented batches without end."""
        options = {"batch_size": batch_size, "shuffle": True, "drop_last": True}
        loader = self.loader(len(self.pixels), self.train_transform, **options)
        while True:
            yield from loader

    def same_batch(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batch without end: the step without the data pipeline."""
        if batch_size not in self.fixed:
            images = self.data.normalize(self.data.train.images[:batch_size])
            self.fixed = {batch_size: (images, self.data.train.labels[:batch_size])}
        return itertools.repeat(self.fixed[batch_size])

    def steps(self, batches: Iterator, num_steps: int) -> None:
        """Train for `num_steps` steps."""
        self.model.train()
        running_loss = correct = 0
        for images, labels in itertools.islice(batches, num_steps):
            images, labels = images.to(self.device), labels.to(self.device)
            self.optimizer.zero_grad()
            logits = self.model(images)
            loss = self.criterion(logits, labels)
            loss.backward()
            self.optimizer.step()
            running_loss += loss.item()
            correct += (logits.argmax(1) == labels).sum().item()

    @torch.no_grad()
    def evaluate(self) -> None:
        """Classify the test images."""
        self.model.eval()
        correct = 0
        for images, labels in self.loader(EVAL_IMAGES, self.test_transform, batch_size=100):
            images, labels = images.to(self.device), labels.to(self.device)
            correct += (self.model(images).argmax(1) == labels).sum().item()


class PILDataset(torch.utils.data.Dataset):
    """An array whose items become PIL images on access, as in torchvision.datasets.CIFAR10."""

    def __init__(self, pixels: object, labels: list[int], transform: Callable) -> None:
        self.pixels, self.labels, self.transform = pixels, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


# ---------------------------------------------------------------- measuring, in a process each


def serve(kind: type, config: Config, connection: Connection) -> None:
    """Answer the parent's requests, each (function, arguments), as long as it lives."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    bare = memory_peak()
    try:
        contestant, streams = kind(config), {}
    except InputError as error:  # of what it cannot be built with: the answer to any request
        connection.recv()
        connection.send(error)
        return
    device = contestant.device

    def timed(action: Callable[[], None]) -> float:
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        return time.perf_counter() - start

    def step(batch_size: int, num_steps: int) -> float:
        return timed(lambda: contestant.steps(contestant.same_batch(batch_size), num_steps))

    def stream(batch_size: int) -> Iterator:
        if batch_size not in streams:
            streams[batch_size] = contestant.batches(batch_size)
            next(streams[batch_size])  # starts the workers, draws the first batch
        return streams[batch_size]

    def epoch(batch_size: int, num_steps: int) -> float:
        batches = stream(batch_size)
        return timed(lambda: contestant.steps(batches, num_steps))

    def data(batch_size: int, num_steps: int) -> float:
        batches = itertools.islice(stream(batch_size), num_steps)
        return timed(lambda: sum(1 for _ in batches))  # draws them, and keeps none

    def evaluate(_: int, times: int) -> float:
        return timed(lambda: [contestant.evaluate() for _ in range(times)])

    requests = {f.__name__: f for f in (step, epoch, data, evaluate)}
    requests |= {"memory": lambda: memory_peak() - bare, "threads": torch.set_num_threads}
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has gone
        while True:
            name, arguments = connection.recv()
            connection.send(requests[name](*arguments))


def end_with_parent() -> None:
    """End this process when its parent ends, even if that is killed amid a measurement."""
    multiprocessing.parent_process().join()
    os._exit(1)


def memory_peak() -> int:
    """Peak memory of this process in bytes: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":  # where getrusage includes the parent's peak
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Worker:
    """A contestant in a process of its own; calling it asks for one of `serve`'s functions."""

    def __init__(self, kind: type, config: Config) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit our memory peak
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(kind, config, theirs))
        self.process.start()
        theirs.close()

    def __call__(self, name: str, *arguments: int) -> float:
        """The result of a measurement."""
        try:
            self.connection.send((name, arguments))
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            raise InputError(
                "benchmark: a process died, perhaps out of memory; try a smaller --batch-size"
            ) from None
        if isinstance(answer, InputError):
            raise answer
        return answer

    def stop(self) -> None:
        """End the process, whatever it is doing; those of its DataLoader end without it."""
        self.process.kill()
        self.process.join()


@contextlib.contextmanager
def interrupt_delayed() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, and the processes that start there never get it."""
    resource_tracker.ensure_running()  # whose start would unblock the signal
    received = []
    before = signal.signal(signal.SIGINT, lambda *_: received.append(True))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which those inherit
    yield
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, before)
    if received:
        raise KeyboardInterrupt


# ---------------------------------------------------------------- the report


class Row(NamedTuple):
    """A row of the table: what is measured of both contestants, in rounds that take turns."""

    part: str  # of the JSON file
    key: str | int  # in this part
    label: str
    name: str  # of `serve`'s function
    batch_size: int
    rounds: int
    threads: int  # of PyTorch

    @property
    def images(self) -> int:
        """Images of one step, or of one evaluation."""
        return EVAL_IMAGES if self.name == "evaluate" else self.batch_size


def benchmark(
    preset: str = "tpsnet",
    /,
    batch_size: int = 0,
    compile: bool = False,
    json: str = "",
    quick: bool = False,
) -> dict[str, object]:
    """Compare train.py's loop with the classical script's, on the network of one preset.

    Args:
        preset: A preset of config.py.
        batch_size: Images trained on per step; 0 for as many as in the preset.
        compile: Run our network through torch.compile, whose own time the estimate leaves out.
        json: Also write the result to this file.
        quick: Measure only the whole epoch, the training step and the peak memory.

    Returns:
        The content of the JSON file; after `quick`, what was not measured is absent, empty or None.

    Raises:
        InputError: an argument is wrong.
    """
    if preset not in PRESETS:
        raise InputError(f"preset: {preset!r} is not one of {', '.join(PRESETS)}")
    if sys.platform == "win32":
        raise InputError("platform: Windows does not report peak memory; use Linux or macOS")
    config = replace(PRESETS[preset], compile=compile)
    utils.check_integer("batch_size", batch_size, 0, int(50_000 * config.keep_fraction))
    utils.check_output("json", json)
    batch_size = batch_size or round(config.keep_fraction * config.batch_size)
    device = init_processes()
    dtype = compute_dtype(device, config.bfloat16)
    cost = model_cost(config)
    print(
        f"{machine(device)}\n{preset}: {cost.num_params:,} parameters,"
        f" {cost.macs / 1e6:,.1f} M MACs per image; batch {batch_size}; ours in {dtype_name(dtype)}"
    )
    rows = table(batch_size, cost, device, quick)
    note = " (--quick: fewer rows, as many rounds)" if quick else ""
    print(f"{2 * sum(row.rounds for row in rows)} measurements{note}", flush=True)

    workers, peaks = [], None
    try:
        with interrupt_delayed():
            for kind in (Ours, Classical):
                workers.append(Worker(kind, config))
        for worker in workers:
            worker("memory")  # answers once it is ready, and leaves the cores to the others
        if not quick:
            peaks = [matmul_peak(dtype, device), matmul_peak(torch.float32, device)]  # FLOP/s
        # A proxy learns in one step of as many: a measurement must have one of these.
        fewest = [PROXY_INTERVAL if config.keep_fraction < 1 else 1, 1]
        parts, memory = measure(workers, rows, fewest)
    finally:
        for worker in workers:
            worker.stop()

    if peaks:
        print_shares(parts["images_per_second"], cost, peaks)
        print(
            f"matmul peak: {peaks[0] / 1e9:,.0f} GFLOP/s in {dtype_name(dtype)},"
            f" {peaks[1] / 1e9:,.0f} in float32"
        )
    result = {
        "machine": machine(device),
        "commit": utils.git_commit(),
        "preset": preset,
        "batch_size": batch_size,
        "num_params": cost.num_params,
        "macs": cost.macs,
        "contestants": ["ours", "classical script"],
        "memory_bytes": memory,  # peak, above the bare process
        "matmul_flops": peaks,  # per second, in each one's precision
        **parts,  # images/s of both in each round: by measurement, by batch size, by threads
    }
    if json:
        utils.write_json(Path(json), result)
    return result


def table(batch_size: int, cost: ModelCost, device: torch.device, quick: bool) -> list[Row]:
    """The rows of the table, without the batch sizes that might not fit into memory."""
    threads = torch.get_num_threads()
    rows = [
        Row("images_per_second", name, label, name, batch_size, ROUNDS, threads)
        for name, label in MEASUREMENTS.items()
        if name in QUICK or not quick
    ]
    if quick:
        return rows
    for size in BATCH_SIZES:
        label = f"step, batch {size}"
        if size * cost.activation_bytes > memory_limit(device):
            print(f"{label}: left out, it might not fit into memory")
        else:
            rows.append(Row("scaling", size, label, "step", size, SHORT_ROUNDS, threads))
    for number in sorted({1, threads}) if device.type == "cpu" else ():
        label = f"step on {number} thread{'s' * (number > 1)}"
        rows.append(Row("threads", number, label, "step", batch_size, SHORT_ROUNDS, number))
    return rows


def measure(workers: list[Worker], rows: list[Row], fewest: list[int]) -> tuple[dict, list[int]]:
    """Images per second by part and key of the rows, and peak memory in bytes, of each worker.

    Prints the rows, after how long they will take; a measurement has at least `fewest` steps.
    """
    parts = {"images_per_second": {}, "scaling": {}, "threads": {}}
    expected = {}  # seconds, by row
    bar_format = "{desc} {percentage:3.0f}%|{bar}| {remaining} left"
    with tqdm(bar_format=bar_format, leave=False, dynamic_ncols=True, disable=None) as bar:
        for row in rows:
            bar.set_description_str(row.label)
            seconds = warm_up(workers, row)
            if not expected:
                speeds = [row.images / s for s in seconds]
                expected = {row: expected_seconds(row, speeds, fewest) for row in rows}
                bar.reset(total=sum(expected.values()))
                tqdm.write(f"estimated time: {utils.duration(bar.total)}\n")
                print_row("", "ours", "classical script", "ratio")
            num_steps = [max(f, round(SECONDS / s)) for f, s in zip(fewest, seconds, strict=True)]
            rates = [[] for _ in workers]
            for _ in range(row.rounds):
                for worker, steps, rate in zip(workers, num_steps, rates, strict=True):
                    rate.append(steps * row.images / worker(row.name, row.batch_size, steps))
                    bar.n += expected[row] / row.rounds / len(workers)
                    bar.refresh()
            parts[row.part][row.key] = rates
            print_rates(f"{row.label}, images/s", rates)
            if row.key == "epoch":
                memory = [worker("memory") for worker in workers]
                texts = (f"{m / 1e6:,.0f}" for m in memory)
                print_row("peak memory, MB", *texts, memory[0] / memory[1])
    return parts, memory


def warm_up(workers: list[Worker], row: Row) -> list[float]:
    """Seconds of one step of each worker, once it is warm."""
    trial = WARM_BATCHES if row.name == "data" else 1
    seconds = []
    for worker in workers:
        worker("threads", row.threads)
        worker(row.name, row.batch_size, 1)
        seconds.append(worker(row.name, row.batch_size, trial) / trial)
    return seconds


def expected_seconds(row: Row, speeds: list[float], fewest: list[int]) -> float:
    """How long a row will take, if training makes `speeds` images per second."""
    # An evaluation has no backward pass; the data pipeline is hardly ever what takes the time.
    faster = {"evaluate": 3, "data": 100}.get(row.name, 1) * row.threads / torch.get_num_threads()
    total = 0
    for speed, least in zip(speeds, fewest, strict=True):
        step = row.images / speed / faster
        total += step * (2 + row.rounds * max(least, round(SECONDS / step)))
    return total


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest of several large matrix products."""
    best = 0
    for size in (2048, 4096) if device.type == "cpu" else (4096, 8192, 16384):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for _ in range(8):
            synchronize(device)
            start = time.perf_counter()
            a @ b.T  # as in a linear layer
            synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def memory_limit(device: torch.device) -> float:
    """Bytes of float32 activations to allow: a third, beside gradients and the other process."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 3
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 3


def print_shares(rates: dict[str, list[list[float]]], cost: ModelCost, peaks: list[float]) -> None:
    """Rows of percentages: of an epoch for the data pipeline, of the matmul peak for an epoch."""
    medians = {name: list(map(statistics.median, both)) for name, both in rates.items()}
    pipeline = [100 * e / d for e, d in zip(medians["epoch"], medians["data"], strict=True)]
    print_row("data share of an epoch, %", *(f"{share:.1f}" for share in pipeline))
    flops = [6 * cost.macs * rate for rate in medians["epoch"]]  # forward and backward
    shares = [100 * f / peak for f, peak in zip(flops, peaks, strict=True)]
    print_row("share of matmul peak, %", *(f"{share:.0f}" for share in shares))


def print_rates(label: str, rates: list[list[float]]) -> None:
    """A row of images per second: medians, smallest and largest, and the median of the ratios."""
    texts = [f"{statistics.median(r):,.0f} ({min(r):,.0f}-{max(r):,.0f})" for r in rates]
    ratios = [ours / classical for ours, classical in zip(*rates, strict=True)]
    print_row(label, *texts, statistics.median(ratios))


def print_row(label: str, ours: str, classical: str, ratio: float | str = "") -> None:
    """A row of the table."""
    ratio = f"{ratio:.2f}" if isinstance(ratio, float) else ratio
    tqdm.write(f"{label:27} {ours:>22} {classical:>22} {ratio:>5}")
    sys.stdout.flush()


def machine(device: torch.device) -> str:
    """The processor and its threads, and in a second line the versions."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    versions = ", ".join(f"{key} {value}" for key, value in utils.library_versions().items())
    return f"{name}, {torch.get_num_threads()} threads\n{versions}"


def main(args: list[str]) -> None:
    """Measure the preset that the command line names."""
    script.parse_command_line(benchmark, args, prog="benchmark.py")()


if __name__ == "__main__":
    script.run_script(main)
