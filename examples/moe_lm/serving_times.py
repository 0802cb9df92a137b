"""How long serving takes, way by way."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Int32, Key

from moe_lm import serving
from moe_lm.serving import Sequences, State

_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Way:
    """A model and what it is to serve."""

    graph: nnx.GraphDef
    state: State
    prompts: Int32[Array, "batch length"]
    key: Key[Array, ""]
    max_length: int

    def prefill(self) -> Sequences:
        """Reads the prompts, and writes the first token after each."""
        return serving.prefill(
            self.graph, self.state, self.prompts, self.key, max_length=self.max_length
        )

    def step(self, sequences: Sequences) -> Sequences:
        """Writes the next token of each sequence."""
        return serving.step(self.graph, self.state, sequences, self.key)

    def decode(self, sequences: Sequences) -> Sequences:
        """Writes all the others."""
        return serving.decode(self.graph, self.state, sequences, self.key)

    def serve(self) -> Sequences:
        """Reads the prompts, and writes all."""
        return self.decode(self.prefill())


@dataclasses.dataclass
class Times:
    """Seconds of each run, and how many tokens one writes in ``decode``."""

    prefill: list[float] = dataclasses.field(default_factory=list)
    decode: list[float] = dataclasses.field(default_factory=list)
    step: list[float] = dataclasses.field(default_factory=list)
    written: int = 0


def compare(ways: dict[str, Way], *, repeats: int) -> dict[str, Times]:
    """Times reading, writing in one loop, and single steps; the ways take turns.

    Args:
      ways: what to time.
      repeats: runs of each. One more, which compiles, does not count.

    Returns:
      The times of each; of single steps as many as the loop has, in every run.
    """
    times = {name: Times() for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            _time_once(way, times[name] if number else Times())
    return times


def format_times(times: dict[str, Times], ways: dict[str, Way]) -> str:
    """Lays out tokens a second, and what a step takes: a sequence waits so long for a token."""
    width = max(map(len, ways))
    lines = [
        f"{'':{width}}{'prefill':>12}{'decode':>12}{'a step, ms':>20}{'experts':>14}",
        f"{'':{width}}{'tokens/s':>12}{'tokens/s':>12}{'p50':>10}{'p99':>10}{'MB a device':>14}",
    ]
    for name, way in ways.items():
        spent = times[name]
        p50, p99 = 1e3 * np.percentile(spent.step, [50, 99])
        lines.append(
            f"{name:{width}}{way.prompts.size / np.median(spent.prefill):12,.0f}"
            f"{spent.written / np.median(spent.decode):12,.0f}{p50:10.2f}{p99:10.2f}"
            f"{_expert_bytes(way) / 1e6:14.2f}"
        )
    return "\n".join(lines)


def _time_once(way: Way, times: Times) -> None:
    sequences = _timed(times.prefill, way.prefill)
    served = _timed(times.decode, partial(way.decode, sequences))
    # The first token after each prompt is the prefill's.
    times.written = serving.num_written(served, way.prompts.shape[1]) - len(way.prompts)
    sequences = way.prefill()
    while int(sequences.length) < int(served.length):
        sequences = _timed(times.step, partial(way.step, sequences))


def _timed(seconds: list[float], call: Callable[[], _Result]) -> _Result:
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    seconds.append(time.perf_counter() - start)
    return result


def _expert_bytes(way: Way) -> int:
    """Returns what one device holds of the experts of all layers."""
    moes = [block.moe for block in nnx.merge(way.graph, way.state).blocks]
    weights = [w[...] for moe in moes for w in (moe.w_gate, moe.w_up, moe.w_down)]
    return sum(w.addressable_shards[0].data.nbytes for w in weights)
