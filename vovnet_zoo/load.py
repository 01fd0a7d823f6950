"""`load_detector` opens a trained detector, wherever it is: a folder, the Hub, the table, or an exported file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Unpack

from . import detectors, hub
from .arguments import check_options, check_path
from .export.runtimes import is_exported, load_exported
from .exported import ExportedDetector
from .fcos import FCOS


def load_detector(source: str | os.PathLike, **options: Unpack[hub.HubOptions]) -> FCOS | ExportedDetector:
    """Load a trained detector, which `predict` takes.

    Args:
        source: a folder that `save_pretrained` wrote, a name on the Hub ("organisation/name", or
            "organisation/name@revision"), a name of `list_detectors(pretrained=True)`, or a file that
            `export_detector` wrote ("model.onnx", "model.xml", "model.pt2"), which its own runtime computes: no torch
            model is built.
        options: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` and `map_location` of
            `FCOS.from_pretrained`. A name of `list_detectors` takes `map_location` only, a file none.

    Raises:
        ValueError: there is no such detector, its files are damaged, or the source does not take an option.
        ImportError: the runtime of an exported file is not installed.
        OSError: the Hub or a server cannot be reached, or refuses.
    """
    check_path("source", source)
    check_options("load_detector", options, hub.HubOptions.__annotations__)
    if is_exported(source) and not Path(source).is_dir():
        hub.refuse_options(str(source), options, "an exported file")
        return load_exported(source)
    if files := exported_files(Path(source)):
        raise ValueError(f"{source} is the folder of an exported file; give the file: {' or '.join(map(str, files))}")
    return detectors.load_detector(str(source), **options)


def exported_files(folder: Path) -> list[Path]:
    """List the exported files in a folder; none where it is the folder of a saved model."""
    if not folder.is_dir() or (folder / hub.CONFIG).exists():
        return []
    return sorted(path for path in folder.iterdir() if is_exported(path))
