"""Conversion renames every tensor and loses none. Whether the numbers are right is tested in test_golden.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import pytorchcv.models.vovnet
import timm
import torch
from checkpoints import ARCHS, SMALLEST, published

import vovnet_zoo
from vovnet_zoo import classifiers, convert, detectors, hub, publish
from vovnet_zoo.detectors import build_converted
from vovnet_zoo.files import write_safetensors
from vovnet_zoo.vovnet import checkpoint_filter_fn, layout_of


@pytest.fixture(scope="module", params=list(convert.FORMS))
def form(request):
    return request.param


@pytest.fixture(scope="module")
def checkpoint(form):
    return published(form)


def broken(checkpoint):
    """Yield the name of a tensor, and the checkpoint without this tensor, or with it renamed."""
    for name in checkpoint:
        rest = {key: x for key, x in checkpoint.items() if key != name}
        yield name, rest
        yield name, {**rest, name + "x": checkpoint[name]}


def test_form_and_architecture_are_read_off(form, checkpoint):
    converted = convert.convert(checkpoint, ARCHS)
    assert (converted.form, converted.arch) == (form, SMALLEST[form])


@pytest.mark.parametrize(
    "arch, kind",
    [
        (arch, kind)
        for arch, layout in ARCHS.items()
        for kind in (["authors_v2", "timm"] if layout.ese else ["authors", "pytorchcv", "timm"])
    ],
)
def test_every_architecture(arch, kind):
    net = timm.create_model(arch, num_classes=0 if kind == "authors_v2" else 1000)
    assert layout_of(net) == ARCHS[arch]
    table = convert.names(kind, ARCHS[arch])
    assert set(table.values()) == set(net.state_dict()) and len(set(table.values())) == len(table)
    ours = net.state_dict()
    converted = convert.convert({theirs: ours[name] for theirs, name in table.items()}, ARCHS)
    assert converted.arch == arch and converted.state_dict.keys() == ours.keys()
    assert all(
        converted.state_dict[name] is not None and torch.equal(converted.state_dict[name], ours[name]) for name in ours
    )


@pytest.mark.parametrize(
    "name, theirs", [("vovnet27_slim", "vovnet27s"), ("vovnet39", "vovnet39"), ("vovnet57", "vovnet57")]
)
def test_pytorchcv_names(name, theirs):
    net = getattr(pytorchcv.models.vovnet, theirs)()
    assert net.state_dict().keys() == convert.names("pytorchcv", ARCHS[name]).keys()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda sd: {"model": sd},
        lambda sd: {"state_dict": sd, "epoch": 3, "arch": "vovnet", "best_acc1": 0.5},
        lambda sd: {f"module.{key}": x for key, x in sd.items()},
        lambda sd: {f"model.{key}": x for key, x in sd.items()},
        lambda sd: {
            "model": {f"module.{key}": x for key, x in sd.items()},
            "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
            "scheduler": {"last_epoch": 9},
            "iteration": 9,
        },
    ],
)
def test_wrapping_is_taken_off(checkpoint, wrap):
    plain, wrapped = convert.convert(checkpoint, ARCHS), convert.convert(wrap(checkpoint), ARCHS)
    assert plain.state_dict.keys() == wrapped.state_dict.keys() and plain[:2] == wrapped[:2]
    assert all(torch.equal(plain.state_dict[key], wrapped.state_dict[key]) for key in plain.state_dict)


def test_other_tensors_beside_the_weights_are_named(checkpoint):
    with pytest.raises(ValueError, match="averaged"):
        convert.convert({"model": checkpoint, "averaged": {"w": torch.zeros(1)}}, ARCHS)


def test_any_tensor_missing_or_renamed_is_named(form, checkpoint):
    for name, weights in broken(checkpoint):
        with pytest.raises(ValueError) as error:
            convert.convert(weights, {arch: ARCHS[arch] for arch in (SMALLEST[form], "vovnet27_slim") if arch in ARCHS})
        assert name in str(error.value) and len(weights) - len(checkpoint) in (0, -1)
        assert (name + "x" in str(error.value)) == (name + "x" in weights)


@pytest.mark.parametrize("kind", ["authors", "pytorchcv", "timm"])
def test_any_tensor_missing_or_renamed_is_named_by_timm(kind):
    """The error comes also where timm itself would not load strictly: with other classes, or features only."""
    weights, net = published(kind), timm.create_model("vovnet27_slim", num_classes=5)
    for name, fewer in broken(weights):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            checkpoint_filter_fn(fewer, net)
    name = list(weights)[40]
    fewer = {key: x for key, x in weights.items() if key != name}
    for options in ({}, dict(num_classes=5), dict(num_classes=0), dict(features_only=True), dict(in_chans=1)):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            timm.create_model(
                "vovnet27_slim", pretrained=True, pretrained_cfg_overlay=dict(state_dict=fewer), **options
            )
        timm.create_model("vovnet27_slim", pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights), **options)


def test_any_tensor_missing_or_renamed_is_named_by_the_detector(tmp_path):
    model = vovnet_zoo.create_detector("fcos_vovnet27_slim_fpn", num_classes=2, channels=64, num_convs=1)
    weights = model.state_dict()
    for name, fewer in broken(weights):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            hub.load_strict(model, fewer, "test")
    model.save_pretrained(tmp_path)
    name = list(weights)[-1]
    write_safetensors({key: x for key, x in weights.items() if key != name}, tmp_path / hub.WEIGHTS)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        vovnet_zoo.FCOS.from_pretrained(tmp_path)


def test_wrong_tensors_are_named(checkpoint):
    name = next(key for key in checkpoint if "conv" in key)
    for wrong in (torch.float16, torch.float64, torch.int32, torch.complex64):
        with pytest.raises(ValueError, match="dtype: " + name.replace(".", r"\.")):
            convert.convert({**checkpoint, name: checkpoint[name].to(wrong)}, ARCHS)
    with pytest.raises(ValueError, match="not finite: " + name.replace(".", r"\.")):
        convert.convert({**checkpoint, name: checkpoint[name] * torch.inf}, ARCHS)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        convert.convert({**checkpoint, name: "no tensor"}, ARCHS)


def test_wrong_shape_is_named(form, checkpoint):
    name = next(key for key in checkpoint if "conv" in key)
    converted = convert.convert({**checkpoint, name: checkpoint[name][:-1]}, ARCHS)
    if form in convert.FOLDS:
        with pytest.raises(ValueError, match="shape: backbone.(stem_0.conv|conv1).weight"):
            build_converted(converted)
    else:
        with pytest.raises(RuntimeError, match="stem.0.conv.weight"):
            timm.create_model(
                SMALLEST[form], pretrained=True, pretrained_cfg_overlay=dict(state_dict=converted.state_dict)
            )


@pytest.mark.parametrize("nonsense", [{}, {"a": torch.zeros(1)}, {1: torch.zeros(1)}, [1], None, {"model": {}}])
def test_nonsense(nonsense):
    with pytest.raises(ValueError):
        convert.convert(nonsense, ARCHS)


def test_optional_parts():
    """A checkpoint may lack the classifier, or the batch counts of its norms, which old versions of torch lacked."""
    weights = published("authors")
    bare = {key: x for key, x in weights.items() if "classifier" not in key and "num_batches" not in key}
    converted = convert.convert(bare, ARCHS)
    timm.create_model("vovnet27_slim", num_classes=0).load_state_dict(converted.state_dict, strict=True)
    name = next(key for key in weights if "num_batches" in key)
    with pytest.raises(ValueError, match=name):
        convert.convert({key: x for key, x in weights.items() if key != name}, ARCHS)


PREFIXES = ["", "backbone.bottom_up.", "img_backbone.", "backbone.", "model.module.anything."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_of_a_v2_body(prefix):
    weights = published("authors_v2")
    wanted = convert.convert(weights, ARCHS)
    alone = {prefix + name: x for name, x in weights.items()}
    beside = {
        "neck.0.weight": torch.zeros(2),
        f"{prefix}classifier.weight": torch.zeros(2),
        "a.0": torch.zeros(2).half(),
    }
    for checkpoint, part, left_out in [
        (alone, "all", []),
        (alone, "backbone", []),
        ({"state_dict": alone | beside}, "backbone", list(beside)),
    ]:
        found = convert.convert(checkpoint, ARCHS, part)
        assert found[:2] == wanted[:2] and found.left_out == left_out
        assert found.state_dict.keys() == wanted.state_dict.keys()
        assert all(torch.equal(found.state_dict[name], x) for name, x in wanted.state_dict.items())
    with pytest.raises(ValueError, match=r"unexpected: 3 tensors .*neck.0.weight.*--part backbone"):
        convert.convert(alone | beside, ARCHS)
    extra = {f"{prefix}stage2.OSA2_1.more.weight": torch.zeros(2)}  # in the body: nobody knows what it is for
    with pytest.raises(ValueError, match="unexpected: stage2.OSA2_1.more.weight"):
        convert.convert(alone | beside | extra, ARCHS, "backbone")
    fewer = {name: x for name, x in (alone | beside).items() if "ese.fc.bias" not in name}
    with pytest.raises(ValueError, match="missing: stage2.OSA2_1.ese.fc.bias"):
        convert.convert(fewer, ARCHS, "backbone")


def test_bodies_with_the_same_names_differ_in_width():
    """V-19 and V-19-slim have the same names."""
    for arch in ("vovnetv2_19", "vovnetv2_19_slim"):
        converted = convert.convert(published("authors_v2", arch), ARCHS)
        assert converted.arch == arch
        timm.create_model(arch, num_classes=0).load_state_dict(converted.state_dict, strict=True)


@pytest.mark.parametrize(
    "checkpoint, part",
    [
        (published("authors"), "backbone"),
        ({f"{p}.{name}": x for p in "ab" for name, x in published("authors_v2").items()}, "backbone"),
        (published("authors_v2"), "head"),
    ],
    ids=["V1", "two bodies", "no part"],
)
def test_no_body_to_take(checkpoint, part):
    with pytest.raises(ValueError, match="part="):
        convert.convert(checkpoint, ARCHS, part)


def test_fold_needs_positive_variances():
    weights = published("authors_detector")
    name = next(key for key in weights if key.endswith("running_var"))
    with pytest.raises(ValueError, match="above 0"):
        convert.convert({**weights, name: weights[name] * 0}, ARCHS)


def test_fold_is_exact():
    torch.manual_seed(0)
    weight, var = torch.randn(512), torch.rand(512) * 10 ** torch.empty(512).uniform_(-9, 4)
    folded, new_var = convert.fold_eps(weight, var, "var")
    exact = weight.double() / var.double().sqrt()
    ours = folded.double() / (new_var.double() + convert.FROZEN_EPS).sqrt()
    error = ((ours - exact) / exact).abs()
    assert error.median() < 1e-10 and error.max() < 1e-8


def test_convert_imports_only_torch():
    code = "import runpy, sys; runpy.run_path('convert.py'); print({'timm', 'safetensors'} & sys.modules.keys())"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(convert.__file__).parent, capture_output=True, text=True
    )
    assert result.stdout.strip() == "set()", result.stderr


def nested(depth, wrap):
    value = {"a": torch.zeros(1)}
    for _ in range(depth):
        value = wrap(value)
    return value


def in_itself():
    value = {"a": torch.zeros(1)}
    value["model"] = value
    return value


@pytest.mark.parametrize(
    "checkpoint",
    [
        nested(100_000, lambda value: {"model": value}),
        in_itself(),
        {"model": {"a": torch.zeros(1)}, "more": nested(100_000, lambda value: [value])},
        {"model": {"a": torch.zeros(1)}, "more": nested(100, lambda value: [value, value])},
        {"module." * 100_000 + "a": torch.zeros(1)},
        {nested(500, lambda value: (1,) if isinstance(value, dict) else (value,)): torch.zeros(1)},
    ],
    ids=["checkpoints", "in itself", "lists", "laughs", "prefixes", "keys"],
)
def test_nesting_without_end(checkpoint):
    with pytest.raises(ValueError) as error:
        convert.convert(checkpoint, ARCHS)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize("form", ["authors"], indirect=True)
@pytest.mark.parametrize(
    "odd",
    [
        lambda: torch.zeros(1).expand(10**12),
        lambda: torch.zeros(10).as_strided((10**6, 10**6), (0, 0)),
        lambda: torch.zeros(3, 3).to_sparse(),
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        lambda: torch.empty(10**12, device="meta"),
        lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    ],
    ids=["stride 0", "strides 0", "sparse", "nested", "meta", "quantised"],
)
@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_odd_tensors_are_not_touched(form, checkpoint, odd):
    name = next(key for key in checkpoint if "conv" in key)
    with pytest.raises(ValueError, match=f"not a plain tensor: {name}"):
        convert.convert({**checkpoint, name: odd()}, ARCHS)


@pytest.mark.parametrize("form", ["authors_detector", "torchvision_detector"], indirect=True)
@pytest.mark.parametrize("shape", [(), (2, 3), (20_000,), (0,)])
def test_odd_shapes_of_a_detector(form, checkpoint, shape):
    """No shape takes memory or raises anything else, before a model compares it."""
    names = [key for key in checkpoint if ".stem_1/" in key or ".body.bn1." in key or "cls_logits" in key]
    names += [key for key in checkpoint if "scales.0" in key]
    assert len(names) == (8 if form == "authors_detector" else 6)
    for name in names:
        with pytest.raises(ValueError):
            build_converted(convert.convert({**checkpoint, name: torch.ones(shape)}, ARCHS))
    together = {key: torch.ones(shape) for key in names if "norm" in key or ".bn1." in key}
    with pytest.raises(ValueError):
        build_converted(convert.convert({**checkpoint, **together}, ARCHS))


@pytest.mark.parametrize("kind, name", [("authors_detector", "rpn.head.cls_logits"), ("authors", "classifier")])
@pytest.mark.parametrize("bias", [torch.zeros(90_000), torch.tensor(0.0)])
def test_a_model_takes_no_memory_before_the_shapes_fit(monkeypatch, kind, name, bias):
    """A file of 360 KB could ask for a class layer of gigabytes."""
    checkpoint, devices = {**published(kind), f"{name}.bias": bias}, []

    def watched(real):
        def build(*arguments, **options):
            devices.append(torch.empty(0).device.type)
            return real(*arguments, **options)

        return build

    monkeypatch.setattr(detectors, "FCOS", watched(detectors.FCOS))
    monkeypatch.setattr(classifiers.timm, "create_model", watched(timm.create_model))
    with pytest.raises(ValueError, match="shape"):
        converted = convert.convert(checkpoint, ARCHS)
        if kind == "authors_detector":
            build_converted(converted)
        else:
            publish.build_for_timm(converted.arch, converted.state_dict)
    assert set(devices) <= {"meta"}
