"""Weights & Biases: written offline, the same run after a resume; its failures cost nothing."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import ROOT, run

from engine.progress import WandbRun
from train import train
from utils import read_csv


class Wandb:
    """A stand-in for the library; `broken` is the name of the call that fails."""

    def __init__(self, broken=""):
        self.broken, self.inits, self.logged, self.summary = broken, [], [], {}
        self.Settings, self.Image = dict, str
        self.url, self.id, self.offline = "https://wandb.example/run", "abc", False
        self.settings = SimpleNamespace(mode="online", project=None, run_name=None, run_group=None)

    def check(self, name):
        if name == self.broken:
            raise ZeroDivisionError("out of order\nand more")

    def setup(self):
        return self

    def init(self, **options):
        self.check("init")
        self.inits.append(options)
        self.sync_dir = f"{options['dir']}/wandb/run-abc"
        return self

    def log(self, values, **options):
        self.check("log")
        self.logged.append(values | options)

    def finish(self):
        self.check("finish")


@pytest.fixture
def real(tmp_path):
    """The library itself, with a home of its own and none of its variables in the environment."""
    import wandb

    inherited = [name for name in os.environ if name.startswith("WANDB_")]
    with mock.patch.dict(os.environ, {"HOME": str(tmp_path), "NETRC": "none"}):
        for name in inherited:
            del os.environ[name]
        wandb.teardown()
        yield wandb
        wandb.teardown()


@pytest.fixture
def library(monkeypatch):
    """Put a stand-in into the place of the library."""

    def install(broken=""):
        fake = Wandb(broken)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    return install


def test_offline_run_holds_every_epoch_the_curves_and_the_final_accuracy(demo):
    """Of the real library: it writes JSON values as they are."""
    folder, output = demo
    assert re.search(r"Weights & Biases: run \w+, offline, in checkpoints/demo/wandb", output)
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content = path.read_bytes()
    rows = read_csv(folder / "log.csv")
    for row in rows:
        for value in (row["lr"], row["train_loss"], row["train_accuracy"]):
            assert str(value).encode() in content
    assert content.count(b"train_accuracy") >= len(rows)
    assert b'"image-file"' in content
    assert b"test_accuracy" in content and b"batch_size" in content


def test_resumed_run_keeps_its_id_and_logs_each_epoch_once(tiny, library):
    fake = library()
    config = replace(tiny, name="group/tiny", wandb="offline", val_size=50)
    train(replace(config, epochs=2))
    rows, score = train(replace(config, resume=True))
    first, second = fake.inits
    assert (first["id"], second["id"]) == (None, "abc")
    for options in fake.inits:
        assert (options["project"], options["name"], options["group"]) == (
            "tpsnet",
            "tiny",
            "group",
        )
        assert (options["mode"], options["resume"]) == ("offline", "allow")
        assert options["config"]["batch_size"] == 16
    epochs = [values for values in fake.logged if "epoch" in values]
    assert [values["step"] for values in epochs] == [1, 2, 3]
    assert [values["val_loss"] for values in epochs] == [row["val_loss"] for row in rows]
    assert fake.logged[-1] == {"curves": "checkpoints/group/tiny/curves.png"}
    assert fake.summary == {"test_loss": score.loss, "test_accuracy": score.accuracy}


@pytest.mark.parametrize("broken", ["init", "log", "finish", "import"])
def test_failure_is_one_warning_and_the_result_the_same(tiny, library, monkeypatch, capsys, broken):
    tiny = replace(tiny, epochs=1)
    _, expected = train(replace(tiny, name="without"))
    capsys.readouterr()
    library(broken)
    if broken == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    assert train(replace(tiny, wandb="offline"))[1] == expected
    error = capsys.readouterr().err
    assert error.startswith("warning: wandb: ")
    assert error.endswith("; going on without it\n")
    assert error.count("\n") == 1


def test_silence_of_a_server_at_the_end_says_how_to_send_the_rest(library, monkeypatch, capsys):
    def silent():
        raise TimeoutError

    fake = library()
    monkeypatch.setattr(fake, "finish", silent)
    WandbRun("online", Path("runs/one"), {}).finish({}, Path("runs/one/curves.png"))
    assert "`wandb sync --include-online runs/one/wandb` sends it" in capsys.readouterr().err
    assert fake.inits[0]["settings"]["finish_timeout"] <= 60


def test_run_that_fails_is_ended_before_the_next_one_begins(tiny, real):
    def fail(_log):
        raise ZeroDivisionError

    first, second = (replace(tiny, name=name, epochs=1, wandb="offline") for name in "ab")
    with pytest.raises(ZeroDivisionError):
        train(first, report=fail)
    train(second)
    for name in "ab":
        assert len(list(Path("checkpoints", name, "wandb").glob("offline-run-*"))) == 1


def test_disabled_never_imports_the_library(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    train(replace(tiny, epochs=1))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("mode", "variables", "file", "expected"),
    [
        ("auto", {"WANDB_MODE": "disabled"}, "", None),
        ("auto", {}, "mode = disabled", None),  # as `wandb disabled` writes it
        ("auto", {}, "mode = offline\nproject = thesis", ("thesis", "one", "group", "runs/one")),
        (
            "offline",  # as given, whatever the environment says
            {
                "WANDB_MODE": "disabled",
                "WANDB_PROJECT": "thesis",
                "WANDB_ENTITY": "lab",
                "WANDB_NAME": "first",
                "WANDB_RUN_GROUP": "mine",
                "WANDB_DIR": "there",
            },
            "project = other",
            ("thesis", "first", "mine", "there"),
        ),
    ],
)
def test_its_own_variables_and_settings_count(mode, variables, file, expected, real, capsys):
    os.environ.update(variables)
    Path("wandb").mkdir()
    Path("wandb/settings").write_text(f"[default]\n{file}\n")
    before = sorted(Path().rglob("*"))
    logger = WandbRun(mode, Path("runs/one"), {}, group="group")
    out, err = capsys.readouterr()
    assert not err
    if not expected:
        assert not out and sorted(Path().rglob("*")) == before
        return
    assert f"offline, in {Path(expected[-1], 'wandb')}" in out
    settings = logger.run.settings
    assert (settings.project, settings.run_name, settings.run_group) == expected[:-1]
    assert settings.entity == variables.get("WANDB_ENTITY")
    logger.run.finish()
    assert not Path(os.environ["HOME"], ".cache").exists()  # a home may be read-only
    assert list(Path(expected[-1]).glob("wandb/offline-run-*/run-*.wandb"))


def test_a_wrong_variable_is_named(real, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "nowhere")
    assert WandbRun("auto", Path("runs/one"), {}).run is None
    error = capsys.readouterr().err
    assert re.match(r"warning: wandb: .* mode .*'nowhere'.*; going on without it\n$", error)


def test_documented_command_finds_what_is_to_be_sent(demo):
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    arguments = re.search(r"`wandb (sync checkpoints/tpsnet/wandb)`", page)[1]
    line = arguments.replace("tpsnet", "demo").split()
    command = [sys.executable, "-m", "wandb", *line, "--dry-run"]
    result = subprocess.run(command, cwd=demo[0].parents[1], capture_output=True, text=True)
    assert "Would sync 1 run" in result.stderr


@pytest.mark.slow
def test_auto_without_a_login_is_offline_asks_nothing_and_resumes_the_same_run(tmp_path):
    line = "train.py demo --name group/demo --epochs 2 --max-steps-per-epoch 2 --wandb auto".split()
    alone = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_API_KEY": ""}
    first, again = run(*line, **alone), run(*line, "--resume", **alone)
    ids = []
    for result in (first, again):
        assert result.returncode == 0, result.stderr
        ids.append(re.search(r"run (\w+), offline, in checkpoints", result.stdout)[1])
    assert ids[0] == ids[1]


@pytest.mark.slow
def test_broken_login_is_one_warning(tiny, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "no-key")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # refuses
    train(replace(tiny, wandb="auto"))
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: wandb: ")
    assert captured.err.count("\n") == 1
    assert "test accuracy" in captured.out
