"""A large image is looked at in windows (`windows`), and what is found in them becomes one result (`merge`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_area, box_iou

from .arguments import check_number
from .config import OVERLAPS
from .nms import class_nms

OVERLAP = 0.2  # of a window's side, unless a user asks for another overlap
NEAR = 0.01  # of a window's side: a box that ends so near to the window's edge is taken as cut by it
SAME = 0.5  # parts of an object in two windows are alike in the strip that both see, if their IoU there is higher
INSIDE = 0.5  # a cut box belongs to a whole one that holds a larger part of it


class Window(NamedTuple):
    """A window is a rectangle of an image, in whole pixels."""

    x: int
    y: int
    width: int
    height: int

    def corners(self) -> Tensor:
        """Return float64 [4], xyxy."""
        return torch.tensor([self.x, self.y, self.x + self.width, self.y + self.height], dtype=torch.float64)


def windows(height: int, width: int, size: int, overlap: float = OVERLAP) -> list[Window]:
    """Cover an image with windows of `size` x `size` pixels at equal distances, row by row.

    Args:
        height, width: of the image, in pixels. A window is no larger than the image.
        size: side of a window, in pixels.
        overlap: part of its side that a window shares with its neighbour, at least; 0 to 0.9. An object smaller than
            this strip is whole in some window.

    Raises:
        ValueError: `size` or `overlap` is out of range.
    """
    check_number("tiles", size, 1, math.inf, whole=True, why="; it is the side of a window in pixels")
    check_number(
        "overlap", overlap, *OVERLAPS, why="; it is the part of its side that a window shares with its neighbour"
    )

    def starts(length: int) -> list[int]:
        if length <= size:
            return [0]
        count = math.ceil((length - size) / max(1, size * (1 - overlap))) + 1
        return [round(i * (length - size) / (count - 1)) for i in range(count)]

    return [Window(x, y, min(size, width), min(size, height)) for y in starts(height) for x in starts(width)]


def merge(
    found: Sequence[dict[str, Tensor]],
    places: Sequence[Window],
    image_size: tuple[int, int],
    nms_threshold: float,
    plus_one: bool = False,
) -> dict[str, Tensor]:
    """Join what was found in windows of one image.

    An edge between windows cuts objects. Two cut boxes of a class that agree in the strip that both windows see become
    one box around both. A cut box that lies for the most part in a whole box of its class is dropped, and the whole box
    gets the higher score of the two. What the view of the whole image finds small, the windows show larger: its boxes
    that are whole in some window anyway are left out. NMS, computed in float64, drops the rest of the duplicates.

    Args:
        found: `boxes` [N,4] xyxy in pixels of the window, `scores` [N], `labels` [N] of each window.
        places: the windows; one of them may be the whole image.
        image_size: (h, w) of the image in pixels.
        nms_threshold, plus_one: see `class_nms`.

    Returns:
        `boxes` [N,4] xyxy in pixels of the image, `scores` [N], `labels` [N], best score first.
    """
    with torch.device("cpu"):  # where `found` is, whatever device users have made the default
        return _merge(found, places, image_size, nms_threshold, plus_one)


def _merge(
    found: Sequence[dict[str, Tensor]],
    places: Sequence[Window],
    image_size: tuple[int, int],
    nms_threshold: float,
    plus_one: bool,
) -> dict[str, Tensor]:
    height, width = image_size
    more = torch.tensor([0, 0, 1, 1], dtype=torch.float64) * plus_one  # from the published boxes to their edges
    whole: list[dict[str, Tensor]] = []
    cut: list[dict[str, Tensor]] = []
    strip, near = _smallest_strip(places, image_size), NEAR * max(places[0].width, places[0].height)
    for detections, place in zip(found, places, strict=True):
        boxes = detections["boxes"].double() + torch.tensor([place.x, place.y]).repeat(2) + more
        ends = torch.tensor([place.x > 0, place.y > 0, place.x + place.width < width, place.y + place.height < height])
        sides = ends & ((boxes - place.corners()).abs() < near)  # [N,4]
        used = torch.ones(len(boxes), dtype=torch.bool)
        if place == Window(0, 0, width, height) and len(places) > 1:
            used = (boxes[:, 2:] - boxes[:, :2]).amax(1) > strip
        here = {"boxes": boxes, "scores": detections["scores"], "labels": detections["labels"], "sides": sides}
        is_cut = sides.any(1)
        whole.append({key: value[used & ~is_cut] for key, value in here.items()})
        cut.append({key: value[is_cut] for key, value in here.items()})

    joined = _join(cut, places, near)
    is_cut = joined["sides"].any(1)
    left = {key: value[is_cut] for key, value in joined.items()}
    joined = {key: value[~is_cut] for key, value in joined.items()}
    boxes, scores, labels = (
        torch.cat([part[key] for part in (*whole, joined)]) for key in ("boxes", "scores", "labels")
    )
    keep = class_nms(boxes - more, scores, labels, nms_threshold, max(1, len(boxes)), plus_one)
    boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
    alone = torch.ones(len(left["labels"]), dtype=torch.bool)
    for i, (box, score, label) in enumerate(zip(left["boxes"], left["scores"], left["labels"], strict=True)):
        part = _shared_area(box[None], boxes)[0] / box_area(box[None]).clamp(min=1e-9)  # [N]
        holders = (part > INSIDE) & (labels == label)
        alone[i] = not holders.any()
        best = torch.where(holders, part, -1).argmax() if len(part) else 0
        if holders.any() and scores[best] < score:
            scores[best] = score
    boxes = torch.cat([boxes, left["boxes"][alone]])
    scores, labels = torch.cat([scores, left["scores"][alone]]), torch.cat([labels, left["labels"][alone]])
    keep = class_nms(boxes - more, scores, labels, nms_threshold, max(1, len(boxes)), plus_one)
    return {"boxes": (boxes - more)[keep].to(found[0]["boxes"].dtype), "scores": scores[keep], "labels": labels[keep]}


def _smallest_strip(places: Sequence[Window], image_size: tuple[int, int]) -> float:
    """Compute the side of the largest object that lies whole in some window wherever it is, less what counts as cut."""
    parts = [place for place in places if (place.height, place.width) != tuple(image_size)]
    strip = math.inf if len(parts) > 1 else 0.0
    for a, b in zip(parts, parts[1:], strict=False):  # row by row: the next one is to the right, or begins a lower row
        if a.y == b.y:
            strip = min(strip, a.x + a.width - b.x - 2 * NEAR * a.width)
        else:
            strip = min(strip, a.y + a.height - b.y - 2 * NEAR * a.height)
    return max(strip, 0.0)


def _join(cut: Sequence[dict[str, Tensor]], places: Sequence[Window], near: float) -> dict[str, Tensor]:
    """Make one box of the cut boxes that are parts of one object, window by window.

    `sides` bool [N,4] says at which sides (left, top, right, bottom) a box is cut; so it does in the result.
    """
    first = [0]
    for part in cut:
        first.append(first[-1] + len(part["labels"]))
    group = list(range(first[-1]))  # a box's group is found by going from it to its leader

    def leader(i: int) -> int:
        while group[i] != i:
            i = group[i]
        return i

    corners = torch.stack([place.corners() for place in places])  # [W,4]
    has_cut = torch.tensor([len(part["labels"]) > 0 for part in cut])
    share = (_shared_area(corners, corners) > 0) & has_cut & has_cut[:, None]
    for a, b in share.triu(1).nonzero().tolist():  # pairs of windows that share a strip
        strip = torch.cat([corners[a, :2].maximum(corners[b, :2]), corners[a, 2:].minimum(corners[b, 2:])])
        inside_a, inside_b = _clip(cut[a]["boxes"], strip), _clip(cut[b]["boxes"], strip)
        alike = box_iou(inside_a, inside_b).nan_to_num() > SAME  # [Na,Nb]
        alike &= cut[a]["labels"][:, None] == cut[b]["labels"]
        for i, j in alike.nonzero().tolist():
            group[leader(first[a] + i)] = leader(first[b] + j)

    members: dict[int, list[int]] = {}
    for i in range(len(group)):
        members.setdefault(leader(i), []).append(i)
    all_cut = {key: torch.cat([part[key] for part in cut]) for key in cut[0]}
    boxes, scores, sides = all_cut["boxes"], all_cut["scores"], all_cut["sides"]
    outward = torch.tensor([-1.0, -1, 1, 1], dtype=torch.float64)
    for lead, others in members.items():
        if len(others) > 1:
            ends = boxes[others] * outward  # [n,4], larger is further out
            furthest = ends.amax(0)
            boxes[lead] = furthest * outward
            sides[lead] = (sides[others] | (ends < furthest - near)).all(
                0
            )  # cut if all that reach so far are cut there
            scores[lead] = scores[others].max()
    leaders = torch.tensor(list(members), dtype=torch.long)
    return {key: value[leaders] for key, value in all_cut.items()}


def _clip(boxes: Tensor, strip: Tensor) -> Tensor:
    """Return the part of each box [N,4] that lies in the rectangle `strip` [4]; empty where there is none."""
    upper_left = boxes[:, :2].maximum(strip[:2])
    return torch.cat([upper_left, boxes[:, 2:].minimum(strip[2:]).maximum(upper_left)], dim=1)


def _shared_area(a: Tensor, b: Tensor) -> Tensor:
    """Compute the area [N,M] that each of the boxes `a` [N,4] shares with each of `b` [M,4]."""
    sides = a[:, None, 2:].minimum(b[None, :, 2:]) - a[:, None, :2].maximum(b[None, :, :2])
    return sides.clamp(min=0).prod(2)
