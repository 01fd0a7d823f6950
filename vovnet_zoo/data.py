"""COCO-format detection data: dataset, transforms, sampler, collate.

Boxes are xyxy in pixels, images uint8 RGB `[3, H, W]`, labels 0..K-1 (foreground only).
"""

import io
import itertools
import json
import logging
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

try:  # 1.5 times the speed of Pillow, but deprecated since torchvision 0.29
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

logger = logging.getLogger(__name__)

Image.init()
# Not all that Pillow knows: some need a plugin's word that a text is an image, EPS runs an interpreter.
FORMATS = [
    name for name in ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM") if name in Image.OPEN
]
MAX_IMAGE_BYTES = 2**31 - 1  # of an image file: what is larger is none, and would not fit into memory


class CocoDataset(torch.utils.data.Dataset):
    """Images and boxes of a COCO-format annotation file, in the order of the image ids.

    Crowd regions are left out. So are, counted in `problems` and reported in one warning, annotations that cannot be
    used: unknown image or category, a box that is not four finite numbers, empty or outside the image. Boxes partly
    outside are clipped (counted if by more than one pixel).

    Args:
        images_dir: the folder that `file_name` is relative to.
        annotation_file: COCO JSON; every image needs `id`, `file_name`, `width` and `height`.
        transforms: `(image, target) -> (image, target)`, see `train_transforms` and `eval_transforms`.
        drop_empty: leave out images without a usable box (the published recipes do).
        plus_one: boxes in the published convention, see `coco_to_xyxy`.
        skip_bad_images: give a `Skipped` for an image that cannot be used, which `collate` leaves out of the batch.

    Attributes:
        class_names, category_ids: name and original category id of each label, K of both.
        image_ids: int64 [N], ascending; file_names: str [N]; sizes: int64 [N, 2] (height, width) from the JSON.
        problems: number of annotations per kind of problem, `{}` for a clean file.

    Raises ValueError, naming the file, if the annotation file as a whole, or every annotation in it, cannot be used.
    """

    def __init__(
        self,
        images_dir: str | Path,
        annotation_file: str | Path,
        *,
        transforms: Callable | None = None,
        drop_empty: bool = False,
        plus_one: bool = False,
        skip_bad_images: bool = False,
    ):
        self.images_dir, self.annotation_file = Path(images_dir), Path(annotation_file)
        self.transforms, self.skip_bad_images = transforms, skip_bad_images
        coco = read_annotations(annotation_file)
        if not self.images_dir.is_dir():
            raise ValueError(f"{images_dir}: no such folder of images (for {annotation_file})")

        categories = entries_by_id(coco["categories"], "categories", "name", annotation_file)
        images = entries_by_id(coco["images"], "images", "file_name", annotation_file)
        for image in images:
            if problem := image_problem(image):
                raise ValueError(f"{annotation_file}: {problem}")
        self.class_names = [category["name"] for category in categories]
        self.category_ids = [category["id"] for category in categories]
        # arrays, not lists: workers then share these pages instead of copying them one reference count at a time
        self.image_ids = np.array([image["id"] for image in images], dtype=np.int64)
        self.file_names = np.array([image["file_name"] for image in images])
        self.sizes = np.array([(image["height"], image["width"]) for image in images], dtype=np.int64)

        owners, labels, boxes, problems = usable_boxes(
            coco["annotations"],
            {image_id: i for i, image_id in enumerate(self.image_ids.tolist())},
            {category_id: label for label, category_id in enumerate(self.category_ids)},
            self.sizes,
            plus_one,
        )
        self.problems = {kind: len(positions) for kind, positions in problems.items()}
        if self.problems:
            counts = ", ".join(f"{kind}: {n}" for kind, n in self.problems.items())
            if len(boxes) == 0:
                raise ValueError(f"{annotation_file}: none of its annotations can be used ({counts})")
            logger.warning("%s: annotations dropped or changed (%s)", annotation_file, counts)

        if are_fractions(boxes, self.sizes):
            raise ValueError(f"{annotation_file}: all boxes lie in the first pixel: are they fractions? write pixels")

        counts = np.bincount(owners, minlength=len(images))
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

    def __getitem__(self, key: int | tuple[int, int]) -> "tuple[tv_tensors.Image, dict] | Skipped":
        """The image of `index`, or of `(index, seed)`: torch's generator is then seeded for the transforms alone.

        With a seed, what comes out depends on the key only, not on the worker, rank or history (as long as the
        transforms draw from torch's default CPU generator, as torchvision's do).

        Returns:
            image: `tv_tensors.Image` uint8 [3, H, W].
            target: `boxes` `tv_tensors.BoundingBoxes` XYXY float32 [N, 4], `labels` int64 [N], `image_id` int,
                `orig_size` (height, width) of the decoded image, before any transform.

        Raises `ImageError`, a ValueError, naming the file, if the image cannot be read or is not of the size the JSON
        says; with `skip_bad_images` it returns a `Skipped` instead.
        """
        index, seed = key if isinstance(key, tuple) else (key, None)
        index = range(len(self))[index]
        try:
            image, target = self._load(index)
        except ImageError as error:
            if not self.skip_bad_images:
                raise
            return Skipped(int(self.image_ids[index]), str(error))
        if self.transforms is None:
            return image, target
        if seed is None:
            return self.transforms(image, target)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which reseeds the accelerators too
            return self.transforms(image, target)

    @property
    def aspect_ratios(self) -> np.ndarray:
        """float64 [N], height / width."""
        return self.sizes[:, 0] / self.sizes[:, 1]

    def _load(self, index: int) -> tuple[tv_tensors.Image, dict]:
        path = self.images_dir / str(self.file_names[index])
        image = tv_tensors.Image(read_image(path))
        size = tuple(image.shape[-2:])
        check_size(path, size, tuple(self.sizes[index].tolist()), self.annotation_file)
        rows = slice(self._offsets[index], self._offsets[index + 1])
        boxes = torch.from_numpy(self._boxes[rows].copy())
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.from_numpy(self._labels[rows].copy()),
            "image_id": int(self.image_ids[index]),
            "orig_size": size,
        }
        return image, target


@dataclass(frozen=True)
class Skipped:
    """In place of a sample: an image that cannot be used, and why (the text of its `ImageError`, with the path)."""

    image_id: int
    reason: str


class ImageError(ValueError):
    """An image file that cannot be used; `kind` is a few words, the same ones for all files with this problem."""

    def __init__(self, message: str, kind: str = "damaged image"):
        super().__init__(message)
        self.kind = kind


def find_split(root: str | Path, split: str) -> tuple[Path, Path]:
    """`(images_dir, annotation_file)` of a split ("train", "val", ...) below `root`.

    Known layouts, YEAR being any number or nothing:
        root/annotations/instances_{split}{YEAR}.json with root/{split}{YEAR}/ or root/images/{split}{YEAR}/
        root/{split}/_annotations.coco.json beside its images ("valid" also stands for "val")

    Raises ValueError if none or several are there, saying which.
    """
    root, found = Path(root), split_candidates(root, split)
    if len(found) == 1:
        return found[0]
    if found:
        pairs = "; ".join(f"{file} with {folder}" for folder, file in found)
        raise ValueError(f"{root}: several '{split}' splits, remove or rename all but one: {pairs}")
    there = [str(path.relative_to(root)) for path in sorted([*root.iterdir(), *root.glob("annotations/*")])]
    raise ValueError(
        f"{root}: no '{split}' split; looked for annotations/instances_{split}[YEAR].json with {split}[YEAR]/ or "
        f"images/{split}[YEAR]/, and for {split}/_annotations.coco.json; there is: {', '.join(there[:20]) or 'nothing'}"
        f"{', ...' if len(there) > 20 else ''}"
    )


def split_candidates(root: str | Path, split: str) -> list[tuple[Path, Path]]:
    """All that `find_split` could mean. Raises ValueError if `root` is no folder."""
    root, found = Path(root), []
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    for file in sorted((root / "annotations").glob(f"instances_{split}*.json")):
        if re.fullmatch(rf"instances_{re.escape(split)}\d*", file.stem):
            name = file.stem.removeprefix("instances_")
            found += [(folder, file) for folder in (root / name, root / "images" / name) if folder.is_dir()]
    for name in (split, "valid") if split == "val" else (split,):
        file = root / name / "_annotations.coco.json"
        found += [(root / name, file)] if file.is_file() else []
    return found


# ---- transforms: all take and return (image, target) ----------------------------------------------------------------


def train_transforms(
    min_size: tuple[int, int] = (640, 800),
    max_size: int = 1333,
    augment: str = "flip",
    *,
    flip: float = 0.5,
    scale: tuple[float, float] = (0.5, 2.0),
    color: float = 0.0,
    plus_one: bool = False,
) -> v2.Compose:
    """Augmentation for training; boxes come out inside the image and at least one pixel wide and high.

    Args:
        min_size: range (inclusive) of the shorter side in pixels, drawn per image.
        max_size: limit of the longer side in pixels.
        augment: "none" resizes; "flip" also mirrors; "jitter_crop" also zooms and crops, see `RandomScaleCrop`.
        flip: probability of mirroring.
        scale: range of the zoom of "jitter_crop".
        color: largest relative change of brightness, contrast and saturation, 0 for none.
        plus_one: mirror in the published convention and, like the published code, leave the boxes as they come out;
            not for "jitter_crop".

    Raises ValueError on an unknown `augment` or a range that is none.
    """
    if augment not in ("none", "flip", "jitter_crop"):
        raise ValueError(f"augment is one of 'none', 'flip', 'jitter_crop', not {augment!r}")
    if plus_one and augment == "jitter_crop":
        raise ValueError("plus_one goes with augment 'none' or 'flip': the published models know no 'jitter_crop'")
    steps = []
    if augment == "jitter_crop":
        steps.append(RandomScaleCrop(min_size, max_size, scale))
    else:
        steps.append(RandomShortestSide(min_size, max_size))
    if augment != "none":
        steps.append(_RandomPlusOneFlip(flip) if plus_one else v2.RandomHorizontalFlip(flip))
    if color:
        steps.append(v2.ColorJitter(brightness=color, contrast=color, saturation=color))
    if not plus_one:
        steps += [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()]
    return v2.Compose(steps)


def eval_transforms(min_size: int = 800, max_size: int = 1333) -> v2.Compose:
    """Published test resize: shorter side to `min_size`, longer at most about `max_size` pixels."""
    return v2.Compose(
        [RandomShortestSide((min_size, min_size), max_size), v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()]
    )


class RandomShortestSide(v2.Transform):
    """Resizes to a shorter side drawn from `min_sizes` (low, high; inclusive) by the rule of `resize_size`."""

    def __init__(self, min_sizes: tuple[int, int], max_size: int):
        super().__init__()
        self.min_sizes, self.max_size = _int_range(min_sizes), max_size

    def make_params(self, flat_inputs: list) -> dict:
        return {"size": resize_size(*v2.query_size(flat_inputs), _randint(*self.min_sizes), self.max_size)}

    def transform(self, inpt, params: dict):
        return F.resize(inpt, list(params["size"]), antialias=True)


class RandomScaleCrop(v2.Transform):
    """Zooms by a factor around the size that `RandomShortestSide` would give, and crops to at most that size.

    The factor is log-uniform in `scale`. Above 1 a random window is cut out and enlarged; below 1 the whole image
    becomes smaller. Boxes outside the window come out empty: clamp and sanitize after it.
    """

    def __init__(self, min_sizes: tuple[int, int], max_size: int, scale: tuple[float, float]):
        super().__init__()
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale is (low, high) with 0 < low <= high, not {scale}")
        self.min_sizes, self.max_size, self.scale = _int_range(min_sizes), max_size, scale

    def make_params(self, flat_inputs: list) -> dict:
        height, width = v2.query_size(flat_inputs)
        target = resize_size(height, width, _randint(*self.min_sizes), self.max_size)
        low, high = np.log(self.scale)
        zoom = float(np.exp(low + (high - low) * torch.rand(()).item()))
        window = [max(1, round(side / max(zoom, 1))) for side in (height, width)]
        return {
            "top": _randint(0, height - window[0]),
            "left": _randint(0, width - window[1]),
            "height": window[0],
            "width": window[1],
            "size": [max(1, round(side * min(zoom, 1))) for side in target],
        }

    def transform(self, inpt, params: dict):
        return F.resized_crop(inpt, **params, antialias=True)


class _RandomPlusOneFlip(v2.RandomHorizontalFlip):
    """Mirrors boxes in the published convention."""

    def transform(self, inpt, params: dict):
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            boxes = hflip_boxes(inpt.as_subclass(Tensor), inpt.canvas_size[1], plus_one=True)
            return tv_tensors.wrap(boxes, like=inpt)
        return super().transform(inpt, params)


def resize_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Published size rule, `(height, width)` in pixels, both at least 1.

    The shorter side becomes `min_size`, or what brings the longer to `max_size`, rounded; the longer is then computed
    from the shorter and truncated, so it may pass `max_size` by up to half the aspect ratio.
    """
    short, long = sorted((height, width))
    size = min_size
    if long / short * size > max_size:
        size = round(max_size * short / long)
    if size == 0:  # beyond 2 * max_size : 1 the rule gives nothing
        size, other = 1, max_size
    else:
        other = int(size * long / short)
    return (size, other) if height <= width else (other, size)


def coco_to_xyxy(xywh, height, width, plus_one: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """COCO boxes to clipped corners.

    Args:
        xywh: [N, 4] left, top, width, height in pixels.
        height, width: of the image in pixels, numbers or [N].
        plus_one: the published convention: `x2 = x + max(w - 1, 0)`, clipped to [0, width - 1] (likewise y);
            otherwise `x2 = x + w`, clipped to [0, width].

    Returns:
        boxes: float32 [N, 4] xyxy; keep: bool [N], where something is left of the box (False for NaN).
    """
    one = int(plus_one)
    xywh = np.asarray(xywh, dtype=np.float64).reshape(-1, 4)
    limit = np.stack(np.broadcast_arrays(width, height), axis=-1) - one  # [2] or [N, 2]
    start, extent = xywh[:, :2], xywh[:, 2:]
    end = start + (np.maximum(extent - 1, 0) if plus_one else extent)
    boxes = np.concatenate([np.clip(start, 0, limit), np.clip(end, 0, limit)], axis=1).astype(np.float32)
    return boxes, (boxes[:, 2:] > boxes[:, :2]).all(axis=1)


def hflip_boxes(boxes: Tensor, width: int, plus_one: bool = False) -> Tensor:
    """Mirrors xyxy boxes [..., 4] in an image `width` pixels wide; `plus_one`: `x1' = width - x2 - 1` (published)."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    one = int(plus_one)
    return torch.stack([width - x2 - one, y1, width - x1 - one, y2], dim=-1)


# ---- batches --------------------------------------------------------------------------------------------------------


class TrainSampler:
    """Batch sampler for endless shuffled training, a pure function of its arguments.

    Each step yields the keys `(index, seed)` of this rank: its contiguous share of the global batch. Step n gives the
    same global batch for any world size, worker count and starting point. Every epoch goes through all images once;
    what does not fill a batch waits for the next epoch. A sample's seed depends on (seed, epoch, index).

    Args:
        aspect_ratios: [N] height / width of the images.
        batch_size: global, over all ranks.
        num_steps: of the whole training; iteration covers `start_step` to `num_steps - 1`.
        group_by_aspect: make each batch of wide images or of tall ones, to save padding.

    Raises ValueError on a batch that cannot be shared out or arguments out of range.
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
    ):
        tall = np.asarray(aspect_ratios) >= 1
        if len(tall) == 0:
            raise ValueError("no images to sample from")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"global batch size {batch_size} is not a multiple of the world size {world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not within the world size of {world_size}")
        if start_step < 0 or seed < 0:
            raise ValueError(f"start_step ({start_step}) and seed ({seed}) must not be negative")
        self.groups = tall if group_by_aspect else np.zeros_like(tall)
        self.batch_size, self.num_steps, self.start_step = batch_size, num_steps, start_step
        self.seed, self.rank, self.world_size = seed, rank, world_size

    def __len__(self) -> int:
        return max(0, self.num_steps - self.start_step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        for batch in itertools.islice(self._global_batches(), self.start_step, max(self.start_step, self.num_steps)):
            yield batch[mine]

    def _global_batches(self) -> Iterator[list[tuple[int, int]]]:
        groups, waiting = self.groups.tolist(), ([], [])
        for epoch in itertools.count():
            rng = np.random.default_rng((self.seed, epoch))
            order, seeds = rng.permutation(len(groups)).tolist(), rng.integers(2**63, size=len(groups)).tolist()
            for index in order:
                group = waiting[groups[index]]
                group.append((index, seeds[index]))
                if len(group) == self.batch_size:
                    yield list(group)
                    group.clear()


def collate(batch: list[tuple[Tensor, dict] | Skipped], size_divisor: int = 32) -> dict[str, Tensor]:
    """Pads the samples of a `CocoDataset` to one batch.

    If all samples are `Skipped` the batch is one blank 32x32 image (id -1) without boxes, so that no step is missing.

    Returns:
        images: uint8 [B, 3, H, W], zeros at the bottom and right; H, W the largest, rounded up to `size_divisor`.
        sizes: int64 [B, 2] (height, width) without padding; orig_sizes: int64 [B, 2] before the transforms.
        boxes: float32 [B, M, 4] xyxy in pixels of `images`, M the most boxes of an image, at least 1; padding 0.
        labels: int64 [B, M], padding -1; image_ids: int64 [B].
        skipped: list of the `Skipped` samples that are not in the above; there is no such key if there are none.
    """
    skipped = [sample for sample in batch if isinstance(sample, Skipped)]
    samples = [sample for sample in batch if not isinstance(sample, Skipped)] or [_blank_sample()]
    images, targets = zip(*samples, strict=True)
    sizes = torch.tensor([image.shape[-2:] for image in images])
    height, width = (-(-sizes.amax(0) // size_divisor) * size_divisor).tolist()
    most = max(1, *(len(target["labels"]) for target in targets))
    out = {
        # channels last in memory, as decoding and resizing leave them: nothing is transposed
        "images": torch.zeros(len(samples), height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2),
        "sizes": sizes,
        "orig_sizes": torch.tensor([target["orig_size"] for target in targets]),
        "boxes": torch.zeros(len(samples), most, 4),
        "labels": torch.full((len(samples), most), -1),
        "image_ids": torch.tensor([target["image_id"] for target in targets]),
    }
    for i, (image, target) in enumerate(samples):
        out["images"][i, :, : image.shape[-2], : image.shape[-1]] = image
        out["boxes"][i, : len(target["boxes"])] = target["boxes"]
        out["labels"][i, : len(target["labels"])] = target["labels"]
    return out | ({"skipped": skipped} if skipped else {})


def _blank_sample() -> tuple[Tensor, dict]:
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return torch.zeros(3, 32, 32, dtype=torch.uint8), {**nothing, "image_id": -1, "orig_size": (32, 32)}


def normalize(images: Tensor, sizes: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`(images - 255 * mean) / (255 * std)`, and 0 in the padding.

    Args:
        images: uint8 [B, C, H, W]; sizes: int [B, 2] (height, width) without padding, on the same device.
        mean, std: C numbers, for colours in 0..1.

    Returns float32 [B, C, H, W]. Compiles as one graph. Raises ValueError unless there is a mean per channel.
    """
    # Python numbers, not tensors: no copy to the device in every step
    channels = zip(images.unbind(1), mean, std, strict=True)
    x = torch.stack([(channel.float() - 255 * m) / (255 * s) for channel, m, s in channels], dim=1)
    rows = torch.arange(x.shape[2], device=x.device) < sizes[:, :1]  # [B, H]
    columns = torch.arange(x.shape[3], device=x.device) < sizes[:, 1:]  # [B, W]
    return x.masked_fill(~(rows[:, None, :, None] & columns[:, None, None, :]), 0)


# ---- files ----------------------------------------------------------------------------------------------------------


def read_image(source: str | Path | bytes) -> Tensor:
    """Reads an image file, or its bytes, as RGB uint8 [3, H, W], turned as its EXIF orientation says.

    Grey, palette, CMYK, 1-bit and 16-bit (its upper byte) images become RGB; alpha is dropped; of several frames the
    first is read.

    Raises `ImageError`, naming the file, if it is missing, not an image of `FORMATS`, truncated (a JPEG without its end
    marker is), damaged so that the decoder notices, too large (`PIL.Image.MAX_IMAGE_PIXELS`), or floating-point.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return decode_image(bytes(source), "<bytes>")
    return decode_image(read_image_bytes(source), source)


def read_image_bytes(path: str | Path) -> bytes:
    """What is in an image file. Raises `ImageError` if there is none."""
    try:
        return _read_bytes(path, "image", MAX_IMAGE_BYTES)
    except ValueError as error:
        backslashes = "\\" in str(path) and os.sep == "/"
        hint = "; write its backslashes as '/' in the JSON" if backslashes else "; restore it or correct its path"
        kind = "missing image file" if isinstance(error.__cause__, FileNotFoundError) else "unreadable image file"
        raise ImageError(f"{error}{hint}", kind) from error.__cause__


def decode_image(data: bytes, name: str | Path) -> Tensor:
    """`read_image` of the bytes of the file `name`."""
    if not data:
        raise ImageError(f"{name}: the image file is empty (0 bytes); replace or remove it", "empty image file")
    try:
        with open_image(data) as image:
            return _decode(image, data)
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image of a known format; convert or remove it", "not an image") from error
    except Exception as error:  # on hostile bytes the decoders raise anything from SyntaxError to struct.error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ImageError(f"{name}: cannot decode the image: {reason}; replace or remove it") from error


def open_image(data: bytes) -> Image.Image:
    """Parses the header only, and refuses decompression bombs."""
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _decode(image: Image.Image, data: bytes) -> Tensor:
    if image.format in ("JPEG", "MPO"):
        if not _jpeg_ends(data):
            raise ValueError("truncated, the JPEG end marker is missing")
        if decode_jpeg is not None:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_jpeg(buffer, ImageReadMode.RGB, apply_exif_orientation=True)
    # Pillow for the others: on a damaged PNG torchvision ends the process, of WebP it ignores the EXIF
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range, convert it to 8 bit")
    if image.mode.startswith("I"):  # Pillow would clip 16 bits to 8
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("pixel values beyond 16 bit, convert it to 8 bit")
        return torch.from_numpy((grey >> 8).astype(np.uint8)).repeat(3, 1, 1)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _jpeg_ends(data: bytes) -> bool:
    """Whether an end-of-image marker follows the header; libjpeg only warns and fills the rest with grey."""
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":  # segments, up to the first scan
        fill = data[at + 1 : at + 2] == b"\xff"
        at += 1 if fill else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data.rfind(b"\xff\xd9", at) >= 0  # from the end, where it usually is


def read_annotations(path: str | Path) -> dict:
    """The parsed COCO JSON. Raises ValueError, naming the file, unless it has images, annotations and categories."""
    data = _read_bytes(path, "annotation file")
    try:
        coco = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(coco, dict):
        raise ValueError(f"{path}: not COCO format: a JSON {type(coco).__name__} where an object should be")
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco.get(key), list):
            raise ValueError(f"{path}: not COCO format: there is no list '{key}' in it")
    return coco


def _read_bytes(path: str | Path, what: str, limit: int | None = None) -> bytes:
    try:
        status = os.stat(path)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise OSError("it is a pipe or device, not a file")  # reading it may never end
        if limit is not None and status.st_size > limit:
            raise OSError(f"it has {status.st_size} bytes")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: no path, for example a null character in it
        raise ValueError(f"{path}: cannot read the {what}: {getattr(error, 'strerror', None) or error}") from error


def entries_by_id(entries: list, key: str, text: str, path: str | Path) -> list[dict]:
    """The JSON's images or categories in the order of their ids, each with an own integer id and a text."""
    for i, entry in enumerate(entries):
        if problem := entry_problem(entry, text):
            raise ValueError(f"{path}: {key}[{i}] {problem}")
    if twice := repeated(entry["id"] for entry in entries):
        raise ValueError(f"{path}: {key} must have different ids, but these occur more than once: {twice[:5]}")
    if not entries:
        raise ValueError(f"{path}: the list '{key}' is empty")
    return sorted(entries, key=lambda entry: entry["id"])


def entry_problem(entry, text: str) -> str | None:
    """Why a JSON image or category has no usable id or `text`, None if it has."""
    if not isinstance(entry, dict) or type(entry.get("id")) is not int or abs(entry["id"]) >= 2**63:
        return "has no integer 'id'"
    if not isinstance(entry.get(text), str) or not entry[text].strip():
        return f"(id {entry['id']}) has no '{text}'"
    return None


def image_problem(image: dict) -> str | None:
    """What makes a JSON image with id and file name unusable, None if nothing does."""
    name, size = image["file_name"], (image.get("height"), image.get("width"))
    if len(name) > 4096 or "\0" in name:
        return f"image {image['id']} has a 'file_name' of {len(name)} characters that is no path: {name[:50]!r}"
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        return f"image {image['id']} ({name}) must have a 'file_name' below the folder of images, without '..'"
    if not all(type(side) in (int, float) and 1 <= side < 2**31 and side == int(side) for side in size):
        return f"image {image['id']} ({name}) needs a whole positive width and height, not {size[1]!r} and {size[0]!r}"
    return None


def check_size(path: str | Path, size: tuple[int, int], expected: tuple[int, int], annotation_file: str | Path) -> None:
    """Raises `ImageError` unless an image's (height, width) is the one that its annotation file says."""
    if size != expected:
        turned = " (annotated before its EXIF rotation?)" if size == expected[::-1] else ""
        raise ImageError(
            f"{path}: the image is {size[1]}x{size[0]} (width x height) but {annotation_file} says "
            f"{expected[1]}x{expected[0]}{turned}; correct one of the two",
            "size unlike the JSON",
        )


def repeated(values: Iterable) -> list:
    """Those that occur more than once."""
    return [value for value, n in Counter(values).items() if n > 1]


def usable_boxes(
    annotations: list, image_index: dict[int, int], label_of: dict[int, int], sizes: np.ndarray, plus_one: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, list[int]]]:
    """Image index int64 [A], label int64 [A] and xyxy box float32 [A, 4] of each usable annotation that is no crowd.

    Last, by kind of problem, the positions in `annotations` of those left out or changed.
    """
    problems = defaultdict(list)
    owners, labels, rows, positions = [], [], [], []
    for i, annotation in enumerate(annotations):
        if problem := annotation_problem(annotation, image_index, label_of):
            problems[problem].append(i)
        elif not is_crowd(annotation):
            owners.append(image_index[annotation["image_id"]])
            labels.append(label_of[annotation["category_id"]])
            rows.append(annotation["bbox"])
            positions.append(i)
    owners, labels = np.array(owners, dtype=np.int64), np.array(labels, dtype=np.int64)
    positions, xywh = np.array(positions, dtype=np.int64), np.array(rows, dtype=np.float64).reshape(-1, 4)
    limit = sizes[owners][:, ::-1]  # [A, 2] width, height
    boxes, keep = coco_to_xyxy(xywh, limit[:, 1], limit[:, 0], plus_one)

    start, extent = xywh[:, :2], xywh[:, 2:]
    outside = ((start >= limit) | (start + extent <= 0)).any(axis=1) & (extent > 0).all(axis=1)
    beyond = ((start < -1) | (start + extent > limit + 1)).any(axis=1)
    problems["empty box"] = positions[~keep & ~outside].tolist()
    problems["box outside the image"] = positions[~keep & outside].tolist()
    problems["box clipped to the image"] = positions[keep & beyond].tolist()
    return owners[keep], labels[keep], boxes[keep], {kind: where for kind, where in problems.items() if where}


def are_fractions(boxes: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether boxes [A, 4] can only be fractions of the images, of (height, width) [N, 2]."""
    return len(boxes) > 0 and boxes.max() <= 1 and sizes.min() > 1


def annotation_problem(annotation, image_ids: Container[int], category_ids: Container[int]) -> str | None:
    """What makes a JSON annotation unusable whatever its image's size, None if nothing does."""
    if not isinstance(annotation, dict):
        return "not an object"
    for key, known in (("image_id", image_ids), ("category_id", category_ids)):
        if type(annotation.get(key)) not in (int, float) or annotation[key] not in known:
            return f"unknown {key}"
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) and abs(v) < 1e30 for v in box)):
        return "box is not 4 finite numbers"
    return None


def is_crowd(annotation: dict) -> bool:
    """Whether a JSON annotation is a crowd region."""
    return annotation.get("iscrowd") in (1, "1")


def _randint(low: int, high: int) -> int:
    """Uniform, both ends included."""
    return int(torch.randint(low, high + 1, ()))


def _int_range(sizes: tuple[int, int]) -> tuple[int, int]:
    if len(sizes) != 2 or not 0 < sizes[0] <= sizes[1]:
        raise ValueError(f"the shorter side is a range (low, high) with 0 < low <= high, not {sizes}")
    return sizes[0], sizes[1]
