"""Near copies are found within a split and across splits, and photos that only resemble each other are not."""

import io
from collections import defaultdict

import layouts
import numpy as np
import torch
from PIL import Image, ImageEnhance

from vovnet_zoo.data.check import _check_near, check_dataset
from vovnet_zoo.data.formats.places import Split
from vovnet_zoo.data.images import read_image
from vovnet_zoo.data.inspection import Inspection
from vovnet_zoo.data.near import groups_of, joining_pairs, near_rows, same_pairs, thumbnail
from vovnet_zoo.data.splitting import look_alike


def near_pairs(thumbnails):
    return [(i, int(j)) for i, later in near_rows(thumbnails) for j in later]


def scene(seed: int, size=(96, 120)) -> Image.Image:
    """Draw a picture of smooth noise and ellipses, which resembles a photo in its statistics."""
    rng = np.random.default_rng(seed)
    height, width = size
    y, x = np.mgrid[:height, :width]
    pixels = np.array(Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), 3))
    for _ in range(6):
        a, b, r, q = rng.integers(0, width), rng.integers(0, height), *rng.integers(6, 25, 2)
        pixels[((x - a) / r) ** 2 + ((y - b) / q) ** 2 < 1] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def jpeg(image, quality=90):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def noisy(image):
    noise = np.random.default_rng(0).normal(0, 6, np.asarray(image).shape)
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


COPIES = {  # ten ways in which a copy differs
    "jpeg": lambda image: jpeg(image, 50),
    "worse jpeg": lambda image: jpeg(image, 25),
    "half size": lambda image: image.resize((60, 48)),
    "double size": lambda image: image.resize((240, 192)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.7),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "noisy": noisy,
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def write_set(root, pictures):
    """Write {split: {name: picture}} as COCO."""
    for split, images in pictures.items():
        rows = [
            {"name": name, "pixels": np.asarray(image.convert("RGB")), "boxes": [(i % 2, [4, 5, 20, 24])]}
            for i, (name, image) in enumerate(images.items())
        ]
        layouts.save(root / split, rows)
        layouts.write(root / "annotations" / f"instances_{split}.json", layouts.coco(rows))


def test_ten_planted_copies_are_found_and_nothing_else(tmp_path):
    train = {f"{i}.png": scene(i) for i in range(60)}
    val = {f"{i}.png": scene(100 + i) for i in range(20)}
    val |= {f"copy of {i}.png": change(scene(i)) for i, change in enumerate(COPIES.values())}
    train["59b.png"] = jpeg(scene(59))
    write_set(tmp_path, {"train": train, "val": val})
    report = check_dataset(tmp_path, workers=0, progress=False)
    found = {(f.split, f.kind): f.items for f in report.findings if f.severity == "warning"}
    assert found == {
        ("", "near copies in train and val"): [f"train/{i}.png ~ val/copy of {i}.png" for i in range(10)],
        ("train", "near copies"): ["train/59.png ~ train/59b.png"],
    }
    assert report.ok


def test_copies_are_not_divided(tmp_path):
    """The part for scoring has no near copy of a training image, at any seed."""
    images = {f"{i}.png": scene(i) for i in range(20)}
    images |= {f"{i} {name}.png": change(scene(i)) for i, (name, change) in enumerate(COPIES.items())}
    write_set(tmp_path, {"train": images})
    names = list(images)
    split = Split(tmp_path / "train", tmp_path / "annotations" / "instances_train.json", "")
    groups = [[names[i].split()[0].removesuffix(".png") for i in group] for group in look_alike(split, names, 0)]
    assert sorted(map(tuple, groups)) == sorted(tuple([str(i)] * (2 if i < 10 else 1)) for i in range(20))


def test_images_of_one_grey_are_not_alike():
    flat = [thumbnail(torch.full((3, 40, 60), value, dtype=torch.uint8)) for value in (0, 0, 200)]
    assert near_pairs(np.stack(flat)) == [] and near_pairs(np.zeros((0, 16, 17), np.float32)) == []


def test_many_images_are_compared_in_blocks(monkeypatch):
    from vovnet_zoo.data import near

    thumbs = np.random.default_rng(0).normal(100, 50, (40, 16, 17)).astype(np.float32)
    thumbs[37], thumbs[21] = thumbs[2], thumbs[20][:, ::-1]
    assert near_pairs(thumbs) == [(2, 37), (20, 21)]
    monkeypatch.setattr(near, "BLOCK", 7)
    assert near_pairs(thumbs) == [(2, 37), (20, 21)]


def test_groups():
    assert groups_of(6, [(4, 2), (0, 5), (2, 5)]) == [[0, 2, 4, 5], [1], [3]]
    assert same_pairs(["a", None, "b", "a", None, "a"]) == [(0, 3), (0, 5)]


def test_photos(shared):
    """All copies of photos are found but for a few, and no two different photos of COCO are called near."""
    paths = sorted((shared / "data" / "coco-mini").glob("*/*.jpg"))
    thumbs = np.stack([thumbnail(read_image(path)) for path in paths])
    assert near_pairs(thumbs) == []
    sample = range(0, len(paths), 8)
    for name, change in COPIES.items():
        copies = [change(Image.open(paths[i]).convert("RGB")) for i in sample]
        tensors = [torch.from_numpy(np.array(c.convert("RGB"))).permute(2, 0, 1) for c in copies]
        pairs = near_pairs(np.concatenate([thumbs[list(sample)], np.stack(list(map(thumbnail, tensors)))]))
        assert len(pairs) >= 0.9 * len(sample) and all(j - i == len(sample) for i, j in pairs), name


def test_frames_of_fixed_cameras_are_joined_by_few_pairs():
    """All frames of a camera look the same; 1,000 frames make half a million pairs."""
    rng = np.random.default_rng(0)
    cameras = rng.uniform(0, 255, (2, 1, 16, 17)).astype(np.float32)
    frames = (cameras + rng.normal(0, 1, (2, 1000, 16, 17)).astype(np.float32)).reshape(-1, 16, 17)
    order = rng.permutation(len(frames))
    pairs = list(joining_pairs(near_rows(frames[order]), len(frames)))
    assert len(pairs) == len(frames) - 2
    groups = groups_of(len(frames), pairs)
    assert [set(order[group] // 1000) for group in groups] in ([{0}, {1}], [{1}, {0}])


def test_joining_pairs_join_what_all_pairs_join():
    rng = np.random.default_rng(0)
    for count in (2, 10, 40):
        near = np.triu(rng.random((count, count)) < 1.2 / count, 1)
        rows = [(i, np.flatnonzero(near[i])) for i in range(count) if near[i].any()]
        every = [(i, int(j)) for i, later in rows for j in later]
        few = list(joining_pairs(rows, count))
        assert groups_of(count, few) == groups_of(count, every) and len(few) < count


def test_report_names_each_copy_once():
    """Five frames of a fixed camera are four copies, and not ten pairs."""
    rng = np.random.default_rng(0)
    frames = rng.uniform(0, 255, (1, 16, 17)) + rng.normal(0, 1, (5, 16, 17))
    found = {f"{i}.png": Inspection(thumbnail=frame.astype(np.float32)) for i, frame in enumerate(frames)}
    split_of = {"0.png": "val", "1.png": "train", "2.png": "train", "3.png": "val", "4.png": "train"}
    notes = defaultdict(list)
    _check_near(found, split_of, notes)
    assert notes == {
        ("train", "near copies"): ["1.png ~ 2.png", "1.png ~ 4.png"],
        ("val", "near copies"): ["0.png ~ 3.png"],
        ("", "near copies in train and val"): ["0.png ~ 1.png", "1.png ~ 3.png"],
    }
