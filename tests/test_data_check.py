import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict

import layouts
import numpy as np
import pytest
import torch
from PIL import Image

from vovnet_zoo.data import check as check_module
from vovnet_zoo.data import find_split
from vovnet_zoo.data.check import check_dataset, inspect_image, main, run_parallel


@pytest.fixture
def root(tmp_path):
    """Write a faultless dataset: 5 pictures in train, 3 in val."""
    rng = np.random.default_rng(0)
    (tmp_path / "annotations").mkdir()
    for split, count in (("train", 5), ("val", 3)):
        (tmp_path / split).mkdir()
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / split / f"{i}.png")
        coco = {
            "images": [{"id": i, "file_name": f"{i}.png", "width": 60, "height": 40} for i in range(count)],
            "annotations": [
                {"id": i, "image_id": i, "category_id": i % 2, "bbox": [10, 5, 30, 20]} for i in range(count)
            ],
            "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
        }
        file_of(tmp_path, split).write_text(json.dumps(coco))
    return tmp_path


def file_of(root, split):
    return root / "annotations" / f"instances_{split}.json"


def edit(root, split, change):
    coco = json.loads(file_of(root, split).read_text())
    change(coco)
    file_of(root, split).write_text(json.dumps(coco))


def check(root, **more):
    return check_dataset(root, **{"workers": 0, "progress": False} | more)


def found(report):
    return {(f.split, f.kind): f.count for f in report.findings}


def items(report, kind):
    return [item for f in report.findings if f.kind == kind for item in f.items]


def test_nothing_wrong(root):
    report = check(root)
    assert report.ok and report.findings == []
    assert report.splits == {
        "train": {"images": 5, "boxes": 5, "classes": 2},
        "val": {"images": 3, "boxes": 3, "classes": 2},
    }
    sides = "  box sides: 10 % are below 50 % of the image's, 50 % below 50 %, 90 % below 50 %"
    assert str(report).splitlines() == [
        "class  train boxes  train images  val boxes  val images",
        "cat              3             3          2           2",
        "dog              2             2          1           1",
        f"{root}: train: 5 images, 5 boxes, 2 classes (annotations/instances_train.json and train/: this is COCO)",
        sides,
        f"{root}: val: 3 images, 3 boxes, 2 classes (annotations/instances_val.json and val/: this is COCO)",
        sides,
        f"{root}: boxes were judged for images of 288 to 352 px on the shorter side and at most 640 px on the "
        "longer one, as the preset finetune trains here: where nine of ten boxes are larger than 196 px (to be found "
        "well, 16)",
        f"{root}: 0 errors, 0 warnings, 0 notes",
    ]


def test_classes_of_one_name_are_counted_apart(root):
    edit(root, "train", lambda coco: coco["categories"][1].update(name="cat"))
    assert check(root).classes["train"] == {"cat (0)": [3, 3], "cat (1)": [2, 2]}


def test_advice_on_a_split_without_boxes(root):
    for split in ("train", "val"):
        edit(root, split, lambda coco: coco.update(annotations=[]))
    advice = {f.split: f.advice for f in check(root).findings if f.kind == "no annotations"}
    assert advice == {
        "train": "annotate something; only background is learnt",
        "val": "annotate something; without boxes nothing can be scored",
    }


def test_one_of_each(root):
    """A split has one image of one class, and the report has one error."""

    def keep_one(coco):
        coco |= {key: coco[key][:1] for key in ("images", "annotations", "categories")}

    edit(root, "train", keep_one)
    file_of(root, "val").unlink()
    lines = str(check(root)).splitlines()
    assert any(": train: 1 image, 1 box, 1 class (" in line for line in lines)
    assert lines[-1].startswith(f"{root}: 1 error, 0 warnings, ")


def spoil(root):
    """Spoil many things at once, in both splits."""

    def train(coco):
        image, annotation = coco["images"][0], coco["annotations"][0]
        coco["images"] += [
            image | {"id": 10, "file_name": "gone.png"},
            image | {"id": 11, "width": 0},
            image | {"id": 3, "file_name": "again.png"},
            "5.png",
            image | {"id": 12, "file_name": "../val/0.png"},
            image | {"id": 13, "file_name": "empty.png"},
            image | {"id": 14, "file_name": "text.png", "width": 61},
        ]
        coco["categories"] += [{"id": 1, "name": "bird"}, {"id": 2}, {"id": 3, "name": "dog"}]
        coco["annotations"] += [
            annotation | {"id": 20, "image_id": 11},  # waits for image 11
            annotation | {"id": 21, "category_id": 2},  # waits for category 2
            annotation | {"id": 22, "image_id": 99},
            annotation | {"id": 23, "image_id": 99},
            annotation | {"id": 24, "category_id": 99},
            annotation | {"id": 25, "bbox": [float("nan"), 1, 2, 3]},
            annotation | {"id": 26, "bbox": [1, 2, -3, 4]},
            annotation | {"id": 27, "bbox": [100, 2, 3, 4]},
            annotation | {"id": 28, "bbox": [-9, -9, 20, 20]},
            annotation | {"id": 29, "iscrowd": 1},
            annotation | {"id": 20},
            None,
        ]

    edit(root, "train", train)
    edit(root, "val", lambda coco: coco["images"][0].update(width=40, height=60))
    (root / "train" / "empty.png").touch()
    (root / "train" / "text.png").write_text("no image\n")
    (root / "train" / "extra.jpg").write_text("nobody asks\n")
    (root / "train" / "notes.txt").write_text("no image by name\n")
    (root / "train" / "1.png").write_bytes((root / "train" / "1.png").read_bytes()[:-1000])
    (root / "train" / "2.png").write_bytes((root / "val" / "2.png").read_bytes())
    (root / "train" / "4.png").write_bytes((root / "train" / "3.png").read_bytes())
    Image.new("RGB", (60, 40)).save(root / "val" / "1.png", "JPEG")


def test_all_at_once(root):
    spoil(root)
    report = check(root)
    assert not report.ok
    assert found(report) == {
        ("", "classes differ"): 1,
        ("train", "category entry"): 1,
        ("train", "image entry"): 3,
        ("train", "repeated category id"): 1,
        ("train", "repeated image id"): 1,
        ("train", "not an object"): 1,
        ("train", "unknown image_id"): 2,
        ("train", "unknown category_id"): 1,
        ("train", "box is not 4 finite numbers"): 1,
        ("train", "missing image file"): 1,
        ("train", "empty image file"): 1,
        ("train", "not an image"): 1,
        ("train", "damaged image"): 1,
        ("val", "size unlike the JSON"): 1,
        ("", "same image in train and val"): 1,
        ("train", "empty box"): 1,
        ("train", "box outside the image"): 1,
        ("train", "box clipped to the image"): 1,
        ("train", "repeated box"): 1,
        ("train", "repeated annotation id"): 1,
        ("train", "repeated class name"): 1,
        ("train", "same image twice"): 1,
        ("train", "image without boxes"): 3,
        ("train", "class without boxes"): 1,
        ("train", "crowd region"): 1,
        ("train", "file without entry"): 1,
        ("val", "format unlike the name"): 1,
    }
    order = ["error", "warning", "info"]
    assert [order.index(f.severity) for f in report.findings] == sorted(
        order.index(f.severity) for f in report.findings
    )
    assert items(report, "unknown image_id") == [
        f"annotations[{i}]: image_id 99, category_id 0, bbox [10, 5, 30, 20]" for i in (7, 8)
    ]
    assert items(report, "same image in train and val") == ["train/2.png = val/2.png"]
    assert items(report, "same image twice") == ["train/3.png = train/4.png"]
    assert items(report, "file without entry") == ["extra.jpg"]
    assert items(report, "repeated image id") == ["3: 3.png, again.png"]
    assert items(report, "classes differ") == ["only in train: dog (3); only in val: none"]
    assert items(report, "missing image file")[0].startswith("train/gone.png: cannot read the image: No such file")
    assert "annotated before its EXIF rotation?" in items(report, "size unlike the JSON")[0]
    assert [item.split(":")[0] for item in items(report, "image entry")] == [
        "image 11 (0.png) needs a whole positive width and height, not 0 and 40",
        "images[8] has no integer 'id'",
        "image 12 (../val/0.png) must have a 'file_name' below the folder of images, without '..'",
    ]


def test_table(root):
    spoil(root)
    report = check(root)
    lines = str(report).splitlines()
    header, rows = lines[0], lines[1 : 1 + len(report.findings)]
    assert header.split() == "severity split kind count example what to do".split()
    for name in ("split", "kind", "example", "what to do"):
        at = header.index(name)
        assert all(row[at - 1] == " " != row[at] for row in rows)
    assert max(map(len, [header, *rows])) < 200
    row = next(row for row in rows if "unknown image_id" in row)
    assert row.split()[:5] == ["warning", "train", "unknown", "image_id", "2"] and row.endswith("training drops it")
    assert lines[-1].startswith(f"{root}: 12 errors, ")


def test_processes_give_the_same_report(root, capfd):
    spoil(root)
    assert check(root, workers=2, progress=True) == check(root)
    progress = capfd.readouterr().err
    assert "images: 100%" in progress and "11/11" in progress
    check(root)
    assert capfd.readouterr().err == ""


def test_spawned_processes(root, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_context", lambda: multiprocessing.context._concrete_contexts["spawn"])
    monkeypatch.setattr(
        "concurrent.futures.process.mp.get_context", lambda: multiprocessing.context._concrete_contexts["spawn"]
    )
    assert check(root, workers=1).findings == []


def test_a_script_that_each_process_runs_again(tmp_path):
    """Where Python does not fork (macOS), a script without `if __name__ == '__main__':` starts again and again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\n"
        "multiprocessing.set_start_method('spawn', force=True)\n"
        "from vovnet_zoo.data.inspection import run_parallel\n"
        "print(dict(run_parallel(abs, [-1, -2], 1)))\n"
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and not result.stdout
    assert "below `if __name__ == '__main__':`" in result.stderr.splitlines()[-1]


def deadly(job):
    if job in (3, 50):
        os._exit(1)
    return job * job


def test_process_that_dies(monkeypatch):
    jobs = list(range(100))
    results = dict(run_parallel(deadly, jobs, 2))
    assert results == {job: None if job in (3, 50) else job * job for job in jobs}
    assert dict(run_parallel(abs, [], 2)) == {}


def interrupt(job):
    os.kill(os.getpid(), signal.SIGINT)
    return job


def test_ctrl_c_is_left_to_the_process_that_waits():
    """A terminal sends it to the processes that decode too; each would print a traceback."""
    assert dict(run_parallel(interrupt, [5, 6], 1)) == {0: 5, 1: 6}


def test_image_that_ends_the_process(root, monkeypatch):
    monkeypatch.setattr(
        check_module, "run_parallel", lambda f, jobs, n: ((i, f(job) if i else None) for i, job in enumerate(jobs))
    )
    report = check(root)
    assert found(report) == {("train", "crashing image"): 1} and not report.ok
    assert items(report, "crashing image") == ["train/0.png: decoding it ends the process"]


def test_splits_missing(root, tmp_path):
    file_of(root, "val").rename(root / "val.txt")
    report = check(root)
    assert not report.ok and found(report) == {("val", "no val split"): 1} and list(report.splits) == ["train"]
    text = items(report, "no val split")[0]  # what helps stands below the table, whole
    assert "type --val-fraction 0.2" in text and f"error, no val split: {text}" in str(report).splitlines()
    assert check(root, val_fraction=0.2).ok
    (root / "train2017").mkdir()
    file_of(root, "train2017").write_text("{}")
    report = check(root)
    assert found(report) == {("train", "no dataset"): 1, ("val", "no val split"): 1} and not report.ok
    assert "several 'train' splits" in items(report, "no dataset")[0]
    report = check(tmp_path / "none")
    assert found(report) == {("", "no dataset"): 1} and str(tmp_path / "none") in str(report)


def test_one_bad_annotation_file_does_not_hide_the_other(root):
    file_of(root, "train").write_text("{")
    (root / "val" / "0.png").unlink()
    report = check(root)
    assert found(report) == {("train", "annotation file"): 1, ("val", "missing image file"): 1}
    assert list(report.splits) == ["val"]


def test_training_size(root):
    Image.new("RGB", (4000, 200)).save(root / "train" / "0.png")
    Image.new("RGB", (20, 20)).save(root / "train" / "1.png")

    def change(coco):
        coco["images"][0].update(width=4000, height=200)
        coco["images"][1].update(width=20, height=20)
        coco["annotations"][0]["bbox"] = [100, 100, 40, 2]
        coco["annotations"][1]["bbox"] = [0, 0, 10, 10]

    edit(root, "train", change)
    report = check(root, min_size=640, max_size=1333)
    assert report.ok
    assert items(report, "panorama") == ["0.png: 4000x200, trained at 1340x67"]
    assert items(report, "box that vanishes") == ["0.png: box 100, 100, 140, 102, below a pixel at 1340x67"]
    assert items(report, "tiny image") == ["1.png: 20x20, trained at 640x640"]
    report = check(root, min_size=600, max_size=3000)
    assert found(report) == {("train", "tiny image"): 1}


def test_command(root, capsys, tmp_path):
    out = tmp_path / "new" / "report.json"
    assert main(root, workers=0, json_out=out) == 0
    assert json.loads(out.read_text()) == {"ok": True, **asdict(check(root))}
    assert "0 errors" in capsys.readouterr().out
    (root / "val" / "1.png").write_bytes(b"")
    assert main(root, workers=0, json_out=out) == 1
    written = json.loads(out.read_text())
    assert not written["ok"] and written["findings"][0]["kind"] == "empty image file"
    assert "empty image file" in capsys.readouterr().out


def test_inspect_image_says_what_the_decoder_said(tmp_path, capfd):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    assert inspect_image(str(tmp_path / "a.jpg")).complaint == ""
    (tmp_path / "a.jpg").write_bytes(data[:2000] + b"\xff\xd9")
    seen = inspect_image(str(tmp_path / "a.jpg"))
    assert seen.size == (64, 64) and "JPEG" in seen.complaint
    assert capfd.readouterr().err == ""


def test_real_photos(request):
    folder = request.config.rootpath.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the shared data folder")
    for name in ("coco-mini", "bccd"):
        report = check(folder / name, workers=2, min_size=288, max_size=640)
        assert report.ok
        assert {f.kind: f.items for f in report.findings if f.severity == "warning"} == KNOWN[name]


KNOWN = {
    "coco-mini": {
        "box that vanishes": ["000000000542.jpg: box 466.93, 224.52, 468.16, 234.66, below a pixel at 380x288"]
    },
    # the same cells, a little shifted
    "bccd": {"near copies in train and val": ["train/BloodImage_00038.jpg ~ val/BloodImage_00037.jpg"]},
}


# ---- YOLO -----------------------------------------------------------------------------------------------------------


def test_only_the_folders_of_the_images_are_searched(tmp_path):
    """All that data.yaml and the images have in common may be the disk."""
    layouts.yolo_lists(tmp_path / "a" / "set")
    (tmp_path / "a" / "set" / "set.yaml").unlink()
    layouts.write(tmp_path / "a" / "set" / "val.txt", "images/08.png\nimages/09.png\n")
    layouts.write(tmp_path / "b" / "data.yaml", "path: ../a/set\ntrain: train.txt\nval: val.txt\nnames: [a, b]\n")
    for place in ("elsewhere", "a/other"):
        layouts.save(tmp_path / place, layouts.PICTURES[:1])
    report = check(tmp_path / "b")
    assert report.splits["train"]["images"] == 8 and report.splits["val"]["images"] == 2
    assert items(report, "file without entry") == ["a/set/images/10.png", "a/set/images/11.png"]


def test_problems_of_yolo_name_the_line(tmp_path):
    layouts.yolo(tmp_path)
    file = tmp_path / "labels" / "train" / "03.txt"
    file.write_text(f"{file.read_text()}\n\n7 0.5 0.5 0.25 0.25\n0 0.5 0.5 0.25\n0 0 0.5 0.5 0.5\n")
    report = check(tmp_path)
    assert {f.kind: f.items for f in report.findings if f.severity == "warning"} == {
        "unknown category_id": ["labels/train/03.txt, line 5: 7 0.5 0.5 0.25 0.25"],
        "box is not 4 finite numbers": ["labels/train/03.txt, line 6: 0 0.5 0.5 0.25"],
        "box clipped to the image": ["labels/train/03.txt, line 7: 0 0 0.5 0.5 0.5"],
    }
    assert all("categories" not in f.advice and "[left" not in f.advice for f in report.findings)


def test_problems_of_voc_name_the_object(tmp_path):
    layouts.voc(tmp_path)
    (file,) = tmp_path.rglob("03.xml")
    first, second = file.read_text().split("</object>", 1)
    file.write_text(f"{first}</object>{re.sub('<xmax>.*?</xmax>', '', second)}")
    (text,) = items(check(tmp_path), "box is not 4 finite numbers")
    assert re.fullmatch(r"Annotations/03.xml, object 2: red, xmin \d+, ymin \d+, xmax nan, ymax \d+", text)


def test_problems_of_coco_name_the_image(root):
    edit(root, "train", lambda coco: coco["annotations"][1].update(category_id=9))
    text = "1.png: annotations[1]: image_id 1, category_id 9, bbox [10, 5, 30, 20]"
    assert items(check(root), "unknown category_id") == [text]


def test_a_file_in_two_lists_is_in_train_and_val(tmp_path):
    layouts.yolo_lists(tmp_path)
    layouts.write(tmp_path / "val.txt", "images/07.png\nimages/08.png\n")
    report = check(tmp_path)
    assert items(report, "same image in train and val") == ["images/07.png: it is in both"]
    assert items(report, "same image twice") == []


# ---- an error means that training stops, and no error that it runs --------------------------------------------------


def keys(root, **change):
    for split in ("train", "val"):
        edit(root, split, lambda coco: coco.update({k: v(coco[k]) for k, v in change.items()}))


SPOILT = {  # name: (what is done to the dataset, whether training stops)
    "nothing": (lambda root: None, False),
    "no val": (lambda root: file_of(root, "val").unlink(), True),
    "no train": (lambda root: file_of(root, "train").unlink(), True),
    "unknown ids": (lambda root: edit(root, "train", lambda c: c["annotations"][0].update(image_id=99)), False),
    "no ids known": (lambda root: keys(root, annotations=lambda rows: [r | {"image_id": 99} for r in rows]), True),
    "no boxes in val": (lambda root: edit(root, "val", lambda c: c.update(annotations=[])), False),
    "a broken box": (lambda root: edit(root, "train", lambda c: c["annotations"][0].update(bbox=None)), False),
    "other classes": (lambda root: edit(root, "val", lambda c: c["categories"][0].update(name="cow")), True),
    "other ids": (lambda root: edit(root, "val", lambda c: renumber(c, 5)), False),
    "other order": (lambda root: edit(root, "val", lambda c: renumber(c, -1)), False),
    "an empty class": (lambda root: keys(root, categories=lambda rows: [*rows, {"id": 9, "name": "cow"}]), False),
    "only crowds": (lambda root: keys(root, annotations=lambda rows: [r | {"iscrowd": 1} for r in rows]), True),
    "fractions": (lambda root: keys(root, annotations=lambda r: [x | {"bbox": [0.1, 0.1, 0.5, 0.5]} for x in r]), True),
    "a missing image": (lambda root: (root / "train" / "0.png").unlink(), True),
    "a missing image in val": (lambda root: (root / "val" / "0.png").unlink(), True),
    "a wrong size": (lambda root: edit(root, "val", lambda c: c["images"][0].update(width=9)), True),
    "a repeated id": (lambda root: edit(root, "train", lambda c: c["images"][0].update(id=1)), True),
    "a copy": (lambda root: (root / "val" / "0.png").write_bytes((root / "train" / "0.png").read_bytes()), False),
}


def renumber(coco, by):
    for row in coco["categories"]:
        row["id"] = row["id"] + by if by > 0 else 1 - row["id"]
    for row in coco["annotations"]:
        row["category_id"] = row["category_id"] + by if by > 0 else 1 - row["category_id"]


@pytest.mark.parametrize("name", SPOILT)
def test_an_error_means_that_training_stops(name, root, tmp_path):
    from launch import train_here

    spoil_it, stops = SPOILT[name]
    spoil_it(root)
    assert check(root).ok == (not stops), str(check(root))
    options = "--workers 0 --steps 2"
    if stops:
        with pytest.raises(ValueError):
            train_here(root, tmp_path / "run", options)
    else:
        train_here(root, tmp_path / "run", options)


@pytest.mark.parametrize("small", [False, True])
def test_sizes_are_those_of_the_training(root, small):
    """Boxes are judged at the sizes that `finetune` chooses for them, unless sizes are given."""
    from fitting import fit_size
    from presets import PRESETS

    if small:
        for key, change in (("images", dict(width=600, height=400)), ("annotations", dict(bbox=[9, 9, 10, 10]))):
            edit(root, "train", lambda coco, key=key, change=change: [row.update(change) for row in coco[key]])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, (why,) = fit_size(PRESETS["finetune"][1], find_split(root, "train")[1], device)
    assert config.test_size == (416 if small else 320)
    report, (low, high) = check(root), config.min_size
    assert f"images of {low} to {high} px on the shorter side and at most {config.max_size} px" in report.trained
    assert why.split(" px, ")[1] in report.trained and report.trained in str(report)
    most = config.max_size
    assert f"images of 32 px on the shorter side and at most {most} px" in check(root, min_size=32).trained
    assert "images of 28 to 32 px on the shorter side and at most 32 px" in check(root, max_size=32).trained
