"""What a run prints."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


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


def print_losses(
    first_step: int,
    losses: Float[np.ndarray, "num_steps"],
    *,
    held_out_loss: float,
    entropy: float,
) -> None:
    """Prints where training began and where it ended, beside what byte frequencies give."""
    print(f"loss at step {first_step + 1:<9} {losses[0]:.3f} bits per byte")
    print(f"mean of the last 10    {losses[-10:].mean():.3f}")
    print(f"text not trained on    {held_out_loss:.3f}")
    print(f"byte entropy           {entropy:.3f}")


def print_parts(num_layers: int, parts: dict[str, float], step: float) -> None:
    """Prints how the time of a step is spent."""
    print(f"\nA step, and the parts of its {num_layers} expert layers on their own,")
    print(f"forward and backward:\n{format_shares(parts, step)}")
