"""What a run shows: a table, a picture, and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def save_picture(
    path: Path,
    history: History,
    *,
    title: str,
    held_out_loss: float,
    entropy: float,
    balanced_from: int,
) -> None:
    """Draws the loss, loads of experts and of devices, and the drops over the steps of training.

    Args:
      path: where to write the PNG.
      history: what to draw.
      title: what was trained.
      held_out_loss: bits per byte of text not trained on, at the end.
      entropy: bits per byte of the text when only byte frequencies are known.
      balanced_from: the first step in which devices borrowed experts.
    """
    # Made without pyplot, a figure needs no window system.
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 9), dpi=110, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        loss_axes, load_axes, rank_axes, drop_axes = figure.subplots(
            4, 1, sharex=True, height_ratios=[4, 4, 1.6, 1.6]
        )
        _draw_losses(loss_axes, history.loss, held_out_loss, entropy)
        _draw_load(load_axes, history.expert_load)
        _draw_ranks(rank_axes, history.busiest_rank.mean(axis=1), balanced_from)
        _draw_drops(drop_axes, history.dropped.mean(axis=1))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


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
