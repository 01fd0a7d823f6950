"""A user writes programs like this one; mypy checks that every name has a useful type.

The program also runs: `tests/test_types.py` calls `main`.
"""

from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from torch import Tensor

import vovnet_zoo
from vovnet_zoo import FCOS, FCOSLoss, ImageDetections, Predictions
from vovnet_zoo.compiled import Detections
from vovnet_zoo.data import CocoDataset, collate, find_split, normalize, train_transforms
from vovnet_zoo.evaluation import coco_metrics, to_coco_results
from vovnet_zoo.loss import Targets


def build(folder: Path) -> FCOS:
    model = vovnet_zoo.create_detector(
        "fcos_vovnet27_slim_fpn", num_classes=2, class_names=["red", "green"], channels=64, num_convs=1, min_size=64
    )
    assert_type(model, FCOS)
    model.save_pretrained(folder)
    loaded = FCOS.from_pretrained(folder)
    assert_type(loaded, FCOS)

    config = loaded.config
    assert_type(config["class_names"], list[str] | None)
    assert_type(config["image_mean"], list[float])
    assert_type(config["plus_one"], bool)
    return FCOS(**config)


def train_step(model: FCOS, root: Path) -> float:
    dataset = CocoDataset(*find_split(root, "train"), transforms=train_transforms((64, 64), 96, "flip"))
    batch = collate([dataset[0], dataset[1]])
    assert_type(batch["images"], Tensor)
    criterion = FCOSLoss(variant="improved", center_radius=None)
    assert_type(FCOSLoss.of(model), FCOSLoss)

    preds = model(normalize(batch["images"], batch["sizes"], model.config["image_mean"], model.config["image_std"]))
    assert_type(preds, Predictions)
    assert_type(preds.logits, Tensor)
    assert_type(model.forward_features(torch.zeros(1, 3, 64, 64)), list[Tensor])
    assert_type(criterion.assign(preds.points, preds.strides, batch["boxes"], batch["labels"]), Targets)

    losses = criterion(preds, batch["boxes"], batch["labels"])
    assert_type(losses, dict[str, Tensor])
    loss = torch.stack(list(losses.values())).sum()
    loss.backward()
    return loss.item()


def detect(model: FCOS, images: list[Path]) -> list[str]:
    detections = vovnet_zoo.predict(
        model, images, candidate_threshold=0.0, score_threshold={"red": 0.0}, nms_threshold=0.5, max_detections=3
    )
    assert_type(detections, list[ImageDetections])
    names = model.config["class_names"] or []
    rows = to_coco_results(detections, range(len(images)), [7, 12], model.config["plus_one"])
    assert_type(rows, list[dict])

    for one in vovnet_zoo.predict(model, np.zeros((64, 64, 3), np.uint8), stream=True, batch_size=4):
        assert_type(one, ImageDetections)
        assert_type(one.names, list[str])
        assert_type(one["boxes"], Tensor)
    with torch.inference_mode():
        preds = model(torch.zeros(1, 3, 64, 64))
    assert_type(vovnet_zoo.postprocess(preds, [(64, 64)], topk=10), list[dict[str, Tensor]])

    fast = vovnet_zoo.compile_detector(model, (64, 96), winograd=False, backend="eager", score_threshold=0.1)
    found = fast(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))
    assert_type(found, Detections)
    assert_type(found.count, Tensor)
    return [names[label] for detection in detections for label in detection["labels"].tolist()]


def score(root: Path) -> dict:
    _, annotation_file = find_split(root, "val")
    return coco_metrics(annotation_file, [])


def main(root: Path, out: Path) -> list[str]:
    model = build(out / "model")
    print(train_step(model, root), score(root)["AP"])
    return detect(model, sorted((root / "val").glob("*.png")))
