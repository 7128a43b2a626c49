"""The studies of the search: their records, what they train, and what is concluded from them."""

import importlib.util
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT

import utils
from config import PRESETS, check_config, load_config
from model import model_cost

if not importlib.util.find_spec("ray"):  # not imported: search.py tells it first where to listen
    pytest.skip("Ray is not installed", allow_module_level=True)
import search
from studies import overhead, tpe
from studies.choices import answers
from studies.choices import run as choices
from trials import PER_STAGE, Search, Trials, read_record
from utils import InputError, SearchError

RECORD = ROOT / "studies" / "choices"
DRAWN = (*PER_STAGE, "num_stages", "pool_kernel", "c1", "width", "rejected")


@pytest.fixture
def recorded():
    """The rows of the trials that have ended."""
    return choices.whole(utils.read_csv(RECORD / "trials.csv"))


def page():
    """docs/search.md, which tells of them, in one line."""
    return " ".join((ROOT / "docs" / "search.md").read_text(encoding="utf-8").split())


def test_recorded_search_is_the_scripts(recorded):
    stored = read_record(RECORD / "search.json")
    assert stored.pop("space") == repr(choices.space())
    assert stored.pop("preset") == "tpsnet"
    assert Search(**stored) == choices.OPTIONS
    trials = Trials(choices.OPTIONS, "tpsnet", choices.space())
    for row in recorded[::5]:  # a draw can take a second
        drawn = trials.draw(row["trial"])
        assert [row[name] for name in DRAWN] == [drawn[name] for name in DRAWN]
    for row in recorded:
        assert list(row) == list(trials.columns)
        assert choices.fixed(choices.RECIPE).items() <= row.items()
        cost = model_cost(choices.again(row))
        assert (cost.num_params, cost.macs) == (row["num_params"], row["macs"])
        assert row["epochs"] == choices.OPTIONS.epochs


def test_recorded_best_is_the_best_trial(recorded):
    best = max(recorded, key=lambda row: row["val_accuracy"])
    config, again = load_config(str(RECORD / "best.json")), choices.again(best)
    for name in ("num_blocks", "c1", "width", "conv_kernel", "skip_kernel", "pool_kernel", "lr"):
        assert getattr(config, name) == getattr(again, name)


def test_the_page_gives_the_answers(monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in answers.answers():
        assert line.split(": ")[1] in page()


def test_longer_training_differs_in_its_epochs_alone():
    trials = Trials(choices.OPTIONS, "tpsnet", choices.space())
    for number in (1, 2, 3):
        trials.rows[number] = trials.draw(number)
    trials.path.mkdir(parents=True)
    trials.write_table()
    for row in utils.read_csv(trials.path / "trials.csv"):
        config = choices.again(row)
        check_config(config)
        drawn = trials.config(trials.rows[row["trial"]])
        assert config.epochs == 4 * drawn.epochs == 48
        assert replace(config, epochs=12, name=drawn.name, restart_epochs=6) == drawn


def test_pilot_trains_networks_of_the_size_that_is_searched(monkeypatch):
    runs = []
    monkeypatch.setattr(choices, "train_all", lambda found, _path: runs.extend(found))
    choices.pilot()
    assert len({config.name for _, config in runs}) == 8
    for row, config in runs:
        check_config(config)
        cost = model_cost(config)
        limits = choices.OPTIONS
        assert limits.min_params <= cost.num_params <= limits.max_params
        assert cost.macs <= limits.max_macs
        assert f"{config.optimizer} {config.lr}" == row["recipe"]


def test_search_is_done_when_all_its_trials_are(monkeypatch):
    """Else the longer trainings would begin with others than those of the whole search."""
    rows = [{"status": "finished"}] * 47 + [{"status": "failed"}]
    monkeypatch.setattr(search, "run_search", lambda *_: rows)
    with pytest.raises(SearchError, match="1 trials have not ended; the same command goes on"):
        choices.run_search()
    with pytest.raises(InputError, match=r"trials\.csv does not exist; run `search` first"):
        choices.longer()


def test_what_diverges_leaves_a_row_and_the_rest_goes_on(tmp_path):
    calm = replace(PRESETS["demo"], num_blocks=(1,), pool_kernel=32, c1=4, epochs=1)
    calm = replace(calm, train_size=256, val_size=200)
    wild = replace(calm, name="wild", lr=1000.0, epochs=3)
    for _ in range(2):  # the second time it goes on
        choices.train_all([({"trial": 1}, wild), ({"trial": 2}, calm)], tmp_path / "found.csv")
    first, second = utils.read_csv(tmp_path / "found.csv")
    assert first == {"trial": 1, "epochs": None, "val_accuracy": None}
    assert (second["trial"], second["epochs"]) == (2, 1)
    assert 0 < second["val_accuracy"] < 100


def made(**effects):
    """A record of 60 trials whose accuracies are 80% and `effects` per unit; every fifth longer."""
    rng = np.random.default_rng(2)
    rows, longer = [], []
    for number in range(1, 61):
        stages, blocks = int(rng.integers(3, 5)), int(rng.integers(1, 10))
        kernels = rng.choice([1, 3, 5], stages)
        row = {
            "trial": number, "num_stages": stages, "num_blocks": " ".join([str(blocks)] * stages),
            "conv_kernel": " ".join(map(str, kernels)), "skip_kernel": " ".join("1" * stages),
            "c1": int(rng.integers(6, 33)), "width": 1, "num_params": number, "macs": 10**7,
            "pooled_size": int(rng.choice([1, 2, 4])),
        }  # fmt: skip
        values = {"depth": blocks, "odd": blocks % 2, "threes": np.mean(kernels == 3)}
        values["only_1x1"] = max(kernels) == 1
        accuracy = 80 + rng.normal() + sum(effects[name] * values[name] for name in effects)
        rows.append(row | {"val_accuracy": accuracy, "early_accuracy": accuracy})
        if number % 5 == 0:
            longer.append({"trial": number, "val_accuracy": accuracy + blocks})
    answers.FOLDER.mkdir(parents=True)
    utils.write_csv(answers.FOLDER / "trials.csv", rows)
    utils.write_csv(answers.FOLDER / "longer.csv", longer)


EQUAL = "at an equal share of 1x1 convolutions"


def asked(question):
    """A question's number, and the ends of its interval."""
    line = dict(line.split(": ", 1) for line in answers.answers())[question]
    return [float(number) for number in re.findall(r"[+-][\d.]+", line)]


def test_answers_find_what_is_there():
    made(depth=-1, odd=3, threes=12, only_1x1=-30)
    for question, effect in (
        ("odd blocks in all stages against the rest, at equal depth", 3),
        ("1x1 convolutions alone against the rest", -34),  # and no 3x3, of which others have some
    ):
        found, low, high = asked(question)
        assert low < found < high
        assert found == pytest.approx(effect, abs=2)
    assert asked(f"rank correlation with blocks per stage, {EQUAL}")[2] < 0
    assert asked("rank correlation with the share of 3x3 convolutions")[1] > 0
    assert asked("rank correlation of what longer training adds with blocks per stage")[1] > 0.8


def test_answers_know_that_they_do_not_know():
    made()
    questions = ["3 stages against 4", "pooled to 1x1 against 2x2 and 4x4"]
    questions += ["rank correlation with parameters"]
    questions += [f"rank correlation with blocks per stage, {EQUAL}"]
    ends = [asked(question)[1:] for question in questions]
    assert sum(low < 0 < high for low, high in ends) >= 3  # one interval in twenty misses
    lines = "\n".join(answers.answers())
    assert "rank correlation with the skip kernel: all trials are alike" in lines


def test_what_goes_with_another_choice_alone_is_seen_at_its_equal_values():
    rng = np.random.default_rng(3)
    kernel = rng.normal(size=200)
    rows = [
        {"kernel": k, "width": k + rng.normal(), "val_accuracy": 80 - k + rng.normal()}
        for k in kernel
    ]
    ends = {}
    for equal in ((), (lambda row: row["kernel"],)):
        text = answers.rank_correlation(rows, lambda row: row["width"], equal=equal)
        ends[equal] = [float(number) for number in re.findall(r"[+-][\d.]+", text)]
    plain, at_equal = ends.values()
    assert plain[2] < -0.2
    assert at_equal[1] < 0 < at_equal[2]


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
    space = choices.DRAWN | {"num_blocks": (1,), "c1": (4, 5), "num_stages": (2,)}
    options = Search(name="study", num_samples=2, epochs=1, val_size=200)
    rows = choices.run(options, "demo", space)
    assert [row["num_blocks"] for row in rows] == ["1 1", "1 1"]
    assert all(row["c1"] in (4, 5) for row in rows)
    again = choices.run(options, "demo", space)
    assert [row["val_accuracy"] for row in again] == [row["val_accuracy"] for row in rows]
    with pytest.raises(InputError, match="epochs: 2, but the search study was started with 1"):
        choices.run(replace(options, epochs=2), "demo", space)
