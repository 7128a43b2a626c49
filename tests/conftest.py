"""What the tests share. Every test runs in an empty folder of its own, on tiny data."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

os.environ.pop("TPSNET_CHECKPOINTS", None)  # the tests name their folders

# Tests on all cores at once: none of them, nor a script it runs, may take all for itself.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import filelock
import numpy as np
import pytest
from PIL import Image

import data
from config import PRESETS
from engine.script import run_script

ROOT = Path(__file__).resolve().parent.parent
HAS_CIFAR10 = any(
    (ROOT / "data" / name).is_dir()
    for name in (data.RELEASES["cifar10"].binary_folder, data.RELEASES["cifar10"].python_folder)
)
TINY = replace(
    PRESETS["demo"],
    name="tiny",
    c1=4,
    batch_size=16,
    epochs=3,
    max_steps_per_epoch=3,
    wandb="disabled",
)

# A script leaves a signal ignored that it inherits so; under nohup or in a shell's background the
# tests would hand theirs down.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    """Skip the tests whose data is not there, and with them those that take their time."""
    reasons = {} if HAS_CIFAR10 else {"cifar10": "CIFAR-10 is not in data/"}
    if not HAS_CIFAR10 and "slow" not in config.option.markexpr:
        reasons["slow"] = "slow; `-m slow` runs it, and so does CIFAR-10 in data/"
    for item in items:
        for name in reasons.keys() & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason=reasons[name]))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """The scripts read and write under the current folder; give each test a fresh one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def blank_figures(monkeypatch):
    """Figures are made but not rendered: that would take longer than a tiny training."""

    def save_blank(figure, path, **options):
        Image.new("L", (1, 1)).save(path, "PNG")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save_blank)


@pytest.fixture(autouse=True)
def own_wandb_service():
    """End the service that W&B started in this process: the next test's scripts would join it."""
    yield
    if "WANDB_SERVICE" in os.environ:
        import wandb

        wandb.teardown()


@pytest.fixture
def new_imports():
    """Our modules are not imported yet, as in a new process; the libraries are."""
    names = {path.stem for path in ROOT.glob("*.py")} | {"engine", "search", "studies"}

    def take():
        found = [name for name in sys.modules if name.partition(".")[0] in names]
        return {name: sys.modules.pop(name) for name in found}

    before = take()
    yield
    take()
    sys.modules.update(before)


@pytest.fixture
def tiny():
    """The demo cut down to a second: 3 epochs of 3 steps, nothing sent anywhere."""
    return TINY


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The README's first command, but of few epochs and with W&B offline: its folder and output."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # once for all processes
        shared = shared.parent
    folder = shared / "demo"
    with filelock.FileLock(shared / "demo.lock"):
        if not folder.exists():
            folder.mkdir()
            result = run("train.py", "demo", "--epochs", 3, "--wandb", "offline", cwd=folder)
            assert result.returncode == 0, result.stderr
            (folder / "output.txt").write_text(result.stdout, encoding="utf-8")
    output = (folder / "output.txt").read_text(encoding="utf-8")
    return folder / "checkpoints" / "demo", output


@pytest.fixture(scope="session")
def cifar10_bin(tmp_path_factory):
    """A data folder with the official binary layout, full size, filled with noise."""
    release = data.RELEASES["cifar10"]
    folder = tmp_path_factory.mktemp("cifar10") / release.binary_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, (number, _) in release.binary_files.items():
        shape = (number, release.record_bytes)
        records = rng.integers(0, 256, shape, dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(folder / name)
    return folder.parent


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __reduce__(self):
        return open, ("bomb_went_off", "w")


def command(*args, launcher=()):
    """The command line of a script, `train.py`, or of a module, `search`."""
    script, *options = map(str, args)
    start = [*launcher, str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    return [sys.executable, *(["-m"] if launcher else []), *start, *options]


def run(*args, cwd=".", launcher=(), **env):
    """Run a script in a process of its own."""
    line = command(*args, launcher=launcher)
    env = os.environ | {"PYTHONPATH": str(ROOT)} | env  # modules are found from any folder
    return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True)


def run_main(main, *args, monkeypatch):
    """Run the `main` of a module in this process as its script would; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        run_script(main if isinstance(main, str) else main.__module__)
    return stop.value.code


def make_pictures(folder, size=(40, 40), suffix="png", **numbers):
    """Write so many pictures of each class, `cat=3`, into folders below `folder`.

    Each is noise around a color of its class.
    """
    rng = np.random.default_rng(len(numbers))
    for i, (name, number) in enumerate(numbers.items()):
        (Path(folder) / name).mkdir(parents=True, exist_ok=True)
        for j in range(number):
            pixels = rng.integers(0, 100, (*size, 3)) + 50 * np.eye(4)[i % 4][:3]
            Image.fromarray(pixels.astype(np.uint8)).save(Path(folder) / name / f"{j}.{suffix}")
