"""`counted` writes a number with its noun, and `counted_classes` also some of the names."""

from __future__ import annotations

import re
from collections.abc import Sequence


def counted(number: float, noun: str, plural: str | None = None, form: str = "") -> str:
    """Write a number with its noun, such as "1 image", "2 images" and "2 boxes".

    Args:
        plural: of a noun that has more words than itself behind it, such as "images are" of "image is".
        form: of the number, as `format` has it.
    """
    text = format(number, form)
    if text == "1":
        return f"1 {noun}"
    if plural is None:
        stem = re.sub(r"(?<![aeou])y$", "ie", noun)
        hissing = stem.endswith(("s", "x", "ch", "sh")) and not stem.endswith("epoch")
        plural = stem + ("es" if hissing else "s")
    return f"{text} {plural}"


def counted_classes(number: int, names: Sequence[str] | None) -> str:
    """Write the number of classes with the first names, such as "4 classes (cat, dog, cow, ..)"."""
    return counted(number, "class") + (f" ({shortened(names)})" if names else "")


def shortened(texts: Sequence[str], most: int = 3) -> str:
    """Write the first texts of a list, with ".." for the others."""
    return ", ".join([*texts[:most], *[".."] * (len(texts) > most)])
