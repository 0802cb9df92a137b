"""Draws what ``bench_layer`` found: tokens per second by routing, and slowest ranks."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from picture_style import STYLE

_STYLE: dict[Any, Any] = STYLE | {
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}
_COLORS = {
    "native": "#2364aa",
    "native, balanced": "#3a7d44",
    "xla": "#d9541e",
    "all_gather": "#b7950b",
    "all_to_all, no drops": "#8e44ad",
    "all_to_all, factor 2": "#c39bd3",
    "einsum (GSPMD), factor 2": "#7b8794",
    "dense": "#1f2933",
}


def save(path: pathlib.Path, records: Sequence[dict[str, Any]]) -> None:
    """Writes a PNG: bars of tokens per second, and the slowest rank's time over its imbalance.

    Args:
      path: where to.
      records: those of ``bench_layer``.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10, 7.5), dpi=110, layout="constrained")
        top, bottom = figure.subplots(2, 1, height_ratios=[3, 2])
        _draw_speeds(top, [r for r in records if r["bench"] == "layer"])
        _draw_pinned(bottom, [r for r in records if r["bench"] == "pinned layer"])
        figure.savefig(path)


def _draw_speeds(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    routings = [*dict.fromkeys(r["routing"] for r in records)]
    ways = [*dict.fromkeys(r["way"] for r in records)]
    width = 0.85 / len(ways)
    for i, way in enumerate(ways):
        mine = [r for r in records if r["way"] == way]
        at = [routings.index(r["routing"]) + (i - len(ways) / 2 + 0.5) * width for r in mine]
        speeds = [r["tokens_per_s"] / 1e3 for r in mine]
        axes.bar(at, speeds, 0.92 * width, color=_COLORS[way], label=way)
        for place, speed, record in zip(at, speeds, mine, strict=True):
            if record["dropped"]:
                percent = f"{100 * record['dropped']:.0f} % lost"
                axes.text(
                    place, speed, f" {percent}", rotation=90, ha="center", va="bottom", size=7
                )
    busiest = {r["routing"]: r["busiest_over_mean"] for r in records}
    labels = [f"{name}\nbusiest rank: {busiest[name]:.2f}" for name in routings]
    axes.set_xticks(range(len(routings)), labels, size=8)
    axes.set_title("A layer forward and backward: thousand tokens a second, by routing")
    axes.set_xlabel("busiest rank: its load over the mean")
    axes.legend(ncols=4, frameon=False, fontsize=8, loc="upper center")
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])


def _draw_pinned(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    for way in dict.fromkeys(r["way"] for r in records):
        mine = sorted((r for r in records if r["way"] == way), key=lambda r: r["busiest_over_mean"])
        imbalance = [r["busiest_over_mean"] for r in mine]
        p50, p99 = (np.array([r[name] for r in mine]) for name in ("p50_ms", "p99_ms"))
        axes.plot(imbalance, p50, "o-", color=_COLORS[way], label=way)
        axes.fill_between(imbalance, p50, p99, color=_COLORS[way], alpha=0.15, linewidth=0)
    axes.set_title("Two ranks, each on a core of its own: milliseconds of the slower one, to p99")
    axes.set_xlabel("busiest rank's load over the mean, by routing")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
