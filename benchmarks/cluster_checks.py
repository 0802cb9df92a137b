"""Compares the rows that the model of clusters reckons with, with those of real plans."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
import timing
from cluster_rows import (
    Geometry,
    Rows,
    chances_of_fullest,
    count_rows,
    expect_rows,
    fullest_pair,
    rows_of_tokens,
)
from programs import AXIS

import jax_ep
import jax_ep.testing

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
    """Compares for one draw of experts, all as likely: by choices exactly, by chance nearly."""
    g = geometry
    topk_idx = jax_ep.testing.zipf_routing(
        np.random.default_rng(seed),
        num_ranks=g.num_ranks,
        num_tokens=g.num_tokens,
        num_experts=g.num_experts,
        num_topk=g.num_topk,
        exponent=0.0,
    )
    counted, received = count_rows(g, topk_idx), count_received(g, topk_idx)
    for name in (field.name for field in dataclasses.fields(Rows)):
        model, real = getattr(counted, name), getattr(received, name)
        yield Compared(f"{name}, of these choices", model, real, model, model)
    by_chance = expect_rows(g)
    for name, of_token in zip(("near", "far", "nodes"), rows_of_tokens(g, topk_idx), strict=True):
        model, num_tokens = getattr(by_chance, name), g.num_tokens
        slack = STANDARD_ERRORS * of_token.std() / math.sqrt(of_token.size) * num_tokens
        slack += 1e-9 * num_tokens  # where all tokens have as many
        counted_rows = of_token.mean() * num_tokens
        yield Compared(f"{name}, by chance", model, counted_rows, model - slack, model + slack)
    chances = np.cumsum(chances_of_fullest(g))
    least, median, most = np.searchsorted(chances, [RAREST, 0.5, 1 - RAREST])
    yield Compared("fullest pair, by chance", median, fullest_pair(g, topk_idx), least, most)


def count_received(geometry: Geometry, topk_idx: np.ndarray) -> Rows:
    """Counts rows by what a real plan has each rank receive."""
    g = geometry
    sizes = (g.num_tokens, g.num_topk, g.num_experts, g.num_ranks)
    capacity = jax_ep.suggest_capacity(*sizes, factor=_SPARE)

    def per_rank(choices: jax.Array) -> tuple[jax.Array, jax.Array]:
        plan = jax_ep.make_plan(
            choices, num_experts=g.num_experts, axis_name=AXIS, capacity=capacity
        )
        return plan._arrays.recv_choice, plan.recv_counts

    lists, counts = jax.jit(jax.vmap(per_rank, axis_name=AXIS))(topk_idx)
    tokens_of_pairs = np.zeros((g.num_ranks, g.num_ranks), int)  # [to, from]
    at_nodes = set()
    for rank, (choices, num_rows) in enumerate(
        zip(np.asarray(lists), np.sum(counts, 1), strict=True)
    ):
        tokens = np.unique(choices[:num_rows] // g.num_topk)
        tokens_of_pairs[rank] = np.bincount(tokens // g.num_tokens, minlength=g.num_ranks)
        at_nodes |= {(rank // g.ranks_per_node, int(token)) for token in tokens}
    node = np.arange(g.num_ranks) // g.ranks_per_node
    is_near, is_self = node[:, None] == node, np.eye(g.num_ranks, dtype=bool)
    away = sum(at != token // (g.num_tokens * g.ranks_per_node) for at, token in at_nodes)
    fullest = int(tokens_of_pairs.max())
    rounds = math.ceil(fullest / g.room)
    halves = math.ceil(fullest / math.ceil(g.room / 2))
    return Rows(
        near=tokens_of_pairs[is_near & ~is_self].sum() / g.num_ranks,
        far=tokens_of_pairs[~is_near].sum() / g.num_ranks,
        nodes=away / g.num_ranks,
        dispatch_rounds=rounds,
        dispatch_slots=rounds * g.room,
        combine_rounds=1 if rounds == 1 else halves,
        combine_slots=g.room if rounds == 1 else halves * math.ceil(g.room / 2),
    )
