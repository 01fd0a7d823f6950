"""Tests of exports share this small detector and these pictures."""

import torch
from samples import busy

from vovnet_zoo import FCOS, create_detector

MEAN = (0.485, 0.456, 0.406)


def small_detector() -> FCOS:
    """With weights that find something on drawn pictures."""
    torch.manual_seed(0)
    return busy(create_detector("fcos", backbone="test_resnet", num_classes=2, class_names=["red", "green"],
                                channels=64, num_convs=1, image_mean=MEAN, min_size=64, max_size=160))  # fmt: skip


def pictures(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator) for h, w in sizes]
