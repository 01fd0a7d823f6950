"""Boxes follow the pixels, and sizes follow the published rule."""

import numpy as np
import pytest
import torch
from PIL import Image
from samples import make_sample, plain
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from vovnet_zoo.data.annotations import coco_to_xyxy
from vovnet_zoo.data.images import read_image
from vovnet_zoo.data.transforms import RandomScaleCrop, eval_transforms, hflip_boxes, resize_size, train_transforms


@pytest.fixture(scope="module")
def golden(shared):
    from safetensors.torch import load_file

    return load_file(shared / "golden" / "golden_fcos_ops.safetensors")


@pytest.mark.parametrize("min_size", [640, 800])
def test_resize_size_published(golden, min_size):
    for (width, height), expected in zip(
        golden["resize/in/image_wh"].tolist(), golden[f"resize/out_hw_{min_size}_1333"].tolist(), strict=True
    ):
        assert resize_size(height, width, min_size, 1333) == tuple(expected)


def test_resize_size_extremes():
    assert resize_size(1, 1, 800, 1333) == (800, 800)
    assert resize_size(400, 20000, 800, 1333) == (27, 1350)  # int(27 * 50): the rule rounds the short side first
    assert resize_size(20000, 1, 800, 1333) == (1333, 1)
    assert min(resize_size(h, w, 800, 1333) for h in range(1, 90, 7) for w in range(1, 90000, 997))[0] >= 1


def test_boxes_published(golden):
    """Each step from xywh over xyxy, clipping and resizing to mirroring equals the published numbers bit for bit."""
    xywh, (width, height) = golden["boxes/in/coco_xywh"].numpy(), golden["boxes/in/image_wh"].tolist()
    assert np.array_equal(coco_to_xyxy(xywh, 9999, 9999, plus_one=True)[0], golden["boxes/xyxy"])
    boxes, keep = coco_to_xyxy(xywh, height, width, plus_one=True)
    assert np.array_equal(boxes, golden["boxes/clipped_all"])
    assert np.array_equal(boxes[keep], golden["boxes/clipped"])

    sample = make_sample(height, width, boxes[keep])
    resized_wh = tuple(golden["boxes/in/resized_wh"].tolist())
    image, target = train_transforms((800, 800), 1333, "none", plus_one=True)(*sample)
    assert image.shape[-2:] == resized_wh[::-1] and torch.equal(plain(target["boxes"]), golden["boxes/resized"])
    _, target = train_transforms((800, 800), 1333, "flip", flip=1.0, plus_one=True)(*sample)
    assert torch.equal(plain(target["boxes"]), golden["boxes/flipped"])
    flipped = hflip_boxes(golden["boxes/resized"], resized_wh[0], plus_one=True)
    assert torch.equal(flipped, golden["boxes/flipped"])


def test_resize_image_published(shared):
    """The result differs from Pillow's bilinear filter, which the published code used, by at most one grey level."""
    path = next((shared / "data" / "bccd" / "val").glob("*.jpg"))
    image, _ = eval_transforms(800, 1333)(tv_tensors.Image(read_image(path)), make_sample(480, 640, [])[1])
    with Image.open(path) as photo:
        expected = np.asarray(photo.convert("RGB").resize((1066, 800), Image.Resampling.BILINEAR))
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


RECTANGLE = (30, 20, 90, 60)  # white, in a black picture 160 wide and 120 high


def rectangle_sample(height=120, width=160):
    image, target = make_sample(height, width, [RECTANGLE, (0, 0, width, height)])
    image[:, RECTANGLE[1] : RECTANGLE[3], RECTANGLE[0] : RECTANGLE[2]] = 255
    return image, target


@pytest.mark.parametrize("augment", ["none", "flip", "jitter_crop"])
def test_boxes_follow_the_pixels(augment):
    transforms, shapes, seen = train_transforms((60, 240), 400, augment, color=0.2), set(), 0
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
        else:  # a sliver, below a quarter of the rectangle at the size that it has here
            scale = max(height / 120, width / 160) * (2 if augment == "jitter_crop" else 1)
            assert len(white) <= 0.26 * 60 * 40 * scale**2
    assert seen > 30 and len(shapes) > 20


def test_jitter_crop_stays_within_the_target_size():
    sizes = []
    for seed in range(100):
        torch.manual_seed(seed)
        image, _ = RandomScaleCrop((100, 100), 150, (0.5, 2.0))(*rectangle_sample())
        sizes.append(image.shape[-2:])
    assert max(sizes) == (100, 133) and (50, 67) <= min(sizes) < (60, 80)
    assert 30 < sizes.count((100, 133)) < 70  # log-uniform: half the time a window is enlarged


def test_slivers_of_boxes_are_left_out():
    """A crop keeps a box of which a quarter is left, and changes none that is whole in it."""
    window = {"top": 0, "left": 50, "height": 50, "width": 50, "size": [100, 100]}
    crop = RandomScaleCrop((100, 100), 100, (0.5, 2.0))
    boxes = [(40, 10, 80, 20), (20, 0, 60, 10), (19, 0, 60, 10), (60, 40, 70, 79), (60, 40, 70, 81), (0, 0, 50, 50)]
    _, target = make_sample(100, 100, boxes)
    cut = crop.transform(target["boxes"], window)
    assert cut.canvas_size == (100, 100) and cut.tolist() == [
        [0, 20, 60, 40], [0, 0, 20, 20], [0] * 4, [20, 80, 40, 100], [0] * 4, [0] * 4
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    low = rng.uniform((50, 0), (90, 40), size=(200, 2))
    inside = np.concatenate([low, low + rng.uniform(1e-3, 10, size=(200, 2))], axis=1)
    assert (inside[:, 2] <= 100).all() and (inside[:, 3] <= 50).all()
    _, target = make_sample(100, 100, inside.tolist())
    assert torch.equal(crop.transform(target["boxes"], window), F.resized_crop(target["boxes"], **window))


def test_flip_probability_and_range():
    sizes = set()
    for seed in range(200):
        torch.manual_seed(seed)
        image, target = train_transforms((20, 24), 100, flip=0.0)(*make_sample(40, 60, [(3, 0, 33, 30)]))
        sizes.add(image.shape[-2])
        assert target["boxes"][0, 0] < image.shape[-1] / 4
    assert sizes == {20, 21, 22, 23, 24}
    _, target = train_transforms((40, 40), 100, flip=1.0)(*make_sample(40, 60, [(3, 0, 33, 30)]))
    assert target["boxes"].tolist() == [[27, 0, 57, 30]]


def test_small_boxes_and_odd_images():
    sample = make_sample(400, 20000, [(0, 0, 10000, 400), (5, 5, 9, 9)])
    image, target = eval_transforms()(*sample)
    assert image.shape == (3, 27, 1350) and target["labels"].tolist() == [0]  # the other is below one pixel
    for augment in ("none", "flip", "jitter_crop"):
        transforms = train_transforms((640, 800), 1333, augment)
        image, target = transforms(*make_sample(1, 1, [(0, 0, 1, 1)]))
        assert 320 <= image.shape[-1] <= 800 and target["boxes"].shape == (1, 4)
        image, target = transforms(*make_sample(20000, 40, []))
        assert image.shape[-2] <= 2666 and target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)


def test_transform_arguments():
    for arguments in ({"augment": "mosaic"}, {"min_size": (800, 640)}, {"min_size": (0, 9)}):
        with pytest.raises(ValueError):
            train_transforms(**arguments)
    for size in (640, (640.0, 800.0), (480, 640, 800), None):
        with pytest.raises(ValueError, match=r"the shorter side is a range \(low, high\) of whole numbers"):
            train_transforms(size)
    for make, name in ((train_transforms, "max_size"), (eval_transforms, "max_size"), (eval_transforms, "min_size")):
        for size in ((800, 1333), 0, 640.0):
            with pytest.raises(ValueError, match=f"{name}=.*: give a whole number of 1 or more"):
                make(**{name: size})
    with pytest.raises(ValueError, match="scale is"):
        train_transforms(augment="jitter_crop", scale=2.0)
    with pytest.raises(ValueError, match="plus_one"):
        train_transforms(augment="jitter_crop", plus_one=True)
    with pytest.raises(ValueError, match="scale"):
        train_transforms(augment="jitter_crop", scale=(2.0, 0.5))
