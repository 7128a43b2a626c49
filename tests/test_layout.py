"""The layout: which file may import which, and the README's list of files."""

import ast
import re
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

# Each group imports only from itself and from those below it.
GROUPS = [
    ["tests"],
    ["search", "studies"],
    ["train", "test", "predict", "export", "hubconf"],
    ["config", "model", "data", "augment", "learner", "engine"],
    ["utils"],
]
RANK = {name: rank for rank, group in enumerate(GROUPS) for name in group}


def name_of(path):
    """`engine.run` of engine/run.py, `search` of search/__init__.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = [*ROOT.glob("*.py")]
for folder in ("engine", "search", "studies"):
    FILES += (ROOT / folder).rglob("*.py")
MODULES = {name_of(path): path for path in FILES}


def imports(path):
    """Our modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(MODULES) - {name_of(path)}


def test_nothing_imports_in_a_circle():
    graph = {name: imports(path) for name, path in MODULES.items()}
    assert graph["train"]
    assert list(TopologicalSorter(graph).static_order())  # CycleError names the circle


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_import_from_below(name):
    rank = RANK[name.split(".")[0]]
    for imported in imports(MODULES[name]):
        assert RANK[imported.split(".")[0]] >= rank, f"{name} imports {imported}"


def test_readme_lists_every_file():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"## Files\n+```\n(.*?)```", readme, re.DOTALL).group(1)
    scripts, _, rest = tree.partition("\nengine/")
    engine, _, folders = rest.partition("\nfolders\n")
    listed = {name: set(re.findall(r"^  (\w+\.py) ", text, re.MULTILINE))
              for name, text in ((".", scripts), ("engine", engine))}  # fmt: skip
    for folder, names in listed.items():
        files = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
        assert names == files, folder
    for folder in re.findall(r"^  (\w+)/ ", folders, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
