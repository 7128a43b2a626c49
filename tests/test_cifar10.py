"""On the real CIFAR-10: `python -m pytest -m cifar10`. Skipped where it is not in data/."""

import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run, run_main
from PIL import Image

from config import Config
from data import load_dataset
from engine.checkpoint import load_model
from engine.evaluate import classify, evaluate
from utils import read_csv

DATA = ROOT / "data"
RELEASED = sorted((ROOT / "checkpoints").glob("*.safetensors"))
QUICK = ("small", "tiny")  # of the released networks, those that classify in seconds
pytestmark = pytest.mark.cifar10


@pytest.fixture(scope="module")
def cifar10():
    return load_dataset(Config(data_dir=str(DATA), download=False))


def test_it_is_cifar10(cifar10):
    assert (len(cifar10.train), len(cifar10.test)) == (50_000, 10_000)
    assert cifar10.train.labels.bincount().tolist() == [5000] * 10
    assert cifar10.test.labels.bincount().tolist() == [1000] * 10
    first = [cifar10.class_names[label] for label in cifar10.train.labels[:5]]
    assert first == ["frog", "truck", "truck", "deer", "automobile"]
    assert [cifar10.class_names[label] for label in cifar10.test.labels[:3]] == [
        "cat", "ship", "ship",
    ]  # fmt: skip


def test_mean_and_std_are_the_data_sets(cifar10):
    channels = cifar10.train.images.transpose(0, 1).flatten(1) / 255
    assert channels.mean(1).tolist() == pytest.approx(cifar10.mean, abs=1e-4)
    assert channels.std(1).tolist() == pytest.approx(cifar10.std, abs=1e-4)


@pytest.mark.slow
def test_validation_split(cifar10):
    split = load_dataset(Config(data_dir=str(DATA), val_size=5000, download=False))
    assert split.train.labels.bincount().tolist() == [4500] * 10
    assert split.val.labels.bincount().tolist() == [500] * 10
    assert torch.equal(split.test.images, cifar10.test.images)


@pytest.mark.slow
def test_rehearsal_goes_through_every_stage_to_a_tested_checkpoint():
    line = "train.py model1 --num-blocks 1 1 1 --c1 4 --epochs 2 --max-steps-per-epoch 3 --name try"
    shared = ("--data-dir", DATA, "--no-download")
    trained = run(*line.split(), "--wandb", "disabled", *shared)
    assert trained.returncode == 0, trained.stderr
    assert "epochs: 2 of 3 steps" in trained.stdout
    tested = run("test.py", *shared)
    assert tested.returncode == 0, tested.stderr
    pattern = r"test accuracy: .* of 10,000; .*"
    assert re.findall(pattern, trained.stdout) == re.findall(pattern, tested.stdout) != []
    assert re.search(r"^automobile +[\d,]+ +1,000 ", tested.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem not in QUICK))
        for path in RELEASED
    ],
)
def test_released_weights_classify_as_well_as_they_claim(path, cifar10):
    """On a tenth of the test set, where three points are four standard errors."""
    model, info = load_model(path)
    found = evaluate(model, cifar10.test[::10], cifar10.normalize)
    assert abs(found.accuracy - info["accuracy"]["test"]) < 3


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: path.stem)
@pytest.mark.slow
def test_pictures_in_files_get_the_same_answers(path, cifar10, monkeypatch):
    """A tenth of the test set as PNG files, classified by predict.py."""
    model, info = load_model(path)
    images = cifar10.test.images[::10]
    Path("photos").mkdir()
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(f"photos/{i:04}.png")
    options = ("--checkpoint", path, "--top", "1", "--csv", "a.csv")
    assert run_main("predict", "photos", *options, monkeypatch=monkeypatch) == 0
    predicted = classify(model, images, cifar10.normalize).argmax(1).tolist()
    assert [row["class_1"] for row in read_csv("a.csv")] == [
        info["class_names"][label] for label in predicted
    ]
