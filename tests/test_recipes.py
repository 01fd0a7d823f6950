"""The recipes can be read: no function is longer than a screen."""

import ast
from pathlib import Path

import pytest

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.py"))
TREES = {path.stem: ast.parse(path.read_text()) for path in RECIPES}


@pytest.mark.parametrize("name", TREES)
def test_functions_fit_on_a_screen(name):
    functions = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)]
    assert {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= 60} == {}
