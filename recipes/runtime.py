"""What surrounds a training step: processes, signals, the run's log."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

import vovnet_zoo

log = logging.getLogger("vovnet_zoo")


@contextlib.contextmanager
def process_group(device: str | None) -> Iterator[tuple[int, int, torch.device]]:
    """Join the job torchrun started, if one did: (rank, world size, this process's device)."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    logging.captureWarnings(True)
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    target = torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    if world_size > 1:
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        if rank == 0 and restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            log.warning(
                "torchrun keeps one store over its restarts, so a restarted process may find the address of a dead "
                "one; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun"
            )
        dist.init_process_group("nccl" if target.type == "cuda" else "gloo")
    try:
        yield rank, world_size, target
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """`x` reduced over all processes, in place; `x` itself without a process group."""
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


def all_reduce_gradients(model: nn.Module) -> None:
    """Sum gradients over all processes, as one message.

    Not DistributedDataParallel: the losses of all processes already share one normaliser, so gradients are summed;
    one message in parameter order gives the same rounding in a resumed run; and nothing hooks into the graph.
    """
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    parts = flat.split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


class StopSignal:
    """While it is open, SIGTERM and SIGINT (Ctrl-C) are remembered instead of died of, so that a step can be finished
    and saved. A second one means it. `received` is the number of the signal, or 0."""

    received = 0

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _remember(self, number: int, frame) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number

    def __exit__(self, *error) -> None:
        """Ends the workers too: at its exit, Python would send those left over a SIGTERM, and wait for ever."""
        watch = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would take it for an accident
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()
        for number, handler in {**self._before, signal.SIGCHLD: watch}.items():
            signal.signal(number, handler)


def ignore_stop_signals(worker_id: int) -> None:
    """For data loading workers: the process they work for says when they stop."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class RunLog:
    """The run folder: `run.json` (configuration, versions, command), `metrics.jsonl` (a JSON object a line), and
    tensorboard where it is installed.

    Rows of steps from `start_step` on, left by a run that was killed, are dropped. Only rank 0 writes.
    """

    def __init__(self, folder: Path, config, rank: int, start_step: int = 0):
        self.folder, self.active, self.tensorboard = folder, rank == 0, None
        if not self.active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / "run.json"
        starts = json.loads(about.read_text())["starts"] if start_step and about.is_file() else []
        starts.append({"step": start_step, **environment()})
        about.write_text(json.dumps({"config": dataclasses.asdict(config), "starts": starts}, indent=2, default=str))
        kept = [row for row in self.rows() if row["step"] < start_step]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.file = open(folder / "metrics.jsonl", "a")  # noqa: SIM115  (closed by close)
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step or None)

    def write(self, step: int, **values) -> None:
        """Add a row for `step`."""
        if not self.active:
            return
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.tensorboard is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.tensorboard.add_scalar(name, value, step)

    def rows(self) -> list[dict]:
        """All whole rows so far."""
        path, rows = self.folder / "metrics.jsonl", []
        for line in path.read_text().splitlines() if path.is_file() else []:
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run
                rows.append(json.loads(line))
        return rows

    def close(self) -> None:
        if self.active:
            self.file.close()
            if self.tensorboard is not None:
                self.tensorboard.close()


def environment() -> dict:
    """What else a run depends on: command, versions, commit, machine, and the variables that steer torch."""
    prefixes = ("OMP_", "MKL_", "ATEN_", "ONEDNN_", "TORCH", "PYTORCH_", "CUDA_", "NCCL_", "GLOO_", "WORLD_SIZE")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {p.__name__: p.__version__ for p in (torch, torchvision, timm, np, vovnet_zoo)},
        "git": _git_commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {gpu}",
        "cpu": describe_cpu(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes)},
    }


def describe_cpu() -> dict:
    """Describe the CPU: its model, the instruction set that torch's kernels use, the number of torch's threads, and the
    vector and matrix instructions that the CPU has, by torch's names."""
    capabilities = torch.cpu.get_capabilities()
    model = capabilities.get("cpu_name") or platform.processor()
    with contextlib.suppress(OSError):  # only Linux has this file, and its line of the model not on every CPU
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    kinds = ("avx", "amx", "fma", "f16c", "neon", "sve", "sme", "bf16", "i8mm", "fp16_arith")
    return {
        "model": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "features": sorted(name for name, has in capabilities.items() if has is True and name.startswith(kinds)),
    }


def peak_memory(device: torch.device) -> float:
    """Most memory so far, in GiB: allocated on a GPU, resident of this process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _git_commit() -> str | None:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        here = Path(__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    return None
