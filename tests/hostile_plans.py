"""Alterations of what a plan keeps to itself: out of range, contradictory, and extreme."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

import jax_ep

# What an error may name: the arrays that exchanges read.
FIELDS = (
    "send_rank",
    "send_row",
    "recv_choice",
    "recv_row",
    "recv_counts",
    "group_sizes",
    "group_rows",
    "fingerprint",
)
INT32 = np.iinfo(np.int32)


@dataclasses.dataclass(frozen=True)
class Alteration:
    """One array of each rank, [R, ...], and what becomes of it."""

    field: str
    name: str
    change: Callable[[jax_ep.Plan, np.ndarray], Any]

    def __str__(self) -> str:
        return f"{self.field}-{self.name}"


def filled(value: int) -> Callable[[jax_ep.Plan, np.ndarray], Any]:
    return lambda _, a: np.full_like(a, value)


def first(value: int) -> Callable[[jax_ep.Plan, np.ndarray], Any]:
    """Sets the first entry of each rank alone."""

    def change(_: jax_ep.Plan, a: np.ndarray) -> np.ndarray:
        a = a.copy()
        a.reshape(len(a), -1)[:, :1] = value
        return a

    return change


ALTERATIONS = [
    Alteration("send_rank", "one_past_the_ranks", lambda p, a: np.full_like(a, p.num_ranks)),
    Alteration("send_rank", "negative", filled(-1)),
    Alteration("send_rank", "below_dropped", filled(-2)),
    Alteration("send_rank", "least", filled(INT32.min)),
    Alteration("send_rank", "most", first(INT32.max)),
    Alteration("send_rank", "other_ranks", lambda p, a: (a + 1) % p.num_ranks),
    Alteration("send_row", "one_past_the_rows", lambda p, a: np.full_like(a, p.capacity)),
    Alteration("send_row", "below_dropped", filled(-2)),
    Alteration("send_row", "least", filled(INT32.min)),
    Alteration("send_row", "most", first(INT32.max)),
    Alteration("send_row", "all_one_row", filled(0)),
    Alteration(
        "recv_choice",
        "one_past_the_choices",
        lambda p, a: np.full_like(a, p.num_ranks * p.num_tokens * p.num_topk),
    ),
    Alteration("recv_choice", "negative", filled(-1)),
    Alteration("recv_choice", "least", filled(INT32.min)),
    Alteration("recv_choice", "most", first(INT32.max)),
    Alteration("recv_choice", "backwards", lambda _, a: a[:, ::-1]),
    Alteration("recv_row", "one_past_the_rows", lambda p, a: np.full_like(a, p.capacity)),
    Alteration("recv_row", "negative", filled(-1)),
    Alteration("recv_row", "least", filled(INT32.min)),
    Alteration("recv_row", "most", first(INT32.max)),
    Alteration("recv_row", "all_one_row", filled(0)),
    Alteration("recv_counts", "negative", first(-1)),
    Alteration("recv_counts", "least", filled(INT32.min)),
    Alteration("recv_counts", "most", filled(INT32.max)),
    Alteration("recv_counts", "more_than_the_rows", lambda p, a: np.full_like(a, p.capacity + 1)),
    # Their sum wraps to zero in 32 bits.
    Alteration("recv_counts", "sum_wraps", filled(2**30)),
    Alteration("recv_counts", "one_more", lambda _, a: a + 1),
    Alteration("recv_counts", "of_other_ranks", lambda _, a: np.roll(a, 1, axis=1)),
    Alteration("group_sizes", "negative", first(-1)),
    Alteration("group_sizes", "least", filled(INT32.min)),
    Alteration("group_sizes", "most", filled(INT32.max)),
    Alteration("group_sizes", "more_than_the_rows", lambda p, a: np.full_like(a, p.capacity + 1)),
    Alteration("group_rows", "negative", first(-1)),
    Alteration("group_rows", "most", filled(INT32.max)),
    Alteration("group_rows", "more_than_the_sizes", lambda _, a: a + 1),
    Alteration("fingerprint", "another", lambda _, a: a ^ np.uint32(1)),
]


def altered(plan: jax_ep.Plan, alteration: Alteration, ranks: slice) -> jax_ep.Plan:
    """Alters the plans of some ranks, given all of them as NumPy arrays [R, ...]."""
    sound = np.asarray(getattr(plan._arrays, alteration.field))
    array = sound.copy()
    array[ranks] = alteration.change(plan, sound)[ranks]
    return dataclasses.replace(plan, _arrays=plan._arrays._replace(**{alteration.field: array}))
