"""Tables of the package `datasets`: a folder of parquet files, or one that `save_to_disk` wrote, with images inside."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..annotations import Annotations
from ..images import FORMATS as IMAGE_FORMATS
from ..images import ImageError, read_image_bytes, turned_size
from .coco import UNKNOWN, coco_content
from .imagefolder import BOX_COLUMNS, CLASS_COLUMNS, class_names, column, objects_of_row, to_objects
from .places import Split, folders_below, is_of_macos, split_word


def find_tables(root: Path) -> dict[str, list[Split]]:
    """Find the splits of tables with a column of images and a column of objects.

    Raises:
        ValueError: there are such files, but the package `datasets` is not installed, or they have other columns.
    """
    groups: dict[str, list[Path]] = {}
    for folder in (root, *folders_below(root, 2)):
        if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
            groups.setdefault(split_word(folder.name) if folder != root else "", []).append(folder)
    if not groups:
        for path in sorted(path for folder in (root, *folders_below(root, 2)) for path in folder.glob("*.parquet")):
            if path.name == "metadata.parquet" or is_of_macos(path):  # metadata of an imagefolder, without images
                continue
            word = split_word(path.stem.split("-")[0]) or (split_word(path.parent.name) if path.parent != root else "")
            groups.setdefault(word, []).append(path)
    tables = {word: tuple(paths) for word, paths in groups.items()}
    names = _names(tables) if tables else []
    found = {}
    for word, paths in tables.items():
        source = Annotations(
            paths[0],
            functools.partial(read_table, paths, tuple(names)),
            functools.partial(read_table_image, paths),
            tuple(file for path in paths for file in (sorted(path.glob("*.arrow")) if path.is_dir() else [path])),
        )
        how = f"{paths[0].relative_to(root)}: this is a table of Hugging Face's datasets"
        found[word] = [Split(root, source, how)]
    return found


@functools.lru_cache(maxsize=8)
def open_table(paths: Sequence[Path]) -> Any:
    """Open files as one table of `datasets`, whose images stay as bytes. `ValueError` where that cannot be."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{paths[0]}: to read it, type: pip install datasets") from error
    if paths[0].is_dir():
        table = datasets.concatenate_datasets([datasets.load_from_disk(str(path)) for path in paths])
    else:
        table = datasets.load_dataset("parquet", data_files=[str(path) for path in paths], split="train")
    if _image_column(table) is None:
        raise ValueError(f"{paths[0]}: none of its columns holds images: {', '.join(table.column_names)}")
    if column(_object_features(table), BOX_COLUMNS) is None:
        raise ValueError(
            f"{paths[0]}: none of its columns holds boxes: {', '.join(table.column_names)}; rename it to 'objects', "
            "which has 'bbox' and 'category'"
        )
    return table.cast_column(_image_column(table), datasets.Image(decode=False))


def read_table(paths: Sequence[Path], names: Sequence[str]) -> dict:
    """Read a table as the content of a COCO JSON file; the `file_name` of an image is its row's number."""
    table = open_table(paths)
    rows = table.remove_columns([_image_column(table)])
    of_class, label_of = _own_names(table), {name: i for i, name in enumerate(names)}

    def objects(name: str, size: tuple[int, int]) -> list[dict]:
        return to_objects(_named(rows[int(name)], of_class), label_of)

    def size_of(name: str) -> tuple[int, int]:
        try:
            with Image.open(io.BytesIO(read_table_image(paths, name)), formats=IMAGE_FORMATS) as image:
                height, width = turned_size(image)
                return height, width
        except Exception:  # see `image_size`
            return UNKNOWN

    return coco_content(Path(), [f"{i:08d}" for i in range(len(table))], names, objects, size_of)


def read_table_image(paths: Sequence[Path], name: str) -> bytes:
    """Read the bytes of the image in a row. Raises `ImageError` if there is none, or its file cannot be read."""
    table = open_table(paths)
    cell = table[int(name)][_image_column(table)] or {"bytes": None, "path": None}
    if cell["bytes"] is not None:
        return cell["bytes"]
    if cell["path"] is None:
        raise ImageError(f"{paths[0] / name}: this row has no image; remove the row", "missing image file")
    try:
        return read_image_bytes(cell["path"])
    except ImageError as error:
        raise ImageError(f"{paths[0] / name}: {error}", error.kind) from error


def _names(tables: dict[str, tuple[Path, ...]]) -> list[str]:
    """Collect the classes of all splits: their order in the table's features, or sorted."""
    opened = [open_table(paths) for paths in tables.values()]
    if own := _own_names(opened[0]):
        return own
    return class_names(
        [row for table in opened for row in table.remove_columns([_image_column(table)])],
        next(iter(tables.values()))[0],
    )


def _own_names(table: Any) -> list[str]:
    """Return the names of a column of numbered classes; [] where classes are texts, or numbers without names."""
    feature = column(_object_features(table), CLASS_COLUMNS)
    feature = feature[0] if isinstance(feature, list) else feature
    return list(getattr(getattr(feature, "feature", feature), "names", None) or [])


def _object_features(table: Any) -> dict:
    """Return the features of the columns of objects: those under `objects`, or of the table itself."""
    features: Any = table.features.get("objects", table.features)
    features = getattr(features, "feature", features)
    if isinstance(features, list):
        features = features[0]
    return features if isinstance(features, dict) else {}


def _named(row: dict, names: list[str]) -> dict:
    """Replace numbers of classes by names."""
    objects = objects_of_row(row)
    if objects is None or "category" not in objects or not names:
        return row
    classes = [names[x] if isinstance(x, int) and 0 <= x < len(names) else None for x in objects["category"]]
    return {"objects": {"bbox": objects["bbox"], "category": classes}}


def _image_column(table: Any) -> str | None:
    """Return the name of the column of images, which are an `Image`, or bytes and path as pandas writes them."""
    for name in ("image", *table.column_names):
        feature = table.features.get(name)
        if type(feature).__name__ == "Image" or (isinstance(feature, dict) and feature.keys() == {"bytes", "path"}):
            return name
    return None
