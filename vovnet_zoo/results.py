"""`ImageDetections` holds what was found in one image; it becomes rows of COCO (`to_coco_results`) or YOLO."""

from __future__ import annotations

import copy
import io
import reprlib
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

from .arguments import check_flag, check_kind
from .convert import COCO_IDS
from .draw import DISPLAY_SCORE, check_detection, draw_detections
from .fcos import shown_shapes
from .sources import ImageLike, to_rgb
from .words import counted, shortened

DISPLAY_SIDE = 1000  # pixels; the picture in a notebook is not larger, or a file of photos would have many megabytes


class ImageDetections(dict[str, Tensor]):
    """The detections of one image are a dict of tensors on the CPU, best score first, with facts as attributes.

    The keys are `boxes` float32 [N,4] xyxy in pixels of the original image, `scores` float32 [N] and `labels` int64 [N]
    (0..K-1). `supervision.Detections.from_transformers(found, found.id2label)` takes it as it is, and `dict(found)` is
    a plain dict for `torch.save`, and for tools that make a new object of its class, such as Ignite.

    Attributes:
        source: path or address of the image, "clip.mp4 frame 0" .. for a frame of a video, or "image 0" .. for an image
            in memory.
        size: (height, width) of the original image.
        class_names: K names in label order, or None.
        plus_one: boxes follow the published pixel convention, see `FCOS`.
        display_score: `draw` leaves out what scores less, unless it is told otherwise. `predict` sets 0 where its
            caller or the model's config has a score threshold above 0: all detections are drawn then.

    A notebook shows the picture that `draw()` makes, if `source` is a file.
    """

    def __init__(
        self,
        detections: Mapping[str, Tensor],
        source: str,
        size: tuple[int, int],
        class_names: Sequence[str] | None = None,
        plus_one: bool = False,
        display_score: float = DISPLAY_SCORE,
    ):
        super().__init__(detections)
        self.source, self.size, self.class_names, self.plus_one = source, size, class_names, plus_one
        self.display_score = display_score

    def __repr__(self) -> str:
        if not {"boxes", "scores", "labels"} <= self.keys():  # what is left after a change
            return super().__repr__()
        height, width = self.size
        best = [f"{name} {score:.2f}" for name, score in zip(self.names, self["scores"].tolist(), strict=False)]
        boxes = counted(len(self["boxes"]), "box") + (f": {shortened(best)}" if best else "")
        return f"ImageDetections({self.source}, {width} x {height} px, {boxes})"

    def _repr_png_(self) -> bytes | None:
        """Return the picture that a notebook shows; None where `source` is no file, and it shows the text."""
        if not Path(self.source).is_file():
            return None
        file, picture = io.BytesIO(), self.draw()
        picture.thumbnail((DISPLAY_SIDE, DISPLAY_SIDE))
        picture.save(file, "PNG")
        return file.getvalue()

    @property
    def id2label(self) -> dict[int, str]:
        """The name of each label; empty where names are unknown."""
        return dict(enumerate(self.class_names or ()))

    @property
    def names(self) -> list[str]:
        """The class name of each detection; its label as text where names are unknown."""
        return [self.id2label.get(label, str(label)) for label in self["labels"].tolist()]

    def to(self, device: torch.device | str) -> ImageDetections:
        """Copy the detections to a device; Lightning and Accelerate call this where they move results."""
        moved = copy.copy(self)
        moved.update({key: value.to(device) if isinstance(value, Tensor) else value for key, value in self.items()})
        return moved

    def draw(
        self, image: ImageLike | None = None, score_threshold: float | None = None, enlarge: int | None = None
    ) -> Image.Image:
        """Draw the detections that score at least `score_threshold` on a copy of the image.

        Args:
            image: None reads the file `source` again.
            score_threshold: None is `display_score`.
            enlarge: how many times larger the picture is, see `draw_detections`.

        Raises:
            ValueError: the image cannot be read, has another size, or is None and `source` is no file.
        """
        if image is None and not Path(self.source).is_file():
            raise ValueError(f"{self.source} is no file that could be read again; give the image: draw(image)")
        pixels = to_rgb(self.source if image is None else image)
        if (height_width := tuple(pixels.shape[-2:])) != self.size:
            raise ValueError(f"{self.source}: found in an image of {self.size} (height, width), not {height_width}")
        least = self.display_score if score_threshold is None else score_threshold
        return draw_detections(pixels, self, self.class_names, least, enlarge)

    def to_coco(self, image_id: int, category_ids: Sequence[int]) -> list[dict]:
        """Turn the detections into COCO result rows, see `to_coco_results`."""
        return to_coco_results([self], [image_id], category_ids, self.plus_one)


class Detections(NamedTuple):
    """What was found in B images, best first, in D places each; those from `count` on are empty."""

    boxes: Tensor  # float32 [B,D,4] xyxy in pixels of the network input; 0 where empty
    scores: Tensor  # float32 [B,D]; 0 where empty
    labels: Tensor  # int64 [B,D] 0..K-1; -1 where empty
    count: Tensor  # type: ignore[assignment]  # int64 [B]; a tuple's method has this name too

    def __repr__(self) -> str:
        return shown_shapes(self)


def to_coco_results(
    detections: Sequence[dict[str, Tensor]],
    image_ids: Sequence[int],
    category_ids: Sequence[int],
    plus_one: bool = False,
) -> list[dict]:
    """Turn detections into COCO result rows, `{"image_id", "category_id", "bbox", "score"}`, ready for JSON.

    Args:
        detections: per image `boxes` [N, 4] xyxy in pixels of the original image, `scores` [N], `labels` int [N].
        image_ids: the COCO id of each image.
        category_ids: original category id of each label.
        plus_one: the published convention, `w = x2 - x1 + 1` (likewise h).

    Raises:
        ValueError: there are not as many image ids as detections, or a label has no category.
    """
    check_kind("detections", detections, (list, tuple), "a list of dicts")
    check_ids("image_ids", image_ids)
    check_ids("category_ids", category_ids)
    check_flag("plus_one", plus_one)
    for detection in detections:
        check_detection("detections", detection)
    if len(detections) != len(image_ids):
        raise ValueError(f"{counted(len(detections), 'detection')} for {counted(len(image_ids), 'image id')}")
    rows = []
    for detection, image_id in zip(detections, image_ids, strict=True):
        boxes = detection["boxes"].detach().cpu().to(torch.float64, copy=True)
        boxes[:, 2:] += int(plus_one) - boxes[:, :2]  # [N, 4] xywh
        labels = detection["labels"].tolist()
        if labels and not 0 <= min(labels) <= max(labels) < len(category_ids):
            raise ValueError(
                f"image {image_id}: labels {min(labels)}..{max(labels)} do not fit the "
                f"{counted(len(category_ids), 'category')} of category_ids; was the model trained on other classes?"
            )
        rows += [
            {"image_id": int(image_id), "category_id": int(category_ids[label]), "bbox": box, "score": score}
            for box, score, label in zip(boxes.tolist(), detection["scores"].tolist(), labels, strict=True)
        ]
    return rows


def to_yolo(detection: Mapping[str, Tensor], size: tuple[int, int], plus_one: bool = False) -> str:
    """Turn the detections of one image of `size` (height, width) into the text of a YOLO label file.

    A line is `LABEL X Y WIDTH HEIGHT`: a box's centre and sides, as parts of the image's width and height. Scores are
    left out, as YOLO's files of ground truth have none. `plus_one` is the published convention, see `to_coco_results`.
    """
    height, width = size
    boxes = detection["boxes"].detach().cpu().to(torch.float64, copy=True)
    boxes[:, 2:] += int(plus_one)
    parts = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)  # [N,4] centre and sides
    parts /= torch.tensor([width, height] * 2)
    rows = zip(detection["labels"].tolist(), parts.tolist(), strict=True)
    return "".join(f"{label} {' '.join(f'{x:.6f}' for x in row)}\n" for label, row in rows)


def category_ids_of(config: Mapping[str, Any]) -> list[int]:
    """Return the category id of each label of a model with this config.

    They are the ids of the dataset that it was trained on, which its config holds; if it does not, they are COCO's for
    COCO's 80 classes, and otherwise 1 to K.
    """
    if config.get("category_ids"):
        return list(config["category_ids"])
    is_coco = list(config["class_names"] or ()) == coco_class_names()
    return list(COCO_IDS) if is_coco else list(range(1, config["num_classes"] + 1))


def coco_class_names() -> list[str]:
    """List COCO's 80 classes in the order of their ids; torchvision lists them among 91 places."""
    names = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return [names[i] for i in COCO_IDS]


def check_ids(name: str, ids: Sequence[int]) -> None:
    """Raise `ValueError` unless ids are a sequence of whole numbers."""
    try:
        right = not isinstance(ids, str | dict) and all(isinstance(x, Integral | Tensor) for x in ids)
    except TypeError:
        right = False
    if not right:
        raise ValueError(f"{name}={reprlib.repr(ids)}: give a sequence of whole numbers")
