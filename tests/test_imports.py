"""Who may import whom (README, "How the code is laid out")."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {  # project modules; `lazily` are imported inside functions only
    "vovnet": {"convert", "hub", "weights"},
    "backbone": set(),
    "fcos": {"backbone", "hub"},
    "loss": {"fcos"},
    "inference": {"fcos", "data", "nms"},
    "compiled": {"fcos", "data", "inference", "nms", "osa", "winograd"},
    "nms": set(),
    "osa": {"winograd"},
    "data": set(),
    "coco_eval": {"data"},
    "files": set(),
    "hub": {"files"},
    "weights": {"files"},
    "convert": set(),
    "draw": set(),
    "version": set(),
    "winograd": set(),
    "check_data": {"data", "coco_eval"},
}


@pytest.mark.parametrize("name", sorted(MAY_IMPORT))
def test_library_modules_import_only_what_they_may(name):
    path = ROOT / "vovnet_zoo" / f"{name}.py"
    assert project_imports(path) <= MAY_IMPORT[name]


def test_the_library_does_not_import_recipes():
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.py")} | {"recipes"}
    for path in (ROOT / "vovnet_zoo").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] not in recipes, path
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & recipes, path


def test_network_needs_timm_and_torchvision_ops_only():
    tree = ast.parse((ROOT / "vovnet_zoo" / "fcos.py").read_text())
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 0}
    modules |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    standard = {"__future__", "difflib", "math", "collections", "collections.abc", "typing"}
    assert all(
        m in standard or m.split(".")[0] in ("torch", "timm") or m.startswith("torchvision.ops") for m in modules
    )


def project_imports(path: Path) -> set[str]:
    """Project modules imported at the top level of a module."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vovnet_zoo"):
            found.add(node.module.partition(".")[2] or "__init__")
    return found
