"""Compiled and quantised files depend on the instructions that a CPU has."""

from __future__ import annotations

import logging
import re

import torch

log = logging.getLogger("vovnet_zoo")

# Groups that a compiler uses by itself, as torch calls them. AMX is used by libraries, which look for it.
COMPILED = re.compile(r"avx(?!10)|fma3|f16c|bmi|sve|i8mm|bf16|dot")
# One instruction multiplies numbers of 8 bits and adds the products up in 32 bits. Without it, three do so.
INT8 = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "dot")


def compiled_for() -> list[str]:
    """Name the groups of instructions that code may have which is compiled for this CPU."""
    return sorted(
        name for name, there in torch.cpu.get_capabilities().items() if there is True and COMPILED.match(name)
    )


def int8_instructions() -> list[str]:
    """Name the groups of instructions of this CPU that multiply numbers of 8 bits fast."""
    there = torch.cpu.get_capabilities()
    return [name for name in INT8 if there.get(name) is True]


def warn_of_the_cpu() -> None:
    """Warn where int8 is not worth while."""
    if not int8_instructions():
        log.warning("this CPU has no instructions for int8 (AVX-512 VNNI, AVX-VNNI, AMX, i8mm): expect little gain")
