import inspect
import json

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from vovnet_zoo import FCOS, FCOSLoss, Predictions, create_detector, detectors
from vovnet_zoo.backbone import backbone_maps, create_backbone
from vovnet_zoo.config import VARIANTS, DetectorConfig, DetectorOptions
from vovnet_zoo.fcos import ExtraLevels, make_points

PUBLISHED_HEAD = {"distance": "exp", "centerness_on": "cls"}


def test_parameter_count_of_the_published_detector():
    model = create_detector("fcos_vovnet39_fpn", variant="published")
    assert sum(p.numel() for p in model.parameters()) == 30_016_538
    assert sum(b.numel() for b in model.buffers()) == 40_832


def test_a_detector_says_what_it_is():
    model = tiny(num_classes=4, class_names=["cat", "dog", "cow", "pig"])
    assert (model.class_names, model.num_classes) == (["cat", "dog", "cow", "pig"], 4)
    assert repr(model).startswith("FCOS(resnet10t, 4 classes (cat, dog, cow, ..), short side 800 px, ")
    assert "\n" not in repr(model) and repr(model).endswith("M parameters)")
    model = tiny(num_classes=4)
    assert model.class_names is None and "resnet10t, 4 classes, short" in repr(model)
    loss = repr(FCOSLoss.of(tiny(center_radius=None, box_loss="iou")))
    assert loss.startswith("FCOSLoss(add_images=False, box_loss='iou', center_radius=None, matching='paper', ")


def test_points_lie_at_cell_centres():
    points, strides = make_points([(2, 3), (1, 2)], [8, 16], "cpu")
    assert points.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12], [8, 8], [24, 8]]
    assert strides.tolist() == [8] * 6 + [16] * 2


def test_predictions_are_the_flattened_heads():
    model = tiny().eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        preds = model(images)
        features = model.forward_features(images)
        cls, reg, ctr = model.forward_head(features)
    assert isinstance(preds, Predictions)
    assert repr(preds).startswith("Predictions(logits=float32 [2, 129, 3], distances=float32 [2, 129, 4], ")
    assert [tuple(x.shape) for x in features] == [(2, 64, h, w) for h, w in ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))]
    # the point of row 3, column 5 at stride 8
    at = 3 * 12 + 5
    assert preds.points[at].tolist() == [5 * 8 + 4, 3 * 8 + 4]
    torch.testing.assert_close(preds.logits[:, at], cls[0][:, :, 3, 5])
    torch.testing.assert_close(preds.distances[:, at], reg[0][:, :, 3, 5])
    torch.testing.assert_close(preds.centerness[:, at], ctr[0][:, 0, 3, 5])
    torch.testing.assert_close(preds.distances[:, -1], reg[4][:, :, 0, 0])


def test_variants_compute_what_they_say():
    """Distances and centerness of both variants equal a computation by hand, for one level."""
    features = [torch.randn(1, 64, 4, 4) for _ in range(5)]
    for distance, centerness_on in (("relu", "box"), ("exp", "cls")):
        head = tiny(distance=distance, centerness_on=centerness_on).head
        nn.init.normal_(head.box_distances.weight, std=0.5)
        nn.init.normal_(head.centerness.weight, std=0.5)
        with torch.no_grad():
            head.scales.copy_(torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0]))
            _, reg, ctr = head(features)
            cls_features, box_features = head.cls_tower(features[1]), head.box_tower(features[1])
            raw = 1.5 * head.box_distances(box_features)
            torch.testing.assert_close(reg[1], raw.clamp(min=0) * 16 if distance == "relu" else raw.exp())
            own = box_features if centerness_on == "box" else cls_features
            torch.testing.assert_close(ctr[1], head.centerness(own))


def test_initial_foreground_probability():
    preds = tiny(prior=0.02).eval()(torch.zeros(1, 3, 64, 64))
    assert preds.logits.sigmoid().mean().item() == pytest.approx(0.02, rel=0.05)


def test_other_classes(tmp_path):
    """A detector learns other classes: what it knows of a class by name stays, the rest is as in a new one."""
    model = tiny(class_names=["cat", "dog", "cow"], thresholds={"dog": 0.5}, category_ids=[3, 4, 5], prior=0.02).half()
    before, images = {k: v.clone() for k, v in model.state_dict().items()}, torch.zeros(1, 3, 64, 64)
    model.reset_classifier(2, ["owl", "dog"])
    layer = model.head.cls_logits
    assert layer.weight.dtype == torch.float16 and torch.equal(layer.weight[1], before["head.cls_logits.weight"][1])
    assert layer.bias[0].item() == pytest.approx(-3.89, abs=0.01) and 0.005 < layer.weight[0].std() < 0.02
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "cls_logits" not in k)
    assert (model.num_classes, model.class_names) == (2, ["owl", "dog"])
    assert model.config["thresholds"] is None and model.config["category_ids"] is None
    assert model.config is model._hub_mixin_config
    model.float().save_pretrained(tmp_path)
    again = FCOS.from_pretrained(tmp_path)
    assert torch.equal(again(images).logits, model.eval()(images).logits) and again.config == model.config
    with pytest.raises(ValueError, match="num_classes=5: the model has 2 .*; .* model.reset_classifier"):
        FCOS.from_pretrained(tmp_path, num_classes=5)


@pytest.mark.parametrize("frozen_norm", [False, True])
def test_layer_decay_of_timm(frozen_norm):
    """timm's optimizers give FPN and head the whole learning rate, and each part of the backbone less, the first least.

    Each parameter is in one group.
    """
    model = tiny(frozen_norm=frozen_norm)
    optimizer = create_optimizer_v2(model, "sgd", lr=1, weight_decay=0.1, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert len(scales) == sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    parts = {name.split(".")[1]: scales[id(p)] for name, p in model.backbone.named_parameters(prefix="backbone")}
    assert parts == {"conv1": 1 / 32, "layer1": 1 / 16, "layer2": 1 / 8, "layer3": 1 / 4, "layer4": 1 / 2} | (
        {} if frozen_norm else {"bn1": 1 / 32}
    )
    assert {scales[id(p)] for part in (model.fpn, model.head) for p in part.parameters()} == {1}


def test_frozen_norm_has_no_trainable_norm():
    model = create_detector("fcos", backbone="resnet18", num_classes=2, channels=64, frozen_norm=True)
    names = {name for name, _ in model.backbone.named_parameters()}
    assert names and not any(".bn" in name for name in names)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_classes": 0}, "at least one"),
        ({"channels": 100}, "32 groups"),
        ({"channels": 32}, "at least 2"),
        ({"distance": "softplus"}, "'relu' or 'exp'"),
        ({"centerness_on": "both"}, "'box' or 'cls'"),
        ({"class_names": ["a", "b"]}, "2 class_names"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny(**kwargs)


def test_bad_images():
    with pytest.raises(ValueError, match=r"\[B,3,H,W\]"):
        tiny()(torch.zeros(3, 64, 64))


def test_one_graph():
    """Network, assignment and loss compile without a graph break, forward and backward."""
    model, criterion = tiny().train(), FCOSLoss()

    def step(images, boxes, labels):
        return criterion(model(images), boxes, labels)

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    images = torch.randn(2, 3, 64, 96)
    for count in (3, 0):
        boxes = torch.tensor([10.0, 12, 50, 40]).expand(2, count, 4)
        labels = torch.ones(2, count, dtype=torch.int64)
        wanted, got = step(images, boxes, labels), compiled(images, boxes, labels)
        torch.testing.assert_close(got, wanted)
        sum(got.values()).backward()


def test_config_rebuilds_the_model():
    model = tiny(class_names=["a", "b", "c"], distance="exp")
    again = FCOS(**model.config)
    assert again.config == model.config
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_config_has_every_argument():
    arguments = inspect.signature(FCOS).parameters
    assert tiny().config.keys() == arguments.keys() == DetectorConfig.__annotations__.keys()
    assert DetectorOptions.__annotations__.keys() == arguments.keys() - {"num_classes"}
    for name, value in VARIANTS["improved"].items():
        assert arguments[name].default == value
    assert VARIANTS is detectors.VARIANTS and VARIANTS["published"]["plus_one"]
    published = create_detector("fcos", backbone="resnet10t", channels=64, num_convs=1, variant="published").config
    assert published.items() >= VARIANTS["published"].items()


@pytest.mark.parametrize(
    "kwargs, wanted",
    [
        ({}, {"plus_one": False, "center_radius": 1.5, "box_loss": "giou", "add_images": False}),
        (PUBLISHED_HEAD, {"plus_one": False, "center_radius": None, "box_loss": "iou", "add_images": True}),
        (
            {**PUBLISHED_HEAD, "image_std": [1 / 255] * 3},  # converted from the published weights
            {"plus_one": True, "center_radius": None, "box_loss": "iou", "add_images": True},
        ),
    ],
)
def test_config_files_without_conventions(kwargs, wanted, tmp_path):
    """The files of earlier versions mean what their weights were trained with."""
    tiny(**kwargs).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in wanted}))
    assert FCOS.from_pretrained(tmp_path).config == config | wanted


def tiny(**kwargs) -> FCOS:
    torch.manual_seed(0)
    return FCOS(**{"backbone": "resnet10t", "num_classes": 3, "channels": 64, "num_convs": 1, **kwargs})


@pytest.mark.parametrize("backbone", ["vovnet27_slim", "resnet10t"])
def test_grad_checkpointing_changes_nothing(backbone):
    """The gradients are the same, and less is kept for the backward pass."""
    torch.manual_seed(0)
    model = create_detector("fcos", backbone=backbone, num_classes=3, channels=64, num_convs=2, frozen_norm=True)
    images, kept, gradients = torch.randn(1, 3, 96, 128), [], []
    for enable in (False, True):
        model.train().zero_grad()
        model.set_grad_checkpointing(enable)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept[-1].append(x.numel()) or x, lambda x: x):
            kept.append([])
            preds = model(images)
        (preds.logits.sum() + preds.distances.sum() + preds.centerness.sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])
    assert sum(kept[1]) < 0.75 * sum(kept[0])
    with pytest.raises(ValueError, match="frozen_norm=True"):
        create_detector("fcos", backbone=backbone, num_classes=3, channels=64).set_grad_checkpointing()


def test_backbone_of_narrow_images_is_float32_on_a_cpu():
    """The last stage makes a map 1 wide of one 2 wide, of which oneDNN does not write all in bfloat16."""
    body, images = create_backbone("resnet10t").eval(), torch.randn(2, 3, 320, 64)
    for width, dtype in ((32, torch.float32), (64, torch.bfloat16)):
        with torch.no_grad():
            wanted = backbone_maps(body, images[..., :width])
            with torch.autocast("cpu", torch.bfloat16):
                maps = backbone_maps(body, images[..., :width].bfloat16().float())
        assert all(x.dtype == dtype for x in maps)
        assert all((x.float() - y).norm() < 0.05 * y.norm() for x, y in zip(maps, wanted, strict=True))


@pytest.mark.parametrize("height, width", [(1, 1), (2, 2), (5, 1), (12, 2), (12, 3), (24, 4)])
def test_extra_levels_of_narrow_maps_in_bfloat16(height, width):
    """What oneDNN does not write for a map that is 1 or 2 wide would be what the memory held before."""
    torch.manual_seed(0)
    levels, p5, found = ExtraLevels(128, 128), torch.randn(2, 128, height, width, requires_grad=True), []
    for bfloat16 in (False, True):
        dirt = [torch.full((1 << bits,), float("nan")) for bits in (8, 10, 12, 14, 16, 18, 20) for _ in range(6)]
        del dirt
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            maps, names = levels([p5.bfloat16() if bfloat16 else p5], [], ["p5"])
        losses = sum(x.float().square().sum() for x in maps[1:])
        found.append([*maps[1:], *torch.autograd.grad(losses, [p5, levels.p6.weight, levels.p7.weight])])
    assert names == ["p5", "p6", "p7"]
    for right, ours in zip(*found, strict=True):
        assert ours.shape == right.shape and (ours.float() - right).norm() < 0.02 * right.norm()
