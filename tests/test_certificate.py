"""A package of AOTInductor that computes something else is refused, and the message says where it went wrong.

A package shows no inner tensors. In most of these tests torch's interpreter stands for the compiler, which takes
minutes; in slow ones the compiler itself runs.
"""

import copy
import shutil
import sys

import numpy as np
import pytest
import torch
from exports import MEAN, pictures, small_detector
from torch.export.pt2_archive._package import PT2ArchiveWriter

from vovnet_zoo import export_detector
from vovnet_zoo.export import blame, certificate, pairs, pt2, registry
from vovnet_zoo.export.graph import DetectorGraph, NetworkGraph, trace
from vovnet_zoo.inference import choose_thresholds, prepare
from vovnet_zoo.sources import Frame

SIZE, LIMIT = dict(size=(64, 96), batch=1), dict(max_detections=20)


@pytest.fixture(scope="module")
def model():
    return small_detector()


@pytest.fixture(scope="module")
def program(model):
    """Trace the detector once, and write its graph in operators of torch alone; no test may change it."""
    return pt2.decompose(trace(DetectorGraph(model, choose_thresholds(model, LIMIT)).eval(), *SIZE.values()))


@pytest.fixture
def interpreted(monkeypatch, program):
    """Let the exporter take a changed copy of `program`, and torch's interpreter run what is compiled of it."""

    def interpret(change=lambda program: None, change_compiled=lambda program: None):
        exported = changed(program, change)
        compiled = changed(exported, change_compiled)

        def compile(program, *, package_path, inductor_configs):
            assert program is exported
            with PT2ArchiveWriter(package_path) as writer:
                writer.write_string("data/aotinductor/model/x.wrapper_metadata.json", "{}")

        monkeypatch.setattr("vovnet_zoo.export.trace", lambda *arguments: None)
        monkeypatch.setattr(pt2, "decompose", lambda program: exported)
        monkeypatch.setattr("torch._inductor.aoti_compile_and_package", compile)
        monkeypatch.setattr("torch._inductor.aoti_load_package", lambda path: compiled.module())
        monkeypatch.setenv("CXX", sys.executable)  # there may be no C++ compiler

    return interpret


def changed(program, change):
    copied = copy.deepcopy(program)
    with torch.no_grad():
        change(copied)
    return copied


# ---- what may go wrong ----------------------------------------------------------------------------------------------


def change_mean(program):
    """Give the red channel the mean of another model."""
    (node,) = [n for n in program.graph.nodes if n.target == torch.ops.aten.sub.Tensor and n.args[1] == 255 * MEAN[0]]
    node.args = (node.args[0], 255 * 0.5)
    program.graph_module.recompile()


def swap_channels(program):
    weight = program.state_dict["model.backbone.conv1.0.weight"]
    weight.copy_(weight.flip(1))


def round_to_4_bits(program):
    weight = program.state_dict["model.head.box_tower.0.weight"]
    step = weight.abs().max() / 7
    weight.copy_((weight / step).round() * step)


def change_nms(program):
    """The threshold of the NMS is another."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes:
            if node.target == torch.ops.aten.gt.Scalar and node.args[1] == 0.6:
                node.args = (node.args[0], 0.3)
        module.recompile()


BROKEN = {
    change_mean: r"the first layer of the exported graph that differs is backbone.conv1.0 .*, or what is done to",
    swap_channels: r"the first layer of the exported graph that differs is backbone.conv1.0 .*, or what is done to",
    round_to_4_bits: r"the first layer of the exported graph that differs is head.box_tower.0 \(",
    change_nms: r"no layer of the exported graph differs by more than .*, so it happens after them, in decoding or NMS",
}


@pytest.mark.parametrize("change", BROKEN)
def test_a_broken_package_is_refused(interpreted, model, change, tmp_path):
    """The message names the image and the layer of the graph that was compiled, and there is no file."""
    interpreted(change)
    message = f"AOTInductor computes something else.*the file was deleted.*worst image: image 0; .*{BROKEN[change]}"
    with pytest.raises(ValueError, match=message) as error:
        export_detector(model, tmp_path / "out", format="pt2", images=pictures((64, 90)), **SIZE, **LIMIT)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_the_compiler_is_blamed(interpreted, model, tmp_path):
    """Where the graph agrees with PyTorch, but what was compiled of it does not, the message says so."""
    interpreted(change_compiled=round_to_4_bits)
    with pytest.raises(ValueError, match="worst image: image 0; .*graph agrees .* happens in its compilation$"):
        export_detector(model, tmp_path / "out", format="pt2", images=pictures((64, 90)), **SIZE, **LIMIT)
    assert not (tmp_path / "out").exists()


def test_a_whole_package_is_certified(interpreted, model, tmp_path):
    interpreted()
    made = export_detector(model, tmp_path / "out", format="pt2", images=pictures((64, 90)), **SIZE, **LIMIT)
    assert made["matched"] == 1 and made["detections"] > 10


def test_outputs_of_the_network_alone(model):
    """The message names the outputs that differ, and the strides of their levels; NaN differs."""
    graph, inputs = NetworkGraph(model).eval(), [torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        wanted = [x.numpy() for x in graph(*inputs)]
        strides = graph.model(*inputs).strides
    arrays = [x.copy() for x in wanted]
    bounds = pairs.BOUNDS["float32"]
    assert blame.compare_outputs(graph, inputs, arrays, wanted, bounds) == ""
    arrays[1][:, strides >= 64] *= 1.01
    arrays[2][:, int((strides == 8).nonzero()[3, 0])] = float("nan")
    found = blame.compare_outputs(graph, inputs, arrays, wanted, bounds)
    assert found == "distances (stride 64, 128), centerness (stride 8)"


def test_a_network_of_nan_is_refused(model, monkeypatch, tmp_path):
    """No number is larger than a bound where it is NaN, but such a file is not kept."""
    monkeypatch.setattr(certificate, "open_file", lambda file: (lambda x: [np.full(1, np.nan)] * 3, {}))
    monkeypatch.setattr(certificate, "blame", lambda *arguments: "")
    item = prepare(Frame("photo", torch.zeros(3, 64, 96, dtype=torch.uint8)), model.config, fixed=(64, 96))
    written = registry.Written(registry.FORMATS["pt2"], tmp_path, NetworkGraph(model).eval(), None, {})
    with pytest.raises(ValueError, match="logits differ by inf of the largest.*worst image: photo"):
        certificate.certify_network(model, written, [item], pairs.BOUNDS["float32"])


def test_linear_layers_are_named():
    """torch.onnx transposes their weights and gives them other names; the layers' names are found again."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from vovnet_zoo.export.onnx import name_layers

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.widen, self.back = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8, bias=False)

        def forward(self, x):
            return self.back(self.widen(x).relu()) + 1

    network, x = Network().eval(), torch.randn(1, 5, 5, 8)
    model = torch.onnx.export(network, (x,), dynamo=True, verbose=False, opset_version=18).model_proto
    layers = name_layers(model.graph, network)
    model.graph.output.extend(onnx.ValueInfoProto(name=layers[name]) for name in ("widen", "back"))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    _, *found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    maps = blame.record_maps(network, layers, [x])
    for got, (want, *_) in zip(found, maps.values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-5)


# ---- the compiler itself --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("change", [change_mean, swap_channels, round_to_4_bits])
def test_a_broken_package_is_refused_as_compiled(program, model, change, monkeypatch, tmp_path):
    broken = changed(program, change)
    monkeypatch.setattr("vovnet_zoo.export.trace", lambda *arguments: None)
    monkeypatch.setattr(pt2, "decompose", lambda program: broken)
    with pytest.raises(ValueError, match=f"the file was deleted.*worst image: image 0; .*{BROKEN[change]}"):
        export_detector(model, tmp_path / "out", format="pt2", images=pictures((64, 90)), **SIZE, **LIMIT)
    assert not list(tmp_path.iterdir())
