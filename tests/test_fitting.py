"""What `finetune` chooses by the data and the machine, and that what is typed wins."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from launch import rows, train
from test_faults import stop_after

import fitting
import train_coco
from fitting import fit_batch, fit_precision, fit_schedule, fit_size, fit_steps, probe_batch
from presets import FIT, FIT_PRETRAINED, PRESETS, TrainConfig, parse
from run_folder import load_checkpoint, save_checkpoint
from seeds import check_seeds, compare_seeds
from training_run import set_up
from trial import Trial, blank_batch, largest_input
from vovnet_zoo.data import CocoDataset, find_split
from vovnet_zoo.data.sizes import size_for

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FINETUNE = PRESETS["finetune"][1]


@pytest.fixture
def cores(monkeypatch):
    """Pretend that this process may use so many cores."""
    return lambda count: monkeypatch.setattr(fitting, "count_cores", lambda: count)


# ---- sizes ----------------------------------------------------------------------------------------------------------


def boxes_of(side: float, count: int = 100) -> np.ndarray:
    return np.tile(np.array([[10.0, 10.0, 10 + side, 10 + side]], np.float32), (count, 1))


@pytest.mark.parametrize(
    "side, image, most, expected",
    [
        (24, (480, 640), 640, 320),  # 16 pixels at a size of 320
        (20, (480, 640), 640, 384),
        (20, (480, 640), 352, 352),
        (5, (480, 640), 640, 480),  # no more than the images have
        (5, (1080, 1920), 640, 640),
        (5, (1080, 1920), 800, 800),
        (50, (200, 200), 640, 320),
    ],
)
def test_small_boxes_ask_for_more_pixels(side, image, most, expected):
    size, why = size_for(boxes_of(side), np.tile(image, (100, 1)), most)
    assert size == expected and (size == 320 or f"{(expected / 320) ** 2:.1f} times the time" in why)
    mixed = np.concatenate([boxes_of(side, 11), boxes_of(200, 89)])
    assert size_for(mixed, np.tile(image, (100, 1)), most)[0] == expected  # a tenth is small
    mixed = np.concatenate([boxes_of(side, 9), boxes_of(200, 91)])
    assert size_for(mixed, np.tile(image, (100, 1)), most)[0] == 320
    assert size_for(boxes_of(side, 0), np.zeros((0, 2)), most)[0] == 320


def test_typed_sizes_win(tiny_coco):
    _, source = find_split(tiny_coco, "train")
    fit = functools.partial(fit_size, source=source, device=CPU)

    def sizes(config):
        return config.test_size, config.min_size, config.max_size

    assert sizes(fit(FINETUNE)[0]) == (320, (288, 352), 640)
    assert sizes(fit(dataclasses.replace(FINETUNE, max_size=300))[0]) == (300, (270, 300), 300)
    assert sizes(fit(dataclasses.replace(FINETUNE, test_size=200))[0]) == (200, (180, 220), 400)
    assert sizes(fit(dataclasses.replace(FINETUNE, min_size=(64, 96)))[0]) == (320, (64, 96), 640)
    assert sizes(fit(dataclasses.replace(FINETUNE, min_size=(700, 800)))[0]) == (320, (700, 800), 800)
    with pytest.raises(ValueError, match="test_size=400: .*max_size=300"):
        fit(dataclasses.replace(FINETUNE, test_size=400, max_size=300))
    typed = TrainConfig(data=None, out=None)
    assert fit(typed) == (typed, [])


# ---- batch and steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, batch, workers", [(1, 4, 1), (2, 4, 1), (8, 8, 2), (15, 8, 3), (96, 16, 4)])
def test_cores_choose_batch_and_workers(cores, count, batch, workers):
    cores(count)
    config, why = fit_batch(FINETUNE, None, CPU, 1, None)
    assert config.batch_size == batch and f"({count} core" in why
    assert fitting.fit_workers(FINETUNE, CPU)[0].workers == workers
    assert fitting.fit_workers(FINETUNE, GPU)[0].workers == min(count, 8)
    assert fit_batch(dataclasses.replace(FINETUNE, accum=3), None, CPU, 2, None)[0].batch_size % 6 == 0
    assert fit_batch(dataclasses.replace(FINETUNE, batch_size=5), None, CPU, 1, None)[0].batch_size == 5


@pytest.mark.parametrize(
    "images, batch, device, pretrained, steps",
    [
        (205, 4, CPU, False, 615),  # BCCD
        (205, 4, CPU, True, 410),
        (50, 4, CPU, False, 600),
        (205, 16, GPU, False, 600),
        (1000, 4, CPU, False, 3000),
        (100_000, 4, CPU, False, 6000),
        (10_000, 16, GPU, False, 7500),
        (10**6, 16, GPU, False, 90_000),
    ],
)
def test_the_number_of_images_chooses_the_steps(images, batch, device, pretrained, steps):
    fit = FIT_PRETRAINED if pretrained else FIT
    config, why = fit_steps(dataclasses.replace(FINETUNE, batch_size=batch), images, device, fit)
    assert config.steps == steps and str(steps) in why and str(images) in why
    typed = dataclasses.replace(config, steps=7)
    assert fit_steps(typed, images, device, fit) == (typed, "")


def test_the_schedule_follows_the_batch(tiny_coco, cores):
    cores(2)
    train_set, val_set = (CocoDataset(*find_split(tiny_coco, split)) for split in ("train", "val"))
    fit = functools.partial(fit_schedule, train_set=train_set, val_set=val_set, device=CPU, world_size=1, try_out=None)
    config, why = fit(FINETUNE)
    found = (config.batch_size, config.steps, config.lr, config.warmup_steps, config.eval_every, config.workers)
    assert found == (4, 600, 2e-3, 50, 60, 1) and len(why) == 3
    assert fit(dataclasses.replace(FINETUNE, batch_size=16))[0].lr == 4e-3
    assert fit(dataclasses.replace(FINETUNE, batch_size=16, optimizer="momentum"))[0].lr == 8e-3
    short = fit(dataclasses.replace(FINETUNE, steps=25))[0]
    assert (short.warmup_steps, short.eval_every) == (2, 3)
    typed = fit(dataclasses.replace(FINETUNE, lr=1.0, warmup_steps=9, eval_every=7, evals=None))[0]
    assert (typed.lr, typed.warmup_steps, typed.eval_every) == (1.0, 9, 7)
    assert fit(dataclasses.replace(FINETUNE, epochs=5.0))[0].steps == 10
    few = dataclasses.replace(FINETUNE, batch_size=4, steps=100)
    assert [fitting.num_evals(few, count) for count in (10, 18, 100, 10**6)] == [10, 10, 1, 1]
    assert fitting.num_evals(dataclasses.replace(few, evals=20), 10**6) == 20  # typed


@pytest.mark.parametrize("amx", [False, True])
def test_units_for_bf16_choose_the_precision(monkeypatch, amx):
    monkeypatch.setattr(fitting, "has_amx", lambda: amx)
    config, why = fit_precision(FINETUNE, CPU)
    assert config.precision == ("bf16" if amx else "float32") and bool(why) == amx
    assert fit_precision(FINETUNE, GPU)[0].precision == "float32"
    typed = dataclasses.replace(FINETUNE, precision="float32")
    assert fit_precision(typed, CPU) == (typed, [])
    assert fitting.fit_plan(FINETUNE, 205, CPU).precision == config.precision
    begun = {"precision": "'bf16'", "eval_every": "60"}
    assert fitting.kept(FINETUNE, begun).precision == "bf16"  # a run goes on as it began


def test_a_plan_has_no_data(cores):
    cores(2)
    config = fitting.fit_plan(FINETUNE, 205, CPU)
    found = (config.test_size, config.batch_size, config.steps, config.lr, config.warmup_steps, config.eval_every)
    assert found == (320, 4, 615, 2e-3, 50, 62)
    assert (fitting.fit_plan(FINETUNE, 205, GPU).batch_size, fitting.fit_plan(FINETUNE, 205, GPU).steps) == (16, 600)
    v39 = PRESETS["v39_1x"][1]
    assert fitting.fit_plan(v39, 118_287, GPU) == v39


def test_epochs_are_another_word_for_steps():
    config = parse(["v39_1x", "--data", "x", "--epochs", "6"])
    fitted, why = fit_steps(config, 1600, CPU, FIT)
    assert (fitted.steps, fitted.milestones, why) == (600, (400, 533), "")
    with pytest.raises(ValueError, match="--epochs and --steps both say how long"):
        parse(["finetune", "--data", "x", "--epochs", "6", "--steps", "3"])
    assert parse(["finetune", "--data", "x", "--eval-every", "6"]).evals is None


def test_published_presets_leave_nothing_open(tiny_coco):
    for name, (_, preset) in PRESETS.items():
        open_fields = {name for name in fitting.FITTED if getattr(preset, name) is None}
        assert bool(open_fields) == (name == "finetune")
        if name != "finetune":
            assert fit_size(preset, None, CPU) == fit_precision(preset, CPU) == (preset, [])
            fitted = fit_schedule(preset, [0] * 8, [0] * 3, CPU, 1, None)
            assert fitted == (preset, [])


# ---- memory ---------------------------------------------------------------------------------------------------------


class FakeMemory:
    """The memory of a GPU that a network and its states fill up to `fixed`, and each image of a step by `image`."""

    def __init__(self, free: int, fixed: int, image: int, monkeypatch):
        self.free, self.fixed, self.image, self.seen = free, fixed, image, []
        real = Trial.step

        def step(trial, parts):
            self.seen.append(len(parts[0]["images"]))
            if self.peak() > free:
                raise torch.OutOfMemoryError
            before = [p.clone() for p in trial.model.parameters()]
            real(trial, parts)
            changed = [not torch.equal(a, b) for a, b in zip(before, trial.model.parameters(), strict=True)]
            assert sum(changed) > 0.5 * len(changed)  # forward, backward and update were real
            assert len(trial.optimizer.state) == len(changed) and trial.ema

        monkeypatch.setattr(Trial, "step", step)

    def peak(self) -> int:
        return self.fixed + self.image * max(self.seen, default=0)


@pytest.mark.parametrize(
    "free, fixed, tried, expected",
    [(100, 4, [2, 4, 8], 8), (100, 6, [2, 4, 8], 4), (100, 80, [2], None), (100, 30, [2, 4, 8], 4), (46, 4, [2, 4], 2)],
)
def test_the_batch_fits_into_the_memory_of_a_gpu(tiny_coco, monkeypatch, free, fixed, tried, expected):
    """Ten bytes an image: 85 of 100 may be used."""
    memory = FakeMemory(free, fixed, 10, monkeypatch)
    train_set = CocoDataset(*find_split(tiny_coco, "train"))
    config = dataclasses.replace(
        FINETUNE, model="fcos", backbone="test_resnet", channels=64, num_convs=1, test_size=64, min_size=(48, 64),
        max_size=96,
    )  # fmt: skip
    state = torch.random.get_rng_state()
    try_out = functools.partial(Trial, train_set=train_set, start=None, known=None, device=CPU)
    if expected is None:
        with pytest.raises(ValueError, match="2 images of 96x64 pixels does not fit .* free on the GPU; lower"):
            probe_batch(config, train_set, try_out, memory, most=8)
    else:
        assert probe_batch(config, train_set, try_out, memory, most=8)[0] == expected
    assert memory.seen == tried and torch.equal(torch.random.get_rng_state(), state)


def test_the_largest_input_of_a_batch():
    config = TrainConfig(data=None, out=None, min_size=(64, 100), max_size=200)
    assert largest_input(np.array([[100, 100], [50, 100]]), config) == (128, 224)
    assert largest_input(np.array([[100, 100], [50, 50]]), config) == (128, 128)  # wide and tall are never together
    assert largest_input(np.array([[100, 300], [300, 100], [300, 80]]), config) == (96, 224)
    assert blank_batch(2, 64, 96)["images"].shape == (2, 3, 64, 96)


# ---- runs -----------------------------------------------------------------------------------------------------------

TINY_FIT = dict(
    model="fcos", backbone="test_resnet", channels=64, num_convs=1, test_size=64, max_size=96, device="cpu",
    precision="float32",
)  # fmt: skip


@pytest.fixture
def config(tiny_coco, tmp_path, monkeypatch) -> TrainConfig:
    for name in ("report_run", "draw_pictures"):  # they take most of the time of a short run
        monkeypatch.setattr(train_coco, name, lambda *arguments: None)
    return dataclasses.replace(FINETUNE, data=tiny_coco, out=tmp_path / "run", workers=0, **TINY_FIT)


def test_a_run_goes_on_with_what_it_chose(config, cores, monkeypatch, capsys):
    """Another machine would choose another batch, learning rate and schedule."""
    cores(2)
    stop_after(config, 2, monkeypatch)
    assert "chosen, since not typed: 4 images a step (2 cores); 600 steps" in capsys.readouterr().err
    chosen = json.loads((config.out / "run.json").read_text())["config"]
    assert (chosen["steps"], chosen["batch_size"], chosen["eval_every"], chosen["min_size"]) == (600, 4, 60, [57, 70])
    cores(64)
    run = set_up(config, 0, 1, CPU)
    assert run.progress.step == 3 and (run.config.steps, run.config.batch_size, run.config.lr) == (600, 4, 2e-3)
    assert "chosen" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="batch_size: was 4, now 8"):
        set_up(dataclasses.replace(config, batch_size=8), 0, 1, CPU)
    with pytest.raises(ValueError, match="steps: was 600, now 20.*to train longer: .*--init .*best --out .*-longer"):
        set_up(dataclasses.replace(config, epochs=10.0), 0, 1, CPU)


def test_a_checkpoint_of_version_0_2_goes_on(config, monkeypatch):
    """Its `finetune` had 600 steps of 4 images, and was scored at the end only."""
    old = dataclasses.replace(
        config, batch_size=4, steps=600, lr=2e-3, warmup_steps=50, min_size=(60, 70), evals=None, eval_every=None
    )
    stop_after(old, 2, monkeypatch)
    state = load_checkpoint(config.out / "checkpoints")
    new = {"epochs", "minutes", "evals", "patience", "seeds", "loggers"}
    state["run"] = {name: text for name, text in state["run"].items() if name not in new}
    save_checkpoint(config.out / "checkpoints", 3, state)
    run = set_up(config, 0, 1, CPU)
    assert (run.config.steps, run.config.eval_every, run.config.min_size) == (600, None, (60, 70))


def test_minutes(config, monkeypatch, capsys):
    """Steps and evaluations that take so long, by the clock of the trial, fit into the time; then the run is one of so
    many steps, to the bit, and goes on as such."""
    trials = []
    real = Trial.step_seconds

    def step_seconds(trial, *arguments):
        trials.append(real(trial, *arguments))
        return 10.0

    monkeypatch.setattr(Trial, "step_seconds", step_seconds)
    monkeypatch.setattr(Trial, "eval_seconds", lambda *arguments: 1.0)  # three images
    timed = dataclasses.replace(config, minutes=1.0, out=config.out.with_name("timed"))
    stop_after(timed, 1, monkeypatch)
    assert trials[0] > 0
    train_coco.main(timed)
    steps = [row["step"] for row in rows(timed.out) if "loss" in row]
    assert steps == list(range(1, len(steps) + 1)) and 3 <= len(steps) <= 6 and len(trials) == 1
    train_coco.main(dataclasses.replace(config, steps=len(steps)))
    assert [row.get("loss") for row in rows(config.out)] == [row.get("loss") for row in rows(timed.out)]
    printed = capsys.readouterr().err
    assert "1 minute at 10.00 s a step" in printed and f"step {len(steps)} of {len(steps)}: loss" in printed
    epochs = f"({len(steps) / 2:g} epochs)"
    for fact in ("8 images to train on, 3 to score on", "FCOS on test_resnet, 0.", "on cpu", epochs):
        assert fact in printed
    assert "\r" not in printed and "\x1b" not in printed  # no bar where there is no terminal


def test_the_time_of_an_evaluation(config, tiny_coco):
    fitted = dataclasses.replace(config, batch_size=2, min_size=(60, 70))
    trial = Trial(fitted, CocoDataset(*find_split(tiny_coco, "train")), None, None, CPU)
    assert 0 < trial.eval_seconds(CocoDataset(*find_split(tiny_coco, "val")), 2) < 60 and trial.model.training


def test_patience(config, capsys):
    config = dataclasses.replace(config, steps=9, evals=None, eval_every=1, patience=2, lr=1e-12, ema=None)
    for _ in range(2):  # the second finds nothing to do
        train_coco.main(config)
        assert [row["step"] for row in rows(config.out) if "loss" in row] == [1, 2, 3]
        assert [row["step"] for row in rows(config.out) if "AP" in row] == [1, 2, 3]
    printed = capsys.readouterr().err
    assert printed.count("the run ends after step 3: 2 evaluations in a row gave no better AP") == 1
    assert printed.count("nothing is left to train: the run ended after step 3") == 1
    assert printed.count("best model") == 2 and "to train longer: the same command with --init" in printed


def test_nothing_to_score_is_no_worse_score(config, capsys):
    file = config.data / "annotations" / "instances_val.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": []}))
    train_coco.main(dataclasses.replace(config, steps=4, evals=None, eval_every=1, patience=1, ema=None))
    assert [row["AP"] for row in rows(config.out) if "AP" in row] == [-1] * 4
    printed = capsys.readouterr().err
    assert printed.count("AP -, AP50 -") == 4 and "(AP -); to train longer" in printed and "-1.000" not in printed
    assert "best AP -" in printed


@pytest.mark.slow
@pytest.mark.parametrize("options, steps", [("--steps 9 --eval-every 1 --patience 2", 3), ("--minutes 0.2", None)])
def test_two_processes_end_together(tiny_coco, tmp_path, options, steps):
    """One of them knows the AP, and each has times of its own."""
    train(tiny_coco, tmp_path / "run", f"--lr 1e-12 --workers 0 {options}", processes=2)
    done = [row["step"] for row in rows(tmp_path / "run") if "loss" in row]
    assert done == list(range(1, (steps or len(done)) + 1)) and done


def test_seeds(config, capsys):
    config = dataclasses.replace(config, steps=1, seeds=2, seed=5)
    found = train_coco.main(config)
    assert found == json.loads((config.out / "seeds.json").read_text())
    ap = [max(row["AP"] for row in rows(config.out / name) if "AP" in row) for name in ("seed5", "seed6")]
    assert list(found["AP"].values()) == ap and found["mean"] == pytest.approx(sum(ap) / 2)
    assert found["deviation"] == pytest.approx(abs(ap[0] - ap[1]) / 2**0.5)
    assert rows(config.out / "seed5")[0]["loss"] != rows(config.out / "seed6")[0]["loss"]
    assert "best AP of 2 seeds" in capsys.readouterr().out
    assert train_coco.main(config) == found and len(rows(config.out / "seed5")) == 2
    with pytest.raises(
        ValueError, match="results of the seeds 5, 6, .*another --out, or --seed 5 --seeds 5 for all of"
    ):
        train_coco.main(dataclasses.replace(config, seed=8))
    assert json.loads((config.out / "seeds.json").read_text()) == found and not (config.out / "seed8").exists()
    check_seeds(dataclasses.replace(config, seeds=3))  # its results are among the results of more seeds
    (config.out / "seeds.json").write_text("[1]")
    with pytest.raises(ValueError, match="no file that this command wrote"):
        train_coco.main(config)


def test_seeds_without_a_score(tmp_path, capsys):
    """Where no held-out image has a box, the AP of a run is -1, which is no number to average."""
    found = compare_seeds(TrainConfig(data=tmp_path, out=tmp_path, seeds=2), [-1.0, -1.0])
    assert found["mean"] is None and found == json.loads((tmp_path / "seeds.json").read_text())
    assert "nothing to score (-, -)" in capsys.readouterr().out
