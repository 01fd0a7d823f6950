"""Every number that a public function or the command takes has a range, which is checked before any work."""

import sys

import pytest
import torch

from vovnet_zoo import Predictions, cli, compile_detector, postprocess, predict
from vovnet_zoo.data import (
    RandomScaleCrop,
    RandomShortestSide,
    TrainSampler,
    collate,
    eval_transforms,
    photometric,
    repeat_factors,
    train_transforms,
)
from vovnet_zoo.data.check import check_dataset
from vovnet_zoo.fcos import make_points

NAN = float("nan")
THRESHOLDS = {
    "score_threshold": [-1, 30, 1.01, NAN, "0.5", None, True],
    "candidate_threshold": [-0.1, 2, NAN, {}],
    "nms_threshold": [-0.1, 2, NAN, [0.5]],
    "topk": [0, -1, 2.5, "10", None, True],
    "max_detections": [0, -5, 1.0, NAN],
}


def predictions():
    points, strides = make_points([(2, 2)], [8], "cpu")
    return Predictions(torch.zeros(1, 4, 2), torch.ones(1, 4, 4), torch.zeros(1, 4), points, strides)


@pytest.mark.parametrize("name", THRESHOLDS)
def test_thresholds(name, tiny_detector):
    """In all three functions that take them, before the image is looked for; the ends of a range are in it."""
    for value in THRESHOLDS[name]:
        for call in (
            lambda **options: postprocess(predictions(), [(16, 16)], **options),
            lambda **options: predict(tiny_detector, "nosuch.png", **options),
            lambda **options: compile_detector(tiny_detector, (64, 64), backend="eager", **options),
        ):
            with pytest.raises(ValueError, match=f"{name}=.*: give "):
                call(**{name: value})
    for value in (0, 1, 0.5) if name.endswith("_threshold") else (1, 10**6):
        postprocess(predictions(), [(16, 16)], **{name: value})


@pytest.mark.parametrize("size", [(64,), (0, 64), (64, -32), (64, 65), (64.0, 64), ("64", 64)])
def test_sizes_of_compiled_detectors(size, tiny_detector):
    with pytest.raises(ValueError, match="size="):
        compile_detector(tiny_detector, size, backend="eager")


DATA = [
    (check_dataset, dict(root="."), dict(workers=-1, min_size=0, max_size=2.5)),
    (train_transforms, {}, dict(min_size=(0, 5), max_size=0, augment="x", flip=1.5, color=-1)),
    (train_transforms, dict(augment="jitter_crop"), dict(min_size=(9, 5), max_size=0.5, scale=(0, 1))),
    (eval_transforms, {}, dict(min_size=0, max_size=-1)),
    (RandomShortestSide, dict(min_sizes=(8, 9), max_size=9), dict(min_sizes=(8.5, 9), max_size=0)),
    (RandomScaleCrop, dict(min_sizes=(8, 9), max_size=9, scale=(1, 2)), dict(max_size=0, scale=(2, 1))),
    (photometric, {}, dict.fromkeys(("color", "blur", "jpeg"), 1.5)),
    (TrainSampler, dict(aspect_ratios=[1.0], batch_size=2, num_steps=3), dict(batch_size=0, num_steps=-1, seed=-1)),
    (TrainSampler, dict(aspect_ratios=[1.0], batch_size=2, num_steps=3), dict(factors=[0.5], late_from=-1)),
    (TrainSampler, dict(aspect_ratios=[1.0], batch_size=2, num_steps=3), dict(factors=[1, 1])),
    (TrainSampler, dict(aspect_ratios=[1.0], batch_size=2, num_steps=3), dict(factors=[NAN])),
    (repeat_factors, dict(dataset=None), dict(threshold=1.5)),
    (collate, dict(batch=[(torch.zeros(3, 4, 4), {})]), dict(size_divisor=0, batch=[])),
]  # fmt: skip


@pytest.mark.parametrize(("function", "right", "wrong"), DATA)
def test_the_data(function, right, wrong):
    for name, value in wrong.items():
        with pytest.raises(ValueError):
            function(**{**right, name: value})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("predict a.png --score 30", "--score 30"),
        ("predict a.png --score -1", "--score -1"),
        ("predict a.png --score nan", "--score nan"),
        ("predict a.png --nms-threshold 2", "--nms-threshold 2"),
        ("predict a.png --max-detections 0", "--max-detections 0"),
        ("predict", "name of an image"),
        ("check-data DATA --workers -1", "--workers -1"),
    ],
)
def test_the_command(line, message, tmp_path, monkeypatch, capsys):
    """One line, before the model is looked for."""
    options = ["--model", "nosuch", "--out", str(tmp_path / "out")] if line.startswith("predict") else []
    monkeypatch.setattr(sys, "argv", ["vovnet-zoo", *line.split(), *options])
    with pytest.raises(SystemExit) as error:
        cli.main()
    printed = capsys.readouterr()
    assert error.value.code == 2 and message in printed.err + printed.out and "nosuch" not in printed.err
    assert not (tmp_path / "out").exists()
