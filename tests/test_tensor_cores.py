"""A detector whose convolutions were aligned for tensor cores predicts the same."""

import copy

import pytest
import torch
from torch import nn

from vovnet_zoo import create_detector
from vovnet_zoo.kernels.freeze import freeze
from vovnet_zoo.kernels.tensor_cores import align_channels


@pytest.mark.parametrize("centerness_on", ["box", "cls"])
def test_aligned_channels_change_nothing(centerness_on):
    torch.manual_seed(0)
    options = dict(channels=64, num_convs=1, num_classes=3, centerness_on=centerness_on)
    model = freeze(create_detector("fcos", backbone="vovnet27_slim", **options).eval().requires_grad_(False), False)
    for conv in (model.head.cls_logits, model.head.box_distances, model.head.centerness):
        nn.init.normal_(conv.weight, std=0.1)
        nn.init.normal_(conv.bias)
    aligned = copy.deepcopy(model)
    align_channels(aligned)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for got, wanted in zip(aligned(images), model(images), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    convs = [m for m in aligned.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == sum(isinstance(m, nn.Conv2d) for m in model.modules()) - 1  # centerness is part of another
    assert all(conv.in_channels % 8 == 0 for conv in convs)
    assert {conv.out_channels for conv in convs if conv.out_channels % 8} == ({3} if centerness_on == "box" else {4})
