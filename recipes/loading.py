"""`Batches` reads a dataset in worker processes. It says why when a batch does not come, and never waits for ever."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from runtime import Stopped, StopSignal, ignore_stop_signals

POLL_S = 2.0  # so often is looked whether there is hope, and whether a stop signal came
LOST_S = 60.0  # what a worker has finished is here within seconds
STUCK_S = 1800.0  # a disk or network that gives no batch for so long hangs
SHM = Path("/dev/shm")


class Batches:
    """This iterator gives what a `DataLoader` gives.

    Args:
        dataset, options: of the `DataLoader`; `collate_fn` may be None where `batch_size` is.
        workers: processes; with 0, this process reads.
        stop: if given, the workers leave stop signals to this process. A batch that does not come within seconds after
            a signal raises `Stopped`.

    Raises:
        RuntimeError: shared memory is full, a worker has died, a batch was lost, or none came for half an hour.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        workers: int,
        collate_fn: Callable | None = None,
        stop: StopSignal | None = None,
        **options: Any,
    ):
        # With this strategy, shared memory is freed when the processes end, even if they are killed; "file_system"
        # would leave files behind. It needs a file descriptor for each tensor on its way.
        if "file_descriptor" in torch.multiprocessing.get_all_sharing_strategies():
            torch.multiprocessing.set_sharing_strategy("file_descriptor")
        if workers and stop:  # see `kill_workers`
            multiprocessing.util.Finalize(None, kill_workers, exitpriority=10)
        self.workers, self.stop, self.received = workers, stop, 0
        self.in_turn = not isinstance(dataset, IterableDataset)  # workers of a stream end at different times
        self.finished = multiprocessing.RawArray("q", max(1, workers))  # batches that each worker has finished
        self.loader = iter(
            DataLoader(
                dataset,
                num_workers=workers,
                collate_fn=Send(collate_fn, self.finished),
                timeout=POLL_S if workers else 0,
                worker_init_fn=ignore_stop_signals if stop else None,
                **options,
            )
        )

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        began, looks_after_signal = time.monotonic(), 0
        while True:
            try:
                batch = next(self.loader)
                break
            except (RuntimeError, OSError, EOFError) as error:
                if "DataLoader timed out" not in str(error):
                    if not self.workers or "in DataLoader worker process" in str(error):  # the dataset raised it
                        raise
                    if self.stop and self.stop.received:  # Ctrl-C may have ended a worker that was just starting
                        raise Stopped(128 + self.stop.received) from error
                    why = first_line(error)
                    raise RuntimeError(
                        f"a data loading worker has died or cannot be reached: {why}{advice()}"
                    ) from error
            looks_after_signal += bool(self.stop and self.stop.received)
            if looks_after_signal > 1:
                raise Stopped(128 + self.stop.received)
            self.look(time.monotonic() - began)
        self.received += 1
        if isinstance(batch, NotSent):
            raise RuntimeError(batch.reason)
        return batch

    def look(self, waited: float) -> None:
        """Raise `RuntimeError` where the next batch will not come. Workers take turns, unless they read a stream."""
        turn, worker = divmod(self.received, self.workers)
        if self.in_turn and waited > LOST_S and self.finished[worker] > turn:
            raise RuntimeError(f"a data loading worker has finished a batch {waited:.0f} s ago that is lost{advice()}")
        if waited > STUCK_S:
            raise RuntimeError(f"no batch came for {waited:.0f} s; see whether the disk of the images still answers")


class Ahead:
    """This iterator gives the items of another one. `fetch` gets the next item before `next` asks for it."""

    def __init__(self, items: Iterator):
        self.items = items
        self.fetched: tuple[Any, BaseException | None] | None = None
        self.events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        if self.fetched is None:
            return next(self.items)
        (item, error), self.fetched = self.fetched, None
        if error is not None:
            raise error
        return item

    def fetch(self, device: torch.device) -> None:
        """Get the next item while an NVIDIA GPU computes; an error is raised by `next`. A CPU computes nothing now."""
        if device.type != "cuda":
            return
        self.events = computed, received = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        computed.record()
        try:
            self.fetched = next(self.items), None
        except (Exception, Stopped) as error:
            self.fetched = None, error
        received.record()

    def idle(self) -> float:
        """Return for how many seconds the GPU lacked work in the last `fetch`, once it was waited for."""
        if self.events is None:
            return 0.0
        (computed, received), self.events = self.events, None
        return computed.elapsed_time(received) / 1e3


def kill_workers() -> None:
    """Kill the workers that are left. At its exit Python sends them SIGTERM, which they ignore, and waits for them."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class Send:
    """This `collate_fn` puts a batch into shared memory. DataLoader would do so in a thread, and lose what fails."""

    def __init__(self, collate_fn: Callable | None, finished: Any):
        self.collate_fn, self.finished = collate_fn, finished

    def __call__(self, samples: Any) -> Any:
        batch, worker = self.collate_fn(samples) if self.collate_fn else samples, get_worker_info()
        if worker is None:
            return batch
        tensors = list(tensors_in(batch))
        try:
            for x in tensors:
                x.as_subclass(Tensor).share_memory_()
        except (RuntimeError, OSError) as error:
            size = sum(x.nbytes for x in tensors) / 2**20
            batch = NotSent(
                f"a batch of {size:.0f} MiB cannot be put into shared memory: {first_line(error)}{advice()}"
            )
        self.finished[worker.id] += 1
        return batch


@dataclass(frozen=True)
class NotSent:
    """This takes the place of a batch that could not be sent."""

    reason: str


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """Find all tensors in dicts, lists and tuples."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (dict, list, tuple)):
        for item in batch.values() if isinstance(batch, dict) else batch:
            yield from tensors_in(item)


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def advice() -> str:
    """Say what to do about shared memory."""
    if not SHM.is_dir():  # only Linux limits shared memory by itself
        return "; memory may be too small: lower --workers or --batch-size"
    usage = shutil.disk_usage(SHM)
    room = f" ({SHM} has {usage.total / 2**20:.0f} MiB, {usage.free / 2**20:.0f} MiB of them free)"
    return (
        f"; memory or shared memory may be too small{room}: enlarge it (docker run --shm-size=2g, or --ipc=host), or "
        "lower --workers or --batch-size; --workers 0 needs no shared memory"
    )
