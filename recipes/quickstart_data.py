"""`make_shapes` draws a COCO-format dataset from a seed, so that the quickstart needs no download."""

from __future__ import annotations

import colorsys
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from vovnet_zoo.files import staged

CLASSES = ("circle", "square", "triangle", "star")
SUPERSAMPLING = 3  # shapes are drawn larger and reduced, for smooth edges


def make_shapes(root: Path, num_train: int = 500, num_val: int = 100, size: int = 128, seed: int = 0) -> Path:
    """Write `root/{train,val}/*.png` and `root/annotations/instances_{train,val}.json`; returns `root`.

    Each image is `size` x `size` pixels with 1 to 5 bright shapes, 24 to 84 pixels wide, turned by any angle, drawn
    over each other on a dull background of textured noise. A box encloses the visible part of a shape; a shape of which
    less than half is visible has no box. The same arguments give the same files. An existing `root` is kept. The
    dataset is written under another name and then renamed, so that `root` is never incomplete.
    """
    if root.exists():
        return root
    with staged(root) as folder:
        (folder / "annotations").mkdir()
        for split, count in (("train", num_train), ("val", num_val)):
            rng = np.random.default_rng([seed, split == "val"])
            (folder / split).mkdir()
            images, annotations = [], []
            for image_id in range(1, count + 1):
                picture, objects = draw_image(rng, size)
                file_name = f"{image_id:06d}.png"
                picture.save(folder / split / file_name)
                images.append({"id": image_id, "file_name": file_name, "width": size, "height": size})
                for label, (x1, y1, x2, y2) in objects:
                    box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
                    annotations.append(
                        {"id": len(annotations) + 1, "image_id": image_id, "category_id": label + 1, **box}
                    )
            categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
            content = {"images": images, "annotations": annotations, "categories": categories}
            (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def draw_image(rng: np.random.Generator, size: int) -> tuple[Image.Image, list[tuple[int, tuple[int, int, int, int]]]]:
    """Draw a picture; returns it and its objects: (label, (x1, y1, x2, y2) in pixels)."""
    picture = background(rng, size)
    layers = []
    for _ in range(rng.integers(1, 6)):
        label = int(rng.integers(len(CLASSES)))
        radius = 12 * 3.5 ** rng.random()  # 12..42 pixels, small ones as likely as large ones
        centre = rng.uniform(0.6 * radius, size - 0.6 * radius, size=2)
        mask = shape_mask(CLASSES[label], centre, radius, rng.uniform(0, 2 * np.pi), size)
        colour = tuple(
            round(255 * c) for c in colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.6, 1), rng.uniform(0.7, 1))
        )
        picture.paste(Image.new("RGB", picture.size, colour), mask=mask)
        layers.append((label, np.asarray(mask) > 127))

    noise = rng.normal(0, 4, size=(size, size, 3))
    picture = Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))

    objects, covered = [], np.zeros((size, size), bool)
    for label, mask in reversed(layers):  # from the topmost down
        visible = mask & ~covered
        covered |= mask
        if visible.sum() < max(30, 0.5 * mask.sum()):
            continue
        ys, xs = np.nonzero(visible)
        objects.append((label, (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)))
    return picture, objects


def shape_mask(name: str, centre: np.ndarray, radius: float, angle: float, size: int) -> Image.Image:
    """Draw a mask (mode "L", [size,size]): 255 inside the shape, whose corners lie on the circle of `radius` pixels."""
    corners, inner = {"circle": (64, 1.0), "square": (4, 1.0), "triangle": (3, 1.0), "star": (10, 0.45)}[name]
    angles = angle + np.arange(corners) * 2 * np.pi / corners
    radii = radius * np.where(np.arange(corners) % 2, inner, 1.0)
    points = centre + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)  # [corners,2]
    mask = Image.new("L", (size * SUPERSAMPLING, size * SUPERSAMPLING))
    ImageDraw.Draw(mask).polygon([tuple(p) for p in points * SUPERSAMPLING], fill=255)
    return mask.resize((size, size), Image.Resampling.BOX)


def background(rng: np.random.Generator, size: int) -> Image.Image:
    """Draw dull coloured noise at three scales."""
    total = np.zeros((size, size, 3))
    for cells, strength in ((3, 30), (12, 20), (48, 10)):
        noise = rng.normal(0, 1, size=(cells, cells, 3)) * strength
        channels = [Image.fromarray(noise[..., c].astype(np.float32)).resize((size, size)) for c in range(3)]
        total += np.stack([np.asarray(channel) for channel in channels], axis=-1)
    return Image.fromarray(np.clip(total + rng.uniform(60, 160, size=3), 0, 255).astype(np.uint8))
