"""The run folder: a log that is whole whatever happens, checkpoints, and no finished step that is lost."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from launch import rows, tiny_config

import pictures
import run_folder
import train_coco
from pictures import draw_comparison, draw_curves
from presets import TrainConfig
from run_folder import RunLog, list_checkpoints, load_checkpoint, longer, note_not_finite, save_checkpoint, was_bad
from vovnet_zoo import FCOS, create_detector
from vovnet_zoo.data import CocoDataset, ImageError, Skipped, find_split
from vovnet_zoo.draw import draw_detections


@pytest.fixture
def config(tiny_coco, tmp_path) -> TrainConfig:
    return tiny_config(tiny_coco, tmp_path / "run")


def write_rows(log: RunLog, steps: range, **values) -> None:
    for step in steps:
        log.write(step, loss=1.0 / (1 + step), **values)


def test_log_holds_rows_and_starts(config):
    log = RunLog(config.out, config, rank=0)
    write_rows(log, range(3), lr=0.1)
    log.write(2, AP=0.5)
    log.close()
    assert log.rows() == [
        *({"step": i, "loss": 1.0 / (1 + i), "lr": 0.1} for i in range(3)),
        {"step": 2, "AP": 0.5},
    ]
    about = json.loads((config.out / "run.json").read_text())
    assert about["config"]["steps"] == 4 and about["config"]["out"] == str(config.out)
    (start,) = about["starts"]
    assert start["step"] == 0 and start["command"] == sys.argv and start["versions"]["torch"] == torch.__version__
    assert not list(config.out.glob("*.partial"))


def test_log_goes_on_after_the_last_checkpoint(config):
    """Rows of steps that are done again are dropped, and so is an evaluation that no checkpoint knows of."""
    log = RunLog(config.out, config, rank=0)
    for step in range(1, 5):
        write_rows(log, range(step, step + 1))
        log.write(step, AP=0.1 * step)
    log.close()
    with open(config.out / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # a killed run's last line
    log = RunLog(config.out, config, rank=0, start_step=3, scored=2)
    write_rows(log, range(4, 6))
    log.close()
    found = log.rows()
    assert [row["step"] for row in found if "loss" in row] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in found if "AP" in row] == [1, 2]
    assert [start["step"] for start in json.loads((config.out / "run.json").read_text())["starts"]] == [0, 3]
    RunLog(config.out, config, rank=0).close()  # from the start again: nothing of the other run stays
    assert log.rows() == [] and len(json.loads((config.out / "run.json").read_text())["starts"]) == 1


def test_a_log_of_version_0_2_counted_from_0(config):
    log = RunLog(config.out, config, rank=0)
    write_rows(log, range(4))
    log.write(1, AP=0.5)
    log.close()
    about = json.loads((config.out / "run.json").read_text())
    del about["first_step"]
    (config.out / "run.json").write_text(json.dumps(about))
    for _ in range(2):  # once it goes on, it counts from 1
        RunLog(config.out, config, rank=0, start_step=3, scored=2).close()
        assert [row["step"] for row in log.rows()] == [1, 2, 3, 2]


def test_log_of_other_ranks_writes_nothing(config):
    log = RunLog(config.out, config, rank=1)
    log.write(0, loss=1.0)
    log.close()
    assert not config.out.exists()


def test_log_writes_tensorboard(config):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(config.out, config, rank=0)
    write_rows(log, range(3), note="text")
    log.close()
    events = accumulator.EventAccumulator(str(config.out / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [event.step for event in events.Scalars("loss")] == [0, 1, 2]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([1, 1 / 2, 1 / 3])


@pytest.mark.parametrize("damage", [b"", b'{"config": {', b"\xff\x00", b"[]", b'{"config": {}}'])
def test_a_damaged_log_is_reported_and_does_not_stop_a_run(config, damage, caplog):
    log = RunLog(config.out, config, rank=0)
    write_rows(log, range(3))
    log.close()
    (config.out / "run.json").write_bytes(damage)
    content = (config.out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (config.out / "metrics.jsonl").write_bytes(content[0] + damage + b"\n" + content[2])
    log = RunLog(config.out, config, rank=0, start_step=3)
    log.close()
    assert f"{config.out / 'run.json'} is damaged" in caplog.text
    assert [start["step"] for start in json.loads((config.out / "run.json").read_text())["starts"]] == [3]
    assert [row["step"] for row in log.rows()] == [0, 2]


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_a_log_that_cannot_be_written_stays_as_it_was(config, name, monkeypatch):
    """As with a full disk, in the middle of the file."""
    log = RunLog(config.out, config, rank=0)
    write_rows(log, range(3))
    log.close()
    before = (config.out / name).read_bytes()
    (config.out / (name + ".partial")).write_text("mine")
    real, written = run_folder.os.fsync, hashlib.sha256(name.encode()).hexdigest()[:12]  # see files.temporary

    def fsync(descriptor):
        if written in str(Path(f"/proc/self/fd/{descriptor}").resolve()):
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(run_folder.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        RunLog(config.out, config, rank=0, start_step=2)
    assert (config.out / name).read_bytes() == before
    assert [path.name for path in config.out.rglob("*.partial")] == [name + ".partial"]
    assert (config.out / (name + ".partial")).read_text() == "mine"


def test_a_checkpoint_replaces_that_of_the_same_step(tmp_path, monkeypatch):
    """One of the same content has the same name, and Windows gives a file no name that another file has."""

    def rename(source, target):
        assert not os.path.exists(target), "as Windows says"
        os.replace(source, target)

    monkeypatch.setattr(os, "rename", rename)
    for step, value in ((2, 0.0), (4, 1.0), (4, 2.0), (4, 3.0), (4, 3.0)):
        save_checkpoint(tmp_path, step, {"value": value})
    assert [path.name[:8] for path in list_checkpoints(tmp_path)] == ["00000002", "00000004"]
    assert load_checkpoint(tmp_path) == {"value": 3.0}


def test_steps_are_saved_before_an_evaluation_that_fails(config, tiny_coco):
    """The same command repeats the evaluation and no step, and ends as an undisturbed run."""
    undisturbed = dataclasses.replace(config, out=config.out.with_name("undisturbed"))
    expected = train_coco.main(undisturbed)
    photo = tiny_coco / "val" / "1.png"
    content = photo.read_bytes()
    photo.write_bytes(b"not a picture")
    for _ in range(2):
        with pytest.raises(ValueError, match="1.png"):
            train_coco.main(config)
        progress = load_checkpoint(config.out / "checkpoints")["progress"]
        assert (progress["step"], progress["scored"]) == (2, 0)
    photo.write_bytes(content)
    assert train_coco.main(config) == expected
    ours, theirs = (rows(run.out) for run in (config, undisturbed))
    assert [row.get("loss") for row in ours] == [row.get("loss") for row in theirs]
    assert [row["step"] for row in ours if "AP" in row] == [2, 4]
    for name in ("best", "last"):
        found, wanted = (FCOS.from_pretrained(run.out / name).state_dict() for run in (config, undisturbed))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert train_coco.main(config) == expected and len(rows(config.out)) == 6  # nothing is left to do


def test_a_checkpoint_of_version_0_1_goes_on(config, monkeypatch):
    """It was written after the evaluation of its step, and does not say so."""
    train_coco.main(config)
    folder = config.out / "checkpoints"
    state = load_checkpoint(folder)
    del state["progress"]["scored"]
    save_checkpoint(folder, 4, state)
    monkeypatch.setattr(train_coco, "score_dataset", None)
    assert train_coco.main(config)["AP"] == state["progress"]["metrics"]["AP"]


def test_all_checkpoints_damaged(config):
    """The run does not start over by itself, since that would overwrite its log."""
    train_coco.main(dataclasses.replace(config, checkpoint_every=1))
    before = (config.out / "metrics.jsonl").read_bytes()
    paths = list_checkpoints(config.out / "checkpoints")
    assert len(paths) == 2
    for path in paths:
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=rf"all checkpoints are damaged.*{paths[0].name}.*start the run over"):
        train_coco.main(config)
    assert (config.out / "metrics.jsonl").read_bytes() == before
    for path in paths:
        path.unlink()
    train_coco.main(config)


def test_only_whole_checkpoints_count_in_the_rotation(tmp_path):
    """With damaged files of later steps too, as after going back to the one before them."""
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, step, {"value": step}, keep=3)
    for path in list_checkpoints(tmp_path)[1:]:
        path.write_bytes(path.read_bytes()[:-1])
    assert load_checkpoint(tmp_path) == {"value": 2}
    save_checkpoint(tmp_path, 3, {"value": 3})
    assert [path.name[:8] for path in list_checkpoints(tmp_path)] == ["00000002", "00000003"]


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    left = tmp_path / "00000007-0123456789abcdef.pt.partial"
    left.touch()
    save_checkpoint(tmp_path, 8, {"value": 8})
    assert not left.exists() and load_checkpoint(tmp_path) == {"value": 8}


@pytest.mark.parametrize("number, is_error", [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch, number, is_error):
    """CIFS, sshfs and others refuse it; the file is whole all the same."""
    real = run_folder.os.fsync

    def fsync(descriptor):
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir():
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(run_folder.os, "fsync", fsync)
    with pytest.raises(OSError) if is_error else contextlib.nullcontext():
        save_checkpoint(tmp_path, 8, {"value": 8})
    assert load_checkpoint(tmp_path) == {"value": 8}


def test_numbers_that_are_not_finite_are_null(tmp_path):
    """JSON has no Infinity and no NaN; Python's json alone would read them."""

    def refuse(name):
        raise AssertionError(name)

    config = TrainConfig(data=tmp_path, out=tmp_path)
    with contextlib.closing(RunLog(tmp_path, config, 0)) as run_log:
        run_log.write(0, loss=float("inf"), loss_cls=1.0, loss_box=float("nan"), loss_ctr=0.5, lr=0.1)
        run_log.write(1, loss=1.0, loss_cls=1.0, loss_box=2.0, loss_ctr=0.5, lr=0.1)
        draw_curves(run_log.rows(), tmp_path / "curves.png")
    with contextlib.closing(RunLog(tmp_path, config, 0, start_step=2)):  # the rows are written again
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["loss"] for row in rows] == [None, 1.0] and rows[0]["loss_box"] is None
    path = note_not_finite(tmp_path, 0, 0, [], {"loss_cls": float("nan")}, float("-inf"))
    assert json.loads(path.read_text(), parse_constant=refuse)["losses"] == {"loss_cls": None}


@pytest.mark.parametrize("thresholds, shown", [({"red": 0.0, "green": 1.0}, {0}), ({}, set())])
def test_detections_png_shows_what_predict_shows(tiny_coco, tmp_path, monkeypatch, thresholds, shown):
    """The thresholds of the model decide, and 0.3 only where it has none: these weights score 0.244 everywhere."""
    drawn: set[int] = set()

    def draw(image, objects, names, least, **options):
        if "scores" in objects:
            drawn.update(objects["labels"][objects["scores"] >= least].tolist())
        return draw_detections(image, objects, names, least, **options)

    monkeypatch.setattr(pictures, "draw_detections", draw)
    names = ["red", "green"]
    model = create_detector("fcos", backbone="test_resnet", num_classes=2, class_names=names, thresholds=thresholds,
                            channels=64, num_convs=1, min_size=64, max_size=128)  # fmt: skip
    for part, bias in ((model.head.cls_logits, -2.0), (model.head.centerness, 0.0)):
        torch.nn.init.zeros_(part.weight)
        torch.nn.init.constant_(part.bias, bias)
    draw_comparison(model.eval(), CocoDataset(*find_split(tiny_coco, "val")), tmp_path / "detections.png")
    assert drawn == shown and (tmp_path / "detections.png").is_file()


def test_longer_names_folders_as_a_shell_wants_them(config):
    """What the new command must not repeat is named: the detector to start from has a backbone of its own."""
    config = dataclasses.replace(config, out=Path("my runs/a"), backbone="local-dir:runs/b", pretrained_backbone=True)
    text = "the same command with --init 'my runs/a/best' --out 'my runs/a-longer' and without --pretrained-backbone"
    assert longer(config) == f"{text} and without --backbone"
    assert longer(dataclasses.replace(config, backbone="resnet18")) == text


@pytest.mark.parametrize("name", ["写真.png", os.fsdecode(b"f\xfcr.png")], ids=["utf8", "other"])
def test_any_name_of_a_bad_image_is_written_down(tmp_path, monkeypatch, name):
    """Whatever the locale's encoding; on Linux, the name of a file need not be UTF-8."""
    monkeypatch.setattr(run_folder.log_own, "disabled", True)  # xdist cannot send such a name
    run_folder.note_skipped(tmp_path, 1, [Skipped(7, f"a/{name}: damaged")])
    assert not was_bad(tmp_path, Path("b") / name)
    run_folder.note_bad_image(tmp_path, 2, ImageError(f"image 7: cannot be read\n b/{name}: damaged"))
    assert was_bad(tmp_path, Path("b") / name) and was_bad(tmp_path, Path("a") / name)
