"""The commands, examples and links of the README and docs/ work."""

import contextlib
import functools
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

import model
import utils
from config import PRESETS, record
from utils import InputError

FOLDERS = [ROOT / name for name in ("docs", "checkpoints", "studies")]
PAGES = [ROOT / "README.md", *(page for one in FOLDERS for page in sorted(one.rglob("*.md")))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def find_commands():
    """Every `python ...` and `torchrun ...` of the pages: the script, and its arguments."""
    lines = [
        line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) for line in block.split("\n")
    ]
    lines += [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", TEXT)]
    found = set()
    for line in lines:
        for part in re.split(r" #|[|<;$]|&&", line):
            if match := re.search(r"\b(?:python|torchrun --nproc-per-node \d+) (.+)", part):
                found.add(match.group(1).strip())
    # `python -m pytest`, `python -m http.server`: not ours
    return sorted(command for command in found if source_of(command).exists())


def source_of(command):
    """The file that a command such as `train.py best` or `-m search demo` runs."""
    words = command.split()
    if words[0] != "-m":
        return ROOT / words[0]
    path = ROOT / words[1].replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


COMMANDS = find_commands()
TRAININGS = [command for command in COMMANDS if re.match(r"train\.py(?! -h)", command)]
README = PAGES[0].read_text(encoding="utf-8")
TRAININGS += [f"train.py {name}" for name in re.findall(r"^\| `(\w+)`", README, re.M)]


@functools.cache
def main_of(source):
    """The `main` of a script, found by the name that it gives to `run_script`."""
    name = re.search(r"run_script\(\"([\w.]+)\"\)", source.read_text(encoding="utf-8"))
    return importlib.import_module(name.group(1)).main


@functools.cache
def help_of(source):
    """The help of a script."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as ended:
        main_of(source)(["-h"])
    assert not ended.value.code
    return shown.getvalue()


def test_commands_are_found():
    scripts = {command.split(" ")[0] for command in COMMANDS}
    assert {"train.py", "test.py", "predict.py", "export.py", "tests/faults.py"} <= scripts
    assert {"-m search", "-m studies.benchmark --quick"} <= set(COMMANDS)


def test_scripts_exist():
    for script in re.findall(r"python ((?:\w+/)*\w+\.py)", TEXT):
        assert (ROOT / script).exists(), script
    for module in re.findall(r"python\s-m\s((?:search|studies)[\w.]*)", TEXT):
        assert source_of(f"-m {module}").exists(), module


@pytest.mark.parametrize("command", [command for command in COMMANDS if " --" in command])
def test_options_exist(command, monkeypatch):
    options = re.findall(r"(?<!\S)--[a-z0-9-]+", command)
    assert options
    monkeypatch.setenv("COLUMNS", "200")
    for option in options:
        assert re.search(rf"{option}(?![\w-])", help_of(source_of(command))), option


@pytest.mark.parametrize("command", sorted(set(TRAININGS)))
def test_trainings_are_accepted(command, monkeypatch):
    for path in ("checkpoints/search/best.json", "checkpoints/mixed/config.json"):
        utils.write_json(Path(path), record(PRESETS["demo"]))
    _, *args = shlex.split(command)
    # The budget is checked last, so that nothing else of the command is refused. To say what would
    # be within it takes time.
    monkeypatch.setattr(model, "smaller", lambda *_: "less")
    with pytest.raises(InputError, match="max_params"):
        main_of(ROOT / "train.py")([*args, "--max-params", "1"])


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", TEXT, re.S))
def test_python_examples_run(code, tmp_path, monkeypatch):
    if "onnxruntime" in code:
        pytest.importorskip("onnxruntime")
    photo = tmp_path / "photo.png"
    Image.new("RGB", (50, 40), "red").save(photo)
    monkeypatch.chdir(ROOT)
    places = {
        "path/to/this/folder": ROOT.as_posix(),
        "photo.jpg": photo.as_posix(),
        "train(config)": "None, None",
    }
    for name, place in places.items():
        code = code.replace(name, place)
    exec(code, {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_images_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)]*)\)", text):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.M)
            assert anchor in [slug(title) for title in titles], link


def slug(title):
    """The anchor of a heading, as on GitHub."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
