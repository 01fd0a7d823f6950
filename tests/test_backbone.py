"""Any timm model becomes a detector's backbone, or an error says why not."""

import pytest
import torch

from vovnet_zoo import FCOSLoss, create_detector

BACKBONES = [
    "vovnet39",
    "ese_vovnet19b_dw",
    "resnet18",
    "mobilenetv3_small_050",
    "convnext_atto",
    "efficientnet_b0",
    "swin_tiny_patch4_window7_224",
    "pvt_v2_b0",
]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_any_backbone_trains(backbone):
    torch.manual_seed(0)
    model = create_detector("fcos", backbone=backbone, num_classes=3, channels=64, num_convs=1).train()
    preds = model(torch.randn(2, 3, 128, 160))
    num_points = sum(-(-128 // s) * -(-160 // s) for s in (8, 16, 32, 64, 128))
    assert preds.logits.shape == (2, num_points, 3)
    assert preds.distances.shape == (2, num_points, 4) and (preds.distances >= 0).all()
    assert preds.centerness.shape == (2, num_points)
    assert preds.points.shape == (num_points, 2) and preds.strides.shape == (num_points,)
    boxes, labels = torch.tensor([[[20.0, 30, 90, 80]], [[0, 0, 0, 0]]]), torch.tensor([[2], [-1]])
    losses = FCOSLoss()(preds, boxes, labels)
    sum(losses.values()).backward()
    assert all(value > 0 and value.isfinite() for value in losses.values())
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize(
    "backbone, reason",
    [
        ("vit_tiny_patch16_224", "strides"),
        ("inception_v3", "turns a 96x160 image into maps"),
        ("maxvit_tiny_tf_224", "images of any size"),
        ("coat_lite_tiny", "cannot extract feature maps"),
        ("resnet1888", "did you mean"),
    ],
)
def test_unusable_backbone_says_why(backbone, reason):
    with pytest.raises(ValueError, match=reason):
        create_detector("fcos", backbone=backbone, num_classes=3)
