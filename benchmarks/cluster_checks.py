"""Compares the rows that the model of clusters reckons with, with those of real plans."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import timing
from cluster_rows import (
    OF_TOKENS,
    Geometry,
    Rounds,
    chances_of_fullest,
    count_rows,
    expect_rows,
    fullest_pair,
    rows_of_tokens,
)
from programs import AXIS

import jax_ep
import jax_ep.testing
from jax_ep._axes import place
from jax_ep._call import Call, Operands
from jax_ep._ops import GATHER_ROWS
from jax_ep._wire import Wire

STANDARD_ERRORS = 5
"""How far the mean over tokens of random choices may be from what chance says."""

_SPARE = 4.0
"""Capacity over the mean load: enough for all, in less memory than what is always enough."""

RAREST = 1e-4
"""How unlikely the fullest pair may be, to either side."""


class Compared(NamedTuple):
    """A number of the model, what it is held against, and how far apart they may be."""

    what: str
    model: float
    counted: float
    least: float
    most: float

    @property
    def is_met(self) -> bool:
        return self.least <= self.counted <= self.most


def print_check(geometries: Sequence[Geometry]) -> None:
    """Prints the model's rows beside those of real plans; ends the program if they are too far.

    Raises:
      SystemExit: some are.
    """
    compared = [(g.num_ranks, each) for g in geometries for each in compare(g)]
    table = [
        [
            num_ranks,
            each.what,
            *(f"{x:.3f}" for x in (each.model, each.counted, each.least, each.most)),
            "yes" if each.is_met else "NO",
        ]
        for num_ranks, each in compared
    ]
    title = (
        "rows a rank, by the model and by real plans: equal where choices are given, else within "
        f"{STANDARD_ERRORS} standard errors, and the fullest pair no rarer than {RAREST}"
    )
    header = ("ranks", "what", "model", "counted", "at least", "at most", "met")
    timing.print_table(title, header, table)
    if failed := sum(not each.is_met for _, each in compared):
        raise SystemExit(f"{failed} of {len(compared)} are too far apart.")


def compare(geometry: Geometry, *, seed: int = 0) -> Iterator[Compared]:
    """Compares for one draw of experts, all as likely: by choices exactly, by chance nearly.

    And by choices that make pairs so full that they need several rounds.
    """
    g = geometry
    topk_idx = jax_ep.testing.zipf_routing(
        np.random.default_rng(seed),
        num_ranks=g.num_ranks,
        num_tokens=g.num_tokens,
        num_experts=g.num_experts,
        num_topk=g.num_topk,
        exponent=0.0,
    )
    yield from _compare_counts(g, topk_idx, "of these choices")
    yield from _compare_counts(g, _to_the_next(g, topk_idx), "of full pairs")
    yield from _compare_chances(g, topk_idx)


def _to_the_next(geometry: Geometry, topk_idx: np.ndarray) -> np.ndarray:
    """Has most tokens go to the next rank only: all ranks still receive as many choices."""
    local = geometry.num_local_experts
    following = np.roll(np.arange(geometry.num_ranks), -1)[:, None, None]
    is_spared = np.arange(geometry.num_tokens)[:, None] % 8 == 0
    return np.where(is_spared, topk_idx, topk_idx % local + following * local)


def _compare_counts(g: Geometry, topk_idx: np.ndarray, of_which: str) -> Iterator[Compared]:
    counted, received = count_rows(g, topk_idx), count_received(g, topk_idx)
    for name, model in counted.numbers().items():
        yield Compared(f"{name}, {of_which}", model, received[name], model, model)
    real = received["node_wire_bytes"]
    yield Compared(f"load_metrics, {of_which}", counted.nodes, real, counted.nodes, counted.nodes)


def _compare_chances(g: Geometry, topk_idx: np.ndarray) -> Iterator[Compared]:
    by_chance = expect_rows(g)
    for name, of_token in zip(OF_TOKENS, rows_of_tokens(g, topk_idx), strict=True):
        model, num_tokens = getattr(by_chance, name), g.num_tokens
        slack = STANDARD_ERRORS * of_token.std() / math.sqrt(of_token.size) * num_tokens
        slack += 1e-9 * num_tokens  # where all tokens have as many
        counted_rows = of_token.mean() * num_tokens
        yield Compared(f"{name}, by chance", model, counted_rows, model - slack, model + slack)
    for peer, what in ((1, "fullest pair"), (g.ranks_per_peer, "fullest pair with nodes")):
        chances = np.cumsum(chances_of_fullest(g, peer))
        least, median, most = np.searchsorted(chances, [RAREST, 0.5, 1 - RAREST])
        yield Compared(f"{what}, by chance", median, fullest_pair(g, topk_idx, peer), least, most)


def count_received(geometry: Geometry, topk_idx: np.ndarray) -> dict[str, float]:
    """Counts rows by what a real plan has each rank receive, and rounds by who sends what.

    Returns:
      What ``Rows.numbers`` has, and ``node_wire_bytes`` of rows of one byte: the mean over ranks.
    """
    g = geometry
    sizes = (g.num_tokens, g.num_topk, g.num_experts, g.num_ranks)
    capacity = jax_ep.suggest_capacity(*sizes, factor=_SPARE)

    def per_rank(choices: jax.Array) -> Any:
        plan = jax_ep.make_plan(
            choices,
            num_experts=g.num_experts,
            axis_name=AXIS,
            capacity=capacity,
            ranks_per_node=g.ranks_per_node,
        )
        metrics = jax_ep.load_metrics(plan, hidden=1, dtype=jnp.int8)
        rounds = {
            f"{name}.{part}": number
            for name, peer in (("rounds", 1), ("node_rounds", g.ranks_per_peer))
            for part, number in _rounds_of(plan, peer).items()
        }
        means = {"node_wire_bytes": metrics["node_wire_bytes"]} | rounds
        return plan._arrays.recv_choice, plan.recv_counts, means

    lists, counts, means = jax.jit(jax.vmap(per_rank, axis_name=AXIS))(topk_idx)
    of_tokens = _count_tokens(g, np.asarray(lists), np.sum(counts, 1))
    return of_tokens | {name: np.asarray(each, float).mean() for name, each in means.items()}


def _count_tokens(
    geometry: Geometry, lists: np.ndarray, num_received: np.ndarray
) -> dict[str, float]:
    """Counts ``OF_TOKENS`` in ranks' lists of the choices that they receive."""
    g = geometry
    of_pairs = np.zeros((g.num_ranks, g.num_ranks), int)  # [to, from]
    comes = np.zeros((g.num_nodes, g.num_ranks * g.num_tokens), bool)
    for rank, (choices, number) in enumerate(zip(lists, num_received, strict=True)):
        tokens = np.unique(choices[:number] // g.num_topk)
        of_pairs[rank] = np.bincount(tokens // g.num_tokens, minlength=g.num_ranks)
        comes[rank // g.ranks_per_node, tokens] = True
    from_nodes = comes.reshape(g.num_nodes, g.num_nodes, -1).sum(-1)
    node, at = np.divmod(np.arange(g.num_ranks), g.ranks_per_node)
    is_near = node[:, None] == node
    totals = {
        "near": of_pairs[is_near].sum() - of_pairs.trace(),
        "far": of_pairs[~is_near].sum(),
        "nodes": from_nodes.sum() - from_nodes.trace(),
        "spread": of_pairs[at[:, None] != at].sum(),
    }
    return {name: float(total) / g.num_ranks for name, total in totals.items()}


def _rounds_of(plan: jax_ep.Plan, ranks_per_peer: int) -> dict[str, jax.Array]:
    """Asks what carries rounds how many it would take, and how many slots they have for a pair."""
    call = Call(GATHER_ROWS, plan._layout, "mesh", "dispatch", None)
    whole = Wire.of(call, Operands(place(plan._layout), plan._arrays, ()), ranks_per_peer)

    def taken(wire: Wire) -> list[jax.Array]:
        others = wire.after_the_first()
        further = jnp.maximum(others.num_rounds, 0)
        return [1 + further, wire.room + further * others.room]

    at_once, one_by_one = taken(whole), taken(whole.halved())
    is_once = whole.num_rounds == 1
    combine = [jnp.where(is_once, *both) for both in zip(at_once, one_by_one, strict=True)]
    return dict(zip(Rounds._fields, (*at_once, *combine), strict=True))
