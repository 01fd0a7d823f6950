"""`TrainSampler` chooses the images of each batch; `collate` and `normalize` make its tensors."""

import itertools
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torchvision import tv_tensors

from ..arguments import check_number
from .dataset import CocoDataset, Skipped, label_problem


class TrainSampler:
    """This batch sampler shuffles for training without end; its batches depend on its arguments only.

    Each step yields the keys `(index, seed)` of one rank, a contiguous part of the global batch. The global batch of
    step n is the same for any world size, number of workers and starting step. Every epoch visits all images once (but
    see `repeats`); images that do not fill a batch wait for the next epoch. The seed of a sample depends on
    (seed, epoch, index).

    Args:
        aspect_ratios: [N] height / width of the images.
        batch_size: images of the global batch, over all ranks.
        num_steps: steps of the whole training; the sampler yields the steps `start_step` to `num_steps - 1`.
        seed: batches differ between seeds.
        rank, world_size: which part of each batch this process takes, of how many.
        start_step: the first step, to resume a training.
        group_by_aspect: make each batch of wide images or of tall ones, to save padding.
        repeats: give each image so many times in a row, with other seeds, and so many fewer images in an epoch
            (repeated augmentation, arXiv 1902.05509).
        factors: [N], how many times an epoch shows each image, on average; None shows each once. An epoch draws whether
            a factor of 1.3 means 1 or 2.
        late_from: from this step on, keys are `(index, seed, True)`, for the `late_transforms` of a dataset.

    Raises:
        ValueError: `batch_size` is not a multiple of `world_size`, or another argument is out of range.
    """

    def __init__(
        self,
        aspect_ratios: Sequence[float],
        batch_size: int,
        *,
        num_steps: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        group_by_aspect: bool = True,
        repeats: int = 1,
        factors: ArrayLike | None = None,
        late_from: int | None = None,
    ):
        tall = np.asarray(aspect_ratios) >= 1
        if len(tall) == 0:
            raise ValueError("no images to sample from")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"global batch size {batch_size} is not a multiple of the world size {world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not within the world size of {world_size}")
        if repeats < 1:
            raise ValueError(f"repeats={repeats!r}: give a whole number of 1 or more")
        if start_step < 0 or seed < 0 or num_steps < 0 or (late_from or 0) < 0:
            raise ValueError(
                f"start_step ({start_step}), num_steps ({num_steps}), seed ({seed}) and late_from ({late_from}) must "
                "not be negative"
            )
        if factors is not None:
            factors = np.asarray(factors, dtype=np.float64)
            if factors.shape != tall.shape or not (factors >= 1).all() or np.isinf(factors).any():
                raise ValueError(f"factors: give a number of 1 or more for each of the {len(tall)} images")
        self.factors, self.late_from = factors, late_from
        self.groups = tall if group_by_aspect else np.zeros_like(tall)
        self.batch_size, self.num_steps, self.start_step = batch_size, num_steps, start_step
        self.seed, self.rank, self.world_size, self.repeats = seed, rank, world_size, repeats

    def __len__(self) -> int:
        return max(0, self.num_steps - self.start_step)

    def __iter__(self) -> Iterator[list[tuple[int, int]] | list[tuple[int, int, bool]]]:
        share = self.batch_size // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        if len(set(self.groups.tolist())) == 1 and self.factors is None:  # no earlier epoch matters
            first, batches = 0, self._global_batches(*divmod(self.start_step * self.batch_size, len(self.groups)))
        else:
            first, batches = self.start_step, self._global_batches()
        for step, batch in enumerate(itertools.islice(batches, first, first + len(self)), self.start_step):
            late = self.late_from is not None and step >= self.late_from
            yield [(index, seed, True) for index, seed in batch[mine]] if late else batch[mine]

    def _global_batches(self, first_epoch: int = 0, skip: int = 0) -> Iterator[list[tuple[int, int]]]:
        """Give the batches from an epoch on, without the first `skip` images of that epoch."""
        groups = self.groups.tolist()
        waiting: tuple[list, list] = ([], [])
        for epoch in itertools.count(first_epoch):
            rng = np.random.default_rng((self.seed, epoch))
            images = list(range(len(groups)))
            if self.factors is not None:
                images = np.repeat(images, np.floor(self.factors + rng.random(len(images))).astype(np.int64)).tolist()
            order, seeds = rng.permutation(len(images)).tolist(), rng.integers(2**63, size=len(images)).tolist()
            for place in range(skip, len(order)):
                drawn = order[place // self.repeats]
                index = images[drawn]
                group = waiting[groups[index]]
                group.append((index, seeds[drawn] + place % self.repeats))
                if len(group) == self.batch_size:
                    yield list(group)
                    group.clear()
            skip = 0


def repeat_factors(dataset: CocoDataset, threshold: float) -> np.ndarray:
    """Compute how often an epoch should show each image, so that rare classes are seen (arXiv 1908.03195).

    A class that is in a share f of the images, less than `threshold`, wants each of its images `sqrt(threshold / f)`
    times. An image is shown as often as the rarest of its classes wants, and at least once.

    Returns:
        float64 [N], at least 1, for `TrainSampler`.

    Raises:
        ValueError: `threshold` is not from 0 to 1.
    """
    check_number("threshold", threshold, 0, 1)
    owners, labels, _ = dataset.all_boxes()
    pairs = np.unique(np.stack([owners, labels], axis=1), axis=0)  # (image, class)
    images = np.bincount(pairs[:, 1], minlength=len(dataset.class_names))  # of each class
    wanted = np.sqrt(threshold * len(dataset) / np.maximum(images, 1))
    factors = np.ones(len(dataset))
    np.maximum.at(factors, pairs[:, 0], wanted[pairs[:, 1]])
    return factors


class Batch(TypedDict):
    """A batch of a `CocoDataset` has these tensors, see `collate`."""

    images: Tensor
    sizes: Tensor
    orig_sizes: Tensor
    boxes: Tensor
    labels: Tensor
    image_ids: Tensor
    skipped: NotRequired[list[Skipped]]


def collate(
    batch: list[tuple[Tensor, dict] | Skipped], size_divisor: int = 32, *, num_classes: int | None = None
) -> Batch:
    """Pad the samples of a `CocoDataset` to one batch.

    If all samples are `Skipped`, the batch is one blank 32x32 image (id -1) without boxes, so that no step is missing.

    Args:
        batch: images uint8 [3, H, W], each with a dict: `boxes` [N, 4] and `labels` [N] (tensors, arrays or lists),
            `image_id` (a whole number) and `orig_size` (height, width) before the transforms.
        size_divisor: divides the height and the width of the batch.
        num_classes: K; labels of K or more are refused. None knows only that labels are not negative.

    Returns:
        images: uint8 [B, 3, H, W], padded with 0 at the bottom and right; H and W are the largest height and width,
            rounded up to a multiple of `size_divisor`.
        sizes: int64 [B, 2] (height, width) without padding.
        orig_sizes: int64 [B, 2] (height, width) before the transforms.
        boxes: float32 [B, M, 4] xyxy in pixels of `images`, padded with 0; M is the largest number of boxes of an
            image, at least 1.
        labels: int64 [B, M], padded with -1.
        image_ids: int64 [B].
        skipped: list of the `Skipped` samples, which are not in the batch; without any, the key is absent.

    Raises:
        ValueError: an image is not uint8 [3, H, W], its boxes are not [N, 4], or `BoundingBoxes` of another format than
            XYXY or of an image of another size, or the labels of a sample are out of range, or not one for each box;
            the message has its `image_id`. Or a target lacks one of its four keys.
    """
    if size_divisor < 1:
        raise ValueError(f"size_divisor={size_divisor!r}: give a whole number of 1 or more")
    if not batch:
        raise ValueError("a batch needs at least one sample")
    skipped = [sample for sample in batch if isinstance(sample, Skipped)]
    samples = [sample for sample in batch if not isinstance(sample, Skipped)] or [_blank_sample()]
    images, targets = zip(*samples, strict=True)
    for image, target in samples:
        if missing := [key for key in ("boxes", "labels", "image_id", "orig_size") if key not in target]:
            has = f"a target has no {', '.join(missing)}, only {', '.join(map(str, target))}"
            raise ValueError(f"{has}; orig_size is the image's (height, width) before the transforms")
        if not isinstance(target["image_id"], Integral | Tensor):
            raise ValueError(f"image_id={target['image_id']!r}: give a whole number")
        if problem := _image_problem(image) or _box_problem(image, target) or label_problem(target, num_classes):
            raise ValueError(f"image {int(target['image_id'])}: {problem}")
    sizes = torch.tensor([image.shape[-2:] for image in images])
    height, width = (-(-sizes.amax(0) // size_divisor) * size_divisor).tolist()
    most = max(1, *(len(target["labels"]) for target in targets))
    out: Batch = {
        # channels last in memory, as decoding and resizing leave the images, so that no image is transposed
        "images": torch.zeros(len(samples), height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2),
        "sizes": sizes,
        "orig_sizes": torch.stack([torch.as_tensor(target["orig_size"]) for target in targets]),
        "boxes": torch.zeros(len(samples), most, 4),
        "labels": torch.full((len(samples), most), -1),
        "image_ids": torch.tensor([int(target["image_id"]) for target in targets]),
    }
    for i, (image, target) in enumerate(samples):
        out["images"][i, :, : image.shape[-2], : image.shape[-1]] = image
        if count := len(target["labels"]):
            out["boxes"][i, :count] = torch.as_tensor(target["boxes"])
            out["labels"][i, :count] = torch.as_tensor(target["labels"])
    if skipped:
        out["skipped"] = skipped
    return out


def _image_problem(image: Tensor) -> str | None:
    """Say why an image cannot be in a batch; None if it can."""
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3:
        return None
    got = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
    advice = "leave ToDtype and Normalize out of the transforms: vovnet_zoo.data.normalize takes the batch"
    is_float = isinstance(image, Tensor) and image.is_floating_point()
    return f"a batch takes uint8 tensors [3, H, W], got {got}{'; ' + advice if is_float else ''}"


def _box_problem(image: Tensor, target: dict) -> str | None:
    """Say why boxes cannot be in a batch, by their shape or by the format and size that they know; None if they can."""
    boxes = target["boxes"]
    if not isinstance(boxes, tv_tensors.BoundingBoxes):
        shape = list(torch.as_tensor(boxes).shape)
        wrong = len(boxes) and shape != [len(boxes), 4]  # without boxes, a list has the shape [0]
        return f"its boxes have the shape {shape}; give [N, 4]" if wrong else None
    if boxes.format != tv_tensors.BoundingBoxFormat.XYXY:
        return f"its boxes are {boxes.format.value}; end the transforms with v2.ConvertBoundingBoxFormat('XYXY')"
    if tuple(boxes.canvas_size) != (size := tuple(image.shape[-2:])):
        given = f"boxes of an image of {tuple(boxes.canvas_size)} (height, width), which is {size} now"
        return (
            f"the target has {given}; transforms must take image and target together, as v2.Resize(..)(image, target)"
        )
    return None


def _blank_sample() -> tuple[Tensor, dict]:
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return torch.zeros(3, 32, 32, dtype=torch.uint8), {**nothing, "image_id": -1, "orig_size": (32, 32)}


def normalize(images: Tensor, sizes: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Compute `(images - 255 * mean) / (255 * std)`, with 0 in the padding. Compiles as one graph.

    Args:
        images: uint8 [B, C, H, W].
        sizes: int [B, 2] (height, width) without padding, on the same device.
        mean, std: C numbers, for colours in 0..1.

    Returns:
        float32 [B, C, H, W].

    Raises:
        ValueError: the number of means or of standard deviations is not C.
    """
    # mean and std as Python numbers need no copy to the device in every step
    channels = zip(images.unbind(1), mean, std, strict=True)
    x = torch.stack([(channel.float() - 255 * m) / (255 * s) for channel, m, s in channels], dim=1)
    rows = torch.arange(x.shape[2], device=x.device) < sizes[:, :1]  # [B, H]
    columns = torch.arange(x.shape[3], device=x.device) < sizes[:, 1:]  # [B, W]
    return x.masked_fill(~(rows[:, None, :, None] & columns[:, None, None, :]), 0)
