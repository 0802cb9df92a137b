"""Traces that a test makes up: of one process, or of several that recorded the same exchanges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jax_ep import Trace
from jax_ep._exchanges import Columns

START = 10**12
MS = 10**6


def part(
    came: np.ndarray,
    *,
    process: int = 0,
    is_here: Sequence[bool] | None = None,
    named: int | None = None,
    published: int | np.ndarray = 0,
    work: int | np.ndarray = MS,
    **labels: str | Sequence[str],
) -> Columns:
    """Makes the records of one process.

    Args:
      came: ns by exchange and rank, from a start at which the exchange before has long ended: when
        it came, or when its process was seen, as ``CallRecord`` has it.
      process: its number.
      is_here: which ranks are its own, if not all.
      named: when it had been told by the leader which exchange it is, if another one leads.
      published: when it had published, likewise, if others read it.
      work: how many ns it worked.
      labels: ``op``, ``scope`` and ``fabric`` of each exchange, or of all, and the ``host``.
    """
    count, num_ranks = came.shape
    number = np.arange(count)
    start = START + 1000 * MS * number
    here = np.ones(num_ranks, bool) if is_here is None else np.array(is_here)
    bits = np.uint64(sum(1 << rank for rank in np.flatnonzero(here).tolist()))
    times = came + start[:, None]
    began = times.max(axis=1, initial=0)
    host = labels.pop("host", "here")
    texts = {"op": "dispatch", "scope": "", "fabric": "devices"} | labels
    numbers = {"run": 0, "call_site": 0, "group": 7, "num_ranks": num_ranks, "lent_bytes": 512}
    return {
        **{name: np.full(count, value, np.int64) for name, value in numbers.items()},
        "exchange": number,
        "epoch": np.where(np.array(texts["fabric"]) == "processes", number + 1, 0),
        **{name: np.broadcast_to(np.array(text), (count,)) for name, text in texts.items()},
        "named": np.zeros(count, np.int64) if named is None else start + named,
        "published": start + published,
        "began": began,
        "ended": began + work,
        "told": began + work + MS // 10,
        "first_rank": np.zeros(count, np.int64),
        "is_here": np.full(count, bits, np.uint64),
        "came": times.astype(np.int64),
        "platform": np.array("cpu"),
        "process": np.array(process),
        "host": np.array(host),
        "num_lost": np.array(0),
    }


def trace(*parts: Columns) -> Trace:
    return Trace(parts)
