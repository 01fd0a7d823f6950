"""What can go wrong in a training run, tried in this process: nothing is lost, and nothing is silent."""

import copy
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time

import layouts
import pytest
import torch
from launch import fork, losses, rows, tiny_config
from PIL import Image

import build
import eval_coco
import runtime
import scoring
import train_coco
import training_run
import trial
from image_notes import ImageNotes
from optim import create_optimizer
from presets import TrainConfig
from run_folder import list_checkpoints, load_checkpoint, refuse_foreign, save_checkpoint
from runtime import StopSignal
from vovnet_zoo import FCOS, commands, create_detector
from vovnet_zoo.coco_eval import evaluate
from vovnet_zoo.data import CocoDataset, find_split, images
from vovnet_zoo.data.annotations import changed
from vovnet_zoo.evaluation.runs import read_run, scored_ids


@pytest.fixture
def config(tiny_coco, tmp_path) -> TrainConfig:
    return tiny_config(tiny_coco, tmp_path / "run")


def assert_same(config: TrainConfig, other: TrainConfig) -> None:
    """The two runs end with the same losses, scores and weights, to the bit."""
    assert losses(config.out) == losses(other.out) and len(losses(config.out)) == config.steps
    scores, others = ([row for row in rows(run.out) if "AP" in row] for run in (config, other))
    assert scores == others
    for name in ("best", "last"):
        ours, theirs = (FCOS.from_pretrained(run.out / name).state_dict() for run in (config, other))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# ---- signals --------------------------------------------------------------------------------------------------------


def test_a_signal_that_comes_twice_at_once_is_one_signal(monkeypatch):
    """torchrun forwards a signal to processes that have it already. Another one, later, ends the process."""
    ended = []
    monkeypatch.setattr(runtime.signal, "raise_signal", ended.append)
    with StopSignal() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.received == signal.SIGTERM and ended == []
        later = time.monotonic() + runtime.REPEAT_S + 1
        monkeypatch.setattr(runtime.time, "monotonic", lambda: later)
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [signal.SIGTERM]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_in_an_evaluation(config, monkeypatch, workers):
    """To the process and its workers, and twice: answered at the next image, and the evaluation is done again."""
    config = dataclasses.replace(config, workers=workers)
    undisturbed = dataclasses.replace(config, out=config.out.with_name("undisturbed"))
    train_coco.main(undisturbed)
    predict, scored = scoring.predict, []

    def stopped(model, images, **options):
        for found in predict(model, images, **options):
            for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
                for _ in range(2):
                    os.kill(process.pid, signal.SIGTERM)
            time.sleep(0.2)
            scored.append(found)
            yield found

    monkeypatch.setattr(scoring, "predict", stopped)
    for start in (1, 2):  # in the middle of the run, and at its next start, which begins with the evaluation
        with pytest.raises(SystemExit) as error:
            train_coco.main(config)
        assert error.value.code == 128 + signal.SIGTERM and len(scored) == start
        progress = load_checkpoint(config.out / "checkpoints")["progress"]
        assert (progress["step"], progress["scored"]) == (2, 0)
    monkeypatch.setattr(scoring, "predict", predict)
    train_coco.main(config)
    assert_same(config, undisturbed)


def test_a_signal_in_an_evaluation_alone_is_told(config, detector_folder, monkeypatch, capsys):
    predict = scoring.predict

    def stopped(*arguments, **options):
        for found in predict(*arguments, **options):
            os.kill(os.getpid(), signal.SIGINT)
            yield found

    monkeypatch.setattr(scoring, "predict", stopped)
    monkeypatch.setattr(eval_coco, "check_classes", lambda *arguments: None)
    place = config.data / "found.json"
    settings = eval_coco.EvalConfig(model=str(detector_folder), data=config.data, out=place, device="cpu")
    with pytest.raises(SystemExit) as error:
        eval_coco.main(settings)
    assert error.value.code == 128 + signal.SIGINT and not place.exists()
    assert "stopped by a signal; no scores, and no file is written" in capsys.readouterr().err


def test_a_signal_while_the_scores_are_computed(config, monkeypatch):
    def evaluate(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):
            time.sleep(0.1)
        raise AssertionError("it was not interrupted")

    monkeypatch.setattr(scoring, "evaluate", evaluate)
    with pytest.raises(SystemExit) as error:
        train_coco.main(config)
    assert error.value.code == 128 + signal.SIGINT
    assert load_checkpoint(config.out / "checkpoints")["progress"]["step"] == 2


@pytest.mark.parametrize(
    "module, work, told",
    [
        (training_run, "build_datasets", "while the run was prepared; the same command begins again"),
        (trial.Trial, "step", "while the run was prepared; the same command begins again"),
        (train_coco, "report_run", "after the last step; all is saved, and the same command writes the report"),
    ],
)
def test_a_signal_before_the_first_step_and_after_the_last(config, monkeypatch, capsys, module, work, told):
    """Ctrl-C in a terminal reaches the workers too. It is answered at once, and nothing is lost."""
    config = dataclasses.replace(config, minutes=0.01 if work == "step" else None, workers=1, steps=2, eval_every=None)
    real = getattr(module, work)

    def interrupted(*arguments, **options):
        for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
            os.kill(process.pid, signal.SIGINT)
        time.sleep(5)
        raise AssertionError("it was not interrupted")

    monkeypatch.setattr(module, work, interrupted)
    with pytest.raises(SystemExit) as error:
        train_coco.main(config)
    assert error.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err.count(f"stopped by a signal {told}") == 1
    if work == "report_run":
        monkeypatch.setattr(module, work, real)
        monkeypatch.setattr(train_coco, "draw_pictures", lambda *arguments: None)
        assert train_coco.main(config)["AP"] >= 0 and (config.out / "report.html").is_file()
    else:
        assert not (config.out / "run.json").exists()


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["compute_losses", "update", "log_step", "next_parts"])
def test_an_error_in_a_step_loses_no_step(config, monkeypatch, capsys, where):
    """Batch norm and EMA included: the finished steps are saved as if the run had been stopped after them."""
    config = dataclasses.replace(config, accum=2, ema=0.5, eval_every=None, optimizer="muon")
    undisturbed = dataclasses.replace(config, out=config.out.with_name("undisturbed"))
    train_coco.main(undisturbed)
    real, calls = getattr(train_coco, where), []

    def fails(*arguments, **options):
        calls.append(arguments)
        result = None if where in ("update", "next_parts") and len(calls) == 3 else real(*arguments, **options)
        if len(calls) == (6 if where == "compute_losses" else 3):  # two parts a step
            raise RuntimeError("out of memory")
        return result

    monkeypatch.setattr(train_coco, where, fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        train_coco.main(config)
    done = 3 if where == "log_step" else 2
    assert f"after step {done}; {done} steps are saved" in capsys.readouterr().err
    assert load_checkpoint(config.out / "checkpoints")["progress"]["step"] == done
    monkeypatch.setattr(train_coco, where, real)
    train_coco.main(config)
    for name in ("best", "last"):
        ours, theirs = (FCOS.from_pretrained(run.out / name).state_dict() for run in (config, undisturbed))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_an_error_while_the_weights_change_saves_nothing(config, monkeypatch, capsys):
    """Half of the weights may be of one step and half of the next, so the checkpoint before stays the newest."""
    config = dataclasses.replace(config, checkpoint_every=1, eval_every=None)

    def step(optimizer, closure=None):
        raise RuntimeError("device lost")

    real = train_coco.set_lr

    def set_lr(optimizer, config, at):
        if at == 2:
            monkeypatch.setattr(type(optimizer), "step", step)
        return real(optimizer, config, at)

    monkeypatch.setattr(train_coco, "set_lr", set_lr)
    with pytest.raises(RuntimeError, match="device lost"):
        train_coco.main(config)
    assert "after step 2; 2 steps are saved" in capsys.readouterr().err
    assert [path.name[:8] for path in list_checkpoints(config.out / "checkpoints")] == ["00000001", "00000002"]


def test_a_bad_validation_image_is_skipped(config, tiny_coco):
    """The run that it ended goes on with --skip-bad-images, and scores the other images."""
    (tiny_coco / "val" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="1.png"):
        train_coco.main(config)
    metrics = train_coco.main(dataclasses.replace(config, skip_bad_images=True))
    assert len(losses(config.out)) == 4 and [row["step"] for row in rows(config.out) if "AP" in row] == [2, 4]
    assert (config.out / "skipped.txt").read_text().count("image 11: ") == 2  # at both evaluations
    dataset = CocoDataset(*find_split(tiny_coco, "val"), skip_bad_images=True)
    results, found = scoring.score_dataset(FCOS.from_pretrained(config.out / "last"), dataset, note=print, workers=0)
    assert found == metrics == evaluate(dataset.annotation_file, results, image_ids=[10, 12])
    assert scored_ids(dataset, read_run(config.out).skipped) == [10, 12]
    assert "2 of" in (config.out / "report.html").read_text()
    for name in ("0.png", "2.png"):
        (tiny_coco / "val" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of its images \(3\) could be read"):
        scoring.score_dataset(FCOS.from_pretrained(config.out / "last"), dataset, note=print, workers=0)


# ---- steps that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [9, 4])  # stopped by --max-not-finite, or at the run's end before that
def test_ruined_weights_are_not_saved(config, monkeypatch, steps):
    """The checkpoints of the good steps stay, and so do `last` and `best`."""
    config = dataclasses.replace(config, steps=steps, checkpoint_every=1, eval_every=1, max_not_finite=5)
    real = train_coco.log_step

    def log_step(run, run_log, bar, step, *arguments, **values):
        real(run, run_log, bar, step, *arguments, **values)
        if step == 1:
            monkeypatch.setattr(train_coco, "next_parts", ruin(run))

    def ruin(run):
        def next_parts(*arguments):
            with torch.no_grad():
                run.model.head.cls_logits.weight.fill_(float("nan"))
            return parts(*arguments)

        return next_parts

    parts = train_coco.next_parts
    monkeypatch.setattr(train_coco, "log_step", log_step)
    with pytest.raises(RuntimeError, match="steps in a row were not finite"):
        train_coco.main(config)
    assert [path.name[:8] for path in list_checkpoints(config.out / "checkpoints")] == ["00000001", "00000002"]
    assert all(x.isfinite().all() for x in load_checkpoint(config.out / "checkpoints")["model"].values())
    for name in ("best", "last"):
        assert all(x.isfinite().all() for x in FCOS.from_pretrained(config.out / name).state_dict().values())
    assert [row["step"] for row in rows(config.out) if "AP" in row] == [1, 2]


def test_a_last_step_that_is_not_finite_ends_a_run_well(config, monkeypatch):
    """It was skipped, so the weights are as the step before left them."""
    real = train_coco.update

    def update(run, step, parts, losses, grad_norm):
        return real(run, step, parts, losses | ({"loss_box": float("nan")} if step == 3 else {}), grad_norm)

    monkeypatch.setattr(train_coco, "update", update)
    assert train_coco.main(config)["AP"] >= 0
    assert load_checkpoint(config.out / "checkpoints")["progress"]["scored"] == 4


# ---- optional packages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ImportError("no such module"), AttributeError("module has no attribute 'x'")])
@pytest.mark.parametrize("package", ["matplotlib", "tensorboard"])
def test_a_missing_or_broken_optional_package(config, monkeypatch, capsys, package, error):
    """The run says so at its start, in one line, and is complete otherwise."""

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == package:
                raise error

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    for name in [n for n in sys.modules if n.split(".")[0] == package or n in ("pictures", "torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    train_coco.main(config)
    printed = capsys.readouterr()
    start, end = printed.err.split("step 1 of", 1)
    missing = "no curves.png and detections.png" if package == "matplotlib" else "nothing for tensorboard"
    assert start.count(missing) == 1 and missing not in end and repr(error) in start
    assert "AP50" in printed.out and "best model" in end
    assert (config.out / "curves.png").is_file() == (package != "matplotlib")


def test_pictures_and_tensorboard_that_fail_later(config, monkeypatch, capsys):
    import pictures

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pictures, "draw_curves", full)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    train_coco.main(config)
    printed = capsys.readouterr()
    assert "AP50" in printed.out and "its pictures could not be drawn" in printed.err
    assert printed.err.count("nothing for tensorboard from now on") == 1 and len(losses(config.out)) == 4


# ---- several processes ----------------------------------------------------------------------------------------------


def test_live_batch_norm_on_two_processes(config):
    """Both have the same model and moving average at every checkpoint, and the logged scores are the saved model's."""
    config = dataclasses.replace(config, steps=6, eval_every=3, ema=0.5, optimizer="muon")
    fork(2, train_rank, config)
    ours, theirs = (torch.load(config.out / f"rank{rank}.pt") for rank in (0, 1))
    assert len(ours) == 4 and len(ours[0]) == 2  # saved before and after each evaluation
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    dataset = CocoDataset(*find_split(config.data, "val"))
    _, found = scoring.score_dataset(FCOS.from_pretrained(config.out / "last"), dataset, workers=0)
    logged = rows(config.out)[-1]
    assert logged["AP"] > 0 and {name: found[name] for name in logged if name != "step"} == {
        name: value for name, value in logged.items() if name != "step"
    }


def test_a_signal_to_one_of_two_processes_in_an_evaluation(config):
    """Both stop at the next image where they look, with the same exit code, and the step is saved."""
    fork(2, stop_rank, config)
    progress = load_checkpoint(config.out / "checkpoints")["progress"]
    assert (progress["step"], progress["scored"]) == (2, 0)
    assert len(losses(config.out)) == 2 and not [row for row in rows(config.out) if "AP" in row]


def stop_rank(rank: int, config: TrainConfig) -> None:
    """Be one of two processes, of which the second receives a signal at the first image of the evaluation."""
    real, scoring.LOOK_EVERY = scoring.predict, 1

    def predict(*arguments, **options):
        for found in real(*arguments, **options):
            if rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield found

    scoring.predict = predict
    with pytest.raises(SystemExit) as error:
        train_rank(rank, config)
    assert error.value.code == 128 + signal.SIGTERM


def train_rank(rank: int, config: TrainConfig) -> None:
    """Be one of two processes, and note both of its models' weights at every checkpoint."""
    real, models = train_coco.save, []

    def save(run):
        models.append([{k: x.clone() for k, x in m.state_dict().items()} for m in (run.model, run.averaged)])
        real(run)

    train_coco.save = training_run.save = save
    train_coco.main(config)
    torch.save(models, config.out / f"rank{rank}.pt")


# ---- going on with less, or with changes ----------------------------------------------------------------------------


def test_a_run_goes_on_without_what_it_started_from(config, tiny_coco, monkeypatch):
    """The checkpoint holds all weights and the model's config: no folder of --init, no Hub."""
    create_detector("fcos", backbone="test_resnet", channels=64, num_convs=1, num_classes=2).save_pretrained(
        tiny_coco / "start"
    )
    config = dataclasses.replace(config, init=str(tiny_coco / "start"))
    expected = train_coco.main(config)
    shutil.rmtree(tiny_coco / "start")
    assert train_coco.main(config) == expected
    config = dataclasses.replace(config, init=None, pretrained_backbone=True, out=config.out.with_name("pretrained"))
    real = build.create_detector
    monkeypatch.setattr(build, "create_detector", lambda *a, **k: real(*a, **k | {"pretrained_backbone": False}))
    real_backbone = build.create_backbone
    monkeypatch.setattr(build, "create_backbone", lambda name, pretrained: real_backbone(name))
    expected = train_coco.main(config)
    monkeypatch.setattr(build, "create_detector", None)
    monkeypatch.setattr(build, "create_backbone", None)
    assert train_coco.main(config) == expected


def stop_after(config: TrainConfig, step: int, monkeypatch) -> None:
    """Run the first steps of a run."""
    real = train_coco.log_step

    def log_step(run, run_log, bar, at, *arguments, **values):
        real(run, run_log, bar, at, *arguments, **values)
        if at + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train_coco, "log_step", log_step)
        train_coco.main(config)


@pytest.mark.parametrize(
    "changes",
    [
        dict(weight_decay=0.5, bias_lr_factor=3.0),
        dict(decay_norms=False, layer_decay=0.7),
        dict(optimizer="adamw"),
        dict(ema=0.5),
        dict(precision="fp16"),
        dict(test_size=96),
    ],
)
def test_allowed_changes_take_effect(config, monkeypatch, capsys, changes):
    config = dataclasses.replace(config, eval_every=None)
    stop_after(config, 2, monkeypatch)
    before = load_checkpoint(config.out / "checkpoints")
    seen, real = [], train_coco.set_lr

    def set_lr(optimizer, config, step):
        seen.append((copy.deepcopy(optimizer.state_dict()), optimizer))
        return real(optimizer, config, step)

    monkeypatch.setattr(train_coco, "set_lr", set_lr)
    changed = dataclasses.replace(config, allow_changes=True, **changes)
    train_coco.main(changed)
    assert "going on with changes" in capsys.readouterr().err and len(losses(config.out)) == 4
    model = FCOS.from_pretrained(config.out / "last")
    assert model.config["min_size"] == changed.test_size
    state, optimizer = seen[0]
    fresh = create_optimizer(model, changed).state_dict()["param_groups"]
    for key in ("weight_decay", "lr_factor", "params"):
        assert [group[key] for group in state["param_groups"]] == [group[key] for group in fresh]
    assert bool(state["state"]) == ("optimizer" not in changes)
    after = load_checkpoint(config.out / "checkpoints")
    momenta = dict(zip(before["parameters"], (before["optimizer"]["state"][i] for i in range(1000)), strict=False))
    for i, name in enumerate(after["parameters"] if state["state"] else []):
        torch.testing.assert_close(state["state"][i], momenta[name])
    assert ("ema" in after) == (changed.ema is not None)


def test_the_network_cannot_change(config, monkeypatch):
    stop_after(config, 1, monkeypatch)
    with pytest.raises(ValueError, match="of another network.*channels: was 64, now 96.*--init"):
        train_coco.main(dataclasses.replace(config, channels=96, allow_changes=True))


def test_a_field_that_is_newer_than_the_checkpoint(config):
    """It had its default value then, and has lost its meaning if it is gone today."""
    expected = train_coco.main(config)
    state = load_checkpoint(config.out / "checkpoints")
    del state["run"]["grad_checkpointing"], state["run"]["clip_grad"]
    save_checkpoint(config.out / "checkpoints", 4, state)
    assert train_coco.main(config) == expected
    with pytest.raises(ValueError, match="clip_grad: was None, now 3.0"):
        train_coco.main(dataclasses.replace(config, clip_grad=3.0))


# ---- places and memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["folder", "file/detections.json", "sealed/detections.json"])
def test_a_place_for_detections_that_cannot_be_written(config, tiny_detector, monkeypatch, place):
    """It is found out before the first image."""
    tiny_detector.save_pretrained(config.data / "model")
    for name in ("folder", "sealed"):
        (config.data / name).mkdir()
    (config.data / "file").touch()
    real = commands.tempfile.TemporaryFile

    def temporary(dir):
        if dir.name == "sealed":
            raise PermissionError(13, "Permission denied")
        return real(dir=dir)

    monkeypatch.setattr(commands.tempfile, "TemporaryFile", temporary)
    monkeypatch.setattr(eval_coco, "score_dataset", None)
    settings = eval_coco.EvalConfig(model=str(config.data / "model"), data=config.data, out=config.data / place)
    with pytest.raises(ValueError, match=f"--out .*{place} (is a folder|cannot be written)"):
        eval_coco.main(settings)


def test_thresholds_that_cannot_be_written(config, tiny_detector, monkeypatch):
    """It is found out before the first image, as of a model that belongs to somebody else."""
    pytest.importorskip("hotcoco")
    tiny_detector.save_pretrained(config.data / "model")

    def temporary(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(commands.tempfile, "TemporaryFile", temporary)
    monkeypatch.setattr(eval_coco, "load_detector", None)
    settings = eval_coco.EvalConfig(model=str(config.data / "model"), data=config.data, save_thresholds=True)
    with pytest.raises(ValueError, match="--save-thresholds: .*config.json cannot be written .*Permission denied"):
        eval_coco.main(settings)


@pytest.mark.parametrize("option, name", [("out", "annotations/instances_val.json"), ("report", "train/1.png")])
def test_an_evaluation_writes_over_no_file_of_the_user(config, monkeypatch, option, name):
    """Files that it wrote itself are written anew."""
    monkeypatch.setattr(eval_coco, "score_dataset", None)
    settings = eval_coco.EvalConfig(model=str(config.data / "model"), data=config.data)
    before = (config.data / name).read_bytes()
    with pytest.raises(ValueError, match=f"--{option} .*{name} is there already, and no file that this command wrote"):
        eval_coco.main(dataclasses.replace(settings, **{option: config.data / name}))
    assert (config.data / name).read_bytes() == before
    for begins, content in ((b"[", b"[]"), (b"[", b""), (b"<!DOCTYPE html>", b"<!DOCTYPE html>\n")):
        (config.data / "ours").write_bytes(content)
        runtime.check_out(config.data / "ours", begins)


def test_a_folder_of_the_user_is_no_run_folder(config):
    """What a run would write over stays; a folder with other files in it may become a run's."""
    (config.out / "best").mkdir(parents=True)
    for name in ("report.html", "notes.txt"):
        (config.out / name).write_text("mine")
    with pytest.raises(ValueError, match=r"is no run folder.*\(best, report.html\); give another --out"):
        train_coco.main(config)
    assert (config.out / "report.html").read_text() == "mine" and not (config.out / "run.json").exists()
    (config.out / "report.html").unlink()
    (config.out / "best").rmdir()
    refuse_foreign(config.out)


def test_too_little_memory_is_no_damaged_image(config, monkeypatch):
    """--skip-bad-images must not leave out every image of a machine that has too little memory."""

    def decode(*arguments):
        raise MemoryError

    monkeypatch.setattr(images, "_decode", decode)
    with pytest.raises(MemoryError):
        train_coco.main(dataclasses.replace(config, skip_bad_images=True))


# ---- images that were replaced --------------------------------------------------------------------------------------


def other_pixels(path):
    """Change the pixels of a PNG; returns the bytes before. Most have another size then, so the file is filled up."""
    before = path.read_bytes()
    picture = Image.open(path)
    Image.new("RGB", picture.size, "blue").save(path)
    path.write_bytes(path.read_bytes().ljust(len(before), b"\0"))
    assert path.stat().st_size == len(before)
    return before


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_replaced_image_is_noticed(config, monkeypatch, split):
    """Another content of equal size is refused; a copied or touched file, or one that was put back, is not."""
    expected = train_coco.main(dataclasses.replace(config, out=config.out.with_name("undisturbed")))
    stop_after(config, 2, monkeypatch)
    path = config.data / split / "2.png"
    before = other_pixels(path)
    with pytest.raises(
        ValueError, match=f"1 image file is another than when the run began: {split}/2.png.*--allow-changes"
    ):
        train_coco.main(config)
    path.write_bytes(before)
    for image in (config.data / "train").iterdir():
        os.utime(image, (1, 1))
    moved = dataclasses.replace(config, data=config.data / "moved")
    for name in ("annotations", "train", "val"):
        shutil.copytree(config.data / name, moved.data / name)
    assert train_coco.main(moved) == expected


@pytest.mark.parametrize(
    "make, file", [(layouts.hf_parquet, "data/{}-00000-of-00001.parquet"), (layouts.hf_saved, "{}/*.arrow")]
)
def test_a_replaced_table_is_noticed(tmp_path, make, file):
    pytest.importorskip("datasets")
    make(tmp_path)
    for word, name in (("train", "train"), ("val", "validation")):
        (path,) = tmp_path.glob(file.format(name))
        folder, source = find_split(tmp_path, word)
        datasets = {word: CocoDataset(folder, changed(source, dict))}
        first = ImageNotes(tmp_path / f"{word}.json", datasets, goes_on=False)
        first.start()
        first.close()
        os.utime(path, (1, 1))
        assert ImageNotes(first.path, datasets, goes_on=True).changed() == []
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        assert ImageNotes(first.path, datasets, goes_on=True).changed() == [f"{word}/{path.relative_to(tmp_path)}"]


def test_a_replaced_image_can_be_allowed(config, monkeypatch, capsys):
    stop_after(config, 2, monkeypatch)
    other_pixels(config.data / "train" / "2.png")
    train_coco.main(dataclasses.replace(config, allow_changes=True))
    assert "going on with changes: 1 image file is another" in capsys.readouterr().err
    train_coco.main(config)  # noted anew


def test_an_image_that_stopped_a_run_may_be_repaired(config):
    """The same command goes on, as the message of the damaged image says."""
    path = config.data / "val" / "1.png"
    content = path.read_bytes()
    for damage in (b"not a picture", None):
        path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(ValueError, match="1.png"):
            train_coco.main(config)
    path.write_bytes(content)
    train_coco.main(config)
    assert len(losses(config.out)) == 4


@pytest.mark.parametrize("damage", ["{", "[1]", '{"train/0.png": 3}', None])
def test_damaged_notes_of_images(config, monkeypatch, capsys, damage):
    """They stop no run. A run that is older than the notes has none."""
    stop_after(config, 2, monkeypatch)
    notes = config.out / "images.json"
    assert len(json.loads(notes.read_text())) == 11
    notes.unlink() if damage is None else notes.write_text(damage)
    train_coco.main(config)
    assert ("images.json is damaged" in capsys.readouterr().err) == (damage is not None)
    assert all(len(digest) == 64 for _, _, digest in json.loads(notes.read_text()).values())
