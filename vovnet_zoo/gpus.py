"""`GPUS` holds what the manufacturer's data sheets say of GPUs.

Data sheets give peaks that no program reaches; `planning.py` multiplies them by a measured efficiency.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU has these peaks. "dense" means that no products are left out for zeros in the weights (sparsity)."""

    title: str
    memory_gb: float
    tflops: Mapping[str, float]  # dense, by precision of the network; "float32" with TF32 where the GPU has it
    link_gb_s: float  # to another GPU of the same machine, in one direction
    link: str
    source: str


def _tflops(float32: float, bf16: float | None = None, fp16: float | None = None) -> Mapping[str, float]:
    found = {"float32": float32, "bf16": bf16, "fp16": fp16 or bf16}
    return {name: value for name, value in found.items() if value is not None}


# A link of PCI Express x16 carries 15.75 GB/s in one direction in generation 3, and twice that in generation 4.
# NVIDIA's data sheets give tensor peaks of Ampere and later with sparsity: half of each is here.
GPUS = {
    "h100": Gpu("H100 SXM", 80, _tflops(494.7, 989.4), 450, "NVLink 4", "NVIDIA H100 data sheet (SXM)"),
    "h200": Gpu("H200 SXM", 141, _tflops(494.7, 989.4), 450, "NVLink 4", "NVIDIA H200 data sheet (SXM)"),
    "a100": Gpu("A100 SXM", 80, _tflops(156, 312), 300, "NVLink 3", "NVIDIA A100 80GB data sheet (SXM)"),
    "v100": Gpu("V100 SXM2", 32, _tflops(15.7, fp16=125), 150, "NVLink 2", "NVIDIA V100 data sheet (SXM2)"),
    "l40s": Gpu("L40S", 48, _tflops(183, 362), 31.5, "PCIe 4.0 x16", "NVIDIA L40S data sheet"),
    "l4": Gpu("L4", 24, _tflops(60, 121), 31.5, "PCIe 4.0 x16", "NVIDIA L4 data sheet"),
    "a10": Gpu("A10", 24, _tflops(62.5, 125), 31.5, "PCIe 4.0 x16", "NVIDIA A10 data sheet"),
    "t4": Gpu("T4", 16, _tflops(8.1, fp16=65), 15.75, "PCIe 3.0 x16", "NVIDIA T4 data sheet"),
    "rtx4090": Gpu(
        "RTX 4090", 24, _tflops(82.6, 165.2), 31.5, "PCIe 4.0 x16", "NVIDIA Ada architecture whitepaper, V2.01"
    ),
    "rtx3090": Gpu("RTX 3090", 24, _tflops(35.6, 71), 31.5, "PCIe 4.0 x16", "NVIDIA Ampere GA102 whitepaper, V2.1"),
}


def find_gpu(device_name: str) -> str | None:
    """Return the key of the GPU in `GPUS` that a driver calls by this name, such as "NVIDIA H100 80GB HBM3".

    Other forms of these GPUs (PCIe cards, laptops) have other peaks, and are none of them: the result is None.
    """
    words = re.sub(r"rtx ", "rtx", device_name.lower())
    tokens = re.split(r"[^a-z0-9]+", words)
    if not {"pcie", "nvl", "laptop"}.isdisjoint(tokens):
        return None
    return next((key for key in GPUS if key in tokens), None)
