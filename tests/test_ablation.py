import statistics

import pytest
from conftest import ROOT

import train
import utils
from docs import ablation, best


@pytest.mark.parametrize("change", ablation.CHANGES)
def test_every_run_can_be_trained_and_validated(change):
    config = ablation.configuration(change, seed=1)
    train.check_config(config)
    assert (config.seed, config.val_size > 0, config.resume) == (1, True, False)
    unchanged = ablation.configuration("base", seed=1)
    assert (config.name == unchanged.name) == (change == "base")


def test_table_holds_the_mean_of_the_seeds_beside_the_base(tmp_path, monkeypatch, capsys):
    accuracy = {"base": 80.0, "proxy": 81.5}
    configs = []

    def fake_train(config):
        configs.append(config)
        change = config.name.split("-")[1]
        rows = [
            {"seconds": 30.0, "val_loss": 1.0, "val_accuracy": 10.0},
            {"seconds": 60.0, "val_loss": 0.5, "val_accuracy": accuracy[change] + config.seed},
        ]
        utils.write_csv(ablation.CHECKPOINTS / config.name / "log.csv", rows)
        (ablation.CHECKPOINTS / config.name / "last.pt").touch()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablation, "train", fake_train)
    monkeypatch.setattr(ablation, "CHANGES", {name: ablation.CHANGES[name] for name in accuracy})
    for resume in (False, True):  # what was trained before goes on
        ablation.main([])
        assert [c.resume for c in configs[-4:]] == [resume] * 4
        lines = capsys.readouterr().out.splitlines()
        assert lines[-2:] == [
            "| base | 2 | 1.5 | 80.50% (80.00, 81.00) | +0.00 |",
            "| proxy | 2 | 1.5 | 82.00% (81.50, 82.50) | +1.50 |",
        ]
    rows = utils.read_csv(tmp_path / "docs" / "ablation.csv")
    assert [(row["change"], row["seed"], row["val_accuracy"]) for row in rows] == [
        ("base", "0", "80.0"),
        ("proxy", "0", "81.5"),
        ("base", "1", "81.0"),
        ("proxy", "1", "82.5"),
    ]


def test_readme_has_the_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = utils.read_csv(ROOT / "docs" / "ablation.csv")
    assert {row["change"] for row in rows} == set(ablation.CHANGES)
    for change in ablation.CHANGES:
        found = [row for row in rows if row["change"] == change]
        assert [int(row["seed"]) for row in found] == list(ablation.SEEDS)
        each = [float(row["val_accuracy"]) for row in found]
        mean = f"{statistics.mean(each):.2f}% ({', '.join(f'{a:.2f}' for a in each)})"
        assert f"| {found[0]['epochs']} | {mean} |" in readme


@pytest.mark.parametrize("change", best.CHANGES)
def test_every_run_for_best_can_be_trained_and_validated(change):
    config = best.configuration(change, seed=1)
    train.check_config(config)
    assert (config.seed, config.val_size, config.train_size) == (1, 5000, 4000)
    assert config.warmup * config.epochs == pytest.approx(3)


def test_page_of_best_and_readme_have_what_was_repeated():
    page, readme = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("docs/best.md", "README.md")
    )
    rows = utils.read_csv(ROOT / "docs" / "best.csv")
    assert {row["change"] for row in rows} == set(best.CHANGES)
    runs = {row["change"]: [] for row in rows}
    for row in rows:
        assert int(row["seed"]) == len(runs[row["change"]])
        assert int(row["epochs"]) == best.configuration(row["change"], 0).epochs
        runs[row["change"]].append(float(row["val_accuracy"]))
    for change, each in runs.items():
        base = "base-100" if change.endswith("-100") else "base"
        gain = statistics.mean(each) - statistics.mean(runs[base])
        shown = f"| {statistics.mean(each):.2f}% ({', '.join(f'{a:.2f}' for a in each)}) |"
        shown += " |" if change == base else f" {gain:+.2f} |"
        assert page.count(shown) == readme.count(shown) == 1, change


def test_page_of_best_has_every_candidate():
    page = (ROOT / "docs" / "best.md").read_text(encoding="utf-8")
    rows = utils.read_csv(ROOT / "docs" / "candidates.csv")
    runs = {row["change"]: [] for row in rows}
    for row in rows:
        assert int(row["seed"]) == len(runs[row["change"]])
        runs[row["change"]].append(float(row["val_accuracy"]))
    page = page.split("These rows cannot be repeated")[0]
    lines = [line for line in page.splitlines() if line.startswith("| ") and "% (" in line]
    assert len(lines) == len(runs) > 20
    for change, each in runs.items():
        base = "base-100" if change.endswith("-100") else "base"
        gain = statistics.mean(each) - statistics.mean(runs[base])
        shown = f"{statistics.mean(each):.2f}% ({', '.join(f'{a:.2f}' for a in each)})"
        shown += " | |" if change == base else f" | {gain:+.2f} |"
        assert sum(shown in line for line in lines) == 1, change
