"""`draw_detections` draws detections on an image."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_detections(
    image: Tensor,
    detection: dict[str, Tensor],
    class_names: Sequence[str] | None = None,
    score_threshold: float = 0.3,
) -> Image.Image:
    """Draw the detections, or the ground truth, of one image on a copy of the image.

    Args:
        image: uint8 [3,H,W] RGB.
        detection: `boxes` [N,4] xyxy in pixels of `image`, `labels` int64 [N], and `scores` [N]; ground truth has no
            scores.
        class_names: names in label order; None writes the numbers.
        score_threshold: boxes with a lower score are left out.
    """
    boxes, labels, scores = detection["boxes"].cpu(), detection["labels"].tolist(), detection.get("scores")
    texts = [class_names[label] if class_names else str(label) for label in labels]
    chosen = list(range(len(labels)))
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores.tolist(), strict=True)]
        chosen = (scores >= score_threshold).nonzero()[:, 0].tolist()
    order = list(reversed(chosen))  # the best score comes last, on top
    boxes, texts, colours = boxes[order], [texts[i] for i in order], [class_colour(labels[i]) for i in order]

    image, side = image.cpu(), min(image.shape[-2:])
    if order:
        image = draw_bounding_boxes(image, boxes, colors=colours, width=max(1, round(side / 200)))
    picture = to_pil_image(image)
    font = ImageFont.load_default(size=max(10, side / 40))
    for box, text, colour in zip(boxes.tolist(), texts, colours, strict=True):
        _write(picture, box, text, colour, font)
    return picture


def class_colour(label: int) -> tuple[int, int, int]:
    """Choose a bright RGB colour; neighbouring labels get hues far apart (golden angle)."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.65, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _write(picture: Image.Image, box: list[float], text: str, colour: tuple[int, int, int], font: Font) -> None:
    """Write a label above its box, or inside where there is no room.

    `draw_bounding_boxes` could write it, but on top of the object, beyond the picture's right edge, and only 10 pixels
    high unless a font file is given.
    """
    canvas = ImageDraw.Draw(picture)
    _, _, right, bottom = canvas.textbbox((0, 0), text, font=font)
    x = max(0, min(box[0], picture.width - right))
    y = box[1] - bottom - 1 if box[1] > bottom else box[1]
    canvas.rectangle([x, y, x + right + 2, y + bottom + 1], fill=colour)
    canvas.text((x + 1, y), text, fill="black", font=font)
