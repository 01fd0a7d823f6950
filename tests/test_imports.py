"""The modules import only whom they may (recipes/guides/code.md).

The imports are read off the whole syntax tree of every module, inside functions too.
"""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The rooms of the library, which are its modules and its folders, from the ground up.
# A room may import rooms of the lines before its own only.
LAYERS = [
    {"words"},
    {"arguments", "batching", "commands", "config", "convert", "files", "gpus", "import_hook"}
    | {"ledger", "version", "video", "web"},
    {"data", "hub", "kernels", "planning", "precision"},
    {"backbone", "nms", "space"},
    {"fcos", "sources", "tiles", "weights"},
    {"draw", "loss"},
    {"fused"},
    {"parts"},
    {"results", "show_data"},
    {"exported"},
    {"inference", "vovnet"},
    {"classifiers", "compiled", "evaluation", "predict_files"},
    {"detectors", "export"},
    {"load", "publish"},
    {"demo"},
    {"__init__", "check_data", "cli", "coco_eval"},  # check_data and coco_eval are former paths of moved modules
    {"__main__"},
]
ONLY = {  # rooms that may import even less
    "data": {"arguments", "config", "files", "words"},
    "hub": {"arguments", "files", "ledger"},
    "backbone": {"hub"},
    "planning": {"gpus", "words"},
    "precision": {"config"},
    "nms": {"arguments", "kernels"},
    "fcos": {"arguments", "backbone", "config", "hub", "words"},
    "tiles": {"arguments", "config", "nms"},
    "weights": {"files", "ledger", "web", "words"},
    "loss": {"arguments", "config", "fcos", "words"},
    "sources": {"arguments", "data", "files", "video", "web", "words"},
    "draw": {"arguments", "sources", "words"},
    "fused": {"data", "fcos", "kernels", "loss"},
    "parts": {"fcos", "fused"},
    "results": {"arguments", "convert", "draw", "fcos", "sources", "words"},
    "show_data": {"arguments", "data", "draw"},
    "exported": {"config", "fcos", "results", "words"},
    "inference": {"arguments", "batching", "commands", "config", "data", "draw", "exported", "fcos", "fused", "nms"}
    | {"parts", "precision", "results", "sources", "tiles", "words"},
    "vovnet": {"convert", "files", "hub", "ledger", "weights"},
    "space": {"files", "hub", "version"},
    "demo": {"config", "draw", "exported", "fcos", "inference", "load", "predict_files", "results", "sources", "words"},
    "export": {"arguments", "commands", "compiled", "config", "data", "evaluation", "exported", "fcos", "files"}
    | {"inference", "results", "sources", "version", "words"},
    "load": {"arguments", "detectors", "export", "exported", "fcos", "hub"},
    "evaluation": {"arguments", "data", "fcos", "files", "inference", "results", "version", "words"},
}


@pytest.fixture(scope="module")
def graph():
    return import_graph(ROOT)


def test_no_circle(graph):
    assert circle(graph) == []


def test_every_room_has_a_layer(graph):
    listed = [room for layer in LAYERS for room in layer]
    assert sorted(listed) == sorted({room_of(module) for module in graph if is_library(module)})


def test_arrows_go_down(graph):
    layer_of = {room: number for number, layer in enumerate(LAYERS) for room in layer}
    for importer, imported in arrows(graph):
        assert layer_of[imported] < layer_of[importer], f"{importer} imports {imported}"
        assert imported in ONLY.get(importer, layer_of), f"{importer} imports {imported}"


def test_the_library_does_not_import_recipes(graph):
    for module in filter(is_library, graph):
        assert all(map(is_library, graph[module])), f"{module} imports {graph[module]}"


def test_no_recipe_script_imports_another(graph):
    scripts = {name for name in graph if not is_library(name) and is_script(ROOT / "recipes" / f"{name}.py")}
    assert {"train_coco", "eval_coco"} <= scripts
    found = {name: graph[name] & scripts for name in scripts if graph[name] & scripts}
    assert not found, f"shared pieces belong in modules beside the scripts: {found}"


def test_network_needs_timm_and_torchvision_ops_only():
    for name in ("backbone", "fcos"):
        tree = ast.parse((ROOT / "vovnet_zoo" / f"{name}.py").read_text())
        modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 0}
        modules |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
        for module in modules:
            top = module.split(".")[0]
            assert top in sys.stdlib_module_names or top in ("torch", "timm") or module.startswith("torchvision.ops")


def test_every_module_is_in_the_guide():
    """Below the name of each folder, the guide lists all modules of this folder, and nothing else."""
    listed, folder = [], ""
    guide = (ROOT / "recipes" / "guides" / "code.md").read_text()
    for line in guide.split("```")[1].strip().splitlines():
        name = line.split()[0]
        if line.startswith(" "):
            listed.append(folder + name)
        else:
            folder = name
    modules = [*(ROOT / "vovnet_zoo").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]
    assert sorted(listed) == sorted(path.relative_to(ROOT).as_posix() for path in modules)


def test_former_paths_of_moved_modules():
    from vovnet_zoo import check_data, coco_eval, data
    from vovnet_zoo.data import check
    from vovnet_zoo.evaluation import coco_metrics

    assert coco_eval.evaluate is coco_metrics and check_data.check_dataset is check.check_dataset
    for name in ("annotations", "images", "dataset", "transforms", "batches"):
        module = getattr(data, name)
        for key, value in vars(module).items():
            if getattr(value, "__module__", None) == module.__name__ and not key.startswith("_"):
                assert getattr(data, key) is value and key in data.__all__, f"vovnet_zoo.data lacks {key}"


@pytest.mark.parametrize(
    "module, line, imported",
    [
        ("hub", "from . import cli", "vovnet_zoo.cli"),
        ("hub", "from .data.check import main", "vovnet_zoo.data.check"),
        ("hub", "def f():\n    import vovnet_zoo.cli as c", "vovnet_zoo.cli"),
        ("hub", "from vovnet_zoo import something", "vovnet_zoo"),
        ("hub", "try:\n    import train_coco\nexcept ImportError: pass", "train_coco"),
        ("data/check", "from ..cli import main", "vovnet_zoo.cli"),
        ("data/check", "from .. import cli", "vovnet_zoo.cli"),
        ("data/check", "from . import CocoDataset", "vovnet_zoo.data"),
        ("data/__init__", "class A:\n    from .check import main", "vovnet_zoo.data.check"),
    ],
)
def test_every_form_of_import_is_seen(tmp_path, module, line, imported):
    for name in ("__init__", "cli", "hub", "data/__init__", "data/check", "../recipes/train_coco"):
        path = tmp_path / "vovnet_zoo" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "vovnet_zoo" / f"{module}.py").write_text(line)
    importer = module_name(tmp_path / "vovnet_zoo" / f"{module}.py", tmp_path)
    assert import_graph(tmp_path)[importer] == {imported}
    (tmp_path / "vovnet_zoo" / "cli.py").write_text("from . import hub")
    assert bool(circle(import_graph(tmp_path))) == (line == "from . import cli" or "import vovnet_zoo.cli" in line)


# ---- reading the sources


POSIX = {"fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"}  # modules that Windows lacks


def test_every_module_fits_every_system():
    paths = [*(ROOT / "vovnet_zoo").rglob("*.py"), *(ROOT / "recipes").rglob("*.py"), ROOT / "hubconf.py"]
    found = {str(path): unfit(ast.parse(path.read_text(encoding="utf-8"))) for path in paths}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "code, what",
    [
        ("import fcntl", "imports fcntl without except ImportError"),
        ("try:\n    import fcntl\nexcept ImportError:\n    fcntl = None", None),
        ("open(path)", "has no encoding: open(path)"),
        ("open(path, 'rb')", None),
        ("path.write_text(text)", "has no encoding: path.write_text(text)"),
        ("path.read_text('utf-8')", None),
        ("x.to(device, non_blocking=True)", "does not wait: x.to(device, non_blocking=True)"),
    ],
)
def test_what_does_not_fit_a_system_is_found(code, what):
    assert unfit(ast.parse(code)) == ([f"line 1 {what}"] if what else [])


def unfit(tree: ast.Module) -> list[str]:
    """List what a module does that fails on some system.

    Windows has not all modules, and takes cp1252 where no encoding is given. On Apple's GPUs, a copy that is not
    waited for may read memory that was freed (github.com/pytorch/pytorch/issues/139550).
    """
    tries = [n for n in ast.walk(tree) if isinstance(n, ast.Try) and "ImportError" in ast.unparse(n.handlers[:1])]
    caught = {node for part in tries for node in ast.walk(part)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in caught:
            found += [(node, f"imports {x.name} without except ImportError") for x in node.names if x.name in POSIX]
        if isinstance(node, ast.Call):
            if lacks_encoding(node):
                found.append((node, f"has no encoding: {ast.unparse(node)}"))
            if "non_blocking=True" in map(ast.unparse, node.keywords):
                found.append((node, f"does not wait: {ast.unparse(node)}"))
    return [f"line {node.lineno} {what}" for node, what in found]


def lacks_encoding(call: ast.Call) -> bool:
    """Tell whether a call reads or writes text in the encoding of the system."""
    name = getattr(call.func, "attr", None) or getattr(call.func, "id", None)
    if not {keyword.arg for keyword in call.keywords} <= {"mode", "buffering", "errors", "newline"}:
        return False  # it has one, or is no function of Python's
    if name == "open" and isinstance(call.func, ast.Name):
        return len(call.args) < 2 or "b" not in ast.unparse(call.args[1])
    return name == "read_text" and not call.args or name == "write_text" and len(call.args) < 2


def import_graph(root: Path) -> dict[str, set[str]]:
    """Map the dotted name of each module of ours to the modules of ours that it imports; recipes have no dot."""
    paths = [*(root / "vovnet_zoo").rglob("*.py"), *(root / "recipes").glob("*.py")]
    modules = {module_name(path, root): path for path in paths}
    return {name: imports(path, name, modules.keys()) for name, path in modules.items()}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(part for part in parts if part not in ("recipes", "__init__"))


def imports(path: Path, name: str, modules) -> set[str]:
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module.split(".") if node.module else [])])
            submodules = {f"{source}.{alias.name}" for alias in node.names}
            found |= {submodule if submodule in modules else source for submodule in submodules}
    return found & modules


def circle(graph: dict[str, set[str]]) -> list[str]:
    """List the modules of a circle of imports; [] if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def arrows(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Collect the (importer, imported) pairs of the library's rooms."""
    pairs = {(room_of(a), room_of(b)) for a in filter(is_library, graph) for b in filter(is_library, graph[a])}
    return {(importer, imported) for importer, imported in pairs if importer != imported}


def is_library(module: str) -> bool:
    return module.split(".")[0] == "vovnet_zoo"


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def is_script(path: Path) -> bool:
    tests = [ast.unparse(node.test) for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
    return "__name__ == '__main__'" in tests
