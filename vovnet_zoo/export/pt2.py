"""AOTInductor compiles the graph to machine code (pt2), which torch runs in Python and C++ without this library."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop_op
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import PT2ArchiveReader, PT2ArchiveWriter

from .cpu import compiled_for
from .graph import Graph
from .runtimes import PT2_METADATA

# The weights are laid out for the CPU once, and the user chooses the number of threads, not the process that compiles.
COMPILER = {"freezing": True, "cpp.dynamic_threads": True}
OWN = (".data/", "byteorder")  # records that the writer adds by itself


def write(graph: Graph, program: ExportedProgram, file: Path, precision: str) -> dict[str, str]:
    """Compile the graph for the CPU of this machine. No tensor is named, since a package does not show inner ones."""
    assert precision == "float32"
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(decompose(program), package_path=str(file), inductor_configs=COMPILER)
    return {}


def decompose(program: ExportedProgram) -> ExportedProgram:
    """Write the graph in operators of torch alone, as it is compiled."""
    return program.run_decompositions({torch.ops.vovnet_zoo.nms_fixed.default: nms_plain})


def nms_plain(
    boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, max_detections: int, plus_one: bool
) -> Tensor:
    """Compute `nms_fixed` with operators of torch alone: `max_detections` times, the best box that is left is kept."""
    if plus_one:
        boxes = torch.cat([boxes[..., :2], boxes[..., 2:] + 1], dim=-1)
        threshold = math.nextafter(threshold, 0)
    boxes = boxes.double()  # as `class_nms`, so that no rounding decides
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)  # [B,N]
    own = torch.arange(boxes.shape[1], device=boxes.device)  # [N]
    places = torch.arange(max_detections, device=boxes.device)  # [D]

    def goes_on(step: Tensor, left: Tensor, kept: Tensor, *rest: Tensor) -> Tensor:
        return step < max_detections

    def keep_best(
        step: Tensor,
        left: Tensor,
        kept: Tensor,
        boxes: Tensor,
        area: Tensor,
        labels: Tensor,
        own: Tensor,
        places: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        best = left.argmax(1, keepdim=True)  # [B,1]; equal scores: the first wins
        box = boxes.gather(1, best[..., None].expand(-1, -1, 4))  # [B,1,4]
        sides = torch.minimum(boxes[..., 2:], box[..., 2:]) - torch.maximum(boxes[..., :2], box[..., :2])
        shared = sides.clamp(min=0).prod(-1)  # [B,N]
        overlaps = shared / (area + area.gather(1, best) - shared) > threshold
        gone = (overlaps & (labels == labels.gather(1, best))) | (own == best)
        kept = torch.where((places == step) & (left.gather(1, best) >= 0), best, kept)
        return step + 1, torch.where(gone, -1.0, left), kept

    first = torch.zeros((), dtype=torch.int64, device=boxes.device)
    nothing = torch.full((boxes.shape[0], max_detections), -1, device=boxes.device)
    # `while_loop` itself would compile these functions with torch.compile, which takes other shapes for dynamic when it
    # sees them for the second time, and then the export of a second model fails
    state: Any = (first, scores.clone(), nothing)
    return while_loop_op(goes_on, keep_best, state, (boxes, area, labels, own, places))[2]


def write_facts(file: Path, facts: Mapping[str, Any]) -> None:
    """Write facts into the metadata of a package, each as JSON, and the class names once more, one on each line."""
    texts = {key: json.dumps(value) for key, value in {**facts, "instructions": compiled_for()}.items()}
    texts["class_names"] = "\n".join(facts["config"]["class_names"] or ())
    reader = PT2ArchiveReader(str(file))
    records = {name: reader.read_bytes(name) for name in reader.get_file_names() if not name.startswith(OWN)}
    with PT2ArchiveWriter(str(file)) as writer:
        for name, data in records.items():
            if name.endswith(PT2_METADATA):
                data = json.dumps({**json.loads(data), **texts}).encode()
            writer.write_bytes(name, data)


def versions() -> dict[str, Any]:
    """Name the versions that made the file, and the instructions that a CPU needs for it."""
    return {"versions": {"torch": torch.__version__}, "instructions": compiled_for()}
