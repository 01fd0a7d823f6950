"""The benchmarks run, and measure what they say; times are theirs to tell."""

import copy
import dataclasses
import functools
import importlib
import json
import logging
import sys

import numpy as np
import pytest
import torch

import benchmark
import benchmark_runtimes
import profile_blocks
import runtime
from presets import PUBLISHED
from vovnet_zoo import compile_detector, create_detector
from vovnet_zoo.config import Thresholds
from vovnet_zoo.exported import ExportedDetector


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch):
    torch._dynamo.reset()
    traced = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(benchmark, "compiled", traced)
    monkeypatch.setattr(profile_blocks, "compiled", traced)
    monkeypatch.setattr(benchmark, "compile_detector", functools.partial(compile_detector, backend="eager"))


def test_benchmark(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "measure_peak", functools.partial(benchmark.measure_peak, calls=3))
    config = benchmark.BenchmarkConfig(
        model="fcos_vovnet27_slim_fpn", size=(64, 96), train_batch=2, precisions=("float32",), rounds=1,
        others=False, runtimes=(), device="cpu", out=tmp_path,
    )  # fmt: skip
    rows = benchmark.main(config)
    names = [row.name for row in rows]
    peer = "torchvision FCOS on vovnet27_slim, eager"
    assert names == [
        peer,
        "ours, eager",
        "ours, compiled",
        peer,
        "ours, eager",
        "ours, eager, checkpointing",
        "ours, compiled",
    ]
    assert rows[0].ratio == rows[3].ratio == 1
    assert all(row.fastest <= row.seconds <= row.slowest and row.gflop > 0 for row in rows)
    assert [row.kept_mib > 0 for row in rows] == [False] * 3 + [True] * 4
    assert rows[5].kept_mib < rows[4].kept_mib  # torchvision's keeps more where images outweigh the weights
    table = capsys.readouterr().out
    assert all(name in table for name in names)
    record = json.loads((tmp_path / "benchmark.json").read_text())
    assert len(record["rows"]) == len(rows)
    assert record["peak_gflops"]["float32"].keys() == {"matrix product", "3x3 convolution"}
    assert all(speed > 0 for speed in record["peak_gflops"]["float32"].values())
    assert record["cpu"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert f"CPU: {record['cpu']['model']}, PyTorch uses {record['cpu']['capability']}" in table
    assert (tmp_path / "benchmark.png").stat().st_size > 1000


@pytest.mark.parametrize("count", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_published_table(count, tmp_path, capsys, monkeypatch):
    """The rows of the comparison run, at a small size and without tracing; ratios are to R-50 of the same kind."""
    monkeypatch.setattr(benchmark, "PUBLISHED", dict(list(PUBLISHED.items())[:count]))

    def compile_nothing(model, size, dtype):
        return lambda images, sizes: benchmark.detect(model, images, sizes, benchmark.Thresholds())

    monkeypatch.setattr(benchmark, "compile_detector", compile_nothing)
    monkeypatch.setattr(benchmark, "measure_peak", lambda *args: {"matrix product": 100.0})
    config = benchmark.BenchmarkConfig(table="published", size=(64, 64), rounds=1, device="cpu", out=tmp_path)
    rows = benchmark.main(config)
    models = [row.model for row in benchmark.PUBLISHED.values()]
    assert models[0] == "fcos_resnet50_fpn" and len(models) == count
    assert [row.name for row in rows] == [f"{model}, {kind}" for model in models for kind in ("eager", "compiled")]
    assert {(row.task, row.precision, row.batch) for row in rows} == {("inference", "float32", 1)}
    gflop = {row.name.split(",")[0]: row.gflop for row in rows}
    assert len(set(gflop.values())) == count
    record = json.loads((tmp_path / "benchmark.json").read_text())
    assert record["config"]["table"] == "published" and record["config"]["size"] == [64, 64]
    assert record["published"]["v39_1x"] == {"model": "fcos_vovnet39_fpn", "ap": 37.7, "milliseconds": 82}
    found = [line.split() for line in capsys.readouterr().out.splitlines()]
    lines = {words[0]: words for words in found if words and words[0] in benchmark.PUBLISHED}
    assert list(lines) == list(benchmark.PUBLISHED)
    times = {row.name: row.seconds for row in rows}
    for preset, (model, _, milliseconds) in benchmark.PUBLISHED.items():
        shown = [float(word) for word in lines[preset][2:]]
        assert lines[preset][1] == model and shown[:2] == [milliseconds, round(milliseconds / 84, 2)]
        for kind, (time, ratio) in {"eager": shown[2:4], "compiled": shown[4:6]}.items():
            assert time == pytest.approx(times[f"{model}, {kind}"] * 1e3, abs=0.06)
            assert ratio == pytest.approx(times[f"{model}, {kind}"] / times[f"{models[0]}, {kind}"], abs=0.006)


@pytest.mark.slow  # 13 s
def test_exported_files(tmp_path, monkeypatch):
    """They are timed on the same images; one of another size, or what is no exported file, is refused."""
    opened = []

    def load(path):
        model = create_detector("fcos_vovnet27_slim_fpn", num_classes=2)

        def run(images, sizes):
            opened.append(images.shape)
            places = np.zeros((len(images), 100), np.float32)
            return [np.zeros((len(images), 100, 4), np.float32), places, places.astype(np.int64), np.zeros(len(images))]

        return ExportedDetector("x", model.config, Thresholds(), (64, 96), None, "int8", run)

    monkeypatch.setattr(benchmark, "load_exported", load)
    options = dict(model="fcos_vovnet27_slim_fpn", what=("inference",), precisions=("float32",), rounds=1, runtimes=(),
                   others=False, device="cpu", out=tmp_path)  # fmt: skip
    rows = benchmark.main(benchmark.BenchmarkConfig(**options, size=(64, 96), exported=(tmp_path / "model.xml",)))
    assert (rows[-1].name, rows[-1].precision) == (f"ours, exported, {tmp_path / 'model.xml'}", "int8")
    assert rows[-1].gflop > 0 and set(opened) == {(1, 3, 64, 96)}
    for wrong, message in (
        (dict(size=(64, 64), exported=(tmp_path / "model.xml",)), "takes images of"),
        (dict(size=(64, 96), exported=(tmp_path,)), "is no exported file"),
        (dict(size=(64, 96), exported=(tmp_path / "model.xml",), what=("training",)), "leave --exported out"),
    ):
        with pytest.raises(ValueError, match=message):
            benchmark.main(benchmark.BenchmarkConfig(**{**options, **wrong}))


def test_default_sizes_of_the_tables(monkeypatch):
    seen = []

    def stop(config, batch, precisions, device):
        seen.append((config.size, batch, precisions))
        raise ZeroDivisionError

    monkeypatch.setattr(benchmark, "published_contestants", stop)
    monkeypatch.setattr(benchmark, "training_contestants", stop)
    monkeypatch.setattr(benchmark, "measure_peak", lambda *args: {"matrix product": 100.0})
    for options in (dict(table="published"), dict(what=("training",))):
        with pytest.raises(ZeroDivisionError):
            benchmark.main(benchmark.BenchmarkConfig(device="cpu", **options))
    assert seen == [((800, 1088), 1, ("float32",)), ((640, 640), 2, ("float32", "bf16"))]


@pytest.fixture(scope="module")
def tiny():
    """A small detector's network, and a normalised image for it."""
    torch.manual_seed(0)
    model = create_detector("fcos", backbone="resnet10t", channels=64, num_convs=1, num_classes=3).eval()
    return benchmark_runtimes.Network(model).eval().requires_grad_(False), torch.randn(1, 3, 64, 96)


@pytest.mark.parametrize("name", benchmark_runtimes.RUNTIMES)
def test_runtime_gives_what_pytorch_gives(tiny, name):
    if reason := benchmark_runtimes.why_left_out(name, batch=1):
        pytest.skip(reason)
    network, images = tiny
    call = benchmark_runtimes.load_runtimes([name], network, images)[name]
    expected = network(images)
    for outputs in (call(), call()):
        differences = benchmark_runtimes.compare_outputs(outputs, expected)
        assert list(differences) == ["logits", "distances", "centerness"]
        assert max(differences.values()) < 1e-4, differences  # Winograd rounds more than a direct convolution
    assert set(benchmark_runtimes.RUNTIMES[name].packages) <= benchmark_runtimes.imported_versions().keys()


def test_openvino_is_imported_without_its_telemetry(monkeypatch):
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.delitem(sys.modules, "openvino_telemetry", raising=False)
    monkeypatch.setattr(importlib, "import_module", lambda name: (name, sys.modules["openvino_telemetry"]))
    assert benchmark_runtimes.import_package("openvino") == ("openvino", None)


def test_compare_outputs_sees_one_wrong_value():
    expected = [torch.full((1, 5, 3), 4.0), torch.ones(1, 5, 4), torch.ones(1, 5)]
    outputs = [x.clone().numpy() for x in expected]
    outputs[0][0, 3, 1] += 0.5
    assert benchmark_runtimes.compare_outputs(outputs, expected) == {
        "logits": 0.125, "distances": 0, "centerness": 0
    }  # fmt: skip
    with pytest.raises(RuntimeError):
        benchmark_runtimes.compare_outputs([x[:, :4] for x in outputs], expected)


def test_missing_runtime_is_left_out(tiny, monkeypatch, caplog):
    def import_module(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", import_module)
    with caplog.at_level(logging.WARNING, "vovnet_zoo"):
        assert benchmark_runtimes.load_runtimes(list(benchmark_runtimes.RUNTIMES), *tiny) == {}
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" is left out")[0] for line in lines] == ["OpenVINO", "ONNX Runtime", "ncnn"]
    assert all("pip install -e '.[bench]'" in line and "\n" not in line for line in lines)


def test_runtime_that_would_crash_is_left_out(monkeypatch):
    monkeypatch.setattr(benchmark_runtimes, "import_package", lambda name: None)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert benchmark_runtimes.why_left_out("openvino", batch=1) is None
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert "unset ONEDNN_MAX_CPU_ISA" in benchmark_runtimes.why_left_out("openvino", batch=1)
    assert benchmark_runtimes.why_left_out("ncnn", batch=1) is None


def test_runtimes_are_contestants(tiny, tmp_path, monkeypatch, capsys):
    def load(network, images, threads):
        return lambda: [output.numpy() for output in network(images)]

    for name, row in benchmark_runtimes.RUNTIMES.items():
        stand_in = dataclasses.replace(row, packages=(), load=load)
        monkeypatch.setitem(benchmark_runtimes.RUNTIMES, name, stand_in)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(benchmark, "inference_contestants", lambda *args: [])  # test_benchmark runs those
    monkeypatch.setattr(benchmark, "measure_peak", lambda *args: {"matrix product": 100.0})
    monkeypatch.setattr(benchmark, "create_detector", lambda name, num_classes: copy.deepcopy(tiny[0].model))
    config = benchmark.BenchmarkConfig(
        size=(64, 96), batches=(1, 2), what=("inference",), precisions=("float32",), rounds=1, device="cpu",
        out=tmp_path,
    )  # fmt: skip
    rows = benchmark.main(config)
    alone = ["ours, eager", "OpenVINO", "ONNX Runtime", "ncnn", "ours, eager", "OpenVINO", "ONNX Runtime"]
    assert [row.name for row in rows] == [f"{name}, network alone" for name in alone]
    assert len({row.gflop / row.batch for row in rows}) == 1
    parity = json.loads((tmp_path / "benchmark.json").read_text())["parity"]
    assert list(parity) == ["1", "2"] and list(parity["2"]) == ["OpenVINO", "ONNX Runtime"]
    assert parity["1"]["ncnn"].keys() == {"logits", "distances", "centerness"}
    assert max(parity["1"]["ncnn"].values()) < 1e-4
    assert "ncnn, batch 1, largest difference from eager" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"precisions": ("bf16",)}, {"device": "meta"}])
def test_runtimes_need_float32_on_the_cpu(options, monkeypatch):
    monkeypatch.setattr(runtime, "find_device", lambda name, index=None: torch.device(name))  # there may be no other
    with pytest.raises(ValueError, match="--runtimes run in float32 on the CPU"):
        benchmark.main(benchmark.BenchmarkConfig(**{"device": "cpu", "runtimes": ("ncnn",), **options}))


def test_kept_by():
    weight = torch.ones(100, requires_grad=True)
    x = torch.ones(100)
    assert benchmark.kept_by(lambda: ((x * weight) * weight).sum()) == 2 * 400 / 2**20  # x and x * weight, not weight


def test_profile_blocks(tmp_path):
    config = profile_blocks.ProfileConfig(
        backbone="vovnet27_slim", size=(64, 96), batch=1, precisions=("float32",), rounds=1, device="cpu",
        out=tmp_path / "profile.json",
    )  # fmt: skip
    rows = profile_blocks.main(config)
    assert [row["blocks"] for row in rows] == ["timm's, eager", "ours, eager", "timm's, compiled", "ours, compiled"]
    for row in rows:
        for name in ("forward", "backward"):
            groups = sum(row[f"{name}, {group}"] for group in profile_blocks.GROUPS)
            assert 0 < groups < row[f"{name}, all"]
        assert row["forward, concatenation"] > 0  # all of them eager here
    assert json.loads(config.out.read_text())["rows"] == rows
