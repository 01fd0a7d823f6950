"""Checkpoints in the background: a copy of the moment, written whole, waited for where it has to be."""

import dataclasses
import os
import signal
import threading
import time
from collections import OrderedDict

import pytest
import torch
from launch import losses, tiny_config

import saving
import train_coco
from average import MovingAverage
from run_folder import list_checkpoints, load_checkpoint
from saving import BackgroundSaver, copy_state
from vovnet_zoo import create_detector


@pytest.fixture
def gate(monkeypatch):
    """One checkpoint is written for each time that this semaphore is released."""
    gate, real = threading.Semaphore(0), saving.save_checkpoint

    def save_checkpoint(*arguments):
        assert gate.acquire(timeout=60)
        return real(*arguments)

    monkeypatch.setattr(saving, "save_checkpoint", save_checkpoint)
    yield gate
    gate.release(100)


def saved_steps(folder) -> list[int]:
    return [int(path.name[:8]) for path in list_checkpoints(folder)]


def test_a_checkpoint_holds_the_state_of_its_moment(tmp_path, gate):
    """What changes while it is written, and the copy that is written again, do not change it."""
    saver, weights = BackgroundSaver(tmp_path, None, None), torch.nn.Parameter(torch.ones(2, 3))
    state = {"model": OrderedDict(w=weights), "lists": [{"betas": (0.9, 0.99), "none": None}], "name": "x"}
    for step in (1, 2):
        with torch.no_grad():
            weights.fill_(step)
        state["lists"][0]["step"] = step
        saver.save(step, state)
        with torch.no_grad():
            weights.fill_(-1)
        state["lists"][0]["step"] = -1
        assert saver.saved == step - 1
        gate.release()
        saver.wait()
        assert saver.saved == step
        found = load_checkpoint(tmp_path)
        assert found.pop("model")["w"].tolist() == [[step] * 3] * 2
        assert found == {"lists": [{"betas": (0.9, 0.99), "none": None, "step": step}], "name": "x"}
    assert torch.load(list_checkpoints(tmp_path)[0])["model"]["w"].tolist() == [[1] * 3] * 2


def test_a_copy_takes_the_memory_of_the_one_before():
    state = {"a": torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last), "b": [torch.arange(3)]}
    first = copy_state(state)
    pointers = first["a"].data_ptr(), first["b"][0].data_ptr()
    state["a"] += 1
    second = copy_state(state, first)
    assert pointers == (second["a"].data_ptr(), second["b"][0].data_ptr()) != (state["a"].data_ptr(), ...)
    assert torch.equal(second["a"], state["a"]) and second["a"].stride() == state["a"].stride()
    third = copy_state({"a": torch.ones(2), "b": []}, second)
    assert third["a"].tolist() == [1, 1] and third["b"] == [] and copy_state(third, None)["a"].tolist() == [1, 1]


def test_memory_is_reserved_before_the_first_checkpoint(tmp_path):
    """The copy has the tensors that were allocated for it; what was not there then, or has another shape, is new."""
    saver, state = BackgroundSaver(tmp_path, 100, None), {"model": {"a": torch.ones(2), "b": torch.ones(3)}, "n": 1}
    saver.reserve(state)
    saver.keep_up(1)
    saver.wait()
    room = saver._copy["model"]
    assert saver.reserved and saver.saved == 0 and saved_steps(tmp_path) == []
    state = {"model": {"a": torch.zeros(2), "b": torch.zeros(4)}, "optimizer": [torch.arange(3)], "n": 2}
    saver.save(3, state)
    saver.close()
    assert saver._copy["model"]["a"] is room["a"] and saver._copy["model"]["b"] is not room["b"]
    found = load_checkpoint(tmp_path)
    assert found["n"] == 2 and found["optimizer"][0].tolist() == [0, 1, 2]
    assert [x.tolist() for x in found["model"].values()] == [[0] * 2, [0] * 4]


def test_a_checkpoint_waits_for_the_memory_but_not_for_its_pauses(tmp_path, monkeypatch):
    allocate, allocated = saving.room_for, []

    def slow(x):
        time.sleep(0.01)
        allocated.append(allocate(x))
        return allocated[-1]

    monkeypatch.setattr(saving, "room_for", slow)
    monkeypatch.setattr(saving, "PAUSE", 1e5)  # seconds of pause after each
    saver, state = BackgroundSaver(tmp_path, None, None), {name: torch.ones(1) for name in "abc"}
    saver.reserve(state)
    saver.save(1, state)
    saver.close()
    assert len(allocated) == 3 and saver.saved == 1 and saver._copy["c"] is allocated[2]


def test_an_error_in_reserving_is_raised_once(tmp_path, monkeypatch):
    def fail(x):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(saving, "room_for", fail)
    saver = BackgroundSaver(tmp_path, None, None)
    saver.reserve({"a": torch.ones(1)})
    with pytest.raises(RuntimeError, match="out of memory"):
        for step in range(1000):
            time.sleep(0.01)
            saver.keep_up(step)
    saver.close()


@pytest.mark.parametrize("unit", ["steps", "minutes"])
def test_a_whole_checkpoint_is_never_older_than_the_interval(tmp_path, gate, monkeypatch, unit):
    """It begins a tenth earlier, and is waited for at the end of the interval, not before."""
    now = time.monotonic()
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    saver = BackgroundSaver(tmp_path, *((100, None) if unit == "steps" else (None, 100 / 60)))
    waited, started = [], [0]
    real = saver.wait

    def wait():
        if saver.saved < started[-1]:
            waited.append(step)
            gate.release()
        real()

    monkeypatch.setattr(saver, "wait", wait)
    for step in range(1, 250):  # a step a second
        now += 1
        if saver.is_due(step):
            saver.save(step, {"step": step})
            started.append(step)
        saver.keep_up(step)
        assert step - saver.saved <= 100
    assert (started, waited, saver.saved) == ([0, 90, 180], [100, 190], 180)


def test_an_interval_too_short_for_the_background(tmp_path, gate):
    gate.release(2)
    saver = BackgroundSaver(tmp_path, 2, None, step=5)
    for step in range(6, 10):
        if saver.is_due(step):
            saver.save(step, {})
        saver.keep_up(step)
        assert step - saver.saved < 2
    assert saved_steps(tmp_path) == [7, 9]


def test_the_error_of_a_background_write_is_raised_once(tmp_path, monkeypatch):
    """As soon as it is there; the checkpoint before stays, and the next one is written."""
    saver, real = BackgroundSaver(tmp_path, 100, None), os.fsync
    saver.save(1, {"value": 1})
    saver.wait()

    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    saver.save(2, {"value": 2})
    with pytest.raises(OSError, match="step 2 not saved .No space left on device.; .*00000001-.* is intact"):
        for _ in range(1000):
            time.sleep(0.01)
            saver.keep_up(3)
    assert saver.saved == 1 and saved_steps(tmp_path) == [1] and not list(tmp_path.glob("*.partial"))
    saver.save(3, {"value": 3})
    with pytest.raises(OSError, match="step 3 not saved"):
        saver.save(4, {"value": 4})
    monkeypatch.setattr(os, "fsync", real)
    saver.save(4, {"value": 4})
    saver.close()
    assert saver.saved == 4 and load_checkpoint(tmp_path) == {"value": 4} and saved_steps(tmp_path) == [1, 4]


def test_other_processes_write_nothing(tmp_path):
    saver = BackgroundSaver(tmp_path / "run", 2, 5.0, active=False)
    saver.save(2, {})
    saver.keep_up(4)
    saver.close()
    assert saver.saved == 2 and not (tmp_path / "run").exists()


def test_a_run_waits_for_its_last_checkpoint(tiny_coco, tmp_path, monkeypatch, capsys):
    """After a signal, and at its end, with a slow disk."""
    config = dataclasses.replace(tiny_config(tiny_coco, tmp_path / "run"), eval_every=None)
    write, log_step = saving.save_checkpoint, train_coco.log_step

    def slow(*arguments):
        time.sleep(0.5)
        return write(*arguments)

    def signalled(run, run_log, bar, step, *arguments, **values):
        log_step(run, run_log, bar, step, *arguments, **values)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(saving, "save_checkpoint", slow)
    monkeypatch.setattr(train_coco, "log_step", signalled)
    with pytest.raises(SystemExit):
        train_coco.main(config)
    done = len(losses(config.out))
    assert 2 <= done < 4 and f"{done} steps are saved" in capsys.readouterr().err
    assert load_checkpoint(config.out / "checkpoints")["progress"]["step"] == done
    monkeypatch.setattr(train_coco, "log_step", log_step)
    train_coco.main(config)
    progress = load_checkpoint(config.out / "checkpoints")["progress"]
    assert (progress["step"], progress["scored"]) == (4, 4)


@pytest.mark.gpu
def test_a_checkpoint_hardly_stops_a_gpu(tmp_path):
    """VoVNet-57 with average and momentum, 553 MB: a training waits for 0.3 s at most, the first time too."""
    model = create_detector("fcos_ese_vovnet57b_fpn", num_classes=80).cuda()
    average, optimizer = MovingAverage(model, 0.999), torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {"model": model.state_dict(), "ema": average.module.state_dict(), "optimizer": optimizer.state_dict()}
    saver = BackgroundSaver(tmp_path, None, None)
    saver.reserve(state)
    saver._thread.join()
    for step in (1, 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        saver.save(step, state)
        torch.cuda.synchronize()
        assert time.perf_counter() - began <= 0.3, f"checkpoint {step}"
        saver.wait()  # a checkpoint waits for the one before, and minutes lie between them
    assert saved_steps(tmp_path) == [1, 2]
