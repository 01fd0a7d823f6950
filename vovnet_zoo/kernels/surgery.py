"""`become` changes how a module computes while it stays the module it is."""

from __future__ import annotations

from typing import Any

from torch import nn


def become(module: nn.Module, cls: type[Any]) -> None:
    """Give `module` the class `cls`, which computes the same in another way; `restore` undoes it.

    Parameters, state dict and hooks stay as they are, and so do references to the module. `cls` derives from
    `cls.stands_for`, the class that the module was built with, and adds no state to it.
    """
    plain, built = cls.stands_for, plain_class(module)
    assert built is plain, f"{built.__name__} cannot become {cls.__name__}, which is for {plain.__name__}"
    assert issubclass(cls, plain) and cls.__init__ is plain.__init__, f"{cls.__name__} has a state of its own"
    module.__class__ = cls


def restore(model: nn.Module) -> nn.Module:
    """Give every module of `model` back the class that it had before `become`; returns `model`."""
    for module in model.modules():
        module.__class__ = plain_class(module)
    return model


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that `module` was built with."""
    return getattr(type(module), "stands_for", type(module))
