"""A `Logger` gives the numbers of a run to a tracking tool. No tool is needed, and none can end a run."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from runtime import global_rank, log
from vovnet_zoo.files import write_whole

PROJECT = "vovnet_zoo"  # W&B, MLflow and trackio show runs by project; the tools' own variables name another
IDS = "tracking.json"  # in the run folder: the run's name in each tool, with which it goes on there
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny sqlalchemy alembic", "trackio": "trackio"}
FLUSH_S = 10.0  # MLflow's client waits for its server, so numbers are sent together
REASON = 300  # characters of an error that the log shows, of its beginning and its end


class Logger(Protocol):
    """A tool gets a run's configuration, then numbers by step, and then the end. It may raise anything."""

    def on_start(self, folder: Path, config: dict[str, Any], step: int) -> None:
        """Begin a run, or go on with it after `step` steps. `config` holds what JSON can hold."""

    def on_metrics(self, step: int, values: dict[str, float]) -> None:
        """Note numbers after `step` steps. A run that was killed repeats the steps after its last checkpoint."""

    def on_end(self) -> None:
        """Send what is left. The run is complete, or was stopped."""


class TensorBoard:
    """This writes event files in the folder `tensorboard` of the run."""

    def on_start(self, folder: Path, config: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def on_metrics(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def on_end(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """This makes a run at Weights & Biases; WANDB_MODE=offline keeps it in the run folder."""

    def on_start(self, folder: Path, config: dict[str, Any], step: int) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            dir=str(folder),
            config=config,
            id=read_id(folder, "wandb", step),
            resume="allow",
        )
        write_id(folder, "wandb", self.run.id)
        self.run.define_metric("*", step_metric="step")  # W&B's own steps cannot go back, as a killed run does

    def on_metrics(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def on_end(self) -> None:
        self.run.finish()


class MLflow:
    """This makes a run at the server, or in the database or folder, that MLFLOW_TRACKING_URI names, or in mlflow.db."""

    def on_start(self, folder: Path, config: dict[str, Any], step: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.client, self.new_metric = MlflowClient(), Metric
        self.waiting, self.sent = [], time.monotonic()
        self.run_id = read_id(folder, "mlflow", step)
        if self.run_id is None:
            project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self.client.get_experiment_by_name(project)
            experiment_id = found.experiment_id if found else self.client.create_experiment(project)
            self.run_id = self.client.create_run(experiment_id, run_name=folder.name).info.run_id
            params = [Param(name, str(value)) for name, value in config.items()]
            for i in range(0, len(params), 100):  # the most that MLflow takes at once
                self.client.log_batch(self.run_id, params=params[i : i + 100])
        write_id(folder, "mlflow", self.run_id)

    def on_metrics(self, step: int, values: dict[str, float]) -> None:
        now = int(1000 * time.time())
        self.waiting += [self.new_metric(name, value, now, step) for name, value in values.items()]
        if time.monotonic() > self.sent + FLUSH_S:
            self.flush()

    def flush(self) -> None:
        for i in range(0, len(self.waiting), 1000):  # the most that MLflow takes at once
            self.client.log_batch(self.run_id, metrics=self.waiting[i : i + 1000])
        self.waiting, self.sent = [], time.monotonic()

    def on_end(self) -> None:
        self.flush()
        self.client.set_terminated(self.run_id)


class Trackio:
    """This makes a run in trackio's local database, or where TRACKIO_SPACE_ID says."""

    def on_start(self, folder: Path, config: dict[str, Any], step: int) -> None:
        import trackio

        name = read_id(folder, "trackio", step) or f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        with contextlib.redirect_stdout(io.StringIO()):  # trackio prints in colours, also where there is no terminal
            self.run = trackio.init(project=project, name=name, config=config, resume="allow", embed=False)
        log.info("trackio: the run is %s; trackio show --project %s", name, project)
        write_id(folder, "trackio", name)

    def on_metrics(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def on_end(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.run.finish()


LOGGERS: dict[str, Callable[[], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}


class Loggers:
    """Several loggers are called as one. An error in one of them is a line of the log, and ends this logger alone."""

    def __init__(self, names: Sequence[str]):
        self.running = {name: LOGGERS[name]() for name in dict.fromkeys(names)}

    def on_start(self, folder: Path, config: dict[str, Any], step: int) -> None:
        self._call("on_start", folder, config, step)

    def on_metrics(self, step: int, values: dict[str, float]) -> None:
        self._call("on_metrics", step, values)

    def on_end(self) -> None:
        self._call("on_end")

    def _call(self, method: str, *arguments: Any) -> None:
        for name, logger in list(self.running.items()):
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:  # a tool that does not fit the other packages raises anything
                reason = shortened(repr(error))
                log.warning("nothing for %s from now on (%s); metrics.jsonl has all numbers", name, reason)
                del self.running[name]


def shortened(text: str) -> str:
    """Write a text in one line, and leave out the middle of a long one: its end may say what to do."""
    line, half = " ".join(text.split()), REASON // 2
    return line if len(line) <= REASON else f"{line[:half]} ... {line[-half:]}"


def check_loggers(names: Sequence[str]) -> None:
    """Raise `ValueError` if the packages of loggers are not installed, or MLflow cannot open where its runs go."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        packages = " ".join(PACKAGES[name] for name in missing)
        raise ValueError(f"--loggers {' '.join(missing)}: not installed; pip install {packages}")
    if "mlflow" in names and global_rank() == 0:  # two processes would make the same database
        from mlflow import MlflowClient

        try:
            MlflowClient()
        except Exception as error:  # of a database, any
            place = os.environ.get("MLFLOW_TRACKING_URI") or "mlflow.db in this folder"
            raise ValueError(
                f"--loggers mlflow: MLflow cannot open {place} ({shortened(str(error))}); set MLFLOW_TRACKING_URI to "
                "a server, to a database (sqlite:///mlflow.db; pip install sqlalchemy alembic), or to a folder with "
                "MLFLOW_ALLOW_FILE_STORE=true"
            ) from error


def read_id(folder: Path, name: str, step: int) -> str | None:
    """Return a run's id in a tool if the run goes on there; None if it begins."""
    path = folder / IDS
    return json.loads(path.read_bytes()).get(name) if step and path.is_file() else None


def write_id(folder: Path, name: str, value: str) -> None:
    """Note a run's id in a tool."""
    path = folder / IDS
    ids = json.loads(path.read_bytes()) if path.is_file() else {}
    write_whole(path, json.dumps({**ids, name: value}).encode())
