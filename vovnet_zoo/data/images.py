"""This module reads image files as RGB uint8 `[3, H, W]`, or says why a file cannot be used."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..files import read_bytes

try:  # this decoder has 1.5 times the speed of Pillow, but is deprecated since torchvision 0.29
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

Image.init()
# Pillow knows more formats, but some would take a text file for an image, and EPS runs an interpreter.
FORMATS: list[str] = [
    name for name in ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM") if name in Image.OPEN
]
MAX_IMAGE_BYTES = 2**31 - 1  # a larger file is no image, and would not fit into memory


def read_image(source: str | Path | bytes) -> Tensor:
    """Read an image file, or its bytes, as RGB uint8 [3, H, W], turned as its EXIF orientation says.

    Grey, palette, CMYK, 1-bit and 16-bit images become RGB (16 bits are cut to the upper 8); alpha is dropped; of
    several frames the first is read.

    Raises:
        ImageError: the file is missing, not an image of `FORMATS`, truncated (as a JPEG without its end marker is),
            damaged so that the decoder notices, too large (`PIL.Image.MAX_IMAGE_PIXELS`), or has floating-point
            pixels. The message names the file.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return decode_image(bytes(source), "<bytes>")
    return decode_image(read_image_bytes(source), source)


def read_image_bytes(path: str | Path) -> bytes:
    """Read the bytes of an image file. Raises `ImageError` if the file is missing or cannot be read."""
    try:
        return read_bytes(path, "image", MAX_IMAGE_BYTES)
    except ValueError as error:
        backslashes = "\\" in str(path) and os.sep == "/"
        hint = "; write its backslashes as '/' in the JSON" if backslashes else "; restore it or correct its path"
        kind = "missing image file" if isinstance(error.__cause__, FileNotFoundError) else "unreadable image file"
        raise ImageError(f"{error}{hint}", kind) from error.__cause__


def decode_image(data: bytes, name: str | Path, size: tuple[int, int] | None = None, wanted_by: str = "") -> Tensor:
    """Decode the bytes of an image file as `read_image` does.

    Args:
        data: the content of the file.
        name: the file's name, for the error messages.
        size: (height, width) that the image must have, or None. An image of another size is refused before its pixels
            take memory.
        wanted_by: the file that says this size.
    """
    if not data:
        raise ImageError(f"{name}: the image file is empty (0 bytes); replace or remove it", "empty image file")
    try:
        with open_image(data) as image:
            if size is not None and sorted(image.size) != sorted(size):
                check_size(name, turned_size(image), size, wanted_by)
            pixels = _decode(image, data, name)
    except (ImageError, MemoryError):  # too little memory says nothing about the file
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image of a known format; convert or remove it", "not an image") from error
    except Exception as error:  # on hostile bytes the decoders raise anything from SyntaxError to struct.error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ImageError(f"{name}: cannot decode the image: {reason}; replace or remove it") from error
    if size is not None:
        height, width = pixels.shape[-2:]
        check_size(name, (height, width), size, wanted_by)
    return pixels


def turned_size(image: Image.Image) -> tuple[int, int]:
    """Tell the (height, width) of an image as its EXIF orientation turns it, from its header."""
    try:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:  # damaged metadata raises all kinds of errors
        turned = False
    return image.size if turned else image.size[::-1]


def open_image(data: bytes) -> Image.Image:
    """Parse the header of an image, without its pixels, and refuse decompression bombs."""
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _decode(image: Image.Image, data: bytes, name: str | Path) -> Tensor:
    if image.format in ("JPEG", "MPO"):
        if not _jpeg_ends(data):
            raise ValueError("truncated, the JPEG end marker is missing")
        if decode_jpeg is not None:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_jpeg(buffer, ImageReadMode.RGB, apply_exif_orientation=True)
    # Pillow decodes the other formats: torchvision ends the process on a damaged PNG, and ignores the EXIF of WebP
    return pil_to_rgb(image, name)


def pil_to_rgb(image: Image.Image, name: str | Path = "") -> Tensor:
    """Turn a Pillow image, or the file that it stands for, into the pixels that `read_image` gives for the file.

    A warning names an image of 16 bits that is nearly black, as an image of 12 bits in a file of 16 is.

    Raises:
        ValueError: the pixels are floating-point numbers, or have more than 16 bits.
        Exception: a damaged file raises anything.
    """
    name = name or getattr(image, "filename", "") or "a Pillow image"
    deep = image.mode.startswith("I") or any(";16" in str(tile) for tile in getattr(image, "tile", ()))
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)  # which copies an upright image too
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range, convert it to 8 bit")
    if image.mode.startswith("I"):  # Pillow would clip 16 bits to 8
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("pixel values beyond 16 bit, convert it to 8 bit")
        dark = 0 < grey.max() < 4096
        pixels = torch.from_numpy((grey >> 8).astype(np.uint8)).repeat(3, 1, 1)
    else:
        pixels = _rgb(image)
        dark = deep and 0 < pixels.max() < 16
    if dark:
        warnings.warn(
            f"{name}: its 16-bit pixels are all below 4096, so it comes out black; if it is a 12-bit image, multiply "
            "its pixels by 16",
            ImageWarning,
            stacklevel=2,
        )
    return pixels


def _rgb(image: Image.Image, rows: int = 1024) -> Tensor:
    """Copy the pixels of an image, uint8 [3,H,W], some rows at a time: at once, Pillow takes 4 copies of the image."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for y in range(0, image.height, rows):
        strip = image.crop((0, y, image.width, min(y + rows, image.height))) if image.height > rows else image
        pixels[y : y + rows] = np.asarray(strip.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _jpeg_ends(data: bytes) -> bool:
    """Tell whether an end-of-image marker follows the header.

    Without the marker, libjpeg only warns, and fills the missing part with grey.
    """
    at = 2
    while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":  # segments, up to the first scan
        fill = data[at + 1 : at + 2] == b"\xff"
        at += 1 if fill else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data.rfind(b"\xff\xd9", at) >= 0  # rfind begins at the end, where the marker usually is


def check_size(path: str | Path, size: tuple[int, int], expected: tuple[int, int], annotation_file: str | Path) -> None:
    """Compare an image's (height, width) with the one in its annotation file. Raises `ImageError` if they differ."""
    if size != expected:
        turned = " (annotated before its EXIF rotation?)" if size == expected[::-1] else ""
        raise ImageError(
            f"{path}: the image is {size[1]}x{size[0]} (width x height) but {annotation_file} says "
            f"{expected[1]}x{expected[0]}{turned}; correct one of the two",
            "size unlike the JSON",
        )


class ImageWarning(UserWarning):
    """An image file can be read, but its pixels are hardly those that were meant."""


class ImageError(ValueError):
    """An image file cannot be used; all files with the same problem have the same few words as `kind`."""

    def __init__(self, message: str, kind: str = "damaged image"):
        super().__init__(message)
        self.kind = kind
