"""`blame` finds the layer at which an exported file and PyTorch part."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn

from ..data import normalize
from ..inference import Prepared
from ..results import Detections
from .graph import DetectorGraph, Graph, NetworkGraph
from .pairs import Bounds, differences, first, is_within
from .registry import Written
from .runtimes import open_file

LAYERS = (torch.ops.aten.conv2d, torch.ops.aten.convolution, torch.ops.aten.linear)  # whose second argument is weights
MOST = 3  # layers that are named where all of them differ


def blame(written: Written, item: Prepared, bounds: Bounds) -> str:
    """Say where an exported file and PyTorch part on one image: at a layer, or before or after all of them.

    A package of AOTInductor does not show its maps. The graph of which it was compiled shows them, so the fault is in
    this graph or, where the graph agrees with PyTorch, in the compilation.
    """
    inputs = inputs_of(written.graph, item)
    layers, outputs = compare_layers(written, inputs)
    graph = "" if written.layers else " of the exported graph"
    if bounds.layer is None:  # all layers differ a little
        return f"the layers{graph} that differ most there: {', '.join(described(layers, MOST))}"
    differing = {name: difference for name, difference in layers.items() if not difference <= bounds.layer}
    if differing:
        (name,) = described(differing, 1, by_size=False)
        before = ", or what is done to the images before it" if next(iter(layers)) in differing else ""
        return f"the first layer{graph} that differs is {name}{before}"

    agree = f"no layer{graph} differs by more than {bounds.layer:g} (most: {described(layers, 1)[0]})"
    with torch.no_grad():
        wanted = [x.numpy() for x in written.graph(*inputs)]
    if apart := compare_outputs(written.graph, inputs, outputs, wanted, bounds):
        return f"{agree}, so it happens after them, in {apart}"
    if not written.layers:
        run, _ = open_file(written.file)
        if apart := compare_outputs(written.graph, inputs, run(*(x.numpy() for x in inputs)), wanted, bounds):
            what = f"; what differs is {apart}" if isinstance(written.graph, NetworkGraph) else ""
            return f"the exported graph agrees with PyTorch, so it happens in its compilation{what}"
    return (
        "the copy of the model that was exported (on the CPU) agrees with the file, so this copy and the model differ"
    )


def compare_layers(written: Written, inputs: Sequence[Tensor]) -> tuple[dict[str, float], list[np.ndarray]]:
    """Compute the relative difference of each layer's map, in the order in which they are computed, and the outputs.

    Both are of the file, or, where it shows no maps, of the graph of which it was compiled.
    """
    graph, layers = written.graph, written.layers
    if layers:
        maps = record_maps(graph, layers, inputs)
        run, _ = open_file(written.file, [layers[name] for name in maps])
        arrays = run(*(x.numpy() for x in inputs))
        outputs, found = arrays[: len(graph.outputs)], dict(zip(maps, arrays[len(graph.outputs) :], strict=True))
    else:
        recorder = Recorder(written.format.exporter().decompose(written.program).module())
        with torch.no_grad():
            outputs = [x.numpy() for x in recorder.run(*inputs)]
        found = {name: x.numpy() for name, x in recorder.maps.items()}
        maps = record_maps(graph, found, inputs)
    return {
        name: min(relative_difference(found[name], want.numpy()) for want in wanted) for name, wanted in maps.items()
    }, outputs


class Recorder(torch.fx.Interpreter):
    """The interpreter computes an exported graph node by node, and keeps the map of each layer in `maps`."""

    def __init__(self, module: torch.fx.GraphModule):
        super().__init__(module)
        self.maps: dict[str, Tensor] = {}  # of one that runs several times, the first

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if getattr(n.target, "overloadpacket", None) in LAYERS and isinstance(weight := n.args[1], torch.fx.Node):
            self.maps.setdefault(str(weight.target).removesuffix(".weight"), result)
        return result


def compare_outputs(
    graph: Graph, inputs: Sequence[Tensor], got: list[np.ndarray], want: list[np.ndarray], bounds: Bounds
) -> str:
    """Say in words which outputs of a graph differ; "" where all are in bounds."""
    if isinstance(graph, DetectorGraph):
        a, b = (first(Detections(*map(torch.from_numpy, arrays))) for arrays in (want, got))
        shared, apart = differences(a, b)
        matched = 2 * shared / max(1, len(a.scores) + len(b.scores))
        return "" if is_within(bounds, matched, apart) else "decoding or NMS"
    with torch.no_grad():
        strides = graph.model(*inputs).strides.numpy()  # [P]
    parts = []
    for name, x, y in zip(graph.outputs, got, want, strict=True):
        apart_at = {f"{s:g}": relative_difference(x[:, strides == s], y[:, strides == s]) for s in np.unique(strides)}
        if levels := [stride for stride, difference in apart_at.items() if difference > bounds.output]:
            parts.append(f"{name} (stride {', '.join(levels)})")
    return ", ".join(parts)


def described(layers: Mapping[str, float], count: int, by_size: bool = True) -> list[str]:
    """Name the first layers, or those that differ most, with their differences."""
    names = sorted(layers, key=lambda name: -layers[name]) if by_size else list(layers)
    return [f"{name.removeprefix('model.')} ({layers[name]:.1e} of its largest value)" for name in names[:count]]


def record_maps(graph: Graph, names: Container[str], inputs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Compute the map of each layer in PyTorch, and its map after the batch norm that follows it, if one does.

    A format may make one convolution of the two. What runs several times counts for its first time.
    """
    maps: dict[str, list[Tensor]] = {}
    last: tuple[str, Tensor | None] = "", None
    name_of = {module: name for name, module in graph.named_modules()}

    def keep(module: nn.Module, inputs: tuple, output: Any) -> None:
        nonlocal last
        name = name_of[module]
        if isinstance(module, nn.Conv2d | nn.Linear):
            last = "", None
            if name in names and name not in maps:
                maps[name], last = [output.clone()], (name, output)  # a copy, since activations change it in place
        elif last[0] and inputs[0] is last[1] and isinstance(output, Tensor) and output.shape == maps[last[0]][0].shape:
            maps[last[0]].append(output.clone())

    hooks = [module.register_forward_hook(keep) for module in graph.modules() if not list(module.children())]
    try:
        with torch.no_grad():
            graph(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def relative_difference(got: np.ndarray, want: np.ndarray) -> float:
    """Compute the largest difference, relative to the largest value; infinity for other shapes and for NaN."""
    if got.shape != want.shape or np.isnan(got).any():
        return float("inf")
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-12))


def as_batch(item: Prepared) -> tuple[Tensor, Tensor]:
    """Return images [1,3,H,W] and sizes [1,2]."""
    return item.pixels[None], torch.tensor([item.size])


def inputs_of(graph: Graph, item: Prepared) -> tuple[Tensor, ...]:
    """Return what a graph takes for one image."""
    images, sizes = as_batch(item)
    if isinstance(graph, DetectorGraph):
        return images, sizes
    config = graph.model.config
    return (normalize(images, sizes, config["image_mean"], config["image_std"]),)
