"""What the README tells people to type must be what the scripts take."""

import re
from pathlib import Path

import pytest
from conftest import ROOT, run_main

import plots
import test as test_script
import train as train_script
import utils
from train import PRESETS

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
COMMANDS = re.findall(r"(?:python|torchrun --nproc-per-node \d+) (train\.py[^#&|\n$]*)", SHELL)
COMMANDS += [line for line in re.findall(r"`python (train\.py [^`]*)`", README) if "-h" not in line]
SEARCHES = re.findall(
    r"python (search\.py[^#`\n]*)[#`\n]", README.replace("HOST:PORT", "127.0.0.1:9")
)


def test_two_commands_do_all_the_set_up():
    assert "pip install -r requirements.txt && python train.py demo\n" in SHELL
    assert "pip install -r requirements.txt && python -m pytest\n" in SHELL


@pytest.mark.parametrize("line", COMMANDS)
def test_training_commands_are_accepted(line, monkeypatch):
    assert len(COMMANDS) >= 8
    configs = []
    for name in ("train", "train_seeds"):
        monkeypatch.setattr(train_script, name, configs.append)
    _, *args = line.split()
    utils.write_json(Path("checkpoints/search/best.json"), train_script.record(PRESETS["demo"]))
    assert run_main(train_script.main, *args, monkeypatch=monkeypatch) == 0
    train_script.check_config(configs[0])


@pytest.mark.parametrize("line", SEARCHES)
def test_search_commands_are_accepted(line, monkeypatch):
    pytest.importorskip("ray")
    import search

    assert len(SEARCHES) >= 7
    _, *args = line.split()
    stored = {"preset": "demo", "space": repr(search.SPACE), **vars(search.Search())}
    utils.write_json(Path("checkpoints/search/search.json"), stored)
    found = []
    monkeypatch.setattr(search, "run_search", lambda *searched: found.append(searched))
    assert run_main(search.main, *args, monkeypatch=monkeypatch) == 0
    search.check_search(found[0][0])


def test_folder_of_a_search_is_complete():
    pytest.importorskip("ray")
    import search

    for name in ("search.json", "trials.csv", "best.json", *plots.EFFECTS):
        assert name in README
    for name in search.SHAPE:
        assert name in search.SPACE


def test_python_examples_run(demo, tmp_path, monkeypatch, capsys):
    folder, _ = demo
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "demo").symlink_to(folder)
    trained = []
    monkeypatch.setattr(train_script, "train", trained.append)
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(code, {})
    assert trained[0].name == "model1-30"
    assert "num_params=" in capsys.readouterr().out


def test_table_of_the_run_folder_is_complete(demo):
    folder, _ = demo
    for path in folder.iterdir():
        assert path.name in README
    assert test_script.CHECKPOINTS == train_script.CHECKPOINTS
