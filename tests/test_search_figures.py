"""The figures of a search: drawn without errors, and the numbers behind them."""

import numpy as np
import pytest

from model import MAX_PARAMS
from search.figures import (
    EFFECTS,
    blocks_and_channels,
    choices,
    differing,
    effects,
    is_logarithmic,
    largest_depth,
    pareto_front,
    permutation_importance,
    with_derived,
)


def trials(number):
    """Rows of trials.csv in which the learning rate alone decides, and one that diverged."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(number):
        lr = 10 ** rng.uniform(-4, 0)
        accuracy = 40 - 8 * (np.log10(lr) + 2) ** 2 + rng.normal()
        stages = 3
        rows.append({
            "early_accuracy": accuracy, "num_params": int(rng.integers(1e5, 5e6)),
            "macs": int(rng.integers(1e7, 1e9)), "num_stages": stages, "pooled_size": 1,
            "num_blocks": " ".join(map(str, rng.integers(1, 17, stages))),
            "conv_kernel": " ".join("3" * stages), "skip_kernel": " ".join("1" * stages),
            "c1": int(rng.integers(8, 20)), "width": int(rng.integers(1, 3)), "lr": lr,
            "batch_size": int(rng.choice([32, 64])), "optimizer": str(rng.choice(["sgd", "muon"])),
        })  # fmt: skip
    return [*rows, rows[0] | {"early_accuracy": None}]


@pytest.mark.slow
def test_a_search_has_five_figures(tmp_path):
    paths = effects(trials(12), tmp_path, "12 trials")
    assert [path.name for path in paths] == list(EFFECTS)
    assert all(path.exists() for path in paths)


def test_drawn_channels_are_shown_by_their_mean(tmp_path):
    rows = []
    for n, row in enumerate(trials(12)[:-1]):
        del row["width"]
        rows.append(with_derived(row | {"channels": f"{8 + n} 40 {42 + n}"}))
    assert [row["mean_channels"] for row in rows[:2]] == [30, 30 + 2 / 3]
    assert "mean_channels" in differing(rows)
    blocks_and_channels(rows, tmp_path / "channels.png", "11 trials", MAX_PARAMS)
    assert (tmp_path / "channels.png").exists()


def test_other_constants_that_are_drawn_are_shown_too(tmp_path):
    pooled = with_derived(trials(1)[0] | {"downsample": "pool", "skip_kernel": "3 3 3"})
    assert pooled["mean_skip_kernel"] == 0  # no shortcut has one
    rows = [with_derived(trials(1)[0] | {"early_accuracy": 10.0 + i}) for i in range(12)]
    assert differing(rows) == []
    for i, row in enumerate(rows):
        row |= {"weight_decay": 10.0 ** (i / 4 - 5), "momentum": 0.8 + i / 100}
    names = differing(rows)
    assert sorted(names) == ["momentum", "weight_decay"]
    logarithmic = {n: is_logarithmic(n, [row[n] for row in rows]) for n in names}
    assert logarithmic == {"weight_decay": True, "momentum": False}
    choices(rows, tmp_path / "choices.png", "12 trials")
    drops, _ = permutation_importance(rows, names)
    assert drops.shape == (10, 2)


@pytest.mark.parametrize(
    "rows",
    [
        trials(5),
        [row | {"early_accuracy": 10.0} for row in trials(30)],
        [trials(1)[0] | {"early_accuracy": 10.0 + i} for i in range(30)],
    ],
    ids=["few trials", "the same accuracy", "the same network"],
)
def test_there_are_no_figures_without_a_difference_to_show(rows, tmp_path):
    assert effects(rows, tmp_path, "trials") == list(tmp_path.iterdir()) == []


def test_the_pareto_front_has_the_trials_that_nothing_cheaper_beats():
    cost, accuracy = np.array([3, 1, 2, 2, 5]), np.array([30.0, 10.0, 25.0, 20.0, 30.0])
    assert pareto_front(cost, accuracy) == [1, 2, 0]


def test_shuffling_what_decides_costs_the_most():
    rows = trials(60)[:-1]
    drops, r2 = permutation_importance(rows, ["c1", "lr", "optimizer"])
    c1, lr, optimizer = drops.mean(axis=0)
    assert lr > 1
    assert max(abs(c1), abs(optimizer)) < 0.1
    assert 0.5 < r2 < 1


@pytest.mark.parametrize(("c1", "blocks"), [(16, 13), (34, 3), (22, 7)])
def test_the_papers_networks_are_the_deepest_under_the_budget(c1, blocks):
    assert int(largest_depth(c1, 3, 2, MAX_PARAMS)) == blocks
