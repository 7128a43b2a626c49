"""Speed and memory of our training loop beside the classical script's, in one run.

    python -m studies.benchmark --json studies/benchmark.json  # tpsnet; studies/figures.py draws it
    python -m studies.benchmark fast
    python -m studies.benchmark --quick  # only the whole epoch, the step and the memory

The contestants train the same network on the same noise (no data set is needed). The classical
script does what most such repositories do; it runs in float32 and, where ours computes in bfloat16,
also under torch.autocast. Each contestant has a process of its own in each round, and they take
turns. A row of the table has the median of the rounds, the smallest and the largest in brackets,
and how many times as fast ours is (the median of the rounds' ratios); for the memory it is our
share of theirs. Images per second count the images that are trained on: for a preset with a proxy,
our time includes the proxy's.

What it cannot tell: how it is on another machine, or with an input pipeline that is better than the
classical script's. docs/fast.md has the results, each with its commit, machine and versions.
"""

if __name__ == "__main__":  # above the imports: a missing library or an old Python is one line
    from engine.script import run_script

    run_script("studies.benchmark")

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import utils
from config import PRESETS
from engine.distributed import compute_dtype, dtype_name, init_processes
from model import ModelCost, model_cost
from studies.contestants import CONTESTANTS, NUM_IMAGES, synchronize
from utils import InputError

SHORT_ROUNDS = 3  # at most, of the batch sizes and threads
BATCH_SIZES = (32, 64, 128, 256, 512, 1024)
MEASUREMENTS = {
    "epoch": "whole epoch",
    "step": "training step",
    "data": "data pipeline",
    "evaluate": "evaluation",
}
QUICK = ("epoch", "step")  # those of --quick
# A row: (part of the JSON file, key in it, label, (measurement, batch size, threads)).
Row = tuple[str, str | int, str, tuple[str, int, int]]


def benchmark(
    preset: str = "tpsnet",
    /,
    batch_size: int = 0,
    compile: bool = False,
    json: str = "",
    quick: bool = False,
    rounds: int = 0,
    seconds: float = 3.0,
) -> None:
    """Compare train.py's loop with the classical script's, on the network of one preset.

    Args:
        preset: A preset of config.py.
        batch_size: Images trained on per step; 0 for as many as in the preset.
        compile: Run our network through torch.compile.
        json: Also write the result to this file.
        quick: Measure only the whole epoch, the training step and the peak memory.
        rounds: Number of rounds; 0 for 5, or 3 with --quick.
        seconds: Length of one measurement, which has at least one step.
    """
    if preset not in PRESETS:
        raise InputError(f"preset: {preset!r} is not one of {', '.join(PRESETS)}")
    config = PRESETS[preset]
    utils.check_integer("batch_size", batch_size, 0, int(NUM_IMAGES * config.keep_fraction))
    utils.check_integer("rounds", rounds, 0)
    utils.check_number("seconds", seconds, 0, 3600)
    utils.check_output("json", json)
    if sys.platform == "win32":
        raise InputError("platform: Windows does not report peak memory; use Linux or macOS")

    rounds = rounds or (3 if quick else 5)
    batch_size = batch_size or round(config.keep_fraction * config.batch_size)
    device = init_processes()
    dtype = compute_dtype(device, config.bfloat16)
    cost = model_cost(config)
    print(
        f"{machine(device)}\n{preset}: {cost.num_params:,} parameters,"
        f" {cost.macs / 1e6:,.1f} M MACs per image; batch {batch_size}; ours in {dtype_name(dtype)}"
    )
    precisions = dict(zip(CONTESTANTS, (dtype, torch.float32, torch.bfloat16), strict=True))
    if dtype != torch.bfloat16:
        name, _ = precisions.popitem()
        print(f"{name}: left out, as ours does not compute in bfloat16 here")
    names = list(precisions)
    rows = table(batch_size, cost, device, quick)
    request = {"preset": preset, "compile": compile, "seconds": seconds}
    answers = measure(names, request, rows, rounds)
    parts = {"images_per_second": {}, "scaling": {}, "threads": {}}
    for i, (part, key, _, _) in enumerate(rows):
        # The later rounds lack the rows at the end.
        parts[part][key] = [
            [answer["rates"][i] for answer in answers[name] if i < len(answer["rates"])]
            for name in names
        ]
    peaks = {}  # FLOP/s by precision
    if not quick:
        peaks = {kind: matmul_peak(kind, device) for kind in dict.fromkeys(precisions.values())}
    result = {
        "machine": machine(device),
        "commit": utils.git_commit(),
        "preset": preset,
        "batch_size": batch_size,
        "num_params": cost.num_params,
        "macs": cost.macs,
        "contestants": names,
        # Peak, above the bare process.
        "memory_bytes": [
            round(statistics.median(answer["memory"] for answer in answers[name])) for name in names
        ],
        # Per second, in each one's precision; None after --quick.
        "matmul_flops": [peaks[precisions[name]] for name in names] if peaks else None,
        **parts,  # images/s of each contestant in each round: by measurement, batch size, threads
    }
    print_table(result, {(part, key): label for part, key, label, _ in rows})
    for kind, peak in peaks.items():
        print(f"matmul peak in {dtype_name(kind)}: {peak / 1e9:,.0f} GFLOP/s")
    if json:
        utils.write_json(Path(json), result)


def table(batch_size: int, cost: ModelCost, device: torch.device, quick: bool) -> list[Row]:
    """The rows of the table, without the batch sizes that might not fit into memory."""
    threads = torch.get_num_threads()
    rows = [
        ("images_per_second", name, label, (name, batch_size, threads))
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
            rows.append(("scaling", size, label, ("step", size, threads)))
    for number in sorted({1, threads}) if device.type == "cpu" else ():
        label = f"step, {number} thread{'s' * (number > 1)}"
        rows.append(("threads", number, label, ("step", batch_size, number)))
    return rows


def measure(
    names: list[str], request: dict[str, object], rows: list[Row], rounds: int
) -> dict[str, list[dict]]:
    """Ask every contestant in every round; print an estimate of the time after the first round."""
    answers = {name: [] for name in names}
    start = time.perf_counter()
    with tqdm(total=rounds * len(names), leave=False, dynamic_ncols=True, disable=None) as bar:
        for number in range(rounds):
            measured = [
                what
                for part, _, _, what in rows
                if part == "images_per_second" or number < SHORT_ROUNDS
            ]
            for name in names:
                bar.set_description_str(name)
                answers[name].append(ask(name, request | {"rows": measured}))
                bar.update()
            if number == 0 < rounds - 1:
                estimate = utils.duration((time.perf_counter() - start) * rounds)
                tqdm.write(f"{rounds} rounds, about {estimate} in all")
    return answers


def ask(name: str, request: dict[str, object]) -> dict[str, object]:
    """Measure one round of one contestant in a process of its own; returns what it printed.

    Raises:
        InputError: the process failed; it is named with its status and the last line of stderr.
    """
    command = [sys.executable, "-m", "studies.contestants"]
    command.append(json.dumps(request | {"contestant": name}))
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it may have run out of memory"])[-1]
        raise InputError(f"{name}: its process ended with status {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


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
    """Bytes of float32 activations to allow: a third, as gradients and the rest need some, too."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 3
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 3


def print_table(result: dict[str, object], labels: dict[tuple, str]) -> None:
    """Print a row for each measurement and contestant."""
    names, speeds = result["contestants"], result["images_per_second"]

    def print_rows(label: str, texts: list[str], ratios: list[float] | None = None) -> None:
        for i, (name, text) in enumerate(zip(names, texts, strict=True)):
            ratio = f"{ratios[i]:.2f}" if ratios and i else ""
            print(f"{'' if i else label:25} {name:20} {text:>24} {ratio:>6}")

    def print_rates(label: str, rates: list[list[float]]) -> None:
        texts = [f"{statistics.median(r):,.0f} ({min(r):,.0f}-{max(r):,.0f})" for r in rates]
        ratios = [
            statistics.median(ours / theirs for ours, theirs in zip(rates[0], other, strict=True))
            for other in rates
        ]
        print_rows(label, texts, ratios)

    print(f"\n{'images/s':25} {'':20} {'':24} {'ratio':>6}")
    for part in ("images_per_second", "scaling", "threads"):
        for key, rates in result[part].items():
            print_rates(labels[part, key], rates)
    memory = result["memory_bytes"]
    texts = [f"{m / 1e6:,.0f}" for m in memory]
    print_rows("peak memory, MB", texts, [memory[0] / m for m in memory])
    if result["matmul_flops"]:
        medians = {key: list(map(statistics.median, rates)) for key, rates in speeds.items()}
        shares = [100 * e / d for e, d in zip(medians["epoch"], medians["data"], strict=True)]
        print_rows("data share of an epoch, %", [f"{share:.1f}" for share in shares])
        shares = [  # an image takes 6 FLOPs per MAC: two forward, four backward
            100 * 6 * result["macs"] * rate / peak
            for rate, peak in zip(medians["epoch"], result["matmul_flops"], strict=True)
        ]
        print_rows("share of matmul peak, %", [f"{share:.0f}" for share in shares])


def machine(device: torch.device) -> str:
    """Two lines: the processor and its threads, and the versions."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    versions = ", ".join(f"{key} {value}" for key, value in utils.library_versions().items())
    return f"{name}, {torch.get_num_threads()} threads\n{versions}"


def main(args: list[str]) -> None:
    """Measure the preset that the command line names."""
    import tyro

    tyro.cli(benchmark, args=args, prog="python -m studies.benchmark")
