"""This package reads COCO-format data; its modules are listed in the order in which an annotation travels.

`parse` (COCO JSON without polygons) -> `annotations` (to usable boxes) -> `index` (to arrays, kept for large files),
and `images` (files to pixels) -> `dataset` -> `transforms` -> `batches`.
`check` finds everything that is wrong with a dataset. Boxes are xyxy in pixels, images uint8 RGB `[3, H, W]`, labels
0..K-1 (foreground only).
"""

from .annotations import (
    annotation_problem,
    are_fractions,
    clip_boxes,
    coco_to_xyxy,
    entries_by_id,
    entry_problem,
    idle_categories,
    image_problem,
    is_crowd,
    parse_annotations,
    read_annotations,
    repeated,
    usable_boxes,
)
from .batches import Batch, TrainSampler, collate, normalize
from .dataset import CocoDataset, Skipped, find_split, label_problem, split_candidates
from .images import (
    FORMATS,
    MAX_IMAGE_BYTES,
    ImageError,
    ImageWarning,
    check_size,
    decode_image,
    open_image,
    pil_to_rgb,
    read_image,
    read_image_bytes,
)
from .transforms import (
    RandomScaleCrop,
    RandomShortestSide,
    eval_transforms,
    hflip_boxes,
    resize_image,
    resize_size,
    train_transforms,
)

__all__ = [
    "Batch",
    "CocoDataset",
    "FORMATS",
    "ImageError",
    "ImageWarning",
    "MAX_IMAGE_BYTES",
    "RandomScaleCrop",
    "RandomShortestSide",
    "Skipped",
    "TrainSampler",
    "annotation_problem",
    "are_fractions",
    "check_size",
    "clip_boxes",
    "coco_to_xyxy",
    "collate",
    "decode_image",
    "entries_by_id",
    "entry_problem",
    "eval_transforms",
    "find_split",
    "hflip_boxes",
    "idle_categories",
    "image_problem",
    "is_crowd",
    "label_problem",
    "normalize",
    "open_image",
    "parse_annotations",
    "pil_to_rgb",
    "read_annotations",
    "read_image",
    "read_image_bytes",
    "repeated",
    "resize_image",
    "resize_size",
    "split_candidates",
    "train_transforms",
    "usable_boxes",
]
