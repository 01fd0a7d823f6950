"""A detector leaves Python: one file from uint8 images to boxes, with a certificate of what it computes."""

from __future__ import annotations

import importlib
import json
import logging
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

import torch

from ..arguments import check_flag, check_model, check_number, check_path
from ..compiled import check_size
from ..config import ThresholdOptions, Thresholds
from ..fcos import FCOS
from ..files import fingerprint, free_to_write, staged
from ..inference import choose_thresholds
from ..sources import Source
from ..version import __version__
from .accuracy import Comparison, open_dataset
from .card import card
from .certificate import certify, certify_network, choose_images
from .cpu import warn_of_the_cpu
from .graph import LEAST_SIDE, DetectorGraph, Graph, NetworkGraph, trace
from .pairs import BOUNDS
from .registry import FORMATS, Written, choose_format
from .runtimes import load_exported

log = logging.getLogger(__name__)

CERTIFICATE, CARD = "certificate.json", "README.md"


def export_detector(
    model: FCOS,
    out: str | PathLike,
    *,
    format: str = "onnx",
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    precision: str = "float32",
    raw: bool = False,
    images: Source | None = None,
    data: str | PathLike | None = None,
    max_ap_difference: float | None = None,
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
        precision: "float32"; or "float16", which stores the weights in 16 bits and computes in float32; or "int8",
            which computes convolutions in 8 bits, but leaves those in float32 that the AP needs; it takes `data`.
        raw: the graph is the network alone: it takes `images` float32 [B,3,H,W], normalised, and gives `logits`
            [B,P,K], `distances` [B,P,4] and `centerness` [B,P], as in `Predictions`.
        images: the images that are compared, see `predict`. None draws shapes, and keeps pictures in which the model
            finds something. int8 needs images of the user, since it measures the ranges of all maps on them.
        data: the folder of a dataset; the AP on its val split is measured with the file and with PyTorch. None measures
            none.
        max_ap_difference: how far the two may lie apart; None is 0.001, with float16 0.005, and
            with int8 0.01.
        overwrite: write over an earlier export in `out`.
        options: fields of `Thresholds`, see `predict`; the file keeps them.

    Returns:
        The certificate: number of images, share of detections that both have, largest differences, and their bounds.

    Raises:
        ValueError: the file computes something else than the model (it is deleted, and the message names the image and
            the layer, or says that all layers agree), the model finds nothing in the images, the format cannot do what
            is asked, a file is there already, or an argument is out of range.
        ImportError: a package is missing that the format needs.
        OSError: `out` cannot be written.
    """
    check_model("model", model, FCOS)
    check_path("out", out)
    size, thresholds = check_arguments(model, size, batch, raw, data, max_ap_difference, overwrite, options)
    chosen = choose_format(format, precision)
    if precision == "int8":
        if images is None or data is None:
            raise ValueError(
                "int8 measures the ranges of maps on images, and is judged by its AP: give images (--images) and data "
                "(--data)"
            )
        warn_of_the_cpu()
    out = Path(out)
    free_to_write([out / name for name in (*chosen.files, CERTIFICATE, CARD)], [], overwrite)
    dataset = open_dataset(data, model) if data is not None else None
    facts: dict[str, Any] = {
        "vovnet_zoo": __version__,
        "format": format,
        "precision": precision,
        "size": size,
        "batch": batch,
        "config": model.config,
        "thresholds": None if raw else described(thresholds),
        "weights_sha256": fingerprint({name: x.cpu() for name, x in model.state_dict().items()}),
    }
    bounds = BOUNDS[precision] if max_ap_difference is None else replace(BOUNDS[precision], ap=max_ap_difference)

    with staged(out) as folder:  # nothing is in `out` unless all below went well
        compared, drawn = choose_images(model, images, thresholds, size, chosen.least_side)
        graph: Graph = NetworkGraph(model).eval() if raw else DetectorGraph(model, thresholds).eval()
        file, exporter = folder / chosen.files[0], chosen.exporter()
        first_precision = "float32" if precision == "int8" else precision
        log.info(
            "tracing and writing %s, which takes %s", file.name, "minutes" if chosen.compiled else "a minute or so"
        )
        program = trace(graph, size, batch)
        layers = exporter.write(graph, program, file, first_precision)
        written = Written(chosen, file, graph, program, layers)
        exporter.write_facts(file, facts)
        certificate: dict[str, Any] = {"images_are": "drawn" if drawn else "the user's"}
        comparison = None if dataset is None else Comparison(model, dataset, thresholds, size, chosen.least_side)
        if precision == "int8":
            assert comparison is not None
            log.info("quantising, which takes minutes, or hours where the AP needs layers in float32")
            certificate |= importlib.import_module(".int8", __package__).quantize(
                written, compared, comparison, bounds.ap
            )
        log.info("comparing with PyTorch on %d images%s", len(compared), ", then by AP" if comparison else "")
        if raw:
            certificate |= certify_network(model, written, compared, bounds)
        else:
            certificate |= certify(model, thresholds, written, compared, bounds)
        if comparison is not None:
            certificate |= comparison.certify(written, bounds)
        certificate |= exporter.versions()
        exporter.write_facts(file, {**facts, "certificate": certificate})
        (folder / CERTIFICATE).write_text(
            json.dumps({**facts, "certificate": certificate}, indent=1) + "\n", encoding="utf-8"
        )
        (folder / CARD).write_text(card(chosen, facts, certificate), encoding="utf-8")
    return certificate


def check_arguments(
    model: FCOS,
    size: tuple[int, int] | None,
    batch: int | None,
    raw: bool,
    data: str | PathLike | None,
    max_ap_difference: float | None,
    overwrite: bool,
    options: ThresholdOptions,
) -> tuple[tuple[int, int] | None, Thresholds]:
    """Check arguments of `export_detector`; returns the size and the thresholds that it goes on with."""
    check_flag("raw", raw)
    check_flag("overwrite", overwrite)
    if size is not None:
        size = check_size(size)
        check_number("size", min(size), LEAST_SIDE, 65_536, whole=True)
    if batch is not None:
        check_number("batch", batch, 1, 4096, whole=True)
    if data is not None:
        check_path("data", data)
    if max_ap_difference is not None:
        check_number("max_ap_difference", max_ap_difference, 0, 1)
        if data is None:
            raise ValueError(f"max_ap_difference={max_ap_difference}: there is no AP without a dataset; give data too")
    if raw and (data is not None or options):
        raise ValueError("raw: the network alone has no detections, so leave out data and thresholds")
    if wrong := {x.dtype for x in model.parameters()} - {torch.float32}:
        raise ValueError(f"model has weights of {', '.join(map(str, wrong))}; give model.float()")
    if model.config["resize"] != "antialias":
        raise ValueError("an exported file takes uint8 images, and this model's images are resized to floating point")
    return size, choose_thresholds(model, options)


def described(thresholds: Thresholds) -> dict[str, Any]:
    """Turn thresholds into what JSON knows."""
    return {key: x.tolist() if isinstance(x, torch.Tensor) else x for key, x in thresholds._asdict().items()}


__all__ = ["FORMATS", "export_detector", "load_exported"]
