"""On a GPU these parts of a detector are compiled: each child of the backbone, the FPN, and both towers of the head.

They are most of its work. Towers with kernels of their own (`fused.py`) are left as they are. Each part is one graph
for all sizes; one graph of the whole network, in which sizes are variables, takes many minutes to compile there.
"""

from __future__ import annotations

import copy
import weakref
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import nn

from .fcos import FCOS
from .fused import FusedTower

M = TypeVar("M", bound=nn.Module)
MANY = 4096  # graphs
# Of a detector and a backend: the detector with compiled parts, and the parts that these were made of
Known = dict[str, tuple[FCOS, list[nn.Module]]]
_known: weakref.WeakKeyDictionary[FCOS, Known] = weakref.WeakKeyDictionary()


def compile_parts(model: FCOS, backend: str = "inductor") -> None:
    """Compile the parts of `model` in place, when they are first used; where that is not within `many_graphs`, torch's
    own limit holds."""
    for part in parts_of(model):
        part.compile(fullgraph=True, dynamic=True, backend=backend)


def many_graphs() -> AbstractContextManager:
    """Within this context, torch compiles the same code for any number of models, sizes and precisions.

    It counts the graphs of all models of a process together, and its limit of 8 is an error where there must be one
    graph. A user's own functions keep the limit.
    """
    return torch._dynamo.config.patch(recompile_limit=MANY, accumulated_recompile_limit=MANY)


def with_compiled_parts(model: FCOS, backend: str = "inductor") -> FCOS:
    """Return a detector of the same weights whose parts are compiled, and leave `model` as it is.

    It is kept for the next call with this model.
    """
    known = _known.setdefault(model, {})
    parts = parts_of(model)
    if backend not in known or known[backend][1] != parts:
        known[backend] = copy_of_parts(model), parts
        compile_parts(known[backend][0], backend)
    compiled = known[backend][0]
    for ours, theirs in zip((compiled, *parts_of(compiled)), (model, *parts), strict=True):
        ours.training = theirs.training
    return compiled


def parts_of(model: FCOS) -> list[nn.Module]:
    towers = [x for x in (model.head.cls_tower, model.head.box_tower) if not isinstance(x, FusedTower)]
    return [*model.backbone.children(), model.fpn, *towers]


def copy_of_parts(model: FCOS) -> FCOS:
    """Copy a detector down to its parts, which share all that is in them, weights and hooks, with those of `model`."""
    found = copy_with_children(model)
    found.backbone, found.head = copy_with_children(model.backbone), copy_with_children(model.head)
    for module in (found.backbone, found.head):
        for name, child in module.named_children():
            module._modules[name] = copy.copy(child)
    found.fpn = copy.copy(model.fpn)
    return found


def copy_with_children(module: M) -> M:
    """Copy a module such that other children can be put into the copy."""
    found = copy.copy(module)
    found._modules = dict(module._modules)
    return found
