"""The floor under any exchange on CPU: two plain copies of its rows into memory already mapped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import timing
from absl import app
from shapes import EXCHANGE_SHAPES, Shape

from jax_ep._timing import make_copies

_COPIES = 2


def make_floor(shape: Shape, *, num_threads: int = 2) -> Callable[[], None]:
    """Returns a call that copies the rows of all choices twice: out, as dispatch, and back.

    Args:
      shape: how many rows of how many bytes.
      num_threads: how many share each copy.
    """
    return make_copies(shape.num_choices, shape.row_bytes, num_threads=num_threads)


def moved_bytes(num_rows: int, shape: Shape) -> int:
    """Counts the bytes that arrive somewhere when ``num_rows`` rows go out and back."""
    return _COPIES * num_rows * shape.row_bytes


def main(argv: Sequence[str]) -> None:
    del argv
    timing.print_json(timing.environment())
    floors = {name: make_floor(shape) for name, shape in EXCHANGE_SHAPES.items()}
    rows = []
    for name, times in timing.compare(floors).items():
        shape = EXCHANGE_SHAPES[name]
        rate = moved_bytes(shape.num_choices, shape) / times.median / 1e9
        rows.append((name, shape.num_choices, shape.row_bytes, str(times), f"{rate:.1f}"))
        timing.print_json({**shape.as_json(), **times.as_json(), "gb_per_s": round(rate, 2)})
    header = ("shape", "rows", "row bytes", "ms (p10-p90)", "GB/s")
    timing.print_table("two copies by two threads", header, rows)


if __name__ == "__main__":
    app.run(main)
