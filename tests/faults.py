"""Kill trainings and damage their files at random, and see whether anything is lost.

    python tests/faults.py  # 200 of each

A kill is SIGKILL at a random instant, or just before a random access to a file of the run, so that
every gap in a save is met; every third run is killed again while it goes on. What is resumed must
end as the unbroken run did, bit for bit: weights, BN statistics, average, optimizer, schedule,
log (but its seconds) and test accuracy.

A signal (SIGINT, SIGTERM, SIGUSR1 or SIGHUP, at a random instant) must be answered with a line, the
state saved, and the status that it has by convention; what is resumed must be the same too.

A corruption flips a bit of a saved file, cuts it off, zeroes a range or swaps two: of a state, a
model or a teacher's kept answers. It must be noticed or make no difference. Whatever happens is one
line of text, never a traceback.

A damaged search (damaged_search.py) must keep every trial whose file is undamaged.

Each training is a fork of this process, so that PyTorch is loaded once.
"""

import argparse
import contextlib
import functools
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._dynamo  # which the first optimizer loads: here, so that no fork has to
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
import utils
from config import PRESETS, Config
from data import Dataset, load_dataset
from engine import checkpoint
from engine.checkpoint import load_model
from engine.script import StopSignals, run_script
from utils import CHECKPOINTS

# The first backward pass of a process starts a thread for each device; after that no fork can do
# one. torch.export makes it look as if there were a GPU: hence this, before any test exports.
torch.zeros(1, requires_grad=True).backward()

TINY = replace(
    PRESETS["demo"],
    name="run",
    c1=2,
    epochs=2,
    batch_size=16,
    max_steps_per_epoch=6,
    dropout=0.2,
    val_size=50,
    save_minutes=0.0,  # after each step: most kills meet a save
    wandb="disabled",
)
FAST = {
    name: getattr(PRESETS["fast"], name)
    for name in (
        "stem c1 downsample pool_kernel padding_mode optimizer lr momentum adam_lr label_smoothing"
        " schedule keep_fraction small_fraction"
    ).split()
} | {"width": 1}
OTHER = "other.safetensors"  # the network of the first recipe, as one of CIFAR-10
SMALL = ("small_fraction", "small_size", "small_images")  # of the preset best
RECIPES = [
    TINY,
    replace(TINY, schedule="cosine_restarts", restart_epochs=1, save_minutes=0.001),
    replace(TINY, **FAST),
    replace(
        TINY,
        **{name: getattr(PRESETS["best"], name) for name in SMALL},
        nesterov=True,
        warmup_epochs=1,
        ema_decay=0.9,
        cutout_size=8,
    ),
    replace(
        TINY,
        dataset="cifar10",  # by name: digits may not be moved
        trivial_augment=True,
        crop_padding=4,
        flip="alternating",
        init=OTHER,
        teacher=OTHER,
        teacher_views=2,
        label_smoothing=0.0,
    ),
]
FILES = ("last.pt", checkpoint.PREVIOUS, "model.safetensors")
ANSWERS = Path(TINY.data_dir, "answers")


def main() -> int:
    """Run all campaigns; returns 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--signals", type=int, default=200)
    parser.add_argument("--corruptions", type=int, default=200)
    parser.add_argument("--searches", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # before any operation: a pool of threads does not survive a fork
    utils.git_commit()

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        whole = [Whole(config) for config in RECIPES]
        lost = kill_all(whole, args.kills, rng)
        lost += signal_all(whole, args.signals, rng)
        lost += corrupt_all(whole, args.corruptions, rng)
        lost += damage_searches(args.searches, args.seed)
    return 1 if lost else 0


# ---------------------------------------------------------------- trainings in forks


class Fork:
    """`python train.py` in a fork of this process, for a configuration.

    Args:
        moments: signals that it sends itself, by (path, n): just before a file whose path ends like
            this is renamed into its place for the n-th time; of "", before the n-th access of any
            kind to a file of a run or of its teacher's answers.
    """

    def __init__(self, config: Config, moments: dict[tuple[str, int], int] | None = None) -> None:
        self.output = Path("output.txt")
        load(config.dataset, config.val_size)
        sys.stdout.flush()  # or the fork would print it again
        self.pid = os.fork()
        if self.pid:
            return
        try:
            torch.set_num_threads(1)  # a pool of threads does not survive a fork
            with self.output.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
            accesses = watch_accesses(moments or {})
            sys.modules["forked"] = SimpleNamespace(main=lambda _: run(config))
            run_script("forked")
        except SystemExit as stop:
            if stop.code == 0:
                Path("accesses").write_text(str(accesses[""]))
            os._exit(stop.code)
        except BaseException:  # as the interpreter would, but that a fork must not go on from here
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)

    def wait(self, seconds: float = 0, number: int = signal.SIGKILL) -> int:
        """Signal it after so many seconds, if given; its exit status, negative for a signal."""
        if seconds:
            time.sleep(seconds)
            os.kill(self.pid, number)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def lines(self) -> list[str]:
        """What it printed."""
        return self.output.read_text().splitlines()


@functools.cache
def load(dataset: str, val_size: int) -> Dataset:
    """Load the digits, under the name of whatever data set, once for all forks."""
    return replace(load_dataset(Config(dataset="digits", val_size=val_size)), name=dataset)


def run(config: Config) -> None:
    """Train what a configuration asks for."""
    if config.seeds > 1:
        train.train_seeds(config)
    else:
        train.train(config, load(config.dataset, config.val_size))


def watch_accesses(moments: dict[tuple[str, int], int]) -> Counter:
    """Count openings, renamings and removals of a run's files and answers; see `Fork`."""
    count = Counter()
    endings = {ending for ending, _ in moments} | {""}

    def hook(event: str, args: tuple) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
            return
        path = str(args[event == "os.rename"])  # of a renaming, the new one
        if CHECKPOINTS.name not in path and ANSWERS.name not in path:
            return
        for ending in endings if event == "os.rename" else [""]:
            if path.endswith(ending):
                count[ending] += 1
                if number := moments.get((ending, count[ending])):
                    os.kill(os.getpid(), number)

    sys.addaudithook(hook)
    return count


class Whole:
    """An unbroken training, and what it left."""

    def __init__(self, config: Config) -> None:
        start = time.perf_counter()
        fork = Fork(config)
        assert fork.wait() == 0, fork.lines
        self.config, self.seconds = config, time.perf_counter() - start
        self.accesses, self.result = int(Path("accesses").read_text()), result(config)
        if not Path(OTHER).exists():
            model, info = load_model(CHECKPOINTS / config.name / "model.safetensors")
            del info["architecture"]
            checkpoint.save_model(Path(OTHER), model, info | {"dataset": "cifar10"})
        start_anew()


def start_anew() -> None:
    """Remove the runs, and what a teacher answered."""
    for folder in (CHECKPOINTS, ANSWERS):
        shutil.rmtree(folder, ignore_errors=True)


def result(config: Config) -> dict[str, str]:
    """Digests of what a finished run left, without its times."""
    folder = CHECKPOINTS / config.name
    assert not list(folder.glob(f"{utils.TEMPORARY}*"))
    state = checkpoint.read_state(folder / "last.pt")
    model = load_digestible(folder / "model.safetensors")
    log = utils.read_csv(folder / "log.csv")
    for row in (*log, *state["metrics"]["log"]):
        del row["seconds"]
    weights, _ = model
    found = {"state": state, "model": model, "weights": weights, "log": log}
    return {name: digest(value) for name, value in found.items()}


def digest(value: object) -> str:
    """SHA-256 of tensors and plain values, nested in dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        content = f"{value.dtype} {tuple(value.shape)}".encode()
        content += value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, dict):
        content = "".join(sorted(f"{key} {digest(v)}\n" for key, v in value.items())).encode()
    elif isinstance(value, list | tuple):
        content = "".join(map(digest, value)).encode()
    else:
        content = repr(value).encode()
    return hashlib.sha256(content).hexdigest()


# ---------------------------------------------------------------- kills


def kill_all(whole: list[Whole], number: int, rng: random.Random) -> int:
    """Kill so many trainings, and resume each; returns how many were lost."""
    kills = again = unsaved = within = identical = trial = 0
    bar = tqdm(total=number, desc="kills", disable=None)
    while kills < number:
        one, twice = whole[trial % len(whole)], kills % 3 == 2
        start_anew()
        trial += 1
        if not killed(one, rng):
            continue  # it was finished before
        kills += 1
        if not has_state(one.config):
            unsaved += 1  # in its first moments: the same command starts anew
        elif twice:
            again += killed(one, rng)
        same, mid_epoch = resumes_to_the_same(one)
        identical, within = identical + same, within + mid_epoch
        bar.update()
    bar.close()
    print(f"kills {kills}, and {again} again while going on; before the first save {unsaved}")
    print(f"resumes {kills - unsaved}, of them within an epoch {within};", end=" ")
    print(f"identical {identical}, lost {kills - identical}")
    return kills - identical


def killed(one: Whole, rng: random.Random) -> bool:
    """Start or resume a training and kill it; whether it was still running."""
    config = replace(one.config, resume=has_state(one.config))
    if rng.random() < 0.5:
        return Fork(config).wait(rng.uniform(0.01, one.seconds)) == -signal.SIGKILL
    return (
        Fork(config, {("", rng.randint(1, one.accesses)): signal.SIGKILL}).wait() == -signal.SIGKILL
    )


def resumes_to_the_same(one: Whole) -> tuple[bool, bool]:
    """Go on with a run: whether it ends as the unbroken one, and whether it began in mid-epoch."""
    fork = Fork(replace(one.config, resume=has_state(one.config)))
    status = fork.wait()
    same = status == 0 and is_silent(fork) and result(one.config) == one.result
    if not same:
        print(f"lost: exit status {status}", *fork.lines, sep="\n  ")
    return same, any("going on after" in line and "step" in line for line in fork.lines)


def has_state(config: Config) -> bool:
    """Whether there is something to resume."""
    folder = CHECKPOINTS / config.name
    return any((folder / name).exists() for name in ("last.pt", checkpoint.PREVIOUS))


def is_silent(fork: Fork) -> bool:
    """Whether it printed nothing but what a training prints, or that it used previous.pt."""
    unusual = [line for line in fork.lines if line.startswith(("error", "warning", "Traceback"))]
    return all(line.startswith("warning: ") and checkpoint.PREVIOUS in line for line in unusual)


# ---------------------------------------------------------------- signals


def signal_all(whole: list[Whole], number: int, rng: random.Random) -> int:
    """Signal so many trainings, and resume each; returns how many did wrong or were lost."""
    counts = dict.fromkeys(("saved", "before the first step", "too late", "wrong"), 0)
    for trial in tqdm(range(number), desc="signals", disable=None):
        one = whole[trial % len(whole)]
        start_anew()
        name = rng.choice(StopSignals.NAMES)
        fork, sent = Fork(one.config), getattr(signal, name)
        status = fork.wait(rng.uniform(0.01, one.seconds), sent)
        said = "\n".join(["", *fork.lines])
        if status == 128 + sent and f"\nstopped by {name} " in said:
            outcome = "saved" if has_state(one.config) else "before the first step"
            outcome = outcome if f"\n{name}: stopping after" in said else "wrong"
        elif status == 0:  # heard after the last step, or not at all
            outcome = "too late"
        else:  # it has its usual effect until there is something to save
            begun = has_state(one.config)
            usual = status == -sent or (status, said) == (130, "\ninterrupted")
            outcome = "before the first step" if usual and not begun else "wrong"
        if outcome == "wrong":
            print(f"wrong: {name}, exit status {status}", *fork.lines, sep="\n  ")
        elif not (result(one.config) == one.result if status == 0 else resumes_to_the_same(one)[0]):
            outcome = "wrong"
        counts[outcome] += 1
    shown = ", ".join(f"{name} {count}" for name, count in counts.items())
    print(f"signals {number}: {shown}")
    return counts["wrong"]


# ---------------------------------------------------------------- corruptions


def corrupt_all(whole: list[Whole], number: int, rng: random.Random) -> int:
    """Damage so many files, and use each; returns how many were wrong without a word."""
    counts = {"detected": 0, "harmless": 0, "wrong": 0}
    broken = [half_done(one, Path(f"broken-{i}")) for i, one in enumerate(whole)]
    for trial in tqdm(range(number), desc="corruptions", disable=None):
        one = whole[trial % len(whole)]
        start_anew()
        if one.config.teacher and rng.random() < 0.5:
            counts[use_answers(one, rng)] += 1
            continue
        shutil.copytree(broken[trial % len(whole)], "checkpoints")
        names = rng.choice([FILES[:1], FILES[:2], FILES[2:], FILES[2:]])
        paths = [CHECKPOINTS / one.config.name / name for name in names]
        sound = [path.read_bytes() for path in paths]
        for path in paths:
            damage(path, rng)
        outcome = use_model(paths[0], sound[0]) if names == FILES[2:] else use_state(one, paths)
        counts[outcome] += 1
    shown = ", ".join(f"{name} {count}" for name, count in counts.items())
    print(f"corruptions {number}: {shown}")
    return counts["wrong"]


def half_done(one: Whole, folder: Path) -> Path:
    """Kill a training in its last third; `folder`, in which it then is with all its files."""
    for fatal in range(one.accesses * 2 // 3, one.accesses):
        start_anew()
        assert Fork(one.config, {("", fatal): signal.SIGKILL}).wait() == -signal.SIGKILL
        if all((CHECKPOINTS / one.config.name / name).exists() for name in FILES):
            break
    return Path(shutil.move("checkpoints", folder))


def damage(path: Path, rng: random.Random) -> None:
    """Put another content in the place of a file, as long or shorter."""
    old = path.read_bytes()
    new = bytearray(old)
    while new == old:
        kind, size = rng.choice(["flip", "truncate", "zero", "swap"]), len(old)
        a, b = sorted(rng.sample(range(size), 2))
        length = rng.randint(1, min(1000, b - a, size - b))
        if kind == "flip":
            new[a] ^= 1 << rng.randrange(8)
        elif kind == "truncate":
            del new[a:]
        elif kind == "zero":
            new[a : a + length] = bytes(length)
        else:
            new[a : a + length], new[b : b + length] = new[b : b + length], new[a : a + length]
    path.unlink()
    path.write_bytes(new)


def use_state(one: Whole, damaged: list[Path]) -> str:
    """Resume from damaged states: the same result, or one line if there is no sound one left."""
    before = [path.read_bytes() for path in damaged]
    fork = Fork(replace(one.config, resume=True))
    status = fork.wait()
    if len(damaged) == 1:
        warned = is_silent(fork) and fork.lines[0].startswith("warning: ")
        detected = status == 0 and warned and result(one.config) == one.result
    else:
        refused = len(fork.lines) == 1 and fork.lines[0].startswith("error: resume: ")
        intact = before == [path.read_bytes() for path in damaged]
        detected = status == 2 and refused and intact
    if detected:
        return "detected"
    print(f"wrong: exit status {status}", *fork.lines, sep="\n  ")
    return "wrong"


def use_model(path: Path, sound: bytes) -> str:
    """Load a damaged model: one line, or the same network as before."""
    try:
        found = digest(load_digestible(path))
    except utils.InputError as error:
        return "detected" if "\n" not in str(error) else "wrong"
    path.write_bytes(sound)
    return "harmless" if found == digest(load_digestible(path)) else "wrong"


def use_answers(one: Whole, rng: random.Random) -> str:
    """Damage a file of kept answers and train with it: the same result, with a line about it."""
    assert Fork(one.config).wait() == 0
    shutil.rmtree(CHECKPOINTS)
    damage(rng.choice(sorted(ANSWERS.rglob("*.safetensors"))), rng)
    fork = Fork(one.config)
    status = fork.wait()
    warned = any("is damaged; computing its answers again" in line for line in fork.lines)
    if status == 0 and result(one.config) == one.result:
        return "detected" if warned else "harmless"
    print(f"wrong: exit status {status}", *fork.lines, sep="\n  ")
    return "wrong"


def load_digestible(path: Path) -> tuple[dict, dict]:
    """Tensors and metadata of a model file."""
    model, info = load_model(path)
    return model.state_dict(), info


# ---------------------------------------------------------------- searches


def damage_searches(number: int, seed: int) -> int:
    """Damage so many searches; returns how many lost a row."""
    if not number:
        return 0
    from damaged_search import damage_rounds

    results = damage_rounds(number, seed)
    kept = results.pop("nothing lost", 0)
    print(*(f"lost: {what}" for what in results), sep="\n", end="\n" if results else "")
    print(f"damaged searches {number}: rows kept {kept}, lost {number - kept}")
    return number - kept


if __name__ == "__main__":
    sys.exit(main())
