"""`postprocess` turns predictions into detections, and `predict` turns image files into detections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple, TypedDict, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import functional as tvf

from .data import normalize, pil_to_rgb, read_image, resize_size
from .fcos import FCOS, Predictions, check_thresholds
from .nms import class_nms

ImageLike = str | PathLike | Image.Image | np.ndarray | Tensor


class Thresholds(NamedTuple):
    """These numbers decide which predictions become detections (arXiv 1904.01355, section 4)."""

    score_threshold: float | Tensor = 0.0
    """A detection is returned if its score is at least this: one number, or a tensor [K] of one for each class."""
    candidate_threshold: float = 0.05
    """A class at a location is a candidate if its probability, without centerness, is higher."""
    nms_threshold: float = 0.6
    """A box is dropped if its IoU with a better box of its class is higher."""
    topk: int = 1000
    """Candidates kept per level and image, the best by class probability times centerness."""
    max_detections: int = 100
    """Detections kept per image."""


class ThresholdOptions(TypedDict, total=False):
    """These options of `predict`, `postprocess` and `compile_detector` are the fields of `Thresholds`.

    `predict` and `compile_detector` know the model, so there `score_threshold` can also map class names to numbers.
    """

    score_threshold: float | Mapping[str, float] | Tensor
    candidate_threshold: float
    nms_threshold: float
    topk: int
    max_detections: int


def predict(
    model: FCOS, images: ImageLike | Sequence[ImageLike], **options: Unpack[ThresholdOptions]
) -> list[dict[str, Tensor]]:
    """Detect objects in one image or in several of any sizes.

    The network sees one image at a time, so that detections do not depend on the padding of other images.

    Args:
        model: a detector, on any device; afterwards it is in the same mode (train or eval) as before.
        images: a path, a PIL image, a uint8 array [H,W,3] or [H,W] (RGB or grey), a tensor [3,H,W] or [1,H,W] (uint8,
            or floating point in 0..1), or a sequence of these.
        options: fields of `Thresholds`: `score_threshold` (one score, or a mapping of class names to scores; a class
            that is not named has none; default: the config's `thresholds`), `candidate_threshold`, `nms_threshold`,
            `topk`, `max_detections`.

    Returns:
        One dict per image, on the CPU, best score first: `boxes` float32 [N,4] xyxy in pixels of the original image,
        `scores` float32 [N], `labels` int64 [N] (0..K-1; names in `model.config["class_names"]`).

    Raises:
        ValueError: an image cannot be read, or has an unusable type or shape; or the model has no class of a name in
            `score_threshold`.
    """
    device, dtype = next((p.device, p.dtype) for p in model.parameters())
    config, was_training, thresholds = model.config, model.training, choose_thresholds(model, options)
    model.eval()
    detections = []
    try:
        for item in as_sequence(images):
            with torch.inference_mode():
                image = to_rgb(item)
                height, width = image.shape[-2:]
                h, w = resize_size(height, width, config["min_size"], config["max_size"])
                resized = tvf.resize(image.to(device), [h, w], antialias=True)
                padded = pad(resized, (0, -w % 32, 0, -h % 32))[None]  # uint8 [1,3,H,W]
                sizes = torch.tensor([[h, w]], device=device)
                inputs = normalize(padded, sizes, config["image_mean"], config["image_std"]).to(dtype)
                inputs = inputs.contiguous(memory_format=torch.channels_last)  # faster, on a CPU and on a GPU
                (found,) = postprocess(model(inputs), sizes, plus_one=config["plus_one"], **thresholds._asdict())
            with torch.inference_mode(False):  # a tensor of the inference mode could not be changed in place later
                found = {key: value.cpu().clone() for key, value in found.items()}
                found["boxes"] *= torch.tensor([width / w, height / h]).repeat(2)
            detections.append(found)
    finally:
        model.train(was_training)
    return detections


def postprocess(
    preds: Predictions,
    image_sizes: Tensor | Sequence[tuple[int, int]],
    *,
    plus_one: bool = False,
    **options: Unpack[ThresholdOptions],
) -> list[dict[str, Tensor]]:
    """Decode predictions, drop low scores, and suppress overlapping boxes of a class (arXiv 1904.01355, section 4).

    Args:
        preds: predictions of B images.
        image_sizes: [B,2] or B pairs, (h, w) of the images in the network input, without padding; boxes are clipped
            to this size.
        plus_one: the published pixel convention, `model.config["plus_one"]`: a box covers the pixels x1..x2, so its
            width is x2 - x1 + 1; boxes are clipped to w - 1 and h - 1, no box is dropped as empty, and an IoU equal to
            `nms_threshold` suppresses.
        options: fields of `Thresholds`: `score_threshold` (one score, or a tensor [K]), `candidate_threshold`,
            `nms_threshold`, `topk`, `max_detections`.

    Returns:
        One dict per image, best score first: `boxes` [N,4] xyxy in pixels of the network input, `scores` [N], the
        geometric mean of class probability and centerness, `labels` int64 [N].

    Raises:
        ValueError: there is not one size for each image, or `score_threshold` is neither a number nor a tensor [K].
    """
    thresholds = Thresholds(**options)  # type: ignore[arg-type]  # a mapping is refused below
    num_classes = preds.logits.shape[-1]
    image_sizes, least = sizes_of(len(preds.logits), image_sizes), thresholds.score_threshold
    if isinstance(least, Mapping):
        raise ValueError("score_threshold by class name is for predict and compile_detector; give a tensor [K] here")
    if isinstance(least, Tensor) and least.shape not in ((), (num_classes,)):
        raise ValueError(f"score_threshold must be a number or a tensor [{num_classes}], got {list(least.shape)}")
    boxes, scores, labels = decode(preds, image_sizes, thresholds, plus_one)
    detections = []
    for box, score, label in zip(boxes, scores, labels, strict=True):
        candidate = score >= 0
        box, score, label = box[candidate], score[candidate], label[candidate]
        keep = class_nms(box, score, label, thresholds.nms_threshold, thresholds.max_detections, plus_one)
        detections.append({"boxes": box[keep], "scores": score[keep], "labels": label[keep]})
    return detections


def choose_thresholds(model: FCOS, options: ThresholdOptions) -> Thresholds:
    """Complete the options of `predict`: the model's own thresholds, and a tensor [K] in place of a mapping.

    Raises:
        ValueError: `score_threshold` is a mapping that does not fit the model's class names.
    """
    names, own = model.config["class_names"], model.config["thresholds"]
    if own is not None and "score_threshold" not in options:
        options = {**options, "score_threshold": own}
    thresholds = Thresholds(**options)  # type: ignore[arg-type]  # a mapping is replaced below
    if isinstance(thresholds.score_threshold, Mapping):
        scores = check_thresholds(thresholds.score_threshold, names, "score_threshold")
        least = torch.tensor([scores.get(name, 0.0) for name in names or ()], device=next(model.parameters()).device)
        thresholds = thresholds._replace(score_threshold=least)
    return thresholds


def sizes_of(count: int, image_sizes: Tensor | Sequence[tuple[int, int]], device: torch.device | None = None) -> Tensor:
    """Turn `image_sizes` into a tensor [count,2]. Raises ValueError unless there is one (h, w) for each image."""
    sizes = torch.as_tensor(image_sizes, device=device)
    if sizes.shape != (count, 2):
        raise ValueError(f"image_sizes must be [B,2], (h, w) of each of {count} images, got {list(sizes.shape)}")
    return sizes


def decode(
    preds: Predictions,
    image_sizes: Tensor,
    thresholds: Thresholds,
    plus_one: bool = False,
    level_sizes: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the best candidates of each level, and compute their boxes.

    Args:
        preds, plus_one: see `postprocess`.
        thresholds: `score_threshold`, `candidate_threshold` and `topk` are used.
        image_sizes: [B,2] (h, w) of the images in the network input.
        level_sizes: number of locations of each level. None reads it from the predictions, which a compiled graph
            cannot do.

    Returns:
        boxes: [B,N,4] xyxy, clipped to the image; N is the sum over levels of min(topk, locations * K).
        scores: [B,N], -1 for a place without a candidate.
        labels: [B,N].
    """
    if level_sizes is None:
        level_sizes = torch.unique_consecutive(preds.strides, return_counts=True)[1].tolist()
    limits = image_sizes.flip(-1).repeat(1, 2)[:, None].to(preds.distances) - int(plus_one)  # [B,1,4] w, h, w, h
    num_classes, least = preds.logits.shape[-1], thresholds.score_threshold
    found = []
    for logits, distances, centerness, points in zip(
        preds.logits.split(level_sizes, dim=1),  # [B,n,K]
        preds.distances.split(level_sizes, dim=1),  # [B,n,4]
        preds.centerness.split(level_sizes, dim=1),  # [B,n]
        preds.points.split(level_sizes),  # [n,2]
        strict=True,
    ):
        probability = logits.float().sigmoid()
        score = probability * centerness.float().sigmoid()[..., None]
        candidate = probability > thresholds.candidate_threshold
        if isinstance(least, Tensor) or least > 0:
            candidate &= score.sqrt() >= least  # before the choice of the best, which is for all classes together
        score = torch.where(candidate, score, -1.0).flatten(1)  # [B,n*K]
        score, index = score.topk(min(thresholds.topk, score.shape[1]))  # [B,k]
        location, label = index // num_classes, index % num_classes
        left_top, right_bottom = distances.gather(1, location[..., None].expand(-1, -1, 4)).chunk(2, dim=-1)
        point = points[location]  # [B,k,2]
        box = torch.cat([point - left_top, point + right_bottom], dim=-1).clamp(min=0).minimum(limits)  # [B,k,4]
        candidate = score >= 0
        if not plus_one:
            candidate &= (box[..., 2:] > box[..., :2]).all(-1)  # empty boxes lie in the padding
        found.append((box, torch.where(candidate, score.clamp(min=0).sqrt(), -1.0), label))
    boxes, scores, labels = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return boxes, scores, labels


def as_sequence(images: ImageLike | Sequence[ImageLike]) -> Sequence[ImageLike]:
    """Turn the `images` of `predict` into a sequence; a tensor [B,3,H,W] is one of B images."""
    if isinstance(images, Tensor):
        return [images] if images.ndim < 4 else list(images)
    return [images] if isinstance(images, (str, PathLike, Image.Image, np.ndarray)) else images


def to_rgb(image: ImageLike) -> Tensor:
    """Turn any kind of image that `predict` takes into uint8 [3,H,W] RGB.

    A PIL image becomes what its file would become: turned as its EXIF orientation says, 16 bits cut to the upper 8.
    """
    if isinstance(image, (str, PathLike)):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        try:
            return pil_to_rgb(image)
        except Exception as error:  # a damaged file raises anything when its pixels are first asked for
            name = getattr(image, "filename", "") or "a PIL image"
            raise ValueError(f"{name}: cannot use the image: {error or type(error).__name__}") from error
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise ValueError(f"an image array must be uint8 [H,W,3] or [H,W], got {image.dtype} {list(image.shape)}")
        array = image[..., None] if image.ndim == 2 else image
        image = torch.from_numpy(np.array(array)).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise ValueError(f"an image must be a path, PIL image, uint8 array or tensor, not {type(image).__name__}")
    if image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        raise ValueError(f"an image must have 1 or 3 channels, [3,H,W] as tensor, got {list(image.shape)}")
    if image.is_floating_point():
        if image.amin() < 0 or image.amax() > 1:
            raise ValueError("a floating point image must be in 0..1; give 0..255 as uint8")
        image = (image * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise ValueError(f"an image tensor must be uint8 or floating point, got {image.dtype}")
    return image.expand(3, -1, -1)
