"""Rounding may decide a tie the other way, and nothing else."""

import pytest
import torch

from vovnet_zoo.config import THRESHOLDS
from vovnet_zoo.export.ties import is_right
from vovnet_zoo.fcos import Predictions
from vovnet_zoo.results import Detections

CONFIG = dict(num_classes=1, plus_one=False, keep_empty=False)
FAR = [(150.0 * i, 0, 150 * i + 100, 100) for i in range(4)]  # boxes that do not overlap
SQUARE = (0, 0, 100, 100)
SMALL, LARGE = 4e-5, 4e-4  # below and above what rounding may decide


def shifted(iou, box=SQUARE, sign=1):
    """Move a square of 100 pixels so that it has this IoU with what it was."""
    step = sign * 100 * (1 - iou) / (1 + iou)
    return box[0] + step, box[1], box[2] + step, box[3]


def right(boxes, scores, picks, change=lambda found: found, config=CONFIG, **thresholds):
    """Tell whether NMS on these boxes may choose `picks`, as PyTorch's predictions have them or changed."""
    boxes, scores = torch.tensor(boxes, dtype=torch.float64), torch.tensor(scores, dtype=torch.float64)
    points = (boxes[:, :2] + boxes[:, 2:]) / 2
    distances = torch.cat([points - boxes[:, :2], boxes[:, 2:] - points], 1)[None].float()
    logits = torch.logit(scores**2)[None, :, None].float()
    centerness = torch.full((1, len(scores)), 30.0)
    preds = Predictions(logits, distances, centerness, points.float(), torch.full((len(scores),), 8))
    got = Detections(boxes[picks].float(), scores[picks].float(), torch.zeros(len(picks), dtype=torch.int64), 0)
    return is_right(preds, (700, 700), change(got), config, THRESHOLDS._replace(**thresholds), 0.05, 1e-4)


def test_an_iou_at_the_threshold():
    for side in (-1, 1):
        tie, clear = ([SQUARE, shifted(0.6 + side * gap)] for gap in (SMALL, LARGE))
        assert right(tie, [0.9, 0.8], [0]) and right(tie, [0.9, 0.8], [0, 1])
        assert right(clear, [0.9, 0.8], [0]) == (side == 1) and right(clear, [0.9, 0.8], [0, 1]) == (side == -1)
        assert not right(tie, [0.9, 0.8], [1])  # the best is not suppressed by a worse one
        assert right(tie, [0.8 + SMALL, 0.8], [1]) and not right(tie, [0.8 + LARGE, 0.8], [1])
    # the second suppresses the third, if it is not suppressed itself
    second = shifted(0.6 + SMALL)
    chain, scores = [SQUARE, second, shifted(0.7, second)], [0.9, 0.8, 0.7]
    assert right(chain, scores, [0, 1]) and right(chain, scores, [0, 2])
    assert not right(chain, scores, [0]) and not right(chain, scores, [0, 1, 2])


def test_the_published_pixel_convention():
    """A box is one pixel larger there, so the IoU is another."""
    tie = [SQUARE, shifted(0.6 + SMALL)]
    assert right(tie, [0.9, 0.8], [0, 1]) and not right(tie, [0.9, 0.8], [0, 1], config={**CONFIG, "plus_one": True})


def test_the_last_place():
    for gap, allowed in ((SMALL, True), (LARGE, False)):
        scores = [0.9, 0.8, 0.8 - gap, 0.7]
        assert right(FAR, scores, [0, 1], max_detections=2)
        assert right(FAR, scores, [0, 2], max_detections=2) == allowed
    assert not right(FAR, scores, [0], max_detections=2) and not right(FAR, scores, [0, 3], max_detections=2)


@pytest.mark.parametrize("name", ["score_threshold", "candidate_threshold"])
@pytest.mark.parametrize("side", [-1, 1])
def test_a_score_at_a_threshold(name, side):
    """Whether there is such a detection is rounding's choice."""
    border = 0.5 if name == "score_threshold" else 0.5**2
    for gap, allowed in ((SMALL, True), (LARGE, False)):
        scores = [0.9, 0.5 + side * gap]
        assert right(FAR[:2], scores, [0, 1], **{name: border}) == (allowed or side == 1)
        assert right(FAR[:2], scores, [0], **{name: border}) == (allowed or side == -1)


def test_the_best_of_a_level():
    for gap, allowed in ((SMALL, True), (LARGE, False)):
        scores = [0.9, 0.8, 0.8 - gap, 0.7]
        assert right(FAR, scores, [0, 1], topk=2)
        assert right(FAR, scores, [0, 2], topk=2) == right(FAR, scores, [0, 1, 2], topk=2) == allowed
        assert not right(FAR, scores, [0, 1, 3], topk=2)


def test_a_fault_beside_a_tie():
    boxes, scores = [SQUARE, shifted(0.6 + SMALL), *FAR[2:]], [0.9, 0.8, 0.7, 0.6]

    def refused(change):
        return not right(boxes, scores, [0, 2, 3], lambda found: found._replace(**change(found)))

    assert right(boxes, scores, [0, 2, 3]) and right(boxes, scores, [0, 1, 2, 3])
    assert not right(boxes, scores, [0, 2]) and not right(boxes, scores, [0, 1, 3]) and not right(boxes, scores, [])
    assert not right(boxes, scores, [0, 2, 3, 3])
    assert refused(lambda found: dict(boxes=found.boxes + 0.1))
    assert refused(lambda found: dict(scores=found.scores + 2e-4))
    assert refused(lambda found: dict(labels=found.labels + 1))


def test_an_empty_box_is_no_candidate():
    boxes, scores = [SQUARE, (800.0, 0, 900, 100)], [0.9, 0.8]  # the second lies beside the image
    clip = lambda found: found._replace(boxes=found.boxes.clamp(max=700))  # noqa: E731
    assert right(boxes, scores, [0]) and not right(boxes, scores, [0, 1], clip)
    kept = {**CONFIG, "keep_empty": True}
    assert right(boxes, scores, [0, 1], clip, kept) and not right(boxes, scores, [0], config=kept)
