"""Every mistake a user can make: one line naming what, which value and what to do; status 2."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, TINY_LINE, Bomb, command, run, run_main

import checkpoint
import data
import test as test_script
import train as train_script
import utils
from config import PRESETS, check_config, load_config
from model import Architecture, ResNet
from utils import InputError
from weights import load_model, save_model

# command line, and words that the error must contain
BAD_LINES = [
    # presets and options
    (
        "train.py resnet50",
        ["preset", "'resnet50'", "tpsnet, model1, model2, fast, small, tiny, best, demo"],
    ),
    ("train.py --learning-rate 0.1", ["--learning-rate", "-h"]),
    ("train.py --config", ["config", "''", "config.json"]),
    ("train.py --config nothing.json", ["config", "'nothing.json'", "best.json"]),
    ("train.py demo model1", ["model1", "-h"]),
    ("train.py demo --lr", ["--lr", "-h"]),
    ("train.py demo --lr fast", ["--lr", "'fast'", "-h"]),
    ("train.py demo --epochs 2.5", ["--epochs", "'2.5'", "-h"]),
    ("train.py demo --num-blocks 1 x 1", ["--num-blocks", "'x'", "-h"]),
    ("train.py demo --conv-kernel big", ["--conv-kernel", "'big'", "-h"]),
    ("train.py demo --dataset mnist", ["--dataset", "'mnist'", "cifar10", "digits"]),
    ("train.py demo --schedule step", ["--schedule", "'step'", "cosine_restarts"]),
    ("train.py demo --wandb yes", ["--wandb", "'yes'", "offline", "disabled"]),
    # the network
    ("train.py demo --num-blocks", ["num_blocks", "()", "1 to 4 stages"]),
    ("train.py demo --num-blocks 1 1 1 1 1", ["num_blocks", "(1, 1, 1, 1, 1)", "1 to 4"]),
    ("train.py demo --num-blocks 1 0 1", ["num_blocks", "0", "from 1 to 500"]),
    ("train.py demo --num-blocks 1 -2 1", ["num_blocks", "-2", "from 1 to 500"]),
    ("train.py demo --num-blocks 1000000000", ["num_blocks", "1000000000", "from 1 to 500"]),
    ("train.py demo --c1 0", ["c1", "0", "from 1 to 4096"]),
    ("train.py demo --c1 99999999", ["c1", "99999999", "from 1 to 4096"]),
    ("train.py demo --width -1", ["width", "-1", "from 1 to 64"]),
    ("train.py demo --conv-kernel 4", ["conv_kernel", "4", "even", "such as 3"]),
    ("train.py demo --conv-kernel 0", ["conv_kernel", "0", "from 1 to 31"]),
    ("train.py demo --conv-kernel -3", ["conv_kernel", "-3", "from 1 to 31"]),
    ("train.py demo --conv-kernel 3 3", ["conv_kernel", "2 sizes", "3 stages"]),
    ("train.py demo --conv-kernel 3 2 3", ["conv_kernel", "2", "even"]),
    ("train.py demo --skip-kernel 2", ["skip_kernel", "2", "even", "such as 1"]),
    ("train.py demo --skip-kernel 1 1 1 1", ["skip_kernel", "4 sizes", "3 stages"]),
    ("train.py demo --pool-kernel 0", ["pool_kernel", "0", "at least 1"]),
    ("train.py demo --pool-kernel 9", ["pool_kernel", "9", "8x8", "use 1 to 8"]),
    ("train.py demo --num-blocks 1 1 1 1", ["pool_kernel", "8", "4x4", "use 1 to 4"]),
    ("train.py demo --dropout 1", ["dropout", "1", "from 0 to 0.99"]),
    ("train.py demo --dropout nan", ["dropout", "nan", "from 0 to 0.99"]),
    ("train.py demo --classifier-dropout 1", ["classifier_dropout", "1", "from 0 to 0.99"]),
    ("train.py --c1 17", ["max_params", "5,598,195", "5,000,000", "--max-params"]),
    ("train.py demo --max-params 76817", ["max_params", "76,818", "76,817"]),
    ("train.py demo --num-classes 1", ["num_classes", "1", "from 2"]),
    ("train.py demo --num-classes 7", ["num_classes", "7", "digits has 10"]),
    ("train.py demo --max-params 0", ["max_params", "0", "at least 1"]),
    # the data
    ("train.py demo --flip random", ["flip", "--flip none"]),
    ("train.py demo --crop-padding 2", ["crop_padding", "--crop-padding 0"]),
    ("train.py demo --auto-augment", ["auto_augment", "the demo preset"]),
    ("train.py --crop-padding -1", ["crop_padding", "-1", "from 0 to 32"]),
    ("train.py --rotation-degrees 181", ["rotation", "181", "from 0 to 180"]),
    ("train.py demo --val-size -1", ["val_size", "-1", "at least 0"]),
    ("train.py demo --val-size 5", ["val_size", "5", "use 0, or 10 to 1,428"]),
    ("train.py demo --val-size 1438", ["val_size", "1438", "use 0, or 10 to 1,428"]),
    ("train.py demo --train-size -1", ["train_size", "-1", "at least 0"]),
    ("train.py demo --train-size 9", ["train_size", "9", "or 10 to 1,428"]),
    ("train.py demo --train-size 1439", ["train_size", "1439", "or 10 to 1,428"]),
    ("train.py demo --batch-size 1439", ["batch_size", "1439", "1,438", "use 1 to 1,438"]),
    ("train.py demo --val-size 1400 --batch-size 39", ["batch_size", "39", "use 1 to 38"]),
    (
        "train.py demo --num-blocks 1 1 1 1 --c1 24 --width 1 --stem whitening --downsample pool"
        " --pool-kernel 1 --batch-size 1437",
        ["batch_size", "1437", "one image", "one pixel"],
    ),
    ("train.py --no-download", ["data_dir", "cifar-10-python.tar.gz", "train.py demo"]),
    ("train.py --no-download --data-dir x/y", ["data_dir", "x/y", "cifar-10-python.tar.gz"]),
    # the recipe
    ("train.py demo --batch-size 0", ["batch_size", "0", "at least 1"]),
    ("train.py demo --epochs 0", ["epochs", "0", "at least 1"]),
    ("train.py demo --keep-fraction 0", ["keep_fraction", "0", "from 0.01 to 1"]),
    ("train.py --small-fraction 1.1", ["small_fraction", "1.1", "from 0 to 1"]),
    ("train.py --small-size 7", ["small_size", "7", "from 8 to 32"]),
    ("train.py --small-images shrink", ["--small-images", "'shrink'", "scale"]),
    (
        "train.py model1 --pool-kernel 4 --small-fraction 0.5 --small-size 24",
        ["small_size", "24x24", "to 1x1", "32x32 to 2x2", "small_fraction of 0"],
    ),
    (
        "train.py demo --num-blocks 1 1 1 1 --c1 4 --downsample pool --pool-kernel 2"
        " --small-fraction 0.5 --small-size 8",
        ["small_size", "8x8", "to 0x0", "32x32 to 1x1"],
    ),
    ("train.py demo --lr -0.1", ["lr", "-0.1", "from 0 to 1000"]),
    ("train.py demo --lr inf", ["lr", "inf", "from 0 to 1000"]),
    ("train.py demo --momentum 1.5", ["momentum", "1.5", "from 0 to 1"]),
    ("train.py demo --weight-decay nan", ["weight_decay", "nan", "from 0 to 1"]),
    ("train.py demo --restart-epochs 0", ["restart_epochs", "0", "at least 1"]),
    ("train.py best --momentum 0", ["momentum", "0", "--no-nesterov"]),
    ("train.py demo --warmup-epochs 15", ["warmup_epochs", "15 of 15", "use 0 to 14"]),
    ("train.py demo --ema-decay 1", ["ema_decay", "1", "from 0 to 0.999999"]),
    # the run
    ("train.py demo --name ../elsewhere", ["name", "'../elsewhere'", "letters, digits"]),
    ("train.py demo --name a/b/c", ["name", "'a/b/c'", "GROUP/NAME"]),
    ("train.py demo --name .hidden", ["name", "'.hidden'", "letters, digits"]),
    ("train.py demo --name=", ["name", "''", "letters, digits"]),
    ("train.py demo --seed -1", ["seed", "-1", "from 0 to 4294967295"]),
    ("train.py demo --seeds 0", ["seeds", "0", "at least 1"]),
    ("train.py demo --seeds 2 --seed 4294967295", ["seed", "4294967296", "to 4294967295"]),
    ("train.py demo --resume --overwrite", ["overwrite", "--resume", "use one"]),
    ("train.py demo --save-minutes -1", ["save_minutes", "-1", "from 0 to"]),
    ("train.py demo --save-minutes nan", ["save_minutes", "nan", "from 0 to"]),
    ("train.py demo --save-minutes often", ["--save-minutes", "'often'", "-h"]),
    ("train.py demo --max-steps-per-epoch -1", ["max_steps_per_epoch", "-1", "at least 0"]),
    # test.py
    ("test.py", ["checkpoint", "checkpoints", "does not exist", "train.py demo"]),
    ("test.py nothing.safetensors", ["checkpoint", "nothing.safetensors", "does not exist"]),
    ("test.py --tta nothing.safetensors extra", ["extra", "-h"]),
    ("test.py --verbose", ["--verbose", "-h"]),
    ("test.py --compare", ["--compare", "-h"]),
    ("test.py --json", ["--json", "-h"]),
]


def check_refusal(script, args, words, monkeypatch, capsys):
    """Run in this process; nothing may be written but one line on stderr."""
    before = written()
    main = {"train.py": train_script, "test.py": test_script}[script].main
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be a second line
        assert run_main(main, *args, monkeypatch=monkeypatch) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    for word in words:
        assert word in captured.err
    assert written() == before


def written():
    """All files with their times, but for locks, which some versions of filelock touch."""
    paths = (path for path in Path().rglob("*") if path.name != "run.lock")
    return {path: path.stat().st_mtime_ns for path in paths}


@pytest.mark.parametrize(("line", "words"), BAD_LINES, ids=[line for line, _ in BAD_LINES])
def test_bad_command_line(line, words, monkeypatch, capsys):
    script, *args = line.split()
    check_refusal(script, args, words, monkeypatch, capsys)


def test_from_the_shell_it_is_the_same():
    for line, words in (BAD_LINES[0], ("test.py nothing.safetensors", ["does not exist"])):
        result = run(*line.split())
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert all(word in result.stderr for word in words)
    assert list(Path().iterdir()) == []


def test_command_line_without_its_library(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    words = ["tyro", "not installed", "pip install -r requirements.txt"]
    check_refusal("train.py", ["demo"], words, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "x"), ("LOCAL_RANK", "-1"), ("WORLD_SIZE", ""), ("WORLD_SIZE", "2")],
)
def test_bad_environment(name, value, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    words = [repr(value), name] if value != "2" else ["MASTER_PORT"]  # two processes meet there
    line = ["demo", "--wandb", "disabled"]
    check_refusal("train.py", line, [*words, "in the environment", "torchrun"], monkeypatch, capsys)


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR"])
def test_incomplete_environment(missing, monkeypatch, capsys):
    whole = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    for name in whole.keys() - {missing}:
        monkeypatch.setenv(name, whole[name])
    words = [missing, "in the environment", "torchrun"]
    check_refusal("train.py", ["demo", "--wandb", "disabled"], words, monkeypatch, capsys)


def test_more_processes_than_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    words = ["LOCAL_WORLD_SIZE: 3 processes for 2 GPUs", "--nproc-per-node 2"]
    check_refusal("train.py", ["demo", "--wandb", "disabled"], words, monkeypatch, capsys)


def test_too_little_memory_on_a_gpu(monkeypatch, capsys):
    def full(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nAnd more")

    monkeypatch.setattr(train_script, "train", full)
    words = ["batch_size: CUDA out of memory", "use a smaller one"]
    check_refusal("train.py", ["demo"], words, monkeypatch, capsys)


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_output_that_must_not_be_replaced(kind):
    os.mkfifo("pipe")
    Path("link").symlink_to("other")
    with pytest.raises(InputError, match=f"json: {kind} is a link, pipe or device; name a file"):
        utils.check_output("json", kind)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset", "mnist"),
        ("schedule", "step"),
        ("wandb", True),
        ("epochs", "30"),
        ("epochs", True),
        ("lr", "0.1"),
        ("lr", None),
        ("num_blocks", 3),
        ("num_blocks", "333"),
        ("conv_kernel", 3.0),
        ("conv_kernel", None),
        ("flip", "no"),
        ("padding_mode", "mirror"),
        ("optimizer", "adam"),
        ("stem", "patch"),
        ("downsample", "both"),
        ("bfloat16", 1),
        ("label_smoothing", 1.5),
        ("adam_lr", -1.0),
        ("resume", 1),
        ("data_dir", None),
        ("name", None),
    ],
)
def test_bad_value_given_in_python(field, value):
    """What the command line's types would catch, other scripts can still pass to train()."""
    with pytest.raises(InputError, match=f"^{field}: ") as error:
        check_config(replace(PRESETS["model1"], **{field: value}))
    assert repr(value) in str(error.value)


def test_every_preset_is_sound():
    for config in PRESETS.values():
        check_config(config)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "label"])
def test_bad_data_file(cifar10_bin, tmp_path, damage, monkeypatch, capsys):
    folder = tmp_path / "d" / data.BINARY_FOLDER
    folder.mkdir(parents=True)
    for path in (cifar10_bin / data.BINARY_FOLDER).iterdir():
        (folder / path.name).hardlink_to(path)
    path = folder / "data_batch_2.bin"
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "foreign":
        path.write_bytes(b"PK" + content)
    elif damage == "label":
        content[9999 * data.RECORD_BYTES] = 255
        path.write_bytes(content)
    words = {"label": ["record 9999", "255", "0 to 9"], "missing": ["No such file"]}
    words = words.get(damage, ["30,730,000", "truncated or foreign"])
    line = ["--data-dir", "d", "--wandb", "disabled"]
    check_refusal("train.py", line, ["data_dir", "data_batch_2.bin", *words], monkeypatch, capsys)


FOREIGN = {
    "hostile pickle": lambda p: p.write_bytes(pickle.dumps(Bomb())),
    "hostile torch file": lambda p: torch.save({"model": Bomb()}, p),
    "empty": lambda p: p.write_bytes(b""),
    "text": lambda p: p.write_text("not a checkpoint"),
    "truncated": lambda p: p.write_bytes(p.read_bytes()[:2000]),
    "other tensors": lambda p: torch.save({"weight": torch.ones(2)}, p),
    "a list": lambda p: torch.save([torch.ones(2)], p),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the run folder of `tiny`, finished."""
    folder = tmp_path_factory.mktemp("trained")
    with contextlib.chdir(folder):
        train_script.train(TINY)
    return folder / "checkpoints"


@pytest.fixture
def finished(tiny, trained):
    """A finished run in checkpoints/tiny."""
    shutil.copytree(trained, "checkpoints")
    return tiny


@pytest.mark.parametrize("damage", FOREIGN.values(), ids=FOREIGN)
def test_bad_checkpoint_to_test(finished, damage, monkeypatch, capsys):
    path = Path("checkpoints/tiny/model.safetensors")
    damage(path)
    capsys.readouterr()
    words = ["checkpoint", "model.safetensors", "name a model.safetensors that train.py wrote"]
    check_refusal("test.py", [], words, monkeypatch, capsys)


def test_model_that_cannot_be_opened():
    Path("loop.safetensors").symlink_to("loop.safetensors")
    with pytest.raises(InputError, match=r"checkpoint: loop.safetensors cannot be opened; check"):
        load_model("loop.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_names": [0, 1]}, "class_names and dataset must be texts"),
        ({"dataset": ["digits"]}, "class_names and dataset must be texts"),
        ({"std": [0.5, 0, 0.5]}, "std: 0 must be"),
    ],
)
def test_metadata_that_no_script_can_use_is_not_saved(change, words):
    shown = {"mean": [0.5] * 3, "std": [0.5] * 3, "class_names": ["cat", "dog"], "dataset": "a"}
    with pytest.raises(InputError, match=words):
        save_model("m.safetensors", ResNet(Architecture((1,), 2, num_classes=2)), shown | change)


def test_training_state_is_no_model_to_test(finished, monkeypatch, capsys):
    capsys.readouterr()
    line = ["checkpoints/tiny/last.pt"]
    check_refusal("test.py", line, ["last.pt", "model.safetensors"], monkeypatch, capsys)


@pytest.mark.parametrize("info", [{}, {"dataset": "mnist"}, {"dataset": "digits"}], ids=str)
def test_model_of_other_data_to_test(info, monkeypatch, capsys):
    shown = {"mean": [0.5] * 3, "std": [0.5] * 3, "class_names": ["cat", "dog"]}
    network = ResNet(Architecture((1, 1), 2, num_classes=2))
    save_model("m.safetensors", network, shown | info)
    words = ["checkpoint: m.safetensors"] if "digits" in info.values() else ["dataset: "]
    check_refusal("test.py", ["m.safetensors"], words, monkeypatch, capsys)


def test_json_into_a_folder(finished, monkeypatch, capsys):
    capsys.readouterr()
    words = ["json", "checkpoints", "is a folder"]
    check_refusal("test.py", ["--json", "checkpoints"], words, monkeypatch, capsys)


@pytest.mark.parametrize("damage", FOREIGN.values(), ids=FOREIGN)
def test_bad_state_to_resume(finished, damage, monkeypatch, capsys):
    for name in ("last.pt", "previous.pt"):
        damage(Path("checkpoints/tiny", name))
    capsys.readouterr()
    line = [*TINY_LINE, "--resume"]
    check_refusal("train.py", line, ["resume", "last.pt", "; "], monkeypatch, capsys)


def test_state_whose_tensors_do_not_fit(finished, monkeypatch, capsys):
    path = Path("checkpoints/tiny/last.pt")
    state = checkpoint.load_state(path)
    state["learner"]["model"]["linear.weight"] = torch.ones(3, 3)
    checkpoint.save_state(path, state)
    capsys.readouterr()
    line = [*TINY_LINE, "--resume"]
    check_refusal("train.py", line, ["resume", "last.pt", "; "], monkeypatch, capsys)


def test_run_is_not_overwritten_nor_resumed_as_another(finished, monkeypatch, capsys):
    capsys.readouterr()
    words = ["name", "checkpoints/tiny", "--resume", "--overwrite", "another --name"]
    check_refusal("train.py", TINY_LINE, words, monkeypatch, capsys)
    words = ["lr", "0.2", "0.1", "another --name"]
    check_refusal("train.py", [*TINY_LINE, "--resume", "--lr", "0.2"], words, monkeypatch, capsys)
    words = ["c1", "9", "8", "another --name"]
    check_refusal("train.py", [*TINY_LINE, "--resume", "--c1", "9"], words, monkeypatch, capsys)


def test_run_folder_that_cannot_be_made(monkeypatch, capsys):
    Path("checkpoints").write_text("a file")
    words = ["name", "checkpoints/demo", "cannot be written"]
    check_refusal("train.py", ["demo", "--wandb", "disabled"], words, monkeypatch, capsys)


@pytest.mark.parametrize("text", ["", "[1]", '{"depth": 3}', '{"c1":', "\x00", 99_999 * "["])
def test_file_of_constants_that_is_none(text, monkeypatch, capsys):
    Path("bad.json").write_text(text)
    words = ["config", "bad.json", "config.json that train.py wrote"]
    check_refusal("train.py", ["--config", "bad.json"], words, monkeypatch, capsys)


def test_file_of_constants_with_a_bad_one(monkeypatch, capsys):
    Path("bad.json").write_text('{"c1": "wide"}')
    check_refusal("train.py", ["--config", "bad.json"], ["c1", "'wide'"], monkeypatch, capsys)


def test_weights_that_are_not_finite_are_no_result(finished, monkeypatch, capsys):
    model, info = load_model("checkpoints/tiny/model.safetensors")
    del info["architecture"]
    model.linear.bias.data[3] = float("nan")
    save_model("nan.safetensors", model, info)
    assert run_main(test_script.main, "nan.safetensors", monkeypatch=monkeypatch) == 2
    assert "its weights are not finite" in capsys.readouterr().err


def test_compile_without_a_compiler(monkeypatch):
    """Before any work."""
    result = run("train.py", "demo", "--compile", CXX="/nowhere/g++")
    assert result.stderr.startswith("error: compile: torch.compile does not work here (")
    assert result.stderr.endswith("a C++ compiler, or use --no-compile\n")
    assert result.stderr.count("\n") == 1
    assert result.returncode == 2
    assert not Path("checkpoints").exists()


def test_missing_library_is_one_line():
    Path("torch.py").write_text("raise ModuleNotFoundError('gone', name='torch')")
    result = run("train.py", "demo", PYTHONPATH=".")
    assert result.stderr == ("error: torch: not installed; run `pip install -r requirements.txt`\n")
    assert result.returncode == 2
    error = "raise ModuleNotFoundError('a file of ours, which someone edits', name='model')"
    Path("torch.py").write_text(error)
    result = run("train.py", "demo", PYTHONPATH=".")
    assert "Traceback" in result.stderr and error in result.stderr
    assert result.returncode == 1


def test_ctrl_c_while_the_libraries_load():
    process = subprocess.Popen(command("train.py", "-h"), stderr=subprocess.PIPE, text=True)
    while "torch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == ""
    assert process.returncode == -signal.SIGINT  # which shells call 130


def test_output_that_knows_no_unicode():
    code = "import script; script.run_script(lambda _: print('94.8 ± 0.1'))"
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "94.8 ? 0.1\n"), result.stderr


def test_commit_of_a_repository_around_ours_is_not_ours(monkeypatch):
    outer = Path("outer")
    shutil.copytree(ROOT, outer / "ours", ignore=lambda *_: {".git", "data", "checkpoints"})
    for words in ("init -q", "add .", "-c user.name=x -c user.email=x commit -qm outer"):
        subprocess.run(["git", *words.split()], cwd=outer, check=True)
    monkeypatch.setattr(utils, "__file__", str(outer / "ours" / "utils.py"))
    monkeypatch.setenv("GIT_DIR", str(outer.resolve() / ".git"))  # as in a hook
    assert utils.git_commit.__wrapped__() == "unknown"


def test_config_file_with_a_byte_order_mark():
    Path("config.json").write_text(json.dumps(asdict(TINY)), encoding="utf-8-sig")
    assert load_config("config.json") == TINY


def test_config_file_round_trip():
    """What config.json holds is a configuration again."""
    Path("config.json").write_text(json.dumps(asdict(PRESETS["model2"])))
    assert load_config("config.json") == PRESETS["model2"]
