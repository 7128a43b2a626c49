"""A run cannot be lost: kills, signals, full disks, two runs at once, divergence, damaged files."""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import threading
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, command, make_pictures, run_main
from faults import RECIPES, Fork, digest, result

import utils
from config import PRESETS, check_resumable, record
from data import load_dataset, train_batches
from engine import distributed
from engine.checkpoint import PREVIOUS, load_model, load_state, read_state, save_model, save_state
from engine.evaluate import classify, evaluate
from engine.progress import Progress
from engine.run import RUN_FILES, Run, lock_folder
from engine.script import stop_signals
from engine.start import Start
from learner import Learner
from model import Architecture, ResNet
from train import train, train_seeds
from utils import DivergenceError, InputError, StoppedError, duration, part_of

FOLDER = Path("checkpoints/tiny")
EACH_STEP = replace(TINY, save_minutes=0.0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the forks: the number of threads decides how sums are rounded."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of one epoch."""
    with contextlib.chdir(tmp_path_factory.mktemp("trained")):
        train(replace(TINY, epochs=1))
        return FOLDER.absolute()


def where(folder=FOLDER):
    """Whole epochs, and steps since, of the saved state."""
    position = load_state(folder / "last.pt")[0]["metrics"]
    return len(position["log"]), position["step"]


def log(folder=FOLDER):
    return [{**row, "seconds": ""} for row in utils.read_csv(folder / "log.csv")]


def files():
    """All files with their content, but for locks."""
    paths = (path for path in Path("checkpoints").rglob("*") if path.name != "run.lock")
    return {path: path.is_dir() or path.read_bytes() for path in paths}


# ---------------------------------------------------------------- resuming equals the whole run

PROXY, AVERAGE = RECIPES[2], RECIPES[3]  # with Muon and smaller images first; with dropout
STEPS = TINY.max_steps_per_epoch  # each step and each epoch's end is a save
RECIPE = {
    "tiny": EACH_STEP,
    "proxy, muon": replace(PROXY, name="tiny", max_steps_per_epoch=3),
    "average, dropout, scaled": replace(AVERAGE, name="tiny", max_steps_per_epoch=3),
}
MOMENTS = {
    "kill while the first state is saved": ("last.pt", 1, signal.SIGKILL, None),
    "kill in mid-epoch": (PREVIOUS, 5, signal.SIGKILL, (1, 1)),
    "kill between the two renamings": ("last.pt", 6, signal.SIGKILL, (1, 1)),
    "kill after an epoch's last step": (PREVIOUS, 3, signal.SIGKILL, (0, 3)),
    "kill after an epoch before its log row": ("log.csv", 1, signal.SIGKILL, (1, 0)),
    "kill after the last epoch before the test": ("log.csv", -1, signal.SIGKILL, "end"),
    "kill after the test": ("model.safetensors", -1, signal.SIGKILL, "end"),
    "SIGTERM in mid-epoch": (PREVIOUS, 4, signal.SIGTERM, (1, 2)),
    "SIGINT before the validation": (PREVIOUS, 2, signal.SIGINT, (0, 3)),  # if there is one
    "SIGUSR1 at an epoch's end": (PREVIOUS, 3, signal.SIGUSR1, (1, 1)),
    "SIGHUP after the last epoch": ("log.csv", -1, signal.SIGHUP, "end"),
}
TINY_MOMENTS = [moment for moment in MOMENTS if "validation" not in moment]
CASES = [
    *((moment, "tiny") for moment in TINY_MOMENTS),
    ("kill in mid-epoch", "proxy, muon"),
    ("SIGTERM in mid-epoch", "proxy, muon"),
    ("kill between the two renamings", "average, dropout, scaled"),
    ("SIGINT before the validation", "average, dropout, scaled"),
]


@functools.cache
def whole(config):
    """Digests of what an unbroken run leaves."""
    fork = Fork(config)
    assert fork.wait() == 0, "\n".join(fork.lines)
    found = result(config)
    shutil.rmtree("checkpoints")
    return found


QUICK = (
    ("kill in mid-epoch", "proxy, muon"),
    ("kill after an epoch before its log row", "tiny"),
    ("kill after the last epoch before the test", "tiny"),
    ("SIGTERM in mid-epoch", "tiny"),
)


@pytest.mark.parametrize(
    ("moment", "recipe"),
    [
        pytest.param(*case, id=", ".join(case), marks=[pytest.mark.slow] * (case not in QUICK))
        for case in CASES
    ],
)
def test_resuming_equals_the_whole_run_to_the_bit(moment, recipe):
    config = RECIPE[recipe]
    expected = whole(config)
    name, nth, number, position = MOMENTS[moment]
    if nth < 0:  # of the last epoch, or of the end
        nth = config.epochs + (name == "model.safetensors")
    fork = Fork(config, {(name, nth): number})
    status = fork.wait()
    if number == signal.SIGKILL:
        assert status == -number
    else:
        assert status == 128 + number
        assert any(f"stopped by {signal.Signals(number).name} after" in s for s in fork.lines)
        assert any("--resume goes on from there" in line for line in fork.lines)
    if position:
        assert where() == ((config.epochs, 0) if position == "end" else position)
    again = Fork(replace(config, resume=True))
    assert again.wait() == 0, again.lines
    assert not any(line.startswith(("error", "Traceback")) for line in again.lines)
    assert result(config) == expected


@pytest.mark.parametrize("nth", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_damaged_state_gives_way_to_the_previous_one_even_if_killed_then(nth):
    """The first save must not make the damaged one the previous one."""
    expected = whole(EACH_STEP)
    assert Fork(EACH_STEP, {(PREVIOUS, 6): signal.SIGKILL}).wait() == -signal.SIGKILL
    path = FOLDER / "last.pt"
    path.write_bytes(path.read_bytes()[:-100])
    resumed = replace(EACH_STEP, resume=True)
    killed = Fork(resumed, {("last.pt", nth): signal.SIGKILL})
    assert killed.wait() == -signal.SIGKILL
    assert any("warning: " in line and PREVIOUS in line for line in killed.lines)
    assert Fork(resumed).wait() == 0
    assert result(EACH_STEP) == expected


def test_run_of_before_goes_on():
    """Of a commit that also saved the optimizer's constants, and lacked a constant of ours."""
    expected = whole(EACH_STEP)
    assert Fork(EACH_STEP, {(PREVIOUS, 6): signal.SIGKILL}).wait() == -signal.SIGKILL
    state = read_state(FOLDER / "last.pt")
    assert set(state) == {"config", "data_fingerprint", "learner", "metrics"}
    assert set(state["learner"]) == {"model", "optimizers", "ema", "steps"}
    kept = {"log", "step", "seen", "loss", "correct", "lr", "seconds", "wandb_id"}
    assert set(state["metrics"]) == kept
    del state["config"]["cutout_size"], state["config"]["channels"]
    state["learner"]["optimizers"][0]["param_groups"] = [{"lr": 99.0, "params": [0]}]
    save_state(FOLDER / "last.pt", state)
    with pytest.raises(InputError, match=r"cutout_size: 4, but .* started with 0"):
        Run(replace(EACH_STEP, resume=True, cutout_size=4))
    assert Fork(replace(EACH_STEP, resume=True)).wait() == 0
    assert result(EACH_STEP) == expected


def test_what_a_killed_process_was_writing_is_removed(tiny):
    leftover = FOLDER / f"{utils.TEMPORARY}abc"
    leftover.mkdir(parents=True)
    (leftover / "last.pt").write_text("half")
    train(replace(tiny, epochs=1))
    assert not leftover.exists()


# ---------------------------------------------------------------- signals


def test_signal_too_late_to_matter_lets_the_run_finish():
    """The network is tested when it comes."""
    fork = Fork(EACH_STEP, {("model.safetensors", 4): signal.SIGTERM})
    assert fork.wait() == 0
    assert load_model(FOLDER / "model.safetensors")[1]["accuracy"]["test"] is not None
    assert any("test accuracy" in line for line in fork.lines)


def test_second_ctrl_c_stops_at_once():
    fork = Fork(EACH_STEP, {(PREVIOUS, 4): signal.SIGINT, (PREVIOUS, 5): signal.SIGINT})
    assert fork.wait() == 130
    assert any("SIGINT: stopping" in s and "again to stop at once" in s for s in fork.lines)
    assert "--resume goes on" in fork.lines[-1]
    assert where() in ((1, 1), (1, 2))  # the step was not ended, or its save not


@pytest.mark.parametrize(
    ("ending", "nth", "begun"),
    [
        ("tiny-0/model.safetensors", 2, ["tiny-0"]),  # while the first network finishes
        pytest.param(  # after the second one's first step
            "tiny-1/config.json", 1, ["tiny-0", "tiny-1"], marks=pytest.mark.slow
        ),
    ],
)
def test_signal_stops_before_the_next_seed(ending, nth, begun):
    config = replace(EACH_STEP, epochs=1, seeds=3)
    fork = Fork(config, {(ending, nth): signal.SIGINT})
    assert fork.wait() == 130
    assert "stopped by SIGINT" in fork.lines[-1]
    assert fork.lines[-1].endswith("the same command with --resume goes on from there")
    assert sorted(path.name for path in Path("checkpoints").iterdir()) == begun
    fork = Fork(replace(config, resume=True))
    assert fork.wait() == 0
    assert "3 seeds: test accuracy" in fork.lines[-1]


def test_stop_signals_nest_and_leave_the_handlers_as_they_were():
    before = {name: signal.getsignal(getattr(signal, name)) for name in stop_signals.NAMES}
    with stop_signals:
        os.kill(os.getpid(), signal.SIGTERM)
        with stop_signals:
            assert stop_signals.received == signal.SIGTERM  # every block has to stop
        assert stop_signals.received == signal.SIGTERM
    with stop_signals:
        assert stop_signals.received == 0
    after = {name: signal.getsignal(getattr(signal, name)) for name in stop_signals.NAMES}
    assert after == before


def test_training_in_a_thread_hears_no_signals(tiny):
    threads = [threading.Thread(target=train, args=(replace(tiny, epochs=1),))]
    threads[0].start()
    threads[0].join()
    assert len(log()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True], ids=["", "nohup"])
def test_closed_terminal(ignored):
    """The terminal goes in mid-training: saved as at SIGTERM; under nohup the run goes on."""
    name = "demo --name tiny --batch-size 16 --max-steps-per-epoch 3 --wandb disabled".split()
    line = command("train.py", *name, "--epochs", 12 if ignored else 400)
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
    while not re.search(rb"epoch +2/", shown):
        shown += os.read(output, 1000)
    os.close(master)
    assert process.wait(timeout=60) == (0 if ignored else 128 + signal.SIGHUP)
    assert where()[0] == 12 if ignored else 2 <= where()[0] < 400


def write_program(name, text):
    """Write a bash script into this folder."""
    Path(name).write_text(f"#!/bin/bash\n{text}\n")
    Path(name).chmod(0o755)


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [0, 1, 2], ids=["one GPU", "one node", "two nodes"])
def test_slurm_jobs_of_the_docs_save_end_and_requeue(tmp_path, nodes):
    """With stand-ins for srun, which passes signals on to its tasks, and scontrol."""
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    jobs = re.findall(r"```sh\n(#!/bin/bash\n.*?)```", page, re.DOTALL)
    script = jobs[bool(nodes)]
    assert script.count("train.py tpsnet --wandb offline --resume") == 1
    small = "demo --name tpsnet --epochs 400 --max-steps-per-epoch 2 --wandb offline"
    script = script.replace("train.py tpsnet --wandb offline", f"{ROOT / 'train.py'} {small}")
    script = script.replace("--nproc-per-node 4", f"--nproc-per-node {1 + (nodes == 1)}")
    write_program("python", 'exec "$PYTHON" "$@"')
    write_program("torchrun", 'exec "$PYTHON" -m torch.distributed.run "$@"')
    write_program("scontrol", 'echo "$@" > scontrol.txt')
    write_program(
        "srun",
        """
        trap 'kill -USR1 "${tasks[@]}"' USR1
        for node in $(seq ${SLURM_NNODES:-1}); do "$@" & tasks+=($!); done
        echo $$ > srun.txt
        for task in "${tasks[@]}"; do
            wait $task; status=$?
            while kill -0 $task 2> /dev/null; do wait $task; status=$?; done
        done
        exit $status
        """,
    )
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    env |= {"SLURM_JOB_ID": str(os.getpid()), "TPSNET_CHECKPOINTS": "runs", "OMP_NUM_THREADS": "1"}
    if nodes:
        env["SLURM_NNODES"] = str(nodes)
    job = subprocess.Popen(
        ["bash", "-c", script], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not job.stdout.readline().startswith("epoch   2/"):
        assert job.poll() is None
    # As SLURM does: to the tasks, or with B: to the job's shell alone.
    warned = job.pid if "--signal=B:" in script else int(Path("srun.txt").read_text())
    os.kill(warned, signal.SIGUSR1)
    errors = job.communicate(timeout=120)[1]
    stopped = [line for line in errors.splitlines() if line.startswith("stopped by SIGUSR1 after")]
    assert len(stopped) == max(nodes, 1)  # a line from each machine
    epochs, steps = where(Path("runs/tpsnet"))
    position = f"epoch {epochs + 1}, step {steps}," if steps else f"epoch {epochs},"
    assert f"after {position} saved in runs/tpsnet;" in stopped[0]
    assert Path("scontrol.txt").read_text() == f"requeue {os.getpid()}\n"
    assert job.returncode == 0


# ---------------------------------------------------------------- the verdict, and the folder


@pytest.mark.parametrize("name", RUN_FILES)
def test_any_file_of_a_run_protects_it(tiny, name):
    FOLDER.mkdir(parents=True)
    (FOLDER / name).write_text("mine")
    with pytest.raises(InputError, match=f"holds a run already .{name}.; .* --overwrite"):
        Run(tiny)
    assert files() == {FOLDER: True, FOLDER / name: b"mine"}


def test_verdict_comes_before_any_work_and_changes_nothing(tiny):
    """Of several seeds, too: what stands in the way of the last one is said at once."""
    train(replace(tiny, name="tiny-2", epochs=1))
    before = files()
    config = replace(tiny, seeds=3)
    with pytest.raises(InputError, match="checkpoints/tiny-2 holds a run already"):
        train_seeds(config)
    with pytest.raises(InputError, match=r"c1: 9, but the run in .*tiny-2 was started with 4"):
        train_seeds(replace(config, c1=9, resume=True))
    for changes in ({"name": "new"}, {"resume": True}, {"overwrite": True}):
        Run(replace(tiny, **{"name": "tiny-2"} | changes))
    assert files() == before


def test_resume_starts_a_run_where_there_is_none_but_not_without_its_state(tiny, capsys):
    train(replace(tiny, epochs=1, resume=True))
    assert "resume: no saved state; starting at the beginning" in capsys.readouterr().out
    train(replace(tiny, epochs=2, resume=True))
    assert "resume: going on after epoch 1" in capsys.readouterr().out
    for name in ("last.pt", PREVIOUS):
        (FOLDER / name).unlink(missing_ok=True)
    before = files()
    with pytest.raises(InputError, match=r"^name: .* a run without its last.pt"):
        train(replace(tiny, resume=True))
    assert files() == before


def test_processes_with_different_states_go_on_with_none(tiny, trained, monkeypatch):
    """As on two nodes whose folders are not the same."""
    shutil.copytree(trained, FOLDER)
    before = files()
    with monkeypatch.context() as patch:
        patch.setattr("engine.run.broadcast_from_main", lambda found: None)
        with pytest.raises(InputError, match=r"^resume: the processes do not find the same state"):
            train(replace(tiny, resume=True))
    assert files() == before
    train(replace(tiny, resume=True))


def test_overwrite_starts_anew(tiny):
    linked = FOLDER.with_name("other") / "wandb"
    linked.parent.mkdir(parents=True)
    Path("elsewhere/offline-run-1-old").mkdir(parents=True)
    linked.symlink_to(Path("elsewhere").resolve())
    _, expected = train(replace(tiny, name="other", overwrite=True))
    assert (linked / "offline-run-1-old").is_dir()  # what a link names is not of the run
    train(replace(tiny, seed=5, epochs=4))
    (FOLDER / "wandb/offline-run-1-old").mkdir(parents=True)
    for name in ("notes.txt", "model_mistakes.png", "model_mine.png"):
        (FOLDER / name).write_text("mine")
    assert train(replace(tiny, overwrite=True))[1] == expected
    assert not list((FOLDER / "wandb").iterdir())
    assert len(log()) == 3
    kept = {path.name for path in FOLDER.iterdir() if path.suffix in (".txt", ".png")}
    assert kept == {"notes.txt", "model_mine.png", "curves.png"}  # no test of the run before
    assert read_state(FOLDER / "last.pt")["config"] == record(tiny)


def test_log_is_whole_whenever_an_epoch_is_reported(tiny):
    """Whoever gets the report may end the process, as a search does."""
    reported = []

    def report(rows):
        reported.append((len(rows), len(log())))

    train(tiny, report=report)
    assert reported == [(1, 1), (2, 2), (3, 3)]


@pytest.fixture
def kept_open(trained, monkeypatch):
    """Make a file of an old run one that cannot be removed: on Windows, a program has it open."""
    unlink = Path.unlink
    shutil.copytree(trained, FOLDER)

    def keep(name):
        def refuse(path, **options):
            if path.name == name:
                raise PermissionError(13, "Access is denied", str(path))
            unlink(path, **options)

        monkeypatch.setattr(Path, "unlink", refuse)

    return keep


def test_old_state_that_cannot_be_removed_ends_the_run(tiny, kept_open):
    """A --resume could take it for the new run's."""
    kept_open(PREVIOUS)
    with pytest.raises(InputError, match=rf"{PREVIOUS}: still that of the old run .*; close"):
        train(replace(tiny, overwrite=True))


def test_old_log_that_cannot_be_removed_costs_a_warning(tiny, kept_open, capsys):
    kept_open("log.csv")
    rows, score = train(replace(tiny, overwrite=True))
    assert score and len(rows) == len(log()) == 3
    words = f"{FOLDER / 'log.csv'}: still that of the old run (Access is denied)"
    assert f"warning: {words}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overwrite", "old", "again"),
    [
        (False, False, "with --resume goes on from there"),
        (True, False, "with --resume in place of --overwrite goes on from there"),
        (True, True, "starts it again"),
    ],
)
def test_run_that_ends_before_its_first_step_is_none(tiny, overwrite, old, again):
    """It also leaves the run that it was to overwrite."""
    if old:
        train(replace(tiny, epochs=1))
    before, config, data = files(), replace(tiny, overwrite=overwrite), load_dataset(tiny)
    learner = Learner(tiny, data, torch.device("cpu"))
    run = Run(config)
    with pytest.raises(MemoryError), run.opened(data, learner):
        raise MemoryError
    run = Run(config)
    words = f"^stopped by SIGTERM before the first step; the same command {again}$"
    with (
        pytest.raises(StoppedError, match=words),
        run.opened(data, learner),
    ):
        os.kill(os.getpid(), signal.SIGTERM)
        run.stop_if_asked()
    assert files() == before | {FOLDER: True}
    Run(config)


def test_a_run_that_cannot_be_saved_leaves_the_one_that_it_was_to_overwrite(tiny, monkeypatch):
    train(replace(tiny, epochs=1))
    before = files()

    def full(path, *_):
        raise InputError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr("engine.run.save_state", full)
    with pytest.raises(InputError, match="No space left"):
        train(replace(tiny, overwrite=True))
    assert files() == before


def test_advice_after_a_stop_leaves_overwrite_out(tiny):
    """With both options the command would be refused."""
    config = replace(tiny, overwrite=True)
    with pytest.raises(StoppedError, match="with --resume in place of --overwrite goes on"):
        train(config, report=lambda _: os.kill(os.getpid(), signal.SIGTERM))


def test_second_run_in_a_folder_is_refused(tiny):
    with (
        lock_folder(FOLDER),
        pytest.raises(InputError, match=r"name: another process is training in .*; give another"),
    ):
        train(tiny)
    assert files() == {FOLDER: True}
    with lock_folder(FOLDER):  # free again
        pass


def test_state_is_read_again_under_the_lock(tiny):
    """Another process goes on with the run and ends between our first look and our lock."""
    train(replace(tiny, epochs=1))
    digits = load_dataset(tiny)
    first_look = Run(replace(tiny, resume=True))
    rows, _ = train(replace(tiny, resume=True, epochs=2))
    learner = Learner(tiny, digits, torch.device("cpu"))
    with first_look.opened(digits, learner):
        assert first_look.log == rows  # to the seconds
        assert learner.steps == 6


def test_run_may_become_longer_but_not_shorter(tiny):
    config = replace(tiny, schedule="linear", resume=True)
    train(config)
    with pytest.raises(InputError, match=r"^epochs: 2, but .* with 3; give that or more"):
        train(replace(config, epochs=2))
    train(replace(config, epochs=6))
    rates = [row["lr"] for row in log()]
    assert rates == pytest.approx([0.1, 0.2 / 3, 0.1 / 3, 0.05, 0.1 / 3, 0.1 / 6])


@pytest.mark.parametrize(("name", "value"), [("seed", 1), ("val_size", 20), ("bfloat16", False)])
def test_a_run_does_not_go_on_with_another_constant(tiny, trained, name, value):
    shutil.copytree(trained, FOLDER)
    with pytest.raises(InputError, match=f"^{name}: {value}, but the run in "):
        Run(replace(tiny, resume=True, **{name: value}))


def test_finished_run_is_only_tested_again_and_how_it_runs_may_change(tiny, capsys, monkeypatch):
    first = train(tiny)
    FOLDER.rename("checkpoints/renamed")
    path = Path("checkpoints/renamed/model.safetensors")
    _, before = load_model(path)
    monkeypatch.setattr("engine.run.git_commit", lambda: "later")
    capsys.readouterr()
    changes = {"name": "renamed", "data_dir": "elsewhere", "save_minutes": 1.0, "download": False}
    assert train(replace(tiny, resume=True, **changes)) == first
    assert "epoch 1/" not in capsys.readouterr().out
    _, info = load_model(path)
    assert info["git_commit"] == before["git_commit"] != "later"
    other = replace(load_dataset(tiny), fingerprint="another")
    with pytest.raises(InputError, match=r"^data_dir: .* not the images"):
        train(replace(tiny, resume=True, name="renamed"), other)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state["learner"]["model"].update({"linear.weight": torch.ones(3, 3)}),
        lambda state: state["learner"].pop("optimizers"),
        lambda state: state["metrics"].pop("seen"),
        lambda state: state.pop("metrics"),
        lambda state: state.update(learner=[1, 2]),
    ],
    ids=["tensor", "optimizers", "position", "metrics", "list"],
)
def test_state_that_does_not_fit_is_refused(tiny, trained, spoil):
    shutil.copytree(trained, FOLDER)
    state = read_state(FOLDER / "last.pt")
    spoil(state)
    save_state(FOLDER / "last.pt", state)
    before = files()
    with pytest.raises(InputError, match=r"^resume: .*last.pt .*; restore a copy"):
        train(replace(tiny, epochs=2, resume=True))
    assert files() == before


# ---------------------------------------------------------------- saves


@pytest.mark.parametrize(
    ("minutes", "expected"), [(0.0, [(1, 0), (2, 0), (3, 0)]), (5.0, [(0, 1), (0, 1), (3, 0)])]
)
def test_states_are_saved_as_often_as_asked(tiny, minutes, expected):
    """After the first step, or each of them, and at the end; in mid-run not within ten seconds."""
    seen = []
    train(replace(tiny, save_minutes=minutes), report=lambda _: seen.append(where()))
    assert seen == expected


def test_states_are_saved_within_an_epoch_when_the_time_is_up(tiny):
    """Each step takes longer than this: the state before the last one is of the step before."""
    seen = []

    def note(_):
        before = read_state(FOLDER / PREVIOUS)["metrics"]
        seen.append((where(), (len(before["log"]), before["step"])))

    train(replace(tiny, save_minutes=1e-6), report=note)
    assert seen == [((n, 0), (n - 1, 3)) for n in (1, 2, 3)]


def test_a_file_is_on_the_disk_before_it_has_its_name(monkeypatch):
    calls, flush, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("flushed") or flush(file))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("renamed") or rename(*names))
    utils.write_json(Path("a.json"), {})
    assert calls == ["flushed", "renamed", "flushed"]  # the folder too


def test_full_disk_stops_with_one_line_and_leaves_the_checkpoint(tiny):
    """The kernel refuses to let a file grow: the second epoch's state does not fit any more."""
    _, whole_score = train(replace(tiny, name="whole"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(InputError, match=r"last.pt: cannot be written \(File too large\);"):
            train(EACH_STEP, report=lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(FOLDER.glob(f"{utils.TEMPORARY}*"))
    assert where() == (1, 0)
    assert train(replace(tiny, resume=True))[1] == whole_score


@pytest.mark.parametrize("where", ["step", "evaluate", "diverge"])
def test_log_has_all_whole_epochs_of_a_run_that_ends_within_one(tiny, monkeypatch, where):
    """Also those since the last state, which are so short that none was due."""
    steps, evaluations, step = itertools.count(1), itertools.count(1), Learner.step

    def last_step(learner, *batch):
        is_last = next(steps) == 8  # three in each epoch
        if is_last and where == "diverge":
            return torch.tensor([math.nan, 0])
        if is_last and where == "step":
            signal.raise_signal(signal.SIGTERM)
        return step(learner, *batch)

    def last_evaluate(*args):
        if next(evaluations) == 3 and where == "evaluate":
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(Learner, "step", last_step)
    monkeypatch.setattr("train.evaluate", last_evaluate)
    with pytest.raises(DivergenceError if where == "diverge" else StoppedError):
        train(replace(tiny, val_size=200))
    assert [row["epoch"] for row in log()] == [1, 2]


def test_a_run_that_diverges_before_its_first_state_leaves_the_one_that_it_was_to_overwrite(tiny):
    train(replace(tiny, epochs=1))
    before = files()
    config = replace(tiny, overwrite=True)
    run, data = Run(config), load_dataset(config)
    learner = Learner(config, data, torch.device("cpu"))
    with pytest.raises(DivergenceError), run.opened(data, learner):
        images, labels, n = next(train_batches(data, config, run.begin_epoch()))
        run.add(learner.step(images, labels, n), n)
        learner.model.linear.bias.data.fill_(float("nan"))
        run.end_epoch(None)  # as on GPUs, of which several save every 20th step
    assert files() == before


def test_a_run_that_recorded_lists_goes_on(tiny):
    """Those of a notebook, by an older version."""
    config = replace(tiny, num_blocks=(1, 1, 1))
    check_resumable(config, record(config) | {"num_blocks": [1, 1, 1]}, FOLDER)
    with pytest.raises(InputError, match=r"^num_blocks: "):
        check_resumable(config, record(config) | {"num_blocks": [1, 1]}, FOLDER)


def test_network_names_the_data_files_that_are_not_the_official_ones(tiny):
    train(replace(tiny, epochs=1), replace(load_dataset(tiny), unofficial=("data_batch_1.bin",)))
    _, info = load_model(FOLDER / "model.safetensors")
    assert info["unofficial_data_files"] == ["data_batch_1.bin"]


def test_log_that_cannot_be_written_costs_a_warning(tiny, capsys):
    """As on Windows, where a spreadsheet holds it; here a folder is in the way at first."""

    def block(rows):
        if len(rows) == 1:
            (FOLDER / "log.csv").unlink()
            (FOLDER / "log.csv").mkdir()
        elif len(rows) == 2:
            (FOLDER / "log.csv").rmdir()

    rows, _ = train(replace(tiny, save_minutes=0.0), report=block)
    errors = capsys.readouterr().err
    assert errors.startswith("warning: ") and "log.csv" in errors
    assert errors.count("\n") == 1
    assert len(log()) == len(rows) == 3


# ---------------------------------------------------------------- divergence


def test_loss_that_is_not_finite_ends_with_one_line_and_is_not_saved(monkeypatch, capsys):
    line = "demo --name tiny --lr 900 --momentum 0.99 --batch-size 16 --max-steps-per-epoch 20"
    assert run_main("train", *line.split(), "--wandb=disabled", monkeypatch=monkeypatch) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: epoch \d, step \d+: the loss is .*lower --lr.*\n", error)
    state = read_state(FOLDER / "last.pt")
    assert all(tensor.isfinite().all() for tensor in state["learner"]["model"].values())


def test_weights_that_are_not_finite_are_never_saved(tiny):
    """In the very last step, when no loss comes after it: the loop of train.py, spoiled."""
    config, run, data = replace(tiny, epochs=1), Run(replace(tiny, epochs=1)), load_dataset(tiny)
    learner = Learner(config, data, torch.device("cpu"))

    def whole_run():
        with run.opened(data, learner):
            batches = train_batches(data, config, run.begin_epoch())
            for images, labels, n in run.steps(batches):
                run.add(learner.step(images, labels, n), n)
            learner.model.linear.bias.data.fill_(float("inf"))
            run.end_epoch(None)

    with pytest.raises(DivergenceError, match=r"not finite at lr 0\.1; the last good state is"):
        whole_run()
    assert where() == (0, 1)
    assert not (FOLDER / "model.safetensors").exists()


# ---------------------------------------------------------------- a run, as a newcomer sees it


@pytest.mark.slow
def test_demo_is_as_accurate_as_it_claims():
    assert train(replace(PRESETS["demo"], wandb="disabled"))[1].accuracy >= 99


def test_demo_reaches_90_percent_in_three_epochs_and_says_what_to_run_next(demo):
    folder, output = demo
    _, info = load_model(folder / "model.safetensors")
    assert info["accuracy"]["test"] >= 90
    last_line = output.splitlines()[-1]
    assert last_line == "next: python test.py checkpoints/demo/model.safetensors"
    assert f"test accuracy: {info['accuracy']['test']:.2f}% (" in output
    epochs = [line for line in output.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 3  # and no progress bar where the output is no terminal
    assert all(len(line) < 80 for line in epochs)
    assert "estimated time on this CPU" in output


def test_estimate_leaves_out_the_first_step_and_its_save(monkeypatch, capsys):
    config = replace(PRESETS["demo"], epochs=4, small_fraction=0.5, small_size=16)
    config = replace(config, keep_fraction=0.5)
    progress, ends = Progress(config, 1000), iter([30, 60, 61, 62, 63, 64])
    with monkeypatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: next(ends))  # all but two steps take a second
        for step in range(1, 7):
            progress.estimate(1, 10 * step, 10)
    # 500 images in an epoch, two of small images and two of four times as many pixels: 494 s.
    assert capsys.readouterr().out == "estimated time on this CPU: 8.2 min\n"


def test_durations_have_their_natural_unit():
    seconds = {4.2: "4.2 s", 738: "12.3 min", 12_240: "3.4 h", 483_840: "5.6 days"}
    assert [duration(number) for number in seconds] == list(seconds.values())


def test_figure_that_cannot_be_drawn_costs_no_result(tiny, monkeypatch, capsys):
    def locked(*_args):
        raise InputError("curves.png cannot be written (it is open)")

    monkeypatch.setattr("engine.plots.learning_curves", locked)
    _, score = train(replace(tiny, wandb="offline"))
    out, err = capsys.readouterr()
    assert f"test accuracy: {score}" in out
    assert err == "warning: no figure: curves.png cannot be written (it is open)\n"


def test_run_folder_holds_what_the_readme_promises(demo):
    folder, _ = demo
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "log.csv", "last.pt", "model.safetensors", "curves.png"}
    assert not [name for name in names if name.startswith(".")]  # no temporary left behind
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    constants = asdict(replace(PRESETS["demo"], epochs=3, wandb="offline"))
    assert json.loads((folder / "config.json").read_text()) == json.loads(json.dumps(constants))
    rows = utils.read_csv(folder / "log.csv")
    assert list(rows[0]) == [
        "epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds",
    ]  # fmt: skip
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[0]["train_loss"] > rows[-1]["train_loss"]


def test_model_file_explains_itself(demo):
    folder, _ = demo
    _, info = load_model(folder / "model.safetensors")
    digits = load_dataset(PRESETS["demo"])
    network = part_of(PRESETS["demo"], Architecture)
    assert info["architecture"] == json.loads(json.dumps(asdict(network)))
    assert (info["preset"], info["dataset"], info["seed"]) == ("demo", "digits", 0)
    assert (tuple(info["mean"]), tuple(info["std"])) == (digits.mean, digits.std)
    assert info["class_names"] == list("0123456789")
    assert info["data_fingerprint"] == digits.fingerprint
    assert info["epochs"] == info["config"]["epochs"] == 3
    assert info["versions"]["torch"] == torch.__version__
    commit = utils.git_commit().removesuffix("-dirty")  # files may be edited while tests run
    assert info["git_commit"].removesuffix("-dirty") == commit
    assert 0 < info["accuracy"]["train"] <= 100
    assert info["accuracy"]["val"] is info["temperature"] is None


def test_row_of_an_epoch_is_the_mean_over_the_images_that_steps_were_taken_on(tiny, monkeypatch):
    taken, step = [], Learner.step

    def noted(learner, images, targets, n):
        totals = step(learner, images, targets, n)
        taken.append((totals, n))
        return totals

    monkeypatch.setattr(Learner, "step", noted)
    (row,), _ = train(replace(tiny, epochs=1, keep_fraction=0.5))
    loss, correct = sum(totals for totals, _ in taken).tolist()
    seen = sum(n for _, n in taken)
    assert seen == 3 * 8
    found = row["train_loss"], row["train_accuracy"]
    assert found == pytest.approx((loss / seen, 100 * correct / seen))


def test_average_is_validated_tested_and_saved_with_its_temperature(tiny, capsys, monkeypatch):
    fitted = []
    monkeypatch.setattr("train.fit_temperature", lambda *given: fitted.append(given) or 1.5)
    rows, score = train(replace(tiny, c1=5, ema_decay=0.7, val_size=200))
    out = capsys.readouterr().out
    for kind in ("train", "val"):
        assert f"{kind} {rows[-1][f'{kind}_loss']:.4f} {rows[-1][f'{kind}_accuracy']:6.2f}%" in out
    assert "next:" not in out  # the advice of the script: here the data may be the user's own
    model, info = load_model(FOLDER / "model.safetensors")
    averaged = read_state(FOLDER / "last.pt")["learner"]["ema"]
    assert all(torch.equal(averaged[f"module.{n}"], t) for n, t in model.state_dict().items())
    digits = load_dataset(replace(tiny, val_size=200))
    val, test = (evaluate(model, part, digits.normalize) for part in (digits.val, digits.test))
    # Where channels come last, as while training, some CPUs add up in another order.
    assert (test.correct, test.total) == (score.correct, score.total)
    assert score.loss == pytest.approx(test.loss, rel=1e-5)
    assert rows[-1]["val_loss"] == pytest.approx(val.loss, rel=1e-5)
    assert info["accuracy"]["val"] == rows[-1]["val_accuracy"]
    ((logits, labels),) = fitted
    assert torch.equal(labels, digits.val.labels)
    expected = classify(model, digits.val.images, digits.normalize)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert info["temperature"] == 1.5
    assert info["preset"] == "custom"  # an edited network


def test_training_without_test_images_reports_its_epochs_and_tests_nothing(tiny, capsys):
    data = load_dataset(replace(tiny, val_size=100), test=False)
    config, reported, again = replace(tiny, name="group/one"), [], []
    assert train(config, data, lambda log: reported.append(list(log))) == (reported[-1], None)
    assert [len(log) for log in reported] == [1, 2, 3]
    assert reported[-1] == utils.read_csv("checkpoints/group/one/log.csv")
    assert "test accuracy" not in capsys.readouterr().out
    _, info = load_model("checkpoints/group/one/model.safetensors")
    assert info["accuracy"]["test"] is None
    train(replace(config, epochs=4, resume=True), data, lambda log: again.append(list(log)))
    assert [len(log) for log in again] == [3, 4]  # what was there, at once
    assert again[0] == reported[-1]


def test_a_seed_decides_everything_and_nothing_else_does(tiny):
    config = replace(tiny, dropout=0.2, epochs=1)
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(weights))
        train(replace(config, name=name, seed=seed))
        weights.append(digest(load_model(f"checkpoints/{name}/model.safetensors")[0].state_dict()))
    assert weights[0] == weights[1] != weights[2]


def test_seeds_are_trained_in_turn_and_summed_up(tiny, capsys):
    config = replace(tiny, epochs=1, seed=3, seeds=3, val_size=200)
    scores = train_seeds(config)
    infos = [load_model(f"checkpoints/tiny-{n}/model.safetensors")[1] for n in (3, 4, 5)]
    assert [info["seed"] for info in infos] == [3, 4, 5]
    assert [info["accuracy"]["test"] for info in infos] == [score.accuracy for score in scores]
    lines = capsys.readouterr().out.splitlines()[-2:]
    for line, kind, key in zip(lines, ("validation", "test"), ("val", "test"), strict=True):
        accuracies = [info["accuracy"][key] for info in infos]
        mean = sum(accuracies) / 3
        std = math.sqrt(sum((a - mean) ** 2 for a in accuracies) / 2)
        half = 4.302653 * std / math.sqrt(3)  # Student's t at 97.5% in two degrees of freedom
        numbers = [float(n) for n in re.findall(r"\d+\.\d\d", line)]
        assert line.startswith(f"3 seeds: {kind} accuracy ")
        expected = [mean, std, max(0, mean - half), min(100, mean + half)]
        assert numbers == pytest.approx(expected, abs=0.006)
    with pytest.raises(InputError, match=r"seeds: 3 .*|seeds: .*, not 3; call train_seeds"):
        train(config)


def test_seeds_that_overwrite_and_are_stopped_go_on_without_the_old_runs(
    tiny, trained, monkeypatch
):
    config = replace(tiny, seeds=3)
    for seed in range(3):
        shutil.copytree(trained, f"checkpoints/tiny-{seed}")
    with (
        lock_folder(Path("checkpoints/tiny-2")),
        pytest.raises(InputError, match="another process is training in checkpoints/tiny-2"),
    ):
        train_seeds(replace(config, overwrite=True))
    assert all(Path(f"checkpoints/tiny-{seed}/last.pt").exists() for seed in range(3))

    def stopped(config, data):
        os.kill(os.getpid(), signal.SIGTERM)
        return train(config, data)

    with monkeypatch.context() as patch:
        patch.setattr("train.train", stopped)
        with pytest.raises(StoppedError, match="with --resume in place of --overwrite goes on"):
            train_seeds(replace(config, overwrite=True))
    assert len(list(Path("checkpoints").rglob("last.pt"))) == 1
    scores = train_seeds(replace(config, resume=True))
    assert len({score.loss for score in scores}) == 3


@pytest.mark.parametrize(
    "mistake", [{"batch_size": 5000}, {"val_size": 1700}, {"dataset": "cifar10"}]
)
def test_seeds_that_cannot_be_trained_remove_no_old_run(tiny, trained, mistake):
    for seed in range(2):
        shutil.copytree(trained, f"checkpoints/tiny-{seed}")
    before = files()
    changes = {"download": False, "flip": "none", "crop_padding": 0} | mistake
    with pytest.raises(InputError, match=r"^(data_dir|batch_size|val_size): "):
        train_seeds(replace(tiny, seeds=2, overwrite=True, **changes))
    assert files() == before


def test_networks_of_earlier_seeds_are_gone(tiny, monkeypatch):
    """A GPU may have no memory for several."""
    alive = weakref.WeakSet()
    left = []

    class Noted(Learner):
        def __init__(self, *args):
            left.append(len(alive))
            super().__init__(*args)
            alive.add(self)

    monkeypatch.setattr("train.Learner", Noted)
    train_seeds(replace(tiny, seeds=3, epochs=1))
    assert left == [0, 0, 0]


@pytest.mark.parametrize("name", ["tiny", "proxy, muon"])
def test_deterministic_kernels_are_asked_for_and_exist(name, monkeypatch):
    """On a GPU they make a difference; here it is seen that no operation lacks one."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    config = replace(RECIPE[name], epochs=1)
    try:
        train(replace(config, deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        distributed.init_processes()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
def test_compiled_network_learns_the_same_and_is_saved_under_plain_names(tiny):
    small = {"num_blocks": (1,), "c1": 2, "pool_kernel": 32}  # compiled in seconds
    config = replace(tiny, **small, epochs=1, bfloat16=False)
    _, plain = train(replace(config, name="plain"))
    torch._dynamo.utils.counters.clear()
    _, compiled = train(replace(config, name="compiled", compile=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1  # one is of check_compiler
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-3)
    names = [
        list(load_model(f"checkpoints/{n}/model.safetensors")[0].state_dict())
        for n in ("plain", "compiled")
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize(("cycle", "warned"), [(1, False), (2, False), (3, True)])
def test_a_last_cosine_that_is_cut_off_is_reported(tiny, capsys, cycle, warned):
    config = replace(tiny, schedule="cosine_restarts", restart_epochs=cycle, epochs=4)
    train(replace(config, max_steps_per_epoch=1))
    assert ("restart_epochs" in capsys.readouterr().err) == warned


# ---------------------------------------------------------------- pictures of one's own


@pytest.mark.parametrize("layout", ["", pytest.param("train", marks=pytest.mark.slow)])
def test_own_pictures_are_trained_resumed_tested_and_predicted(layout, monkeypatch, capsys):
    make_pictures(f"photos/{layout}", cat=5, dog=5, eel=5)
    if layout:
        make_pictures("photos/test", cat=2, dog=2, eel=2)
    line = "demo --dataset folder --data-dir photos --batch-size 6 --wandb disabled --name mine"
    line = line.split()
    assert run_main("train", *line, "--epochs", 1, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert "photos: " in out
    assert "3 classes: cat, dog, eel" in out
    model, info = load_model("checkpoints/mine/model.safetensors")
    assert (info["dataset"], info["class_names"]) == ("folder", ["cat", "dog", "eel"])
    assert info["data_dir"] == str(Path("photos").absolute())
    assert info["config"]["num_classes"] == model.architecture.num_classes == 3
    assert info["preset"] == "demo"
    line += ["--epochs", 2, "--resume"]
    assert run_main("train", *line, monkeypatch=monkeypatch) == 0
    *_, following = capsys.readouterr().out.splitlines()
    _, script, *args = following.removeprefix("next: ").split()
    assert run_main(script.removesuffix(".py"), *args, monkeypatch=monkeypatch) == 0
    assert "2 epochs of your pictures\ntest accuracy: " in capsys.readouterr().out
    assert run_main("predict", "photos/test" if layout else "photos", monkeypatch=monkeypatch) == 0
    Path("photos").rename("moved")
    assert run_main("test", *args, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: data_dir: {Path('photos').absolute()}, whose pictures ")
    assert error.endswith("does not exist; name the folder where they are now with --data-dir")
    make_pictures("others", bee=1, fly=1)
    assert run_main("test", *args, "--data-dir", "others", monkeypatch=monkeypatch) == 2
    assert "other classes than the folders of the pictures; name" in capsys.readouterr().err
    assert run_main("test", *args, "--data-dir", "moved", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().err == ""
    make_pictures("moved" if not layout else "moved/train", cat=6)
    assert run_main("test", *args, "--data-dir", "moved", monkeypatch=monkeypatch) == 0
    assert "the pictures are not those that" in capsys.readouterr().err
    make_pictures("moved" if not layout else "moved/train", fox=5)
    if not layout:
        line[line.index("photos")] = "moved"
        assert run_main("train", *line, monkeypatch=monkeypatch) == 2
        assert "data_dir: 4 classes, but the run in" in capsys.readouterr().err


# ---------------------------------------------------------------- starting from weights


@pytest.fixture
def source(trained):
    """A trained network: its file, its weights, its metadata."""
    shutil.copytree(trained, "checkpoints/source")
    path = Path("checkpoints/source/model.safetensors")
    return path, *load_model(path)


@pytest.mark.parametrize("classes", ["the same", "others"])
def test_a_run_starts_from_weights_and_keeps_their_normalization(source, classes, tiny, capsys):
    path, model, info = source
    digits = load_dataset(tiny)
    if classes == "others":
        names = tuple("abcdefghij")
        digits = replace(digits, class_names=names, mean=(0.1,) * 3)
    still = replace(tiny, init=str(path), lr=0.0, epochs=1, val_size=0)
    capsys.readouterr()
    train(still, digits)
    (line,) = re.findall(r"^init: .*", capsys.readouterr().out, re.M)
    assert line.startswith(f"init: the weights of {path}")
    assert line.endswith("but the last layer's: new classes") == (classes == "others")
    started, found = load_model(FOLDER / "model.safetensors")
    assert (found["mean"], found["std"]) == (info["mean"], info["std"])
    assert found["init"] == {
        "name": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    assert "init" not in info
    kept = {
        name: torch.equal(value, started.state_dict()[name])
        for name, value in model.named_parameters()
    }
    last = [kept.pop("linear.weight"), kept.pop("linear.bias")]
    assert all(kept.values())
    assert all(last) if classes == "the same" else not any(last)


@pytest.mark.parametrize("names", ["0123456789", "abcdefghij", "xyz"])
def test_all_is_copied_but_the_last_layer_of_other_classes(source, names, tiny):
    path, model, _ = source
    start = Start(replace(tiny, init=str(path), dropout=0.5, conv_kernel=(3, 3, 3)))
    filled = ResNet(replace(tiny, num_classes=len(names)))
    start.fill(filled, tuple(names))
    found = filled.state_dict()
    others = {name for name, v in model.state_dict().items() if not torch.equal(v, found[name])}
    same = names == "0123456789"
    assert others == (set() if same else {"linear.weight", "linear.bias"})


def test_a_run_from_weights_resumes_to_the_bit_but_not_from_others(source, tiny):
    path, model, info = source
    config = replace(tiny, init=str(path), save_minutes=0.0, epochs=2, max_steps_per_epoch=1)
    train(replace(config, name="whole"))

    def end(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, report=end)
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(InputError, match=r"^init: .*; restore it, which --resume needs"):
        train(replace(config, resume=True))
    del info["architecture"]
    for other in ({"mean": [0.5] * 3}, {"class_names": list("abcdefghij")}):
        save_model(path, model, info | other)
        with pytest.raises(
            InputError, match=r"^resume: .*init: .* is not the network that it was started with"
        ):
            train(replace(config, resume=True))
    Path("moved.safetensors").write_bytes(content)
    train(replace(config, init="moved.safetensors", resume=True))
    whole, resumed = (
        load_model(f"checkpoints/{name}/model.safetensors")[0] for name in ("whole", "tiny")
    )
    for one, other in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"c1": 2},
            r"^init: .* has c1 4, channels .8, 16, 32., and this run c1 2, channels .4, 8, 16.;",
        ),
        ({"init": "nothing"}, "^init: nothing does not exist"),
        ({"name": "source", "overwrite": True}, "^init: .* is the network of this run itself;"),
        ({"init": "checkpoints"}, "^init: checkpoints is a folder of several networks; name one"),
        ({"name": "fast", "init": "fast"}, "^init: fast would be this run itself as soon as it is"),
        (
            {"name": "fast/1", "init": "fast"},
            "^init: fast would be this run itself .*, or name the file .*/fast.safetensors$",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(source, tiny, changes, words):
    before = files()
    with pytest.raises(InputError, match=words):
        train(replace(tiny, **{"init": str(source[0])} | changes))
    assert files() == before


def test_weights_that_do_not_fit_one_seed_are_refused_before_the_first_is_trained(tiny, trained):
    shutil.copytree(trained, "checkpoints/tiny-1")
    before = files()
    with pytest.raises(InputError, match=r"^init: tiny-1 is the network of this run itself;"):
        train_seeds(replace(tiny, seeds=2, init="tiny-1", overwrite=True))
    assert files() == before
