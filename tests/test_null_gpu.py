"""What a training step asks of a GPU, counted on one that computes nothing.

NULLGPU_RUN is the path of a launcher that runs a command with such a GPU and the module `nullgpu`, which counts.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT, TINY

from presets import parse
from step_work import count_work

# Count from one batch to the next, after the number of steps in the variable STEPS.
COUNT = """
import contextlib, functools, os, sys
import gradients, nullgpu, torch
import train_coco
from presets import parse

if "GROUP" in os.environ:
    group = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", **group)
    gradients.GradientSum.check = lambda self, numbers: numbers[:4]  # the counts mean nothing here
stack, next_parts, steps = contextlib.ExitStack(), train_coco.next_parts, int(os.environ["STEPS"])
sizes, graphs = set(), []

def counted(run, step, batches):
    global seen
    if step == steps:
        stack.close()
    parts = next_parts(run, step, batches)
    sizes.add(tuple(parts[0]["images"].shape[-2:]))
    graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    if step == steps - 1:
        seen = stack.enter_context(nullgpu.count())
    return parts

train_coco.next_parts = counted
train_coco.compile_step = functools.partial(train_coco.compile_step, backend=os.environ.get("BACKEND"))
train_coco.score_if_due = train_coco.summarize = lambda *rest: None
train_coco.main(parse(sys.argv[1:]))
print(f"waits {seen.syncs}, kernels {seen.launches},", seen)
print(f"graphs {graphs[1]} at first and {graphs[-1]} for {len(sizes)} sizes")
"""


@pytest.fixture
def launcher():
    if not (launcher := os.environ.get("NULLGPU_RUN")):
        pytest.skip("NULLGPU_RUN names no launcher")
    return launcher


def run_null(launcher: str, code: str, *arguments, **environment: str) -> str:
    """Run code that may import this checkout, on the null GPU; returns what was printed."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "recipes")])
    result = subprocess.run(
        [launcher, sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def count_step(launcher: str, data: Path, out: Path, options: str, steps: int = 3, **environment: str) -> str:
    """Train a tiny detector, and count what the step after `steps` steps does."""
    line = ["finetune", "--data", data, "--out", out, *TINY.split(), "--workers", "0", "--batch-size", "4"]
    line += ["--device", "cuda", "--no-cuda-graphs", "--steps", str(steps + 1), *options.split()]
    line += ["--checkpoint-minutes", "1000", "--eval-every", "1000"]  # a checkpoint would be counted too
    return run_null(launcher, COUNT, *line, STEPS=str(steps), **environment)


@pytest.mark.parametrize(
    "variant, environment", [("published", {}), ("improved", {}), ("improved", {"GROUP": "of one process"})]
)
def test_a_step_waits_for_the_gpu_once(tiny_coco, tmp_path, launcher, variant, environment):
    printed = count_step(launcher, tiny_coco, tmp_path / "run", f"--variant {variant}", **environment)
    assert "waits 1," in printed and ("nccl" in printed) == bool(environment), printed


def test_a_plan_counts_the_kernels_of_a_step(tiny_coco, tmp_path, launcher):
    launched = int(re.search(r"kernels (\d+),", count_step(launcher, tiny_coco, tmp_path / "run", ""))[1])
    work = count_work(parse(["finetune", *TINY.split(), "--batch-size", "4"]))
    assert work.launches == pytest.approx(launched, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("variant", ["published", "improved"])
def test_a_compiled_step_waits_for_the_gpu_once(tiny_coco, tmp_path, launcher, variant, backend):
    """Its graphs have the same operations with both backends; inductor takes minutes to make kernels of them. The
    first step compiles for all sizes."""
    options = f"--variant {variant} --compile --min-size 160 256 --max-size 512 --test-size 256"
    printed = count_step(launcher, tiny_coco, tmp_path / "run", options, steps=6, BACKEND=backend)
    assert "waits 1," in printed
    first, last, sizes = map(int, re.search(r"graphs (\d+) at first and (\d+) for (\d+) sizes", printed).groups())
    assert first == last > 5 and sizes > 2, printed


def test_an_evaluation_waits_once_for_a_batch(tiny_coco, launcher):
    code = """
import sys
import nullgpu
import scoring
from vovnet_zoo import create_detector
from vovnet_zoo.data import CocoDataset, find_split
from vovnet_zoo.results import ImageDetections

scoring.evaluate = lambda *arguments, **options: {}
ImageDetections.to_coco = lambda *arguments: []  # the boxes are whatever the memory holds, and would be refused
model = create_detector("fcos", backbone="test_resnet", channels=64, num_convs=1, num_classes=2, min_size=64).cuda()
dataset = CocoDataset(*find_split(sys.argv[1], "val"))
for _ in range(2):
    with nullgpu.count() as seen:
        scoring.score_dataset(model, dataset, batch_size=2, workers=0)
print("waits", seen.syncs, seen)
"""
    assert "waits 2 " in run_null(launcher, code, tiny_coco)  # 3 images of 2 sizes are 2 batches


def test_a_checkpoint_does_not_wait_for_the_gpu(tmp_path, launcher):
    """The state goes to pinned memory, and is there when it is written, not before."""
    code = """
import sys, threading
from pathlib import Path
import nullgpu, saving, torch

saver, weights = saving.BackgroundSaver(Path(sys.argv[1]), None, None), torch.zeros(8, 4, 3, 3).cuda()
weights = weights.to(memory_format=torch.channels_last)
ready, real = threading.Event(), torch.cuda.Event.synchronize
torch.cuda.Event.synchronize = lambda event: (ready.wait(60), real(event))
for step in (1, 2):
    ready.clear()
    with nullgpu.count() as seen:
        saver.save(step, {"w": [weights, torch.nn.Parameter(weights)], "step": torch.ones(())})
    print("waits", seen.syncs, "pageable", seen.stats["d2h_pageable"], "copies", seen.stats["d2h"])
    ready.set()
    saver.wait()
print(saver.saved, saver._copy["w"][0].is_pinned(), saver._copy["step"].is_pinned())
"""
    printed = run_null(launcher, code, tmp_path / "run").splitlines()
    assert printed == ["waits 0 pageable 0 copies 2"] * 2 + ["2 True False"]


def test_the_second_gpu(tmp_path, launcher):
    """Kernels start on the GPU of their tensors, where another is the current one; a checkpoint's thread has the GPU of
    the training."""
    code = """
import sys
from pathlib import Path
import saving, torch
from triton.runtime import driver
from vovnet_zoo import create_detector, predict
from vovnet_zoo.kernels import nms_triton
from vovnet_zoo.nms import class_nms

gpus = []
for name in ("rank", "keep"):
    kernel = getattr(nms_triton, name)
    def run(*arguments, start=kernel.run, **options):
        gpus.append((driver.active.get_current_device(), arguments[0].get_device()))
        return start(*arguments, **options)
    kernel.run = run
model = create_detector("fcos", backbone="test_resnet", channels=64, num_convs=1, num_classes=2, min_size=64)
predict(model.to("cuda:1"), torch.zeros(3, 64, 64, dtype=torch.uint8), workers=0)
class_nms(*(torch.zeros(3, *shape, device="cuda:1") for shape in ((4,), ())), torch.zeros(3).long().cuda(1), 0.5, 3)
print(gpus, torch.cuda.current_device())

torch.cuda.set_device(1)
saver = saving.BackgroundSaver(Path(sys.argv[1]), None, None)
saving.save_checkpoint = lambda *arguments: print("written beside GPU", torch.cuda.current_device())
saver.save(1, {"w": torch.zeros(3, device="cuda")})
saver.wait()
"""
    printed = run_null(launcher, code, tmp_path, NULLGPU_DEVICES="2").splitlines()
    assert printed == [f"{[(1, 1)] * 4} 0", "written beside GPU 1"]


def test_memory_of_checkpoints_is_there_before_the_first(tiny_coco, tmp_path, launcher):
    """A training allocates pinned memory for its state after the first step, and none in the checkpoint."""
    code = """
import sys
import saving, torch, train_coco
from presets import parse

save, pinned = saving.BackgroundSaver.save, []

def tensors(state):
    return [x for part in state.values() for x in tensors(part)] if isinstance(state, dict) else [state]

def counted(saver, step, state):
    saver.wait()
    before = [x for x in tensors(saver._copy) if isinstance(x, torch.Tensor) and x.is_pinned()]
    save(saver, step, state)
    saver.wait()
    after = [x for x in tensors(saver._copy) if isinstance(x, torch.Tensor) and x.is_pinned()]
    print("step", step, len(after) > 100, [x.data_ptr() for x in before] == [x.data_ptr() for x in after])

saving.BackgroundSaver.save = counted
train_coco.score_if_due = train_coco.summarize = lambda *rest: None
train_coco.main(parse(sys.argv[1:]))
"""
    line = ["finetune", "--data", tiny_coco, "--out", tmp_path / "run", *TINY.split(), "--workers", "0"]
    line += ["--device", "cuda", "--batch-size", "4", "--steps", "3", "--eval-every", "3"]
    assert "step 3 True True" in run_null(launcher, code, *line).splitlines()


def test_a_classifier_waits_for_nothing(launcher):
    code = """
import nullgpu, timm, torch
from train_imagenet import compute_logits

model, images = timm.create_model("test_resnet").cuda(), torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device="cuda")
for _ in range(2):
    with nullgpu.count() as seen:
        compute_logits(model, images, model.pretrained_cfg, "bf16")
print("waits", seen.syncs, seen)
"""
    assert "waits 0 " in run_null(launcher, code)


def test_the_benchmark_compiles_as_the_recipe_does(launcher):
    """On a GPU, that is not one graph of the whole network."""
    code = """
import benchmark, torch
from benchmark import BenchmarkConfig, training_contestants

functions = benchmark.find_targets, benchmark.compute_losses
benchmark.compile_step = lambda model: (print("parts"), functions)[1]
benchmark.compiled = lambda *arguments, **options: print("one graph")
config = BenchmarkConfig(model="fcos_vovnet27_slim_fpn", size=(64, 64), others=False)
training_contestants(config, 1, ("bf16",), torch.device("cuda"))
"""
    assert run_null(launcher, code) == "parts\n" * 2  # one of them is recorded


@pytest.mark.parametrize("optimizer", ["Muon", "BatchedMuon"])
def test_kernels_of_muon(launcher, optimizer):
    """Of 8 equal matrices: as many kernels as for one, and a copy of each."""
    code = f"""
import nullgpu, timm.optim, torch
from timm.optim import Muon
from optim import BatchedMuon

weights = [torch.nn.Parameter(torch.zeros(16, 8, 3, 3, device="cuda")) for _ in range(8)]
for weight in weights:
    weight.grad = torch.zeros_like(weight)
muon = {optimizer}(weights)
muon.step()
with nullgpu.count() as seen:
    muon.step()
print(seen.launches)
"""
    launches = int(run_null(launcher, code))
    assert launches < 40 if optimizer == "BatchedMuon" else launches > 150


@pytest.mark.slow
def test_the_graph_of_compile_detector_is_captured(launcher):
    code = """
import nullgpu, torch
from vovnet_zoo import compile_detector, create_detector

model = create_detector("fcos", backbone="test_resnet", channels=64, num_convs=1, num_classes=2).cuda().eval()
fast = compile_detector(model, (64, 96), torch.bfloat16, mode="reduce-overhead")
images, sizes = torch.zeros(1, 3, 64, 96, dtype=torch.uint8, device="cuda"), torch.tensor([[64, 90]], device="cuda")
found = {"graphs": 0, "illegal_in_capture": 0, "host_copies_captured": 0}
for _ in range(4):
    nullgpu.reset()
    fast(images, sizes)
    found = {name: n + nullgpu.stats()[name] for name, n in found.items()}
with nullgpu.count() as seen:
    fast(images, sizes)
print(*found.values(), seen.syncs, seen.stats["graph_launches"], seen.launches)
"""
    graphs, *found, launches = map(int, run_null(launcher, code).split())
    assert graphs > 0 and found == [0, 0, 0, 1] and launches < 10


def test_an_error_under_nccl_ends_the_process(tmp_path, launcher):
    """In a group of NCCL with one process, which other processes are said to belong to."""
    code = """
import os, time
from runtime import process_group, run_command

def fail(config):
    with process_group("cuda") as (rank, world_size, device):
        raise RuntimeError("the reason")

import torch.distributed as dist
dist.destroy_process_group = lambda: time.sleep(100)
init = dist.init_process_group
dist.init_process_group = lambda *a, **o: (init(*a, world_size=1, rank=0, **o), print(dist.get_backend_config()))
run_command(fail, None)
"""
    job = dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    environment = os.environ | job | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "recipes")])}
    result = subprocess.run(
        [launcher, sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=90
    )
    assert result.returncode == 1 and result.stderr.count("RuntimeError: the reason") == 1, result.stderr
    assert "cuda:nccl" in result.stdout and "cpu:gloo" in result.stdout


@pytest.mark.parametrize(
    "options, replays",
    [
        ("", 1),
        ("--accum 2", 2),
        ("--precision fp16", 1),
        ("--no-cuda-graphs", 0),
        pytest.param("--compile --cuda-graphs", 1, marks=pytest.mark.slow),
    ],
)
def test_a_step_is_one_graph_from_its_second_time_on(tiny_coco, tmp_path, launcher, options, replays):
    """Sizes that came before are replayed: a tenth of the launches, one wait, and nothing that a graph cannot hold."""
    code = """
import contextlib, os, sys
import nullgpu, torch, train_coco
from presets import parse

stack, next_parts, seen = contextlib.ExitStack(), train_coco.next_parts, []

def counted(run, step, batches):
    stack.close()
    parts = next_parts(run, step, batches)
    seen.append(stack.enter_context(nullgpu.count()))
    return parts

train_coco.next_parts = counted
train_coco.score_if_due = train_coco.summarize = lambda *rest: None
train_coco.main(parse(sys.argv[1:]))
stack.close()
print(*[f"{x.stats['graph_launches']}:{x.launches}:{x.syncs}" for x in seen])
print("illegal", sum(x.stats["illegal_in_capture"] for x in seen))
"""
    line = ["v39_1x", "--data", tiny_coco, *TINY.replace("test_resnet", "vovnet27_slim").split(), "--device", "cuda"]
    line += ["--workers", "0", "--batch-size", "2"]
    line += ["--checkpoint-minutes", "1000", "--eval-every", "1000", "--no-pretrained-backbone", "--steps", "12"]
    printed = run_null(launcher, code, *line, "--out", tmp_path / "run", *options.split()).splitlines()
    steps = [tuple(map(int, step.split(":"))) for step in printed[-2].split()]
    assert printed[-1] == "illegal 0" and len(steps) == 12 and steps[0][0] == 0, printed
    if not replays:
        assert all(graphs == 0 for graphs, *_ in steps), printed
        return
    waits = min(waits for *_, waits in steps[1:])  # of a step in which nothing is recorded
    replayed = [step for step in steps[1:] if step[0] == replays and step[2] == waits]
    assert replayed and waits <= (1 + ("fp16" in options)) and all(n < steps[0][1] / 4 for _, n, _ in replayed), printed


def test_minutes_are_planned_by_steps_that_are_replayed(tiny_coco, launcher):
    code = """
import dataclasses, sys, torch
import trial
from build import build_datasets, find_splits

from presets import parse
from recorded import RecordedPasses

record, recorded = RecordedPasses.record, []
RecordedPasses.record = lambda passes, inputs: (recorded.append(inputs[0].shape), record(passes, inputs))[1]
config, device = parse(sys.argv[1:]), torch.device("cuda")
train_set, _ = build_datasets(config, find_splits(config, 0), False, "torchvision")
for options in {}, {"cuda_graphs": False}, {"accum": 2}:
    found = trial.Trial(dataclasses.replace(config, **options), train_set, None, None, device)
    seconds = found.step_seconds(1, 2, 10, 60)
    print(len(recorded) > 0, seconds > 0, type(found.passes) is trial.Passes)
    recorded.clear()
"""
    line = ["v39_1x", "--data", tiny_coco, *TINY.split(), "--workers", "0", "--batch-size", "4", "--device", "cuda"]
    printed = run_null(launcher, code, *line, "--no-pretrained-backbone").splitlines()
    assert printed == ["True True True", "False True True", "True True True"]
