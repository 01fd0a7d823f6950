"""This module builds the C++ kernels once for each kind of CPU, caches the library and loads it.

Nothing here runs when the package is imported. `load` builds if it must, and says why it cannot instead of raising.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ..commands import how_to_install
from ..files import cache_folder

log = logging.getLogger("vovnet_zoo")

SOURCES = [Path(__file__).with_name("winograd.cpp")]
FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-shared",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]  # runs with torch 2.11 on
INSTRUCTION_SETS = {  # what torch means by its capabilities on x86-64; elsewhere the compiler's default is enough
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"],
}


def capability() -> str:
    """Name the instruction set that torch uses here: "AVX512", "AVX2" or "DEFAULT" on x86-64.

    The environment variable ATEN_CPU_CAPABILITY (avx2, default) makes torch, and these kernels, use a smaller one.
    """
    return torch.backends.cpu.get_cpu_capability().partition(" ")[0]


@functools.cache
def load() -> str:
    """Load the library into torch, built first if the cache does not hold it; returns "" or why that is impossible.

    A build takes about five seconds. The environment variable CXX names the compiler, else it is c++, g++ or clang++;
    the cache is the folder `vovnet_zoo` in XDG_CACHE_HOME or `~/.cache`. A library belongs to the source, the compiler
    and the instruction set, so CPUs of several kinds can share a cache.
    """
    try:
        torch.ops.load_library(str(_built()))
    except (OSError, RuntimeError) as error:
        return " ".join(str(error).split())
    return ""


def _built() -> Path:
    """Return the library's file, from the cache or built now; a `RuntimeError` or `OSError` says why there is none."""
    if sys.platform == "win32":
        raise RuntimeError("they are not built on Windows")
    cache = cache_folder()
    flags = [*FLAGS, *(INSTRUCTION_SETS.get(capability(), []) if platform.machine() in ("x86_64", "AMD64") else [])]
    contents = _digest([source.read_bytes() for source in SOURCES], flags)
    stem = f"kernels-{platform.machine()}-{capability()}-{contents}".lower()
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    found = shutil.which(compiler.partition(" ")[0])
    if found is None:
        if kept := sorted(cache.glob(f"{stem}-*.so")):  # another compiler's serves as well
            return kept[0]
        raise RuntimeError(
            f"there is no C++ compiler {compiler!r}; {how_to_install('g++')}, or name one in the environment "
            "variable CXX"
        )
    real = Path(found).resolve()
    path = cache / f"{stem}-{_digest(str(real), real.stat().st_mtime_ns, compiler)}.so"
    if not path.exists():
        _build([*compiler.split(), *flags], path)
    return path


def _build(command: list[str], path: Path) -> None:
    log.info("building %s, which takes some seconds", path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent)  # other processes may be at it as well
    except OSError as error:
        raise RuntimeError(
            f"the folder {path.parent} for built kernels cannot be written ({error.strerror}); name another in the "
            "environment variable XDG_CACHE_HOME"
        ) from error
    root = Path(torch.__file__).parent
    links = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [f"-L{root / 'lib'}", "-ltorch_cpu"]
    with folder as name:
        built = Path(name) / path.name
        whole = [*command, f"-I{root / 'include'}", *map(str, SOURCES), "-o", str(built), *links]
        result = subprocess.run(whole, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
            raise RuntimeError(f"{' '.join(command)} could not build the kernels: {errors[0] if errors else ''}")
        built.replace(path)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
