"""The data loading workers lose no batch in silence, need little shared memory, and do not make a run wait for ever."""

import dataclasses
import os
import runpy
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from launch import ROOT, losses, tiny_config

import build
import loading
import train_coco
from loading import Ahead, Batches
from run_folder import load_checkpoint
from runtime import Stopped, StopSignal


class Numbers(torch.utils.data.Dataset):
    """Twelve tensors; `trouble` is called before the sixth."""

    def __init__(self, trouble=None):
        self.trouble = trouble

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return self.trouble() if self.trouble and index == 5 else torch.full((1000,), index)


def hang():
    time.sleep(600)


def cannot_be_sent():
    return lambda: None  # pickling it fails in the thread that sends, as shared memory once did


def die():
    os._exit(3)


@pytest.fixture
def impatient(monkeypatch):
    for name, seconds in (("POLL_S", 0.3), ("LOST_S", 1.0), ("STUCK_S", 3.0)):
        monkeypatch.setattr(loading, name, seconds)


@pytest.mark.parametrize(("workers", "method"), [(0, None), (3, "fork"), (1, "spawn")])
def test_batches_are_those_of_the_dataset(start_method, workers, method):
    start_method(method)
    for batch_size in (None, 4):
        collate = None if batch_size is None else torch.stack
        found = list(Batches(Numbers(), workers=workers, collate_fn=collate, batch_size=batch_size))
        assert torch.equal(torch.cat([x.flatten() for x in found]), torch.arange(12).repeat_interleave(1000))
    assert torch.multiprocessing.get_sharing_strategy() == "file_descriptor"


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (cannot_be_sent, "is lost; memory or shared memory"),
        (hang, "no batch came for 3 s"),
        (die, "worker has died or cannot be reached: .*shared memory may be"),
    ],
)
@pytest.mark.usefixtures("forked")
def test_a_batch_that_does_not_come(impatient, trouble, message):
    batches, began = Batches(Numbers(trouble), workers=2, batch_size=None), time.monotonic()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler raises at any place in this test
    found = []
    with pytest.raises(RuntimeError, match=message):
        for batch in batches:
            found.append(batch[0].item())
    assert found == [0, 1, 2, 3, 4][: len(found)] and (trouble is die or len(found) == 5)
    assert time.monotonic() - began < 60
    with StopSignal():  # its end kills the workers; the one that hangs would be waited for
        pass


@pytest.mark.usefixtures("forked")
def test_the_next_batch_is_fetched_while_a_gpu_computes(monkeypatch):
    """An item that cannot be had is missed when it is asked for, so that the step before is finished."""

    def items():
        yield from range(3)
        raise Stopped(130)

    class Event:
        seconds = iter((1.0, 1.5))

        def __init__(self, enable_timing):
            self.time = None

        def record(self):
            self.time = next(self.seconds)

        def elapsed_time(self, other):
            return 1e3 * (other.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    gpu, ahead = torch.device("cuda"), Ahead(items())
    assert next(ahead) == 0 and ahead.idle() == 0
    ahead.fetch(torch.device("cpu"))
    assert ahead.fetched is None and ahead.idle() == 0
    ahead.fetch(gpu)
    assert ahead.fetched == (1, None) and ahead.idle() == 0.5 and ahead.idle() == 0
    assert [next(ahead), next(ahead)] == [1, 2]
    Event.seconds = iter((2.0, 3.0))
    ahead.fetch(gpu)
    assert ahead.idle() == 1
    with pytest.raises(Stopped):
        next(ahead)


@pytest.mark.usefixtures("forked")
def test_a_signal_while_a_batch_does_not_come(impatient):
    with StopSignal() as stop:
        batches = Batches(Numbers(hang), workers=2, batch_size=None, stop=stop)
        for _ in range(5):
            next(batches)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(Stopped) as error:
            next(batches)
        assert error.value.code == 128 + signal.SIGTERM


@pytest.mark.usefixtures("forked")
def test_ctrl_c_that_ends_a_worker_too(impatient):
    """Where workers are no copies, Ctrl-C can reach one before it leaves signals to this process."""
    with StopSignal() as stop:
        batches = Batches(Numbers(die), workers=2, batch_size=None, stop=stop)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler raises at any place in this test
        stop.received = signal.SIGINT
        with pytest.raises(Stopped) as error:
            list(batches)
        assert error.value.code == 130


@pytest.mark.parametrize("script", ["train_coco.py", "train_imagenet.py"])
def test_a_worker_leaves_ctrl_c_while_it_imports_torch(script):
    """multiprocessing runs the script once more, under this name, in a worker that is no copy."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        runpy.run_path(str(ROOT / "recipes" / script), run_name="__mp_main__")
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_only_linux_is_told_of_docker(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "SHM", tmp_path / "none")
    assert "docker" not in loading.advice() and "--workers" in loading.advice()


@pytest.mark.usefixtures("forked")
def test_a_signal_in_a_training_whose_batch_does_not_come(tiny_coco, tmp_path, monkeypatch):
    """The finished steps are saved, and the same command goes on from there."""
    monkeypatch.setattr(loading, "POLL_S", 0.3)
    config = dataclasses.replace(tiny_config(tiny_coco, tmp_path / "run"), workers=1, eval_every=None)
    real, collated, log_step = build.collate, [], train_coco.log_step

    def collate(*arguments, **options):  # in the worker
        collated.append(arguments)
        if len(collated) == 3:
            hang()
        return real(*arguments, **options)

    def then_stop(run, run_log, bar, step, *arguments, **values):
        log_step(run, run_log, bar, step, *arguments, **values)
        if step == 1:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()

    with monkeypatch.context() as patch:
        patch.setattr(build, "collate", collate)
        patch.setattr(train_coco, "log_step", then_stop)
        with pytest.raises(SystemExit) as error:
            train_coco.main(config)
    assert error.value.code == 128 + signal.SIGTERM
    assert load_checkpoint(config.out / "checkpoints")["progress"]["step"] == 2
    train_coco.main(config)
    assert len(losses(config.out)) == 4


@pytest.mark.usefixtures("forked")
def test_full_shared_memory_is_named(monkeypatch):
    """A stand-in for a small /dev/shm."""

    def full(self):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)\n.."
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(RuntimeError) as error:
        next(Batches(Numbers(), workers=1, batch_size=None))
    line = str(error.value)
    assert "\n" not in line and "No space left on device" in line
    assert all(word in line for word in ("a batch of", "/dev/shm has", "--shm-size", "--workers 0"))
    assert int(next(Batches(Numbers(), workers=0, batch_size=None))[0]) == 0


SCRIPT = """
import torch
from loading import Batches
from torchvision.transforms.v2.functional import resize

class Photos:
    def __init__(self, side, to=None): self.side, self.to = side, to
    def __len__(self): return 30
    def __getitem__(self, i):
        image = torch.zeros(3, self.side, self.side, dtype=torch.uint8)
        return resize(image, [self.to, self.to]) if self.to else image

def run(*sides):
    try:
        return sum(1 for _ in Batches(Photos(*sides), workers=2, batch_size=None))
    except RuntimeError as error:
        return str(error)

print("small", run(200))
print("resized", run(2000, 320))
print("large", run(2000))
"""


def test_a_small_shared_memory():
    """In a /dev/shm of 8 MiB: photos of 12 MB pass where they are resized before they are sent, as in a training."""
    mount = "mount -t tmpfs -o size=8m tmpfs /dev/shm"
    try:
        can = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode == 0
    except OSError:
        can = False
    if not can:
        pytest.skip("a mount of its own needs root and unshare; the stand-in above tests the message")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "recipes")))
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, SCRIPT],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    lines = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    assert (lines["small"], lines["resized"]) == ("30", "30"), result.stdout + result.stderr
    assert "a batch of 11 MiB cannot be put into shared memory" in lines["large"]
    assert "/dev/shm has 8 MiB" in lines["large"] and "--shm-size" in lines["large"]


def test_a_batch_norm_that_would_see_one_value(tiny_coco, tmp_path):
    """One clear line; a batch of which no image could be read is padded instead, and the run goes on."""
    config = dataclasses.replace(
        tiny_config(tiny_coco, tmp_path / "run"), batch_size=1, min_size=(32, 32), max_size=32, test_size=32
    )
    with pytest.raises(ValueError, match="one image of 32x32 pixels leaves a batch norm one value.*--frozen-norm"):
        train_coco.main(config)
    train_coco.main(dataclasses.replace(config, frozen_norm=True, out=tmp_path / "frozen", eval_every=None))
    for image in (tiny_coco / "train").iterdir():
        image.write_bytes(b"")
    config = dataclasses.replace(config, skip_bad_images=True, out=tmp_path / "skipped", eval_every=None)
    train_coco.main(config)
    assert len(losses(config.out)) == 4


def test_a_script_ends_whose_workers_ignore_signals():
    """Python's exit sends them SIGTERM and waits. Within `StopSignal` they are killed before."""
    code = """
import torch
from loading import Batches
from runtime import StopSignal
batches = Batches(torch.arange(1000), workers=2, batch_size=None, stop=StopSignal())
print(next(batches))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "recipes")])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "tensor(0)" in result.stdout, result.stderr
