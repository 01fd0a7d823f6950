import math

import pytest
import torch
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vovnet_zoo import FCOSLoss, Predictions, assign_targets, loss
from vovnet_zoo.fcos import make_points
from vovnet_zoo.loss import centerness_targets, giou_loss, iou_loss

STRIDES = [8, 16, 32, 64, 128]


def test_assignment_equals_a_loop_over_points_and_boxes():
    generator = torch.Generator().manual_seed(0)
    points, strides = points_of(192, 256)
    for center_radius, plus_one in ((1.5, False), (None, True), (None, False), (1.0, True)):
        boxes, labels = random_boxes(generator, 3, 12, 192, 256)
        got = assign_targets(points, strides, boxes, labels, center_radius=center_radius, plus_one=plus_one)
        for b in range(3):
            for p in range(len(points)):
                label, distances = assign_one(
                    points[p].tolist(),
                    strides[p].item(),
                    boxes[b].tolist(),
                    labels[b].tolist(),
                    center_radius,
                    plus_one,
                )
                assert got.labels[b, p].item() == label
                assert got.distances[b, p].tolist() == pytest.approx(distances, abs=1e-4)
        assert (got.labels >= 0).any() and (got.labels == -1).any()


def assign_one(point, stride, boxes, labels, center_radius, plus_one):
    """FCOS's rule for one location, in plain Python."""
    x, y = point
    best = (math.inf, -1, [0, 0, 0, 0])
    for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
        distances = [x - x1, y - y1, x2 - x, y2 - y]
        if label < 0 or min(distances) <= 0:
            continue
        near = center_radius is None or (
            abs(x - (x1 + x2) / 2) < center_radius * stride and abs(y - (y1 + y2) / 2) < center_radius * stride
        )
        low = {8: 0, 16: 64, 32: 128, 64: 256, 128: 512}[stride]
        high = {8: 64, 16: 128, 32: 256, 64: 512, 128: math.inf}[stride]
        if not near or not low <= max(distances) <= high:
            continue
        area = (x2 - x1 + plus_one) * (y2 - y1 + plus_one)
        if area < best[0]:
            best = (area, label, distances)
    return best[1:]


@pytest.mark.parametrize(
    "center_radius, plus_one, matching",
    [(1.5, False, "paper"), (None, True, "paper"), (1.5, False, "torchvision")],
)
def test_a_crowded_image_changes_nothing_but_memory(monkeypatch, center_radius, plus_one, matching):
    """Boxes that are looked at in parts give the same targets to the bit, of equal boxes the first."""
    boxes, labels = random_boxes(torch.Generator().manual_seed(4), 2, 300, 192, 256)
    boxes[:, 150:] = boxes[:, :150]  # the other half repeats the boxes, under other labels
    if matching == "torchvision":
        boxes[:, 150:, 3] -= 0.01  # or nearly, so that the smaller box is the first one at 1e8
    points, strides = points_of(192, 256)
    options = dict(center_radius=center_radius, plus_one=plus_one, matching=matching)
    found = assign_targets(points, strides, boxes, labels, **options)
    monkeypatch.setattr(loss, "BOXES_IN_A_GRAPH", 300)
    wanted = assign_targets(points, strides, boxes, labels, **options)
    assert (wanted.labels >= 0).sum() > 100
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_memory_does_not_grow_with_the_boxes():
    """The largest tensors of two images with 2,000 boxes are not larger than those with 64 boxes."""
    points, strides = points_of(320, 320)
    largest = {}
    for count in (64, 2000):
        boxes, labels = random_boxes(torch.Generator().manual_seed(5), 2, count, 320, 320)
        with LargestTensor() as seen:
            assign_targets(points, strides, boxes, labels)
        largest[count] = seen.numbers
    assert 0 < largest[2000] <= largest[64]


class LargestTensor(TorchDispatchMode):
    """While this context is open, it notes the size of the largest tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numbers = max([self.numbers, *(x.untyped_storage().nbytes() // x.element_size() for x in made)])
        return result


def test_a_crowded_image_is_one_graph():
    torch._dynamo.reset()
    points, strides = points_of(96, 96)
    compiled = torch.compile(assign_targets, fullgraph=True, backend="eager")
    for count in (3, 40, 70, 100, 300, 1000, 2000, 555, 777, 888, 999, 1111):  # torch allows 8 graphs
        boxes, labels = random_boxes(torch.Generator().manual_seed(6), 2, count, 96, 96)
        for ours, theirs in zip(
            compiled(points, strides, boxes, labels), assign_targets(points, strides, boxes, labels), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_operator_for_crowded_images():
    boxes, labels = random_boxes(torch.Generator().manual_seed(7), 2, 70, 64, 64)
    for options in ((1.5, False, "paper"), (None, True, "paper"), (1.5, False, "torchvision")):
        args = (*points_of(64, 64), boxes, labels, *options)
        torch.library.opcheck(torch.ops.vovnet_zoo.choose_box_in_parts, args)


def test_a_label_without_a_class_is_refused():
    """A label of K or more would be learnt as background."""
    points, strides = points_of(64, 64)
    preds, criterion = predictions(points, strides, 1, 3), FCOSLoss()
    boxes = torch.tensor([[[10.0, 10, 40, 40]]])
    for call in (criterion, torch.compile(criterion, fullgraph=True, backend="eager")):
        with pytest.raises((ValueError, RuntimeError), match=r"labels must be 0\.\.2"):
            call(preds, boxes, torch.tensor([[3]]))
    targets = criterion.assign(points, strides, boxes, torch.tensor([[3]]))
    with pytest.raises(ValueError, match=r"labels must be 0\.\.2.* from 0 on"):
        criterion.compare(preds, targets, criterion.normalizers(targets))


def test_boxes_that_are_not_xyxy_are_refused():
    """No location would learn a box whose corners are exchanged, or which is not finite; padding may be anything."""
    points, strides = points_of(64, 64)
    preds, criterion = predictions(points, strides, 1, 3), FCOSLoss()
    for call in (criterion, torch.compile(criterion, fullgraph=True, backend="eager")):
        with pytest.raises((ValueError, RuntimeError), match="boxes must be finite and xyxy"):
            call(preds, torch.tensor([[[40.0, 40, 10, 10]]]), torch.tensor([[1]]))
    with pytest.raises(ValueError, match=r"got \[10.0, 10.0, nan, 40.0\]; torchvision.ops.box_convert"):
        criterion(preds, torch.tensor([[[10.0, 10, torch.nan, 40]]]), torch.tensor([[1]]))
    point, padding = [10.0, 10, 10, 10], [9.0, 9, 0, torch.nan]
    criterion(preds, torch.tensor([[point, padding]]), torch.tensor([[1, -1]]))


def test_size_limits_are_inclusive_on_both_levels():
    points, strides = torch.tensor([[100.0, 100], [100, 100], [100, 100]]), torch.tensor([8.0, 16, 32])
    box = torch.tensor([[[36.0, 60, 140, 140]]])  # its furthest side is exactly 64 away
    assert assign_targets(points, strides, box, torch.tensor([[5]]), center_radius=None).labels.tolist() == [[5, 5, -1]]


def test_smallest_box_wins_and_the_first_among_equals():
    points, strides = torch.tensor([[50.0, 50]]), torch.tensor([8.0])
    boxes = torch.tensor([[[0.0, 0, 100, 100], [40, 40, 60, 60], [45, 35, 55, 75], [40, 40, 60, 60]]])
    assert assign_targets(points, strides, boxes, torch.tensor([[0, 1, 2, 3]]), center_radius=None).labels.item() == 1


def test_no_boxes():
    points, strides = points_of(64, 64)
    for count in (0, 2):
        targets = assign_targets(points, strides, torch.zeros(2, count, 4), torch.full((2, count), -1))
        assert (targets.labels == -1).all() and (targets.distances == 0).all() and (targets.centerness == 0).all()


def test_wrong_shapes():
    points, strides = points_of(64, 64)
    with pytest.raises(ValueError, match=r"\[B,M,4\]"):
        assign_targets(points, strides, torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))


def test_centerness():
    distances = torch.tensor([[2.0, 3, 8, 12], [5, 5, 5, 5], [0, 0, 0, 0]])
    assert centerness_targets(distances).tolist() == pytest.approx([math.sqrt(2 / 8 * 3 / 12), 1, 0])


def test_box_losses():
    a, b = torch.tensor([[4.0, 4, 4, 4]]), torch.tensor([[4.0, 4, 0, 4]])  # 8x8 around the point, its left half
    assert iou_loss(a, b).item() == pytest.approx(-math.log(33 / 65))
    assert giou_loss(a, b).item() == pytest.approx(1 - 0.5, abs=1e-6)  # the hull is the larger box
    c, d = torch.tensor([[2.0, 2, 0, 2]]), torch.tensor([[0.0, 2, 2, 2]])  # side by side: IoU 0, no gap in the hull
    assert giou_loss(c, d).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("variant", ["improved", "published"])
def test_losses_by_hand(variant):
    """One positive location among all: each loss written out."""
    points, strides = points_of(64, 64)
    boxes, labels = torch.tensor([[[30.0, 31, 37, 38]]]), torch.tensor([[1]])  # holds the point (36, 36) alone
    preds = predictions(points, strides, 1, 3)
    losses = FCOSLoss(variant)(preds, boxes, labels)
    at = points.tolist().index([36.0, 36.0])
    target = torch.tensor([6.0, 5, 1, 2])

    p = preds.logits[0].sigmoid()
    focal = -0.75 * p**2 * (1 - p).log()
    focal[at, 1] = -0.25 * (1 - p[at, 1]) ** 2 * p[at, 1].log()
    torch.testing.assert_close(losses["loss_cls"], focal.sum() / (1 if variant == "improved" else 2))
    box_loss = giou_loss if variant == "improved" else iou_loss
    torch.testing.assert_close(losses["loss_box"], box_loss(preds.distances[0, at], target))  # one positive: mean of 1
    centerness = math.sqrt(1 / 6 * 2 / 5)
    logit = preds.centerness[0, at]
    wanted = -(centerness * logit.sigmoid().log() + (1 - centerness) * (1 - logit.sigmoid()).log())
    torch.testing.assert_close(losses["loss_ctr"], wanted)


@pytest.mark.parametrize("variant", ["improved", "published"])
def test_losses_of_parts_add_up(variant):
    generator = torch.Generator().manual_seed(1)
    points, strides = points_of(128, 128)
    boxes, labels = random_boxes(generator, 4, 5, 128, 128)
    labels[3] = -1  # a part without boxes
    preds, criterion = predictions(points, strides, 4, 3), FCOSLoss(variant)
    whole = criterion(preds, boxes, labels)
    parts = [slice(0, 1), slice(1, 3), slice(3, 4)]
    normalizers = sum(criterion.normalizers(criterion.assign(points, strides, boxes[s], labels[s])) for s in parts)
    losses = [
        criterion(preds._replace(logits=preds.logits[s], distances=preds.distances[s], centerness=preds.centerness[s]),
                  boxes[s], labels[s], normalizers)
        for s in parts
    ]  # fmt: skip
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in losses), value)


@pytest.mark.parametrize("variant", ["improved", "published"])
def test_no_positive_gives_finite_losses_and_gradients(variant):
    points, strides = points_of(64, 96)
    preds = predictions(points, strides, 2, 3)
    preds = preds._replace(distances=torch.full_like(preds.distances, torch.inf))  # exp overflowed on background
    tensors = [x.clone().requires_grad_() for x in preds[:3]]
    losses = FCOSLoss(variant)(Predictions(*tensors, points, strides), torch.zeros(2, 0, 4), torch.zeros(2, 0).long())
    assert losses["loss_box"] == 0 and losses["loss_ctr"] == 0 and 0 < losses["loss_cls"] < torch.inf
    sum(losses.values()).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in tensors)


def test_losses_are_float32_for_low_precision_predictions():
    points, strides = points_of(64, 64)
    preds = predictions(points, strides, 1, 3)
    half = preds._replace(logits=preds.logits.bfloat16(), centerness=preds.centerness.bfloat16())
    boxes, labels = torch.tensor([[[10.0, 10, 40, 40]]]), torch.tensor([[0]])
    for name, value in FCOSLoss()(half, boxes, labels).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, FCOSLoss()(preds, boxes, labels)[name], rtol=0.02, atol=0)
    double = preds._replace(**{name: getattr(preds, name).double() for name in ("logits", "distances", "centerness")})
    assert {value.dtype for value in FCOSLoss()(double, boxes, labels).values()} == {torch.float64}


@pytest.mark.parametrize("box_dtype", [torch.float16, torch.bfloat16, torch.int32, torch.float64])
@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int32])
def test_boxes_and_labels_of_other_dtypes(box_dtype, label_dtype):
    """The area of this box is infinite in float16, and the background's label -1 would be 255 in uint8."""
    points, strides = points_of(512, 512)
    preds, boxes, labels = predictions(points, strides, 1, 3), torch.tensor([[[0.0, 0, 512, 384]]]), torch.tensor([[1]])
    expected = assign_targets(points, strides, boxes, labels)
    assert sorted(set(expected.labels.flatten().tolist())) == [-1, 1]
    found = assign_targets(points, strides, boxes.to(box_dtype), labels.to(label_dtype))
    torch.testing.assert_close(found, expected, check_dtype=False)
    assert found.labels.dtype == torch.int64 and found.distances.dtype == torch.promote_types(box_dtype, torch.float32)
    right = FCOSLoss()(preds, boxes, labels)
    for name, value in FCOSLoss()(preds, boxes.to(box_dtype), labels.to(label_dtype)).items():
        torch.testing.assert_close(value, right[name], rtol=1e-6, atol=0, check_dtype=False)


def test_unknown_options():
    with pytest.raises(ValueError, match="variant='best'"):
        FCOSLoss("best")
    with pytest.raises(ValueError, match="unknown"):
        FCOSLoss(radius=2)
    with pytest.raises(ValueError, match="box_loss"):
        FCOSLoss(box_loss="l1")


def points_of(height, width):
    return make_points([(-(-height // s), -(-width // s)) for s in STRIDES], STRIDES, "cpu")


def predictions(points, strides, batch, classes):
    generator = torch.Generator().manual_seed(2)
    n = len(points)
    return Predictions(
        torch.randn(batch, n, classes, generator=generator),
        torch.rand(batch, n, 4, generator=generator) * 50 + 1,
        torch.randn(batch, n, generator=generator),
        points,
        strides,
    )


def random_boxes(generator, batch, count, height, width):
    corners = torch.rand(batch, count, 2, 2, generator=generator) * torch.tensor([width, height])
    boxes = torch.cat([corners.amin(2), corners.amax(2)], dim=-1).round()  # integers hit limits exactly
    labels = torch.randint(-1, 3, (batch, count), generator=generator)
    return boxes, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_giou_equals_torchvision_to_the_bit(dtype):
    """The loss and both gradients, also of boxes that are equal, empty, or apart."""
    generator = torch.Generator().manual_seed(8)
    ours, theirs = (torch.rand(2, 500, 4, generator=generator) * 100).to(dtype)
    ours[:50] = theirs[:50]
    ours[50:100, :2] = theirs[50:100, :2]
    ours[100:150] = 0
    ours[150:200, 0] = -theirs[150:200, 2] - 1
    sign = torch.tensor([-1, -1, 1, 1], dtype=dtype)
    results = []
    for function in (giou_loss, lambda a, b: torchvision.ops.generalized_box_iou_loss(a * sign, b * sign)):
        inputs = [x.clone().requires_grad_() for x in (ours, theirs)]
        loss = function(*inputs)
        loss.sum().backward()
        results.append((loss, *(x.grad for x in inputs)))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected) and expected.isfinite().all()
