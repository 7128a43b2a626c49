"""Does Optuna's TPE find better networks than random search, on the handwritten digits?

    python -m studies.tpe    # half an hour on two cores; continues where it was interrupted

Both draw the same number of trials from the same space and train them in the same way, with five
seeds each, since a single search can be lucky. studies/tpe.csv has the highest and the mean
validation accuracy of the first 10, 20 and 40 trials. The highest is optimistic, equally for both.
docs/search.md has the table.

tpe.csv is of commit 57553db, where trials were drawn differently: today the command gives other
trials from the same space.
"""

if __name__ == "__main__":
    from engine.script import run_script

    run_script("studies.tpe")

import statistics
from dataclasses import replace
from pathlib import Path

import utils
from engine.progress import Row
from search.space import SPACE, LogUniform, Search
from search.trials import METRIC
from studies.choices.run import run

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
OPTIONS = Search(num_samples=max(TRIALS), epochs=2, grace_epochs=2, train_size=500, val_size=800)


def searched(algorithm: str, seed: int) -> list[float]:
    """The validation accuracies of a search's trials in order; 10% for one that diverged."""
    name = f"tpe-{algorithm}-{seed}"
    rows = run(replace(OPTIONS, name=name, algorithm=algorithm, seed=seed), "demo", DRAWN)
    return [row[METRIC] or 10.0 for row in rows]


def study() -> None:
    """Run the searches, write studies/tpe.csv and print the table."""
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
    """Print mean and standard deviation over the seeds, and how often the best of TPE is higher."""
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


def main(args: list[str]) -> None:
    """Parse the command line, which has no option but -h, and run the study."""
    import tyro

    tyro.cli(study, args=args, prog="python -m studies.tpe", description=__doc__)
