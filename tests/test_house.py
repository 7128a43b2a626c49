"""The layout: flat scripts of a readable length that import only from those above them."""

import ast
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

SCRIPTS = {path.stem: path for path in ROOT.glob("*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SCRIPTS.items()}


def imports(name):
    """The scripts that a script imports, anywhere in it."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found & set(SCRIPTS) - {name}


def test_imports_make_no_circle_and_are_few():
    graph = {name: imports(name) for name in SCRIPTS}
    assert list(TopologicalSorter(graph).static_order())  # CycleError names a circle
    assert not graph["utils"]
    assert sum(map(len, graph.values())) <= 84, graph


@pytest.mark.parametrize("name", SCRIPTS)
def test_files_and_parameter_lists_are_short(name):
    lines = len(SCRIPTS[name].read_text(encoding="utf-8").splitlines())
    assert lines <= {"train": 320, "utils": 300}.get(name, 650)
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert len([p for p in parameters if p.arg != "self"]) <= 8, node.name
