"""Presets as users type them: `quickstart` with the dataset it draws, and a published one with ImageNet weights."""

import dataclasses
import functools
import inspect
import json
from collections import defaultdict
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from hub_server import Repo
from launch import losses, rows

import build
import train_coco
from fitting import fit_of, fit_plan
from presets import (
    FINETUNE_PRETRAINED,
    FIT_PRETRAINED,
    PRESETS,
    PUBLISHED,
    TrainConfig,
    check_config,
    doubts,
    is_recorded,
    parse,
)
from quickstart_data import CLASSES, make_shapes
from vovnet_zoo import FCOS, inference, loss, results
from vovnet_zoo.config import VARIANTS
from vovnet_zoo.data import CocoDataset, annotations, augment, find_split
from vovnet_zoo.detectors import STARTS

SMALL = functools.partial(make_shapes, num_train=24, num_val=6)


def test_quickstart_draws_its_data_and_learns(tmp_path, monkeypatch):
    """The preset itself, with fewer images and steps."""
    monkeypatch.setattr(build, "make_shapes", SMALL)
    preset = PRESETS["quickstart"][1]
    config = dataclasses.replace(
        preset, data=tmp_path / "shapes", out=tmp_path / "run", steps=12, batch_size=4, warmup_steps=2, workers=0
    )
    metrics = train_coco.main(config)
    curve = losses(config.out)
    assert len(curve) == 12 and sum(curve[-3:]) < 0.9 * sum(curve[:3])
    assert set(metrics["per_class"]) == set(CLASSES)
    assert {"best", "last", "checkpoints", "run.json", "curves.png", "detections.png"} <= {
        path.name for path in config.out.iterdir()
    }
    assert FCOS.from_pretrained(config.out / "best").config["class_names"] == list(CLASSES)


def test_drawn_data_are_right_and_always_the_same(tmp_path):
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "mine").write_text("mine")
    for name in ("a", "b"):
        SMALL(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 24 + 6 + 2
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    for split, count in (("train", 24), ("val", 6)):
        dataset = CocoDataset(*find_split(tmp_path / "a", split))
        assert len(dataset) == count and dataset.class_names == list(CLASSES)
        for image, target in dataset:
            assert 1 <= len(target["boxes"]) <= 5 and image.shape == (3, 128, 128)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.partial", "b"]
    assert (tmp_path / "a.partial" / "mine").read_text() == "mine"


def test_existing_data_are_kept(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    SMALL(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


SMALL_RUN = ["--min-size", "64", "96", "--max-size", "128", "--test-size", "64", "--workers", "0", "--steps", "2"]
SMALL_RUN += ["--batch-size", "2", "--channels", "64", "--num-convs", "1", "--device", "cpu"]


@pytest.mark.parametrize(
    "options",
    [["--augment", "flip"], ["--variant", "published"], ["--init", "x"], ["--init", "x", "--mosaic", "0.5"]],
)
@pytest.mark.parametrize("preset", ["finetune", "coco_36e"])
def test_a_presets_zooming_steps_back(preset, options):
    config = parse([preset, "--data", "x", *(["--no-pretrained-backbone"] if "--init" in options else []), *options])
    check_config(config)
    until = PRESETS[preset][1].augment_until if "--mosaic" in options else 1.0
    assert (config.augment, config.zoom, config.augment_until) == ("flip", (0.5, 2.0), until)
    assert parse([preset, "--data", "x"]).augment == "jitter_crop"


def test_finetune_has_other_defaults_for_a_pretrained_start():
    plain, flag = ["finetune", "--data", "x"], "--pretrained-backbone"
    assert parse(plain) == dataclasses.replace(PRESETS["finetune"][1], data=Path("x"))
    tuned = parse([*plain, flag])
    assert tuned == dataclasses.replace(parse(plain), **FINETUNE_PRETRAINED)
    assert tuned.frozen_norm and tuned.steps is None and tuned.lr is None
    assert parse([*plain, "--pretrained_backbone"]) == tuned
    assert parse([*plain, "--no-pretrained-backbone"]) == parse(plain)
    typed = parse([*plain, flag, "--steps", "600", "--no-frozen-norm", "--model", "fcos_vovnet39_fpn"])
    assert (typed.steps, typed.frozen_norm, typed.model) == (600, False, "fcos_vovnet39_fpn")
    assert parse(["v39_1x", "--data", "x", flag]) == parse(["v39_1x", "--data", "x"])


def test_coco_presets():
    for epochs in (12, 24, 36):
        config = parse([f"coco_{epochs}e", "--data", "x"])
        assert config.steps * config.batch_size == pytest.approx(118_287 * epochs, rel=1e-3)
        assert config.variant == "improved" and config.augment == "jitter_crop" and config.schedule == "cosine"
        assert config.ema and is_recorded(config, "cuda") and config.precision == "bf16" and config.frozen_norm
        assert config.pretrained_backbone and config.model in STARTS


def test_what_is_recorded():
    line = ["coco_12e", "--data", "x"]
    for typed, recorded in (
        ("", True),
        ("--no-cuda-graphs", False),
        ("--compile", False),
        ("--compile --cuda-graphs", True),
        ("--grad-checkpointing", False),
    ):
        config = parse([*line, *typed.split()])
        check_config(config)
        assert is_recorded(config, "cuda") == recorded and not is_recorded(config, "cpu")
    with pytest.raises(ValueError, match="cannot be recorded"):
        parse([*line, "--grad-checkpointing", "--cuda-graphs"])


def test_rows_of_the_published_comparison():
    assert {name: (row.ap, row.milliseconds) for name, row in PUBLISHED.items()} == {
        "r50_1x": (37.5, 84), "v39_1x": (37.7, 82), "r101_2x": (41.3, 104),
        "v57_2x": (41.6, 91), "x101_2x": (42.5, 171), "v93_2x": (42.1, 113),
    }  # fmt: skip
    for name, row in PUBLISHED.items():
        about, config = PRESETS[name]
        assert config.model == row.model and f"({row.ap} AP on COCO, as published)" in about
        assert config.variant == "published" and config.pretrained_backbone and config.frozen_norm
        assert (config.steps, config.milestones, config.warmup) == (
            (90_000, (60_000, 80_000), "constant") if name.endswith("1x") else (180_000, (120_000, 160_000), "linear")
        )
        fields = dataclasses.asdict(config)
        assert {key for key, value in fields.items() if value != getattr(PRESETS["v57_2x"][1], key)} <= {
            "out", "model", "steps", "milestones", "warmup"
        }  # fmt: skip


@pytest.mark.parametrize(
    "options, expected",
    [  # learning rate, steps, milestones, steps of warm-up, steps between evaluations
        ("", (0.01, 90_000, (60_000, 80_000), 500, 15_000)),
        ("--batch-size 16", (0.01, 90_000, (60_000, 80_000), 500, 15_000)),
        ("--batch-size 8", (0.005, 180_000, (120_000, 160_000), 1000, 30_000)),
        ("--batch_size=64", (0.04, 22_500, (15_000, 20_000), 125, 3750)),
        ("--steps 45000", (0.01, 45_000, (30_000, 40_000), 500, 15_000)),
        ("--batch-size 32 --steps 90000 --lr 0.01", (0.01, 90_000, (60_000, 80_000), 250, 7500)),
        ("--batch-size 8 --milestones 5 6 --warmup-steps 500", (0.005, 180_000, (5, 6), 500, 30_000)),
        ("--batch-size 4 --optimizer adamw", (0.005, 360_000, (240_000, 320_000), 2000, 60_000)),
        ("--steps 2", (0.01, 2, (1, 2), 500, 15_000)),
    ],
)
def test_a_schedule_is_one_of_images(options, expected):
    config = parse(["v39_1x", "--data", "x", *options.split()])
    check_config(config)
    found = (config.lr, config.steps, config.milestones, config.warmup_steps, config.eval_every)
    assert found == (pytest.approx(expected[0]), *expected[1:])


def test_a_cosine_schedule_has_no_milestones_to_scale():
    config = parse(["coco_12e", "--data", "x", "--batch-size", "32"])
    check_config(config)
    preset = PRESETS["coco_12e"][1]
    assert config.steps == round(preset.steps / 2) and config.lr == pytest.approx(preset.lr * 2**0.5)
    for options in ([], ["--batch-size", "32"], ["--steps", "1000"]):  # these presets have milestones
        config = parse(["v57_2x", "--data", "x", "--schedule", "cosine", *options])
        check_config(config)
        assert config.schedule == "cosine" and config.milestones == TrainConfig.milestones
    with pytest.raises(ValueError, match=r"milestones=\(5, 6\): the cosine schedule has none"):
        check_config(parse(["v57_2x", "--data", "x", "--schedule", "cosine", "--milestones", "5", "6"]))


def test_doubtful_schedules_are_named():
    preset = PRESETS["v39_1x"][1]
    whole = [config for _, config in PRESETS.values() if config.steps is not None]
    assert [doubts(config) for config in whole] == [[]] * (len(PRESETS) - 1)
    (late,) = doubts(dataclasses.replace(preset, steps=70_000))
    assert "ends after 70000 steps, before the milestones [80000]" in late
    late, short = doubts(dataclasses.replace(preset, steps=500))
    assert "the warm-up of 500 steps does not end" in short
    (few,) = doubts(dataclasses.replace(PRESETS["quickstart"][1], minutes=2.0, steps=99))
    assert few.startswith("only 99 steps fit into --minutes 2;")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_weights_or_says_what_to_type(name, tmp_path, monkeypatch):
    """It says so before it looks at the data, which takes long, and what it says to type works."""
    options = [name, "--data", str(tmp_path / "missing"), "--out", str(tmp_path / "run")]
    fetched = []
    real = build.create_backbone
    monkeypatch.setattr(build, "create_backbone", lambda name, pretrained: fetched.append(name))
    build.check_weights(parse(options))
    known = [timm.get_pretrained_cfg(model).has_weights for model in fetched]
    assert len(known) == parse(options).pretrained_backbone
    if all(known):
        return
    monkeypatch.setattr(build, "create_backbone", real)
    with pytest.raises(ValueError, match="no weights of 'vovnet93.*type --no-pretrained-backbone --no-frozen-norm"):
        train_coco.main(parse(options))
    assert name == "v93_2x"
    scratch = parse([*options, "--no-pretrained-backbone", "--no-frozen-norm"])
    build.check_weights(scratch)
    model = build.build_model(scratch, ["a", "b"], [1, 2], None)
    assert not model.config["frozen_norm"] and model.config["num_classes"] == 2


@pytest.mark.parametrize("source", ["local-dir:runs/rsb_a3/best", "hf-hub:me/net"])
def test_a_classifier_of_ones_own_is_trained_on_as_pretrained(source):
    config = parse(["finetune", "--data", "x", "--model", "fcos", "--backbone", source, "--pretrained-backbone"])
    build.check_weights(config)
    assert fit_of(config) == FIT_PRETRAINED and config.optimizer == "adamw" and config.frozen_norm
    assert fit_plan(config, 205, torch.device("cpu")).lr == FIT_PRETRAINED.lr


@pytest.mark.parametrize("preset", ["finetune", "coco_12e"])
def test_presets_with_a_live_backbone_train(preset, tiny_coco, tmp_path, hub_on_loopback):
    """Two steps of small images, from weights that a Hub on loopback has."""
    name, out = "ese_vovnet19b_dw.ra_in1k", tmp_path / "run"
    torch.manual_seed(0)
    weights = timm.create_model("ese_vovnet19b_dw").state_dict()
    files = {"model.safetensors": safetensors.torch.save(weights)}
    hub_on_loopback.repos[f"timm/{name}"] = Repo(False, [("1" * 40, files, set(files))], {"main": "1" * 40})
    typed = [preset, "--data", str(tiny_coco), "--out", str(out), "--pretrained-backbone", *SMALL_RUN]
    train_coco.main(parse([*typed, "--warmup-steps", "1", "--checkpoint-every", "2", "--eval-every", "2"]))
    curve = losses(out)
    assert len(curve) == 2 and all(0 < loss < 100 for loss in curve)
    model = FCOS.from_pretrained(out / "last")
    assert model.config["backbone"] == "ese_vovnet19b_dw" and model.config["frozen_norm"]
    trained = model.backbone.state_dict()
    for key, x in trained.items():
        start = weights[key.replace("stem_", "stem.").replace("stages_", "stages.")]
        torch.testing.assert_close(x, start, rtol=0, atol=0.01)  # near the weights of the Hub, in two steps


@pytest.mark.parametrize("variant", ["published", "improved"])
def test_plus_one_reaches_data_loss_and_evaluation(tiny_coco, tmp_path, monkeypatch, variant):
    """Two steps of `v39_1x` and their evaluation call every function that knows the pixel convention with the same."""
    seen = defaultdict(set)

    def spy(module, name):
        function = getattr(module, name)

        @functools.wraps(function)
        def call(*args, **kwargs):
            bound = inspect.signature(function).bind(*args, **kwargs)
            bound.apply_defaults()
            seen[name].add(bound.arguments["plus_one"])
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    spy(annotations, "coco_to_xyxy")
    spy(augment, "train_transforms")
    spy(loss, "assign_targets")
    spy(inference, "decode")
    spy(inference, "nms_fixed")
    spy(results, "to_coco_results")
    config = dataclasses.replace(
        PRESETS["v39_1x"][1], data=tiny_coco, out=tmp_path / "run", variant=variant, pretrained_backbone=False,
        channels=64, num_convs=1, min_size=(64, 96), max_size=128, test_size=64, batch_size=2, workers=0, steps=2,
        device="cpu",
    )  # fmt: skip
    train_coco.main(config)
    functions = ("coco_to_xyxy", "train_transforms", "assign_targets", "decode", "nms_fixed", "to_coco_results")
    assert seen == {name: {variant == "published"} for name in functions}
    assert FCOS.from_pretrained(config.out / "last").config["plus_one"] is (variant == "published")


def test_published_preset_starts_from_imagenet_weights(tiny_coco, tmp_path, hub_on_loopback, monkeypatch):
    """`v39_1x` with a small head, two steps of small images; the backbone's weights come from a Hub on loopback."""
    torch.manual_seed(0)
    imagenet = timm.create_model("vovnet39").state_dict()
    for name, x in imagenet.items():
        if name.endswith("running_mean"):
            x.normal_(std=0.01)
    repo = Repo(private=False, branches={"main": "1" * 40})
    repo.commits.append(("1" * 40, {"model.safetensors": safetensors.torch.save(imagenet)}, {"model.safetensors"}))
    out = tmp_path / "run"
    hub_on_loopback.repos["someone/vovnet39.pytorchcv_in1k"] = repo
    monkeypatch.setenv("VOVNET_ZOO_ORG", "someone")
    train_coco.main(parse(["v39_1x", "--data", str(tiny_coco), "--out", str(out), *SMALL_RUN]))
    assert "GET /someone/vovnet39.pytorchcv_in1k/resolve/main/model.safetensors" in hub_on_loopback.log

    about = json.loads((out / "run.json").read_text())["config"]
    assert about["variant"] == "published" and about["pretrained_backbone"] and about["optimizer"] == "momentum"
    curve = losses(out)
    assert len(curve) == 2 and all(0 < loss < 100 for loss in curve)
    assert rows(out)[0]["lr"] == pytest.approx(0.01 / 3 * 2 / 16) and "AP" in rows(out)[-1]
    model = FCOS.from_pretrained(out / "last")
    assert model.config.items() >= VARIANTS["published"].items()
    trained = model.backbone.state_dict()
    for name, x in trained.items():
        start = imagenet[name.replace("stem_", "stem.").replace("stages_", "stages.")]
        if name.endswith(("running_mean", "running_var")):
            assert torch.equal(x, start), name  # frozen, and from the Hub
        else:
            torch.testing.assert_close(x, start, rtol=0, atol=0.05)  # two steps away
    assert trained["stem_0.bn.running_mean"].any()
    assert not torch.equal(trained["stem_0.conv.weight"], imagenet["stem.0.conv.weight"])
