"""The planner counts the work of a real step, computes what its formulas say, and reads what it measured."""

import dataclasses
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from launch import ROOT, tiny_config
from torch.utils.flop_counter import FlopCounterMode

import calibration
import plan
import presets
import step_work
from build import build_model, prepare_for_training
from fitting import fit_plan
from memory import kept_by
from presets import TrainConfig
from step import compute_losses, find_targets
from vovnet_zoo import FCOSLoss, cli
from vovnet_zoo.commands import CommandError
from vovnet_zoo.gpus import GPUS, find_gpu
from vovnet_zoo.planning import (
    LINK,
    Calibration,
    Measured,
    Schedule,
    StepWork,
    assumptions,
    forecast,
    measured_model,
    memory_bytes,
    ring_seconds,
)

WORK = StepWork(
    flops=1.5e12, forward_flops=0.5e12, launches=2000, forward_launches=900, kept_bytes=1e9, weight_bytes=120_000_000,
    gradient_bytes=120_000_000, state_bytes=120_000_000, pixels=1e6, most_pixels=1_100_000,
)  # fmt: skip
SCHEDULE = Schedule(
    steps=90_000, batch_size=16, accum=1, workers=8, precision="float32", compiled=False,
    evaluations=6, images=118_287,
)  # fmt: skip


# ---- the formulas


def test_few_images_on_each_gpu_are_bound_by_launches():
    rows = {row.gpus: row for row in forecast(WORK, SCHEDULE, [1, 2, 4, 8], GPUS["l4"])}
    assert rows[1].bound == "compute" and rows[1].step_s / rows[2].step_s == pytest.approx(2, rel=0.05)
    slow = dataclasses.replace(WORK, launches=200_000)
    rows = {row.gpus: row for row in forecast(slow, SCHEDULE, [1, 8], GPUS["h100"], price=2.0)}
    assert rows[8].bound == "launches" and rows[8].step_s == pytest.approx(rows[1].step_s, rel=0.01)
    assert rows[8].money == pytest.approx(2.0 * 8 * rows[8].hours)
    assert rows[1].money is not None and rows[1].hours > 90_000 * rows[1].step_s / 3600


def test_a_slow_loader_bounds_a_step():
    light = dataclasses.replace(WORK, flops=1e11)
    (enough,) = forecast(light, SCHEDULE, [1], GPUS["h100"])
    (few,) = forecast(light, dataclasses.replace(SCHEDULE, workers=1), [1], GPUS["h100"])
    (none,) = forecast(light, dataclasses.replace(SCHEDULE, workers=0), [1], GPUS["h100"])
    assert none.bound == "loader" and none.step_s == pytest.approx(few.step_s + enough.step_s, rel=0.01)
    assert enough.bound != "loader" and few.bound == "loader" and few.step_s > enough.step_s
    assert few.workers == enough.workers > 1 and enough.cores == enough.workers + 1


def test_memory_grows_with_the_images_and_must_fit():
    two, four = (memory_bytes(WORK, SCHEDULE, images, None) for images in (2, 4))
    assert four - two == 2 * WORK.kept_bytes
    halves = dataclasses.replace(SCHEDULE, accum=2)
    assert memory_bytes(WORK, halves, 4, None) == two
    one, eight = forecast(WORK, SCHEDULE, [1, 8], GPUS["t4"])
    assert not one.fits and eight.fits


def test_an_all_reduce_hides_behind_the_backward_pass():
    one, eager = forecast(WORK, SCHEDULE, [1, 2], GPUS["l4"])
    _, compiled = forecast(WORK, dataclasses.replace(SCHEDULE, compiled=True), [1, 2], GPUS["l4"])
    whole = ring_seconds(WORK.gradient_bytes, 2, 0.5 * 31.5e9)
    assert one.exposed_s == 0 < eager.exposed_s < compiled.exposed_s == pytest.approx(whole)
    assert ring_seconds(1e9, 4, 1e9) == pytest.approx(1.5)


def test_cuda_graphs_leave_few_launches():
    """A step of few images is as short as the GPU's work, and its gradients are sent when all are there."""
    recorded = dataclasses.replace(SCHEDULE, recorded=True)
    rows = {row.gpus: row for row in forecast(WORK, SCHEDULE, [1, 8], GPUS["h100"])}
    faster = {row.gpus: row for row in forecast(WORK, recorded, [1, 8], GPUS["h100"])}
    assert rows[8].bound == "launches" and faster[8].bound == "compute"
    assert faster[8].step_s < 0.7 * rows[8].step_s and faster[1].step_s == pytest.approx(rows[1].step_s)
    assert faster[8].exposed_s == pytest.approx(ring_seconds(WORK.gradient_bytes, 8, 0.5 * 450e9))
    assert "launches that are left" in assumptions(recorded, GPUS["h100"], None)
    config = presets.parse(["v39_1x"])
    assert plan.schedule_of(config, 100, "cuda").recorded
    assert not plan.schedule_of(config, 100, "cpu").recorded
    assert not plan.schedule_of(dataclasses.replace(config, grad_checkpointing=True), 100, "cuda").recorded
    # evaluations are not recorded
    hours = [
        forecast(WORK, dataclasses.replace(x, evaluations=1000), [8], GPUS["h100"])[0] for x in (SCHEDULE, recorded)
    ]
    seconds = [row.hours * 3600 - SCHEDULE.steps * row.step_s for row in hours]
    assert seconds[0] == pytest.approx(seconds[1])


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="--batch-size 16 cannot be shared out over 3 GPUs"):
        forecast(WORK, SCHEDULE, [3], GPUS["h100"])
    with pytest.raises(ValueError, match="bf16: a T4 does not compute in it; give float32 or fp16"):
        forecast(WORK, dataclasses.replace(SCHEDULE, precision="bf16"), [1], GPUS["t4"])
    with pytest.raises(ValueError, match="--calibrate"):
        forecast(WORK, SCHEDULE, [1], None)


def test_a_calibration_gives_back_what_was_measured():
    host, per_pixel, sync = 0.05, 1e-8, 0.004
    steps = tuple(Measured(n, 1e6, max(host, n * 1e6 * per_pixel) + sync, 5e9) for n in (16, 8, 4, 2))
    found = Calibration("a GPU", steps, loader_images_per_s=100.0, start_s=20.0)
    model = measured_model(found)
    assert (model.host, model.gpu_per_pixel, model.sync) == pytest.approx((host, per_pixel, sync))
    rows = forecast(WORK, SCHEDULE, [1, 2, 4, 8], GPUS["h100"], found)
    for row, step in zip(rows, steps, strict=True):
        assert row.step_s - row.exposed_s == pytest.approx(step.seconds)
        assert row.memory_gib == pytest.approx(5e9 / 2**30 + 1)
    assert rows[0].workers == 1 and "calibration on a GPU" in assumptions(SCHEDULE, None, found)["host"].source
    (alone,) = forecast(WORK, SCHEDULE, [1], None, dataclasses.replace(found, steps=steps[:1]))
    assert alone.step_s == pytest.approx(steps[0].seconds)


def test_data_sheets():
    for gpu in GPUS.values():
        assert gpu.tflops["float32"] <= gpu.tflops["fp16"] and gpu.source
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA L40S": "l40s", "NVIDIA L4": "l4", "Tesla T4": "t4"}
    names |= {"NVIDIA GeForce RTX 4090": "rtx4090", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA H100 PCIe": None}
    assert {name: find_gpu(name) for name in names} == names
    assert find_gpu("2 CPU cores") is None and find_gpu("NVIDIA L40") is None


# ---- the work that is counted


def test_the_work_is_that_of_a_real_step(tiny_coco, tmp_path):
    """FLOPs, activations and kernels of fake tensors are as of real ones of the same size."""
    config = dataclasses.replace(tiny_config(tiny_coco, tmp_path), frozen_norm=True)
    work, (height, width) = step_work.count_work(config), step_work.largest_size(config)
    model = build_model(config, [str(i) for i in range(80)], list(range(80)), None)
    prepare_for_training(model, dataclasses.replace(config, winograd=False), torch.device("cpu"))
    criterion, images = FCOSLoss.of(model), torch.zeros(1, 3, height, width, dtype=torch.uint8)
    boxes, labels = torch.tensor([[[4.0, 4, 40, 40]] * 16]), torch.zeros(1, 16, dtype=torch.int64)
    losses = {}

    def forward():
        targets, normalizers = find_targets(model, criterion, boxes, labels, height, width)
        sizes = torch.tensor([[height, width]])
        losses.update(compute_losses(model, criterion, images, sizes, targets, normalizers, config.precision))

    with step_work.CountKernels() as kernels, FlopCounterMode(display=False) as counter:
        kept = kept_by(forward) * 2**20
        saved = step_work.saved_launches(model, config.precision != "float32")
        assert (work.forward_launches, work.kept_bytes) == (kernels.launches - saved[0], kept)
        sum(losses.values()).backward()
    assert work.flops / work.pixels == pytest.approx(counter.get_total_flops() / (height * width))
    update = work.launches + sum(saved) - kernels.launches  # tensors go together in it
    assert 0 < update < 60
    assert work.gradient_bytes == work.state_bytes == 4 * sum(p.numel() for p in model.parameters())  # momentum
    assert 0.5 < work.pixels / work.most_pixels <= 1


def test_larger_batches_have_more_padding():
    config = TrainConfig(data=None, out=Path("x"))
    one, few, many = (step_work.padded_pixels(config, count) for count in (1, 4, 16))
    assert 640 * 853 < one < few < many <= step_work.largest_size(config)[0] * step_work.largest_size(config)[1]


# ---- the command


SMALL = "--model fcos --backbone test_resnet --channels 64 --num-convs 1 --optimizer momentum"


def run(*options) -> list:
    return plan.main(plan.parse_plan([str(x) for x in options]))


def test_the_table_and_its_assumptions(capsys):
    """Each option changes something; `calibrate` is below."""
    names = {"preset", "gpus", "gpu", "price_per_gpu_hour", "images", "calibrate", "json"}
    assert {field.name for field in dataclasses.fields(cli.Plan)} == names
    options = ["quickstart", *SMALL.split(), "--gpu", "l4"]
    rows = run(*options, "--price-per-gpu-hour", "0.5", "--batch-size", "32", "--images", "1000")
    printed = capsys.readouterr().out
    assert [row.gpus for row in rows] == [1, 2, 4, 8] and [row.images_per_gpu for row in rows] == [32, 16, 8, 4]
    assert rows[0].money == pytest.approx(0.5 * rows[0].hours)
    assert "180 steps of 32 images" in printed and "1,000 images" in printed and "NVIDIA L4 data sheet" in printed
    assert run(*options, "--gpus", "2", "--json")[-1].gpus == 2
    facts = json.loads(capsys.readouterr().out)
    assert facts["gpu"] == "L4" and not facts["calibrated"] and len(facts["rows"]) == 2
    assert all(row["source"] for row in facts["assumptions"].values()) and facts["work"]["launches"] > 300


def test_the_table_is_in_columns(capsys):
    """Words are explained, money is there where a price is, and memory that a GPU has not is marked."""
    few = forecast(WORK, SCHEDULE, [1, 8], GPUS["t4"])
    lines = plan.table(few)
    assert lines[1].split() == "GPUs per GPU ms per s time by per GPU needed cores disk".split()
    assert len({line.index("GB", 60) for line in lines[2:4]}) == 1 and "GiB!" in lines[2] and "GiB " in lines[3]
    assert "compute: the GPU" in lines[4] and "loader:" not in lines[4]
    assert plan.table(forecast(WORK, SCHEDULE, [8], GPUS["t4"], price=2.0))[1].endswith("money")
    said = [plan.quantity(*x) for x in ((20e-6, "s per launch"), (5e-3, "s per step"), (1e9, "bytes"), (60, "s"))]
    assert said == ["20 us per launch", "5 ms per step", "1000 MB", "60 s"]


def test_workers_are_advised_where_they_change_something():
    """The advice names what the plan has and what it needs, and none is given for cores that are not there."""
    light, few = dataclasses.replace(WORK, flops=1e11), dataclasses.replace(SCHEDULE, workers=1)
    rows = forecast(light, few, [1], GPUS["h100"])
    needed = rows[0].workers
    assert plan.loader_advice(rows, 1, math.inf) == [
        f"the loader is too slow with --workers 1; give --workers {needed} where there are cores"
    ]
    (lacking,) = plan.loader_advice(rows, 1, 2)
    assert "give" not in lacking and lacking.endswith(f"{needed} need {needed + 1} cores, here are 2")
    followed = dataclasses.replace(few, workers=needed)
    assert plan.loader_advice(forecast(light, followed, [1], GPUS["h100"]), needed, math.inf) == []


def test_a_plan_counts_the_images_of_its_data(tiny_coco):
    """It also chooses the size by their boxes, and writes nothing."""
    found = []
    for line in ("", "--drop-empty", "--images 50", "--val-fraction 0.5"):
        asked, config, _ = plan.parse_plan(["finetune", "--data", str(tiny_coco), *line.split()])
        config, images = plan.fit(asked, config, torch.device("cuda"))
        found.append(images)
    assert found == [8, 7, 50, 4] and config.test_size == 320 and not Path("runs/finetune").exists()
    with pytest.raises(ValueError, match="nowhere"):
        run("finetune", "--data", "nowhere")


@pytest.mark.parametrize(
    "options, message",
    [
        ("nosuch", "'nosuch' is no preset"),
        ("finetune --gpu z9", "--gpu z9: give here, or one of h100"),
        ("finetune --gpus 64", "--gpus 64: give 1 to 8"),
        ("finetune --gpus 0", "--gpus 0: give 1 to 8"),
        ("finetune --images 0", "--images 0"),
        ("finetune --price-per-gpu-hour -1", "--price-per-gpu-hour -1"),
        ("finetune --price-per-gpu-hour nan", "--price-per-gpu-hour nan"),
        ("finetune --calibrate --gpu t4", "leave --gpu t4 out"),
        ("finetune --lr 0", "lr=0"),
        ("finetune --minutes 5", "leave --minutes and --seeds out"),
        ("v39_1x --batch-size 0", "batch_size=0"),
        ("v39_1x --accum 32 --gpu h100", "cannot be shared out over 1 GPU x --accum 32; give another --accum"),
        ("v39_1x --gpu here --gpus 8", "nothing is known of several; leave --gpus out"),
        ("finetune --batch-size 4 --gpus 8 --gpu h100", "--batch-size 4 cannot be shared out over 8 GPUs"),
    ],
)
def test_an_option_that_cannot_be_followed(options, message):
    with pytest.raises(ValueError, match=message):
        run(*options.split())


def test_a_calibration_that_could_not_be_kept_is_not_begun(tmp_path, monkeypatch):
    (tmp_path / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "calibrate", None)
    with pytest.raises(ValueError, match="--calibrate: .*plans cannot be written .*cache is a file"):
        run("finetune", "--calibrate", "--device", "cpu")


def test_help_names_every_gpu(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vovnet-zoo", "plan", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    printed = capsys.readouterr().out
    assert all(f"{key}," in printed for key in GPUS) and "--price-per-gpu-hour" in printed


def test_the_batch_decides_how_many_gpus_there_can_be():
    schedule = dataclasses.replace(SCHEDULE, batch_size=4)
    assert plan.gpu_counts(None, schedule) == [1, 2, 4] and plan.gpu_counts(None, SCHEDULE) == [1, 2, 4, 8]
    assert plan.gpu_counts(None, dataclasses.replace(schedule, accum=2)) == [1, 2]
    assert plan.gpu_counts(3, schedule) == [1, 2, 3] and plan.gpu_counts(1, schedule) == [1]


def test_the_command_runs_the_recipe(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda line: calls.append(line) or subprocess.CompletedProcess(line, 3))
    monkeypatch.setattr(sys, "argv", ["vovnet-zoo", *"plan v39_1x --gpus 4 --batch-size 32 --debug".split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 3
    options = ["v39_1x", "--gpus", "4", "--batch-size", "32", "--debug"]
    assert calls == [[sys.executable, ROOT / "recipes" / "plan.py", *options]]
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site" / "vovnet_zoo" / "cli.py"))
    with pytest.raises(ValueError, match=r"clone the repository, and type there: python recipes/plan.py v39_1x"):
        cli.run_recipe("plan", ["v39_1x"], False)


# ---- what is measured


def test_steps_that_compile_are_left_out(tmp_path):
    rows = [{"step": i, "images_per_s": 4 / (9.0 if i in (0, 20) else 0.25), "data_wait_s": 0.05} for i in range(60)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 60, "im')
    times = calibration.step_seconds(calibration.read_rows(tmp_path / "metrics.jsonl"), 4)
    assert len(times) == 60 and calibration.steady(times) == pytest.approx([0.2] * 58)
    assert calibration.enough(times) and not calibration.enough(times[:24]) and not calibration.enough(times[:30])
    assert [len(part) for part in calibration.split(times[21:])] == [30, 9]
    assert [len(part) for part in calibration.split([4.0] * 60)] == [8, 52]  # a slow machine
    assert calibration.read_rows(tmp_path / "none") == []


FAKE = """
import json, pathlib, sys, time
out, fails = pathlib.Path(sys.argv[sys.argv.index("--out") + 1]), "--fails" in sys.argv
out.mkdir()
print("reading the data")
row = {"images_per_s": 40.0, "data_wait_s": 0.02, "peak_memory_gib": 3.0}
(out / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for _ in range(0 if fails else 100)))
sys.exit("no such option") if fails else time.sleep(60)
"""


@pytest.fixture
def fake_training(tmp_path, monkeypatch):
    """A stand-in for the training, which takes 0.1 s a step of 4 images, 0.02 s of them for data."""
    (tmp_path / "train_coco.py").write_text(FAKE)
    monkeypatch.setattr(calibration, "HERE", tmp_path)
    started, real = [], subprocess.Popen

    def start(*args, **options):
        started.append(real(*args, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    return started


def test_a_training_is_measured_and_ended(tmp_path, fake_training):
    config = fit_plan(presets.parse(["finetune"]), 300, torch.device("cpu"))
    measured, start_s = calibration.measure_steps("finetune", [], config, 4, tmp_path / "run")
    assert (measured.images, measured.seconds, measured.memory_bytes) == (4, pytest.approx(0.08), 3 * 2**30)
    assert 0 < start_s < 30 and fake_training[0].poll() is not None
    line = fake_training[0].args
    assert line[line.index("--batch-size") + 1] == "4" and "--no-pretrained-backbone" in line
    with pytest.raises(CommandError, match="has ended: reading the data / no such option"):
        calibration.measure_steps("finetune", ["--fails"], config, 4, tmp_path / "failed")


def test_a_stopped_calibration_leaves_no_training_behind(tmp_path, fake_training, monkeypatch):
    monkeypatch.setattr(calibration, "SECONDS", 1e9)
    config = fit_plan(presets.parse(["finetune", "--data", str(tmp_path)]), 300, torch.device("cpu"))

    def stop_it():
        for _ in range(6000):
            if fake_training:
                return os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    stopping = threading.Thread(target=stop_it)
    stopping.start()
    with pytest.raises(SystemExit):
        calibration.calibrate("finetune", [], config, [4], torch.device("cpu"))
    stopping.join()
    assert len(fake_training) == 1 and fake_training[0].poll() is not None


def test_a_calibration_is_kept_for_the_same_step_only(tiny_coco, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config, device = tiny_config(tiny_coco, tmp_path / "run"), torch.device("cpu")
    assert calibration.load_calibration(config, device) is None
    path = calibration.cache_path(config, device)
    assert {*calibration.FREE} < {field.name for field in dataclasses.fields(TrainConfig)}
    for name in calibration.FREE:
        assert calibration.cache_path(dataclasses.replace(config, **{name: "other"}), device) == path
    for name in ("min_size", "precision", "compile", "channels", "accum", "optimizer", "augment"):
        assert calibration.cache_path(dataclasses.replace(config, **{name: "other"}), device) != path


@pytest.mark.slow
def test_measured_on_this_machine(tmp_path, monkeypatch, capsys):
    """A later plan has the same numbers. Other work on the machine changes the pace, so the bound is wide."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "SECONDS", 2.0)
    monkeypatch.setattr(calibration, "LOADER_S", 1.0)
    options = ["finetune", *f"{SMALL} --min-size 64 64 --max-size 96 --test-size 64 --device cpu".split()]
    (measured,) = run(*options, "--calibrate")
    assert "calibration on" in capsys.readouterr().out
    (again,) = run(*options, "--gpu", "here")
    assert again == measured and measured.bound in ("compute", "loader") and measured.hours < 1


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["finetune", "v39_1x"])
def test_the_forecast_of_200_steps(preset, tmp_path, monkeypatch):
    """On a GPU the forecast of the time per step is within 15 %, after the first steps, which the start includes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    data = calibration.draw_photos(tmp_path / "photos")
    typed = [
        "--data",
        data,
        "--batch-size",
        "16",
        "--workers",
        "8",
        *(["--test-size", "320"] if preset == "finetune" else []),
    ]
    (row, *_) = run(preset, "--gpus", "1", "--calibrate", *typed)
    out, options = tmp_path / "run", ["--steps", "200", "--lr", "1e-9", "--no-pretrained-backbone"]
    line = [sys.executable, ROOT / "recipes" / "train_coco.py", preset, *typed, "--out", out, *options]
    subprocess.run(line, check=True, capture_output=True, timeout=300)
    rows = [row for row in calibration.read_rows(out / "metrics.jsonl") if "images_per_s" in row]
    seconds = statistics.fmean(calibration.split([16 / row["images_per_s"] for row in rows])[1])
    print(f"{preset}: forecast {row.step_s:.4f} s, measured {seconds:.4f} s a step")
    assert len(rows) == 200 and row.step_s == pytest.approx(seconds, rel=0.15)


# ---- the guide


# GB/s in one direction, for all GPUs of a machine: a network of 1 Gbit/s carries 0.125 GB/s
NETWORKS = {"8x NDR": 8 * 400 / 8, "8x HDR": 8 * 200 / 8, "100G": 100 / 8, "25G": 25 / 8}


def test_the_numbers_of_the_guide():
    guide = (ROOT / "recipes" / "guides" / "scale.md").read_text()
    rows = re.findall(r"^\| (?:(\w[\w ]*?) ?[(,E].*?)\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", guide, re.M)
    assert len(rows) == 1 + len(NETWORKS)
    for name, bandwidth, *times in rows:
        count = 8 if name.startswith("NVLink") else 64
        expected = GPUS["h100"].link_gb_s if count == 8 else NETWORKS[name.removesuffix(" Ethernet")]
        assert float(bandwidth) == expected
        for size, milliseconds in zip((120.1e6, 258.5e6, 25 * 2**20), times, strict=True):
            seconds = ring_seconds(size, count, expected * 1e9 * LINK.value)
            assert f"{seconds * 1e3:.1f}" == milliseconds
    steps = dataclasses.asdict(presets.parse(["v39_1x", "--batch-size", "128"]))
    assert (steps["steps"], round(steps["lr"], 3), steps["warmup_steps"]) == (11_250, 0.08, 62)
    steps = dataclasses.asdict(presets.parse(["coco_24e", "--batch-size", "128"]))
    assert f"{steps['steps']:,} steps at\n{steps['lr'] * 1e4:.1f}e-4" in guide


@pytest.mark.slow
def test_the_forecasts_of_the_guide():
    """The guide's table is what the planner says today, but for a few launches."""
    guide = (ROOT / "recipes" / "guides" / "scale.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| (\d+) MB \|((?: \d+ \|){4}) (\d) \|$", guide, re.M)
    assert [row[0] for row in rows] == [*presets.PUBLISHED, "coco_12e", "coco_24e", "coco_36e"]
    for preset, gflop, megabytes, times, sensible in rows:
        config = fit_plan(presets.parse([preset]), plan.COCO_IMAGES, torch.device("cuda"))
        work = step_work.count_work(config)
        schedule = plan.schedule_of(config, plan.COCO_IMAGES, "cuda")
        seconds = [row.step_s for row in forecast(work, schedule, [1, 2, 4, 8], GPUS["h100"])]
        assert (f"{work.flops / 1e9:,.0f}", f"{work.gradient_bytes / 1e6:.0f}") == (gflop, megabytes)
        assert [x * 1e3 for x in seconds] == pytest.approx([*map(float, re.findall(r"\d+", times))], rel=0.05)
        pairs = zip((2, 4, 8), seconds[:-1], seconds[1:], strict=True)
        pays = [count for count, before, after in pairs if after <= 0.75 * before]
        assert int(sensible) == max(pays, default=1)
