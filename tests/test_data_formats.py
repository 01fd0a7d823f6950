"""YOLO, Pascal VOC and Hugging Face data give the arrays of COCO, compared with a second reader too."""

import io
import json
import re
import sys

import layouts
import numpy as np
import odd_layouts
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vovnet_zoo.data import (
    CocoDataset,
    changed,
    difficult_as_crowd,
    digest_of,
    digest_of_content,
    find_split,
    read_annotations,
)
from vovnet_zoo.data.check import check_dataset
from vovnet_zoo.data.conversion import convert_data
from vovnet_zoo.data.formats.huggingface import open_table
from vovnet_zoo.data.formats.voc import VocObject, count_of, read_objects
from vovnet_zoo.data.images import ImageError
from vovnet_zoo.data.layouts import unsplit
from vovnet_zoo.evaluation import coco_metrics

HALVES = [
    {**picture, "boxes": [(label, [x + 0.5, y + 0.25, w - 0.5, h - 0.75]) for label, (x, y, w, h) in picture["boxes"]]}
    for picture in layouts.PICTURES
]


def boxes_of(dataset) -> list[list]:
    return [[sorted(map(tuple, t["boxes"].tolist())), t["labels"].tolist()] for _, t in dataset]


def expected(pictures=layouts.PICTURES) -> list[list]:
    return [
        [sorted((x, y, x + w, y + h) for _, (x, y, w, h) in p["boxes"]), [label for label, _ in p["boxes"]]]
        for p in pictures
    ]


def only_train(root) -> CocoDataset:
    return CocoDataset(*find_split(root, "train"))


# ---- YOLO -----------------------------------------------------------------------------------------------------------


def test_yolo_half_pixels_are_exact(tmp_path):
    layouts.save_yolo(tmp_path / "train" / "images", tmp_path / "train" / "labels", HALVES)
    layouts.write(tmp_path / "data.yaml", "train: train/images\nnames: [green, red]\n")
    dataset = only_train(tmp_path)
    assert boxes_of(dataset) == expected(HALVES) and dataset.problems == {} and len(dataset[2][1]["boxes"]) == 0


def test_yolo_six_digits_are_near(tmp_path):
    layouts.save_yolo(tmp_path / "images", tmp_path / "labels", digits=6)
    layouts.write(tmp_path / "classes.txt", "green\nred\n")
    found = unsplit(tmp_path)
    for (boxes, labels), (truth, classes) in zip(
        boxes_of(CocoDataset(found.folder, found.source)), expected(), strict=True
    ):
        assert labels == classes
        np.testing.assert_allclose(np.array(boxes), np.array(truth), atol=1e-3 * 80)


LINES = {
    "polygon": ("1 0.1 0.2 0.5 0.1 0.4 0.9", [[8, 6, 40, 54]], {}),
    "five corners": ("0 0.5 0.5 0.75 0.5 0.75 0.75 0.5 0.75 0.4 0.6", [[32, 30, 60, 45]], {}),
    "blank lines": ("\n0 0.5 0.5 0.5 0.5\n\n", [[20, 15, 60, 45]], {}),
    "class of a decimal": ("1.0 0.5 0.5 0.5 0.5", [[20, 15, 60, 45]], {}),
    "beyond the image": ("0 0.0 0.5 0.5 0.5", [[0, 15, 20, 45]], {"box clipped to the image": 1}),
    "no such class": ("2 0.5 0.5 0.5 0.5", [], {"unknown category_id": 1}),
    "no numbers": ("0 a b c d", [], {"unknown category_id": 1}),
    "a confidence": ("0 0.5 0.5 0.5 0.5 0.9", [[20, 15, 60, 45]], {}),
    "NaN": ("0 nan 0.5 0.5 0.5", [], {"box is not 4 finite numbers": 1}),
    "empty": ("", [], {}),
}


@pytest.mark.parametrize("name", LINES)
def test_yolo_lines(name, tmp_path):
    text, boxes, problems = LINES[name]
    for i, line in enumerate((text, "0 0.5 0.5 0.25 0.25")):
        layouts.write(tmp_path / "train" / "labels" / f"{i}.txt", line)
        (tmp_path / "train" / "images").mkdir(exist_ok=True)
        Image.new("RGB", (80, 60)).save(tmp_path / "train" / "images" / f"{i}.png")
    layouts.write(tmp_path / "data.yaml", "train: train/images\nnames: {0: a, 1: b}\n")
    dataset = only_train(tmp_path)
    np.testing.assert_allclose(dataset[0][1]["boxes"].numpy(), np.array(boxes).reshape(-1, 4), atol=1e-5)
    assert dataset.problems == problems
    report = check_dataset(tmp_path, workers=0, progress=False)
    assert {f.kind for f in report.findings} >= set(problems)


def test_yolo_first_text_file_may_be_empty(tmp_path):
    layouts.save_yolo(tmp_path, tmp_path)
    layouts.write(tmp_path / "-.txt", "")
    Image.new("RGB", (8, 8)).save(tmp_path / "-.png")
    layouts.write(tmp_path / "classes.txt", "green\nred\n")
    found = unsplit(tmp_path)
    assert boxes_of(CocoDataset(found.folder, found.source)) == [[[], []], *expected()] and found.left_out == ()


@pytest.mark.parametrize("layout", ["yolo", "yolo_roboflow", "voc", "voc_roboflow"])
def test_annotations_without_image_are_told(layout, tmp_path, caplog):
    """An image of a format that is not read is as one that is not there."""
    getattr(layouts, layout)(tmp_path)
    (image,) = tmp_path.rglob("03.png")
    image.rename(image.with_suffix(".heic"))
    next(tmp_path.rglob("04.png")).unlink()
    assert len(only_train(tmp_path)) == 6
    assert re.search(r"03\.(txt|xml): there is no image 03\.\* that can be read \(1 more", caplog.text)
    report = check_dataset(tmp_path, workers=0, progress=False)
    (finding,) = (x for x in report.findings if x.kind == "left out")
    assert finding.count == 2 and "there is no image 04.*" in finding.items[1] and report.ok


def test_yolo_folder_that_is_not_there_is_told(tmp_path, caplog):
    layouts.yolo_roboflow(tmp_path)
    (tmp_path / "valid").rename(tmp_path / "other")
    assert len(only_train(tmp_path)) == 8
    assert "data.yaml: no images are where it says val: ../valid/images" in caplog.text


def test_yolo_path_goes_before_the_folder_of_the_file(tmp_path):
    """The yaml's own folder has folders of the same names, with other images."""
    odd_layouts.yolo(tmp_path / "other")
    layouts.save_yolo(tmp_path / "here" / "images" / "train", tmp_path / "here" / "labels" / "train")
    for place in (tmp_path / "other", "../other"):
        text = f"path: {place}\ntrain: images/train\nval: images/val\nnames: [green, red]\n"
        layouts.write(tmp_path / "here" / "data.yaml", text)
        folder, source = find_split(tmp_path / "here", "train")
        dataset = CocoDataset(folder, source)
        assert boxes_of(dataset) == expected(layouts.TRAIN)
        assert {(folder / name).parent.parent.parent.name for name in dataset.file_names} == {"other"}


def test_yolo_names_are_texts(tmp_path):
    layouts.yolo(tmp_path)
    layouts.write(tmp_path / "data.yaml", "train: images/train\nval: images/val\nnames: [no, 012]\n")
    assert only_train(tmp_path).class_names == ["no", "012"]


@pytest.mark.parametrize(
    ("text", "remarks"),
    [
        ("nc: 2\nnames: [a, b, c]", ["nc is 2, but there are 3 names"]),
        ("nc: 3\nnames: {0: a, 1: b, 3: c}", ["class 2 has no name"]),
        ("names: {0: a, 9: b}", ["classes 1, 2, 3, 4, 5, ... have no name"]),
        ("nc: 4\nnames: {0: a, 1: b, 2: c, 3: d}", []),
    ],
)
def test_yolo_names_that_may_be_a_mistake_are_told(text, remarks, tmp_path, caplog):
    odd_layouts.yolo(tmp_path, f"train: images/train\nval: images/val\n{text}\n")
    find_split(tmp_path, "train")
    assert [x.getMessage() for x in caplog.records] == [f"{tmp_path}: {tmp_path}/data.yaml: {x}" for x in remarks]
    report = check_dataset(tmp_path, workers=0, progress=False)
    told = [item for f in report.findings if f.kind == "dataset file in doubt" for item in f.items]
    assert told == [f"data.yaml: {x}" for x in remarks] and report.ok


def test_yolo_keypoints(tmp_path):
    layouts.write(tmp_path / "labels" / "train" / "0.txt", "0 0.5 0.5 0.5 0.5 0.1 0.1 2 0.2 0.2 2 0.3 0.3 1")
    (tmp_path / "images" / "train").mkdir(parents=True)
    Image.new("RGB", (80, 60)).save(tmp_path / "images" / "train" / "0.png")
    layouts.write(tmp_path / "pose.yaml", "train: images/train\nkpt_shape: [3, 3]\nnames: [person]\n")
    assert only_train(tmp_path)[0][1]["boxes"].tolist() == [[20, 15, 60, 45]]


def test_yolo_image_turned_by_exif(tmp_path):
    image = Image.new("RGB", (80, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images" / "train").mkdir(parents=True)
    image.save(tmp_path / "images" / "train" / "0.jpg", exif=exif)
    layouts.write(tmp_path / "labels" / "train" / "0.txt", "0 0.5 0.5 0.5 0.5")
    layouts.write(tmp_path / "classes.txt", "a\n")
    pixels, target = only_train(tmp_path)[0]
    assert pixels.shape[1:] == (80, 60) and target["boxes"].tolist() == [[15, 20, 45, 60]]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"data.yaml": "names: [a]\ntrain: nowhere"}, "no images where it says .*nowhere"),
        ({"data.yaml": "names: 3\ntrain: images"}, "'names' must be a list"),
        ({"data.yaml": "names: [a"}, "not a YAML file"),
        ({"data.yaml": "names: [a]\ntrain: images\ndate: 2023-13-45"}, "not a YAML file"),
        ({"data.yaml": "names: " + "[" * 5000}, "not a YAML file"),
        ({"data.yaml": "names: [a]\ntrain: 2017"}, "no images where it says .*2017"),
        ({"data.yaml": "names: [a", "labels/0.txt": "0 0.5 0.5 0.5 0.5"}, "classes.txt.*data.yaml: not a YAML file"),
        ({"labels/0.txt": "0 0.5 0.5 0.5 0.5", "images/x": ""}, "classes.txt"),
    ],
)
def test_yolo_that_cannot_be_read(files, message, tmp_path):
    for name, text in files.items():
        layouts.write(tmp_path / name, text)
    (tmp_path / "images").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "0.png")
    with pytest.raises(ValueError, match=message) as error:
        find_split(tmp_path, "train")
    assert "\n" not in str(error.value)
    assert not check_dataset(tmp_path, workers=0, progress=False).ok


# ---- Pascal VOC -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", [1, 0])
def test_voc_corners(one, tmp_path):
    """Corners from 1 count the pixels of the box; where one is 0, all are coordinates."""
    pictures = [p | {"boxes": [*p["boxes"], (0, [0, 0, 9, 7])]} for p in layouts.PICTURES]
    layouts.save(tmp_path / "train", pictures)
    layouts.save_voc(tmp_path / "train", pictures, one=one)
    dataset = only_train(tmp_path)
    assert boxes_of(dataset) == expected(pictures) and dataset.problems == {}


def test_voc_half_pixels(tmp_path):
    pictures = [p | {"boxes": [*p["boxes"], (0, [0.5, 0.5, 9, 7])]} for p in HALVES]
    layouts.save(tmp_path / "train", pictures)
    layouts.save_voc(tmp_path / "train", pictures, one=0)
    assert boxes_of(only_train(tmp_path)) == expected(pictures)


@pytest.mark.parametrize(
    ("corners", "decimal", "from_one"),
    [((1, 2, 9, 9), False, True), ((0, 2, 9, 9), False, False), ((1, 2, 9, 9), True, False)],
)
def test_voc_corners_with_a_decimal_point_are_coordinates(corners, decimal, from_one):
    assert count_of([VocObject("x", corners, 0, decimal)] * 2)[0] is from_one


def test_voc_reads_decimal_points(tmp_path):
    layouts.save_voc(tmp_path, layouts.PICTURES[:1], shift=0.5)
    assert [x.decimal for x in read_objects(tmp_path / "00.xml")] == [True, True]


def test_voc_splits_have_the_classes_of_all(tmp_path):
    """A class that only one split shows has its label in both."""
    few = [p | {"boxes": [b for b in p["boxes"] if b[0] == 1]} for p in layouts.VAL]
    for split, pictures in (("train", layouts.TRAIN), ("val", few)):
        layouts.save(tmp_path / split, pictures)
        layouts.save_voc(tmp_path / split, pictures)
    train, val = (CocoDataset(*find_split(tmp_path, split)) for split in ("train", "val"))
    assert train.class_names == val.class_names == ["green", "red"] and val[0][1]["labels"].tolist() == [1]


def test_voc_difficult_as_crowd_on_request(tmp_path):
    layouts.voc(tmp_path, difficult=["00.png", "09.png"])
    folder, source = find_split(tmp_path, "train")
    crowd = CocoDataset(folder, changed(source, difficult_as_crowd))
    assert CocoDataset(folder, source).num_boxes == 14 and crowd.num_boxes == 12
    assert sum(a["iscrowd"] for a in read_annotations(crowd.annotations)["annotations"]) == 2


def test_voc_that_cannot_be_read(tmp_path):
    layouts.voc(tmp_path)
    (tmp_path / "Annotations" / "03.xml").write_text("<annotation><object>")
    with pytest.raises(ValueError, match="03.xml: not an XML file"):
        find_split(tmp_path, "train")
    (tmp_path / "Annotations" / "03.xml").write_text(
        "<annotation><object><name>red</name><bndbox><xmin>7</xmin></bndbox></object></annotation>"
    )
    assert CocoDataset(*find_split(tmp_path, "train")).problems == {"box is not 4 finite numbers": 1}


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["objects in a list", "columns of the row", "numbers"])
def test_metadata_of_other_forms(form, tmp_path):
    layouts.save(tmp_path / "train")
    rows = layouts.hf_rows(layouts.PICTURES)
    for row in rows:
        boxes, classes = row["objects"]["bbox"], row["objects"]["category"]
        if form == "objects in a list":
            row["objects"] = [{"bbox": b, "label": c} for b, c in zip(boxes, classes, strict=True)]
        elif form == "columns of the row":
            del row["objects"]
            row |= {"bboxes": boxes, "categories": [layouts.CLASSES[c] for c in classes]}
    layouts.write(tmp_path / "train" / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    dataset = only_train(tmp_path)
    assert boxes_of(dataset) == expected() and dataset.problems == {}
    assert dataset.class_names == (layouts.CLASSES if form == "columns of the row" else ["0", "1"])


@pytest.mark.parametrize(
    ("columns", "names", "labels"),
    [
        ([{"bbox": [1, 2, 3, 4], "label": 3}], ["3"], [0]),
        ([{"bbox": [1, 2, 3, 4], "label": "cat"}], ["cat"], [0]),
        ([{"bboxes": [[1, 2, 3, 4], [5, 6, 7, 8]], "label": "cat"}], ["cat"], [0, 0]),
        ([{"objects": [{"bbox": [1, 2, 3, 4], "label": x}]} for x in "ba"], ["a", "b"], [1, 0]),  # a line an object
        ([{"objects": [{"bbox": [1, 2, 3, 4], "label": "cat"}, {"bbox": [5, 6, 7, 8]}]}], ["cat"], [0]),
    ],
)
def test_metadata_of_few_objects(columns, names, labels, tmp_path):
    """A row may have one box or one class that is in no list, and an image several rows; a box may lack its class."""
    layouts.save(tmp_path / "train")
    rows = [{"file_name": layouts.PICTURES[0]["name"], **row} for row in columns]
    layouts.write(tmp_path / "train" / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    dataset = only_train(tmp_path)
    assert dataset.class_names == names and len(dataset) == 1 and dataset[0][1]["labels"].tolist() == labels


def test_metadata_that_cannot_be_read(tmp_path):
    layouts.write(tmp_path / "train" / "metadata.jsonl", '{"file_name": "a.png"}\n{"file"\n')
    with pytest.raises(ValueError, match="metadata.jsonl: line 2 is no JSON"):
        find_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"objects": [{"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": ["a"]}]}, None),
        ({"bbox": [[1.0, 2.0, 3.0, 4.0]], "label": [7]}, None),
        ({"faces": [{"bbox": [[1.0, 2.0, 3.0, 4.0]]}]}, "none of its columns holds boxes: image, faces; rename .*bbox"),
        ({"objects": [{"bbox": [[1.0, 2.0, 3.0, 4.0]]}]}, "its boxes have no classes; write .*category"),
    ],
)
def test_tables_of_pandas(columns, message, tmp_path):
    """Images are bytes and paths there, without the mark of `datasets`."""
    datasets = pytest.importorskip("datasets")
    data = io.BytesIO()
    Image.new("RGB", (80, 60)).save(data, "PNG")
    table = {"image": [{"bytes": data.getvalue(), "path": "0.png"}], **columns}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "train.parquet")
    if message:
        with pytest.raises(ValueError, match=f"train.parquet: {message}"):
            only_train(tmp_path)
    else:
        image, target = only_train(tmp_path)[0]
        assert image.shape == (3, 60, 80) and target["boxes"].tolist() == [[1, 2, 4, 6]]


def test_tables_without_the_package(tmp_path, monkeypatch):
    layouts.write(tmp_path / "train.parquet", "x")
    open_table.cache_clear()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        find_split(tmp_path, "train")


# ---- second readers, and scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["yolo_roboflow", "voc_roboflow"])
def test_a_second_reader_agrees(name, tmp_path):
    """supervision reads the same corners and classes."""
    supervision = pytest.importorskip("supervision", reason="the second reader is the package supervision")
    getattr(layouts, name)(tmp_path)
    folder = tmp_path / "train"
    if name.startswith("yolo"):
        theirs = supervision.DetectionDataset.from_yolo(
            str(folder / "images"), str(folder / "labels"), str(tmp_path / "data.yaml")
        )
    else:
        theirs = supervision.DetectionDataset.from_pascal_voc(str(folder), str(folder))
    ours = only_train(tmp_path)
    found = {path.split("/")[-1]: detections for path, _, detections in theirs}
    assert len(found) == len(ours) == 8
    for name, (_, target) in zip(ours.file_names.tolist(), ours, strict=True):
        detections = found[name.split("/")[-1]]
        corners = np.asarray(detections.xyxy, dtype=np.float64).reshape(-1, 4)
        np.testing.assert_allclose(corners, target["boxes"].numpy(), atol=1e-3)
        names = [theirs.classes[i] for i in detections.class_id]
        assert names == [ours.class_names[i] for i in target["labels"].tolist()]


@pytest.mark.parametrize("name", ["yolo", "voc", "imagefolder", "hf_saved"])
def test_scores_are_those_of_coco(name, tmp_path):
    """pycocotools scores the same detections alike, from the file of COCO and from other formats."""
    if name.startswith("hf_"):
        pytest.importorskip("datasets")
    metrics = []
    for layout in ("usual", name):
        getattr(layouts, layout)(tmp_path / layout)
        dataset = CocoDataset(*find_split(tmp_path / layout, "val"))
        rng, rows = np.random.default_rng(0), []
        for image_id, (_, target) in zip(dataset.image_ids.tolist(), dataset, strict=True):
            for (x, y, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
                dx, dy, score = rng.uniform(-4, 4), rng.uniform(-4, 4), rng.uniform()
                row = {"image_id": image_id, "category_id": dataset.category_ids[label], "score": score}
                rows.append(row | {"bbox": [x + dx, y + dy, x2 - x, y2 - y]})
        metrics.append(coco_metrics(dataset.annotations, rows))
    assert metrics[0] == metrics[1] and 0.2 < metrics[0]["AP"] < 0.95


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "this row has no image"),
        ({"bytes": None, "path": "nowhere.png"}, "nowhere.png: cannot read the image"),
        ({"bytes": b"xxxx", "path": None}, "not an image|no image that can be read"),
    ],
)
def test_a_row_of_a_table_without_an_image(cell, message, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="tables need the extra `datasets`")
    pytest.importorskip("datasets", reason="tables need the extra `datasets`")
    import pyarrow

    layouts.usual(tmp_path / "coco")
    whole = {"bytes": next((tmp_path / "coco").rglob("*.png")).read_bytes(), "path": None}
    form = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    objects = [{"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": ["a"]}] * 2
    table = pyarrow.table({"image": pyarrow.array([whole, cell], type=form), "objects": objects})
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        parquet.write_table(table, tmp_path / "data" / f"{split}.parquet")
    message = f"train.parquet/00000001: .*({message})"
    with pytest.raises(ImageError, match=message):
        CocoDataset(*find_split(tmp_path / "data", "train"))[1]
    with pytest.raises(ValueError, match=message):
        convert_data(tmp_path / "data", tmp_path / "out")
    report = check_dataset(tmp_path / "data", workers=0, progress=False)
    (found,) = (x for x in report.findings if x.split == "train" and x.severity == "error")
    assert re.search(message, found.items[0])


@pytest.mark.parametrize("name", ["yolo_label_studio", "voc", "imagefolder"])
def test_pycocotools_scores_what_was_converted(name, tmp_path):
    """Its COCOeval needs an area, with which the hash of the annotations stays what it was."""
    getattr(layouts, name)(tmp_path / "data")
    convert_data(tmp_path / "data", tmp_path / "coco")
    truth = COCO(tmp_path / "coco" / "annotations" / "instances_train.json")
    rows = [{"score": 0.9, **{k: a[k] for k in ("image_id", "category_id", "bbox")}} for a in truth.anns.values()]
    scored = COCOeval(truth, truth.loadRes(rows), "bbox")
    scored.evaluate()
    scored.accumulate()
    scored.summarize()
    assert scored.stats[0] == pytest.approx(1) and {a["area"] for a in truth.anns.values()} == {480}

    content = read_annotations(unsplit(tmp_path / "data").source)
    content |= {"annotations": [{k: v for k, v in a.items() if k != "area"} for a in content["annotations"]]}
    assert content.pop("derived") == ["area"]
    assert digest_of(unsplit(tmp_path / "data").source) == digest_of_content(content)


def test_classes_of_other_numbers_are_matched_by_name(tmp_path):
    layouts.usual(tmp_path)
    file = tmp_path / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    for row in content["categories"]:
        row["id"] = 90 - row["id"]
    for row in content["annotations"]:
        row["category_id"] = 90 - row["category_id"]
    before = CocoDataset(tmp_path / "val", file, known_classes=["green", "red"])
    file.write_text(json.dumps(content))
    after = CocoDataset(tmp_path / "val", file, known_classes=["green", "red"])
    assert (
        after.category_ids == [89, 88] and after.class_names == ["green", "red"] and boxes_of(before) == boxes_of(after)
    )
    assert CocoDataset(tmp_path / "val", file).class_names == ["red", "green"]
