"""A trace as a picture: who waits for whom, how long calls take, and when."""

import os
from typing import Any

import numpy as np

from jax_ep._trace import Trace

_MATRICES, _SHOWN = 3, 0.02
_INK, _FAINT = "#333333", "#dddddd"
_LINES = ("#2a6f97", "#d1495b", "#66a182", "#edae49", "#7a5195", "#5c677d")


def save_picture(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Draws who waits for whom in the ops that wait most, how long calls take, and when.

    Args:
      trace: of one process, or of several put together; it must hold an exchange.
      path: the PNG, which is replaced.

    Raises:
      ImportError: matplotlib is not installed.
      OSError: the file cannot be written.
      ValueError: the trace is empty.
    """
    _check_not_empty(trace)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a picture needs matplotlib: `pip install matplotlib`, or jax_ep's extra 'examples'"
        ) from error
    figure = Figure(figsize=(11, 7.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(2, 1, height_ratios=[1.3, 1])
    draw_waits(halves[0], trace)
    times, moments = halves[1].subplots(1, 2, width_ratios=[1, 1.4])
    calls = trace.calls()
    colors = {op: _LINES[i % len(_LINES)] for i, op in enumerate(trace.ops)}
    _draw_times(times, calls, colors)
    _draw_moments(moments, calls, colors)
    for axes in (times, moments):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=_FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=90, format="png")


def draw_waits(figure: Any, trace: Trace) -> None:
    """Draws into a figure who waits for whom in a call, for the three ops that wait most.

    Each op has a matrix of ranks, in milliseconds a call, on one scale for all: where little is
    waited all is pale. ``trace.waits()`` has the numbers.

    Args:
      figure: of matplotlib, or a part of one from its ``subfigures``; it should have a constrained
        layout.
      trace: of one process, or of several put together; it must hold an exchange.

    Raises:
      ValueError: the trace is empty.

    Example:
      >>> import jax, jax.numpy as jnp, jax_ep
      >>> from matplotlib.figure import Figure
      >>> def plan(topk_idx):
      ...     return jax_ep.make_plan(topk_idx, num_experts=4, axis_name="expert")
      >>> with jax_ep.record() as trace:
      ...     plans = jax.vmap(plan, axis_name="expert")(jnp.zeros((4, 8, 1), jnp.int32))
      ...     _ = jax.block_until_ready(plans)
      >>> figure = Figure()
      >>> jax_ep.draw_waits(figure, trace)
      >>> figure.axes[0].get_title()
      'make_plan'
    """
    _check_not_empty(trace)
    calls, waits = trace.calls(), trace.waits()
    most = np.argsort(-waits.sum(axis=(1, 2)), kind="stable")[:_MATRICES]
    counts = np.array([np.sum(calls["op"] == op) for op in trace.ops])
    means = 1e3 * waits / counts[:, None, None]
    most_of_all = max(float(means.max()), 1e-3)
    image, all_axes = None, np.ravel(figure.subplots(1, len(most)))
    for axes, place in zip(all_axes, most, strict=True):
        mean = means[place]
        image = axes.imshow(mean, cmap="YlOrRd", vmin=0, vmax=most_of_all)
        axes.set_title(trace.ops[place], fontsize=11, color=_INK)
        axes.set_xlabel("for rank j")
        axes.set_ylabel("rank i waits")
        if len(mean) <= 8:
            axes.set_xticks(range(len(mean)))
            axes.set_yticks(range(len(mean)))
            for (i, j), value in np.ndenumerate(mean):
                ink = "white" if value > 0.6 * most_of_all else _INK
                if value > _SHOWN * most_of_all:
                    axes.text(j, i, f"{value:.2g}", ha="center", va="center", color=ink, fontsize=8)
    figure.colorbar(image, ax=all_axes, shrink=0.8, label="ms a call")


def _check_not_empty(trace: Trace) -> None:
    if not len(trace):
        raise ValueError("trace must hold an exchange to be drawn; got an empty one.")


def _draw_times(axes: Any, calls: dict[str, np.ndarray], colors: dict[str, str]) -> None:
    """Draws how many calls take longer than so long: the tail shows."""
    for op, color in colors.items():
        time = np.sort(_ms(calls)[calls["op"] == op])
        axes.step(time, 1 - np.arange(len(time)) / len(time), where="pre", color=color, label=op)
    axes.set(xscale="log", yscale="log", xlabel="ms", ylabel="share of calls that take longer")
    axes.legend(frameon=False, fontsize=9)


def _draw_moments(axes: Any, calls: dict[str, np.ndarray], colors: dict[str, str]) -> None:
    """Draws when calls were, how long they took, and how much of that was waiting."""
    began = (calls["first_arrival"] - calls["first_arrival"].min()) * 1e-9
    for op, color in colors.items():
        some = calls["op"] == op
        axes.plot(began[some], _ms(calls)[some], ".", markersize=5, color=color, label=op)
        waiting = 1e3 * calls["gather"][some]
        axes.vlines(began[some], 0, waiting, color=color, linewidth=0.8, alpha=0.4)
    axes.set(xlabel="s from the first call", ylabel="ms; line: waiting for ranks")
    axes.set_ylim(bottom=0)


def _ms(calls: dict[str, np.ndarray]) -> np.ndarray:
    return 1e3 * (calls["gather"] + calls["work"] + calls["tell"])
