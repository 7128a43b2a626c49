import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar
from unittest import mock

import pytest
import torch
from conftest import ROOT

import benchmark
from benchmark import Classical, Ours
from config import PRESETS
from learner import Proxy
from utils import InputError


class FakeWorker:
    """Answers at once: an image takes `seconds` in training and a third of it in evaluation."""

    asked: ClassVar = []  # (measurement, batch size, seconds that it would have taken), by all

    def __init__(self, kind, config):
        self.seconds, self.slower = {Ours: 0.01, Classical: 0.03}[kind], 1

    def __call__(self, name, *arguments):
        if name == "memory":
            return 1_000_000
        if name == "threads":
            self.slower = torch.get_num_threads() / arguments[0]
            return None
        faster = {"data": 1000, "evaluate": 3}.get(name, 1)
        images = benchmark.EVAL_IMAGES if name == "evaluate" else arguments[0]
        seconds = images * arguments[1] * self.seconds * self.slower / faster
        self.asked.append((name, arguments[0], seconds))
        return seconds

    def stop(self):
        pass


@pytest.fixture
def fake(monkeypatch):
    """No processes; returns what was asked of the workers."""
    monkeypatch.setattr(benchmark, "Worker", FakeWorker)
    monkeypatch.setattr(benchmark, "matmul_peak", lambda dtype, device: 1e11)
    monkeypatch.setattr(benchmark, "memory_limit", lambda device: 1e15)
    monkeypatch.setattr(FakeWorker, "asked", [])
    return FakeWorker.asked


@pytest.fixture
def quick(monkeypatch):
    """One short round of everything."""
    monkeypatch.setattr(benchmark, "SECONDS", 0.01)
    monkeypatch.setattr(benchmark, "BATCH_SIZES", (32, 64))
    monkeypatch.setattr(benchmark, "matmul_peak", lambda dtype, device: 1e11)


@pytest.mark.slow
def test_both_are_measured_in_processes_of_their_own(quick, capsys):
    result = benchmark.benchmark("demo", batch_size=32, json="result.json")
    assert json.loads(Path("result.json").read_text())["macs"] == result["macs"] > 1e6
    for name in benchmark.MEASUREMENTS:
        ours, classical = result["images_per_second"][name]
        assert len(ours) == len(classical) == benchmark.ROUNDS
        assert min(ours + classical) > 1
    # a float32 copy of nothing but the 50,000 images is 150 MB
    assert all(100e6 < memory < 5e9 for memory in result["memory_bytes"])
    assert sorted(result["scaling"]) == [32, 64]
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    for label in (*benchmark.MEASUREMENTS.values(), "peak memory", "share of matmul peak"):
        assert label in output


def test_quick_measures_the_epoch_the_step_and_the_memory_in_as_many_rounds(fake, capsys):
    result = benchmark.benchmark("demo", quick=True, json="result.json")
    assert {(name, size) for name, size, _ in fake} == {("epoch", 64), ("step", 64)}
    assert list(result["images_per_second"]) == ["epoch", "step"]
    for rates in result["images_per_second"].values():
        assert [len(r) for r in rates] == [benchmark.ROUNDS] * 2
    assert result["memory_bytes"] == [1_000_000] * 2
    assert (result["matmul_flops"], result["scaling"], result["threads"]) == (None, {}, {})
    assert json.loads(Path("result.json").read_text()) == result
    output = capsys.readouterr().out
    assert "\n20 measurements (--quick: fewer rows, as many rounds)\n" in output
    rows = output.split("ratio\n")[1].splitlines()
    assert [row[:15] for row in rows] == ["whole epoch, im", "peak memory, MB", "training step, "]
    assert all(row.endswith((" 3.00", " 1.00")) for row in rows)


@pytest.mark.parametrize("preset", ["demo", "fast"])
@pytest.mark.parametrize("quick", [False, True])
def test_the_estimate_stands_above_the_table_and_is_right(fake, capsys, preset, quick):
    benchmark.benchmark(preset, quick=quick)
    captured = capsys.readouterr()
    before, after = captured.out.split("ratio\n")
    number, unit = re.search(r"^estimated time: ([\d.]+) (s|min)$", before, re.M).groups()
    seconds = float(number) * {"s": 1, "min": 60}[unit]
    assert seconds == pytest.approx(sum(taken for _, _, taken in fake), rel=0.05)
    assert (" measurements\n" in before) == (not quick)
    scaling = torch.get_num_threads() > 1  # a row for each number of threads
    assert len(after.splitlines()) == (3 if quick else 16 if scaling else 15)
    assert not captured.err  # no bar


def test_output_is_checked_before_the_measurements():
    with pytest.raises(InputError, match=r"json: \. is a folder; name a file"):
        benchmark.benchmark("demo", json=".")


def test_what_cannot_be_built_says_why(monkeypatch):
    def unbuildable(config):
        raise InputError("compile: it does not work here")

    monkeypatch.setattr(benchmark.threading, "Thread", mock.Mock())
    ours, theirs = multiprocessing.Pipe()
    ours.send(("step", (64, 1)))
    benchmark.serve(unbuildable, None, theirs)
    worker = mock.Mock(connection=mock.Mock(recv=ours.recv))
    with pytest.raises(InputError, match="compile: it does not work here"):
        benchmark.Worker.__call__(worker, "step", 64, 1)


def test_the_proxys_work_is_counted(monkeypatch):
    """A step of 16 trained images draws 32, and the proxy sees all, learns from every fourth."""
    seen, hardest = [], Proxy.hardest

    def spy(proxy, batches, first_step):
        for batch in hardest(proxy, (seen.append(len(b[1])) or b for b in batches), first_step):
            seen.append(len(batch[1]))
            yield batch

    monkeypatch.setattr(Proxy, "hardest", spy)
    contestant = Ours(replace(PRESETS["demo"], keep_fraction=0.5))
    learner, lessons = contestant.proxy.learner, []
    update = learner.update
    monkeypatch.setattr(
        learner, "update", lambda loss: lessons.append(learner.steps) or update(loss)
    )
    contestant.steps(contestant.batches(16), 2)
    for _ in range(3):  # short measurements, each goes on where the last one ended
        contestant.steps(contestant.same_batch(16), 1)
    assert seen == [32, 16] * 5
    assert lessons == [0, 4]


def test_contestants_train_the_same_network_on_the_same_kind_of_batch():
    sizes, shapes = set(), set()
    for kind in (Ours, Classical):
        contestant = kind(PRESETS["demo"])
        before = [p.detach().clone() for p in contestant.model.parameters()]
        contestant.steps(contestant.batches(16), 2)
        after = list(contestant.model.parameters())
        assert all((a != b).any() for a, b in zip(after, before, strict=True))
        sizes.add(sum(p.numel() for p in after))
        images, labels, *_ = next(contestant.batches(16))
        shapes.add((images.shape, images.dtype, labels.shape))
        assert images.abs().max() < 3
    assert len(sizes) == len(shapes) == 1


@pytest.mark.parametrize(("preset", "batch_size"), [("nosuch", 0), ("demo", -1), ("demo", 10**6)])
def test_bad_arguments(preset, batch_size):
    with pytest.raises(InputError, match=r"^(preset|batch_size): "):
        benchmark.benchmark(preset, batch_size=batch_size)


def processes_of(session):
    """Ids of the processes of a session that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            state, _, _, number = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(number) == session and state != "Z":
                found.append(int(folder.name))
    return found


ENDLESS = """
import script, benchmark
benchmark.SECONDS = 10_000  # of one measurement
script.run_script(benchmark.main)
"""


@pytest.fixture
def endless():
    """A benchmark that only a signal ends, in a session of its own; what is left is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, "demo", "--quick"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield process
    for number in processes_of(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "moment", "status", "last_words"),
    [
        (signal.SIGINT, "measurements", 130, "interrupted\n"),  # the contestants are loading
        (signal.SIGINT, "ratio", 130, "interrupted\n"),
        (signal.SIGTERM, "ratio", -signal.SIGTERM, ""),
    ],
)
def test_a_signal_ends_all_processes_at_once(endless, number, moment, status, last_words):
    """Ctrl-C reaches all of them, here the contestants first; SIGTERM only their parent."""
    next(line for line in endless.stdout if moment in line)
    # itself, the contestants, and multiprocessing's resource tracker
    while endless.poll() is None and len(processes_of(endless.pid)) < 4:
        time.sleep(0.01)
    if number == signal.SIGINT:
        for child in processes_of(endless.pid):
            if child != endless.pid:
                os.kill(child, number)
        time.sleep(1)
    endless.send_signal(number)
    _, errors = endless.communicate(timeout=60)  # which the processes that hold the pipes delay
    assert (endless.returncode, errors) == (status, last_words)
    end = time.monotonic() + 30
    while processes_of(endless.pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not processes_of(endless.pid)
