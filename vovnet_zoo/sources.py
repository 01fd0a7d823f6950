"""`frames` finds the images that people point at: files, folders, videos, cameras, addresses, images in memory."""

from __future__ import annotations

import functools
import glob
import io
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import NamedTuple, NoReturn
from urllib.parse import urlparse

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .data import FORMATS, pil_to_rgb, read_image
from .files import read_bytes
from .video import SUFFIXES, Video
from .web import is_url, receive
from .words import counted

logger = logging.getLogger(__name__)

ImageLike = str | PathLike | Image.Image | np.ndarray | Tensor
MAX_LIST_BYTES = 1 << 30  # a longer file is no list of paths
MAX_URL_BYTES, MAX_URL_SECONDS = 256 << 20, 60  # of an image that comes from a server


class Frame(NamedTuple):
    """A frame is one image that is not decoded yet."""

    name: str
    """What messages and results call it: its path, or its place among the images."""
    image: ImageLike | Callable[[], Tensor]
    """The image, or a function that reads it as uint8 [3,H,W] RGB; another thread may call it."""


Source = ImageLike | Frame | Iterable[ImageLike | Frame]


def frames(source: Source, recursive: bool = False, urls: bool = False) -> Iterator[Frame]:
    """Find the images of a source one after the other; only videos are decoded, one frame at a time.

    Args:
        source: a path, which is an image file, a folder, whose images are taken and not its videos, a pattern such as
            "photos/*.jpg" (`**` stands for any folders), a video file, or a `.txt` file with the path of an image in
            each line, relative to this file's folder; a number as text, such as "0", which is a camera; the http:// or
            https:// address of an image; an image in memory, see `to_rgb`; a tensor [B,3,H,W] of B images; a `Frame`;
            or an iterable of these. An iterator may use the memory of an image again for the next one.
        recursive: look for images in the folders below a folder too.
        urls: addresses may be read, within `MAX_URL_BYTES` and `MAX_URL_SECONDS`.

    Raises:
        ValueError: there is no image in a folder, pattern or list, a source is none of these, or an address is given
            without `urls`. A video that cannot be read, or not to its end, gives a last frame that raises the error.
        ImportError: there is a video, and PyAV is not installed.
    """
    for found in find(source, recursive, urls):
        if isinstance(found, Video):
            yield from video_frames(found)
        else:
            yield found


def find(source: Source, recursive: bool = False, urls: bool = False) -> Iterator[Frame | Video]:
    """Find the images and videos of a source, see `frames`, without reading any."""
    for index, found in enumerate(_find(source, recursive, urls)):
        yield found if found.name or isinstance(found, Video) else found._replace(name=f"image {index}")


def video_frames(video: Video) -> Iterator[Frame]:
    """Decode one frame after the other; they are called "clip.mp4 frame 0" and so on."""
    try:
        for number, pixels in enumerate(video.read()):
            yield Frame(f"{video.name} frame {number}", pixels)
    except ValueError as error:
        yield Frame(video.name, functools.partial(_fail, error))


def read_url(url: str) -> Tensor:
    """Download an image as uint8 [3,H,W] RGB. Raises `ValueError` if it cannot be had or used."""
    file = io.BytesIO()
    try:
        receive(url, file, MAX_URL_BYTES, MAX_URL_SECONDS, check=check_url)
    except ConnectionError as error:
        raise ValueError(str(error)) from error
    try:
        return read_image(file.getvalue())
    except ValueError as error:
        raise ValueError(f"{url}: {str(error).removeprefix('<bytes>: ')}") from error


def check_url(url: str) -> None:
    """Raise `ValueError` unless this is an address of a server that is spoken to by HTTP."""
    if not is_url(url) or not urlparse(url).hostname:
        raise ValueError(f"{url}: an image's address begins with http:// or https:// and the name of a server")


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
            raise ValueError(f"{name}: cannot use the image: {str(error) or type(error).__name__}") from error
    if isinstance(image, np.ndarray):
        array = image[..., None] if image.ndim == 2 else image  # [H,W,C]
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3) or array.size == 0:
            raise ValueError(f"an image array must be uint8 [H,W,3] or [H,W], got {image.dtype} {list(image.shape)}")
        image = torch.from_numpy(np.array(array)).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise ValueError(not_an_image(image))
    if image.layout != torch.strided or image.is_meta:
        kind = "meta" if image.is_meta else str(image.layout)
        raise ValueError(f"an image tensor must hold every pixel, got one that is {kind}")
    if image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        raise ValueError(f"an image must have 1 or 3 channels, [3,H,W] as tensor, got {list(image.shape)}")
    if image.is_floating_point():
        if not (image.amin() >= 0 and image.amax() <= 1):  # NaN neither
            raise ValueError("a floating point image must be in 0..1; give 0..255 as uint8")
        image = (image * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise ValueError(f"an image tensor must be uint8 or floating point, got {image.dtype}")
    return image.expand(3, -1, -1)


def not_an_image(value: object) -> str:
    """Say that a value is no image, and what is one."""
    hint = "; PIL.Image.open reads an open file" if _is_open(value) else ""
    return f"an image must be a path, PIL image, uint8 array or tensor, not {type(value).__name__}{hint}"


def _is_open(value: object) -> bool:
    """Tell whether this is an open file, over whose lines a loop would go."""
    return hasattr(value, "read")


def _find(source: Source, recursive: bool, urls: bool, place: str = "images") -> Iterator[Frame | Video]:
    """Find what `find` finds; `place` says in messages which part of the user's images this is."""
    if isinstance(source, Frame):
        yield source
    elif isinstance(source, (str, PathLike)):
        yield from _find_files(source, recursive, urls)
    elif isinstance(source, Tensor) and source.ndim == 4:
        yield from (Frame("", image) for image in source)
    elif isinstance(source, Image.Image):
        yield Frame(getattr(source, "filename", ""), source)
    elif isinstance(source, (np.ndarray, Tensor)):
        yield Frame("", source)
    elif isinstance(source, Iterable) and not isinstance(source, (bytes, bytearray, dict)) and not _is_open(source):
        for number, part in enumerate(source):
            found = _find(part, recursive, urls, f"{place}[{number}]")
            yield from found if isinstance(source, Collection) else map(_taken, found)
    else:
        raise ValueError(f"{place}: {not_an_image(source)}")


def _taken(found: Frame | Video) -> Frame | Video:
    """Take the pixels that an iterator gave, which may use the same memory, or close the file, for the next image."""
    if isinstance(found, Video) or not isinstance(found.image, (np.ndarray, Tensor, Image.Image)):
        return found
    try:
        image = to_rgb(found.image)
    except ValueError:  # it is told at the image's turn
        return found
    return found._replace(image=image.clone() if isinstance(found.image, Tensor) else image)


def _find_files(source: str | PathLike, recursive: bool, urls: bool) -> Iterator[Frame | Video]:
    path = Path(source)
    if not os.fspath(source):  # Path("") is the current folder
        raise ValueError("the path of an image is empty")
    if is_url(source):
        yield _place(source, urls)
    elif os.path.isdir(path):  # Path.is_dir raises an error for a name that is too long
        files = sorted(path.rglob("*") if recursive else path.iterdir())
        found, videos = [x for x in files if _is_image_file(x, path)], [x for x in files if _is_video(x)]
        left = f"{counted(len(videos), 'video is', 'videos are')} left out; name videos, or give a pattern: '{path}/*'"
        if not found:
            below = "" if recursive else "; images in the folders below it are found with recursive"
            hint = f"; {left}" if videos else below
            raise ValueError(f"{path}: no image in this folder (of {', '.join(FORMATS)}){hint}")
        if videos:
            logger.warning("%s: %s", path, left)
        yield from (_place(x, urls) for x in found)
    elif path.suffix.lower() == ".txt":
        try:
            text = read_bytes(path, "list of images", MAX_LIST_BYTES).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: the list of images is not UTF-8 text") from error
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{path}: the list of images is empty; write one path in each line")
        yield from (_place(line if is_url(line) else path.parent / line, urls) for line in lines)
    elif glob.has_magic(str(path)) and not os.path.exists(path):
        matches = sorted(Path(x) for x in glob.iglob(str(path), recursive=True))
        found = [x for x in matches if _is_image_file(x, x.parent) or _is_video(x)]
        if not found:
            raise ValueError(
                f"{path}: no image matches this pattern ({counted(len(matches), 'other file does', 'other files do')})"
            )
        yield from (_place(x, urls) for x in found)
    elif is_camera(path):
        yield Video(f"camera {path}", int(str(path)))
    else:
        yield _place(path, urls)


def _place(place: str | PathLike, urls: bool) -> Frame | Video:
    """Return the image or the video at a path or address."""
    if is_url(place):
        check_url(url := os.fspath(place))
        if not urls:
            raise ValueError(f"{url}: images come from a server only with urls=True, or --allow-urls in a command")
        return Frame(url, functools.partial(read_url, url))
    path = Path(place)
    return Video(str(path)) if _is_video(path) else Frame(str(path), path)


def is_camera(path: Path) -> bool:
    """Tell whether this is a number, which stands for a camera, and no file."""
    return str(path).isascii() and str(path).isdecimal() and not path.exists()


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not os.path.isdir(path)


def _is_image_file(path: Path, folder: Path) -> bool:
    """Tell by its name whether a file is an image; what begins with a dot below `folder` is left out, as a shell does.

    Some systems put a hidden file `._photo.jpg` beside each photo.
    """
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and Image.EXTENSION.get(path.suffix.lower()) in FORMATS and path.is_file()


def _fail(error: ValueError) -> NoReturn:
    raise error
