"""Draws what a token costs against the number of ranks, as the model of clusters has it."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from picture_style import GREY, INK, STYLE

_COLORS = ("#2364aa", "#3a7d44", "#d9541e", "#b7950b", "#8e44ad", INK, GREY)
_LINE_OF_TEXT = 18.0
"""In pixels."""


class _Line(NamedTuple):
    name: str
    values: Sequence[float]
    color: str


def save(
    path: pathlib.Path,
    num_ranks: Sequence[int],
    ways: Mapping[str, Sequence[float]],
    plans: Mapping[str, Sequence[float]],
    *,
    steepest: str,
    title: str,
    subtitle: str,
) -> None:
    """Draws a line for each way to exchange, and one for each plan.

    Args:
      path: where to write the PNG.
      num_ranks: numbers of ranks, ascending.
      ways: microseconds for each token of a rank, by what a line is to be called.
      plans: likewise, of plans alone.
      steepest: the line that may leave the picture at its top.
      title: what is drawn.
      subtitle: for which sizes, and on what.
    """
    named = [*ways.items(), *plans.items()]
    lines = [_Line(*each, color) for each, color in zip(named, _COLORS, strict=True)]
    top = 1.12 * max(max(line.values) for line in lines if line.name != steepest)
    # Made without pyplot, a figure needs no window system.
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 5.4), dpi=110, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        axes = figure.subplots()
        axes.set_title(subtitle, loc="left", fontsize=9, color=GREY)
        axes.set_xscale("log", base=2)
        axes.set_xticks(num_ranks, [f"{ranks:,}" for ranks in num_ranks])
        axes.set_ylim(0, top)
        axes.minorticks_off()
        axes.grid(axis="y", color="#e4e7eb")
        axes.set_xlabel("ranks, one GPU each")
        axes.set_ylabel("microseconds for each token of a rank")
        for line in lines:
            style = "o-" if line.name in ways else "--"
            axes.plot(num_ranks, line.values, style, color=line.color, linewidth=1.8, markersize=4)
        _name(axes, num_ranks[-1], [line for line in lines if line.values[-1] <= top])
        for line in lines:
            if line.values[-1] > top:
                _name_at_the_top(axes, top, num_ranks, line)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _name(axes: Axes, x: float, lines: Sequence[_Line]) -> None:
    """Writes lines' names beside their ends, the higher ones further up where these are close."""
    lowest = -math.inf
    for line in sorted(lines, key=lambda line: line.values[-1]):
        y = line.values[-1]
        height = axes.transData.transform((x, y))[1]
        up = max(0.0, lowest - height)
        lowest = height + up + _LINE_OF_TEXT
        axes.annotate(
            line.name,
            (x, y),
            (10, up),
            textcoords="offset pixels",
            va="center",
            color=line.color,
        )


def _name_at_the_top(axes: Axes, top: float, num_ranks: Sequence[int], line: _Line) -> None:
    """Writes a line's name where it leaves the picture, and how far up it goes."""
    x = 2 ** np.interp(top, line.values, np.log2(num_ranks))
    axes.annotate(
        f"{line.name}: {line.values[-1]:,.0f} with {num_ranks[-1]:,} ranks",
        (float(x), top),
        (10, -16),
        textcoords="offset pixels",
        va="top",
        color=line.color,
    )
