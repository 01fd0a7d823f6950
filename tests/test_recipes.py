"""The recipes can be read, since no function is longer than a screen, and their help is quick."""

import ast
from pathlib import Path
from typing import get_args

import pytest
from launch import HEAVY, run_light

import benchmark
import benchmark_runtimes

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.py"))
SCRIPTS = [path.name for path in RECIPES if '\nif __name__ == "__main__":' in path.read_text()]
TREES = {path.stem: ast.parse(path.read_text()) for path in RECIPES}


@pytest.mark.parametrize("name", TREES)
def test_functions_fit_on_a_screen(name):
    functions = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)]
    assert {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= 60} == {}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_takes_no_seconds(name):
    """A script answers --help and wrong options before it imports torch."""
    for option, status in (("--help", 0), ("--no-such-option", 2)):
        result, imported = run_light(f"recipes/{name}", option)
        assert result.returncode == status and name in result.stdout + result.stderr
        assert not imported & HEAVY


def test_the_benchmark_knows_the_runtimes():
    """Its options name them without importing them."""
    assert set(get_args(benchmark.RuntimeName)) == set(benchmark_runtimes.RUNTIMES)
