"""The study of the paper's choices: what it trains, and that each part goes on with the others'."""

import importlib.util
from dataclasses import replace

import pytest

import utils
from config import PRESETS, check_config
from model import model_cost

if not importlib.util.find_spec("ray"):  # not imported: search.py tells it first where to listen
    pytest.skip("Ray is not installed", allow_module_level=True)
from studies.choices import run as choices
from trials import Trials


@pytest.fixture
def space():
    recipe = choices.fixed(choices.RECIPE)
    return choices.DRAWN | {name: (value,) for name, value in recipe.items()}


def test_longer_training_differs_in_its_epochs_alone(space):
    trials = Trials(choices.OPTIONS, "tpsnet", space)
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
