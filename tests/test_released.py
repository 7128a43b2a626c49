"""The weights in checkpoints/ are what their model cards, and the README, say they are."""

import csv
import re

import pytest
from conftest import ROOT

from model import MAX_PARAMS, count_parameters
from weights import load_model

RELEASED = sorted((ROOT / "checkpoints").glob("*.safetensors"))


def test_something_is_released():
    assert "fast" in [path.stem for path in RELEASED]


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.stem)
def test_card_log_and_readme_agree_with_the_file(path):
    model, info = load_model(path)
    assert count_parameters(model) <= MAX_PARAMS
    assert re.fullmatch(r"[0-9a-f]{40}", info["git_commit"])  # neither unknown nor -dirty
    accuracy = f"{info['accuracy']['test']:.2f}%"
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for text in (accuracy, f"{count_parameters(model):,}"):
        assert text in card
        assert text in readme
    assert info["git_commit"] in card
    with path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(1, info["config"]["epochs"] + 1))
    assert float(rows[-1]["train_accuracy"]) == info["accuracy"]["train"]
