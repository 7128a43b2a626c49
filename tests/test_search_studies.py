"""The search that docs/search.md tells of: its record, and what is concluded from it."""

import importlib.util
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from conftest import ROOT

import utils
from config import load_config
from model import check_budget

if not importlib.util.find_spec("ray"):  # not imported: search.py tells it first where to listen
    pytest.skip("Ray is not installed", allow_module_level=True)
from studies import overhead, tpe
from studies.search import answers
from studies.search import run as small_search
from trials import Search, Trials
from utils import InputError

RECORD = ROOT / "studies" / "search"


@pytest.fixture
def recorded():
    return utils.read_csv(RECORD / "trials.csv")


def page():
    """docs/search.md, which tells of it, in one line."""
    return " ".join((ROOT / "docs" / "search.md").read_text(encoding="utf-8").split())


def test_recorded_search_is_the_scripts(recorded, monkeypatch):
    monkeypatch.chdir(ROOT)
    stored = json.loads((RECORD / "search.json").read_text())
    assert stored.pop("space") == repr(small_search.NARROWED)
    assert stored.pop("preset") == "tpsnet"
    assert Search(**stored) == small_search.OPTIONS  # of limits that came later it has none
    trials = Trials(small_search.OPTIONS, "tpsnet", small_search.NARROWED)
    assert [row["trial"] for row in recorded] == [*range(1, small_search.OPTIONS.num_samples + 1)]
    preset, options, _ = answers.load()
    for row in recorded:
        assert list(row) == list(trials.columns)
        trials.check(row)
        config = answers.configuration(preset, options, row)
        assert check_budget(config) == row["num_params"]
        assert row["lr"] >= small_search.NARROWED["lr"].low
        for name in ("c1", "width", "batch_size", "optimizer", "schedule", "dropout"):
            assert row[name] in small_search.NARROWED[name]
        assert row["status"] == "diverged" or row["epochs"] == small_search.OPTIONS.epochs


def test_recorded_best_is_the_best_trial(recorded):
    best = max(recorded, key=lambda row: row["val_accuracy"] or 0)
    config = load_config(str(RECORD / "best.json"))
    assert (config.lr, config.c1, config.batch_size) == (best["lr"], best["c1"], best["batch_size"])
    assert check_budget(config) == best["num_params"]


def test_the_page_gives_the_answers(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = answers.answers()
    assert len(lines) == 8
    for line in lines:
        assert line.split(": ")[1] in page()


def made(folder, num_trials=60, **effects):
    """A record whose accuracies are `effects` per unit, above a parabola in the learning rate."""
    rng = np.random.default_rng(1)
    rows = []
    for number in range(1, num_trials + 1):
        stages, blocks = int(rng.integers(2, 5)), int(rng.integers(1, 8))
        row = {
            "trial": number, "num_stages": stages, "num_blocks": " ".join([str(blocks)] * stages),
            "conv_kernel": " ".join("3" * stages), "skip_kernel": " ".join("1" * stages),
            "pool_kernel": 32 // 2 ** (stages - 1), "c1": int(rng.integers(8, 21)), "width": 1,
            "dropout": float(rng.choice([0, 0.1, 0.2, 0.3])),
            "classifier_dropout": float(rng.choice([0, 0.1, 0.2, 0.3])),
            "lr": 10 ** rng.uniform(-3, 0), "batch_size": 64, "num_params": 10_000, "macs": 10**7,
            "optimizer": "sgd", "schedule": "cosine", "pooled_size": 1,
        }  # fmt: skip
        accuracy = 40 - 5 * (np.log10(row["lr"]) + 1.5) ** 2 + rng.normal(scale=0.1)
        values = row | {"blocks": blocks, "odd": blocks % 2}
        accuracy += sum(effect * values[name] for name, effect in effects.items())
        rows.append(row | {"val_accuracy": accuracy, "early_accuracy": accuracy})
    folder.mkdir(parents=True)
    utils.write_csv(folder / "trials.csv", rows)
    options = asdict(replace(small_search.OPTIONS, num_samples=num_trials))
    utils.write_json(folder / "search.json", {"preset": "tpsnet", "space": "{}", **options})
    return rows


def test_answers_find_what_is_there():
    made(answers.FOLDER, odd=3, blocks=1, dropout=-20)
    lines = dict(line.split(": ", 1) for line in answers.answers())
    odd = float(lines["odd blocks in all stages against the rest"].split()[0])
    assert odd == pytest.approx(3, abs=1.5)
    assert float(lines["dropout in blocks against none"].split()[0]) == pytest.approx(-4, abs=1.5)
    low, high = interval(lines["dropout before the classifier against none"])
    assert low < 0 < high
    assert interval(lines["rank correlation with blocks per stage"])[0] > 0


def interval(line):
    """The two ends of the 95% interval that a line gives."""
    inside = line.split("(")[1].split(";")[0]
    low, high = inside.split(" to ")
    return float(low), float(high)


def test_answers_know_that_they_do_not_know():
    made(answers.FOLDER)
    for line in answers.answers()[:5]:
        low, high = interval(line)
        assert -0.5 < low < high < 0.5


def test_longer_training_differs_in_its_epochs_alone():
    rows = made(answers.FOLDER)
    preset, options, best_first = answers.load()
    assert best_first[0]["val_accuracy"] == max(row["val_accuracy"] for row in rows)
    row = best_first[0]
    config = answers.configuration(preset, options, row)
    assert (config.epochs, config.schedule, config.val_size) == (16, "cosine", 1000)
    assert (config.lr, config.c1, config.train_size) == (row["lr"], row["c1"], 2000)
    assert config.restart_epochs == 8
    assert len(config.num_blocks) == len(config.conv_kernel) == row["num_stages"]


def test_overhead_is_measured_on_one_network():
    trials = Trials(Search(epochs=5), "demo", overhead.ONE)
    first, second = (trials.draw(number) for number in (1, 2))
    assert first == second | {"trial": 1}


def test_table_of_random_search_and_tpe(capsys):
    rows = [
        {"algorithm": a, "seed": s, "trials": t, "best_accuracy": best + s, "mean_accuracy": 50}
        for a, best in (("random", 80), ("optuna", 81))
        for s in (0, 1, 2)
        for t in tpe.TRIALS
    ]
    rows[0]["best_accuracy"] = 90  # of random search with seed 0, after 10 trials
    tpe.print_table(rows)
    table = capsys.readouterr().out.splitlines()
    assert table[2].startswith("| 10 | 84.3% ± 4.9 | 82.0% ± 1.0 | 50.0% ± 0.0 |")
    assert [line.split("|")[-2].strip() for line in table[2:]] == ["2 of 3", "3 of 3", "3 of 3"]


def test_the_page_gives_the_table(capsys):
    rows = utils.read_csv(ROOT / "studies" / "tpe.csv")
    assert len(rows) == len(tpe.SEEDS) * len(tpe.TRIALS) * len(tpe.ALGORITHMS)
    tpe.print_table(rows)
    assert " ".join(capsys.readouterr().out.split()) in page()


@pytest.mark.slow
def test_a_study_searches_its_own_space_and_goes_on():
    space = small_search.NARROWED | {"num_blocks": (1,), "c1": (4, 5), "num_stages": (2,)}
    options = Search(name="study", num_samples=2, epochs=1, val_size=200)
    rows = small_search.run(options, "demo", space)
    assert [row["num_blocks"] for row in rows] == ["1 1", "1 1"]
    assert all(row["c1"] in (4, 5) for row in rows)
    again = small_search.run(options, "demo", space)
    assert [row["val_accuracy"] for row in again] == [row["val_accuracy"] for row in rows]
    with pytest.raises(InputError, match="epochs: 2, but the search study was started with 1"):
        small_search.run(replace(options, epochs=2), "demo", space)
