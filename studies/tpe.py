"""Random search against Optuna's TPE with equal numbers of trials, on the handwritten digits.

    python -m studies.tpe    # half an hour on two cores; goes on where it was cut off

Both draw from the same space and train in the same way; each is run with several seeds, since one
search of either can be lucky. Written to studies/tpe.csv: the highest validation accuracy among the
first so many trials, and the mean of these trials. The highest of several accuracies is optimistic,
equally so for both. docs/search.md has the table.

The record was drawn before a trial's sample was a function of the seed and its number (commit
57553db): run again, it gives other trials from the same space.
"""

import script

import statistics
from pathlib import Path

import utils
from metrics import Row
from studies.choices.run import run
from trials import METRIC, SPACE, LogUniform, Search

DRAWN = SPACE | {
    "num_blocks": range(1, 4),
    "c1": range(4, 13),
    "dropout": (0.0, 0.1, 0.2, 0.3),
    "classifier_dropout": (0.0, 0.1, 0.2, 0.3),
    "lr": LogUniform(1e-4, 1.0),
    "batch_size": (32, 64, 128, 256),
    "optimizer": ("sgd", "muon"),
    "schedule": ("cosine", "cosine_restarts", "linear"),
}
SEEDS, TRIALS = range(5), (10, 20, 40)
ALGORITHMS = ("random", "optuna")


def searched(algorithm: str, seed: int) -> list[float]:
    """Validation accuracies of a search's trials, in their order; divergence counts as chance."""
    options = Search(
        name=f"tpe-{algorithm}-{seed}",
        num_samples=max(TRIALS),
        epochs=2,
        grace_epochs=2,
        algorithm=algorithm,
        train_size=500,
        val_size=800,
        seed=seed,
    )
    rows = run(options, "demo", DRAWN)
    return [row[METRIC] or 10.0 for row in rows]


def main(_args: list[str]) -> None:
    """Run the searches, print and write how they compare."""
    rows = []
    for seed in SEEDS:
        for algorithm in ALGORITHMS:
            accuracy = searched(algorithm, seed)
            rows += [
                {
                    "algorithm": algorithm,
                    "seed": seed,
                    "trials": trials,
                    "best_accuracy": max(accuracy[:trials]),
                    "mean_accuracy": round(statistics.mean(accuracy[:trials]), 2),
                }
                for trials in TRIALS
            ]
            utils.write_csv(Path("studies/tpe.csv"), rows)
    print_table(rows)


def print_table(rows: list[Row]) -> None:
    """Mean and standard deviation over the seeds, and how often TPE's best was the better one."""
    print("| trials | best, random | best, TPE | mean, random | mean, TPE | TPE's best is higher |")
    print("|---|---|---|---|---|---|")
    for trials in TRIALS:
        best, mean = (
            {
                algorithm: [
                    row[column]
                    for row in rows
                    if (row["algorithm"], row["trials"]) == (algorithm, trials)
                ]
                for algorithm in ALGORITHMS
            }
            for column in ("best_accuracy", "mean_accuracy")
        )
        cells = [
            f"{statistics.mean(values[algorithm]):.1f}% ± {statistics.stdev(values[algorithm]):.1f}"
            for values in (best, mean)
            for algorithm in ALGORITHMS
        ]
        wins = sum(tpe > rand for rand, tpe in zip(best["random"], best["optuna"], strict=True))
        print(f"| {trials} | {' | '.join(cells)} | {wins} of {len(best['random'])} |")


if __name__ == "__main__":
    script.run_script(main)
