"""`load_exported` reads an exported file, and gives a detector that `predict` takes; no torch model is built."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export.pt2_archive._package import PT2ArchiveReader

from ..config import Thresholds
from ..exported import ExportedDetector
from .cpu import compiled_for
from .registry import FORMATS, need

Arrays = list[np.ndarray]
Run = Callable[..., Arrays]  # takes the inputs of a `Graph`, and returns its outputs
UNSET = -1  # no count of detections, and no whole map of a layer, has this value
KEPT = ("config", "thresholds", "size", "batch", "precision")  # of the metadata, for a detector
RT_INFO = "vovnet_zoo"  # where an OpenVINO model has its metadata
PT2_METADATA = "_metadata.json"  # files of a package whose names end so hold texts that both of torch's loaders return
SUFFIXES = {Path(chosen.files[0]).suffix: name for name, chosen in FORMATS.items() if not chosen.refusal}


def is_exported(path: str | os.PathLike) -> bool:
    """Tell by its ending whether a path names an exported file."""
    return Path(path).suffix in SUFFIXES


def load_exported(path: str | os.PathLike) -> ExportedDetector:
    """Load a file that `export_detector` wrote; it computes on the CPU, with as many threads as torch.

    Raises:
        ValueError: the file is missing, damaged, or not written by `export_detector`.
        ImportError: its runtime is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    run, facts = open_file(path)
    if missing := set(KEPT) - facts.keys():
        raise ValueError(
            f"{path} was not written by vovnet-zoo export: its metadata lacks {', '.join(sorted(missing))}"
        )
    kept = {key: json.loads(facts[key]) for key in KEPT}
    if kept["thresholds"] is None:
        raise ValueError(f"{path} holds the network alone (raw), which finds no boxes; export it without raw")
    least = kept["thresholds"]["score_threshold"]
    if isinstance(least, list):
        kept["thresholds"]["score_threshold"] = torch.tensor(least)
    size, thresholds = kept["size"] and tuple(kept["size"]), Thresholds(**kept["thresholds"])
    known = kept["config"], thresholds, size, kept["batch"], kept["precision"]
    return ExportedDetector(str(path), *known, run, FORMATS[SUFFIXES[path.suffix]].least_side)


def open_file(path: Path, tensors: Sequence[str] = ()) -> tuple[Run, dict[str, str]]:
    """Open an exported file, with further inner `tensors` as outputs; returns a call and the metadata."""
    return RUNTIMES[SUFFIXES[path.suffix]](path, tensors)


def open_onnx(path: Path, tensors: Sequence[str]) -> tuple[Run, dict[str, str]]:
    """Open an ONNX file in ONNX Runtime, with further `tensors` as outputs; returns a call and the metadata."""
    onnxruntime = need("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    source: Any = str(path)
    if tensors:
        onnx = need("onnx")
        model = onnx.load(path)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
        source = model.SerializeToString()
    try:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise ValueError(f"{path}: ONNX Runtime cannot load it ({str(error).splitlines()[0]:.200})") from error

    names = [x.name for x in session.get_inputs()]

    def run(*inputs: np.ndarray) -> Arrays:
        return session.run(None, dict(zip(names, inputs, strict=True)))

    return run, session.get_modelmeta().custom_metadata_map


def open_openvino(path: Path, tensors: Sequence[str]) -> tuple[Run, dict[str, str]]:
    """Open an OpenVINO model, with further `tensors` as outputs; returns a call and the metadata."""
    try:
        model = read_openvino(path)
        if tensors:
            model.add_outputs(list(tensors))
        run = compile_openvino(model)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path}: OpenVINO cannot load it ({str(error).splitlines()[0]:.200})") from error
    facts = {}
    if model.has_rt_info([RT_INFO]):
        facts = {key: str(value) for key, value in model.get_rt_info([RT_INFO]).value.items()}

    return run, facts


def read_openvino(path: Path) -> Any:
    """Read a model from memory: one that is read from a path keeps its file mapped, which could not be replaced."""
    return need("openvino").Core().read_model(path.read_bytes(), path.with_suffix(".bin").read_bytes())


def compile_openvino(model: Any) -> Run:
    """Make a call of a model. Where a CPU has bfloat16 units, OpenVINO would use them unless it is told float32."""
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    core = need("openvino").Core()
    return call_openvino(core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", **threads}))


def call_openvino(compiled: Any) -> Run:
    """Make a call of a compiled model.

    Raises:
        ValueError: from the call, where OpenVINO cannot compute images of this size. With one thread it says nothing
            then, and leaves the outputs of the call before.
    """
    request, last = compiled.create_infer_request(), len(compiled.outputs) - 1

    def run(*inputs: np.ndarray) -> Arrays:
        try:
            found = request.infer(list(inputs))
            arrays = [np.array(found[i]) for i in range(last + 1)]
            if (arrays[last] == UNSET).all():  # also where there are no numbers
                raise RuntimeError("it computed nothing")
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or ["?"])[-1]
            raise ValueError(f"OpenVINO cannot compute images {list(inputs[0].shape)} ({reason:.200})") from error
        request.get_output_tensor(last).data.fill(UNSET)
        return arrays

    return run


def open_pt2(path: Path, tensors: Sequence[str]) -> tuple[Run, dict[str, str]]:
    """Open a package of AOTInductor in torch; returns a call and the metadata."""
    assert not tensors  # it does not show inner ones
    from torch._inductor import aoti_load_package  # torch._inductor takes seconds to import

    try:
        facts = read_package(path)
        if missing := set(json.loads(facts.get("instructions", "[]"))) - set(compiled_for()):
            raise ValueError(
                f"{path} was compiled for a CPU with {', '.join(sorted(missing))}, which this one lacks; export it here"
            )
        package = aoti_load_package(str(path))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{path}: torch cannot load it ({str(error).splitlines()[0]:.200})") from error

    def run(*inputs: np.ndarray) -> Arrays:
        with torch.no_grad():  # the compiled code takes for granted that arrays are contiguous
            return [x.numpy() for x in package(*(torch.from_numpy(np.ascontiguousarray(x)) for x in inputs))]

    return run, facts


def read_package(path: Path) -> dict[str, str]:
    """Read the metadata of a package, without a look at its code."""
    reader = PT2ArchiveReader(str(path))
    names = [name for name in reader.get_file_names() if name.endswith(PT2_METADATA)]
    return {key: value for name in names for key, value in json.loads(reader.read_string(name)).items()}


RUNTIMES: dict[str, Callable[[Path, Sequence[str]], tuple[Run, dict[str, str]]]] = {
    "onnx": open_onnx,
    "openvino": open_openvino,
    "pt2": open_pt2,
}
