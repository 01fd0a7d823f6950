"""The C++ library: built once for each kind of CPU, and never needed."""

import os
import subprocess
import sys

import pytest
import torch

from vovnet_zoo import compile_detector, create_detector, kernels
from vovnet_zoo.kernels import library


def run(code, cache, **environment):
    """What a new process prints that runs `code` with an empty cache for built kernels."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"} | environment
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


DETECTOR = """
import torch, vovnet_zoo
from vovnet_zoo import kernels
from vovnet_zoo.kernels.winograd import use_winograd
print(kernels.available()["winograd"].reason)
model = vovnet_zoo.create_detector("fcos", backbone="vovnet27_slim", channels=64, num_convs=1, num_classes=3)
images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
print(vovnet_zoo.compile_detector(model, (64, 64), backend="eager")(images).count.shape)
print(use_winograd(model))
model(torch.zeros(1, 3, 64, 64)).logits.sum().backward()
try:
    vovnet_zoo.compile_detector(model, (64, 64), winograd=True)
except ValueError as error:
    print("ValueError:", error)
"""


def broken_compiler(folder):
    path = folder / "broken-c++"
    path.write_text("#!/bin/sh\necho 'error: this compiler is broken' >&2\nexit 1\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("fault", ["no compiler", "broken compiler", "no place for the cache"])
def test_a_detector_works_without_the_kernels(fault, tmp_path):
    """One clear line says why they are not used; nothing raises but what demands them."""
    cache, environment = tmp_path / "cache", {"CXX": "no-such-compiler"}
    reason = "there is no C++ compiler 'no-such-compiler'; install one (apt install g++)"
    if fault == "broken compiler":
        environment, reason = {"CXX": broken_compiler(tmp_path)}, "could not build the kernels: error: this compiler"
    if fault == "no place for the cache":
        if missing := library.load():
            pytest.skip(missing)
        cache.write_text("a file where the folder should be")
        environment, reason = {}, "cannot be written"
    printed = run(DETECTOR, cache, **environment)
    assert printed.splitlines()[0].count(reason) == 1
    assert "torch.Size([1])" in printed and "\n0\n" in printed
    assert f"ValueError: winograd=True, but the kernels cannot be used: {printed.splitlines()[0]}" in printed
    assert f"compile_detector uses torch's convolutions instead of Winograd's: {printed.splitlines()[0]}" in printed
    assert f"Winograd convolutions are not used: {printed.splitlines()[0]}" in printed


def test_the_cache(tmp_path, monkeypatch):
    """A library is built once, and a process needs no compiler for what is built."""
    if reason := library.load():
        pytest.skip(reason)
    compiler = tmp_path / "counting-c++"
    real = os.environ.get("CXX", "c++")
    compiler.write_text(f'#!/bin/sh\necho built >> {tmp_path / "count"}\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    for _ in range(2):
        built = library._built()
    assert (tmp_path / "count").read_text() == "built\n"
    code = "from vovnet_zoo import kernels; print(kernels.available()['winograd'])"
    assert "usable=True" in run(code, tmp_path / "cache", CXX="no-such-compiler")
    assert list((tmp_path / "cache" / "vovnet_zoo").iterdir()) == [built]
    assert built.suffix == ".so" and library.capability().lower() in built.name


def test_each_instruction_set_has_a_library_of_its_own(tmp_path, monkeypatch):
    """CPUs of several kinds may share a home folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths, commands = set(), []
    monkeypatch.setattr(library, "_build", lambda command, path: commands.append(command))
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(library.shutil, "which", lambda name: sys.executable)  # some file in place of a compiler
    for capability in ("DEFAULT", "AVX2", "AVX512"):
        monkeypatch.setattr(library, "capability", lambda capability=capability: capability)
        paths.add(library._built())
    assert len(paths) == 3
    assert [[flag for flag in command if flag.startswith("-m")] for command in commands] == [
        [],
        ["-mavx2", "-mfma"],
        ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"],
    ]


def test_availability():
    found = kernels.available()
    assert set(found) == {"winograd", "nms_triton", "training_triton"}
    assert bool(found["winograd"]) == found["winograd"].usable and found["winograd"].reason
    if not torch.cuda.is_available():
        for name in ("nms_triton", "training_triton"):
            assert not found[name] and found[name].reason == "torch finds no CUDA device"


def test_what_is_demanded_and_cannot_be():
    model = create_detector("fcos", backbone="vovnet27_slim", channels=64, num_convs=1, num_classes=3)
    with pytest.raises(ValueError, match="winograd=True.* float32 and bfloat16"):
        compile_detector(model, (64, 64), torch.float16, winograd=True)
    declined = compile_detector(model, (64, 64), winograd=False, backend="eager")
    assert declined(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).count.shape == (1,)
