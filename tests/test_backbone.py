"""Any timm model becomes a detector's backbone, or an error says why not."""

import time

import pytest
import safetensors.torch
import timm
import torch
from hub_server import PATIENCE, Repo

from vovnet_zoo import FCOSLoss, create_detector
from vovnet_zoo import backbone as backbones
from vovnet_zoo.backbone import backbone_maps
from vovnet_zoo.detectors import DETECTORS, STARTS
from vovnet_zoo.vovnet import v2_cfgs

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
        ("coat_lite_tiny", "cannot extract feature maps|images of one size only"),
        ("halonet26t", "images of any size, as FCOS needs: AssertionError"),
        ("mvitv2_tiny", "images of any size, as FCOS needs: index .* is out of bounds"),
        ("timm/resnet18", "backbone='hf-hub:timm/resnet18'. takes a repository"),
        ("resnet1888", "did you mean"),
    ],
)
def test_unusable_backbone_says_why(backbone, reason):
    with pytest.raises(ValueError, match=reason):
        create_detector("fcos", backbone=backbone, num_classes=3)


@pytest.mark.parametrize("backbone, number", [("vovnet27_slim", 1), ("convnext_atto", 1), ("tiny_vit_5m_224", 2)])
def test_only_a_backbone_with_tables_runs_a_wide_image(backbone, number, monkeypatch):
    sizes = []
    monkeypatch.setattr(backbones, "backbone_maps", lambda body, x: sizes.append(x.shape) or backbone_maps(body, x))
    with torch.device("meta"):
        create_detector("fcos", backbone=backbone, num_classes=3, channels=64, num_convs=1)
    assert [size[-2:] for size in sizes] == [(96, 160), (32, 800)][:number]


@pytest.mark.parametrize("backbone", ["hrnet_w18_small", "twins_pcpvt_small"])
def test_a_backbone_without_checkpointing_says_so(backbone):
    with torch.device("meta"):
        model = create_detector("fcos", backbone=backbone, num_classes=3, channels=64, num_convs=1, frozen_norm=True)
    model.set_grad_checkpointing(False)
    with pytest.raises(ValueError, match=f"no gradient checkpointing for the feature maps of '{backbone}'"):
        model.set_grad_checkpointing()
    assert not model.head.grad_checkpointing


def test_norms_that_stay_trainable_are_not_called_frozen():
    """timm fixes batch norms of two dimensions; NextViT has others too."""
    options = dict(backbone="nextvit_small", num_classes=3, channels=64, num_convs=1)
    with torch.device("meta"), pytest.raises(ValueError, match="frozen_norm=True: backbone 'nextvit_small'"):
        create_detector("fcos", frozen_norm=True, **options)


MEAN = {"ese_vovnet57b.ra4_e3600_r256_in1k": [0.5, 0.5, 0.5]}
STD = {"ese_vovnet57b.ra4_e3600_r256_in1k": [0.5, 0.5, 0.5]}


@pytest.mark.parametrize("name", [name for name in STARTS if "ese" in name])
def test_live_backbones(name, hub_on_loopback):
    """`pretrained_backbone=True` takes the weights of `STARTS` from timm's repository, with their mean and std."""
    start, options = STARTS[name], dict(channels=64, num_convs=1, num_classes=3)
    torch.manual_seed(0)
    weights = timm.create_model(start.split(".")[0]).state_dict()
    files = {"model.safetensors": safetensors.torch.save(weights)}
    hub_on_loopback.repos[f"timm/{start}"] = Repo(False, [("1" * 40, files, set(files))], {"main": "1" * 40})
    for frozen_norm in (False, True):
        model = create_detector(name, pretrained_backbone=True, frozen_norm=frozen_norm, **options)
        assert model.config["backbone"] == DETECTORS[name]["backbone"]  # timm's name, without the tag
        assert model.config["image_mean"] == MEAN.get(start, [0.485, 0.456, 0.406])
        assert model.config["image_std"] == STD.get(start, [0.229, 0.224, 0.225])
        for key, x in model.backbone.state_dict().items():
            assert torch.equal(x, weights[key.replace("stem_", "stem.").replace("stages_", "stages.")]), key
    assert f"GET /timm/{start}/resolve/main/model.safetensors" in hub_on_loopback.log
    with pytest.raises(OSError):  # another backbone has weights of its own, which are not on this hub
        create_detector(name, backbone="resnet18", pretrained_backbone=True, **options)
    assert "HEAD /timm/resnet18.a1_in1k/resolve/main/model.safetensors" in hub_on_loopback.log


def test_weights_where_the_hub_is_away(hub_on_loopback, monkeypatch):
    """Weights in the cache are taken, and others are refused; timm's own retries would take 50 s."""
    options = dict(backbone="resnet10t", pretrained_backbone=True, channels=64, num_convs=1, num_classes=3)
    start = timm.get_pretrained_cfg("resnet10t").hf_hub_id
    files = {"model.safetensors": safetensors.torch.save(timm.create_model("resnet10t").state_dict())}
    hub_on_loopback.repos[start] = Repo(False, [("1" * 40, files, set(files))], {"main": "1" * 40})
    first = create_detector("fcos", **options)
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    hub_on_loopback.down = True
    again = create_detector("fcos", **options)
    assert torch.equal(again.backbone.state_dict()["conv1.0.weight"], first.backbone.state_dict()["conv1.0.weight"])
    with pytest.raises(OSError, match="^timm/resnet18.a1_in1k: .* is not in the cache"):
        create_detector("fcos", **options | {"backbone": "resnet18"})
    assert sum(waited) < PATIENCE


@pytest.mark.parametrize("name", [name for name in STARTS if "res" in name])
def test_rows_of_2019_start_from_torchvisions_weights(name, hub_on_loopback):
    with pytest.raises(OSError):
        create_detector(name, pretrained_backbone=True, channels=64, num_convs=1)
    assert f"HEAD /timm/{name[5:-4]}.tv_in1k/resolve/main/model.safetensors" in hub_on_loopback.log


def test_every_v2_body_has_a_detector():
    for name, cfg in v2_cfgs.items():
        with torch.device("meta"):
            body = create_detector(f"fcos_{name}_fpn", channels=64, num_convs=1).backbone
        assert body.feature_info.channels()[1:] == cfg["stage_out_chs"]
