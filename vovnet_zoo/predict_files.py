"""`predict_files` detects objects in many images, and writes what it finds into a folder while it goes on."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Unpack

from .config import Pictures
from .draw import DISPLAY_SCORE
from .fcos import FCOS
from .files import free_to_write, write_whole
from .inference import PredictOptions, predict
from .results import ImageDetections
from .sources import Frame, frames

JPEG_QUALITY = 90


def predict_files(
    model: FCOS,
    images: Sequence[Path],
    out: Path,
    *,
    pictures: Pictures = "jpg",
    overwrite: bool = False,
    **options: Unpack[PredictOptions],
) -> int:
    """Write a picture of each image, and `detections.jsonl` with one line of JSON for each image, as they come.

    An image that cannot be used is reported on stderr and left out. After Ctrl-C the results so far are in the folder.

    Args:
        images: files, folders, patterns and lists of paths, see `sources.frames`.
        out: folder for the results, which is made.
        pictures: the format of the pictures, or "none".
        overwrite: write over files that are there already; never over an image that is read.
        options: options of `predict`, but `on_error`. Without `score_threshold`, the thresholds are the model's own,
            `thresholds` or `score_threshold` in its config; if it has none, the score that people are shown,
            `DISPLAY_SCORE`.

    Returns:
        The number of images that could not be used.

    Raises:
        ValueError: there is no image, or a file would be written over.
    """
    found_frames = list(frames(images, options.get("recursive", False)))
    if not found_frames:
        raise ValueError("no images; give files, folders, patterns or .txt lists of paths")
    taken: set[str] = set()
    names = [unique(Path(frame.name).stem, taken) for frame in found_frames]
    targets = [out / f"{name}.{pictures}" for name in names] if pictures != "none" else []
    results = out / "detections.jsonl"
    inputs = [Path(frame.name) for frame in found_frames]
    free_to_write([*targets, results], inputs, overwrite)
    out.mkdir(parents=True, exist_ok=True)

    own = model.config["thresholds"] or model.config["score_threshold"] or DISPLAY_SCORE
    threshold = options.get("score_threshold", own)
    if not isinstance(threshold, Mapping):
        options["score_threshold"] = 0.0  # lower scores are asked for too, to tell how far below the threshold they are
    bad: list[str] = []

    def report(frame: Frame, error: ValueError) -> None:
        print(f"vovnet-zoo: {error}", file=sys.stderr)
        bad.append(frame.name)

    options["on_error"] = report
    target_of = dict(zip((frame.name for frame in found_frames), targets, strict=False))
    done, count, began = 0, 0, time.perf_counter()
    results.unlink(missing_ok=True)  # a link is replaced, not followed
    with results.open("w", encoding="utf-8") as lines:
        try:
            stream = predict(model, found_frames, stream=True, **options)
            for found in stream:
                best = found["scores"].max().item() if len(found["scores"]) else None
                if not isinstance(threshold, Mapping):
                    for key in tuple(found):
                        found[key] = found[key][: int((found["scores"] >= threshold).sum())]
                picture = target_of.get(found.source)
                row = {"image": found.source, "picture": picture.name if picture else None, **as_lists(found)}
                if picture:
                    buffer = io.BytesIO()
                    quality = {"quality": JPEG_QUALITY} if pictures == "jpg" else {}
                    found.draw(score_threshold=0).save(buffer, "JPEG" if pictures == "jpg" else "PNG", **quality)
                    write_whole(picture, buffer.getvalue())
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
                lines.flush()
                done, count = done + 1, count + len(found["scores"])
                hint = ""
                if not len(found["scores"]) and best is not None and not isinstance(threshold, Mapping):
                    hint = f"; the best score, {best:.2f}, is below the threshold {threshold:g}"
                print(f"{found.source}: {len(found['scores'])} detections{hint}")
        finally:
            seconds = time.perf_counter() - began
            print(
                f"{done} of {len(found_frames)} images, {count} detections, {len(bad)} images could not be used; "
                f"{seconds:.1f} s, {done / seconds:.1f} images/s; {results}"
            )
    return len(bad)


def as_lists(found: ImageDetections) -> dict[str, list]:
    """Turn detections into lists for JSON; with the names of the classes, where they are known."""
    row: dict[str, list] = {key: value.tolist() for key, value in found.items()}
    return {**row, "names": found.names} if found.class_names else row


def unique(stem: str, taken: set[str]) -> str:
    """Return `stem`, with a number behind it if it is taken, and add the result to the taken names.

    Names that differ only in the case of letters are the same on some file systems.
    """
    name, number = stem, 2
    while name.casefold() in taken:
        name, number = f"{stem}_{number}", number + 1
    taken.add(name.casefold())
    return name
