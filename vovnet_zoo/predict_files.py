"""`predict_files` detects objects in images and videos, and writes what it finds into a folder while it goes on."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Unpack
from urllib.parse import urlparse

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from .config import Pictures
from .draw import DISPLAY_SCORE
from .exported import ExportedDetector
from .fcos import FCOS
from .files import free_to_write, write_whole
from .inference import PredictOptions, predict, read
from .results import ImageDetections, category_ids_of, to_yolo
from .sources import Frame, find, video_frames
from .video import Video, VideoWriter
from .web import is_url
from .words import counted

JPEG_QUALITY = 90
KEPT_BYTES = 256 << 20  # pixels that are kept from the network's look at an image until its picture is drawn
NO_PLACE_FOR = r'[\\/:*?"<>|\x00-\x1f]|^\.+|[. ]+$'  # in the name of a file, on some system
DEVICES = r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)"  # Windows takes these names, in capitals too, for devices


def predict_files(
    model: FCOS | ExportedDetector,
    images: Sequence[str | Path],
    out: Path,
    *,
    pictures: Pictures = "jpg",
    crops: bool = False,
    labels: bool = False,
    coco: Path | None = None,
    overwrite: bool = False,
    **options: Unpack[PredictOptions],
) -> int:
    """Write a picture of each image, and `detections.jsonl` with one line of JSON for each image, as they come.

    A video becomes a video of the pictures, `NAME.mp4`. What cannot be used is reported on stderr and left out. After
    Ctrl-C, or when the disk is full, the results so far are in the folder.

    Args:
        images: files, folders, patterns, lists of paths, videos, cameras and addresses, see `sources.frames`.
        out: folder for the results, which is made.
        pictures: the format of the pictures, or "none", also for videos. What was found in a folder keeps its place
            below it.
        crops: write each object as a picture, `crops/CLASS/NAME_0.jpg` and so on, in the format of the pictures.
        labels: write a YOLO label file of each image, `labels/NAME.txt`, and the class names, `classes.txt`.
        coco: file for all detections as COCO result rows. Image ids are the numbers that the images are called by, as
            those of COCO are, if each has such a name, otherwise 1, 2, and so on; they are in `detections.jsonl` too.
            Category ids are those of the dataset that the model was trained on, see `results.category_ids_of`.
        overwrite: write over files that are there already; never over an image that is read, and not into a folder of
            crops or of a video's labels, where old ones would stay among the new.
        options: options of `predict`, but `on_error`. Without `score_threshold`, the thresholds are the model's own,
            `thresholds` or `score_threshold` in its config; if it has none, the score that people are shown,
            `DISPLAY_SCORE`.

    Returns:
        The number of images, and videos, that could not be used.

    Raises:
        ValueError: there is no image, or a file would be written over.
        OSError: a result cannot be written.
    """
    sources = list(find(images, options.get("recursive", False), options.get("urls", False)))
    if not sources:
        raise ValueError("no images; give files, folders, patterns or .txt lists of paths")
    taken: set[str] = set()
    folders = [Path(item) for item in images if isinstance(item, (str, PathLike)) and Path(item).is_dir()]
    wanted = [result_name(source.name, folders) for source in sources]
    names = [unique(name, taken) for name in wanted]
    videos = [name for source, name in zip(sources, names, strict=True) if isinstance(source, Video)]
    check_targets(out, dict(zip(names, sources, strict=True)), pictures, crops, labels, coco, overwrite)
    ids = image_ids([source.name for source in sources]) if not videos else None

    others = [i for i, name in enumerate(names) if name != wanted[i] and not isinstance(sources[i], Video)]
    if labels and others:
        example = f"labels/{names[others[0]]}.txt is for {sources[others[0]].name}"
        of = counted(len(others), "label file has", "label files have")
        print(f"vovnet-zoo: {of} another name than the image, since other images have it: {example}", file=sys.stderr)

    own = model.config["thresholds"] or model.config["score_threshold"] or DISPLAY_SCORE
    threshold = options.get("score_threshold", own)
    least = model.thresholds.score_threshold if isinstance(model, ExportedDetector) else 0.0  # what can be asked for
    if options.get("tiles") is not None:
        options["score_threshold"] = threshold  # what scores less would be joined with what is over an edge of windows
    elif not isinstance(threshold, Mapping) and not isinstance(least, Tensor) and least <= threshold:
        options["score_threshold"] = least  # to tell how far below the threshold the scores are
    started: deque[Job] = deque()
    bad: list[str] = []

    def jobs() -> Iterator[Frame]:
        for number, job in enumerate(list_jobs(sources, names, keep=crops or pictures != "none")):
            started.append(job._replace(image_id=ids[number] if ids else number + 1))
            yield job.frame

    def report(frame: Frame, error: ValueError) -> None:
        print(f"vovnet-zoo: {error}", file=sys.stderr)
        bad.append(frame.name)
        started.remove(next(job for job in started if job.frame is frame))

    options["on_error"] = report
    stream = predict(model, jobs(), stream=True, **options)  # refuses options before any file is made
    done, count, began = 0, 0, time.perf_counter()
    with ResultFolder(model, out, pictures, crops, labels, coco) as results:
        try:
            with (
                remembered_interrupt() as look_for_interrupt,
                contextlib.closing(stream),
            ):
                for found in stream:
                    look_for_interrupt()
                    job = started.popleft()
                    best = found["scores"].max().item() if len(found["scores"]) else None
                    if not isinstance(threshold, Mapping):
                        for key in tuple(found):
                            found[key] = found[key][: int((found["scores"] >= threshold).sum())]
                    results.add(job, found)
                    done, count = done + 1, count + len(found["scores"])
                    hint = ""
                    if not len(found["scores"]) and best is not None and not isinstance(threshold, Mapping):
                        hint = f"; the best score, {best:.2f}, is below the threshold {threshold:g}"
                    print(f"{found.source}: {counted(len(found['scores']), 'detection')}{hint}")
        finally:
            seconds = time.perf_counter() - began
            whole = counted(len(sources), "source" if videos else "image")
            of = (
                f"{counted(done, 'image or frame', 'images and frames')} of {whole}" if videos else f"{done} of {whole}"
            )
            print(
                f"{of}, {counted(count, 'detection')}, {counted(len(bad), 'image')} could not be used; "
                f"{seconds:.1f} s, {done / seconds:.1f} images/s; {results.lines.name}"
            )
    return len(bad)


@contextlib.contextmanager
def remembered_interrupt() -> Iterator[Callable[[], None]]:
    """Remember a Ctrl-C that Python loses, as it does where an interrupt comes while a library in C calls back.

    Yields:
        A function that raises `KeyboardInterrupt` if there was a Ctrl-C.
    """
    came: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    is_possible = callable(before) and threading.current_thread() is threading.main_thread()

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)
        assert callable(before)
        before(number, frame)

    def look() -> None:
        if came:
            raise KeyboardInterrupt

    if is_possible:
        signal.signal(signal.SIGINT, remember)
    try:
        yield look
    finally:
        if is_possible:
            signal.signal(signal.SIGINT, before)


class Job(NamedTuple):
    """A job is an image, or a frame of a video, whose results have a name."""

    frame: Frame
    name: str
    """Name of the files for it, without suffix; those of a video's frames are in a folder, "clip/000012"."""
    video: Video | None = None
    image_id: int = 0
    seconds: float | None = None
    """Time of a video's frame after the first one."""


def list_jobs(sources: Sequence[Frame | Video], names: Sequence[str], keep: bool) -> Iterator[Job]:
    """List the images and frames of sources; with `keep`, since each is looked at twice, what was read is kept.

    What a server sent is always kept, pixels of files as far as `KEPT_BYTES` reach.
    """
    room = Room(KEPT_BYTES)
    for source, name in zip(sources, names, strict=True):
        if isinstance(source, Video):
            for number, frame in enumerate(video_frames(source)):
                yield Job(frame, f"{name}/{number:06d}", source, seconds=source.seconds)
        elif callable(source.image) and keep:
            yield Job(source._replace(image=functools.cache(source.image)), name)
        elif keep:
            yield Job(source._replace(image=KeptImage(source, room).read), name)
        else:
            yield Job(source, name)


class Room:
    """A room counts the bytes that may still be kept."""

    def __init__(self, free: int):
        self.free, self.lock = free, threading.Lock()

    def take(self, size: int) -> bool:
        """Take bytes, if so many are free; a negative number gives bytes back."""
        with self.lock:
            fits = size <= self.free
            self.free -= size if fits else 0
        return fits


class KeptImage:
    """A kept image is decoded for the network, and if there is room not again for its picture."""

    def __init__(self, frame: Frame, room: Room):
        self.frame, self.room = frame, room
        self.pixels: Tensor | None = None

    def read(self) -> Tensor:
        """Return the pixels uint8 [3,H,W], and keep them until the next call, if there is room."""
        if self.pixels is not None:
            pixels, self.pixels = self.pixels, None
            self.room.take(-pixels.nbytes)
            return pixels
        pixels = read(self.frame)
        if self.room.take(pixels.nbytes):
            self.pixels = pixels
        return pixels


class ResultFolder:
    """The folder of results has files that are whole whenever the process ends; use it in a `with` statement.

    Args: see `predict_files`.
    """

    def __init__(
        self,
        model: FCOS | ExportedDetector,
        out: Path,
        pictures: Pictures,
        crops: bool,
        labels: bool,
        coco: Path | None,
    ) -> None:
        config = model.config
        self.out, self.pictures, self.crops, self.labels = out, pictures, crops, labels
        class_names = config["class_names"] or [str(label) for label in range(config["num_classes"])]
        self.folders = folder_names(class_names)
        self.category_ids = category_ids_of(config)
        self.video: Video | None = None
        self.writer: VideoWriter | None = None
        out.mkdir(parents=True, exist_ok=True)
        if coco:
            coco.parent.mkdir(parents=True, exist_ok=True)
        if labels:
            write_whole(out / "classes.txt", "".join(f"{name}\n" for name in class_names).encode())
        with contextlib.ExitStack() as stack:
            self.lines = stack.enter_context(AppendedFile(out / "detections.jsonl"))
            self.rows = stack.enter_context(AppendedFile(coco, b"[\n", b"\n]\n")) if coco else None
            stack.callback(self.end_video)
            self.close = stack.pop_all().close

    def __enter__(self) -> ResultFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def add(self, job: Job, found: ImageDetections) -> None:
        """Write the results of the next image or frame; its line of `detections.jsonl` last."""
        pixels = read(job.frame) if self.crops or self.pictures != "none" else None  # uint8 [3,H,W]
        picture = None
        if pixels is not None and self.pictures != "none":
            picture = self.draw(job, found, pixels)
        if pixels is not None and self.crops:
            self.cut_out(job, found, pixels)
        if self.labels:
            target = self.out / "labels" / f"{job.name}.txt"
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, to_yolo(found, found.size, found.plus_one).encode())
        row: dict[str, object] = {"image": found.source, "picture": picture, **as_lists(found)}
        if job.seconds is not None:
            row["seconds"] = round(job.seconds, 6)
        if self.rows is not None:
            row["image_id"] = job.image_id
            rows = [json.dumps(row) for row in found.to_coco(job.image_id, self.category_ids)]
            self.rows.append(",\n".join(rows).encode(), between=b",\n")
        # what is no letter in the name of a file becomes \udc.., which JSON reads as the same name
        self.lines.append(json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")

    def draw(self, job: Job, found: ImageDetections, pixels: Tensor) -> str:
        """Write the picture of an image, or of a frame into its video; returns the file's name."""
        picture = found.draw(pixels, score_threshold=0)
        if job.video is None:
            name = f"{job.name}.{self.pictures}"
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.out / name, self.encode(picture))
            return name
        name = f"{Path(job.name).parent}.mp4"
        if self.video is not job.video:
            self.end_video()
            self.video, self.writer = job.video, VideoWriter(self.out / name, job.video.rate)
        assert self.writer is not None
        self.writer.write(np.asarray(picture), job.seconds)
        return name

    def end_video(self) -> None:
        """End the file of the video that frames are written to."""
        writer, self.video, self.writer = self.writer, None, None
        if writer is not None:
            writer.close()

    def cut_out(self, job: Job, found: ImageDetections, pixels: Tensor) -> None:
        """Write a picture of each object."""
        height, width = pixels.shape[-2:]
        for i, (box, label) in enumerate(zip(found["boxes"].tolist(), found["labels"].tolist(), strict=True)):
            x1, y1 = max(0, min(math.floor(box[0]), width - 1)), max(0, min(math.floor(box[1]), height - 1))
            x2, y2 = max(x1 + 1, math.ceil(box[2] + found.plus_one)), max(y1 + 1, math.ceil(box[3] + found.plus_one))
            suffix = "png" if self.pictures == "png" else "jpg"
            target = self.out / "crops" / self.folders[label] / f"{job.name}_{i}.{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, self.encode(to_pil_image(pixels[:, y1:y2, x1:x2])))

    def encode(self, picture: Image.Image) -> bytes:
        """Compress a picture in the format that was asked for."""
        buffer = io.BytesIO()
        quality = {} if self.pictures == "png" else {"quality": JPEG_QUALITY}
        picture.save(buffer, "PNG" if self.pictures == "png" else "JPEG", **quality)
        return buffer.getvalue()


class AppendedFile:
    """An appended file holds whole entries between `start` and `end` at any time, also when the disk is full."""

    def __init__(self, path: Path, start: bytes = b"", end: bytes = b""):
        path.unlink(missing_ok=True)  # a link is replaced, not followed
        self.name, self.end, self.empty = str(path), end, True
        self.file = open(path, "wb", buffering=0)
        self.write(0, start + end)

    def __enter__(self) -> AppendedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def append(self, entry: bytes, between: bytes = b"") -> None:
        """Add an entry, after `between` if it is not the first. Raises `OSError`, and leaves what was there."""
        if entry:
            at = self.file.seek(0, io.SEEK_END) - len(self.end)
            self.write(at, (b"" if self.empty else between) + entry + self.end)
            self.empty = False

    def write(self, at: int, data: bytes) -> None:
        """Replace what is from a place on."""
        rest = memoryview(data)
        try:
            self.file.seek(at)
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            self.file.truncate(at)
            self.file.seek(at)
            self.file.write(self.end)
            raise OSError(error.errno, error.strerror, self.name) from error


def folder_names(class_names: Sequence[str]) -> list[str]:
    """Choose a folder's name for each class, which no system refuses."""
    taken: set[str] = set()
    return [unique(file_name(name), taken) for name in class_names]


def file_name(text: str) -> str:
    """Make a name of at most 100 letters, which no system refuses for a file, of any text."""
    name = re.sub(NO_PLACE_FOR, "_", text)[:100] or "_"
    return f"_{name}" if re.match(DEVICES, name, re.IGNORECASE) else name


def check_targets(
    out: Path,
    sources: Mapping[str, Frame | Video],
    pictures: Pictures,
    crops: bool,
    labels: bool,
    coco: Path | None,
    overwrite: bool,
) -> None:
    """Raise `ValueError` if results would be written over inputs, or, unless allowed, over other files.

    Args:
        sources: the images and videos by the names of their results.
    """
    targets: list[Path] = []
    folders = [out / "crops"] if crops else []
    for name, source in sources.items():
        is_video = isinstance(source, Video)
        if is_video and (labels or crops) and any(x.casefold().startswith(f"{name}/".casefold()) for x in sources):
            raise ValueError(
                f"{source.name}: the results of its frames and of the images in the folder {name} would have the same "
                "names; give them in two commands"
            )
        if pictures != "none":
            targets.append(out / f"{name}.{'mp4' if is_video else pictures}")
        if labels and is_video:
            folders.append(out / "labels" / name)
        elif labels:
            targets.append(out / "labels" / f"{name}.txt")
    targets += [out / "classes.txt"] * labels + [out / "detections.jsonl"]
    if coco is not None:
        if coco.absolute() in [target.absolute() for target in targets]:
            raise ValueError(f"{coco}: other results are written there; choose another file for --coco")
        targets.append(coco)
    free_to_write(targets, [Path(source.name) for source in sources.values()], overwrite)
    for folder in folders:
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty, and old files would stay among the new; remove it")


def image_ids(names: Sequence[str]) -> list[int] | None:
    """Return the numbers that the images are called by, as those of COCO are; None unless each has one of its own."""
    stems = [stem_of(name) for name in names]
    if not all(stem.isascii() and stem.isdecimal() and len(stem) < 19 for stem in stems):
        return None
    ids = [int(stem) for stem in stems]
    return ids if len(set(ids)) == len(ids) else None


def stem_of(name: str) -> str:
    """Return the name of an image's file, without folder and suffix."""
    return file_name(Path(urlparse(name).path).stem or "image") if is_url(name) else Path(name).stem


def result_name(name: str, folders: Sequence[Path]) -> str:
    """Name the results of an image as its file, in a folder of the same name if it was found below one of `folders`."""
    for folder in folders:
        if not is_url(name) and Path(name).is_relative_to(folder):
            below = Path(name).relative_to(folder)
            if ".." not in below.parts:  # as in "../x.jpg", which is relative to "."
                return below.with_suffix("").as_posix()
    return stem_of(name)


def as_lists(found: ImageDetections) -> dict[str, list]:
    """Turn detections into lists for JSON; with the names of the classes, where they are known."""
    row: dict[str, list] = {key: value.tolist() for key, value in found.items()}
    return {**row, "names": found.names} if found.class_names else row


def unique(stem: str, taken: set[str]) -> str:
    """Return `stem`, with a number behind it if it is taken, and add the result to the taken names.

    Names that differ only in the case of letters are the same on some file systems.
    """
    name, number = stem, 2
    while name.casefold() in taken:
        name, number = f"{stem}_{number}", number + 1
    taken.add(name.casefold())
    return name
