"""The recipes can be read, since no function is longer than a screen, and their help is quick."""

import ast
import functools
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pytest
from launch import HEAVY, run_light

import benchmark
import benchmark_runtimes
import imagenet_presets
import presets
from grouping import parse_grouped

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
        assert result.returncode == status and Path(name).stem in result.stdout + result.stderr
        assert not imported & HEAVY


@pytest.mark.parametrize("module", [presets, imagenet_presets])
def test_help_shows_the_options_in_groups(module, capsys, monkeypatch):
    """What matters most comes first, and no option is missing; values and defaults are as in the presets."""
    monkeypatch.setenv("COLUMNS", "100")  # so that groups are below each other
    known = {name: replace(config, data=Path("x")) for name, (_, config) in list(module.PRESETS.items())[:2]}
    parse = functools.partial(parse_grouped, module.PRESETS, module.FIRST_OPTIONS, module.SECTIONS)
    assert {name: parse([name, "--data", "x"]) for name in known} == known
    name = list(known)[1]
    assert parse([name, "--data", "x", "--seed=3", "--no-winograd"]) == replace(known[name], seed=3, winograd=False)
    with pytest.raises(SystemExit):
        parse([name, "--help"])
    page = capsys.readouterr().out
    shown = re.findall(r"^. --([a-z0-9-]+)", page, re.MULTILINE)
    names = [field.name.replace("_", "-") for field in fields(known[name])]
    assert shown[:5] == [x.replace("_", "-") for x in module.FIRST_OPTIONS] and sorted(shown) == sorted(names)
    titles = re.findall(r"^\W*(\w+) options\W*$", page, re.MULTILINE)
    assert set(titles) == set(module.SECTIONS.values()) and len(titles) == len(set(titles))


def test_the_benchmark_knows_the_runtimes():
    """Its options name them without importing them."""
    assert set(get_args(benchmark.RuntimeName)) == set(benchmark_runtimes.RUNTIMES)
