"""Two or three real processes, of torchrun or as it starts them, with gloo."""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import command, make_pictures, run, run_main

import utils
from config import PRESETS
from data import load_dataset, train_batches
from engine import distributed
from engine.checkpoint import load_model, load_state
from engine.evaluate import evaluate
from learner import Learner
from utils import InputError

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def first_steps():
    """Loss and change of the weights in the demo's first step, for two batch sizes.

    BN runs in eval mode: in training each process normalizes with its own share of the batch, and
    the loss of two halves is not that of the whole.
    """
    device, found = distributed.init_processes(), []
    digits = load_dataset(PRESETS["demo"]).to(device)
    for batch_size in (64, 33):  # an odd one shares out unevenly
        config = replace(PRESETS["demo"], bfloat16=False, batch_size=batch_size)
        learner = Learner(config, digits, device)
        learner.model.eval()
        before = [p.detach().clone() for p in learner.model.parameters()]
        images, targets, n = next(train_batches(digits, config, 1))
        totals = distributed.all_reduce_sum(learner.step(images, targets, n))
        moved = [b - p.detach() for b, p in zip(before, learner.model.parameters(), strict=True)]
        change = torch.cat([m.flatten() for m in moved]).norm()  # lr times gradient and decay
        loss, correct = (totals / n).tolist()
        found.append({"loss": loss, "correct": correct, "change": change.item()})
    return found


def take_first_steps(rank, port):
    """Be one of two processes, with the variables that torchrun sets."""
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": f"{port}"}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    utils.write_json(Path(f"{rank}.json"), first_steps())


def test_two_processes_take_the_same_first_step_as_one():
    one = first_steps()
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    fork = multiprocessing.get_context("fork")
    two = [fork.Process(target=take_first_steps, args=(rank, store.port)) for rank in (0, 1)]
    for process in two:
        process.start()
    for process in two:
        process.join(60)
        assert process.exitcode == 0
    for rank in (0, 1):
        for single, double in zip(one, json.loads(Path(f"{rank}.json").read_text()), strict=True):
            assert double == pytest.approx(single, rel=1e-5)
            assert single["change"] > 0.01


@pytest.mark.slow
def test_three_processes_go_on_to_the_bit():
    """The order of sums over two could not matter."""
    three = run("tests/resumed_steps.py", launcher=(*TORCHRUN[:-1], "3"), OMP_NUM_THREADS="1")
    assert three.stdout == "differences: 0\n", three.stderr


LINE = (
    "train.py demo --epochs 2 --batch-size 63 --val-size 800 --max-steps-per-epoch 9"
    " --ema-decay 0.8 --dropout 0.1 --save-minutes 0 --wandb disabled"
).split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training of two processes: its run folder and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    trained = run(*LINE, launcher=TORCHRUN, cwd=folder)
    assert trained.returncode == 0, trained.stderr
    return folder / "checkpoints" / "demo", trained.stdout


def log(folder):
    return [{**row, "seconds": ""} for row in utils.read_csv(folder / "log.csv")]


@pytest.mark.slow
def test_data_parallel_run_is_tested_by_one_process_with_the_same_result(whole):
    """Its validation set is more than one batch, so both processes take part in evaluating it."""
    folder, output = whole
    assert "on cpu in 2 processes" in output
    assert output.count("epoch 2/2") == 1  # one process prints
    model, info = load_model(folder / "model.safetensors")
    digits = load_dataset(replace(PRESETS["demo"], val_size=800))
    val, test = (evaluate(model, part, digits.normalize) for part in (digits.val, digits.test))
    assert f"test accuracy: {test.accuracy:.2f}% ({test.correct} of 359;" in output
    assert info["accuracy"]["test"] == test.accuracy
    last = log(folder)[-1]
    assert last["val_loss"] == pytest.approx(val.loss, rel=1e-5)
    assert last["val_accuracy"] == pytest.approx(val.accuracy)


def test_processes_share_each_global_batch_as_one_process_augments_it(monkeypatch):
    """Three of them, one after the other."""
    digits = load_dataset(PRESETS["demo"])
    config = replace(PRESETS["demo"], rotation_degrees=30.0, batch_size=101)
    whole, shares = list(train_batches(digits, config, 1)), []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shares.append(list(train_batches(digits, config, 1)))
    for (images, labels, size), *parts in zip(whole, *shares, strict=True):
        for rank, (share, share_labels, global_size) in enumerate(parts):
            assert torch.equal(share, images[rank::3])
            assert torch.equal(share_labels, labels[rank::3])
            assert global_size == size == len(labels)


def child(launcher, rank):
    """Process id of one rank below torchrun."""
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            return int(pid)
    raise LookupError(rank)


@pytest.mark.slow
def test_killed_process_ends_the_job_which_goes_on_with_as_many_or_one(whole, monkeypatch):
    process = subprocess.Popen(
        command(*LINE, launcher=TORCHRUN),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("epoch 1/2"):
            break
    state = Path("checkpoints/demo/last.pt")
    while not load_state(state)[0]["metrics"]["step"]:  # until the next epoch has begun
        time.sleep(0.01)
    os.kill(child(process.pid, rank=1), signal.SIGKILL)
    start = time.monotonic()
    process.communicate()
    assert process.returncode != 0
    assert time.monotonic() - start < 30  # not a hang
    state, _ = load_state(state)
    assert (len(state["metrics"]["log"]), state["metrics"]["step"] > 0) == (1, True)

    shutil.copytree("checkpoints", "alone/checkpoints")
    again = run(*LINE, "--resume", launcher=TORCHRUN)
    assert again.returncode == 0, again.stderr
    resumed, expected = (
        load_model(folder / "model.safetensors")[0].state_dict()
        for folder in (Path("checkpoints/demo"), whole[0])
    )
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    assert log(Path("checkpoints/demo")) == log(whole[0])

    monkeypatch.chdir("alone")
    assert run_main("train", *LINE[1:], "--resume", monkeypatch=monkeypatch) == 0
    ours, theirs = log(Path("checkpoints/demo")), log(whole[0])  # BN saw whole batches here
    assert ours[0] == theirs[0]
    assert ours[1]["train_loss"] == pytest.approx(theirs[1]["train_loss"], rel=0.2)


def signaled_after_an_epoch(epochs, number):
    """Send torchrun a signal after the first epoch; its status, and what all processes wrote."""
    process = subprocess.Popen(
        command(*LINE, "--epochs", epochs, launcher=TORCHRUN),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if re.match(rf"epoch +1/{epochs}", line):
            process.send_signal(number)
            break
    errors = process.communicate(timeout=120)[1]  # until the processes have closed their ends
    return process.returncode, errors


@pytest.mark.slow
def test_signal_to_torchrun_saves_at_the_same_step_everywhere():
    status, errors = signaled_after_an_epoch(50, signal.SIGTERM)
    assert status != 0
    stopped = [line for line in errors.splitlines() if line.startswith("stopped by SIGTERM")]
    assert len(stopped) == 1
    state = load_state(Path("checkpoints/demo/last.pt"))[0]["metrics"]
    where = f"epoch {len(state['log']) + 1}, step {state['step']}"
    assert (where if state["step"] else f"epoch {len(state['log'])}") + "," in stopped[0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_processes_that_torchrun_leaves_behind_save_and_end(number):
    status, errors = signaled_after_an_epoch(500, number)
    assert status == -number
    stopped = [line for line in errors.splitlines() if line.startswith("stopped by the end of")]
    assert len(stopped) == 1
    state = load_state(Path("checkpoints/demo/last.pt"))[0]["metrics"]
    where = f"epoch {len(state['log']) + 1}, step {state['step']}"
    assert (where if state["step"] else f"epoch {len(state['log'])}") + "," in stopped[0]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("local_rank", [0, 1])
def test_the_others_wait_for_the_first_even_if_it_fails(local_rank, fails, monkeypatch):
    done = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.barrier", lambda: done.append("barrier"))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with contextlib.suppress(InputError), distributed.first_on_each_machine():
        done.append("read")
        if fails:
            raise InputError("data_dir: nothing there")
    assert done == (["barrier", "read"] if local_rank else ["read", "barrier"])


ALONE = """
import sys
import torch.distributed as dist
from engine import distributed
from engine.script import run_script

def main(_):
    distributed.init_processes()
    dist.get_backend = lambda: "nccl"  # whose group lets nobody go while others work
    dist.destroy_process_group = lambda: print("waits for the others", file=sys.stderr)
    if dist.get_rank():
        raise RuntimeError(sys.argv[1])
    dist.barrier()

run_script(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("CUDA out of memory.", "rank 1: error: memory: CUDA out of memory.; free some, or give"),
        ("a defect", "RuntimeError: a defect"),
    ],
)
def test_process_that_fails_alone_says_so_and_ends_the_others(error, line):
    Path("alone.py").write_text(ALONE)
    result = run(Path("alone.py").absolute(), error, launcher=TORCHRUN)
    assert result.returncode != 0
    assert "waits for the others" not in result.stderr
    assert any(found.startswith(line) for found in result.stderr.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--batch-size 1", "batch_size: 1 for 1,438 training images and 2 processes; use 2 to"),
        ("--dataset folder --data-dir photos", "data_dir: photos/dog holds one picture alone; "),
    ],
)
def test_bad_input_under_torchrun_is_one_line_and_ends_all_processes(options, words):
    make_pictures("photos", cat=3, dog=1)
    result = run("train.py", "demo", *options.split(), launcher=TORCHRUN)
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert "[rank" not in result.stderr  # a traceback of a process that waits for another
