"""Draws what a token costs against the number of ranks, as the model of clusters has it."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_INK, _GREY = "#1f2933", "#7b8794"
_STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "font.size": 10,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_COLORS = ("#2364aa", "#3a7d44", "#d9541e", "#8e44ad", _GREY)
_LINE_OF_TEXT = 18.0
"""In pixels."""


def save(
    path: pathlib.Path,
    num_ranks: Sequence[int],
    microseconds: Mapping[str, Sequence[float]],
    plan: Sequence[float],
    *,
    title: str,
    subtitle: str,
) -> None:
    """Draws a line for each way to exchange, and one for the plan.

    Args:
      path: where to write the PNG.
      num_ranks: numbers of ranks, ascending.
      microseconds: for each token of a rank, by what a line is to be called.
      plan: likewise, of the plan alone.
      title: what is drawn.
      subtitle: for which sizes, and on what.
    """
    # Made without pyplot, a figure needs no window system.
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 5.2), dpi=110, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        axes = figure.subplots()
        axes.set_title(subtitle, loc="left", fontsize=9, color=_GREY)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(num_ranks, [f"{ranks:,}" for ranks in num_ranks])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(axis="y", color="#e4e7eb")
        axes.set_xlabel("ranks, one GPU each")
        axes.set_ylabel("microseconds for each token of a rank")
        named = [*microseconds.items(), ("the plan, for any of them", plan)]
        for (name, values), color in zip(named, _COLORS, strict=True):
            style = "o-" if name in microseconds else "--"
            axes.plot(num_ranks, values, style, color=color, linewidth=1.8, markersize=4)
        _name(axes, num_ranks[-1], [(values[-1], name) for name, values in named])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _name(axes: Axes, x: float, ends: Sequence[tuple[float, str]]) -> None:
    """Writes lines' names beside their ends, the higher ones further up where these are close."""
    colors = dict(zip(ends, _COLORS, strict=True))
    lowest = -math.inf
    for y, name in sorted(ends):
        height = axes.transData.transform((x, y))[1]
        up = max(0.0, lowest - height)
        lowest = height + up + _LINE_OF_TEXT
        axes.annotate(
            name,
            (x, y),
            (10, up),
            textcoords="offset pixels",
            va="center",
            color=colors[y, name],
        )
