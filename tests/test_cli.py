"""These tests run the command line in this process, and look at its files and its errors."""

import copy
import json
import sys

import pytest
import timm
import torch
from checkpoints import published as published_form
from PIL import Image

from vovnet_zoo import cli, hub
from vovnet_zoo import weights as published
from vovnet_zoo.vovnet import VovNetV2


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `vovnet-zoo ARGS` and return (exit status, stdout, stderr)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["vovnet-zoo", *map(str, args)])
        status = 0
        try:
            cli.main()
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def folder(tiny_detector, tmp_path_factory):
    """Save a detector that sees a cat or a dog everywhere."""
    model = copy.deepcopy(tiny_detector)
    torch.nn.init.constant_(model.head.cls_logits.bias, 2.0)
    torch.nn.init.constant_(model.head.centerness.bias, 2.0)
    torch.nn.init.constant_(model.head.box_distances.bias, 1.0)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


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
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"x.png", "x_2.png", "y.png", "detections.json"}
    assert Image.open(tmp_path / "out" / "y.png").size == (200, 100)
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [row["image"] for row in rows] == [str(path) for path in images]
    for row in rows:
        assert len(row["boxes"]) == len(row["scores"]) == len(row["labels"]) == len(row["names"]) > 0
        assert min(row["scores"]) >= 0.3 and set(row["names"]) <= {"cat", "dog"}
    assert run("predict", images[0], "--model", folder, "--out", tmp_path / "one", "--max-detections", "1")[0] == 0
    assert len(json.loads((tmp_path / "one" / "detections.json").read_text())[0]["boxes"]) == 1 < len(rows[0]["boxes"])
    assert run("predict", images[0], "--model", folder, "--out", tmp_path / "none", "--score", "0.999")[0] == 0
    assert json.loads((tmp_path / "none" / "detections.json").read_text())[0]["boxes"] == []


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_predict_writes_over_nothing_of_the_user(run, folder, images, tmp_path):
    """Neither an input is replaced, however it is spelled, nor another file, unless --overwrite allows the latter."""
    work = tmp_path / "work"
    work.mkdir()
    images[0].rename(work / "photo.png")
    Image.new("RGB", (64, 64), "red").save(work / "cat.jpg")
    (work / "other.png").hardlink_to(work / "photo.png")
    for name in ("cat.png", "detections.json"):
        (work / name).write_text("mine")
    before = content(work)
    again = work / ".." / "work"
    for image, options, message in [
        ("photo.png", [], "photo.png: the result would be written over the input"),
        ("photo.png", ["--overwrite"], "photo.png: the result would be written over the input"),
        ("other.png", ["--overwrite"], "other.png: the result would be written over the input"),
        ("cat.jpg", [], "cat.png is there already"),
    ]:
        status, _, err = run("predict", again / image, "--model", folder, "--out", work, *options)
        assert status == 2 and message in err and content(work) == before
    (work / "cat.png").unlink()
    status, _, err = run("predict", work / "cat.jpg", "--model", folder, "--out", work)
    assert status == 2 and "detections.json is there already" in err
    (work / "cat.png").symlink_to("photo.png")
    assert run("predict", work / "cat.jpg", "--model", folder, "--out", work, "--overwrite")[0] == 0
    assert (work / "photo.png").read_bytes() == before["photo.png"] and not (work / "cat.png").is_symlink()
    assert json.loads((work / "detections.json").read_text())[0]["picture"] == "cat.png"


def test_pictures_differ_on_any_file_system():
    taken = set()
    assert [cli.unique(stem, taken) for stem in ("a", "A", "a_2", "b")] == ["a", "A_2", "a_2_2", "b"]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image="not_there.png"), "not_there.png"),
        (dict(model="not/a/model"), "not/a/model"),
        (dict(model="fcos_vovnet39_fpn"), "published yet"),
        (dict(model="."), "has no config.json"),
    ],
)
def test_errors_of_the_users(run, folder, images, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(published.ORGANISATION_VARIABLE, raising=False)
    image, model = change.get("image", images[0]), change.get("model", folder)
    status, _, err = run("predict", image, "--model", model, "--out", tmp_path / "out")
    assert status == 2 and message in err and "Traceback" not in err


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
    net = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert type(net) is VovNetV2
    assert torch.equal(net.stem[0].conv.weight, body[f"{prefix}stem.stem_1/conv.weight"])
    status, out, err = run("convert", tmp_path / "w.pth", tmp_path / "out", "--part", "backbone", "--overwrite")
    assert status == 0, err


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
