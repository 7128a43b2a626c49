"""The trials of a search: what they draw, report and leave, and what outlives damage."""

import hashlib
import importlib.util
import io
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Bomb
from damaged_search import TINY, WIDER, damage_rounds

import utils
from config import PRESETS, check_config, load_config
from data import load_dataset
from distributed import StopSignals
from model import ResNet, count_parameters

if not importlib.util.find_spec("ray"):  # not imported: search.py tells it first where to listen
    pytest.skip("Ray is not installed", allow_module_level=True)
import search as search_script
from trials import SPACE, Search, Trials, configuration, draw_trial, random_samples, tpe_samples

# ---------------------------------------------------------------- what is drawn


def found(space=WIDER, preset="demo", **options):
    """The trials of a search that has not begun."""
    search = Search(name="tiny", **{"epochs": 2, "grace_epochs": 1, "val_size": 200} | options)
    return Trials(search, preset, space)


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_trials_are_within_the_space_and_the_budget(algorithm):
    trials = found(preset="tpsnet", algorithm=algorithm, min_params=500_000)
    rejected = 0
    for number in range(1, 6):
        row = trials.draw(number)
        config = trials.config(row)
        check_config(config)
        assert (row["trial"], config.name) == (number, f"tiny/{number:03d}")
        built = count_parameters(ResNet(config))
        assert built == row["num_params"]
        assert 500_000 <= built <= 5_000_000
        assert len(config.num_blocks) == row["num_stages"] in SPACE["num_stages"]
        for name in ("num_blocks", "conv_kernel", "skip_kernel"):
            assert set(getattr(config, name)) <= set(SPACE[name])
            assert row[name] == " ".join(map(str, getattr(config, name)))
        for name in ("c1", "width", "dropout", "batch_size", "optimizer", "schedule"):
            assert row[name] == getattr(config, name)
            assert row[name] in WIDER[name]
        assert 1e-4 <= config.lr <= 1
        assert (row["epochs"], row["val_accuracy"]) == (0, None)
        rejected += row["rejected"]
    assert rejected > 0


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_a_trial_is_a_function_of_seed_and_number(algorithm):
    first, again, other = (found(algorithm=algorithm, seed=seed) for seed in (0, 0, 1))
    rows = [first.draw(number) for number in (1, 2, 3)]
    assert [again.draw(number) for number in (3, 2, 1)] == rows[::-1]
    assert len({row["lr"] for row in rows}) == 3
    assert other.draw(1)["lr"] != rows[0]["lr"]


def test_how_many_were_refused_is_a_function_of_the_number_too():
    trials = found(preset="tpsnet", min_params=2_000_000)
    seed = utils.derive_seed("search", 0, 5)
    row = trials.draw(5)
    samples = random_samples(WIDER, seed)
    before = [next(samples) for _ in range(row["rejected"])]
    assert next(samples) == row["sample"]
    assert before
    for sample in before:
        built = count_parameters(ResNet(configuration(sample, trials.base)))
        assert not 2_000_000 <= built <= 5_000_000


def test_limits_of_a_size_hold():
    limits = {"min_params": 10_000, "max_params": 20_000, "max_macs": 2_000_000}
    space = SPACE | {"num_blocks": (1, 2), "c1": range(2, 9)}
    trials = found(space, "tpsnet", **limits)
    rows = [trials.draw(number) for number in range(1, 6)]
    assert all(10_000 <= row["num_params"] <= 20_000 for row in rows)
    assert all(row["macs"] <= 2_000_000 for row in rows)
    unlimited = found(space, "tpsnet", **limits | {"max_macs": 0})
    assert any(unlimited.draw(number)["macs"] > 2_000_000 for number in range(1, 6))


def test_no_network_of_the_wanted_size_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr("trials.MAX_REJECTED", 5)
    trials = found(SPACE | {"num_blocks": (1, 2), "c1": range(2, 9)}, max_macs=99)
    words = r"none of 5 samples .* 0 to 5,000,000 parameters and up to 99 MACs \(.*too many\); give"
    with pytest.raises(utils.InputError, match=words):
        trials.draw(1)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "demo"])
def test_every_preset_can_be_searched_from(preset):
    trials = found(SPACE, preset, epochs=30)
    for number in range(1, 11):
        sample, _ = draw_trial(trials.search, trials.base, SPACE, number, [])
        check_config(configuration(sample, trials.base))
    assert trials.base.warmup_epochs == (4 if preset == "best" else 0)  # 27 of 180 epochs, of 30


def test_learning_rates_are_log_uniform():
    samples = random_samples(WIDER, 0)
    lrs = np.array([next(samples)["lr"] for _ in range(400)])
    shares = np.histogram(np.log10(lrs), bins=[-4, -3, -2, -1, 0])[0] / 400
    assert shares == pytest.approx([0.25] * 4, abs=0.08)


@pytest.mark.parametrize("samples", [random_samples, lambda *args: tpe_samples(*args, [])])
def test_every_value_of_a_range_is_drawn(samples):
    space = SPACE | {"c1": range(8, 21, 4), "num_stages": (2,)}
    drawn = samples(space, 0)
    assert {next(drawn)["c1"] for _ in range(80)} == {8, 12, 16, 20}


@pytest.mark.parametrize("same", [True, False])
def test_blocks_and_pooling_of_a_sample(same):
    sample = next(random_samples(SPACE, 0))
    sample |= {"num_stages": 3, "same_blocks": same, "pooled_size": 2}
    sample |= {"num_blocks_1": 4, "num_blocks_2": 5, "num_blocks_3": 6, "num_blocks_4": 7}
    config = configuration(sample, PRESETS["tpsnet"])
    assert config.num_blocks == ((4, 4, 4) if same else (4, 5, 6))
    assert config.pool_kernel == 4  # an 8x8 map to 2x2
    assert (config.rotation_degrees, config.weight_decay) == (5.0, 5e-4)  # what is not drawn


def test_optuna_learns_from_what_ended_and_random_search_does_not():
    def last_errors(algorithm):
        """How far the last 20 of 60 learning rates are from the best, in powers of ten."""
        search, errors, tried = Search(algorithm=algorithm, seed=1), [], []
        for number in range(1, 61):
            sample, _ = draw_trial(search, PRESETS["demo"], TINY, number, tried)
            errors.append(abs(np.log10(sample["lr"]) + 1.5))
            tried.append((sample, -errors[-1]))
        return np.mean(errors[-20:])

    assert last_errors("optuna") < 0.7 * last_errors("random")


def test_optuna_is_given_the_trials_that_ended():
    trials = found(TINY, num_samples=20, algorithm="optuna")
    alone = trials.draw(20)
    for number in range(1, 16):
        row = trials.draw(number) | {"epochs": 2, "val_accuracy": 3.0 * number}
        row["status"] = "running" if number > 13 else "finished"
        trials.write(row | ({"status": "diverged", "val_accuracy": None} if number == 2 else {}))
    tried = trials.tried()
    assert [accuracy for _, accuracy in tried] == [3, 10, *range(9, 40, 3)]
    assert trials.draw(20)["sample"] != alone["sample"]
    assert trials.draw(20) == trials.draw(20)


# ---------------------------------------------------------------- a trial and its folder


@pytest.fixture
def reports(monkeypatch):
    """What trials report, in this process instead of one of Ray's."""
    found = []
    monkeypatch.setattr(search_script.tune, "report", lambda result: found.append(dict(result)))
    return found


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", val_size=200, test=False)


def run_trial(trials, number, digits):
    """Run a trial here, as a process of Ray's would."""
    search_script.run_trial({"number": number}, trials, str(Path.cwd()), digits)


def epochs_of(reports):
    """The epochs that were reported, and which of them only once more."""
    return [(r["epoch"], r.get("repeated", False)) for r in reports]


def test_a_trial_reports_its_epochs_and_ends(reports, digits):
    trials = found(TINY, epochs=3)
    run_trial(trials, 2, digits)
    assert epochs_of(reports) == [(0, False), (1, False), (2, False), (3, False)]
    row = trials.read(2)
    assert row["status"] == "finished"
    assert row == reports[-1]["row"]
    log = utils.read_csv("checkpoints/tiny/002/log.csv")
    assert [epoch["val_accuracy"] for epoch in log][:2] == [r["val_accuracy"] for r in reports[1:3]]
    assert (row["early_accuracy"], row["val_accuracy"]) == (
        log[0]["val_accuracy"], log[2]["val_accuracy"],
    )  # fmt: skip
    assert load_config("checkpoints/tiny/002/config.json") == trials.config(row)
    assert {path.suffix for path in Path("checkpoints/tiny/002").iterdir()} == {
        ".csv", ".json", ".lock", ".png",
    }  # fmt: skip
    # Once more, it only tells ASHA what that compares.
    trials.rows[2] = row
    reports.clear()
    run_trial(trials, 2, digits)
    assert epochs_of(reports) == [(1, True), (3, False)]
    assert reports[0]["val_accuracy"] == log[0]["val_accuracy"]


def test_a_trial_that_was_cut_off_goes_on(reports, digits, monkeypatch):
    trials = found(TINY, epochs=3)
    run_trial(trials, 1, digits)
    whole = reports[-1]["row"]
    other = Trials(replace(trials.search, name="other"), "demo", TINY)

    def cut_off(result):
        if result["epoch"] == 2:
            raise SystemExit  # as Ray Tune ends a trial

    monkeypatch.setattr(search_script.tune, "report", cut_off)
    monkeypatch.setattr("checkpoint.EPOCH_SECONDS", 0)
    with pytest.raises(SystemExit):
        run_trial(other, 1, digits)
    assert other.read(1)["status"] == "running"
    assert Path("checkpoints/other/001/last.pt").exists()
    other.load()
    assert other.rows[1]["status"] == "cut off"
    other.mend(1)
    reports.clear()
    monkeypatch.setattr(search_script.tune, "report", lambda result: reports.append(dict(result)))
    run_trial(other, 1, digits)
    assert epochs_of(reports) == [(0, False), (1, True), (2, False), (3, False)]
    assert without_seconds(other.read(1)) == without_seconds(whole)


def without_seconds(row):
    return {name: value for name, value in row.items() if name != "seconds"}


def test_a_trial_that_diverges_or_fails_is_reported(reports, digits, monkeypatch):
    trials = found(TINY)

    def fail(error):
        def train(*_):
            raise error

        monkeypatch.setattr(search_script, "train", train)
        run_trial(trials, 1, digits)
        return reports[-1]["row"]

    row = fail(MemoryError("no memory\nat all"))
    assert (row["status"], row["error"]) == ("failed", "MemoryError: no memory")
    assert trials.read(1)["status"] == "running"  # is tried again
    assert "MemoryError: no memory" in Path("checkpoints/tiny/001/error.txt").read_text()
    row = fail(utils.DivergenceError("the loss is nan"))
    assert (row["status"], row["error"], row["val_accuracy"]) == (
        "diverged",
        "the loss is nan",
        None,
    )
    assert trials.read(1) == row


def test_asha_compares_with_what_is_repeated_but_stops_no_trial_for_it():
    asha = search_script.ASHA(
        "epoch", "val_accuracy", mode="max", max_t=20, grace_period=2, reduction_factor=4
    )

    def decision(name, accuracy, **options):
        trial = SimpleNamespace(trial_id=name)
        asha.on_trial_add(None, trial)
        return asha.on_trial_result(None, trial, {"epoch": 2, "val_accuracy": accuracy, **options})

    assert decision("a", 50.0, repeated=True) == asha.CONTINUE
    assert decision("b", 40.0, repeated=True) == asha.CONTINUE
    assert decision("c", 45.0) == asha.STOP
    assert decision("d", 55.0) == asha.CONTINUE


# ---------------------------------------------------------------- damage


@pytest.fixture
def ended():
    """Four trials: finished, stopped, diverged, and one that was cut off."""
    trials = found(TINY, num_samples=5)
    for number, status in enumerate(("finished", "stopped", "diverged", "running"), start=1):
        row = trials.draw(number) | {"status": status, "epochs": 2, "seconds": 1.5}
        accuracy = None if status == "diverged" else 10.0 * number
        row |= {"val_accuracy": accuracy, "early_accuracy": accuracy}
        trials.write(row)
        trials.rows[number] = row
        utils.write_csv(
            trials.folder(number) / "log.csv",
            [{"epoch": epoch, "val_accuracy": accuracy} for epoch in (1, 2)],
        )
    utils.write_csv(trials.path / "trials.csv", trials.table())
    return trials


def loaded():
    """What a search that is resumed knows, but for the samples."""
    trials = found(TINY, num_samples=5)
    trials.load()
    return {number: {**row, "sample": None} for number, row in trials.rows.items()}


def test_rows_outlive_any_damaged_file(ended, capsys):
    expected = {n: {**row, "sample": None} for n, row in ended.rows.items()}
    expected[4]["status"] = "cut off"
    files = sorted(path for path in ended.path.rglob("*") if path.is_file())
    assert len(files) == 9
    for path in files:
        content = path.read_bytes()
        half = content[: len(content) // 2]
        for damaged in (None, b"", b"\xff\xfe\x00", half, b"{}", b"a,b\n1,2\n"):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            known = loaded()
            if path.name == "trial.json" and path.parent.name == "004":
                known.setdefault(4, None)  # it had not ended
                expected_here = expected | {4: known[4]}
            else:
                expected_here = expected
            assert known == expected_here, (path, damaged)
            assert capsys.readouterr().err.count("\n") <= 1
            path.write_bytes(content)


def test_rows_outlive_the_folders(ended):
    for path in ended.path.glob("00?"):
        shutil.rmtree(path)
    assert [row["status"] for row in loaded().values()] == [
        "finished", "stopped", "diverged", "cut off",
    ]  # fmt: skip


def test_one_damaged_line_costs_that_line_where_the_folder_is_gone_too(ended, capsys):
    path = ended.path / "trials.csv"
    whole = path.read_bytes()
    for old, new in (
        (b"\n2,stopped", b"\n2,st0pped"),
        (b"\n2,stopped", b"\n2,\xffopped"),
        (b"\n2,stopped", b"\n2"),
        (b"\n2,stopped,20.0", b"\n2,stopped,"),
        (b"\n2,stopped,20.0", b"\n2,stopped,2e9"),
    ):
        assert old in whole
        path.write_bytes(damaged := whole.replace(old, new))
        assert loaded()[2]["val_accuracy"] == 20.0
        assert "trials.csv is damaged, kept as trials.csv.damaged" in capsys.readouterr().err
        ended.folder(2).rename("gone")
        assert sorted(loaded()) == [1, 3, 4]
        Path("gone").rename(ended.folder(2))
        trials = found(TINY, num_samples=5)
        trials.load()
        trials.write_table()
        assert path.with_name("trials.csv.damaged").read_bytes() == damaged
        assert utils.read_csv(path)[1]["status"] == "stopped"
    for folder in ended.path.glob("00?"):
        shutil.rmtree(folder)
    path.write_bytes(whole.replace(b"\n3,", b"\n2,"))  # which of them is trial 2?
    assert sorted(loaded()) == [1, 4]


def test_no_row_is_lost_or_changed_by_random_damage():
    assert damage_rounds(40) == {"nothing lost": 40}


def test_a_trial_that_ended_keeps_its_row_whatever_becomes_of_its_process(ended):
    monitor = search_script.Monitor(ended, StopSignals())
    monitor.on_trial_error(SimpleNamespace(config={"number": 2}, error_file="gone"))
    assert ended.rows[2]["status"] == "stopped"


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b"[" * 100_000])
def test_byte_order_marks_and_deep_json(ended, start, capsys):
    expected = loaded()
    for path in ended.path.glob("*/trial.json"):
        path.write_bytes(start + path.read_bytes())
    assert loaded() == expected
    if start.startswith(b"\xef"):
        assert ended.read(4) == ended.rows[4]
    else:
        with pytest.raises(utils.InputError, match="too deep"):
            ended.read(4)
        ended.mend(4)
        assert "trial 4 starts anew" in capsys.readouterr().err


@pytest.mark.slow
def test_damage_costs_one_trial_its_unfinished_work(reports, digits, monkeypatch, capsys):
    monkeypatch.setattr("checkpoint.EPOCH_SECONDS", 0)

    def state_of(trials):
        def stop(*args):
            raise SystemExit

        with monkeypatch.context() as patch:
            patch.setattr(search_script.tune, "report", lambda r: r["epoch"] and stop())
            with pytest.raises(SystemExit):
                run_trial(trials, 1, digits)
        folder = trials.folder(1)
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    trials = found(TINY)
    files = state_of(trials)
    assert {"last.pt", "previous.pt", "config.json", "trial.json", "log.csv"} <= set(files)
    other = json.loads(files["trial.json"])
    other["sample"]["lr"] /= 2
    damages = {
        "last.pt": (None, b"", files["last.pt"][:-1]),
        "trial.json": (None, b"{}", json.dumps(other).encode()),
        "config.json": (None, b"{"),
        "log.csv": (None, b"\xff"),
    }
    for name, contents in damages.items():
        for content in contents:
            trials.folder(1).mkdir(exist_ok=True)
            for there, whole in files.items():
                (trials.folder(1) / there).write_bytes(whole)
            path = trials.folder(1) / name
            path.unlink() if content is None else path.write_bytes(content)
            if name == "last.pt":
                path.with_name("previous.pt").unlink()
            capsys.readouterr()
            trials.mend(1)
            anew = "trial 1 starts anew" in (error := capsys.readouterr().err)
            assert anew == (name in ("last.pt", "trial.json"))
            assert error.count("\n") == anew
        run_trial(trials, 1, digits)
        assert trials.read(1)["status"] == "finished"


def test_a_kill_between_the_first_state_and_config_json_costs_nothing(
    reports, digits, monkeypatch, capsys
):
    trials = found(TINY)
    run_trial(trials, 1, digits)
    whole = trials.read(1)
    shutil.rmtree(trials.path)

    write_json = utils.write_json

    def killed(path, value):
        if path.name == "config.json":
            raise SystemExit
        write_json(path, value)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(utils, "write_json", killed)
        run_trial(trials, 1, digits)
    names = {path.name for path in trials.folder(1).iterdir()}
    assert "last.pt" in names
    assert "config.json" not in names
    capsys.readouterr()
    trials.mend(1)
    assert capsys.readouterr().err == ""
    run_trial(trials, 1, digits)
    assert without_seconds(trials.read(1)) == without_seconds(whole)


def test_no_pickle_in_a_folder_of_results_is_read(reports, digits):
    trials = found(TINY, num_samples=1)
    bomb = pickle.dumps(Bomb())
    pickle.loads(bomb).close()  # it does go off
    Path("bomb_went_off").unlink()
    folder = trials.path / "ray"
    folder.mkdir(parents=True)
    for name in ("tuner.pkl", "search_gen_state-1.json", "searcher-state-1.pkl"):
        (folder / name).write_bytes(bomb)
    trials.write(trials.draw(1) | {"status": "running"})
    torch.save({"config": Bomb()}, buffer := io.BytesIO())
    state = buffer.getvalue()
    for name in ("last.pt", "previous.pt"):  # as if train.py had written it
        (trials.folder(1) / name).write_bytes(state + hashlib.sha256(state).digest())
    for name in ("model.safetensors", "config.json", "log.csv", "error.pkl"):
        (trials.folder(1) / name).write_bytes(bomb)
    (trials.path / "trials.csv").write_bytes(bomb)
    trials.load()
    trials.mend(1)
    run_trial(trials, 1, digits)
    assert trials.read(1)["status"] == "finished"
    assert not list(Path().rglob("bomb_went_off"))


def test_what_failed_is_not_the_best(ended):
    ended.rows[1] |= {"status": "failed", "val_accuracy": 99.0}
    assert ended.best()["trial"] == 4
    ended.rows[4]["val_accuracy"] = None
    assert ended.best()["trial"] == 2


def test_best_json_is_not_promised_where_the_best_trial_is_damaged(ended, capsys):
    search_script.finish(ended, 0)
    assert "next: python train.py --config checkpoints/tiny/best.json" in capsys.readouterr().out
    (ended.folder(4) / "trial.json").unlink()
    (ended.path / "best.json").unlink()
    trials = found(TINY, num_samples=5)
    trials.load()
    search_script.finish(trials, 0)
    printed = capsys.readouterr().out
    assert "no best.json: checkpoints/tiny/004/trial.json is damaged" in printed
    assert "next:" not in printed
