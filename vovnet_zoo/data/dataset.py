"""`CocoDataset` gives images, boxes and labels of annotations to torch's data loader."""

from __future__ import annotations

import logging
import os
import reprlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from ..arguments import check_flag, check_kind, check_path
from ..words import counted, counted_classes
from .annotations import Annotations, are_fractions, file_of, idle_categories
from .images import ImageError, decode_image, read_image_bytes
from .index import open_index
from .layouts import find_split as find_split  # its place before there was `layouts`
from .layouts import split_candidates as split_candidates

logger = logging.getLogger(__name__)


class CocoDataset(torch.utils.data.Dataset):
    """The dataset holds the images and boxes of annotations, in the order of the image ids.

    Crowd regions are left out. Annotations that cannot be used are left out too: their image or category is unknown,
    or their box is empty, outside the image or not four finite numbers. A box that is partly outside is clipped.
    `problems` counts the annotations that were left out or clipped by more than one pixel, and one warning reports
    them.

    A category without annotations that groups others or stands for the background is no class, see `idle_categories`;
    a line of the log names it.

    Args:
        images_dir: the folder that `file_name` is relative to.
        annotation_file: COCO JSON, or the `Annotations` of another format, as `find_split` returns them; every image
            needs `id`, `file_name`, `width` and `height`.
        transforms: `(image, target) -> (image, target)`, see `train_transforms` and `eval_transforms`.
        late_transforms: take their place for keys `(index, seed, True)`, which `TrainSampler` gives from
            its step `late_from` on.
        drop_empty: leave out images without a usable box (the published recipes do).
        plus_one: boxes in the published convention, see `coco_to_xyxy`.
        skip_bad_images: give a `Skipped` for an image that cannot be used, which `collate` leaves out of the batch.
        known_classes: names of the classes that a model or another split has; a category of such a name is a class,
            used or not. If these are the names of all classes, the labels are in this order, however the file numbers
            its categories.

    Attributes:
        annotation_file: the file that messages name; annotations: what was given, for `coco_metrics`.
        class_names, category_ids: name and original category id of each label, K of both.
        image_ids: int64 [N], ascending; file_names: str [N]; sizes: int64 [N, 2] (height, width) from the JSON.
        annotations_sha256: the hash of the annotation file.
        problems: number of annotations per kind of problem, `{}` for a clean file.

    Raises:
        ValueError: the annotation file as a whole, or every annotation in it, cannot be used, or all are crowd regions;
            the message names it.
    """

    def __init__(
        self,
        images_dir: str | Path,
        annotation_file: str | Path | Annotations,
        *,
        transforms: Callable | None = None,
        late_transforms: Callable | None = None,
        drop_empty: bool = False,
        plus_one: bool = False,
        skip_bad_images: bool = False,
        known_classes: Collection[str] = (),
    ):
        check_path("images_dir", images_dir)
        if not isinstance(annotation_file, Annotations):
            check_kind("annotation_file", annotation_file, (str, os.PathLike), "a path, or Annotations")
        of_names = isinstance(known_classes, Collection) and all(isinstance(name, str) for name in known_classes)
        if isinstance(known_classes, str) or not of_names:
            raise ValueError(f"known_classes={reprlib.repr(known_classes)}: give a list of names")
        for name, function in (("transforms", transforms), ("late_transforms", late_transforms)):
            if function is not None and not callable(function):
                raise ValueError(f"{name} must be a function of (image, target), got {type(function).__name__}")
        for name, flag in (("drop_empty", drop_empty), ("plus_one", plus_one), ("skip_bad_images", skip_bad_images)):
            check_flag(name, flag)
        self.annotations = annotation_file if isinstance(annotation_file, Annotations) else Path(annotation_file)
        self.images_dir, self.annotation_file = Path(images_dir), file_of(self.annotations)
        self.transforms, self.late_transforms = transforms, late_transforms
        self.plus_one, self.skip_bad_images = plus_one, skip_bad_images
        index = open_index(self.annotations)
        self.annotations_sha256 = index.sha256
        annotation_file = self.annotation_file
        if not self.images_dir.is_dir():
            raise ValueError(f"{images_dir}: no such folder of images (for {annotation_file})")

        categories = index.categories
        if idle := idle_categories(categories, index.used_categories(), known_classes):
            names = ", ".join(f"{category['name']} (id {category['id']})" for category in idle)
            logger.warning("%s: no class is made of %s, which has no annotations", annotation_file, names)
            categories = [category for category in categories if category not in idle]
        categories = in_order(categories, known_classes)
        self.class_names = [category["name"] for category in categories]
        self.category_ids = [category["id"] for category in categories]
        # arrays, not lists: counting references to a list's items would copy its memory pages into every worker
        self.image_ids, self.file_names, self.sizes = index.image_ids, index.file_names, index.sizes
        owners, labels, boxes, problems = index.usable_boxes(self.category_ids, plus_one)
        self.problems = {kind: len(positions) for kind, positions in problems.items()}
        if self.problems:
            what = ", ".join(f"{kind}: {n}" for kind, n in self.problems.items())
            if len(boxes) == 0:
                raise ValueError(
                    f"{annotation_file}: none of its annotations can be used ({what}); check-data shows them"
                )
            logger.warning("%s: annotations dropped or changed (%s); check-data shows them", annotation_file, what)

        crowds = index.num_crowds
        if crowds and len(boxes) == 0:
            raise ValueError(
                f"{annotation_file}: all its annotations ({crowds}) are crowd regions, which are neither trained on "
                "nor scored; if they are single objects, write 'iscrowd': 0"
            )
        if crowds > len(boxes):
            logger.warning(
                "%s: most annotations, %d of %d, are crowd regions, which are neither trained on nor scored; if they "
                "are single objects, write 'iscrowd': 0",
                *(annotation_file, crowds, crowds + len(boxes)),
            )
        if are_fractions(boxes, self.sizes):
            raise ValueError(f"{annotation_file}: all boxes lie in the first pixel: are they fractions? write pixels")

        counts = np.bincount(owners, minlength=len(self.image_ids))
        order = np.argsort(owners, kind="stable")
        self._boxes, self._labels = boxes[order], labels[order]
        if drop_empty:
            kept = counts > 0
            self.image_ids, self.file_names, self.sizes = self.image_ids[kept], self.file_names[kept], self.sizes[kept]
            counts = counts[kept]
            if not kept.any():
                raise ValueError(f"{annotation_file}: no image has a usable box, so drop_empty leaves nothing")
        self._offsets = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return len(self.image_ids)

    def __repr__(self) -> str:
        counts = f"{counted(len(self), 'image')}, {counted(self.num_boxes, 'box')}"
        return (
            f"CocoDataset({self.annotation_file}, {counts}, {counted_classes(len(self.class_names), self.class_names)})"
        )

    def __getitem__(
        self, key: int | tuple[int, int] | tuple[int, int, bool]
    ) -> tuple[tv_tensors.Image, dict] | Skipped:
        """Load the image of `index`, of `(index, seed)`, or of `(index, seed, late)`, and transform it.

        With a seed, the sample depends on the key only, not on the worker, the rank or earlier samples: torch's
        default CPU generator, from which torchvision's transforms draw, is seeded for the transforms alone.

        Returns:
            image: `tv_tensors.Image` uint8 [3, H, W].
            target: `boxes` `tv_tensors.BoundingBoxes` XYXY float32 [N, 4], `labels` int64 [N], `image_id` int,
                `orig_size` (height, width) of the decoded image, before any transform.

        Raises:
            ImageError: the image, or another one that the transforms want, cannot be read, or its size is not the one
                in the JSON; the message names the file. With `skip_bad_images` a `Skipped` is returned instead.
            ValueError: the transforms gave labels that are no classes, or not one for each box; or `index` is a slice.
        """
        index, seed, late = (*key, False)[:3] if isinstance(key, tuple) else (key, None, False)
        if isinstance(index, slice):
            raise ValueError("a dataset gives one image at a time; torch.utils.data.Subset(dataset, range(10)) has ten")
        index = range(len(self))[index]
        transforms = self.late_transforms if late else self.transforms
        try:
            image, target = self.load(index)
            if transforms is None:
                return image, target
            with torch.random.fork_rng(devices=[], enabled=seed is not None):
                if seed is not None:
                    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
                sample = transforms(image, target)
        except ImageError as error:
            if not self.skip_bad_images:
                raise
            return Skipped(int(self.image_ids[index]), str(error))
        if problem := label_problem(sample[1], len(self.class_names)):
            raise ValueError(f"{self.images_dir / str(self.file_names[index])}: after the transforms, {problem}")
        return sample

    @property
    def num_boxes(self) -> int:
        """The number of boxes of all images together."""
        return int(self._offsets[-1])

    def all_boxes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the boxes of all images, without reading an image.

        Returns:
            owners: int64 [A], the index of each box's image, ascending.
            labels: int64 [A].
            boxes: float32 [A, 4] xyxy in pixels, as in the targets.
        """
        count = self.num_boxes
        return np.repeat(np.arange(len(self)), np.diff(self._offsets)), self._labels[:count], self._boxes[:count]

    @property
    def class_counts(self) -> list[int]:
        """The number of boxes of each class."""
        return np.bincount(self._labels, minlength=len(self.class_names)).tolist()

    @property
    def aspect_ratios(self) -> np.ndarray:
        """The ratio height / width of each image, float64 [N]."""
        return self.sizes[:, 0] / self.sizes[:, 1]

    def load(self, index: int) -> tuple[tv_tensors.Image, dict]:
        """Load the image of an index as it is, without the transforms; raises `ImageError`."""
        name, size = str(self.file_names[index]), tuple(self.sizes[index].tolist())
        image = tv_tensors.Image(self.read_image(name, size))
        rows = slice(self._offsets[index], self._offsets[index + 1])
        boxes = torch.from_numpy(self._boxes[rows].copy())
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.from_numpy(self._labels[rows].copy()),
            "image_id": int(self.image_ids[index]),
            "orig_size": size,
        }
        return image, target

    def read_image(self, name: str, size: tuple[int, int] | None = None) -> Tensor:
        """Read the image of a `file_name` as uint8 [3, H, W], from its file or from the table of the annotations.

        Raises:
            ImageError: it cannot be read, or its (height, width) is not `size`; the message names it.
        """
        if isinstance(self.annotations, Annotations) and self.annotations.read_image is not None:  # in a table
            data = self.annotations.read_image(name)
            path = self.annotation_file / name
        else:
            data = read_image_bytes(path := self.images_dir / name)
        return decode_image(data, path, size, str(self.annotation_file))


def in_order(categories: list[dict], names: Collection[str]) -> list[dict]:
    """Sort categories as `names` are, if these are all their names, each once; otherwise leave them as they are."""
    position = {name: i for i, name in enumerate(names)}
    own = [category["name"] for category in categories]
    if len(set(own)) < len(own) or set(own) != position.keys():
        return categories
    return sorted(categories, key=lambda category: position[category["name"]])


def label_problem(target: dict, num_classes: int | None) -> str | None:
    """Say why the labels of a target cannot be trained on; None if they can. Without `num_classes`, any is a class."""
    labels, boxes = torch.as_tensor(target["labels"]), target["boxes"]
    if labels.shape != (len(boxes),):
        return f"the labels of {counted(len(boxes), 'box')} have the shape {list(labels.shape)}; give one for each box"
    if len(labels) and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
        return f"the labels are {labels.dtype}; give whole numbers"
    last = labels.max().item() if num_classes is None and len(labels) else (num_classes or 0) - 1
    if len(labels) and not (0 <= labels.min() and labels.max() <= last):
        shown, among = sorted(set(labels.tolist()))[:5], "0 .. K-1" if num_classes is None else f"0 .. {last}"
        return (
            f"the labels {shown} are not all in {among}; number the classes from 0 on, without one for the background"
        )
    return None


@dataclass(frozen=True)
class Skipped:
    """This takes the place of a sample whose image cannot be used; `reason` is the text of its `ImageError`."""

    image_id: int
    reason: str
