"""A run as a picture: over its steps on the left, how fast it is on the right."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import jax_ep
from moe_lm import speed_picture
from moe_lm.metrics import Metrics
from moe_lm.ways import Speed

_INK, _BLUE, _ORANGE, _GREY = "#1f2933", "#2364aa", "#d9541e", "#7b8794"
_STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class Picture(NamedTuple):
    """What a picture shows.

    Attributes:
      title: what was trained.
      held_out_loss: bits per byte of text not trained on, at the end.
      entropy: bits per byte of the text when only byte frequencies are known.
      first_step: the number of the first step.
      balanced_from: the first step in which devices borrowed experts.
      history: what each step reported.
      seconds: how long steps took.
      speeds: how each way to compute a layer fares.
      trace: whose waits to draw; none are if it is empty.
    """

    title: str
    held_out_loss: float
    entropy: float
    first_step: int
    balanced_from: int
    history: Metrics
    seconds: Float[np.ndarray, "num_timed"]
    speeds: dict[str, Speed]
    trace: jax_ep.Trace


def save_picture(path: Path, picture: Picture) -> None:
    """Draws loss, loads and drops over the steps; speeds, memory, tails, and who waits for whom.

    Args:
      path: where to write the PNG.
      picture: what to draw.
    """
    # Made without pyplot, a figure needs no window system.
    with mpl.rc_context(_STYLE):
        has_trace = len(picture.trace) > 0
        figure = Figure(figsize=(13, 13.5 if has_trace else 10), dpi=90, layout="constrained")
        figure.suptitle(picture.title, x=0.01, ha="left", fontsize=13)
        rows: Any = figure.subfigures(1 + has_trace, 1, height_ratios=[10, 3.5][: 1 + has_trace])
        columns = np.ravel(rows)[0].subfigures(1, 2, width_ratios=[1.5, 1], wspace=0.03)
        _draw_steps(columns[0], picture)
        speed_picture.draw(columns[1], picture.seconds, picture.speeds, picture.trace)
        if has_trace:
            waits = np.ravel(rows)[1]
            waits.suptitle(
                "Which rank waits for which in an exchange: ms a call, mean of the last steps "
                "(ranks are the devices along the expert axis)",
                x=0.01,
                ha="left",
                fontsize=11,
                fontweight="bold",
            )
            jax_ep.draw_waits(waits, picture.trace)
        figure.savefig(path)


def _draw_steps(figure: Any, picture: Picture) -> None:
    history, first = picture.history, picture.first_step
    steps = first + np.arange(len(history.loss))
    losses, experts, ranks, drops = figure.subplots(
        4, 1, sharex=True, height_ratios=[3.4, 4, 1.8, 1.8]
    )
    _draw_losses(losses, steps, picture)
    experts.set_title("Load of each expert: 1 is the mean of its layer")
    image = _draw_loads(experts, history.expert_load, first)
    ranks.set_title("Load of each device, on the same scale")
    _draw_loads(ranks, history.rank_load, first)
    # One scale for both, beside them and not in their space, so that all panels keep one width.
    scale = experts.inset_axes((1.015, 0, 0.018, 1))
    figure.colorbar(image, cax=scale, extend="max")
    _draw_drops(drops, steps, history.dropped_by_choice.mean(axis=1))
    if first < picture.balanced_from <= steps[-1]:
        for axes in (losses, experts, ranks, drops):
            axes.axvline(picture.balanced_from - 0.5, color=_INK, linewidth=1.0, linestyle="--")
        losses.annotate(
            "from here on devices\nborrow busy experts",
            (picture.balanced_from, losses.get_ylim()[1]),
            (6, -26),
            textcoords="offset points",
            color=_GREY,
        )


def _draw_losses(axes: Axes, steps: np.ndarray, picture: Picture) -> None:
    axes.set_title("Loss: bits per byte")
    axes.plot(steps, picture.history.loss, color=_BLUE, linewidth=1.4)
    axes.axhline(picture.entropy, color=_ORANGE, linewidth=1.2, linestyle="--")
    last = steps[-1]
    axes.annotate(
        f"by byte frequencies alone {picture.entropy:.2f}",
        (last, picture.entropy),
        (0, 4),
        textcoords="offset points",
        ha="right",
        color=_ORANGE,
    )
    axes.plot(last, picture.held_out_loss, "o", color=_BLUE, markersize=6, clip_on=False)
    axes.annotate(
        f"held-out text {picture.held_out_loss:.2f}",
        (last, picture.held_out_loss),
        (-8, -16),
        textcoords="offset points",
        ha="right",
        color=_BLUE,
    )
    axes.set_ylim(0, max(8.2, float(np.max(picture.history.loss))))
    axes.grid(axis="y", color="#e4e7eb")
    axes.set_axisbelow(True)


def _draw_loads(axes: Axes, load: np.ndarray, first_step: int) -> Any:
    """Draws a row for each owner of each layer; returns the image, for its scale."""
    num_steps, num_layers, num_owners = load.shape
    share = load / np.maximum(load.mean(axis=2, keepdims=True), 1e-9)
    rows = share.reshape(num_steps, num_layers * num_owners).T
    image = axes.imshow(
        rows,
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r",
        vmin=0.0,
        vmax=2.0,
        extent=(first_step - 0.5, first_step + num_steps - 0.5, len(rows) - 0.5, -0.5),
    )
    for layer in range(1, num_layers):
        axes.axhline(layer * num_owners - 0.5, color=_INK, linewidth=1.2)
    axes.set_yticks(
        [(layer + 0.5) * num_owners - 0.5 for layer in range(num_layers)],
        [f"layer {layer}" for layer in range(num_layers)],
    )
    axes.tick_params(axis="y", length=0)
    return image


def _draw_drops(axes: Axes, steps: np.ndarray, dropped: np.ndarray) -> None:
    axes.set_title("Choices dropped for want of room, %")
    percent, num_topk = 100 * dropped, dropped.shape[1]
    # From dark to light: what a token wants first is kept before what anyone wants second.
    colors = mpl.colormaps["Oranges_r"](np.linspace(0.15, 0.6, num_topk))
    for k, color in enumerate(colors):
        axes.plot(steps, percent[:, k], color=color, linewidth=1.4, label=_ordinal(k + 1))
    axes.set_ylim(0, max(1.0, 1.05 * float(np.max(percent))))
    axes.set_xlabel("step")
    axes.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
    axes.legend(frameon=False, ncols=min(4, num_topk), fontsize=9, loc="upper right")


def _ordinal(k: int) -> str:
    return f"{k}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(k, 'th') } choices"
