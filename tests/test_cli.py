"""Mistakes that a user can make, help, and how a script starts, is stopped and ends.

A mistake is one line that names the field, its value and the remedy; status 2; nothing is written.
"""

import ast
import errno
import fcntl
import importlib
import inspect
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, command, make_pictures, run, run_main

import config as config_module
import export
import predict
import utils
from config import (
    CLAIMS,
    GROUPS,
    PRESETS,
    Config,
    check_batches,
    check_config,
    load_config,
    parse_command_line,
    record,
)
from engine.distributed import init_processes
from engine.run import lock_folder
from engine.script import plain_arguments
from utils import DivergenceError, InputError, SearchError, StoppedError, write_json

# a command line for each check, and words that the line must contain
MISTAKES = [
    # bounds
    ("demo --c1 0", ["c1", "0", "from 1 to 4096"]),
    ("demo --num-blocks 1 1000 1", ["num_blocks", "1000", "from 1 to 500"]),
    ("demo --epochs 0", ["epochs", "0", "at least 1"]),
    ("demo --lr nan", ["lr", "nan", "from 0 to 1000"]),
    # the network
    ("demo --num-blocks", ["num_blocks", "()", "1 to 4 stages"]),
    ("demo --conv-kernel 3 2 3", ["conv_kernel", "2", "even", "such as 1"]),
    ("demo --skip-kernel 1 1 1 1", ["skip_kernel", "4 sizes", "3 stages"]),
    ("demo --stem whitening", ["c1", "8", "use 24"]),
    ("demo --channels 8 16", ["channels", "2 numbers", "3 stages", "one per stage"]),
    ("best --channels 64 64 64 --width=1", ["width", "1 beside channels", "leave one"]),
    ("demo --num-blocks 1 1 1 1", ["pool_kernel", "8", "4x4", "use 1 to 4"]),
    ("--c1 17", ["max_params", "5,598,195", "5,000,000", "--c1 16 or less, --width 1, or raise"]),
    ("demo --max-params 76817", ["76,818", "76,817", "use --c1 7 or less, --width 1, or raise"]),
    ("fast --width 5", ["max_params", "use --width 4 or less, or raise --max-params"]),
    ("--channels 400 400 400", ["max_params", "use fewer blocks or channels, or raise"]),
    ("demo --max-params 9", ["max_params", "use fewer blocks or channels, or raise --max-params"]),
    # the data
    ("demo --flip random", ["flip", "--flip none"]),
    ("best --dataset digits", ["--flip none --crop-padding 0 --no-auto-augment --no-trivial"]),
    ("mine --data-dir ~nobody-of-that-name/x", ["data_dir: ~nobody-of-that-name/x does not exist"]),
    ("demo --num-classes 7", ["num_classes", "follows from the data", "leave --num-classes out"]),
    ("demo --num_classes=7", ["num_classes", "follows from the data"]),
    ("mine --dataset cifar10", ["data_dir: photos is for your own", "add --data-dir data"]),
    ("demo --val-size 5", ["val_size", "5", "use 0, or 10 to 1,428"]),
    ("demo --train-size 1439", ["train_size", "1439", "or 10 to 1,428"]),
    ("demo --batch-size 1439", ["batch_size", "1439", "1,438", "use 1 to 1,438"]),
    (
        "demo --num-blocks 1 1 1 1 --c1 24 --width 1 --stem whitening --downsample pool"
        " --pool-kernel 1 --batch-size 3",
        ["batch_size", "3", "one image", "one pixel"],
    ),
    ("--no-download --data-dir x/y", ["data_dir", "x/y", "cifar-10-python.tar.gz", "demo"]),
    (
        "model1 --pool-kernel 4 --small-fraction 0.5 --small-size 24",
        ["small_size", "24x24", "to 1x1", "32x32 to 2x2", "small_fraction of 0"],
    ),
    # the optimization
    ("best --momentum 0", ["momentum", "0", "--no-nesterov"]),
    ("demo --warmup-epochs 15", ["warmup_epochs", "15 of 15", "use 0 to 14"]),
    ("small --init nothing", ["init", "nothing does not exist"]),
    (
        "small --init fast",
        ["init: fast has channels (96, 192, 384), and this run channels (48, 96, 192); give it"],
    ),
    # the run
    ("demo --name ../elsewhere", ["name", "'../elsewhere'", "letters, digits"]),
    ("demo --name a/b/c", ["name", "'a/b/c'", "GROUP/NAME"]),
    (f"demo --name {'a' * 101}", ["name", "aaa", "at most 100 letters"]),
    ("demo --seeds 2 --seed 4294967295", ["seed", "4294967296", "to 4294967295"]),
    ("demo --resume --overwrite", ["overwrite", "--resume", "use one"]),
    ("demo --resume x/last.pt", ["'x/last.pt'", "takes no value; repeat the command", "alone"]),
    ("--resume=./last.pt", ["resume", "`python train.py --config config.json --resume` goes on"]),
    # a file of constants
    ("--config nothing.json", ["config", "'nothing.json'", "best.json"]),
    ("--config list.json", ["config", "list.json", "config.json that train.py wrote"]),
    ("--config half.json", ["config", "half.json", "config.json that train.py wrote"]),
    ("--config deep.json", ["config", "deep.json", "nests too deep"]),
    ("--config foreign.json", ["config", "foreign.json", "depth"]),
    ("--config escape.json -h", ["config", "control characters in its data_dir", "best.json"]),
    ("--config wide.json", ["c1", "'wide'", "from 1 to 4096"]),
    ("tpsnet --config wide.json", ["config", "'wide.json' beside the preset tpsnet; leave one"]),
]
FILES = {
    "config": "{}",
    "list": "[1]",
    "half": '{"c1":',
    "deep": 99_999 * "[",
    "foreign": '{"depth": 3}',
    "escape": r'{"data_dir": "\u001b[31m"}',
    "wide": '{"c1": "wide"}',
}


def check_refusal(line, words, monkeypatch, capsys):
    """Run train.py in this process; nothing may be written but one line on stderr."""
    before = written()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be a second line
        assert run_main("train", *line.split(), monkeypatch=monkeypatch) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err
    assert written() == before


def written():
    """All files with their times, but for locks, which some versions of filelock touch."""
    paths = (path for path in Path().rglob("*") if path.name != "run.lock")
    return {path: path.lstat().st_mtime_ns for path in paths}


@pytest.mark.parametrize(("line", "words"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_mistake_is_one_line(line, words, monkeypatch, capsys):
    for name, text in FILES.items():
        Path(f"{name}.json").write_text(text)
    check_refusal(line, words, monkeypatch, capsys)


def test_constants_of_a_folder_with_an_unusual_space_in_its_name_are_read():
    config = replace(PRESETS["mine"], data_dir="my\u3000photos\u00a0")
    write_json(Path("config.json"), record(config))
    assert load_config("config.json") == config


NO_FOLDER = "name a folder that holds a folder of pictures for each class"
NO_CLASSES = "holds no class folder; put a folder of pictures for each class there"
FILE = "is a file where a folder should be"
DIVIDED = "put the class folders into folders named train and test (or val)"
TOO_FEW = "put at least 2 there, or remove the folder"
BAD_FOLDERS = {  # what is there: pictures of each class below photos/, or another thing; the line
    "missing": ({}, f"photos does not exist; {NO_FOLDER}"),
    "a file": (lambda: Path("photos").touch(), f"photos {FILE}; {NO_FOLDER}"),
    "nothing in it": (lambda: Path("photos").mkdir(), f"photos {NO_CLASSES}"),
    "pictures alone": ({".": 3}, f"photos {NO_CLASSES}"),
    "hidden": ({".cat": 3, ".dog": 3}, f"photos {NO_CLASSES}"),
    "one class": ({"cat": 3}, "photos holds one class folder alone, cat; add another class"),
    "empty class": (
        {"cat": 3, "dog": 0},
        f"photos/dog holds no picture that can be read; {TOO_FEW}",
    ),
    "one picture": ({"cat": 3, "dog": 1}, f"photos/dog holds one picture alone; {TOO_FEW}"),
    "too many": (
        {f"{i}": 0 for i in range(1001)},
        "photos holds 1,001 class folders; use 2 to 1,000",
    ),
    "train is a file": (
        lambda: (make_pictures("photos", cat=2, dog=2), Path("photos/train").touch()),
        f"photos/train {FILE}; unpack or remove it",
    ),
    "one class to train on": (
        {"train/cat": 3},
        "photos/train holds one class folder alone, cat; add another class",
    ),
    "no class to train on": (
        lambda: (Path("photos/train").mkdir(parents=True), make_pictures("photos/test", cat=2)),
        f"photos/train {NO_CLASSES}",
    ),
    "untested class": (
        {"train/cat": 2, "train/dog": 2, "test/cat": 2},
        "photos/test holds one class folder alone, cat; add another class",
    ),
    "link to nothing": (
        lambda: (make_pictures("photos", cat=2, dog=2), Path("photos/eel").symlink_to("nothing")),
        "photos/eel is a link to nothing; restore what it leads to, or remove it",
    ),
    "unknown class": (
        {"train/a": 2, "train/b": 2, "test/a": 2, "test/b": 2, "test/eel": 2},
        "photos/test/eel has no counterpart in photos/train; both must have the same classes",
    ),
    "empty test class": (
        {"train/a": 2, "train/b": 2, "val/a": 2, "val/b": 0},
        "photos/val/b holds no picture that can be read; put at least 1 there, or remove the"
        " folder",
    ),
    "beside train and test": (
        {"train/a": 2, "test/a": 2, "more": 2},
        "photos holds more beside train and test; move it into train, or out of there",
    ),
    "two test folders": (
        {"train/a": 2, "val/a": 2, "Test/a": 2},
        "photos holds Test beside train and val; move it into train, or out of there",
    ),
    "an empty class": (
        {"train": 0, "plane": 2},
        "photos/train holds no picture that can be read; put at least 2 there, or remove the"
        " folder",
    ),
    "beside a train folder": (
        {"train/cat": 2, "train/dog": 2, "dev/cat": 2, "dev/dog": 2},
        "photos holds dev beside train, whose pictures are in folders; name dev test, or move it"
        " out of there; or, if train is a class, put its pictures into train itself",
    ),
    "a test beside the classes": (
        {"cat": 2, "dog": 2, "test/x": 2},
        "photos holds test beside cat; put the class folders into a folder named train, or move"
        " test out of there",
    ),
    "nothing to train on": ({"test/a": 2, "test/b": 2}, f"photos holds test; {DIVIDED}"),
    "other names": (
        {"training/a": 2, "Validation/a": 2},
        f"photos holds Validation and training; {DIVIDED}",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_folder_that_cannot_be_trained_on_is_one_line(content, message, monkeypatch, capsys):
    make_pictures("photos", **content) if isinstance(content, dict) else content()
    line = "demo --dataset folder --data-dir photos --batch-size 2 --name mine"
    check_refusal(line, [f"data_dir: {message.replace('/', os.sep)}"], monkeypatch, capsys)


def test_the_page_about_own_pictures_quotes_these_lines():
    page = (ROOT / "docs" / "own-pictures.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\|[^|]*\| `data_dir: ([^|]*)` \|$", page, re.M)
    assert len(quoted) > 8
    for line in quoted:
        assert any(found.startswith(line.removesuffix("...")) for _, found in BAD_FOLDERS.values())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize("name", ["two\nlines", os.fsdecode(b"\xff")])
def test_class_that_cannot_be_printed_is_refused(name, monkeypatch, capsys):
    make_pictures("photos", cat=2, **{name: 2})
    words = [f"class folder {name!r}", "control characters or is no UTF-8; rename it"]
    check_refusal("mine --name x", words, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("resnet50", ["resnet50", "tpsnet", "demo"]),
        ("--learning-rate 0.1", ["--learning-rate", "--help"]),
        ("demo model1", ["model1"]),
        ("demo --lr", ["--lr"]),
        ("demo --epochs 2.5", ["--epochs", "2.5"]),
        ("demo --schedule step", ["--schedule", "step", "cosine_restarts"]),
    ],
)
def test_misspelled_option_is_explained_by_the_parser(line, words, monkeypatch, capsys):
    assert run_main("train", *line.split(), monkeypatch=monkeypatch) == 2
    captured = capsys.readouterr()
    assert all(word in captured.out + captured.err for word in words)
    assert "Traceback" not in captured.err
    assert written() == {}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "x"}, ["RANK", "'x'"]),
        ({"LOCAL_RANK": "-1"}, ["LOCAL_RANK", "'-1'"]),
        ({"WORLD_SIZE": "2"}, ["MASTER_PORT"]),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "29511"}, ["RANK"]),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "29511", "RANK": "0"}, ["MASTER_ADDR"]),
    ],
)
def test_environment_that_is_not_torchruns(environment, words, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    words = [*words, "in the environment", "torchrun"]
    check_refusal("demo --wandb disabled", words, monkeypatch, capsys)


def test_more_processes_than_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    words = ["LOCAL_WORLD_SIZE: 3 processes for 2 GPUs", "--nproc-per-node 2"]
    check_refusal("demo --wandb disabled", words, monkeypatch, capsys)


def test_the_cpu_can_be_chosen(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TPSNET_DEVICE", "cpu")
    assert init_processes() == torch.device("cpu")
    monkeypatch.setenv("TPSNET_DEVICE", "gpu")
    words = ["TPSNET_DEVICE: 'gpu' in the environment; use cpu, or unset it"]
    check_refusal("demo --wandb disabled", words, monkeypatch, capsys)


def test_run_that_is_there_or_in_use_or_cannot_be_made(monkeypatch, capsys):
    with lock_folder(Path("checkpoints/demo")):
        words = ["name", "another process", "checkpoints/demo", "another --name"]
        check_refusal("demo --wandb disabled", words, monkeypatch, capsys)
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")  # by srun, without torchrun
        words = ["another of srun's 4 tasks", "--ntasks=1, or torchrun"]
        check_refusal("demo --wandb disabled", words, monkeypatch, capsys)
    Path("checkpoints/demo/log.csv").write_text("mine")
    words = ["name", "checkpoints/demo", "log.csv", "--resume", "--overwrite", "another --name"]
    check_refusal("demo", words, monkeypatch, capsys)
    shutil.rmtree("checkpoints")
    Path("checkpoints").write_text("a file")
    words = ["name", "checkpoints/demo", "cannot be written", "TPSNET_CHECKPOINTS"]
    check_refusal("demo --wandb disabled", words, monkeypatch, capsys)


def test_folder_of_all_runs_may_be_in_the_home_directory(new_imports, monkeypatch):
    """A shell expands ~, but neither Docker nor a file of settings does."""
    monkeypatch.setenv("TPSNET_CHECKPOINTS", "~/runs")
    folder = importlib.import_module("utils").CHECKPOINTS
    assert folder == Path.home() / "runs"


def test_folder_behind_a_link_to_nothing():
    Path("checkpoints").symlink_to("/mnt/gone")
    words = r"^name: .* checkpoints is a link to /mnt/gone, which is missing; create that"
    with pytest.raises(InputError, match=words), lock_folder(Path("checkpoints/demo")):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_file_system_without_locks(number, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    words = rf"^name: .* cannot be written and locked \({os.strerror(number)}\); set the environ"
    with pytest.raises(InputError, match=words), lock_folder(Path("checkpoints/demo")):
        pass
    assert written().keys() == {Path("checkpoints")}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset", "mnist"),  # a choice
        ("epochs", "30"),  # an integer
        ("epochs", True),
        ("lr", "0.1"),  # a number
        ("lr", None),
        ("num_blocks", 3),  # a list
        ("num_blocks", "333"),
        ("conv_kernel", 3.0),  # an integer or a list
        ("bfloat16", 1),  # a bool
        ("data_dir", None),  # a text
        ("name", None),
    ],
)
def test_bad_value_given_in_python(field, value):
    """What the command line's types would catch, other scripts can still pass to train()."""
    with pytest.raises(InputError, match=f"^{field}: ") as error:
        check_config(replace(PRESETS["model1"], **{field: value}))
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("pipe", "is a link, pipe or device"),
        ("link", "is a link, pipe or device"),
        ("folder", "is a folder"),
        ("photo.jpg", "is there, and no .json file; name another"),
        ("photo.jpg/new.json", "photo.jpg is no folder that can be written to"),
        ("nothing/yet/new.json", ""),
        ("old.JSON", ""),
        ("", ""),
    ],
)
def test_output_that_cannot_be_written_or_must_not_be_replaced(path, problem):
    os.mkfifo("pipe")
    Path("link").symlink_to("other")
    Path("folder").mkdir()
    for name in ("photo.jpg", "old.JSON"):
        Path(name).touch()
    with pytest.raises(InputError, match=f"^json: .*{problem}") if problem else nullcontext():
        utils.check_output("json", path)


def test_two_outputs_are_two_files(monkeypatch, capsys):
    args = ("photo.jpg", "--json", "out", "--csv", "./out")
    assert run_main("predict", *args, monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err == "error: csv: ./out is the file of --json too; name another\n"


# ---------------------------------------------------------------- what is understood


def test_every_preset_is_sound_and_has_a_claim():
    assert PRESETS.keys() == CLAIMS.keys()
    for config in PRESETS.values():
        check_config(config)


@pytest.mark.parametrize(
    ("batch_size", "num_images", "processes", "words"),
    [
        (8, 7, 1, "8 for 7 training images and 1 process; use 1 to 7"),
        (2, 7, 3, "2 for 7 training images and 3 processes; use 3 to 7"),
        (8, 17, 2, "8 leaves a last batch of 1 for 2 processes; use another"),
    ],
)
def test_batches_that_cannot_be_divided_are_refused(batch_size, num_images, processes, words):
    config = replace(TINY, batch_size=batch_size)
    with pytest.raises(InputError, match=f"^batch_size: {words}$"):
        check_batches(config, num_images, processes)
    check_batches(replace(config, batch_size=4), 4 * num_images, processes)


def test_command_line_overrides_a_preset_or_a_file():
    line = "model1 --epochs 30 --lr 0.1 --num-blocks [1,2] --conv-kernel 3 5 --flip none --name try"
    changes = {"epochs": 30, "lr": 0.1, "num_blocks": (1, 2), "conv_kernel": (3, 5)}
    expected = replace(PRESETS["model1"], **changes, flip="none", name="try")
    assert parse_command_line(line.split()) == expected
    assert parse_command_line([]) == PRESETS["tpsnet"]
    constants = json.dumps(asdict(replace(TINY, c1=5)))
    Path("best.json").write_text(constants, encoding="utf-8-sig")  # with a byte order mark
    assert load_config("best.json") == replace(TINY, c1=5)
    for line in ("--num-blocks 2 2 demo --name fast", "--name fast --num-blocks [2, 2] demo"):
        expected = replace(PRESETS["demo"], num_blocks=(2, 2), name="fast")
        assert parse_command_line(line.split()) == expected
    for line in ("--config best.json --epochs 300", "--epochs=300 --config=best.json"):
        assert parse_command_line(line.split()) == replace(TINY, c1=5, epochs=300)


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("--num-blocks [1,2,3]", "--num-blocks 1 2 3"),
        ("--num-blocks '[1, 2, 3]' demo", "--num-blocks 1 2 3 demo"),
        ("--num-blocks [1, 2, 3] --lr 1", "--num-blocks 1 2 3 --lr 1"),
        ("--num_blocks=(1,2,3)", "--num_blocks 1 2 3"),
        ("--conv-kernel=1,2 --skip-kernel 1, 2", "--conv-kernel 1 2 --skip-kernel 1 2"),
        ("--name [a,b] --data-dir=c,d True", "--name [a,b] --data-dir=c,d True"),
        ("--compile True demo true", "--compile demo true"),
        ("--compile=true --download=False", "--compile --no-download"),
        ("--resume false --bfloat16", "--no-resume --bfloat16"),
        ("--local-rank=1 demo --local_rank=0", "demo"),  # python -m torch.distributed.launch
    ],
)
def test_other_forms_of_values_are_taken(line, meant):
    assert plain_arguments(shlex.split(line), Config) == shlex.split(meant)


def test_checkpoint_may_be_named_as_an_option():
    options = ["--tta", "false", "--format", "onnx,pte"]
    for named in (["--checkpoint", "a,b"], ["--checkpoint=a,b"]):
        plain = plain_arguments([*options, *named], export.export)
        assert plain == ["a,b", "--tta", "false", "--format", "onnx", "pte"]
    assert plain_arguments(["--checkpoint"], export.export) == ["--checkpoint"]  # for the parser
    assert plain_arguments(["a,b", "--tta", "True"], predict.predict) == ["a,b", "--tta"]


def test_help_lists_the_preset_the_file_and_every_constant_in_groups(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert run_main("train", "-h", monkeypatch=monkeypatch) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines()[1:])) <= 80  # all but the usage
    words = " ".join(text.replace("│", " ").split())
    assert all(f"{name} {claim}" in words for name, claim in CLAIMS.items())
    headings = re.findall(r"^\W*(\w+) options\b\W*$", text, re.MULTILINE)
    assert headings == ["network", "data", "optimization", "arithmetic", "run"]
    assert "--config" in words and "{tpsnet,model1" in words
    sources = "".join(inspect.getsource(group) for group in GROUPS)
    explained = re.findall(r'    (\w+): .*\n    """(.*)"""', sources)
    assert {name for name, _ in explained} == {field.name for field in fields(Config)}
    for name, explanation in explained:
        assert f"--{name.replace('_', '-')}" in words
        assert explanation in words
    assert "defaults below are those of demo" in help_of("demo", monkeypatch, capsys)


def help_of(preset, monkeypatch, capsys):
    assert run_main("train", preset, "--help", monkeypatch=monkeypatch) == 0
    return " ".join(capsys.readouterr().out.split())


def test_schedules_are_functions_of_the_constants():
    config = replace(TINY, epochs=100, small_fraction=0.29, small_size=20)  # .29 x 100 < 29
    sizes = [config_module.image_size(config, epoch) for epoch in (1, 29, 30, 100)]
    assert sizes == [20, 20, 32, 32]
    for batch_size, limit, steps in ((16, 0, 7), (20, 0, 5), (16, 3, 3), (16, 9, 7), (33, 0, 3)):
        config = replace(TINY, batch_size=batch_size, max_steps_per_epoch=limit)
        assert config_module.steps_per_epoch(config, 100) == steps


# ---------------------------------------------------------------- how a script starts


SCRIPTS = ["train.py", "test.py", "predict.py", "export.py", "search/__main__.py"]


@pytest.mark.parametrize("name", ["engine/__init__.py", "engine/script.py", *SCRIPTS])
def test_older_pythons_can_parse_it(name):
    """Or they could not say which Python is needed."""
    ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 9))


@pytest.mark.parametrize("version", [(3, 8, 20), (3, 10, 0)])
def test_old_python_is_one_line(version):
    code = f"import sys, runpy; sys.version_info = {version}; sys.argv = ['train.py'];"
    code += f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: python: this is 3.{version[1]}; use 3.11")
    assert result.stderr.count("\n") == 1


def test_missing_library_is_one_line_and_a_missing_file_of_ours_a_traceback():
    Path("torch.py").write_text("raise ModuleNotFoundError('gone', name='torch.nn')")
    result = run("train.py", "demo", PYTHONPATH=".")
    assert result.stderr == "error: torch: not installed; run `pip install -r requirements.txt`\n"
    assert result.returncode == 2
    Path("torch.py").write_text("raise ModuleNotFoundError('which someone edits', name='model')")
    result = run("train.py", "demo", PYTHONPATH=".")
    assert "Traceback" in result.stderr and "which someone edits" in result.stderr
    assert result.returncode == 1


@pytest.fixture
def script(monkeypatch):
    """Run a function as the `main` of a script; returns its exit status."""

    def start(main):
        monkeypatch.setitem(sys.modules, "fake", SimpleNamespace(main=main))
        return run_main("fake", monkeypatch=monkeypatch)

    return start


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("c1: 0, too few; use 1"), 2, "error: c1: 0, too few; use 1"),
        (DivergenceError("the loss is nan"), 1, "error: the loss is nan"),
        (SearchError("no trial succeeded"), 1, "error: no trial succeeded"),
        (StoppedError(signal.SIGTERM, "stopped by SIGTERM"), 143, "stopped by SIGTERM"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory.\nAnd more"), 2, "error: memory: CUDA"),
        (RuntimeError("MPS backend out of memory (MPS"), 2, "error: memory: MPS"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), 2, "error: memory: CUDA"),
        (
            MemoryError(),
            2,
            "error: memory: MemoryError; free some, or give train.py or predict.py a smaller",
        ),
        (ModuleNotFoundError("no", name="tyro"), 2, "error: tyro: not installed; run `pip install"),
        (ModuleNotFoundError("no", name="ray.tune"), 2, "error: ray: not installed"),
        (OSError(28, "No space left"), 2, "error: stdout: cannot be written (No space left); make"),
        (OSError(13, "denied", "data"), 2, "error: [Errno 13] denied: 'data'"),
        (BrokenPipeError(), 141, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_error_is_one_line_and_a_status(error, status, line, script, monkeypatch, capsys):
    def main(_args):
        raise error

    with Path("out.txt").open("w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert script(main) == status
    errors = capsys.readouterr().err
    assert errors.startswith(line)
    assert errors.count("\n") == bool(line)


def test_file_that_cannot_be_read_leaves_a_notebooks_output_as_it_was(script, capsys):
    def main(_args):
        raise PermissionError(13, "denied", "data")

    assert script(main) == 2  # here, too, stdout has no number
    print("the next cell")
    assert capsys.readouterr() == ("the next cell\n", "error: [Errno 13] denied: 'data'\n")


def test_figures_need_nothing_of_the_notebook_that_started_the_script():
    result = run("test.py", "-h", MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert (result.returncode, result.stderr) == (0, "")


def test_cpu_without_enough_memory(script, capsys):
    assert script(lambda _: torch.empty(1 << 50)) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: memory: .* memory: you tried .* smaller --batch-size\n", error)


@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError])
def test_other_errors_keep_their_traceback(script, error):
    def main(_args):
        raise error("something else")

    with pytest.raises(error, match="something else"):
        script(main)


def test_output_that_cannot_be_written_or_knows_no_unicode(script, monkeypatch, capsys):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert script(lambda _: print("94.8")) == 2
    assert "No space left" in capsys.readouterr().err
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert script(lambda _: print("94.8 ± 0.1")) == 0
    assert raw.getvalue() == b"94.8 ? 0.1\n"


def test_a_user_whom_the_system_does_not_know_has_a_home(script, monkeypatch):
    pwd = pytest.importorskip("pwd")
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}["uid not found"])
    monkeypatch.delenv("HOME", raising=False)
    assert script(lambda _: print(Path("~/ray_results").expanduser())) == 0  # as Ray does


def test_ctrl_c_while_the_libraries_load():
    process = subprocess.Popen(command("train.py", "-h"), stderr=subprocess.PIPE, text=True)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == ""
    assert process.returncode == -signal.SIGINT  # which shells call 130


@pytest.mark.slow
def test_compile_without_a_compiler():
    """Before any work."""
    result = run("train.py", "demo", "--compile", CXX="/nowhere/g++")
    assert result.stderr.startswith("error: compile: torch.compile does not work here (")
    assert "a C++ compiler, or use --no-compile" in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.returncode == 2
    assert not Path("checkpoints").exists()


IMPORTING = """
import atexit, importlib, json, os, pathlib, signal, sys, threading, warnings
import filelock, matplotlib.figure, numpy, PIL.Image, PIL.ImageOps, safetensors.torch
import scipy.optimize, torch, torch.optim.swa_utils, torch.utils.flop_counter, tqdm

def state():
    return {
        "hooks": [repr(h) for h in (sys.excepthook, threading.excepthook, sys.unraisablehook)],
        "handlers": [repr(signal.getsignal(number)) for number in signal.valid_signals()],
        "exit": atexit._ncallbacks(),
        "environment": dict(os.environ),
        "warnings": [repr(entry) for entry in warnings.filters],
        "streams": [(id(s), s.errors, s.encoding) for s in (sys.stdin, sys.stdout, sys.stderr)],
        "process": [sys.argv, list(sys.path), os.getcwd(), threading.active_count()],
        "torch": [torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
                  torch.are_deterministic_algorithms_enabled(), torch.initial_seed(),
                  torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32],
        "files": sorted(map(str, pathlib.Path().iterdir())),
    }

for name in sys.argv[1:]:
    before = state()
    importlib.import_module(name)
    after = state()
    for part in before:
        if before[part] != after[part]:
            print(name, part, before[part], after[part])
"""


def test_importing_changes_nothing():
    modules = ["train", "test", "predict", "export", "hubconf", "search.run"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", IMPORTING, *modules]
    result = subprocess.run(line, env=env, capture_output=True, text=True)
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)


def test_commit_is_that_of_our_repository_and_not_of_one_around_it(monkeypatch):
    def commit_all(folder):
        for words in ("init -q", "add .", "-c user.name=x -c user.email=x commit -qm all"):
            subprocess.run(["git", *words.split()], cwd=folder, check=True)

    outer, ours = Path("outer"), Path("outer/ours")
    ours.mkdir(parents=True)
    shutil.copy(ROOT / "utils.py", ours)
    commit_all(outer)
    monkeypatch.setattr(utils, "__file__", str(ours / "utils.py"))
    with monkeypatch.context() as patch:
        patch.setenv("GIT_DIR", str(outer.resolve() / ".git"))  # as in a hook
        assert utils.git_commit.__wrapped__() == "unknown"
    commit_all(ours)
    assert re.fullmatch("[0-9a-f]{40}", utils.git_commit.__wrapped__())
    (ours / "utils.py").write_text("changed")
    assert re.fullmatch("[0-9a-f]{40}-dirty", utils.git_commit.__wrapped__())


def test_clone_of_another_user_is_reported_with_the_remedy(monkeypatch, capsys):
    remedy = "git config --global --add safe.directory /clone"
    text = f"fatal: detected dubious ownership in repository\nTo add an exception:\n\n\t{remedy}\n"
    Path("git").write_text(f"#!/bin/sh\nprintf '{text}' >&2\nexit 128\n")
    Path("git").chmod(0o755)
    monkeypatch.setenv("PATH", str(Path.cwd()), prepend=os.pathsep)
    assert utils.git_commit.__wrapped__() == "unknown"
    warning = capsys.readouterr().err
    assert warning.startswith("warning: git: ") and f"unknown; `{remedy}` allows" in warning
    assert warning.count("\n") == 1
