"""The card is the page beside an exported file, which shows its certificate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..words import counted
from .registry import Format


def card(chosen: Format, facts: Mapping[str, Any], certificate: Mapping[str, Any]) -> str:
    """Write the page that shows the certificate."""
    file = chosen.files[0]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows(chosen, facts, certificate).items())
    example = (
        f'import vovnet_zoo\n\nmodel = vovnet_zoo.load_detector("{file}")\n'
        '(found,) = vovnet_zoo.predict(model, "photo.jpg")\nprint(found.names, found["boxes"], found["scores"])\n'
    )
    use = f"```python\n{example}```\n\n" if facts["thresholds"] is not None else "The network alone, without boxes.\n\n"
    return f"# {file}: FCOS on {facts['config']['backbone']}\n\n{use}| | |\n|---|---|\n{table}\n"


def rows(chosen: Format, facts: Mapping[str, Any], certificate: Mapping[str, Any]) -> dict[str, Any]:
    """List what the card shows."""
    opset = f", opset {certificate['opset']}" if "opset" in certificate else ""
    return {
        "format": f"{chosen.runtime}, {facts['precision']}{opset}",
        "size, batch": f"{facts['size'] or 'any'}, {facts['batch'] or 'any'}",
        "classes": facts["config"]["num_classes"],
        **summary(certificate),
        "weights (sha256)": facts["weights_sha256"],
    }


def summary(certificate: Mapping[str, Any]) -> dict[str, str]:
    """Say in words what a certificate holds."""
    found = {"compared with PyTorch on": f"{counted(certificate['images'], 'image')} ({certificate['images_are']})"}
    if "matched" in certificate:
        found |= {
            "detections": f"{certificate['detections']}",
            "found by both": f"{certificate['matched']:.2%}"
            + (f"; rounding alone decides about {ties} more" if (ties := certificate["ties"]) else ""),
            "largest difference of a box": f"{certificate['largest_box_difference']:.2g} px",
            "largest difference of a score": f"{certificate['largest_score_difference']:.2g}",
        }
    else:
        differences = certificate["largest_relative_differences"].items()
        found["largest difference"] = ", ".join(f"{key} {value:.1g} of the largest" for key, value in differences)
    if "AP" in certificate:
        low, high = certificate["AP_difference_interval"]
        found[f"AP on {counted(certificate['data_images'], 'image')}"] = (
            f"{certificate['AP']:.4f}, in PyTorch {certificate['AP_torch']:.4f}; difference "
            f"{certificate['AP_difference']:+.4f} (95%: {low:+.4f} to {high:+.4f})"
        )
    if "int8_layers" in certificate:
        floats, seconds = certificate["float_layers"], certificate["seconds_per_call"]
        found["layers in int8"] = f"{len(certificate['int8_layers'])}"
        found["layers in float32"] = f"{len(floats)}: {', '.join(floats)}" if floats else "none"
        found["time of a call"] = f"{seconds['int8'] * 1e3:.1f} ms, in float32 {seconds['float32'] * 1e3:.1f} ms"
    return found
