"""The real library, offline and online; and its absence, failure and silence: they cost nothing."""

import contextlib
import csv
import os
import re
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT, run
from silent_wandb import environment, wandb_server

import metrics
from train import train


def records(folder):
    """Records of every W&B run in a run folder, oldest first: (run id, protobuf record).

    A .wandb file is a LevelDB log: 32 KiB blocks of fragments, each with a checksum, length and
    type (1 whole, 2 first, 3 middle, 4 last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(folder.glob("wandb/*run-*/run-*.wandb")):
        content, position, record = path.read_bytes(), 7, b""
        while position < len(content):
            left = 32768 - position % 32768
            if left < 7:
                position += left
                continue
            _, length, kind = struct.unpack_from("<IHB", content, position)
            record += content[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):
                yield path.stem.removeprefix("run-"), Record.FromString(record)
                record = b""


def history(folder):
    """(run id, metrics) of every logged step."""
    for run_id, record in records(folder):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield run_id, {i.key or ".".join(i.nested_key): i.value_json for i in items}


def test_offline_run_holds_every_epoch_the_curves_and_the_final_accuracy(demo):
    folder, output = demo
    with (folder / "log.csv").open() as file:
        log = list(csv.DictReader(file))
    epochs = {int(m["epoch"]): m for _, m in history(folder) if "epoch" in m}
    assert sorted(epochs) == [int(row["epoch"]) for row in log]
    for row in log:
        metrics = epochs[int(row["epoch"])]
        for name in ("lr", "train_loss", "train_accuracy"):
            assert float(metrics[name]) == pytest.approx(float(row[name]))
    assert any(m.get("curves._type") == '"image-file"' for _, m in history(folder))
    summary = {}
    for _, record in records(folder):
        if record.WhichOneof("record_type") == "summary":
            summary |= {item.key: item.value_json for item in record.summary.update}
    assert f"test accuracy: {float(summary['test_accuracy']):.2f}%" in output
    configs = [r.run.config for _, r in records(folder) if r.HasField("run")]
    assert {u.key: u.value_json for u in configs[0].update}["batch_size"] == "64"


@pytest.mark.slow
def test_auto_without_a_login_is_offline_asks_nothing_and_resumes_the_same_run(tmp_path):
    line = "train.py demo --name group/demo --epochs 2 --max-steps-per-epoch 2 --wandb auto".split()
    alone = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_API_KEY": ""}
    first = run(*line, **alone)
    assert first.returncode == 0, first.stderr
    assert "offline, in checkpoints" in first.stdout
    again = run(*line, "--resume", **alone)
    assert again.returncode == 0, again.stderr
    folder = tmp_path / "checkpoints" / "group" / "demo"
    assert len(list(folder.glob("wandb/offline-run-*"))) == 2
    assert len({run_id for run_id, _ in history(folder)}) == 1
    runs = [record.run for _, record in records(folder) if record.HasField("run")]
    assert {(run.display_name, run.run_group) for run in runs} == {("demo", "group")}


def test_missing_library_is_one_warning(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    train(replace(tiny, wandb="auto"))
    assert capsys.readouterr().err == (
        "warning: wandb: import of wandb halted; None in sys.modules; going on without it\n"
    )


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_failing_library_is_one_warning_and_the_result_the_same(tiny, monkeypatch, capsys, broken):
    _, expected = train(replace(tiny, name="without"))
    capsys.readouterr()
    wandb = pytest.importorskip("wandb")

    def fail(*_, **__):
        raise ZeroDivisionError("out of order\nand more")

    online = mock.Mock(id="abc", summary={})
    setattr(online, broken, fail)
    monkeypatch.setattr(wandb, "init", fail if broken == "init" else lambda **_: online)
    assert train(replace(tiny, wandb="offline"))[1] == expected
    assert capsys.readouterr().err == "warning: wandb: out of order; going on without it\n"


@pytest.mark.parametrize("trouble", ["broken login", "unwritable folder"])
def test_real_library_in_trouble_is_one_warning(tiny, monkeypatch, capsys, trouble):
    if trouble == "broken login":
        monkeypatch.setenv("WANDB_API_KEY", "no-key")
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # refuses
        mode, words = "auto", "WANDB_API_KEY invalid"
    else:
        Path("checkpoints/tiny").mkdir(parents=True)
        Path("checkpoints/tiny/wandb").write_text("a file in the way of the folder")
        mode, words = "offline", "Not a directory"
    train(replace(tiny, wandb=mode))
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: wandb: ")
    assert words in captured.err
    assert captured.err.endswith("; going on without it\n")
    assert captured.err.count("\n") == 1
    assert "test accuracy" in captured.out


def test_disabled_never_imports_the_library(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    train(tiny)
    assert capsys.readouterr().err == ""
    assert metrics.WandbRun("disabled", None, {}).id is None


# ---------------------------------------------------------------- a server that goes silent


WITHIN = 45  # seconds on a busy machine; the old wait had no end
TRAIN = "script.run_script(train.main)"
LINE = "demo --max-steps-per-epoch 2 --wandb online --epochs".split()
UNSENT = (
    "warning: wandb: not all was sent in time;"
    " `wandb sync --include-online checkpoints/demo/wandb/run-*` sends it; going on without it\n"
)


@contextlib.contextmanager
def online(silent, code, *args, seconds):
    """`code` in a process of its own, with a deadline of `seconds` and such a server."""
    preamble = f"import script, wandb, metrics, train\nmetrics.FINISH_SECONDS = {seconds}\n"
    with wandb_server(silent) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", preamble + code, *args],
            env=os.environ | environment(server) | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            try:
                yield process
            finally:
                process.kill()


def read_until(process, start):
    """Wait until it has printed a line with this start; returns the time."""
    lines = iter(process.stdout.readline, "")
    assert any(line.startswith(start) for line in lines), process.stderr.read()
    return time.monotonic()


@pytest.mark.slow
def test_silent_server_costs_a_finished_run_nothing_and_sync_sends_it_later():
    with online("once a run has started", TRAIN, *LINE, "2", seconds=3) as process:
        start = read_until(process, "test accuracy: ")  # printed, and flushed, before the wait
        assert Path("checkpoints/demo/model.safetensors").exists()
        _, err = process.communicate(timeout=WITHIN)
        assert (process.returncode, err) == (0, UNSENT)
        assert time.monotonic() - start > 3
    with wandb_server() as server:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = os.environ | environment(server) | {"PATH": path}
        command = re.search("`(.*)`", err)[1]
        subprocess.run(command, shell=True, env=env, check=True, capture_output=True, timeout=60)
        for what in (b'"test_accuracy"', b"PNG", b"train_accuracy"):
            assert any(what in body for body in server.received)


@pytest.mark.slow
def test_signal_ends_the_wait_for_a_silent_server():
    with online("once a run has started", TRAIN, *LINE, "1", seconds=600) as process:
        read_until(process, "next: ")
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=WITHIN)
        assert process.returncode == 0, err
        assert err.endswith(UNSENT)
        assert err.count("warning: ") == 1
        assert "Traceback" not in err


@pytest.mark.slow
def test_signal_in_a_training_with_a_silent_server_is_not_kept_waiting():
    with online("once a run has started", TRAIN, *LINE, "4000", seconds=3) as process:
        read_until(process, "epoch    1/4000")
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=WITHIN)
        assert process.returncode == 128 + signal.SIGTERM, err
        assert "Traceback" not in err
    folder = Path("checkpoints/demo")
    assert f"saved in {folder.as_posix()}" in err
    assert (folder / "last.pt").exists()
    # What W&B would have shown: it failed, with this status.
    statuses = [record.exit.exit_code for _, record in records(folder) if record.HasField("exit")]
    assert statuses == [process.returncode]


def test_server_that_never_says_anything_is_one_warning():
    code = """
from pathlib import Path
settings = wandb.Settings
wandb.Settings = lambda **options: settings(**options | {"init_timeout": 2})
metrics.WandbRun("online", Path("run"), {}).finish({}, Path("run/curves.png"), None)
print("done", flush=True)"""
    with online("at once", code, seconds=600) as process:
        read_until(process, "done")
        _, err = process.communicate(timeout=12)
        assert process.returncode == 0, err
        assert re.fullmatch("warning: wandb: .*; going on without it\n", err)


@pytest.mark.slow
def test_logging_to_a_silent_server_does_not_block_and_ending_the_run_has_a_deadline():
    code = """
from pathlib import Path
run = metrics.WandbRun("online", Path("run"), {})
for epoch in range(3000):
    run.log({"epoch": epoch, "train_loss": 1.0})
print("logged", flush=True)
try:
    wandb.finish()  # as search.py ends a trial
except TimeoutError:
    print("not all was sent")"""
    with online("once a run has started", code, seconds=3) as process:
        start = read_until(process, "Weights & Biases: run")
        assert read_until(process, "logged") - start < 20
        assert process.communicate(timeout=WITHIN) == ("not all was sent\n", "")
        assert process.returncode == 0
