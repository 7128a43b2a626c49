"""Damage a search's folder at random, and see whether a row of trials.csv is lost or changed.

    damage_rounds(200, seed=0)

Below the current folder; needs no Ray. A row that trial.json or trials.csv still tells must be
known as it was, and no trial's files may give it another one. What is noticed to be damaged is told
in one line.
"""

import contextlib
import functools
import io
import random
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import utils
from trials import ENDED, SPACE, LogUniform, Search, Trials, read_record, write_record

# With a recipe too: numbers, words and sizes that users may add.
WIDER = SPACE | {
    "dropout": (0.0, 0.1, 0.2, 0.3),
    "lr": LogUniform(1e-4, 1.0),
    "batch_size": (32, 64, 128, 256),
    "optimizer": ("sgd", "muon"),
    "schedule": ("cosine", "cosine_restarts", "linear"),
}
TINY = WIDER | {"num_blocks": (1, 2), "c1": range(2, 5), "batch_size": (128, 256)}
SEARCH = Search(name="damaged", num_samples=6, epochs=2, grace_epochs=1, val_size=200)
DESCRIBED = {"preset": "demo", "space": repr(TINY), **asdict(SEARCH)}


@functools.cache
def drawn(number: int) -> dict[str, object]:
    """The row of a trial that has not begun."""
    return Trials(SEARCH, "demo", TINY).draw(number)


def make_search(statuses: tuple[str, ...]) -> Trials:
    """A search that has come to trials of these statuses, with the files that it leaves."""
    trials = Trials(SEARCH, "demo", TINY)
    shutil.rmtree(trials.path, ignore_errors=True)
    write_record(trials.path / "search.json", DESCRIBED)
    for number, status in enumerate(statuses, start=1):
        row = drawn(number) | {"status": status, "epochs": 2, "seconds": 1.5}
        accuracy = None if status == "diverged" else 10.125 * number
        row |= {"val_accuracy": accuracy, "early_accuracy": accuracy}
        trials.write(row)
        trials.rows[number] = row
        log = [{"epoch": epoch, "val_accuracy": accuracy} for epoch in (1, 2)]
        utils.write_csv(trials.folder(number) / "log.csv", log)
    trials.write_table()
    return trials


def damage_search(folder: Path, rng: random.Random) -> list[str]:
    """Damage one to three of its files, or remove a trial's folder; returns what was done."""
    done = []
    for _ in range(rng.randint(1, 3)):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        path, how = rng.choice(files), rng.choice(("flip", "cut", "zero", "swap", "gone", "folder"))
        content = bytearray(path.read_bytes())
        if how == "gone" or not content:
            path.unlink()
        elif how == "folder" and path.parent != folder:
            shutil.rmtree(path.parent)
        elif how == "swap":  # with the same file of another trial, say
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
    return done


def intact_rows(trials: Trials, before: dict[Path, bytes]) -> dict[int, dict]:
    """The rows of trials that ended and are told by an undamaged trial.json or line."""
    table, found = trials.path / "trials.csv", {}
    header, *lines = before[table].splitlines()
    left = table.read_bytes().splitlines() if table.exists() else []
    for row, line in zip(trials.table(), lines, strict=True):
        path = trials.folder(row["trial"]) / "trial.json"
        told = path.exists() and path.read_bytes() == before[path]
        if row["status"] in ENDED and (told or (left[:1] == [header] and line in left)):
            found[row["trial"]] = row
    return found


def check_rows(trials: Trials, before: dict[Path, bytes]) -> str:
    """What a resumed search loses of these trials, whose files were `before`; "" for nothing."""
    expected = intact_rows(trials, before)
    with contextlib.suppress(OSError, TypeError, ValueError):
        stored = read_record(trials.path / "search.json")
        if "preset" in stored and stored != DESCRIBED:
            return "search.json tells of another search"
    left = {n for n in trials.ended() if trials.folder(n).joinpath("trial.json").exists()}
    left = trials.ended() if trials.path.joinpath("trials.csv").exists() else left
    told = io.StringIO()
    for _ in range(2):  # the second time what the first one mended and wrote
        known = Trials(SEARCH, "demo", TINY)
        with contextlib.redirect_stderr(told):
            known.load()
            for number in set(known.numbers) - known.ended():
                known.mend(number)
            known.write_table()
        rows = {row["trial"]: row for row in known.table()}
        for number, row in expected.items():
            if rows.get(number) != row:
                return f"trial {number} is {rows.get(number)}, was {row}"
        for number, row in known.rows.items():
            if row.get("sample", sample := trials.rows[number]["sample"]) != sample:
                return f"trial {number} has the sample of another one"
    if lost := left - known.ended():
        return "" if told.getvalue() else f"trials {sorted(lost)} are lost without a word"
    return ""


def damage_rounds(rounds: int, seed: int = 0) -> Counter:
    """Damage finished and half-done searches so many times; how many rounds lost nothing.

    The key of a round that did is what was lost, and by what.
    """
    results = Counter()
    for number in range(rounds):
        rng = random.Random(f"{seed} {number}")
        ended = [rng.choice(ENDED) for _ in range(6)]
        half = (*ended[:3], "running", "failed")
        trials = make_search(tuple(ended) if number % 2 else half)
        before = {p: p.read_bytes() for p in trials.path.rglob("*") if p.is_file()}
        done = damage_search(trials.path, rng)
        lost = check_rows(trials, before)
        results[f"{lost} ({', '.join(done)})" if lost else "nothing lost"] += 1
    return results
