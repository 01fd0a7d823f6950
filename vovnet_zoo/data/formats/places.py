"""These functions look through the folders of a dataset."""

from __future__ import annotations

import codecs
import itertools
import os
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ...files import read_bytes
from ..annotations import Source
from ..images import FORMATS

WORDS = {
    "train": ("train", "training", "trainset"),
    "val": ("val", "valid", "validation", "valset", "dev"),
    "test": ("test", "testing", "testset"),
}
ENDINGS = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}


@dataclass(frozen=True)
class Split:
    """A split of a dataset has a folder of images, and annotations whose `file_name`s are relative to it."""

    folder: Path
    source: Source
    how: str  # by what it was recognised
    doubt: str = ""  # what the user should know before the scores are trusted
    left_out: tuple[str, ...] = ()  # what of the dataset cannot be used, a text for each file
    remarks: tuple[str, ...] = ()  # what about the file that describes the dataset may be a mistake

    @property
    def warnings(self) -> list[str]:
        """What a command that uses the split should say, each in one line."""
        more = f" ({len(self.left_out) - 1} more like it; check-data lists them)" if len(self.left_out) > 1 else ""
        return [*[self.doubt] * bool(self.doubt), *self.remarks, *(f"{text}{more}" for text in self.left_out[:1])]


def split_word(name: str, whole: bool = False) -> str:
    """Return "train", "val" or "test" where a name has one word that means it, and "" otherwise.

    Case and numbers do not matter, but a capital begins a word; with `whole`, the name is that word alone.
    """
    words = [name.lower()] if whole else re.findall("[a-z]+", re.sub("([a-z])([A-Z])", r"\1 \2", name).lower())
    found = {split for split, meaning in WORDS.items() for word in words if word in meaning}
    return found.pop() if len(found) == 1 else ""


def folders_below(root: Path, depth: int) -> list[Path]:
    """List the folders below `root`, to a depth, without hidden ones and those of macOS' archives.

    A link to a folder around it is left out.
    """
    found = []
    if depth > 0:
        with os.scandir(root) as entries:
            inner = sorted(
                e.name
                for e in entries
                if _is_folder(e) and not e.name.startswith((".", "__MACOSX")) and not _leads_up(e)
            )
        for name in inner:
            found += [root / name, *folders_below(root / name, depth - 1)]
    return found


def _is_folder(entry: os.DirEntry) -> bool:
    """Tell whether an entry is a folder, or a link to one; only for a link does the disk have to be asked again."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _leads_up(entry: os.DirEntry) -> bool:
    """Tell whether a folder is a link to itself or to a folder around it."""
    return entry.is_symlink() and Path(os.path.realpath(entry.path)) in Path(os.path.abspath(entry.path)).parents


def is_image(path: str | Path) -> bool:
    """Tell whether a name ends as one of an image does, and macOS keeps no attributes of another file in it."""
    return os.path.splitext(path)[1].lower() in ENDINGS and not is_of_macos(path)


def is_of_macos(path: str | Path) -> bool:
    """Tell whether a file, by its name, holds the attributes of another: ._photo.jpg of photo.jpg."""
    return os.path.basename(path).startswith("._")


def images_below(folder: Path) -> list[Path]:
    """List the image files in a folder and below, sorted. Links to folders are followed, each folder once."""
    found, seen = [], set()
    for at, inner, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(at))
        inner[:] = [name for name in inner if os.path.realpath(os.path.join(at, name)) not in seen]
        found += [Path(at, name) for name in names if is_image(name)]
    return sorted(found)


def text_lines(path: Path, kind: str) -> list[str]:
    """Read the lines of a text file as `numbered_lines` does, without their numbers."""
    return [line for _, line in numbered_lines(path, kind)]


def numbered_lines(path: Path, kind: str) -> list[tuple[int, str]]:
    """Read the lines of a text file that are not empty, stripped, with their numbers, which begin with 1.

    The error message calls the file a `kind`.

    Raises:
        ValueError: the file cannot be read, or is neither UTF-8 nor UTF-16 with its mark.
    """
    data = read_bytes(path, kind)
    encoding = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        lines = data.decode(encoding).splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} of the {kind} is no UTF-8; save it as UTF-8") from error
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


# ---- images by their names ------------------------------------------------------------------------------------------


def image_index(root: Path) -> dict[str, list[tuple[str, ...]]]:
    """Map the last name of each image below `root`, in lower case, to the parts of the paths that end so."""
    index: dict[str, list[tuple[str, ...]]] = {}
    for path in images_below(root):
        index.setdefault(path.name.lower(), []).append(path.relative_to(root).parts)
    return index


def find_image(name: str, index: dict[str, list[tuple[str, ...]]], word: str = "") -> str | None:
    """Find the image that a tool meant by a path of another machine, or by an address; None where it is in doubt.

    The last parts of the paths must agree, but for the case of letters; of several images, the one with most parts in
    common is taken, then the one in a folder of the split `word`.
    """
    for parts in (path_parts(name), path_parts(decoded(name))):
        same = index.get(parts[-1].lower(), []) if parts else []
        same = [path for path in same if path[-1] == parts[-1]] or same
        ranks = [(common_end(path, parts), any(split_word(x) == word for x in path[:-1])) for path in same]
        if ranks and ranks.count(best := max(ranks)) == 1:
            return "/".join(same[ranks.index(best)])
    return None


def path_parts(name: str) -> list[str]:
    """Split a path, of Windows too, into its parts without those that are dots."""
    return [part for part in re.split(r"[\\/]+", name) if part not in ("", ".", "..")]


def decoded(name: str) -> str:
    """Return the path in an address: without server and query, and with its %20 as spaces.

    Label Studio's /data/local-files/?d=PATH has it in the query.
    """
    try:
        address = urllib.parse.urlsplit(name)
    except ValueError:
        return ""
    inside = urllib.parse.parse_qs(address.query).get("d")
    return inside[0] if inside else urllib.parse.unquote(address.path)


def common_end(path: Sequence[str], other: Sequence[str]) -> int:
    """Count the parts at the end in which two paths agree, whatever the case of letters."""
    pairs = zip(reversed(path), reversed(other), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0].lower() == pair[1].lower(), pairs))
