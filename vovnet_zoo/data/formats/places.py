"""These functions look through the folders of a dataset."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..annotations import Source
from ..images import FORMATS

WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
ENDINGS = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}


@dataclass(frozen=True)
class Split:
    """A split of a dataset has a folder of images, and annotations whose `file_name`s are relative to it."""

    folder: Path
    source: Source
    how: str  # by what it was recognised
    doubt: str = ""  # what the user should know before the scores are trusted


def split_word(name: str, whole: bool = False) -> str:
    """Return "train", "val" or "test" where a name has one word that means it, and "" otherwise.

    Case and numbers do not matter; with `whole`, the name is that word alone.
    """
    words = [name.lower()] if whole else re.findall("[a-z]+", name.lower())
    found = {split for split, meaning in WORDS.items() for word in words if word in meaning}
    return found.pop() if len(found) == 1 else ""


def folders_below(root: Path, depth: int) -> list[Path]:
    """List the folders below `root`, to a depth, without hidden ones and those of macOS' archives."""
    found = []
    if depth > 0:
        with os.scandir(root) as entries:
            inner = sorted(
                e.name for e in entries if os.path.isdir(e.path) and not e.name.startswith((".", "__MACOSX"))
            )
        for name in inner:
            found += [root / name, *folders_below(root / name, depth - 1)]
    return found


def is_image(path: str | Path) -> bool:
    """Tell whether a name ends as one of an image does."""
    return os.path.splitext(path)[1].lower() in ENDINGS


def images_below(folder: Path) -> list[Path]:
    """List the image files in a folder and below, sorted."""
    return sorted(Path(at, name) for at, _, names in os.walk(folder) for name in names if is_image(name))


def image_index(root: Path) -> dict[str, str]:
    """Map the name of each image file below `root` to its path from there; a name that occurs twice is left out."""
    paths = images_below(root)
    counts = Counter(path.name for path in paths)
    return {path.name: path.relative_to(root).as_posix() for path in paths if counts[path.name] == 1}
