"""Random search: what is drawn, what is refused, and a real search on two nodes of Ray."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import filelock
import numpy as np
import pytest
from conftest import ROOT, run_main

import train as train_script
import utils
from model import ResNet, count_parameters
from train import PRESETS, check_config, load_config

pytest.importorskip("ray")
import search as search_script
from search import SPACE, RandomSearch, Search, UnderBudget, configuration, make_searcher


def samples(algorithm="random", seed=0, min_params=0):
    """What makes trials of samples, as a search does."""
    search = Search(algorithm=algorithm, seed=seed)
    return UnderBudget(make_searcher(search), PRESETS["tpsnet"], min_params)


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_trials_are_within_the_space_and_the_budget(algorithm):
    source = samples(algorithm, min_params=500_000)
    drawn = []
    suggest = source.samples.suggest
    source.samples.suggest = lambda *args: drawn.append(suggest(*args)) or drawn[-1]
    for number in range(1, 13):
        trial = source.suggest(f"trial-{number}")
        config = train_script.make_config(trial["constants"])
        check_config(config)
        assert (trial["number"], config.name) == (number, f"tpsnet/{number:03d}")
        built = count_parameters(ResNet(**config.architecture()))
        assert built == trial["num_params"]
        assert 500_000 <= built <= 5_000_000
        assert len(config.num_blocks) == trial["num_stages"] in SPACE["num_stages"]
        for name in ("num_blocks", "conv_kernel", "skip_kernel"):
            assert set(getattr(config, name)) <= set(SPACE[name])
        for name in ("c1", "width", "dropout", "classifier_dropout", "batch_size", "optimizer"):
            assert getattr(config, name) in SPACE[name]
        assert 1e-4 <= config.lr <= 1
        assert trial["rejected"] == len(drawn) - number
    assert source.rejected > 0


def test_learning_rates_are_log_uniform():
    source = RandomSearch(0)
    lrs = np.array([source.suggest(str(i))["lr"] for i in range(400)])
    shares = np.histogram(np.log10(lrs), bins=[-4, -3, -2, -1, 0])[0] / 400
    assert shares == pytest.approx([0.25] * 4, abs=0.08)


@pytest.mark.parametrize("same", [True, False])
def test_blocks_and_pooling_of_a_sample(same):
    sample = RandomSearch(0).suggest("")
    sample |= {"num_stages": 3, "same_blocks": same, "pooled_size": 2}
    sample |= {"num_blocks_1": 4, "num_blocks_2": 5, "num_blocks_3": 6, "num_blocks_4": 7}
    config = configuration(sample, PRESETS["tpsnet"])
    assert config.num_blocks == ((4, 4, 4) if same else (4, 5, 6))
    assert config.pool_kernel == 4  # an 8x8 map to 2x2
    assert (config.rotation, config.weight_decay) == (5.0, 5e-4)  # what is not drawn


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_restored_searcher_goes_on_as_it_would_have(algorithm, tmp_path):
    first = samples(algorithm)
    for i in range(3):
        first.suggest(str(i))
    first.on_trial_complete("0", {"val_accuracy": 50.0, "training_iteration": 1})
    first.save(tmp_path / "state")
    second = samples(algorithm, seed=9)
    second.restore(tmp_path / "state")
    for source in (first, second):
        source.on_trial_complete("1", {"val_accuracy": 60.0, "training_iteration": 1})
    assert [first.suggest(i) for i in "34"] == [second.suggest(i) for i in "34"]


def test_optuna_learns_from_what_ended_and_random_search_does_not():
    def last_errors(algorithm):
        """How far the last 20 of 60 learning rates are from the best, in powers of ten."""
        source, errors = samples(algorithm, seed=1).samples, []
        for i in range(60):
            errors.append(abs(np.log10(source.suggest(str(i))["lr"]) + 1.5))
            source.on_trial_complete(str(i), {"val_accuracy": -errors[-1]})
        return np.mean(errors[-20:])

    assert last_errors("optuna") < 0.7 * last_errors("random")


# ---------------------------------------------------------------- bad input


BAD_LINES = [
    ("resnet50", ["preset", "'resnet50'", "demo"]),
    ("demo --num-samples 0", ["num_samples", "0", "at least 1"]),
    ("demo --epochs 0", ["epochs", "0", "at least 1"]),
    ("demo --epochs 3 --grace-period 4", ["grace_period", "4", "from 0 to 3"]),
    ("demo --val-size -1", ["val_size", "-1", "at least 0"]),
    ("demo --val-size 5000", ["val_size", "5000", "or 10 to 1,428"]),
    ("demo --train-size 200 --val-size 200", ["batch_size", "256", "200 training images"]),
    ("demo --cpus-per-trial 0", ["cpus_per_trial", "0", "from 0.01"]),
    ("demo --gpus-per-trial -1", ["gpus_per_trial", "-1", "from 0"]),
    ("demo --time-budget nan", ["time_budget", "nan", "from 0"]),
    ("demo --min-params 4999999", ["min_params", "2,000 samples", "4,999,999", "SPACE"]),
    ("demo --name a/b", ["name", "'a/b'", "leave out the /"]),
    ("demo --name ..", ["name", "'..'", "letters, digits"]),
    ("demo --algorithm grid", ["--algorithm", "'grid'", "optuna"]),
    ("demo --address localhost", ["address", "'localhost'", "HOST:PORT"]),
    ("demo --address 127.0.0.1:9", ["address", "127.0.0.1:9", "ray start --head"]),
    ("demo --resume nothing", ["resume", "checkpoints/nothing", "--name"]),
    ("--no-download", ["data_dir", "cifar-10-python.tar.gz"]),
]


def check_refusal(line, words, monkeypatch, capsys):
    """One line that contains `words`, status 2, and nothing written."""
    before = sorted(Path().rglob("*"))
    assert run_main(search_script.main, *line.split(), monkeypatch=monkeypatch) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err
    assert captured.out == ""
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(("line", "words"), BAD_LINES, ids=[line for line, _ in BAD_LINES])
def test_bad_command_line(line, words, monkeypatch, capsys):
    monkeypatch.setattr(search_script, "MAX_REJECTED", 2000 if "2,000" not in words[1] else 20)
    words = [word.replace("2,000 samples", "20 samples") for word in words]
    check_refusal(line, words, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"c1": ()}, ["c1", "empty", "()"]),
        ({"num_blocks": range(3, 3)}, ["num_blocks", "empty", "range(3, 3)"]),
        ({"lr": search_script.LogUniform(0.1, 0.01)}, ["lr", "empty", "0.01"]),
        ({"width": 2}, ["width", "empty", "2", "tuple"]),
        ({"depth": (1, 2)}, ["depth", "no constant of train.py"]),
    ],
    ids=str,
)
def test_bad_space(change, words, monkeypatch, capsys):
    monkeypatch.setattr(search_script, "SPACE", SPACE | change)
    check_refusal("demo", ["SPACE", *words], monkeypatch, capsys)


def test_empty_space(monkeypatch, capsys):
    monkeypatch.setattr(search_script, "SPACE", {})
    check_refusal("demo", ["SPACE", "lacks num_stages", "search.py"], monkeypatch, capsys)


def test_search_is_not_overwritten_nor_resumed_as_another(monkeypatch, capsys):
    folder = Path("checkpoints/found")
    folder.mkdir(parents=True)
    line = "demo --name found"
    check_refusal(line, ["name", "checkpoints/found", "--resume found"], monkeypatch, capsys)
    check_refusal("--resume found", ["resume", "no search in"], monkeypatch, capsys)
    stored = {"preset": "demo", "space": repr(SPACE), **vars(Search(name="found", num_samples=9))}
    utils.write_json(folder / "search.json", stored)
    words = ["num_samples", "8", "was started with 9"]
    check_refusal("--resume found --num-samples 8", words, monkeypatch, capsys)
    monkeypatch.setattr(search_script, "SPACE", SPACE | {"c1": (16, 17)})
    check_refusal("--resume found", ["SPACE", "range(8, 49)", "put it back"], monkeypatch, capsys)


# ---------------------------------------------------------------- a real search


@contextlib.contextmanager
def ray_nodes(monkeypatch):
    """Two nodes of Ray on this machine, of one processor each; the address of their cluster."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = "--block --num-cpus 1 --object-store-memory 100000000 --disable-usage-stats".split()
    head = ["--head", "--node-ip-address", "127.0.0.1", "--port", address.split(":")[1]]
    head.append("--include-dashboard=false")
    nodes = []
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", *common]
    try:
        for place in (head, ["--address", address]):
            nodes.append(
                subprocess.Popen(
                    [*ray, *place],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
            wait_for(lambda: can_connect(address))
        yield address
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.wait(60)


def can_connect(address):
    host, port = address.split(":")
    with contextlib.suppress(OSError):
        socket.create_connection((host, int(port)), timeout=1).close()
        return True
    return False


def wait_for(condition, seconds=60):
    """Wait until `condition` is true; returns what it is."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def rows(*statuses):
    """The rows of trials.csv that have one of these statuses, by their trial."""
    with contextlib.suppress(OSError):
        found = utils.read_numbers("checkpoints/tiny/trials.csv")
        return {r["trial"]: r for r in found if not statuses or r["status"] in statuses}
    return {}


def start(*args):
    """tests/tiny_search.py, in a process of its own."""
    script = [sys.executable, str(ROOT / "tests" / "tiny_search.py"), *args]
    with Path("out.txt").open("w") as out:
        return subprocess.Popen(script, stdout=out, stderr=subprocess.STDOUT)


def noted_ends(folder):
    """The trials that Ray Tune's state says have ended: the last second's are not there yet."""
    if not search_script.state_is_whole(folder):
        return []
    state = json.loads(max(folder.glob("experiment_state-*.json")).read_text())
    trials = [json.loads(trial) for trial, _ in state["trial_data"]]
    return [trial["config"]["number"] for trial in trials if trial["status"] == "TERMINATED"]


@pytest.mark.slow
def test_search_on_two_nodes_outlives_a_kill_and_a_signal(monkeypatch):
    ended = ("finished", "stopped", "diverged", "failed")
    with ray_nodes(monkeypatch) as address:
        line = "demo --name tiny --num-samples 8 --epochs 4"
        driver = start(*line.split(), "--address", address)
        # Each node has one processor: two trials at once are on two nodes.
        wait_for(lambda: len(rows("running")) == 2)
        wait_for(lambda: len(rows("finished", "stopped")) >= 2 or driver.poll() is not None)
        driver.kill()
        driver.wait()
        before, noted = rows(*ended), noted_ends(Path("checkpoints/tiny/ray"))
        failed = rows("failed")
        assert failed[1]["error"] == "MemoryError: no memory is left"
        assert failed[2]["error"].startswith("ActorDiedError: The actor died unexpectedly")

        driver = start("--resume", "tiny", "--address", address)
        wait_for(lambda: len(rows("finished", "stopped")) >= 4 or driver.poll() is not None)
        driver.send_signal(signal.SIGINT)
        assert driver.wait(60) == 130
        assert "stopped by SIGINT, saved in checkpoints/tiny; --resume tiny goes on" in (
            Path("out.txt").read_text()
        )
        assert rows("running", "pending")

        driver = start("--resume", "tiny", "--address", address)
        assert driver.wait(120) == 0
        output = Path("out.txt").read_text()
        too_many = start(*"demo --name other --cpus-per-trial 2 --address".split(), address)
        assert too_many.wait(60) == 2
    assert Path("out.txt").read_text() == (
        "error: cpus_per_trial: 2, but no machine has more than 1; use up to 1\n"
    )
    after = rows()
    assert sorted(after) == [*range(1, 9)]
    for trial, row in after.items():
        assert row["status"] == ("finished" if row["epochs"] == 4 else "stopped")
        log = utils.read_numbers(f"checkpoints/tiny/{trial:03d}/log.csv")
        assert [r["epoch"] for r in log] == [*range(1, row["epochs"] + 1)]
        assert row["val_accuracy"] == log[-1]["val_accuracy"]
        assert row["early_accuracy"] == log[0]["val_accuracy"]
        config = load_config(f"checkpoints/tiny/{trial:03d}/config.json")
        assert count_parameters(ResNet(**config.architecture())) == row["num_params"]
        assert not list(Path(f"checkpoints/tiny/{trial:03d}").glob("*.pt"))
        if trial in noted and trial > 2:
            assert row == before[trial]  # what had ended was not repeated
    best = max(after.values(), key=lambda row: row["val_accuracy"])
    assert f"best: trial {best['trial']}, {best['val_accuracy']:.2f}% of 200" in output
    assert "no figures: they take 10 trials" in output
    config = load_config("checkpoints/tiny/best.json")
    check_config(config)
    assert (config.lr, config.val_size, config.name) == (best["lr"], 0, "tiny-best")
    trained = load_config(f"checkpoints/tiny/{best['trial']:03d}/config.json")
    assert config == replace(trained, name="tiny-best", val_size=0, wandb="auto")
    stored = json.loads(Path("checkpoints/tiny/search.json").read_text())
    assert (stored["num_samples"], stored["grace_period"], stored["val_size"]) == (8, 1, 200)
    check_state_survives_damage(Path("checkpoints/tiny/ray"))


def check_state_survives_damage(folder):
    """Ray Tune writes its state in place: a kill can leave half of it, or files that disagree."""
    assert search_script.state_is_whole(folder)
    search_script.keep_state(folder)
    for pattern in search_script.STATE_FILES:
        newest = max(folder.glob(pattern))
        newest.write_bytes(newest.read_bytes()[:1000])
        assert not search_script.state_is_whole(folder)
        search_script.keep_state(folder)  # does not replace the sound copy
        search_script.mend_state(folder)
        assert search_script.state_is_whole(folder)


@pytest.fixture
def memory_to_itself(tmp_path_factory):
    """Waits until no other run of these tests on this machine fills its memory."""
    runs = tmp_path_factory.getbasetemp().parent  # of pytest, one folder each
    with filelock.FileLock(runs / "memory.lock", timeout=300):
        yield


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="does not say how much is free")
def test_trial_that_ray_kills_for_its_memory_fails_alone(memory_to_itself, monkeypatch):
    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    total, free = kilobytes["MemTotal"], kilobytes["MemAvailable"]
    if free < 8e6:
        pytest.skip("less than 8 GB are free")
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{1 - (free - 3e6) / total:.3f}")
    monkeypatch.setenv("GREEDY", "1")
    line = f"demo --name tiny --num-samples 3 --epochs 1 --cpus-per-trial {os.cpu_count()}"
    assert start(*line.split()).wait(120) == 0
    assert [row["status"] for row in rows().values()] == ["failed", "finished", "finished"]
    assert rows()[1]["error"].startswith("RayActorError: 1 worker(s) were killed")
    monkeypatch.delenv("GREEDY")
    for number in (1, 2):
        Path(f"failed-{number}").touch()
    assert start("--resume", "tiny").wait(120) == 0
    assert [row["status"] for row in rows().values()] == ["finished"] * 3
