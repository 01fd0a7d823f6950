"""A detector leaves Python: one file from uint8 images to boxes, with a certificate of what it computes."""

from __future__ import annotations

import json
import logging
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

import torch

from ..arguments import check_flag, check_model, check_number, check_path
from ..compiled import check_size
from ..fcos import FCOS
from ..files import fingerprint, free_to_write, staged
from ..inference import ThresholdOptions, choose_thresholds
from ..sources import Source
from ..version import __version__
from .certificate import BOUNDS, card, certify, choose_images
from .graph import LEAST_SIDE, trace
from .registry import FORMATS, choose_format
from .runtimes import load_exported

log = logging.getLogger("vovnet_zoo")

CERTIFICATE, CARD = "certificate.json", "README.md"


def export_detector(
    model: FCOS,
    out: str | PathLike,
    *,
    format: str = "onnx",
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    precision: str = "float32",
    images: Source | None = None,
    overwrite: bool = False,
    **options: Unpack[ThresholdOptions],
) -> dict[str, Any]:
    """Write a detector as one graph, compare what the file computes with what PyTorch computes, and certify it.

    The graph takes `images`, uint8 [B,3,H,W] RGB, and `sizes`, int64 [B,2], their (h, w) without the padding at bottom
    and right. It gives `boxes` float32 [B,D,4] xyxy in pixels of these images, `scores` float32 [B,D], `labels` int64
    [B,D] and `count` int64 [B]: the `Detections` that `compile_detector` gives. Normalising, decoding and NMS are part
    of it. `load_detector` reads the file for `predict`.

    Args:
        model: a float32 detector.
        out: the folder for the file, its `certificate.json`, and a README.md that shows both.
        format: one of `FORMATS`; `pip install vovnet_zoo[export]` installs what they need.
        size: (H, W) of all images, multiples of 32; None lets each call have its own, from 64 pixels on.
        batch: number of images of each call; None lets each call have its own.
        precision: "float32"; or "float16", which stores the weights in 16 bits and computes in float32.
        images: the images that are compared, see `predict`. None draws shapes, and keeps pictures in which the model
            finds something.
        overwrite: write over an earlier export in `out`.
        options: fields of `Thresholds`, see `predict`; the file keeps them.

    Returns:
        The certificate: number of images, share of detections that both have, largest differences, and their bounds.

    Raises:
        ValueError: the file computes something else than the model (it is deleted, and the message names the image and
            the layer), the model finds nothing in the images, the format cannot do what is asked, a file is there
            already, or an argument is out of range.
        ImportError: a package is missing that the format needs.
        OSError: `out` cannot be written.
    """
    check_model("model", model, FCOS)
    check_path("out", out)
    check_flag("overwrite", overwrite)
    if size is not None:
        size = check_size(size)
        check_number("size", min(size), LEAST_SIDE, 65_536, whole=True)
    if batch is not None:
        check_number("batch", batch, 1, 4096, whole=True)
    if wrong := {x.dtype for x in model.parameters()} - {torch.float32}:
        raise ValueError(f"model has weights of {', '.join(map(str, wrong))}; give model.float()")
    if model.config["resize"] != "antialias":
        raise ValueError("an exported file takes uint8 images, and this model's images are resized to floating point")
    thresholds = choose_thresholds(model, options)
    chosen = choose_format(format, precision)
    out = Path(out)
    targets = [out / name for name in (*chosen.files, CERTIFICATE, CARD)]
    free_to_write(targets, [], overwrite)

    with staged(out) as folder:  # nothing is in `out` unless all below went well
        compared, drawn = choose_images(model, images, thresholds, size)
        facts: dict[str, Any] = {
            "vovnet_zoo": __version__,
            "format": format,
            "precision": precision,
            "size": size,
            "batch": batch,
            "config": model.config,
            "thresholds": {
                key: value.tolist() if isinstance(value, torch.Tensor) else value
                for key, value in thresholds._asdict().items()
            },
            "weights_sha256": fingerprint({name: x.cpu() for name, x in model.state_dict().items()}),
        }
        file, exporter = folder / chosen.files[0], chosen.exporter()
        graph, program = trace(model, thresholds, size, batch)
        layers = exporter.write(program, file, precision, model.num_classes)
        exporter.write_facts(file, facts)
        certificate = certify(
            model, thresholds, load_exported(file), compared, BOUNDS[precision], chosen, file, graph, layers
        )
        certificate = {"images_are": "drawn" if drawn else "the user's", **certificate, **exporter.versions()}
        exporter.write_facts(file, {**facts, "certificate": certificate})
        (folder / CERTIFICATE).write_text(json.dumps({**facts, "certificate": certificate}, indent=1) + "\n")
        (folder / CARD).write_text(card(chosen, facts, certificate), encoding="utf-8")
    return certificate


__all__ = ["FORMATS", "export_detector", "load_exported"]
