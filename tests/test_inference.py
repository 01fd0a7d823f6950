import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import batched_nms

from vovnet_zoo import FCOS, Predictions, create_detector, postprocess, predict
from vovnet_zoo.fcos import make_points

STRIDES = [8, 16, 32, 64, 128]


def test_postprocess_finds_planted_boxes():
    """Boxes planted in the network's output come back, best first, clipped to the image."""
    preds = blank(batch=2, height=128, width=160, classes=4)
    plant(preds, 0, point=(36, 36), box=(20, 25, 60, 70), label=2, probability=0.9, centerness=0.5)
    plant(preds, 0, point=(100, 60), box=(90, 40, 170, 90), label=0, probability=0.6, centerness=0.9)  # beyond x=150
    plant(preds, 1, point=(12, 12), box=(-5, -5, 30, 30), label=3, probability=0.04, centerness=0.99)  # too faint
    first, second = postprocess(preds, torch.tensor([[120, 150], [128, 160]]))
    assert first["labels"].tolist() == [0, 2]
    assert first["scores"].tolist() == pytest.approx([(0.6 * 0.9) ** 0.5, (0.9 * 0.5) ** 0.5], abs=1e-5)
    assert first["boxes"].tolist() == [pytest.approx([90, 40, 150, 90]), pytest.approx([20, 25, 60, 70])]
    assert second["boxes"].shape == (0, 4) and second["scores"].shape == (0,) and second["labels"].shape == (0,)


def test_postprocess_equals_torchvision_nms():
    torch.manual_seed(0)
    points, strides = points_of(128, 160)
    n = len(points)
    preds = Predictions(torch.randn(3, n, 5) - 1, torch.rand(3, n, 4) * 40, torch.randn(3, n), points, strides)
    found = postprocess(preds, torch.tensor([[128, 160]] * 3), topk=10**6, max_detections=10**6)
    for b in range(3):
        probability = preds.logits[b].sigmoid()
        point, label = (probability > 0.05).nonzero(as_tuple=True)
        score = (probability * preds.centerness[b].sigmoid()[:, None])[point, label].sqrt()
        left_top, right_bottom = preds.distances[b].split(2, dim=-1)
        box = torch.cat([points - left_top, points + right_bottom], dim=-1)[point]
        box = box.clamp(min=0).minimum(torch.tensor([160.0, 128, 160, 128]))
        seen = (box[:, 2:] > box[:, :2]).all(-1)  # the others lie in the padding
        box, score, label = box[seen], score[seen], label[seen]
        keep = batched_nms(box.double(), score.double(), label, 0.6)
        assert len(keep) > 100
        torch.testing.assert_close(found[b]["boxes"], box[keep])
        torch.testing.assert_close(found[b]["scores"], score[keep])
        torch.testing.assert_close(found[b]["labels"], label[keep])


def test_limits():
    torch.manual_seed(0)
    points, strides = points_of(128, 160)
    n = len(points)
    preds = Predictions(torch.randn(1, n, 5), torch.rand(1, n, 4) * 5, torch.randn(1, n), points, strides)
    sizes = torch.tensor([[128, 160]])
    assert len(postprocess(preds, sizes, max_detections=7)[0]["scores"]) == 7
    assert len(postprocess(preds, sizes, topk=3)[0]["scores"]) <= 15
    (found,) = postprocess(preds, sizes, score_threshold=0.9)
    assert 0 < len(found["scores"]) < 100
    torch.testing.assert_close(postprocess(preds, [(128, 160)]), postprocess(preds, sizes), rtol=0, atol=0)
    for wrong in ([(128, 160)] * 2, (128, 160)):
        with pytest.raises(ValueError, match="image_sizes must be .* each of 1 images"):
            postprocess(preds, wrong)


def test_same_box_of_two_classes_survives_nms():
    preds = blank(1, 64, 64, 3)
    for label in (0, 1):
        plant(preds, 0, (36, 36), (20, 20, 50, 50), label, 0.9, 0.9)
    plant(preds, 0, (28, 36), (20, 20, 50, 51), 1, 0.8, 0.9)  # overlaps the other of its class
    assert sorted(postprocess(preds, torch.tensor([[64, 64]]))[0]["labels"].tolist()) == [0, 1]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = create_detector(
        "fcos", backbone="resnet10t", num_classes=3, channels=64, num_convs=1, min_size=64, max_size=128, prior=0.3
    )
    torch.nn.init.normal_(model.head.cls_logits.weight, std=0.5)
    return model.train()


def test_predict_takes_every_kind_of_image(model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    kinds = [tmp_path / "image.png", str(tmp_path / "image.png"), Image.fromarray(pixels), pixels, tensor, tensor / 255]
    wanted = predict(model, pixels)
    assert len(wanted) == 1 and len(wanted[0]["boxes"]) > 0
    for found in [predict(model, kind) for kind in kinds] + [[one] for one in predict(model, kinds)]:
        assert len(found) == 1
        for key in ("boxes", "scores", "labels"):
            torch.testing.assert_close(found[0][key], wanted[0][key])
    assert model.training  # as it came
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    torch.testing.assert_close(predict(model, grey), predict(model, np.stack([grey] * 3, axis=-1)))


def test_predict_is_in_original_pixels(model):
    image = torch.randint(0, 256, (3, 100, 300), dtype=torch.uint8)
    (found,) = predict(model, image, score_threshold=0.01)
    assert (found["boxes"] >= 0).all()
    assert (found["boxes"][:, 2] <= 300 + 1e-3).all() and (found["boxes"][:, 3] <= 100 + 1e-3).all()
    assert found["boxes"][:, 2].max() > 200  # beyond the 128 pixels the network saw
    assert (found["scores"].diff() <= 0).all()


def test_predict_follows_the_pixel_convention_of_the_model(model):
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)  # the network sees it in this size
    for plus_one, right_bottom in ((False, [96, 64]), (True, [95, 63])):
        detector = FCOS(**{**model.config, "plus_one": plus_one})
        torch.nn.init.constant_(detector.head.box_distances.bias, 20.0)  # all boxes are larger than the image
        (found,) = predict(detector, image, score_threshold=0.01)
        assert found["boxes"].amax(0).tolist() == [0, 0, *right_bottom]


def test_a_misspelt_option_is_an_error(model):
    with pytest.raises(TypeError, match="score_treshold"):
        predict(model, torch.zeros(3, 64, 64, dtype=torch.uint8), score_treshold=0.5)
    with pytest.raises(TypeError, match="score_treshold"):
        postprocess(blank(1, 64, 64, 3), [(64, 64)], score_treshold=0.5)


def test_detections_are_ordinary_tensors(model):
    """The user may change them in place, under autograd too, also if `predict` was called in the inference mode."""
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        (other,) = predict(model, image)
    for found in (predict(model, image)[0], other):
        assert not any(value.is_inference() or value.requires_grad for value in found.values())
        boxes = found["boxes"].clone()
        found["boxes"][:, 2:] -= found["boxes"][:, :2]
        assert len(boxes) > 0 and torch.equal(found["boxes"][:, 2:], boxes[:, 2:] - boxes[:, :2])
        weight = torch.ones(1, requires_grad=True)
        (weight * found["scores"]).sum().backward()
        assert weight.grad.item() == pytest.approx(found["scores"].sum().item())


def test_predict_does_not_depend_on_neighbours(model):
    images = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((64, 64), (40, 120), (200, 90))]
    together, alone = predict(model, images), [predict(model, image)[0] for image in images]
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((4, 5, 3), np.float32), "uint8"),
        (np.zeros((4, 5, 6, 3), np.uint8), r"\[H,W,3\]"),
        (torch.zeros(2, 8, 8), "1 or 3 channels"),
        (torch.zeros(3, 0, 8), "channels"),
        (torch.full((3, 8, 8), 255.0), "0..1"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "uint8 or floating"),
        ("no/such/file.jpg", "no/such/file.jpg"),
        ([3], "not int"),
    ],
)
def test_predict_rejects(model, image, message):
    with pytest.raises(ValueError, match=message):
        predict(model, image)
    assert model.training


def points_of(height, width):
    return make_points([(-(-height // s), -(-width // s)) for s in STRIDES], STRIDES, "cpu")


def blank(batch, height, width, classes):
    points, strides = points_of(height, width)
    n = len(points)
    return Predictions(
        torch.full((batch, n, classes), -10.0), torch.ones(batch, n, 4), torch.zeros(batch, n), points, strides
    )


def plant(preds, image, point, box, label, probability, centerness):
    at = preds.points.tolist().index(list(map(float, point)))
    x, y = point
    preds.logits[image, at, label] = torch.logit(torch.tensor(probability))
    preds.centerness[image, at] = torch.logit(torch.tensor(centerness))
    preds.distances[image, at] = torch.tensor([x - box[0], y - box[1], box[2] - x, box[3] - y]).float()
