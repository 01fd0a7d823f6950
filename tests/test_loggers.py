"""Trackers get a run's numbers, without a network, and none of them can end a run."""

import dataclasses
import io
import os
import struct
import time
from types import SimpleNamespace

import pytest
import torch
from launch import tiny_config
from tqdm import tqdm

import loggers
import train_coco
import training_loop
from loggers import LOGGERS, Logger, Loggers, check_loggers
from run_folder import RunLog
from vovnet_zoo.files import read_json

CONFIG = {"lr": 0.1, "init": None, "zoom": [0.5, 2.0], "model": "x"}


@pytest.fixture
def log_twice(tmp_path):
    """Log two steps of a run, go on after the first, and return the folder."""

    def log(name):
        (tmp_path / "run").mkdir()
        for start in (0, 1):
            time.sleep(start * (name == "wandb"))  # its folders are called by the second
            logger = Loggers([name])
            logger.on_start(tmp_path / "run", CONFIG, start)
            for step in (start + 1, start + 2):
                logger.on_metrics(step, {"loss": 1 / step, "lr": 0.5})
            assert name in logger.running
            logger.on_end()
            assert name in logger.running
        return tmp_path / "run"

    return log


def test_wandb(log_twice, monkeypatch):
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = log_twice("wandb")
    seen, ids, configs = [], set(), []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=os.path.getmtime):
        for data in records_of(path.read_bytes()):
            record = proto.Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                configs.append({item.key: item.value_json for item in record.run.config.update})
            if record.HasField("history"):
                values = {(item.key or item.nested_key[0]): item.value_json for item in record.history.item}
                seen.append((int(values["step"]), float(values["loss"]), float(values["lr"])))
    assert seen == [(1, 1.0, 0.5), (2, 1 / 2, 0.5), (2, 1 / 2, 0.5), (3, 1 / 3, 0.5)]
    assert ids == {read_json(folder / loggers.IDS)["wandb"]} and configs[0]["zoom"] == "[0.5,2.0]"


def records_of(content: bytes, block: int = 32768):
    """Read the records of a W&B file, which is a log of LevelDB after a header of 7 bytes."""
    position, parts = 7, b""
    while position + 7 <= len(content):
        if block - position % block < 7:
            position += block - position % block
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


@pytest.fixture
def mlflow_by_default(monkeypatch, tmp_path):
    """Import MLflow for a user who has set none of its variables."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_ALLOW_FILE_STORE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return pytest.importorskip("mlflow", reason="mlflow is not installed")


def test_mlflow(log_twice, mlflow_by_default, monkeypatch, tmp_path):
    """A run goes to the database that is MLflow's default, which the packages of the extra can open."""
    pytest.importorskip("alembic", reason="alembic and sqlalchemy are not installed")
    mlflow = mlflow_by_default
    monkeypatch.setattr(loggers, "FLUSH_S", 0.0)
    check_loggers(["mlflow"])
    log_twice("mlflow")
    assert (tmp_path / "mlflow.db").is_file()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("vovnet_zoo").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 1 / 2), (2, 1 / 2), (3, 1 / 3)]
    assert run.data.params == {name: str(value) for name, value in CONFIG.items()}
    assert run.info.status == "FINISHED" and run.info.run_name == "run"


def test_mlflow_that_cannot_be_opened_is_refused_before_the_training(mlflow_by_default, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    config = dataclasses.replace(tiny_config(tmp_path / "none", tmp_path / "run"), loggers=("mlflow",))
    with pytest.raises(ValueError, match="--loggers mlflow: MLflow cannot open file:.*MLFLOW_TRACKING_URI") as error:
        train_coco.main(config)
    assert "to opt out of this exception" in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setenv("RANK", "1")  # of another process, which does not log
    check_loggers(["mlflow"])


def test_trackio(log_twice, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    storage = pytest.importorskip("trackio.sqlite_storage", reason="trackio is not installed").SQLiteStorage
    folder = log_twice("trackio")
    (name,) = storage.get_runs("vovnet_zoo")
    assert name == read_json(folder / loggers.IDS)["trackio"]
    found = [(row["step"], row["loss"]) for row in storage.get_logs("vovnet_zoo", name)]
    assert found == [(1, 1.0), (2, 1 / 2), (2, 1 / 2), (3, 1 / 3)]
    assert storage.get_run_config("vovnet_zoo", name)["lr"] == 0.1
    assert "\x1b" not in capsys.readouterr().out


def test_every_logger_has_the_methods_of_the_protocol():
    methods = {name for name in vars(Logger) if name.startswith("on_")}
    assert methods == {"on_start", "on_metrics", "on_end"}
    for logger in LOGGERS.values():
        assert {name for name in vars(logger) if name.startswith("on_")} == methods


@pytest.mark.parametrize("method", ["on_start", "on_metrics", "on_end"])
def test_an_error_in_a_logger_ends_this_logger_alone(tiny_coco, tmp_path, monkeypatch, caplog, method):
    calls = []

    class Broken:
        def __getattr__(self, name):
            def call(*arguments):
                calls.append(name)
                if name == method:
                    raise ConnectionError("no network\n" + 1000 * "x " + "to be found; plug it in")

            return call

    monkeypatch.setitem(LOGGERS, "wandb", Broken)
    config = dataclasses.replace(tiny_config(tiny_coco, tmp_path / "run"), loggers=("wandb",))
    log = RunLog(config.out, config, rank=0)
    for step in (1, 2):
        log.write(step, loss=1.0, note="no number")
    log.close()
    lines = [line for line in caplog.messages if "wandb" in line]
    assert len(lines) == 1 and "no network" in lines[0] and "plug it in" in lines[0]
    assert "\n" not in lines[0] and len(lines[0]) < 400
    assert calls.count(method) == 1 and calls[-1] == method and len(log.rows()) == 2
    assert list(log.loggers.running) == ["tensorboard"]


def test_a_logger_that_is_not_installed_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    config = dataclasses.replace(tiny_config(tmp_path / "none", tmp_path / "run"), loggers=("mlflow",))
    with pytest.raises(ValueError, match="--loggers mlflow: not installed; pip install mlflow-skinny"):
        train_coco.main(config)
    check_loggers([])


def test_the_bar_is_not_drawn_in_every_step():
    """A thousand steps take far less than the tenth of a second after which tqdm draws the bar again."""
    progress = SimpleNamespace(scored=0, train_seconds=1.0)
    config = SimpleNamespace(batch_size=1, steps=1000)
    run = SimpleNamespace(config=config, progress=progress, device=torch.device("cpu"), rank=0)
    log, terminal = SimpleNamespace(write=lambda *values, **named: None), io.StringIO()
    for step in (bar := tqdm(range(1000), file=terminal)):
        training_loop.log_step(run, log, bar, step, {"loss": step / 1000}, 1.0, lr=0.1)
    assert terminal.getvalue().count("\r") < 200 and "loss 0.999" in terminal.getvalue()
