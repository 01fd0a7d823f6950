"""`parse_grouped` reads a preset's name and its options from a command line; `--help` shows the options in groups."""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields, make_dataclass
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

from vovnet_zoo.commands import check_first

T = TypeVar("T")


def parse_grouped(
    presets: Mapping[str, tuple[str, T]],
    first: Sequence[str],
    sections: Mapping[str, str],
    args: Sequence[str] | None = None,
    description: str = "",
) -> T:
    """Return the preset that the arguments name, changed by the options after it.

    Args:
        presets: description and configuration of each; these are of one frozen dataclass.
        first: the names of the options that stand first.
        sections: the title of each group, by the first of its fields in the dataclass.
    """
    args = sys.argv[1:] if args is None else args
    check_first(args, presets, "preset")
    if args[1:] and args[0] in presets and not args[1].startswith("-"):
        advice = "give one preset" if args[1] in presets else f"after the preset come options, such as --data {args[1]}"
        raise ValueError(f"{' '.join(args[:2])}: {advice}")
    kind = type(next(config for _, config in presets.values()))
    hints, docs = get_type_hints(kind), read_docs(kind)
    groups = {
        title: make_dataclass(title, [(x, Annotated[hints[x], tyro.conf.arg(help=docs[x])]) for x in names])
        for title, names in group_fields(kind, first, sections).items()
    }
    # The group without a name is shown first, as "options".
    names = {title: tyro.conf.arg(name="" if title == FIRST else title) for title in groups}
    whole = make_dataclass(kind.__name__, [(title, Annotated[group, names[title]]) for title, group in groups.items()])

    def grouped(config: T) -> Any:
        parts = {title: [getattr(config, field.name) for field in fields(group)] for title, group in groups.items()}
        return whole(**{title: groups[title](*values) for title, values in parts.items()})

    found = tyro.extras.overridable_config_cli(
        {name: (about, grouped(config)) for name, (about, config) in presets.items()},
        args=args,
        description=description,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return kind(**{x: value for title in groups for x, value in vars(getattr(found, title)).items()})


FIRST = "first"


def group_fields(kind: type, first: Sequence[str], sections: Mapping[str, str]) -> dict[str, list[str]]:
    """Sort the names of a dataclass's fields into groups, which are in the order of `sections`."""
    groups, title = {FIRST: list(first), **{title: [] for title in sections.values()}}, FIRST
    for name in (field.name for field in fields(kind)):
        title = sections.get(name, title)
        if name not in first:
            groups[title].append(name)
    return groups


def read_docs(kind: type) -> dict[str, str]:
    """Read the docstring below each field in the source of a dataclass, and of those that it inherits from."""
    docs = {}
    for part in reversed(kind.__mro__[:-1]):  # without `object`
        body: list[Any] = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0].body
        docs |= {
            field.target.id: " ".join(doc.value.value.split())
            for field, doc in itertools.pairwise(body)
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr)
        }
    return docs
