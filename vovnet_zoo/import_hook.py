"""`after_import` calls a function right after a module is imported, whoever imports it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any


def after_import(name: str, action: Callable[[], object]) -> None:
    """Call `action` at once if the package `name` is imported already, and as the last step of each import of it.

    An error of `action` ends the import of `name`, as an error in that module itself does, and the next import of
    `name` calls `action` again. The first action that is given for a name stays.
    """
    assert "." not in name, "the import statement would import the package around it"
    finder = next((x for x in sys.meta_path if isinstance(x, Finder) and x.name == name), None)
    if finder is None:
        finder = Finder(name, action)
        sys.meta_path.insert(0, finder)
    if finder.is_imported():
        action()


class Finder(MetaPathFinder):
    """This finder takes what the finders behind it find for one module, and gives its loader a last step.

    It stays in sys.meta_path for good: while a list gets shorter, other threads that walk it miss an element.
    """

    def __init__(self, name: str, action: Callable[[], object]) -> None:
        self.name, self.action = name, action
        self.asking: set[int] = set()  # the threads that ask whether the module is imported

    def is_imported(self) -> bool:
        """Tell whether the module is imported; a thread that is in the middle of it is waited for.

        sys.modules alone does not tell: another thread may have its loader already, from the finders behind this one,
        and not yet the module. So the module is asked for with the import statement, which waits, and where no thread
        imports the module the statement comes to this finder, which ends it.
        """
        self.asking.add(threading.get_ident())
        try:
            __import__(self.name)
        except NotImported:
            return False
        finally:
            self.asking.discard(threading.get_ident())
        return True

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        if threading.get_ident() in self.asking:
            raise NotImported
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(fullname, path, target) for finder in behind)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = LastStep(spec.loader, self.action)
        return spec


class NotImported(ImportError):
    """No thread has imported the module, or is about to."""


class LastStep(Loader):
    """This loader runs a module as its own loader does, and then an action."""

    def __init__(self, loader: Loader, action: Callable[[], object]) -> None:
        self.loader, self.action = loader, action

    def __getattr__(self, name: str) -> Any:  # its own loader has the source, resources and the like
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader  # for everyone who looks at the module from now on
        self.loader.exec_module(module)
        self.action()
