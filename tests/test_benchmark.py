import json
from dataclasses import replace
from pathlib import Path

import pytest

import benchmark
from benchmark import Classical, Ours
from config import PRESETS
from learner import Proxy
from utils import InputError


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


def test_the_proxys_work_is_counted(monkeypatch):
    """A step of 16 trained images draws 32, and the proxy looks at all of them."""
    seen, hardest = [], Proxy.hardest

    def spy(proxy, batches):
        for batch in hardest(proxy, (seen.append(len(b[1])) or b for b in batches)):
            seen.append(len(batch[1]))
            yield batch

    monkeypatch.setattr(Proxy, "hardest", spy)
    contestant = Ours(replace(PRESETS["demo"], keep_fraction=0.5))
    contestant.steps(contestant.batches(16), 2)
    contestant.steps(contestant.same_batch(16), 1)
    assert seen == [32, 16] * 3


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
