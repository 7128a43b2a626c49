"""The loops that studies/benchmark.py compares, and one round of measuring one of them.

    python -m studies.contestants '{"contestant": "ours", "preset": "demo", ...}'

benchmark.py runs this once per contestant and round. The process measures what the JSON of its
argument names and prints its result as one line of JSON.
"""

if __name__ == "__main__":  # above the imports: a missing library or an old Python is one line
    from engine.script import run_script

    run_script("studies.contestants")

import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import utils
from config import PRESETS, Config
from data import Batch, Dataset, Split, make_dataset, train_batches
from engine.distributed import cpu_is_chosen, init_processes
from engine.evaluate import classify
from engine.run import LOG_INTERVAL
from learner import PROXY_INTERVAL, Learner, Proxy
from model import ResNet
from utils import InputError

NUM_IMAGES = 50_000  # of noise, as many as CIFAR-10 has for training
EVAL_IMAGES = 500
NUM_WORKERS = 2  # of the classical DataLoader, as in PyTorch's CIFAR-10 tutorial
WARM_BATCHES = 20  # more than its workers prefetch


def noise(num_images: int) -> Dataset:
    """A data set of noise in CIFAR-10's shape: speed does not depend on the pixels."""
    rng = utils.generator("benchmark")
    images = torch.randint(0, 256, (num_images, 3, 32, 32), dtype=torch.uint8, generator=rng)
    split = Split(images, torch.randint(0, 10, (num_images,), generator=rng))
    return make_dataset("cifar10", split, split[:EVAL_IMAGES])


class Ours:
    """The loop of train.py: the learner, and the proxy if the preset has one."""

    def __init__(self, config: Config) -> None:
        self.device = init_processes()
        self.data = noise(NUM_IMAGES).to(self.device)
        # Images of full size, and so many epochs that the learning rate hardly falls.
        self.config = replace(config, small_fraction=0.0, epochs=10_000)
        self.learner = Learner(self.config, self.data, self.device)
        has_proxy = config.keep_fraction < 1
        self.proxy = Proxy(self.config, self.data, self.device) if has_proxy else None
        self.unit = PROXY_INTERVAL if has_proxy else 1  # the proxy learns in one step of these
        self.num_steps = 0

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Augmented batches without end; `batch_size` images of each are trained on."""
        num_images = round(batch_size / self.config.keep_fraction)
        config = replace(self.config, batch_size=num_images)
        for epoch in itertools.count(1):
            for batch in train_batches(self.data, config, epoch):
                if batch[2] == num_images:  # not the last one, which may be smaller
                    yield batch

    def fixed_batch(self, batch_size: int) -> Batch:
        """One batch, to measure the step without the data pipeline."""
        return next(self.batches(batch_size))

    def steps(self, batches: Iterable[Batch]) -> None:
        """Train for a step per batch."""
        if self.proxy:
            batches = self.proxy.hardest(batches, self.num_steps)
        unread = []
        for images, targets, n in batches:
            unread.append(self.learner.step(images, targets, n))
            self.num_steps += 1
            if len(unread) == LOG_INTERVAL:
                torch.stack(unread).tolist()
                unread.clear()

    def evaluate(self) -> None:
        """Classify the test images."""
        classify(self.learner.model, self.data.test.images, self.data.normalize)


class Classical:
    """The loop of most such repositories, on the same network.

    torchvision transforms on PIL images in DataLoader workers, the default memory format, and
    `loss.item()` in every step; in float32, or under torch.autocast in bfloat16.
    """

    unit = 1

    def __init__(self, config: Config, bfloat16: bool = False) -> None:
        from torchvision import transforms

        self.device = init_processes()
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16)
        data = noise(NUM_IMAGES)  # of which one copy stays, as in torchvision's data sets
        self.pixels = data.train.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels, self.normalize = data.train.labels, data.normalize
        self.model = ResNet(config).to(self.device)
        if config.stem == "whitening":
            self.model.set_whitening(self.fixed_batch(100)[0])
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, 0.01, 0.9, weight_decay=5e-4)
        self.criterion = nn.CrossEntropyLoss()
        normalize = [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
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
        loader = self.loader(NUM_IMAGES, self.train_transform, **options)
        while True:
            yield from loader

    def fixed_batch(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """One batch, to measure the step without the data pipeline."""
        images = torch.from_numpy(self.pixels[:batch_size]).permute(0, 3, 1, 2).contiguous()
        return self.normalize(images / 255), self.labels[:batch_size]

    def steps(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Train for a step per batch."""
        self.model.train()
        running_loss = correct = 0
        for images, labels in batches:
            images, labels = images.to(self.device), labels.to(self.device)
            self.optimizer.zero_grad()
            with self.autocast:
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
            with self.autocast:
                logits = self.model(images)
            correct += (logits.argmax(1) == labels).sum().item()


class PILDataset(torch.utils.data.Dataset):
    """An array whose items become PIL images on access, as in torchvision.datasets.CIFAR10."""

    def __init__(self, pixels: object, labels: list[int], transform: Callable) -> None:
        self.pixels, self.labels, self.transform = pixels, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


CONTESTANTS = {
    "ours": Ours,
    "classical script": Classical,
    "classical, autocast": lambda config: Classical(config, bfloat16=True),
}


# ---------------------------------------------------------------- one round of one contestant


def measure(
    contestant: Ours | Classical, rows: list[tuple[str, int, int]], seconds: float
) -> list[float]:
    """Images per second in each row (measurement, batch size, threads), for `seconds` each."""
    streams = {}

    def stream(batch_size: int) -> Iterator:
        if batch_size not in streams:
            streams[batch_size] = contestant.batches(batch_size)
        return streams[batch_size]

    def action(name: str, batch_size: int) -> Callable[[int], object]:
        if name == "step":
            batch = contestant.fixed_batch(batch_size)
            return lambda n: contestant.steps(itertools.repeat(batch, n))
        if name == "epoch":
            return lambda n: contestant.steps(itertools.islice(stream(batch_size), n))
        if name == "data":  # draws the batches and keeps none
            return lambda n: sum(1 for _ in itertools.islice(stream(batch_size), n))
        return lambda n: [contestant.evaluate() for _ in range(n)]

    def timed(act: Callable[[int], object], times: int) -> float:
        synchronize(contestant.device)
        start = time.perf_counter()
        act(times)
        synchronize(contestant.device)
        return time.perf_counter() - start

    rates = []
    for name, batch_size, threads in rows:
        torch.set_num_threads(threads)
        act = action(name, batch_size)
        trial = WARM_BATCHES if name == "data" else contestant.unit
        act(trial)  # to warm up
        spent = timed(act, trial)
        if (times := trial * round(seconds / spent)) > trial:
            trial, spent = times, timed(act, times)
        rates.append(trial * (EVAL_IMAGES if name == "evaluate" else batch_size) / spent)
    return rates


def memory_peak() -> int:
    """Peak memory of this process in bytes: on the GPU if it is used, else resident."""
    if torch.cuda.is_available() and not cpu_is_chosen():
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


def main(args: list[str]) -> None:
    """Measure one contestant and print {"rates": images/s of each row, "memory": bytes}."""
    if len(args) != 1 or not args[0].startswith("{"):
        raise InputError("request: missing; run `python -m studies.benchmark`, which gives it")
    request = json.loads(args[0])
    bare = memory_peak()
    config = replace(PRESETS[request["preset"]], compile=request["compile"])
    contestant = CONTESTANTS[request["contestant"]](config)
    first, *others = request["rows"]
    rates = measure(contestant, [first], request["seconds"])
    memory = memory_peak() - bare  # of the first row, the whole epoch
    rates += measure(contestant, others, request["seconds"])
    print(json.dumps({"rates": rates, "memory": memory}))
