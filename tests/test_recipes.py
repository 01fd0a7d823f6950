"""The recipes are made so that they can be read: scripts beside modules, and no function longer than a screen."""

import ast
from pathlib import Path

import pytest

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.py"))
TREES = {path.stem: ast.parse(path.read_text()) for path in RECIPES}
SCRIPTS = {name for name, tree in TREES.items() if "__main__" in ast.dump(tree)}


@pytest.mark.parametrize("name", TREES)
def test_nothing_imports_a_script(name):
    """What two recipes share is a module beside them, without a command line."""
    assert {"train_coco", "eval_coco", "benchmark"} <= SCRIPTS
    imported = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    assert not imported & SCRIPTS


@pytest.mark.parametrize("name", TREES)
def test_functions_fit_on_a_screen(name):
    functions = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)]
    assert {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= 60} == {}
