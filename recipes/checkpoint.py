"""Checkpoints: whole or not there at all.

A file is written under a temporary name, flushed to the disk and renamed; its name carries the first digits of its
SHA-256, so a damaged one is noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from pathlib import Path

import torch
import torch.distributed as dist

from runtime import log


def save_checkpoint(folder: Path, step: int, state: dict, keep: int = 2) -> Path:
    """Write `state` (tensors, numbers, strings in dicts and lists) after `step` steps; keep the newest `keep` files.

    `OSError` if it cannot be written, a full disk for instance; earlier checkpoints are then untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    path = folder / f"{step:08d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    try:
        write_whole(path, content)
    except OSError as error:
        newest = list_checkpoints(folder)
        intact = f"{newest[-1]} is intact" if newest else "there is no earlier one"
        raise OSError(error.errno, f"checkpoint of step {step} not saved ({error.strerror}); {intact}", path) from error
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def load_checkpoint(folder: Path) -> dict | None:
    """The newest undamaged checkpoint's state, on the CPU, given by rank 0 to all processes; None if there is none."""
    state = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        state = [_newest(folder)]
    if dist.is_initialized():
        dist.broadcast_object_list(state, src=0)
    return state[0]


def _newest(folder: Path) -> dict | None:
    for path in reversed(list_checkpoints(folder)):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest()[:16] == path.stem.partition("-")[2]:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        log.warning("%s is damaged (its hash is not the one in its name); using the one before", path)
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("????????-????????????????.pt"))


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that after a crash it is either whole or not there under this name."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)
