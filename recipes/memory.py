"""These functions measure memory: what a process uses, and what autograd keeps."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

try:
    import resource
except ImportError:  # on Windows
    resource = None


def peak_memory(device: torch.device) -> float | None:
    """Return the most memory used so far, in GiB: allocated on a GPU, otherwise resident memory of this process.

    Windows does not tell a process its resident memory; the result is then None.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def kept_by(call: Callable) -> float:
    """Return the memory, in MiB, that autograd keeps in a call for its backward pass, without the weights themselves.

    Memory that several tensors share is counted once.
    """
    kept = {}

    def keep(x: Tensor) -> Tensor:
        if not (x.is_leaf and x.requires_grad):
            storage = x.untyped_storage()  # a fake tensor's has no address, so the storage itself is the key
            kept[storage._cdata] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        call()
    return sum(kept.values()) / 2**20
