"""These functions tell how much of a box [N,4], xyxy in pixels, is in a window."""

import torch
from torch import Tensor

VISIBLE = 0.25  # a box that a crop, a mosaic or blending cuts is left out if less of its area is left
Window = tuple[int, int, int, int]  # x1, y1, x2, y2 in whole pixels


def are_visible(boxes: Tensor, window: Window) -> Tensor:
    """Tell of which boxes [N] at least a quarter of the area lies in a window."""
    return shares_inside(boxes, window) >= VISIBLE


def shares_inside(boxes: Tensor, window: Window) -> Tensor:
    """Compute the share of each box's area [N] that lies in a window: exactly 1 for a box that is whole in it.

    Args:
        boxes: [N,4], wider and higher than 0.
    """
    low, high = boxes.new_tensor(window).split(2)
    sides = torch.minimum(boxes[:, 2:], high) - torch.maximum(boxes[:, :2], low)
    return sides.clamp(min=0).prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1)
