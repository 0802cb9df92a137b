"""Rounds as the tests want them: how large, how many, and what their programs send."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import AXIS, over_devices

import jax_ep
from jax_ep import _wire
from jax_ep._axes import place
from jax_ep._call import Call, Operands
from jax_ep._ops import GATHER_ROWS

R, T, K, E, H = 4, 32, 4, 16, 16
MANY = 0.1
"""Room for a tenth of what ranks send as a rule, and for one token to a node: a dozen rounds."""


def set_room(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Gives rounds room for so much of the mean, whatever chance may add to it."""
    monkeypatch.setattr(_wire, "ROOM_FACTOR", factor)
    monkeypatch.setattr(_wire, "CHANCE_FACTOR", -1e9)


def random_routing(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((R, T, E)), axis=-1)[:, :, :K].astype(np.int32)


def make_plan(topk_idx: jax.Array) -> jax_ep.Plan:
    return jax_ep.make_plan(topk_idx, num_experts=E, axis_name=AXIS, implementation="native")


def count_rounds() -> Callable[[np.ndarray], tuple[int, int]]:
    """Compiles what says how many rounds choices take, and for how many tokens each has room."""

    def per_rank(topk_idx: jax.Array) -> tuple[jax.Array, jax.Array]:
        plan = make_plan(topk_idx)
        call = Call(GATHER_ROWS, plan._layout, "mesh", "dispatch", "cpu")
        operands = Operands(place(plan._layout), plan._arrays, ())
        wire = _wire.Wire.of(call, operands)
        return wire.num_rounds, jnp.int32(wire.room)

    program = jax.jit(over_devices(per_rank, R))

    def count(topk_idx: np.ndarray) -> tuple[int, int]:
        counts, rooms = program(topk_idx)
        [number] = {*counts.tolist()}  # All ranks agree.
        return number, int(rooms[0])

    return count


def collectives(text: str, name: str) -> Iterator[int]:
    """Finds the bytes that each collective of a program brings to a device."""
    for types in re.findall(rf"= \(?([^=]*?)\)? {name}\(", text):
        shapes = re.findall(r"([a-z]+)(\d+)\[([\d,]*)\]", types)
        yield sum(
            int(bits) // 8 * math.prod(int(n) for n in dims.split(",") if n)
            for _, bits, dims in shapes
        )
