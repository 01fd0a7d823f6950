"""`load_detector` opens a trained detector, wherever it is: a folder, the Hub, the table, or an exported file."""

from __future__ import annotations

import os
from pathlib import Path

from . import detectors, hub
from .arguments import check_path
from .export.runtimes import is_exported, load_exported
from .exported import ExportedDetector
from .fcos import FCOS


def load_detector(source: str | os.PathLike) -> FCOS | ExportedDetector:
    """Load a trained detector, which `predict` takes.

    Args:
        source: a folder that `save_pretrained` wrote, a name on the Hub ("organisation/name", or
            "organisation/name@revision"), a name of `list_detectors(pretrained=True)`, or a file that
            `export_detector` wrote ("model.onnx", "model.xml", "model.pt2"), which its own runtime computes: no torch
            model is built.

    Raises:
        ValueError: there is no such detector, or its files are damaged.
        ImportError: the runtime of an exported file is not installed.
        OSError: the Hub or a server cannot be reached, or refuses.
    """
    check_path("source", source)
    if is_exported(source) and not Path(source).is_dir():
        return load_exported(source)
    if files := exported_files(Path(source)):
        raise ValueError(f"{source} is the folder of an exported file; give the file: {' or '.join(map(str, files))}")
    return detectors.load_detector(str(source))


def exported_files(folder: Path) -> list[Path]:
    """List the exported files in a folder; none where it is the folder of a saved model."""
    if not folder.is_dir() or (folder / hub.CONFIG).exists():
        return []
    return sorted(path for path in folder.iterdir() if is_exported(path))
