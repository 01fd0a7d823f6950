"""Bad input of many kinds: each gives an error that names the file, a counted skip, or the right boxes."""

import codecs
import contextlib
import gzip
import io
import json
import os
import pickle
import struct
import zlib
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vovnet_zoo import FCOSLoss, Predictions
from vovnet_zoo.data import CocoDataset, ImageError, Skipped, collate, decode_image, train_transforms
from vovnet_zoo.data.check import check_dataset
from vovnet_zoo.evaluation import coco_metrics
from vovnet_zoo.fcos import make_points

WIDTH, HEIGHT, BOX = 60, 40, [10, 5, 30, 20]  # of every image unless a case says otherwise: black, the box white
CORNERS = [10, 5, 40, 25]
WHOLE = [0, 0, WIDTH, HEIGHT]
NAN, INF = float("nan"), float("inf")


# ---- images ---------------------------------------------------------------------------------------------------------


def picture(width=WIDTH, height=HEIGHT, box=BOX, grey=0):
    array = np.full((height, width, 3), grey, dtype=np.uint8)
    x, y, w, h = box
    array[y : y + h, x : x + w] = 255
    return Image.fromarray(array)


def encode(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def jpeg(image=None, orientation=None, **options):
    """With the `orientation`, the image as a camera stores it."""
    image = image or picture()
    if orientation:
        turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
        image = image.transpose(turn[orientation])
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    return encode(image, "JPEG", **{"quality": 95, "subsampling": 0} | options)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_size(width, height):
    return PNG[:8] + chunk(b"IHDR", struct.pack(">II", width, height) + PNG[24:29]) + PNG[33:]


PNG = encode(picture(), "PNG")
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
NOISE_PNG, NOISE_JPEG = encode(NOISE, "PNG"), jpeg(NOISE)
PALETTE = picture().quantize(8)
GREY16 = Image.fromarray(np.asarray(picture().convert("L")).astype(np.uint16) * 257)
FLOAT = Image.fromarray(np.asarray(picture().convert("L")).astype(np.float32))
ALPHA = picture().copy()
ALPHA.putalpha(7)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n%%EndComments\n(touched) (w) file\n%%EOF\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 12345\n"
BAD_EXIF = jpeg()[:2] + b"\xff\xe1\x00\x14Exif\0\0II*\0\xff\xff\xff\xff\xff\xff\xff\xff" + jpeg()[2:]

FLOOR = np.asarray(picture()).copy()
FLOOR[32:] = np.asarray(NOISE)[32:] // 4
HURT_JPEG = jpeg(Image.fromarray(FLOOR))[:-90] + b"\xff\xd9"  # the white is above what is lost


def case(change, *, error=None, bad_image=None, report=(), problems=None, boxes=(CORNERS,), own_file=False):
    """What is expected of a dataset that `change(root, coco)` spoils.

    error: of the annotation file, as a whole; bad_image: error of image 2; otherwise its `boxes`, of which the first is
    the white of the image, and the `problems` counted. report: all kinds of findings; None: errors, whichever.
    """
    return SimpleNamespace(**locals())


def file(content, bad_image=None, name="odd.jpg", report=(), **more):
    """`content` (bytes, or what makes the file) in the file of image 2."""

    def change(root, coco):
        path = root / "train" / name
        path.parent.mkdir(exist_ok=True)
        content(path) if callable(content) else path.write_bytes(content)
        coco["images"][1]["file_name"] = name

    return case(change, bad_image=bad_image, report=report, own_file=True, **more)


def sized(content, width, height, box, name="odd.png", **more):
    """Image 2 is said to be of this size, with this box."""
    x, y, w, h = box
    out = file(content, name=name, boxes=[[x, y, x + w, y + h]], **more)

    def change(root, coco, inner=out.change):
        inner(root, coco)
        coco["images"][1].update(width=width, height=height)
        coco["annotations"][1]["bbox"] = box

    out.change = change
    return out


def named(name, **more):
    """Image 2 is there, the annotation file calls it otherwise."""
    return case(lambda root, coco: coco["images"][1].update(file_name=name), **more)


def loop(path):
    path.symlink_to("other")
    (path.parent / "other").symlink_to(path.name)


def sparse(path):
    with open(path, "wb") as f:
        f.truncate(3 << 30)


MISSING, UNREADABLE, EMPTY = "missing image file", "unreadable image file", "empty image file"
NONE, DAMAGED, SIZE = "not an image", "damaged image", "size unlike the JSON"
FORMAT, UNNAMED = "format unlike the name", "file without entry"

IMAGES = {
    # cannot be used: an error that names the file, or skipped and counted
    "zero bytes": file(b"", bad_image="is empty", report=[EMPTY]),
    "missing": file(lambda path: None, "No such file", "gone.jpg", report=[MISSING]),
    "other case of letters": file(
        lambda path: (path.parent / "ODD.JPG").write_bytes(jpeg()), "No such file", report=[MISSING, UNNAMED]
    ),
    "file for a folder": named("1.png/odd.jpg", bad_image="Not a directory", report=[UNREADABLE, UNNAMED]),
    "folder for a file": file(lambda path: path.mkdir(), "directory", report=[UNREADABLE]),
    "name too long for the disk": named("x" * 300 + ".png", bad_image="too long", report=[UNREADABLE, UNNAMED]),
    "link to itself": file(loop, "symbolic links", report=[UNREADABLE]),
    "link to nowhere": file(lambda path: path.symlink_to("nowhere"), "No such file", report=[MISSING]),
    "link to an endless device": file(lambda path: path.symlink_to("/dev/zero"), "device", report=[UNREADABLE]),
    "named pipe": file(os.mkfifo, "pipe", report=[UNREADABLE]),
    "3 GiB of nothing": file(sparse, "has 3221225472 bytes", report=[UNREADABLE]),
    "text": file(b"this is no image\n" * 9, "not an image", report=[NONE]),
    "html of a failed download": file(b"<!DOCTYPE html><title>404</title>", "not an image", report=[NONE]),
    "git-lfs pointer": file(LFS, "not an image", report=[NONE]),
    "gzip of an image": file(gzip.compress(PNG), "not an image", report=[NONE]),
    "heic": file(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "not an image", report=[NONE]),
    "video": file(b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(99), "not an image", report=[NONE]),
    "svg": file(b"<svg xmlns='http://www.w3.org/2000/svg' width='60' height='40'/>", "not an image", report=[NONE]),
    "pdf": file(encode(picture(), "PDF"), "not an image", report=[NONE]),
    "postscript, a program": file(EPS, "not an image", report=[NONE]),
    "pickle": file(pickle.dumps(PNG), "not an image", report=[NONE]),
    "zeros": file(bytes(5000), "not an image", report=[NONE]),
    "start of a jpeg": file(jpeg()[:100], "decode|not an image", report=[DAMAGED]),
    "truncated jpeg": file(NOISE_JPEG[:-200], "truncated", report=[DAMAGED]),
    "truncated progressive jpeg": file(jpeg(NOISE, progressive=True)[:-200], "truncated", report=[DAMAGED]),
    "half a jpeg, then zeros": file(NOISE_JPEG[:1500] + bytes(1500), "truncated", report=[DAMAGED]),
    "jpeg of 12 bit": file(
        NOISE_JPEG.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"), "decode|not an image", report=None
    ),
    "truncated png": file(NOISE_PNG[: len(NOISE_PNG) // 2], "decode", "odd.png", report=[DAMAGED]),
    "truncated webp": file(encode(NOISE, "WEBP")[:-500], "decode", "odd.webp", report=[DAMAGED]),
    "truncated bmp": file(encode(NOISE, "BMP")[:-500], "truncated", "odd.bmp", report=[DAMAGED]),
    "truncated gif": file(encode(NOISE.quantize(), "GIF")[:-900], "decode", "odd.gif", report=[DAMAGED]),
    "png with a wrong checksum of the header": file(
        PNG[:29] + b"abcd" + PNG[33:], "not an image|checksum|broken", "odd.png", report=None
    ),
    "png with damaged pixels": file(
        NOISE_PNG[:500] + bytes(90) + NOISE_PNG[590:], "decode", "odd.png", report=[DAMAGED]
    ),
    "png without pixels": file(PNG[:33] + chunk(b"IEND", b""), "decode", "odd.png", report=[DAMAGED]),
    "png 0 pixels wide": file(png_of_size(0, 40), "decode|not an image", "odd.png", report=None),
    "decompression bomb": file(png_of_size(50000, 50000), "exceeds limit", "odd.png", report=[DAMAGED]),
    "png text bomb": file(
        PNG[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(99 << 20), 9)) + PNG[33:],
        "decode",
        "odd.png",
        report=[DAMAGED],
    ),
    "floating-point tiff": file(encode(FLOAT, "TIFF"), "8 bit", "odd.tif", report=[DAMAGED]),
    "another size": file(encode(picture(61), "PNG"), "61x40 .* says 60x40; correct", "odd.png", report=[SIZE]),
    "exif rotation, JSON before it": sized(
        jpeg(picture(40, 60, [5, 10, 20, 30]), orientation=6),
        60,
        40,
        [10, 10, 30, 20],
        bad_image=r"40x60 .* says 60x40 \(annotated before its EXIF",
        name="odd.jpg",
        report=[SIZE],
    ),
    # can be used: the box is where the white is
    "exif rotation, JSON after it": sized(
        jpeg(picture(40, 60, [5, 10, 20, 30]), orientation=6), 40, 60, [5, 10, 20, 30], name="odd.jpg"
    ),
    "exif rotation the other way": sized(
        jpeg(picture(40, 60, [5, 10, 20, 30]), orientation=8), 40, 60, [5, 10, 20, 30], name="odd.jpg"
    ),
    "exif turned by half": file(jpeg(orientation=3), report=["rotation in doubt"]),
    "exif rotation of a square": sized(
        jpeg(picture(50, 50), orientation=6), 50, 50, BOX, name="odd.jpg", report=["rotation in doubt"]
    ),
    "damaged exif": file(BAD_EXIF),
    "jpeg with damaged pixels": file(HURT_JPEG, report=["pixels in doubt"]),
    "bmp named jpg": file(encode(picture(), "BMP"), report=[FORMAT]),
    "png named jpg": file(PNG, report=[FORMAT]),
    "jpeg named png": file(jpeg(), name="odd.png", report=[FORMAT]),
    "jpeg without an ending": file(jpeg(), name="odd"),
    "jpeg with bytes after it": file(jpeg() + b"\xff\xda" + bytes(999)),
    "progressive jpeg": file(jpeg(progressive=True)),
    "grey jpeg": file(jpeg(picture().convert("L"))),
    "cmyk jpeg": file(jpeg(picture().convert("CMYK"))),
    "16-bit png": file(encode(GREY16, "PNG"), name="odd.png"),
    "1-bit png": file(encode(picture().convert("1"), "PNG"), name="odd.png"),
    "rgba png": file(encode(ALPHA, "PNG"), name="odd.png"),
    "palette with transparency": file(encode(PALETTE, "PNG", transparency=0), name="odd.png"),
    "animated gif": file(encode(PALETTE, "GIF", save_all=True, append_images=[PALETTE.rotate(180)]), name="odd.gif"),
    "png with a wrong checksum of the pixels": file(PNG[:-16] + b"abcd" + PNG[-12:], name="odd.png"),
    "png without its last chunk": file(PNG[:-12], name="odd.png"),
    "1x1": sized(encode(picture(1, 1, [0, 0, 1, 1]), "PNG"), 1, 1, [0, 0, 1, 1], report=["tiny image"]),
    "1 pixel high": sized(
        encode(picture(500, 1, [50, 0, 400, 1]), "PNG"), 500, 1, [50, 0, 400, 1], report=["tiny image", "panorama"]
    ),
    "panorama": sized(
        encode(picture(20000, 400, [9000, 0, 9000, 400]), "PNG"), 20000, 400, [9000, 0, 9000, 400], report=["panorama"]
    ),
    "tall panorama with a tiny box": sized(
        encode(picture(400, 20000, [9, 9, 9, 9]), "PNG"),
        400,
        20000,
        [9, 9, 9, 9],
        report=["panorama", "box that vanishes"],
    ),
}


# ---- annotation files -----------------------------------------------------------------------------------------------


def raw(content, error="not a JSON", report=("annotation file",)):
    """The annotation file as bytes or text, or made from the text of the good one."""

    def change(root, coco):
        data = content(json.dumps(coco)) if callable(content) else content
        return data if isinstance(data, bytes) else data.encode()

    return case(change, error=error, report=report)


def edit(change, error=None, **more):
    return case(lambda root, coco: change(coco), error=error, **more)


def image(error=None, report=None, **values):
    """Values in the entry of image 2."""
    return edit(lambda coco: coco["images"][1].update(values), error, report=report)


def box(bbox, problem=None, more_boxes=(), report=None, **values):
    """One more annotation of image 2."""
    row = {"id": 9, "image_id": 2, "category_id": 7, "bbox": bbox} | values
    return edit(
        lambda coco: coco["annotations"].append(row),
        report=report or [problem] * (problem is not None),
        problems={problem: 1} if problem else {},
        boxes=[CORNERS, *more_boxes],
    )


def drop(key, *names):
    return lambda coco: [coco[key][1].pop(name) for name in names]


NUMBERS, OBJECT, NOTHING = "box is not 4 finite numbers", "not an object", "empty box"
OUTSIDE, CLIPPED = "box outside the image", "box clipped to the image"
IMAGE_ID, CATEGORY_ID = "unknown image_id", "unknown category_id"
BOXLESS, UNSEEN, NO_BOX = "image without boxes", "class without boxes", "no usable box"
FRACTIONS = "boxes as fractions"

ANNOTATIONS = {
    # the file as a whole: an error that names it
    "empty file": raw(""),
    "not json": raw("image_id,x,y,w,h\n"),
    "truncated json": raw(lambda text: text[: len(text) // 2]),
    "json lines": raw(lambda text: text + "\n" + text),
    "zipped": raw(lambda text: gzip.compress(text.encode())),
    "latin-1": raw(lambda text: text.replace("dog", "g\xfcte").encode("latin-1")),
    "nested without end": raw("[" * 99999),
    "number of 5000 digits": raw(lambda text: text.replace("60", "6" * 5000)),
    "a list": raw("[]", "JSON list"),
    "null": raw("null", "JSON NoneType"),
    "no images": edit(lambda c: c.pop("images"), "no list 'images'", report=["annotation file"]),
    "no annotations": edit(lambda c: c.pop("annotations"), "no list 'annotations'", report=["annotation file"]),
    "no categories": edit(lambda c: c.pop("categories"), "no list 'categories'", report=["annotation file"]),
    "images by name": edit(lambda c: c.update(images={"a": {}}), "no list 'images'", report=["annotation file"]),
    "zero images": edit(
        lambda c: c["images"].clear(),
        "'images' is empty",
        report=["image entry", IMAGE_ID, NO_BOX, UNSEEN, UNNAMED],
    ),
    "zero categories": edit(
        lambda c: c["categories"].clear(),
        "'categories' is empty",
        report=["category entry", CATEGORY_ID, NO_BOX, BOXLESS, "classes differ"],
    ),
    "only unusable annotations": edit(
        lambda c: [a.update(bbox="1 2 3 4") for a in c["annotations"]],
        rf"none .* can be used \({NUMBERS}: 2",
        report=[NUMBERS, NO_BOX, BOXLESS, UNSEEN],
    ),
    "all boxes as fractions": edit(
        lambda c: [a.update(bbox=[0.1, 0.1, 0.5, 0.5]) for a in c["annotations"]],
        "first pixel.*fractions",
        report=[FRACTIONS],
    ),
    # images and categories: an error that names the file and the entry
    "image without id": edit(drop("images", "id"), r"images\[1\] has no integer 'id'", report=None),
    "image without file_name": edit(drop("images", "file_name"), "id 2.* no 'file_name'", report=None),
    "image id no number": image(r"images\[1\] has no integer 'id'", id="b"),
    "image id a fraction": image(r"images\[1\] has no integer 'id'", id=2.5),
    "image id huge": image(r"images\[1\] has no integer 'id'", id=10**30),
    "image id true": image(r"images\[1\] has no integer 'id'", id=True),
    "image id NaN": image(r"images\[1\] has no integer 'id'", id=NAN),
    "image id twice": image(r"images .* more than once: \[1\]", id=1),
    "image a string": edit(
        lambda c: c["images"].append("3.png"), r"images\[2\] has no id|integer", report=["image entry"]
    ),
    "width a string": image("needs a whole", ["image entry", UNSEEN], width="60"),
    "width negative": image("needs a whole", width=-60),
    "width NaN": image("needs a whole", width=NAN),
    "width infinite": image("needs a whole", width=INF),
    "width a fraction": image("needs a whole", width=60.5),
    "width of 400 digits": image("needs a whole", width=10**400),
    "width beyond int64": image("needs a whole", width=2**64),
    "file_name above the folder": image("without '..'", file_name="../val/3.png"),
    "file_name up and down": image("without '..'", file_name="sub/../odd.jpg"),
    "file_name absolute": image("below the folder", file_name="/etc/passwd"),
    "file_name with a null character": image("no path", file_name="odd.jpg\0.png"),
    "file_name of a megabyte": image("of 1000000 characters", file_name="x" * 10**6),
    "file_name a list": image("no 'file_name'", file_name=["odd.jpg"]),
    "file_name blank": image("no 'file_name'", file_name=" "),
    "category without name": edit(drop("categories", "name"), "id 7.* no 'name'", report=None),
    "category name a fraction": edit(lambda c: c["categories"][1].update(name=0.5), "id 7.* no 'name'", report=None),
    "category id a word": edit(lambda c: c["categories"][1].update(id="b"), r"s\[1\] has no integer", report=None),
    "category id twice": edit(lambda c: c["categories"][1].update(id=3), r"more than once: \[3\]", report=None),
    "category null": edit(lambda c: c["categories"].append(None), r"categories\[2\] has no", report=["category entry"]),
    # file names that are only wrong on this disk: an error that names the file, or skipped and counted
    "file_name with backslashes": named(
        "sub\\odd.jpg", bad_image="No such file.*backslashes as '/'", report=[MISSING, UNNAMED]
    ),
    "file_name of Windows": named(
        "C:\\data\\odd.jpg", bad_image="No such file.*backslashes", report=[MISSING, UNNAMED]
    ),
    "file_name no unicode": named("odd\ud800.jpg", bad_image="cannot read the image", report=[UNREADABLE, UNNAMED]),
    "file_name composed otherwise": file(
        lambda path: path.with_name("u\u0308.jpg").write_bytes(jpeg()), "No such file", "\xfc.jpg", [MISSING, UNNAMED]
    ),
    "file_name of the folder": named(".", bad_image="directory", report=[UNREADABLE, UNNAMED]),
    # single annotations: left out, or cut, and counted
    "annotation null": edit(lambda c: c["annotations"].append(None), report=[OBJECT], problems={OBJECT: 1}),
    "annotation a list": edit(lambda c: c["annotations"].append([2, 7]), report=[OBJECT], problems={OBJECT: 1}),
    "annotation empty": edit(lambda c: c["annotations"].append({}), report=[IMAGE_ID], problems={IMAGE_ID: 1}),
    "image_id unknown": box(BOX, IMAGE_ID, image_id=99),
    "image_id a string": box(BOX, IMAGE_ID, image_id="two"),
    "image_id NaN": box(BOX, IMAGE_ID, image_id=NAN),
    "image_id true": box(BOX, IMAGE_ID, image_id=True),
    "image_id of 400 digits": box(BOX, IMAGE_ID, image_id=10**400),
    "image_id a list": box(BOX, IMAGE_ID, image_id=[2]),
    "category_id unknown": box(BOX, CATEGORY_ID, category_id=4),
    "category_id a label": box(BOX, CATEGORY_ID, category_id=0),
    "category_id a name": box(BOX, CATEGORY_ID, category_id="dog"),
    "category_id null": box(BOX, CATEGORY_ID, category_id=None),
    "box NaN": box([NAN, 5, 30, 20], NUMBERS),
    "box infinite": box([0, 0, INF, INF], NUMBERS),
    "box minus infinite": box([-INF, 0, 5, 5], NUMBERS),
    "box 1e308": box([1e308, 0, 1e308, 5], NUMBERS),
    "box of 400 digits": box([0, 0, 10**400, 5], NUMBERS),
    "box of strings": box(["10", "5", "30", "20"], NUMBERS),
    "box one string": box("10 5 30 20", NUMBERS),
    "box of 3 numbers": box([10, 5, 30], NUMBERS),
    "box of 5 numbers": box([10, 5, 30, 20, 1], NUMBERS),
    "box nested": box([[10, 5, 30, 20]], NUMBERS),
    "box half nested": box([10, 5, [30], 20], NUMBERS),
    "box null": box(None, NUMBERS),
    "box with null": box([10, 5, None, 20], NUMBERS),
    "box with true": box([10, 5, True, 20], NUMBERS),
    "box an object": box({"x": 10, "y": 5, "w": 30, "h": 20}, NUMBERS),
    "box an empty list": box([], NUMBERS),
    "box of no width": box([10, 5, 0, 20], NOTHING),
    "box of negative size": box([40, 25, -30, -20], NOTHING),
    "box of size -1": box([10, 5, -1, -1], NOTHING),
    "box thinner than a float": box([10, 5, 1e-30, 20], NOTHING),
    "box right of the image": box([60, 5, 30, 20], OUTSIDE),
    "box above the image": box([10, -30, 30, 20], OUTSIDE),
    "box far away": box([1e29, 1e29, 5, 5], OUTSIDE),
    "box partly outside": box([-20, -20, 40, 40], CLIPPED, [[0, 0, 20, 20]]),
    "box as corners": box([10, 5, 60, 40], CLIPPED, [[10, 5, 60, 40]]),
    "box around everything": box([-1e29, -1e29, 3e29, 3e29], CLIPPED, [WHOLE]),
    "box of a fifth of a pixel": box([10, 5, 0.2, 10], None, [[10, 5, 10.2, 15]], report=["box below one pixel"]),
    # unusual, and right
    "byte order mark": raw(lambda text: codecs.BOM_UTF8 + text.encode(), None, ()),
    "utf-16": raw(lambda text: text.encode("utf-16"), None, ()),
    "names in other scripts": file(jpeg(), name="f\xfc\xdfe/\u5199\u771f \U0001f408.jpg"),
    "name with a newline and an escape": file(jpeg(), name="odd\n\x1b[31m.jpg"),
    "name with a dot folder": file(jpeg(), name="./odd.jpg"),
    "linked image": file(lambda path: (path.with_name("real.bin").write_bytes(jpeg()), path.symlink_to("real.bin"))),
    "float ids in annotations": edit(lambda c: c["annotations"][1].update(image_id=2.0, category_id=7.0)),
    "sizes as whole floats": image(None, (), width=60.0, height=40.0),
    "crowd given as a string": edit(
        lambda c: c["annotations"].append(c["annotations"][1] | {"id": 9, "iscrowd": "1"}), report=["crowd region"]
    ),
    "crowd given as true": edit(
        lambda c: c["annotations"].append(c["annotations"][1] | {"id": 9, "iscrowd": True}), report=["crowd region"]
    ),
    "crowd given as null": box(WHOLE, None, [WHOLE], iscrowd=None),
    "zero annotations": edit(lambda c: c["annotations"].clear(), boxes=[], report=["no annotations", BOXLESS, UNSEEN]),
    "annotation id twice": box(WHOLE, None, [WHOLE], id=2, report=["repeated annotation id"]),
    "same box twice": box(BOX, None, [CORNERS], report=["repeated box"]),
    "class name twice": edit(
        lambda c: c["categories"][1].update(name="cat"), report=["repeated class name", "classes differ"]
    ),
    "class without boxes": edit(
        lambda c: c["categories"].append({"id": 9, "name": "bird"}), report=[UNSEEN, "classes differ"]
    ),
    "file_name twice": edit(
        lambda c: c["images"].append({"id": 5, "file_name": "odd.jpg", "width": 60, "height": 40}),
        report=["repeated file name", BOXLESS],
    ),
    "image id a string": image(None, (), id="2"),
    "image id a float": image(None, (), id=2.0),
    "category id a string": edit(lambda c: c["categories"][1].update(id="7")),
    "category name a number": edit(lambda c: c["categories"][1].update(name=5), report=["classes differ"]),
    "huge image id": edit(lambda c: (c["images"][1].update(id=2**62), c["annotations"][1].update(image_id=2**62))),
    "keys nobody knows": edit(lambda c: (c.update(extra=[None] * 9), c["images"][0].update(extra={"a": NAN}))),
    "oddities beside the box": edit(
        lambda c: c["annotations"][1].update(segmentation="?", area="big", iscrowd=[1], id={})
    ),
}
CASES = IMAGES | ANNOTATIONS
assert len(CASES) == len(IMAGES) + len(ANNOTATIONS)


# ---- what must come of it -------------------------------------------------------------------------------------------


def coco_of(*names):
    sizes = {"width": WIDTH, "height": HEIGHT}
    return {
        "images": [{"id": i, "file_name": name, **sizes} for i, name in enumerate(names, start=1)],
        "annotations": [{"id": i, "image_id": i, "category_id": c, "bbox": list(BOX)} for i, c in ((1, 3), (2, 7))],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    }


def build(root, spoil):
    """A dataset that is good but for what `spoil` does; returns folder and annotation file of train."""
    for folder in ("annotations", "train", "val"):
        (root / folder).mkdir()
    for i, name in enumerate(("train/1.png", "val/3.png", "val/4.png")):
        picture(grey=20 + i).save(root / name)
    if not spoil.own_file:
        (root / "train" / "odd.jpg").write_bytes(jpeg())
    (root / "annotations" / "instances_val.json").write_text(json.dumps(coco_of("3.png", "4.png")))
    coco = coco_of("1.png", "odd.jpg")
    content = spoil.change(root, coco)
    file = root / "annotations" / "instances_train.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(coco).encode())
    return root / "train", file


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, tmp_path, caplog):
    expected = CASES[name]
    folder, file = build(tmp_path, expected)

    report = check_dataset(tmp_path, workers=0, progress=False)
    alike = {"near copies", "near copies in train and val"}  # all images here are of the same few colours
    kinds = {finding.kind for finding in report.findings} - alike
    assert expected.report is None or kinds == set(expected.report)
    if expected.report is None or expected.error or expected.bad_image:
        assert not report.ok
    json.dumps(asdict(report))
    assert all(line.isprintable() for line in str(report).splitlines())
    rows = str(report).splitlines()[1 : 1 + len(report.findings)]
    assert [row.split()[0] for row in rows] == [finding.severity for finding in report.findings]

    with contextlib.suppress(ValueError):  # scoring only needs the JSON
        assert -1 <= coco_metrics(file, [])["AP"] <= 1

    if expected.error:
        with pytest.raises(ValueError, match=rf"instances_train\.json: .*({expected.error})"):
            CocoDataset(folder, file)
        return
    dataset = CocoDataset(folder, file)
    assert dataset.problems == (expected.problems or {})
    assert all(f"{kind}: {n}" in caplog.text for kind, n in dataset.problems.items())
    if expected.bad_image:
        check_skipping(dataset, expected.bad_image)
    else:
        check_boxes(dataset, expected.boxes)


def check_skipping(dataset, reason):
    path = str(dataset.images_dir / str(dataset.file_names[1]))
    with pytest.raises(ImageError, match=f"(?s){reason}") as caught:
        dataset[1]
    assert str(caught.value).startswith(f"{path}: ")
    dataset.skip_bad_images = True
    assert dataset[1] == dataset[1, 5] == Skipped(2, str(caught.value))
    batch = collate([dataset[0], dataset[1]])
    assert batch["image_ids"].tolist() == [1] and batch["boxes"].tolist() == [[CORNERS]]
    assert batch.pop("skipped") == [dataset[1]] and batch.keys() == collate([dataset[0]]).keys()


def check_boxes(dataset, boxes):
    image, target = dataset[1]
    assert target["boxes"].tolist() == torch.tensor(boxes).reshape(-1, 4).tolist()
    assert target["labels"].tolist() == [1] * len(boxes)
    if boxes:
        assert same_place(image, target["boxes"][0])
    for augment in ("flip", "jitter_crop"):
        dataset.transforms = train_transforms((48, 96), 192, augment)
        for seed in range(2):
            image, target = dataset[1, seed]
            height, width = image.shape[-2:]
            x1, y1, x2, y2 = target["boxes"].unbind(-1)
            assert (x1 >= 0).all() and (y1 >= 0).all() and (x2 <= width).all() and (y2 <= height).all()
            assert (x2 - x1 >= 1).all() and (y2 - y1 >= 1).all()
            if len(boxes) == 1:
                assert same_place(image, *target["boxes"])
            batch = collate([dataset[0, seed], (image, target)])
            assert batch["labels"].shape[0] == 2 and "skipped" not in batch
            check_losses(batch)


def same_place(image, box=None):
    """Whether the white of an image is the box, or hardly any if there is none."""
    white = (image.float().amin(0) > 150).nonzero()  # rows, columns
    if box is None:
        return len(white) <= 3 * max(image.shape)
    found = torch.cat([white.amin(0).flip(0), white.amax(0).flip(0) + 1])
    return (found - box).abs().max() <= 2


def check_losses(batch):
    height, width = batch["images"].shape[-2:]
    strides = [8, 16, 32, 64, 128]
    points, of_point = make_points([(-(-height // s), -(-width // s)) for s in strides], strides, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    shape = (len(batch["images"]), len(points))
    logits = torch.randn(*shape, 2, generator=generator, requires_grad=True)
    distances = (torch.rand(*shape, 4, generator=generator) * 50 + 1).requires_grad_()
    centerness = torch.randn(*shape, generator=generator, requires_grad=True)
    preds = Predictions(logits, distances, centerness, points, of_point)
    for variant in ("improved", "published"):
        criterion = FCOSLoss(variant)
        targets = criterion.assign(points, of_point, batch["boxes"], batch["labels"])
        positive = targets.labels >= 0
        assert (targets.distances[positive] > 0).all() and targets.centerness.isfinite().all()
        total = sum(criterion(preds, batch["boxes"], batch["labels"]).values())
        assert total.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(total, preds[:3]))


def test_at_least_forty_kinds():
    assert len(IMAGES) >= 40 and len(ANNOTATIONS) >= 40


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_in_a_loader(workers, tmp_path):
    """Of four images two are bad: batches with one of them, with none, and with nothing else."""
    folder, file = build(tmp_path, case(lambda root, coco: None))
    coco = coco_of("1.png", "odd.jpg")
    coco["images"] += [
        coco["images"][0] | {"id": i, "file_name": name} for i, name in ((3, "gone.png"), (4, "zero.png"))
    ]
    file.write_text(json.dumps(coco))
    (folder / "zero.png").touch()
    dataset = CocoDataset(folder, file, skip_bad_images=True, transforms=train_transforms((32, 32), 64))
    keys = [[(0, 1), (2, 1)], [(0, 1), (1, 1)], [(2, 1), (3, 1)]]
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=keys, collate_fn=collate, num_workers=workers)
    some, none, all_bad = loader
    assert some["image_ids"].tolist() == [1] and [s.image_id for s in some["skipped"]] == [3]
    assert none["image_ids"].tolist() == [1, 2] and "skipped" not in none
    assert torch.equal(some["images"][0], none["images"][0])
    assert [s.image_id for s in all_bad["skipped"]] == [3, 4]
    gone, empty = (sample.reason for sample in all_bad["skipped"])
    assert "gone.png: cannot read" in gone and "(0 bytes)" in empty
    assert all_bad["images"].shape == (1, 3, 32, 32) and all_bad["images"].sum() == 0
    assert all_bad["image_ids"].tolist() == [-1] and all_bad["labels"].tolist() == [[-1]]
    assert all_bad["sizes"].tolist() == all_bad["orig_sizes"].tolist() == [[32, 32]]
    for batch in (some, none, all_bad):
        check_losses(batch)
    dataset.skip_bad_images = False
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=keys, collate_fn=collate, num_workers=workers)
    iterator = iter(loader)
    with pytest.raises(ImageError, match=r"gone\.png: cannot read the image: No such file"):
        next(iterator)
    if workers:
        iterator._shutdown_workers()  # left to the garbage collector it takes 5 s per worker


def test_pipe_as_annotation_file(tmp_path):
    os.mkfifo(tmp_path / "instances.json")
    with pytest.raises(ValueError, match=r"instances\.json: cannot read the annotation file: it is a pipe"):
        CocoDataset(tmp_path, tmp_path / "instances.json")


@pytest.mark.filterwarnings("ignore:.*(EXIF|Truncated)")
def test_random_damage():
    """Bytes changed and cut anywhere: an image, or an error that names the file; nothing else."""
    rng, outcomes = np.random.default_rng(0), set()
    good = [
        NOISE_PNG, NOISE_JPEG, jpeg(NOISE, progressive=True), encode(NOISE, "WEBP"), encode(NOISE, "BMP"),
        encode(NOISE.quantize(), "GIF"), encode(NOISE, "TIFF", compression="tiff_lzw"), LFS,
    ]  # fmt: skip
    for content in good * 100:
        data = bytearray(content)
        for at in rng.integers(0, len(data), size=rng.integers(1, 5)):
            data[at] = rng.integers(256)
        try:
            shape = decode_image(bytes(data[: rng.integers(len(data) // 2, 2 * len(data))]), "odd.jpg").shape
            outcomes.add("image")
            assert shape[0] == 3 and min(shape) >= 1
        except ImageError as error:
            outcomes.add(error.kind)
            assert str(error).startswith("odd.jpg: ")
    assert outcomes == {"image", NONE, DAMAGED}
