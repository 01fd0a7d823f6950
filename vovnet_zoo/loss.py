"""`assign_targets` gives each location the box that it learns, and `FCOSLoss` measures the errors of predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from .arguments import are_xyxy, check_choice, check_flag, check_model, check_number, check_tensor, refuse_not_xyxy
from .config import DEFAULT_VARIANT, DEFAULTS, VARIANTS, LossOptions, Matching, VariantName
from .fcos import CHOICES, FCOS, Predictions, check_predictions, check_radius
from .words import counted


class FCOSLoss(nn.Module):
    """The loss has three parts: focal loss of classes, IoU loss of boxes weighted by centerness, and centerness loss.

    Args:
        variant: "improved" (arXiv 2006.09214), "published" (the 2019 detectors, arXiv 1904.01355) or "torchvision", a
            key of `VARIANTS`; it sets the defaults of the next six arguments.
        center_radius: only locations within this many strides of a box's centre learn the box; None lets all locations
            inside the box learn it.
        matching: how a location's box is chosen, see `assign_targets`.
        box_loss: "giou" (arXiv 1902.09630) or "iou": `-log((intersection + 1) / (union + 1))`.
        plus_one: areas of boxes count pixels, `(w + 1) * (h + 1)`, when the smallest box is chosen.
        weigh_boxes: the box loss of a location has its centerness as weight, and the sum is divided by the sum of these
            weights instead of the number of positives.
        add_images: the classification loss is divided by positives + images instead of positives.
        alpha, gamma: parameters of the focal loss (arXiv 1708.02002), 0..1 and 0..100.

    Raises:
        ValueError: an argument is unknown or out of range, or tensors have other shapes or kinds than documented; the
            message names the argument.
    """

    def __init__(
        self,
        variant: VariantName = DEFAULT_VARIANT,
        *,
        alpha: float = 0.25,
        gamma: float = 2.0,
        **overrides: Unpack[LossOptions],
    ):
        super().__init__()
        check_choice("variant", variant, VARIANTS)
        check_number("alpha", alpha, 0, 1)
        check_number("gamma", gamma, 0, 100)
        if unknown := overrides.keys() - LossOptions.__annotations__.keys():
            known = ["variant", "alpha", "gamma", *sorted(LossOptions.__annotations__)]
            raise ValueError(f"unknown {sorted(unknown)}: FCOSLoss has {', '.join(known)}")
        default = VARIANTS[variant]
        self.center_radius = overrides.get("center_radius", default["center_radius"])
        self.plus_one = overrides.get("plus_one", default["plus_one"])
        self.matching = overrides.get("matching", default["matching"])
        self.box_loss = overrides.get("box_loss", default["box_loss"])
        self.weigh_boxes = overrides.get("weigh_boxes", default["weigh_boxes"])
        self.add_images = overrides.get("add_images", default["add_images"])
        self.alpha, self.gamma = alpha, gamma
        check_choice("box_loss", self.box_loss, CHOICES["box_loss"])
        check_choice("matching", self.matching, CHOICES["matching"])
        check_radius(self.center_radius)
        for name in ("plus_one", "weigh_boxes", "add_images"):
            check_flag(name, getattr(self, name))

    def __repr__(self) -> str:
        names = (*sorted(LossOptions.__annotations__), "alpha", "gamma")
        return f"FCOSLoss({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    @classmethod
    def of(cls, model: FCOS) -> FCOSLoss:
        """Create the loss that a detector's configuration asks for."""
        check_model("model", model, FCOS)
        config = model.config
        return cls(
            plus_one=config["plus_one"],
            center_radius=config["center_radius"],
            matching=config["matching"],
            box_loss=config["box_loss"],
            weigh_boxes=config["weigh_boxes"],
            add_images=config["add_images"],
        )

    def forward(
        self, preds: Predictions, boxes: Tensor, labels: Tensor, normalizers: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch, each a scalar, in float32 (float64 for float64 predictions).

        Args:
            preds: predictions of B images at P locations with K classes.
            boxes: [B,M,4] xyxy in pixels of the network input, x1 <= x2 and y1 <= y2.
            labels: whole numbers [B,M], 0..K-1, -1 for padding.
            normalizers: [3], the divisors of the three losses; None takes `self.normalizers` of this batch. Where a
                global batch is split over ranks or accumulated, pass the sum of the normalizers over its parts: the
                losses of the parts then add up to the loss of the batch.

        Returns:
            {"loss_cls", "loss_box", "loss_ctr"}

        Raises:
            ValueError: a tensor has another shape or kind, a label is K or more, or a box is not xyxy. On a GPU, and in
                a compiled graph, such a label or box raises torch's error for an assertion instead, so that nothing
                waits for the GPU.
        """
        check_predictions(preds)
        check_boxes(boxes, labels)
        if len(boxes) != len(preds.logits):
            raise ValueError(f"boxes are of {counted(len(boxes), 'image')}, preds of {len(preds.logits)}")
        boxes, labels = _wide_enough(boxes, labels)
        check_labels(labels, preds.logits.shape[-1])
        check_corners(boxes, labels)
        targets = self.assign(preds.points, preds.strides, boxes, labels)
        return self.compare(preds, targets, self.normalizers(targets) if normalizers is None else normalizers)

    if TYPE_CHECKING:  # nn.Module's own says that any arguments give any result

        def __call__(
            self, preds: Predictions, boxes: Tensor, labels: Tensor, normalizers: Tensor | None = None
        ) -> dict[str, Tensor]: ...

    def compare(self, preds: Predictions, targets: Targets, normalizers: Tensor) -> dict[str, Tensor]:
        """Compute the losses of predictions from targets that are assigned already; see `forward`."""
        check_predictions(preds)
        check_targets(targets)
        if targets.labels.shape != preds.centerness.shape:
            raise ValueError(f"targets are {list(targets.labels.shape)}, preds {list(preds.centerness.shape)} [B,P]")
        check_tensor("normalizers", normalizers, (3,), "")
        check_labels(targets.labels, preds.logits.shape[-1])
        # without positives the sums are 0, so that any other divisor will do
        cls_norm, box_norm, ctr_norm = (x.clamp(min=least) for x, least in zip(normalizers, (1, 1e-6, 1), strict=True))

        distances = _at_least_float32(preds.distances)  # [B,P,4]
        centerness = _at_least_float32(preds.centerness)  # [B,P]
        positive = targets.labels >= 0  # [B,P]

        loss_cls = self._add_class_losses(preds.logits, targets.labels) / cls_norm

        # Background locations take part with weight 0 and a harmless box, so that no inf or nan reaches the gradient.
        distances = torch.where(positive[..., None], distances, 1.0)
        wanted = torch.where(positive[..., None], targets.distances, 1.0)
        box_losses = giou_loss(distances, wanted) if self.box_loss == "giou" else iou_loss(distances, wanted)  # [B,P]
        loss_box = (box_losses * (targets.centerness if self.weigh_boxes else positive)).sum() / box_norm

        wanted_ctr = targets.centerness.to(centerness.dtype)  # torch gives the losses the dtype of the targets
        ctr_losses = F.binary_cross_entropy_with_logits(centerness, wanted_ctr, reduction="none")  # [B,P]
        loss_ctr = (ctr_losses * positive).sum() / ctr_norm
        return {"loss_cls": loss_cls, "loss_box": loss_box, "loss_ctr": loss_ctr}

    def _add_class_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Add up the focal losses of logits [B,P,K]; labels are int64 [B,P], -1 for background."""
        logits = _at_least_float32(logits)
        classes = torch.arange(logits.shape[-1], device=logits.device)
        one_hot = (labels[..., None] == classes).to(logits.dtype)  # [B,P,K], zeros for background
        return sigmoid_focal_loss(logits, one_hot, self.alpha, self.gamma, reduction="sum")

    def assign(self, points: Tensor, strides: Tensor, boxes: Tensor, labels: Tensor) -> Targets:
        """Call `assign_targets` with the options of this loss."""
        return assign_targets(
            points,
            strides,
            boxes,
            labels,
            center_radius=self.center_radius,
            plus_one=self.plus_one,
            matching=self.matching,
        )

    def normalizers(self, targets: Targets) -> Tensor:
        """Count the divisors [3] of the three losses, which add up over the parts of a batch.

        They are the number of positives (with `add_images` plus the number of images), the sum of the centerness
        targets (without `weigh_boxes` the number of positives), and the number of positives.
        """
        check_targets(targets)
        num_positive = (targets.labels >= 0).sum().to(targets.centerness.dtype)
        num_images = targets.labels.shape[0] if self.add_images else 0
        weights = targets.centerness.sum() if self.weigh_boxes else num_positive
        return torch.stack([num_positive + num_images, weights, num_positive])


class Targets(NamedTuple):
    """Each of P locations of B images should learn these targets."""

    labels: Tensor  # [B,P] int64, 0..K-1, -1 for background
    distances: Tensor  # [B,P,4] left, top, right, bottom in pixels of the network input; 0 for background
    centerness: Tensor  # [B,P] in 0..1; 0 for background


def check_boxes(boxes: Tensor, labels: Tensor) -> None:
    """Raise `ValueError` unless boxes are a tensor [B,M,4] and labels a whole one [B,M], on one device."""
    if isinstance(boxes, list | tuple):
        raise ValueError(
            f"boxes must be one tensor [B,M,4], got a {type(boxes).__name__}; pad each image's boxes to the same M, "
            "with label -1, as vovnet_zoo.data.collate does"
        )
    check_tensor("boxes", boxes, ("B", "M", 4), "")
    check_tensor("labels", labels, ("B", "M"), "whole")
    if labels.shape != boxes.shape[:2]:
        raise ValueError(f"boxes must be [B,M,4] and labels [B,M], got {list(boxes.shape)} and {list(labels.shape)}")
    if labels.device != boxes.device:
        raise ValueError(f"boxes are on {boxes.device}, labels on {labels.device}; move them to one device")


def check_points(points: Tensor, strides: Tensor) -> None:
    """Raise `ValueError` unless points are a tensor [P,2] and strides [P]."""
    check_tensor("points", points, ("P", 2))
    check_tensor("strides", strides, ("P",), "")
    if len(points) != len(strides):
        raise ValueError(f"points must be [P,2] and strides [P], got {list(points.shape)} and {list(strides.shape)}")


def _wide_enough(boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Convert boxes whose area float16 cannot hold, and labels whose dtype has no -1."""
    return _at_least_float32(boxes), labels.long()


def check_targets(targets: Targets) -> None:
    """Raise `ValueError` unless targets are those that `assign_targets` makes."""
    if not isinstance(targets, Targets):
        raise ValueError(f"targets must be the Targets that assign_targets returns, got {type(targets).__name__}")


def assign_targets(
    points: Tensor,
    strides: Tensor,
    boxes: Tensor,
    labels: Tensor,
    *,
    center_radius: float | None = DEFAULTS["center_radius"],
    plus_one: bool = DEFAULTS["plus_one"],
    matching: Matching = DEFAULTS["matching"],
) -> Targets:
    """Give each location the smallest of the boxes that have the size of its level and that it lies strictly inside of.

    A box has the size of a level of stride s if its furthest side is 4s..8s pixels away from the location, both ends
    included: 64..128 at stride 16. The first level has no lower end, the last level no upper end (arXiv 1904.01355,
    section 3.2). All tensors have fixed shapes, so that a training step can be one graph.

    Args:
        points: [P,2] x, y, as in `Predictions`.
        strides: [P], as in `Predictions`.
        boxes: [B,M,4] xyxy in pixels of the network input.
        labels: whole numbers [B,M], -1 for padding.
        center_radius: the location must also lie within `center_radius * stride` of the box's centre in x and in y
            (arXiv 2006.09214); None switches this off.
        plus_one: areas are `(w + 1) * (h + 1)`.
        matching: "paper", or "torchvision": 4s and 8s are excluded, so that a box whose furthest side is exactly 64
            pixels away has the size of neither level, and areas are compared as `1e8 - area` in the dtype of the boxes,
            so that in float32 the first of several boxes wins whose areas differ by less than about 8 square pixels.

    Raises:
        ValueError: a tensor has another shape or kind, or an option is out of range; the message names it.
    """
    check_points(points, strides)
    check_radius(center_radius)
    check_flag("plus_one", plus_one)
    check_choice("matching", matching, CHOICES["matching"])
    check_boxes(boxes, labels)
    boxes, labels = _wide_enough(boxes, labels)
    if boxes.shape[1] == 0:  # the choice needs at least one box, if only padding
        boxes, labels = F.pad(boxes, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=-1)

    # A crowded image must not take all memory, so more boxes are looked at in parts, in one node of a compiled graph.
    choose = choose_box if boxes.shape[1] <= BOXES_IN_A_GRAPH else choose_box_in_parts
    chosen, area = choose(points, strides, boxes, labels, center_radius, plus_one, matching)  # [B,P]
    positive = area < torch.inf

    label = torch.where(positive, labels.gather(1, chosen), -1)
    box = boxes.gather(1, chosen[..., None].expand(-1, -1, 4))  # [B,P,4]
    distances = torch.cat([points - box[..., :2], box[..., 2:] - points], dim=-1)
    distances = torch.where(positive[..., None], distances, 0.0)
    return Targets(label, distances, centerness_targets(distances))


BOXES_IN_A_GRAPH = 64  # a batch of photos seldom has an image with more
BOXES_IN_A_PART = 16  # about 30 bytes are needed for each of them, at each location of each image


def choose_box(
    points: Tensor,
    strides: Tensor,
    boxes: Tensor,
    labels: Tensor,
    center_radius: float | None,
    plus_one: bool,
    matching: str,
) -> tuple[Tensor, Tensor]:
    """Choose the box of each location, see `assign_targets`.

    Returns:
        Its index and its `comparable_area`, both [B,P]; where there is none, 0 and infinity.
    """
    x, y = points[:, None].unbind(-1)  # [P,1]
    x1, y1, x2, y2 = boxes[:, None].unbind(-1)  # [B,1,M]
    left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y  # [B,P,M]
    candidate = torch.minimum(torch.minimum(left, right), torch.minimum(top, bottom)) > 0  # [B,P,M], inside the box
    if center_radius is not None:
        reach = strides[:, None] * center_radius  # [P,1]
        candidate &= ((x - (x1 + x2) / 2).abs() < reach) & ((y - (y1 + y2) / 2).abs() < reach)

    furthest = torch.maximum(torch.maximum(left, right), torch.maximum(top, bottom))  # [B,P,M]
    low = torch.where(strides == strides.amin(), 0.0, 4 * strides)[:, None]  # [P,1]
    high = torch.where(strides == strides.amax(), torch.inf, 8 * strides)[:, None]
    if matching == "torchvision":
        candidate &= (furthest > low) & (furthest < high)  # [B,P,M]
    else:
        candidate &= (furthest >= low) & (furthest <= high)
    area = torch.where(labels >= 0, comparable_area(boxes, plus_one, matching), torch.inf)[:, None]  # [B,1,M]
    least, chosen = torch.where(candidate, area, torch.inf).min(-1)  # [B,P], the first among equals
    return chosen, least


@torch.library.custom_op("vovnet_zoo::choose_box_in_parts", mutates_args=())
def choose_box_in_parts(
    points: Tensor,
    strides: Tensor,
    boxes: Tensor,
    labels: Tensor,
    center_radius: float | None,
    plus_one: bool,
    matching: str,
) -> tuple[Tensor, Tensor]:
    """Choose as `choose_box` does, in memory that does not grow with the number of boxes."""
    chosen = boxes.new_zeros(len(boxes), len(points), dtype=torch.int64)
    least = torch.full(chosen.shape, torch.inf, dtype=torch.result_type(boxes, torch.inf), device=boxes.device)
    for start in range(0, boxes.shape[1], BOXES_IN_A_PART):
        part = slice(start, start + BOXES_IN_A_PART)
        found, area = choose_box(points, strides, boxes[:, part], labels[:, part], center_radius, plus_one, matching)
        smaller = area < least  # of equal boxes the first stays
        chosen, least = torch.where(smaller, found + start, chosen), torch.where(smaller, area, least)
    return chosen, least


@choose_box_in_parts.register_fake
def _(points, strides, boxes, labels, center_radius, plus_one, matching):
    shape, dtype = (len(boxes), len(points)), torch.result_type(boxes, torch.inf)
    return boxes.new_empty(shape, dtype=torch.int64), boxes.new_empty(shape, dtype=dtype)


def comparable_area(boxes: Tensor, plus_one: bool, matching: str) -> Tensor:
    """Compute the areas [...] of boxes [...,4] xyxy, in square pixels; for "torchvision" rounded, and less 1e8."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    area = (x2 - x1 + plus_one) * (y2 - y1 + plus_one)
    return -(1e8 - area) if matching == "torchvision" else area


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Check that labels are -1..K-1, without waiting for a GPU.

    Raises:
        ValueError: a label on the CPU is out of range, or labels are no whole numbers.
        RuntimeError: in a compiled graph or, at a later synchronisation, on a GPU.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if labels.device.type == "meta":
        return
    right = ((labels >= -1) & (labels < num_classes)).all()
    message = f"labels must be 0..{num_classes - 1}, and -1 for padding"  # torch 2.11 traces this, with a variable
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        if not right:
            wrong = labels[(labels < -1) | (labels >= num_classes)].unique().tolist()
            raise ValueError(f"{message}, got {wrong[:5]}; number the classes from 0 on")
    else:
        torch._assert_async(right, message)


def check_corners(boxes: Tensor, labels: Tensor) -> None:
    """Check that boxes with a label are finite and xyxy, not xywh, since no location would learn another box.

    Raises:
        ValueError, RuntimeError: a box is wrong, see `check_labels`.
    """
    if boxes.device.type == "meta":
        return
    if boxes.device.type == "cpu" and not torch.compiler.is_compiling():
        refuse_not_xyxy("boxes", boxes[labels >= 0])
    else:
        torch._assert_async((are_xyxy(boxes) | (labels < 0)).all(), "boxes must be finite and xyxy")


def centerness_targets(distances: Tensor) -> Tensor:
    """Compute the centerness [...] of distances [...,4] (left, top, right, bottom), 0 where the distances are 0.

    It is `sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))` (arXiv 1904.01355, equation 3).
    """
    left, top, right, bottom = distances.unbind(-1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right)
    vertical = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return torch.where((left > 0) & (top > 0), horizontal * vertical, 0.0).sqrt()


def iou_loss(distances: Tensor, targets: Tensor) -> Tensor:
    """Compute `-log((intersection + 1) / (union + 1))` [...] of boxes around the same point.

    The boxes are distances [...,4] in pixels, the areas in square pixels. The 1 keeps the loss of an empty overlap
    finite (the published detectors' UnitBox loss).
    """
    left, top, right, bottom = distances.unbind(-1)
    left_t, top_t, right_t, bottom_t = targets.unbind(-1)
    width = torch.minimum(left, left_t) + torch.minimum(right, right_t)
    height = torch.minimum(top, top_t) + torch.minimum(bottom, bottom_t)
    intersection = width * height
    union = (left + right) * (top + bottom) + (left_t + right_t) * (top_t + bottom_t) - intersection
    return -((intersection + 1) / (union + 1)).log()


def giou_loss(distances: Tensor, targets: Tensor) -> Tensor:
    """Compute 1 - GIoU [...] (arXiv 1902.09630) of boxes around the same point, as distances [...,4] in pixels.

    The numbers are those of torchvision's `generalized_box_iou_loss`, which selects boxes by a mask: each time the host
    would wait for a GPU to count them.
    """
    ours, theirs = (torch.cat([-x[..., :2], x[..., 2:]], -1) for x in (distances, targets))  # xyxy
    ours, theirs = _at_least_float32(ours), _at_least_float32(theirs)
    intersection, union = _intersection_and_union(ours, theirs)
    x1, y1, x2, y2 = ours.unbind(-1)
    x1_t, y1_t, x2_t, y2_t = theirs.unbind(-1)
    width = torch.max(x2, x2_t) - torch.min(x1, x1_t)  # of the smallest box around both
    height = torch.max(y2, y2_t) - torch.min(y1, y1_t)
    around = width * height
    return 1 - (intersection / (union + 1e-7) - (around - union) / (around + 1e-7))


def _intersection_and_union(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    # The boxes are taken apart here once more, so that gradients are added up in torchvision's order.
    x1, y1, x2, y2 = ours.unbind(-1)
    x1_t, y1_t, x2_t, y2_t = theirs.unbind(-1)
    left, top, right, bottom = torch.max(x1, x1_t), torch.max(y1, y1_t), torch.min(x2, x2_t), torch.min(y2, y2_t)
    intersection = torch.where((bottom > top) & (right > left), (right - left) * (bottom - top), 0.0)
    return intersection, (x2 - x1) * (y2 - y1) + (x2_t - x1_t) * (y2_t - y1_t) - intersection


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
