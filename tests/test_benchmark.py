"""studies/benchmark.py: our loop beside the classical script's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT

from config import PRESETS
from studies import benchmark
from studies.contestants import CONTESTANTS, Ours, measure
from utils import InputError


@pytest.mark.slow  # a process for each contestant
def test_quick_prints_a_row_per_measurement_and_contestant_and_writes_json(capsys):
    benchmark.main("demo --quick --rounds 1 --seconds 0 --json result.json".split())
    result = json.loads(Path("result.json").read_text(encoding="utf-8"))
    names = result["contestants"]
    assert names[:2] == ["ours", "classical script"]
    assert list(result["images_per_second"]) == ["epoch", "step"]
    for rates in result["images_per_second"].values():
        assert all(len(each) == 1 and each[0] > 0 for each in rates)
        assert len(rates) == len(names)
    assert all(100e6 < memory < 5e9 for memory in result["memory_bytes"])  # images alone: 150 MB
    before, table = capsys.readouterr().out.split("ratio\n")
    assert len(table.splitlines()) == 3 * len(names)
    for label in ("whole epoch", "training step", "peak memory, MB"):
        assert label in table
    # Where ours computes in float32, a line says why a contestant is missing.
    assert ("left out" in before) == (len(names) < len(CONTESTANTS))


def test_table_of_the_published_result_has_its_figures(capsys):
    """The epoch is 3.02 times as fast and the memory 0.62 of the classical script's (README)."""
    result = json.loads((ROOT / "studies/benchmark.json").read_text(encoding="utf-8"))
    parts = ("images_per_second", "scaling", "threads")
    benchmark.print_table(result, {(part, key): key for part in parts for key in result[part]})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80

    def after(label):
        """The cells of the classical script's row, after that of ours."""
        row = next(i for i, line in enumerate(lines) if line.startswith(label))
        return lines[row + 1].split()

    assert after("epoch") == ["classical", "script", "45", "(44-46)", "3.02"]
    assert after("peak memory") == ["classical", "script", "2,374", "0.62"]


@pytest.mark.parametrize(
    "options",
    [
        "nosuch",
        "demo --batch-size -1",
        "demo --batch-size 1000000",
        "demo --rounds -1",
        "demo --json .",
    ],
)
def test_bad_option_is_one_line_before_any_work(options, capsys):
    with pytest.raises(InputError, match=r"^(preset|batch_size|rounds|json): [^\n]+$"):
        benchmark.main(options.split())
    assert not capsys.readouterr().out


def test_misspelled_option_has_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--quik"])
    assert stop.value.code == 2


@pytest.mark.slow
def test_failed_contestant_is_named_with_its_status_and_last_line():
    with pytest.raises(InputError, match=r"^classical script: .* status 1: KeyError: 'nosuch'$"):
        benchmark.ask("classical script", {"preset": "nosuch", "compile": False})


@pytest.mark.slow
def test_contestants_train_the_same_network_on_the_same_kind_of_batch():
    sizes, shapes = set(), set()
    for name, make in CONTESTANTS.items():
        contestant = make(PRESETS["demo"])
        model = contestant.learner.model if isinstance(contestant, Ours) else contestant.model
        before = [p.detach().clone() for p in model.parameters()]
        # bfloat16 is slow on CPUs without it, so its contestant is measured in training alone.
        measured = benchmark.QUICK if "autocast" in name else benchmark.MEASUREMENTS
        rows = [(row, 16, 1) for row in measured]
        assert min(measure(contestant, rows, seconds=0)) > 0
        after = list(model.parameters())
        assert all((a != b).any() for a, b in zip(after, before, strict=True))
        sizes.add(sum(p.numel() for p in after))
        images, labels, *_ = next(contestant.batches(16))
        shapes.add((images.shape, images.dtype, len(labels)))
        assert images.abs().max() < 3
    assert len(sizes) == len(shapes) == 1


def test_work_of_the_proxy_is_counted():
    contestant = Ours(replace(PRESETS["demo"], keep_fraction=0.5))
    images, _, n = next(contestant.batches(16))
    assert len(images) == n == 32  # of which the proxy keeps half
    proxy = contestant.proxy.learner
    before = [p.detach().clone() for p in proxy.model.parameters()]
    contestant.steps([contestant.fixed_batch(16)] * contestant.unit)
    assert any((p != q).any() for p, q in zip(proxy.model.parameters(), before, strict=True))
    assert proxy.steps == contestant.learner.steps == contestant.unit
