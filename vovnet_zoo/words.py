"""`counted` writes a number with its noun."""

from __future__ import annotations

import re


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
