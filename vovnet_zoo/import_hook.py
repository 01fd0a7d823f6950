"""`after_import` calls a function right after a module is imported, whoever imports it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any


def after_import(name: str, action: Callable[[], object]) -> None:
    """Call `action` at once if the module `name` is imported already, and as the last step of each import of it.

    An error of `action` ends the import of `name`, as an error in that module itself does, and the next import of
    `name` calls `action` again. The first action that is given for a name stays.
    """
    if not any(isinstance(finder, Finder) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder(name, action))
    if name in sys.modules:  # looked up after the line above, since another thread may import it meanwhile
        __import__(name)  # waits for a thread that is in the middle of it
        action()


class Finder(MetaPathFinder):
    """This finder takes what the finders behind it find for one module, and gives its loader a last step.

    It stays in sys.meta_path for good: while a list gets shorter, other threads that walk it miss an element.
    """

    def __init__(self, name: str, action: Callable[[], object]) -> None:
        self.name, self.action = name, action

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(fullname, path, target) for finder in behind)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = LastStep(spec.loader, self.action)
        return spec


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
