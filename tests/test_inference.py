import io

import numpy as np
import pytest
import torch
from PIL import Image
from samples import make_confident_detector
from torchvision.ops import batched_nms

from vovnet_zoo import FCOS, Predictions, compile_detector, postprocess, precision, predict
from vovnet_zoo.fcos import make_points
from vovnet_zoo.inference import choose_best

STRIDES = [8, 16, 32, 64, 128]
BLANK = torch.zeros(3, 64, 64, dtype=torch.uint8)


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


def test_levels_chosen_from_together():
    """As on a GPU: the same scores and indices as level by level; places without a candidate, -1, may be any."""
    scores = [torch.rand(2, n).where(torch.rand(2, n) < 0.5, -1.0) for n in (400, 100, 30, 9, 4)]
    for most in (1, 20, 1000):
        pairs = zip(choose_best(scores, most, together=True), choose_best(scores, most, together=False), strict=True)
        for score, (got, wanted) in zip(scores, pairs, strict=True):
            assert torch.equal(got[0], wanted[0]) and got[1].amax() < score.shape[1]
            assert torch.equal(got[1].where(got[0] >= 0, 0), wanted[1].where(got[0] >= 0, 0))


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
        with pytest.raises(ValueError, match="image_sizes must be .* each of 1 image"):
            postprocess(preds, wrong)


def test_score_threshold_is_compared_with_the_returned_score():
    """A probable class at a bad centre scores less than one that is less probable at a good centre."""
    preds = blank(1, 128, 160, 3)
    plant(preds, 0, (36, 36), (20, 20, 50, 50), 0, probability=0.9, centerness=0.016)  # scores 0.12
    plant(preds, 0, (100, 60), (90, 40, 130, 90), 1, probability=0.25, centerness=0.81)  # scores 0.45
    plant(preds, 0, (100, 100), (90, 90, 130, 120), 2, probability=0.04, centerness=0.99)  # scores 0.2, no candidate
    sizes = [(128, 160)]
    scores = {name: postprocess(preds, sizes, **options)[0]["scores"] for name, options in {
        "all": dict(candidate_threshold=0.0), "default": {}, "0.3": dict(score_threshold=0.3),
        "none": dict(score_threshold=0.46), "each": dict(score_threshold=torch.tensor([0.1, 0.5, 0.0])),
    }.items()}  # fmt: skip
    assert scores["all"][:3].tolist() == pytest.approx([0.45, 0.199, 0.12], abs=1e-3)
    assert scores["default"].tolist() == pytest.approx([0.45, 0.12], abs=1e-3)
    assert scores["0.3"].tolist() == pytest.approx([0.45], abs=1e-3) and scores["none"].tolist() == []
    assert scores["each"].tolist() == pytest.approx([0.12], abs=1e-3)
    best = scores["default"][0].item()
    assert len(postprocess(preds, sizes, score_threshold=best)[0]["scores"]) == 1  # at least this, so itself too
    for wrong, message in ((torch.ones(2), r"tensor \[3\], got \[2\]"), ({"cat": 0.5}, "by class name")):
        with pytest.raises(ValueError, match=message):
            postprocess(preds, sizes, score_threshold=wrong)


def test_a_class_with_a_high_threshold_takes_no_places_of_others():
    """Neither among the candidates of a level nor among the detections of an image."""
    preds = blank(1, 64, 64, 2)
    for i in range(6):
        plant(preds, 0, (4 + 8 * i, 4), (8 * i, 0, 8 * i + 8, 8), 0, 0.8, 0.8)
        plant(preds, 0, (4 + 8 * i, 20), (8 * i, 16, 8 * i + 8, 24), 1, 0.5, 0.5)
    for limit in ("topk", "max_detections"):
        (found,) = postprocess(preds, [(64, 64)], score_threshold=torch.tensor([0.9, 0.4]), **{limit: 4})
        assert found["labels"].tolist() == [1] * 4


def test_same_box_of_two_classes_survives_nms():
    preds = blank(1, 64, 64, 3)
    for label in (0, 1):
        plant(preds, 0, (36, 36), (20, 20, 50, 50), label, 0.9, 0.9)
    plant(preds, 0, (28, 36), (20, 20, 50, 51), 1, 0.8, 0.9)  # overlaps the other of its class
    assert sorted(postprocess(preds, torch.tensor([[64, 64]]))[0]["labels"].tolist()) == [0, 1]


@pytest.fixture(scope="module")
def model():
    return make_confident_detector().train()


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
    (found,) = predict(model, image, candidate_threshold=0.01)
    assert (found["boxes"] >= 0).all()
    assert (found["boxes"][:, 2] <= 300).all() and (found["boxes"][:, 3] <= 100).all()
    assert found["boxes"][:, 2].max() > 200  # beyond the 128 pixels the network saw
    assert (found["scores"].diff() <= 0).all()


def test_predict_follows_the_pixel_convention_of_the_model(model):
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)  # the network sees it in this size
    for plus_one, right_bottom in ((False, [96, 64]), (True, [95, 63])):
        detector = FCOS(**{**model.config, "plus_one": plus_one})
        torch.nn.init.constant_(detector.head.box_distances.bias, 20.0)  # all boxes are larger than the image
        (found,) = predict(detector, image, candidate_threshold=0.01)
        assert found["boxes"].amax(0).tolist() == [0, 0, *right_bottom]


def test_no_box_ends_beyond_the_image(model):
    """The network sees this image 70 pixels wide, and 70 * (72 / 70) is more than 72 in float32."""
    torch.nn.init.constant_((detector := FCOS(**model.config)).head.box_distances.bias, 20.0)
    for flip in (False, True):
        (found,) = predict(detector, torch.zeros(3, 65, 72, dtype=torch.uint8), flip=flip, candidate_threshold=0.01)
        assert found["boxes"].unique(dim=0).tolist() == [[0, 0, 72, 65]]


def test_a_misspelt_option_is_an_error(model):
    with pytest.raises(TypeError, match="predict has no 'score_treshold'; there are .*score_threshold.*batch_size"):
        predict(model, torch.zeros(3, 64, 64, dtype=torch.uint8), score_treshold=0.5)
    for call in (
        lambda: postprocess(blank(1, 64, 64, 3), [(64, 64)], score_treshold=0.5),
        lambda: compile_detector(model, (64, 64), score_treshold=0.5),
    ):
        with pytest.raises(TypeError, match="Thresholds has no 'score_treshold'; there are score_threshold"):
            call()


def test_a_name_instead_of_a_model():
    with pytest.raises(
        ValueError, match=r"model must be a vovnet_zoo.FCOS, got str; vovnet_zoo.load_detector\('runs/x'\) loads one"
    ):
        predict("runs/x", BLANK)


def test_thresholds_by_class_name(model):
    """They come with the call or with the model's config, and the call wins."""
    detector = FCOS(**{**model.config, "class_names": ["cat", "dog", "cow"]})
    detector.load_state_dict(model.state_dict())
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    (found,) = predict(detector, image, max_detections=1000)
    scores = [found["scores"][found["labels"] == label] for label in range(3)]
    assert min(map(len, scores)) > 1
    thresholds = {"cat": scores[0].max().item(), "cow": 1.0}
    wanted = [1, len(scores[1]), 0]
    options = dict(max_detections=1000, score_threshold=thresholds)
    assert predict(detector, image, **options)[0]["labels"].bincount(minlength=3).tolist() == wanted
    stored = FCOS(**{**detector.config, "thresholds": thresholds})
    stored.load_state_dict(model.state_dict())
    assert predict(stored, image, max_detections=1000)[0]["labels"].bincount(minlength=3).tolist() == wanted
    torch.testing.assert_close(predict(stored, image, max_detections=1000, score_threshold=0.0), [found])
    fast = compile_detector(stored, (64, 64), backend="eager", max_detections=1000, winograd=False)
    assert fast(image[None]).labels[0].add(1).bincount(minlength=4)[1:].tolist() == wanted
    strict = FCOS(**{**stored.config, "score_threshold": 1.0})  # counts for the class that is not named
    strict.load_state_dict(model.state_dict())
    only_cat = [wanted[0], 0, 0]
    assert predict(strict, image, max_detections=1000)[0]["labels"].bincount(minlength=3).tolist() == only_cat
    torch.testing.assert_close(predict(strict, image, max_detections=1000, score_threshold=0.0), [found])
    for wrong, message in (({"pig": 0.5}, "no class 'pig'; .* cat, dog, cow"), ({"cat": 1.5}, r"\['cat'\]=1.5")):
        with pytest.raises(ValueError, match=message):
            predict(detector, image, score_threshold=wrong)
        with pytest.raises(ValueError, match=message):
            FCOS(**{**detector.config, "thresholds": wrong})
    with pytest.raises(ValueError, match="no class_names"):
        predict(model, image, score_threshold={"cat": 0.5})


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
        moved = found.to("meta")
        assert {value.device.type for value in moved.values()} == {"meta"} and found["boxes"].device.type == "cpu"
        assert type(moved) is type(found) and vars(moved) == vars(found)


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
        ([BLANK, None], r"^images\[1\]: an image must be .*, not NoneType"),
        ([BLANK, np.zeros((4, 5, 4), np.uint8)], r"^image 1: an image array .* got uint8 \[4, 5, 4\]"),
        ([BLANK, BLANK.float() + 2], "^image 1: a floating point image must be in 0..1"),
        (torch.zeros(3, 8, 8).to_sparse(), "^image 0: an image tensor must hold every pixel, got .*sparse"),
        (torch.zeros(3, 8, 8, device="meta"), "^image 0: an image tensor must hold every pixel, got .*meta"),
        ("", "the path of an image is empty"),
        (io.BytesIO(b"x"), "not BytesIO; PIL.Image.open reads an open file"),
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


@pytest.mark.parametrize("fast, better", [(True, "give bf16 (bfloat16), which this CPU"), (False, "give float32")])
def test_a_precision_that_a_cpu_is_slow_in_is_said(tiny_detector, caplog, monkeypatch, fast, better):
    """Once in a process for each, however often it predicts; nothing is said of bfloat16 where the CPU has it."""
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: fast)
    precision._warn_of_float16.cache_clear()
    precision._warn_of_bfloat16.cache_clear()
    for _ in range(2):
        for name in ("float32", "bf16", "fp16"):
            predict(tiny_detector, BLANK, precision=name)
        compile_detector(tiny_detector, (64, 64), torch.float16, winograd=False, backend="eager")
    *of_bf16, line = caplog.messages
    assert line.startswith("fp16 (float16) is slower on a CPU than float32") and better in line
    assert len(of_bf16) == (0 if fast else 1) and all(x.startswith("bf16 (bfloat16) is several") for x in of_bf16)
