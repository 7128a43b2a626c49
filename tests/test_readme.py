"""What the README and docs/ tell people to type must be what the scripts take."""

import importlib.util
import re
from pathlib import Path

import pytest
from conftest import ROOT, run_main

import plots
import train as train_script
import utils
from config import PRESETS, check_config, record

FOLDERS = [ROOT / name for name in ("docs", "checkpoints", "studies")]
PAGES = [ROOT / "README.md", *(page for one in FOLDERS for page in sorted(one.rglob("*.md")))]
README, *DOCS = TEXTS = [page.read_text(encoding="utf-8") for page in PAGES]
TEXT = "\n".join(TEXTS).replace("HOST:PORT", "127.0.0.1:9").replace("path/to/TPSNet", str(ROOT))
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL))
COMMANDS = re.findall(r"(?:python|torchrun --nproc-per-node \d+) (train\.py[^#&|\n$]*)", SHELL)
COMMANDS += [line for line in re.findall(r"`python (train\.py [^`]*)`", TEXT) if " -h" not in line]
COMMANDS += [f"train.py {line}" for line in re.findall(r"^\| `((?!python)[^`]*)`", README, re.M)]
SEARCHES = re.findall(r"python (search\.py[^#`\n]*)[#`\n]", TEXT)
STUDIES = re.findall(r"python -m (studies\.[\w.]+)", TEXT)
SCRIPTS = re.findall(r"python ((?:\w+/)?\w+\.py)", TEXT)
TREE = re.search(r"## Where things are\n+```\n(.*?)```", README, re.DOTALL).group(1)


def test_two_commands_do_all_the_set_up():
    assert "pip install -r requirements.txt && python train.py demo\n" in SHELL
    assert "pip install -r requirements.txt && python -m pytest\n" in SHELL


def test_readme_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("line", sorted(set(COMMANDS)))
def test_training_commands_are_accepted(line, monkeypatch):
    configs = []
    for name in ("train", "train_seeds"):
        monkeypatch.setattr(train_script, name, configs.append)
    _, *args = line.split()
    for path in ("checkpoints/search/best.json", "checkpoints/mine/config.json"):
        utils.write_json(Path(path), record(PRESETS["demo"]))
    assert run_main(train_script.main, *args, monkeypatch=monkeypatch) == 0
    check_config(configs[0])


@pytest.mark.parametrize("line", sorted(set(SEARCHES)))
def test_search_commands_are_accepted(line, monkeypatch):
    pytest.importorskip("ray")
    import search
    import trials

    _, *args = line.split()
    stored = {"preset": "demo", "space": repr(trials.SPACE), **vars(trials.Search())}
    utils.write_json(Path("checkpoints/search/search.json"), stored)
    found = []
    monkeypatch.setattr(search, "run_search", lambda *searched: found.append(searched))
    assert run_main(search.main, *args, monkeypatch=monkeypatch) == 0
    trials.check_search(found[0][0])


def test_commands_are_found():
    assert len(set(COMMANDS)) > 20
    assert len(set(SEARCHES)) > 6
    for script in SCRIPTS:
        assert (ROOT / script).exists(), script
    for study in STUDIES:
        assert importlib.util.find_spec(study), study


def test_folder_of_a_search_is_complete():
    import trials

    page = (ROOT / "docs/search.md").read_text(encoding="utf-8")
    for name in ("search.json", "trials.csv", "best.json", "trial.json", *plots.EFFECTS):
        assert name in page
    for name in trials.SHAPE:
        assert name in trials.SPACE


def test_python_examples_run(demo, tmp_path, monkeypatch, capsys):
    folder, _ = demo
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "demo").symlink_to(folder)
    trained = []
    monkeypatch.setattr(train_script, "train", lambda config: (trained.append(config), None))
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(code, {})
    assert trained[0].name == "model1-30"
    assert "num_params=" in capsys.readouterr().out


def test_table_of_the_run_folder_is_complete(demo):
    folder, _ = demo
    for path in folder.iterdir():
        assert path.name in README


def test_tree_has_every_script_and_nothing_else():
    named = re.findall(r"[\w/]+\.py\b|^\w+/", TREE, re.MULTILINE)
    for name in named:
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
    assert {path.name for path in ROOT.glob("*.py")} <= set(named)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)]*)\)", text):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [slug(title) for title in titles], link


def slug(title):
    """The anchor of a heading, as on GitHub."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_every_page_is_reached_from_the_readme():
    for page in PAGES[1:]:
        assert f"({page.relative_to(ROOT).as_posix()}" in README
