"""`find_split` finds the images and the annotations of a split below a folder, in the layouts that tools write."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .annotations import Source, changed, file_of, image_problem, read_annotations
from .formats import FORMATS
from .formats.coco import lacks_size, with_sizes
from .formats.other import name_format
from .formats.places import Split, find_image, folders_below, image_index, is_of_macos, split_word
from .formats.yolo import find_yolo_of, is_dataset_file
from .parse import parse_json

logger = logging.getLogger(__name__)

OTHER_SPLIT = "give another --split, or --val JSON --val-images FOLDER"  # where a command scores a split


def find_split(root: str | Path, split: str) -> tuple[Path, Source]:
    """Find the folder of images and the annotations of a split ("train", "val", ...) below `root`.

    `root` may also be the data.yaml of a YOLO dataset.
    What is returned goes to `CocoDataset`. README and recipes/guides/data.md list the layouts and formats. The name of
    a split is read without case, and words such as "training", "valid" and "validation" mean the same as the usual
    ones. Where there is no "val", a "test" split takes its place, with a warning.

    Raises:
        ValueError: there is no such split or more than one; the message lists the files that are there.
    """
    found = locate(root, split)
    for text in found.warnings:
        logger.warning("%s: %s", root, text)
    return found.folder, found.source


def locate(root: str | Path, split: str, instead: str = "") -> Split:
    """Find a split as `find_split` does, and say how it was recognised; `instead` is as for `choose_split`."""
    root, found = Path(root), candidates(root, split)
    if len(found) == 1:
        return found[0]
    if found:
        pairs = "; ".join(f"{file_of(s.source)} with {s.folder}" for s in found)
        raise ValueError(f"{root}: several '{split}' splits, remove or rename all but one: {pairs}")
    if split == "val" and len(tests := candidates(root, "test")) == 1:
        doubt = "there is no 'val' split, so 'test' takes its place; the scores of a model chosen by them are too high"
        return dataclasses.replace(tests[0], doubt=doubt)
    broken = _broken(root, split_word(split) or split)
    raise ValueError(broken or f"{root}: no '{split}' split; {advice(root, split, instead)}")


def locate_file(file: Path, images: Path | None, split: str) -> Split:
    """Find the images of a split's COCO JSON file: in the folder `images`, or near the file.

    Raises:
        ValueError: the file is no COCO JSON, or none of its images is there.
    """
    if file.is_dir():
        raise ValueError(f"{file} is a folder; give a COCO JSON file, or give the folder as --data")
    if images is not None and not images.is_dir():
        raise ValueError(f"{images}: no such folder of images (for {file})")
    look = _look_or_error(file)
    root = images or (file.parent.parent if file.parent.name.lower() == "annotations" else file.parent)
    found = _images_of(file, look, [images] if images else _places(file, root, split), root, split)
    if found is None:
        where = f"in {images}" if images else f"near it; add --{split}-images FOLDER"
        raise ValueError(f"{file}: the images that it names ({look.names[0]}, ...) are not {where}")
    return found


def choose_split(
    root: Path | None, split: str, file: Path | None = None, images: Path | None = None, instead: str = ""
) -> Split:
    """Find a split in the COCO JSON `file` (--train, --val) if it is given, and below `root` (--data) otherwise.

    Where there is none, the message says what to type: `instead`, or the options of a training.
    """
    if file is not None:
        return locate_file(file, images, split)
    if images is not None:
        raise ValueError(f"{split}_images={str(images)!r}: it goes with --{split} JSON; with --data, leave it out")
    if root is None:
        raise ValueError(f"give --{split} JSON with --{split}-images FOLDER, or the dataset's folder as --data")
    return locate(root, split, instead)


def choose_whole(root: Path | None, file: Path | None = None, images: Path | None = None) -> Split:
    """Find the dataset of which --val-fraction keeps a part for scoring: one that is not split, or the train split."""
    if file is None and images is None and root is not None and (found := unsplit(root)) is not None:
        return found
    return choose_split(root, "train", file, images)


def unsplit(root: Path) -> Split | None:
    """Find the annotations of a dataset that is not split, or has a 'train' split only; None where there are none."""
    for split in ("", "train"):
        if len(found := candidates(root, split)) == 1:
            return found[0]
    return None


def split_candidates(root: str | Path, split: str) -> list[tuple[Path, Source]]:
    """List every (folder of images, annotations) that `find_split` may choose.

    Raises:
        ValueError: `root` is neither a folder nor a data.yaml.
    """
    return [(found.folder, found.source) for found in candidates(root, split)]


def candidates(root: str | Path, split: str) -> list[Split]:
    """List the splits of this name; "" stands for a dataset that is not split."""
    root = Path(root)
    word = split_word(split) or split
    if is_dataset_file(root):
        return find_yolo_of(root).get(word, [])
    if found := _usual(root, word):
        return found
    return _all_splits(root).get(word, [])


def _all_splits(root: Path) -> dict[str, list[Split]]:
    """List all splits of a folder, by their words; those of the only folder in it, where there are no others."""
    _refuse_archive(root)
    for reader in (_coco, *FORMATS):
        if found := reader(root):
            return found
    inner = [path for path in sorted(root.iterdir()) if os.path.isdir(path) and not path.name.startswith((".", "__"))]
    if len(inner) != 1 or os.path.realpath(root).startswith(os.path.realpath(inner[0])):  # a link to itself
        return {}
    return _all_splits(inner[0])


# ---- COCO -----------------------------------------------------------------------------------------------------------


def _usual(root: Path, word: str) -> list[Split]:
    """Find a split by the names that COCO and Roboflow use, without a look into a large annotation file."""
    if not root.is_dir():
        _refuse_archive(root)
        raise ValueError(f"{root}: no such folder")
    found = []
    for file in sorted((root / "annotations").glob("instances_*.json")):
        name = file.stem.removeprefix("instances_")
        if split_word(re.sub(r"\d+$", "", name), whole=True) == word or name == word:
            folders = [folder for folder in (root / name, root / "images" / name) if _has_images(folder, file)]
            found += [
                Split(folder, file, f"annotations/{file.name} and {folder.name}/: this is COCO") for folder in folders
            ]
    for file in sorted(root.glob("*/_annotations.coco.json")):
        if split_word(file.parent.name, whole=True) == word and _has_images(file.parent, file):
            how = f"{file.parent.name}/{file.name}: this is COCO, as Roboflow writes it"
            found.append(Split(file.parent, file, how))
    return found


def _has_images(folder: Path, file: Path) -> bool:
    """Tell whether images of an annotation file lie in a folder, and nothing of them has to be looked up.

    A large file is trusted, and so is one that is broken, which its reader will tell.
    """
    if not folder.is_dir() or file.stat().st_size > SMALL:
        return folder.is_dir()
    look = _look(file)
    return not look.names or (look.sized and _count(folder, look) > 0)


SMALL = 4_000_000  # bytes of an annotation file that is read in less than a second


def _json_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.json")) if not is_of_macos(path)]


def _coco(root: Path) -> dict[str, list[Split]]:
    """Find COCO JSON files of any name, and the images that they name."""
    files: dict[str, list[Path]] = {}
    for folder in (root, *folders_below(root, 3)):
        inside = [path for path in _json_files(folder) if not OTHER_TASKS.match(path.name)]
        if len(inside) > MANY:  # a file for each image, as labelme writes them
            continue
        for path in inside:
            if _look(path).names:
                files.setdefault(split_word(path.stem) or split_word_of_folders(path, root), []).append(path)
    found: dict[str, list[Split]] = {}
    for word, paths in files.items():
        best = [path for path in paths if path.name.startswith("instances_")] or paths
        for path in best:
            look = _look(path)
            place = _images_of(path, look, _places(path, root, word), root, word)
            if place is None and len(best) == 1:
                option = "--val" if word in ("val", "test") else "--train"
                raise ValueError(
                    f"{path} is COCO, but the images that it names ({look.names[0]}, ...) are not below {root}; put "
                    f"them there, or type where they are: {option} {path} {option}-images FOLDER"
                )
            found.setdefault(word, []).extend([place] if place else [])
    return found


OTHER_TASKS = re.compile("captions_|person_keypoints_|panoptic_|stuff_|image_info_")
MANY = 50  # JSON files in one folder


def split_word_of_folders(path: Path, root: Path) -> str:
    """Return the word of a split among the names of the folders between `root` and a file; "" where there is none."""
    names = reversed(path.relative_to(root).parts[:-1])
    return next((word for name in names if (word := split_word(name))), "")


class Look(NamedTuple):
    """A look into a COCO JSON file gives these facts."""

    names: tuple[str, ...] = ()  # some file names of images; () where the file is no COCO JSON
    sized: bool = True  # whether images have a width and a height


def _look(file: Path) -> Look:
    if not os.path.isfile(file):  # a link to nowhere, a pipe
        return Look()
    about = file.stat()
    return _look_again(file, about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=64)
def _look_again(file: Path, stamp: int, size: int) -> Look:
    try:
        return _look_or_error(file)
    except ValueError:
        return Look()


def _look_or_error(file: Path) -> Look:
    images = [image for image in read_annotations(file)["images"] if isinstance(image, dict)]
    names = [image["file_name"] for image in images if isinstance(image.get("file_name"), str)]
    if not names:
        raise ValueError(f"{file}: no image in it has a 'file_name'")
    return Look(tuple(names[:: max(1, len(names) // 20)]), not any(map(lacks_size, images)))


def _broken(root: Path, word: str) -> str:
    """Say which JSON file, whose name is that of a split, cannot be parsed; "" where there is none."""
    if is_dataset_file(root):
        return ""
    for folder in (root, *folders_below(root, 3)):
        for path in _json_files(folder)[:MANY]:
            if word and (split_word(path.stem) or split_word_of_folders(path, root)) == word and os.path.isfile(path):
                try:
                    parse_json(path.read_bytes())
                except (ValueError, RecursionError) as error:
                    return f"{path}: not a JSON file: {error}"
    return ""


def _places(file: Path, root: Path, word: str) -> list[Path]:
    """List the folders in which the images of a split's annotation file may lie, the likeliest first."""
    folder = file.parent
    near = [folder / "images", folder / "data", folder, root, root / "images", root / "data"]
    places = [place for place in dict.fromkeys([*near, *folders_below(root, 2)]) if place.is_dir()]
    # files of the same name can be in several splits, and in copies of the dataset further below
    return sorted(
        places, key=lambda place: (split_word(place.name) != word, split_word(place.name) != "", len(place.parts))
    )


def _images_of(file: Path, look: Look, places: Sequence[Path], root: Path, word: str) -> Split | None:
    """Choose the folder with most of the named images; failing that, look for their last names anywhere in `root`."""
    counts = [_count(place, look) for place in places]
    if max(counts, default=0) > 0:
        place = places[counts.index(max(counts))]
        source = file if look.sized else changed(file, functools.partial(with_sizes, folder=place))
        return Split(place, source, f"{file.name} and {place.name}/: this is COCO")
    index = image_index(root)
    if any(find_image(name, index, word) for name in look.names):
        how = f"{file.name}: this is COCO; its images are found by the last parts of their names"
        moved = changed(file, functools.partial(_moved, root=root, word=word))
        return Split(root, moved if look.sized else changed(moved, functools.partial(with_sizes, folder=root)), how)
    return None


def _count(place: Path, look: Look) -> int:
    """Count the images in a folder whose names can be used as they are."""
    usable = (x for x in look.names if image_problem({"id": 0, "file_name": x, "width": 1, "height": 1}) is None)
    return sum(os.path.isfile(place / name) for name in usable)


def _moved(coco: dict, root: Path, word: str) -> dict:
    """Give each image the path below `root` of the file that is meant, see `find_image`."""
    index = image_index(root)
    images = [
        image | {"file_name": find_image(image["file_name"], index, word) or image["file_name"]}
        if isinstance(image, dict) and isinstance(image.get("file_name"), str)
        else image
        for image in coco["images"]
    ]
    return coco | {"images": images}


# ---- what to say where nothing is found -----------------------------------------------------------------------------


def _refuse_archive(root: Path) -> None:
    """Raise `ValueError` with the command to type, where `root` is an archive, or a folder with nothing but one."""
    path = root
    if root.is_dir():
        inside = [path for path in root.iterdir() if not path.name.startswith(".")]
        path = inside[0] if len(inside) == 1 and os.path.isfile(inside[0]) else root
    if not path.is_file():
        return
    target = path.with_suffix("")
    if zipfile.is_zipfile(path):
        raise ValueError(f"{path} is an archive; type: python -m zipfile -e {path} {target}; then give --data {target}")
    if tarfile.is_tarfile(path):
        raise ValueError(
            f"{path} is an archive; type: mkdir {target} && tar -xf {path} -C {target}; then give --data {target}"
        )
    if root.is_file():
        raise ValueError(
            f"{root} is a file; give the dataset's folder or data.yaml, or a COCO JSON as --train, or --val to score"
        )


def advice(root: Path, split: str, instead: str = "") -> str:
    """Say what was looked for, what is there, and what to type; `instead` is as for `choose_split`."""
    if is_dataset_file(root):
        words = ", ".join(word for word in ("train", "val", "test") if candidates(root, word))
        fraction = " type --val-fraction 0.2 to keep a fifth of its images for scoring, or" if words == "train" else ""
        return f"it names {words} only;{'' if instead else fraction} {instead or f'write {split!r} into it'}"
    there = [str(path.relative_to(root)) for path in sorted([*root.iterdir(), *root.glob("annotations/*")])]
    listing = f"{', '.join(there[:20]) or 'nothing'}{', ...' if len(there) > 20 else ''}"
    whole = unsplit(root) if split in ("train", "val") and not instead else None
    if whole is not None:
        return (
            f"looked for annotations/instances_{split}.json and other names of COCO, YOLO and VOC, and found "
            f"{file_of(whole.source)} only; type --val-fraction 0.2 to keep a fifth of its images for scoring, or name "
            f"both files: --train JSON --train-images FOLDER --val JSON --val-images FOLDER; there is: {listing}"
        )
    if known := name_format(root):
        return known
    instead = instead or "name your files: --train JSON --train-images FOLDER --val JSON --val-images FOLDER"
    if others := [word for word in ("train", "val", "test") if len(candidates(root, word)) == 1]:
        instead += f"; there are the splits: {', '.join(others)}"
    return (
        f"looked for COCO (annotations/instances_{split}.json with {split}/ or images/, "
        f"{split}/_annotations.coco.json, {split}.json), YOLO (data.yaml, or images/{split}/ with labels/{split}/), "
        f"Pascal VOC (.xml) and Hugging Face ({split}/metadata.jsonl); {instead}; there is: {listing}"
    )
