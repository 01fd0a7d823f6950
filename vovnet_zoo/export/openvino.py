"""OpenVINO converts the ONNX file to its own two files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from .graph import Graph
from .onnx import OPSET
from .onnx import write as write_onnx
from .registry import need
from .runtimes import RT_INFO, read_openvino

openvino = need("openvino")


def write(graph: Graph, program: ExportedProgram, file: Path, precision: str) -> dict[str, str]:
    """Write model.xml and model.bin, and map the name of each layer to the tensor that it computes."""
    between = file.with_suffix(".onnx")
    try:
        layers = write_onnx(graph, program, between, "float32")
        model = openvino.convert_model(between)
        openvino.save_model(model, file, compress_to_fp16=precision == "float16")
    finally:
        between.unlink(missing_ok=True)
    return layers


def write_facts(file: Path, facts: Mapping[str, Any]) -> None:
    """Write facts into the rt_info of a model, each as JSON."""
    model = read_openvino(file)
    for key, value in facts.items():
        model.set_rt_info(json.dumps(value), [RT_INFO, key])
    openvino.serialize(model, file, file.with_suffix(".bin"))


def versions() -> dict[str, Any]:
    """Name the versions that made the files."""
    return {"opset": OPSET, "versions": {"torch": torch.__version__, "openvino": openvino.__version__}}
