"""The weights in checkpoints/ are what their model cards, and the README, say they are."""

import csv
import re

import pytest
from conftest import ROOT

import hubconf
from config import PRESETS, Config, Recipe
from data import FACTS
from engine.checkpoint import load_model
from engine.start import Start
from engine.teacher import Teacher
from model import MAX_PARAMS, Architecture, count_parameters
from utils import part_of

RELEASED = sorted((ROOT / "checkpoints").glob("*.safetensors"))


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.stem)
def test_card_log_and_readme_agree_with_the_file(path):
    model, info = load_model(path)
    assert count_parameters(model) <= MAX_PARAMS
    trained = Config(**info["config"])
    for kind in (Recipe, Architecture):
        assert part_of(trained, kind) == part_of(PRESETS[path.stem], kind)
    names, mean, std = FACTS["cifar10"]
    assert info["class_names"] == list(names)
    assert (tuple(info["mean"]), tuple(info["std"])) == (mean, std)
    assert f"{info['accuracy']['test']:.2f}% on CIFAR-10" in getattr(hubconf, path.stem).__doc__
    assert re.fullmatch(r"[0-9a-f]{40}", info["git_commit"])  # neither unknown nor -dirty
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for text in (f"{info['accuracy']['test']:.2f}%", f"{count_parameters(model):,}"):
        assert text in card
        assert text in readme
    assert info["git_commit"] in card
    with path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(1, info["config"]["epochs"] + 1))
    assert float(rows[-1]["train_accuracy"]) == info["accuracy"]["train"]


def test_networks_that_presets_start_from_or_learn_from_are_released_and_fit():
    Start(PRESETS["mine"])  # refuses another architecture
    assert Teacher(PRESETS["tiny"]).info["dataset"] == PRESETS["tiny"].dataset


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.stem)
def test_cards_are_what_model_hubs_read(path):
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard.load(path.with_suffix(".md")).data
    _, info = load_model(path)
    assert (data.license, data.pipeline_tag) == ("mit", "image-classification")
    assert data.datasets == ["uoft-cs/cifar10"]
    assert data.eval_results[0].metric_value == pytest.approx(info["accuracy"]["test"])
    assert data.eval_results[0].dataset_split == "test"
