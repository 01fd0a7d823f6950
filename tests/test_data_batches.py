"""The sampler chooses the images of each batch, and collate and normalize make its tensors."""

import numpy as np
import pytest
import torch
from samples import make_sample
from torchvision import tv_tensors

from vovnet_zoo.data.batches import TrainSampler, collate, normalize

RATIOS = np.tile([0.75, 0.75, 1.5], 20)[:50]  # 34 wide, 16 tall


def test_sampler_is_the_same_for_any_world_size_and_start():
    steps = list(TrainSampler(RATIOS, 8, num_steps=40, seed=3))
    assert len(steps) == 40 and all(len(step) == 8 for step in steps)
    assert steps == list(TrainSampler(RATIOS, 8, num_steps=40, seed=3))
    assert steps != list(TrainSampler(RATIOS, 8, num_steps=40, seed=4))
    for world_size in (2, 4, 8):
        ranks = [
            TrainSampler(RATIOS, 8, num_steps=40, seed=3, rank=r, world_size=world_size) for r in range(world_size)
        ]
        assert [sum(shares, []) for shares in zip(*ranks, strict=True)] == steps
    for start in (1, 17, 40, 50):
        resumed = TrainSampler(RATIOS, 8, num_steps=40, seed=3, start_step=start)
        assert list(resumed) == steps[start:] and len(resumed) == len(steps[start:])


def test_sampler_epochs_groups_and_seeds():
    steps = list(TrainSampler(RATIOS, 4, num_steps=100))
    assert all(len({RATIOS[index] >= 1 for index, _ in step}) == 1 for step in steps)
    visits = np.bincount([index for step in steps for index, _ in step], minlength=50)
    assert visits.sum() == 400 and visits.min() >= 7 and visits.max() <= 9  # 8 epochs, less or more what is carried
    seeds = [seed for step in steps for _, seed in step]
    assert len(set(seeds)) == 400 and 0 <= min(seeds) and max(seeds) < 2**63
    mixed = list(TrainSampler(RATIOS, 50, num_steps=2, group_by_aspect=False))
    assert [sorted(index for index, _ in step) for step in mixed] == [list(range(50))] * 2
    assert mixed[0] != mixed[1]


def test_sampler_smaller_than_a_batch():
    steps = list(TrainSampler([1.0, 0.5, 0.5], 8, num_steps=5))
    assert len(steps) == 5 and {index for step in steps for index, _ in step} == {0, 1, 2}


def test_sampler_arguments():
    for arguments in (
        {"batch_size": 9, "world_size": 2},
        {"batch_size": 0},
        {"rank": 2, "world_size": 2},
        {"start_step": -1},
        {"aspect_ratios": []},
        {"repeats": 0},
    ):
        with pytest.raises(ValueError):
            TrainSampler(**{"aspect_ratios": RATIOS, "batch_size": 8, "num_steps": 1} | arguments)


def test_collate_and_normalize():
    images = [torch.full((3, 40, 60), 200, dtype=torch.uint8), torch.full((3, 65, 30), 100, dtype=torch.uint8)]
    targets = [make_sample(40, 60, [(1, 2, 3, 4), (5, 6, 7, 8)])[1], make_sample(65, 30, [])[1] | {"image_id": 2**40}]
    batch = collate([(tv_tensors.Image(i), t) for i, t in zip(images, targets, strict=True)])
    assert type(batch["images"]) is type(batch["boxes"]) is torch.Tensor
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "images": (torch.uint8, (2, 3, 96, 64)),
        "sizes": (torch.int64, (2, 2)),
        "orig_sizes": (torch.int64, (2, 2)),
        "boxes": (torch.float32, (2, 2, 4)),
        "labels": (torch.int64, (2, 2)),
        "image_ids": (torch.int64, (2,)),
    }
    assert batch["images"].is_contiguous(memory_format=torch.channels_last)  # see collate
    assert batch["sizes"].tolist() == batch["orig_sizes"].tolist() == [[40, 60], [65, 30]]
    assert batch["labels"].tolist() == [[0, 1], [-1, -1]] and batch["image_ids"].tolist() == [1, 2**40]
    assert batch["boxes"].tolist() == [[[1, 2, 3, 4], [5, 6, 7, 8]], [[0] * 4] * 2]
    assert torch.equal(batch["images"].long().sum((2, 3)), torch.tensor([[200 * 2400] * 3, [100 * 1950] * 3]))
    empty = collate([make_sample(32, 32, [])], size_divisor=128)
    assert empty["boxes"].shape == (1, 1, 4) and empty["images"].shape == (1, 3, 128, 128)

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = normalize(batch["images"], batch["sizes"], mean, std)
    assert x.dtype == torch.float32 and x.shape == (2, 3, 96, 64)
    for i, (image, value) in enumerate(zip(images, (200, 100), strict=True)):
        height, width = image.shape[-2:]
        expected = torch.tensor([(value - 255 * m) / (255 * s) for m, s in zip(mean, std, strict=True)])
        torch.testing.assert_close(x[i, :, :height, :width], expected[:, None, None].expand(3, height, width))
        assert x[i, :, height:].eq(0).all() and x[i, :, :, width:].eq(0).all()
    compiled = torch.compile(normalize, fullgraph=True, backend="eager")
    assert torch.equal(compiled(batch["images"], batch["sizes"], mean, std), x)
    with pytest.raises(ValueError):
        normalize(batch["images"], batch["sizes"], mean[:2], std)


def test_samples_that_are_no_bytes_or_lack_a_key_are_refused():
    image, target = make_sample(32, 32, [(1, 2, 3, 4)])
    with pytest.raises(ValueError, match=f"image {target['image_id']}: .*float32 .3, 32, 32.; leave ToDtype and Norm"):
        collate([(image, target), (image / 255, target)])
    for wrong in (image[:1], image[0], image.numpy()):
        with pytest.raises(ValueError, match=r"takes uint8 tensors \[3, H, W\], got"):
            collate([(wrong, target)])
    boxes = {"format": "XYXY", "canvas_size": (32, 32)}
    for wrong, why in (
        ({"format": "CXCYWH"}, "are CXCYWH; end the transforms with v2.ConvertBoundingBoxFormat"),
        ({"canvas_size": (64, 32)}, r"of \(64, 32\) \(height, width\), which is \(32, 32\) now; transforms must take"),
    ):
        boxed = tv_tensors.BoundingBoxes(target["boxes"], **boxes | wrong)
        with pytest.raises(ValueError, match=f"image {target['image_id']}: .*{why}"):
            collate([(image, target | {"boxes": boxed})])
    for wrong, why in (
        ({"boxes": [[1, 2, 3, 4, 0]], "labels": [0]}, r"its boxes have the shape \[1, 5\]; give \[N, 4\]"),
        ({"labels": [0.0]}, "the labels are torch.float32; give whole numbers"),
    ):
        with pytest.raises(ValueError, match=f"image {target['image_id']}: {why}"):
            collate([(image, target | {"image_id": torch.tensor([target["image_id"]])} | wrong)])
    with pytest.raises(ValueError, match="image_id='a.jpg': give a whole number"):
        collate([(image, target | {"image_id": "a.jpg"})])
    for key in ("boxes", "labels", "image_id", "orig_size"):
        with pytest.raises(ValueError, match=f"a target has no {key}, only "):
            collate([(image, {name: value for name, value in target.items() if name != key})])


def test_a_batch_takes_what_other_datasets_and_transforms_give():
    """albumentations gives arrays or lists, and empty ones without a type; torchvision's older datasets a tensor id."""
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    right = {"boxes": torch.tensor([[1.0, 2, 3, 4]]), "labels": torch.tensor([1]), "image_id": 7, "orig_size": (64, 48)}
    wanted = collate([(image, right), (image, right | {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()})])
    for boxes, labels, nothing in (
        ([[1, 2, 3, 4]], [1], []),
        (np.array([[1.0, 2, 3, 4]]), np.array([1]), np.array([])),
        (right["boxes"].double(), right["labels"].int(), torch.tensor([])),
    ):
        target = {"boxes": boxes, "labels": labels, "image_id": torch.tensor([7]), "orig_size": torch.tensor([64, 48])}
        found = collate([(image, target), (image, target | {"boxes": nothing, "labels": nothing})])
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_normalize_published(shared):
    from safetensors.torch import load_file

    golden = load_file(shared / "golden" / "golden_fcos_v39.safetensors")
    mean, std = [m / 255 for m in (122.7717, 115.9465, 102.9801)], [1 / 255] * 3
    for i in range(3):  # the last is padded
        sample = make_sample(*golden[f"img{i}/image_size_hw"].tolist(), [])
        batch = collate([(golden[f"img{i}/image_rgb_u8"].permute(2, 0, 1), sample[1])])
        x = normalize(batch["images"], batch["sizes"], mean, std)
        assert torch.equal(x.flip(1), golden[f"img{i}/input"])
