import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run, run_main

from data import load_dataset
from metrics import CALIBRATION_BINS, Score, calibrate, evaluate, score
from model import Architecture, ResNet, model_cost
from test import confusion, main, mcnemar, worst_mistakes
from utils import TEMPORARY, InputError
from weights import find_checkpoint, load_model, save_model


def test_repeats_exactly_what_training_printed(demo):
    folder, output = demo
    result = run("test.py", folder / "model.safetensors", "--json", "result.json")
    assert result.returncode == 0, result.stderr
    line = re.search(r"^test accuracy: .*$", output, re.MULTILINE)[0]
    assert line in result.stdout.splitlines()

    written = json.loads(Path("result.json").read_text())
    _, info = load_model(folder / "model.safetensors")
    assert written["accuracy"] == info["accuracy"]["test"] == 100 * written["correct"] / 359
    assert written["total"] == 359
    assert written["tta"] is None
    cost = model_cost(Architecture(**info["architecture"]))
    assert (written["num_params"], written["macs"]) == (cost.num_params, cost.macs)
    counts = torch.tensor(written["confusion"])
    assert counts.trace() == written["correct"]
    assert counts.sum(1).tolist() == load_dataset("digits").test.labels.bincount().tolist()
    for name in ("confusion", "calibration", "mistakes"):
        assert (folder / f"model_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_per_class_table_adds_up(demo, monkeypatch, capsys):
    folder, _ = demo
    assert run_main(main, folder, monkeypatch=monkeypatch) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    rows = re.findall(r"^(\d) +(\d+) +(\d+) +([\d.]+)%", captured.out, re.MULTILINE)
    assert [name for name, *_ in rows] == list("0123456789")
    correct = int(re.search(r"\((\d+) of 359;", captured.out)[1])
    assert sum(int(right) for _, right, _, _ in rows) == correct
    for _, right, total, accuracy in rows:
        assert float(accuracy) == pytest.approx(100 * int(right) / int(total), abs=0.005)


def test_flip_tta_is_reported_apart(demo, monkeypatch, capsys):
    folder, _ = demo
    assert run_main(main, folder, "--tta", "--json", "r.json", monkeypatch=monkeypatch) == 0
    written = json.loads(Path("r.json").read_text())
    model, _ = load_model(folder / "model.safetensors")
    digits = load_dataset("digits")
    plain = score(evaluate(model, digits.test.images, digits.normalize), digits.test.labels)
    x = digits.normalize(digits.test.images)
    with torch.no_grad():
        both = score((model(x) + model(x.flip(3))) / 2, digits.test.labels)
    assert written["accuracy"] == plain.accuracy
    assert written["tta"]["accuracy"] == both.accuracy
    assert written["tta"]["loss"] == pytest.approx(both.loss, rel=1e-4)
    assert "with the flipped view (TTA): " in capsys.readouterr().out


def test_evaluation_leaves_no_trace_and_uses_the_running_statistics():
    model = ResNet(Architecture((1,), 2, pool_kernel=32, dropout=0.5)).train()
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    all_logits = evaluate(model, images, lambda x: x / 255)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    one_by_one = torch.cat([evaluate(model, image[None], lambda x: x / 255) for image in images])
    torch.testing.assert_close(all_logits, one_by_one)
    assert model.training


def test_score_and_its_interval():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])
    result = score(logits, torch.tensor([0, 1, 1, 0]))
    assert (result.correct, result.total, result.accuracy) == (3, 4, 75.0)
    hit, miss = torch.tensor(2.0).exp().add(1).log() - 2, torch.tensor(2.0).exp().add(1).log()
    assert result.loss == pytest.approx(((3 * hit + miss) / 4).item())
    # Wilson's interval ends where the observed share lies 1.96 standard errors from the true one.
    for end in Score(0.0, 9484, 10_000).interval:
        p = end / 100
        assert abs(0.9484 - p) == pytest.approx(1.96 * (p * (1 - p) / 10_000) ** 0.5, rel=1e-4)
    assert Score(0.0, 0, 10).interval == pytest.approx((0.0, 27.75), abs=0.01)
    assert Score(0.0, 10, 10).interval == pytest.approx((72.25, 100.0), abs=0.01)


def test_confusion_counts_true_then_predicted():
    counts = confusion(torch.tensor([1, 1, 0, 2]), torch.tensor([0, 1, 0, 2]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_normalisation_comes_from_the_checkpoint(demo, monkeypatch, tmp_path, capsys):
    folder, _ = demo
    model, info = load_model(folder / "model.safetensors")
    assert run_main(main, folder, "--json", "a.json", monkeypatch=monkeypatch) == 0
    info = {k: v for k, v in info.items() if k != "architecture"}
    save_model(tmp_path / "shifted.safetensors", model, info | {"mean": [0.0, 0.1, 0.2]})
    line = ("shifted.safetensors", "--json", "b.json")
    assert run_main(main, *line, monkeypatch=monkeypatch) == 0
    losses = [json.loads(Path(name).read_text())["loss"] for name in ("a.json", "b.json")]
    assert losses[0] != losses[1]


def test_another_copy_of_the_data_is_noted(demo, monkeypatch, tmp_path, capsys):
    folder, _ = demo
    model, info = load_model(folder / "model.safetensors")
    info = {k: v for k, v in info.items() if k != "architecture"}
    save_model(tmp_path / "a.safetensors", model, info | {"data_fingerprint": "0" * 64})
    assert run_main(main, "a.safetensors", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().err == (
        "warning: this copy of digits is not the one that a.safetensors was trained with\n"
    )


def test_default_is_the_newest_run_else_a_released_model(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    with pytest.raises(InputError, match=r"checkpoint: .* holds no run and no released model"):
        find_checkpoint(folder)
    for i, name in enumerate(["tpsnet.safetensors", "fast.safetensors"]):
        (folder / name).touch()
        os.utime(folder / name, (i, i))
    assert find_checkpoint(folder) == folder / "fast.safetensors"
    for i, name in enumerate(["new", "newest", "old"]):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").touch()
        os.utime(folder / name / "model.safetensors", (i % 2, i % 2))
    assert find_checkpoint(folder) == folder / "newest" / "model.safetensors"
    assert find_checkpoint(folder / "old") == folder / "old" / "model.safetensors"
    of_a_group = folder / "group" / "run" / "model.safetensors"
    of_a_group.parent.mkdir(parents=True)
    of_a_group.touch()
    assert find_checkpoint(folder) == find_checkpoint(folder / "group") == of_a_group
    half_written = folder / "old" / f"{TEMPORARY}x" / "model.safetensors"
    half_written.parent.mkdir()
    half_written.touch()
    assert find_checkpoint(folder) == of_a_group
    assert find_checkpoint(folder / "old") == folder / "old" / "model.safetensors"


def test_figure_that_cannot_be_written_costs_no_result(demo, tmp_path, monkeypatch, capsys):
    path = shutil.copy(demo[0] / "model.safetensors", tmp_path)
    Path("model_calibration.png").mkdir()  # in the way of the figure
    assert run_main(main, path, "--json", "result.json", monkeypatch=monkeypatch) == 0
    captured = capsys.readouterr()
    assert re.fullmatch(
        r"warning: no figure: .*model_calibration.png: cannot be written .*\n", captured.err
    )
    assert captured.out.count("figure: ") == 2
    assert Path("model_confusion.png").exists() and Path("model_mistakes.png").exists()
    assert json.loads(Path("result.json").read_text())["total"] == 359


def test_what_a_terminal_would_obey_is_not_printed(demo, tmp_path, monkeypatch, capsys):
    model, info = load_model(demo[0] / "model.safetensors")
    del info["architecture"]
    save_model("evil.safetensors", model, info | {"preset": "\x1b[2Jevil", "epochs": "\x1b]0;\a"})
    assert run_main(main, "evil.safetensors", monkeypatch=monkeypatch) == 0
    assert run_main(main, "\x1b[2J.safetensors", monkeypatch=monkeypatch) == 2
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "?[2Jevil network" in captured.out


def test_title_with_a_dollar_sign_is_no_formula(demo, tmp_path, monkeypatch):
    folder = tmp_path / "$\\frac{1$"  # as a formula it could not be drawn
    folder.mkdir()
    path = shutil.copy(demo[0] / "model.safetensors", folder)
    assert run_main(main, path, monkeypatch=monkeypatch) == 0
    assert len(list(folder.glob("*.png"))) == 3


def test_calibration_error_is_the_mean_gap_between_confidence_and_accuracy():
    # Two classes: a confidence of p is a difference of log(p / (1 - p)) between the logits.
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.6, 0.6])
    logits = torch.stack([torch.logit(confidence.double()), torch.zeros(6)], dim=1)
    bins = calibrate(logits, torch.tensor([0, 0, 0, 1, 0, 1]))
    assert bins.count.sum() == 6
    assert bins.accuracy[bins.count > 0].tolist() == [50, 75]
    assert bins.confidence[bins.count > 0] == pytest.approx([60, 90])
    assert bins.mean_confidence == pytest.approx((4 * 90 + 2 * 60) / 6)
    assert bins.error == pytest.approx((4 * 15 + 2 * 10) / 6)
    certain = calibrate(torch.tensor([[100.0, 0.0], [0.0, 100.0]]), torch.tensor([0, 1]))
    assert certain.count.tolist() == [0] * (CALIBRATION_BINS - 1) + [2]
    assert certain.error == pytest.approx(0)


@pytest.mark.parametrize(("b", "c", "p"), [(0, 0, 1), (1, 1, 1), (0, 5, 2 / 32), (1, 7, 18 / 256)])
def test_mcnemar_is_the_exact_binomial_test_on_the_images_that_tell_apart(b, c, p):
    right, wrong = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    first = torch.stack([right] * 3 + [right] * b + [wrong] * c + [wrong] * 2)
    second = torch.stack([right] * 3 + [wrong] * b + [right] * c + [wrong] * 2)
    result = mcnemar(first, second, torch.zeros(len(first), dtype=torch.long))
    assert (result["only_first"], result["only_second"]) == (b, c)
    assert result["p"] == pytest.approx(p)


def test_comparison_counts_what_one_model_alone_gets_right(demo, monkeypatch, capsys):
    folder, _ = demo
    model, info = load_model(folder / "model.safetensors")
    info = {k: v for k, v in info.items() if k != "architecture"}
    model.linear.weight.data[3] = 0  # it never says 3
    save_model("blind.safetensors", model, info)
    line = (folder, "--compare", "blind.safetensors", "--json", "r.json")
    assert run_main(main, *line, monkeypatch=monkeypatch) == 0
    written = json.loads(Path("r.json").read_text())
    compared = written["compared_with"]
    assert compared["checkpoint"] == "blind.safetensors"
    assert compared["only_first"] > 20
    assert compared["p"] < 1e-4
    right = written["correct"] - compared["only_first"] + compared["only_second"]
    printed = capsys.readouterr().out
    second = printed[printed.index("\nblind.safetensors: ") :].splitlines()
    assert f"({right} of 359;" in second[1]
    assert f"first alone {compared['only_first']}, with the second" in second[2]
    assert second[3].startswith("McNemar's exact test: p = ")


def test_worst_mistakes_come_first_and_say_what_they_are():
    digits = load_dataset("digits")
    logits = 20 * torch.nn.functional.one_hot(digits.test.labels, 10).double()
    for image, confidence in ((3, 30.0), (5, 25.0)):
        logits[image, (digits.test.labels[image] + 1) % 10] = confidence
    images, captions = worst_mistakes(logits, digits)
    assert len(images) == len(captions) == 2
    assert (images[0] == digits.test.images[3].permute(1, 2, 0).numpy()).all()
    true = digits.test.labels[3].item()
    assert captions[0] == f"{true},\ntaken for {(true + 1) % 10} (100%)"
