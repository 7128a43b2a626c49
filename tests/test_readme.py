"""What the README tells people to type must be what the scripts take."""

import re

import pytest
from conftest import ROOT, run_main

import test as test_script
import train as train_script

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
COMMANDS = re.findall(r"(?:python|torchrun --nproc-per-node \d+) (train\.py[^#&|\n$]*)", SHELL)
COMMANDS += [line for line in re.findall(r"`python (train\.py [^`]*)`", README) if "-h" not in line]


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
    assert run_main(train_script.main, *args, monkeypatch=monkeypatch) == 0
    train_script.check_config(configs[0])


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
