"""Damage the folder of a search at random: damage_rounds(200, seed=0), below the current folder.

An intact trial.json must give its row, a damaged one no row at all, and a warning must name the
trial that is trained again. Ray is not needed.
"""

import contextlib
import functools
import io
import random
import shutil
from collections import Counter
from dataclasses import asdict, replace

from tiny_search import TINY

from search.run import load_search
from search.space import Search
from search.trials import ENDED, Trials, write_record
from utils import InputError

SEARCH = Search(name="damaged", num_samples=6, epochs=2, grace_epochs=1, val_size=200)


@functools.cache
def drawn(number):
    """The row of a trial before its first epoch."""
    return Trials(SEARCH, "demo", TINY).draw(number)


def make_search(statuses):
    """Write the files of a search with trials of these statuses; returns its Trials."""
    trials = Trials(SEARCH, "demo", TINY)
    shutil.rmtree(trials.path, ignore_errors=True)
    described = {"preset": "demo", "space": repr(TINY), **asdict(SEARCH)}
    write_record(trials.path / "search.json", described)
    for number, status in enumerate(statuses, start=1):
        accuracy = None if status == "diverged" else 10.125 * number
        row = drawn(number) | {"status": status, "epochs": 2, "seconds": 1.5}
        trials.rows[number] = row | {"val_accuracy": accuracy, "early_accuracy": accuracy}
        trials.write(trials.rows[number])
    trials.write_table()
    return trials


def damage(folder, rng):
    """Damage one to three files, or remove a trial's folder; returns a description."""
    done = []
    for _ in range(rng.randint(1, 3)):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        path, how = rng.choice(files), rng.choice(("flip", "cut", "zero", "swap", "gone", "folder"))
        content = bytearray(path.read_bytes())
        if how == "gone" or not content:
            path.unlink()
        elif how == "folder" and path.parent != folder:
            shutil.rmtree(path.parent)
        elif how == "swap":  # with the same file of another trial, for example
            other = rng.choice([other for other in files if other.suffix == path.suffix])
            path.write_bytes(other.read_bytes())
            other.write_bytes(content)
        else:
            start = rng.randrange(len(content))
            end = rng.randint(start, len(content))
            if how == "zero":
                content[start:end] = bytes(end - start)
            elif how == "cut":
                del content[start:]
            else:
                content[start] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
        done.append(f"{how} {path.relative_to(folder)}")
    return ", ".join(done)


def find_loss(trials, before):
    """What resuming the damaged search loses or gets wrong; "" for nothing."""
    expected = "demo", replace(SEARCH, resume=SEARCH.name)
    with contextlib.suppress(InputError):
        if load_search(Search(resume=SEARCH.name), TINY) != expected:
            return "search.json holds other options"
    resumed, printed = Trials(SEARCH, "demo", TINY), io.StringIO()
    resumed.load()
    with contextlib.redirect_stderr(printed):
        for number in set(resumed.numbers) - resumed.ended():
            resumed.remove_unless_resumable(number)
    for number, row in trials.rows.items():
        path, found = trials.folder(number) / "trial.json", resumed.rows.get(number)
        changed = before[path] != (path.read_bytes() if path.exists() else None)
        if found and found != row | {"status": found["status"]}:
            return f"trial {number} has another row"
        if not found and row["status"] in ENDED and not changed:
            return f"trial {number} is lost"
        if not found and path.parent.exists() and f"trial {number} is" not in printed.getvalue():
            return f"trial {number} is lost without a warning"
    return ""


def damage_rounds(rounds, seed=0):
    """Damage a finished and a half-finished search in turn; count what was lost, and how."""
    results = Counter()
    for number in range(rounds):
        rng = random.Random(f"{seed} {number}")
        ended = [rng.choice(ENDED) for _ in range(6)]
        trials = make_search(ended if number % 2 else [*ended[:3], "running", "failed"])
        before = {p: p.read_bytes() for p in trials.path.rglob("*") if p.is_file()}
        done = damage(trials.path, rng)
        lost = find_loss(trials, before)
        results[f"{lost} ({done})" if lost else "nothing lost"] += 1
    return results
