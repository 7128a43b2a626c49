"""The search: bad options, drawing, what outlives damage, and real searches on Ray."""

import contextlib
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from operator import add
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import ROOT, make_pictures
from damaged_search import damage_rounds, make_search
from tiny_search import TINY

import utils
from config import PRESETS, check_config, load_config
from model import ResNet, count_parameters
from search.cluster import LISTEN, set_environment, trial_resources, usable_cpus
from search.run import finish, load_search, main, run_search
from search.space import (
    SPACE,
    LogUniform,
    Search,
    configuration,
    draw_sample,
    random_samples,
    with_defaults,
    with_epochs,
)
from search.trials import Trials, write_record
from utils import InputError, SearchError

# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("resnet50", ["preset", "'resnet50'", "demo"]),
        ("demo --num-samples 0", ["num_samples", "0", "at least 1"]),  # stands for every Range
        ("demo --epochs 3 --grace-epochs 4", ["grace_epochs", "4", "from 0 to 3"]),
        ("demo --min-params 9 --max-params 8", ["min_params", "9", "8"]),
        ("demo --name a/b", ["name", "'a/b'", "leave out the /"]),
        ("demo --name a$b", ["name", "'a$b' must be 1 to 95 letters, digits and . _ -"]),
        ("demo --max-params 9", ["min_params", "samples", "0 to 9", "SPACE"]),
        ("demo --name there", ["name", "checkpoints/there", "--resume there"]),
        ("demo --val-size 5000", ["val_size", "5000", "10 to 1,428"]),
        ("demo --train-size 50", ["batch_size", "256", "50 training images"]),
        ("demo --address localhost", ["address", "'localhost'", "HOST:PORT"]),
        ("demo --address 127.0.0.1:9", ["address", "127.0.0.1:9", "ray start --head"]),
        ("demo --cpus-per-trial 1 --resume nothing", ["resume", "checkpoints/nothing", "--name"]),
        ("--resume there --num-samples 8", ["num_samples", "8", "was started with 9"]),
        ("demo --dataset folder --data-dir none", ["data_dir", "none does not exist; name"]),
        ("fast --resume there", ["preset", "fast", "was started with demo"]),
    ],
)
def test_a_bad_option_is_one_line_and_writes_nothing(line, words, monkeypatch):
    monkeypatch.setattr("search.space.MAX_REJECTED", 5)
    search = Search(name="there", num_samples=9)
    described = {"preset": "demo", "space": repr(TINY), **asdict(search)}
    write_record(Path("checkpoints/there/search.json"), described)
    before = sorted(Path().rglob("*"))
    with pytest.raises(InputError) as error:
        main(line.split(), TINY)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (SPACE | {"c1": ()}, ["c1", "()"]),
        (SPACE | {"lr": LogUniform(0.1, 0.01)}, ["lr", "0.01"]),
        (SPACE | {"width": 2}, ["width", "2", "tuple"]),
        (SPACE | {"channels": range(16, 129)}, ["width", "channels"]),
        (SPACE | {"depth": (1, 2)}, ["'depth'", "config.py"]),
        (SPACE | {"pool_kernel": (1, 2)}, ["pool_kernel", "pooled_size"]),
        ({}, ["num_stages", "search/space.py"]),
    ],
)
def test_a_bad_space_is_one_line(space, words):
    with pytest.raises(InputError) as error:
        run_search(Search(), "demo", space)
    for word in ("SPACE", *words):
        assert word in str(error.value)


def test_an_unknown_data_set_is_one_line():
    with pytest.raises(InputError, match=r"^dataset: 'mnist' is not one of cifar10, cifar100"):
        run_search(Search(dataset="mnist"), "demo")


def test_a_constant_that_no_option_sets_is_refused_with_where_it_is_set():
    make_pictures("photos", cat=30, dog=30)
    for dataset, words in (("digits", "^flip, .*in SPACE"), ("folder", "^batch_size: 128 .*SPACE")):
        with pytest.raises(InputError, match=f"{words} .*another preset than tpsnet"):
            run_search(Search(dataset=dataset, data_dir="photos"), "tpsnet")


def test_warm_up_and_restarts_keep_their_share_of_the_epochs():
    trial = make_trials(SPACE, "best", epochs=30).base
    assert (trial.epochs, trial.warmup_epochs, trial.restart_epochs) == (30, 5, 13)
    long = with_epochs(trial, 300)
    assert (long.epochs, long.warmup_epochs, long.restart_epochs) == (300, 50, 125)
    assert with_epochs(trial, 1).warmup_epochs == 0


def test_a_search_reads_no_test_image(monkeypatch):
    def refuse(config, test=True):
        raise InputError(f"test: {test}")

    monkeypatch.setattr("search.run.load_dataset", refuse)
    with pytest.raises(InputError, match="test: False"):
        run_search(Search(num_samples=1, epochs=1), "demo")


def test_a_damaged_search_json_or_another_space_is_refused():
    path = Path("checkpoints/found/search.json")
    stored = {"preset": "demo", "space": repr(SPACE), **asdict(Search(name="found", num_samples=9))}
    write_record(path, stored)
    whole = path.read_bytes()
    shutil.copytree("checkpoints/found", "checkpoints/copy")
    assert load_search(Search(resume="copy"))[1].name == "copy"
    with pytest.raises(InputError, match=r"^num_samples: 200, but the search copy was .* with 9;"):
        main("--resume copy --num-samples 200".split())
    for content in (whole.replace(b": 9,", b": 8,"), b"[" * 100_000, b"[]", b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match="resume: no search in checkpoints/found"):
            load_search(Search(resume="found"))
    write_record(path, stored | {"space": repr(SPACE | {"c1": range(9, 10)})})
    with pytest.raises(InputError, match=r"SPACE: .* range\(9, 10\)"):
        load_search(Search(resume="found"))


def test_ray_is_neither_imported_nor_set_up_before_the_options_are_checked(
    new_imports, monkeypatch
):
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it is an error
    for name in [name for name in os.environ if name.startswith(("RAY_", "TUNE_"))]:
        monkeypatch.delenv(name)  # of another test
    before = dict(os.environ)
    search = importlib.import_module("search.run")
    with pytest.raises(SystemExit):
        search.main(["-h"])
    with pytest.raises(ValueError, match=r"^epochs: "):
        search.main(["demo", "--epochs", "0"])
    assert dict(os.environ) == before


@pytest.mark.parametrize(("module", "options"), [("ray", ""), ("optuna", "--algorithm optuna")])
def test_a_missing_library_is_one_line(module, options, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"{module}.*pip install -r requirements-dev.txt"):
        main(f"demo --name tiny {options}".split(), TINY)


@pytest.mark.parametrize(
    ("variables", "groups", "limits", "cpus"),
    [
        ({}, "", {}, 6),  # as joblib counts: by affinity and by the quota of a container
        ({"SLURM_CPUS_ON_NODE": "4"}, "", {}, 4),
        ({"SLURM_CPUS_ON_NODE": "64"}, "", {}, 6),
        ({"SLURM_CPUS_ON_NODE": "4(x2)"}, "", {}, 6),
        ({}, "0::/user/job", {"user": "250000 100000", "user/job": "max 100000"}, 3),
        ({}, "0::/user/job", {"": "max", "user/job": "50000 100000"}, 1),
        ({}, "1:cpu:/job\n0::/../job", {"user": "100000 100000"}, 6),
    ],
)
def test_ray_gets_the_cpus_that_this_process_may_use(
    variables, groups, limits, cpus, tmp_path, monkeypatch
):
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for group, content in limits.items():
        folder = tmp_path / "sys/fs/cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text(f"{content}\n")
    monkeypatch.setattr("joblib.cpu_count", lambda: 6)
    assert usable_cpus(tmp_path) == cpus


def test_classes_and_validation_images_follow_from_the_data():
    make_pictures("photos", cat=30, dog=20, eel=14)
    expected = {"folder": (3, 12), "cifar100": (100, 5000), None: (10, 200)}
    for dataset, (num_classes, val_size) in expected.items():
        search = with_defaults(Search(dataset=dataset, data_dir="photos"), "demo")
        trials = Trials(search, "demo", TINY)
        assert search.val_size == trials.base.val_size == val_size
        row = trials.draw(1)
        assert trials.config(row).num_classes == num_classes
        assert row["num_params"] == count_parameters(ResNet(trials.config(row)))
    given = with_defaults(Search(dataset="folder", data_dir="nothing", val_size=9), "demo")
    assert given.val_size == 9
    found = [with_defaults(Search(dataset=name), "mine").data_dir for name in ("cifar10", None)]
    assert found == ["data", "photos"]


# ---------------------------------------------------------------- drawing


def make_trials(space=TINY, preset="demo", **options):
    """The trials of a search that has not begun."""
    search = Search(name="tiny", **{"epochs": 2, "grace_epochs": 1, "val_size": 200} | options)
    return Trials(search, preset, space)


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_trials_are_within_the_space_and_the_limits(algorithm):
    limits = {"min_params": 10_000, "max_params": 40_000, "max_macs": 4_000_000}
    space = TINY | {"c1": range(2, 9)}
    trials = make_trials(space, "tpsnet", algorithm=algorithm, **limits)
    rejected = 0
    for number in range(1, 6):
        row = trials.draw(number)
        config = trials.config(row)
        check_config(config)
        assert (row["trial"], config.name) == (number, f"tiny/{number:03d}")
        assert 10_000 <= count_parameters(ResNet(config)) == row["num_params"] <= 40_000
        assert row["macs"] <= 4_000_000
        assert len(config.num_blocks) == row["num_stages"] in space["num_stages"]
        for name in ("num_blocks", "conv_kernel", "skip_kernel"):
            assert set(getattr(config, name)) <= set(space[name])
            assert row[name] == " ".join(map(str, getattr(config, name)))
        for name in ("c1", "width", "batch_size", "optimizer"):
            assert row[name] == getattr(config, name) in space[name]
        assert 1e-4 <= config.lr <= 1
        rejected += row["rejected"]
    assert rejected > 0


def test_a_logarithmic_range_is_drawn_evenly_by_order_of_magnitude():
    samples = itertools.islice(random_samples(TINY, 0), 400)
    assert 0.005 < np.median([sample["lr"] for sample in samples]) < 0.02  # of 1e-4 to 1


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_a_trial_is_a_function_of_the_seed_and_its_number(algorithm):
    first, again, other = (make_trials(algorithm=algorithm, seed=seed) for seed in (0, 0, 1))
    rows = [first.draw(number) for number in (1, 2, 3)]
    assert [again.draw(number) for number in (3, 2, 1)] == rows[::-1]
    assert len({row["lr"] for row in rows}) == 3
    assert other.draw(1)["lr"] != rows[0]["lr"]


def test_searches_with_a_whitening_stem_find_networks_within_narrow_limits():
    limits = {"min_params": 1_000_000, "max_params": 1_100_000}
    trials = make_trials(SPACE, "small", **limits)
    for number in range(1, 4):
        row = trials.draw(number)
        assert (row["c1"], row["rejected"] < 1000) == (24, True)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "demo"])
def test_every_preset_can_be_searched_from(preset):
    make_pictures("photos", cat=2, dog=2)  # of `mine`
    trials = make_trials(SPACE, preset, epochs=30)
    assert trials.base.init == ""  # whose weights fit one network alone
    assert trials.base.teacher == ""  # which has seen the validation images
    sample, _ = draw_sample(trials.search, trials.base, SPACE, 1, [])
    check_config(configuration(sample, trials.base))


@pytest.mark.parametrize(("same", "num_blocks"), [(True, (4, 4, 4)), (False, (4, 5, 6))])
def test_a_sample_becomes_a_configuration(same, num_blocks):
    sample = {"num_stages": 3, "same_blocks": same, "pooled_size": 2, "c1": 9, "width": 1}
    for name, values in (
        ("num_blocks", (4, 5, 6, 7)),
        ("conv_kernel", (1, 3, 5, 1)),
        ("skip_kernel", (1, 3, 1, 3)),
    ):
        sample |= {f"{name}_{stage}": value for stage, value in enumerate(values, start=1)}
    config = configuration(sample, PRESETS["tpsnet"])
    assert (config.num_blocks, config.conv_kernel) == (num_blocks, (1, 3, 5))
    assert (config.pool_kernel, config.c1) == (4, 9)  # from 8x8 to 2x2 pixels
    assert config.rotation_degrees == PRESETS["tpsnet"].rotation_degrees  # not drawn
    pooled = configuration(sample | {"downsample": "pool"}, PRESETS["tpsnet"])
    assert pooled.pool_kernel == 2  # from 4x4 pixels


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_channels_of_each_stage_can_be_drawn_instead_of_the_width(algorithm):
    space = {name: values for name, values in TINY.items() if name != "width"}
    trials = make_trials(space | {"channels": range(3, 40, 2)}, algorithm=algorithm)
    found = set()
    for number in range(1, 6):
        row = trials.draw(number)
        config = trials.config(row)
        assert len(config.channels) == row["num_stages"]
        assert set(config.channels) <= set(range(3, 40, 2))
        assert row["channels"] == " ".join(map(str, config.channels))
        assert row["num_params"] == count_parameters(ResNet(config))
        trials.write(row | {"status": "finished", "val_accuracy": 20.0})
        assert trials.read(number)["sample"] == row["sample"]
        found.update(config.channels)
    assert len(found) > 5
    assert "width" not in trials.columns
    assert "channels" not in make_trials(TINY).columns  # a search of before goes on


def test_tpe_learns_from_the_trials_that_ended_and_random_search_does_not():
    def last_errors(algorithm):
        """Distance of the last 10 of 40 learning rates from the best one, in powers of ten."""
        search, errors, tried = Search(algorithm=algorithm, seed=1), [], []
        for number in range(1, 41):
            sample, _ = draw_sample(search, PRESETS["demo"], TINY, number, tried)
            errors.append(abs(np.log10(sample["lr"]) + 1.5))
            tried.append((sample, -errors[-1]))
        return np.mean(errors[-10:])

    assert last_errors("optuna") < 0.7 * last_errors("random")


def test_tpe_is_given_the_trials_that_ended():
    trials = make_trials(num_samples=20, algorithm="optuna")
    for number, status in enumerate(("finished", "diverged", "stopped", "failed"), start=1):
        accuracy = None if status == "diverged" else 3.0 * number
        trials.write(trials.draw(number) | {"status": status, "val_accuracy": accuracy})
    assert [accuracy for _, accuracy in trials.tried()] == [3, 10, 9]


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("damaged", [None, b"", b"\xff\xfe\x00", b"{}", b"[" * 100_000, "edited"])
def test_a_damaged_trial_is_trained_again_and_a_line_names_it(damaged, capsys):
    trials = make_search(("finished", "stopped", "diverged", "running"))
    before = trials.rows[2]
    path = trials.folder(2) / "trial.json"
    if damaged == "edited":
        damaged = path.read_bytes().replace(b"20.25", b"99.25")
    path.unlink() if damaged is None else path.write_bytes(damaged)
    (trials.folder(2) / "config.json").touch()
    (trials.path / "trials.csv").write_bytes(b"\xff")  # is never read
    resumed = Trials(trials.search, "demo", TINY)
    resumed.load()
    assert {number: row["status"] for number, row in resumed.rows.items()} == {
        1: "finished", 3: "diverged", 4: "interrupted",
    }  # fmt: skip
    for number in (2, 4):
        resumed.remove_unless_resumable(number)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[:2] for line in lines] == [["warning", " trial 2 is trained again"]]
    assert not trials.folder(2).exists()
    assert resumed.draw(2)["sample"] == before["sample"]


def test_a_trial_whose_state_cannot_be_read_is_kept():
    trials = make_search(("interrupted",))
    (trials.folder(1) / "last.pt").mkdir()  # as a file that another program has locked, on Windows
    with pytest.raises(InputError, match=r"^resume: .*last.pt cannot be read"):
        trials.remove_unless_resumable(1)
    assert trials.folder(1).exists()


def test_no_row_is_lost_or_changed_by_random_damage():
    assert damage_rounds(20) == {"nothing lost": 20}


@pytest.mark.parametrize(("drawn", "warmup_epochs"), [({}, 45), ({"warmup_epochs": (1,)}, 150)])
def test_the_best_trial_is_the_most_accurate_one_that_did_not_fail(drawn, warmup_epochs, capsys):
    """To be trained with the preset's warm-up, in proportion, or the one that was drawn."""
    trials = make_search(("finished", "diverged", "stopped", "failed"))
    assert trials.best()["trial"] == 3
    trials.base = replace(trials.base, warmup_epochs=1)  # of two epochs
    trials.preset, trials.space = "best", trials.space | drawn
    finish(trials, 0)
    printed = capsys.readouterr().out
    assert "best: trial 3, 30.38% of 200" in printed
    assert "3 trials are left" in printed
    command = "next: python train.py --config checkpoints/damaged/best.json --epochs 300"
    assert f"{command} --warmup-epochs {warmup_epochs}\n" in printed
    config = load_config("checkpoints/damaged/best.json")
    assert (config.name, config.val_size, config.lr) == ("damaged-best", 0, trials.rows[3]["lr"])


# ---------------------------------------------------------------- real searches on Ray


def test_ray_listens_to_this_machine_alone_and_wants_a_token(monkeypatch):
    tokens = set()
    for _ in range(2):
        monkeypatch.setattr(os, "environ", {})
        set_environment("")
        assert os.environ[LISTEN] == "0"
        assert os.environ["RAY_AUTH_MODE"] == "token"
        tokens.add(os.environ["RAY_AUTH_TOKEN"])
    assert len(tokens) == 2
    assert all(re.fullmatch("[0-9a-f]{64}", token) for token in tokens)
    monkeypatch.setattr(os, "environ", {})
    set_environment("127.0.0.1:6379")  # a cluster of the user's own has its own settings
    assert not {LISTEN, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} & os.environ.keys()


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [
        ({}, "", {"cpu": 1, "gpu": 1}),
        ({}, "cpu", {"cpu": 1, "gpu": 0}),
        ({"cpus_per_trial": 2.5, "gpus_per_trial": 0.5}, "", {"cpu": 2.5, "gpu": 0.5}),
        ({"gpus_per_trial": 3.0}, "", "gpus_per_trial: 3, but no machine has more than 2"),
        ({"cpus_per_trial": 9.0}, "", "cpus_per_trial: 9, but no machine has more than 8"),
    ],
)
def test_a_trial_has_a_gpu_where_there_is_one_or_what_the_options_say(
    options, device, expected, monkeypatch
):
    found = [{"Resources": {"CPU": 8}}, {"Resources": {"CPU": 4, "GPU": 2}}]
    monkeypatch.setattr("search.cluster.machines", lambda: found)
    monkeypatch.setenv("TPSNET_DEVICE", device)
    search = Search(**options)
    if isinstance(expected, dict):
        assert trial_resources(search) == expected
    else:
        with pytest.raises(InputError, match=f"^{expected}"):
            trial_resources(search)


@pytest.mark.slow  # importing Ray takes seconds
def test_a_resumed_search_repeats_what_asha_compares_and_stops_nothing_for_it(monkeypatch):
    from search import ray_tune

    reports = []
    monkeypatch.setattr(ray_tune.tune, "report", reports.append)
    log = [{"val_accuracy": accuracy} for accuracy in (10.0, 20.0, 30.0, 40.0)]
    ray_tune.report_rungs(log, Search(epochs=5, grace_epochs=1))
    assert reports == [
        {"epoch": 1, "val_accuracy": 10.0, "repeated": True},
        {"epoch": 4, "val_accuracy": 40.0, "repeated": True},
    ]
    asha = ray_tune.ASHA("epoch", "val_accuracy", mode="max", max_t=5, reduction_factor=4)
    for number, accuracy in enumerate((90.0, 80.0, 70.0, 60.0, 10.0)):
        trial, result = Mock(trial_id=f"{number}"), {"epoch": 1, "val_accuracy": accuracy}
        asha.on_trial_add(None, trial)
        assert asha.on_trial_result(None, trial, result | {"repeated": True}) == asha.CONTINUE
    trial = Mock(trial_id="new")
    asha.on_trial_add(None, trial)
    assert asha.on_trial_result(None, trial, {"epoch": 1, "val_accuracy": 11.0}) == asha.STOP


@pytest.mark.slow
def test_no_trial_runs_any_more_after_a_search_that_cannot_go_on(monkeypatch):
    from search import ray_tune

    trials, tune = make_search(("finished", "running")), Mock()
    tune.Tuner.return_value.fit.side_effect = RuntimeError("a machine is lost")
    monkeypatch.setattr(ray_tune, "tune", tune)
    with pytest.raises(SearchError, match=r"^RuntimeError: a machine is lost; fix"):
        ray_tune.run_trials(trials, None, {})
    table = utils.read_csv("checkpoints/damaged/trials.csv")
    assert [row["status"] for row in table] == ["finished", "interrupted"]


@pytest.mark.slow
def test_a_search_ends_when_its_minutes_are_over(monkeypatch):
    from search import ray_tune

    trials = make_trials()
    for minutes, is_over in ((0.0, False), (2.0, True)):
        trials.search = replace(trials.search, max_minutes=minutes)
        monitor = ray_tune.Monitor(trials)
        assert not monitor.stop_all()
        start = time.monotonic()
        with monkeypatch.context() as later:
            later.setattr(time, "monotonic", partial(add, start, 121))
            assert monitor.stop_all() == is_over


def rows(*statuses):
    """The rows of trials.csv with one of these statuses, by trial, without their seconds."""
    with contextlib.suppress(OSError):
        found = utils.read_csv("checkpoints/tiny/trials.csv")
        found = [row for row in found if not statuses or row["status"] in statuses]
        return {row["trial"]: row | {"seconds": None} for row in found}
    return {}


def start(line):
    """tests/tiny_search.py in a process and group of its own; its output goes to out.txt."""
    script = [sys.executable, str(ROOT / "tests" / "tiny_search.py"), *line.split()]
    with Path("out.txt").open("w") as out:
        return subprocess.Popen(
            script, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


def wait_for(condition, driver, seconds=200):
    """Wait until the condition holds or the search has ended."""
    end = time.monotonic() + seconds
    while not condition() and driver.poll() is None:
        assert time.monotonic() < end, Path("out.txt").read_text()
        time.sleep(0.05)


def workers(pid):
    """The worker processes of Ray that run a trial, below a process."""
    found, below = {}, {pid}
    for path in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in below:
                below.add(int(path.name))
                found[int(path.name)] = (path / "cmdline").read_bytes()
    return [pid for pid, line in found.items() if line.startswith(b"ray::ImplicitFunc.train")]


LINE = "demo --name tiny --num-samples 6 --epochs 4 --grace-epochs 4"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a search that was not interrupted, and its output."""
    with contextlib.chdir(tmp_path_factory.mktemp("whole")):
        assert start(LINE).wait(300) == 0, Path("out.txt").read_text()
        return Path.cwd(), Path("out.txt").read_text()


@pytest.mark.slow
def test_a_search_trains_its_trials_and_writes_the_best_one(whole):
    folder, output = whole
    shutil.copytree(folder, ".", dirs_exist_ok=True)
    found = rows()
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    for trial, row in found.items():
        log = utils.read_csv(f"checkpoints/tiny/{trial:03d}/log.csv")
        assert (row["status"], row["epochs"], len(log)) == ("finished", 4, 4)
        assert row["val_accuracy"] == log[-1]["val_accuracy"]
        assert not list(Path(f"checkpoints/tiny/{trial:03d}").glob("*.pt"))
    best = max(found.values(), key=lambda row: row["val_accuracy"])
    assert f"best: trial {best['trial']}, {best['val_accuracy']:.2f}% of 200" in output
    trained = load_config(f"checkpoints/tiny/{best['trial']:03d}/config.json")
    expected = replace(trained, name="tiny-best", val_size=0, wandb="auto")
    assert load_config("checkpoints/tiny/best.json") == expected


@pytest.mark.slow
def test_a_search_that_is_killed_and_stopped_finds_what_an_unbroken_one_finds(whole):
    driver = start(LINE)
    wait_for(lambda: rows("finished"), driver)
    driver.kill()
    driver.wait()
    assert len(rows("finished")) < 6
    # One of the trials that have finished is damaged, and is trained again.
    trial = min(rows("finished"))
    Path(f"checkpoints/tiny/{trial:03d}/trial.json").write_text("{}")

    driver = start("--resume tiny")
    found = []  # in one look: between two trials a worker has another name
    wait_for(lambda: found.extend(workers(driver.pid)) or found, driver)
    os.kill(found[0], signal.SIGKILL)
    wait_for(lambda: rows("failed"), driver)
    os.killpg(driver.pid, signal.SIGTERM)
    assert driver.wait(150) == 128 + signal.SIGTERM
    output = Path("out.txt").read_text()
    assert f"warning: trial {trial} is trained again" in output
    assert "saved in checkpoints/tiny; --resume tiny goes on" in output
    assert not workers(driver.pid)

    assert start("--resume tiny").wait(300) == 0
    found = rows()
    with contextlib.chdir(whole[0]):
        assert found == rows()


def test_a_search_that_ended_before_it_wrote_anything_can_be_started_again():
    folder = Path("checkpoints/there")
    line = "demo --name there --address 127.0.0.1:9".split()
    for left, field in (
        ("run.lock", "address"),
        (".tmp-1/search.json", "address"),
        ("001", "name"),
    ):
        (folder / left).parent.mkdir(parents=True, exist_ok=True)
        (folder / left).touch()
        with pytest.raises(InputError, match=f"^{field}: "):
            main(line, TINY)


@pytest.mark.slow
def test_asha_stops_trials_early_and_they_stay_stopped():
    line = "demo --name tiny --num-samples 8 --epochs 4 --grace-epochs 1"
    assert start(line).wait(300) == 0, Path("out.txt").read_text()
    found, stopped = rows(), rows("stopped")
    assert stopped
    assert all(row["epochs"] < 4 for row in stopped.values())
    assert max(row["epochs"] for row in rows("finished").values()) == 4
    for number, row in found.items():
        first, *_ = utils.read_csv(f"checkpoints/tiny/{number:03d}/log.csv")
        assert row["early_accuracy"] == first["val_accuracy"]  # of the epoch of grace
    assert start("--resume tiny").wait(300) == 0, Path("out.txt").read_text()
    assert rows() == found


@pytest.mark.slow
def test_a_search_stops_after_three_failures_for_one_reason():
    driver = start("demo --name tiny --num-samples 5 --epochs 1")
    folder = Path("checkpoints/tiny")
    wait_for((folder / "search.json").exists, driver)
    for number in (3, 4, 5):
        (folder / f"00{number}").touch()  # where the folder of a trial is to be
    assert driver.wait(200) == 1
    last = Path("out.txt").read_text().splitlines()[-1]
    assert last.startswith("error: 3 trials in a row failed, the last one with FileExistsError")
    assert last.endswith("--resume tiny goes on")
    assert len(rows("failed")) == 3
    stored = json.loads((folder / "search.json").read_text())
    assert (stored["num_samples"], stored["grace_epochs"]) == (5, 1)
