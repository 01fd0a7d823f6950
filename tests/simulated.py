"""A simulated detector gives datasets and result rows of any size, without a network."""

import json
import shutil

import numpy as np
from PIL import Image

from vovnet_zoo.data import CocoDataset
from vovnet_zoo.evaluation.matches import IOU_THRESHOLDS, Matches


def simulate(seed=0, images=40, classes=3, crowd=0.0, coarse=False):
    """A COCO dict with images of 200x200 pixels, and result rows: found, doubled, confused and invented boxes."""
    rng = np.random.default_rng(seed)
    annotations, rows = [], []

    def add(image, label, box, score):
        score = round(float(score), 1 if coarse else 6)
        rows.append({"image_id": image, "category_id": 10 * label + 10, "bbox": box.tolist(), "score": score})

    for image in range(1, images + 1):
        for _ in range(rng.poisson(3)):
            label = int(rng.integers(classes))
            box = np.concatenate([rng.uniform(0, 120, 2), rng.uniform(15, 80, 2)])
            row = {"id": len(annotations) + 1, "image_id": image, "category_id": 10 * label + 10, "bbox": box.tolist()}
            annotations.append({**row, "area": box[2] * box[3], "iscrowd": int(rng.random() < crowd)})
            noise = rng.normal(0, 0.06, 4) * np.tile(box[2:], 2)
            if rng.random() < 0.85:
                add(image, label, box + noise, rng.beta(6, 3))
            if rng.random() < 0.2:
                add(image, label, box - noise, rng.beta(3, 5))
            if rng.random() < 0.15:
                add(image, int(rng.integers(classes)), box + noise, rng.beta(3, 5))
        for _ in range(rng.poisson(1)):
            box = np.concatenate([rng.uniform(0, 120, 2), rng.uniform(15, 80, 2)])
            add(image, int(rng.integers(classes)), box, rng.beta(2, 6))
    coco = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 200} for i in range(1, images + 1)],
        "categories": [{"id": 10 * label + 10, "name": f"class {label}"} for label in range(classes)],
        "annotations": annotations,
    }
    return coco, rows


def simulate_matches(seed, images, classes=2):
    """The matches of a simulated detector, made without boxes: images differ in how hard they are."""
    rng = np.random.default_rng(seed)
    ease = rng.normal(0, 0.5, images)
    true_image = np.repeat(np.arange(images), rng.poisson(4, images))
    true_label = rng.integers(classes, size=len(true_image))
    quality = ease[true_image] + rng.normal(0, 1, len(true_image))  # of the detection of each object
    found = np.flatnonzero(quality > -1)
    iou = np.clip(0.75 + 0.1 * quality[found] + rng.normal(0, 0.08, len(found)), 0, 1)
    false = rng.integers(images, size=rng.poisson(3 * images))
    score = np.concatenate([quality[found] + rng.normal(0, 0.7, len(found)), rng.normal(-1, 1, len(false))])
    det_true = np.full((len(IOU_THRESHOLDS), len(score)), -1)
    det_true[:, : len(found)] = np.where(iou >= IOU_THRESHOLDS[:, None], found, -1)
    return Matches(
        class_names=[str(label) for label in range(classes)],
        category_ids=list(range(classes)),
        images=[{}] * images,
        true_image=true_image,
        true_label=true_label,
        true_box=np.zeros((len(true_image), 4)),
        true_counts=np.ones(len(true_image), dtype=bool),
        det_image=np.concatenate([true_image[found], false]),
        det_label=np.concatenate([true_label[found], rng.integers(classes, size=len(false))]),
        det_box=np.zeros((len(score), 4)),
        det_score=1 / (1 + np.exp(-score)),
        det_true=det_true,
        det_counts=np.ones(det_true.shape, dtype=bool),
        metrics={},
        class_metrics={},
    )


def write_data(folder, images, noise=False, **options):
    """A simulated dataset with images, as train and val split; returns the dataset and result rows."""
    coco, rows = simulate(images=images, **options)
    rng = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / split).mkdir()
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))
    if noise:
        Image.fromarray(rng.integers(0, 256, (640, 640, 3), dtype=np.uint8)).save(
            folder / "noise.png", compress_level=0
        )
    for image in coco["images"]:
        file = folder / "val" / image["file_name"]
        if noise:
            image["width"] = image["height"] = 640
            shutil.copy(folder / "noise.png", file)
        else:
            Image.new("RGB", (200, 200), (image["id"],) * 3).save(file)
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(coco))
    return CocoDataset(folder / "val", folder / "annotations" / "instances_val.json"), rows
