"""What a training step asks of a GPU, counted on one that computes nothing.

NULLGPU_RUN is the path of a launcher that runs a command with such a GPU and the module `nullgpu`, which counts.
"""

import os
import subprocess
import sys

import pytest
from launch import ROOT, TINY

# Count the steps from the third to the fourth, from batch to batch.
COUNT = """
import contextlib, sys
import nullgpu
import train_coco
from presets import parse

stack, next_parts = contextlib.ExitStack(), train_coco.next_parts

def counted(run, step, batches):
    global seen
    if step == 3:
        stack.close()
    parts = next_parts(run, step, batches)
    if step == 2:
        seen = stack.enter_context(nullgpu.count())
    return parts

train_coco.next_parts = counted
train_coco.score_if_due = train_coco.summarize = lambda *rest: None
train_coco.main(parse(sys.argv[1:]))
print("waits", seen.syncs, seen)
"""


@pytest.fixture
def launcher():
    if not (launcher := os.environ.get("NULLGPU_RUN")):
        pytest.skip("NULLGPU_RUN names no launcher")
    return launcher


@pytest.mark.parametrize("variant", ["published", "improved"])
def test_a_step_waits_for_the_gpu_once(tiny_coco, tmp_path, launcher, variant):
    options = f"--steps 4 --workers 0 --batch-size 4 --variant {variant} --device cuda".split()
    line = [launcher, sys.executable, "-c", COUNT, "finetune", "--data", tiny_coco, "--out", tmp_path / "run"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "recipes")])}
    result = subprocess.run(
        [*line, *TINY.split(), *options], env=environment, capture_output=True, text=True, timeout=300
    )
    assert "waits 1 " in result.stdout, result.stdout + result.stderr


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


COUNT_EVALUATION = """
import sys
import nullgpu
import scoring
from vovnet_zoo import create_detector, inference
from vovnet_zoo.data import CocoDataset

dataset = CocoDataset(f"{sys.argv[1]}/train", f"{sys.argv[1]}/annotations/instances_train.json")
sizes = dict(channels=64, num_convs=1, min_size=64, max_size=96)
model = create_detector("fcos", backbone="test_resnet", num_classes=2, **sizes).cuda()
batches, detect_batch = [], inference.detect_batch

def counted(model, items, *rest):
    batches.append(len(items))
    return detect_batch(model, items, *rest)

inference.detect_batch, scoring.evaluate = counted, lambda *rest, **options: None  # results are no numbers here
scoring.score_dataset(model, dataset, batch_size=2, precision="bf16")
batches.clear()
with nullgpu.count() as seen:
    scoring.score_dataset(model, dataset, batch_size=2, precision="bf16")
print("waits", seen.syncs - len(batches), "images", sum(batches), "batches", len(batches), seen)
"""


def test_an_evaluation_waits_for_the_gpu_once_a_batch(tiny_coco, launcher):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "recipes")])}
    line = [launcher, sys.executable, "-c", COUNT_EVALUATION, tiny_coco]
    result = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert "waits 0 images 8 batches 5" in result.stdout, result.stdout + result.stderr
