"""Training and scoring on real COCO photos, where they are (they are not part of a public clone)."""

import dataclasses
import json
from collections import defaultdict

import pytest
import torch
from launch import command, fork, losses
from near import assert_same_detections
from test_training import detections_of

import eval_coco
from scoring import score_dataset
from vovnet_zoo import FCOS, create_detector, inference, predict
from vovnet_zoo.data import CocoDataset, find_split
from vovnet_zoo.evaluation import to_coco_results


def subset(coco_mini, tmp_path, count: int):
    """A dataset of the first `count` training photos with 2 to 8 boxes, as train and as val split."""
    images, annotations = find_split(coco_mini, "train")
    content = json.loads(annotations.read_text())
    boxes = {}
    for row in content["annotations"]:
        boxes[row["image_id"]] = boxes.get(row["image_id"], 0) + (1 if not row["iscrowd"] else 100)
    chosen = [image for image in content["images"] if 2 <= boxes.get(image["id"], 0) <= 8][:count]
    ids = {image["id"] for image in chosen}
    content |= {"images": chosen, "annotations": [row for row in content["annotations"] if row["image_id"] in ids]}
    (tmp_path / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(images.resolve())
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.slow
def test_overfits_8_photos(coco_mini, tmp_path):
    """From scratch, without augmentation, all 80 classes: the photos themselves are then found."""
    import subprocess

    root, out = subset(coco_mini, tmp_path / "data", 8), tmp_path / "run"
    options = ["finetune", "--data", root, "--out", out, "--augment", "none", "--min-size", "256", "256"]
    options += ["--test-size", "256", "--max-size", "384", "--steps", "200", "--workers", "0", "--ema", "0.9"]
    subprocess.run(command("train_coco.py", options), check=True)
    curve = losses(out)
    assert sum(curve[-10:]) < 0.5 * sum(curve[:10])
    dataset = CocoDataset(*find_split(root, "val"))
    _, metrics = score_dataset(FCOS.from_pretrained(out / "best"), dataset, workers=0)
    assert metrics["AP50"] > 0.9


def evaluate(rank, config):
    real, batches = inference.detect_batch, []
    inference.detect_batch = lambda model, items, *rest: batches.append(len(items)) or real(model, items, *rest)
    eval_coco.main(config)
    assert sum(batches) == 12 and max(batches) > 3 if config.batch_size > 1 else batches == [1] * 24


def test_batches_on_two_processes(coco_mini, tmp_path):
    """An evaluation of photos of many sizes, at batch 16 on two processes, finds what one process finds at batch 1."""
    root = subset(coco_mini, tmp_path / "data", 24)
    torch.manual_seed(0)
    model = create_detector(
        "fcos", backbone="test_resnet", channels=64, num_convs=1, min_size=64, max_size=96, prior=0.1
    )
    torch.nn.init.normal_(model.head.cls_logits.weight, std=0.5)
    model.save_pretrained(tmp_path / "model")
    config = eval_coco.EvalConfig(model=str(tmp_path / "model"), data=root, device="cpu")

    found = []
    for processes, batch_size in ((1, 1), (2, 16)):
        out = tmp_path / f"{processes}.json"
        fork(processes, evaluate, dataclasses.replace(config, out=out, batch_size=batch_size))
        images = defaultdict(list)
        for row in json.loads(out.read_text()):
            images[row["image_id"]].append(row)
        found.append(images)
    assert found[0].keys() == found[1].keys() and len(found[0]) == 24
    for image_id, rows in found[0].items():
        assert len(rows) > 20
        assert_same_detections(*(detections_of(images[image_id]) for images in found), size=640)


def test_detections_are_in_original_pixels_and_ids(coco_mini):
    dataset = CocoDataset(*find_split(coco_mini, "val"))
    assert len(dataset.class_names) == 80 and max(dataset.category_ids) == 90
    torch.manual_seed(0)
    model = create_detector(
        "fcos", backbone="resnet10t", channels=64, num_convs=1, min_size=96, max_size=160, prior=0.1
    )
    image, target = dataset[3]
    found = predict(model, image.as_subclass(torch.Tensor))
    height, width = target["orig_size"]
    rows = to_coco_results(found, [target["image_id"]], dataset.category_ids)
    assert len(rows) == 100 and {row["category_id"] for row in rows} <= set(dataset.category_ids)
    for row in rows:
        x, y, w, h = row["bbox"]
        assert 0 <= x and 0 <= y and x + w <= width + 0.01 and y + h <= height + 0.01
    assert max(row["bbox"][0] + row["bbox"][2] for row in rows) > 160  # wider than what the network saw
