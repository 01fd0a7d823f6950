"""`predict` turns images into detections, and `postprocess` turns predictions into detections."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from .arguments import check_choice, check_flag, check_model, check_number
from .batching import group_alike, read_ahead
from .config import DetectorConfig, Precision, ThresholdOptions, Thresholds
from .data import normalize, resize_image, resize_size
from .fcos import FCOS, PROBABILITIES, RANGES, Predictions, check_predictions, check_thresholds, level_sizes
from .nms import class_nms, nms_fixed
from .results import ImageDetections
from .sources import Frame, Source, frames, to_rgb

DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Network = Callable[[FCOS, Tensor, Tensor], Predictions]


class PredictOptions(ThresholdOptions, total=False):
    """`predict` has these options."""

    recursive: bool
    batch_size: int
    precision: Precision
    compile: bool
    workers: int
    on_error: Callable[[Frame, ValueError], None] | None


@overload
def predict(
    model: FCOS, images: Source, *, stream: Literal[False] = False, **options: Unpack[PredictOptions]
) -> list[ImageDetections]: ...


@overload
def predict(
    model: FCOS, images: Source, *, stream: Literal[True], **options: Unpack[PredictOptions]
) -> Iterator[ImageDetections]: ...


def predict(
    model: FCOS,
    images: Source,
    *,
    stream: bool = False,
    recursive: bool = False,
    batch_size: int = 1,
    precision: Precision = "float32",
    compile: bool = False,
    workers: int = 2,
    on_error: Callable[[Frame, ValueError], None] | None = None,
    **options: Unpack[ThresholdOptions],
) -> list[ImageDetections] | Iterator[ImageDetections]:
    """Detect objects in one image or in several of any sizes.

    Detections do not depend on which images are computed together: the images of a batch are equally large once they
    are resized and padded to multiples of 32, so none has more padding than it would have alone.

    Args:
        model: a detector, on any device; afterwards it is in the same mode (train or eval) as before.
        images: a path (of an image, a folder, a pattern, or a `.txt` list of paths), a PIL image, a uint8 array [H,W,3]
            or [H,W] (RGB or grey), a tensor [3,H,W] or [1,H,W] (uint8, or floating point in 0..1), or an iterable of
            these, see `sources.frames`.
        stream: return an iterator that yields the detections of one image after the other, and keeps few images in
            memory (about 5 times `batch_size`). The model is in eval mode until the iterator ends or is closed.
        recursive: look for images in the folders below a folder too.
        batch_size: images that the network sees together, at most.
        precision: of the network: "float32", or "bf16" or "fp16" by autocast.
        compile: compile the network with torch.compile in the first call; later calls with this model use its graphs.
        workers: threads that decode and resize the next images while the network computes; 0 does so in between.
        on_error: is called with each image that cannot be used and its error, and the image is left out. None raises
            the error.
        options: fields of `Thresholds`: `score_threshold` (one score, or a mapping of class names to scores; a class
            that is not named has none; default: the config's `thresholds`), `candidate_threshold`, `nms_threshold`,
            `topk`, `max_detections`.

    Returns:
        For each image, in the order of the images, a dict on the CPU, best score first: `boxes` float32 [N,4] xyxy in
        pixels of the original image, `scores` float32 [N], `labels` int64 [N] (0..K-1; names in
        `model.config["class_names"]`). See `ImageDetections` for what else it knows.

    Raises:
        ValueError: an image cannot be read, or has an unusable type or shape; the model is in a wrapper, or has no
            class of a name in `score_threshold`; or another argument is none of the values above.
    """
    check_model("model", model, FCOS)
    for name, flag in (("stream", stream), ("recursive", recursive), ("compile", compile)):
        check_flag(name, flag)
    check_number("batch_size", batch_size, 1, 65_536, whole=True)
    check_number("workers", workers, 0, 1024, whole=True)
    check_choice("precision", precision, DTYPES)
    if on_error is not None and not callable(on_error):
        raise ValueError(f"on_error must be a function, got {type(on_error).__name__}")
    thresholds = choose_thresholds(model, options)
    network = functools.partial(compiled_network() if compile else run_autocast, precision=precision)
    found = _detect(model, frames(images, recursive), thresholds, network, batch_size, workers, on_error)
    return found if stream else list(found)


def _detect(
    model: FCOS,
    images: Iterator[Frame],
    thresholds: Thresholds,
    network: Network,
    batch_size: int,
    workers: int,
    on_error: Callable[[Frame, ValueError], None] | None,
) -> Iterator[ImageDetections]:
    """Detect objects in one image after the other, see `predict`."""
    was_training = model.training
    model.eval()
    try:
        load = functools.partial(prepare, config=model.config, catch=on_error is not None)
        done: dict[int, ImageDetections | None] = {}  # by the image's number; None for one that cannot be used

        def usable() -> Iterator[tuple[int, Prepared]]:
            for number, item in enumerate(read_ahead(images, load, workers, batch_size + workers)):
                if isinstance(item, Prepared):
                    yield number, item
                else:
                    assert on_error is not None
                    done[number] = None
                    on_error(*item)

        due = 0
        for group in group_alike(usable(), lambda item: item.pixels.shape, batch_size, window=4 * batch_size):
            numbers, items = zip(*group, strict=True)
            done.update(zip(numbers, detect_batch(model, items, thresholds, network), strict=True))
            while due in done:
                if (found := done.pop(due)) is not None:
                    yield found
                due += 1
    finally:
        model.train(was_training)


class Prepared(NamedTuple):
    """A prepared image is decoded, resized and padded."""

    name: str
    pixels: Tensor  # [3,H,W], multiples of 32; uint8, or float32 in 0..255, see `resize_image`
    size: tuple[int, int]  # (height, width) without the padding
    original: tuple[int, int]  # (height, width) before the image was resized


def prepare(frame: Frame, config: DetectorConfig, catch: bool = False) -> Prepared | tuple[Frame, ValueError]:
    """Decode, resize and pad an image; with `catch`, return the error of an image that cannot be used."""
    try:
        image = frame.image() if callable(frame.image) else to_rgb(frame.image)
    except ValueError as error:
        if catch:
            return frame, error
        raise
    height, width = image.shape[-2:]
    h, w = resize_size(height, width, config["min_size"], config["max_size"], config["resize"])
    resized = resize_image(image.cpu(), (h, w), config["resize"])
    rows, columns = padded_size(height, width, config)
    return Prepared(frame.name, pad(resized, (0, columns - w, 0, rows - h)), (h, w), (height, width))


def padded_size(height: int, width: int, config: DetectorConfig) -> tuple[int, int]:
    """Compute the (height, width) in the network of an image that was (height, width) large."""
    h, w = resize_size(height, width, config["min_size"], config["max_size"], config["resize"])
    return h + -h % 32, w + -w % 32


def detect_batch(
    model: FCOS, items: Sequence[Prepared], thresholds: Thresholds, network: Network
) -> list[ImageDetections]:
    """Detect objects in prepared images of one size; the results come from a GPU in one copy for all images."""
    config, device = model.config, next(model.parameters()).device
    with torch.inference_mode():
        images = torch.stack([item.pixels for item in items])  # [B,3,H,W]
        sizes = torch.tensor([item.size for item in items])
        if device.type == "cuda":
            images, sizes = images.pin_memory(), sizes.pin_memory()
        images, sizes = images.to(device, non_blocking=True), sizes.to(device, non_blocking=True)
        found = detect(model, images, sizes, thresholds, network)
        packed = torch.cat([found.boxes, found.scores[..., None], found.labels[..., None].float()], dim=-1).cpu()
    results = []
    with torch.inference_mode(False):  # a tensor of the inference mode could not be changed in place later
        for item, row in zip(items, packed.clone(), strict=True):
            row = row[row[:, 5] >= 0]
            (h, w), (height, width) = item.size, item.original
            tensors = {
                "boxes": row[:, :4] * torch.tensor([width / w, height / h]).repeat(2),
                "scores": row[:, 4].clone(),
                "labels": row[:, 5].long(),
            }
            results.append(
                ImageDetections(tensors, item.name, item.original, config["class_names"], config["plus_one"])
            )
    return results


class Detections(NamedTuple):
    """What was found in B images, best first, in D places each; those from `count` on are empty."""

    boxes: Tensor  # float32 [B,D,4] xyxy in pixels of the network input; 0 where empty
    scores: Tensor  # float32 [B,D]; 0 where empty
    labels: Tensor  # int64 [B,D] 0..K-1; -1 where empty
    count: Tensor  # type: ignore[assignment]  # int64 [B]; a tuple's method has this name too


def run_network(model: FCOS, images: Tensor, sizes: Tensor) -> Predictions:
    """Normalise images [B,3,H,W] (0..255) of `sizes` [B,2], and run the network on them."""
    inputs = normalize(images, sizes, model.config["image_mean"], model.config["image_std"])
    inputs = inputs.to(model.head.scales.dtype)
    return model(inputs.contiguous(memory_format=torch.channels_last))  # faster, on a CPU and on a GPU


def run_autocast(model: FCOS, images: Tensor, sizes: Tensor, precision: Precision) -> Predictions:
    """Run the network in this precision, see `run_network`."""
    with torch.autocast(images.device.type, DTYPES[precision], enabled=precision != "float32"):
        return run_network(model, images, sizes)


@functools.cache
def compiled_network(backend: str = "inductor") -> Callable[..., Predictions]:
    """Compile `run_autocast`: one graph serves batches of any size, and one more single images of any size."""
    graph = torch.compile(run_autocast, fullgraph=True, backend=backend)

    def run(model: FCOS, images: Tensor, sizes: Tensor, precision: Precision) -> Predictions:
        torch._dynamo.maybe_mark_dynamic(images, (0, 2, 3))
        torch._dynamo.maybe_mark_dynamic(sizes, 0)
        return graph(model, images, sizes, precision)

    return run


def detect(
    model: FCOS, images: Tensor, sizes: Tensor, thresholds: Thresholds, network: Network = run_network
) -> Detections:
    """`postprocess` of `model`'s predictions for uint8 images [B,3,H,W] of `sizes` [B,2], without a shape that depends
    on a value. 32 divides H and W."""
    preds = network(model, images, sizes)
    plus_one = model.config["plus_one"]
    height, width = images.shape[-2:]
    locations = [math.prod(size) for size in level_sizes(height, width, model.strides)]
    boxes, scores, labels = decode(preds, sizes, thresholds, plus_one, model.config["keep_empty"], locations)
    boxes = boxes.float()
    keep = nms_fixed(boxes, scores, labels, thresholds.nms_threshold, thresholds.max_detections, plus_one)  # [B,D]
    found = keep >= 0
    keep = keep.clamp(min=0)
    return Detections(
        boxes=torch.where(found[..., None], boxes.gather(1, keep[..., None].expand(-1, -1, 4)), 0.0),
        scores=torch.where(found, scores.gather(1, keep), 0.0),
        labels=torch.where(found, labels.gather(1, keep), -1),
        count=found.sum(1),
    )


def postprocess(
    preds: Predictions,
    image_sizes: Tensor | Sequence[tuple[int, int]],
    *,
    plus_one: bool = False,
    keep_empty: bool = False,
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
        keep_empty: boxes without a pixel, as in the padding, are detections too, `model.config["keep_empty"]`.
        options: fields of `Thresholds`: `score_threshold` (one score, or a tensor [K]), `candidate_threshold`,
            `nms_threshold`, `topk`, `max_detections`.

    Returns:
        One dict per image, best score first: `boxes` [N,4] xyxy in pixels of the network input, `scores` [N], the
        geometric mean of class probability and centerness, `labels` int64 [N].

    Raises:
        ValueError: there is not one size for each image, `preds` are no predictions, `score_threshold` is neither a
            number nor a tensor [K], or an option is out of range.
    """
    check_predictions(preds)
    check_flag("plus_one", plus_one)
    check_flag("keep_empty", keep_empty)
    thresholds = Thresholds(**options)  # type: ignore[arg-type]  # a mapping is refused below
    num_classes = preds.logits.shape[-1]
    image_sizes, least = sizes_of(len(preds.logits), image_sizes), thresholds.score_threshold
    if isinstance(least, Mapping):
        raise ValueError("score_threshold by class name is for predict and compile_detector; give a tensor [K] here")
    if isinstance(least, Tensor) and least.shape not in ((), (num_classes,)):
        raise ValueError(f"score_threshold must be a number or a tensor [{num_classes}], got {list(least.shape)}")
    check_ranges(thresholds)
    boxes, scores, labels = decode(preds, image_sizes, thresholds, plus_one, keep_empty)
    detections = []
    for box, score, label in zip(boxes, scores, labels, strict=True):
        candidate = score >= 0
        box, score, label = box[candidate], score[candidate], label[candidate]
        keep = class_nms(box, score, label, thresholds.nms_threshold, thresholds.max_detections, plus_one)
        detections.append({"boxes": box[keep], "scores": score[keep], "labels": label[keep]})
    return detections


def check_ranges(thresholds: Thresholds) -> None:
    """Raise `ValueError` if a number is out of range; a tensor of scores is not looked at."""
    for name in PROBABILITIES:
        if not isinstance(value := getattr(thresholds, name), Tensor):
            check_number(name, value, 0, 1)
    for name in ("topk", "max_detections"):
        check_number(name, getattr(thresholds, name), *RANGES[name][:2], whole=True)


def choose_thresholds(model: FCOS, options: ThresholdOptions) -> Thresholds:
    """Complete the options of `predict`: the thresholds of the model's config, and a tensor [K] in place of a mapping.

    Raises:
        ValueError: `score_threshold` is a mapping that does not fit the model's class names, or a number is out of
            range.
    """
    if unknown := options.keys() - set(Thresholds._fields):
        raise TypeError(
            f"no threshold is called {', '.join(sorted(unknown))}; there are {', '.join(Thresholds._fields)}"
        )
    config: Mapping[str, Any] = model.config
    names, own, rest = config["class_names"], config["thresholds"], 0.0
    known: dict[str, Any] = {name: config[name] for name in Thresholds._fields}
    if own is not None and "score_threshold" not in options:
        known["score_threshold"], rest = own, config["score_threshold"]
    thresholds = Thresholds(**{**known, **options})
    if isinstance(thresholds.score_threshold, Mapping):
        scores = check_thresholds(thresholds.score_threshold, names, "score_threshold")
        least = torch.tensor([scores.get(name, rest) for name in names or ()], device=next(model.parameters()).device)
        thresholds = thresholds._replace(score_threshold=least)
    check_ranges(thresholds)
    return thresholds


def sizes_of(count: int, image_sizes: Tensor | Sequence[tuple[int, int]], device: torch.device | None = None) -> Tensor:
    """Turn `image_sizes` into a tensor [count,2]. Raises ValueError unless there is one (h, w) for each image."""
    try:
        sizes = torch.as_tensor(image_sizes, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"image_sizes must be [B,2], (h, w) of each of {count} images: {error}") from error
    on_cpu = sizes.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere a look at numbers would wait
    if sizes.shape == (count, 2) and on_cpu and (sizes < 1).any():
        raise ValueError(f"image_sizes must be (h, w) of at least 1 pixel, got {sizes.tolist()}")
    if sizes.shape != (count, 2) or sizes.dtype == torch.bool or sizes.is_complex():
        raise ValueError(f"image_sizes must be [B,2], (h, w) of each of {count} images, got {list(sizes.shape)}")
    return sizes


def decode(
    preds: Predictions,
    image_sizes: Tensor,
    thresholds: Thresholds,
    plus_one: bool = False,
    keep_empty: bool = False,
    locations: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the best candidates of each level, and compute their boxes.

    Args:
        preds, plus_one, keep_empty: see `postprocess`.
        thresholds: `score_threshold`, `candidate_threshold` and `topk` are used.
        image_sizes: [B,2] (h, w) of the images in the network input.
        locations: number of locations of each level. None reads it from the predictions, which a compiled graph
            cannot do.

    Returns:
        boxes: [B,N,4] xyxy, clipped to the image; N is the sum over levels of min(topk, locations * K).
        scores: [B,N], -1 for a place without a candidate.
        labels: [B,N].
    """
    if locations is None:
        locations = torch.unique_consecutive(preds.strides, return_counts=True)[1].tolist()
    limits = image_sizes.flip(-1).repeat(1, 2)[:, None].to(preds.distances) - int(plus_one)  # [B,1,4] w, h, w, h
    num_classes, least = preds.logits.shape[-1], thresholds.score_threshold
    found = []
    for logits, distances, centerness, points in zip(
        preds.logits.split(locations, dim=1),  # [B,n,K]
        preds.distances.split(locations, dim=1),  # [B,n,4]
        preds.centerness.split(locations, dim=1),  # [B,n]
        preds.points.split(locations),  # [n,2]
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
        if not (plus_one or keep_empty):
            candidate &= (box[..., 2:] > box[..., :2]).all(-1)  # empty boxes lie in the padding
        found.append((box, torch.where(candidate, score.clamp(min=0).sqrt(), -1.0), label))
    boxes, scores, labels = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return boxes, scores, labels
