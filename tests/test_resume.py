"""A run that is killed, interrupted, or finds its disk full, and is started again, ends as if nothing had happened."""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launch import ROOT, STORE_PER_RESTART, losses, rows, train, train_command, train_config, train_forked, train_here
from test_faults import stop_after

import run_folder
from run_folder import list_checkpoints, load_checkpoint, locked, save_checkpoint
from training_run import batch_statistics
from vovnet_zoo import FCOS

# Batch norm live, EMA on, Muon: all that has a state. Samples of several images, until step 12.
OPTIONS = (
    "--steps 24 --workers 1 --checkpoint-every 2 --eval-every 24 --mosaic 0.5 --copy-paste 0.5 --augment-until 0.5"
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(1 process, 2 processes) -> run folder of a run that nothing happened to, made when first asked for."""
    made = {}

    def run(data: Path, processes: int) -> Path:
        if processes not in made:
            made[processes] = tmp_path_factory.mktemp("undisturbed") / "run"
            if processes == 1:
                train_here(data, made[processes], OPTIONS)
            else:
                train_forked(data, made[processes], OPTIONS, processes)
        return made[processes]

    return run


@pytest.mark.slow  # 40 s
@pytest.mark.parametrize("times", [1, 5])
def test_killed_again_and_again(tiny_coco, tmp_path, undisturbed, times):
    """kill -9 of all of a run of 2 processes with workers, at random steps."""
    out, processes = tmp_path / "run", 2
    for step in sorted(random.Random(0).sample(range(1, 24), times)):
        interrupt(tiny_coco, out, processes, step, signal.SIGKILL)
    assert "going on after step" in train_forked(tiny_coco, out, OPTIONS, processes)
    assert_same(out, undisturbed(tiny_coco, processes))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_interrupted(tiny_coco, tmp_path, undisturbed, number):
    """The step is finished and saved, the message says how to go on, and nothing is lost."""
    out = tmp_path / "run"
    code, printed = interrupt(tiny_coco, out, 1, 7, number)
    assert code == 128 + number and "the same command goes on from there" in printed
    saved = load_checkpoint(out / "checkpoints")["progress"]["step"]
    assert saved == rows(out)[-1]["step"] >= 7
    train_here(tiny_coco, out, OPTIONS)
    assert_same(out, undisturbed(tiny_coco, 1))


@pytest.mark.slow
def test_a_signal_doubled_by_torchrun(tiny_coco, tmp_path):
    """torchrun forwards SIGTERM to two processes that received it with torchrun: the step is saved all the same."""
    out = tmp_path / "run"
    interrupt(tiny_coco, out, 2, 7, signal.SIGTERM)
    assert load_checkpoint(out / "checkpoints")["progress"]["step"] == rows(out)[-1]["step"] >= 7


def test_killed_while_a_checkpoint_is_written(tiny_coco, tmp_path, undisturbed):
    """kill -9 in a write that goes on beside the training: it loses no more than the interval, here 10 steps."""
    out, options = tmp_path / "run", OPTIONS.replace("checkpoint-every 2", "checkpoint-every 10")
    code = (
        "import os, sys, time; sys.path[:0] = ['ROOT', 'ROOT/recipes']; import train_coco; from presets import parse\n"
        "def fsync(file, real=os.fsync):\n"
        "    time.sleep(100 if '00000018' in os.readlink(f'/proc/self/fd/{file}') else 0); real(file)\n"
        "os.fsync = fsync; train_coco.main(parse(sys.argv[1:]))"
    ).replace("ROOT", str(ROOT))
    line = [sys.executable, "-c", code, *train_command(tiny_coco, out, options)[2:]]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        wait_for_step(out, 19, job)  # done after the write has begun
        time.sleep(1)
        send_all(out, signal.SIGKILL)
        printed = job.communicate(timeout=100)[0]
    assert job.returncode == -signal.SIGKILL, printed
    assert len(losses(out)) == 19 and list((out / "checkpoints").glob("00000018.pt.partial"))
    assert load_checkpoint(out / "checkpoints")["progress"]["step"] == 9
    train_here(tiny_coco, out, options)
    assert [start["step"] for start in json.loads((out / "run.json").read_text())["starts"]] == [0, 9]
    assert_same(out, undisturbed(tiny_coco, 1))


def test_damaged_newest_checkpoint(tiny_coco, tmp_path, undisturbed, monkeypatch, capsys):
    out = tmp_path / "run"
    stop_after(train_config(tiny_coco, out, OPTIONS), 9, monkeypatch)
    newest = list_checkpoints(out / "checkpoints")[-1]
    os.truncate(newest, newest.stat().st_size // 2)
    train_here(tiny_coco, out, OPTIONS)
    assert f"{newest.name} is damaged" in capsys.readouterr().err
    assert_same(out, undisturbed(tiny_coco, 1))


@pytest.mark.slow
def test_a_lost_process_is_started_again(tiny_coco, tmp_path, undisturbed):
    """torchrun --max-restarts goes on by itself when one of two processes is killed."""
    out = tmp_path / "run"
    line = train_command(tiny_coco, out, OPTIONS, 2, "--standalone --max-restarts 2")
    env = os.environ | STORE_PER_RESTART
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as job:
        wait_for_step(out, 6, job)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        printed = job.communicate(timeout=200)[0]
    assert job.returncode == 0, printed
    assert "going on after step" in printed
    assert_same(out, undisturbed(tiny_coco, 2))


def test_full_disk(tiny_coco, tmp_path, undisturbed, monkeypatch):
    """The checkpoint before survives, the message says so, and with room again the run goes on."""
    out = tmp_path / "run"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", out], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        stop_after(train_config(tiny_coco, out, OPTIONS), 5, monkeypatch)
        before = list_checkpoints(out / "checkpoints")
        used = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        room = used + before[-1].stat().st_size // 2
        subprocess.run(["mount", "-o", f"remount,size={room}", out], check=True)
        with pytest.raises(OSError, match=f"No space left.*{before[-1].name} is intact"):
            train_here(tiny_coco, out, OPTIONS)
        assert list_checkpoints(out / "checkpoints") == before
        subprocess.run(["mount", "-o", "remount,size=1g", out], check=True)
        train_here(tiny_coco, out, OPTIONS)
        assert_same(out, undisturbed(tiny_coco, 1))
    finally:
        subprocess.run(["umount", out], check=True)


def test_two_runs_in_one_folder(tmp_path):
    """The second is refused, naming the first; also when the first was killed and left a worker, it has the folder."""
    code = (
        "import os, sys, time; sys.path.insert(0, 'RECIPES'); from pathlib import Path; from run_folder import locked\n"
        "with locked(Path(sys.argv[1]), wait=0.1):\n"
        "    worker = os.fork()\n"
        "    line = f'{os.getpid()}' if worker else 'worker'\n"
        "    os.write(1, f'{line}\\n'.encode()); time.sleep(100)"  # at once, so that lines of two processes do not mix
    ).replace("RECIPES", str(ROOT / "recipes"))
    line = [sys.executable, "-c", code, tmp_path / "run"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, start_new_session=True) as first:
        try:
            assert {first.stdout.readline() for _ in range(2)} == {f"{first.pid}\n", "worker\n"}
            with pytest.raises(ValueError, match=rf"run is in use by process {first.pid} on .*, since 20.*--out"):
                with locked(tmp_path / "run", wait=0.1):
                    raise AssertionError("the folder has two owners")
            with locked(tmp_path / "run", rank=1, wait=0.1), locked(tmp_path / "other", wait=0.1):
                pass
            os.kill(first.pid, signal.SIGKILL)
            first.wait()
            with locked(tmp_path / "run", wait=0.1):
                assert f"process {os.getpid()} on" in (tmp_path / "run" / "lock").read_text()
        finally:
            os.killpg(first.pid, signal.SIGKILL)


def test_a_run_that_does_not_begin_leaves_nothing(tiny_coco, tmp_path):
    """The folder is as before; a run that waited for its lock does not take the removed file for the lock."""
    out = tmp_path / "runs" / "one"
    for options, error in (
        (f"--init {tiny_coco}", "config.json"),
        ("--val-fraction 0.3 --batch-size 5 --accum 2", "shared"),
    ):
        with pytest.raises(ValueError, match=error):
            train_here(tiny_coco, out, options)
        assert not out.parent.exists()
    out.mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not here"), locked(out):
        raise ValueError("not here")
    assert os.listdir(out) == ["notes.txt"]
    with open(out / "lock", "w") as old:
        os.unlink(old.name)
        assert not run_folder.is_open_at(old, out / "lock")


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def lockf(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "lockf", lockf)
    with locked(tmp_path):
        assert "cannot be locked (No locks available)" in caplog.text


@pytest.mark.slow
def test_another_world_size_goes_on(tiny_coco, tmp_path, undisturbed):
    """Stopped with 1 process, finished by 2: the same as far as floating point goes."""
    out = tmp_path / "run"
    options = OPTIONS + " --frozen-norm --optimizer momentum"
    interrupt(tiny_coco, out, 1, 7, signal.SIGTERM, options)
    train(tiny_coco, out, options, 2)
    train(tiny_coco, tmp_path / "one", options)
    torch.testing.assert_close(losses(out), losses(tmp_path / "one"), rtol=1e-4, atol=0)


def test_save_checkpoint_keeps_the_newest(tmp_path):
    for step in (5, 10, 15, 1000):
        save_checkpoint(tmp_path, step, {"weights": torch.full((4,), float(step))}, keep=2)
    assert [path.name[:8] for path in list_checkpoints(tmp_path)] == ["00000015", "00001000"]
    assert load_checkpoint(tmp_path)["weights"].tolist() == [1000.0] * 4
    assert load_checkpoint(tmp_path / "empty") is None


def interrupt(data: Path, out: Path, processes: int, step: int, number: int, options: str = OPTIONS) -> tuple[int, str]:
    """Start the run and send all its processes a signal once `step` has been done: (exit code, output)."""
    line = train_command(data, out, options, processes)
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as job:
        wait_for_step(out, step, job)
        send_all(out, number)
        printed = job.communicate(timeout=100)[0]
    assert job.returncode != 0, f"it was done before the signal: {printed}"
    return job.returncode, printed


def send_all(out: Path, number: int) -> None:
    """Send a signal to every process of a run, torchrun's and its workers', which are in sessions of their own."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.fsencode(out) in (process / "cmdline").read_bytes().split(b"\0"):
                os.kill(int(process.name), number)


def wait_for_step(out: Path, step: int, job: subprocess.Popen) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if (out / "metrics.jsonl").is_file() and any(row["step"] >= step for row in rows(out)):
            return
        assert job.poll() is None, job.stdout.read()
        time.sleep(0.01)
    raise TimeoutError(f"step {step} was not reached")


def assert_same(out: Path, other: Path) -> None:
    """Bitwise the same weights and losses, each step once."""
    assert [row["step"] for row in rows(out) if "loss" in row] == list(range(1, 25))
    assert losses(out) == losses(other)
    for name in ("last", "best"):
        ours, theirs = (FCOS.from_pretrained(run / name).state_dict() for run in (out, other))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def test_statistics_of_all_batch_norms_can_be_put_back():
    norms = torch.nn.ModuleList([torch.nn.BatchNorm1d(2), torch.nn.BatchNorm2d(2)])  # NextViT has both
    assert len(batch_statistics(norms)) == 6
