import re
import statistics
from dataclasses import replace

import pytest
from conftest import ROOT

import model
import utils
from config import PRESETS, check_config
from studies import ablation, levers, small_maps
from studies.best import run as best


@pytest.mark.parametrize("change", ablation.CHANGES)
def test_every_run_can_be_trained_and_validated(change):
    config = ablation.configuration(change, seed=1)
    check_config(config)
    assert (config.seed, config.val_size > 0, config.resume) == (1, True, True)
    unchanged = ablation.configuration("base", seed=1)
    assert (config.name == unchanged.name) == (change == "base")


def test_table_holds_the_mean_of_the_seeds_beside_the_base(monkeypatch, capsys):
    accuracy = {"base": 80.0, "proxy": 81.5}

    def fake_train(config):
        assert config.resume
        _, change, seed = config.name.split("-")
        log = [
            {"seconds": 300.0, "val_loss": 1.0, "val_accuracy": 10.0},
            {"seconds": 600.0, "val_loss": 0.5, "val_accuracy": accuracy[change] + int(seed)},
        ]
        return log, None

    monkeypatch.setattr(ablation, "train", fake_train)
    monkeypatch.setattr(ablation, "CHANGES", {name: ablation.CHANGES[name] for name in accuracy})
    ablation.main([])
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "| base | 2 | 15.0 | 80.50% (80.00, 81.00) | +0.00 |",
        "| proxy | 2 | 15.0 | 82.00% (81.50, 82.50) | +1.50 |",
    ]
    assert [
        (row["change"], row["seed"], row["val_accuracy"])
        for row in utils.read_csv("studies/ablation.csv")
    ] == [("base", 0, 80.0), ("proxy", 0, 81.5), ("base", 1, 81.0), ("proxy", 1, 82.5)]


def test_small_maps_compares_layers_and_steps(monkeypatch, capsys):
    used, apply = [], model.MatmulConv.apply
    monkeypatch.setattr(model, "HAS_AMX", True)
    monkeypatch.setattr(model.MatmulConv, "is_faster", lambda x: model.HAS_AMX)
    monkeypatch.setattr(model.MatmulConv, "apply", lambda *args: used.append(1) or apply(*args))
    monkeypatch.setattr(small_maps, "LAYERS", [(2, 8, 4, 3)])
    monkeypatch.setattr(small_maps, "NORMS", [(2, 24, 4)])
    monkeypatch.setattr(small_maps.benchmark, "matmul_peak", lambda dtype, device: 1e9)
    tiny = replace(PRESETS["fast"], width=1, batch_size=4)
    monkeypatch.setitem(small_maps.PRESETS, "fast", tiny)
    monkeypatch.setattr(small_maps, "TRAININGS", [("fast", 84)])
    small_maps.main([])
    rows = re.findall(r"\| (.+) \| [\d,]+ ms \| [\d,]+ ms \|", capsys.readouterr().out)
    assert rows == [
        "2 images of 3x3 pixels, 8 to 4 channels",
        "2 images of 4x4 pixels, 24 channels",
        "`fast`, epoch 84",
    ]
    # By one of two contestants: in the layer, and in the nine convolutions (without the stem) of
    # the network and of its proxy.
    rounds, steps = 1 + small_maps.ROUNDS, small_maps.PROXY_INTERVAL
    assert len(used) == rounds * (1 + 2 * 9 * steps)


def test_page_of_fast_has_the_results_of_the_ablation():
    page = (ROOT / "docs/fast.md").read_text(encoding="utf-8")
    for found in runs("ablation", "change", ablation.CHANGES).values():
        assert [row["seed"] for row in found] == list(ablation.SEEDS)
        assert f"| {found[0]['epochs']} | {mean_of(found)} |" in page


def test_page_of_fast_has_the_results_of_the_levers():
    page = (ROOT / "docs/fast.md").read_text(encoding="utf-8")
    for lever, found in runs("levers", "lever", levers.LEVERS).items():
        assert [row["seed"] for row in found] == list(range(len(found)))
        assert re.search(rf"\| {re.escape(mean_of(found))} \|.* `{re.escape(lever)}` \|", page)


def runs(study, column, names):
    """The rows of a study by what they changed, which is each of `names` and nothing else."""
    rows = utils.read_csv(ROOT / f"studies/{study}.csv")
    assert {row[column] for row in rows} == set(names)
    return {name: [row for row in rows if row[column] == name] for name in names}


def mean_of(rows):
    """A cell of a table: the mean of the runs, and each of them."""
    each = [row["val_accuracy"] for row in rows]
    return f"{statistics.mean(each):.2f}% ({', '.join(f'{a:.2f}' for a in each)})"


@pytest.mark.parametrize("change", best.CHANGES)
def test_every_run_for_best_can_be_trained_and_validated(change):
    config = best.configuration(change, seed=1)
    check_config(config)
    assert (config.seed, config.val_size, config.train_size) == (1, 5000, 4000)
    assert (config.warmup_epochs, config.resume) == (3, True)


def test_csv_of_best_gets_a_row_per_run_and_keeps_those_without_code(monkeypatch):
    def fake_train(config):
        row = {"train_accuracy": 90.0, "val_loss": 0.5, "val_accuracy": 70.0 + config.seed}
        return [row] * config.epochs, None

    monkeypatch.setattr(best, "train", fake_train)
    old = [
        {"change": change, "seed": 0, "epochs": 1, "train_accuracy": 1, "val_loss": 1,
         "val_accuracy": 1.5} for change in ("base", "zero-gamma")
    ]  # fmt: skip
    utils.write_csv(best.CSV, old)
    best.main(["1"])
    assert utils.read_csv(best.CSV) == old
    best.main([])
    new = utils.read_csv(best.CSV)
    assert new[-1] == old[1]
    assert [
        (row["change"], row["seed"], row["epochs"], row["val_accuracy"]) for row in new[:-1]
    ] == [
        (change, seed, best.configuration(change, seed).epochs, 70.0 + seed)
        for change in best.CHANGES
        for seed in (0, 1)
    ]


def runs_of(path):
    """The rows of a CSV by change, in the order of their seeds."""
    runs = {}
    for row in utils.read_csv(ROOT / path):
        found = runs.setdefault(row["change"], [])
        assert row["seed"] == len(found)
        found.append(row)
    return runs


def cell(change, runs):
    """A change's mean accuracy, and in brackets the difference to the base."""
    base = "base-100" if change.endswith("-100") else "base"
    means = [statistics.mean(row["val_accuracy"] for row in runs[name]) for name in (change, base)]
    return f"{means[0]:.2f}%" + (f" ({means[0] - means[1]:+.2f})" if change != base else "")


@pytest.mark.parametrize("name", ["best", "candidates"])
def test_page_of_best_has_every_change(name):
    page = (ROOT / "docs/best.md").read_text(encoding="utf-8")
    runs = runs_of(f"studies/best/{name}.csv")
    shown = {change: cell(change, runs) for change in runs}
    assert [change for change, text in shown.items() if text not in page] == []


def test_changes_that_can_be_repeated_are_those_of_the_csv():
    runs = runs_of("studies/best/best.csv")
    assert set(runs) == {*best.CHANGES, "zero-gamma"}  # whose code is gone
    for change in best.CHANGES:
        assert {row["epochs"] for row in runs[change]} == {best.configuration(change, 0).epochs}
