"""A stage's metrics as pictures: one panel for each; a family of metrics (`reward/…`) has its own picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

COLUMNS = 3


def draw(histories: Mapping[str, Sequence[tuple[int, float]]], folder: Path) -> list[Path]:
    """Write PNGs into `folder` for all metrics with at least two points; returns their paths.

    `metrics.png` holds everything; a family of metrics that share a first word (`reward/…`, `expert/…`) has its own.
    """
    curves = {key: points for key, points in sorted(histories.items()) if len(points) > 1}
    if not curves:
        return []
    families: dict[str, dict[str, Sequence[tuple[int, float]]]] = {}
    for key, points in curves.items():
        if "/" in key:
            families.setdefault(key.split("/")[0], {})[key] = points
    pictures = {"metrics": curves, **{name: family for name, family in families.items() if len(family) > 1}}
    return [_picture(curves, folder / f"{name}.png") for name, curves in pictures.items()]


def _picture(curves: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, (key, points) in zip(panels, curves.items(), strict=False):
        steps, values = zip(*points, strict=True)
        panel.plot(steps, values, linewidth=1.2, marker="." if len(points) < 30 else None)
        panel.set_title(key, fontsize=9)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    figure.savefig(path, dpi=100)
    return path
