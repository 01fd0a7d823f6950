"""These functions check arguments of public functions; their messages name the argument."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn


def check_number(name: str, value: Any, least: float, most: float, *, whole: bool = False, why: str = "") -> None:
    """Raise `ValueError` unless `value` is a number from `least` to `most`, a `whole` one if so asked.

    `why` is added to the message, with its own "; ".
    """
    if not is_number(value, least, most, Integral if whole else Real):
        wanted = "a whole number" if whole else "a number"
        raise ValueError(f"{name}={reprlib.repr(value)}: give {wanted} from {least} to {most}{why}")


def is_number(value: Any, least: float, most: float, kind: type = Real) -> bool:
    """Tell whether `value` is a number of a kind, not a bool, from `least` to `most`; NaN is not."""
    return isinstance(value, kind) and not isinstance(value, bool) and bool(least <= value <= most)  # type: ignore[operator]


def check_flag(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={reprlib.repr(value)}: give True or False")


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise `ValueError` unless `value` is one of some texts."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={reprlib.repr(value)}: give {' or '.join(map(repr, choices))}")


def check_options(owner: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Raise `TypeError`, as Python does for any unknown argument, unless all names of options are known."""
    known = list(known)
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"{owner} has no {' or '.join(map(repr, unknown))}; there are {', '.join(known)}")


def check_path(name: str, value: Any) -> None:
    """Raise `ValueError` unless `value` is a path, as text or as a path object, and no name of a home folder."""
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"{name}={reprlib.repr(value)}: give a path, not {type(value).__name__}")
    text = os.fspath(value)
    if text[:1] == "~" and not os.path.lexists(text.partition("/")[0]):
        raise ValueError(f"{name}={text!r:.300}: Python does not replace ~ by your folder; os.path.expanduser does")


def check_kind(name: str, value: Any, kind: type | tuple[type, ...], wanted: str) -> None:
    """Raise `ValueError` unless `value` is of a type; `wanted` says in words of which."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {wanted}, got {type(value).__name__}: {reprlib.repr(value)}")


def check_tensor(
    name: str, value: Any, shape: tuple[str | int, ...], kind: str = "floating-point", why: str = ""
) -> None:
    """Raise `ValueError` unless `value` is a tensor of a shape and kind.

    Args:
        shape: a whole number is the size of a dimension, a letter stands for any size.
        kind: "floating-point", "whole" (integers, not bool), or "" for any.
        why: is added to the message, with its own "; ".
    """
    if isinstance(value, Tensor) and value.ndim == len(shape) and has_kind(value, kind):
        if all(isinstance(n, str) or n == size for n, size in zip(shape, value.shape, strict=True)):
            return
    wanted = f"a {kind} tensor [{','.join(map(str, shape))}]" if kind else f"a tensor [{','.join(map(str, shape))}]"
    got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(f"{name} must be {wanted}, got {got}{why}")


def are_xyxy(boxes: Tensor) -> Tensor:
    """Tell which of the boxes [...,4] are finite, with x1 <= x2 and y1 <= y2."""
    return boxes.isfinite().all(-1) & (boxes[..., :2] <= boxes[..., 2:]).all(-1)


def refuse_not_xyxy(name: str, boxes: Tensor) -> None:
    """Raise `ValueError` unless all boxes [N,4] are finite and xyxy; boxes of a GPU are waited for."""
    if not (right := are_xyxy(boxes)).all():
        raise ValueError(
            f"{name} must be finite and xyxy, with x1 <= x2 and y1 <= y2, got {boxes[~right][0].tolist()}; "
            "torchvision.ops.box_convert turns other boxes"
        )


def has_kind(tensor: Tensor, kind: str) -> bool:
    """Tell whether a tensor's numbers are of a kind of `check_tensor`."""
    if kind == "whole":
        return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return tensor.is_floating_point() if kind else True


def check_model(name: str, value: Any, kind: type[nn.Module]) -> None:
    """Raise `ValueError` unless `value` is a model of a kind, or what torch.compile makes of one.

    The message tells how to get the model out of a wrapper such as DistributedDataParallel.
    """
    if isinstance(value, kind) or isinstance(getattr(value, "_orig_mod", None), kind):
        return
    hint = ""
    if isinstance(getattr(value, "module", None), nn.Module):
        hint = f"; give {name}.module, which it wraps"
    elif isinstance(value, str | os.PathLike):
        hint = f"; vovnet_zoo.load_detector({str(value)!r:.200}) loads one"
    raise ValueError(f"{name} must be a {_full_name(kind)}, got {_full_name(type(value))}{hint}")


def _full_name(kind: type) -> str:
    """Name a class with its package, since torchvision has an FCOS too."""
    package = kind.__module__.partition(".")[0]
    return kind.__name__ if package == "builtins" else f"{package}.{kind.__name__}"
