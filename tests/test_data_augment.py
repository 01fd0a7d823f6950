"""Boxes follow the pixels when images are mixed, and a sample depends on its key only."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from launch import tiny_config
from PIL import Image
from samples import make_sample, plain

from build import build_loader
from training_run import set_up
from vovnet_zoo.config import Augmentation
from vovnet_zoo.data import (
    CocoDataset,
    ImageError,
    MixImages,
    Skipped,
    TrainSampler,
    augment,
    augment_training,
    find_split,
    photometric,
    repeat_factors,
)
from vovnet_zoo.data.augment import COVERED, blend, crop_boxes, make_mosaic, paste_objects, trim_boxes
from vovnet_zoo.data.boxes import VISIBLE

EVERYTHING = dict(copy_paste=0.5, mixup=0.5, mosaic=0.5, color=0.3, blur=0.3, jpeg=0.3)


def colour(label):
    return torch.tensor([40 + 6 * label, 250 - 6 * label, 97 * label % 200], dtype=torch.uint8)


def painted(number, height=60, width=80, least=8):
    """A black picture with three rectangles side by side. No other has their labels, nor their colours."""
    rng, boxes = np.random.default_rng(number), []
    for left in range(0, width - width // 3, width // 3):
        w, h = rng.integers(least, width // 3), rng.integers(least, height // 2)
        x, y = left + rng.integers(0, width // 3 - w + 1), rng.integers(0, height - h + 1)
        boxes.append((x, y, x + w, y + h))
    image, target = make_sample(height, width, boxes)
    target["labels"] += 3 * number
    for label, (x1, y1, x2, y2) in zip(target["labels"].tolist(), boxes, strict=True):
        image[:, y1:y2, x1:x2] = colour(label)[:, None, None]
    return image, target


def seen(image, label):
    """The box around the pixels of a label's colour; None if there is none."""
    pixels = (image.as_subclass(torch.Tensor) == colour(label)[:, None, None]).all(0).nonzero()
    return torch.cat([pixels.amin(0).flip(0), pixels.amax(0).flip(0) + 1]).tolist() if len(pixels) else None


def boxes_of(*samples):
    return {k: box for _, t in samples for k, box in zip(t["labels"].tolist(), plain(t["boxes"]).tolist(), strict=True)}


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def test_mosaic():
    samples, kept, cut, lost = [painted(0), painted(1, 50, 70), painted(2, 90, 90), painted(3, 24, 200)], 0, 0, 0
    places = set()
    for seed in range(60):
        torch.manual_seed(seed)
        image, target = make_mosaic(samples)
        assert image.shape == (3, 60, 80) and target["boxes"].canvas_size == (60, 80) and image.dtype == torch.uint8
        assert target["image_id"] == 1 and len(set(target["labels"].tolist())) == len(target["labels"])
        boxes = boxes_of((image, target))
        for label, before in boxes_of(*samples).items():
            found = seen(image, label)
            if label in boxes:
                assert boxes[label] == found and area(found) >= VISIBLE * area(before)
                kept, cut = kept + 1, cut + (area(found) < area(before))
                places.add((found[0] > 40, found[1] > 30, label // 3))
            else:
                assert found is None or area(found) < VISIBLE * area(before)
                lost += found is not None
    assert kept > 150 and cut > 60 and lost > 30 and len(places) == 16  # each picture is in each corner


def test_mosaic_of_odd_images():
    samples = [make_sample(1, 1, [(0, 0, 1, 1)]), make_sample(300, 2, []), painted(0), make_sample(1, 900, [])]
    for first in range(4):
        image, target = make_mosaic([samples[first], *samples[:first], *samples[first + 1 :]])
        assert image.shape == samples[first][0].shape and target["boxes"].shape == (len(target["labels"]), 4)


def test_pasted_objects(monkeypatch):
    """Their boxes are exact, and so are the boxes that they partly hide; the pixels around them are as before."""
    monkeypatch.setattr(augment, "MARGIN", 0)
    sample, other, pasted, trimmed = painted(0), painted(1, least=22), 0, 0
    before = boxes_of(sample)
    for seed in range(60):
        torch.manual_seed(seed)
        image, target = paste_objects(sample, other, 3 + seed % 3)
        boxes = boxes_of((image, target))
        assert boxes.keys() - before.keys() <= {3 + seed % 3}  # only what was asked for
        for label, box in boxes.items():
            assert box == seen(image, label)
        pasted += len(boxes) > 3
        trimmed += any(boxes[label] != before[label] for label in before)
        for label in boxes.keys() & {3, 4, 5}:
            new, old = boxes[label], boxes_of(other)[label]
            assert area(new) == area(old)
            shared = [
                np.clip(np.minimum(new[2:], b[2:]) - np.maximum(new[:2], b[:2]), 0, None) for b in before.values()
            ]
            assert max(s.prod() / area(b) for s, b in zip(shared, before.values(), strict=True)) <= COVERED
            untouched = torch.ones(60, 80, dtype=torch.bool)
            untouched[int(new[1]) : int(new[3]), int(new[0]) : int(new[2])] = False
            assert torch.equal(image[:, untouched], sample[0][:, untouched])
    assert pasted > 40 and trimmed > 3
    assert boxes_of(sample) == before and seen(sample[0], 3) is None  # the sample itself is as it was


def test_pasted_objects_hide_no_more_together():
    """Of four objects that each cover 0.09 of a box, three find a place in it."""
    corners = [(0, 0), (50, 0), (0, 50), (50, 50)]
    other, pasted = make_sample(100, 100, [(x, y, x + 30, y + 30) for x, y in corners]), set()
    other[1]["labels"][:] = 1
    for seed in range(40):
        torch.manual_seed(seed)
        _, target = paste_objects(make_sample(100, 100, [(0, 0, 100, 100)]), other, 1)
        pasted.add((target["labels"] == 1).sum().item())
    assert max(pasted) == 3


def test_pasted_objects_bring_what_is_in_them():
    """An object inside another comes along; a class that is not there, or too large, changes nothing."""
    image, target = make_sample(60, 80, [(10, 10, 30, 30), (15, 12, 20, 22), (29, 0, 70, 9)])
    image[:] = 50
    for label, (x1, y1, x2, y2) in enumerate(plain(target["boxes"]).long().tolist()):
        image[:, y1:y2, x1:x2] = colour(label)[:, None, None]
    torch.manual_seed(0)
    mixed, found = paste_objects(make_sample(60, 80, []), (image, target), 0)
    boxes = boxes_of((mixed, found))
    assert boxes == {0: seen(mixed, 0), 1: seen(mixed, 1)} and area(boxes[0]) == 400
    x, y = map(int, boxes[0][:2])
    inside, around = mixed[:, y : y + 20, x : x + 20], mixed[:, y + 10, x - 5 : x].tolist()
    assert torch.equal(inside, image[:, 10:30, 10:30])
    assert around == [[0, 10, 20, 30, 40]] * 3  # a fifth of 20 pixels fades
    for label in (2, 7):  # wider than half the image; not there
        mixed, found = paste_objects(painted(1), (image, target), label)
        assert torch.equal(mixed, painted(1)[0]) and boxes_of((mixed, found)) == boxes_of(painted(1))


def test_blend():
    """Red rectangles are of the first image, green ones of the second; both keep their boxes."""
    sample, other = painted(0), painted(1, 70, 60)
    for (image, _), channel in ((sample, 0), (other, 1)):
        mask = image[0] > 0
        image.zero_()[channel, mask] = 200
    weights, lost = [], 0
    for seed in range(20):
        torch.manual_seed(seed)
        image, target = blend(sample, other)
        assert image.shape == (3, 60, 80) and target["boxes"].canvas_size == (60, 80)
        boxes = boxes_of((image, target))
        for channel in (0, 1):
            mask = torch.zeros(60, 80, dtype=torch.bool)
            for label, (x1, y1, x2, y2) in boxes.items():
                if label // 3 == channel:
                    mask[int(y1) : int(y2), int(x1) : int(x2)] = True
            lost += (extra := (image[channel] > 0) & ~mask).any().item()
            assert (image[channel][mask] > 0).all() and extra.sum() < 100  # what was cut off, less than a quarter
        weights += image[0][image[0] > 0].tolist()
    assert 80 <= min(weights) < 90 and set(weights) & set(range(110, 121)) and max(weights) == 200
    assert boxes.keys() >= {0, 1, 2} and lost < 20


def test_crop_and_trim():
    boxes, labels = torch.tensor([[0.0, 0, 8, 8], [4, 4, 12, 12], [20, 20, 30, 30]]), torch.tensor([5, 6, 7])
    cropped, of = crop_boxes(boxes, labels, (6, 4, 16, 16), at=(100, 200))
    assert cropped.tolist() == [[100, 200, 106, 208]] and of.tolist() == [6]  # an eighth of the first is left
    covers = [(0, 0, 3, 8), (5, -1, 9, 9), (0, 0, 9, 2), (0, 7, 8, 8), (2, 0, 4, 8), (0, 0, 3, 7), (9, 0, 12, 9)]
    trimmed = [trim_boxes(boxes[:1], cover)[0].tolist() for cover in covers]
    assert trimmed == [[3, 0, 8, 8], [0, 0, 5, 8], [0, 2, 8, 8], [0, 0, 8, 7], *[[0, 0, 8, 8]] * 3]


def test_colours_and_noise_change_no_box():
    image, target = painted(0)
    image += torch.randint(0, 5, image.shape, dtype=torch.uint8)
    for options in (dict(color=0.5), dict(blur=1.0), dict(jpeg=1.0)):
        (transform,) = photometric(**options)
        torch.manual_seed(0)
        changed, same = transform(image, target)
        assert changed.dtype == torch.uint8 and changed.shape == image.shape and not torch.equal(changed, image)
        assert torch.equal(same["boxes"], target["boxes"]) and torch.equal(same["labels"], target["labels"])
    assert photometric() == []
    for steps in (photometric(blur=0.3), photometric(jpeg=0.3)):
        torch.manual_seed(0)
        changes = sum(not torch.equal(steps[0](image, target)[0], image) for _ in range(100))
        assert 20 <= changes <= 40


# ---- samples of a training ------------------------------------------------------------------------------------------


def batches_of(config, start=0):
    run = set_up(config, 0, 1, torch.device("cpu"))
    run.notes.close()
    return [part for parts in build_loader(config, run.train_set, start, 0, 1, run.device) for part in parts]


def same(batch, other):
    return all(batch[key].shape == x.shape and torch.equal(batch[key], x) for key, x in other.items())


def test_samples_depend_on_their_step_only(tiny_coco, tmp_path):
    """Samples are the same for any number of workers and after a resume; from `augment_until` on, as in a plain run."""
    plain_run = dataclasses.replace(tiny_config(tiny_coco, tmp_path / "run"), steps=10)
    config = dataclasses.replace(plain_run, augment="jitter_crop", augment_until=0.7, **EVERYTHING)
    batches = batches_of(config)
    assert len(batches) == 10
    for other in (batches_of(dataclasses.replace(config, workers=2)), [*batches[:3], *batches_of(config, 3)]):
        assert all(map(same, batches, other)) and len(other) == 10
    without = batches_of(plain_run)
    assert [same(a, b) for a, b in zip(batches, without, strict=True)] == [False] * 7 + [True] * 3
    never = batches_of(dataclasses.replace(config, augment_until=1.0))
    assert all(map(same, never[:7], batches)) and not any(map(same, never[7:], batches[7:]))


def test_each_class_is_as_likely_to_be_pasted(tiny_coco):
    """Of red and green, red is in one image only."""
    file = tiny_coco / "annotations" / "instances_train.json"
    coco = json.loads(file.read_text())
    reds = [a for a in coco["annotations"] if a["category_id"] == 7]
    coco["annotations"] = [a for a in coco["annotations"] if a not in reds[1:]]
    file.write_text(json.dumps(coco))
    dataset = CocoDataset(*find_split(tiny_coco, "train"))
    augment_training(dataset, Augmentation(min_size=(64, 64), max_size=200, augment="none", copy_paste=1.0))
    pasted = np.zeros(2)
    for seed in range(100):
        target = dataset[1, seed][1]  # this image has no boxes of its own
        pasted += np.bincount(target["labels"], minlength=2)
    assert pasted.sum() > 60 and 0.35 < pasted[0] / pasted.sum() < 0.65


def test_a_bad_image_in_a_mosaic_is_named(tiny_coco):
    (tiny_coco / "train" / "3.png").write_bytes(b"")
    for skip in (False, True):
        dataset = CocoDataset(*find_split(tiny_coco, "train"), skip_bad_images=skip)
        augment_training(dataset, Augmentation(min_size=(64, 64), max_size=200, mosaic=1.0))
        if skip:
            samples = [dataset[0, seed] for seed in range(20)]
            bad = [sample for sample in samples if isinstance(sample, Skipped)]
            assert 0 < len(bad) < 20 and all("3.png: the image file is empty" in sample.reason for sample in bad)
        else:
            with pytest.raises(ImageError, match="3.png"):
                [dataset[0, seed] for seed in range(20)]


def test_published_boxes_are_not_mixed(tiny_coco):
    dataset = CocoDataset(*find_split(tiny_coco, "train"), plus_one=True)
    for name in ("copy_paste", "mosaic", "mixup"):
        with pytest.raises(ValueError, match=f"{name}=0.5: boxes in the published convention"):
            augment_training(dataset, Augmentation(**{name: 0.5}))
    augment_training(dataset, Augmentation(color=0.5))
    with pytest.raises(ValueError, match="mosaic=1.5"):
        MixImages(dataset, lambda *sample: sample, mosaic=1.5)


# ---- rare classes ---------------------------------------------------------------------------------------------------


def write_rare(root, images=64, rare=3):
    """Write black images with a box of a common class each; the first three have a box of the rare class too."""
    root.mkdir(exist_ok=True)
    for i in range(images):
        Image.new("RGB", (32, 32)).save(root / f"{i}.png")
    rows = [{"image_id": i, "category_id": 1, "bbox": [1, 1, 9, 9]} for i in range(images)]
    rows += [{"image_id": i, "category_id": 2, "bbox": [12, 12, 9, 9]} for i in range(rare)]
    coco = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 32, "height": 32} for i in range(images)],
        "annotations": [{"id": i, **row} for i, row in enumerate(rows)],
        "categories": [{"id": 1, "name": "common"}, {"id": 2, "name": "rare"}, {"id": 3, "name": "never"}],
    }
    (root / "coco.json").write_text(json.dumps(coco))
    return root, root / "coco.json"


def test_rare_classes_are_shown_more_often(tmp_path):
    """A class of 3 boxes in 64 images: with a threshold of 0.5, they are shown sqrt(0.5 * 64 / 3) = 3.27 times."""
    dataset = CocoDataset(*write_rare(tmp_path))
    factors = repeat_factors(dataset, 0.5)
    assert factors.tolist() == [pytest.approx((0.5 * 64 / 3) ** 0.5)] * 3 + [1.0] * 61
    assert repeat_factors(dataset, 0).tolist() == repeat_factors(dataset, 0.04).tolist() == [1.0] * 64
    length = 61 + 3 * 3.266  # images of an epoch
    shown = {}
    for name, repeat in (("without", None), ("with", factors)):
        steps = list(TrainSampler(dataset.aspect_ratios, 8, num_steps=round(100 * length / 8), factors=repeat))
        keys = [key for step in steps for key in step]
        assert len(set(keys)) == len(keys)  # a repeated image is augmented anew
        shown[name] = np.bincount([index for index, _ in keys], minlength=64)
    assert shown["without"].max() - shown["without"].min() <= 1
    assert (abs(shown["with"][3:] - 100) <= 2).all() and (abs(shown["with"][:3] - 326.6) <= 15).all()


def test_repeats_go_on_after_a_resume(tmp_path):
    factors = np.linspace(1, 3, 50)
    ratios = np.tile([0.5, 2.0], 25)
    for group in (False, True):
        options = dict(num_steps=40, seed=3, factors=factors, group_by_aspect=group)
        steps = list(TrainSampler(ratios, 8, **options))
        assert list(TrainSampler(ratios, 8, start_step=17, **options)) == steps[17:]
        ranks = [TrainSampler(ratios, 8, rank=rank, world_size=2, late_from=20, **options) for rank in range(2)]
        both = [a + b for a, b in zip(*ranks, strict=True)]
        assert both[:20] == steps[:20] and both[20:] == [[(*key, True) for key in step] for step in steps[20:]]
