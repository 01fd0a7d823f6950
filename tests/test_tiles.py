"""Windows cover an image, and what is found in them is joined as if there were no windows."""

import pytest
import torch

from vovnet_zoo.tiles import Window, merge, windows


@pytest.mark.parametrize("shape", [(640, 640), (400, 20_000), (1000, 1501), (641, 640), (1, 3000), (30, 20)])
@pytest.mark.parametrize("size, overlap", [(640, 0.2), (640, 0.0), (100, 0.5), (1, 0.0)])
def test_windows_cover_the_image(shape, size, overlap):
    height, width = shape
    if size == 1 and height * width > 1000:
        return
    found = windows(height, width, size, overlap)
    seen = torch.zeros(height, width, dtype=torch.bool)
    for x, y, w, h in found:
        assert (w, h) == (min(size, width), min(size, height))  # each lies in the image, whole
        assert 0 <= x <= width - w and 0 <= y <= height - h
        seen[y : y + h, x : x + w] = True
    assert seen.all() and len(set(found)) == len(found)
    columns = sorted({x for x, *_ in found})
    assert all(b - a <= size * (1 - overlap) + 1 for a, b in zip(columns, columns[1:], strict=False))


def test_windows_are_no_more_than_needed():
    assert windows(640, 640, 640) == [Window(0, 0, 640, 640)]
    assert len(windows(640, 1152, 640, 0.2)) == 2  # 640 + 512
    assert len(windows(640, 1153, 640, 0.2)) == 3
    for size, overlap in [(0, 0.2), (-5, 0.2), (640, 1.0), (640.0, 0.2), (640, -0.1), (640, float("nan"))]:
        with pytest.raises(ValueError, match="tiles=|overlap="):
            windows(100, 100, size, overlap)


def look(boxes, labels, scores, place, least):
    """Find in a window what a detector without faults would: each box as far as `least` of it is visible."""
    limits = torch.tensor([place.x, place.y, place.x + place.width, place.y + place.height])
    upper, lower = boxes[:, :2].maximum(limits[:2]), boxes[:, 2:].minimum(limits[2:])
    visible = (lower - upper).clamp(min=0).prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1)
    keep = visible > least
    found = torch.cat([upper, lower], 1)[keep] - limits[:2].repeat(2)
    return {"boxes": found.float(), "labels": labels[keep], "scores": scores[keep] * visible[keep]}


def draw_boxes(seed, count, height, width, largest):
    """Draw boxes that do not touch each other."""
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.zeros(0, 4, dtype=torch.float64)
    while len(boxes) < count:
        wh = 8 + (largest - 8) * torch.rand(2, generator=generator, dtype=torch.float64) ** 2
        xy = torch.rand(2, generator=generator, dtype=torch.float64) * (torch.tensor([width, height]) - wh)
        box = torch.cat([xy, xy + wh])
        apart = (box[:2] > boxes[:, 2:] + 4) | (box[2:] < boxes[:, :2] - 4)
        if apart.any(1).all():
            boxes = torch.cat([boxes, box[None]])
    labels = torch.randint(0, 3, (count,), generator=generator)
    return boxes, labels, 0.3 + 0.6 * torch.rand(count, generator=generator)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("global_view", [False, True])
def test_every_object_is_found_once_and_whole(seed, global_view):
    """Objects up to twice as long as the windows' common strip, with a detector that sees 1/10 of an object."""
    height, width, size = 1200, 2000, 400
    boxes, labels, scores = draw_boxes(seed, 40, height, width, 2 * 0.2 * size)
    places = windows(height, width, size, 0.2) + [Window(0, 0, width, height)] * global_view
    found = merge([look(boxes, labels, scores, p, 0.1) for p in places], places, (height, width), 0.6)
    assert len(found["labels"]) == len(labels)
    assert (found["scores"].diff() <= 0).all()
    distance = (found["boxes"][:, None] - boxes[None]).abs().amax(2)  # [N,N]
    assert distance.amin(1).max() < 0.01
    assert torch.equal(distance.argmin(1).sort().values, torch.arange(len(labels)))
    assert torch.equal(found["labels"], labels[distance.argmin(1)])


def test_published_boxes_are_joined_as_their_edges_are():
    """A box of the published convention ends a pixel before its edge, so in a small window it does not look cut."""
    boxes, labels, scores = draw_boxes(0, 20, 300, 500, 24)
    places, more = windows(300, 500, 60, 0.2), torch.tensor([0, 0, 1, 1])
    views = [look(boxes.round(), labels, scores, place, 0.1) for place in places]
    published = [{**view, "boxes": view["boxes"] - more} for view in views]
    wanted, found = merge(views, places, (300, 500), 0.6), merge(published, places, (300, 500), 0.6, plus_one=True)
    assert torch.equal(found["boxes"] + more, wanted["boxes"]) and len(wanted["boxes"]) == 20


def test_an_object_larger_than_a_window_comes_from_the_whole_view():
    boxes, labels = torch.tensor([[50.0, 80, 1500, 900]], dtype=torch.float64), torch.tensor([1])
    places = [*windows(1000, 1600, 320, 0.2), Window(0, 0, 1600, 1000)]
    found = merge([look(boxes, labels, torch.tensor([0.7]), p, 0.0) for p in places], places, (1000, 1600), 0.6)
    assert torch.equal(found["boxes"], boxes.float()) and found["scores"].tolist() == pytest.approx([0.7])


def test_what_the_whole_view_finds_small_is_left_to_the_windows():
    places = [*windows(1000, 1600, 500, 0.2), Window(0, 0, 1600, 1000)]
    empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}
    small = {"boxes": torch.tensor([[10.0, 10, 30, 30]]), "scores": torch.ones(1), "labels": torch.tensor([0])}
    assert not len(merge([empty] * (len(places) - 1) + [small], places, (1000, 1600), 0.6)["labels"])
    large = {**small, "boxes": torch.tensor([[10.0, 10, 400, 300]])}
    assert len(merge([empty] * (len(places) - 1) + [large], places, (1000, 1600), 0.6)["labels"]) == 1
    assert len(merge([small], [Window(0, 0, 300, 300)], (300, 300), 0.6)["labels"]) == 1  # the only view


def test_neighbours_of_one_class_stay_apart():
    """Two objects, one below the other, are both cut by the same edge."""
    boxes = torch.tensor([[300.0, 10, 520, 100], [300, 110, 520, 200]], dtype=torch.float64)
    labels, places = torch.tensor([0, 0]), windows(400, 720, 400, 0.2)
    found = merge([look(boxes, labels, torch.ones(2), p, 0.1) for p in places], places, (400, 720), 0.6)
    assert torch.equal(found["boxes"].sort(0).values, boxes.float().sort(0).values)


def test_thousands_of_windows_take_little_time_and_memory():
    places = windows(8000, 12_500, 400, 0.2)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in places:
        xy = torch.rand(10, 2, generator=generator) * 360
        found.append({"boxes": torch.cat([xy, xy + 40], 1), "scores": torch.rand(10), "labels": torch.zeros(10).long()})
    assert len(places) > 900
    assert len(merge(found, places, (8000, 12_500), 0.6)["labels"]) > 1000
