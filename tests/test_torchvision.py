"""A converted torchvision FCOS finds, and learns, what torchvision's own code does with the same weights."""

import dataclasses

import numpy as np
import pytest
import torch
from launch import rows
from near import assert_near, sum_roundings
from PIL import Image
from torchvision.models.detection.image_list import ImageList
from torchvision_models import make_torchvision, slots, twin

import train_coco
from presets import parse
from vovnet_zoo import FCOS, FCOSLoss, compile_detector, postprocess, predict
from vovnet_zoo.config import VARIANTS
from vovnet_zoo.convert import names
from vovnet_zoo.data import read_image, resize_image, resize_size
from vovnet_zoo.inference import choose_thresholds

MIN_SIZE, MAX_SIZE = 200, 333  # as 800 and 1333, in a quarter of the time
PHOTOS = [(150, 222), (427, 301), (333, 500), (64, 640)]  # (height, width): enlarged, reduced, reduced, a panorama


@pytest.fixture(scope="module")
def theirs():
    return make_torchvision(min_size=MIN_SIZE, max_size=MAX_SIZE)


@pytest.fixture(scope="module")
def ours(theirs):
    return twin(theirs.state_dict(), min_size=MIN_SIZE, max_size=MAX_SIZE)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Draw pictures that have, as photos do, soft light, sharp edges, texture and noise."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number, (height, width) in enumerate(PHOTOS):
        y, x = np.mgrid[:height, :width] / 64
        picture = np.stack([np.sin(x + c) * np.cos(y * (c + 1)) for c in range(3)], axis=-1) * 60 + 120
        for _ in range(12):
            top, left = rng.integers(0, height - 20), rng.integers(0, width - 20)
            patch = picture[top : top + rng.integers(16, 160), left : left + rng.integers(16, 160)]
            patch += rng.normal(size=3) * 70 + rng.choice([0, 40]) * (np.indices(patch.shape[:2]).sum(0) % 2)[..., None]
        picture += rng.normal(size=picture.shape) * 8
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
    return sorted(folder.iterdir())


def their_detections(net, images):
    """Run torchvision's model on uint8 images, and give our labels to what it finds."""
    with torch.no_grad():
        found = net([image / 255 for image in images])
    label_of = {slot: label for label, slot in enumerate(slots(net.head.classification_head.num_classes))}
    return [{**f, "labels": torch.tensor([label_of[i] for i in f["labels"].tolist()])} for f in found]


def same(found, wanted) -> bool:
    """Tell whether there are as many detections, and each has a partner of its class within 0.01 pixels and 1e-5.

    Scores that are equal but for rounding may change places.
    """
    if len(found["labels"]) != len(wanted["labels"]):
        return False
    near = (found["boxes"][:, None] - wanted["boxes"]).abs().amax(-1) < 0.01  # [found, wanted]
    near &= (found["scores"][:, None] - wanted["scores"]).abs() < 1e-5
    near &= found["labels"][:, None] == wanted["labels"]
    return bool(near.any(0).all() and near.any(1).all())


# ---- the network


@pytest.mark.parametrize("num_classes, trained", [(91, True), (91, False), (5, True)])
@pytest.mark.parametrize("norm", ["frozen", "with counts of batches"])
def test_outputs_and_points(num_classes, trained, norm):
    net = make_torchvision(num_classes, trained=trained)
    state_dict = net.state_dict()
    if norm != "frozen":  # as a model that was built without weights saves them
        for name in [name for name in state_dict if name.endswith("running_var")]:
            state_dict[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    model = twin(state_dict)
    images = torch.randn(2, 3, 160, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        preds, features = model(images), list(net.backbone(images).values())
        head = net.head(features)
    roundings = sum_roundings(net)
    assert_near(preds.logits, head["cls_logits"][..., slots(num_classes)], roundings)
    assert_near(preds.centerness, head["bbox_ctrness"][..., 0], roundings)
    assert_near(preds.distances, head["bbox_regression"] * preds.strides[:, None], roundings)
    (anchors,) = net.anchor_generator(ImageList(images[:1], [(160, 224)]), features)
    assert torch.equal(preds.points, (anchors[:, :2] + anchors[:, 2:]) / 2)
    assert torch.equal(preds.strides, anchors[:, 2] - anchors[:, 0])
    assert preds.points[-1].tolist() == [112, 80]  # on P7 the step is 224 // 2 and 160 // 2, not the stride of 128


def test_classes_and_their_ids(theirs, ours):
    """Label 11 is the fire hydrant with COCO's id 11, label 79 the toothbrush with 90."""
    config = ours.config
    assert len(config["class_names"]) == len(config["category_ids"]) == config["num_classes"] == 80
    known = dict(zip(config["category_ids"], config["class_names"], strict=True))
    assert [known[i] for i in (1, 3, 11, 13, 25, 27, 44, 46, 90)] == [
        "person", "car", "fire hydrant", "stop sign", "giraffe", "backpack", "bottle", "wine glass", "toothbrush",
    ]  # fmt: skip
    for part in ("weight", "bias"):
        of_slots = getattr(theirs.head.classification_head.cls_logits, part)
        assert torch.equal(getattr(ours.head.cls_logits, part), of_slots[config["category_ids"]])
    assert config.items() >= VARIANTS["torchvision"].items()
    few = twin(make_torchvision(5).state_dict()).config
    assert few["category_ids"] == [1, 2, 3, 4] and few["class_names"] is None


# ---- from the file to boxes


def test_from_image_files_to_boxes(theirs, ours, photos):
    found = predict(ours, photos)
    for path, detections in zip(photos, found, strict=True):
        (wanted,) = their_detections(theirs, [read_image(path)])
        assert 10 < len(wanted["labels"]) < 100 and same(detections, wanted), path
    assert len({label for f in found for label in f["labels"].tolist()}) > 5


def test_a_batch(theirs, ours, photos):
    """torchvision pads the images of a batch to one size, and finds boxes in the padding too."""
    images = [read_image(path) for path in photos[:3]]
    batch, _ = theirs.transform([image / 255 for image in images])
    wanted = their_detections(theirs, images)
    empty = sum(int((f["boxes"][:, 2:] <= f["boxes"][:, :2]).any(-1).sum()) for f in wanted)
    assert empty > 0
    with torch.no_grad():
        preds = ours(batch.tensors)
    thresholds = choose_thresholds(ours, {})._asdict()
    found = postprocess(preds, batch.image_sizes, keep_empty=True, **thresholds)
    for f, want, image, size in zip(found, wanted, images, batch.image_sizes, strict=True):
        scale = torch.tensor([image.shape[2] / size[1], image.shape[1] / size[0]]).repeat(2)
        assert same({**f, "boxes": f["boxes"] * scale}, want)


OTHER = dict(
    points="center",
    resize="antialias",
    candidate_threshold=0.05,
    score_threshold=0.1,
    nms_threshold=0.5,
    topk=20,
    max_detections=10,
)


@pytest.mark.parametrize("name", OTHER)
def test_each_convention_matters(theirs, photos, name):
    (wanted,) = their_detections(theirs, [read_image(photos[0])])
    model = twin(theirs.state_dict(), min_size=MIN_SIZE, max_size=MAX_SIZE, **{name: OTHER[name]})
    (found,) = predict(model, photos[0])
    assert not same(found, wanted)


def test_compiled(theirs, ours, photos):
    """The compiled graph follows the conventions; it takes images that are resized and rounded already."""
    image = read_image(photos[1])
    size = resize_size(*image.shape[1:], MIN_SIZE, MAX_SIZE, "torchvision")
    image = resize_image(image, size, "torchvision").round().to(torch.uint8)
    theirs.transform.min_size, theirs.transform.max_size = (min(size),), max(size)
    (wanted,) = their_detections(theirs, [image])
    theirs.transform.min_size, theirs.transform.max_size = (MIN_SIZE,), MAX_SIZE
    height, width = (-(-side // 32) * 32 for side in size)
    padded = torch.zeros(1, 3, height, width, dtype=torch.uint8)
    padded[..., : size[0], : size[1]] = image
    found = compile_detector(ours, (height, width), backend="eager", winograd=False)(padded, [size])
    count = int(found.count)
    assert count == len(wanted["labels"]) > 20
    # the copy has batch norms folded into convolutions, which rounds more
    near = (found.boxes[0, :count, None] - wanted["boxes"]).abs().amax(-1) < 0.05
    near &= (found.scores[0, :count, None] - wanted["scores"]).abs() < 1e-4
    near &= found.labels[0, :count, None] == wanted["labels"]
    assert near.any(0).all() and near.any(1).all()


@pytest.mark.parametrize("height, width", [(427, 640), (640, 427), (333, 500), (1, 9000), (3000, 100), (1066, 1600)])
def test_sizes(theirs, height, width):
    """The sides are truncated as torchvision does, also where rounding errors make 799 of 800."""
    image = torch.zeros(3, height, width)
    for min_size, max_size in ((800, 1333), (640, 1333), (200, 333)):
        theirs.transform.min_size, theirs.transform.max_size = (min_size,), max_size
        found = resize_size(height, width, min_size, max_size, "torchvision")
        try:
            wanted = tuple(theirs.transform.resize(image)[0].shape[1:])
        except RuntimeError:  # torchvision cannot make an image of no pixels
            assert min(found) == 1
        else:
            assert found == wanted
    theirs.transform.min_size, theirs.transform.max_size = (MIN_SIZE,), MAX_SIZE


# ---- training


def make_targets(dtype):
    """Make boxes of many sizes for three images: on multiples of 8, so that many locations lie on a limit, and none."""
    rng = np.random.default_rng(1)
    corners = rng.integers(0, 30, size=(2, 12, 2)) * 8
    extents = rng.choice([8, 16, 40, 64, 72, 128, 136, 200], size=(2, 12, 2))
    boxes = torch.from_numpy(np.concatenate([corners, corners + extents], axis=-1)).to(dtype)
    boxes[:, 6:] = boxes[:, :6] + torch.tensor([0, 0, 0, 0.25])  # nearly as large: float32 cannot tell at 1e8
    boxes = torch.cat([boxes.clamp(max=256), torch.zeros(1, 12, 4, dtype=dtype)])
    labels = torch.from_numpy(rng.integers(0, 80, size=(3, 12)))
    labels[2] = -1
    return boxes, labels


def their_targets(boxes, labels):
    there = [label >= 0 for label in labels]
    return [
        {"boxes": b[t], "labels": torch.tensor(slots(91))[x[t]]} for b, x, t in zip(boxes, labels, there, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matching(theirs, ours, monkeypatch, dtype):
    """Each location learns the box that torchvision gives it."""
    boxes, labels = make_targets(dtype)
    matched, sizes = [], [(-(-256 // s), -(-288 // s)) for s in ours.strides]
    anchors = theirs.anchor_generator(
        ImageList(torch.zeros(3, 3, 256, 288), [(256, 288)] * 3),
        [torch.zeros(1, 1, *size, dtype=dtype) for size in sizes],
    )
    monkeypatch.setattr(theirs.head, "compute_loss", lambda targets, outputs, anchors, idxs: matched.extend(idxs))
    theirs.compute_loss(their_targets(boxes, labels), {}, anchors, [h * w for h, w in sizes])
    points, strides = ours.make_points(sizes, (256, 288), "cpu")
    unique = torch.arange(36).reshape(3, 12).where(labels >= 0, -1)  # so that a box can be told by its label
    found = FCOSLoss.of(ours).assign(points, strides, boxes, unique)
    wanted = torch.stack([torch.where(m >= 0, m + 12 * i, -1) for i, m in enumerate(matched)])
    assert torch.equal(found.labels, wanted) and (wanted >= 0).sum() > 50
    by_paper = FCOSLoss.of(ours)
    by_paper.matching = "paper"
    assert not torch.equal(by_paper.assign(points, strides, boxes, unique).labels, wanted)


def test_loss_and_gradients():
    """In float64, on an image with many boxes, some on the limits of levels, and an image without any."""
    net = make_torchvision(_skip_resize=True).double()
    model = twin(net.float().state_dict()).double().train()
    net.double().train()
    images = torch.rand(2, 3, 160, 192, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    boxes, labels = (x[1:] for x in make_targets(torch.float64))
    wanted = net(list(images), their_targets(boxes, labels))
    mean, std = (torch.tensor(model.config[f"image_{k}"], dtype=torch.float64)[:, None, None] for k in ("mean", "std"))
    found = FCOSLoss.of(model)(model((images - mean) / std), boxes, labels)
    for key, their_key in (("cls", "classification"), ("box", "bbox_regression"), ("ctr", "bbox_ctrness")):
        assert_near(found[f"loss_{key}"], wanted[their_key], 1e6, dtype=torch.float64)
        assert wanted[their_key] > 0.01

    sum(wanted.values()).backward()
    sum(found.values()).backward()
    our_name, own = names("torchvision_detector", []), dict(model.named_parameters())
    for name, parameter in net.named_parameters():
        gradient = parameter.grad
        if "cls_logits" in name:
            assert_near(gradient.sum(0), gradient[slots(91)].sum(0), 1e6, dtype=torch.float64)  # the others have none
            gradient = gradient[slots(91)]
        assert gradient.any() or "bias" in name, name
        assert_near(own.pop(our_name[name]).grad, gradient, 1e6, dtype=torch.float64, what=name)
    assert own.keys() == {"head.scales"}  # torchvision has none


def test_finetune_starts_with_torchvisions_loss(tiny_coco, tmp_path, monkeypatch):
    """`finetune --init FOLDER` of a converted file: its first loss is what torchvision says of the same batch."""
    net = make_torchvision(3)
    twin(net.state_dict(), class_names=["red", "green"]).save_pretrained(tmp_path / "start")
    net.transform._skip_resize = True
    config = dataclasses.replace(
        parse(["finetune", "--data", str(tiny_coco), "--init", str(tmp_path / "start")]), out=tmp_path / "run",
        min_size=(90, 100), max_size=128, test_size=64, batch_size=3, accum=1, workers=0, steps=1, winograd=False,
        device="cpu", precision="float32",
    )  # fmt: skip
    batches, compute = [], train_coco.compute_losses

    def keep(model, criterion, images, sizes, targets, *rest):
        batches.append((images, sizes))
        assert model.config.items() >= VARIANTS["torchvision"].items()
        return compute(model, criterion, images, sizes, targets, *rest)

    find = train_coco.find_targets
    monkeypatch.setattr(train_coco, "compute_losses", keep)
    monkeypatch.setattr(train_coco, "find_targets", lambda *args: batches.append(args[2:4]) or find(*args))
    train_coco.main(config)
    (boxes, labels), (images, sizes) = batches
    assert {tuple(size) for size in sizes.tolist()} <= {
        resize_size(64, width, side, 128, "torchvision") for width in (64, 80, 96) for side in range(90, 101)
    }
    wanted = net.train()(
        [image[:, :h, :w] / 255 for image, (h, w) in zip(images, sizes.tolist(), strict=True)],
        [{"boxes": b[x >= 0], "labels": x[x >= 0] + 1} for b, x in zip(boxes, labels, strict=True)],
    )
    (row,) = (row for row in rows(config.out) if "loss" in row)
    for key, their_key in (("cls", "classification"), ("box", "bbox_regression"), ("ctr", "bbox_ctrness")):
        assert row[f"loss_{key}"] == pytest.approx(wanted[their_key].item(), rel=1e-3), key
    saved = FCOS.from_pretrained(config.out / "last").config
    assert saved["category_ids"] == [7, 12] and saved["class_names"] == ["red", "green"]
