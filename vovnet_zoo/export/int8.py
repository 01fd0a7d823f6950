"""NNCF quantises the network of an OpenVINO model to int8, and leaves in float32 what the AP needs.

NNCF serves here, not ONNX Runtime's quantisation: it keeps a metric of ours in its bound by itself, corrects biases,
and OpenVINO computes its int8 convolutions beside float32 ones without conversions by hand.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..exported import ExportedDetector
from ..inference import Prepared
from .accuracy import Comparison, alike
from .blame import as_batch
from .cpu import int8_instructions
from .graph import Graph, find_weight
from .registry import Written, need
from .runtimes import call_openvino, compile_openvino, load_exported, read_openvino

openvino = need("openvino")
nncf = need("nncf")

log = logging.getLogger("vovnet_zoo")

RANKED = 16  # images; on so many the layers are ranked, where some must stay float32
TIMED = 9  # calls of each, of which the median counts
LAYERS = ("Convolution", "GroupConvolution", "MatMul")


def quantize(written: Written, images: Sequence[Prepared], comparison: Comparison, bound: float) -> dict[str, Any]:
    """Quantise a float32 file in place, and return what the certificate says of it.

    Args:
        written: the file, with its metadata.
        images: the images on which the ranges of the maps are measured.
        comparison: a dataset; its AP is kept.
        bound: how far the AP may be from PyTorch's.
    """
    detector, model = load_exported(written.file), read_openvino(written.file)
    known = detector.config, detector.thresholds, detector.size, detector.batch, "int8"
    names, whole = layer_names(model, written.graph), list(range(len(comparison.dataset)))

    def validate(compiled: Any, places: Iterable[int]) -> tuple[float, list[float]]:
        """Compute 1 where the AP of the dataset is in bounds, or less; and the likeness of each image's detections."""
        tried = ExportedDetector("", *known, call_openvino(compiled))
        places = list(places)
        found = comparison.detect(tried, places)
        likeness = [alike(comparison.wanted[place], each) for place, each in zip(places, found, strict=True)]
        if places != whole:
            return statistics.fmean(likeness), likeness
        difference = abs(comparison.score(found).metrics["AP"] - comparison.ap)
        return 1 + min(0.0, bound - difference), likeness

    logging.getLogger("nncf").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):  # its progress bars
        quantized = nncf.quantize_with_accuracy_control(
            model,
            nncf.Dataset([arrays(item, detector.batch) for item in images]),
            nncf.Dataset(whole),
            validate,
            max_drop=0.0,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(names=outside(model), validate=False),
            advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                ranking_subset_size=RANKED, num_ranking_workers=1
            ),
        )
    seconds = time_both(model, quantized, arrays(images[0], detector.batch))
    openvino.serialize(quantized, written.file, written.file.with_suffix(".bin"))
    if seconds["int8"] >= seconds["float32"]:
        log.warning("int8 gains nothing here: %.1f ms, in float32 %.1f ms", *(seconds[x] * 1e3 for x in seconds))
    return {**list_layers(quantized, names), "seconds_per_call": seconds, "int8_instructions": int8_instructions()}


def outside(model: Any) -> list[str]:
    """List the nodes before the first layer and after the last ones, which compute images and boxes."""
    order = model.get_ordered_ops()
    after: set[str] = set()  # layers and what depends on them
    before: set[str] = set()  # layers and on what they depend
    for node in order:
        sources = [x.get_source_output().get_node().get_friendly_name() for x in node.inputs()]
        if node.get_type_name() in LAYERS or not after.isdisjoint(sources):
            after.add(node.get_friendly_name())
    for node in reversed(order):
        targets = [x.get_node().get_friendly_name() for output in node.outputs() for x in output.get_target_inputs()]
        if node.get_type_name() in LAYERS or not before.isdisjoint(targets):
            before.add(node.get_friendly_name())
    names = [
        node.get_friendly_name() for node in order if node.get_type_name() not in ("Constant", "Parameter", "Result")
    ]
    return [name for name in names if name not in after or name not in before]


def arrays(item: Prepared, batch: int | None) -> list[np.ndarray]:
    """Return the inputs of a call with one image, again and again where the file is for a batch."""
    return [x.repeat(batch or 1, *[1] * (x.ndim - 1)).numpy() for x in as_batch(item)]


def time_both(model: Any, quantized: Any, inputs: list[np.ndarray]) -> dict[str, float]:
    """Time a call of the float32 model and of the quantised one by turns, in seconds (medians)."""
    calls = {"float32": compile_openvino(model), "int8": compile_openvino(quantized)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(TIMED + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call(*inputs)
            if number:  # the first call prepares
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def layer_names(model: Any, graph: Graph) -> dict[str, str]:
    """Map each layer's node in a float32 model to the layer's name in PyTorch, which its weights have."""
    found = {}
    for node in layers_of(model):
        weight = node.input_value(1).get_node()
        while weight.get_type_name() != "Constant" and weight.get_input_size():
            weight = weight.input_value(0).get_node()
        name, _, rest = weight.get_friendly_name().rpartition(".weight")
        if rest or not name:  # OpenVINO has multiplied the weights by the scale of a level, and named them anew
            name = find_weight(torch.tensor(weight.data), graph) or node.get_friendly_name()
        found[node.get_friendly_name()] = name.removeprefix("model.")
    return found


def list_layers(model: Any, names: Mapping[str, str]) -> dict[str, list[str]]:
    """List the layers that compute in int8, and those that stayed float32; one that runs several times counts once."""
    found: dict[str, set[str]] = {"int8_layers": set(), "float_layers": set()}
    for node in layers_of(model):
        kinds = [x.get_node().get_type_name() for x in node.input_values()]
        # NNCF quantises what a layer takes: maps, and weights, which it stores as whole numbers that are multiplied
        is_float = kinds[1] in ("Constant", "Reshape", "Transpose")
        found["float_layers" if is_float else "int8_layers"].add(names[node.get_friendly_name()])
    return {key: sorted(values) for key, values in found.items()}


def layers_of(model: Any) -> list[Any]:
    """List the nodes that multiply by weights, in the order in which they are computed."""
    return [node for node in model.get_ordered_ops() if node.get_type_name() in LAYERS]
