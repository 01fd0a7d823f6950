"""Every public function is called with wrong types, wrong shapes and numbers out of range, one argument at a time.

`ValueError` or `TypeError` must come, with a message that names the argument. `make_table` lists the wrong values of
each argument; a function or argument that is new to the library and not in the table fails a test.
"""

import copy
import inspect
import json
import re
import reprlib
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torchvision
from huggingface_hub import ModelCard
from samples import box, make_coco
from torch import nn

import vovnet_zoo
from vovnet_zoo import convert, detectors, evaluation, kernels, nms, publish
from vovnet_zoo.data import CocoDataset
from vovnet_zoo.draw import draw_detections
from vovnet_zoo.hub import StrictHubMixin
from vovnet_zoo.kernels import freeze, osa, winograd

NAN, INF = float("nan"), float("inf")
NOT_A_FLAG = ["yes", 2, None]
NOT_A_TEXT = [5, None, ["a"], b"a"]
NOT_A_PATH = [5, None, ["a"]]
NOT_A_TENSOR = [None, 3, "x", [[1.0]], np.zeros(3)]
NOT_A_SHARE = [-0.1, 1.1, NAN, INF, "x", None, True, [0.5]]
NOT_A_COUNT = [0, -1, 1.5, NAN, 10**12, "x", None, True]
NOT_A_MODEL = [None, "model", 3]
RADII = [0, -1, NAN, INF, "x", True]


@dataclass
class Row:
    """A function, arguments that are right, and wrong values of each argument."""

    call: object
    right: dict
    wrong: dict
    words: dict = field(default_factory=dict)  # what stands for an argument's name in a message, where it is no name
    unchecked: tuple = ()  # arguments that this walk leaves out
    works: bool = True  # the right arguments can be tried here


def thresholds():
    shares = dict.fromkeys(("score_threshold", "candidate_threshold", "nms_threshold"), NOT_A_SHARE)
    return {**shares, "topk": NOT_A_COUNT, "max_detections": NOT_A_COUNT}


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def make_table(model, folder, coco) -> dict[str, Row]:
    images = zeros(1, 3, 64, 64)
    with torch.no_grad():
        preds, features = model(images), model.forward_features(images)
    wrong_preds = [
        None, tuple(preds), list(preds), preds.logits,
        preds._replace(logits=preds.logits[0]), preds._replace(distances=preds.distances[..., :3]),
        preds._replace(centerness=preds.centerness[:, 1:]), preds._replace(points=preds.points[1:]),
        preds._replace(strides=preds.strides[1:]), preds._replace(logits=preds.logits.long()),
    ]  # fmt: skip
    hub_options = dict(
        force_download=NOT_A_FLAG,
        token=[5, ["a"]],
        cache_dir=[5, ["a"]],
        local_files_only=NOT_A_FLAG,
        revision=[5, ["a"]],
        map_location=["nosuch", None, ["cpu"], "cpu:x"],
    )
    boxes, labels = torch.tensor([[[10.0, 10, 50, 50]]]), torch.tensor([[1]])
    wrong_boxes = [*NOT_A_TENSOR, [boxes[0]], zeros(1, 4), zeros(1, 1, 5), zeros(1, 2, 4)]
    wrong_labels = [*NOT_A_TENSOR, [labels[0]], labels.float(), labels[0], labels > 0, zeros(1, 2, dtype=torch.int64)]
    criterion = vovnet_zoo.FCOSLoss.of(model)
    targets = criterion.assign(preds.points, preds.strides, boxes, labels)
    wrapped = nn.DataParallel(model)
    models = [*NOT_A_MODEL, nn.Linear(2, 2), wrapped, vovnet_zoo.FCOS]
    variant = {"variant": ["best", 5, ["improved"], zeros(2)]}
    loss_options = {
        "plus_one": NOT_A_FLAG,
        "add_images": NOT_A_FLAG,
        "center_radius": RADII,
        "box_loss": ["l1", None, 5, ["giou"]],
        "matching": ["improved", None, 5, ["paper"]],
        "weigh_boxes": NOT_A_FLAG,
    }
    detector_options = {
        **loss_options,
        "class_names": ["cat", 5, ["a"], ["a", 5], {"a": 1, "b": 2}],
        "channels": [0, -64, 100, 32, 64.0, "x", None, True, 10**9],
        "num_convs": [-1, 1.5, "x", None, 10**6],
        "distance": ["softplus", None, 5],
        "centerness_on": ["both", None, 5],
        "frozen_norm": NOT_A_FLAG,
        "prior": [0, 1, -0.1, NAN, "x", None, True],
        "image_mean": [0.5, "abc", [0.5], [0.5, 0.5, NAN], ["a", "b", "c"]],
        "image_std": [0, [0, 1, 1], [1, 1], "abc", [1, 1, INF]],
        "min_size": NOT_A_COUNT,
        "max_size": NOT_A_COUNT,
        "thresholds": [5, "x", {"nosuch": 0.5}],
        "category_ids": ["ab", 5, [1], [1, 1], [1, -1], [1, 1.5], [1, True], {1: 2, 3: 4}],
        "resize": ["none", None, 5],
        "points": ["middle", None, 5],
        "keep_empty": NOT_A_FLAG,
        **thresholds(),
    }
    numbers = {"num_classes": [0, -1, 1.5, NAN, "x", 10**9, True]}
    backbone = {"backbone": [5, ["vovnet39"], "nosuchmodel"]}
    small = dict(channels=64, num_convs=0, min_size=64)
    detection = {"boxes": boxes[0], "scores": torch.tensor([0.5]), "labels": labels[0]}
    rows = [{"image_id": 1, "category_id": 7, "bbox": [1.0, 2.0, 3.0, 4.0], "score": 0.5}]
    wrong_rows = [None, "x", 5, [5], [{}], [{**rows[0], "bbox": [1, 2]}], [{**rows[0], "score": "x"}],
                  [{**rows[0], "image_id": "x"}], [{**rows[0], "category_id": None}]]  # fmt: skip
    wrong_ids = [None, 5, "12", ["x"], [1.5], {1: 2}]
    x, weight = torch.randn(1, 32, 16, 16), torch.randn(32, 32, 3, 3)
    pixels = zeros(1, 3, 64, 64, dtype=torch.uint8)
    files = coco, coco / "instances.json"
    nms_wrong = {"threshold": NOT_A_SHARE, "max_detections": NOT_A_COUNT, "plus_one": NOT_A_FLAG}
    load = vovnet_zoo.FCOS.from_pretrained

    return {
        # ---- vovnet_zoo
        "FCOS": Row(
            vovnet_zoo.FCOS,
            dict(backbone="vovnet27_slim", num_classes=2, **small),
            {**backbone, **numbers, **detector_options},
        ),
        "FCOS.forward": Row(
            model,
            dict(images=images),
            dict(images=[*NOT_A_TENSOR, images[0], images[:, :1], pixels]),
        ),
        "FCOS.forward_features": Row(
            model.forward_features, dict(images=images), dict(images=[*NOT_A_TENSOR, images[0], images[:, :1], pixels])
        ),
        "FCOS.forward_head": Row(
            model.forward_head,
            dict(features=features),
            dict(features=[None, 5, features[0], features[:4], [x[0] for x in features], [x[:, :5] for x in features]]),
        ),
        "FCOS.reset_classifier": Row(
            copy.deepcopy(model).reset_classifier,
            dict(num_classes=2, class_names=["cat", "owl"], category_ids=[3, 4]),
            dict(
                num_classes=[*numbers["num_classes"], 3],
                class_names=["cat", ["a"], [1, 2]],
                category_ids=["12", [1], [1, 1]],
            ),
        ),
        "FCOS.group_matcher": Row(model.group_matcher, {}, dict(coarse=NOT_A_FLAG)),
        "FCOS.set_grad_checkpointing": Row(
            model.set_grad_checkpointing,
            dict(enable=False),
            dict(enable=[*NOT_A_FLAG, True]),
            {"enable": "enable|checkpoint"},
        ),
        "FCOS.from_pretrained": Row(
            load,
            dict(pretrained_model_name_or_path=folder),
            dict(
                pretrained_model_name_or_path=[5, None, ["a"], "no/such/folder", "./nosuch", "/nosuch", folder.parent],
                **hub_options,
            ),
            {
                "pretrained_model_name_or_path": r"pretrained_model_name_or_path|folder|has no config.json",
                "enable": "checkpointing",
            },
            unchecked=("model_kwargs",),
        ),  # fmt: skip
        "FCOS.save_pretrained": Row(
            model.save_pretrained,
            dict(save_directory=folder.parent / "again"),
            dict(save_directory=NOT_A_PATH),
            unchecked=("kwargs",),
        ),
        "FCOS.push_to_hub": Row(
            model.push_to_hub,
            dict(repo_id="a/b"),
            dict(repo_id=[*NOT_A_TEXT, "a/b/c", "a b"]),
            {"repo_id": "(?i)repo[_ ]id"},
            unchecked=("kwargs",),
            works=False,
        ),
        "FCOS.make_points": Row(
            model.make_points,
            dict(sizes=[(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)], input_size=(64, 64), device="cpu"),
            dict(sizes=[None, 5, "abcde", [(8, 8)], [8] * 5, [(8,)] * 5], input_size=[None, 64, "64", (64,)]),
            unchecked=("device",),
        ),
        "FCOS.complete_config": Row(model.complete_config, dict(config={}), {}, unchecked=("config",)),
        "FCOS.generate_model_card": Row(model.generate_model_card, {}, {}, unchecked=("facts",)),
        "FCOSLoss": Row(
            vovnet_zoo.FCOSLoss,
            dict(),
            {**variant, "alpha": NOT_A_SHARE, "gamma": [-1, NAN, INF, 1e9, "x", None, True], **loss_options},
        ),
        "FCOSLoss.of": Row(vovnet_zoo.FCOSLoss.of, dict(model=model), dict(model=models)),
        "FCOSLoss.forward": Row(
            criterion,
            dict(preds=preds, boxes=boxes, labels=labels),
            dict(
                preds=wrong_preds,
                boxes=[*wrong_boxes, torch.zeros(2, 1, 4), boxes * NAN, boxes * INF, boxes.flip(-1)],
                labels=[*wrong_labels, torch.tensor([[2]])],
                normalizers=[3, "x", zeros(2), [1, 1, 1]],
            ),
        ),
        "FCOSLoss.compare": Row(
            criterion.compare,
            dict(preds=preds, targets=targets, normalizers=criterion.normalizers(targets)),
            dict(
                preds=wrong_preds,
                targets=[None, tuple(targets), targets._replace(labels=targets.labels[:, 1:])],
                normalizers=[None, 3, zeros(2)],
            ),
        ),
        "FCOSLoss.assign": Row(
            criterion.assign,
            dict(points=preds.points, strides=preds.strides, boxes=boxes, labels=labels),
            dict(
                points=[*NOT_A_TENSOR, preds.points[1:], preds.points.T],
                strides=[*NOT_A_TENSOR, preds.strides[1:]],
                boxes=wrong_boxes,
                labels=wrong_labels,
            ),
        ),
        "FCOSLoss.normalizers": Row(
            criterion.normalizers, dict(targets=targets), dict(targets=[None, 5, tuple(targets)])
        ),
        "Predictions": Row(vovnet_zoo.Predictions, preds._asdict(), {}, unchecked=vovnet_zoo.Predictions._fields),
        "assign_targets": Row(
            vovnet_zoo.assign_targets,
            dict(points=preds.points, strides=preds.strides, boxes=boxes, labels=labels),
            dict(
                points=[*NOT_A_TENSOR, preds.points[1:], preds.points.T],
                strides=[*NOT_A_TENSOR, preds.strides[1:]],
                boxes=wrong_boxes,
                labels=wrong_labels,
                center_radius=RADII,
                plus_one=NOT_A_FLAG,
                matching=loss_options["matching"],
            ),
        ),
        "compile_detector": Row(
            vovnet_zoo.compile_detector,
            dict(model=model, size=(64, 64), backend="eager"),
            dict(
                model=[*models, FakeHalf(model)],
                size=[None, 64, "64", (64,), (64, 100), (0, 64), (-32, 64), (64.0, 64), (64, 64, 3), (64, 2**40)],
                dtype=[torch.float64, torch.int8, "float16", None],
                winograd=["yes", 2],
                mode=["fast", None, 5, "max-autotune"],
                backend=["nosuch", None, 5],
                **thresholds(),
            ),
        ),
        "export_detector": Row(
            vovnet_zoo.export_detector,
            dict(model=model, out=folder.parent / "exported"),
            dict(
                model=[*models, FakeHalf(model)],
                out=[None, 5],
                format=["nosuch", None, 5],
                size=[64, "64", (64,), (64, 100), (32, 64), (64.0, 64)],
                batch=[0, "2", 2.5, 5000],
                precision=["int4", "int8", None, 5],
                raw=["yes", 2],
                images=[5],
                data=[5, "nowhere"],
                max_ap_difference=[-1, 2, "0.1", 0.1],
                overwrite=["yes", 2],
                **thresholds(),
            ),
            {"images": "image must be", "data": "data=|no such folder"},
            works=False,  # an export takes half a minute
        ),
        "load_detector": Row(
            vovnet_zoo.load_detector,
            dict(source=folder),
            dict(source=[None, 5, b"x"], nosuch=[1], **hub_options),
        ),
        "the function of compile_detector": Row(
            vovnet_zoo.compile_detector(model, (64, 64), backend="eager"),
            dict(images=pixels),
            dict(
                images=[*NOT_A_TENSOR, images, pixels[0], pixels[..., :32]],
                sizes=[5, "x", [(1, 2, 3)], [(64, 64)] * 2, [(0, 5)], [("a", "b")]],
            ),
            {"sizes": "image_sizes"},
        ),
        "create_detector": Row(
            vovnet_zoo.create_detector,
            dict(name="fcos_vovnet27_slim_fpn", num_classes=2, **small),
            dict(
                name=[5, None, "nosuch", ["fcos"], "fcos_vovnet27_slim_fpn.nosuch"],
                pretrained=["yes", 2, None, True],
                pretrained_backbone=NOT_A_FLAG,
                **variant,
                **numbers,
                **backbone,
                **detector_options,
                nosuch=[1],
            ),
            {"name": "name=|no detector|name of weights", "pretrained": "pretrained|no weights", "nosuch": "unknown"},
        ),
        "list_detectors": Row(vovnet_zoo.list_detectors, {}, dict(filter=NOT_A_TEXT, pretrained=NOT_A_FLAG)),
        "postprocess": Row(
            vovnet_zoo.postprocess,
            dict(preds=preds, image_sizes=[(64, 64)]),
            dict(
                preds=wrong_preds,
                image_sizes=[None, 5, "x", [(64, 64)] * 2, [(64,)], [(64, 0)], [(-1, 64)], [("a", "b")]],
                plus_one=NOT_A_FLAG,
                keep_empty=NOT_A_FLAG,
                **thresholds(),
            ),
        ),
        "predict": Row(
            vovnet_zoo.predict,
            dict(model=model, images=pixels),
            dict(
                model=models,
                images=[
                    None,
                    5,
                    {"a": 1},
                    b"abc",
                    [5],
                    "nosuch.png",
                    [None],
                    zeros(3, 8, 8) - 1,
                    zeros(3, 8, 8) * NAN,
                    zeros(2, 8, 8),
                    zeros(3, 0, 8),
                    zeros(8),
                    np.zeros((8, 8, 2), np.uint8),
                    np.zeros((8, 8)),
                ],
                **dict.fromkeys(("stream", "recursive", "urls", "flip", "compile"), NOT_A_FLAG),
                tiles=[0, -1, 1.5, NAN, "x", True],
                overlap=[-0.1, 1, NAN, "x", True, 0.2],
                scales=[[], [0], [1.0, 1.0], [NAN], "x", None, 5],
                batch_size=NOT_A_COUNT,
                precision=["float16", None, 5],
                workers=[-1, 1.5, "x", None, True],
                on_error=[5, "skip"],
                nosuch=[1],
                **thresholds(),
            ),
            {"images": "image|source|path|nosuch.png"},
        ),  # fmt: skip
        # ---- data and evaluation
        "CocoDataset": Row(
            CocoDataset,
            dict(zip(("images_dir", "annotation_file"), files, strict=True)),
            dict(
                images_dir=[*NOT_A_PATH, "nosuch"],
                annotation_file=[*NOT_A_PATH, "nosuch.json"],
                **dict.fromkeys(("transforms", "late_transforms"), [5, "flip"]),
                **dict.fromkeys(("drop_empty", "plus_one", "skip_bad_images"), NOT_A_FLAG),
                known_classes=[5, None, "cat", [3]],
            ),
            {"images_dir": "images_dir|folder of images", "annotation_file": "annotation[_ ]file"},
        ),
        "coco_metrics": Row(
            evaluation.coco_metrics,
            dict(annotations=files[1], results=rows),
            dict(
                annotations=[*NOT_A_PATH, "nosuch.json"],
                results=[*wrong_rows, [{**rows[0], "image_id": 99}], [{**rows[0], "score": NAN}]],
                image_ids=[5, "12", ["x"], [99]],
                max_dets=NOT_A_COUNT,
                engine=["nosuch", None, 5],
            ),
            {"annotations": "annotation", "results": "result", "image_ids": "image_ids|images with the ids"},
        ),
        "draw_detections": Row(
            vovnet_zoo.draw_detections,
            dict(image=pixels[0], detection=detection),
            dict(
                image=[None, 5, "nosuch.png", zeros(64, 64), np.zeros((3, 4))],
                detection=[
                    None,
                    {},
                    {"boxes": boxes[0]},
                    {**detection, "boxes": zeros(1, 5)},
                    {**detection, "boxes": boxes[0] * NAN},
                    {**detection, "boxes": boxes[0].flip(-1)},
                    {**detection, "labels": torch.tensor([0.5])},
                    {**detection, "scores": zeros(2)},
                ],
                class_names=["cat", 5, []],
                score_threshold=NOT_A_SHARE,
                enlarge=[0, -1, 1.5, 1000, "x", True],
            ),
            {"image": "image"},
        ),
        "to_coco_results": Row(
            evaluation.to_coco_results,
            dict(detections=[detection], image_ids=[1], category_ids=[7, 12]),
            dict(
                detections=[
                    None,
                    5,
                    [5],
                    [{}],
                    [{**detection, "boxes": zeros(1, 5)}],
                    [{**detection, "boxes": boxes[0] * NAN}],
                    [{**detection, "scores": zeros(2)}],
                    [{**detection, "labels": torch.tensor([9])}],
                ],
                image_ids=[*wrong_ids, [1, 2]],
                category_ids=[*wrong_ids, [7]],
                plus_one=NOT_A_FLAG,
            ),
            {"detections": "detections|labels", "image_ids": "image[_ ]ids", "category_ids": "category_ids|categories"},
        ),  # fmt: skip
        "gather_results": Row(
            evaluation.gather_results,
            dict(results=rows, image_ids=[1]),
            dict(results=wrong_rows, image_ids=[*wrong_ids, [10, 10], [11]]),
            {"image_ids": "image_ids|images"},
            unchecked=("group",),
        ),
        "format_table": Row(
            evaluation.format_table,
            dict(metrics={"AP": 0.5, "per_class": {"a": 0.5}}),
            dict(metrics=[None, 5, {"AP": "x"}], per_class=NOT_A_FLAG),
        ),
        "load_engine": Row(evaluation.load_engine, dict(name="pycocotools"), dict(name=["nosuch", None, 5])),
        # ---- kernels
        "available": Row(kernels.available, {}, {}),
        "class_nms": Row(
            nms.class_nms,
            dict(boxes=boxes[0], scores=zeros(1), labels=labels[0], threshold=0.5, max_detections=5),
            dict(
                boxes=[*NOT_A_TENSOR, boxes, zeros(1, 5)],
                scores=[*NOT_A_TENSOR, zeros(2), labels[0]],
                labels=[*NOT_A_TENSOR, zeros(1)],
                **nms_wrong,
            ),
        ),
        "nms_fixed": Row(
            nms.nms_fixed,
            dict(boxes=boxes, scores=zeros(1, 1), labels=labels, threshold=0.5, max_detections=5),
            dict(
                boxes=[*NOT_A_TENSOR, boxes[0], zeros(1, 1, 5), boxes.double()],
                scores=[*NOT_A_TENSOR, zeros(1, 2), labels],
                labels=[*NOT_A_TENSOR, zeros(1, 1), labels[0]],
                **nms_wrong,
            ),
        ),
        "use_winograd": Row(winograd.use_winograd, dict(model=nn.Sequential()), dict(model=NOT_A_MODEL)),
        "fuse_for_training": Row(osa.fuse_for_training, dict(model=nn.Sequential()), dict(model=NOT_A_MODEL)),
        "freeze": Row(
            freeze.freeze,
            dict(model=nn.Sequential(), winograd=False),
            dict(model=NOT_A_MODEL, winograd=NOT_A_FLAG),
        ),
        "is_eligible": Row(winograd.is_eligible, dict(conv=nn.Conv2d(3, 3, 1)), dict(conv=[*NOT_A_MODEL, nn.ReLU()])),
        "FrozenWinogradConv2d": Row(
            winograd.FrozenWinogradConv2d,
            dict(conv=nn.Conv2d(32, 32, 3, padding=1)),
            dict(conv=[*NOT_A_MODEL, nn.ReLU(), nn.Conv2d(32, 32, 1)], relu=NOT_A_FLAG),
            {"conv": "conv|3x3"},
            works=bool(kernels.available()["winograd"]),
        ),
        **(operators(x, weight) if kernels.available()["winograd"] else {}),
        # ---- convert and publish
        "convert": Row(
            convert.convert,
            dict(checkpoint={}, archs=detectors.archs()),
            dict(
                checkpoint=[None, 5, [], {5: zeros(1)}, {"a": 5}, {"a": zeros(1)}],
                archs=[None, 5, {}, ["vovnet39"], {"a": 5}, {"a": ["x"]}],
                part=["nosuch", None, 5],
            ),
            {"checkpoint": "checkpoint|state dict|format"},
            works=False,
        ),
        "convert_file": Row(
            publish.convert_file,
            dict(file="nosuch.pth", out=folder.parent / "converted"),
            dict(
                file=[*NOT_A_PATH, "nosuch.pth", folder, files[1]],
                out=[*NOT_A_PATH],
                overwrite=NOT_A_FLAG,
                part=["head", None, 5, ["all"]],
            ),
            {"file": "file|checkpoint"},
            works=False,
        ),
        "publish_model": Row(
            publish.publish_model,
            dict(source=folder, repo_id="a/b"),
            dict(
                source=[*NOT_A_PATH, "nosuch", folder.parent],
                repo_id=NOT_A_TEXT,
                run=[5, ["a"]],
                space=NOT_A_FLAG,
                license=[5, ["a"]],
                private=NOT_A_FLAG,
                token=[5, ["a"]],
                branch=[5, ["a"]],
                create_pr=NOT_A_FLAG,
                nosuch=[1],
            ),
            {"source": "source|no such file|has no config.json", "nosuch": "unknown"},
            works=False,
        ),
        "push": Row(
            publish.push,
            dict(repo_id="a/b", folder=folder, card=ModelCard("a")),
            dict(
                repo_id=NOT_A_TEXT,
                folder=[*NOT_A_PATH, "nosuch", folder.parent],
                card=[None, ["a"], 5],
                private=NOT_A_FLAG,
                token=[5, ["a"]],
                branch=[5, ["a"]],
                create_pr=NOT_A_FLAG,
            ),
            {"folder": "folder|config.json"},
            works=False,
        ),
        "checked_card": Row(
            publish.checked_card,
            dict(folder=folder),
            dict(folder=[*NOT_A_PATH, "nosuch", folder.parent]),
            {"folder": "folder|config.json"},
            unchecked=("facts",),
        ),
    }


def operators(x, weight):
    transformed, bias = winograd.transform_weight(weight), torch.zeros(32)
    wrong_x = [*NOT_A_TENSOR, x[0], x.double(), x[:, :3]]
    return {
        "conv3x3": Row(
            winograd.conv3x3,
            dict(x=x, weight=weight),
            dict(
                x=wrong_x,
                weight=[*NOT_A_TENSOR, weight[0], weight[..., :1], weight[:, :3]],
                bias=[3.0, "x", bias[1:]],
                transposed=["yes", None],
            ),
        ),
        "conv3x3_frozen": Row(
            winograd.conv3x3_frozen,
            dict(x=x, transformed=transformed, out_channels=32),
            dict(
                x=wrong_x,
                transformed=[*NOT_A_TENSOR, weight, transformed[0]],
                out_channels=["x", None, 0, -1, 40, 10**6],
                bias=[3.0, "x", bias[1:]],
                relu=["yes", None],
            ),
            {"x": r"\bx\b|for 3 .* channels"},
        ),
        "transform_weight": Row(
            winograd.transform_weight, dict(weight=weight), dict(weight=[*NOT_A_TENSOR, weight[0], weight[..., :1]])
        ),
        "weight_gradient": Row(
            winograd.weight_gradient,
            dict(x=x, dy=x),
            dict(x=[*NOT_A_TENSOR, x[0], x.double()], dy=[*NOT_A_TENSOR, x[0], x[..., :5]]),
        ),
    }


class FakeHalf:
    """Stands in the table for a copy of the model with float16 weights, which is made when it is tried."""

    def __init__(self, model):
        self.model = model

    def value(self):
        return vovnet_zoo.FCOS(**self.model.config).half()


FUNCTIONS = [
    "FCOS", "FCOS.forward", "FCOS.make_points", "FCOS.forward_features", "FCOS.forward_head",
    "FCOS.reset_classifier", "FCOS.group_matcher", "FCOS.set_grad_checkpointing", "FCOS.from_pretrained",
    "FCOS.save_pretrained", "FCOS.push_to_hub", "FCOS.complete_config", "FCOS.generate_model_card", "FCOSLoss",
    "FCOSLoss.of", "FCOSLoss.forward", "FCOSLoss.compare", "FCOSLoss.assign", "FCOSLoss.normalizers", "Predictions",
    "assign_targets", "compile_detector", "the function of compile_detector", "export_detector", "load_detector",
    "create_detector", "list_detectors", "postprocess", "predict", "CocoDataset", "coco_metrics", "to_coco_results",
    "draw_detections", "gather_results", "format_table", "load_engine", "available", "class_nms", "nms_fixed",
    "use_winograd", "fuse_for_training", "freeze", "is_eligible", "FrozenWinogradConv2d", "conv3x3",
    "conv3x3_frozen", "transform_weight", "weight_gradient", "convert", "convert_file", "publish_model", "push",
    "checked_card",
]  # fmt: skip


@pytest.fixture(scope="module")
def table(tiny_detector, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    tiny_detector.save_pretrained(folder)
    coco = tmp_path_factory.mktemp("coco")
    (coco / "instances.json").write_text(json.dumps(make_coco([box()])))
    return make_table(tiny_detector, folder, coco)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_wrong_arguments_are_named(table, name):
    """Each wrong value alone raises an error that names its argument, and the right ones together raise none."""
    if name not in table:
        pytest.skip("the kernels cannot be used here")
    if name == "export_detector":
        pytest.importorskip("onnxruntime", reason="exports need the extra `export`")
    row = table[name]
    if row.works:
        with torch.no_grad():
            row.call(**row.right)
    failures = []
    for argument, values in row.wrong.items():
        for value in values:
            shown = f"{argument}={reprlib.repr(value)}"
            value = value.value() if isinstance(value, FakeHalf) else value
            try:
                row.call(**{**row.right, argument: value})
            except (ValueError, TypeError) as error:
                if not re.search(row.words.get(argument, rf"\b{argument}\b"), str(error)):
                    failures.append(f"{shown}: the message does not name it: {error}")
            except Exception as error:
                failures.append(f"{shown}: {type(error).__name__}: {error}")
            else:
                failures.append(f"{shown}: accepted")
    assert not failures, "\n".join(failure[:400] for failure in failures)


def test_the_table_has_every_public_function(table):
    assert table.keys() <= set(FUNCTIONS)
    public = {name: getattr(vovnet_zoo, name) for name in vovnet_zoo.__all__} | {
        name: getattr(evaluation, name) for name in evaluation.__all__
    }
    owners = {vovnet_zoo.FCOS: [vovnet_zoo.FCOS, StrictHubMixin], vovnet_zoo.FCOSLoss: [vovnet_zoo.FCOSLoss]}
    for cls, bases in owners.items():
        for name in set().union(*map(vars, bases)):
            if name[0] != "_" and callable(getattr(cls, name)):
                public[f"{cls.__name__}.{name}"] = getattr(cls, name)
    not_yet = {"ImageDetections"}  # `predict` makes it
    assert {name for name, value in public.items() if callable(value)} - set(FUNCTIONS) == not_yet


def test_the_table_has_every_argument(table):
    for name, row in table.items():
        for argument in inspect.signature(row.call).parameters.values():
            many = argument.kind in (argument.VAR_KEYWORD, argument.VAR_POSITIONAL)
            if argument.name not in row.unchecked and not (many and row.wrong):
                assert row.wrong.get(argument.name), f"{name}: {argument.name} has no wrong values in the table"


def test_a_model_in_a_wrapper(tiny_detector):
    """The message says how to get at the model."""
    for call in (vovnet_zoo.FCOSLoss.of, lambda model: vovnet_zoo.predict(model, []),
                 lambda model: vovnet_zoo.compile_detector(model, (64, 64))):  # fmt: skip
        with pytest.raises(ValueError, match="DataParallel; give model.module, which it wraps"):
            call(nn.DataParallel(tiny_detector))
    vovnet_zoo.FCOSLoss.of(torch.compile(tiny_detector, backend="eager"))


def test_what_the_messages_say(tiny_detector):
    """The messages for common mistakes say what to do."""
    with pytest.raises(ValueError, match=r"got a list; pad each image's boxes .*collate"):
        vovnet_zoo.assign_targets(zeros(1, 2), zeros(1), [zeros(1, 4)], [zeros(1)])
    with pytest.raises(ValueError, match=r"model has weights of torch.float16; give model.float\(\)"):
        vovnet_zoo.compile_detector(FakeHalf(tiny_detector).value(), (64, 64))
    with pytest.raises(ValueError, match="class_names='cat': give a list of names"):
        vovnet_zoo.create_detector("fcos_vovnet27_slim_fpn", num_classes=1, class_names="cat")
    with pytest.raises(
        ValueError, match="weights of torch.float16, and from_pretrained loads float32; call model.float"
    ):
        FakeHalf(tiny_detector).value().save_pretrained("never")
    with pytest.raises(ValueError, match="model must be a vovnet_zoo.FCOS, got torchvision.FCOS"):
        with torch.device("meta"):
            theirs = torchvision.models.detection.fcos_resnet50_fpn(weights_backbone=None)
        vovnet_zoo.predict(theirs, zeros(3, 8, 8))
    with pytest.raises(ValueError, match="unknown .'weights'.: create_detector has pretrained, pretrained_backbone, "):
        vovnet_zoo.create_detector("fcos_vovnet27_slim_fpn", weights="DEFAULT")
    with pytest.raises(ValueError, match="name of a timm model, got Linear; timm.models.register_model gives"):
        vovnet_zoo.create_detector("fcos", backbone=nn.Linear(1, 1))
    with pytest.raises(ValueError, match="vovnet_zoo.data.normalize turns a batch of bytes into floating point"):
        tiny_detector(zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="2 class_names for num_classes=80: .* their number as num_classes"):
        vovnet_zoo.create_detector("fcos_vovnet27_slim_fpn", class_names=["cat", "dog"])
    with pytest.raises(ValueError, match="class_names='cat': give a list of names"):
        draw_detections(
            zeros(3, 8, 8, dtype=torch.uint8), {"boxes": zeros(0, 4), "labels": zeros(0, dtype=torch.int64)}, "cat"
        )
