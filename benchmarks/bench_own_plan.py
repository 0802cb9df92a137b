"""Times one rank's own part of a plan between hosts: from its own choices, and from all of them.

Collectives are left out: each brings a rank what it has itself, so that plans mean nothing here.
Their bits are a matter of `tests/test_owned_plan.py`. Where rows run out there is more to do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import timing
from absl import app, flags

from jax_ep import _fabrics, _local, _owned_plan
from jax_ep._axes import Place
from jax_ep._call import Call, Operands
from jax_ep._layout import Layout
from jax_ep._local import Local
from jax_ep._ops import PLAN

_NUM_RANKS = (64, 128, 256, 512, 1024)
_NUM_TOKENS, _NUM_TOPK = 4096, 8
_MOST_MS = 2.0

_repeats = flags.DEFINE_integer("repeats", 11, "Rounds of the interleaved run.", lower_bound=1)
_quick = flags.DEFINE_bool("quick", False, "Few ranks and tokens: does it all still run?")


def layout_of(num_ranks: int, num_tokens: int, share: float) -> Layout:
    """Returns a layout in which ranks have room for a share of the mean."""
    return Layout(
        num_ranks=num_ranks,
        num_experts=max(256, 4 * num_ranks),
        num_tokens=num_tokens,
        num_topk=_NUM_TOPK,
        capacity=int(share * num_tokens * _NUM_TOPK),
        alignment=1,
        tail="uninitialized",
        axis_name="expert",
        implementation="native",
        strict=True,
    )


def compile_own_part(layout: Layout, *, from_all: bool) -> Callable[[], Any]:
    """Compiles what a rank does, and binds choices."""
    call = Call(PLAN, layout, "mesh", "make_plan", "cpu")
    fabric = next(f for f in _fabrics.fabrics_for("cpu") if f.name == "rounds")
    rng = np.random.default_rng(0)
    scores = rng.random((layout.num_tokens, layout.num_experts), np.float32)
    own = np.argpartition(scores, _NUM_TOPK, axis=1)[:, :_NUM_TOPK].astype(np.int32)
    choices = np.broadcast_to(own, (layout.num_ranks, *own.shape)) if from_all else own

    def per_rank(rank: jax.Array, choices: jax.Array) -> list[jax.Array]:
        where = Place(rank, jnp.zeros_like(rank))
        return Local(fabric, call, where).plan(call, Operands(where, None, (choices,)))

    operands = jax.device_put((np.int32(0), choices))
    with (
        mock.patch.object(_owned_plan, "FROM_CHOICES", layout.num_choices + from_all),
        mock.patch.object(_local, "gather_choices", lambda _, choices: choices),
        mock.patch.object(_owned_plan, "swap_slices", lambda _, x: x),
        mock.patch.object(_owned_plan, "all_gather", _repeated),
    ):
        program = jax.jit(per_rank).lower(*operands).compile()
    return lambda: program(*operands)


def _repeated(call: Call, x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(x, (call.layout.num_ranks, *x.shape))


def main(argv: Sequence[str]) -> None:
    del argv
    jax.config.update("jax_platforms", "cpu")
    timing.print_json(timing.environment())
    sizes, num_tokens = (_NUM_RANKS[:2], 64) if _quick.value else (_NUM_RANKS, _NUM_TOKENS)
    repeats = min(_repeats.value, 3) if _quick.value else _repeats.value
    table, records = [], []
    for num_ranks in sizes:
        enough, little = (layout_of(num_ranks, num_tokens, share) for share in (1.25, 0.9))
        calls = {
            "own choices": compile_own_part(enough, from_all=False),
            "own choices, and rows run out": compile_own_part(little, from_all=False),
            "all choices": compile_own_part(enough, from_all=True),
        }
        for name, spent in timing.compare(calls, repeats=repeats).items():
            is_met = spent.median * 1e3 <= _MOST_MS
            met = "-" if name == "all choices" else "yes" if is_met else "NO"
            table.append([num_ranks, name, spent, met])
            sizes_of = dataclasses.asdict(enough)
            record = {name: sizes_of[name] for name in ("num_ranks", "num_tokens", "num_topk")}
            records.append({"bench": "own plan", "from": name, **record, **spent.as_json()})
    title = f"one rank's own part of a plan: T={num_tokens} K={_NUM_TOPK}"
    timing.print_table(title, ("ranks", "from", "ms (p10-p90)", f"<= {_MOST_MS:g} ms"), table)
    for record in records:
        timing.print_json(record)


if __name__ == "__main__":
    app.run(main)
