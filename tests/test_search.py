"""search.py: what it refuses, and real searches on Ray that are killed, stopped and resumed."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import filelock
import pytest
from conftest import ROOT, run_main

import utils
from config import load_config
from model import ResNet, count_parameters

if not importlib.util.find_spec("ray"):  # not imported: search.py tells it first where to listen
    pytest.skip("Ray is not installed", allow_module_level=True)
import search as search_script
import trials
from trials import SPACE, LogUniform, Search

# ---------------------------------------------------------------- bad input


BAD_LINES = [
    ("resnet50", ["preset", "'resnet50'", "demo"]),
    ("demo --num-samples 0", ["num_samples", "0", "at least 1"]),
    ("demo --epochs 0", ["epochs", "0", "at least 1"]),
    ("demo --epochs 3 --grace-epochs 4", ["grace_epochs", "4", "from 0 to 3"]),
    ("demo --val-size -1", ["val_size", "-1", "at least 0"]),
    ("demo --val-size 5000", ["val_size", "5000", "or 10 to 1,428"]),
    ("demo --train-size 50 --val-size 200", ["batch_size", "64", "50 training images"]),
    ("demo --min-params 9 --max-params 8", ["min_params", "9", "8"]),
    ("demo --cpus-per-trial 0", ["cpus_per_trial", "0", "from 0.01"]),
    ("demo --gpus-per-trial -1", ["gpus_per_trial", "-1", "from 0"]),
    ("demo --max-minutes nan", ["max_minutes", "nan", "from 0"]),
    ("demo --min-params 4999999", ["min_params", "2,000 samples", "4,999,999", "SPACE"]),
    ("demo --name a/b", ["name", "'a/b'", "leave out the /"]),
    ("demo --name ..", ["name", "'..'", "letters, digits"]),
    ("demo --algorithm grid", ["--algorithm", "'grid'", "optuna"]),
    ("demo --address localhost", ["address", "'localhost'", "HOST:PORT"]),
    ("demo --address 127.0.0.1:9", ["address", "127.0.0.1:9", "ray start --head"]),
    ("demo --resume nothing", ["resume", "checkpoints/nothing", "--name"]),
    ("--no-download", ["data_dir", "cifar-10-python.tar.gz"]),
    ("--no-download --max-params 2000000", ["data_dir", "cifar-10-python.tar.gz"]),
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
    monkeypatch.setattr(trials, "MAX_REJECTED", 2000 if "2,000" not in words[1] else 20)
    words = [word.replace("2,000 samples", "20 samples") for word in words]
    check_refusal(line, words, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (SPACE | {"c1": ()}, ["c1", "empty", "()"]),
        (SPACE | {"num_blocks": range(3, 3)}, ["num_blocks", "empty", "range(3, 3)"]),
        (SPACE | {"lr": LogUniform(0.1, 0.01)}, ["lr", "empty", "0.01"]),
        (SPACE | {"width": 2}, ["width", "empty", "2", "tuple"]),
        (SPACE | {"depth": (1, 2)}, ["depth", "not a constant of config.py"]),
        ({}, ["lacks num_stages", "trials.py"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_space(space, words):
    with pytest.raises(utils.InputError) as error:
        search_script.run_search(Search(), "demo", space)
    for word in ("SPACE", *words):
        assert word in str(error.value)
    assert not list(Path().iterdir())


def test_search_is_not_overwritten_nor_resumed_as_another(monkeypatch, capsys):
    folder = Path("checkpoints/found")
    folder.mkdir(parents=True)
    line = "demo --name found"
    check_refusal(line, ["name", "checkpoints/found", "--resume found"], monkeypatch, capsys)
    check_refusal("--resume found", ["resume", "no search in"], monkeypatch, capsys)
    stored = {"preset": "demo", "space": repr(SPACE), **asdict(Search(name="found", num_samples=9))}
    utils.write_json(folder / "search.json", stored)
    words = ["num_samples", "8", "was started with 9"]
    check_refusal("--resume found --num-samples 8", words, monkeypatch, capsys)
    words = ["preset", "fast", "was started with demo"]
    check_refusal("fast --resume found", words, monkeypatch, capsys)
    stored["space"] = repr(SPACE | {"c1": range(9, 10)})
    utils.write_json(folder / "search.json", stored)
    check_refusal("--resume found", ["SPACE", "range(9, 10)", "put it back"], monkeypatch, capsys)


def test_damaged_search_json_is_refused_in_one_line(monkeypatch, capsys):
    path = Path("checkpoints/found/search.json")
    stored = {"preset": "demo", "space": repr(SPACE), **asdict(Search(name="found", num_samples=9))}
    trials.write_record(path, stored)
    whole = path.read_bytes()
    assert search_script.load_search(Search(resume="found"))[1].num_samples == 9
    utils.write_json(Path("checkpoints/copy/search.json"), stored)  # an older one, copied
    assert search_script.load_search(Search(resume="copy"))[1].name == "copy"
    path.write_bytes(b"\xef\xbb\xbf" + whole)
    assert search_script.load_search(Search(resume="found"))[1].num_samples == 9
    for content, word in (
        (whole.replace(b": 9,", b": 8,"), "damaged or edited"),
        (b"[" * 100_000, "nests too deep"),
        (b"[]", "preset"),
        (json.dumps(stored | {"preset": "demp"}).encode(), "demp"),
        (b"", ""),
    ):
        assert content != whole
        path.write_bytes(content)
        check_refusal("--resume found", ["resume", "no search in", word], monkeypatch, capsys)


def test_without_optuna_one_line_tells_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    words = ["algorithm", "optuna", "pip install -r requirements.txt"]
    check_refusal("demo --algorithm optuna", words, monkeypatch, capsys)


@pytest.mark.slow
def test_without_ray_or_one_of_its_extras_one_line_tells_it():
    names = ("ray", "pandas", "pyarrow", "requests", "fsspec")
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import plots, train, trials
for name in {names}:
    if not os.fork():
        sys.modules[name] = None
        import search
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 2
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    for name, line in zip(names, result.stderr.splitlines(), strict=True):
        assert line.startswith("error: ray: ")
        assert name in line
        assert line.count("pip install") == 1


def test_ray_that_cannot_start_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("RAY_TMPDIR", "/dev/null/x")
    words = ["RAY_TMPDIR", "Ray cannot start", "/dev/null/x"]
    check_refusal("demo --num-samples 1", words, monkeypatch, capsys)


def test_help_fits_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert run_main(search_script.main, "-h", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "--grace-epochs" in printed
    assert max(map(len, printed.splitlines())) <= 80


# ---------------------------------------------------------------- real searches


def test_without_rays_private_class_it_still_searches(monkeypatch):
    search_script.heed_memory_monitor.cache_clear()
    name = "ray.air.execution._internal.actor_manager"
    monkeypatch.setitem(sys.modules, name, None)
    search_script.heed_memory_monitor()
    search_script.heed_memory_monitor.cache_clear()
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(RayActorManager=object))
    search_script.heed_memory_monitor()
    search_script.heed_memory_monitor.cache_clear()


@contextlib.contextmanager
def ray_nodes(monkeypatch):
    """Two nodes of Ray on this machine, of one processor each; the address of their cluster."""
    monkeypatch.delenv(search_script.LISTENS, raising=False)  # `import search` has set it
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


def wait_for(condition, seconds=150):
    """Wait until `condition` is true; returns what it is."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def rows(*statuses):
    """The rows of trials.csv that have one of these statuses, by their trial."""
    with contextlib.suppress(OSError):
        found = utils.read_csv("checkpoints/tiny/trials.csv")
        return {r["trial"]: r for r in found if not statuses or r["status"] in statuses}
    return {}


def start(line, terminal=None, **env):
    """tests/tiny_search.py, in a process (and a group) of its own."""
    script = [sys.executable, str(ROOT / "tests" / "tiny_search.py"), *line.split()]
    with Path("out.txt").open("w") as out:
        streams = {"stdin": terminal, "stdout": terminal or out, "stderr": subprocess.STDOUT}
        return subprocess.Popen(script, **streams, env=os.environ | env, start_new_session=True)


@pytest.mark.slow
def test_search_on_two_nodes_outlives_a_kill_and_a_signal(monkeypatch):
    monkeypatch.setenv("FAULTS", "two")
    with ray_nodes(monkeypatch) as address:
        line = f"demo --name tiny --num-samples 8 --epochs 4 --address {address}"
        driver = start(line)
        # Each node has one processor: two trials at once are on two nodes.
        wait_for(lambda: len(rows("running")) == 2)
        wait_for(lambda: len(rows("finished", "stopped")) >= 2 or driver.poll() is not None)
        driver.kill()
        driver.wait()
        before, failed = rows("finished", "stopped", "diverged"), rows("failed")
        assert failed[1]["error"] == "MemoryError: no memory is left"
        assert failed[2]["error"].startswith("The actor died unexpectedly")

        driver = start(f"--resume tiny --address {address}")
        wait_for(lambda: len(rows("finished", "stopped")) >= 4 or driver.poll() is not None)
        driver.send_signal(signal.SIGINT)
        assert driver.wait(150) == 130
        assert "stopped by SIGINT, saved in checkpoints/tiny; --resume tiny goes on" in (
            Path("out.txt").read_text()
        )
        assert len(rows("finished", "stopped")) < 8
        assert rows("running") == {}

        driver = start(f"--resume tiny --address {address}")
        assert driver.wait(200) == 0
        output = Path("out.txt").read_text()
        too_many = start(f"demo --name other --cpus-per-trial 2 --address {address}")
        assert too_many.wait(150) == 2
    assert Path("out.txt").read_text() == (
        "error: cpus_per_trial: 2, but no machine has more than 1; use up to 1\n"
    )
    after = rows()
    assert sorted(after) == [*range(1, 9)]
    assert not list(Path("checkpoints/tiny").glob(f"{utils.TEMPORARY}*"))  # Ray Tune's own files
    for trial, row in after.items():
        assert row["status"] == ("finished" if row["epochs"] == 4 else "stopped")
        log = utils.read_csv(f"checkpoints/tiny/{trial:03d}/log.csv")
        assert [r["epoch"] for r in log] == [*range(1, row["epochs"] + 1)]
        assert row["val_accuracy"] == log[-1]["val_accuracy"]
        assert row["early_accuracy"] == log[0]["val_accuracy"]
        config = load_config(f"checkpoints/tiny/{trial:03d}/config.json")
        assert count_parameters(ResNet(config)) == row["num_params"]
        assert not list(Path(f"checkpoints/tiny/{trial:03d}").glob("*.pt"))
        if trial in before:
            assert row == before[trial]  # what had ended was not repeated
    best = max(after.values(), key=lambda row: row["val_accuracy"])
    assert f"best: trial {best['trial']}, {best['val_accuracy']:.2f}% of 200" in output
    assert "no figures: they take 10 trials" in output
    config = load_config("checkpoints/tiny/best.json")
    assert (config.lr, config.val_size, config.name) == (best["lr"], 0, "tiny-best")
    trained = load_config(f"checkpoints/tiny/{best['trial']:03d}/config.json")
    assert config == replace(trained, name="tiny-best", val_size=0, wandb="auto")
    stored = json.loads(Path("checkpoints/tiny/search.json").read_text())
    assert (stored["num_samples"], stored["grace_epochs"], stored["val_size"]) == (8, 1, 200)
    # With nothing left to do it is resumed without Ray, which `--address` would have to find.
    assert start(f"--resume tiny --address {address}").wait(150) == 0
    assert rows() == after


def without_seconds(row):
    return {name: value for name, value in row.items() if name != "seconds"}


@pytest.mark.slow
def test_a_search_killed_twice_finds_what_an_unbroken_one_finds():
    line = "demo --name tiny --num-samples 6 --epochs 4 --grace-epochs 4"
    assert start(line).wait(200) == 0
    whole = [without_seconds(row) for row in rows().values()]
    assert [row["status"] for row in whole] == 6 * ["finished"]
    Path("checkpoints").rename("whole")
    for ended, command in ((1, line), (3, "--resume tiny")):
        driver = start(command)
        wait_for(lambda n=ended, d=driver: len(rows("finished")) >= n or d.poll() is not None, 100)
        driver.kill()
        driver.wait()
        assert len(rows("finished")) < 6
    assert start("--resume tiny").wait(200) == 0
    assert [without_seconds(row) for row in rows().values()] == whole


@pytest.mark.slow
def test_ray_listens_on_the_loopback_address_to_who_has_the_token():
    line = "demo --name tiny --num-samples 2 --epochs 1000 --grace-epochs 1000"
    driver = start(line, RAY_AUTH_TOKEN="e" * 64)
    wait_for(lambda: rows("running"))
    pids = descendants(driver.pid)
    listening = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout
    users = {line: set(map(int, re.findall(r"pid=(\d+)", line))) for line in listening.splitlines()}
    ours = [line for line in users if users[line] & pids]
    assert len(ours) > 3
    assert all("127.0.0.1]:" in line or " 127.0.0.1:" in line for line in ours)
    gcs = next(line for line in ours if "gcs_server" in line)
    port = re.search(r"127\.0\.0\.1\]?:(\d+)", gcs)[1]
    code = f"import ray; ray.init('127.0.0.1:{port}', logging_level='CRITICAL'); print('in')"
    clients = {}
    for token in ("e", "0", ""):
        login = {"RAY_AUTH_TOKEN": token * 64, "RAY_AUTH_MODE": "token" if token else "disabled"}
        login[search_script.LISTENS] = "0"  # looks for Ray on the loopback address
        clients[token] = subprocess.Popen(
            [sys.executable, "-c", code], env=os.environ | login, stdout=subprocess.PIPE
        )
    assert clients["e"].communicate(timeout=60)[0] == b"in\n"
    for token in ("0", ""):
        with contextlib.suppress(subprocess.TimeoutExpired):
            clients[token].wait(10)
        clients[token].kill()
        assert clients[token].communicate()[0] == b""
    os.killpg(driver.pid, signal.SIGTERM)  # Ray's processes are in its group
    assert driver.wait(150) == 128 + signal.SIGTERM
    assert (
        "SIGTERM, saved in checkpoints/tiny; --resume tiny goes on" in Path("out.txt").read_text()
    )
    assert {row["status"] for row in rows().values()} == {"cut off"}
    assert not pids & set(parents())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_second_ctrl_c_and_a_terminal_that_goes_leave_no_bar_and_no_process(name):
    ours, terminal = os.openpty()
    driver = start("demo --name tiny --num-samples 2 --epochs 1000 --grace-epochs 1000", terminal)
    os.close(terminal)
    wait_for(lambda: rows("running"))
    pids = descendants(driver.pid)
    os.killpg(driver.pid, getattr(signal, name))
    if name == "SIGINT":
        time.sleep(0.2)
        os.killpg(driver.pid, signal.SIGINT)
    shown = b""
    with contextlib.suppress(OSError):  # the end
        while part := os.read(ours, 9999):
            shown += part
    os.close(ours)
    assert driver.wait(150) == 128 + getattr(signal, name)
    assert not pids & set(parents())
    if name == "SIGINT":
        assert b"SIGINT: stopping" in shown
        last = re.split(rb"[\r\n]+", shown.partition(b"SIGINT: stopping")[2])
        assert b"interrupted; --resume tiny goes on" in last
        assert not any(b"trials 0/2" in line for line in last[-3:])


@pytest.mark.slow
def test_the_token_is_another_one_every_time(monkeypatch):
    for name in search_script.LOCAL:
        monkeypatch.delenv(name, raising=False)
    code = "import os, search; print(os.environ['RAY_AUTH_MODE'], os.environ['RAY_AUTH_TOKEN'])"
    line = [sys.executable, "-c", code]
    first, second = (subprocess.check_output(line, cwd=ROOT, text=True).split() for _ in "12")
    assert first[0] == second[0] == "token"
    assert first[1] != second[1]
    assert len(first[1]) == 64


def descendants(pid):
    """A process, its children and theirs."""
    found = {pid}
    for _ in range(4):
        found |= {pid for pid, parent in parents().items() if parent in found}
    return found


def parents():
    """The parent of every process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            found[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "content"),
    [("torch.py", "raise ImportError('no torch here')"), ("sitecustomize.py", "os._exit(1)")],
)
def test_a_search_whose_processes_cannot_start_says_so(file, content):
    # Both are found through PYTHONPATH alone, which Ray's processes are to have too.
    Path("broken").mkdir()
    guard = "import os, sys\nif any('default_worker' in a for a in sys.orig_argv):\n    "
    if file == "torch.py":  # elsewhere it is the real one
        content += "\nsys.path.remove(os.path.dirname(__file__))\ndel sys.modules['torch']"
        content += "\nimport torch"
    Path("broken", file).write_text(guard + content)
    code = "import script, search; search.START = 10; script.run_script(search.main)"
    env = os.environ | {"PYTHONPATH": f"{Path('broken').resolve()}{os.pathsep}{ROOT}"}
    line = [sys.executable, "-c", code, "demo", "--name", "tiny", "--num-samples", "2"]
    result = subprocess.run(line, env=env, capture_output=True, text=True, timeout=150)
    assert result.returncode == 2
    assert result.stderr.startswith("error: address: no process of Ray's can train")
    assert result.stderr.count("\n") == 1
    assert not Path("checkpoints").exists()


@pytest.mark.slow
def test_a_search_ends_when_its_trials_fail_for_one_reason_or_its_time_is_over(monkeypatch):
    for name in search_script.LOCAL:  # `import search` has set them
        monkeypatch.delenv(name, raising=False)
    Path("home").mkdir()
    line = "demo --name tiny --num-samples 9 --epochs 1"
    Path("home/utils.py").write_text("raise ImportError('not these')")  # ours comes before it
    home = str(Path("home").resolve())
    driver = start(line, FAULTS="full", HOME=home, PYTHONPATH=home)
    assert driver.wait(150) == 1
    assert not Path("home/.ray").exists()
    last = Path("out.txt").read_text().splitlines()[-1]
    assert re.fullmatch(
        r"error: 3 trials in a row failed, the last one with InputError: checkpoints/tiny/00\d/"
        r"last.pt: cannot be written \(File too large\); what was there before is intact; fix this,"
        r" then --resume tiny goes on",
        last,
    )
    assert len(rows("failed")) < 9
    assert "best:" not in Path("out.txt").read_text()
    assert not Path("checkpoints/tiny/best.json").exists()
    # Of a time that is over before the first trial begins, and during one.
    for name, minutes in (("early", 0.0001), ("late", 0.2)):
        line = f"demo --name {name} --num-samples 9 --epochs 1000 --grace-epochs 1000"
        assert start(f"{line} --max-minutes {minutes}").wait(200) == 0
        assert f"9 trials are left: --resume {name} goes on" in Path("out.txt").read_text()
    assert not Path("checkpoints/early/trials.csv").exists()
    statuses = {row["status"] for row in utils.read_csv("checkpoints/late/trials.csv")}
    assert statuses == {"cut off"}


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
    line = f"demo --name tiny --num-samples 3 --epochs 1 --cpus-per-trial {os.cpu_count()}"
    assert start(line, FAULTS="greedy").wait(200) == 0
    assert [row["status"] for row in rows().values()] == ["failed", "finished", "finished"]
    assert rows()[1]["error"].startswith("1 worker(s) were killed")
    assert start("--resume tiny").wait(200) == 0
    assert [row["status"] for row in rows().values()] == ["finished"] * 3
