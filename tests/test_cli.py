"""These tests run the command line in this process, and look at its files and its errors."""

import ast
import json
import sys
from pathlib import Path

import layouts
import pytest
import timm
import torch
from checkpoints import open_with_timm
from checkpoints import published as published_form
from launch import HEAVY, run_light
from PIL import Image

import vovnet_zoo
from vovnet_zoo import FCOS, cli, hub, results
from vovnet_zoo import weights as published
from vovnet_zoo.predict_files import unique
from vovnet_zoo.vovnet import VovNetV2


@pytest.fixture(scope="module")
def folder(detector_folder):
    return detector_folder


@pytest.fixture
def images(tmp_path):
    """Write two images of the same name, and one of another size."""
    paths = [tmp_path / "a" / "x.png", tmp_path / "b" / "x.jpg", tmp_path / "y.png"]
    for path, size in zip(paths, [(64, 64), (64, 64), (200, 100)], strict=True):
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", size, "gray").save(path)
    return paths


def test_help(run):
    status, out, _ = run("--help")
    assert status == 0 and all(command in out for command in ("predict", "convert", "publish"))
    status, out, _ = run("predict", "--help")
    assert status == 0 and "--model" in out and "--score" in out


def test_predict(run, folder, images, tmp_path):
    status, out, err = run("predict", *images, "--model", folder, "--out", tmp_path / "out")
    assert status == 0, err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"x.jpg", "x_2.jpg", "y.jpg", "detections.jsonl"}
    assert Image.open(tmp_path / "out" / "y.jpg").size == (400, 200)  # enlarged, so that its labels can be read
    rows = lines(tmp_path / "out")
    assert [row["image"] for row in rows] == [str(path) for path in images]
    for row in rows:
        assert len(row["boxes"]) == len(row["scores"]) == len(row["labels"]) == len(row["names"]) > 0
        assert min(row["scores"]) >= 0.3 and set(row["names"]) <= {"cat", "dog"}
    assert run("predict", images[0], "--model", folder, "--out", tmp_path / "one", "--max-detections", "1")[0] == 0
    assert len(lines(tmp_path / "one")[0]["boxes"]) == 1 < len(rows[0]["boxes"])
    options = ["--out", tmp_path / "none", "--score", "0.999", "--save-pictures", "none"]
    status, out, _ = run("predict", images[0], "--model", folder, *options)
    best = f"{max(rows[0]['scores']):.2f}"
    assert status == 0 and f"0 detections; the best score, {best}, is below the threshold 0.999" in out
    assert lines(tmp_path / "none")[0]["boxes"] == [] and len(list((tmp_path / "none").iterdir())) == 1


def lines(folder):
    return [json.loads(line) for line in (folder / "detections.jsonl").read_text().splitlines()]


def test_predict_goes_on_after_a_bad_file(run, folder, images, tmp_path):
    """Folders and patterns; what is bad is named on stderr, and nothing else is lost."""
    (tmp_path / "a" / "bad.png").write_bytes(b"not an image")
    wanted = [str(tmp_path / name) for name in ("a/x.png", "b/x.jpg", "y.png")]
    options = ["--model", folder, "--batch-size", "2", "--out"]
    status, out, err = run("predict", tmp_path / "a", tmp_path / "b", tmp_path / "*.png", *options, tmp_path / "out")
    assert status == 1 and "a/bad.png: not an image" in err and "3 of 4 images" in out
    assert [row["image"] for row in lines(tmp_path / "out")] == wanted
    status, out, err = run("predict", tmp_path / "*.bmp", *options, tmp_path / "out2")
    assert status == 2 and "no image matches" in err and not (tmp_path / "out2").exists()
    assert run("predict", *options, tmp_path / "out2")[0] == 2


def test_predict_is_interrupted(run, folder, images, tmp_path, monkeypatch):
    """The lines of the images before Ctrl-C are there; for a signal to a process, see test_predict_files.py."""
    drawn, draw = [], results.ImageDetections.draw

    def interrupted(*arguments, **options):
        drawn.append(1)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(*arguments, **options)

    monkeypatch.setattr(results.ImageDetections, "draw", interrupted)
    status, out, err = run("predict", *images, "--model", folder, "--out", tmp_path / "out")
    assert status == 130 and "interrupted; what was found until now is in" in err and "2 of 3 images" in out
    assert [row["image"] for row in lines(tmp_path / "out")] == [str(path) for path in images[:2]]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"x.jpg", "x_2.jpg", "detections.jsonl"}


def test_predict_uses_the_models_thresholds(run, folder, images, tmp_path):
    model = FCOS.from_pretrained(folder, thresholds={"cat": 1.0, "dog": 0.1})
    model.save_pretrained(tmp_path / "strict")
    assert run("predict", images[0], "--model", tmp_path / "strict", "--out", tmp_path / "out")[0] == 0
    assert set(lines(tmp_path / "out")[0]["names"]) == {"dog"}
    options = ["--out", tmp_path / "all", "--score", "0.1"]
    assert run("predict", images[0], "--model", tmp_path / "strict", *options)[0] == 0
    assert set(lines(tmp_path / "all")[0]["names"]) == {"cat", "dog"}


def test_predict_uses_the_models_score_threshold(run, folder, images, tmp_path):
    """It wins over the 0.3 that is shown otherwise, and --score wins over it."""
    FCOS.from_pretrained(folder, score_threshold=1.0).save_pretrained(tmp_path / "strict")
    for out, options, some in (("own", [], False), ("typed", ["--score", "0.1"], True)):
        arguments = ["predict", images[0], "--model", tmp_path / "strict", "--out", tmp_path / out, *options]
        assert run(*arguments)[0] == 0 and bool(lines(tmp_path / out)[0]["names"]) == some


@pytest.mark.parametrize(
    "line, status, message",
    [
        ("--help", 0, "predict"),
        ("predict --help", 0, "--nms-threshold"),
        ("convert --help", 0, "[-h] FILE FOLDER"),
        ("--version", 0, f"vovnet-zoo {vovnet_zoo.__version__}"),
        ("--tyro-print-completion bash", 0, "vovnet-zoo"),
        ("predct", 2, "'predct' is no command (did you mean 'predict'?); give one of predict, check-data, "),
        ("--vresion", 2, "vovnet-zoo: --vresion: the command comes first, one of predict, check-data, "),
        ("--tyro-print-completion tcsh", 2, "vovnet-zoo: --tyro-print-completion tcsh: give one of the shells bash, "),
        ("predict x.jpg --model M --uot OUT", 2, "--out"),
        (
            "predict nowhere.jpg --model fcos_vovnet39_fpn --out OUT",
            2,
            "vovnet-zoo: no such file or folder: nowhere.jpg",
        ),
        ("predict README.md --model fcos_vovnet39_fpm --out OUT", 2, "did you mean 'fcos_vovnet39_fpn'?"),
        ("predict nowhere*.jpg --model fcos_vovnet39_fpn --out OUT", 2, "nowhere*.jpg: no image matches this pattern"),
        ("predict README.md --model fcos_vovnet39_fpn --out LICENSE", 2, "--out LICENSE cannot be written (LICENSE is"),
        ("predict README.md --model LICENSE --out OUT", 2, "'LICENSE' is a file; give the folder of a saved model"),
        ("predict README.md --model runs/x@ --out OUT", 2, "vovnet-zoo: 'runs/x@' is no folder here"),
        ("predict README.md --model vovnet_zo --out OUT", 2, "vovnet-zoo: 'vovnet_zo' is no folder here"),
        (
            "predict README.md --model fcos_vovnet39_fpn --out OUT",
            2,
            "vovnet-zoo: no weights of 'fcos_vovnet39_fpn' can",
        ),
        ("check-data nowhere", 2, "vovnet-zoo: no such file or folder: nowhere"),
        (
            "check-data tests --val-images tests",
            2,
            "--val-images tests: it goes with --val JSON; with DATA, leave it out",
        ),
        ("check-data tests --train-images tests", 2, "--train-images tests: it goes with --train JSON"),
        (
            "list vovnet39 --markdown",
            2,
            "vovnet-zoo: --markdown prints the table of all published weights; leave vovnet39",
        ),
        ("list --json --markdown", 2, "published weights; leave --json out"),
        ("convert nowhere.pth OUT", 2, "vovnet-zoo: no such file or folder: nowhere.pth"),
        ("publish nowhere someone/model", 2, "vovnet-zoo: no such file or folder: nowhere"),
        ("publish README.md someone/model --run nowhere", 2, "vovnet-zoo: no such file or folder: nowhere"),
    ],
)
def test_what_takes_no_seconds(line, status, message):
    """Help and mistakes of the user are answered before torch is imported."""
    result, imported = run_light("-m", "vovnet_zoo.cli", *line.split())
    assert result.returncode == status and message in result.stdout + result.stderr
    assert not imported & HEAVY and "Traceback" not in result.stderr


def test_help_is_wrapped_by_the_terminal():
    """tyro breaks a line wherever the source does, so an option is described in one line of the source."""
    commands = [x for x in ast.parse(Path(cli.__file__).read_text()).body if isinstance(x, ast.ClassDef)]
    about = [x.value.value for c in commands for x in c.body[1:] if isinstance(x, ast.Expr)]
    assert len(about) > 60 and not [text for text in about if "\n" in text]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


PNG = ["--save-pictures", "png"]


def test_predict_writes_over_nothing_of_the_user(run, folder, images, tmp_path):
    """Neither an input is replaced, however it is spelled, nor another file, unless --overwrite allows the latter."""
    work = tmp_path / "work"
    work.mkdir()
    images[0].rename(work / "photo.png")
    Image.new("RGB", (64, 64), "red").save(work / "cat.jpg")
    (work / "other.png").hardlink_to(work / "photo.png")
    for name in ("cat.png", "detections.jsonl"):
        (work / name).write_text("mine")
    before = content(work)
    again = work / ".." / "work"
    for image, options, message in [
        ("photo.png", [], "photo.png: the result would be written over the input"),
        ("photo.png", ["--overwrite"], "photo.png: the result would be written over the input"),
        ("other.png", ["--overwrite"], "other.png: the result would be written over the input"),
        ("cat.jpg", [], "cat.png is there already"),
    ]:
        status, _, err = run("predict", again / image, "--model", folder, "--out", work, *PNG, *options)
        assert status == 2 and message in err and content(work) == before
    (work / "cat.png").unlink()
    status, _, err = run("predict", work / "cat.jpg", "--model", folder, "--out", work, *PNG)
    assert status == 2 and "detections.jsonl is there already" in err
    (work / "cat.png").symlink_to("photo.png")
    assert run("predict", work / "cat.jpg", "--model", folder, "--out", work, *PNG, "--overwrite")[0] == 0
    assert (work / "photo.png").read_bytes() == before["photo.png"] and not (work / "cat.png").is_symlink()
    assert lines(work)[0]["picture"] == "cat.png"


def test_pictures_differ_on_any_file_system():
    taken = set()
    assert [unique(stem, taken) for stem in ("a", "A", "a_2", "b")] == ["a", "A_2", "a_2_2", "b"]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image="not_there.png"), "not_there.png"),
        (dict(model="not/a/model"), "not/a/model"),
        (dict(model="fcos_vovnet39_fpn"), "no weights of 'fcos_vovnet39_fpn' can be had"),
        (dict(model="fcos_vovnet39_fpm"), "did you mean 'fcos_vovnet39_fpn'?"),
        (dict(model="./runs/x"), "on the Hub: . is there, runs in it is not"),
        (dict(model="runs/x.onnx"), "vovnet-zoo: no such file or folder: runs/x.onnx"),
        (dict(model="y.png"), "'y.png' is a file; give the folder of a saved model, or 'organisation/name' on the Hub"),
        (dict(model="."), "has no config.json"),
    ],
)
def test_errors_of_the_users(run, folder, images, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(published.ORGANISATION_VARIABLE, raising=False)
    image, model = change.get("image", images[0]), change.get("model", folder)
    status, _, err = run("predict", image, "--model", model, "--out", tmp_path / "out")
    assert status == 2 and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    "line",
    [
        "predict y.png --model nowhere/model --out afile",
        "predict y.png --model nowhere/model --out afile/x",
        "predict y.png --model nowhere/model --out out --coco afile/x.json",
        "export nowhere/model --out afile/x",
        "convert y.png afile/x",
        "convert-data . afile/x",
        "check-data . --json afile/x.json",
        "compare y.png y.png --out afile/x.html",
    ],
)
def test_a_place_that_cannot_be_written_is_told_first(run, images, tmp_path, monkeypatch, line):
    """The model is not looked for, and no file is read or made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run(*line.split())
    assert status == 2 and "cannot be written (afile is a file); give another place" in err and err.count("\n") == 1
    assert not out and sorted(tmp_path.rglob("*")) == before and (tmp_path / "afile").read_text() == "mine"


def test_predict_looks_for_a_compiler_first(run, images, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    options = ["--model", "nowhere/model", "--out", tmp_path / "out", "--device", "cpu", "--compile"]
    status, _, err = run("predict", images[0], *options)
    assert status == 2 and "torch.compile finds no C++ compiler" in err and not (tmp_path / "out").exists()


def test_convert(run, tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "w.pth")
    status, _, err = run("convert", tmp_path / "w.pth", tmp_path / "out")
    assert status == 2 and "w.pth: no known format" in err
    assert run("convert", tmp_path / "none.pth", tmp_path / "out")[0] == 2

    net = timm.create_model("vovnet27_slim", num_classes=3)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    status, out, err = run("convert", tmp_path / "w.pth", tmp_path / "out")
    assert status == 0 and "out" in out, err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {hub.CONFIG, hub.WEIGHTS, hub.CARD}
    before = content(tmp_path / "out")
    torch.save({**net.state_dict(), "head.fc.bias": torch.ones(3)}, tmp_path / "w.pth")
    status, out, err = run("convert", tmp_path / "w.pth", tmp_path / "out")
    assert status == 2 and "config.json is there already" in err and content(tmp_path / "out") == before
    status, out, err = run("convert", tmp_path / "out" / hub.WEIGHTS, tmp_path / "out", "--overwrite")
    assert status == 2 and "over the input" in err and content(tmp_path / "out") == before
    assert run("convert", tmp_path / "w.pth", tmp_path / "out", "--overwrite")[0] == 0
    assert content(tmp_path / "out")[hub.WEIGHTS] != before[hub.WEIGHTS]


@pytest.mark.parametrize("prefix", ["backbone.bottom_up.", "img_backbone.", ""])
def test_convert_a_v2_body_of_a_detector(run, tmp_path, prefix):
    body = {prefix + name: x for name, x in published_form("authors_v2").items()}
    beside = {"neck.lateral.weight": torch.zeros(3), "head.cls.bias": torch.zeros(1)}
    torch.save({"state_dict": body | beside}, tmp_path / "w.pth")
    status, _, err = run("convert", tmp_path / "w.pth", tmp_path / "out")
    assert status == 2 and "unexpected" in err and "--part backbone" in err
    status, out, err = run("convert", tmp_path / "w.pth", tmp_path / "out", "--part", "backbone")
    assert status == 0 and "left out 2 tensors" in out and all(name in out for name in beside), err
    card = (tmp_path / "out" / hub.CARD).read_text()
    assert "import vovnet_zoo" in card and "2 tensors beside the backbone" in card
    net = open_with_timm(tmp_path / "out")
    assert type(net) is VovNetV2
    assert torch.equal(net.stem[0].conv.weight, body[f"{prefix}stem.stem_1/conv.weight"])
    status, out, err = run("convert", tmp_path / "w.pth", tmp_path / "out", "--part", "backbone", "--overwrite")
    assert status == 0, err


def test_check_and_convert_data_of_other_formats(tmp_path, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["vovnet-zoo", *map(str, words)])
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code, capsys.readouterr()
        return 0, capsys.readouterr()

    layouts.yolo(tmp_path / "yolo")
    status, printed = run("check-data", tmp_path / "yolo", "--workers", "0")
    assert status == 0 and "data.yaml and labels/: this is YOLO" in printed.out
    assert "image/s" not in printed.err  # no bar where there is no terminal
    status, printed = run("convert-data", tmp_path / "yolo", tmp_path / "coco")
    assert status == 0 and f"train: {tmp_path / 'coco' / 'annotations' / 'instances_train.json'}" in printed.out
    assert run("convert-data", tmp_path / "coco", "--data", tmp_path / "yolo")[0] == 2  # it is there
    named = []
    for split in ("train", "val"):
        named += [f"--{split}", tmp_path / "coco" / "annotations" / f"instances_{split}.json"]
        named += [f"--{split}-images", tmp_path / "coco" / split]
    status, printed = run("check-data", *named, "--workers", "0")
    assert status == 0 and "train: 8 images, 14 boxes, 2 classes" in printed.out
    layouts.fiftyone_single(tmp_path / "one")
    assert run("check-data", "--workers", "0", f"--data={tmp_path / 'one'}")[0] == 1  # as for a training
    assert run("check-data", tmp_path / "one", "--workers", "0", "--val-fraction", "0.2")[0] == 0
    for wrong in ([], named[:3], ["--val", named[1]], [tmp_path / "one", "--val-fraction", "2"]):
        status, printed = run("check-data", *wrong)
        assert status in (1, 2) and "Traceback" not in printed.err


def test_check_data(tiny_coco, tmp_path, monkeypatch, capsys):
    report = tmp_path / "report.json"
    for damage, status in ((False, 0), (True, 1)):
        if damage:
            (tiny_coco / "train" / "2.png").write_bytes(b"")
        monkeypatch.setattr(
            sys, "argv", ["vovnet-zoo", "check-data", str(tiny_coco), "--workers", "0", "--json", str(report)]
        )
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == status and json.loads(report.read_text())["ok"] is (not damage)
    assert "2.png" in capsys.readouterr().out
    annotations = tiny_coco / "annotations" / "instances_train.json"
    before = annotations.read_bytes()
    monkeypatch.setattr(sys, "argv", ["vovnet-zoo", "check-data", str(tiny_coco), "--json", str(annotations)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and annotations.read_bytes() == before
