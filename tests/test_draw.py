"""Detections are drawn on a picture."""

import numpy as np
import pytest
import torch
from samples import make_sample

from vovnet_zoo import draw
from vovnet_zoo.draw import class_colour, draw_detections, place_labels


def test_draw_detections():
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 20, 50, 50], [60, 5, 79, 30]])
    detection = {"boxes": boxes, "labels": torch.tensor([0, 1]), "scores": torch.tensor([0.9, 0.1])}
    drawn = np.asarray(draw_detections(image, detection, ["cat", "dog"], enlarge=1))
    assert drawn.shape == (60, 80, 3) and image.max() == 0
    assert drawn[50, 10:50].any(axis=-1).all()  # the lower edge of the first box
    assert not drawn[31:, 60:].any()  # the second is below the threshold
    for odd in (boxes.clone().requires_grad_(), boxes.bfloat16()):  # of `postprocess` in a training loop
        assert np.array_equal(
            np.asarray(draw_detections(image, {**detection, "boxes": odd}, ["cat", "dog"], enlarge=1)), drawn
        )
    truth = {"boxes": boxes, "labels": torch.tensor([0, 1])}
    assert np.asarray(draw_detections(image, truth, enlarge=1))[30, 60:79].any(axis=-1).all()


def test_a_box_that_ends_with_the_image_has_four_sides():
    image, boxes = torch.zeros(3, 60, 80, dtype=torch.uint8), torch.tensor([[20.0, 15, 80, 60], [80, 60, 80, 60]])
    drawn = np.asarray(draw_detections(image, {"boxes": boxes, "labels": torch.tensor([0, 0])}, enlarge=1))
    coloured = (drawn == class_colour(0)).all(-1)
    assert all(line.all() for line in (coloured[59, 20:], coloured[15:, 79], coloured[15:, 20]))


def test_nothing_to_draw_leaves_the_image():
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    detection = {"boxes": torch.zeros(1, 4), "labels": torch.tensor([0]), "scores": torch.tensor([0.2])}
    assert np.array_equal(np.asarray(draw_detections(image, detection, enlarge=1)), image.permute(1, 2, 0))
    _, nothing = make_sample(20, 30, [])  # a dataset's target, which has other keys too
    assert np.array_equal(np.asarray(draw_detections(image, nothing, enlarge=1)), image.permute(1, 2, 0))


def test_a_label_is_a_number_of_a_class():
    """-1, which stands for a place without a box, would name the last class."""
    detection = {"boxes": torch.zeros(1, 4), "labels": torch.tensor([-1])}
    for names in (["cat", "dog"], None):
        with pytest.raises(ValueError, match="labels: there is a label -1; give labels of 0 or more"):
            draw_detections(torch.zeros(3, 20, 30, dtype=torch.uint8), detection, names)


def test_labels_stay_in_the_picture_and_the_best_is_on_top():
    image, box = torch.zeros(3, 100, 200, dtype=torch.uint8), torch.tensor([[185.0, 40, 199, 90]])
    for label in (0, 1):
        detection = {"boxes": box, "labels": torch.tensor([label]), "scores": torch.tensor([0.9])}
        drawn = np.asarray(draw_detections(image, detection, ["a long name", "another one"], enlarge=1))
        filled = (drawn == class_colour(label)).all(axis=-1)
        assert filled[30:38, 120:198].mean() > 0.4  # the label, moved left so that all of it is there
    both = {"boxes": box.repeat(2, 1), "labels": torch.tensor([1, 0]), "scores": torch.tensor([0.9, 0.8])}
    drawn = np.asarray(draw_detections(image, both, ["a long name", "another one"], enlarge=1))
    assert (drawn[60, 185] == class_colour(1)).all()


def test_small_images_are_enlarged_by_whole_pixels():
    image = torch.randint(0, 256, (3, 64, 48), dtype=torch.uint8)
    detection = {"boxes": torch.tensor([[10.0, 20, 30, 50]]), "labels": torch.tensor([0])}
    drawn = np.asarray(draw_detections(image, detection, ["cat"]))
    assert drawn.shape == (384, 288, 3)
    assert (drawn[20 * 6 : 50 * 6, 10 * 6] == class_colour(0)).all()  # the left edge, in pixels of the picture
    corner = image[:, 60:, :8].permute(1, 2, 0).numpy()
    assert np.array_equal(drawn[360:, :48], corner.repeat(6, 0).repeat(6, 1))  # away from the box, the image itself
    assert draw_detections(torch.zeros(3, 400, 30, dtype=torch.uint8), detection).size == (30, 400)


def test_letters_and_lines_grow_with_the_image():
    for side in (400, 4000):
        image = torch.zeros(3, side, side, dtype=torch.uint8)
        box = torch.tensor([[0.5, 0.5, 0.75, 0.75]]) * side
        drawn = np.asarray(draw_detections(image, {"boxes": box, "labels": torch.tensor([0])}, ["cat"]))
        label = (drawn[: side // 2 - side // 100, side // 2 :] == class_colour(0)).all(-1).any(1).sum()
        assert 0.015 < label / side < 0.04  # rows that the label takes, above the box


def test_a_label_covers_no_small_object_where_it_can_be_elsewhere():
    small, large = [100.0, 70, 112, 78], [100.0, 80, 200, 160]  # the label of the large one would cover the small one
    places = place_labels(np.array([small, large]), [(60, 14), (60, 14)], (400, 300))
    for (x, y), (w, h) in zip(places, [(60, 14)] * 2, strict=True):
        assert 0 <= x <= 340 and 0 <= y <= 286
        assert min(x + w, 112) <= max(x, 100) or min(y + h, 78) <= max(y, 70)
    (ax, ay), (bx, by) = places
    assert abs(ax - bx) >= 60 or abs(ay - by) >= 14  # nor another label
    assert place_labels(np.array([[0.0, 0, 20, 20]]), [(50, 40)], (20, 20)) == [(0, 0)]  # larger than the picture
    assert place_labels(np.zeros((0, 4)), [], (20, 20)) == []


def write_name(name: str) -> bytes:
    """The pixels of a picture with one box of this class."""
    image = torch.zeros(3, 400, 400, dtype=torch.uint8)
    detection = {"boxes": torch.tensor([[100.0, 100, 200, 200]]), "labels": torch.tensor([1])}
    return draw_detections(image, detection, ["", name]).tobytes()


def test_a_name_without_letters_in_any_font_is_written_as_a_number(caplog):
    assert write_name("\U0010fffe") == write_name("class 1")
    assert "'class 1'" in caplog.text
    pytest.importorskip("matplotlib", reason="its font has Cyrillic and Arabic letters")
    assert len({write_name(name) for name in ("кошка", "قطة", "class 1")}) == 3
    assert write_name("a\nb") == write_name("a b")


def test_chinese_japanese_and_korean_names(monkeypatch):
    """They are written if a font of this machine has their letters, otherwise as a number; never as empty boxes."""
    names, caches = ("自転車", "고양이", "ひらがな"), (draw._readable_name, draw._font_of, draw._fonts)
    with monkeypatch.context() as patch:
        patch.setattr(draw, "FONTS", ())
        for cache in caches:
            cache.cache_clear()
        assert {write_name(name) for name in names} == {write_name("class 1")}
    for cache in caches:
        cache.cache_clear()
    if not all(draw._font_of(name) for name in names):
        pytest.skip("no font of this machine has these letters (Debian: fonts-noto-cjk)")
    assert len({write_name(name) for name in (*names, "class 1")}) == 4
