"""The real library, in its offline mode; and its absence and failure, which must cost nothing."""

import csv
import struct
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from conftest import run

import metrics
from train import train


def offline_records(folder):
    """Records of every offline run in a run folder, oldest first: (run id, protobuf record).

    A .wandb file is a LevelDB log: 32 KiB blocks of fragments, each with a checksum, length and
    type (1 whole, 2 first, 3 middle, 4 last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
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
    for run_id, record in offline_records(folder):
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
    for _, record in offline_records(folder):
        if record.WhichOneof("record_type") == "summary":
            summary |= {item.key: item.value_json for item in record.summary.update}
    assert f"test accuracy: {float(summary['test_accuracy']):.2f}%" in output
    configs = [r.run.config for _, r in offline_records(folder) if r.HasField("run")]
    assert {u.key: u.value_json for u in configs[0].update}["batch_size"] == "64"


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
    runs = [record.run for _, record in offline_records(folder) if record.HasField("run")]
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
