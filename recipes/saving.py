"""`BackgroundSaver` writes the checkpoints of a run while the training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from run_folder import save_checkpoint

LEAD = 10  # a checkpoint begins when a tenth of its interval is left, so that it is whole at the interval's end
PAUSE = 4  # after an allocation, pause so many times as long as it took


class BackgroundSaver:
    """Save checkpoints in a thread, one at a time, from a copy of the state that is made at once.

    What a killed run loses is at most one interval: where a checkpoint is not whole at the end of its interval, because
    the disk is slow or the interval is shorter than `LEAD` steps, `keep_up` waits for it.

    The copy takes as much memory of the host as a checkpoint takes on the disk, from the first checkpoint, or the call
    of `reserve`, to the end of the run. Copies of what is on a GPU are in pinned memory: they are queued behind the
    work that changed the state and before the work that will, so neither host nor GPU waits for more than the copy.
    Allocating pinned memory takes far longer than the copy, so `reserve` does it before.

    torch's own `torch.distributed.checkpoint.async_save` would need a process group in every run, and writes a folder
    of files without hashes.

    Args:
        folder: of the checkpoints.
        every: steps of an interval; None for no such limit.
        minutes: minutes of an interval; None for no such limit. The first limit that is reached counts.
        step: steps that the run has done, all of them saved.
        active: whether this process writes. In a process that does not, checkpoints count as saved at once.
    """

    def __init__(self, folder: Path, every: int | None, minutes: float | None, step: int = 0, active: bool = True):
        self.folder, self.active = folder, active
        self.every, self.seconds = every, None if minutes is None else 60 * minutes
        self._begun = self._whole = (step, time.monotonic())  # the newest checkpoint, and the newest that is whole
        self._copy: dict = {}
        self.reserved = not active  # whether there is memory for the copy, or soon will be, or none is needed
        self._hurry = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def saved(self) -> int:
        """Return how many steps the newest whole checkpoint holds."""
        return self._whole[0]

    def is_due(self, step: int) -> bool:
        """Say whether a checkpoint has to begin after `step` steps."""
        return self._has_passed(self._begun, step, 1 - 1 / LEAD)

    def reserve(self, state: dict) -> None:
        """Begin to allocate the memory for the copy of `state`, in a thread; `save` allocates what is missing then.

        While pinned memory is allocated, other threads may have to wait before they start kernels, so the thread pauses
        after each tensor. An error in the thread is raised by the next `wait`, like an error of a checkpoint.
        """
        self.wait()
        self.reserved = True
        self._start(self._reserve, state)

    def save(self, step: int, state: dict) -> None:
        """Begin to save `state` (see `save_checkpoint`); it may change as soon as this returns.

        An error of the thread before is raised.
        """
        self.wait()
        self._begun = (step, time.monotonic())
        if not self.active:
            self._whole = self._begun
            return
        self._copy, self.reserved = copy_state(state, self._copy), True
        copied = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if copied is not None:
            copied.record()
        self._start(self._write, copied)

    def keep_up(self, step: int) -> None:
        """Wait for a checkpoint that should be whole after `step` steps. Its error is raised as soon as it is there."""
        late = self._has_passed(self._whole, step, 1)
        if self._thread is not None and (late or not self._thread.is_alive()):
            self.wait()

    def wait(self) -> None:
        """Wait until the newest checkpoint is whole; an error in writing it is raised, once."""
        if self._thread is None:
            return
        self._hurry.set()
        self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    close = wait  # for contextlib.closing

    def _start(self, function: Callable, argument: Any) -> None:
        """Call `function(argument)` in a thread. Its error is kept, and raised where the training can end."""
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def run() -> None:
            try:
                if gpu is not None:  # a thread begins with the first GPU, whose memory may be full
                    torch.cuda.set_device(gpu)
                function(argument)
            except Exception as error:
                self._error = error

        self._hurry.clear()
        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def _write(self, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        save_checkpoint(self.folder, self._begun[0], self._copy)
        self._whole = self._begun

    def _reserve(self, state: dict) -> None:
        def reserve(x: Tensor, _: Any) -> Tensor:
            began = time.perf_counter()
            room = room_for(x)
            self._hurry.wait(PAUSE * (time.perf_counter() - began))  # no pause where somebody waits
            return room

        self._copy = map_tensors(reserve, state)

    def _has_passed(self, since: tuple[int, float], step: int, share: float) -> bool:
        """Say whether a share of the interval has passed since a step and a time."""
        steps, seconds = step - since[0], time.monotonic() - since[1]
        return (self.every is not None and 0 < steps >= share * self.every) or (
            self.seconds is not None and 0 < steps and seconds >= share * self.seconds
        )


def copy_state(state: Any, copy: Any = None) -> Any:
    """Copy a state (tensors, numbers, strings in dicts and lists) to the host; an NVIDIA GPU's copies are only queued.

    Args:
        copy: an earlier copy, whose tensors are written again where they fit.
    """

    def copied(x: Tensor, room: Any) -> Tensor:
        if not (isinstance(room, Tensor) and (room.shape, room.dtype) == (x.shape, x.dtype)):
            room = room_for(x)
        return room.copy_(x.detach(), non_blocking=x.is_cuda)  # Apple's GPUs would have to be waited for

    return map_tensors(copied, state, copy)


def room_for(x: Tensor) -> Tensor:
    """Allocate memory of the host for a copy of a tensor, pinned if the tensor is on a GPU."""
    return torch.empty_like(x, device="cpu", requires_grad=False, pin_memory=x.is_cuda)


def map_tensors(function: Callable[[Tensor, Any], Tensor], state: Any, other: Any = None) -> Any:
    """Replace each tensor x of a state by `function(x, y)`, where y is what `other` has in its place, or None."""
    if isinstance(state, Tensor):
        return function(state, other)
    if isinstance(state, dict):
        others = other if isinstance(other, dict) else {}
        return {name: map_tensors(function, x, others.get(name)) for name, x in state.items()}
    if isinstance(state, (list, tuple)):
        others = other if isinstance(other, (list, tuple)) and len(other) == len(state) else [None] * len(state)
        return type(state)(map_tensors(function, x, y) for x, y in zip(state, others, strict=True))
    return state
