"""These functions deal with what a recipe runs on: processes and devices, signals, the machine."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import logging
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
import timm
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

import vovnet_zoo
from vovnet_zoo.commands import find_device, make_folder, run_reporting, take_debug
from vovnet_zoo.data import ImageWarning
from vovnet_zoo.words import counted

T = TypeVar("T")
log = logging.getLogger("vovnet_zoo")  # of the job: rank 0 writes these lines
log_own = logging.getLogger("vovnet_zoo.process")  # of this process, such as images that it could not read

# A process waits so long for another. It has to outlast the scoring of all images by rank 0, and a disk that gives no
# batch (`loading.STUCK_S`), so that the process at fault is the one that reports.
TIMEOUT = datetime.timedelta(hours=1)


def run_command(main: Callable[[T], object], config: T) -> None:
    """Run a recipe: an error of the user is one line, with `--debug` also its traceback, and the exit status is 2.

    Of processes that torchrun started, one prints the line, and after any error or signal a process ends at once.

    Args:
        config: what `commands.parse_command` returned.
    """
    command, debug = Path(sys.argv[0]).stem, take_debug(sys.argv[1:])[1]
    try:
        run_reporting(command, lambda: main(config), debug, claim)
    except BaseException as error:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise
        end_at_once(command, error, debug)


def end_at_once(command: str, error: BaseException, debug: bool = False) -> NoReturn:
    """Print an error and end this process of several, without the clean-up of Python and torch.

    That clean-up would wait for the other processes, and these wait for this one, for ever with NCCL. torchrun ends
    them when it sees that one has ended. A process whose error is that another one has ended prints one line, so that
    the traceback of the first is easy to find.
    """
    if not isinstance(error, SystemExit):
        if debug or not tells_of_another(error):
            traceback.print_exception(error)
        else:
            rank = os.environ.get("RANK", "0")
            print(f"{command}: process {rank} ends, as another process has ended or cannot be reached", file=sys.stderr)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def tells_of_another(error: BaseException) -> bool:
    """Tell whether an error only says that another process does not answer. Those of gloo have no type of their own."""
    texts = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and any(t in str(error) for t in texts))


def global_rank() -> int:
    """Return the number of this process in the job that torchrun started; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def claim(line: str) -> bool:
    """Tell whether this process is the first of those that torchrun started that asks for this line."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # the store ends with the process of rank 0
        return global_rank() == 0
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"vovnet_zoo/{start}/{hashlib.sha256(line.encode()).hexdigest()}"
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=datetime.timedelta(seconds=10))
        return store.add(key, 1) == 1
    except (RuntimeError, ValueError, KeyError):  # rather twice than not at all
        return True


def check_out(path: Path, begins: bytes, option: str = "--out", example: str = "detections.json") -> None:
    """Make the folder of the file that is to be written; `ValueError` unless the file can be written there.

    The message names the option, and an example of a file's name. A file that is there already, and does not begin as
    such files do (`begins`), is one of the user's, and is kept.
    """
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder; give the name of a file, such as {path / example}")
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(len(begins))
        if not begins.startswith(start):
            raise ValueError(
                f"{option} {path} is there already, and no file that this command wrote; give another name"
            )
    make_folder(path.parent, f"{option} {path}")


@contextlib.contextmanager
def process_group(device: str | None) -> Iterator[tuple[int, int, torch.device]]:
    """Join the job that torchrun started, if it did, and leave it at the end.

    After an error the job is not left, since that would wait for the other processes: see `end_at_once`.

    Yields (rank, world size, this process's device); (0, 1, device) without torchrun. `ValueError` if there is no such
    device, if it is one GPU for several processes, or if torch cannot connect processes on it.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank, local_rank = global_rank(), int(os.environ.get("LOCAL_RANK", 0))
    start_log(rank)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if device is not None and device.startswith("cuda:") and local_size > 1:
        raise ValueError(
            f"--device {device} is one GPU for {local_size} processes; give --device cuda, which is a GPU for each, "
            "and choose among the GPUs with the variable CUDA_VISIBLE_DEVICES"
        )
    target = find_device(device, local_rank)
    check_backend(target, world_size)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    if world_size > 1:
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        if rank == 0 and restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            log.warning(
                "torchrun keeps one store over its restarts, so a restarted process may find the address of a dead "
                "one; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun"
            )
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo",  # numbers of the host do not wait for a GPU
            timeout=TIMEOUT,
            device_id=target if target.type == "cuda" else None,  # otherwise NCCL guesses it from the rank
        )
    yield rank, world_size, target
    if dist.is_initialized():
        dist.destroy_process_group()


def check_backend(device: torch.device, world_size: int) -> None:
    """Raise `ValueError` where several processes cannot work together on a type of device."""
    if world_size > 1 and device.type == "cuda" and not dist.is_nccl_available():
        raise ValueError(
            "several GPUs need NCCL, which this torch lacks (it is there on Linux only); start one process, without "
            "torchrun"
        )
    if world_size > 1 and device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: several processes need a CPU or NVIDIA GPUs; start one, without torchrun")


def start_log(rank: int) -> None:
    """Let rank 0 write the job's lines and warnings, since all processes would write the same, and each its own."""
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    log_own.setLevel(logging.INFO)
    logging.captureWarnings(True)
    if rank > 0:
        logging.getLogger("py.warnings").setLevel(logging.WARNING)
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", ImageWarning)


def all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce `x` over all processes, in place, and return it; without a process group, `x` stays as it is."""
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


def average(tensors: list[Tensor]) -> None:
    """Average floating-point tensors over all processes, in place and in one message; others stay as they are."""
    tensors = [x for x in tensors if x.is_floating_point()]
    if tensors and dist.is_initialized():
        means = all_reduce(torch.cat([x.flatten() for x in tensors])) / dist.get_world_size()
        for x, mean in zip(tensors, means.split([x.numel() for x in tensors]), strict=True):
            x.copy_(mean.view_as(x))


def gather(items: list) -> list:
    """Join the lists of all processes, on all of them."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_weights(model: nn.Module) -> None:
    """Give all processes the parameters and buffers of rank 0."""
    if dist.is_initialized():
        for x in model.state_dict().values():
            dist.broadcast(x, src=0)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def to_device(batch: dict, device: torch.device) -> dict[str, Tensor]:
    """Move the tensors of a batch to a device, and leave out all else.

    Only an NVIDIA GPU is not waited for: on Apple's, torch may read memory that was freed meanwhile.
    """
    goes_on = device.type == "cuda"
    return {name: x.to(device, non_blocking=goes_on) for name, x in batch.items() if isinstance(x, Tensor)}


REPEAT_S = 5.0


class Stopped(SystemExit):
    """A stop signal ended what the process did; the exit code is 128 + its number, as shells have it."""


class StopSignal:
    """While this context is open, SIGTERM and SIGINT (Ctrl-C) do not end the process: the number of the signal is kept
    in `received`, so that the training loop can finish its step, save, and stop.

    A second signal ends the process if it comes more than `REPEAT_S` seconds after the first. Before, it is taken for
    the same one: where a job is stopped as a whole, torchrun forwards the signal to processes that have it already.
    """

    received = 0  # no signal yet
    _at_once = False

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _remember(self, number: int, frame) -> None:
        if self.received and time.monotonic() > self._first + REPEAT_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.received:
            self.received, self._first = number, time.monotonic()
        if self._at_once:
            raise Stopped(128 + self.received)

    def agreed(self) -> int:
        """Return the number of the signal that a process received, or 0. All processes call this together."""
        return int(all_reduce(torch.tensor(self.received), dist.ReduceOp.MAX))

    @contextlib.contextmanager
    def at_once(self, message: str | None = None) -> Iterator[None]:
        """Within this context, a signal raises `Stopped`. It is for work that takes long and leaves nothing behind.

        Args:
            message: what the log then says.
        """
        self._at_once = True
        try:
            if self.received:
                raise Stopped(128 + self.received)
            yield
        except Stopped:
            if message is not None:
                log.warning("stopped by a signal %s", message)
            raise
        finally:
            self._at_once = False

    def __exit__(self, *error) -> None:
        """Kill the data loading workers too: they ignore the SIGTERM that Python sends them at its exit, and Python
        would wait for them for ever."""
        handlers = {**self._before}
        if hasattr(signal, "SIGCHLD"):  # Windows has none
            # DataLoader's handler would call this an accident
            handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def ignore_stop_signals(worker_id: int) -> None:
    """Let a data loading worker ignore SIGTERM and SIGINT; the process that it works for ends it (`worker_init_fn`)."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def environment() -> dict:
    """Name what else a run depends on: command, versions, commit, machine, and the variables that steer torch."""
    prefixes = ("OMP_", "MKL_", "ATEN_", "ONEDNN_", "TORCH", "PYTORCH_", "CUDA_", "NCCL_", "GLOO_", "WORLD_SIZE")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {p.__name__: p.__version__ for p in (torch, torchvision, timm, np, vovnet_zoo)},
        "git": _git_commit(),
        "machine": f"{platform.machine()}, {counted(os.cpu_count() or 1, 'core')}, {gpu}",
        "cpu": describe_cpu(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(prefixes)},
    }


def describe_cpu() -> dict:
    """Describe the CPU: its model, the instruction set that torch's kernels use, the number of torch's threads, and the
    vector and matrix instructions that the CPU has, by torch's names."""
    capabilities = torch.cpu.get_capabilities()
    model = capabilities.get("cpu_name") or platform.processor()
    with contextlib.suppress(OSError):  # only Linux has this file, and its line of the model not on every CPU
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    kinds = ("avx", "amx", "fma", "f16c", "neon", "sve", "sme", "bf16", "i8mm", "fp16_arith")
    return {
        "model": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "features": sorted(name for name, has in capabilities.items() if has is True and name.startswith(kinds)),
    }


def _git_commit() -> str | None:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        here = Path(__file__).parent
        return subprocess.run(
            command, cwd=here, capture_output=True, text=True, errors="replace", check=True
        ).stdout.strip()
    return None
