"""`show-data` draws what a training sees: its data, sizes, augmentation and order."""

import itertools
import sys

import layouts
import pytest
import torch
from PIL import Image

import show_data
from build import build_loader
from presets import parse
from training_run import set_up
from vovnet_zoo import cli
from vovnet_zoo.draw import class_colour

SMALL = "--min-size 64 64 --max-size 100 --augment flip"


def show(root, options="", count=16):
    """Run the recipe in this process."""
    line = [*([str(root)] if root else []), *options.split()]
    show_data.main(show_data.parse_show([*line, "--count", str(count), "--device", "cpu"]))


@pytest.mark.parametrize(
    "layout, options",
    [
        ("usual", ""),
        ("usual", "--mosaic 0.5 --copy-paste 0.5 --color 0.2 --repeat-rare 1 --seed 3 --batch-size 3 --drop-empty"),
        ("voc", "--test-size 96 --variant published"),
        ("fiftyone_single", "--val-fraction 0.25 --max-size 128 --steps 3 --augment-until 0.5"),
    ],
)
def test_samples_are_those_of_the_training(layout, options, tmp_path, monkeypatch, capsys):
    """Bit by bit the first images and boxes that the training of the same options gets."""
    getattr(layouts, layout)(tmp_path / "data")
    shown = []

    def collect(dataset, keys, out):
        shown.extend(dataset[key] for key in keys)
        return len(shown)

    monkeypatch.setattr(show_data, "show_data", collect)
    show(tmp_path / "data", options, 12)
    network = "--model fcos --backbone test_resnet --channels 64 --num-convs 1 --workers 0 --device cpu"
    line = ["finetune", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *network.split()]
    run = set_up(parse([*line, *options.split()]), 0, 1, torch.device("cpu"))
    run.notes.close()
    config, expected = run.config, []
    for (batch,) in itertools.islice(build_loader(config, run.train_set, 0, 0, 1, run.device), 4):
        for i, (height, width) in enumerate(batch["sizes"].tolist()):
            known = batch["labels"][i] >= 0
            expected.append(
                (batch["images"][i, :, :height, :width], batch["boxes"][i, known], batch["labels"][i, known])
            )
    assert len(shown) == 12 <= len(expected)
    for (image, target), (pixels, boxes, labels) in zip(shown, expected, strict=False):
        assert torch.equal(image, pixels) and torch.equal(target["labels"], labels)
        assert torch.equal(target["boxes"].as_subclass(torch.Tensor), boxes)
    low, high = config.min_size
    text = f"shorter side {low} to {high} px, longer side at most {config.max_size} px, batches of {config.batch_size}"
    assert text in capsys.readouterr().out


def test_a_sheet_is_drawn_anew_and_over_no_other_file(tiny_coco, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    show(tiny_coco, SMALL)
    with Image.open("samples.png") as sheet:  # images of 80x64 are shown five times as large, of 64x64 six times
        assert sheet.size == (4 * (400 + 8) - 8, 4 * (384 + 8) - 8) and sheet.format == "PNG"
        sheet.load()
    red = sum(count for count, colour in sheet.getcolors(10**6) if colour == class_colour(0))
    assert red > 500  # the frames of boxes
    show(None, f"{SMALL} --train {tiny_coco}/annotations/instances_train.json --train-images {tiny_coco}/train", 4)
    assert max(Image.open("samples.png").size) <= 2 * (400 + 8) - 8
    (tiny_coco / "train" / "3.png").write_bytes(b"")
    show(tiny_coco, f"{SMALL} --skip-bad-images", 8)  # as the training, it goes on without it
    Image.new("RGB", (8, 8)).save("photo.png")
    for wrong, message in (
        ("--out photo.png", "photo.png is there already"),
        ("--out photo.jpg", "photo.jpg: give a name that ends with .png"),
        ("--out photo.png/new.png", "--out .* cannot be written .photo.png is a file"),
        ("--preset nosuch", "--preset nosuch: give one of quickstart, finetune"),
        ("--mosaic 2", "mosaic=2.0"),
        ("--zoom 0.5 1", "only --augment jitter_crop"),
        ("--count 0", "count=0"),
        ("--seed -1", "seed=-1"),
        ("--train-images nowhere", "nowhere"),
        ("--out new.png", "3.png: the image file is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            show_data.main(show_data.parse_show([str(tiny_coco), *SMALL.split(), *wrong.split()]))
    assert Image.open("photo.png").size == (8, 8)
    with pytest.raises(ValueError, match="give the dataset's folder"):
        show(None)


def test_the_command_runs_the_recipe(tiny_coco, tmp_path, monkeypatch, capfd):
    line = f"show-data {tiny_coco} --out {tmp_path}/new/a.png --count 1 --test-size 64 --mosaic 1"
    for more, status in (("", 0), ("--mosaic 3", 2)):
        monkeypatch.setattr(sys, "argv", ["vovnet-zoo", *line.split(), *more.split()])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == status
    out, err = capfd.readouterr()
    assert "a.png: the first 1 sample of 8 images, as finetune sees them: shorter side 57 to 70 px" in out
    assert "mosaic=3.0" in err and "Traceback" not in err and (tmp_path / "new" / "a.png").is_file()
