"""The trials of a search and their folders.

trial.json in a trial's folder is its record. It is read again, and so is log.csv, for ASHA's
comparisons; trials.csv is a table of the records, for people.
"""

import contextlib
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import utils
from config import Config, check_config
from engine.checkpoint import PREVIOUS
from engine.run import Run
from model import model_cost, pooled_size
from search.space import (
    PER_STAGE,
    SHAPE,
    Sample,
    Search,
    Space,
    base_config,
    configuration,
    draw_sample,
    entries,
)
from utils import CHECKPOINTS, InputError, first_line

METRIC = "val_accuracy"
ENDED = ("finished", "stopped", "diverged")  # not run again by --resume
STATUSES = (*ENDED, "running", "interrupted", "failed")
WEIGHTS = ("last.pt", PREVIOUS, "model.safetensors")

Row = dict[str, object]  # what is known of a trial: the columns of trials.csv, and its sample


# ---------------------------------------------------------------- records with a checksum


def write_record(path: Path, values: dict[str, object]) -> None:
    """Write search.json or a trial.json, with the SHA-256 of its values."""
    utils.write_json(path, values | {"sha256": checksum(values)})


def read_record(path: Path) -> dict[str, object]:
    """Read what `write_record` wrote.

    Raises:
        OSError, TypeError, ValueError: the file is missing, damaged or was edited.
    """
    values = dict(utils.read_json(path))
    if values.pop("sha256", None) != checksum(values):
        raise ValueError(f"{path.name} was damaged or edited: its SHA-256 does not match")
    return values


def checksum(values: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- trials


class Trials:
    """The trials 1 to `num_samples` of a search; `rows` has those that have begun, by number."""

    def __init__(self, search: Search, preset: str, space: Space) -> None:
        self.search, self.space, self.preset = search, space, preset
        self.base = base_config(search, preset)
        self.path, self.numbers = CHECKPOINTS / search.name, range(1, search.num_samples + 1)
        self.rows: dict[int, Row] = {}
        self.constants = [name for name in PER_STAGE if name in space] + ["pool_kernel", "c1"]
        self.constants += [] if "channels" in space else ["width"]
        self.constants += [name for name in space if name not in (*SHAPE, *self.constants)]
        self.columns = ["trial", "status", METRIC, "early_accuracy", "epochs", "seconds"]
        self.columns += ["num_params", "macs", "num_stages", "pooled_size", *self.constants]
        self.columns += ["rejected", "error"]

    @property
    def have_begun(self) -> bool:
        """False too if a search was ended between locking its folder and writing in it."""
        left = ("run.lock", utils.TEMPORARY)
        return any(not path.name.startswith(left) for path in self.path.glob("*"))

    def folder(self, number: int) -> Path:
        return self.path / f"{number:03d}"

    def config(self, row: Row) -> Config:
        """The constants of a trial."""
        name = f"{self.search.name}/{row['trial']:03d}"
        return replace(configuration(row["sample"], self.base), name=name)

    def blank(self, number: int) -> Row:
        """The row of a trial whose sample has not been drawn."""
        return dict.fromkeys(self.columns) | {"trial": number, "epochs": 0, "sample": None}

    def draw(self, number: int) -> Row:
        """Draw a trial's sample; returns the row of the trial before its first epoch.

        Raises:
            InputError: no sample is within the limits of the search.
        """
        tried = self.tried() if self.search.algorithm == "optuna" else []
        sample, rejected = draw_sample(self.search, self.base, self.space, number, tried)
        row = self.blank(number) | {"sample": sample, "rejected": rejected}
        config = self.config(row)
        cost = model_cost(config)
        row |= {"num_params": cost.num_params, "macs": cost.macs}
        row |= {"num_stages": sample["num_stages"], "pooled_size": pooled_size(config)}
        for name in self.constants:
            value = getattr(config, name)
            row[name] = " ".join(map(str, value)) if isinstance(value, tuple) else value
        return row

    def tried(self) -> list[tuple[Sample, float]]:
        """The samples and accuracies of the trials that have ended by now, in any process.

        The accuracy of a trial that diverged is that of guessing.
        """
        found, chance = [], 100 / self.base.num_classes
        for number in self.numbers:
            with contextlib.suppress(InputError):
                row = self.read(number)
                if row["status"] in ENDED:
                    found.append((row["sample"], row[METRIC] or chance))
        return found

    def read(self, number: int) -> Row:
        """Read a trial's row from its folder.

        Raises:
            InputError: its trial.json is missing, damaged or of another trial.
        """
        path = self.folder(number) / "trial.json"
        try:
            row = read_record(path)
            if row["trial"] != number or set(row) != {*self.columns, "sample"}:
                raise ValueError("it belongs to another trial or search")
            if row["status"] not in STATUSES or set(row["sample"]) != set(entries(self.space)):
                raise ValueError("it belongs to another trial or search")
            check_config(self.config(row))
            return row
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({first_line(error)})") from None

    def write(self, row: Row) -> None:
        """Write a row to its trial.json; delete the weights of a trial that has ended.

        After so few epochs the weights are of no use. A row without a sample is not written: the
        trial will be drawn again.
        """
        folder = self.folder(row["trial"])
        if row["sample"]:
            write_record(folder / "trial.json", row)
        if row["status"] in ENDED:
            for name in WEIGHTS:
                (folder / name).unlink(missing_ok=True)

    def load(self) -> None:
        """Read the rows from the trial folders; a trial whose trial.json is damaged has none."""
        for number in self.numbers:
            with contextlib.suppress(InputError):
                self.rows[number] = self.read(number)
        self.mark_interrupted()

    def mark_interrupted(self) -> None:
        """Change the status of running trials, after their processes have ended."""
        for row in self.rows.values():
            if row["status"] == "running":
                row["status"] = "interrupted"

    def ended(self) -> set[int]:
        """The numbers of the trials that are not run again."""
        return {number for number, row in self.rows.items() if row["status"] in ENDED}

    def remove_unless_resumable(self, number: int) -> None:
        """Remove the folder of a trial, with a warning, if the trial cannot continue from it.

        Raises:
            InputError: its state cannot be read, though it may be sound.
        """
        folder = self.folder(number)
        if not folder.exists():
            return
        try:
            Run(replace(self.config(self.read(number)), resume=True))
        except InputError as error:
            if isinstance(error.__cause__, OSError):
                raise
            if any(path.suffix in (".json", ".pt") for path in folder.iterdir()):  # it had begun
                utils.warn(f"trial {number} is trained again: {first_line(error)}")
            shutil.rmtree(folder)
            self.rows.pop(number, None)

    def table(self) -> list[Row]:
        """The rows of trials.csv."""
        rows = (self.rows[number] for number in sorted(self.rows))
        return [{name: row[name] for name in self.columns} for row in rows]

    def write_table(self) -> None:
        """Write trials.csv, once there is a row."""
        if self.rows:
            utils.write_csv(self.path / "trials.csv", self.table())

    def best(self) -> Row | None:
        """The row with the highest validation accuracy, if there is one."""
        tried = (r for r in self.rows.values() if r[METRIC] is not None and r["status"] != "failed")
        return max(tried, key=lambda row: row[METRIC], default=None)
