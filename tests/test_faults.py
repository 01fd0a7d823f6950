"""What can go wrong in a training run, tried in this process: nothing is lost, and nothing is silent."""

import dataclasses
import multiprocessing
import os
import signal
import time

import pytest
import torch
from launch import losses, rows

import runtime
import scoring
import train_coco
from presets import TrainConfig
from run_folder import load_checkpoint
from runtime import StopSignal
from vovnet_zoo import FCOS


@pytest.fixture
def config(tiny_coco, tmp_path) -> TrainConfig:
    return TrainConfig(
        data=tiny_coco, out=tmp_path / "run", model="fcos", backbone="test_resnet", channels=64, num_convs=1,
        min_size=(64, 64), max_size=96, test_size=64, batch_size=4, workers=0, steps=4, eval_every=2, device="cpu",
    )  # fmt: skip


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

    def stopped(model, image, **options):
        for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
            for _ in range(2):
                os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.2)
        scored.append(image)
        return predict(model, image, **options)

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
