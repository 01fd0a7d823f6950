"""The table lists the formats: what each needs, what it can do, and why it refuses the rest."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from torch.export import ExportedProgram

from ..arguments import check_choice
from ..commands import has_compiler
from ..config import ExportPrecision
from .graph import LEAST_SIDE, Graph


@dataclass(frozen=True)
class Format:
    """A format is known by its runtime, the files that it consists of, and the packages that it needs.

    `exporter()` has `write(graph, program, file, precision)`, which returns the tensor that holds the map of each
    layer with weights, `write_facts(file, facts)`, and `versions()`. Where a file shows no maps, `write` returns none,
    and `decompose(program)` gives the program of which the file was compiled.
    """

    name: str
    runtime: str
    files: tuple[str, ...]  # the first one is what `load_detector` takes
    packages: tuple[str, ...]  # the first one is the runtime, which is all that an exported file needs
    precisions: tuple[str, ...]
    least_side: int = 32  # pixels; `predict` pads smaller images
    compiled: bool = False  # by a C++ compiler, for the CPU of this machine
    refusal: str = ""  # why nothing can be written in it

    def exporter(self) -> Any:
        return importlib.import_module(f"{__package__}.{self.name}")


@dataclass(frozen=True)
class Written:
    """A file was written of a graph, which torch.export had made a program."""

    format: Format
    file: Path
    graph: Graph
    program: ExportedProgram
    layers: Mapping[str, str]  # the tensor of the file that holds the map of each layer; empty if none is shown


FORMATS = {
    "onnx": Format(
        "onnx", "ONNX Runtime", ("model.onnx",), ("onnxruntime", "onnx", "onnxscript"), ("float32", "float16")
    ),
    "openvino": Format(
        "openvino",
        "OpenVINO",
        ("model.xml", "model.bin"),
        ("openvino", "onnx", "onnxscript"),
        ("float32", "float16", "int8"),
        least_side=LEAST_SIDE,
    ),
    "pt2": Format("pt2", "AOTInductor", ("model.pt2",), ("torch",), ("float32",), compiled=True),
    "executorch": Format(
        "executorch",
        "ExecuTorch",
        ("model.pte",),
        (),
        (),
        refusal="ExecuTorch (1.5) has no loops (while_loop), and the NMS is one",
    ),
}


def choose_format(name: str, precision: str) -> Format:
    """Return a format that can be written here.

    Raises:
        ValueError: there is no such format, or it does not have the precision, or it cannot be used on this machine.
        ImportError: a package is missing; the message says how to install it.
    """
    check_choice("format", name, FORMATS)
    check_choice("precision", precision, get_args(ExportPrecision))
    chosen = FORMATS[name]
    if chosen.refusal:
        others = [other for other in FORMATS if not FORMATS[other].refusal]
        raise ValueError(f"format {name!r} cannot be written: {chosen.refusal}; choose {' or '.join(others)}")
    if precision not in chosen.precisions:
        raise ValueError(f"precision={precision!r}: format {name!r} has {' and '.join(chosen.precisions)}")
    for package in (*chosen.packages, *(["nncf"] if precision == "int8" else [])):
        need(package)
    if chosen.compiled and not has_compiler():
        raise ValueError(f"format {name!r} needs a C++ compiler, and there is no g++; install one, or name it in CXX")
    return chosen


def need(name: str) -> Any:
    """Import a package of a runtime.

    Raises:
        ImportError: the package is missing; the message says how to install it.
        ValueError: it is known to crash here.
    """
    if name == "openvino" and "ONEDNN_MAX_CPU_ISA" in os.environ:  # seen with 2026.4.1 and AVX2 on a CPU with AVX-512
        raise ValueError("OpenVINO crashes where ONEDNN_MAX_CPU_ISA is less than the CPU has; unset it")
    try:
        return import_package(name)
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'vovnet_zoo[export]' installs what it needs") from error


def import_package(name: str) -> Any:
    """Import a package of a runtime. OpenVINO and NNCF are imported without their telemetry, which reports each use."""
    if name in ("openvino", "nncf") and name not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # they do without it
    return importlib.import_module(name)
