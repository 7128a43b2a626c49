"""test.py: its numbers are those of the network and of their definitions."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run, run_main

import test as script
from config import PRESETS, Config
from data import APPROXIMATE_COPY, Normalize, check_data, load_dataset
from engine import checkpoint
from engine.checkpoint import find_checkpoint, load_model, save_model
from engine.evaluate import evaluate, score
from model import Architecture, model_cost
from test import (
    confusion_matrix,
    find_groups,
    mcnemar,
    print_per_class,
    worst_mistakes,
)
from utils import CHECKPOINTS, TEMPORARY, InputError, write_csv


@pytest.fixture
def variant(demo):
    """A function that saves the demo's network with other metadata."""
    model, info = load_model(demo[0] / "model.safetensors")
    del info["architecture"]

    def save(name, **changes):
        save_model(name, model, info | changes)
        return name

    return save


def result_of(*args, monkeypatch):
    assert run_main("test", *args, "--json", "result.json", monkeypatch=monkeypatch) == 0
    return json.loads(Path("result.json").read_text())


def test_nothing_is_downloaded_if_that_is_not_allowed(monkeypatch, capsys):
    line = ["fast", "--no-download", "--data-dir", "nowhere"]
    assert run_main("test", *line, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: data_dir: no CIFAR-10 in nowhere; allow its download, or put")


@pytest.mark.slow
def test_repeats_exactly_what_training_printed(demo):
    folder, output = demo
    result = run("test.py", folder, "--json", "result.json")
    assert (result.returncode, result.stderr) == (0, "")
    line = re.search(r"^test accuracy: .*$", output, re.MULTILINE)[0]
    assert line in result.stdout.splitlines()

    written = json.loads(Path("result.json").read_text())
    _, info = load_model(folder / "model.safetensors")
    assert written["accuracy"] == info["accuracy"]["test"] == 100 * written["correct"] / 359
    cost = model_cost(Architecture(**info["architecture"]))
    assert (written["num_params"], written["macs"]) == (cost.num_params, cost.macs)
    counts = torch.tensor(written["confusion"])
    assert counts.trace() == written["correct"]
    labels = load_dataset(Config(dataset="digits")).test.labels
    assert counts.sum(1).tolist() == labels.bincount().tolist()
    rows = re.findall(r"^(\d) +(\d+) +(\d+) +([\d.]+)%", result.stdout, re.MULTILINE)
    for i, (name, right, total, accuracy) in enumerate(rows):
        assert [int(name), int(right), int(total)] == [i, counts[i, i], counts[i].sum()]
        assert float(accuracy) == pytest.approx(100 * int(right) / int(total), abs=0.005)
    assert len(rows) == 10
    for name in ("confusion", "calibration", "mistakes"):
        assert (folder / f"model_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_flipped_view_is_reported_apart(demo, monkeypatch, capsys):
    written = result_of(demo[0], "--tta", monkeypatch=monkeypatch)
    model, _ = load_model(demo[0] / "model.safetensors")
    digits = load_dataset(Config(dataset="digits"))
    x = digits.normalize(digits.test.images / 255)
    with torch.no_grad():
        plain, both = model(x), (model(x) + model(x.flip(3))) / 2
    assert written["accuracy"] == score(plain, digits.test.labels).accuracy
    assert written["tta"]["accuracy"] == score(both, digits.test.labels).accuracy
    assert "with the flipped view (TTA): " in capsys.readouterr().out


def test_calibration_with_and_without_the_temperature(demo, variant, monkeypatch, capsys):
    written = result_of(variant("cold.safetensors", temperature=2.0), monkeypatch=monkeypatch)
    assert "with its temperature, 2.000: " in capsys.readouterr().out
    assert written["temperature"] == 2
    assert written["calibrated_mean_confidence"] < written["mean_confidence"]
    assert written["calibrated_error"] != written["calibration_error"]
    assert result_of(demo[0], monkeypatch=monkeypatch)["calibrated_error"] is None


def test_normalization_comes_from_the_checkpoint(demo, variant, monkeypatch):
    shifted = variant("shifted.safetensors", mean=[0.0, 0.1, 0.2])
    losses = [result_of(path, monkeypatch=monkeypatch)["loss"] for path in (demo[0], shifted)]
    assert losses[0] != losses[1]


def test_each_of_two_networks_gets_its_own_normalization(demo, variant, monkeypatch):
    mean, std = [0.9, 0.1, 0.2], [9.0, 1.0, 0.05]
    other = variant("other.safetensors", mean=mean, std=std)
    written = result_of(demo[0], "--compare", other, monkeypatch=monkeypatch)
    compared = written["compared_with"]
    right = written["correct"] - compared["only_first"] + compared["only_second"]
    test = load_dataset(Config(dataset="digits")).test
    expected = evaluate(load_model(other)[0], test, Normalize(mean, std))
    assert right == expected.correct != written["correct"]
    assert script.test(str(demo[0]), compare=other)["compared_with"] == compared  # in a notebook


def test_networks_of_other_classes_are_not_compared(variant, monkeypatch, capsys):
    plain = variant("plain.safetensors")
    other = variant("other.safetensors", class_names=list("9876543210"))
    assert run_main("test", plain, "--compare", other, monkeypatch=monkeypatch) == 2
    assert "other.safetensors has other classes than digits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"data_fingerprint": "0" * 64}, 0, "warning: this copy of digits is not the one that"),
        ({"class_names": list("abcdefghij")}, 2, "has other classes than digits"),
        ({"dataset": "imagenet"}, 2, "dataset: 'imagenet' is not one of"),
    ],
)
def test_foreign_data_is_noticed(changes, status, words, variant, monkeypatch, capsys):
    path = variant("a.safetensors", **changes)
    assert run_main("test", path, monkeypatch=monkeypatch) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("trained_with", "tested_with", "out", "err"),
    [
        ("ours", "ours", "", ""),
        ("ours", "official", "104 of the 60,000 images, 23 of them in the test set, differ", ""),
        ("official", "ours", "104 of the 60,000 images, 23 of them in the test set, differ", ""),
        ("official", "official", "", ""),
        ("ours", "third", "", "warning: this copy of cifar10 is not the one that"),
        ("third", "official", "", "warning: this copy of cifar10 is not the one that"),
        ("training images alone", "ours", "", ""),
    ],
)
def test_only_a_third_copy_of_cifar10_is_warned_about(trained_with, tested_with, out, err, capsys):
    digits = load_dataset(PRESETS["demo"])
    copies = {  # fingerprint, unofficial files
        "ours": (APPROXIMATE_COPY, ("test_batch.bin",)),
        "official": ("0" * 64, ()),
        "third": ("3" * 64, ("test_batch.bin",)),
        "training images alone": (load_dataset(PRESETS["demo"], test=False).fingerprint, ()),
    }
    found, unofficial = copies[tested_with]
    tested = replace(digits, name="cifar10", fingerprint=found, unofficial=unofficial)
    found, unofficial = copies[trained_with]
    info = {
        "class_names": list(digits.class_names),
        "data_fingerprint": found,
        "unofficial_data_files": list(unofficial),
    }
    check_data(Path("a.safetensors"), info, tested)
    for text, words in zip(capsys.readouterr(), (out, err), strict=True):
        assert text.count("\n") == bool(words)
        assert words in text


@pytest.mark.parametrize("path", sorted((ROOT / "checkpoints").glob("*.safetensors")))
def test_released_networks_were_trained_on_the_copy_that_is_known(path):
    assert load_model(path)[1]["data_fingerprint"] == APPROXIMATE_COPY


def test_escape_codes_of_a_checkpoint_are_not_printed(variant, monkeypatch, capsys):
    path = variant("evil.safetensors", preset="\x1b[2Jevil", epochs="\x1b]0;\a")
    assert run_main("test", path, monkeypatch=monkeypatch) == 0
    assert run_main("test", "\x1b[2J.safetensors", monkeypatch=monkeypatch) == 2
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "?[2Jevil network" in captured.out


def test_figure_that_cannot_be_written_is_a_warning(demo, monkeypatch, capsys):
    folder = Path("$\\frac{1$")  # no formula, although Matplotlib would take it for one
    folder.mkdir()
    path = shutil.copy(demo[0] / "model.safetensors", folder)
    (folder / "model_calibration.png").mkdir()  # in the way of the figure
    assert result_of(path, monkeypatch=monkeypatch)["total"] == 359
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: no figure: ")
    assert captured.out.count("figure: ") == 2


def test_comparison_counts_what_one_network_alone_gets_right(demo, monkeypatch, capsys):
    model, info = load_model(demo[0] / "model.safetensors")
    del info["architecture"]
    model.linear.weight.data[3] = 0  # it never answers 3
    save_model("blind.safetensors", model, info)
    written = result_of(demo[0], "--compare", "blind.safetensors", monkeypatch=monkeypatch)
    compared = written["compared_with"]
    assert compared["only_first"] > 20
    assert compared["p"] < 1e-4
    right = written["correct"] - compared["only_first"] + compared["only_second"]
    out = capsys.readouterr().out
    assert re.search(rf"^blind.safetensors: .*\({right} of 359;", out, re.MULTILINE)
    assert f"first alone {compared['only_first']}, with the second" in out


@pytest.mark.parametrize(("b", "c", "p"), [(0, 0, 1), (1, 1, 1), (0, 5, 2 / 32), (1, 7, 18 / 256)])
def test_mcnemar_is_the_exact_binomial_test_on_the_images_that_differ(b, c, p):
    right, wrong = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    first = torch.stack([right] * 3 + [right] * b + [wrong] * c + [wrong] * 2)
    second = torch.stack([right] * 3 + [wrong] * b + [right] * c + [wrong] * 2)
    result = mcnemar(first, second, torch.zeros(len(first), dtype=torch.long))
    assert (result["only_first"], result["only_second"]) == (b, c)
    assert result["p"] == pytest.approx(p)


def test_confusion_matrix_counts_true_then_predicted():
    logits = torch.eye(4)[[1, 1, 0, 2]]
    counts = confusion_matrix(logits, torch.tensor([0, 1, 0, 2]))
    assert counts.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_worst_mistakes_come_first_with_their_captions():
    digits = load_dataset(Config(dataset="digits"))
    logits = 20 * torch.nn.functional.one_hot(digits.test.labels, 10).double()
    for image, confidence in ((5, 25.0), (3, 30.0)):
        logits[image, (digits.test.labels[image] + 1) % 10] = confidence
    images, captions = worst_mistakes(logits, digits)
    assert len(images) == len(captions) == 2
    assert (images[0] == digits.test.images[3].permute(1, 2, 0).numpy()).all()
    true = digits.test.labels[3].item()
    assert captions[0] == f"{true},\ntaken for {(true + 1) % 10} (100%)"


def make(*names, age=0):
    """Empty files, last changed so many seconds after 1970."""
    for path in map(Path, names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (age, age))


def group(demo, name, accuracies, test=90.0, lr=0.1, **changes):
    """Save the runs NAME-0, NAME-1, ... with these validation accuracies."""
    model, info = load_model(demo[0] / "model.safetensors")
    del info["architecture"]
    for seed, val in enumerate(accuracies):
        accuracy = {"val": val, "test": test and test + seed}
        config = info["config"] | {"seed": seed, "lr": lr}
        run = Path(f"checkpoints/{name}-{seed}")
        metadata = info | {"config": config, "accuracy": accuracy, "dataset": "cifar10"} | changes
        save_model(run / "model.safetensors", model, metadata)
        row = {"train_loss": 0.1, "train_accuracy": 80.0, "val_loss": val, "val_accuracy": val}
        write_csv(run / "log.csv", [{"epoch": 1} | row])


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        ([91.0, 92.5, 92.0], [90.0, 90.2], "validation accuracy"),
        ([91.0, 92.0, 93.0], [None, None], "test accuracy"),
    ],
)
def test_groups_of_seeds_are_compared_without_the_data(
    first, second, kind, demo, monkeypatch, capsys
):
    group(demo, "A", first)
    group(demo, "x/B", second)
    written = result_of("A", "--compare", "x/B", "--no-download", monkeypatch=monkeypatch)
    used = [first, second] if None not in second else [[90, 91, 92], [90, 91]]
    assert [part["accuracies"] for part in written["groups"]] == used
    assert written["accuracy"] == kind
    assert written["difference"] == pytest.approx(np.mean(used[0]) - np.mean(used[1]))
    low, high = written["interval"]
    assert low <= written["difference"] <= high
    captured = capsys.readouterr()
    assert f"A, {len(first)} seeds: {kind} {np.mean(used[0]):.2f} ± " in captured.out
    assert f"A - x/B: {written['difference']:+.2f} points; 95% interval {low:+.2f}" in captured.out
    assert "figure: checkpoints/A_vs_B.png" in captured.out
    assert not captured.err


@pytest.mark.parametrize(
    ("changes", "options", "status", "words"),
    [
        ({"epochs": 0}, [], 2, "checkpoint: the run in checkpoints/B-0 is not finished; go on"),
        (
            {"accuracies": [None, None], "test": None},
            *([], 2, "checkpoint: the run in checkpoints/B-0 is not finished; go on"),
        ),
        ({"class_names": list("abcdefghij")}, [], 2, "compare: B has other classes than A; name"),
        ({"accuracies": [90.0]}, [], 2, "compare: A stands for 2 runs, but there are no two"),
        ({}, ["--tta"], 2, "tta: groups are compared by their runs' accuracies; leave it out"),
        ({}, ["--json", "."], 2, "json: . is a folder; name a file"),
        ({"data_fingerprint": "0" * 64}, [], 0, "warning: the two groups were not trained and"),
    ],
)
def test_groups_that_cannot_be_compared(changes, options, status, words, demo, monkeypatch, capsys):
    group(demo, "A", [90.0, 91.0])
    group(demo, "B", **{"accuracies": [90.0, 91.0]} | changes)
    assert run_main("test", "A", "--compare", "B", *options, monkeypatch=monkeypatch) == status
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert words in line
    assert bool(captured.out) == (status == 0)


def test_groups_without_test_images_are_compared_by_validation(demo, monkeypatch, capsys):
    """As those of a study, which reads no test image."""
    group(demo, "A", [90.0, 91.0], test=None)
    group(demo, "B", [90.0, 91.0])
    written = result_of("A", "--compare", "B", monkeypatch=monkeypatch)
    assert (written["accuracy"], written["difference"]) == ("validation accuracy", 0)
    group(demo, "B", [None, None])
    assert run_main("test", "A", "--compare", "B", monkeypatch=monkeypatch) == 2
    assert "error: compare: A and B have no accuracy in common" in capsys.readouterr().err


def test_seeds_that_do_not_differ_give_no_interval(demo, monkeypatch, capsys):
    group(demo, "A", [91.0, 91.0])
    group(demo, "B", [90.0, 90.0])
    written = result_of("A", "--compare", "B", monkeypatch=monkeypatch)
    assert (written["interval"], written["groups"][0]["interval"]) == (None, None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(
        "91.00 ± 0.00% (standard deviation); no interval of the mean, since all are equal"
    )
    assert lines[2] == "A - B: +1.00 points; no interval, since the runs of each group are equal"


def test_runs_of_the_same_seed_are_no_group(demo, monkeypatch, capsys):
    group(demo, "A", [90.0, 91.0, 92.0])
    group(demo, "B", [90.0, 91.0])
    shutil.copytree("checkpoints/B-1", "checkpoints/B-2")
    assert run_main("test", "A", "--compare", "B", monkeypatch=monkeypatch) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: seed: 1 in checkpoints/B-2 and in checkpoints/B-1; the")
    assert not captured.out


def test_a_run_that_is_older_than_a_constant_is_part_of_a_group(demo, monkeypatch):
    group(demo, "A", [90.0, 91.0])
    group(demo, "B", [90.0, 91.0])
    path = Path("checkpoints/B-0/model.safetensors")
    model, info = load_model(path)
    assert info["config"].pop("channels") == []
    del info["architecture"]
    save_model(path, model, info)
    assert result_of("A", "--compare", "B", monkeypatch=monkeypatch)["difference"] == 0


@pytest.mark.parametrize(
    "content", [b"epoch,val_loss\n1\n", "epoch,val_loss\n1,2\n".encode("utf-16")]
)
def test_a_log_that_was_spoilt_costs_the_figure_alone(content, demo, monkeypatch, capsys):
    group(demo, "A", [90.0, 91.0])
    group(demo, "B", [90.0, 91.0])
    Path("checkpoints/B-1/log.csv").write_bytes(content)
    assert run_main("test", "A", "--compare", "B", monkeypatch=monkeypatch) == 0
    captured = capsys.readouterr()
    assert "A - B: +0.00 points; 95% interval" in captured.out
    assert captured.err.startswith("warning: no figure: ")


def test_run_of_another_recipe_is_no_part_of_a_group(demo, monkeypatch, capsys):
    group(demo, "B", [90.0, 91.0, 92.0], lr=0.2)
    group(demo, "B", [90.0, 91.0])
    group(demo, "A", [90.0, 91.0])
    assert run_main("test", "A", "--compare", "B", monkeypatch=monkeypatch) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: lr: 0.2 in checkpoints/B-2, but 0.1 in checkpoints/B-0;")
    assert not captured.out


def test_names_of_two_groups_stand_for_their_runs():
    names = [Path("A"), Path("B")]
    make(*(f"checkpoints/A-{n}/model.safetensors" for n in ("0", "2", "10", "old", "2-old")))
    make("checkpoints/A/model.safetensors", "checkpoints/B.safetensors", "B-7/last.pt", "B-8/a")
    assert find_groups(names) is None  # B is one network
    make("checkpoints/B-9/last.pt", "checkpoints/B-8/model.safetensors")
    runs = [[Path(f"checkpoints/A-{n}") for n in (0, 2, 10)]]
    runs.append([Path("checkpoints/B-8"), Path("checkpoints/B-9")])
    assert find_groups(names) == runs
    assert find_groups([Path("checkpoints", name) for name in names]) == runs
    assert find_groups([Path("A-0"), Path("A-2")]) is None


def test_folder_stands_for_its_newest_run_else_a_released_network():
    folder = Path("runs")
    folder.mkdir()
    with pytest.raises(InputError, match=r"checkpoint: .* holds no run and no released model"):
        find_checkpoint(folder)
    for nothing in ("", ".", "runs/.."):  # no names of released networks
        with pytest.raises(InputError, match=r"checkpoint: \S+ holds no run and no released"):
            find_checkpoint(Path(nothing))
    make("runs/tpsnet.safetensors", "runs/fast.safetensors")
    assert find_checkpoint(folder) == folder / "fast.safetensors"
    names = ("group/run", "newest", "old", f"old/{TEMPORARY}half-written")
    for name, age in zip(names, (100, 200, 98, 300), strict=True):
        make(folder / name / "model.safetensors", age=age)
    assert find_checkpoint(folder) == folder / "newest" / "model.safetensors"
    assert find_checkpoint(folder / "group") == folder / "group/run/model.safetensors"
    assert find_checkpoint(folder / "old") == folder / "old/model.safetensors"


def test_default_and_names_are_also_found_beside_the_scripts(monkeypatch):
    beside = Path("repository").resolve()
    monkeypatch.setattr(checkpoint, "RELEASED", beside)
    make(beside / "best.safetensors", beside / "fast.safetensors")
    assert find_checkpoint(CHECKPOINTS) == beside / "best.safetensors"
    Path("fast").mkdir()  # of something else
    assert find_checkpoint(Path("fast")) == beside / "fast.safetensors"
    make("checkpoints/fast.safetensors")
    for name in ("fast", "fast.safetensors", "checkpoints/fast", "checkpoints"):
        assert find_checkpoint(Path(name)) == Path("checkpoints/fast.safetensors")
    make("checkpoints/fast/model.safetensors")
    assert find_checkpoint(Path("fast")) == Path("checkpoints/fast/model.safetensors")
    for name in ("faster", "checkpoints/best.safetensors"):  # for the line that it does not exist
        assert find_checkpoint(Path(name)) == Path(name)


@pytest.mark.parametrize("name", ["try", "checkpoints", "checkpoints/try/model.safetensors"])
def test_run_that_has_saved_no_network_is_not_tested(name, monkeypatch, capsys):
    make("checkpoints/try/last.pt", "checkpoints/try/config.json")
    assert run_main("test", name, monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err == (
        "error: checkpoint: the run in checkpoints/try has saved no network yet; go on with it by"
        " `python train.py --config checkpoints/try/config.json --resume`, or name another\n"
    )
    make("checkpoints/fast.safetensors")
    assert find_checkpoint(CHECKPOINTS) == Path("checkpoints/fast.safetensors")


def test_command_in_a_message_is_quoted_where_a_name_has_blanks():
    make("my runs/try/last.pt")
    with pytest.raises(InputError, match=r"--config 'my runs/try/config\.json' --resume`"):
        find_checkpoint(Path("my runs/try"))


def test_missing_file_stands_for_no_other_network():
    make("checkpoints/group/run/model.safetensors")
    for name in ("model.safetensors", "checkpoints/group/model.safetensors"):
        assert find_checkpoint(Path(name)) == Path(name)


def test_each_class_is_listed_with_what_it_is_most_often_taken_for(capsys):
    print_per_class(np.array([[5, 0, 3], [1, 7, 0], [0, 0, 0]]), ("cat", "dog", "eel"))
    rows = [line.split() for line in capsys.readouterr().out.strip().splitlines()[1:]]
    assert rows == [
        ["cat", "5", "8", "62.50%", "eel", "(3)"],
        ["dog", "7", "8", "87.50%", "cat", "(1)"],
        ["eel", "0", "0", "0.00%", "-"],
    ]


def test_of_many_classes_the_least_accurate_are_listed(capsys):
    counts = np.diag(np.arange(100)) + 1
    print_per_class(counts[::-1, ::-1], tuple(f"class-{i}" for i in range(100)))
    title, _, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert title == "the 20 of 100 classes with the lowest accuracies:"
    assert [row.split()[0] for row in rows] == [f"class-{i}" for i in range(99, 79, -1)]
