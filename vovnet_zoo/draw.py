"""Detections as a picture."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def draw_detections(
    image: Tensor,
    detection: dict[str, Tensor],
    class_names: Sequence[str] | None = None,
    score_threshold: float = 0.3,
) -> Image.Image:
    """Draw one image's detections, or its ground truth, on a copy of it.

    Args:
        image: uint8 [3,H,W] RGB.
        detection: `boxes` [N,4] xyxy in pixels of `image`, `labels` [N], and `scores` [N] unless it is ground truth.
        class_names: names in label order; None writes the numbers.
        score_threshold: boxes that score less are left out.
    """
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    canvas = ImageDraw.Draw(picture)
    width = max(1, round(min(picture.size) / 200))
    font = ImageFont.load_default(size=max(10, min(picture.size) / 40))

    scores = detection["scores"].tolist() if "scores" in detection else [None] * len(detection["labels"])
    rows = list(zip(detection["boxes"].tolist(), detection["labels"].tolist(), scores, strict=True))
    for box, label, score in reversed(rows):  # the best score on top
        if score is not None and score < score_threshold:
            continue
        colour = class_colour(label)
        canvas.rectangle(box, outline=colour, width=width)
        text = class_names[label] if class_names else str(label)
        if score is not None:
            text += f" {score:.2f}"
        left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
        x = max(0, min(box[0], picture.width - right))
        y = box[1] - bottom - 1 if box[1] > bottom else box[1]  # above the box, inside where there is no room
        canvas.rectangle([x, y, x + right + 2, y + bottom + 1], fill=colour)
        canvas.text((x + 1, y), text, fill="black", font=font)
    return picture


def class_colour(label: int) -> tuple[int, int, int]:
    """A bright RGB colour; labels next to each other get hues far apart (golden angle)."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.65, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
