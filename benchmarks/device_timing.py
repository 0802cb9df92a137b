"""Times what calls take on a device, with its L2 cache flushed before each, by the host's clock."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import timing

Steps: TypeAlias = Sequence[Callable[..., Any]]
"""Calls one after the other. Each takes the arguments that the one before returned as a tuple."""


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
    contenders: Mapping[str, Steps], flush: Flush, *, batch: int, repeats: int
) -> dict[str, timing.Times]:
    """Times contenders as the device does them one after the other, in one interleaved run.

    A run puts ``batch`` turns on the queue, in each of which a flush goes before every step, and
    waits for the last. The median of the same flushes alone is subtracted, and with it the waiting.

    Args:
      contenders: the steps of each; they return arrays that depend on all they do.
      flush: runs before every step.
      batch: turns in a run.
      repeats: runs of each.

    Returns:
      The times of one turn of each, one entry per run.
    """
    lengths = sorted({len(steps) for steps in contenders.values()})
    runs: dict[Any, Callable[[], Any]] = {
        name: _repeated(steps, flush, batch) for name, steps in contenders.items()
    }
    runs |= {length: _repeated([lambda *_: ()] * length, flush, batch) for length in lengths}
    times = timing.compare(runs, repeats=repeats)
    alone = {length: times.pop(length).median for length in lengths}
    return {
        name: timing.Times(
            tuple((seconds - alone[len(contenders[name])]) / batch for seconds in spent.seconds)
        )
        for name, spent in times.items()
    }


def _repeated(steps: Steps, flush: Flush, batch: int) -> Callable[[], Any]:
    def run() -> Any:
        flushed, result = None, ()
        for _ in range(batch):
            # The queue keeps their order: what an earlier turn returned may go.
            result = ()
            for step in steps:
                flushed = flush()
                result = step(*result)
        return flushed, result

    return run
