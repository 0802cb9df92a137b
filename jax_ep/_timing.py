"""Times contenders side by side, and lays out what came out as a table."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

Contender = Callable[[], Any]
Key = TypeVar("Key", bound=Hashable)

# A contender slower than this sits out rounds in proportion, so that it does not eat the budget of
# the fast ones; it still runs in at least a few.
_SLOW_SECONDS = 0.2
_FEWEST_SAMPLES = 5


@dataclasses.dataclass(frozen=True)
class Times:
    """What one contender took, one entry per run."""

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...] = ()
    """Of all threads of the process: it tells work from waiting, and from a busy machine."""

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def p10(self) -> float:
        return float(np.percentile(self.seconds, 10))

    @property
    def p90(self) -> float:
        return float(np.percentile(self.seconds, 90))

    @property
    def p99(self) -> float:
        return float(np.percentile(self.seconds, 99))

    @property
    def cpu_median(self) -> float:
        return float(np.median(self.cpu_seconds))

    def as_json(self) -> dict[str, float | int]:
        """Returns the summary in milliseconds."""
        return {
            "median_ms": round(self.median * 1e3, 4),
            "p10_ms": round(self.p10 * 1e3, 4),
            "p90_ms": round(self.p90 * 1e3, 4),
            "runs": len(self.seconds),
            **({"cpu_ms": round(self.cpu_median * 1e3, 4)} if self.cpu_seconds else {}),
        }

    def __str__(self) -> str:
        return f"{self.median * 1e3:.2f} ({self.p10 * 1e3:.2f}-{self.p90 * 1e3:.2f})"


def compare(
    contenders: Mapping[Key, Contender], *, repeats: int = 50, warmup: int = 3
) -> dict[Key, Times]:
    """Times all contenders in one interleaved run, so that noise of the machine hits all alike.

    Every round runs each contender once, in a new random order: what one leaves behind in caches
    and free memory is then not always the same one's to find.

    Args:
      contenders: calls whose results, arrays in any pytree or nothing, are waited for. A result is
        released before the clock of the next run starts.
      repeats: rounds. A slow contender takes part in every n-th only.
      warmup: runs of each before its first that counts; the first compiles.

    Returns:
      The times of each contender.
    """
    every = {name: _rounds_between(call, warmup, repeats) for name, call in contenders.items()}
    runs: dict[Key, list[tuple[float, float]]] = {name: [] for name in contenders}
    order = np.random.default_rng(0)
    for round_number in range(repeats):
        names = [name for name in contenders if round_number % every[name] == 0]
        order.shuffle(names)
        for name in names:
            runs[name].append(_time(contenders[name]))
    return {name: Times(*zip(*pairs, strict=True)) for name, pairs in runs.items()}


def make_copies(num_rows: int, row_bytes: int, *, num_threads: int = 2) -> Callable[[], None]:
    """Returns a call that copies rows twice, out and back, into memory already mapped.

    The sources are as large as the results, so nothing is gained from copying a row to several
    places. Every page has been written before the first call.

    Args:
      num_rows: how many rows.
      row_bytes: of how many bytes.
      num_threads: how many share each copy; NumPy copies without holding the interpreter.

    Returns:
      The call.
    """
    buffers = [np.full((num_rows, row_bytes), i, np.uint8) for i in range(3)]
    bounds = np.linspace(0, num_rows, num_threads + 1).astype(int)
    parts = [slice(begin, end) for begin, end in itertools.pairwise(bounds)]
    pool = concurrent.futures.ThreadPoolExecutor(num_threads)

    def copy(part: slice) -> None:
        tokens, rows, back = (buffer[part] for buffer in buffers)
        np.copyto(rows, tokens)
        np.copyto(back, rows)

    def run() -> None:
        # Parts go to threads: a list waits for all.
        list(pool.map(copy, parts))

    return run


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lays out rows under a header, the first column to the left and the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [title]
    for row in cells:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *rest]).rstrip())
    return "\n".join(lines)


def _time(call: Contender) -> tuple[float, float]:
    """Runs once; returns the seconds it took, and those of the processors."""
    cpu_start, start = time.process_time(), time.perf_counter()
    result = call()
    jax.block_until_ready(result)
    # In this order: the result, released on return, is not part of either.
    return time.perf_counter() - start, time.process_time() - cpu_start


def _rounds_between(call: Contender, warmup: int, repeats: int) -> int:
    """Warms a contender up; returns in which rounds it takes part: every that many."""
    seconds = [_time(call)[0] for _ in range(max(2, warmup))]
    wanted = max(1, round(min(seconds) / _SLOW_SECONDS))
    return min(wanted, max(1, repeats // _FEWEST_SAMPLES))
