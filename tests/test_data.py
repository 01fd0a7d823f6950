import io
import json
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from vovnet_zoo import data

pytestmark = pytest.mark.filterwarnings("ignore:.*TorchCodec:DeprecationWarning")
Y, X = np.mgrid[:40, :60]
PICTURE = np.stack([X * 4, Y * 6, (X + Y) * 2], axis=-1).astype(np.uint8)  # [40, 60, 3], no symmetry
ALPHA = np.full_like(PICTURE[..., :1], 7)


@pytest.fixture(scope="module")
def shared():
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the shared data folder")
    return folder


@pytest.fixture(scope="module")
def golden(shared):
    from safetensors.torch import load_file

    return load_file(shared / "golden" / "golden_fcos_ops.safetensors")


# ---- reading images -------------------------------------------------------------------------------------------------


def encode(image, format, orientation=None, **options):
    if orientation:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png16(array):
    """A 16-bit RGB PNG, which Pillow cannot write."""
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


RGB = Image.fromarray(PICTURE)
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
        monkeypatch.setattr(data, "decode_jpeg", None)
    content, expected, tolerance = IMAGES[name]
    image = data.read_image(content)
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
    image = data.read_image(content).permute(1, 2, 0).numpy()
    assert image.shape == PICTURE.shape
    assert np.abs(image.astype(int) - PICTURE).max() <= 6


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
        monkeypatch.setattr(data, "decode_jpeg", None)
    content, reason = BROKEN[name]
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=rf"photo\.jpg: .*({reason})"):
        data.read_image(tmp_path / "photo.jpg")


def test_read_image_missing_or_folder(tmp_path):
    with pytest.raises(ValueError, match=r"none\.png: .*No such file") as caught:
        data.read_image(str(tmp_path / "none.png"))
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(ValueError, match="directory"):
        data.read_image(tmp_path)
    with pytest.raises(ValueError, match="<bytes>"):
        data.read_image(JPEG[:5000])


# ---- published numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_size", [640, 800])
def test_resize_size_published(golden, min_size):
    for (width, height), expected in zip(
        golden["resize/in/image_wh"].tolist(), golden[f"resize/out_hw_{min_size}_1333"].tolist(), strict=True
    ):
        assert data.resize_size(height, width, min_size, 1333) == tuple(expected)


def test_resize_size_extremes():
    assert data.resize_size(1, 1, 800, 1333) == (800, 800)
    assert data.resize_size(400, 20000, 800, 1333) == (27, 1350)  # int(27 * 50): the rule rounds the short side first
    assert data.resize_size(20000, 1, 800, 1333) == (1333, 1)
    assert min(data.resize_size(h, w, 800, 1333) for h in range(1, 90, 7) for w in range(1, 90000, 997))[0] >= 1


def test_boxes_published(golden):
    """xywh -> xyxy -> clip -> resize -> flip, each bit for bit."""
    xywh, (width, height) = golden["boxes/in/coco_xywh"].numpy(), golden["boxes/in/image_wh"].tolist()
    assert np.array_equal(data.coco_to_xyxy(xywh, 9999, 9999, plus_one=True)[0], golden["boxes/xyxy"])
    boxes, keep = data.coco_to_xyxy(xywh, height, width, plus_one=True)
    assert np.array_equal(boxes, golden["boxes/clipped_all"])
    assert np.array_equal(boxes[keep], golden["boxes/clipped"])

    sample = make_sample(height, width, boxes[keep])
    resized_wh = tuple(golden["boxes/in/resized_wh"].tolist())
    image, target = data.train_transforms((800, 800), 1333, "none", plus_one=True)(*sample)
    assert image.shape[-2:] == resized_wh[::-1] and torch.equal(plain(target["boxes"]), golden["boxes/resized"])
    _, target = data.train_transforms((800, 800), 1333, "flip", flip=1.0, plus_one=True)(*sample)
    assert torch.equal(plain(target["boxes"]), golden["boxes/flipped"])
    flipped = data.hflip_boxes(golden["boxes/resized"], resized_wh[0], plus_one=True)
    assert torch.equal(flipped, golden["boxes/flipped"])


def test_normalize_published(shared):
    from safetensors.torch import load_file

    golden = load_file(shared / "golden" / "golden_fcos_v39.safetensors")
    mean, std = [m / 255 for m in (122.7717, 115.9465, 102.9801)], [1 / 255] * 3
    for i in range(3):  # the last is padded
        sample = make_sample(*golden[f"img{i}/image_size_hw"].tolist(), [])
        batch = data.collate([(golden[f"img{i}/image_rgb_u8"].permute(2, 0, 1), sample[1])])
        x = data.normalize(batch["images"], batch["sizes"], mean, std)
        assert torch.equal(x.flip(1), golden[f"img{i}/input"])


def test_resize_image_published(shared):
    """Pillow's bilinear, which the published code used, to one grey level."""
    path = next((shared / "data" / "bccd" / "val").glob("*.jpg"))
    image, _ = data.eval_transforms(800, 1333)(tv_tensors.Image(data.read_image(path)), make_sample(480, 640, [])[1])
    with Image.open(path) as photo:
        expected = np.asarray(photo.convert("RGB").resize((1066, 800), Image.Resampling.BILINEAR))
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_coco_to_xyxy_continuous():
    nan, inf = float("nan"), float("inf")
    xywh = [
        [1, 2, 3, 4],
        [-5, -5, 10, 10],
        [50, 30, 100, 100],
        [60, 0, 5, 5],
        [5, 5, 0, 5],
        [9, 9, -4, -4],
        [nan, 0, 5, 5],
    ]
    boxes, keep = data.coco_to_xyxy([*xywh, [0, 0, inf, inf]], 40, 60)
    assert boxes.dtype == np.float32
    assert keep.tolist() == [True, True, True, False, False, False, False, True]
    assert boxes[keep].tolist() == [[1, 2, 4, 6], [0, 0, 5, 5], [50, 30, 60, 40], [0, 0, 60, 40]]
    per_box, _ = data.coco_to_xyxy([[0, 0, 99, 99]] * 2, np.array([10, 20]), np.array([30, 40]))
    assert per_box.tolist() == [[0, 0, 30, 10], [0, 0, 40, 20]]
    assert data.coco_to_xyxy([], 40, 60)[0].shape == (0, 4)
    assert data.hflip_boxes(torch.tensor([[1.0, 2, 4, 6]]), 60).tolist() == [[56, 2, 59, 6]]


# ---- dataset --------------------------------------------------------------------------------------------------------


def make_sample(height, width, boxes):
    boxes = torch.as_tensor(np.asarray(boxes, dtype=np.float32).reshape(-1, 4))
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.arange(len(boxes)),
        "image_id": 1,
        "orig_size": (height, width),
    }
    return tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8)), target


def plain(boxes):
    return boxes.as_subclass(torch.Tensor)


def box(image_id=1, category_id=3, bbox=(1, 2, 10, 20), **more):
    bbox = list(bbox) if isinstance(bbox, tuple) else bbox
    return {"id": 1, "image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


def make_coco(annotations=(), images=3):
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 60, "height": 40} for i in range(images, 0, -1)],
        "annotations": list(annotations),
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


@pytest.fixture
def write(tmp_path):
    """Writes images 1.png, 2.png, ... and the JSON; returns the arguments of CocoDataset."""
    for i in range(1, 8):
        RGB.save(tmp_path / f"{i}.png")

    def write(coco):
        file = tmp_path / "instances.json"
        file.write_text(coco if isinstance(coco, str) else json.dumps(coco))
        return tmp_path, file

    return write


def test_dataset(write, caplog):
    coco = make_coco([box(2, 7, (-5, -5, 20.5, 10)), box(1, 3), box(2, 3), box(2, 3, iscrowd=1), box(1, 7, iscrowd=0)])
    dataset = data.CocoDataset(*write(coco))
    assert (dataset.class_names, dataset.category_ids) == (["cat", "dog"], [3, 7])
    assert dataset.image_ids.tolist() == [1, 2, 3] and dataset.file_names.tolist() == ["1.png", "2.png", "3.png"]
    assert dataset.sizes.tolist() == [[40, 60]] * 3 and dataset.aspect_ratios.tolist() == [40 / 60] * 3
    assert dataset.problems == {"box clipped to the image": 1} and "clipped to the image: 1" in caplog.text

    image, target = dataset[1]
    assert isinstance(image, tv_tensors.Image) and np.array_equal(image.permute(1, 2, 0), PICTURE)
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes) and target["boxes"].canvas_size == (40, 60)
    assert target["boxes"].tolist() == [[0, 0, 15.5, 5], [1, 2, 11, 22]] and target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [1, 0] and target["labels"].dtype == torch.int64
    assert target["image_id"] == 2 and target["orig_size"] == (40, 60)
    assert dataset[0][1]["labels"].tolist() == [0, 1]
    assert dataset[-1][1]["boxes"].shape == (0, 4) and dataset[2][1]["labels"].shape == (0,)
    with pytest.raises(IndexError):
        dataset[3]

    target["boxes"].zero_()  # a caller's changes stay with the caller
    assert dataset[1][1]["boxes"].sum() > 0
    assert data.CocoDataset(*write(coco), drop_empty=True).image_ids.tolist() == [1, 2]
    boxes = data.CocoDataset(*write(coco), plus_one=True)[1][1]["boxes"]
    assert boxes.tolist() == [[0, 0, 14.5, 4], [1, 2, 10, 21]]


def test_clean_file_gives_no_warning(write, caplog):
    dataset = data.CocoDataset(*write(make_coco([box(), box(bbox=(0, 0, 60.5, 40))])))  # half a pixel is rounding
    assert dataset.problems == {} and not caplog.records


BAD_ANNOTATIONS = {
    "unknown image_id": [box(99), box("1"), box(None), box([1])],
    "unknown category_id": [box(1, 1), box(1, "3"), box(1, {}), box(1, float("nan"))],
    "box is not 4 finite numbers": [
        *(
            box(bbox=b)
            for b in (None, [], [1, 2, 3], [1, 2, 3, 4, 5], ["1", "2", "3", "4"], "1234", {}, [1, 2, None, 4])
        ),
        *(box(bbox=(1, 2, v, 4)) for v in (float("nan"), float("inf"), 10**400, True, [3])),
        {"image_id": 1, "category_id": 3},
    ],
    "empty box": [box(bbox=(1, 2, *wh)) for wh in ((0, 5), (5, 0), (-5, 5), (5, -5), (1e-12, 5))],
    "box outside the image": [box(bbox=b) for b in ((60, 0, 5, 5), (0, 40, 5, 5), (-5, 0, 5, 5), (1e9, 1e9, 5, 5))],
    "not an object": [None, 3, "box", [1, 2, 3, 4]],
}


def test_unusable_annotations_are_dropped_and_counted(write, caplog):
    bad = [annotation for annotations in BAD_ANNOTATIONS.values() for annotation in annotations]
    dataset = data.CocoDataset(*write(make_coco([box(), *bad, box(2, 7)])))
    assert dataset.problems == {kind: len(annotations) for kind, annotations in BAD_ANNOTATIONS.items()}
    assert [dataset[i][1]["boxes"].tolist() for i in range(3)] == [[[1, 2, 11, 22]], [[1, 2, 11, 22]], []]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert all(f"{kind}: {len(annotations)}" in caplog.text for kind, annotations in BAD_ANNOTATIONS.items())
    assert "instances.json" in caplog.text


def changed(change):
    coco = make_coco([box()])
    change(coco)
    return coco


BAD_FILES = {
    "not json": ("{", "not a JSON"),
    "empty": ("", "not a JSON"),
    "binary": ("\x00\x01", "not a JSON"),
    "too deep": ("[" * 100000, "not a JSON"),
    "a list": ([], "not COCO format: a JSON list"),
    "no images": (changed(lambda c: c.pop("images")), "no list 'images'"),
    "no annotations": (changed(lambda c: c.pop("annotations")), "no list 'annotations'"),
    "no categories": (changed(lambda c: c.pop("categories")), "no list 'categories'"),
    "annotations an object": (changed(lambda c: c.update(annotations={})), "no list 'annotations'"),
    "zero images": (changed(lambda c: c.update(images=[])), "'images' is empty"),
    "zero categories": (changed(lambda c: c.update(categories=[])), "'categories' is empty"),
    "same image id": (changed(lambda c: c["images"][0].update(id=1)), r"images .* more than once: \[1\]"),
    "same category id": (changed(lambda c: c["categories"][0].update(id=3)), r"categories .* more than once: \[3\]"),
    "image without id": (changed(lambda c: c["images"][1].pop("id")), r"images\[1\] has no integer 'id'"),
    "image id a string": (changed(lambda c: c["images"][1].update(id="2")), r"images\[1\] has no integer 'id'"),
    "image id beyond int64": (changed(lambda c: c["images"][1].update(id=2**70)), r"images\[1\] has no integer 'id'"),
    "image not an object": (changed(lambda c: c["images"].append("x.png")), r"images\[3\] has no integer 'id'"),
    "image without file_name": (changed(lambda c: c["images"][1].pop("file_name")), r"images\[1\] .* no 'file_name'"),
    "category without name": (changed(lambda c: c["categories"][0].pop("name")), r"categories\[0\] .* no 'name'"),
    "category name blank": (changed(lambda c: c["categories"][0].update(name=" ")), r"categories\[0\] .* no 'name'"),
    "image without width": (changed(lambda c: c["images"][1].pop("width")), r"image 2 \(2.png\) needs"),
    "image height a string": (changed(lambda c: c["images"][1].update(height="40")), r"image 2 \(2.png\) needs"),
    "image height zero": (changed(lambda c: c["images"][1].update(height=0)), r"image 2 \(2.png\) needs"),
    "image height NaN": (changed(lambda c: c["images"][1].update(height=float("nan"))), r"image 2 \(2.png\) needs"),
    "no usable annotation": (
        make_coco([box(99), box(bbox=None)]),
        r"none .* can be used \(unknown image_id: 1, box is",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unusable_file(name, write):
    coco, message = BAD_FILES[name]
    with pytest.raises(ValueError, match=rf"instances\.json: .*{message}"):
        data.CocoDataset(*write(coco))


def test_missing_files(write, tmp_path):
    images_dir, file = write(make_coco())
    with pytest.raises(ValueError, match=r"none\.json: .*No such file"):
        data.CocoDataset(images_dir, tmp_path / "none.json")
    with pytest.raises(ValueError, match="none: no such folder"):
        data.CocoDataset(tmp_path / "none", file)
    (tmp_path / "2.png").unlink()
    with pytest.raises(ValueError, match=r"2\.png"):
        data.CocoDataset(images_dir, file)[1]
    with pytest.raises(ValueError, match="drop_empty"):
        data.CocoDataset(images_dir, file, drop_empty=True)


def test_image_of_another_size(write, tmp_path):
    dataset = data.CocoDataset(*write(make_coco([box()])))
    RGB.resize((61, 40)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"1\.png: .* 61x40 .*instances\.json says 60x40;"):
        dataset[0]
    (tmp_path / "1.png").write_bytes(encode(RGB, "PNG", orientation=6))
    with pytest.raises(ValueError, match=r"1\.png: .* 40x60 .* says 60x40 \(annotated before its EXIF rotation"):
        dataset[0]


def test_byte_order_mark_and_unicode_names(write, tmp_path):
    coco = make_coco([box(3)])
    coco["images"][0]["file_name"] = "füße/写真.png"
    (tmp_path / "füße").mkdir()
    RGB.save(tmp_path / "füße" / "写真.png")
    images_dir, file = write(coco)
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(coco, ensure_ascii=False).encode())
    assert data.CocoDataset(images_dir, file)[2][1]["labels"].tolist() == [0]


def test_seeded_key_decides_everything(write):
    transforms = data.train_transforms((30, 60), 100, "jitter_crop", color=0.3)
    dataset = data.CocoDataset(*write(make_coco([box()])), transforms=transforms)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    image, target = dataset[0, 5]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = dataset[0, 5]
    assert torch.equal(again[0], image) and torch.equal(again[1]["boxes"], target["boxes"])
    assert len({dataset[0, seed][0].shape for seed in range(5)}) > 1
    keys = [[(0, 5), (1, 2**63 - 1)], [(0, 5)]]
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=keys, num_workers=2, collate_fn=data.collate)
    for batch in loader:
        height, width = batch["sizes"][0].tolist()
        assert torch.equal(batch["images"][0, :, :height, :width], image)


def test_real_photos(shared):
    expected = {"train": (128, 935 - 6, 2), "val": (128, 903 - 5, None)}
    for split, (images, boxes, empty) in expected.items():
        folder, file = data.find_split(shared / "data" / "coco-mini", split)
        assert folder.name == f"{split}2017"
        dataset = data.CocoDataset(folder, file)
        assert len(dataset) == images and len(dataset.class_names) == 80 and dataset.category_ids[79] == 90
        counts = [len(dataset[i][1]["labels"]) for i in range(images)]
        assert sum(counts) == boxes and dataset.problems == {}
        if empty is not None:
            assert counts.count(0) == empty
            assert len(data.CocoDataset(folder, file, drop_empty=True)) == images - empty
    bccd = data.CocoDataset(*data.find_split(shared / "data" / "bccd", "val"))
    assert len(bccd) == 87 and len(bccd._boxes) == 1137 and sorted(bccd.class_names) == ["Platelets", "RBC", "WBC"]


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "images", "annotations"),
    [
        ("train", "train", "annotations/instances_train.json"),
        ("val", "val2017", "annotations/instances_val2017.json"),
        ("val", "images/val2014", "annotations/instances_val2014.json"),
        ("train", "train", "train/_annotations.coco.json"),
        ("val", "valid", "valid/_annotations.coco.json"),
        ("test", "test", "test/_annotations.coco.json"),
    ],
)
def test_find_split(tmp_path, split, images, annotations):
    for name in (images, "annotations", "trainer"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    for name in (annotations, "annotations/instances_valuable.json", "annotations/instances_trainer.json"):
        (tmp_path / name).touch()
    assert data.find_split(tmp_path, split) == (tmp_path / images, tmp_path / annotations)


def test_find_split_none_or_several(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        data.find_split(tmp_path / "none", "train")
    with pytest.raises(ValueError, match="there is: nothing"):
        data.find_split(tmp_path, "train")
    for name in ("annotations", "train2014", "train2017"):
        (tmp_path / name).mkdir()
    (tmp_path / "annotations" / "instances_train2014.json").touch()
    with pytest.raises(ValueError, match=r"no 'val' split; looked for .*instances_val.*there is: .*_train2014\.json"):
        data.find_split(tmp_path, "val")
    (tmp_path / "annotations" / "instances_train2017.json").touch()
    with pytest.raises(ValueError, match=r"several 'train' splits.*train2014\.json.*train2017\.json"):
        data.find_split(tmp_path, "train")


# ---- transforms -----------------------------------------------------------------------------------------------------

RECTANGLE = (30, 20, 90, 60)  # white, in a black picture 160 wide and 120 high


def rectangle_sample(height=120, width=160):
    image, target = make_sample(height, width, [RECTANGLE, (0, 0, width, height)])
    image[:, RECTANGLE[1] : RECTANGLE[3], RECTANGLE[0] : RECTANGLE[2]] = 255
    return image, target


@pytest.mark.parametrize("augment", ["none", "flip", "jitter_crop"])
def test_boxes_follow_the_pixels(augment):
    transforms, shapes, seen = data.train_transforms((60, 240), 400, augment, color=0.2), set(), 0
    for seed in range(60):
        torch.manual_seed(seed)
        image, target = transforms(*rectangle_sample())
        height, width = image.shape[-2:]
        shapes.add((height, width))
        assert image.dtype == torch.uint8 and target["boxes"].canvas_size == (height, width)
        boxes = plain(target["boxes"])
        assert len(boxes) == len(target["labels"]) and target["labels"].tolist()[-1] == 1  # the whole picture stays
        torch.testing.assert_close(boxes[-1], torch.tensor([0.0, 0, width, height]), atol=1e-3, rtol=0)
        white = (image[0] > 90).nonzero()  # rows, columns
        if 0 in target["labels"].tolist():
            seen += 1
            found = torch.cat([white.amin(0).flip(0), white.amax(0).flip(0) + 1])
            assert (found - boxes[0]).abs().max() <= 1.5
        else:
            assert len(white) <= 2 * max(height, width)
    assert seen > 30 and len(shapes) > 20


def test_jitter_crop_stays_within_the_target_size():
    sizes = []
    for seed in range(100):
        torch.manual_seed(seed)
        image, _ = data.RandomScaleCrop((100, 100), 150, (0.5, 2.0))(*rectangle_sample())
        sizes.append(image.shape[-2:])
    assert max(sizes) == (100, 133) and (50, 67) <= min(sizes) < (60, 80)
    assert 30 < sizes.count((100, 133)) < 70  # log-uniform: half the time a window is enlarged


def test_flip_probability_and_range():
    sizes = set()
    for seed in range(200):
        torch.manual_seed(seed)
        image, target = data.train_transforms((20, 24), 100, flip=0.0)(*make_sample(40, 60, [(3, 0, 33, 30)]))
        sizes.add(image.shape[-2])
        assert target["boxes"][0, 0] < image.shape[-1] / 4
    assert sizes == {20, 21, 22, 23, 24}
    _, target = data.train_transforms((40, 40), 100, flip=1.0)(*make_sample(40, 60, [(3, 0, 33, 30)]))
    assert target["boxes"].tolist() == [[27, 0, 57, 30]]


def test_small_boxes_and_odd_images():
    sample = make_sample(400, 20000, [(0, 0, 10000, 400), (5, 5, 9, 9)])
    image, target = data.eval_transforms()(*sample)
    assert image.shape == (3, 27, 1350) and target["labels"].tolist() == [0]  # the other is below one pixel
    for augment in ("none", "flip", "jitter_crop"):
        transforms = data.train_transforms((640, 800), 1333, augment)
        image, target = transforms(*make_sample(1, 1, [(0, 0, 1, 1)]))
        assert 320 <= image.shape[-1] <= 800 and target["boxes"].shape == (1, 4)
        image, target = transforms(*make_sample(20000, 40, []))
        assert image.shape[-2] <= 2666 and target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)


def test_transform_arguments():
    for arguments in ({"augment": "mosaic"}, {"min_size": (800, 640)}, {"min_size": (0, 9)}):
        with pytest.raises(ValueError):
            data.train_transforms(**arguments)
    with pytest.raises(ValueError, match="plus_one"):
        data.train_transforms(augment="jitter_crop", plus_one=True)
    with pytest.raises(ValueError, match="scale"):
        data.train_transforms(augment="jitter_crop", scale=(2.0, 0.5))


# ---- batches --------------------------------------------------------------------------------------------------------

RATIOS = np.tile([0.75, 0.75, 1.5], 20)[:50]  # 34 wide, 16 tall


def test_sampler_is_the_same_for_any_world_size_and_start():
    steps = list(data.TrainSampler(RATIOS, 8, num_steps=40, seed=3))
    assert len(steps) == 40 and all(len(step) == 8 for step in steps)
    assert steps == list(data.TrainSampler(RATIOS, 8, num_steps=40, seed=3))
    assert steps != list(data.TrainSampler(RATIOS, 8, num_steps=40, seed=4))
    for world_size in (2, 4, 8):
        ranks = [
            data.TrainSampler(RATIOS, 8, num_steps=40, seed=3, rank=r, world_size=world_size) for r in range(world_size)
        ]
        assert [sum(shares, []) for shares in zip(*ranks, strict=True)] == steps
    for start in (1, 17, 40, 50):
        resumed = data.TrainSampler(RATIOS, 8, num_steps=40, seed=3, start_step=start)
        assert list(resumed) == steps[start:] and len(resumed) == len(steps[start:])


def test_sampler_epochs_groups_and_seeds():
    steps = list(data.TrainSampler(RATIOS, 4, num_steps=100))
    assert all(len({RATIOS[index] >= 1 for index, _ in step}) == 1 for step in steps)
    visits = np.bincount([index for step in steps for index, _ in step], minlength=50)
    assert visits.sum() == 400 and visits.min() >= 7 and visits.max() <= 9  # 8 epochs, less or more what is carried
    seeds = [seed for step in steps for _, seed in step]
    assert len(set(seeds)) == 400 and 0 <= min(seeds) and max(seeds) < 2**63
    mixed = list(data.TrainSampler(RATIOS, 50, num_steps=2, group_by_aspect=False))
    assert [sorted(index for index, _ in step) for step in mixed] == [list(range(50))] * 2
    assert mixed[0] != mixed[1]


def test_sampler_smaller_than_a_batch():
    steps = list(data.TrainSampler([1.0, 0.5, 0.5], 8, num_steps=5))
    assert len(steps) == 5 and {index for step in steps for index, _ in step} == {0, 1, 2}


def test_sampler_arguments():
    for arguments in (
        {"batch_size": 9, "world_size": 2},
        {"batch_size": 0},
        {"rank": 2, "world_size": 2},
        {"start_step": -1},
        {"aspect_ratios": []},
    ):
        with pytest.raises(ValueError):
            data.TrainSampler(**{"aspect_ratios": RATIOS, "batch_size": 8, "num_steps": 1} | arguments)


def test_collate_and_normalize():
    images = [torch.full((3, 40, 60), 200, dtype=torch.uint8), torch.full((3, 65, 30), 100, dtype=torch.uint8)]
    targets = [make_sample(40, 60, [(1, 2, 3, 4), (5, 6, 7, 8)])[1], make_sample(65, 30, [])[1] | {"image_id": 2**40}]
    batch = data.collate([(tv_tensors.Image(i), t) for i, t in zip(images, targets, strict=True)])
    assert type(batch["images"]) is type(batch["boxes"]) is torch.Tensor
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "images": (torch.uint8, (2, 3, 96, 64)),
        "sizes": (torch.int64, (2, 2)),
        "orig_sizes": (torch.int64, (2, 2)),
        "boxes": (torch.float32, (2, 2, 4)),
        "labels": (torch.int64, (2, 2)),
        "image_ids": (torch.int64, (2,)),
    }
    assert batch["images"].is_contiguous(memory_format=torch.channels_last)  # see collate
    assert batch["sizes"].tolist() == batch["orig_sizes"].tolist() == [[40, 60], [65, 30]]
    assert batch["labels"].tolist() == [[0, 1], [-1, -1]] and batch["image_ids"].tolist() == [1, 2**40]
    assert batch["boxes"].tolist() == [[[1, 2, 3, 4], [5, 6, 7, 8]], [[0] * 4] * 2]
    assert torch.equal(batch["images"].long().sum((2, 3)), torch.tensor([[200 * 2400] * 3, [100 * 1950] * 3]))
    empty = data.collate([make_sample(32, 32, [])], size_divisor=128)
    assert empty["boxes"].shape == (1, 1, 4) and empty["images"].shape == (1, 3, 128, 128)

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = data.normalize(batch["images"], batch["sizes"], mean, std)
    assert x.dtype == torch.float32 and x.shape == (2, 3, 96, 64)
    for i, (image, value) in enumerate(zip(images, (200, 100), strict=True)):
        height, width = image.shape[-2:]
        expected = torch.tensor([(value - 255 * m) / (255 * s) for m, s in zip(mean, std, strict=True)])
        torch.testing.assert_close(x[i, :, :height, :width], expected[:, None, None].expand(3, height, width))
        assert x[i, :, height:].eq(0).all() and x[i, :, :, width:].eq(0).all()
    compiled = torch.compile(data.normalize, fullgraph=True, backend="eager")
    assert torch.equal(compiled(batch["images"], batch["sizes"], mean, std), x)
    with pytest.raises(ValueError):
        data.normalize(batch["images"], batch["sizes"], mean[:2], std)


def test_benchmark(tmp_path, monkeypatch, capsys):
    import benchmark_data

    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    (tmp_path / "train").mkdir()
    for i in range(1, 5):
        RGB.save(tmp_path / "train" / f"{i}.png")
    coco = make_coco([box(i, id=i) for i in range(1, 5)], images=4)
    (tmp_path / "train" / "_annotations.coco.json").write_text(json.dumps(coco))
    config = benchmark_data.BenchmarkConfig(
        tmp_path, batch_size=2, rounds=1, min_size=60, max_size=100, out=tmp_path / "out" / "report.json"
    )
    report = benchmark_data.main(config)
    assert json.loads(config.out.read_text()) == report
    rows = [row for title in list(report)[:2] for row in report[title].values()]
    assert len(rows) == 8 and all(row["median"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 10
