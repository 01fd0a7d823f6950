"""torch.onnx translates the graph to ONNX, and the NMS becomes ONNX's own NonMaxSuppression."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxscript
import torch
from torch import nn
from torch.export import ExportedProgram

from .graph import Graph, find_weight

OPSET = 18
op: Any = onnxscript.opset18  # its type hints are for the tensors of a script, which no checker knows
LARGE = 1024  # numbers; weights with fewer stay float32, since they take no space


def write(graph: Graph, program: ExportedProgram, file: Path, precision: str) -> dict[str, str]:
    """Write and check an ONNX file, and map the name of each layer to the tensor that it computes."""
    for name in ("onnx_ir", "onnxscript"):  # they tell of every constant that they merge or do not merge
        logging.getLogger(name).setLevel(logging.ERROR)
    nms = torch.ops.vovnet_zoo.nms_fixed.default
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.onnx warns of its own use of deprecated functions
        converted = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table={nms: translate_nms(graph.model.num_classes)},
            input_names=graph.inputs,
            output_names=graph.outputs,
            verbose=False,
        )
    assert converted is not None
    converted.save(file, external_data=False)
    model = onnx.load(file)
    remove_notes(model.graph)
    name_dimensions(model.graph)
    if precision == "float16":
        store_float16(model.graph)
    onnx.save(model, file)
    onnx.checker.check_model(file, full_check=True)
    return name_layers(model.graph, graph)


def remove_notes(graph: onnx.GraphProto) -> None:
    """Remove what torch.onnx notes of the code that made each node: it is long, and has paths of this machine."""
    values = *graph.input, *graph.output, *graph.value_info, *graph.initializer
    for item in (graph, *graph.node, *values):
        item.ClearField("metadata_props")


def name_dimensions(graph: onnx.GraphProto) -> None:
    """Name the free dimensions of the images, which torch.export calls s34 and 32*s30, wherever they occur."""
    of_images = [dim.dim_param for dim in graph.input[0].type.tensor_type.shape.dim]
    names = dict(zip(of_images, ("batch", "", "height", "width"), strict=True))
    names.pop("", None)  # fixed dimensions
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def name_layers(translated: onnx.GraphProto, graph: nn.Module) -> dict[str, str]:
    """Map the name of each layer with weights to the tensor that it computes; of what runs several times, the first."""
    weights = {x.name.removesuffix(".float16"): x for x in translated.initializer}
    sums = {node.input[0]: node for node in translated.node if node.op_type == "Add"}
    layers = {}
    for node in reversed(translated.node):
        if node.op_type == "Conv":
            layers[node.input[1].removesuffix(".weight")] = node.output[0]
        elif node.op_type == "MatMul" and node.input[1] in weights:  # its weights were transposed, and named anew
            numbers = torch.tensor(onnx.numpy_helper.to_array(weights[node.input[1]])).float().T
            if name := find_weight(numbers, graph):
                has_bias = graph.get_submodule(name).bias is not None
                layers[name] = (sums[node.output[0]] if has_bias else node).output[0]
    return layers


def translate_nms(num_classes: int) -> Callable[..., Any]:
    """Make the function that writes `nms_fixed` in ONNX's operators: NMS of each class, then the best of all."""

    def nms(boxes: Any, scores: Any, labels: Any, threshold: float, max_detections: int, plus_one: bool) -> Any:
        if plus_one:  # x2 and y2 lie one pixel further, and an IoU equal to the threshold suppresses
            boxes = op.Add(boxes, op.Constant(value_floats=[0.0, 0.0, 1.0, 1.0]))
            threshold = float(np.nextafter(np.float32(threshold), np.float32(0)))
        axis = op.Constant(value_ints=[1])
        classes = op.Reshape(op.Constant(value_ints=range(num_classes)), op.Constant(value_ints=[1, num_classes, 1]))
        absent = op.Constant(value_float=-1.0)
        of_class = op.Where(op.Equal(op.Unsqueeze(labels, axis), classes), op.Unsqueeze(scores, axis), absent)
        chosen = op.NonMaxSuppression(
            boxes,
            of_class,  # [B,K,N]
            op.Constant(value_ints=[max_detections]),
            op.Constant(value_floats=[threshold]),
            op.Constant(value_floats=[-0.5]),
        )  # rows of (image, class, place)
        places = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)
        kept = op.ScatterND(op.Expand(absent, op.Shape(scores)), places, op.GatherND(scores, places))  # [B,N]
        kept = op.Pad(kept, op.Constant(value_ints=[0, 0, 0, max_detections]), absent)
        best, index = op.TopK(kept, op.Constant(value_ints=[max_detections]))  # equal scores: the first wins
        return op.Where(op.GreaterOrEqual(best, op.Constant(value_float=0.0)), index, op.Constant(value_int=-1))

    return nms


def store_float16(graph: onnx.GraphProto) -> None:
    """Store large weights in 16 bits; a Cast beside each, with its former name, makes float32 of it."""
    casts = []
    for weight in graph.initializer:
        if weight.data_type == onnx.TensorProto.FLOAT and np.prod(weight.dims) >= LARGE:
            name = weight.name
            numbers = onnx.numpy_helper.to_array(weight).astype(np.float16)
            weight.CopyFrom(onnx.numpy_helper.from_array(numbers, f"{name}.float16"))
            casts.append(onnx.helper.make_node("Cast", [weight.name], [name], to=onnx.TensorProto.FLOAT))
    for cast in reversed(casts):
        graph.node.insert(0, cast)


def write_facts(file: Path, facts: Mapping[str, Any]) -> None:
    """Write facts into the metadata of a file, each as JSON."""
    model = onnx.load(file)
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in facts.items()})
    onnx.save(model, file)


def versions() -> dict[str, Any]:
    """Name the versions that made the file."""
    known = {x.__name__: x.__version__ for x in (torch, onnx, onnxscript, onnxruntime)}
    return {"opset": OPSET, "versions": known}
