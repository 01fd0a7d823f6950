"""Tests of exports share this small detector and these pictures."""

import torch

from vovnet_zoo import FCOS, create_detector

MEAN = (0.485, 0.456, 0.406)


def small_detector() -> FCOS:
    """With weights that find something on drawn pictures."""
    torch.manual_seed(0)
    return busy(create_detector("fcos", backbone="test_resnet", num_classes=2, class_names=["red", "green"],
                                channels=64, num_convs=1, image_mean=MEAN, min_size=64, max_size=160))  # fmt: skip


def busy(model: FCOS) -> FCOS:
    """With classes that vary from place to place, and boxes of some strides, so that there is something to find."""
    torch.manual_seed(0)
    torch.nn.init.normal_(model.head.cls_logits.weight, std=0.3)
    torch.nn.init.constant_(model.head.cls_logits.bias, -2.5)
    torch.nn.init.constant_(model.head.box_distances.bias, 1.5)
    for module in model.modules():  # as after training: no batch norm is the identity
        if hasattr(module, "running_mean"):  # frozen ones too
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.8, 1.2)
    return model.eval()


def pictures(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator) for h, w in sizes]
