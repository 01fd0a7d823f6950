"""This page tries a detector in a browser: `vovnet-zoo demo MODEL`, or `python app.py` in the folder of a model.

`vovnet-zoo publish --space` puts this file as app.py into a Space of Hugging Face, with the model beside it.
"""

from __future__ import annotations

import argparse
import base64
import html
import inspect
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vovnet_zoo.config import RANGES, TILES
from vovnet_zoo.draw import DISPLAY_SCORE, draw_detections
from vovnet_zoo.exported import ExportedDetector
from vovnet_zoo.fcos import FCOS
from vovnet_zoo.inference import predict
from vovnet_zoo.load import load_detector
from vovnet_zoo.predict_files import as_lists
from vovnet_zoo.results import ImageDetections
from vovnet_zoo.sources import Frame, to_rgb
from vovnet_zoo.words import counted

SPARE = 10  # times as many detections are kept as are shown, so that a higher threshold brings others in
ALWAYS = 10  # classes; of more, only those that were found, with a score of SEEN, have a slider that is seen
SEEN = 0.1
FONTS = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # none from another server


class Found(NamedTuple):
    """This is an image with all that was found in it, of any score."""

    pixels: Tensor  # uint8 [3,H,W]
    detections: ImageDetections
    most: int | None  # detections that are shown; None is all
    seconds: float  # that `predict` took, with the reading of the file


def serve(
    model: FCOS | ExportedDetector, name: str, *, host: str | None = None, port: int | None = None, open: bool = False
) -> None:
    """Serve the page of a model until Ctrl-C.

    Args:
        model: the detector.
        name: the title of the page.
        host: the address to listen at; None is this machine only, or what the variable GRADIO_SERVER_NAME says.
        port: None is the first free one from 7860 on, or what the variable GRADIO_SERVER_PORT says.
        open: open the page in a browser.

    Raises:
        ImportError: gradio is not installed.
        OSError: the port is not free.
    """
    page, theme = build_page(model, name), load_gradio().themes.Default(**FONTS)
    options = dict(server_name=host, server_port=port, inbrowser=open, theme=theme, footer_links=[])
    page.launch(**options, quiet=True, prevent_thread_lock=True)
    print(f"{name}: {page.local_url} until Ctrl-C", flush=True)
    page.block_thread()


def build_page(model: FCOS | ExportedDetector, name: str) -> Any:
    """Build the page of a model, as `gradio.Blocks`: an image, sliders of the thresholds, and the detections."""
    gr = load_gradio()
    names, least = class_names(model), first_thresholds(model)
    side = max(model.config["min_size"], TILES[0])  # the network sees such a window as large as it is
    with gr.Blocks(title=name, analytics_enabled=False) as page:
        gr.Markdown(f"# {name}")
        found = gr.State()
        with gr.Row():
            with gr.Column():
                image = gr.Image(
                    label="Image", type="filepath", image_mode=None, sources=["upload", "webcam", "clipboard"]
                )
            with gr.Column():
                picture = gr.Image(
                    label="Detections", interactive=False, format="jpeg", buttons=["download", "fullscreen"]
                )
                summary = gr.Markdown(elem_id="summary")
                download = gr.HTML()
        take_any_file(image)
        tiles = gr.Checkbox(label=f"Look at windows of {side} x {side} pixels too, for small objects in large images")
        every = gr.Slider(0, 1, DISPLAY_SCORE, step=0.01, label="Threshold of all classes", elem_id="every")
        with gr.Accordion("Threshold of each class", open=len(names) <= ALWAYS):
            sliders = [
                gr.Slider(0, 1, value, step=0.01, label=label, visible=len(names) <= ALWAYS)
                for label, value in zip(names, least, strict=True)
            ]
        outputs = [picture, summary, download]

        def look(path: str | None, use_tiles: bool) -> list[Any]:
            """Detect, and show the sliders of what was found."""
            result = None
            try:
                result = detect(model, path, side if use_tiles else None) if path else None
            except ValueError as error:  # gr.Error would lie over the sliders
                gr.Warning(html.escape(str(error)))
            return [result, *(gr.update(visible=visible) for visible in seen(result, len(names)))]

        def draw(result: Found | None, *thresholds: float) -> tuple[Any, str, str]:
            return show(result, thresholds, names, name)

        again: dict[str, Any] = dict(fn=draw, inputs=[found, *sliders], outputs=outputs, api_visibility="private")
        gr.on([image.change, tiles.change], look, [image, tiles], [found, *sliders], api_visibility="private").success(
            **again
        )
        live: dict[str, Any] = dict(trigger_mode="always_last", show_progress="hidden")
        gr.on([slider.input for slider in sliders], **again, **live)
        every.input(
            lambda value: [value] * len(names) if len(names) > 1 else value,
            every,
            sliders,
            api_visibility="private",
            **live,
        ).success(**again, **live)
    return page


def take_any_file(image: Any) -> None:
    """Let a `gradio.Image` pass the path of what was uploaded, also of a file that gradio cannot open.

    gradio opens each file itself, and where it cannot it tells the log of the server, and not the user.
    """
    opened = image.preprocess
    image.preprocess = lambda payload: payload.path if payload is not None and payload.path else opened(payload)


def detect(model: FCOS | ExportedDetector, path: str, tiles: int | None) -> Found:
    """Detect objects in an image file, of any score that the model gives; `tiles` has its meaning in `predict`.

    The file comes from a visitor, so it is nothing but an image: `predict` would read a `.txt` as a list of paths.

    Raises:
        ValueError: the file is not an image; the message holds its name without the server's folders.
    """
    began = time.perf_counter()
    name = Path(path).name
    try:
        pixels = to_rgb(path)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), name)) from error
    options: dict[str, Any] = {}
    most = None
    if not isinstance(model, ExportedDetector):  # which keeps its own thresholds
        options["score_threshold"] = 0.0
        if tiles is None:  # with tiles, the limit is of each window
            most = model.config["max_detections"]
            options["max_detections"] = min(SPARE * most, RANGES["max_detections"][1])
    (found,) = predict(model, Frame(name, pixels), tiles=tiles, **options)
    seconds = time.perf_counter() - began
    return Found(pixels, found, most, seconds)


def seen(found: Found | None, classes: int) -> list[bool]:
    """Say for each of K classes whether its slider is seen."""
    if classes <= ALWAYS or found is None:
        return [classes <= ALWAYS] * classes
    labels = found.detections["labels"][found.detections["scores"] >= SEEN].tolist()
    return [label in labels for label in range(classes)]


def show(found: Found | None, thresholds: tuple[float, ...], names: list[str], model: str) -> tuple[Any, str, str]:
    """Make a picture, a summary and a link to the JSON of the detections that score at least their threshold.

    Args:
        found: None where there is no image.
        thresholds: K, of each class.
        names: K, of the classes.
        model: the name of the model, for the JSON.
    """
    if found is None:
        return None, "", ""
    began = time.perf_counter()
    kept = above(found.detections, thresholds, found.most)
    picture = draw_detections(found.pixels, kept, names, score_threshold=0.0)
    drawn = time.perf_counter() - began
    height, width = kept.size
    counts = Counter(names[label] for label in kept["labels"].tolist())
    what = ", ".join(f"{count} {html.escape(name)}" for name, count in counts.most_common()) or "nothing"
    summary = (
        f"**{counted(len(kept['labels']), 'detection')}** above the thresholds: {what}. "
        f"{width} x {height} pixels; detected in {found.seconds:.2f} s, drawn in {drawn:.2f} s."
    )
    content = {
        "model": model,
        "height": height,
        "width": width,
        "thresholds": dict(zip(names, thresholds, strict=True)),
        **as_lists(kept),
    }
    data = base64.b64encode(json.dumps(content, ensure_ascii=False).encode()).decode()
    link = f'<a id="json" download="detections.json" href="data:application/json;base64,{data}">Download as JSON</a>'
    return picture, summary, link


def above(found: ImageDetections, thresholds: tuple[float, ...], most: int | None) -> ImageDetections:
    """Keep the detections that score at least the threshold of their class, the best `most` of them."""
    keep = (found["scores"] >= torch.tensor(thresholds)[found["labels"]]).nonzero()[:most, 0]
    kept = {key: value[keep] for key, value in found.items()}
    facts = found.source, found.size, found.class_names, found.plus_one, found.display_score
    return ImageDetections(kept, *facts)


def class_names(model: FCOS | ExportedDetector) -> list[str]:
    """List the K names in label order; numbers where they are unknown."""
    return model.config["class_names"] or [str(label) for label in range(model.config["num_classes"])]


def first_thresholds(model: FCOS | ExportedDetector) -> list[float]:
    """List the K thresholds that the sliders start with: the model's own, or the score that people are shown."""
    own, rest = model.config["thresholds"] or {}, model.config["score_threshold"]
    return [round(own.get(name, rest) if own else rest or DISPLAY_SCORE, 3) for name in class_names(model)]


def load_gradio() -> Any:
    """Import gradio. Raises `ImportError`, which says how to install it."""
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the page needs gradio: pip install 'vovnet_zoo[demo]'") from error
    return gradio


def main() -> None:
    """Serve the page of the model in the folder of this file, or of another one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(Path(__file__).resolve().parent))
    parser.add_argument("--check", action="store_true", help="detect once in noise, and end")
    arguments = parser.parse_args()
    model, name = load_detector(arguments.model), title(arguments.model)
    if arguments.check:
        check(model, name)
    else:
        serve(model, name)


def check(model: FCOS | ExportedDetector, name: str) -> None:
    """Build the page, and detect once in an image of noise, without serving the page."""
    build_page(model, name)
    noise = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (found,) = predict(model, noise)
    names = class_names(model)
    picture, _, _ = show(Found(noise, found, None, 0.0), tuple(first_thresholds(model)), names, name)
    code = Path(inspect.getfile(predict)).parent
    size = f"{picture.width} x {picture.height}"
    print(f"{name}: {counted(len(names), 'class')}, {size} pixels drawn; the code is in {code}")


def title(model: str) -> str:
    """Choose the title of a page: a model's name without the folders before it, `best` and `last` with their run."""
    path = Path(model) if Path(model).name else Path(model).resolve()
    return f"{path.resolve().parent.name}/{path.name}" if path.name in ("best", "last") else path.name


if __name__ == "__main__":
    main()
