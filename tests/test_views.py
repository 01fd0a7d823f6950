"""`predict` looks at windows, at mirrored images and at several sizes, in batches of all of them."""

import json

import pytest
import torch
from near import assert_same_detections
from PIL import Image
from samples import make_confident_detector

from vovnet_zoo import FCOS, FCOSLoss, create_detector, inference, predict
from vovnet_zoo.data import normalize
from vovnet_zoo.evaluation import coco_metrics

VIEWS = [
    dict(flip=True),
    dict(scales=(0.5, 1.0, 1.5)),
    dict(tiles=96),
    dict(tiles=64, overlap=0.4, flip=True, scales=(1.0, 2)),
]


@pytest.fixture(scope="module")
def model():
    return make_confident_detector()


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    sizes = [(50, 70), (70, 50), (150, 220), (64, 64), (64, 64)]
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


@pytest.mark.parametrize("views", VIEWS, ids=str)
def test_detections_do_not_depend_on_the_batch(model, images, views, monkeypatch):
    """Views of one image and of several share batches."""
    alone, batches, real = predict(model, images, **views), [], inference.detect_batch

    def counted(model, items, *arguments):
        batches.append(len(items))
        return real(model, items, *arguments)

    monkeypatch.setattr(inference, "detect_batch", counted)
    for batch_size, workers in ((4, 0), (16, 2)):
        together = predict(model, images, batch_size=batch_size, workers=workers, **views)
        for ours, theirs, image in zip(together, alone, images, strict=True):
            assert len(ours["boxes"]) > 5 and ours.size == tuple(image.shape[-2:]) and ours.source == theirs.source
            assert_same_detections(ours, theirs, size=max(ours.size))
    assert max(batches) > 1
    plain = predict(model, images)
    assert any(len(a["boxes"]) != len(b["boxes"]) for a, b in zip(alone, plain, strict=True))


def test_tiles_of_an_image_that_fits_one_window(model, images):
    for ours, theirs in zip(predict(model, images, tiles=220), predict(model, images), strict=True):
        torch.testing.assert_close(dict(ours), dict(theirs), rtol=0, atol=0)


def test_a_mirrored_image_gives_mirrored_detections(model, images):
    """With flip; in both pixel conventions."""
    for plus_one in (False, True):
        detector = FCOS(**{**model.config, "plus_one": plus_one})
        detector.load_state_dict(model.state_dict())
        image = images[3]  # the network sees it in this size, so nothing is rounded differently
        (found,), (mirrored,) = (predict(detector, x, flip=True) for x in (image, image.flip(-1)))
        edge = 64 - int(plus_one)
        boxes = torch.stack([edge - found["boxes"][:, 2], found["boxes"][:, 1], edge - found["boxes"][:, 0]], 1)
        turned = {**found, "boxes": torch.cat([boxes, found["boxes"][:, 3:]], 1)}
        assert_same_detections(mirrored, turned, size=64)


def test_bad_images_among_views(model, images, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"x")
    mixed = [images[0], tmp_path / "bad.png", images[1], tmp_path / "bad.png"]
    for views in VIEWS:
        bad = []
        found = predict(
            model, mixed, on_error=lambda frame, error, to=bad: to.append(frame.name), batch_size=8, **views
        )
        assert [x.source for x in found] == ["image 0", "image 2"] and bad == [str(tmp_path / "bad.png")] * 2
        with pytest.raises(ValueError, match="bad.png"):
            predict(model, mixed, **views)
        assert not predict(model, [], **views)


def test_nothing_found_in_tiles(model, images):
    (found,) = predict(model, images[2], tiles=64, score_threshold=1.0, flip=True)
    assert found["boxes"].shape == (0, 4) and len(found["labels"]) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        dict(tiles=16),
        dict(tiles=64.5),
        dict(tiles="64"),
        dict(overlap=0.5),
        dict(overlap=1, tiles=64),
        dict(overlap="x", tiles=64),
        dict(flip=1),
        dict(scales=1.0),
        dict(scales=()),
        dict(scales=(1, 1.0)),
        dict(scales=(0,)),
        dict(scales=(1, "2")),
        dict(urls="yes"),
    ],
    ids=str,
)
def test_options_out_of_range(model, wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}[= ]"):
        predict(model, "nosuch.png", **wrong)


# ---- small objects in a large canvas -------------------------------------------------------------------------------


def draw_sample(generator):
    """Draw a bright rectangle in each half of a dark 64-pixel image; returns it and boxes [2,5], xyxy and label."""
    pixels, boxes = torch.randint(0, 60, (3, 64, 64), generator=generator, dtype=torch.uint8), []
    for left in (0, 32):
        width, height = torch.randint(14, 28, (2,), generator=generator).tolist()
        x = left + int(torch.randint(0, 33 - width, (1,), generator=generator))
        y = int(torch.randint(0, 65 - height, (1,), generator=generator))
        label = int(torch.randint(0, 2, (1,), generator=generator))
        pixels[label, y : y + height, x : x + width] = 255
        boxes.append((x, y, x + width, y + height, label))
    return pixels, torch.tensor(boxes)


def draw_canvas(generator, side=4):
    """Put `side` x `side` such images together."""
    samples = [[draw_sample(generator) for _ in range(side)] for _ in range(side)]
    pixels = torch.cat([torch.cat([pixels for pixels, _ in row], dim=2) for row in samples], dim=1)
    shifts = [torch.tensor([64 * x, 64 * y, 64 * x, 64 * y, 0]) for y in range(side) for x in range(side)]
    return pixels, torch.cat([boxes + shift for (_, boxes), shift in zip(sum(samples, []), shifts, strict=True)])


@pytest.fixture(scope="module")
def trained():
    """Train a tiny detector for half a minute."""
    torch.manual_seed(0)
    model = create_detector(
        "fcos", backbone="test_resnet", num_classes=2, channels=64, num_convs=1, min_size=64, max_size=64
    ).train()
    criterion, optimizer = FCOSLoss.of(model), torch.optim.AdamW(model.parameters())
    generator, steps, sizes = torch.Generator().manual_seed(0), 100, torch.tensor([[64, 64]] * 16)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        images, boxes = (torch.stack(x) for x in zip(*(draw_sample(generator) for _ in range(16)), strict=True))
        inputs = normalize(images, sizes, model.config["image_mean"], model.config["image_std"])
        optimizer.zero_grad()
        sum(criterion(model(inputs), boxes[..., :4].float(), boxes[..., 4]).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    return model.eval()


def score(model, canvases, path, **options):
    """Compute the AP of a detector on pictures and their boxes."""
    images, annotations, rows = [], [], []
    for image_id, (pixels, boxes) in enumerate(canvases):
        images.append(
            {"id": image_id, "file_name": f"{image_id}.png", "height": pixels.shape[1], "width": pixels.shape[2]}
        )
        for x1, y1, x2, y2, label in boxes.tolist():
            row = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label + 1, "iscrowd": 0}
            annotations.append({**row, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
        (found,) = predict(model, pixels, batch_size=8, **options)
        rows += found.to_coco(image_id, [1, 2])
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return coco_metrics(path, rows)["AP"]


def test_tiles_find_small_objects(trained, tmp_path):
    """In a canvas that is resized to a quarter nothing is found; with tiles, nearly as much as in the single images."""
    generator = torch.Generator().manual_seed(1)
    singles = [draw_sample(generator) for _ in range(32)]
    canvases = [draw_canvas(generator) for _ in range(4)]
    single, whole = (score(trained, x, tmp_path / "truth.json") for x in (singles, canvases))
    tiled = score(trained, canvases, tmp_path / "truth.json", tiles=64, overlap=0.5)
    assert single > 0.6 and whole < 0.1 and tiled > 0.7 * single, (single, whole, tiled)
    assert score(trained, canvases, tmp_path / "truth.json", tiles=80) > whole + 0.3
    assert score(trained, canvases, tmp_path / "truth.json", scales=(4.0,)) > 0.7 * single


def test_tiled_evaluation_of_a_recipe(trained, tmp_path):
    """eval_coco.py with --tiles scores as predict with tiles does, and writes the same detections."""
    import eval_coco

    generator = torch.Generator().manual_seed(2)
    canvases = [draw_canvas(generator, 3) for _ in range(2)]
    (tmp_path / "val").mkdir()
    (tmp_path / "annotations").mkdir()
    truth = tmp_path / "annotations" / "instances_val.json"
    wanted = score(trained, canvases, truth, tiles=64, flip=True)
    for image_id, (pixels, _) in enumerate(canvases):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "val" / f"{image_id}.png")
    trained.save_pretrained(tmp_path / "model")
    config = eval_coco.EvalConfig(model=str(tmp_path / "model"), data=tmp_path, device="cpu", tiles=64, flip=True)
    assert eval_coco.main(config)["AP"] == pytest.approx(wanted, abs=1e-4) and wanted > 0.2
