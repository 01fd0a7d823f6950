"""The certificate says how far the detections of an exported file are from those of PyTorch."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import Thresholds
from ..exported import ExportedDetector
from ..fcos import FCOS
from ..inference import Prepared, detect, prepare
from ..results import Detections
from ..sources import Frame, Source, frames
from .graph import DetectorGraph
from .registry import Format
from .runtimes import run_layers

LEAST_IOU = 0.5  # of two boxes that are the same detection
DRAWN, DRAWN_TRIES = 4, 32  # pictures that are compared where the user gives none, and how many are drawn for them


@dataclass(frozen=True)
class Bounds:
    """An exported file is refused if it is further from PyTorch than these numbers."""

    matched: float  # least share of detections that both have
    box: float  # largest difference of a corner, in pixels of the network input
    score: float  # largest difference of a score
    layer: float  # largest difference of a convolution's map, relative to its largest value; tells where it went wrong


BOUNDS = {
    "float32": Bounds(matched=1.0, box=0.05, score=1e-4, layer=1e-3),
    "float16": Bounds(matched=0.98, box=1.0, score=0.02, layer=0.02),
}


def choose_images(
    model: FCOS, images: Source | None, thresholds: Thresholds, size: tuple[int, int] | None
) -> tuple[list[Prepared], bool]:
    """Prepare the images that are compared, and tell whether they were drawn.

    Raises:
        ValueError: the model finds nothing in any of them, so that nothing could be compared.
    """
    source = frames(images) if images is not None else map(draw, range(DRAWN_TRIES))
    chosen, found = [], 0
    for frame in source:
        item = prepare(frame, model.config, fixed=size)
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
    model: FCOS,
    thresholds: Thresholds,
    exported: ExportedDetector,
    images: Sequence[Prepared],
    bounds: Bounds,
    chosen: Format,
    file: Path,
    graph: DetectorGraph,
    layers: Mapping[str, str],
) -> dict[str, Any]:
    """Compare the file with the model on all images, and return what was found.

    Raises:
        ValueError: a number is out of bounds; the message names the worst image and the first layer that differs.
    """
    both, all_of_them, worst, largest = 0, 0, (-1.0, images[0]), {"box": 0.0, "score": 0.0}
    for item in images:
        want, got = reference(model, item, thresholds), first(exported(*as_batch(item)))
        pairs = match(want, got)
        differences = {
            "box": max((float((want.boxes[i] - got.boxes[j]).abs().max()) for i, j in pairs), default=0.0),
            "score": max((float((want.scores[i] - got.scores[j]).abs()) for i, j in pairs), default=0.0),
        }
        lost = len(want.scores) + len(got.scores) - 2 * len(pairs)
        both, all_of_them = both + 2 * len(pairs), all_of_them + len(want.scores) + len(got.scores)
        largest = {key: max(value, differences[key]) for key, value in largest.items()}
        badness = lost + differences["box"] / bounds.box + differences["score"] / bounds.score
        worst = max(worst, (badness, item), key=lambda pair: pair[0])
    if not all_of_them:
        raise ValueError(
            "the model finds nothing in the images, so there is nothing to compare; give others (--images)"
        )
    result: dict[str, Any] = {
        "images": len(images),
        "detections": all_of_them - both // 2,
        "matched": both / all_of_them,
        "largest_box_difference": largest["box"],
        "largest_score_difference": largest["score"],
        "worst_image": worst[1].name,
        "bounds": asdict(bounds),
    }
    if result["matched"] < bounds.matched or largest["box"] > bounds.box or largest["score"] > bounds.score:
        raise ValueError(
            f"{chosen.runtime} computes something else than PyTorch, so the file was deleted: {result['matched']:.1%} "
            f"of {result['detections']} detections match (at least {bounds.matched:.1%}), boxes differ by up to "
            f"{largest['box']:.2g} px (at most {bounds.box:g}), scores by {largest['score']:.2g} (at most "
            f"{bounds.score:g}); worst image: {worst[1].name}; {blame(graph, file, layers, worst[1], bounds)}"
        )
    return result


def as_batch(item: Prepared) -> tuple[Tensor, Tensor]:
    """Return images [1,3,H,W] and sizes [1,2]."""
    return item.pixels[None], torch.tensor([item.size])


def reference(model: FCOS, item: Prepared, thresholds: Thresholds) -> Detections:
    """Compute PyTorch's detections of one image, on the device of the model, in evaluation mode."""
    was_training, device = model.training, next(model.parameters()).device
    images, sizes = as_batch(item)
    model.eval()
    try:
        with torch.no_grad():
            found = detect(model, images.to(device), sizes.to(device), thresholds)
    finally:
        model.train(was_training)
    return first(Detections(*(x.cpu() for x in found)))


def first(found: Detections) -> Detections:
    """Return the detections of the first image, without empty places: boxes [N,4], scores [N], labels [N]."""
    count = int(found.count[0])
    return Detections(found.boxes[0, :count], found.scores[0, :count], found.labels[0, :count], found.count[0])


def match(want: Detections, got: Detections) -> list[tuple[int, int]]:
    """Pair detections of one class that overlap, the nearest boxes first; each is in one pair at most."""
    distance = (want.boxes[:, None] - got.boxes).abs().amax(-1).numpy().copy()  # [N,M]
    same = (want.labels[:, None] == got.labels) & (overlap(want.boxes, got.boxes) >= LEAST_IOU)
    distance[~same.numpy()] = np.inf
    pairs = []
    while distance.size and np.isfinite(nearest := distance.min()):
        i, j = np.argwhere(distance == nearest)[0]
        pairs.append((int(i), int(j)))
        distance[i], distance[:, j] = np.inf, np.inf
    return pairs


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Compute the IoU [N,M] of boxes [N,4] and [M,4], xyxy; a box without pixels has 1 with itself."""
    area_a, area_b = ((x[:, 2:] - x[:, :2]).clamp(min=0) + 1e-3 for x in (a, b))
    sides = (torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])).clamp(min=-1e-3) + 1e-3
    shared = sides.prod(-1)
    return shared / (area_a.prod(-1)[:, None] + area_b.prod(-1) - shared)


def blame(graph: DetectorGraph, file: Path, layers: Mapping[str, str], item: Prepared, bounds: Bounds) -> str:
    """Say which convolution is the first whose map differs between the file and PyTorch."""
    maps = record_maps(graph, layers, item)  # in the order in which they are computed
    images, sizes = (x.numpy() for x in as_batch(item))
    arrays = run_layers(file, [layers[name] for name in maps], images, sizes)
    for place, ((name, wanted), got) in enumerate(zip(maps.items(), arrays, strict=True)):
        difference = min(relative_difference(got, want.numpy()) for want in wanted)
        if not difference <= bounds.layer:
            before = ", or what is done to the images before it" if place == 0 else ""
            name = name.removeprefix("model.")
            return f"the first layer that differs is {name}{before} ({difference:.1e} of its largest value)"
    return "no convolution differs, so it happens in decoding or NMS"


def record_maps(graph: DetectorGraph, names: Container[str], item: Prepared) -> dict[str, list[Tensor]]:
    """Compute the map of each convolution in PyTorch, and its map after the batch norm that follows it, if one does.

    A format may make one convolution of the two. What runs several times counts for its first time.
    """
    maps: dict[str, list[Tensor]] = {}
    last: tuple[str, Tensor | None] = "", None
    name_of = {module: name for name, module in graph.named_modules()}

    def keep(module: nn.Module, inputs: tuple, output: Any) -> None:
        nonlocal last
        name = name_of[module]
        if isinstance(module, nn.Conv2d):
            last = "", None
            if name in names and name not in maps:
                maps[name], last = [output.clone()], (name, output)  # a copy, since activations change it in place
        elif last[0] and inputs[0] is last[1] and isinstance(output, Tensor) and output.shape == maps[last[0]][0].shape:
            maps[last[0]].append(output.clone())

    hooks = [module.register_forward_hook(keep) for module in graph.modules() if not list(module.children())]
    try:
        with torch.no_grad():
            graph(*as_batch(item))
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def relative_difference(got: np.ndarray, want: np.ndarray) -> float:
    """Compute the largest difference, relative to the largest value; infinity for other shapes."""
    if got.shape != want.shape:
        return float("inf")
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-12))


def card(chosen: Format, facts: Mapping[str, Any], certificate: Mapping[str, Any]) -> str:
    """Write the page that shows the certificate."""
    config, file = facts["config"], chosen.files[0]
    rows = {
        "format": f"{chosen.runtime}, {facts['precision']}, opset {certificate['opset']}",
        "size, batch": f"{facts['size'] or 'any'}, {facts['batch'] or 'any'}",
        "classes": f"{config['num_classes']}",
        "compared with PyTorch on": f"{certificate['images']} images ({certificate['images_are']})",
        "detections": certificate["detections"],
        "found by both": f"{certificate['matched']:.2%}",
        "largest difference of a box": f"{certificate['largest_box_difference']:.2g} px",
        "largest difference of a score": f"{certificate['largest_score_difference']:.2g}",
        "weights (sha256)": facts["weights_sha256"],
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        f"# {file}: FCOS on {config['backbone']}\n\n```python\nimport vovnet_zoo\n\n"
        f'model = vovnet_zoo.load_detector("{file}")\nprint(vovnet_zoo.predict(model, "photo.jpg"))\n```\n\n'
        f"| | |\n|---|---|\n{table}\n"
    )
