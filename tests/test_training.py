"""The training recipe, run as users run it: `python recipes/train_coco.py` or torchrun, on a few tiny images."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from launch import fork, losses, rows, train, train_forked, train_here
from near import assert_same_detections

import eval_coco
import step as step_module
import train_coco
from build import build_model, load_start
from optim import create_optimizer, lr_factor, set_lr
from presets import PRESETS, TrainConfig
from run_folder import list_checkpoints, load_checkpoint, refuse_changes
from training_run import set_up
from vovnet_zoo import FCOS, create_detector, inference
from vovnet_zoo.backbone import depth_below_top
from vovnet_zoo.config import VARIANTS
from vovnet_zoo.fcos import shared_classes


def test_a_run_leaves_everything(tiny_coco, tmp_path, capsys):
    out = tmp_path / "run"
    printed = train(tiny_coco, out, "--steps 6 --eval-every 3 --workers 1")
    assert "red" in printed and "AP50" in printed
    assert re.findall(r"step (\d+): AP", printed) == ["3", "6"]  # as in metrics.jsonl, below
    assert re.search(r"step 6 of 6: loss .*, 0 s left", printed)
    for name in ("best", "last"):
        model = FCOS.from_pretrained(out / name)
        assert model.config["class_names"] == ["red", "green"] and model.config["min_size"] == 64
    assert (out / "curves.png").stat().st_size > 10_000 and (out / "detections.png").stat().st_size > 1000
    about = json.loads((out / "run.json").read_text())
    assert about["config"]["steps"] == 6 and about["starts"][0]["versions"]["torch"] == torch.__version__
    assert [row["step"] for row in rows(out) if "loss" in row] == list(range(1, 7))
    assert [row["step"] for row in rows(out) if "AP" in row] == [3, 6]
    first = rows(out)[0]
    assert {
        "loss_cls",
        "loss_box",
        "loss_ctr",
        "lr",
        "grad_norm",
        "images_per_s",
        "data_wait_s",
        "peak_memory_gib",
    } <= set(first)
    train_here(tiny_coco, out, "--steps 6 --eval-every 3 --workers 0")  # again: nothing left to do
    assert "trained" in capsys.readouterr().err
    assert len(losses(out)) == 6


def test_world_size_and_accumulation_change_nothing(tiny_coco, tmp_path):
    """8 steps with a global batch of 8: 1x8, 2x4, 4x2 and 1x(4, accumulated twice); batch norm frozen."""
    # Winograd starts at a size of a process's own batch, and rounds differently: 1e-6 grows over the steps
    options = "--no-winograd --steps 8 --batch-size 8 --frozen-norm --workers 0"
    options += " --optimizer momentum --lr 0.01 --warmup-steps 2"
    curves, weights = [], []
    for processes, accum in ((1, 1), (2, 1), (4, 1), (1, 2)):
        out, line = tmp_path / f"{processes}x{accum}", f"{options} --accum {accum}"
        train_here(tiny_coco, out, line) if processes == 1 else train_forked(tiny_coco, out, line, processes)
        curves.append(torch.tensor(losses(out)))
        weights.append(FCOS.from_pretrained(out / "last").state_dict())
    assert curves[0][0] > 1.2 * curves[0][-1]  # it learns
    for curve, weight in zip(curves[1:], weights[1:], strict=True):
        torch.testing.assert_close(curve, curves[0], rtol=1e-4, atol=0)
        torch.testing.assert_close(weight, weights[0], rtol=1e-3, atol=1e-5)


def run(data, out, **changes):
    """A few steps in this process."""
    config = TrainConfig(
        **{
            **dict(data=data, out=out, model="fcos", backbone="resnet10t", channels=64, num_convs=1, min_size=(64, 64)),
            **dict(max_size=96, test_size=64, batch_size=4, workers=0, steps=2, optimizer="adamw", device="cpu"),
            **changes,
        }
    )
    return train_coco.main(config)


def test_batches_without_boxes_train(tiny_coco, tmp_path):
    for split in ("train", "val"):
        file = tiny_coco / "annotations" / f"instances_{split}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": []}))
    run(tiny_coco, tmp_path / "run", steps=3)
    assert all(0 < loss < 100 for loss in losses(tmp_path / "run"))


def test_wrong_input_is_named(tiny_coco, tmp_path):
    with pytest.raises(ValueError, match="missing: no such folder"):
        run(tiny_coco / "missing", tmp_path / "a")
    with pytest.raises(ValueError, match="batch_size 3 cannot be shared out over 1 process x 2 parts"):
        run(tiny_coco, tmp_path / "b", batch_size=3, accum=2)
    (tiny_coco / "train" / "3.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="3.png"):
        run(tiny_coco, tmp_path / "c", steps=4)
    assert "3.png" in train(tiny_coco, tmp_path / "d", "--steps 4 --workers 1", fails=True)
    file = tiny_coco / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = "blue"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the splits have different classes"):
        run(tiny_coco, tmp_path / "e")


def test_another_run_is_refused(tiny_coco, tmp_path):
    out = tmp_path / "run"
    run(tiny_coco, out)
    with pytest.raises(ValueError, match="steps: was 2, now 4.*--allow-changes"):
        run(tiny_coco, out, steps=4)
    with pytest.raises(ValueError, match="lr: was 0.01, now 0.5"):
        run(tiny_coco, out, lr=0.5)
    file = tiny_coco / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"annotations": content["annotations"][1:]}))
    digits = r"\(SHA-256 [0-9a-f]{8}\.\.\)"
    was, now = (f"8 images and {count} boxes of {re.escape(str(file))} {digits}" for count in (14, 13))
    with pytest.raises(ValueError, match=f"train annotations: was {was}, now {now}.*give another --out"):
        run(tiny_coco, out)
    run(tiny_coco, out, steps=4, allow_changes=True)
    assert load_checkpoint(out / "checkpoints")["progress"]["step"] == 4
    assert len(list_checkpoints(out / "checkpoints")) == 2
    # a checkpoint of a version that did not describe its data
    old, new = ({"init": "None", "val annotations": "a" * 64 + words} for words in ("", " 3 images"))
    assert refuse_changes(old, new, TrainConfig(data=tiny_coco, out=out)) == []


def test_init_keeps_the_head_for_the_same_classes(tiny_coco, tmp_path):
    """Also where they have other numbers, or others are beside them: a class is known by its name."""
    start = create_detector(
        "fcos", backbone="resnet10t", channels=64, num_convs=1, num_classes=2, class_names=["a", "b"]
    )
    torch.nn.init.normal_(start.head.cls_logits.bias)
    start.save_pretrained(tmp_path / "start")
    config = TrainConfig(data=tiny_coco, out=tmp_path, init=str(tmp_path / "start"), test_size=96)
    same = build_model(config, ["a", "b"], [4, 9], load_start(config))
    assert same.config["min_size"] == 96 and same.config["category_ids"] == [4, 9]
    torch.testing.assert_close(same.state_dict(), start.state_dict())
    other = build_model(config, ["a", "b", "c"], [4, 9, 10], load_start(config))
    assert other.head.cls_logits.out_channels == 3
    torch.testing.assert_close(other.head.box_distances.weight, start.head.box_distances.weight)
    assert (
        other.head.cls_logits.bias[:2].equal(start.head.cls_logits.bias)
        and shared_classes(start.class_names, ["c"]) == []
    )
    turned = build_model(config, ["b", "a"], [4, 9], load_start(config))
    torch.testing.assert_close(turned.head.cls_logits.weight, start.head.cls_logits.weight.flip(0), rtol=0, atol=0)
    fewer = build_model(config, ["b"], [4], load_start(config))
    torch.testing.assert_close(fewer.head.cls_logits.bias, start.head.cls_logits.bias[1:], rtol=0, atol=0)


def test_init_keeps_the_conventions_of_the_detector(tiny_coco, tmp_path):
    """Data, loss and the saved model follow the published conventions, and another --variant is refused."""
    kwargs = dict(backbone="resnet10t", channels=64, num_convs=1, num_classes=2, class_names=["red", "green"])
    create_detector("fcos", variant="published", **kwargs).save_pretrained(tmp_path / "start")
    changes = dict(data=tiny_coco, init=str(tmp_path / "start"), test_size=64, workers=0, steps=2, device="cpu")
    config = TrainConfig(out=tmp_path / "run", **changes)
    run = set_up(config, 0, 1, torch.device("cpu"))
    assert run.model.config.items() >= VARIANTS["published"].items()
    assert run.criterion.plus_one and run.criterion.box_loss == "iou" and run.criterion.center_radius is None
    for dataset in (run.train_set, run.val_set):
        assert (dataset._boxes[:, 2] - dataset._boxes[:, 0] == 19).all()  # 20 pixels wide

    wrong = dataclasses.replace(config, variant="improved")
    with pytest.raises(ValueError, match="--variant improved does not fit --init .* plus_one=True, not False.*leave"):
        train_coco.main(wrong)
    load_start(dataclasses.replace(config, variant="published"))  # says what the detector is


def test_published_schedules():
    """Learning rates of weights and biases, and weight decay, as published (legacy V-39 1x and the two 2x)."""
    config = PRESETS["v39_1x"][1]
    values = {0: 1 / 3, 499: 1 / 3, 500: 1, 59_999: 1, 60_000: 0.1, 79_999: 0.1, 80_000: 0.01, 89_999: 0.01}
    for step, factor in values.items():
        assert lr_factor(config, step) == pytest.approx(factor, rel=1e-12)
    for name in ("v57_2x", "v93_2x"):
        config = PRESETS[name][1]
        assert (config.steps, config.milestones) == (180_000, (120_000, 160_000))
        assert lr_factor(config, 0) == pytest.approx(1 / 3) and lr_factor(config, 250) == pytest.approx(2 / 3)
        assert lr_factor(config, 500) == 1 and lr_factor(config, 160_000) == pytest.approx(0.01)
    for name in ("v39_1x", "v57_2x", "v93_2x"):
        config = PRESETS[name][1]
        assert (config.batch_size, config.min_size, config.max_size, config.test_size) == (16, (640, 800), 1333, 800)
        assert (config.lr, config.weight_decay, config.bias_lr_factor) == (0.01, 1e-4, 2.0)
        assert config.frozen_norm and config.drop_empty and config.augment == "flip" and config.variant == "published"
    model = create_detector("fcos", backbone="resnet10t", channels=64, num_convs=1, variant="published")
    optimizer = create_optimizer(model, PRESETS["v39_1x"][1])
    assert type(optimizer) is torch.optim.SGD
    set_lr(optimizer, PRESETS["v39_1x"][1], 60_000)
    names = {id(p): name for name, p in model.named_parameters()}
    seen = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert seen.keys() == dict(model.named_parameters()).keys()
    for name, group in seen.items():
        bias = "bias" in name
        assert group["lr"] == pytest.approx(0.002 if bias else 0.001) and group["weight_decay"] == (0 if bias else 1e-4)
        assert group["momentum"] == 0.9 and not group["nesterov"]


def test_layer_decay():
    model = create_detector("fcos", backbone="resnet10t", channels=64, num_convs=1)
    config = TrainConfig(data=Path(), out=Path(), layer_decay=0.5)
    factors = {id(p): g["lr_factor"] for g in create_optimizer(model, config).param_groups for p in g["params"]}
    assert factors[id(model.backbone.layer4[0].conv1.weight)] == 0.5
    assert factors[id(model.backbone.layer3[0].conv1.weight)] == 0.25
    assert factors[id(model.head.cls_logits.weight)] == 1


@pytest.mark.parametrize(
    "backbone, depths",
    [
        ("resnet18", {"conv1": 5, "bn1": 5, "layer1": 4, "layer4": 1}),  # act1 and maxpool have no weights to train
        ("vgg11", {"features_0": 8, "features_3": 7, "features_18": 1}),
        ("efficientnet_lite0", {"conv_stem": 8, "bn1": 8, "blocks.0": 7, "blocks.6": 1}),
        ("twins_svt_small", {"model.patch_embeds.0": 5, "model.blocks.0": 4, "model.blocks.3": 1}),
        ("vovnet27_slim", {"stem_0": 7, "stem_1": 6, "stem_2": 5, "stages_0": 4, "stages_3": 1}),
    ],
)
def test_layer_decay_counts_parts_with_weights(backbone, depths):
    with torch.device("meta"):
        body = timm.create_model(backbone, features_only=True)
    found = depth_below_top(body)
    assert found.keys() == {name for name, _ in body.named_parameters()}
    for part, depth in depths.items():
        assert {d for name, d in found.items() if name.startswith(f"{part}.")} == {depth}


def evaluate(rank, config):
    eval_coco.main(config)


def test_evaluation_is_shared_out(tiny_coco, tmp_path):
    run(tiny_coco, tmp_path / "run")
    found = []
    edit = json.loads((tiny_coco / "annotations" / "instances_val.json").read_text())
    edit["annotations"].append({**edit["annotations"][0], "id": 99, "image_id": 99})  # left out, with a warning
    (tiny_coco / "annotations" / "instances_val.json").write_text(json.dumps(edit))
    for processes, batch_size in ((1, 1), (4, 1), (2, 16)):  # 3 images: one of four processes has none
        out = tmp_path / f"detections{processes}.json"
        config = eval_coco.EvalConfig(
            model=str(tmp_path / "run" / "last"), data=tiny_coco, out=out, batch_size=batch_size, device="cpu"
        )
        printed = fork(processes, evaluate, config)
        assert printed.count("annotations dropped or changed") == 1  # not once for each process
        found.append(sorted(json.loads(out.read_text()), key=lambda r: (r["image_id"], -r["score"], r["bbox"])))
    assert found[0] == found[1]
    assert_same_detections(*(detections_of(rows) for rows in found[1:]), size=96)
    assert {row["category_id"] for row in found[0]} <= {7, 12} and {row["image_id"] for row in found[0]} == {10, 11, 12}


def detections_of(rows):
    """Turn COCO result rows into the detections of one image, with the image's id in the label."""
    labels = torch.tensor([1000 * row["image_id"] + row["category_id"] for row in rows])
    return {
        "boxes": torch.tensor([x["bbox"] for x in rows]),
        "scores": torch.tensor([x["score"] for x in rows]),
        "labels": labels,
    }


def test_bad_images_are_skipped_and_counted(tiny_coco, tmp_path, capsys):
    (tiny_coco / "train" / "3.png").write_bytes(b"not a picture")
    train_here(tiny_coco, tmp_path / "run", "--steps 4 --workers 0 --skip-bad-images")
    printed = capsys.readouterr().err
    assert "image 13 skipped" in printed and "3.png" in printed
    listed = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert len(listed) == 2  # 16 images seen, 8 there are
    assert len(losses(tmp_path / "run")) == 4


def test_a_loss_that_is_not_finite(tiny_coco, tmp_path):
    """Weights stay as they were, the batch is written down, and after so many in a row the run stops."""
    out = tmp_path / "run"
    options = "--steps 9 --workers 0 --optimizer momentum --lr 1e30 --warmup-steps 0 --max-not-finite 3"
    with pytest.raises(RuntimeError, match="3 steps in a row were not finite") as error:
        train_here(tiny_coco, out, options)
    dumps = sorted((out / "not_finite").glob("*.json"))
    assert len(dumps) == 3 and str(dumps[-1]) in str(error.value)
    batch = json.loads(dumps[0].read_text())["batch"][0]
    assert len(batch["image_ids"]) == 4 and len(batch["boxes"]) == 4 and batch["shape"][:2] == [4, 3]


def test_a_skipped_step_leaves_no_trace_in_batch_norm(tiny_coco, tmp_path, monkeypatch):
    real = train_coco.update

    def update(run, step, parts, losses, grad_norm):
        if step == 1:
            run.model.backbone.bn1.running_mean.fill_(float("nan"))
            losses["loss_box"] = float("nan")
        return real(run, step, parts, losses, grad_norm)

    monkeypatch.setattr(train_coco, "update", update)
    run(tiny_coco, tmp_path / "run", steps=3, ema=0.5)
    model = FCOS.from_pretrained(tmp_path / "run" / "last")
    assert all(x.isfinite().all() for x in model.state_dict().values())
    assert [path.name for path in (tmp_path / "run" / "not_finite").iterdir()] == [
        "step00000002-rank0.json"
    ]  # the second step


@pytest.mark.parametrize("precision", ["float32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_compiled_training_is_the_same(tiny_coco, tmp_path, monkeypatch, capsys, precision):
    """One graph, Winograd convolutions and checkpointing lead to the losses of the plain run."""
    run(tiny_coco, tmp_path / "plain", steps=4, precision=precision, frozen_norm=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend="eager", fullgraph=True))
    monkeypatch.setattr(step_module, "compiled", functools.cache(step_module.compiled.__wrapped__))
    monkeypatch.setattr(inference, "compiled_network", functools.cache(inference.compiled_network.__wrapped__))
    fast = dict(compile=True, winograd=True, grad_checkpointing=True, frozen_norm=True)
    run(tiny_coco, tmp_path / "fast", steps=4, precision=precision, **fast)
    plain, fast = (torch.tensor(losses(tmp_path / name)) for name in ("plain", "fast"))
    if precision == "float32":
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=0)
    torch.testing.assert_close(fast[0], plain[0], rtol=0.02, atol=0)  # later, bf16's rounding has grown
    assert re.search(r"torch.compile made \d+ graphs, with 0 breaks", capsys.readouterr().err)
    assert FCOS.from_pretrained(tmp_path / "fast" / "best").config["num_classes"] == 2
