"""`line_chart` turns numbers into the lines and ticks of an SVG drawing, which the report's template writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 420, 260  # of the drawing
LEFT, TOP, RIGHT, BOTTOM = 58, 12, 408, 216  # of the plot in it
MOST = 240  # points of a line; more would not be seen


class Line(NamedTuple):
    """A line of a chart; `label` is its class, for the filter, or None."""

    name: str
    points: str  # of an SVG polyline
    label: int | None


class Tick(NamedTuple):
    """A tick has a place on the drawing, along its axis, and a text."""

    place: float
    text: str


class Chart(NamedTuple):
    """A chart has lines and two axes; the template draws them at these places."""

    title: str
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    size: tuple[int, int] = (WIDTH, HEIGHT)
    plot: tuple[int, int, int, int] = (LEFT, TOP, RIGHT, BOTTOM)


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[tuple[str, Sequence[float] | np.ndarray, Sequence[float] | np.ndarray, int | None]],
    *,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
) -> Chart:
    """Place lines on a drawing of `WIDTH` x `HEIGHT` units.

    Args:
        series: (name, x [N], y [N], label) of each line; points that are not finite are left out.
        x_range, y_range: ends of the axes; None fits them to the points.
    """
    lines = []
    clean = []
    for name, x, y, label in series:
        xy = np.stack([np.asarray(x, dtype=float), np.asarray(y, dtype=float)])
        xy = xy[:, np.isfinite(xy).all(axis=0)]
        if xy.shape[1] > MOST:
            xy = xy[:, np.unique(np.linspace(0, xy.shape[1] - 1, MOST).astype(int))]
        clean.append((name, xy, label))
    every = np.concatenate([xy for _, xy, _ in clean] or [np.zeros((2, 0))], axis=1)
    (x0, x1), (y0, y1) = x_range or _range(every[0]), y_range or _range(every[1])
    for name, (x, y), label in clean:
        across = LEFT + (np.clip(x, x0, x1) - x0) / (x1 - x0) * (RIGHT - LEFT)
        down = BOTTOM - (np.clip(y, y0, y1) - y0) / (y1 - y0) * (BOTTOM - TOP)
        lines.append(Line(name, " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, down, strict=True)), label))
    x_ticks = [Tick(LEFT + i / 4 * (RIGHT - LEFT), _text(x0 + i / 4 * (x1 - x0))) for i in range(5)]
    y_ticks = [Tick(BOTTOM - i / 4 * (BOTTOM - TOP), _text(y0 + i / 4 * (y1 - y0))) for i in range(5)]
    return Chart(title, x_label, y_label, x_ticks, y_ticks, lines)


def _range(values: np.ndarray) -> tuple[float, float]:
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _text(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
