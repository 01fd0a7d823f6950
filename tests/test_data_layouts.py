"""Datasets as tools write them train as they are, or get one line that says what to type."""

import dataclasses
import json
import logging
import re
import shlex
import subprocess
import sys

import layouts
import numpy as np
import odd_layouts
import pytest
import torch
from launch import losses, rows, train_forked, train_here
from pycocotools.coco import COCO

import benchmark_data
import eval_coco
import train_coco
from vovnet_zoo import FCOS
from vovnet_zoo.data import CocoDataset, find_split
from vovnet_zoo.data.check import check_dataset
from vovnet_zoo.data.splitting import choose
from vovnet_zoo.evaluation import coco_metrics
from vovnet_zoo.export import accuracy

READY = [  # these have two splits
    *(
        "usual",
        "one_images_folder",
        "other_words",
        "roboflow",
        "roboflow_test",
        "cvat_subsets",
        "fiftyone",
        "mmdetection",
    ),
    *(
        "files_in_root",
        "prefixed",
        "scattered",
        "too_deep",
        "yolo",
        "yolo_roboflow",
        "yolo_lists",
        "voc",
        "voc_roboflow",
    ),
    *("imagefolder", "hf_saved", "hf_parquet"),
]
WHOLE = [  # these have one, and need --val-fraction
    *("roboflow_train", "cvat", "cvat_folder", "label_studio", "label_studio_server", "labelme2coco", "via"),
    *("fiftyone_single", "yolo_label_studio"),
]
STEPS = "--steps 3 --workers 0"


def make(name, root):
    if name.startswith("hf_"):
        pytest.importorskip("datasets")
    getattr(layouts, name)(root)
    return root


def same(a: CocoDataset, b: CocoDataset) -> bool:
    """Tell whether two datasets give bit-equal images and boxes, and equal labels, whatever the ids are."""
    if len(a) != len(b) or a.class_names != b.class_names:
        return False
    pairs = [(a[i], b[i]) for i in range(len(a))]
    return all(
        torch.equal(x, y) and torch.equal(s["boxes"], t["boxes"]) and torch.equal(s["labels"], t["labels"])
        for (x, s), (y, t) in pairs
    )


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    root = tmp_path_factory.mktemp("truth")
    layouts.usual(root)
    return {
        split: CocoDataset(root / split, root / "annotations" / f"instances_{split}.json") for split in ("train", "val")
    }


@pytest.mark.parametrize("name", READY)
def test_layout_gives_the_tensors_of_coco_and_trains(name, truth, tmp_path):
    root = make(name, tmp_path / "data")
    for split, expected in truth.items():
        dataset = CocoDataset(*find_split(root, split))
        assert same(dataset, expected) and dataset.problems == {}
    assert check_dataset(root, workers=0, progress=False).ok
    train_here(root, tmp_path / "run", STEPS)
    assert len(losses(tmp_path / "run")) == 3 and "AP" in rows(tmp_path / "run")[-1]


@pytest.mark.parametrize("name", WHOLE)
def test_layout_without_splits_is_told_what_to_type(name, tmp_path):
    root = make(name, tmp_path / "data")
    with pytest.raises(ValueError, match="--val-fraction 0.2") as error:
        train_here(root, tmp_path / "run", STEPS)
    assert "\n" not in str(error.value)
    report = check_dataset(root, workers=0, progress=False)  # which looks at the images all the same
    kind = "no val split" if name == "roboflow_train" else "not split"
    assert [f.kind for f in report.findings if f.severity == "error"] == [kind] and len(report.splits) == 1
    assert "--val-fraction 0.2" in str(report)
    assert check_dataset(root, workers=0, progress=False, val_fraction=0.2).ok
    train_here(root, tmp_path / "run", f"{STEPS} --val-fraction 0.25")
    assert len(losses(tmp_path / "run")) == 3 and "AP" in rows(tmp_path / "run")[-1]
    parts = [json.loads((tmp_path / "run" / "split" / f"{part}.json").read_text()) for part in ("train", "val")]
    count = 8 if name == "roboflow_train" else 12
    assert [len(part["images"]) for part in parts] == [count - count // 4, count // 4]
    assert all("area" in row for part in parts for row in part["annotations"])  # pycocotools needs it


@pytest.mark.parametrize("name", [name for name in READY if re.match("yolo|voc|imagefolder|hf", name)])
def test_other_formats_become_coco(name, truth, tmp_path):
    from vovnet_zoo.data.conversion import convert_data

    source, mine = make(name, tmp_path / "data"), tmp_path / "coco.partial" / "mine"
    mine.parent.mkdir()
    mine.write_text("mine")
    files = convert_data(source, tmp_path / "coco")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coco", "coco.partial", "data"] and mine.exists()
    assert list(files) == ["train", "val"]
    for split, expected in truth.items():
        assert same(CocoDataset(*find_split(tmp_path / "coco", split)), expected)
    with pytest.raises(ValueError, match="is there already"):
        convert_data(tmp_path / "data", tmp_path / "coco")


@pytest.mark.parametrize(
    ("make_it", "file"),
    [
        (layouts.yolo, "data.yaml"),
        (layouts.yolo_roboflow, "data.yaml"),
        (layouts.yolo_lists, "set.yaml"),
        (odd_layouts.yolo_cvat, "obj.data"),
    ],
)
def test_the_file_that_describes_a_yolo_dataset_is_read_as_the_dataset(make_it, file, truth, tmp_path):
    from vovnet_zoo.data.conversion import convert_data

    make_it(tmp_path / "data")
    layouts.write(tmp_path / "data" / "another.yaml", "train: nowhere\nval: nowhere\nnames: [a]\n")
    path = tmp_path / "data" / file
    for split, expected in truth.items():
        assert same(CocoDataset(*find_split(path, split)), expected)
    report = check_dataset(path, workers=0, progress=False)
    assert report.ok and "dataset file in doubt" not in [f.kind for f in report.findings]
    assert f"{path}: train: 8 images" in str(report) and f"({file} and " in str(report)
    assert list(convert_data(path, tmp_path / "coco")) == ["train", "val"]


def test_the_file_that_describes_a_yolo_dataset_is_trained_and_scored_on(tmp_path, run):
    layouts.yolo(tmp_path / "data")
    path = tmp_path / "data" / "data.yaml"
    train_here(path, tmp_path / "run", STEPS)
    model = str(tmp_path / "run" / "last")
    config = eval_coco.EvalConfig(model=model, data=path, device="cpu", workers=0)
    assert eval_coco.main(config) == eval_coco.main(dataclasses.replace(config, data=path.parent))
    compared = ("compare", tmp_path / "run", tmp_path / "run", "--out", tmp_path / "page.html")
    assert run(*compared)[0] == 0 and run(*compared, "--data", path, "--overwrite")[0] == 0
    assert len(accuracy.open_dataset(path, FCOS.from_pretrained(model))) == 4


def test_several_files_that_describe_datasets(tmp_path, caplog):
    layouts.yolo(tmp_path)
    layouts.write(tmp_path / "a.yaml", "train: images/val\nnames: [green, red]\n")
    assert len(CocoDataset(*find_split(tmp_path, "train"))) == 8  # data.yaml goes first, the others by their names
    (tmp_path / "a.yaml").rename(tmp_path / "mini.yaml")
    caplog.clear()
    layouts.write(tmp_path / "hyp.yaml", "lr: 0.1\n")
    assert len(CocoDataset(*find_split(tmp_path, "train"))) == 8
    text = "data.yaml is taken, and not mini.yaml; to use another, give that file as DATA"
    assert text in caplog.text
    (finding,) = (f for f in check_dataset(tmp_path, workers=0, progress=False).findings if f.severity == "warning")
    assert (finding.kind, finding.items) == ("dataset file in doubt", [text])
    assert len(CocoDataset(*find_split(tmp_path / "mini.yaml", "train"))) == 4
    with pytest.raises(ValueError, match="mini.yaml: no 'val' split; it names train only; type --val-fraction 0.2 .*"):
        find_split(tmp_path / "mini.yaml", "val")
    with pytest.raises(ValueError, match="hyp.yaml describes no YOLO dataset: write 'names'"):
        find_split(tmp_path / "hyp.yaml", "val")
    report = check_dataset(tmp_path / "mini.yaml", workers=0, progress=False)
    assert [f.kind for f in report.findings if f.severity == "error"] == ["no val split"]
    assert check_dataset(tmp_path / "mini.yaml", workers=0, progress=False, val_fraction=0.5).ok
    assert not check_dataset(tmp_path / "hyp.yaml", workers=0, progress=False).ok


def test_two_files_of_one_split_are_not_left_out(tmp_path):
    from vovnet_zoo.data.conversion import convert_data

    layouts.files_in_root(tmp_path / "data")
    layouts.write(tmp_path / "data" / "train_old.json", layouts.coco(layouts.TRAIN))
    with pytest.raises(ValueError, match="several 'train' splits"):
        convert_data(tmp_path / "data", tmp_path / "coco")
    assert not (tmp_path / "coco").exists()


def test_archives_get_the_command_that_unpacks_them(tmp_path):
    layouts.zipped(tmp_path / "data")
    for root in (tmp_path / "data", tmp_path / "data" / "set.zip"):
        with pytest.raises(ValueError, match="is an archive; type: ") as error:
            find_split(root, "train")
        assert not check_dataset(root, workers=0, progress=False).ok
    line = str(error.value)
    script = line.split("type: ")[1].split(";")[0].replace("python", sys.executable, 1)
    subprocess.run(shlex.split(script), check=True)
    train_here(line.split("give --data ")[1], tmp_path / "run", STEPS)
    assert len(losses(tmp_path / "run")) == 3


def test_files_that_are_named(tmp_path, truth):
    """--train and --val name any files; the folder of images may be named, or is found near the file."""
    layouts.scattered(tmp_path / "data")
    folder = tmp_path / "data" / "labels of mine"
    for split in ("train", "val"):
        (folder / f"{split} 3.json").rename(tmp_path / f"my {split}.json")
    named = []
    for split in ("train", "val"):
        named += [f"--{split}", str(tmp_path / f"my {split}.json")]
        named += [f"--{split}-images", str(tmp_path / "data" / "pictures" / split)]
    from launch import train_command

    import train_coco
    from presets import parse

    line = [str(x) for x in train_command(tmp_path, tmp_path / "run", STEPS)[2:]]
    at = line.index("--data")
    without = line[:at] + line[at + 2 :]
    train_coco.main(parse([*without, *named]))
    assert len(losses(tmp_path / "run")) == 3
    for extra, message in (
        ([], "--data, or --train JSON"),
        (named[:4], "--val JSON too, or --val-fraction"),
        ([*named[:2], *named[4:6], "--data", "x"], "leave --data out"),
        (named[2:4] + ["--data", "x"], "goes with --train"),
        ([*named, "--val-fraction", "0.2"], "leave out"),
        ([*named[:2], "--train-images", str(folder), *named[4:6]], "are not in .*labels of mine"),
    ):
        with pytest.raises(ValueError, match=message):
            train_coco.main(parse([*without[:2], str(tmp_path / "other"), *without[3:], *extra]))


def test_classes_without_boxes_are_named_and_dropped(tmp_path, capfd):
    """The detector that was trained without them is scored on the same data."""
    root = tmp_path / "data"
    layouts.usual(root)
    for split in ("train", "val"):
        file = root / "annotations" / f"instances_{split}.json"
        content = json.loads(file.read_text())
        content["categories"] = [{"id": 0, "name": "blue"}, *content["categories"], {"id": 9, "name": "grey"}]
        if split == "val":  # what cannot be learnt is not scored
            content["annotations"].append(content["annotations"][0] | {"id": 99, "category_id": 9})
        file.write_text(json.dumps(content))
    train_here(root, tmp_path / "all", STEPS)
    assert "no box in training: blue, grey; --drop-empty-classes" in capfd.readouterr().err
    train_here(root, tmp_path / "run", f"{STEPS} --drop-empty-classes")
    assert FCOS.from_pretrained(tmp_path / "all" / "last").config["class_names"] == ["blue", "green", "red", "grey"]
    assert FCOS.from_pretrained(tmp_path / "run" / "last").config["class_names"] == ["green", "red"]

    config = eval_coco.EvalConfig(model=str(tmp_path / "run" / "last"), data=root, device="cpu", workers=0)
    with pytest.raises(ValueError, match="knows the classes"):  # grey has a box
        eval_coco.main(config)
    file.write_text(json.dumps(content | {"annotations": content["annotations"][:-1]}))
    assert set(eval_coco.main(config)["per_class"]) == {"green", "red"}


@pytest.mark.parametrize("layout", ["usual", "yolo", "voc"])
def test_detectors_are_scored_on_any_format(layout, tmp_path, tiny_detector):
    getattr(layouts, layout)(tmp_path / "data")
    layouts.usual(tmp_path / "coco")
    model = FCOS(**{**tiny_detector.config, "class_names": ["green", "red"]})
    model.save_pretrained(tmp_path / "model")
    config = eval_coco.EvalConfig(model=str(tmp_path / "model"), data=tmp_path / "data", device="cpu", workers=0)
    coco = tmp_path / "coco" / "annotations" / "instances_val.json"
    named = dataclasses.replace(config, data=None, val=coco, val_images=tmp_path / "coco" / "val")
    assert (
        eval_coco.main(config) == eval_coco.main(named) == eval_coco.main(dataclasses.replace(named, val_images=None))
    )
    for wrong in (dict(data=None), dict(val=coco), dict(val_images=tmp_path), dict(data=None, val=coco, split="test")):
        with pytest.raises(ValueError, match="--data|goes with|--split test: it is a split of --data"):
            eval_coco.main(dataclasses.replace(config, **wrong))


def test_detections_have_the_ids_of_the_file(tmp_path, detector_folder):
    """Where ids are texts, pycocotools knows the detections of --out, and so does `coco_metrics`."""
    layouts.usual(tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["images"] = [x | {"id": f"img_{x['id']}"} for x in content["images"]]
    content["annotations"] = [x | {"image_id": f"img_{x['image_id']}"} for x in content["annotations"]]
    content["categories"] = [x | {"name": name} for x, name in zip(content["categories"], ("cat", "dog"), strict=True)]
    file.write_text(json.dumps(content))
    config = eval_coco.EvalConfig(str(detector_folder), tmp_path / "data", device="cpu", workers=0)
    out = tmp_path / "out.json"
    metrics = eval_coco.main(dataclasses.replace(config, difficult_as_crowd=True, out=out))
    found = json.loads(out.read_text())
    assert {row["image_id"] for row in found} == {image["id"] for image in content["images"]}
    assert all(type(row["category_id"]) is int for row in found)
    assert len(COCO(file).loadRes(found).anns) == len(found) and coco_metrics(file, found) == metrics


def test_a_missing_split_names_the_options_of_the_command(tmp_path, tiny_detector):
    """Those of a training (--train, --val-fraction) are named in a training only."""
    layouts.usual(tmp_path)
    scored = eval_coco.EvalConfig(model="x", data=tmp_path, split="test")
    for call in (
        lambda: eval_coco.open_dataset(scored, tiny_detector),
        lambda: benchmark_data.main(benchmark_data.BenchmarkConfig(data=tmp_path, split="test")),
    ):
        with pytest.raises(
            ValueError, match="no 'test' split; .*give another --split.*the splits: train, val;"
        ) as error:
            call()
        assert "--train" not in str(error.value)
    with pytest.raises(ValueError, match="--val-images .*: it goes with --val JSON"):
        eval_coco.check_config(dataclasses.replace(scored, val_images=tmp_path))
    layouts.yolo_label_studio(tmp_path / "whole")
    with pytest.raises(ValueError, match="no 'val' split; looked for .*; there is: classes.txt, images, labels"):
        eval_coco.open_dataset(dataclasses.replace(scored, data=tmp_path / "whole", split="val"), tiny_detector)
    (tmp_path / "annotations" / "instances_val.json").unlink()
    with pytest.raises(ValueError, match="no 'val' split; .*give a dataset that has one; there.*: train;") as error:
        accuracy.open_dataset(tmp_path, tiny_detector)
    assert "--train" not in str(error.value)
    with pytest.raises(ValueError, match="no 'val' split; .*--val-fraction 0.2"):
        find_split(tmp_path, "val")


def test_processes_share_the_held_out_part(tmp_path):
    layouts.fiftyone_single(tmp_path / "data")
    train_forked(tmp_path / "data", tmp_path / "run", f"{STEPS} --val-fraction 0.25 --frozen-norm", processes=2)
    train_here(tmp_path / "data", tmp_path / "one", f"{STEPS} --val-fraction 0.25 --frozen-norm")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "one"), rtol=1e-4)


def test_test_split_in_place_of_val_is_told(tmp_path, caplog):
    layouts.roboflow_test(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert find_split(tmp_path, "val")[0].name == "test"
    assert "'test' takes its place" in caplog.text
    report = check_dataset(tmp_path, workers=0, progress=False)
    assert [f.kind for f in report.findings if f.severity == "warning"] == ["test in place of val"]


def test_json_without_its_images(tmp_path):
    layouts.write(tmp_path / "train.json", layouts.coco())
    with pytest.raises(ValueError, match="--train .*train.json --train-images FOLDER"):
        find_split(tmp_path, "train")


def test_held_out_part_is_seeded_and_kept(tmp_path, caplog):
    from vovnet_zoo.data.layouts import unsplit
    from vovnet_zoo.data.splitting import hold_out

    layouts.fiftyone_single(tmp_path / "data")
    whole = unsplit(tmp_path / "data")

    def names(folder, fraction=0.25, seed=0):
        places = hold_out(whole, fraction, seed, tmp_path / folder, workers=0)
        return [CocoDataset(*places[part]).file_names.tolist() for part in ("train", "val")]

    mine = tmp_path / "a" / "val.partial"
    mine.parent.mkdir()
    mine.write_text("mine")
    first = names("a")
    assert mine.read_text() == "mine"
    assert first == names("a") == names("b") and sorted(first[0] + first[1]) == [p["name"] for p in layouts.PICTURES]
    assert names("a", seed=1) != first and len(names("a", fraction=0.5)[1]) == 6 and names("a") == first
    stamp = (tmp_path / "a" / "val.json").stat().st_mtime_ns
    names("a")
    assert (tmp_path / "a" / "val.json").stat().st_mtime_ns == stamp


def test_image_ids_with_a_decimal_point_keep_their_boxes_when_held_out(tmp_path):
    """A table that lacked some ids for a while has 12.0 for 12."""
    from vovnet_zoo.data.layouts import unsplit
    from vovnet_zoo.data.splitting import hold_out

    layouts.fiftyone_single(tmp_path / "data")
    file = tmp_path / "data" / "labels.json"
    coco = json.loads(file.read_text())
    coco["annotations"] = [a | {"image_id": float(a["image_id"])} for a in coco["annotations"]]
    file.write_text(json.dumps(coco))
    whole = unsplit(tmp_path / "data")
    places = hold_out(whole, 0.25, 0, tmp_path / "split", workers=0)
    assert sum(CocoDataset(*x).num_boxes for x in places.values()) == CocoDataset(whole.folder, whole.source).num_boxes


def test_two_entries_of_one_image_are_converted(tmp_path):
    from vovnet_zoo.data.conversion import convert_data

    layouts.fiftyone_single(tmp_path / "data")
    file = tmp_path / "data" / "labels.json"
    coco = json.loads(file.read_text())
    coco["images"].append(coco["images"][0] | {"id": 10_000})
    file.write_text(json.dumps(coco))
    convert_data(tmp_path / "data", tmp_path / "coco")
    assert len(CocoDataset(*find_split(tmp_path / "coco", "train"))) == len(layouts.PICTURES) + 1


def test_a_run_keeps_the_part_that_it_scored(tmp_path, monkeypatch):
    """A command with another fraction or seed is refused before it writes the parts anew, and `compare` reads them."""
    for name in ("report_run", "draw_pictures"):  # they take most of the time of a short run
        monkeypatch.setattr(train_coco, name, lambda *arguments: None)
    layouts.fiftyone_single(tmp_path / "data")
    train_here(tmp_path / "data", tmp_path / "run", f"{STEPS} --val-fraction 0.25")
    before = (tmp_path / "run" / "split" / "val.json").read_bytes()
    for options, change in (("0.5", "val_fraction: was 0.25, now 0.5"), ("0.25 --seed 1", "seed: was 0, now 1")):
        with pytest.raises(ValueError, match=f"holds another split.*{change}.*--allow-changes"):
            train_here(tmp_path / "data", tmp_path / "run", f"{STEPS} --val-fraction {options}")
    assert (tmp_path / "run" / "split" / "val.json").read_bytes() == before


def test_groups_stay_together():
    groups = [[0, 1, 2, 3, 4], [5], [6, 7], [8], [9]]
    for seed in range(20):
        chosen = choose(groups, 0.3, seed, "x")
        assert 1 <= len(chosen) <= 3 and all(
            set(group) <= set(chosen) or not set(group) & set(chosen) for group in groups
        )
    assert choose([[0, 1, 2], [3, 4]], 0.1, 0, "x") == [3, 4]
    with pytest.raises(ValueError, match="look all the same"):
        choose([[0, 1, 2]], 0.2, 0, "x")
    share = np.mean([len(choose([[i] for i in range(100)], 0.2, seed, "x")) for seed in range(5)])
    assert share == 20
