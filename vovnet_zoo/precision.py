"""A network computes in one of these precisions, and a CPU may be slow in two of them."""

from __future__ import annotations

import functools
import logging

import torch

from .config import Precision

log = logging.getLogger("vovnet_zoo")

DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def warn_of_slow_precision(device: torch.device, dtype: torch.dtype, winograd: bool = False) -> None:
    """Log one line, the first time in a process, where a network is to compute in a precision that a CPU is slow in.

    A 3x3 convolution of 64 channels in float16 took 1.6 times as long as in float32 where the CPU has instructions for
    float16 (AVX512-FP16), and 8.8 times as long with AVX2 only; in bfloat16 10 times as long with AVX2 only.

    Args:
        winograd: convolutions are ours, which multiply in float32 under bfloat16.
    """
    if device.type == "cpu" and dtype == torch.float16:
        _warn_of_float16()
    elif device.type == "cpu" and dtype == torch.bfloat16 and not winograd and not multiplies_bfloat16():
        _warn_of_bfloat16()


@functools.cache
def _warn_of_float16() -> None:
    better = "bf16 (bfloat16), which this CPU multiplies fast, or float32" if multiplies_bfloat16() else "float32"
    log.warning("fp16 (float16) is slower on a CPU than float32, on many CPUs several times; give %s", better)


@functools.cache
def _warn_of_bfloat16() -> None:
    log.warning("bf16 (bfloat16) is several times slower than float32 on this CPU, which has no instructions for it")


def multiplies_bfloat16() -> bool:
    """Tell whether torch multiplies bfloat16 matrices on this CPU with instructions made for it.

    Without them a product of bfloat16 matrices takes tens of times longer than one of float32.
    """
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2") and "avx2" in torch.cpu.get_capabilities():
        return False  # torch uses no more than AVX2 of this x86-64 CPU, and bfloat16 needs more
    has = torch.cpu.get_capabilities()
    return any(has.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))  # the last is Arm's
