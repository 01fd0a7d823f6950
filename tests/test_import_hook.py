"""The backbones are registered with timm in whatever order the two packages are imported."""

import importlib
import importlib.resources
import importlib.util
import inspect
import itertools
import os
import runpy
import sys
import threading
import time
import types
import zipfile
from importlib.machinery import PathFinder

import pytest
from launch import run_python

import vovnet_zoo
from vovnet_zoo.import_hook import Finder, after_import

NUMBERS = itertools.count()


class Package:
    """A package that counts its imports and can be told to fail, and what was called after them."""

    def __init__(self, folder):
        self.folder, self.name, self.calls = folder, f"package_of_a_test_{next(NUMBERS)}", []
        self.write("from .models import create\nfrom . import models\nlast = 1\n")

    def write(self, init):
        (self.folder / self.name).mkdir(exist_ok=True)
        (self.folder / self.name / "__init__.py").write_text(init)
        (self.folder / self.name / "models.py").write_text("def create():\n    return 'made'\n")
        (self.folder / self.name / "__main__.py").write_text("result = 'main'\n")
        importlib.invalidate_caches()

    def action(self):
        self.calls.append(sys.modules[self.name].last)  # what the package does last, it has done

    def hook(self):
        after_import(self.name, self.action)

    @property
    def module(self):
        return importlib.import_module(self.name)


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    package = Package(tmp_path)
    yield package
    sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "name", "") != package.name]


def test_the_action_is_the_last_step_of_the_import(package):
    package.hook()
    assert package.calls == []
    exec(f"from {package.name}.models import create\nassert create() == 'made'")
    assert package.calls == [1]
    exec(f"import {package.name}.models")
    assert package.calls == [1]


def test_a_package_that_is_imported_already(package):
    assert package.module.last == 1
    package.hook()
    assert package.calls == [1]


def test_a_second_hook_and_a_reload_change_nothing(package):
    for _ in range(2):
        package.hook()
    assert sum(isinstance(finder, Finder) and finder.name == package.name for finder in sys.meta_path) == 1
    before = package.module
    importlib.reload(before)
    assert package.module is before and package.calls == [1, 1]


def test_the_package_keeps_its_own_loader(package):
    package.hook()
    spec = importlib.util.find_spec(package.name)  # a look whether it is installed is no import
    assert package.calls == [] and "last = 1" in spec.loader.get_source(package.name)
    plain = type(importlib.import_module("tyro").__loader__)
    assert type(package.module.__loader__) is type(package.module.__spec__.loader) is plain
    assert "last = 1" in inspect.getsource(package.module)
    assert (importlib.resources.files(package.name) / "models.py").is_file()
    assert runpy.run_module(package.name)["result"] == "main"


def test_a_package_in_a_zip(package, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "packages.zip", "w") as archive:
        for file in (tmp_path / package.name).iterdir():
            archive.write(file, f"{package.name}/{file.name}")
        archive.writestr("neighbour_of_a_test.py", "")
    monkeypatch.syspath_prepend(tmp_path / "packages.zip")
    package.hook()
    assert importlib.util.find_spec(package.name) and importlib.import_module("neighbour_of_a_test")
    assert package.calls == []
    assert ".zip" in package.module.__file__ and package.calls == [1]


def test_a_package_that_is_not_there_or_fails(package):
    after_import("no_package_of_this_name", lambda: pytest.fail("called"))
    assert importlib.util.find_spec("no_package_of_this_name") is None
    with pytest.raises(ModuleNotFoundError, match="no_package_of_this_name"):
        importlib.import_module("no_package_of_this_name")
    package.write("from .models import nonsense\n")
    package.hook()
    with pytest.raises(ImportError, match="nonsense"):
        assert package.module
    assert package.calls == []
    package.write("last = 1\n")
    assert package.module.last == 1 and package.calls == [1]


def test_an_error_of_the_action_is_raised_by_each_import(package):
    after_import(package.name, lambda: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            assert package.module
        assert package.name not in sys.modules


def test_the_action_may_import_what_imports_the_package(package):
    """This is the circle of timm and vovnet_zoo.vovnet; it may be entered from both ends."""
    plugin = f"plugin_of_{package.name}"
    (package.folder / f"{plugin}.py").write_text(f"from {package.name}.models import create\nmade = create()\n")
    after_import(package.name, lambda: importlib.import_module(plugin))
    assert importlib.import_module(plugin).made == "made" and package.name in sys.modules
    for name in [name for name in sys.modules if package.name in name]:
        del sys.modules[name]
    assert package.module and sys.modules[plugin].made == "made"


def test_threads(package):
    """No thread gets the package before the action is done."""
    package.write("import time\ntime.sleep(0.05)\nlast = 1\n")
    package.hook()
    seen, start = [], threading.Barrier(8)

    def work():
        start.wait()
        package.hook()
        assert package.module.last
        seen.append(len(package.calls))

    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads], [thread.join(20) for thread in threads]
    assert len(seen) == 8 and min(seen) >= 1


def test_a_thread_that_has_found_the_package_and_not_yet_loaded_it(package, monkeypatch):
    """Its import ends without the hook's last step, so the hook waits for it."""
    found = threading.Event()

    class Slow:
        def find_spec(self, name, path=None, target=None):
            if name != package.name:
                return None
            found.set()
            time.sleep(0.1)
            return PathFinder.find_spec(name, path)

    monkeypatch.setattr(sys, "meta_path", [Slow(), *sys.meta_path])
    thread = threading.Thread(target=lambda: package.module)
    thread.start(), found.wait(20)
    package.hook()
    thread.join(20)
    assert package.calls == [1]


# ---- with timm itself

ORDERS = {
    "timm first": "import timm, vovnet_zoo",
    "timm last": "import vovnet_zoo, timm",
    "a part of timm": "import vovnet_zoo; from timm.models import create_model",
    "a part of ours": "from vovnet_zoo.data import CocoDataset; import timm",
    "our module of backbones": "import vovnet_zoo.vovnet",
    "a name of ours": "from vovnet_zoo import FCOS",
    "all names of ours": "from vovnet_zoo import *; predict, FCOS",
    "a pickle": "import pickle; pickle.loads(b'cvovnet_zoo.fcos\\nFCOS\\n.')",
    "reloaded before": "import vovnet_zoo, importlib; importlib.reload(vovnet_zoo); import timm",
    "reloaded after": "import vovnet_zoo, timm, importlib; importlib.reload(timm); importlib.reload(vovnet_zoo)",
    "the command line": "import vovnet_zoo.cli, timm",
    "threads": """
import threading
lines = ["import timm", "import vovnet_zoo, timm", "import timm, vovnet_zoo"]
lines += ["import vovnet_zoo; vovnet_zoo.FCOS", "import vovnet_zoo; vovnet_zoo.predict"]
errors, start = [], threading.Barrier(len(lines))
def work(line):
    start.wait()
    try:
        exec(line)
    except BaseException as error:
        errors.append(error)
threads = [threading.Thread(target=work, args=[line]) for line in lines]
[thread.start() for thread in threads], [thread.join() for thread in threads]
assert not errors, errors
""",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a fork saves importing torch for each order")
def test_every_order_of_imports():
    code = f"""
import os, sys, torch, torchvision, huggingface_hub
assert "timm" not in sys.modules and "vovnet_zoo" not in sys.modules
for name, order in {ORDERS}.items():
    sys.stdout.flush()
    if not os.fork():
        exec(order, {{}})
        import timm
        assert {{"vovnet39", "vovnet93"}} <= set(timm.list_models("vovnet*")), timm.list_models("vovnet*")
        with torch.device("meta"):
            assert timm.create_model("vovnet27_slim", num_classes=3).num_classes == 3
        print(name, flush=True)
        os._exit(0)
    os.wait()
"""
    result = run_python(code)
    assert result.stdout.splitlines() == list(ORDERS), result.stderr


def test_an_error_in_the_registration_is_seen(tmp_path):
    """timm lacks a piece: its import says so, as the import of this library did that registered at once."""
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("")
    (tmp_path / "timm" / "models.py").write_text("")
    result = run_python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import vovnet_zoo; print('light'); import timm"
    )
    assert result.returncode == 1 and result.stdout == "light\n"
    assert "No module named 'timm.layers'" in result.stderr.splitlines()[-1]


# ---- names of the package


def test_names_of_the_package():
    for name in vovnet_zoo.__all__:
        assert getattr(vovnet_zoo, name) is not None and name in dir(vovnet_zoo)
    assert set(vovnet_zoo.PUBLIC) | {"__version__"} == set(vovnet_zoo.__all__)
    for name, module in vovnet_zoo.PUBLIC.items():
        assert getattr(vovnet_zoo, name).__module__ == f"vovnet_zoo.{module}"
    for name in ("vovnet", "detectors", "data", "weights", "inference"):  # modules that were there after the import
        assert isinstance(getattr(vovnet_zoo, name), types.ModuleType)
    with pytest.raises(AttributeError, match="module 'vovnet_zoo' has no attribute 'predct'"):
        assert vovnet_zoo.predct
    assert not hasattr(vovnet_zoo, "_nonsense") and not hasattr(vovnet_zoo, "no_module")


def test_type_checkers_see_the_names_that_python_gives():
    """The imports for type checkers and the table of names say the same."""
    source = inspect.getsource(vovnet_zoo)
    for name, module in vovnet_zoo.PUBLIC.items():
        (line,) = (line for line in source.splitlines() if line.strip().startswith(f"from .{module} import"))
        assert name in line.replace(",", " ").split()
