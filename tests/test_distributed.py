"""Two real processes under torchrun, with gloo."""

import csv
import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, run

import utils
from data import load_dataset
from model import load_model

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_two_processes_take_the_same_first_step_as_one():
    line = ("tests/first_step.py", 64, 33)
    one, two = (
        run(*line, launcher=launcher, PYTHONPATH=str(ROOT)) for launcher in (None, TORCHRUN)
    )
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    for text, text_of_two in zip(one.stdout.splitlines(), two.stdout.splitlines(), strict=True):
        single, double = json.loads(text), json.loads(text_of_two)
        assert (single.pop("processes"), double.pop("processes")) == (1, 2)
        assert double == pytest.approx(single, rel=1e-5)
        assert single["gradient"] > 0.1


def test_data_parallel_run_is_tested_by_one_process_with_the_same_result():
    """Its validation set is more than one batch, so both processes take part in evaluating it."""
    line = "train.py demo --epochs 2 --batch-size 63 --val-size 800 --wandb disabled".split()
    line += "--limit-steps 9 --ema 0.8".split()
    trained = run(*line, launcher=TORCHRUN)
    assert trained.returncode == 0, trained.stderr
    assert "on cpu in 2 processes" in trained.stdout
    assert trained.stdout.count("epoch 2/2") == 1  # one process prints
    tested = run("test.py")
    assert tested.returncode == 0, tested.stderr
    pattern = r"test accuracy: [\d.]+% \(\d+ of 359"
    assert re.findall(pattern, trained.stdout) == re.findall(pattern, tested.stdout) != []

    model, _ = load_model("checkpoints/demo/model.safetensors")
    digits = load_dataset("digits", val_size=800)
    val = utils.score(utils.evaluate(model, digits.val.images, digits.normalize), digits.val.labels)
    with Path("checkpoints/demo/log.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["val_loss"]) == pytest.approx(val.loss, rel=1e-5)
    assert float(last["val_accuracy"]) == pytest.approx(val.accuracy)


def test_bad_input_under_torchrun_is_one_line_and_ends_all_processes():
    result = run("train.py", "demo", "--batch-size", "1", launcher=TORCHRUN)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: batch_size: 1 for 1,438 training images and 2 processes; use 2 to 1,438"
    ]
