"""A run cannot be lost: kills, signals, full disks, two runs at once, divergence, damaged files."""

import fcntl
import functools
import hashlib
import io
import itertools
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
import termios
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_LINE, Bomb, command, run, run_main
from faults import SMALL

import checkpoint
import learner
import train as train_script
import utils
from config import PRESETS, check_resumable, record
from data import load_dataset
from metrics import Metrics
from train import main, train
from utils import InputError, StoppedError
from weights import load_model

FOLDER = Path("checkpoints/tiny")
LINE = [*TINY_LINE, "--save-minutes", "0"]


def weights(folder=FOLDER):
    return load_model(folder / "model.safetensors")[0].state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def where(state):
    """Whole epochs, and steps since."""
    return len(state["metrics"]["log"]), state["metrics"]["step"]


def log(folder=FOLDER):
    return [{**row, "seconds": ""} for row in utils.read_csv(folder / "log.csv")]


@pytest.fixture
def at_step(monkeypatch):
    """Make something happen while a training takes its n-th step."""

    def arrange(number, action):
        count, step = itertools.count(1), torch.optim.SGD.step

        def stepping(*args):
            if next(count) == number:
                action()
            return step(*args)

        monkeypatch.setattr(torch.optim.SGD, "step", stepping)

    return arrange


@pytest.fixture
def network(monkeypatch):
    """A list that gets the network as soon as it is made."""
    made, make_model = [], learner.make_model

    def make(*args):
        made.append(make_model(*args))
        return made[-1]

    monkeypatch.setattr(learner, "make_model", make)
    return made


# ---------------------------------------------------------------- kills, at random


@pytest.mark.slow
def test_small_campaign_loses_nothing():
    """Kills, signals and damage, for the recipes of all presets; `faults.py` says what it does."""
    numbers = {"kills": 4, "signals": 4, "corruptions": 8, "searches": 20, "silences": 0}
    result = run("tests/faults.py", *(f"--{name}={n}" for name, n in numbers.items()))
    assert result.returncode == 0, result.stdout + result.stderr
    kills, resumes, signals, corruptions, searches, silences = result.stdout.splitlines()
    assert kills.startswith("kills 4, ")
    assert re.search(r" within an epoch [0-4]; identical 4, lost 0$", resumes)
    assert re.search(r"^signals 4: .*, wrong 0$", signals)
    assert re.search(r"^corruptions 8: detected \d+, harmless \d+, wrong 0$", corruptions)
    assert searches == "damaged searches 20: rows kept 20, lost 0"
    assert silences == "silences 0: right 0, wrong 0"


def test_kill_while_a_damaged_state_is_replaced_loses_nothing(tiny, monkeypatch):
    """last.pt is damaged; the first save after it must not make it the previous one."""
    _, whole = train(replace(tiny, name="whole"))
    train(tiny)
    path = FOLDER / "last.pt"
    path.write_bytes(path.read_bytes()[:-100])
    replace_path = Path.replace

    def stop_between_the_renamings(self, target):
        replace_path(self, target)
        if Path(target).name == checkpoint.PREVIOUS:
            raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop_between_the_renamings)
        with pytest.raises(ZeroDivisionError):
            train(replace(tiny, resume=True))
    assert train(replace(tiny, resume=True))[1] == whole


def test_what_a_killed_process_was_writing_is_removed(tiny):
    leftover = FOLDER / f"{utils.TEMPORARY}abc"
    leftover.mkdir(parents=True)
    (leftover / "last.pt").write_text("half")
    train(tiny)
    assert not leftover.exists()


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_signal_lets_the_step_end_saves_and_says_how_to_go_on(
    name, tiny, at_step, monkeypatch, capsys
):
    _, whole = train(replace(tiny, name="whole"))
    number = getattr(signal, name)
    at_step(5, lambda: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    assert run_main(main, *LINE, monkeypatch=monkeypatch) == 128 + number
    assert signal.getsignal(number) == before
    assert capsys.readouterr().err == (
        f"stopped by {name} after epoch 2, step 2, saved in checkpoints/tiny;"
        " the same command with --resume goes on from there\n"
    )
    state = checkpoint.load_state(FOLDER / "last.pt")
    assert where(state) == (1, 2)
    at_step(1, lambda: os.kill(os.getpid(), number))
    with pytest.raises(StoppedError, match="saved in checkpoints/tiny; the same command goes on"):
        train(replace(tiny, resume=True))
    assert train(replace(tiny, resume=True))[1] == whole
    assert same(weights(), weights(Path("checkpoints/whole")))
    assert log() == log(Path("checkpoints/whole"))


def test_signal_in_the_last_step_of_an_epoch(tiny, at_step, monkeypatch, capsys):
    monkeypatch.setattr(
        checkpoint.Checkpointer, "after_step", lambda self: None
    )  # it came after that
    at_step(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_main(main, *LINE, monkeypatch=monkeypatch) == 143
    assert "stopped by SIGTERM after epoch 2, saved" in capsys.readouterr().err
    assert len(log()) == 2


def test_signal_too_late_to_matter_lets_the_run_finish(tiny, monkeypatch, capfd):
    """The last step is taken and the network tested when it comes."""
    finish = checkpoint.Checkpointer.finish

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        finish(*args)

    monkeypatch.setattr(checkpoint.Checkpointer, "finish", signalled)
    assert run_main(main, *LINE, monkeypatch=monkeypatch) == 0
    assert load_model(FOLDER / "model.safetensors")[1]["accuracy"]["test"] is not None
    assert "test accuracy" in capfd.readouterr().out


def test_signal_in_the_last_epoch_leaves_only_the_test_to_resume(
    tiny, at_step, monkeypatch, capsys
):
    _, whole = train(replace(tiny, name="whole"))
    capsys.readouterr()
    monkeypatch.setattr(checkpoint.Checkpointer, "after_step", lambda self: None)
    at_step(9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_main(main, *LINE, monkeypatch=monkeypatch) == 143
    captured = capsys.readouterr()
    assert "stopped by SIGTERM after epoch 3, saved" in captured.err
    assert "test accuracy" not in captured.out
    assert train(replace(tiny, resume=True))[1] == whole


@pytest.mark.parametrize("step", [2, 5])
def test_run_goes_on_among_its_smaller_images_and_among_the_others(step, tiny, at_step):
    small = {name: getattr(PRESETS["best"], name) for name in SMALL}
    config = replace(tiny, **small, epochs=2)
    _, whole = train(replace(config, name="whole"))
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedError):
        train(config)
    assert train(replace(config, resume=True))[1] == whole
    assert same(weights(), weights(Path("checkpoints/whole")))


@pytest.mark.parametrize("moment", ["last epoch", "finish", "before its first step"])
def test_signal_stops_before_the_next_seed(moment, tiny, at_step, monkeypatch, capfd):
    interrupt = partial(os.kill, os.getpid(), signal.SIGINT)
    with monkeypatch.context() as patch:
        if moment == "last epoch":
            patch.setattr(checkpoint.Checkpointer, "after_step", lambda self: None)
            at_step(9, interrupt)
        elif moment == "finish":
            finish = checkpoint.Checkpointer.finish
            patch.setattr(
                checkpoint.Checkpointer, "finish", lambda *args: (interrupt(), finish(*args))
            )
        else:  # while the second network's data is loaded
            loads = itertools.count(1)
            patch.setattr(
                train_script,
                "load_dataset",
                lambda *args: (next(loads) == 2 and interrupt(), load_dataset(*args))[1],
            )
        assert run_main(main, *LINE, "--seeds", 3, monkeypatch=patch) == 130
    errors = capfd.readouterr().err.splitlines()
    assert errors[0] == "SIGINT: stopping after this step; again to stop at once"
    assert errors[1].startswith("stopped by SIGINT ")
    assert errors[1].endswith("the same command with --resume goes on from there")
    assert len(errors) == 2
    begun = {path.name for path in Path("checkpoints").iterdir()}
    assert begun == ({"tiny-0", "tiny-1"} if moment.startswith("before") else {"tiny-0"})
    if moment.startswith("before"):
        assert where(checkpoint.load_state(Path("checkpoints/tiny-1/last.pt"))) == (0, 1)
    assert run_main(main, *LINE, "--seeds", 3, "--resume", monkeypatch=monkeypatch) == 0
    assert "3 seeds: test accuracy" in capfd.readouterr().out


@pytest.mark.parametrize("split", ["val", "test"])
def test_signal_while_evaluating(split, tiny, monkeypatch, capsys):
    """It is heard between two batches; what was learned in the epoch is not lost."""
    config = replace(tiny, val_size=100)
    monkeypatch.setattr("metrics.EVAL_BATCH", 50)  # val: 2 batches an epoch, test: 8
    rows, whole = train(replace(config, name="whole"))
    capsys.readouterr()
    forward, batches = learner.ResNet.forward, itertools.count()
    fatal = 3 if split == "val" else 7  # number 0 is the one that counts the MACs

    def signalled(self, x):
        if not self.training and next(batches) == fatal:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(learner.ResNet, "forward", signalled)
        assert run_main(main, *LINE, "--val-size", 100, monkeypatch=patch) == 143
    captured = capsys.readouterr()
    place = "epoch 2, step 3" if split == "val" else "epoch 3"
    assert f"stopped by SIGTERM after {place}, saved" in captured.err
    assert "test accuracy" not in captured.out
    assert next(batches) == fatal + 1  # it was heard at once
    assert train(replace(config, resume=True))[1] == whole
    assert [row["val_loss"] for row in log()] == [row["val_loss"] for row in rows]


def test_second_ctrl_c_stops_at_once(tiny, at_step, monkeypatch, capfd):
    at_step(5, lambda: (os.kill(os.getpid(), signal.SIGINT), os.kill(os.getpid(), signal.SIGINT)))
    assert run_main(main, *LINE, monkeypatch=monkeypatch) == 130
    assert capfd.readouterr().err == (
        "SIGINT: stopping after this step; again to stop at once\n"
        "interrupted; --resume goes on from what was saved\n"
    )
    state = checkpoint.load_state(FOLDER / "last.pt")
    assert where(state) == (1, 1)  # nothing was saved any more


@pytest.mark.parametrize("ignored", [False, True], ids=["", "nohup"])
def test_closed_terminal(ignored):
    """The terminal goes in mid-training: saved as at SIGTERM; under nohup the run goes on."""
    line = command("train.py", *LINE, "--epochs", 12 if ignored else 400)
    master, slave = os.openpty()
    process = subprocess.Popen(
        ["nohup", *line] if ignored else line,
        stdin=slave,
        stdout=subprocess.PIPE if ignored else slave,
        stderr=subprocess.DEVNULL if ignored else slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    output = process.stdout.fileno() if ignored else master
    shown = b""
    while b"epoch   2/" not in shown and b"epoch  2/" not in shown:
        shown += os.read(output, 1000)
    os.close(master)
    assert process.wait(timeout=60) == (0 if ignored else 128 + signal.SIGHUP)
    epoch, _ = where(checkpoint.load_state(FOLDER / "last.pt"))
    assert epoch == 12 if ignored else 2 <= epoch < 400


@pytest.mark.parametrize("streams", ["2>&-", "<&- >&- 2>&-"])
def test_closed_streams(tiny, streams):
    line = " ".join(command("train.py", *LINE))
    result = subprocess.run(
        ["bash", "-c", f"exec {line} {streams}"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert load_model(FOLDER / "model.safetensors")[1]["accuracy"]["test"] is not None
    assert len(log()) == 3
    assert ("test accuracy" in result.stdout) == (streams == "2>&-")


@pytest.mark.slow
def test_slurm_script_of_the_docs_requeues_itself(tmp_path):
    """With stand-ins for srun, which here warns of the end of the time, and scontrol."""
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    script = re.search(r"```sh\n(#!/bin/bash\n.*?)```", page, re.DOTALL).group(1)
    assert "srun python train.py tpsnet --wandb offline --resume\n" in script
    small = "demo --name tpsnet --epochs 400 --max-steps-per-epoch 2 --wandb offline"
    script = script.replace("train.py tpsnet --wandb offline", f"{ROOT / 'train.py'} {small}")
    srun = """
        shift
        "$PYTHON" "$@" > out.txt &
        until grep -q "^epoch *2/" out.txt; do sleep 0.1; done
        kill -USR1 $!
        wait $!
    """
    for name, text in {"srun": srun, "scontrol": 'echo "$@" > scontrol.txt'}.items():
        Path(name).write_text(f"#!/bin/bash\n{text}\n")
        Path(name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    job = subprocess.run(
        ["bash", "-c", script],
        env=env | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert "stopped by SIGUSR1 after epoch " in job.stderr
    assert Path("scontrol.txt").read_text() == "requeue 77\n"
    assert job.returncode == 0

    Path("srun").write_text('#!/bin/bash\necho "$@" > srun.txt\nexit 3\n')  # the next time
    job = subprocess.run(["bash", "-c", script], env=env, check=False)
    assert Path("srun.txt").read_text().split()[-1] == "--resume"
    assert job.returncode == 3


# ---------------------------------------------------------------- files


def test_states_are_saved_as_often_as_asked(tiny, monkeypatch):
    counts = []
    for every, epoch_save in ((5.0, 0), (5.0, 1e6), (0.0, 1e6)):
        saved = []
        monkeypatch.setattr(checkpoint, "save_state", lambda *args, saved=saved: saved.append(args))
        monkeypatch.setattr(checkpoint, "EPOCH_SECONDS", epoch_save)
        train(replace(tiny, save_minutes=every, name=f"run-{len(counts)}"))
        counts.append(len(saved))
    assert counts == [1 + 3, 1 + 1, 1 + 3 * (3 + 1)]  # at the start, at epochs' ends, each step


def test_previous_state_is_kept(tiny):
    train(replace(tiny, save_minutes=0.0))
    states = [checkpoint.read_state(FOLDER / name) for name in ("last.pt", checkpoint.PREVIOUS)]
    assert [where(state) for state in states] == [(3, 0), (2, 3)]


def test_full_disk_stops_with_one_line_and_leaves_the_checkpoint(tiny, monkeypatch, capsys):
    """The kernel refuses to let a file grow: the second epoch's state does not fit any more."""
    _, whole = train(replace(tiny, name="whole"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (400_000, hard))
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "print_epoch", lambda _: fill())
        try:
            assert run_main(main, *LINE, monkeypatch=patch) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err == (
        "error: checkpoints/tiny/last.pt: cannot be written (File too large);"
        " what was there before is intact\n"
    )
    assert not list(FOLDER.glob(f"{utils.TEMPORARY}*"))
    assert where(checkpoint.read_state(FOLDER / "last.pt"))[0] == 1
    assert train(replace(tiny, resume=True))[1] == whole


def test_log_that_another_program_holds_costs_a_warning(tiny, monkeypatch, capsys):
    """As a spreadsheet on Windows does; it is written again after the next epoch."""
    write, calls = checkpoint.write_csv, itertools.count(1)

    def refuse_the_second(path, rows):
        if next(calls) == 2:
            raise InputError("log.csv: cannot be written")
        write(path, rows)

    monkeypatch.setattr(checkpoint, "write_csv", refuse_the_second)
    rows, _ = train(tiny)
    assert capsys.readouterr().err == "warning: log.csv: cannot be written\n"
    assert len(log()) == len(rows) == 3


@pytest.mark.parametrize("reason", ["its disk is full", "its reader has gone"])
def test_output_that_cannot_be_written(tiny, monkeypatch, capsys, reason):
    if reason == "its disk is full":
        writer, status, error = os.open("/dev/full", os.O_WRONLY), 2, "error: [Errno 28] No space"
    else:
        reader, writer = os.pipe()
        os.close(reader)
        status, error = 141, ""
    with monkeypatch.context() as patch, os.fdopen(writer, "w") as output:
        patch.setattr(sys, "stdout", output)
        assert run_main(main, *LINE, monkeypatch=patch) == status
    errors = capsys.readouterr().err
    assert errors.startswith(error)
    assert errors.count("\n") == (status == 2)


def test_second_run_in_a_folder_is_refused(tiny, monkeypatch, capsys):
    with checkpoint.lock_folder(FOLDER):
        assert run_main(main, *LINE, monkeypatch=monkeypatch) == 2
        assert capsys.readouterr().err == (
            "error: name: another process is training in checkpoints/tiny; give another --name\n"
        )
        assert [path.name for path in FOLDER.iterdir()] == ["run.lock"]
    train(tiny)  # free again


def test_state_is_read_under_the_lock(tiny, monkeypatch):
    """Another process goes on with the run and ends between our first look and our lock."""
    train(replace(tiny, epochs=1))
    longer, load = replace(tiny, resume=True), train_script.load_dataset
    results = []

    def meanwhile(*args):
        monkeypatch.setattr(train_script, "load_dataset", load)
        results.append(train(replace(longer, epochs=2)))
        return load(*args)

    monkeypatch.setattr(train_script, "load_dataset", meanwhile)
    rows, _ = train(longer)
    assert rows[:2] == results[0][0]  # to the seconds: it was not trained again
    assert len(log()) == 3


@pytest.mark.parametrize("name", checkpoint.RUN_FILES)
def test_any_file_of_a_run_protects_it(tiny, name):
    FOLDER.mkdir(parents=True)
    (FOLDER / name).write_text("mine")
    with pytest.raises(InputError, match=f"holds a run already .{name}.; .* --overwrite"):
        train(tiny)
    assert [path.read_text() for path in FOLDER.iterdir()] == ["mine"]


def test_resume_starts_a_run_where_there_is_none(tiny, capsys):
    train(replace(tiny, resume=True))
    assert "resume: nothing was saved before; from the start\n" in capsys.readouterr().out
    train(replace(tiny, name="other"))
    assert "resume" not in capsys.readouterr().out
    assert same(weights(), weights(Path("checkpoints/other")))


def test_resume_does_not_overwrite_a_run_without_its_state(tiny):
    train(tiny)
    before = (FOLDER / "model.safetensors").read_bytes()
    for name in ("last.pt", checkpoint.PREVIOUS):
        (FOLDER / name).unlink()
    with pytest.raises(InputError, match=r"^name: .* a run without its last.pt .config.json.; "):
        train(replace(tiny, resume=True))
    assert (FOLDER / "model.safetensors").read_bytes() == before


def test_overwrite_starts_anew(tiny):
    train(replace(tiny, seed=5, epochs=4))
    (FOLDER / "notes.txt").write_text("mine")
    (FOLDER / "model_mistakes.png").write_text("of the run before")
    (FOLDER / "model_mine.png").write_text("no run's")
    train(replace(tiny, overwrite=True))
    train(replace(tiny, name="other"))
    assert same(weights(), weights(Path("checkpoints/other")))
    assert len(log()) == 3
    assert (FOLDER / "notes.txt").read_text() == "mine"
    assert not (FOLDER / "model_mistakes.png").exists()
    assert (FOLDER / "model_mine.png").exists()
    assert checkpoint.read_state(FOLDER / "last.pt")["config"] == record(tiny)


# ---------------------------------------------------------------- divergence and drift


def test_gradient_that_is_not_finite_is_never_saved(tiny, at_step, network, monkeypatch, capsys):
    """In the very last step, when no loss comes after it."""
    at_step(9, lambda: network[0].linear.bias.grad.fill_(float("inf")))
    assert run_main(main, *LINE, monkeypatch=monkeypatch) == 1
    assert capsys.readouterr().err == (
        "error: epoch 3, step 3: weights or gradients are not finite at lr 0.025; the last good"
        " state is checkpoints/tiny/last.pt; start again with a lower --lr, under another --name\n"
    )
    state = checkpoint.read_state(FOLDER / "last.pt")
    assert (*where(state), len(log())) == (2, 2, 2)
    assert checkpoint.all_finite(state)
    assert all(tensor.isfinite().all() for tensor in weights().values())


def test_loss_that_is_not_finite_names_its_step(tiny, at_step, network, monkeypatch, capsys):
    at_step(4, lambda: network[0].linear.bias.grad.fill_(float("nan")))
    monkeypatch.setattr(checkpoint, "EPOCH_SECONDS", 0)
    assert run_main(main, *LINE, "--save-minutes", "5", monkeypatch=monkeypatch) == 1
    assert capsys.readouterr().err.startswith(
        "error: epoch 2, step 2: the loss is nan at lr 0.075; the last good state is checkpoints"
    )
    assert where(checkpoint.read_state(FOLDER / "last.pt"))[0] == len(log()) == 1


def test_run_may_become_longer_but_not_shorter(tiny):
    train(replace(tiny, schedule="linear"))
    with pytest.raises(InputError, match=r"^epochs: 2, but .* with 3; give that or more"):
        train(replace(tiny, schedule="linear", epochs=2, resume=True))
    train(replace(tiny, schedule="linear", epochs=6, resume=True))
    rates = [row["lr"] for row in log()]
    assert rates == pytest.approx([0.1, 0.2 / 3, 0.1 / 3, 0.05, 0.1 / 3, 0.1 / 6])


def test_constants_that_change_nothing_may_change(tiny, tmp_path):
    first = train(tiny)
    FOLDER.rename("checkpoints/renamed")
    changes = {"name": "renamed", "data_dir": "elsewhere", "save_minutes": 1.0, "wandb": "offline"}
    check_resumable(replace(tiny, compile=True), record(tiny), FOLDER)
    assert train(replace(tiny, resume=True, **changes)) == first


def test_other_images_are_refused(tiny, monkeypatch):
    train(tiny)
    other = replace(load_dataset("digits"), fingerprint="another")
    monkeypatch.setattr(train_script, "load_dataset", lambda *_: other)
    with pytest.raises(InputError, match=r"^data_dir: it holds other images"):
        train(replace(tiny, resume=True))


# ---------------------------------------------------------------- hostile files


def test_state_with_code_inside_is_refused_though_its_checksum_is_right(tiny):
    train(tiny)
    path = FOLDER / "last.pt"
    checkpoint.save_state(path, {"model": Bomb()})
    checkpoint.save_state(path, {"model": Bomb()})  # and the previous one
    with pytest.raises(InputError, match=r"^resume: .*last.pt is damaged or was not written by"):
        train(replace(tiny, resume=True))
    assert not Path("bomb_went_off").exists()


def deflated(content):
    """The same zip file, packed, with a record of zeros that unpacks to 500 MB."""
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for record in old.infolist():
            zeros = record.filename.endswith("data/0")
            new.writestr(record.filename, bytes(500_000_000) if zeros else old.read(record))
    return packed.getvalue()


HOSTILE_STATES = {
    "unpacks to much": lambda: deflated(saved({"a": torch.zeros(125_000_000)[:1].clone()})),
    "claims much": lambda: saved({"a": torch.zeros(1).expand(10**9)}),
    "in the old format": lambda: saved({"a": torch.zeros(1)}, _use_new_zipfile_serialization=False),
    "a billion lists": lambda: saved({"config": functools.reduce(lambda x, _: [x] * 9, "." * 40)}),
}


def saved(state, **options):
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", HOSTILE_STATES)
def test_hostile_state_takes_no_memory_before_it_is_refused(tiny, kind):
    train(tiny)
    content = HOSTILE_STATES[kind]()
    for name in ("last.pt", checkpoint.PREVIOUS):
        (FOLDER / name).write_bytes(content + hashlib.sha256(content).digest())
    limit = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + 300_000_000
    with pytest.raises(InputError, match=r"^resume: .*last.pt (is damaged|lacks)"):
        train(replace(tiny, resume=True))
    assert 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < limit


@pytest.mark.parametrize("length", [2**62, 10**9, 2**64 - 1])
def test_safetensors_file_that_lies_about_its_sizes(tiny, length):
    train(tiny)
    path = FOLDER / "model.safetensors"
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    liars = [
        length.to_bytes(8, "little") + content[8:],  # of the header
        content[:8] + content[8 : 8 + header].replace(b"[8,3,3,3]", b"[8,3,3,9]") + content[-99:],
    ]
    for liar in liars:
        assert liar != content
        path.unlink()
        path.write_bytes(liar)
        with pytest.raises(InputError, match=r"^checkpoint: .* is damaged"):
            load_model(path)


@pytest.mark.parametrize("link", ["data_batch_3.bin", "archive"])
def test_data_file_that_is_a_link_to_somewhere_else(cifar10_bin, tmp_path, link):
    source = cifar10_bin / "cifar-10-batches-bin"
    if link == "archive":
        Path("data").mkdir()
        Path("outside").write_text("precious")
        Path("data/cifar-10-python.tar.gz").symlink_to(tmp_path / "outside")
    else:
        Path("data/cifar-10-batches-bin").mkdir(parents=True)
        for path in source.iterdir():
            if path.name != link:
                Path("data/cifar-10-batches-bin", path.name).hardlink_to(path)
        Path("data/cifar-10-batches-bin", link).symlink_to(source / link)
    with pytest.raises(InputError, match=r"^data_dir: .* is a link to .*, outside its folder"):
        load_dataset("cifar10", download=True)
    if link == "archive":
        assert Path("outside").read_text() == "precious"
    Path("linked").symlink_to(cifar10_bin)  # a whole folder may be elsewhere
    assert len(load_dataset("cifar10", "linked").train) == 50_000


def test_archive_with_names_that_lead_out_of_the_folder_is_not_unpacked(monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # refuses
    Path("evil").write_text("evil")
    Path("data").mkdir()
    with tarfile.open("data/cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add("evil", "../escaped")
        tar.add("evil", "cifar-10-batches-py/../../escaped")
    for download in (False, True):
        with pytest.raises(InputError, match=r"^data_dir: no CIFAR-10 in data"):
            load_dataset("cifar10", download=download)
        assert not Path("escaped").exists()


def test_pickle_in_the_place_of_a_batch_is_not_loaded(monkeypatch):
    import pickle

    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    folder = Path("data", CIFAR10.base_folder)
    folder.mkdir(parents=True)
    for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list, ["batches.meta", ""]]:
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match=r"^data_dir: no CIFAR-10 in data"):
        load_dataset("cifar10", download=False)
    assert not Path("bomb_went_off").exists()
