"""`trace` makes one graph of a detector with torch.export, which the formats translate."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..compiled import fast_copy
from ..config import Thresholds
from ..fcos import FCOS
from ..inference import detect

INPUTS, OUTPUTS = ["images", "sizes"], ["boxes", "scores", "labels", "count"]
LEAST_SIDE = 64  # pixels; below, OpenVINO's pooling refuses maps smaller than its window
# No map has one row or one column at this size: torch.export takes a dimension of 1 for a constant.
TRACED_SIZE = 288, 416


class DetectorGraph(nn.Module):
    """This module is `detect` of one model with fixed thresholds, with batch norms folded into convolutions."""

    def __init__(self, model: FCOS, thresholds: Thresholds):
        super().__init__()
        self.model = fast_copy(model, winograd=False).cpu().to(memory_format=torch.contiguous_format)
        least = thresholds.score_threshold
        self.thresholds = thresholds._replace(score_threshold=least.cpu()) if isinstance(least, Tensor) else thresholds

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """`images`: uint8 [B,3,H,W]; `sizes`: int64 [B,2]. Returns boxes, scores, labels and count."""
        return tuple(detect(self.model, images, sizes, self.thresholds))


def trace(
    model: FCOS, thresholds: Thresholds, size: tuple[int, int] | None, batch: int | None
) -> tuple[DetectorGraph, ExportedProgram]:
    """Export `detect`, for images of one `size` and number or, where these are None, of any.

    Raises:
        ValueError: torch.export cannot make one graph of the backbone.
    """
    graph = DetectorGraph(model, thresholds).eval()
    height, width = size or TRACED_SIZE
    count = batch or 2
    sizes = torch.tensor([[height - 8, width - 6]] * count)
    images_dims: dict[int, Dim] = {}
    sizes_dims: dict[int, Dim] = {}
    if batch is None:
        images_dims[0] = sizes_dims[0] = Dim("batch", min=1, max=4096)
    if size is None:
        least, most = LEAST_SIDE // 32, 256
        images_dims[2] = 32 * Dim("rows", min=least, max=most)
        images_dims[3] = 32 * Dim("columns", min=least, max=most)
    try:
        with torch.no_grad():
            program = torch.export.export(
                graph,
                (torch.zeros(count, 3, height, width, dtype=torch.uint8), sizes),
                dynamic_shapes={"images": images_dims, "sizes": sizes_dims},
            )
    except Exception as error:  # torch.export refuses in many ways
        hint = "" if size and batch else "; try a fixed size and batch"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"torch.export cannot make one graph of {model.config['backbone']!r} ({reason:.200}){hint}"
        ) from error
    return graph, program
