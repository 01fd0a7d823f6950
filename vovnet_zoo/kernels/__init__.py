"""These kernels compute what torch computes, faster. Each is optional: `available` says which can be used here.

winograd.cpp, winograd.py: 3x3 convolutions on a CPU. osa.py: blocks of VoVNets. freeze.py: a model for inference.
On a GPU: nms_triton.py: non-maximum suppression. assign_triton.py, focal_triton.py, group_norm_triton.py,
max_pool_triton.py, normalize_triton.py, osa_triton.py and upsample_triton.py: parts of a training step.
tensor_cores.py: channels that suit it.
README.md says how to add one.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from dataclasses import dataclass

import torch

from . import library


@dataclass(frozen=True)
class Availability:
    """This says whether a kernel can be used here, and is true as a condition if it can."""

    usable: bool
    reason: str

    def __bool__(self) -> bool:
        return self.usable


def available() -> dict[str, Availability]:
    """Say which kernels can be used on this machine, and why the others cannot.

    "winograd" (3x3 convolutions and VoVNet blocks on a CPU) is built by this call if it was never built here, which
    takes some seconds; "nms_triton" and "training_triton" (parts of a training step) need a CUDA device and Triton.
    """
    reason = library.load()
    winograd = Availability(not reason, reason or f"built for {library.capability()}")
    if torch.cuda.is_available():
        reason = why_no_triton(torch.device("cuda"))
        triton = Availability(not reason, reason or f"compiled by Triton for {torch.cuda.get_device_name()}")
    else:
        triton = Availability(False, "torch finds no CUDA device")
    return {"winograd": winograd, **dict.fromkeys(("nms_triton", "training_triton"), triton)}


def has_triton(device: torch.device) -> bool:
    """Tell whether kernels for a GPU can be used on this device; Triton comes with torch's CUDA builds for Linux."""
    return device.type == "cuda" and not why_no_triton(device)


def suits_kernels(x: torch.Tensor) -> bool:
    """Tell whether the kernels of a training step take a map of this device and dtype; their arithmetic is float32."""
    return x.device.type == "cuda" and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def why_no_triton(device: torch.device) -> str:
    """Say why Triton cannot compile for a CUDA device; empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return f"{torch.cuda.get_device_name(device)} is older than what Triton compiles for"
    if not any(map(shutil.which, [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])):
        return "Triton needs a C compiler, and there is none; install gcc"
    return ""
