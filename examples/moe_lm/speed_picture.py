"""How fast a run is: ways to compute a layer side by side, steps and their tail, who comes last."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

import jax_ep
from moe_lm.ways import Speed

_INK, _BLUE, _ORANGE, _GREY = "#1f2933", "#2364aa", "#d9541e", "#7b8794"


def draw(figure: Any, seconds: np.ndarray, speeds: dict[str, Speed], trace: jax_ep.Trace) -> None:
    """Draws speed and memory of each way, how long steps take, and which device comes last.

    Args:
      figure: where to.
      seconds: of steps.
      speeds: how each way to compute a layer fares.
      trace: who came when; without any, nothing is said of it.
    """
    fast, small, tail, last = figure.subplots(4, 1, height_ratios=[2.6, 2.6, 2.6, 2.2])
    fast.set_title("One expert layer, forward and backward:\nthousand tokens a second")
    rates = {
        name: (speed.tokens_per_s / 1e3, f"{speed.tokens_per_s / 1e3:.0f}{_lost(speed)}")
        for name, speed in speeds.items()
    }
    _draw_bars(fast, rates)
    small.set_title("Memory it takes: MB of each device")
    sizes = {name: speed.device_bytes / 1e6 for name, speed in speeds.items()}
    _draw_bars(small, {name: (size, f"{size:.0f}") for name, size in sizes.items()})
    _draw_tail(tail, 1e3 * seconds)
    if len(trace):
        _draw_last(last, trace)
    else:
        last.set_visible(False)


def _lost(speed: Speed) -> str:
    return f"  ({100 * speed.dropped:.0f}% dropped)" if speed.dropped else ""


def _draw_bars(axes: Axes, values: dict[str, tuple[float, str]]) -> None:
    """Draws a bar for each name, with a text behind it."""
    lengths, texts = zip(*values.values(), strict=True)
    colors = [_BLUE if name.startswith("jax_ep") else _GREY for name in values]
    bars = axes.barh(np.arange(len(values)), lengths, 0.7, color=colors)
    axes.bar_label(bars, texts, padding=3, fontsize=9)
    axes.set_yticks(range(len(values)), [*values])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.5 * max(lengths))


def _draw_tail(axes: Axes, ms: np.ndarray) -> None:
    p50, p99 = np.percentile(ms, [50, 99])
    axes.set_title(f"How long a step takes: ms, of {len(ms)} steps")
    counts, *_ = axes.hist(ms, bins=30, color=_BLUE, alpha=0.55)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.4 * np.max(counts))  # The texts stand above.
    for value, name, height in ((p50, "half", 0.98), (p99, "99%", 0.86)):
        axes.axvline(value, color=_INK, linewidth=1.1)
        axes.annotate(
            f" {name} take less than {value:.0f} ",
            (value, height),
            xycoords=("data", "axes fraction"),
            ha="left" if value < axes.get_xlim()[1] / 2 else "right",
            va="top",
            fontsize=9,
        )
    axes.set_ylabel("steps")


def _draw_last(axes: Axes, trace: jax_ep.Trace) -> None:
    last = trace.calls()["last_rank"]
    num_ranks = trace.waits().shape[1]
    share = 100 * np.bincount(last[last >= 0], minlength=num_ranks) / max(1, np.sum(last >= 0))
    slowest = int(np.argmax(share))
    axes.set_title("The slowest device: % of exchanges\nto which each comes last")
    colors = [_ORANGE if rank == slowest else _GREY for rank in range(num_ranks)]
    axes.bar(np.arange(num_ranks), share, 0.7, color=colors)
    axes.axhline(100 / num_ranks, color=_INK, linewidth=1.0, linestyle="--")
    axes.annotate(
        "all alike",
        (num_ranks - 0.5, 100 / num_ranks),
        (0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )
    if num_ranks <= 16:
        axes.set_xticks(range(num_ranks))
    axes.set_xlabel("device along the expert axis")
