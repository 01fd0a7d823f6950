"""`predict` turns images into detections, and `postprocess` turns predictions into detections."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, Unpack, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .arguments import check_choice, check_flag, check_kind, check_model, check_number, check_options
from .batching import group_alike, read_ahead
from .commands import check_compiler, reporting_compiler
from .config import SCALES, TILES, DetectorConfig, Precision, ThresholdOptions, Thresholds
from .data import resize_image, resize_size
from .draw import DISPLAY_SCORE
from .exported import ExportedDetector
from .fcos import FCOS, Predictions, check_predictions, check_ranges, check_thresholds, level_sizes
from .fused import normalize_images
from .nms import class_nms, nms_fixed
from .parts import many_graphs, with_compiled_parts
from .precision import DTYPES, warn_of_slow_precision
from .results import Detections, ImageDetections
from .sources import Frame, Source, frames, to_rgb
from .tiles import OVERLAP, Window, merge, windows
from .words import counted

T = TypeVar("T")
Network = Callable[[FCOS, Tensor, Tensor], Predictions]
WITHOUT_COMPILER = "leave compile=True out"
MODES = threading.RLock()  # the garbage collector may end a forgotten stream anywhere, also where the lock is held
# Of each model that is evaluated just now: an item for each of its users, and its parts with their modes before
_evaluated: dict[nn.Module, tuple[list[None], list[tuple[nn.Module, bool]]]] = {}


class PredictOptions(ThresholdOptions, total=False):
    """`predict` has these options."""

    recursive: bool
    urls: bool
    tiles: int | None
    overlap: float | None
    flip: bool
    scales: Sequence[float]
    batch_size: int
    precision: Precision
    compile: bool
    workers: int
    on_error: Callable[[Frame, ValueError], None] | None


@overload
def predict(
    model: FCOS | ExportedDetector, images: Source, *, stream: Literal[False] = False, **options: Unpack[PredictOptions]
) -> list[ImageDetections]: ...


@overload
def predict(
    model: FCOS | ExportedDetector, images: Source, *, stream: Literal[True], **options: Unpack[PredictOptions]
) -> Iterator[ImageDetections]: ...


@overload
def predict(
    model: FCOS | ExportedDetector, images: Source, *, stream: bool, **options: Unpack[PredictOptions]
) -> list[ImageDetections] | Iterator[ImageDetections]: ...


def predict(
    model: FCOS | ExportedDetector,
    images: Source,
    *,
    stream: bool = False,
    recursive: bool = False,
    urls: bool = False,
    tiles: int | None = None,
    overlap: float | None = None,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
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
        model: a detector, on any device, or an exported file that `load_detector` opened; afterwards it is in the same
            mode (train or eval) as before.
        images: a path (of an image, a folder, a pattern, a video, or a `.txt` list of paths), an address, a camera's
            number as text, a PIL image, a uint8 array [H,W,3] or [H,W] (RGB or grey), a tensor [3,H,W] or [1,H,W]
            (uint8, or floating point in 0..1), or an iterable of these, see `sources.frames`. A video or camera is best
            read with `stream`.
        stream: return an iterator that yields the detections of one image after the other, and keeps few images in
            memory (about 5 times `batch_size`). The model is in eval mode until all its iterators end or are closed.
            Threads decode images that `images` names by their paths; pixels that an iterator gives are taken at once.
        recursive: look for images in the folders below a folder too.
        urls: images may come from a server, by their http:// or https:// address.
        tiles: look at windows of this many pixels of the original image on each side, resized as an image would be, and
            at the whole image, so that small objects in large images are seen large; see `tiles.merge` for how the
            results become one. `max_detections` holds for each window. None looks at the whole image only.
        overlap: part of its side that a window shares with its neighbour, at least; None is 0.2.
        flip: test-time augmentation: look at the mirrored image too.
        scales: test-time augmentation: look at the image at these multiples of the model's `min_size` and `max_size`.
            Boxes of all views are merged by NMS.
        batch_size: images that the network sees together, at most.
        precision: of the network: "float32", or "bf16" or "fp16" by autocast. On an NVIDIA GPU, torch rounds the inputs
            of float32 convolutions to TF32, which has 10 bits, unless `torch.backends.cudnn.allow_tf32` is False. On a
            CPU, "fp16" is slower than "float32", and so is "bf16" on many; a line of the log says so.
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
        RuntimeError: torch.compile finds no compiler; the message says which one, and how to install it.
    """
    if not isinstance(model, ExportedDetector):
        check_model("model", model, FCOS)
    check_options("predict", options, PredictOptions.__annotations__)
    for name, flag in (("stream", stream), ("recursive", recursive), ("urls", urls), ("compile", compile)):
        check_flag(name, flag)
    check_number("batch_size", batch_size, 1, 65_536, whole=True)
    check_number("workers", workers, 0, 1024, whole=True)
    check_choice("precision", precision, DTYPES)
    if on_error is not None and not callable(on_error):
        raise ValueError(f"on_error must be a function, got {type(on_error).__name__}")
    views = check_views(tiles, overlap, flip, scales)
    if isinstance(model, ExportedDetector):
        thresholds = model.choose_thresholds(options, precision, compile)
    else:
        thresholds = choose_thresholds(model, options)
        device = next(model.parameters()).device
        warn_of_slow_precision(device, DTYPES[precision])
        if compile and device.type == "cpu":  # on a GPU, graphs that were compiled before need no compiler
            check_compiler("cpu", WITHOUT_COMPILER)
    network = functools.partial(compiled_network() if compile else run_autocast, precision=precision)
    detector = functools.partial(_detect, model, thresholds=thresholds, network=network, batch_size=batch_size)
    detector = functools.partial(detector, workers=workers)
    found_frames = frames(images, recursive, urls)
    if views == ONE_VIEW:
        load = functools.partial(prepare, config=model.config.copy(), catch=on_error is not None, **limits_of(model))
        found = detector(found_frames, load, on_error=on_error)
    else:
        ahead = 0 if views.tiles else workers  # windows are for images of which memory holds one at a time
        opened = read_ahead(found_frames, functools.partial(_try_read, catch=on_error is not None), ahead, 1)
        found = _detect_views(model, opened, thresholds, detector, views, on_error)
    return found if stream else list(found)


def _detect(
    model: FCOS | ExportedDetector,
    images: Iterator[T],
    load: Callable[[T], Prepared | tuple[Frame, ValueError]],
    thresholds: Thresholds,
    network: Network,
    batch_size: int,
    workers: int,
    on_error: Callable[[Frame, ValueError], None] | None = None,
) -> Iterator[ImageDetections]:
    """Detect objects in one image after the other, which `load` prepares in threads, see `predict`."""
    with evaluating(model):
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


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep a model in evaluation mode, and put each of its parts back into the mode that it was in.

    Of several streams of one model, in one thread or several, the last to end puts them back.
    """
    with MODES:
        users, modes = _evaluated.setdefault(model, ([], []))
        users.append(None)  # first, so that no stream that ends in the next lines is the last
        if not modes:
            modes += [(part, part.training) for part in model.modules()]
        model.eval()
    try:
        yield
    finally:
        with MODES:
            users.pop()
            if not users:
                for part, was_training in _evaluated.pop(model)[1]:
                    part.training = was_training


def limits_of(model: FCOS | ExportedDetector) -> dict[str, Any]:
    """Return the arguments of `prepare` that say how large the images of a model must be."""
    return {"fixed": model.size, "least": model.least_side} if isinstance(model, ExportedDetector) else {}


class Views(NamedTuple):
    """These views of an image are looked at, see `predict`."""

    tiles: int | None
    overlap: float
    flips: tuple[bool, ...]
    scales: tuple[float, ...]


ONE_VIEW = Views(None, OVERLAP, (False,), (1.0,))


def check_views(tiles: int | None, overlap: float | None, flip: bool, scales: Sequence[float]) -> Views:
    """Raise `ValueError` unless these options of `predict` are in range, and each has an effect."""
    if tiles is not None:
        check_number("tiles", tiles, *TILES, whole=True, why="; it is the side of a window in pixels")
        windows(1, 1, tiles, OVERLAP if overlap is None else overlap)
    elif overlap is not None:
        raise ValueError(f"overlap={overlap!r}: windows overlap, and there are none; give tiles too")
    check_flag("flip", flip)
    check_kind("scales", scales, (list, tuple), "a list or tuple of numbers")
    for scale in scales:
        check_number("scales", scale, *SCALES)
    if len(set(scales)) < max(1, len(scales)):
        raise ValueError(f"scales={list(scales)}: give different numbers, at least one")
    flips = (False, True) if flip else (False,)
    return Views(tiles, OVERLAP if overlap is None else overlap, flips, tuple(map(float, scales)))


def _detect_views(
    model: FCOS | ExportedDetector,
    images: Iterator[tuple[Frame, Tensor | ValueError]],
    thresholds: Thresholds,
    detector: Callable[..., Iterator[ImageDetections]],
    views: Views,
    on_error: Callable[[Frame, ValueError], None] | None,
) -> Iterator[ImageDetections]:
    """Detect objects in several views of one image after the other, see `predict`.

    The views of all images are one stream, so that batches are full.
    """
    config = model.config.copy()
    kinds = [(scale, flip) for scale in views.scales for flip in views.flips]
    started: deque[tuple[str, tuple[int, int], list[Window]]] = deque()  # images whose views are on their way

    def looks() -> Iterator[tuple[Frame, float]]:
        for frame, image in images:
            if isinstance(image, ValueError):
                assert on_error is not None
                on_error(frame, image)
                continue
            height, width = image.shape[-2:]
            places = windows(height, width, views.tiles, views.overlap) if views.tiles else []
            if len(places) != 1:
                places.append(Window(0, 0, width, height))
            started.append((frame.name, (height, width), places))
            for place, (scale, flip) in itertools.product(places, kinds):
                yield Frame(frame.name, functools.partial(_crop, image, place, flip)), scale

    with contextlib.closing(
        detector(looks(), functools.partial(_prepare_look, config=config, **limits_of(model)))
    ) as stream:  # type: ignore[type-var]
        for first in stream:
            name, size, places = started.popleft()
            found = itertools.chain([first], stream)
            results: list[dict[str, Tensor]] = []
            for place in places:
                parts = [_turn_back(next(found), place.width, flip, config["plus_one"]) for _, flip in kinds]
                together: dict[str, Tensor] = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
                if len(parts) > 1:
                    together = _suppress(together, thresholds, config["plus_one"])
                results.append(together)
            whole = results[0]
            if len(places) > 1:
                whole = merge(results, places, size, thresholds.nms_threshold, config["plus_one"])
            shown = display_score(thresholds)
            yield ImageDetections(whole, name, size, config["class_names"], config["plus_one"], shown)


def _try_read(frame: Frame, catch: bool) -> tuple[Frame, Tensor | ValueError]:
    """Read an image as uint8 [3,H,W] RGB; with `catch`, return the error of an image that cannot be used."""
    try:
        return frame, read(frame)
    except ValueError as error:
        if catch:
            return frame, error
        raise


def _prepare_look(
    look: tuple[Frame, float], config: DetectorConfig, **limits: Any
) -> Prepared | tuple[Frame, ValueError]:
    """Prepare a view of an image at a multiple of the size that the network is made for."""
    frame, scale = look
    config = config.copy()
    config["min_size"] = max(1, round(config["min_size"] * scale))
    config["max_size"] = max(1, round(config["max_size"] * scale))
    return prepare(frame, config, **limits)


def _turn_back(found: dict[str, Tensor], width: int, flipped: bool, plus_one: bool) -> dict[str, Tensor]:
    """Move what was found in a mirrored image of this width to where it is in the image."""
    if not flipped:
        return found
    left, top, right, bottom = found["boxes"].unbind(1)
    edge = width - int(plus_one)
    return {**found, "boxes": torch.stack([edge - right, top, edge - left, bottom], 1)}


def _suppress(found: dict[str, Tensor], thresholds: Thresholds, plus_one: bool) -> dict[str, Tensor]:
    """Merge the detections of several views by NMS."""
    boxes, scores, labels = found["boxes"], found["scores"], found["labels"]
    keep = class_nms(boxes, scores, labels, thresholds.nms_threshold, thresholds.max_detections, plus_one)
    return {key: value[keep] for key, value in found.items()}


def _crop(image: Tensor, place: Window, flip: bool) -> Tensor:
    """Return the pixels [3,h,w] of a window, mirrored or not."""
    pixels = image[:, place.y : place.y + place.height, place.x : place.x + place.width]
    return pixels.flip(-1) if flip else pixels


class Prepared(NamedTuple):
    """A prepared image is decoded, resized and padded."""

    name: str
    pixels: Tensor  # [3,H,W], multiples of 32; uint8, or float32 in 0..255, see `resize_image`
    size: tuple[int, int]  # (height, width) without the padding
    original: tuple[int, int]  # (height, width) before the image was resized


def prepare(
    frame: Frame,
    config: DetectorConfig,
    catch: bool = False,
    fixed: tuple[int, int] | None = None,
    least: int = 32,
) -> Prepared | tuple[Frame, ValueError]:
    """Decode, resize and pad an image; with `catch`, return the error of an image that cannot be used.

    Every image is padded to the (height, width) `fixed`, if it is given, and made smaller where it would not fit;
    otherwise each side is padded to at least `least`, a multiple of 32.
    """
    try:
        image = read(frame)
    except ValueError as error:
        if catch:
            return frame, error
        raise
    height, width = image.shape[-2:]
    h, w = resize_size(height, width, config["min_size"], config["max_size"], config["resize"])
    if fixed and (factor := min(fixed[0] / h, fixed[1] / w)) < 1:
        h, w = max(1, min(fixed[0], int(h * factor))), max(1, min(fixed[1], int(w * factor)))
    resized = resize_image(image.cpu(), (h, w), config["resize"])
    rows, columns = fixed or (max(least, side) for side in padded_size(height, width, config))
    return Prepared(frame.name, pad(resized, (0, columns - w, 0, rows - h)), (h, w), (height, width))


def read(frame: Frame) -> Tensor:
    """Read an image as uint8 [3,H,W] RGB. Raises `ValueError`, with its name, if it cannot be used."""
    if callable(frame.image):
        return frame.image()
    try:
        return to_rgb(frame.image)
    except ValueError as error:
        if str(error).startswith(frame.name):
            raise
        raise ValueError(f"{frame.name}: {error}") from error


def padded_size(height: int, width: int, config: DetectorConfig) -> tuple[int, int]:
    """Compute the (height, width) in the network of an image that was (height, width) large."""
    h, w = resize_size(height, width, config["min_size"], config["max_size"], config["resize"])
    return h + -h % 32, w + -w % 32


def detect_batch(
    model: FCOS | ExportedDetector, items: Sequence[Prepared], thresholds: Thresholds, network: Network
) -> list[ImageDetections]:
    """Detect objects in prepared images of one size; the results come from a GPU in one copy for all images."""
    config, device = model.config, next(model.parameters(), torch.empty(0)).device
    with torch.inference_mode():
        images = torch.stack([item.pixels for item in items])  # [B,3,H,W]
        sizes = torch.tensor([item.size for item in items], device="cpu")
        goes_on = device.type == "cuda"  # on Apple's GPUs, torch might read memory that was freed meanwhile
        if goes_on:
            images, sizes = images.pin_memory(), sizes.pin_memory()
        images, sizes = images.to(device, non_blocking=goes_on), sizes.to(device, non_blocking=goes_on)
        found = detect(model, images, sizes, thresholds, network)
        packed = torch.cat([found.boxes, found.scores[..., None], found.labels[..., None].float()], dim=-1).cpu()
    results = []
    with torch.inference_mode(False):  # a tensor of the inference mode could not be changed in place later
        for item, row in zip(items, packed.clone(), strict=True):
            row = row[row[:, 5] >= 0]
            (h, w), (height, width) = item.size, item.original
            boxes = row[:, :4] * row.new_tensor([width / w, height / h]).repeat(2)
            if not config["plus_one"]:  # the published code does not clip once more
                boxes = boxes.minimum(row.new_tensor([width, height] * 2))  # rounding can carry them past the edge
            tensors = {
                "boxes": boxes,
                "scores": row[:, 4].clone(),
                "labels": row[:, 5].long(),
            }
            facts = item.name, item.original, config["class_names"], config["plus_one"], display_score(thresholds)
            results.append(ImageDetections(tensors, *facts))
    return results


def display_score(thresholds: Thresholds) -> float:
    """Choose what `ImageDetections.draw` leaves out: nothing, where a score threshold was chosen already."""
    least = thresholds.score_threshold
    return 0.0 if isinstance(least, Tensor) or least > 0 else DISPLAY_SCORE


def run_network(model: FCOS, images: Tensor, sizes: Tensor) -> Predictions:
    """Normalise images [B,3,H,W] (0..255) of `sizes` [B,2], and run the network on them."""
    inputs = normalize_images(images, sizes, model.config["image_mean"], model.config["image_std"])
    return model(inputs.to(model.head.scales.dtype))


def run_autocast(model: FCOS, images: Tensor, sizes: Tensor, precision: Precision) -> Predictions:
    """Run the network in this precision, see `run_network`."""
    with torch.autocast(images.device.type, DTYPES[precision], enabled=precision != "float32"):
        return run_network(model, images, sizes)


@functools.cache
def compiled_network(backend: str = "inductor") -> Callable[..., Predictions]:
    """Compile `run_autocast`: one graph serves batches of any size, and one more single images of any size.

    On a GPU it consists of the graphs of `parts`, for the same sizes.
    """
    graph = torch.compile(run_autocast, fullgraph=True, backend=backend)

    def run(model: FCOS, images: Tensor, sizes: Tensor, precision: Precision) -> Predictions:
        if images.device.type != "cpu":
            with reporting_compiler(WITHOUT_COMPILER), many_graphs():
                return run_autocast(with_compiled_parts(model, backend), images, sizes, precision)
        torch._dynamo.maybe_mark_dynamic(images, (0, 2, 3))
        torch._dynamo.maybe_mark_dynamic(sizes, 0)
        with reporting_compiler(WITHOUT_COMPILER), many_graphs():
            return graph(model, images, sizes, precision)

    return run


def detect(
    model: FCOS | ExportedDetector,
    images: Tensor,
    sizes: Tensor,
    thresholds: Thresholds,
    network: Network = run_network,
) -> Detections:
    """`postprocess` of `model`'s predictions for uint8 images [B,3,H,W] of `sizes` [B,2], without a shape that depends
    on a value. 32 divides H and W."""
    if isinstance(model, ExportedDetector):
        return model(images, sizes, thresholds)
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
    check_options("Thresholds", options, Thresholds._fields)
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


def choose_thresholds(model: FCOS, options: ThresholdOptions) -> Thresholds:
    """Complete the options of `predict`: the thresholds of the model's config, and a tensor [K] in place of a mapping.

    Raises:
        ValueError: `score_threshold` is a mapping that does not fit the model's class names, or a number is out of
            range.
    """
    check_options("Thresholds", options, Thresholds._fields)
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
    if isinstance(given := thresholds.score_threshold, Tensor):
        if given.shape not in ((), (config["num_classes"],)):
            wanted = f"one score, or one for each of {counted(config['num_classes'], 'class')}"
            raise ValueError(f"score_threshold: give {wanted}, got a tensor of {list(given.shape)}")
        if not ((given >= 0) & (given <= 1)).all():
            raise ValueError(f"score_threshold={given.tolist()}: scores are in 0..1")
    check_ranges(thresholds)
    return thresholds


def sizes_of(count: int, image_sizes: Tensor | Sequence[tuple[int, int]], device: torch.device | None = None) -> Tensor:
    """Turn `image_sizes` into a tensor [count,2]. Raises ValueError unless there is one (h, w) for each image."""
    try:
        sizes = torch.as_tensor(image_sizes, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"image_sizes must be [B,2], (h, w) of each of {counted(count, 'image')}: {error}") from error
    on_cpu = sizes.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere a look at numbers would wait
    if sizes.shape == (count, 2) and on_cpu and (sizes < 1).any():
        raise ValueError(f"image_sizes must be (h, w) of at least 1 pixel, got {sizes.tolist()}")
    if sizes.shape != (count, 2) or sizes.dtype == torch.bool or sizes.is_complex():
        raise ValueError(
            f"image_sizes must be [B,2], (h, w) of each of {counted(count, 'image')}, got {list(sizes.shape)}"
        )
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
    of_levels = []
    for logits, centerness in zip(
        preds.logits.split(locations, dim=1),  # [B,n,K]
        preds.centerness.split(locations, dim=1),  # [B,n]
        strict=True,
    ):
        probability = logits.float().sigmoid()
        score = probability * centerness.float().sigmoid()[..., None]
        candidate = probability > thresholds.candidate_threshold
        if isinstance(least, Tensor) or least > 0:
            candidate &= score.sqrt() >= least  # before the choice of the best, which is for all classes together
        of_levels.append(torch.where(candidate, score, -1.0).flatten(1))  # [B,n*K]
    found = []
    for (score, index), distances, points in zip(
        choose_best(of_levels, thresholds.topk),  # [B,k]
        preds.distances.split(locations, dim=1),  # [B,n,4]
        preds.points.split(locations),  # [n,2]
        strict=True,
    ):
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


def choose_best(scores: list[Tensor], most: int, together: bool | None = None) -> list[tuple[Tensor, Tensor]]:
    """Choose the best of each level's scores [B,n], which are -1 or more; returns scores and indices [B,min(most,n)].

    A GPU takes some 20 kernels for each `topk` of long rows, and hardly more time for four rows than for one. There all
    levels but the first, which is four times as large as the second, become rows of one length. `together` says whether
    to do so; None does so on a GPU.
    """
    counts = [min(most, score.shape[1]) for score in scores]
    if together is None:
        together = scores[0].device.type == "cuda"
    if not together or len(scores) < 3:
        return [score.topk(count) for score, count in zip(scores, counts, strict=True)]
    width = max(score.shape[1] for score in scores[1:])
    rows = torch.stack([pad(score, (0, width - score.shape[1]), value=-2.0) for score in scores[1:]], dim=1)
    values, indices = rows.topk(max(counts[1:]))  # [B,L-1,k]; the padding comes after all scores
    rest = zip(counts[1:], values.unbind(1), indices.unbind(1), strict=True)
    return [scores[0].topk(counts[0]), *((value[:, :n], index[:, :n]) for n, value, index in rest)]
