"""A dataset finds its files and gives its samples."""

import json

import numpy as np
import pytest
import torch
from samples import PICTURE, RGB, box, encode, make_coco
from torchvision import tv_tensors

from vovnet_zoo.data.batches import collate
from vovnet_zoo.data.dataset import CocoDataset, find_split
from vovnet_zoo.data.transforms import train_transforms


def test_dataset(write_coco, caplog):
    coco = make_coco([box(2, 7, (-5, -5, 20.5, 10)), box(1, 3), box(2, 3), box(2, 3, iscrowd=1), box(1, 7, iscrowd=0)])
    dataset = CocoDataset(*write_coco(coco))
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
    with pytest.raises(ValueError, match="one image at a time; torch.utils.data.Subset"):
        dataset[:2]
    assert repr(dataset).endswith("instances.json, 3 images, 4 boxes, 2 classes (cat, dog))")

    target["boxes"].zero_()  # a caller's changes stay with the caller
    assert dataset[1][1]["boxes"].sum() > 0
    assert CocoDataset(*write_coco(coco), drop_empty=True).image_ids.tolist() == [1, 2]
    boxes = CocoDataset(*write_coco(coco), plus_one=True)[1][1]["boxes"]
    assert boxes.tolist() == [[0, 0, 14.5, 4], [1, 2, 10, 21]]


def test_clean_file_gives_no_warning(write_coco, caplog):
    dataset = CocoDataset(*write_coco(make_coco([box(), box(bbox=(0, 0, 60.5, 40))])))  # half a pixel is rounding
    assert dataset.problems == {} and not caplog.records


def test_missing_files(write_coco, tmp_path):
    images_dir, file = write_coco(make_coco())
    with pytest.raises(ValueError, match=r"none\.json: .*No such file"):
        CocoDataset(images_dir, tmp_path / "none.json")
    with pytest.raises(ValueError, match="none: no such folder"):
        CocoDataset(tmp_path / "none", file)
    (tmp_path / "2.png").unlink()
    with pytest.raises(ValueError, match=r"2\.png"):
        CocoDataset(images_dir, file)[1]
    with pytest.raises(ValueError, match="drop_empty"):
        CocoDataset(images_dir, file, drop_empty=True)


def test_image_of_another_size(write_coco, tmp_path):
    dataset = CocoDataset(*write_coco(make_coco([box()])))
    RGB.resize((61, 40)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"1\.png: .* 61x40 .*instances\.json says 60x40;"):
        dataset[0]
    (tmp_path / "1.png").write_bytes(encode(RGB, "PNG", orientation=6))
    with pytest.raises(ValueError, match=r"1\.png: .* 40x60 .* says 60x40 \(annotated before its EXIF rotation"):
        dataset[0]


def test_byte_order_mark_and_unicode_names(write_coco, tmp_path):
    coco = make_coco([box(3)])
    coco["images"][0]["file_name"] = "füße/写真.png"
    (tmp_path / "füße").mkdir()
    RGB.save(tmp_path / "füße" / "写真.png")
    images_dir, file = write_coco(coco)
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(coco, ensure_ascii=False).encode())
    assert CocoDataset(images_dir, file)[2][1]["labels"].tolist() == [0]


def test_seeded_key_decides_everything(write_coco):
    transforms = train_transforms((30, 60), 100, "jitter_crop", color=0.3)
    dataset = CocoDataset(*write_coco(make_coco([box()])), transforms=transforms)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    image, target = dataset[0, 5]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = dataset[0, 5]
    assert torch.equal(again[0], image) and torch.equal(again[1]["boxes"], target["boxes"])
    assert len({dataset[0, seed][0].shape for seed in range(5)}) > 1
    keys = [[(0, 5), (1, 2**63 - 1)], [(0, 5)]]
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=keys, num_workers=2, collate_fn=collate)
    for batch in loader:
        height, width = batch["sizes"][0].tolist()
        assert torch.equal(batch["images"][0, :, :height, :width], image)


def test_real_photos(shared):
    expected = {"train": (128, 935 - 6, 2), "val": (128, 903 - 5, None)}
    for split, (images, boxes, empty) in expected.items():
        folder, file = find_split(shared / "data" / "coco-mini", split)
        assert folder.name == f"{split}2017"
        dataset = CocoDataset(folder, file)
        assert len(dataset) == images and len(dataset.class_names) == 80 and dataset.category_ids[79] == 90
        counts = [len(dataset[i][1]["labels"]) for i in range(images)]
        assert sum(counts) == boxes and dataset.problems == {}
        if empty is not None:
            assert counts.count(0) == empty
            assert len(CocoDataset(folder, file, drop_empty=True)) == images - empty
    bccd = CocoDataset(*find_split(shared / "data" / "bccd", "val"))
    assert len(bccd) == 87 and len(bccd._boxes) == 1137 and sorted(bccd.class_names) == ["Platelets", "RBC", "WBC"]


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
    assert find_split(tmp_path, split) == (tmp_path / images, tmp_path / annotations)


def test_find_split_none_or_several(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        find_split(tmp_path / "none", "train")
    with pytest.raises(ValueError, match="there is: nothing"):
        find_split(tmp_path, "train")
    for name in ("annotations", "train2014", "train2017"):
        (tmp_path / name).mkdir()
    (tmp_path / "annotations" / "instances_train2014.json").touch()
    with pytest.raises(ValueError, match=r"no 'val' split; looked for .*instances_val.*there is: .*_train2014\.json"):
        find_split(tmp_path, "val")
    (tmp_path / "annotations" / "instances_train2017.json").touch()
    with pytest.raises(ValueError, match=r"several 'train' splits.*train2014\.json.*train2017\.json"):
        find_split(tmp_path, "train")
