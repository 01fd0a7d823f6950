"""OpenVINO, ONNX Runtime and ncnn run the network of a detector on the CPU, so that `benchmark.py` can time them.

Each of them is exported from the same PyTorch model, computes in float32, and uses as many threads as PyTorch does. The
runtimes are optional: `pip install -e '.[bench]'` installs them, and each is imported only when it is used.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from runtime import log
from vovnet_zoo import FCOS
from vovnet_zoo.export.registry import import_package

Outputs = Sequence[np.ndarray]
OUTPUTS = ["logits", "distances", "centerness"]


@dataclass(frozen=True)
class Runtime:
    """A runtime is known by its name, the packages it needs, and the function that exports a network to it.

    `load(network, images, threads)` returns a call without arguments, which runs the network on `images`, a float32
    tensor [B,3,H,W], and returns the `OUTPUTS`.
    """

    title: str
    packages: tuple[str, ...]  # the first is the runtime itself, the others export
    load: Callable[[nn.Module, Tensor, int], Callable[[], Outputs]]
    batched: bool = True  # more than one image a call


class Network(nn.Module):
    """The network of a detector returns its raw outputs as a tuple, which every exporter understands.

    The outputs are class logits [B,P,K], distances [B,P,4] in pixels and centerness logits [B,P], without the decoding
    into boxes and without NMS.
    """

    def __init__(self, model: FCOS):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`images`: float32 [B,3,H,W], normalised; 32 divides H and W."""
        predictions = self.model(images)
        return predictions.logits, predictions.distances, predictions.centerness


def load_runtimes(names: Sequence[str], network: nn.Module, images: Tensor) -> dict[str, Callable[[], Outputs]]:
    """Export `network` to every runtime of `names` that can be used, and return a call for each (see `Runtime`).

    The log has one line for each runtime that is left out, and says why.

    Raises:
        RuntimeError: a runtime is installed, but cannot convert or load the network.
    """
    reasons = {name: why_left_out(name, len(images)) for name in names}
    for name, reason in reasons.items():
        if reason:
            log.warning("%s is left out: %s", RUNTIMES[name].title, reason)
    used = [name for name, reason in reasons.items() if not reason]
    if used and {"ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"} & os.environ.keys():
        log.warning("ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA limit PyTorch only; %s may use all that the CPU has",
                    ", ".join(RUNTIMES[name].title for name in used))  # fmt: skip
    return {name: RUNTIMES[name].load(network, images, torch.get_num_threads()) for name in used}


def why_left_out(name: str, batch: int) -> str | None:
    """Say in one line why a runtime cannot be used for `batch` images a call; None where it can be used."""
    try:
        for package in RUNTIMES[name].packages:
            import_package(package)
    except ImportError as error:
        return f"{error}; pip install -e '.[bench]' installs what it needs"
    if batch > 1 and not RUNTIMES[name].batched:
        return f"it takes one image a call, not {batch}"
    if name == "openvino" and "ONEDNN_MAX_CPU_ISA" in os.environ:  # seen with 2026.4.1 and AVX2 on a CPU with AVX-512
        return "it crashes where ONEDNN_MAX_CPU_ISA is less than the CPU has; unset ONEDNN_MAX_CPU_ISA"
    return None


def imported_versions() -> dict[str, str]:
    """Return the versions of the runtimes' packages that this process has imported."""
    packages = [package for runtime in RUNTIMES.values() for package in runtime.packages]
    return {package: importlib.metadata.version(package) for package in packages if package in sys.modules}


def compare_outputs(outputs: Outputs, expected: Sequence[Tensor]) -> dict[str, float]:
    """Return each output's largest absolute difference, relative to the largest absolute value of the expected one."""
    differences = {}
    for name, got, want in zip(OUTPUTS, outputs, expected, strict=True):
        got = torch.as_tensor(np.asarray(got)).reshape(want.shape)  # ncnn has no dimension for the batch
        differences[name] = float((got - want).abs().max() / want.abs().max())
    return differences


# ---- one function for each runtime ----------------------------------------------------------------------------------


def load_openvino(network: nn.Module, images: Tensor, threads: int) -> Callable[[], Outputs]:
    """OpenVINO takes the graph of torch.export."""
    openvino = import_package("openvino")
    exported = torch.export.export(network, (images,))
    # The hint for latency is one stream with all threads. Where the CPU has bfloat16 units, OpenVINO would multiply in
    # bfloat16 unless it is told float32.
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.compile_model(openvino.convert_model(exported), "CPU", options)
    request, inputs = compiled.create_infer_request(), [images.numpy()]

    def run() -> Outputs:
        results = request.infer(inputs, share_inputs=True, share_outputs=True)
        return [results[i] for i in range(len(OUTPUTS))]

    return run


def load_onnxruntime(network: nn.Module, images: Tensor, threads: int) -> Callable[[], Outputs]:
    """ONNX Runtime takes an ONNX file, which torch.onnx writes."""
    onnxruntime = import_package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Between two calls its threads sleep, so that they do not take the cores of the contestant that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    logging.getLogger("onnx_ir").setLevel(logging.WARNING)  # it tells of every constant that it merges
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "network.onnx"))
        names = {"input_names": ["images"], "output_names": OUTPUTS}
        torch.onnx.export(network, (images,), path, dynamo=True, external_data=False, verbose=False, **names)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {"images": images.numpy()}
    return lambda: session.run(OUTPUTS, inputs)


def load_ncnn(network: nn.Module, images: Tensor, threads: int) -> Callable[[], Outputs]:
    """ncnn takes its own files, which pnnx makes of a TorchScript file. Winograd is on, as it is by default."""
    ncnn, pnnx = import_package("ncnn"), import_package("pnnx")
    net = ncnn.Net()
    net.opt.num_threads = threads
    # By default, ncnn stores weights and maps in half precision where the CPU can convert it.
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    with tempfile.TemporaryDirectory() as folder:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, and tracing warns of shapes made constant
            torch.jit.trace(network, images, check_trace=False).save(Path(folder, "network.pt"))
        shape = str(list(images.shape)).replace(" ", "")
        command = [pnnx.EXEC_PATH, "network.pt", f"inputshape={shape}f32", "fp16=0"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
        param, weights = Path(folder, "network.ncnn.param"), Path(folder, "network.ncnn.bin")
        if done.returncode or not param.is_file():
            raise RuntimeError(f"pnnx cannot convert the network to ncnn (exit code {done.returncode}): {done.stderr}")
        if net.load_param(str(param)) or net.load_model(str(weights)):
            raise RuntimeError("ncnn cannot load the network that pnnx converted; what it lacks is printed above")
    image = images[0].numpy()

    def run() -> Outputs:
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(image))
        results = [extractor.extract(f"out{i}") for i in range(len(OUTPUTS))]  # pairs of an error code and a matrix
        if any(code for code, _ in results):
            raise RuntimeError("ncnn cannot run the network that pnnx converted")
        return [np.array(matrix) for _, matrix in results]

    return run


RUNTIMES: dict[str, Runtime] = {
    "openvino": Runtime("OpenVINO", ("openvino",), load_openvino),
    "onnxruntime": Runtime("ONNX Runtime", ("onnxruntime", "onnx", "onnxscript"), load_onnxruntime),
    "ncnn": Runtime("ncnn", ("ncnn", "pnnx"), load_ncnn, batched=False),
}
