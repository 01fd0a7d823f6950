"""`blame` finds the layer at which an exported file and PyTorch part."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import normalize
from ..inference import Prepared
from .graph import DetectorGraph, Graph
from .registry import Written
from .runtimes import open_file


def blame(written: Written, item: Prepared, bound: float) -> str:
    """Say which convolution is the first whose map differs, by more than `bound` relative to its largest value."""
    graph, layers = written.graph, written.layers
    if not layers:
        return f"{written.format.name} does not show its layers"
    inputs = inputs_of(graph, item)
    maps = record_maps(graph, layers, inputs)  # in the order in which they are computed
    run, _ = open_file(written.file, [layers[name] for name in maps])
    arrays = run(*(x.numpy() for x in inputs))[len(graph.outputs) :]
    for place, ((name, wanted), got) in enumerate(zip(maps.items(), arrays, strict=True)):
        difference = min(relative_difference(got, want.numpy()) for want in wanted)
        if not difference <= bound:
            before = ", or what is done to the images before it" if place == 0 else ""
            name = name.removeprefix("model.")
            return f"the first layer that differs is {name}{before} ({difference:.1e} of its largest value)"
    return "no convolution differs, so it happens in decoding or NMS"


def record_maps(graph: Graph, names: Container[str], inputs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Compute the map of each convolution in PyTorch, and its map after the batch norm that follows it, if one does.

    A format may make one convolution of the two. What runs several times counts for its first time.
    """
    maps: dict[str, list[Tensor]] = {}
    last: tuple[str, Tensor | None] = "", None
    name_of = {module: name for name, module in graph.named_modules()}

    def keep(module: nn.Module, inputs: tuple, output: Any) -> None:
        nonlocal last
        name = name_of[module]
        if isinstance(module, nn.Conv2d):
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
    """Compute the largest difference, relative to the largest value; infinity for other shapes."""
    if got.shape != want.shape:
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
