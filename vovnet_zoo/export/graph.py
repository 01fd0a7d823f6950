"""`trace` makes one graph of a detector with torch.export, which the formats translate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import cosine_similarity

from ..compiled import fast_copy
from ..config import Thresholds
from ..fcos import FCOS
from ..inference import detect

LEAST_SIDE = 64  # pixels; below, OpenVINO's pooling refuses maps smaller than its window
# No map has one row or one column at this size: torch.export takes a dimension of 1 for a constant.
TRACED_SIZE = 288, 416


class DetectorGraph(nn.Module):
    """This module is `detect` of one model with fixed thresholds, with batch norms folded into convolutions."""

    inputs, outputs = ["images", "sizes"], ["boxes", "scores", "labels", "count"]

    def __init__(self, model: FCOS, thresholds: Thresholds):
        super().__init__()
        self.model = frozen(model)
        least = thresholds.score_threshold
        self.thresholds = thresholds._replace(score_threshold=least.cpu()) if isinstance(least, Tensor) else thresholds

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Detect objects in `images` uint8 [B,3,H,W] of `sizes` int64 [B,2]; return boxes, scores, labels and count."""
        return tuple(detect(self.model, images, sizes, self.thresholds))


class NetworkGraph(nn.Module):
    """This module is the network of one model alone, with batch norms folded into convolutions."""

    inputs, outputs = ["images"], ["logits", "distances", "centerness"]

    def __init__(self, model: FCOS):
        super().__init__()
        self.model = frozen(model)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take normalised images float32 [B,3,H,W]; return logits [B,P,K], distances [B,P,4] and centerness [B,P]."""
        preds = self.model(images)
        return preds.logits, preds.distances, preds.centerness


Graph = DetectorGraph | NetworkGraph


def frozen(model: FCOS) -> FCOS:
    """Copy a model as it is exported."""
    return fast_copy(model, winograd=False).cpu().to(memory_format=torch.contiguous_format)


def trace(graph: Graph, size: tuple[int, int] | None, batch: int | None) -> ExportedProgram:
    """Export a graph, for images of one `size` and number or, where these are None, of any.

    Raises:
        ValueError: torch.export cannot make one graph of the backbone.
    """
    height, width = size or TRACED_SIZE
    count = batch or 2
    dims: dict[int, Any] = {}  # a dimension that varies, by its place
    if batch is None:
        dims[0] = Dim("batch", min=1, max=4096)
    sizes_dims = dims.copy()
    if size is None:
        least, most = LEAST_SIDE // 32, 256
        dims[2] = 32 * Dim("rows", min=least, max=most)
        dims[3] = 32 * Dim("columns", min=least, max=most)
    kind = torch.uint8 if isinstance(graph, DetectorGraph) else torch.float32
    arguments = [torch.zeros(count, 3, height, width, dtype=kind), torch.tensor([[height - 8, width - 6]] * count)]
    shapes = dict(zip(graph.inputs, (dims, sizes_dims), strict=False))
    try:
        with torch.no_grad():
            return torch.export.export(graph, tuple(arguments[: len(graph.inputs)]), dynamic_shapes=shapes)
    except Exception as error:  # torch.export refuses in many ways
        hint = "" if size and batch else "; try a fixed size and batch"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"torch.export cannot make one graph of {graph.model.config['backbone']!r} ({reason:.200}){hint}"
        ) from error


def find_weight(numbers: Tensor, graph: nn.Module) -> str | None:
    """Find the layer whose weights are a multiple of some numbers."""
    for name, weight in graph.named_parameters():
        if weight.shape == numbers.shape and cosine_similarity(weight.flatten(), numbers.flatten(), 0) > 0.9999:
            return name.removesuffix(".weight")
    return None
