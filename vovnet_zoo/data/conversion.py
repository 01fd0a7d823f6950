"""`convert_data` writes a dataset of any known format as COCO JSON beside its images."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

from PIL import UnidentifiedImageError
from tqdm import tqdm

from ..files import staged
from .annotations import Annotations, changed, difficult_as_crowd, image_problem, read_annotations
from .formats.coco import WAIT
from .formats.other import name_format
from .formats.places import Split
from .images import open_image
from .layouts import candidates, locate, unsplit

logger = logging.getLogger(__name__)


def convert_data(source: str | Path, target: str | Path, *, difficult_is_crowd: bool = False) -> dict[str, Path]:
    """Write annotations/instances_{split}.json and the images of each split into a new folder.

    Images are links to the same file where the disk allows that, and copies otherwise. A dataset that is not split
    becomes "train".

    Returns:
        The annotation file of each split.

    Raises:
        ValueError: no split is found in `source`, or several of one name; `target` is there already; or an image has a
            name outside its folder.
    """
    root, out = Path(source), Path(target)
    if out.exists():
        raise ValueError(f"{out} is there already; give the name of a new folder")
    splits = {word: locate(root, word) for word in ("train", "val", "test") if candidates(root, word)}
    if not splits and (whole := unsplit(root)):
        splits = {"train": whole}
    if not splits:
        known = name_format(root) or "no annotations of COCO, YOLO, Pascal VOC or Hugging Face are found there"
        raise ValueError(f"{root}: {known}")
    for text in dict.fromkeys(text for split in splits.values() for text in split.warnings):
        logger.warning("%s", text)
    with staged(out) as folder:
        (folder / "annotations").mkdir()
        for word, split in splits.items():
            (folder / word).mkdir()
            content = write_images(split, folder / word, difficult_is_crowd)
            (folder / "annotations" / f"instances_{word}.json").write_text(json.dumps(content), encoding="utf-8")
    return {word: out / "annotations" / f"instances_{word}.json" for word in splits}


def write_images(split: Split, folder: Path, difficult_is_crowd: bool) -> dict:
    """Put the images of a split into a folder; returns its annotations with the images' new names."""
    coco = read_annotations(changed(split.source, difficult_as_crowd) if difficult_is_crowd else split.source)
    images, inside = [], isinstance(split.source, Annotations) and split.source.read_image
    bar = tqdm(coco["images"], desc="link images", unit="image", delay=WAIT, leave=False, disable=None)
    for image in bar:
        if problem := image_problem(image):
            raise ValueError(f"{split.folder}: {problem}")
        name = image["file_name"]
        if inside:
            data = inside(name)
            try:
                format = open_image(data).format or "png"
            except UnidentifiedImageError as error:
                where = split.source.file / name  # type: ignore[union-attr]  # `inside` is of Annotations
                raise ValueError(f"{where}: this row has no image that can be read; remove the row") from error
            name += f".{format.lower()}"
            (folder / name).write_bytes(data)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(split.folder / name, folder / name)
        images.append(image | {"file_name": name})
    return {"images": images, "annotations": coco["annotations"], "categories": coco["categories"]}


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link, or a copy on another disk, unless `target` is there. `ValueError` where `source` is not."""
    try:
        os.link(source.resolve(), target)
    except FileNotFoundError as error:
        raise ValueError(f"{source}: no such image; restore it, or remove its entry") from error
    except FileExistsError:  # two entries name the same image
        return
    except OSError:
        shutil.copyfile(source, target)
