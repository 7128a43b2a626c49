"""The study of the paper's choices: what it trains, and that each part goes on with the others'."""

import importlib.util
import re
from dataclasses import replace

import numpy as np
import pytest

import utils
from config import PRESETS, check_config
from model import model_cost

if not importlib.util.find_spec("ray"):  # not imported: search.py tells it first where to listen
    pytest.skip("Ray is not installed", allow_module_level=True)
import search
from studies.choices import answers
from studies.choices import run as choices
from trials import Trials
from utils import InputError, SearchError


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
        accuracy = 80 + rng.normal() + sum(effects[name] * values[name] for name in effects)
        rows.append(row | {"val_accuracy": accuracy, "early_accuracy": accuracy})
        if number % 5 == 0:
            longer.append({"trial": number, "val_accuracy": accuracy + blocks})
    answers.FOLDER.mkdir(parents=True)
    utils.write_csv(answers.FOLDER / "trials.csv", rows)
    utils.write_csv(answers.FOLDER / "longer.csv", longer)


def asked(question):
    """A question's number, and the ends of its interval."""
    line = dict(line.split(": ", 1) for line in answers.answers())[question]
    return [float(number) for number in re.findall(r"[+-][\d.]+", line)]


def test_answers_find_what_is_there():
    made(depth=-1, odd=3, threes=12)
    found, low, high = asked("odd blocks in all stages against the rest, at equal depth")
    assert low < found < high
    assert found == pytest.approx(3, abs=1.5)
    assert asked("rank correlation with blocks per stage")[2] < 0
    assert asked("rank correlation with the share of 3x3 convolutions")[1] > 0
    assert asked("rank correlation of what longer training adds with blocks per stage")[1] > 0.8


def test_answers_know_that_they_do_not_know():
    made()
    questions = ["3 stages against 4", "pooled to 1x1 against 2x2 and 4x4"]
    questions += [f"rank correlation with {x}" for x in ("blocks per stage", "parameters")]
    ends = [asked(question)[1:] for question in questions]
    assert sum(low < 0 < high for low, high in ends) >= 3  # one interval in twenty misses
    lines = "\n".join(answers.answers())
    assert "rank correlation with the skip kernel: all trials are alike" in lines
