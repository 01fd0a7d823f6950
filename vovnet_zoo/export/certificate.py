"""The certificate says how far the detections of an exported file are from PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import Thresholds
from ..fcos import FCOS, Predictions
from ..inference import Prepared, detect, evaluating, prepare, run_network
from ..results import Detections
from ..sources import Frame, Source, frames
from .blame import as_batch, blame, inputs_of, relative_difference
from .pairs import Bounds, differences, first, is_within
from .registry import Written
from .runtimes import load_exported, open_file
from .ties import is_right

DRAWN, DRAWN_TRIES = 4, 32  # pictures that are compared where the user gives none, and how many are drawn for them


def choose_images(
    model: FCOS, images: Source | None, thresholds: Thresholds, size: tuple[int, int] | None, least_side: int = 32
) -> tuple[list[Prepared], bool]:
    """Prepare the images that are compared, and tell whether they were drawn.

    Raises:
        ValueError: the model finds nothing in any of them, so that nothing could be compared.
    """
    source = frames(images) if images is not None else map(draw, range(DRAWN_TRIES))
    chosen, found = [], 0
    for frame in source:
        item = prepare(frame, model.config, fixed=size, least=least_side)
        assert isinstance(item, Prepared)
        count = len(reference(model, item, thresholds).scores) if images is None else 1
        if count:
            chosen.append(item)
        found += count
        if images is None and len(chosen) == DRAWN:
            break
    if not chosen:
        what = f"{DRAWN_TRIES} drawn pictures" if images is None else "the images"
        raise ValueError(
            f"the model finds nothing in {what}, so there is nothing to compare; give images with objects (--images)"
        )
    return chosen, images is None


def draw(number: int) -> Frame:
    """Draw a picture of coloured rectangles and ellipses on noise; the same number gives the same picture."""
    random = np.random.default_rng(number)
    height, width = random.integers(96, 480, 2)
    pixels = random.integers(0, 80, (height, width, 3), dtype=np.uint8)
    rows, columns = np.mgrid[:height, :width]
    for _ in range(random.integers(3, 12)):
        y, x = random.integers(0, height), random.integers(0, width)
        h, w = random.integers(6, max(height, width) // 3, 2)
        dy, dx = abs(rows - y) / h, abs(columns - x) / w
        inside = dy**2 + dx**2 < 1 if random.random() < 0.5 else np.maximum(dy, dx) < 1
        pixels[inside] = random.integers(0, 256, 3)
    return Frame(f"drawn picture {number}", torch.from_numpy(pixels).permute(2, 0, 1))


def certify(
    model: FCOS, thresholds: Thresholds, written: Written, images: Sequence[Prepared], bounds: Bounds
) -> dict[str, Any]:
    """Compare the detections of a file with the model's on all images, and return what was found.

    Where every detection must be found by both, one that only one side has is let pass if rounding decides (a tie).

    Raises:
        ValueError: a number is out of bounds; the message names the worst image and the first layer that differs.
    """
    exported = load_exported(written.file)
    both, ties, all_of_them, worst, largest = 0, 0, 0, (-1.0, images[0]), {"box": 0.0, "score": 0.0}
    for item in images:
        want, got = reference(model, item, thresholds), first(exported(*as_batch(item)))
        shared, apart = differences(want, got)
        count = len(want.scores) + len(got.scores)
        lost = count - 2 * shared
        doubtful = bounds.matched == 1 and (lost or not is_within(bounds, 1.0, apart))
        if doubtful and differ_by_ties(model, item, got, thresholds, bounds):
            shared, apart = differences(want, got, bounds)  # a near copy of a box, which NMS chose instead, is no pair
            ties, lost = ties + count - 2 * shared, 0
        both, all_of_them = both + 2 * shared, all_of_them + count
        largest = {key: max(value, apart[key]) for key, value in largest.items()}
        badness = lost + apart["box"] / (bounds.box or 1) + apart["score"] / (bounds.score or 1)
        worst = max(worst, (badness, item), key=lambda pair: pair[0])
    if not all_of_them:
        raise ValueError(
            "the model finds nothing in the images, so there is nothing to compare; give others (--images)"
        )
    matched = both / all_of_them
    if not is_within(bounds, (both + ties) / all_of_them, largest):
        raise ValueError(
            f"{written.format.runtime} computes something else than PyTorch, so the file was deleted: {matched:.1%} "
            f"of {all_of_them - both // 2} detections match (at least {bounds.matched:.1%}), boxes differ by up to "
            f"{largest['box']:.2g} px (at most {bounds.box:g}), scores by {largest['score']:.2g} (at most "
            f"{bounds.score:g}); worst image: {worst[1].name}; {blame(written, worst[1], bounds)}"
        )
    return {
        "images": len(images),
        "detections": all_of_them - both // 2,
        "matched": matched,
        "ties": ties,
        "largest_box_difference": largest["box"],
        "largest_score_difference": largest["score"],
        "worst_image": worst[1].name,
        "bounds": asdict(bounds),
    }


def certify_network(model: FCOS, written: Written, images: Sequence[Prepared], bounds: Bounds) -> dict[str, Any]:
    """Compare the outputs of a network alone with the model's on all images, and return what was found.

    Raises:
        ValueError: a difference is out of bounds; the message names the worst image and the first layer that differs.
    """
    run, _ = open_file(written.file)
    largest, worst = dict.fromkeys(written.graph.outputs, 0.0), (-1.0, images[0])
    device = next(model.parameters()).device
    for item in images:
        (inputs,) = inputs_of(written.graph, item)
        with evaluating(model), torch.no_grad():
            preds = model(inputs.to(device))
        for name, got in zip(written.graph.outputs, run(inputs.numpy()), strict=True):
            difference = relative_difference(got, getattr(preds, name).cpu().numpy())
            largest[name] = max(largest[name], difference)
            worst = max(worst, (difference, item), key=lambda pair: pair[0])
    if not worst[0] <= bounds.output:
        name = max(largest, key=lambda key: largest[key])
        raise ValueError(
            f"{written.format.runtime} computes something else than PyTorch, so the file was deleted: {name} differ by "
            f"{largest[name]:.2g} of the largest (at most {bounds.output:g}); worst image: {worst[1].name}; "
            f"{blame(written, worst[1], bounds)}"
        )
    return {
        "images": len(images),
        "largest_relative_differences": largest,
        "worst_image": worst[1].name,
        "bounds": asdict(bounds),
    }


def reference(model: FCOS, item: Prepared, thresholds: Thresholds) -> Detections:
    """Compute PyTorch's detections of one image, on the device of the model, in evaluation mode."""
    device = next(model.parameters()).device
    images, sizes = as_batch(item)
    with evaluating(model), torch.no_grad():
        found = detect(model, images.to(device), sizes.to(device), thresholds)
    return first(Detections(*(x.cpu() for x in found)))


def differ_by_ties(model: FCOS, item: Prepared, got: Detections, thresholds: Thresholds, bounds: Bounds) -> bool:
    """Tell whether rounding may turn PyTorch's detections of one image into these."""
    assert bounds.box is not None and bounds.score is not None
    device, least = next(model.parameters()).device, thresholds.score_threshold
    if isinstance(least, Tensor):
        thresholds = thresholds._replace(score_threshold=least.cpu())
    images, sizes = as_batch(item)
    with evaluating(model), torch.no_grad():
        preds = Predictions(*(x.cpu() for x in run_network(model, images.to(device), sizes.to(device))))
    return is_right(preds, item.size, got, model.config, thresholds, bounds.box, bounds.score)
