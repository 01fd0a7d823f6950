"""An exported file computes what the model computes, or there is no file."""

import base64
import copy
import dataclasses
import importlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from exports import MEAN, pictures, small_detector
from PIL import Image
from samples import busy, draw_video
from torch.utils.cpp_extension import include_paths, library_paths

import eval_coco
import vovnet_zoo
from vovnet_zoo import create_detector, export_detector, load_detector, predict
from vovnet_zoo.evaluation.coco_eval import coco_metrics
from vovnet_zoo.export import accuracy, blame, certificate, cpu, pairs, registry, runtimes
from vovnet_zoo.export.graph import DetectorGraph, NetworkGraph
from vovnet_zoo.exported import ExportedDetector
from vovnet_zoo.inference import choose_thresholds
from vovnet_zoo.nms import nms_fixed
from vovnet_zoo.predict_files import predict_files
from vovnet_zoo.results import Detections

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("openvino")

GUIDES = Path(__file__).resolve().parents[1] / "recipes" / "guides"
SHARED = Path(__file__).resolve().parents[2] / "shared"
NO_OPENVINO = "ONEDNN_MAX_CPU_ISA" in os.environ  # OpenVINO would crash
WITH_OPENVINO = pytest.param("openvino", marks=pytest.mark.skipif(NO_OPENVINO, reason="OpenVINO would crash"))
FILES = {"onnx": "model.onnx", "openvino": "model.xml"}


@pytest.fixture(scope="module")
def model():
    return small_detector()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """Export to a format once, for images of any number and size; returns the folder and the certificate.

    OpenVINO gets the ONNX file that is there already, which takes most of the time.
    """
    made = {}

    def export(format: str):
        if format in made:
            return made[format]
        out = tmp_path_factory.mktemp("exported") / format
        with pytest.MonkeyPatch.context() as patch:
            if format == "openvino":
                onnx_file = export("onnx")[0] / "model.onnx"
                reuse_onnx(patch, "vovnet_zoo.export.openvino.write_onnx", lambda file: shutil.copy(onnx_file, file))
            made[format] = out, export_detector(model, out, format=format)
        return made[format]

    return export


def reuse_onnx(patch, writer, make):
    """In place of a trace and its translation, let `make(file)` write the ONNX file."""

    def write(graph, program, file, precision):
        make(file)
        return importlib.import_module("vovnet_zoo.export.onnx").name_layers(onnx.load(file).graph, graph)

    patch.setattr(writer, write)
    patch.setattr("vovnet_zoo.export.trace", lambda *arguments: None)


def assert_same(found, wanted):
    """The same boxes in the same order, up to roundings; scores that are as good as equal may change places."""
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        assert len(want["scores"]) > 5 and got.size == want.size and got.names is not None
        found_twice = pairs.match(as_detections(want), as_detections(got))
        assert len(found_twice) == len(want["scores"]) == len(got["scores"])
        i, j = torch.tensor(found_twice).T
        torch.testing.assert_close(got["boxes"][j], want["boxes"][i], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(got["scores"], want["scores"], rtol=1e-4, atol=0)


def as_detections(found):
    return Detections(found["boxes"], found["scores"], found["labels"], len(found["scores"]))


@pytest.mark.parametrize("format", ["onnx", WITH_OPENVINO])
def test_the_file_computes_what_the_model_computes(exported, model, format):
    """Batches of any number, and sizes that 128 does not divide."""
    out, made = exported(format)
    images = pictures((64, 64), (64, 64), (64, 64), (70, 100), (160, 64), (90, 200))
    detector = load_detector(out / FILES[format])
    assert "classes" in repr(detector) and repr(detector).endswith(", float32, images of any size, any at a time)")
    wanted = predict(model, images)
    assert_same(predict(detector, images), wanted)
    assert_same(predict(detector, images, batch_size=3), wanted)
    assert made["matched"] == 1 and made["detections"] > 50 and made["images_are"] == "drawn"
    assert made["largest_box_difference"] < 0.05 and made["largest_score_difference"] < 1e-4
    written = json.loads((out / "certificate.json").read_text())
    assert written["certificate"] == json.loads(json.dumps(made)) and len(written["weights_sha256"]) == 64
    assert "model" in (out / "README.md").read_text()
    names = {"onnx": {"model.onnx"}, "openvino": {"model.xml", "model.bin"}}[format]
    assert {x.name for x in out.iterdir()} == {"certificate.json", "README.md"} | names  # nothing else is left


def test_the_onnx_file_is_valid_and_knows_itself(exported, model):
    file = onnx.load(exported("onnx")[0] / "model.onnx")
    onnx.checker.check_model(file, full_check=True)
    assert [(x.domain, x.version) for x in file.opset_import if not x.domain] == [("", 18)]
    assert [x.name for x in file.graph.input] == ["images", "sizes"]
    assert [x.name for x in file.graph.output] == ["boxes", "scores", "labels", "count"]
    assert {node.domain for node in file.graph.node} == {""}  # no operator of our own
    shapes = [[dim.dim_param or dim.dim_value for dim in x.type.tensor_type.shape.dim] for x in file.graph.input]
    assert shapes == [["batch", 3, "height", "width"], ["batch", 2]]
    written = file.SerializeToString()
    for path in (vovnet_zoo, torch):  # no paths of this machine
        assert str(Path(path.__file__).parent).encode() not in written
    facts = {x.key: json.loads(x.value) for x in file.metadata_props}
    assert facts["config"] == json.loads(json.dumps(model.config)) and facts["vovnet_zoo"] == vovnet_zoo.__version__
    assert facts["thresholds"]["nms_threshold"] == 0.6 and facts["certificate"]["matched"] == 1


@pytest.mark.parametrize("plus_one", [False, True])
def test_nms_in_onnx(plus_one):
    """The translation keeps what `nms_fixed` keeps, with equal scores, and with fewer boxes than places."""
    from vovnet_zoo.export.onnx import translate_nms

    class Keep(torch.nn.Module):
        def forward(self, boxes, scores, labels):
            return torch.ops.vovnet_zoo.nms_fixed(boxes, scores, labels, 0.5, 20, plus_one)

    generator = torch.Generator().manual_seed(0)
    count = torch.export.Dim("count", min=1, max=1000)
    session = None
    for places in (200, 7):
        corner = torch.randint(0, 40, (3, places, 2), generator=generator).float()
        boxes = torch.cat([corner, corner + torch.randint(4, 20, (3, places, 2), generator=generator)], -1)
        scores = torch.randint(-3, 30, (3, places), generator=generator) / 30  # equal ones, and places without a box
        labels = torch.randint(0, 3, (3, places), generator=generator)
        inputs = boxes, scores, labels
        if session is None:
            table = {torch.ops.vovnet_zoo.nms_fixed.default: translate_nms(3)}
            dims = tuple({1: count} for _ in inputs)
            made = torch.onnx.export(Keep(), inputs, dynamo=True, verbose=False, opset_version=18,
                                     dynamic_shapes=dims, custom_translation_table=table)  # fmt: skip
            session = onnxruntime.InferenceSession(made.model_proto.SerializeToString())
        feeds = {x.name: y.numpy() for x, y in zip(session.get_inputs(), inputs, strict=True)}
        wanted = nms_fixed(*inputs, 0.5, 20, plus_one)
        assert (wanted >= 0).sum() > 9
        assert session.run(None, feeds)[0].tolist() == wanted.tolist()


# ---- pt2 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plus_one", [False, True])
def test_nms_in_plain_operators(plus_one):
    """It keeps what `nms_fixed` keeps, with equal scores, and with fewer boxes than places."""
    from vovnet_zoo.export.pt2 import nms_plain

    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 40, (3, 200, 2), generator=generator).float()
    boxes = torch.cat([corner, corner + torch.randint(4, 20, (3, 200, 2), generator=generator)], -1)
    scores = torch.randint(-3, 30, (3, 200), generator=generator) / 30
    labels = torch.randint(0, 3, (3, 200), generator=generator)
    scores[1, 7:] = -1
    wanted = nms_fixed(boxes, scores, labels, 0.5, 20, plus_one)
    assert (wanted >= 0).sum() > 40 and (wanted[1, 7:] == -1).all()
    assert nms_plain(boxes, scores, labels, 0.5, 20, plus_one).tolist() == wanted.tolist()


def test_a_package_of_another_cpu_is_refused(model, tmp_path):
    """A package says for which instructions it was compiled, and its code is not loaded where they are not there."""
    from torch.export.pt2_archive._package import PT2ArchiveWriter

    from vovnet_zoo.export import pt2, runtimes

    file = tmp_path / "model.pt2"
    with PT2ArchiveWriter(str(file)) as writer:
        writer.write_string("data/aotinductor/model/x.wrapper_metadata.json", '{"AOTI_DEVICE_KEY": "cpu"}')
        writer.write_bytes("data/aotinductor/model/x.wrapper.so", b"no code")
    facts = {"config": model.config, "size": (64, 96)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pt2, "compiled_for", lambda: ["avx1024", "fma3"])
        pt2.write_facts(file, facts)
        assert pt2.versions()["instructions"] == ["avx1024", "fma3"]
    kept = runtimes.read_package(file)
    assert kept["AOTI_DEVICE_KEY"] == "cpu" and kept["class_names"] == "red\ngreen" and kept["size"] == "[64, 96]"
    with pytest.raises(ValueError, match="compiled for a CPU with .*avx1024.*, which this one lacks"):
        load_detector(file)
    pt2.write_facts(file, facts)
    with pytest.raises(ValueError, match="torch cannot load it"):
        load_detector(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="torch cannot load it"):
        load_detector(file)


def test_pt2_needs_a_compiler(model, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        export_detector(model, tmp_path / "out", format="pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_pt2(model, tmp_path):
    """A package gives the same boxes in `predict`, and without this library in Python and in C++."""
    out = tmp_path / "out"
    made = export_detector(model, out, format="pt2")
    assert made["matched"] == 1 and made["detections"] > 50
    assert {x.name for x in out.iterdir()} == {"certificate.json", "README.md", "model.pt2"}
    detector, images = load_detector(out / "model.pt2"), pictures((64, 64), (64, 64), (64, 90), (160, 64))
    wanted = predict(model, images)
    assert_same(predict(detector, images, batch_size=2), wanted)

    Image.fromarray(images[2].permute(1, 2, 0).numpy()).save(tmp_path / "image.ppm")
    np.save(tmp_path / "image.npy", images[2].permute(1, 2, 0).numpy())
    program = (
        "import runpy, sys; runpy.run_path(sys.argv.pop(1)); "
        "sys.exit(bool({'timm', 'torchvision', 'vovnet_zoo'} & sys.modules.keys()))"
    )
    np.save(tmp_path / "whole.npy", images[0].permute(1, 2, 0).numpy())  # it needs no padding, which copies
    for name, found in (("image.npy", wanted[2]), ("whole.npy", wanted[0])):
        script = [GUIDES / "detect_pt2.py", out / "model.pt2", name]
        printed = outputs([sys.executable, "-c", program, *script], tmp_path)
        assert_printed([json.loads(line) for line in printed], found)
    strided = images[0][None].contiguous(memory_format=torch.channels_last)
    assert detector(strided, torch.tensor([[64, 64]])).count.tolist() == [len(wanted[0]["boxes"])]

    flags = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    flags += [f"-Wl,-rpath,{path}" for path in library_paths()]
    libraries = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    outputs(["g++", "-std=c++20", GUIDES / "detect_pt2.cpp", "-o", "detect", *flags, *libraries], tmp_path)
    printed = outputs([tmp_path / "detect", out / "model.pt2", "image.ppm"], tmp_path)
    rows = [(name, float(score), [float(x) for x in box]) for name, score, *box in map(str.split, printed)]
    assert_printed(rows, wanted[2])


def outputs(command, folder):
    """Run a command without this library on its path, and return what it prints."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def assert_printed(rows, want):
    """The rows (name, score, box) that an example printed are the detections of one image."""
    assert len(rows) == len(want["scores"]) > 5
    for name, score, box in rows:
        near = (want["boxes"] - torch.tensor(box)).abs().amax(1) < 0.02
        near &= (want["scores"] - score).abs() < 1e-3
        assert name in [want.names[i] for i in near.nonzero()[:, 0]]


# ---- broken files ---------------------------------------------------------------------------------------------------


def change_mean(graph):
    """Give the red channel, whose mean the exporter made a constant, the mean of another model."""
    changed = [x for x in graph.initializer if np.allclose(onnx.numpy_helper.to_array(x), 255 * MEAN[0])]
    assert len(changed) == 1
    replace(changed[0], np.array(255 * 0.5, np.float32).reshape(onnx.numpy_helper.to_array(changed[0]).shape))


def swap_channels(graph):
    first = next(node for node in graph.node if node.op_type == "Conv").input[1]
    weight = next(x for x in graph.initializer if x.name == first)
    replace(weight, onnx.numpy_helper.to_array(weight)[:, ::-1])


def round_to_4_bits(graph):
    weight = next(x for x in graph.initializer if x.name == "model.head.box_tower.0.weight")
    numbers = onnx.numpy_helper.to_array(weight)
    step = np.abs(numbers).max() / 7
    replace(weight, np.round(numbers / step) * step)


def change_nms(graph):
    node = next(node for node in graph.node if node.op_type == "NonMaxSuppression")
    threshold = next(x for x in graph.initializer if x.name == node.input[3])
    replace(threshold, np.array([0.3], np.float32))


def replace(initializer, numbers):
    initializer.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(numbers, np.float32), initializer.name))


BROKEN = {
    change_mean: r"first layer that differs is backbone.*conv1.*, or what is done to the images before it",
    swap_channels: r"first layer that differs is backbone.*conv1.*, or what is done to the images before it",
    round_to_4_bits: r"first layer that differs is head.box_tower.0 ",
    change_nms: r"no layer differs by more than 0.001 .most: .*e-0.*, so it happens after them, in decoding or NMS",
}


@pytest.fixture
def tampered(exported, monkeypatch):
    """Let the exporter write the file of `exported`, changed by a function."""
    source = exported("onnx")[0] / "model.onnx"

    def tamper(change):
        def make(file):
            broken = onnx.load(source)
            change(broken.graph)
            onnx.save(broken, file)

        writers = ["vovnet_zoo.export.onnx.write"]
        if not NO_OPENVINO:
            writers.append("vovnet_zoo.export.openvino.write_onnx")
        for writer in writers:
            reuse_onnx(monkeypatch, writer, make)

    return tamper


@pytest.mark.parametrize("change", BROKEN)
def test_a_broken_export_is_refused(tampered, model, change, tmp_path):
    """The message names the image and the layer, and there is no file; what was there before is as it was."""
    tampered(change)
    with pytest.raises(
        ValueError, match=f"the file was deleted.*worst image: drawn picture.*{BROKEN[change]}"
    ) as error:
        export_detector(model, tmp_path / "out")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.onnx").write_text("an earlier one")
    with pytest.raises(ValueError, match="the file was deleted"):
        export_detector(model, tmp_path / "out", overwrite=True)
    assert [x.read_text() for x in (tmp_path / "out").iterdir()] == ["an earlier one"]


@pytest.mark.skipif(NO_OPENVINO, reason="OpenVINO would crash")
@pytest.mark.parametrize("change", BROKEN)
def test_a_broken_openvino_export_is_refused(tampered, model, change, tmp_path):
    """OpenVINO converts the broken file, and its own maps say where the fault is."""
    tampered(change)
    with pytest.raises(ValueError, match=f"OpenVINO computes something else .*{BROKEN[change]}"):
        export_detector(model, tmp_path / "out", format="openvino")
    assert not list(tmp_path.iterdir())


def test_a_tie_is_let_pass_and_a_fault_beside_it_is_not(model, monkeypatch):
    """Two boxes overlap as much as the threshold allows, so rounding decides whether both are found."""
    bounds, usual = pairs.BOUNDS["float32"], choose_thresholds(model, {})
    (item,), _ = certificate.choose_images(model, pictures((64, 90)), usual, None)
    found = certificate.reference(model, item, usual)
    ious = torchvision.ops.box_iou(found.boxes.double(), found.boxes.double()).triu(1)
    iou = float((ious * (found.labels[:, None] == found.labels)).max())
    lower, higher = (usual._replace(nms_threshold=iou + shift) for shift in (-1e-6, 1e-6))
    want, got = (certificate.reference(model, item, thresholds) for thresholds in (higher, lower))
    (lost,) = set(range(len(want.scores))) - {i for i, _ in pairs.match(want, got)}
    written = registry.Written(registry.FORMATS["pt2"], Path("model.pt2"), DetectorGraph(model, higher), None, {})

    def certify(found):
        as_file = [x[None] for x in found[:3]] + [torch.tensor([len(found.scores)])]
        monkeypatch.setattr(certificate, "load_exported", lambda file: lambda *_: Detections(*as_file))
        monkeypatch.setattr(certificate, "blame", lambda *_: "")  # there is no file
        return certificate.certify(model, higher, written, [item], bounds)

    def without(found, place):
        rest = [i for i in range(len(found.scores)) if i != place]
        return Detections(found.boxes[rest], found.scores[rest], found.labels[rest], len(rest))

    assert certify(want)["ties"] == 0
    made = certify(got)
    assert made["ties"] >= 1 and made["matched"] == 1 - made["ties"] / (len(want.scores) + len(got.scores))
    for broken in (without(got, 0), without(want, 0 if lost else 1)):
        with pytest.raises(ValueError, match="computes something else than PyTorch.* detections match"):
            certify(broken)


def test_a_near_copy_that_nms_chose_instead_is_a_tie(model, monkeypatch):
    """It overlaps the other box so much that the two are a pair, but is another candidate."""
    bounds, usual = pairs.BOUNDS["float32"], choose_thresholds(model, {})
    (item,), _ = certificate.choose_images(model, pictures((64, 90)), usual, None)
    want = certificate.reference(model, item, usual)
    moved = want.boxes.clone()
    moved[0] += 2.3
    assert pairs.differences(want, want._replace(boxes=moved)) == (len(moved), {"box": pytest.approx(2.3), "score": 0})
    as_file = [moved[None], want.scores[None], want.labels[None], torch.tensor([len(moved)])]
    monkeypatch.setattr(certificate, "load_exported", lambda file: lambda *_: Detections(*as_file))
    written = registry.Written(registry.FORMATS["pt2"], Path("model.pt2"), DetectorGraph(model, usual), None, {})
    monkeypatch.setattr(certificate, "differ_by_ties", lambda *_: True)
    made = certificate.certify(model, usual, written, [item], bounds)
    assert (made["ties"], made["largest_box_difference"]) == (2, 0) and made["matched"] == 1 - 1 / len(moved)
    monkeypatch.setattr(certificate, "differ_by_ties", lambda *_: False)
    monkeypatch.setattr(certificate, "blame", lambda *_: "no layer")
    with pytest.raises(ValueError, match="boxes differ by up to 2.3 px"):
        certificate.certify(model, usual, written, [item], bounds)


def test_no_layer_of_a_whole_file_is_blamed(exported, model):
    file, bounds = exported("onnx")[0] / "model.onnx", pairs.BOUNDS["float32"]
    thresholds = choose_thresholds(model, {})
    graph = DetectorGraph(model, thresholds).eval()
    layers = importlib.import_module("vovnet_zoo.export.onnx").name_layers(onnx.load(file).graph, graph)
    assert {"model.head.box_tower.0", "model.fpn.layer_blocks.0.0"} <= layers.keys()
    (item,), _ = certificate.choose_images(model, pictures((64, 90)), thresholds, None)
    assert len(blame.record_maps(graph, layers, blame.as_batch(item))) == len(layers) > 15
    written = registry.Written(registry.FORMATS["onnx"], file, graph, None, layers)
    assert blame.blame(written, item, bounds).startswith("the copy of the model that was exported")


# ---- the AP ---------------------------------------------------------------------------------------------------------


def test_the_ap_of_both(tampered, model, tiny_coco, tmp_path):
    """With a dataset, the certificate and the card have both APs, and the difference with its interval."""
    tampered(lambda graph: None)
    made = export_detector(model, tmp_path / "out", images=tiny_coco / "val", data=tiny_coco, max_ap_difference=1e-3)
    assert made["images_are"] == "the user's" and made["data_images"] == 3
    truth = eval_coco.main(eval_coco.EvalConfig(str(tmp_path / "out" / "model.onnx"), tiny_coco, device="cpu"))
    assert made["AP"] == pytest.approx(truth["AP"], abs=1e-9) and made["AP"] > 0
    low, high = made["AP_difference_interval"]
    assert low - 1e-9 <= made["AP_difference"] <= high + 1e-9 and made["AP_bound"] == 1e-3
    assert f"{made['AP']:.4f}, in PyTorch" in (tmp_path / "out" / "README.md").read_text()


def test_the_command_prints_the_certificate(run, tampered, model, tiny_coco, tmp_path):  # noqa: F811
    tampered(lambda graph: None)
    model.save_pretrained(tmp_path / "model")
    options = ["--images", tiny_coco / "val", "--data", tiny_coco, "--score", "0"]
    status, out, err = run("export", tmp_path / "model", "--out", tmp_path / "out", *options)
    assert status == 0 and len(out.splitlines()) == 1, err
    assert "found by both: 100.00%" in out and "AP on 3 images: 0." in out and "(95%: " in out
    waits = [
        "tracing and writing model.onnx, which takes a minute or so",
        "comparing with PyTorch on 3 images, then by AP",
    ]
    assert err.splitlines() == waits
    options += ["--nms-threshold", "0.4", "--overwrite"]  # the file that `tampered` writes has another
    status, _, err = run("export", tmp_path / "model", "--out", tmp_path / "out", *options)
    assert status == 2 and "in decoding or NMS" in err
    status, _, err = run(
        "predict",
        tiny_coco / "val",
        "--model",
        tmp_path / "out" / "model.onnx",
        "--out",
        tmp_path / "x",
        "--nms-threshold",
        "0.4",
    )
    assert status == 2 and "nms_threshold=0.4" in err


def test_another_ap_is_refused(exported, model, tiny_coco, tmp_path):
    """The message names the image whose own AP changes most, and layers that differ on it."""
    broken = onnx.load(exported("onnx")[0] / "model.onnx")
    swap_channels(broken.graph)
    onnx.save(broken, tmp_path / "model.onnx")
    dataset, thresholds = accuracy.open_dataset(tiny_coco, model), choose_thresholds(model, {"score_threshold": 0.0})
    comparison = accuracy.Comparison(model, dataset, thresholds, None)
    graph = DetectorGraph(model, thresholds).eval()
    layers = importlib.import_module("vovnet_zoo.export.onnx").name_layers(broken.graph, graph)
    written = registry.Written(registry.FORMATS["onnx"], tmp_path / "model.onnx", graph, None, layers)
    made = comparison.certify(written, dataclasses.replace(pairs.BOUNDS["int8"], ap=1.0))
    worst = dataset.file_names[most_changed(comparison, written, made["AP_difference"])]
    for precision, where in {
        "int8": r"the layers that differ most there: \S+ \(.* of its largest value\), \S+ \(.*\), \S+ \(.*\)",
        "float32": "the first layer that differs is backbone.*conv1.*, or what is done to the images before it",
    }.items():
        message = f"AP of 0.* and PyTorch .*they may differ by 1e-06.*worst image: {worst}; {where}$"
        with pytest.raises(ValueError, match=message):
            comparison.certify(written, dataclasses.replace(pairs.BOUNDS[precision], ap=1e-6))


def most_changed(comparison, written, change):
    """Score each image alone, and return the position of the one whose AP changes most, up or down as `change`."""
    ids, categories = comparison.dataset.image_ids.tolist(), comparison.dataset.category_ids
    found = comparison.detect(load_detector(written.file), range(len(ids)))
    changes = []
    for image_id, *both in zip(ids, comparison.wanted, found, strict=True):
        want, got = (
            coco_metrics(comparison.dataset.annotations, x.to_coco(image_id, categories), image_ids=[image_id])["AP"]
            for x in both
        )
        changes.append((got - want) * np.sign(change))
    return int(np.argmax(changes))


def test_a_dataset_of_other_classes(model, tiny_coco, tmp_path):
    other = copy.deepcopy(model)
    other.config["class_names"] = ["green", "blue"]
    with pytest.raises(ValueError, match="has the classes .*'red'.*, and the model .*'blue'"):
        export_detector(other, tmp_path / "out", data=tiny_coco)
    assert not (tmp_path / "out").exists()


# ---- the network alone ----------------------------------------------------------------------------------------------


def test_raw(model, tmp_path):
    """The network alone gives what the model gives; `load_detector` refuses it."""
    made = export_detector(model, tmp_path / "out", raw=True, size=(64, 96), batch=1)
    assert 0 < max(made["largest_relative_differences"].values()) < 1e-4
    file = tmp_path / "out" / "model.onnx"
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        preds = model(images)
    found = onnxruntime.InferenceSession(file).run(None, {"images": images.numpy()})
    for got, want in zip(found, (preds.logits, preds.distances, preds.centerness), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="network alone"):
        load_detector(file)

    def shift(file):
        changed = onnx.load(file)
        round_to_4_bits(changed.graph)
        onnx.save(changed, file)

    shift(file)
    graph = NetworkGraph(model).eval()
    layers = importlib.import_module("vovnet_zoo.export.onnx").name_layers(onnx.load(file).graph, graph)
    written = registry.Written(registry.FORMATS["onnx"], file, graph, None, layers)
    (item,), _ = certificate.choose_images(model, pictures((64, 90)), choose_thresholds(model, {}), (64, 96))
    with pytest.raises(ValueError, match="differ by .* of the largest.*first layer that differs is head.box_tower.0 "):
        certificate.certify_network(model, written, [item], pairs.BOUNDS["float32"])


# ---- int8 -----------------------------------------------------------------------------------------------------------


def test_int8_needs_images_and_a_dataset(model, tiny_coco, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(registry, "need", lambda name: None)
    for lacking in (dict(images=tiny_coco / "val"), dict(data=tiny_coco)):
        with pytest.raises(ValueError, match="give images .* and data"):
            export_detector(model, tmp_path / "out", format="openvino", precision="int8", **lacking)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx_vnni": False})
    cpu.warn_of_the_cpu()
    assert "no instructions for int8" in caplog.text
    caplog.clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx_vnni": True})
    cpu.warn_of_the_cpu()
    assert cpu.int8_instructions() == ["avx_vnni"] and not caplog.text


@pytest.mark.slow
@pytest.mark.skipif(NO_OPENVINO, reason="OpenVINO would crash")
def test_int8(model, tiny_coco, tmp_path, monkeypatch):
    """Convolutions compute in 8 bits; where the AP suffers, layers stay float32, and the certificate names them."""
    pytest.importorskip("nncf", reason="int8 needs the extra `export`")
    common = dict(
        format="openvino", precision="int8", images=tiny_coco / "train", data=tiny_coco, size=(64, 96), batch=1
    )
    made = export_detector(model, tmp_path / "out", **common, max_ap_difference=1.0)
    assert {"head.box_tower.0", "fpn.layer_blocks.0.0"} <= set(made["int8_layers"]) and not made["float_layers"]
    assert made["matched"] < 1 and made["seconds_per_call"]["int8"] > 0
    assert 'element_type="i8"' in (tmp_path / "out" / "model.xml").read_text()
    (image,) = pictures((64, 90))
    assert len(predict(load_detector(tmp_path / "out" / "model.xml"), image)[0]["scores"]) > 5

    bound = abs(made["AP_difference"]) / 2
    assert bound > 0
    kept = export_detector(model, tmp_path / "kept", **common, max_ap_difference=bound)
    assert kept["float_layers"] and abs(kept["AP_difference"]) <= bound
    assert sorted(kept["float_layers"] + kept["int8_layers"]) == made["int8_layers"]
    card = (tmp_path / "kept" / "README.md").read_text()
    assert f"| layers in float32 | {len(kept['float_layers'])}: {kept['float_layers'][0]}" in card


# ---- what cannot be done --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(format="tflite"), "format='tflite': give 'onnx' or 'openvino' or 'pt2' or"),
        (dict(format="executorch"), "has no loops .while_loop., and the NMS is one; choose onnx or openvino or pt2"),
        (dict(precision="int4"), "precision='int4': give 'float32' or 'float16' or 'int8'"),
        (dict(precision="int8"), "precision='int8': format 'onnx' has float32 and float16"),
        (dict(max_ap_difference=0.1), "give data too"),
        (dict(raw=True, score_threshold=0.1), "raw: the network alone has no detections"),
        (dict(size=(100, 64)), "multiples of 32"),
        (dict(size=(32, 64)), "size=32: give a whole number from 64"),
        (dict(batch=0), "batch=0"),
        (dict(nms_threshold=2), "nms_threshold=2"),
    ],
)
def test_what_cannot_be_done(model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_detector(model, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_nothing_to_compare(model, tmp_path):
    blind = copy.deepcopy(model)
    torch.nn.init.constant_(blind.head.cls_logits.bias, -30)
    with pytest.raises(ValueError, match=r"finds nothing in 32 drawn pictures.*\(--images\)"):
        export_detector(blind, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_reports_in_one_line(run, model, tmp_path, monkeypatch):  # noqa: F811
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "file").touch()
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "model.onnx").touch()
    before = sorted(tmp_path.rglob("*"))
    for out, message in (("file/out", "file is a file); give another place"), ("there", "is there already")):
        status, _, err = run("export", tmp_path / "model", "--out", tmp_path / out)
        assert status == 2 and message in err and len(err.splitlines()) == 1, err
    status, _, err = run("export", tmp_path / "model", "--out", tmp_path / "out", "--images", tmp_path / "none")
    assert status == 2 and "no such file or folder" in err and len(err.splitlines()) == 1
    status, _, err = run("export", tmp_path / "there" / "model.onnx", "--out", tmp_path / "out")
    assert status == 2 and "exported file already" in err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    status, _, err = run("export", tmp_path / "model", "--out", tmp_path / "out")
    assert status == 2 and "pip install 'vovnet_zoo[export]'" in err and len(err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_openvino_is_refused_where_it_crashes(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    with pytest.raises(ValueError, match="unset it"):
        registry.choose_format("openvino", "float32")


def test_files_that_are_no_exports(exported, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_detector(tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="model.onnx is an exported file, for which there is no revision; leave it"):
        load_detector(tmp_path / "model.onnx", revision="v2")
    with pytest.raises(ValueError, match=r"the folder of an exported file; give the file: .*model\.onnx"):
        load_detector(exported("onnx")[0])
    (tmp_path / "model.onnx").write_bytes((exported("onnx")[0] / "model.onnx").read_bytes()[:-5000])
    with pytest.raises(ValueError, match="ONNX Runtime cannot load it"):
        load_detector(tmp_path / "model.onnx")
    value = onnx.helper.make_tensor_value_info("x", 1, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", [value],
                                   [onnx.helper.make_tensor_value_info("y", 1, [1])])  # fmt: skip
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(made, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="not written by vovnet-zoo export"):
        load_detector(tmp_path / "other.onnx")


# ---- what takes an exported file ------------------------------------------------------------------------------------


def test_options_of_predict(exported, model):
    detector, images = load_detector(exported("onnx")[0] / "model.onnx"), pictures((64, 96))
    options = dict(score_threshold=float(predict(model, images)[0]["scores"][9]) - 1e-3, max_detections=50)
    assert_same(predict(detector, images, **options), predict(model, images, **options))
    for wrong in (dict(nms_threshold=0.5), dict(max_detections=101)):
        with pytest.raises(ValueError, match="was exported with"):
            predict(detector, images, **wrong)
    for wrong in (dict(precision="bf16"), dict(compile=True)):
        with pytest.raises(ValueError, match="leave them out"):
            predict(detector, images, **wrong)
    with pytest.raises(ValueError, match="score_threshold=2"):
        predict(detector, images, score_threshold=2)


def test_the_thresholds_of_a_trained_model(model, tmp_path, monkeypatch):
    """A run stores one for each class. Higher ones can be asked for, and the AP needs a file without any."""
    own = choose_thresholds(model, dict(score_threshold={"red": 0.2, "green": 0.3}))

    def run(images, sizes):  # finds two boxes of the first class
        scores = np.array([[0.9, 0.25]], np.float32)
        boxes = np.array([[[1, 1, 9, 9], [20, 20, 40, 40]]], np.float32)
        return [boxes, scores, np.zeros((1, 2), np.int64), np.array([2])]

    detector = ExportedDetector("model.onnx", model.config, own, None, None, "float32", run)
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    for score, count in ((0.3, 1), (0.1, None)):  # as `vovnet-zoo predict --score` does
        options = dict(pictures="none", overwrite=True, score_threshold=score)
        if count is None:
            with pytest.raises(ValueError, match="score_threshold=0.1: .* was exported with"):
                predict_files(detector, [str(tmp_path / "photo.png")], tmp_path / "found", **options)
        else:
            predict_files(detector, [str(tmp_path / "photo.png")], tmp_path / "found", **options)
            found = json.loads((tmp_path / "found" / "detections.jsonl").read_text())
            assert len(found["boxes"]) == count
    chosen = [
        detector.choose_thresholds(dict(score_threshold=x), "float32", False) for x in (0.3, {"red": 1, "green": 0.3})
    ]
    assert chosen[0].score_threshold == 0.3 and chosen[1].score_threshold.tolist() == pytest.approx([1, 0.3])
    for lower in (0.25, {"red": 0.1, "green": 0.3}):
        with pytest.raises(ValueError, match=r"was exported with \[0.2, 0.3\]; export it again"):
            detector.choose_thresholds(dict(score_threshold=lower), "float32", False)
    with pytest.raises(ValueError, match="no class 'blue'"):
        detector.choose_thresholds(dict(score_threshold={"blue": 0.5}), "float32", False)
    monkeypatch.setattr(eval_coco, "load_detector", lambda source: detector)
    with pytest.raises(ValueError, match="score a file of vovnet-zoo export --score 0"):
        eval_coco.main(eval_coco.EvalConfig("model.onnx", tmp_path, device="cpu"))


def test_views_of_an_image(exported, model):
    """Windows, the mirrored image and other scales are looked at as with the model."""
    detector, (image,) = load_detector(exported("onnx")[0] / "model.onnx"), pictures((90, 200))
    for options in (dict(tiles=96), dict(flip=True, scales=(1.0, 1.5))):
        assert_same(predict(detector, image, **options), predict(model, image, **options))


@pytest.mark.skipif(NO_OPENVINO, reason="OpenVINO would crash")
def test_thin_images_in_openvino(exported, model):
    """It computes no VoVNet below 64 pixels, so the images are padded to that."""
    detector = load_detector(exported("openvino")[0] / "model.xml")
    wide, thin = pictures((64, 96), (8, 96))
    found = predict(detector, [wide, thin, wide], score_threshold=0.1)
    item = vovnet_zoo.inference.prepare(vovnet_zoo.sources.Frame("", thin), model.config, least=64)
    want = certificate.reference(model, item, choose_thresholds(model, dict(score_threshold=0.1)))
    assert item.pixels.shape[1] == 64 and len(want.scores) == len(found[1]["scores"])
    torch.testing.assert_close(found[1]["scores"], want.scores, rtol=1e-4, atol=0)
    assert_same([found[0], *predict(detector, wide)], predict(model, [wide, wide], score_threshold=0.1))


def test_openvino_gives_no_result_twice():
    """With one thread it says nothing where it cannot compute an image, and leaves the outputs of the call before."""
    counts = SimpleNamespace(data=np.zeros(1, np.int64))

    def infer(inputs):
        if inputs[0].shape[2] >= 64:
            counts.data[:] = 5
        return [counts.data]

    request = SimpleNamespace(infer=infer, get_output_tensor=lambda place: counts)
    run = runtimes.call_openvino(SimpleNamespace(outputs=[0], create_infer_request=lambda: request))
    large, small = np.zeros((1, 3, 64, 64)), np.zeros((1, 3, 32, 64))
    assert run(large)[0].tolist() == run(large)[0].tolist() == [5]
    with pytest.raises(ValueError, match=r"OpenVINO cannot compute images \[1, 3, 32, 64\]"):
        run(small)
    assert run(large)[0].tolist() == [5]


def test_videos(exported, model, tmp_path):
    pytest.importorskip("av", reason="videos need the extra `video`")
    path = draw_video(tmp_path / "clip.mp4", 3)
    detector = load_detector(exported("onnx")[0] / "model.onnx")
    found, wanted = (list(predict(x, path, stream=True)) for x in (detector, model))
    assert len(found) == 3
    assert_same(found, wanted)


@pytest.mark.parametrize("size", [(64, 96), (64, 64)])
def test_fixed_size_and_batch(model, tmp_path, size):
    """Images are made smaller where they do not fit, and the places of a batch that is not full are not seen."""
    limits = dict(score_threshold=0.1, max_detections=60)
    export_detector(model, tmp_path / "out", size=size, batch=2, **limits)
    detector = load_detector(tmp_path / "out" / "model.onnx")
    assert detector.size == size and detector.batch == 2
    images = pictures((64, 64), (64, 96), (96, 160))
    found = predict(detector, images, batch_size=3)
    for image, got in zip(images, found, strict=True):
        frame = vovnet_zoo.sources.Frame("", image)
        item = vovnet_zoo.inference.prepare(frame, model.config, fixed=size)
        want = certificate.reference(model, item, choose_thresholds(model, limits))
        assert item.pixels.shape[1:] == size and len(want.scores) == len(got["scores"]) > 5
        (h, w), (height, width) = item.size, image.shape[1:]
        scale = torch.tensor([width / w, height / h] * 2)
        torch.testing.assert_close(got["scores"], want.scores, rtol=1e-4, atol=0)
        assert got["boxes"].amax() <= max(height, width) + 1e-3
        assert len(pairs.match(want._replace(boxes=want.boxes * scale), as_detections(got))) == len(want.scores)
    with pytest.raises(ValueError, match="exported with 0.1"):
        predict(detector, images, score_threshold=0.05)


def test_float16(exported, model, tmp_path, monkeypatch, capsys):
    """The weights take half the space, and the file says so; the example pads images to the file's fixed size."""
    made = export_detector(model, tmp_path / "out", precision="float16", size=(64, 96), batch=1)
    whole = exported("onnx")[0] / "model.onnx"
    assert made["bounds"] == vars(pairs.BOUNDS["float16"])
    assert made["largest_score_difference"] > 1e-6  # so the bounds of float32 are not met by chance
    weights = sum(x.numel() * 4 for x in model.parameters())
    file = tmp_path / "out" / "model.onnx"
    assert file.stat().st_size < whole.stat().st_size - 0.4 * weights
    (image,) = pictures((64, 64))
    np.save(tmp_path / "image.npy", image.permute(1, 2, 0).numpy())
    monkeypatch.setattr(sys, "argv", ["", str(file), str(tmp_path / "image.npy")])
    capsys.readouterr()
    runpy.run_path(str(GUIDES / "detect_onnxruntime.py"))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert_printed(rows, predict(load_detector(file), image)[0])


def test_the_command_and_the_evaluation_take_a_file(run, exported, model, tiny_coco, tmp_path):  # noqa: F811
    file = exported("onnx")[0] / "model.onnx"
    model.save_pretrained(tmp_path / "model")
    rows = []
    for name, source in (("torch", tmp_path / "model"), ("onnx", file)):
        options = ["--out", tmp_path / name, "--score", "0.2", "--device", "cpu"]
        status, _, err = run("predict", tiny_coco / "val", "--model", source, *options)
        assert status == 0, err
        rows.append([json.loads(x) for x in (tmp_path / name / "detections.jsonl").read_text().splitlines()])
    assert len(rows[0]) == 3 and [len(row["boxes"]) for row in rows[0]] == [len(row["boxes"]) for row in rows[1]]
    metrics = [eval_coco.main(eval_coco.EvalConfig(str(source), tiny_coco, device="cpu")) for source in
               (tmp_path / "model", file)]  # fmt: skip
    assert metrics[0]["AR100"] > 0 and metrics[0].pop("per_class") == pytest.approx(
        metrics[1].pop("per_class"), abs=1e-3
    )
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-3)


@pytest.mark.parametrize("format", ["onnx", WITH_OPENVINO])
def test_the_example_needs_no_torch(exported, model, format, tmp_path):
    """A script of 20 lines finds the same boxes, with numpy and the runtime alone, in a folder of its own."""
    script = GUIDES / {"onnx": "detect_onnxruntime.py", "openvino": "detect_openvino.py"}[format]
    lines = script.read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 20
    for file in exported(format)[0].iterdir():
        shutil.copy(file, tmp_path)
    (image,) = pictures((64, 90))
    np.save(tmp_path / "image.npy", image.permute(1, 2, 0).numpy())
    program = (
        "import runpy, sys; runpy.run_path(sys.argv.pop(1)); "
        "heavy = {'torch', 'timm', 'vovnet_zoo', 'onnx'} & sys.modules.keys(); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    printed = outputs([sys.executable, "-c", program, script, FILES[format], "image.npy"], tmp_path)
    assert_printed([json.loads(line) for line in printed], predict(model, image)[0])


STAND_INS = """
window.ort = { Tensor: class { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } } };
ort.InferenceSession = { create: async () => ({ run: async (given) => {
  const [h, w] = Array.from(given.sizes.data, Number);
  window.given = { pixels: Array.from(given.images.data), shape: given.images.dims, size: [h, w] };
  return { boxes: { data: [0, 0, w, h] }, scores: { data: [0.5] }, labels: { data: [1n] }, count: { data: [1n] } };
} }) };
const known = %s, read = window.fetch;
window.fetch = async (path) => (path === "certificate.json" ? { json: async () => known } : read(path));
"""
ASK = "const done = arguments[1]; fetch(arguments[0]).then((x) => x.blob()).then(detect).then((x) => done([x, given]))"


@pytest.mark.parametrize("fixed, resize", [(None, "antialias"), ((96, 96), "antialias"), (None, "torchvision")])
def test_the_page_prepares_images_as_predict_does(browser, model, fixed, resize):
    """The example for browsers resizes and pads photos, and scales boxes, by the rules of `predict`."""
    config = model.config | {"resize": resize}
    known = json.dumps({"config": config, "size": fixed})
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": STAND_INS % known})
    try:
        browser.get((GUIDES / "detect_onnxruntime.html").as_uri())
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
    for height, width in ((70, 100), (300, 100), (30, 170), (50, 60)):
        across = torch.linspace(0, 255, width).expand(3, height, width)
        image = (across * torch.tensor([1, 0.5, 0.2])[:, None, None]).byte()
        data = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(data, "PNG")
        address = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        found, given = browser.execute_async_script(ASK, address)
        frame = vovnet_zoo.sources.Frame("", image)
        want = vovnet_zoo.inference.prepare(frame, config, fixed=fixed, least=64)
        assert tuple(given["size"]) == want.size and given["shape"] == [1, *want.pixels.shape]
        pixels = torch.tensor(given["pixels"]).view(want.pixels.shape)
        assert (pixels - want.pixels.int()).abs().max() <= 6  # the browser's resizing is not bitwise ours
        assert found == [["green", 0.5, pytest.approx([0, 0, width, height])]]


# ---- the models of the README ---------------------------------------------------------------------------------------

MODELS = [
    ("fcos_vovnet39_fpn", {}),
    ("fcos_vovnet27_slim_fpn", {}),
    ("fcos", dict(backbone="resnet50")),
    ("fcos", dict(backbone="convnext_tiny")),
    ("fcos", dict(backbone="ese_vovnet39b")),
]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", WITH_OPENVINO])
@pytest.mark.parametrize("variant", ["improved", "published"])
@pytest.mark.parametrize("name, options", MODELS, ids=lambda x: x if isinstance(x, str) else x.get("backbone", ""))
def test_models(name, options, variant, format, tmp_path):
    """Each of them passes its certificate, and takes two sizes; rounding may decide a tie."""
    torch.manual_seed(0)
    model = busy(create_detector(name, num_classes=4, variant=variant, min_size=128, max_size=256, **options))
    made = export_detector(model, tmp_path / "out", format=format)
    assert made["detections"] > 20
    thresholds = choose_thresholds(model, {})
    items, _ = certificate.choose_images(model, pictures((128, 160), (150, 128)), thresholds, None)
    graph = DetectorGraph(model, thresholds)
    written = registry.Written(registry.FORMATS[format], tmp_path / "out" / FILES[format], graph, None, {})
    assert certificate.certify(model, thresholds, written, items, pairs.BOUNDS["float32"])["detections"] > 20
