"""`augment_training` augments the images of a dataset; `MixImages` makes one sample of several images.

Like torchvision's transforms, these draw from torch's default generator, which `CocoDataset` seeds for each sample. So
the other images of a sample, too, depend on its key only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..arguments import check_number
from ..config import Augmentation, Resize
from .boxes import Window, are_visible, shares_inside
from .dataset import CocoDataset
from .transforms import photometric, randint, train_transforms

Sample = tuple[tv_tensors.Image, dict]

COVERED = 0.3  # pasted objects cover no more of a box
PLACES = 10  # places that are tried for a pasted object
MOST_PASTED = 4  # objects
MARGIN = 0.2  # pixels around a pasted object that fade into the image, as a share of the object's longer side
GREY = (124, 116, 104)  # ImageNet's mean colour, which normalization makes (nearly) 0, as padding is


def augment_training(dataset: CocoDataset, augmentation: Augmentation, resize: Resize = "antialias") -> None:
    """Give a dataset the transforms of a training. Its `late_transforms` resize, and mirror if the others do.

    Args:
        dataset: its `transforms` and `late_transforms` are replaced.
        augmentation: sizes, probabilities and strengths.
        resize: how images are resized, see `resize_image`.

    Raises:
        ValueError: a number is out of range, or the boxes of `dataset` are in the published convention, which knows
            mirroring and other colours only.
    """
    a = augmentation
    make = functools.partial(train_transforms, a.min_size, a.max_size, plus_one=dataset.plus_one, resize=resize)
    transforms: Callable = make(a.augment, scale=a.zoom)
    if a.copy_paste or a.mosaic or a.mixup:
        transforms = MixImages(dataset, transforms, copy_paste=a.copy_paste, mosaic=a.mosaic, mixup=a.mixup)
    dataset.transforms = v2.Compose([transforms, *photometric(a.color, a.blur, a.jpeg)])
    dataset.late_transforms = make("none" if a.augment == "none" else "flip")


class MixImages:
    """This transform augments a sample, and mixes it with samples of other images of a dataset.

    First come objects of another image, each class with the same probability (`paste_objects`), then a mosaic with
    three other images (`make_mosaic`), then blending with another image (`blend`). The result keeps the size, the
    `image_id` and the `orig_size` of the image that was asked for.

    Args:
        dataset: the images; its own `transforms` are not used.
        transforms: resize and augment each of the images.
        copy_paste, mosaic, mixup: probabilities.

    Raises:
        ValueError: a probability is out of range, or the boxes of `dataset` are in the published convention.
        ImageError: when called, another image cannot be read.
    """

    def __init__(
        self,
        dataset: CocoDataset,
        transforms: Callable,
        *,
        copy_paste: float = 0.0,
        mosaic: float = 0.0,
        mixup: float = 0.0,
    ):
        for name, value in (("copy_paste", copy_paste), ("mosaic", mosaic), ("mixup", mixup)):
            check_number(name, value, 0, 1)
            if value and dataset.plus_one:
                raise ValueError(
                    f"{name}={value!r}: boxes in the published convention (plus_one) cannot be mixed; leave it out, or "
                    "train the variant 'improved'"
                )
        self.dataset, self.transforms = dataset, transforms
        self.copy_paste, self.mosaic, self.mixup = copy_paste, mosaic, mixup
        owners, labels, _ = dataset.all_boxes()
        self.owners = [owners[labels == label] for label in np.unique(labels)]  # the images of each class's boxes
        self.labels = np.unique(labels)

    def __call__(self, image: tv_tensors.Image, target: dict) -> Sample:
        sample = self.transforms(image, target)
        if len(self.labels) and _happens(self.copy_paste):
            kind = randint(0, len(self.labels) - 1)
            owner = self.owners[kind][randint(0, len(self.owners[kind]) - 1)]
            sample = paste_objects(sample, self.sample(int(owner)), int(self.labels[kind]))
        if _happens(self.mosaic):
            sample = make_mosaic([sample, *(self.sample() for _ in range(3))])
        if _happens(self.mixup):
            sample = blend(sample, self.sample())
        return sample

    def sample(self, index: int | None = None) -> Sample:
        """Load and transform an image of the dataset, a random one if no index is given."""
        index = randint(0, len(self.dataset) - 1) if index is None else index
        return self.transforms(*self.dataset.load(index))


def paste_objects(sample: Sample, other: Sample, label: int) -> Sample:
    """Copy up to four objects of a class from another sample, with all that is in their boxes, to random places.

    A place at which more than 0.3 of a box would be covered, with what earlier objects cover, is not taken; an object
    for which ten random places gave none is left out, and so is an object that is wider or higher than half the image.
    The pixels around the object fade into the image.
    """
    image, target = sample[0].as_subclass(Tensor).clone(), sample[1]
    source, (boxes, labels) = other[0].as_subclass(Tensor), plain(other[1])
    chosen = boxes[labels == label]
    chosen = chosen[torch.randperm(len(chosen))[: randint(1, MOST_PASTED)]]
    found, names = plain(target)
    covered = found.new_zeros(len(found))  # share of each box
    height, width = image.shape[-2:]
    for x1, y1, x2, y2 in torch.cat([chosen[:, :2].floor(), chosen[:, 2:].ceil()], dim=1).long().tolist():
        w, h = x2 - x1, y2 - y1
        if 2 * w > width or 2 * h > height:
            continue
        for _ in range(PLACES):
            x, y = randint(0, width - w), randint(0, height - h)
            after = covered + shares_inside(found, (x, y, x + w, y + h))
            if (after <= COVERED).all():
                paste(image, source, (x1, y1, x2, y2), (x, y))
                found = trim_boxes(found, (x, y, x + w, y + h))
                inside, of_inside = crop_boxes(boxes, labels, (x1, y1, x2, y2), (x, y))
                found, names = torch.cat([found, inside]), torch.cat([names, of_inside])
                covered = torch.cat([after, after.new_zeros(len(inside))])
                break
    return make_sample(image, found, names, target)


def make_mosaic(samples: Sequence[Sample]) -> Sample:
    """Let four samples meet at a random point in the middle of an image that has the size of the first.

    Each fills a corner with a random window of it, at the scale it has. A smaller one lies at the meeting point, and
    what it leaves is grey. Boxes are cut to the windows; see `crop_boxes`.
    """
    height, width = samples[0][0].shape[-2:]
    canvas = _canvas(height, width)
    middle_x, middle_y = (randint(side // 4, side - side // 4) for side in (width, height))
    corners = [(x, y) for y in (0, middle_y) for x in (0, middle_x)]
    boxes, labels = [], []
    for (x, y), place in zip(corners, torch.randperm(4).tolist(), strict=True):
        image, target = samples[place]
        room_x, room_y = width - middle_x if x else middle_x, height - middle_y if y else middle_y
        w, h = min(room_x, image.shape[-1]), min(room_y, image.shape[-2])
        left, top = randint(0, image.shape[-1] - w), randint(0, image.shape[-2] - h)
        x, y = x or middle_x - w, y or middle_y - h
        canvas[:, y : y + h, x : x + w] = image[:, top : top + h, left : left + w]
        found, names = crop_boxes(*plain(target), (left, top, left + w, top + h), (x, y))
        boxes.append(found)
        labels.append(names)
    return make_sample(canvas, torch.cat(boxes), torch.cat(labels), samples[0][1])


def blend(sample: Sample, other: Sample) -> Sample:
    """Average two samples, with a weight of the first from 0.4 to 0.6; the result has the boxes of both.

    The result has the size of the first. A random window of the other is taken where the other is larger; where it is
    smaller, it has a random place, and the first is as it was around it.
    """
    image, target = sample[0].as_subclass(Tensor).clone(), sample[1]
    source, (height, width) = other[0].as_subclass(Tensor), image.shape[-2:]
    w, h = min(width, source.shape[-1]), min(height, source.shape[-2])
    left, top = randint(0, source.shape[-1] - w), randint(0, source.shape[-2] - h)
    x, y = randint(0, width - w), randint(0, height - h)
    weight = 0.4 + 0.2 * torch.rand(()).item()
    part, window = image[:, y : y + h, x : x + w], source[:, top : top + h, left : left + w]
    part.copy_((weight * part + (1 - weight) * window).round())
    found, names = plain(target)
    more, of_more = crop_boxes(*plain(other[1]), (left, top, left + w, top + h), (x, y))
    return make_sample(image, torch.cat([found, more]), torch.cat([names, of_more]), target)


# ---- boxes and pixels -----------------------------------------------------------------------------------------------


def crop_boxes(boxes: Tensor, labels: Tensor, window: Window, at: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor]:
    """Clip boxes [N,4] to a window whose upper left corner moves to `at` (x, y).

    A box stays if a quarter of its area, and a pixel of its width and height, are left.

    Returns:
        boxes: [M,4] xyxy in pixels, M <= N.
        labels: [M].
    """
    x1, y1, x2, y2 = window
    low, high = boxes.new_tensor([x1, y1, x1, y1]), boxes.new_tensor([x2, y2, x2, y2])
    clipped = boxes.clamp(low, high)
    keep = are_visible(boxes, window) & (clipped[:, 2:] - clipped[:, :2] >= 1).all(1)
    return (clipped + boxes.new_tensor([*at, *at]) - low)[keep], labels[keep]


def trim_boxes(boxes: Tensor, cover: Window) -> Tensor:
    """Shorten the boxes [N,4] of which `cover` hides a whole side, so that they are around what can be seen."""
    x1, y1, x2, y2 = boxes.unbind(1)
    left, top, right, bottom = cover
    wide, high = (left <= x1) & (right >= x2), (top <= y1) & (bottom >= y2)  # it is as wide, or as high, as the box
    trimmed = [
        torch.where(high & (left <= x1), x1.clamp(min=right), x1),
        torch.where(wide & (top <= y1), y1.clamp(min=bottom), y1),
        torch.where(high & (right >= x2), x2.clamp(max=left), x2),
        torch.where(wide & (bottom >= y2), y2.clamp(max=top), y2),
    ]
    return torch.stack(trimmed, dim=1)


def paste(image: Tensor, source: Tensor, box: Window, at: tuple[int, int]) -> None:
    """Copy the pixels of a box from `source` [3,h,w] to `image` [3,H,W], the box's corner to `at` (x, y).

    The pixels around the box, as far as both images have them, fade into the image.
    """
    (x1, y1, x2, y2), (x, y) = box, at
    margin = round(MARGIN * max(x2 - x1, y2 - y1))
    left, top = min(margin, x1, x), min(margin, y1, y)
    right = min(margin, source.shape[-1] - x2, image.shape[-1] - x - (x2 - x1))
    bottom = min(margin, source.shape[-2] - y2, image.shape[-2] - y - (y2 - y1))
    weights = _ramp(top, y2 - y1, bottom, margin)[:, None] * _ramp(left, x2 - x1, right, margin)  # [h,w]
    part = image[:, y - top : y + y2 - y1 + bottom, x - left : x + x2 - x1 + right]
    window = source[:, y1 - top : y2 + bottom, x1 - left : x2 + right]
    part.copy_((weights * window + (1 - weights) * part).round())


def plain(target: dict) -> tuple[Tensor, Tensor]:
    """Return the boxes [N,4] and labels [N] of a target as tensors without a class of their own."""
    return target["boxes"].as_subclass(Tensor), target["labels"].as_subclass(Tensor)


def make_sample(image: Tensor, boxes: Tensor, labels: Tensor, target: dict) -> Sample:
    """Make a sample of an image [3,H,W] and its boxes [N,4]; what else a target has is taken from `target`."""
    size = (image.shape[-2], image.shape[-1])
    boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
    return tv_tensors.Image(image), {**target, "boxes": boxes, "labels": labels}


def _ramp(before: int, full: int, after: int, margin: int) -> Tensor:
    """Make weights that rise over `before` pixels, are 1 for `full` pixels and fall over `after` pixels."""
    rise = torch.arange(margin, 0, -1) / (margin + 1)  # from the object outwards
    return torch.cat([rise[:before].flip(0), torch.ones(full), rise[:after]])


def _canvas(height: int, width: int) -> Tensor:
    """Make a grey image [3,H,W], channels last in memory, as decoding leaves images."""
    return torch.tensor(GREY, dtype=torch.uint8).expand(height, width, 3).clone().permute(2, 0, 1)


def _happens(probability: float) -> bool:
    return torch.rand(()).item() < probability
