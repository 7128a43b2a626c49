"""The studies that ran once: their configurations are valid, and their records can be read."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

import utils
from config import check_config
from data import load_dataset, train_batches
from learner import Learner
from studies import ablation, figures, levers
from studies.best import run as best
from studies.teacher import run as teacher
from utils import StoppedError

CPU = torch.device("cpu")
STUDIES = {  # configurations, CSV, its column, and the changes in it that have no code any more
    "ablation": (ablation.CHANGES, ablation.configuration, "ablation.csv", "change", set()),
    "best": (best.CHANGES, best.configuration, "best/best.csv", "change", {"zero-gamma"}),
    "levers": (
        levers.LEVERS,
        levers.configuration,
        "levers.csv",
        "lever",
        {"dirac-init", "logits-1.5", "pool-ceil", "freeze-stage-1", "plain-proxy", "airbench-sgd"},
    ),
}


@pytest.mark.parametrize("study", STUDIES)
def test_every_run_can_be_trained_and_the_record_has_it(study):
    changes, configuration, path, column, without_code = STUDIES[study]
    names = set()
    for change in changes:
        for seed in (0, 1):
            config = configuration(change, seed)
            check_config(config)
            assert config.seed == seed
            assert config.val_size == 5000  # what it is compared by
            assert config.resume  # running it again repeats no finished run
            names.add(config.name)
    assert len(names) == 2 * len(changes)
    rows = utils.read_csv(ROOT / "studies" / path)
    assert {row[column] for row in rows} == {*changes, *without_code}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "studies").rglob("*.csv")), ids=lambda path: path.name
)
def test_record_is_a_table(path):
    rows = utils.read_csv(path)
    assert rows
    assert not any(None in row for row in rows)  # cells beyond the header


@pytest.mark.slow
def test_figures_are_drawn_from_the_records(tmp_path):
    for name in ("studies", "checkpoints"):
        (tmp_path / name).symlink_to(ROOT / name)
    figures.main([])
    drawn = {path.name for path in (tmp_path / "images").iterdir()}
    assert {"architecture.png", "benchmark.png", "fast.png", "tpsnet.png", "family.png"} <= drawn


def test_a_learner_of_logits_differs_in_its_loss_alone():
    config = replace(TINY, schedule="linear", warmup_epochs=1)
    data = load_dataset(config)
    images, labels, n = next(train_batches(data, config, 1))
    logits = torch.randn(n, 10)
    one, other = (kind(config, data, CPU) for kind in (Learner, teacher.LogitLearner))
    expected = ((one.forward(images) - logits) ** 2).sum() / 2
    loss, _ = other.step(images, logits, n)
    one.step(images, labels, n)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (other.steps, other.lr) == (one.steps, one.lr)
    rates = [
        group["lr"] for learner in (one, other) for group in learner.optimizers[0].param_groups
    ]
    assert len(set(rates)) == 1


@pytest.mark.parametrize("stage", teacher.ARMS)
def test_arms_of_the_teachers_trial_differ_in_one_thing(stage):
    for arm in teacher.ARMS[stage]:
        config = teacher.configuration(stage, arm, 1)
        check_config(config)
        assert (config.seed, config.val_size, config.resume) == (1, 5000, True)
        assert config.teacher or config.label_smoothing


def test_runs_of_other_machines_stay_in_the_record(monkeypatch, capsys):
    path = Path("trial.csv")
    before = {"arm": "logits", "seed": 0, "val_accuracy": 91.5}
    utils.write_csv(path, [before])
    monkeypatch.setattr(teacher, "CSV", path)
    monkeypatch.setattr(teacher, "load_dataset", lambda *_, **__: None)

    def train(stage, arm, seed, data):
        if (arm, seed) == ("probabilities", 1):
            raise StoppedError(15, "asked to end")
        return {"arm": arm, "seed": seed, "val_accuracy": 90}

    monkeypatch.setattr(teacher, "train", train)
    with pytest.raises(StoppedError):
        teacher.study("loss")
    rows = utils.read_csv(path)
    assert rows[0] == before
    assert [(row["arm"], row["seed"]) for row in rows[1:]] == [
        ("labels", 0), ("probabilities", 0), ("temperature-0.667", 0), ("labels", 1),
    ]  # fmt: skip
