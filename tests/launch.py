"""The tests start recipes, or Python, in a fresh process, as users do."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import train_coco
from presets import TrainConfig, parse

ROOT = Path(__file__).resolve().parents[1]
STORE_PER_RESTART = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see recipes/guides/training.md
TINY = (
    "--model fcos --backbone test_resnet --channels 64 --num-convs 1 --min-size 48 64 --max-size 96 --test-size 64 "
    "--augment flip --precision float32"
)


def command(script: str, options: list, processes: int = 1, torchrun: str = "--standalone") -> list:
    """The command line of a recipe, under torchrun for several processes."""
    launch = (
        ["-m", "torch.distributed.run", *torchrun.split(), f"--nproc-per-node={processes}"] if processes > 1 else []
    )
    return [sys.executable, *launch, ROOT / "recipes" / script, *options]


def train_command(data: Path, out: Path, options: str = "", processes: int = 1, torchrun: str = "--standalone") -> list:
    """The finetune preset with a tiny model."""
    line = ["finetune", "--data", data, "--out", out, *TINY.split(), "--batch-size", "4", "--device", "cpu"]
    return command("train_coco.py", [*line, *options.split()], processes, torchrun)


def tiny_config(data: Path, out: Path) -> TrainConfig:
    """Four steps of a tiny model, scored after the second and the fourth."""
    return TrainConfig(
        data=data, out=out, model="fcos", backbone="test_resnet", channels=64, num_convs=1, min_size=(64, 64),
        max_size=96, test_size=64, batch_size=4, workers=0, steps=4, eval_every=2, device="cpu",
    )  # fmt: skip


def train_config(data: Path, out: Path, options: str = "") -> TrainConfig:
    """What the recipe makes of the command's options."""
    return parse([str(x) for x in train_command(data, out, options)[2:]])


def train_here(data: Path, out: Path, options: str = "") -> None:
    """Run the command in this process, which has imported torch already: that is most of a short run's time."""
    train_coco.main(train_config(data, out, options))


def fork(processes: int, function: Callable, *arguments) -> str:
    """Call `function(rank, *arguments)` in processes of one group, copied from a server that has imported torch.

    A process that torchrun starts needs seconds for that. `function` has a name in its module. The server runs nothing
    else: in a copy of a process that has used autograd's threads, or hotcoco's, these are missing. Returns what the
    processes printed, and prints it: they inherit the server's standard error, which is the standard error of the test
    that came first.
    """
    paths = [str(Path(__file__).parent), str(ROOT / "recipes"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))  # the server does not get sys.path
    multiprocessing.set_forkserver_preload(["launch", "eval_coco"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.NamedTemporaryFile("r", errors="replace") as printed:
        rank_arguments = (processes, port, printed.name, function, arguments)
        try:
            mp.start_processes(_be_rank, rank_arguments, nprocs=processes, start_method="forkserver")
        finally:
            text = printed.read()
            print(text, end="")
    return text


def _be_rank(rank: int, processes: int, port: int, printed: str, function: Callable, arguments: tuple) -> None:
    with open(printed, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in group.items()}
    function(rank, *arguments)


def train_forked(data: Path, out: Path, options: str, processes: int) -> str:
    """Run the command in several processes, without torchrun; returns what was printed."""
    return fork(processes, _train_rank, data, out, options)


def _train_rank(rank: int, data: Path, out: Path, options: str) -> None:
    train_here(data, out, options)


def train(data: Path, out: Path, options: str = "", processes: int = 1, fails: bool = False) -> str:
    """Run it; returns what was printed."""
    line = train_command(data, out, options, processes)
    result = subprocess.run(line, capture_output=True, text=True, timeout=240)
    assert (result.returncode != 0) == fails, result.stdout + result.stderr
    return result.stdout + result.stderr


def rows(out: Path) -> list[dict]:
    """The run's metrics.jsonl, so far."""
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out) if "loss" in row]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code that may import this checkout of vovnet_zoo."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT.parent, capture_output=True, text=True, timeout=300
    )


HEAVY = {"PIL", "huggingface_hub", "numpy", "safetensors", "torch", "torchvision"}  # they take most of a second
HEAVY |= {"timm.layers"}  # "timm" is listed also where vovnet_zoo asks whether it is imported


def run_light(*line: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """Run `python LINE`; returns the names of all modules that it imported, too."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPROFILEIMPORTTIME": "1", "COLUMNS": "120"}
    result = subprocess.run(
        [sys.executable, *line], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    lines = result.stderr.splitlines(keepends=True)
    imported = {line.rsplit("|")[-1].strip() for line in lines if line.startswith("import time:")}
    result.stderr = "".join(line for line in lines if not line.startswith("import time:"))
    assert "tyro" in imported
    return result, imported


def run_in_interpreter(code: str) -> None:
    """Run code that may import tests and recipes, in whose process Triton's interpreter runs kernels on the CPU."""
    pytest.importorskip("triton")
    path = os.pathsep.join([str(ROOT / "recipes"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "tests",
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if "only 0-dimensional arrays can be converted to Python scalars" in result.stderr:
        pytest.skip("the interpreter of Triton 3.6 cannot count to a kernel's argument with NumPy 2.4")
    assert result.returncode == 0, result.stderr
