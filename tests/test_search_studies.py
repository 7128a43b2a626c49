"""The studies that search: the configurations of their commands are valid."""

import pytest
from conftest import ROOT

import utils
from config import check_config
from model import model_cost
from search.space import check_search, check_space
from search.trials import Trials
from studies import tpe
from studies.choices import run as choices


@pytest.mark.slow
def test_every_configuration_is_valid():
    for options, preset, space in (
        (choices.OPTIONS, "tpsnet", choices.space()),
        (tpe.OPTIONS, "demo", tpe.DRAWN),
    ):
        check_search(options)
        check_space(space)
        trials = Trials(options, preset, space)
        check_config(trials.config(trials.draw(1)))
    for _, config in choices.pilot_runs():
        check_config(config)
    recorded = utils.read_csv(ROOT / "studies/choices/trials.csv")
    for row in choices.whole(recorded)[:: choices.EVERY]:
        check_config(config := choices.again(row))
        cost = model_cost(config)
        assert (cost.num_params, cost.macs) == (row["num_params"], row["macs"])
