"""Kernels that compute what torch computes, faster. Each is optional: `available` says which can be used here.

winograd.cpp, winograd.py: 3x3 convolutions on a CPU. osa.py: blocks of VoVNets. freeze.py: a model for inference.
nms_triton.py: non-maximum suppression on a GPU. tensor_cores.py: channels that suit a GPU.
README.md says how to add one.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from . import library


@dataclass(frozen=True)
class Availability:
    """Whether a kernel can be used here; true as a condition if it can."""

    usable: bool
    reason: str

    def __bool__(self) -> bool:
        return self.usable


def available() -> dict[str, Availability]:
    """Which kernels can be used on this machine, and why the others cannot.

    "winograd" (3x3 convolutions and VoVNet blocks on a CPU) is built by this call if it was never built here, which
    takes some seconds; "nms_triton" needs a CUDA device and Triton.
    """
    reason = library.load()
    winograd = Availability(not reason, reason or f"built for {library.capability()}")
    if not torch.cuda.is_available():
        nms = Availability(False, "torch finds no CUDA device")
    elif importlib.util.find_spec("triton") is None:
        nms = Availability(False, "the package triton is not installed")
    else:
        nms = Availability(True, f"compiled by Triton for {torch.cuda.get_device_name()}")
    return {"winograd": winograd, "nms_triton": nms}
