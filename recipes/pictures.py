"""These functions draw the pictures that a run leaves: `curves.png` and `detections.png`."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import resize

from vovnet_zoo import FCOS, predict
from vovnet_zoo.data import CocoDataset, Skipped
from vovnet_zoo.draw import DISPLAY_SCORE, draw_detections

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def draw_curves(rows: list[dict], path: Path) -> None:
    """Draw losses, learning rate and AP over steps, from the rows of `metrics.jsonl`."""
    train = [row for row in rows if "loss" in row]
    scored = [row for row in rows if "AP" in row]
    figure, (losses, rate, ap) = plt.subplots(1, 3, figsize=(15, 4), constrained_layout=True)
    steps = [row["step"] for row in train]
    for name in ("loss", "loss_cls", "loss_box", "loss_ctr"):
        losses.plot(steps, numbers(train, name), label=name, linewidth=1)
    losses.set(title="losses", xlabel="step", yscale="log")
    losses.legend()
    rate.plot(steps, [row["lr"] for row in train])
    rate.set(title="learning rate", xlabel="step")
    for name in ("AP", "AP50", "AP75"):
        ap.plot([row["step"] for row in scored], [row[name] for row in scored], marker="o", label=name)
    ap.set(title="box AP on the held-out images", xlabel="step", ylim=(0, 1))
    ap.legend()
    for axis in (losses, rate, ap):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def numbers(rows: list[dict], name: str) -> list[float]:
    """Return a number of each row; NaN, which is not drawn, for one that was not finite."""
    return [float("nan") if row[name] is None else row[name] for row in rows]


def draw_comparison(
    model: FCOS,
    dataset: CocoDataset,
    path: Path,
    count: int = 8,
    height: int = 320,
) -> None:
    """Draw the predictions of `count` images beside the truth, each `height` pixels high.

    The dataset has no transforms. Boxes are drawn that `vovnet-zoo predict` would show: those above the thresholds in
    the model's config, or else of `DISPLAY_SCORE` or more. Images that the dataset skips are not drawn.
    """
    indices = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
    own = model.config["thresholds"] or model.config["score_threshold"]
    least, shown = (0.0, "above the model's thresholds") if own else (DISPLAY_SCORE, f"score >= {DISPLAY_SCORE}")
    font, captions = ImageFont.load_default(size=13), (f"prediction ({shown})", "truth")
    pairs = []
    samples = (dataset[index] for index in indices)
    for image, truth in (sample for sample in samples if not isinstance(sample, Skipped)):
        (detection,) = predict(model, image.as_subclass(torch.Tensor))
        scale = height / image.shape[-2]
        large = resize(
            image.as_subclass(torch.Tensor), [height, max(1, round(image.shape[-1] * scale))], antialias=True
        )
        pair = Image.new("RGB", (2 * large.shape[-1] + 4, height + 18), "white")
        for i, objects in enumerate((detection, truth)):
            objects = {**objects, "boxes": objects["boxes"].as_subclass(torch.Tensor) * scale}
            x = i * (large.shape[-1] + 4)
            pair.paste(draw_detections(large, objects, dataset.class_names, least, enlarge=1), (x, 18))
            ImageDraw.Draw(pair).text((x + 4, 1), captions[i], fill="black", font=font)
        pairs.append(pair)

    columns = 2
    rows = [pairs[i : i + columns] for i in range(0, len(pairs), columns)]
    gap = 12
    sheet_width = max(sum(p.width for p in row) + gap * (len(row) - 1) for row in rows)
    sheet = Image.new("RGB", (sheet_width, sum(row[0].height + gap for row in rows)), "white")
    y = 0
    for row in rows:
        x = 0
        for pair in row:
            sheet.paste(pair, (x, y))
            x += pair.width + gap
        y += row[0].height + gap
    sheet.save(path)
