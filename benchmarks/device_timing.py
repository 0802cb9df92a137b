"""Times what calls take on a device, with its L2 cache flushed before each, by the host's clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import timing

_FLUSH = "flush alone"


class Flush:
    """Puts a read of more than any cache holds on the device's queue.

    A read leaves no dirty lines, which calls behind it would have to write back. It also takes the
    device longer than the host needs to put the next call behind it, so that the queue never runs
    dry.
    """

    def __init__(self, num_bytes: int) -> None:
        self._buffer = jnp.ones((num_bytes // 4,), jnp.float32)
        self._read = jax.jit(jnp.sum)

    def __call__(self) -> jax.Array:
        return self._read(self._buffer)


def compare(
    calls: Mapping[str, timing.Contender], flush: Flush, *, batch: int, repeats: int
) -> dict[str, timing.Times]:
    """Times calls as the device does them one after the other, in one interleaved run.

    A run puts ``batch`` pairs of a flush and a call on the queue and waits for the last. The median
    of the same without calls is subtracted, and with it the flushes and the waiting.

    Args:
      calls: each returns arrays that depend on all it does.
      flush: runs before every call.
      batch: calls in a run.
      repeats: runs of each.

    Returns:
      The times of one call of each, one entry per run.
    """
    batches = {name: _repeated(call, flush, batch) for name, call in calls.items()}
    times = timing.compare({_FLUSH: _repeated(None, flush, batch), **batches}, repeats=repeats)
    idle = times.pop(_FLUSH).median
    return {
        name: timing.Times(tuple((seconds - idle) / batch for seconds in spent.seconds))
        for name, spent in times.items()
    }


def _repeated(call: timing.Contender | None, flush: Flush, batch: int) -> Callable[[], Any]:
    def run() -> Any:
        flushed, result = None, None
        for _ in range(batch):
            flushed = flush()
            # The queue keeps their order: what an earlier call returned may go.
            result = call() if call else None
        return flushed, result

    return run
