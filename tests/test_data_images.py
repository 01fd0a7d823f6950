"""Image files of every kind are read if whole, and refused if broken."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from samples import PICTURE, RGB, X, Y, encode

from vovnet_zoo.data import CocoDataset, ImageError, images
from vovnet_zoo.data.check import inspect_image
from vovnet_zoo.data.images import read_image
from vovnet_zoo.inference import to_rgb

pytestmark = pytest.mark.filterwarnings("ignore:.*TorchCodec:DeprecationWarning")
ALPHA = np.full_like(PICTURE[..., :1], 7)


def png16(array):
    """Make a 16-bit RGB PNG, which Pillow cannot write."""
    height, width, _ = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def drop_adobe_marker(jpeg):
    at = jpeg.index(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]


GREY = np.repeat(np.asarray(RGB.convert("L"))[..., None], 3, axis=-1)
GREY16 = (X * 1000 + Y).astype(np.uint16)
BIT = np.repeat(np.asarray(RGB.convert("1"))[..., None] * np.uint8(255), 3, axis=-1)
PALETTE = RGB.quantize(200)
CMYK = encode(RGB.convert("CMYK"), "JPEG", quality=95)
IMAGES = {  # name: bytes, expected [H, W, 3], largest difference allowed
    "jpeg": (encode(RGB, "JPEG", quality=95, subsampling=0), PICTURE, 6),
    "progressive jpeg": (encode(RGB, "JPEG", quality=95, subsampling=0, progressive=True), PICTURE, 6),
    "grey jpeg": (encode(RGB.convert("L"), "JPEG", quality=95), GREY, 6),
    "cmyk jpeg, Adobe inverted": (CMYK, PICTURE, 6),
    "cmyk jpeg without Adobe's marker": (drop_adobe_marker(CMYK), PICTURE, 6),  # taken as inverted, like Pillow does
    "jpeg with trailing bytes": (encode(RGB, "JPEG", quality=95, subsampling=0) + b"\xff\xda trailer", PICTURE, 6),
    "multi-picture jpeg": (
        encode(RGB, "MPO", quality=95, subsampling=0, save_all=True, append_images=[RGB.rotate(180)]),
        PICTURE,
        6,
    ),
    "png": (encode(RGB, "PNG"), PICTURE, 0),
    "palette png": (encode(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB")), 0),
    "palette png, one colour transparent": (
        encode(PALETTE, "PNG", transparency=3),
        np.asarray(PALETTE.convert("RGB")),
        0,
    ),
    "rgba png": (encode(Image.fromarray(np.dstack([PICTURE, ALPHA])), "PNG"), PICTURE, 0),
    "grey and alpha png": (encode(Image.merge("LA", (RGB.convert("L"), RGB.getchannel(0))), "PNG"), GREY, 0),
    "1-bit png": (encode(RGB.convert("1"), "PNG"), BIT, 0),
    "16-bit grey png": (encode(Image.fromarray(GREY16), "PNG"), np.repeat(GREY16[..., None] >> 8, 3, axis=-1), 0),
    "16-bit rgb png": (png16(PICTURE.astype(np.uint16) * 257), PICTURE, 0),
    "16-bit grey tiff": (encode(Image.fromarray(GREY16), "TIFF"), np.repeat(GREY16[..., None] >> 8, 3, axis=-1), 0),
    "bmp": (encode(RGB, "BMP"), PICTURE, 0),
    "tiff": (encode(RGB, "TIFF"), PICTURE, 0),
    "lzw tiff": (encode(RGB, "TIFF", compression="tiff_lzw"), PICTURE, 0),
    "webp": (encode(RGB, "WEBP", lossless=True), PICTURE, 0),
    "rgba webp": (encode(Image.fromarray(np.dstack([PICTURE, ALPHA])), "WEBP", lossless=True, exact=True), PICTURE, 0),
    "animated webp": (encode(RGB, "WEBP", lossless=True, save_all=True, append_images=[RGB.rotate(180)]), PICTURE, 0),
    "gif": (encode(PALETTE, "GIF"), np.asarray(PALETTE.convert("RGB")), 0),
    "animated gif": (
        encode(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)]),
        np.asarray(PALETTE.convert("RGB")),
        0,
    ),
}


@pytest.mark.parametrize("without_torchvision", [False, True])
@pytest.mark.parametrize("name", IMAGES)
def test_read_image_formats(name, without_torchvision, monkeypatch):
    if without_torchvision:  # its decoders are deprecated: one day there is only Pillow
        monkeypatch.setattr(images, "decode_jpeg", None)
    content, expected, tolerance = IMAGES[name]
    image = read_image(content)
    assert image.dtype == torch.uint8 and image.shape == (3, *expected.shape[:2])
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_image_exif_orientation(format, orientation):
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    stored = {  # what a camera stores for PICTURE, by the EXIF table: row 0 / column 0 are which sides of the picture
        1: PICTURE,
        2: PICTURE[:, ::-1],
        3: PICTURE[::-1, ::-1],
        4: PICTURE[::-1],
        5: PICTURE.swapaxes(0, 1),
        6: np.rot90(PICTURE, 1),
        7: PICTURE[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(PICTURE, -1),
    }[orientation]
    content = encode(Image.fromarray(np.ascontiguousarray(stored)), format, orientation, **options)
    image = read_image(content).permute(1, 2, 0).numpy()
    assert image.shape == PICTURE.shape
    assert np.abs(image.astype(int) - PICTURE).max() <= 6


@pytest.mark.parametrize("name", IMAGES)
def test_a_pillow_image_has_the_pixels_of_its_file(name):
    content, _, _ = IMAGES[name]
    assert torch.equal(to_rgb(Image.open(io.BytesIO(content))), read_image(content))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_pillow_image_is_turned_as_its_file(format):
    content = encode(RGB, format, 6)
    image = Image.open(io.BytesIO(content))
    for _ in range(2):  # the image itself stays as it is
        assert torch.equal(to_rgb(image), read_image(content)) and to_rgb(image).shape == (3, *RGB.size)


@pytest.mark.parametrize("pixels", [X.astype(np.float32), X.astype(np.int32) << 20], ids=["F", "I"])
def test_pixels_without_a_range_are_refused(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    for source in (Image.fromarray(pixels), Image.open(tmp_path / "x.tif"), tmp_path / "x.tif"):
        with pytest.raises(ValueError, match="8 bit"):
            to_rgb(source)
    (tmp_path / "cut.png").write_bytes(encode(NOISE, "PNG")[:9000])
    with pytest.raises(ValueError, match="cut.png"):
        to_rgb(Image.open(tmp_path / "cut.png"))


@pytest.mark.parametrize("kind", ["grey png", "grey tiff", "rgb png"])
def test_twelve_bits_in_sixteen_are_told(kind, tmp_path):
    """An image of 12 bits warns, by its name; an image of 16 bits, or one that is all black, does not."""

    def write(array):
        if kind == "rgb png":
            (tmp_path / "x.png").write_bytes(png16(np.repeat(array[..., None], 3, axis=-1)))
        else:
            Image.fromarray(array).save(tmp_path / "x.png", kind.split()[1].upper())
        return tmp_path / "x.png"

    twelve = (np.arange(32 * 128, dtype=np.uint16)).reshape(32, 128)
    for read in (read_image, lambda path: to_rgb(Image.open(path))):
        with pytest.warns(images.ImageWarning, match="x.png: its 16-bit pixels are all below 4096"):
            assert read(write(twelve)).max() == 15
        with warnings.catch_warnings():
            warnings.simplefilter("error", images.ImageWarning)
            assert read(write(twelve * 16)).max() == 255 and read(write(twelve * 0)).max() == 0
    write(twelve)
    assert "below 4096" in inspect_image(str(tmp_path / "x.png")).complaint
    write(twelve * 16)
    assert inspect_image(str(tmp_path / "x.png")).complaint == ""


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
JPEG, PNG = encode(NOISE, "JPEG"), encode(NOISE, "PNG")
BOMB = (
    PNG[:16]
    + struct.pack(">II", 50000, 50000)
    + PNG[24:29]
    + struct.pack(">I", zlib.crc32(PNG[12:16] + struct.pack(">II", 50000, 50000) + PNG[24:29]))
    + PNG[33:]
)
BROKEN = {
    "empty": (b"", "empty"),
    "text": (b"not an image at all", "not an image"),
    "jpeg header only": (JPEG[:300], "decode|not an image"),
    "truncated jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "truncated progressive jpeg": (encode(NOISE, "JPEG", progressive=True)[:-500], "truncated"),
    "half downloaded jpeg, rest zero": (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), "truncated"),
    "truncated jpeg with a whole thumbnail": (
        JPEG[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(IMAGES["jpeg"][0])) + IMAGES["jpeg"][0] + JPEG[2:-900],
        "truncated",
    ),
    "truncated png": (PNG[: len(PNG) // 2], "decode"),
    "damaged png": (PNG[:5000] + bytes(50) + PNG[5050:], "decode"),
    "truncated webp": (encode(NOISE, "WEBP")[:-500], "decode"),
    "truncated bmp": (encode(NOISE, "BMP")[:-500], "truncated"),
    "truncated tiff": (encode(NOISE, "TIFF")[:-5000], "decode|not an image"),
    "decompression bomb": (BOMB, "exceeds limit"),
    "floating-point tiff": (encode(Image.fromarray(X.astype(np.float32)), "TIFF"), "8 bit"),
    "32-bit tiff": (encode(Image.fromarray(X.astype(np.int32) << 20), "TIFF"), "8 bit"),
}


@pytest.mark.parametrize("without_torchvision", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_read_image_names_the_broken_file(name, without_torchvision, monkeypatch, tmp_path):
    if without_torchvision:
        monkeypatch.setattr(images, "decode_jpeg", None)
    content, reason = BROKEN[name]
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=rf"photo\.jpg: .*({reason})"):
        read_image(tmp_path / "photo.jpg")


def test_read_image_missing_or_folder(tmp_path):
    with pytest.raises(ValueError, match=r"none\.png: .*No such file") as caught:
        read_image(str(tmp_path / "none.png"))
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(ValueError, match="directory"):
        read_image(tmp_path)
    with pytest.raises(ValueError, match="<bytes>"):
        read_image(JPEG[:5000])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP"])
def test_an_image_of_another_size_is_not_decoded(write_coco, tmp_path, monkeypatch, format):
    """A small file can hold an image that takes gigabytes: its header is compared with the JSON first."""
    image = {"id": 1, "file_name": "odd.png", "width": RGB.width, "height": RGB.height}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}
    folder, file = write_coco({"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "a"}]})
    dataset = CocoDataset(folder, file)
    (folder / "odd.png").write_bytes(encode(RGB, format))
    assert dataset[0][0].shape[1:] == (RGB.height, RGB.width)
    (folder / "odd.png").write_bytes(encode(RGB.resize((RGB.height, RGB.width)), format))
    with pytest.raises(ImageError, match="before its EXIF rotation"):
        dataset[0]
    (folder / "odd.png").write_bytes(encode(RGB.resize((300, 200)), format, *([6] if format != "BMP" else [])))
    monkeypatch.setattr(images, "_decode", lambda *args: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=("300x200" if format == "BMP" else "200x300") + r" .* says 60x40") as error:
        dataset[0]
    assert error.value.kind == "size unlike the JSON"


def test_too_little_memory_is_no_damaged_image(monkeypatch):
    monkeypatch.setattr(images, "_decode", lambda *args: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        read_image(PNG)
