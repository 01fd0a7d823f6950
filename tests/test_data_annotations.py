"""Usable COCO JSON gives boxes, and the rest an error or a count."""

import json
import logging
from pathlib import PureWindowsPath

import numpy as np
import pytest
import torch
from samples import box, make_coco

from vovnet_zoo.data import annotations
from vovnet_zoo.data.annotations import coco_to_xyxy
from vovnet_zoo.data.dataset import CocoDataset
from vovnet_zoo.data.transforms import hflip_boxes

BAD_ANNOTATIONS = {
    "unknown image_id": [box(99), box("one"), box(None), box([1])],
    "unknown category_id": [box(1, 1), box(1, "red"), box(1, {}), box(1, float("nan"))],
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


def test_unusable_annotations_are_dropped_and_counted(write_coco, caplog):
    bad = [annotation for annotations in BAD_ANNOTATIONS.values() for annotation in annotations]
    dataset = CocoDataset(*write_coco(make_coco([box(), *bad, box(2, 7)])))
    assert dataset.problems == {kind: len(annotations) for kind, annotations in BAD_ANNOTATIONS.items()}
    assert [dataset[i][1]["boxes"].tolist() for i in range(3)] == [[[1, 2, 11, 22]], [[1, 2, 11, 22]], []]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert all(f"{kind}: {len(annotations)}" in caplog.text for kind, annotations in BAD_ANNOTATIONS.items())
    assert "instances.json" in caplog.text


def test_images_of_lvis_are_named_by_their_address(write_coco):
    """An image of LVIS has no file name, and the images of one split lie in both folders of COCO."""
    folder, file = write_coco(make_coco([box()]))
    content = json.loads(file.read_text())
    for image in content["images"]:
        name = image.pop("file_name")
        (folder / "train2017").mkdir(exist_ok=True)
        (folder / name).rename(folder / "train2017" / name)
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{name}"
    file.write_text(json.dumps(content))
    dataset = CocoDataset(folder, file)
    assert list(dataset.file_names) == ["train2017/1.png", "train2017/2.png", "train2017/3.png"]
    assert dataset[0][0].shape[0] == 3
    del content["images"][0]["coco_url"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has no 'file_name'"):
        CocoDataset(folder, file)


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
    "image id a word": (changed(lambda c: c["images"][1].update(id="b")), r"images\[1\] has no integer 'id'"),
    "image id a part": (changed(lambda c: c["images"][1].update(id=1.5)), r"images\[1\] has no integer 'id'"),
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
def test_unusable_file(name, write_coco):
    coco, message = BAD_FILES[name]
    with pytest.raises(ValueError, match=rf"instances\.json: .*{message}"):
        CocoDataset(*write_coco(coco))


@pytest.mark.parametrize("name", ["/etc/x.png", r"\etc\x.png", "C:x.png", r"C:\x.png", r"a\..\..\x.png"])
def test_windows_has_more_ways_out_of_a_folder(monkeypatch, name):
    monkeypatch.setattr(annotations, "PurePath", PureWindowsPath)
    image = {"id": 1, "height": 4, "width": 4}
    assert "below the folder of images" in annotations.image_problem(image | {"file_name": name})
    assert annotations.image_problem(image | {"file_name": r"a\x.png"}) is None


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
    boxes, keep = coco_to_xyxy([*xywh, [0, 0, inf, inf]], 40, 60)
    assert boxes.dtype == np.float32
    assert keep.tolist() == [True, True, True, False, False, False, False, True]
    assert boxes[keep].tolist() == [[1, 2, 4, 6], [0, 0, 5, 5], [50, 30, 60, 40], [0, 0, 60, 40]]
    per_box, _ = coco_to_xyxy([[0, 0, 99, 99]] * 2, np.array([10, 20]), np.array([30, 40]))
    assert per_box.tolist() == [[0, 0, 30, 10], [0, 0, 40, 20]]
    assert coco_to_xyxy([], 40, 60)[0].shape == (0, 4)
    assert hflip_boxes(torch.tensor([[1.0, 2, 4, 6]]), 60).tolist() == [[56, 2, 59, 6]]
