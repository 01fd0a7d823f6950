"""`check_options` compares the options of a recipe with their types and ranges, before anything starts."""

from __future__ import annotations

import math
import types
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints


class Range(NamedTuple):
    """A number lies between two others; with `inside`, it must not equal one of them."""

    low: float
    high: float = math.inf
    inside: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, Real)
        return self.low < value < self.high if self.inside else self.low <= value <= self.high

    def __str__(self) -> str:
        if self.inside:
            return f"above {self.low}" + (f" and below {self.high}" if self.high < math.inf else "")
        return f"from {self.low} to {self.high}" if self.high < math.inf else f"of {self.low} or more"


def check_options(config: Any, ranges: dict[str, Range]) -> None:
    """Raise `ValueError` unless each field of a dataclass has its type, is one of its choices, and is in its range.

    Args:
        config: a dataclass whose fields are numbers, strings, paths, flags, tuples of numbers, or None.
        ranges: the range of each field that is a number, or a tuple of numbers. None is in every range.
    """
    kinds = get_type_hints(type(config))
    for name in (field.name for field in fields(config)):
        value = getattr(config, name)
        if problem := _problem(value, kinds[name], ranges.get(name)):
            raise ValueError(f"{name}={value!r}: give {problem}")


def _problem(value: Any, kind: Any, range: Range | None) -> str | None:
    """Say what an option must be; None if it is so already."""
    if get_origin(kind) in (Union, types.UnionType):
        kinds = [x for x in get_args(kind) if x is not type(None)]
        if value is None and type(None) in get_args(kind):
            return None
        return _problem(value, kinds[0], range)
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return None if value in choices else f"one of {', '.join(map(repr, choices))}"
    if get_origin(kind) is tuple:
        of = get_args(kind)
        many = of[-1] is not Ellipsis and len(of)
        if isinstance(value, (tuple, list)) and len(value) == (many or len(value)):
            return next((f"only {p}" for x in value if (p := _problem(x, of[0], range))), None)
        return f"{many} numbers" if many else "several numbers"
    if kind in (int, float):
        base = Integral if kind is int else Real
        right = isinstance(value, base) and not isinstance(value, bool) and math.isfinite(value)
        noun = "a whole number" if kind is int else "a number"
        return None if right and (range is None or value in range) else f"{noun} {range}" if range else noun
    return None if isinstance(value, kind) else f"a {kind.__name__}"
