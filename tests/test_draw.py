"""Detections are drawn on a picture."""

import numpy as np
import torch
from samples import make_sample

from vovnet_zoo.draw import class_colour, draw_detections


def test_draw_detections():
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 20, 50, 50], [60, 5, 79, 30]])
    detection = {"boxes": boxes, "labels": torch.tensor([0, 1]), "scores": torch.tensor([0.9, 0.1])}
    drawn = np.asarray(draw_detections(image, detection, ["cat", "dog"]))
    assert drawn.shape == (60, 80, 3) and image.max() == 0
    assert drawn[50, 10:50].any(axis=-1).all()  # the lower edge of the first box
    assert not drawn[31:, 60:].any()  # the second is below the threshold
    truth = {"boxes": boxes, "labels": torch.tensor([0, 1])}
    assert np.asarray(draw_detections(image, truth))[30, 60:79].any(axis=-1).all()


def test_nothing_to_draw_leaves_the_image():
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    detection = {"boxes": torch.zeros(1, 4), "labels": torch.tensor([0]), "scores": torch.tensor([0.2])}
    assert np.array_equal(np.asarray(draw_detections(image, detection)), image.permute(1, 2, 0))
    _, nothing = make_sample(20, 30, [])  # a dataset's target, which has other keys too
    assert np.array_equal(np.asarray(draw_detections(image, nothing)), image.permute(1, 2, 0))


def test_labels_stay_in_the_picture_and_the_best_is_on_top():
    image, box = torch.zeros(3, 100, 200, dtype=torch.uint8), torch.tensor([[185.0, 40, 199, 90]])
    for label in (0, 1):
        detection = {"boxes": box, "labels": torch.tensor([label]), "scores": torch.tensor([0.9])}
        drawn = np.asarray(draw_detections(image, detection, ["a long name", "another one"]))
        filled = (drawn == class_colour(label)).all(axis=-1)
        assert filled[30:38, 120:198].mean() > 0.4  # the label, moved left so that all of it is there
    both = {"boxes": box.repeat(2, 1), "labels": torch.tensor([1, 0]), "scores": torch.tensor([0.9, 0.8])}
    drawn = np.asarray(draw_detections(image, both, ["a long name", "another one"]))
    assert (drawn[60, 185] == class_colour(1)).all()
