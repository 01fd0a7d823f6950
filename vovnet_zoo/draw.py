"""`draw_detections` draws detections on an image."""

from __future__ import annotations

import colorsys
import functools
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from .arguments import check_kind, check_number, check_tensor, refuse_not_xyxy
from .sources import ImageLike, to_rgb
from .words import counted

DISPLAY_SCORE = 0.3  # what people are shown scores at least this, unless they or the model's config say otherwise

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
READABLE = 384  # pixels; an image whose longer side is shorter is enlarged, or its labels could not be read
MISSING = "\U0010ffff"  # no font has a picture of this character, so it shows the one that stands for all it lacks

# The first of these fonts with all letters of a name writes it. Pillow looks for them where the system keeps fonts.
# DejaVu (also a part of matplotlib) has Latin, Cyrillic, Greek, Arabic and Hebrew letters; the others have Chinese,
# Japanese, Korean and Indian ones on Linux, Windows and macOS.
FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "NotoSansDevanagari-Regular.ttf"),
    *("wqy-zenhei.ttc", "wqy-microhei.ttc", "DroidSansFallbackFull.ttf", "unifont.otf"),
    *("segoeui.ttf", "msyh.ttc", "meiryo.ttc", "malgun.ttf", "Nirmala.ttf"),
    *("Arial Unicode.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc"),
)
log = logging.getLogger(__name__)


def draw_detections(
    image: ImageLike,
    detection: Mapping[str, Tensor],
    class_names: Sequence[str] | None = None,
    score_threshold: float = DISPLAY_SCORE,
    enlarge: int | None = None,
) -> Image.Image:
    """Draw the detections, or the ground truth, of one image on a copy of the image.

    Lines and letters grow with the image. A label lies where it covers least of the boxes and of other labels. Each
    class has its own colour, the same in every picture.

    Args:
        image: a path, PIL image, array or tensor, as `predict` takes it.
        detection: `boxes` [N,4] xyxy in pixels of `image`, `labels` int64 [N], and `scores` [N]; ground truth has no
            scores.
        class_names: names in label order; None writes the numbers. A name is written by its number if no font of this
            machine has its letters.
        score_threshold: boxes with a lower score are left out.
        enlarge: how many times larger than the image the picture is, 1 to 100; None makes images of less than 384
            pixels larger, by a whole number, and others not.

    Raises:
        ValueError: the image cannot be used, `detection` has other tensors, a label has no name, or a number is out of
            range.
    """
    check_detection("detection", detection, scored=False)
    if (least := min(detection["labels"].tolist(), default=0)) < 0:
        raise ValueError(f"detection: labels: there is a label {least}; give labels of 0 or more")
    labels_above = max(detection["labels"].tolist(), default=-1) + 1
    if class_names is not None and (isinstance(class_names, str) or not isinstance(class_names, Sequence)):
        raise ValueError(f"class_names={class_names!r}: give a list of names")
    if class_names is not None and len(class_names) < labels_above:
        raise ValueError(
            f"class_names has {counted(len(class_names), 'name')}, and there is a label {labels_above - 1}"
        )
    check_number("score_threshold", score_threshold, 0, 1)
    if enlarge is not None:
        check_number("enlarge", enlarge, 1, 100, whole=True)
    boxes, labels, scores = detection["boxes"].detach().cpu(), detection["labels"].tolist(), detection.get("scores")
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))  # NumPy has no bfloat16
    texts = [_readable_name(class_names[label], label) if class_names else str(label) for label in labels]
    chosen = list(range(len(labels)))
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores.tolist(), strict=True)]
        chosen = (scores >= score_threshold).nonzero()[:, 0].tolist()
    order = list(reversed(chosen))  # the best score comes last, on top
    texts, colours = [texts[i] for i in order], [class_colour(labels[i]) for i in order]

    # Enlarge by whole pixels, so that the picture shows what the network saw.
    pixels = to_rgb(image).cpu()
    times = enlarge or max(1, round(READABLE / max(pixels.shape[-2:])))
    picture = to_pil_image(pixels)
    if times > 1:
        picture = picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)
    boxes, side = boxes[order] * times, min(picture.size)

    canvas, size = ImageDraw.Draw(picture), max(10, side / 45)
    # as torchvision's draw_bounding_boxes does, but that copies the image several times, and it may have 100 megapixels
    for (x1, y1, x2, y2), colour in zip(boxes.to(torch.int64).tolist(), colours, strict=True):
        # the edge of the image is beside its last pixel
        box = x1, y1, x2 - (x1 < x2 == picture.width), y2 - (y1 < y2 == picture.height)
        canvas.rectangle(box, outline=colour, width=max(1, round(side / 250)))
    fonts = [_font(_font_of(text), size) for text in texts]
    margin = max(1, round(size / 10))
    extents = [canvas.textbbox((0, 0), text, font=font)[2:] for text, font in zip(texts, fonts, strict=True)]
    sizes = [(width + 2 * margin, height + 2 * margin) for width, height in extents]
    places = place_labels(boxes.numpy(), sizes, picture.size)
    for (x, y), (w, h), text, colour, font in zip(places, sizes, texts, colours, fonts, strict=True):
        canvas.rectangle([x, y, x + w - 1, y + h - 1], fill=colour)
        canvas.text((x + margin, y + margin), text, fill="black", font=font)
    return picture


def check_detection(name: str, detection: Mapping[str, Tensor], scored: bool = True) -> None:
    """Raise `ValueError` unless a detection has boxes [N,4], labels [N] and, if `scored`, scores [N]."""
    check_kind(name, detection, Mapping, "dicts of tensors" if name.endswith("s") else "a dict of tensors")
    if missing := {"boxes", "labels", *(["scores"] if scored else [])} - detection.keys():
        raise ValueError(f"{name} must have {', '.join(sorted(missing))}")
    check_tensor(f"{name}: boxes", detection["boxes"], ("N", 4), "")
    refuse_not_xyxy(f"{name}: boxes", detection["boxes"])
    for key in ("scores", "labels"):
        if key in detection:
            kind = "whole" if key == "labels" else ""
            check_tensor(f"{name}: {key}", detection[key], (len(detection["boxes"]),), kind)


def class_colour(label: int) -> tuple[int, int, int]:
    """Choose a bright RGB colour; neighbouring labels get hues far apart (golden angle)."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.65, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def place_labels(
    boxes: np.ndarray, sizes: Sequence[tuple[float, float]], picture: tuple[int, int]
) -> list[tuple[float, float]]:
    """Choose for each label the place beside or in its box that covers the least.

    Args:
        boxes: [N,4] xyxy in pixels, in the order in which labels are drawn; the last label is placed first.
        sizes: (width, height) of each label.
        picture: (width, height) of the picture; a label stays in it where it fits.

    Returns:
        (x, y) of each label's upper left corner.
    """
    places: list[tuple[float, float]] = [(0, 0)] * len(boxes)
    placed = np.zeros((0, 4))
    for i in reversed(range(len(boxes))):
        (x1, y1, x2, y2), (w, h) = boxes[i], sizes[i]
        # above, below, right, left, inside; the first of equally good places is taken
        corners = [(x1, y1 - h), (x2 - w, y1 - h), (x1, y2), (x2 - w, y2), (x2, y1), (x1 - w, y1), (x1, y1)]
        corners = [(min(max(0, x), max(0, picture[0] - w)), min(max(0, y), max(0, picture[1] - h))) for x, y in corners]
        rectangles = np.array([(x, y, x + w, y + h) for x, y in corners])  # [7,4]
        # A pixel of a small box is worth more than a pixel of a large one, and another label most of all.
        areas = np.maximum((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), 1)
        covered = (_overlaps(rectangles, boxes) / areas).sum(1) + 3 * _overlaps(rectangles, placed).sum(1) / (w * h)
        best = int((covered > covered.min() + 1e-6).argmin())
        places[i] = corners[best]
        placed = np.concatenate([placed, rectangles[best : best + 1]])
    return places


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the area [N,M] that each of the boxes `a` [N,4] shares with each of `b` [M,4], xyxy."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    return np.clip(sides, 0, None).prod(2)


@functools.cache
def _readable_name(name: str, label: int) -> str:
    """Return the name if a font has all of its letters, else the number of its class."""
    name = " ".join(name.split())  # a line break would make the label two lines high
    if _has_letters(_font_of(name), name):
        return name
    log.warning("no font here has all letters of the class name %r; it is written as 'class %d'", name, label)
    return f"class {label}"


@functools.cache
def _font_of(text: str) -> str | None:
    """Find the first font that has all letters of the text; None is Pillow's own, which has Latin letters."""
    return next((font for font in _fonts() if _has_letters(font, text)), None)


@functools.cache
def _fonts() -> list[str]:
    """List the files of FONTS that this machine has, in the system or in matplotlib."""
    found = []
    for name in FONTS:
        try:
            found.append(str(ImageFont.truetype(name).path))
        except OSError:
            continue
    if spec := importlib.util.find_spec("matplotlib"):  # not imported: that takes a second
        for folder in spec.submodule_search_locations or ():
            file = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
            found += [str(file)] if file.is_file() else []
    return found


@functools.cache
def _font(path: str | None, size: float) -> Font:
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


@functools.cache
def _has_letters(path: str | None, text: str) -> bool:
    """Say whether each character has a picture of its own, not the one that stands for missing ones."""
    font = _font(path, 16)
    missing = bytes(font.getmask(MISSING))
    return all(bytes(font.getmask(c)) != missing for c in set(text) if not c.isspace())
