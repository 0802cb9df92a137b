"""What a run shows: a table, a picture, and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import jax_ep

_MATRICES = 3
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


class History(NamedTuple):
    """What each step of training reported: see ``training.Metrics``."""

    loss: Float[np.ndarray, "num_steps"]
    expert_load: Int[np.ndarray, "num_steps num_layers num_experts"]
    max_over_mean: Float[np.ndarray, "num_steps num_layers"]
    busiest_rank: Float[np.ndarray, "num_steps num_layers"]
    dropped: Float[np.ndarray, "num_steps num_layers"]


class Picture(NamedTuple):
    """What a picture says besides what it draws.

    Attributes:
      title: what was trained.
      held_out_loss: bits per byte of text not trained on, at the end.
      entropy: bits per byte of the text when only byte frequencies are known.
      balanced_from: the first step in which devices borrowed experts.
    """

    title: str
    held_out_loss: float
    entropy: float
    balanced_from: int


def format_shares(parts: dict[str, float], step: float) -> str:
    """Lays out what each part takes of a step, in milliseconds and per cent."""
    rows = [*parts.items(), ("the rest", step - sum(parts.values())), ("whole step", step)]
    lines = [f"{'':12}{'ms':>9}{'share':>9}"]
    lines += [f"{name:12}{1e3 * t:9.1f}{t / step:9.1%}" for name, t in rows]
    return "\n".join(lines)


def format_text(text: bytes) -> str:
    """Returns bytes as text that cannot upset a terminal."""
    decoded = text.decode("utf-8", errors="replace")
    unknown = "\N{REPLACEMENT CHARACTER}"
    return "".join(c if c.isprintable() or c == "\n" else unknown for c in decoded)


def save_picture(path: Path, picture: Picture, history: History, trace: jax_ep.Trace) -> None:
    """Draws the loss, loads of experts and of devices, drops, and who waits for whom.

    Args:
      path: where to write the PNG.
      picture: what to say besides.
      history: what to draw over the steps of training.
      trace: whose waits to draw; none are if it is empty.
    """
    # Made without pyplot, a figure needs no window system.
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 12 if len(trace) else 9), dpi=100, layout="constrained")
        parts: Any = [figure]
        if len(trace):
            parts = figure.subfigures(2, 1, height_ratios=[9, 3])
            _draw_waits(parts[1], trace)
        loss_axes, load_axes, rank_axes, drop_axes = parts[0].subplots(
            4, 1, sharex=True, height_ratios=[4, 4, 1.6, 1.6]
        )
        parts[0].suptitle(picture.title, x=0.01, ha="left", fontsize=12)
        _draw_losses(loss_axes, history.loss, picture.held_out_loss, picture.entropy)
        _draw_load(load_axes, history.expert_load)
        _draw_ranks(rank_axes, history.busiest_rank.mean(axis=1), picture.balanced_from)
        _draw_drops(drop_axes, history.dropped.mean(axis=1))
        figure.savefig(path)


def _draw_waits(figure: Any, trace: jax_ep.Trace) -> None:
    """Draws how long devices wait for each other in a call, for the ops that wait most."""
    waits, calls = trace.waits(), trace.calls()["op"]
    most = np.argsort(-waits.sum(axis=(1, 2)), kind="stable")[:_MATRICES]
    means = {
        op: 1e3 * waits[i] / np.sum(calls == op) for i, op in enumerate(trace.ops) if i in most
    }
    top = max(float(mean.max()) for mean in means.values())
    figure.suptitle(
        "Who waits for whom in an exchange: ms a call, mean of the last steps",
        x=0.01,
        ha="left",
        fontsize=11,
        fontweight="bold",
    )
    all_axes = np.ravel(figure.subplots(1, len(means)))
    for axes, (op, mean) in zip(all_axes, means.items(), strict=True):
        axes.imshow(mean, cmap="YlOrRd", vmin=0, vmax=top)
        axes.set_title(op, fontsize=10, fontweight="normal")
        axes.set_xticks(range(len(mean)))
        axes.set_yticks(range(len(mean)))
        axes.set_xlabel("for device")
        for (i, j), value in np.ndenumerate(mean):
            if i != j:
                ink = "white" if value > 0.6 * top else _INK
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
    all_axes[0].set_ylabel("device waits")


def _draw_losses(axes: Axes, losses: np.ndarray, held_out_loss: float, entropy: float) -> None:
    axes.set_title("Loss: bits per byte")
    axes.plot(losses, color=_BLUE, linewidth=1.4)
    axes.axhline(entropy, color=_ORANGE, linewidth=1.2, linestyle="--")
    last = len(losses) - 1
    axes.annotate(
        f"byte entropy of the text {entropy:.2f}",
        (last, entropy),
        (0, 4),
        textcoords="offset points",
        ha="right",
        color=_ORANGE,
    )
    axes.plot(last, held_out_loss, "o", color=_BLUE, markersize=6, clip_on=False)
    axes.annotate(
        f"held-out text {held_out_loss:.2f}",
        (last, held_out_loss),
        (-8, -16),
        textcoords="offset points",
        ha="right",
        color=_BLUE,
    )
    axes.set_ylim(0, max(8.2, float(np.max(losses))))
    axes.grid(axis="y", color="#e4e7eb")
    axes.set_axisbelow(True)


def _draw_load(axes: Axes, expert_load: np.ndarray) -> None:
    num_steps, num_layers, num_experts = expert_load.shape
    share = expert_load / expert_load.mean(axis=2, keepdims=True)
    rows = share.reshape(num_steps, num_layers * num_experts).T
    axes.set_title("Load of each expert, over the mean of its layer")
    image = axes.imshow(
        rows,
        aspect="auto",
        interpolation="nearest",
        cmap="RdBu_r",
        vmin=0.0,
        vmax=2.0,
        extent=(-0.5, num_steps - 0.5, len(rows) - 0.5, -0.5),
    )
    for layer in range(1, num_layers):
        axes.axhline(layer * num_experts - 0.5, color=_INK, linewidth=1.2)
    axes.set_yticks(
        [(layer + 0.5) * num_experts - 0.5 for layer in range(num_layers)],
        [f"layer {layer}" for layer in range(num_layers)],
    )
    axes.tick_params(axis="y", length=0)
    # Beside the axes, not in their space, so that the three panels keep one width.
    axes.figure.colorbar(image, cax=axes.inset_axes((1.01, 0, 0.015, 1)), extend="max")


def _draw_ranks(axes: Axes, busiest: np.ndarray, balanced_from: int) -> None:
    axes.set_title("Rows of the busiest device, over the mean")
    axes.plot(busiest, color=_BLUE, linewidth=1.2)
    top = max(1.5, 1.05 * float(np.max(busiest)))
    axes.set_ylim(0.9, top)
    if balanced_from < len(busiest):
        axes.axvline(balanced_from, color=_GREY, linewidth=1.0, linestyle="--")
        axes.annotate(
            "from here on devices borrow busy experts",
            (balanced_from, top),
            (6, -10),
            textcoords="offset points",
            color=_GREY,
        )


def _draw_drops(axes: Axes, dropped: np.ndarray) -> None:
    axes.set_title("Dropped choices, %")
    percent = 100 * dropped
    axes.fill_between(np.arange(len(percent)), percent, color=_ORANGE, alpha=0.35, linewidth=0)
    axes.plot(percent, color=_ORANGE, linewidth=1.2)
    axes.set_ylim(0, max(1.0, 1.05 * float(np.max(percent))))
    axes.set_xlabel("step")
    axes.set_xlim(-0.5, len(dropped) - 0.5)
