"""Datasets as people have them give the tensors of COCO, or one line says what is wrong, where, and what to do."""

import inspect

import layouts
import odd_layouts
import pytest
from launch import losses, train_here
from test_data_layouts import same, truth  # noqa: F401

from vovnet_zoo.data import CocoDataset, find_split
from vovnet_zoo.data.check import check_dataset
from vovnet_zoo.data.layouts import unsplit

NOT_LAYOUTS = ("usual", "named", "rewrite", "windows", "runs", "yolo")
GOOD = [
    name
    for name, function in inspect.getmembers(odd_layouts, inspect.isfunction)
    if function.__module__ == "odd_layouts" and name not in NOT_LAYOUTS
] + ["runs"]


@pytest.mark.parametrize("name", GOOD)
def test_layout_gives_the_tensors_of_coco(name, truth, tmp_path):  # noqa: F811
    root = tmp_path / "data"
    getattr(odd_layouts, name)(root)
    for split, expected in truth.items():
        dataset = CocoDataset(*find_split(root, split))
        assert dataset.problems == {}
        names = {
            "yolo_many_names": [*layouts.CLASSES, *"abcdefghi"],
            "yolo_gap": ["green", "class 1", "class 2", "red"],
        }
        assert dataset.class_names == names.get(name, layouts.CLASSES)
        if name == "yolo_gap":
            dataset._labels = (dataset._labels == 3).astype(dataset._labels.dtype)
        dataset.class_names = expected.class_names
        assert same(dataset, expected)


@pytest.mark.parametrize("name", ["usual", "scattered", "yolo", "yolo_label_studio", "voc", "imagefolder"])
def test_files_of_macos_are_left_out(name, tmp_path, caplog):
    """Beside each photo.jpg of an archive or a memory stick lies a ._photo.jpg with its attributes."""
    getattr(layouts, name)(tmp_path)
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7 attributes")
    whole = unsplit(tmp_path) if name == "yolo_label_studio" else None
    dataset = CocoDataset(*((whole.folder, whole.source) if whole else find_split(tmp_path, "train")))
    assert len(dataset) == (12 if whole else 8) and dataset.problems == {} and not caplog.records
    report = check_dataset(tmp_path, workers=0, progress=False, val_fraction=0.5 if whole else None)
    assert report.ok and {f.kind for f in report.findings} <= {"image without boxes"}


def broken(pattern, data):
    return lambda root: odd_layouts.rewrite(root, pattern, lambda before: data(before) if callable(data) else data)


def yolo_lines(change):
    def write(root):
        odd_layouts.yolo(root)
        odd_layouts.rewrite(root, "labels/*/*.txt", change)

    return write


def labelme(root):
    layouts.save(root / "train")
    layouts.write(root / "train" / "00.json", {"shapes": [], "imagePath": "00.png"})


def csv(root, name="_annotations.csv", head="filename,class,xmin,ymin,xmax,ymax\n"):
    layouts.save(root / "train")
    layouts.write(root / "train" / name, head)


BAD = {  # name: (layout, what is done to it, message)
    "cut JSON": (
        "fiftyone",
        broken("train/labels.json", lambda data: data[:500]),
        "train/labels.json: not a JSON file",
    ),
    "empty JSON": ("files_in_root", broken("train_coco.json", b""), "train_coco.json: not a JSON file"),
    "cut XML": ("voc_roboflow", broken("train/00.xml", lambda data: data[:60]), "train/00.xml: not an XML .* write it"),
    "empty XML": ("voc_roboflow", broken("train/00.xml", b""), "train/00.xml: not an XML .* or remove it"),
    "list of others": ("voc", broken("Main/train.txt", b"x\ny\n"), r"Main/train.txt: none of its images \(x, ...\)"),
    "Latin-1": (
        None,
        lambda root: odd_layouts.yolo(root) or broken("classes.txt", b"gr\xfcn\nred")(root),
        "classes.txt",
    ),
    "no classes": (
        None,
        lambda root: odd_layouts.yolo(root, classes="\n"),
        "no file names the classes; write .*classes",
    ),
    "names as text": (
        None,
        lambda root: odd_layouts.yolo(root, "train: images/train\nnames: a, b\n"),
        "'names' must be",
    ),
    "commas": (
        None,
        yolo_lines(lambda data: data.replace(b" ", b",")),
        "labels/train/00.txt: a line is '0,0.4.* where",
    ),
    "pixels": (None, yolo_lines(lambda data: b"0 90 90 20 24\n"), "00.txt: a line is '0 90 90 20 24'.* fractions"),
    "from one": (
        None,
        yolo_lines(lambda data: b"1 .5 .5 .1 .1\n2 .5 .5 .1 .1\n"),
        "labels/train: .*from 1 to 2, but .* 0",
    ),
    "labelme": (None, labelme, "00.json is a file of labelme .*which is not read; export"),
    "a table": (None, csv, "_annotations.csv is a table of boxes .*export"),
    "metadata.csv": (None, lambda root: csv(root, "metadata.csv"), "metadata.csv .*read from metadata.jsonl"),
    "metadata.parquet": (None, lambda root: csv(root, "metadata.parquet"), "metadata.parquet .*from metadata.jsonl"),
    "a table without head": (None, lambda root: csv(root, head="a.png,1,2,3,4,red\n"), "_annotations.csv is a table"),
    "CVAT's own": (None, lambda root: csv(root, "annotations.xml", "<?xml?>\n<annotations>\n"), "is of CVAT's own"),
    "FiftyOne's own": (
        None,
        lambda root: csv(root, "labels.json", '{"classes": [], "labels": {}}'),
        "labels.json is a file of FiftyOne .*export",
    ),
    "Label Studio's JSON-MIN": (
        None,
        lambda root: csv(root, "export.json", '[{"image": "/data/00.png", "annotator": 1}]'),
        "export.json is a file of Label Studio",
    ),
    "YOLO without images": (
        None,
        lambda root: layouts.write(root / "labels" / "0.txt", "0 0.5 0.5 0.5 0.5"),
        "labels/0.txt is YOLO, but there are no images in .*images; put them there",
    ),
    "YOLO without labels": (
        None,
        lambda root: odd_layouts.yolo(root) or (root / "labels" / "train").rename(root / "labels" / "x"),
        "00.png: no label file is at .*labels/train/00.txt or .*images/train/00.txt, nor for any other of 8 images",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_one_line_says_what_to_do(name, tmp_path):
    layout, spoil, message = BAD[name]
    root = tmp_path / "data"
    if layout:
        getattr(layouts, layout)(root)
    spoil(root)
    with pytest.raises(ValueError, match=message) as error:
        CocoDataset(*find_split(root, "train"))
    assert "\n" not in str(error.value) and str(root) in str(error.value)
    assert not check_dataset(root, workers=0, progress=False).ok


def test_no_split_takes_the_images_of_another(tmp_path):
    """A folder of data.yaml that is not there is not replaced by the folder around it."""
    odd_layouts.yolo(tmp_path, "train: ../train/images\nval: ../valid/images\nnames: [green, red]\n")
    with pytest.raises(ValueError, match="no images where it says"):
        find_split(tmp_path, "train")


def test_one_image_is_enough(tmp_path):
    for split, pictures in (("train", layouts.TRAIN[:1]), ("val", layouts.VAL[:1])):
        layouts.save(tmp_path / "data" / split, pictures)
        layouts.write(tmp_path / "data" / "annotations" / f"instances_{split}.json", layouts.coco(pictures))
    assert check_dataset(tmp_path / "data", workers=0, progress=False).ok
    train_here(tmp_path / "data", tmp_path / "run", "--steps 2 --workers 0")
    assert len(losses(tmp_path / "run")) == 2
