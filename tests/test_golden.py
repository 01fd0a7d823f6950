"""The published models' numbers, reproduced. What the arrays mean: tests/golden/README.md.

Runs on the fixtures in tests/golden and, where they are, on those of `../shared/golden` or the folder that
VOVNET_ZOO_GOLDEN names.
"""

import functools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import FrozenBatchNormAct2d
from torchvision.ops import nms, sigmoid_focal_loss

import vovnet_zoo
from vovnet_zoo import convert
from vovnet_zoo.data import coco_to_xyxy, collate, hflip_boxes, normalize, resize_size
from vovnet_zoo.evaluation import to_coco_results
from vovnet_zoo.fcos import Predictions, make_points
from vovnet_zoo.loss import centerness_targets, iou_loss
from vovnet_zoo.vovnet import model_cfgs

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS / "golden"))
from deterministic_weights import state_dict_from_table  # noqa: E402

from optim import create_optimizer, set_lr  # noqa: E402
from presets import PRESETS  # noqa: E402

ARCHS = {name: cfg["block_per_stage"] for name, cfg in model_cfgs.items()}
FOLDERS = [TESTS / "golden", Path(os.environ.get("VOVNET_ZOO_GOLDEN", TESTS.parents[1] / "shared" / "golden"))]
FILES = {path.stem: path for folder in reversed(FOLDERS) for path in sorted(folder.glob("golden_*.safetensors"))}
DETECTORS = [name for name in FILES if name.startswith("golden_fcos_v")]
CLASSIFIERS = [name for name in FILES if name.startswith("golden_vovnet")]
# Training in float64 takes a minute a file: by default only of the smallest.
QUICK = "golden_fcos_v27_synthetic"
TRAINED = [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DETECTORS]

detectors = pytest.mark.parametrize("name", DETECTORS)
classifiers = pytest.mark.parametrize("name", CLASSIFIERS)
needs_ops = pytest.mark.skipif("golden_fcos_ops" not in FILES, reason="golden_fcos_ops.safetensors is not here")


@functools.cache
def golden(name):
    """Arrays of a file, its published weights, and what they convert to."""
    arrays = load_file(FILES[name])
    keys = FILES[name].with_name(name.replace("golden", "keys").replace("_synthetic", "") + ".json")
    published = state_dict_from_table(json.loads(keys.read_text()))
    converted = convert.convert(published, ARCHS)
    return SimpleNamespace(arrays=arrays, published=published, **converted._asdict())


@functools.cache
def detector(name):
    config = golden(name).config
    model = vovnet_zoo.create_detector(
        f"fcos_{config['backbone']}_fpn",
        variant="published",
        **{key: config[key] for key in ("num_classes", "image_mean", "image_std")},
    )
    model.load_state_dict(golden(name).state_dict, strict=True)
    return model.eval()


@functools.cache
def outputs(name, image):
    """Network input, backbone maps by name, and head outputs of one image."""
    model, arrays = detector(name), golden(name).arrays
    inputs, size = batch(name, [image])["inputs"], arrays[f"{image}/image_rgb_u8"].shape[:2]
    with torch.inference_mode():
        maps = {f"C{i + 1}": x for i, x in enumerate(model.backbone(inputs)) if i}
        features = model.forward_features(inputs)
        maps |= {f"P{i + 3}": x for i, x in enumerate(features)}
        head = [{f"P{i + 3}": x for i, x in enumerate(xs)} for xs in model.forward_head(features)]
        preds = model(inputs)
    return SimpleNamespace(inputs=inputs, size=torch.tensor([size]), maps=maps, head=head, preds=preds)


def batch(name, images, ground_truth=None):
    """Images of a file as `collate` and `normalize` make them, with the boxes of a training case."""
    arrays, config = golden(name).arrays, golden(name).config
    samples = []
    for i, image in enumerate(images):
        rgb = arrays[f"{image}/image_rgb_u8"].permute(2, 0, 1)
        boxes = arrays[f"{ground_truth}/gt{i}_boxes"] if ground_truth else torch.zeros(0, 4)
        labels = arrays[f"{ground_truth}/gt{i}_labels"] - 1 if ground_truth else torch.zeros(0, dtype=torch.int64)
        samples.append((rgb, dict(boxes=boxes, labels=labels, orig_size=rgb.shape[-2:], image_id=i)))
    out = collate(samples)
    out["inputs"] = normalize(out["images"], out["sizes"], config["image_mean"], config["image_std"])
    return out


def images_of(name):
    return sorted({key.split("/")[0] for key in golden(name).arrays if key.startswith("img") and "/C2/" in key})


def close(ours, theirs, rtol=0.0, atol=0.0, what=""):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=rtol, check_dtype=False, msg=lambda m: f"{what}: {m}")


def check_map(x, arrays, key):
    """Statistics over the whole map, and its first and last corner."""
    assert list(x.shape) == arrays[f"{key}/shape"].tolist()
    flat = x.double().flatten()
    place = torch.arange(len(flat), dtype=torch.float64).cos()
    stats = [flat.mean(), flat.std(correction=0), flat.sum(), flat.abs().sum(), flat @ place, flat.min(), flat.max()]
    scale = torch.tensor([1, 1, len(flat), len(flat), len(flat) ** 0.5, 1, 1])  # sums add up their terms' rounding
    close(torch.stack(stats) / scale, arrays[f"{key}/stats"] / scale, atol=2e-5, what=f"{key}/stats")
    c, h, w = (min(8, n) for n in x.shape[1:])
    close(x[0, :c, :h, :w], arrays[f"{key}/corner_tl"], atol=1e-4, what=f"{key}/corner_tl")
    close(x[0, -c:, -h:, -w:], arrays[f"{key}/corner_br"], atol=1e-4, what=f"{key}/corner_br")


def check_detections(ours, theirs, key):
    """As many, of the same classes, with boxes within 0.01 pixels."""
    boxes, scores, labels = (theirs[f"{key}/{part}"] for part in ("boxes", "scores", "labels"))
    assert len(ours["boxes"]) == len(boxes), key
    if len(boxes) == 0:
        return
    distance = (ours["boxes"][:, None] - boxes).abs().amax(-1)  # [N,N]
    distance += 1e6 * (ours["labels"][:, None] != labels - 1) + 1e3 * (ours["scores"][:, None] - scores).abs()
    nearest = distance.argmin(1)
    assert sorted(nearest.tolist()) == list(range(len(boxes))), key
    close(ours["boxes"], boxes[nearest], atol=0.01, what=key)
    close(ours["scores"], scores[nearest], atol=1e-5, what=key)
    assert torch.equal(ours["labels"], labels[nearest] - 1), key
    assert (ours["scores"].diff() <= 0).all(), f"{key}: best first"


@pytest.mark.parametrize("name", DETECTORS + CLASSIFIERS)
def test_weights_are_those_of_the_fixture(name):
    weights = [w.double() for w in golden(name).published.values()]
    sums = torch.stack([w.sum() for w in weights]), torch.stack([w.abs().sum() for w in weights])
    close(sums[0], golden(name).arrays["weights/sum"], rtol=1e-9, atol=1e-9)
    close(sums[1], golden(name).arrays["weights/abssum"], rtol=1e-9, atol=1e-9)


# ---- detectors: forward and detections


@detectors
def test_input(name):
    for image in images_of(name):
        if (key := f"{image}/input") in golden(name).arrays:
            published = golden(name).arrays[key].flip(1)  # BGR
            close(outputs(name, image).inputs, published, atol=1e-5, what=key)


@detectors
def test_features(name):
    for image in images_of(name):
        for level, x in outputs(name, image).maps.items():
            check_map(x, golden(name).arrays, f"{image}/{level}")


@detectors
def test_head(name):
    arrays = golden(name).arrays
    for image in images_of(name):
        cls, reg, ctr = outputs(name, image).head
        for level in cls:
            if (key := f"{image}/cls_logits/{level}") in arrays:
                close(cls[level][0], arrays[key], atol=1e-4, what=key)
            else:
                check_map(cls[level], arrays, key)
            close(reg[level][0], arrays[f"{image}/bbox_reg/{level}"], rtol=1e-5, atol=1e-4, what=level)
            close(ctr[level][0], arrays[f"{image}/centerness/{level}"], atol=1e-4, what=level)


@detectors
def test_locations(name):
    arrays, preds = golden(name).arrays, outputs(name, "img0").preds
    levels = preds.points.split(torch.unique_consecutive(preds.strides, return_counts=True)[1].tolist())
    for level, points in enumerate(levels, start=3):
        assert torch.equal(points, arrays[f"img0/locations/P{level}"])


@detectors
def test_detections(name):
    arrays = golden(name).arrays
    for image in images_of(name):
        out = outputs(name, image)
        (found,) = vovnet_zoo.postprocess(out.preds, out.size, plus_one=True)
        check_detections(found, arrays, f"{image}/det")
        if f"{image}/det_th002/boxes" in arrays:
            (low,) = vovnet_zoo.postprocess(out.preds, out.size, plus_one=True, score_threshold=0.02)
            check_detections(low, arrays, f"{image}/det_th002")

        (h, w), (width, height) = out.size[0].tolist(), arrays[f"{image}/orig_size_wh"].tolist()
        original = dict(found, boxes=found["boxes"] * torch.tensor([width / w, height / h]).repeat(2))
        theirs = {f"det/{part}": arrays[f"{image}/det/{part}"] for part in ("scores", "labels")}
        check_detections(original, theirs | {"det/boxes": arrays[f"{image}/det_orig/boxes_xyxy"]}, "det")
        rows = to_coco_results([original], [0], range(golden(name).config["num_classes"]), plus_one=True)
        xywh = dict(original, boxes=torch.tensor([row["bbox"] for row in rows]))
        check_detections(xywh, theirs | {"det/boxes": arrays[f"{image}/det_orig/boxes_xywh"]}, "det")


@detectors
def test_batch(name):
    arrays = golden(name).arrays
    if "batch/input_shape" not in arrays:
        pytest.skip("no batch in this file")
    data = batch(name, ["img0", "img1"])
    assert list(data["inputs"].shape) == arrays["batch/input_shape"].tolist()
    with torch.inference_mode():
        found = vovnet_zoo.postprocess(detector(name)(data["inputs"]), data["sizes"], plus_one=True)
    for i in range(2):
        check_detections(found[i], arrays, f"batch/det{i}")


# ---- detectors: training


def level_major(x, counts):
    """[B,P,...] -> [P*B,...] in the fixtures' order: level, image, location."""
    return torch.cat([part.flatten(0, 1) for part in x.split(counts, dim=1)])


def check_targets(targets, arrays, key, counts):
    labels = level_major(targets.labels, counts) + 1
    assert torch.equal(labels, arrays[f"{key}/labels"].long())
    positive = labels.nonzero()[:, 0]
    assert torch.equal(positive, arrays[f"{key}/pos_inds"].long())
    close(level_major(targets.distances, counts)[positive], arrays[f"{key}/pos_reg_targets"], atol=1e-5)
    per_level = torch.stack([(part >= 0).sum(1) for part in targets.labels.split(counts, dim=1)])
    assert torch.equal(per_level, arrays[f"{key}/num_pos_per_level"])
    if f"{key}/pos_centerness_targets" in arrays:
        close(level_major(targets.centerness, counts)[positive], arrays[f"{key}/pos_centerness_targets"], atol=1e-6)


def total(losses):
    return torch.stack([losses[key] for key in ("loss_cls", "loss_box", "loss_ctr")])


@detectors
def test_targets_and_losses(name):
    arrays = golden(name).arrays
    cases = sorted({key.split("/")[1] for key in arrays if key.startswith("train/")})
    assert cases, "no training case in this file"
    with torch.inference_mode():
        preds = detector(name)(batch(name, ["img0", "img1"], f"train/{cases[0]}")["inputs"])
    for case in cases:
        key, criterion = f"train/{case}", vovnet_zoo.FCOSLoss(variant="published")
        data = batch(name, ["img0", "img1"], key)
        targets = criterion.assign(preds.points, preds.strides, data["boxes"], data["labels"])
        check_targets(targets, arrays, key, arrays[f"{key}/num_locations_per_level"].tolist())
        losses = total(criterion(preds, data["boxes"], data["labels"]))
        close(losses.double(), arrays[f"{key}/losses"], rtol=1e-6, atol=1e-6, what=f"{key}/losses")


def by_published_name(name, tensors):
    """{our parameter: tensor} in the order and with the shapes of the published parameters."""
    table = convert.names("authors_detector", ARCHS[golden(name).arch])
    scales = {f"head.scales.{i}": x for i, x in enumerate(tensors["head.scales"])}
    trained = [key for key in golden(name).published if "/norm." not in key]
    return {key: (tensors | scales)[table[key]] for key in trained}


def norms(tensors):
    return torch.stack([x.norm() for x in tensors.values()])


def train(name, case, dtype, lr_steps):
    """The published loop; yields per iteration the losses [3], gradients and changes by published name, and lrs."""
    config = PRESETS["v39_1x"][1]
    model = vovnet_zoo.FCOS(**detector(name).config).to(dtype)
    model.load_state_dict(golden(name).state_dict, strict=True)
    criterion, optimizer = vovnet_zoo.FCOSLoss(variant="published"), create_optimizer(model, config)
    data = batch(name, ["img0", "img1"], f"train/{case}")
    inputs, boxes = data["inputs"].to(dtype), data["boxes"].to(dtype)
    for step in lr_steps:
        set_lr(optimizer, config, step)
        losses = total(criterion(model(inputs), boxes, data["labels"]))
        optimizer.zero_grad()
        losses.sum().backward()
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        gradients = by_published_name(name, {key: p.grad for key, p in model.named_parameters()})
        optimizer.step()
        changes = by_published_name(name, {key: p.detach() - before[key] for key, p in model.named_parameters()})
        yield losses.detach().double(), gradients, changes, sorted({group["lr"] for group in optimizer.param_groups})


@pytest.mark.parametrize("name", TRAINED)
def test_training_in_float64(name):
    """Gradients, one step without warm-up, and the losses after it."""
    arrays = golden(name).arrays
    (losses, gradients, changes, _), (after, *_) = train(name, "A", torch.float64, [500, 500])
    close(losses, arrays["train/A/f64/losses"], rtol=1e-6)
    close(norms(gradients), arrays["train/A/f64/grad_norms"], rtol=1e-6)
    close(norms(changes), arrays["train/A/f64/step_delta_norms"], rtol=1e-6)
    close(after, arrays["train/A/f64/losses_after_1_step"], rtol=1e-6)
    for key in (key for key in arrays if key.startswith("train/A/grad/")):
        ours = gradients[key.removeprefix("train/A/grad/")]
        if "stem_1/conv" in key:
            ours = ours[:8].flip(1)  # RGB -> BGR
        theirs = arrays[key].reshape(ours.shape)
        close(ours, theirs, atol=2e-3 * theirs.norm().item(), what=key)  # theirs is in float32


@pytest.mark.slow
@detectors
def test_training_loop_in_float64(name):
    """Three iterations with warm-up."""
    arrays = golden(name).arrays
    losses, _, _, lrs = zip(*train(name, "A", torch.float64, range(3)), strict=True)
    close(torch.stack(losses), arrays["train/A/f64/loop_losses"], rtol=1e-6)
    close(torch.tensor(lrs, dtype=torch.float64), arrays["train/A/loop_lrs"], rtol=1e-12)


@pytest.mark.slow
@detectors
def test_gradients_without_positives(name):
    """Case C, in float32 as published."""
    arrays = golden(name).arrays
    if "train/C/grad_norms" not in arrays:
        pytest.skip("no case C in this file")
    ((losses, gradients, _, _),) = train(name, "C", torch.float32, [500])
    close(losses, arrays["train/C/losses"], rtol=1e-6, atol=1e-6)
    close(norms(gradients).double(), arrays["train/C/grad_norms"], rtol=2e-3, atol=1e-6)


@detectors
def test_parameters_and_groups(name):
    """Which are trained, and how fast: the published optimizer has a group per parameter."""
    model, meta = detector(name), FILES[name].with_name(name.replace("golden", "meta") + ".json")
    if not meta.exists():
        pytest.skip("no meta file")
    facts = json.loads(meta.read_text())
    assert sum(p.numel() for p in model.parameters()) == facts["num_params_trainable"]
    optimizer, groups = create_optimizer(model, PRESETS["v39_1x"][1]), {}
    set_lr(optimizer, PRESETS["v39_1x"][1], 500)
    for group in optimizer.param_groups:
        assert (group["momentum"], group["nesterov"], group["dampening"]) == (0.9, False, 0)
        groups |= {id(p): (group["lr"], group["weight_decay"]) for p in group["params"]}
    ours = {key: groups[id(p)] for key, p in model.named_parameters()}
    ours |= {f"head.scales.{i}": ours["head.scales"] for i in range(5)}
    table = convert.names("authors_detector", ARCHS[golden(name).arch])
    assert facts["param_names"] == [key for key in golden(name).published if "/norm." not in key]
    for key, lr, decay in facts["optimizer"]["groups"]:
        assert ours[table[key]] == (lr, decay), key


# ---- single operations


@pytest.fixture(scope="module")
def ops():
    return load_file(FILES["golden_fcos_ops"])


@needs_ops
@pytest.mark.parametrize(
    "case, options",
    [
        ("default", {}),
        ("top50_per_level_keep20", dict(topk=50, max_detections=20)),
        ("nms03_th03", dict(nms_threshold=0.3, score_threshold=0.3)),
        ("none_above", dict(score_threshold=0.9999)),
    ],
)
def test_postprocess(ops, case, options):
    cls, reg, ctr = (
        [ops[f"post/in/{kind}/P{level}"] for level in range(3, 8)] for kind in ("cls_logits", "bbox_reg", "centerness")
    )
    points, strides = make_points([x.shape[-2:] for x in cls], [8, 16, 32, 64, 128], "cpu")
    preds = Predictions(
        torch.cat([x.flatten(2).transpose(1, 2) for x in cls], dim=1),
        torch.cat([x.flatten(2).transpose(1, 2) for x in reg], dim=1),
        torch.cat([x.flatten(1) for x in ctr], dim=1),
        points,
        strides,
    )
    found = vovnet_zoo.postprocess(preds, ops["post/in/image_sizes_hw"], plus_one=True, **options)
    for i in range(2):
        check_detections(found[i], ops, f"post/{case}/det{i}")


@needs_ops
@pytest.mark.parametrize("percent", [60, 50, 30])
def test_nms(ops, percent):
    """`postprocess` gives torchvision's NMS one pixel more at the end, in float64, and a threshold just below."""
    boxes = ops["nms/in/boxes"].double()
    boxes[:, 2:] += 1
    keep = nms(boxes, ops["nms/in/scores"].double(), float(np.nextafter(percent / 100, 0)))
    assert torch.equal(keep.sort().values, ops[f"nms/keep_{percent // 10:02d}"])


@needs_ops
def test_iou_loss(ops):
    pred = ops["iou_loss/in/pred"].clone().requires_grad_()
    losses = iou_loss(pred, ops["iou_loss/in/target"])
    weight = ops["iou_loss/in/weight"]
    weighted = (losses * weight).sum() / weight.sum()
    weighted.backward()
    close(weighted[None], ops["iou_loss/weighted"], rtol=1e-6)
    close(losses.mean()[None], ops["iou_loss/mean"], rtol=1e-6)
    close(pred.grad, ops["iou_loss/weighted_grad"], rtol=1e-5, atol=1e-8)


@needs_ops
def test_focal_loss(ops):
    logits = ops["focal/in/logits"].clone().requires_grad_()
    one_hot = F.one_hot(ops["focal/in/targets"].long(), 81)[:, 1:].float()
    losses = sigmoid_focal_loss(logits, one_hot, 0.25, 2.0)
    losses.sum().backward()
    # the published code takes log(1 - p) of a rounded p; ours works on the logits and loses nothing
    rounding = 2**-24 / (1 - logits.detach().double().sigmoid())
    assert ((losses - ops["focal/elementwise"]).abs() < rounding + 1e-5 * losses + 1e-7).all()
    assert ((logits.grad - ops["focal/grad"]).abs() < 2 * rounding + 1e-5 * logits.grad.abs() + 1e-7).all()
    close(losses.sum()[None], ops["focal/sum"], rtol=1e-6)


@needs_ops
def test_centerness_targets(ops):
    close(centerness_targets(ops["centerness/in/reg_targets"]), ops["centerness/targets"], rtol=1e-6)


@needs_ops
def test_assignment(ops):
    """800x1088, coordinates that hit the limits of the levels exactly."""
    sizes = ops["targets/level_hw"].tolist()
    points, strides = make_points(sizes, [8, 16, 32, 64, 128], "cpu")
    boxes = [ops[f"targets/in/gt{i}_boxes"] for i in range(2)]
    labels = [ops[f"targets/in/gt{i}_labels"] - 1 for i in range(2)]
    most = max(map(len, boxes))
    boxes = torch.stack([F.pad(x, (0, 0, 0, most - len(x))) for x in boxes])
    labels = torch.stack([F.pad(x, (0, most - len(x)), value=-1) for x in labels])
    targets = vovnet_zoo.assign_targets(points, strides, boxes, labels, center_radius=None, plus_one=True)
    check_targets(targets, ops, "targets", [h * w for h, w in sizes])


@needs_ops
def test_frozen_norm(ops):
    """timm's frozen norm has an eps; the converted weight takes it back."""
    weight, bias, mean, var = (ops[f"frozen_bn/in/{k}"] for k in ("weight", "bias", "running_mean", "running_var"))
    norm = FrozenBatchNormAct2d(8, apply_act=False)
    folded_weight, folded_var = convert.fold_eps(weight, var, "var")
    norm.load_state_dict(dict(weight=folded_weight, bias=bias, running_mean=mean, running_var=folded_var))
    assert norm.eps == convert.FROZEN_EPS
    close(norm(ops["frozen_bn/in/x"]), ops["frozen_bn/y"], rtol=1e-6, atol=1e-5)


@needs_ops
def test_annotations(ops):
    """COCO boxes -> corners -> clipped -> resized -> mirrored -> COCO."""
    width, height = ops["boxes/in/image_wh"].tolist()
    boxes, keep = coco_to_xyxy(ops["boxes/in/coco_xywh"].numpy(), height, width, plus_one=True)
    assert np.array_equal(boxes, ops["boxes/clipped_all"].numpy())
    assert np.array_equal(boxes[keep], ops["boxes/clipped"].numpy())
    new_width, new_height = ops["boxes/in/resized_wh"].tolist()
    resized = torch.from_numpy(boxes[keep]) * torch.tensor([new_width / width, new_height / height]).repeat(2)
    close(resized, ops["boxes/resized"], rtol=1e-6)
    flipped = hflip_boxes(ops["boxes/resized"], new_width, plus_one=True)
    close(flipped, ops["boxes/flipped"], rtol=1e-6, atol=1e-4)
    found = dict(boxes=ops["boxes/flipped"], scores=torch.ones(len(flipped)), labels=torch.zeros(len(flipped)).long())
    rows = to_coco_results([found], [0], [1], plus_one=True)
    close(torch.tensor([row["bbox"] for row in rows]), ops["boxes/flipped_xywh"], rtol=1e-6, atol=1e-4)


@needs_ops
@pytest.mark.parametrize("min_size", [800, 640])
def test_resize_table(ops, min_size):
    images, sizes = ops["resize/in/image_wh"].tolist(), ops[f"resize/out_hw_{min_size}_1333"].tolist()
    for (width, height), wanted in zip(images, sizes, strict=True):
        assert list(resize_size(height, width, min_size, 1333)) == wanted


def test_learning_rate_schedule():
    file = FOLDERS[1] / "lr_schedule.json"
    if not file.exists():
        pytest.skip("lr_schedule.json is not here")
    config = PRESETS["v39_1x"][1]
    optimizer = create_optimizer(detector(DETECTORS[0]), config)
    for step, weight_lr, bias_lr in json.loads(file.read_text())["fcos_v39"]["values"]:
        set_lr(optimizer, config, step)
        lrs = sorted({group["lr"] for group in optimizer.param_groups})
        assert lrs == pytest.approx([weight_lr, bias_lr], rel=1e-12), step


# ---- classifiers


@functools.cache
def classifier(name):
    model = timm.create_model(golden(name).arch)
    model.load_state_dict(golden(name).state_dict, strict=True)
    return model.eval()


@classifiers
@pytest.mark.parametrize("prefix, key", [("", "input"), ("odd/", "input_odd")])
def test_classifier(name, prefix, key):
    model, arrays = classifier(name), golden(name).arrays
    with torch.inference_mode():
        x = model.stem(arrays[key])
        check_map(x[:1], arrays, f"{prefix}stem")
        for i, stage in enumerate(model.stages, start=2):
            x = stage(x)
            check_map(x[:1], arrays, f"{prefix}stage{i}")
        close(model.forward_head(x, pre_logits=True), arrays[f"{prefix}pooled"], atol=1e-4)
        close(model(arrays[key]), arrays[f"{prefix}logits"], atol=1e-4)


@classifiers
def test_classifier_facts(name):
    file = FILES[name].with_name(name.replace("golden", "meta") + ".json")
    if not file.exists():
        pytest.skip("no meta file")
    model, facts = classifier(name), json.loads(file.read_text())
    assert sum(p.numel() for p in model.parameters()) == facts["params"]
    assert (
        sum(p.numel() for p in model.get_classifier().parameters())
        == facts["params"] - facts["params_without_classifier"]
    )


@classifiers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classifier_training(name, dtype):
    arrays, prefix = golden(name).arrays, "train_mode/f64/" if dtype == torch.float64 else "train_mode/"
    model = timm.create_model(golden(name).arch)
    model.load_state_dict(golden(name).state_dict, strict=True)
    logits = model.to(dtype)(arrays["input_odd"].to(dtype))
    loss = F.cross_entropy(logits, torch.tensor([7, 991]))
    loss.backward()
    table = convert.names("authors", ARCHS[golden(name).arch])
    trained = [key for key in golden(name).published if key.rsplit(".", 1)[-1] in ("weight", "bias")]
    gradients = {key: model.get_parameter(table[key]).grad for key in trained}
    exact = dtype == torch.float64
    close(loss[None], arrays[f"{prefix}ce_loss_targets_7_991"], rtol=1e-6 if exact else 1e-4)
    close(norms(gradients), arrays[f"{prefix}grad_norms"], rtol=1e-6 if exact else 1e-2, atol=1e-6)
    if not exact:
        close(logits, arrays["train_mode/logits"], atol=1e-3)
        for key in (key for key in arrays if key.startswith("train_mode/") and "/norm." in key):
            close(
                model.state_dict()[table[key.removeprefix("train_mode/")]], arrays[key], rtol=1e-5, atol=1e-5, what=key
            )
