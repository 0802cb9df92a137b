"""Shapes and routings that break things, by name, and random ones from hypothesis."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import hypothesis.extra.numpy
import numpy as np
import oracle
from hypothesis import strategies as st


@dataclasses.dataclass(frozen=True)
class Shape:
    """Everything static about an exchange: one compiled program each."""

    num_ranks: int = 4
    num_tokens: int = 6
    num_topk: int = 3
    num_experts: int = 8
    hidden: int = 7
    capacity: int | None = None
    alignment: int = 1
    tail: str = "zero"
    ranks_per_node: int = 1

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def topk_shape(self) -> tuple[int, int, int]:
        return self.num_ranks, self.num_tokens, self.num_topk

    def plan(self, topk_idx: np.ndarray) -> oracle.Plan:
        return oracle.plan(
            topk_idx, self.num_experts, self.capacity, self.alignment, self.ranks_per_node
        )


Routing = Callable[[Shape], np.ndarray]
INT32 = np.iinfo(np.int32)


def distinct(shape: Shape) -> np.ndarray:
    """Gives every token different experts, with a few choices that go nowhere."""
    rng = np.random.default_rng(0)
    scores = rng.random((*shape.topk_shape[:2], shape.num_experts))
    topk_idx = np.argsort(scores, axis=-1)[..., : shape.num_topk].astype(np.int32)
    return np.where(rng.random(shape.topk_shape) < 0.1, oracle.NOWHERE, topk_idx).astype(np.int32)


def duplicates(shape: Shape) -> np.ndarray:
    """Draws experts with replacement, so that a token often asks one twice."""
    rng = np.random.default_rng(1)
    return rng.integers(0, shape.num_experts, shape.topk_shape, np.int32)


def everything_to_one_expert(shape: Shape) -> np.ndarray:
    return np.full(shape.topk_shape, shape.num_experts - 2, np.int32)


def nothing_kept(shape: Shape) -> np.ndarray:
    return np.full(shape.topk_shape, oracle.NOWHERE, np.int32)


def a_rank_receives_nothing(shape: Shape) -> np.ndarray:
    local = shape.num_local_experts
    topk_idx = duplicates(shape)
    return np.where(topk_idx // local == 1, topk_idx + local, topk_idx)


def a_rank_sends_nothing(shape: Shape) -> np.ndarray:
    topk_idx = distinct(shape)
    topk_idx[-1] = oracle.NOWHERE
    return topk_idx


def one_rank_sends_to_one_rank(shape: Shape) -> np.ndarray:
    topk_idx = nothing_kept(shape)
    topk_idx[1] = shape.num_experts - 1
    return topk_idx


def out_of_range(shape: Shape) -> np.ndarray:
    rng = np.random.default_rng(2)
    wild = [INT32.min, -2, oracle.NOWHERE, 0, shape.num_experts - 1, shape.num_experts, 2**16]
    return rng.choice(np.array([*wild, 2**16 + 1, INT32.max], np.int32), shape.topk_shape)


def own_experts_only(shape: Shape) -> np.ndarray:
    rank = np.arange(shape.num_ranks)[:, None, None]
    offset = np.arange(shape.num_topk) % shape.num_local_experts
    return np.broadcast_to(rank * shape.num_local_experts + offset, shape.topk_shape).astype(
        np.int32
    )


BASE = Shape()
TIGHT = Shape(capacity=20, alignment=2)
NODES = Shape(num_topk=5, num_experts=12, ranks_per_node=2)
ROUTINGS: tuple[Routing, ...] = (
    distinct,
    duplicates,
    everything_to_one_expert,
    nothing_kept,
    a_rank_receives_nothing,
    a_rank_sends_nothing,
    one_rank_sends_to_one_rank,
    out_of_range,
    own_experts_only,
)

# With everything for one expert, rank 3 is asked for R * T * K = 72 rows.
SHAPES: dict[str, tuple[Shape, tuple[Routing, ...]]] = {
    "base": (BASE, ROUTINGS),
    "capacity_exact": (Shape(capacity=72), (everything_to_one_expert, duplicates)),
    "capacity_one_too_few": (Shape(capacity=71), (everything_to_one_expert, distinct)),
    "capacity_one": (Shape(capacity=1), (distinct, nothing_kept)),
    "aligned": (Shape(alignment=4), ROUTINGS),
    "tight": (TIGHT, (distinct, duplicates, a_rank_receives_nothing)),
    "aligned_no_room": (Shape(alignment=4, capacity=6), (distinct,)),
    "uninitialized": (
        Shape(alignment=4, capacity=40, tail="uninitialized"),
        (distinct, duplicates, nothing_kept, a_rank_receives_nothing),
    ),
    "no_tokens": (Shape(num_tokens=0), (distinct,)),
    "one_of_everything": (
        Shape(num_ranks=1, num_tokens=1, num_topk=1, num_experts=1, hidden=1),
        (distinct, nothing_kept),
    ),
    "one_rank": (
        Shape(num_ranks=1, num_tokens=19, num_experts=5, capacity=48, alignment=2),
        (distinct, duplicates, out_of_range),
    ),
    "one_token": (Shape(num_ranks=2, num_tokens=1, num_topk=2, num_experts=2, hidden=1), ROUTINGS),
    "every_expert": (Shape(num_ranks=2, num_topk=6, num_experts=6), (distinct, duplicates)),
    "more_choices_than_local_experts": (
        Shape(num_topk=5, num_experts=4),
        (duplicates, out_of_range),
    ),
    "eight_ranks": (
        Shape(num_ranks=8, num_tokens=33, num_topk=4, num_experts=32, hidden=33, capacity=120),
        (distinct, duplicates),
    ),
    "two_nodes": (NODES, (distinct, duplicates, own_experts_only)),
    "one_node": (Shape(num_topk=4, ranks_per_node=4), (distinct,)),
    "four_nodes": (
        Shape(num_ranks=8, num_tokens=17, num_topk=7, num_experts=16, hidden=19, ranks_per_node=2),
        (distinct, duplicates, a_rank_receives_nothing),
    ),
    "sixteen_ranks": (
        Shape(num_ranks=16, num_tokens=5, num_topk=2, num_experts=32, hidden=64),
        (distinct, own_experts_only),
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A named shape with a named routing."""

    name: str
    shape: Shape
    routing: Routing

    @property
    def topk_idx(self) -> np.ndarray:
        return self.routing(self.shape)

    def __str__(self) -> str:
        return f"{self.name}-{self.routing.__name__}"


CASES = [
    Case(name, shape, routing) for name, (shape, routings) in SHAPES.items() for routing in routings
]


def topk_indices(shape: Shape) -> st.SearchStrategy[np.ndarray]:
    """Draws the indices from a small drawn pool, so that skewed and empty ranks are common."""
    pools = st.lists(st.integers(-3, shape.num_experts + 2), min_size=1, max_size=6)
    return pools.flatmap(
        lambda pool: hypothesis.extra.numpy.arrays(
            np.int32, shape.topk_shape, elements=st.sampled_from(pool)
        )
    )


def payload(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """Builds tokens [R, T, H] that name their origin.

    Even columns hold ``1 + rank * T + token``, odd ones their column; one-byte dtypes hold these
    numbers as bits, where as values they would not fit.
    """
    origin = 1 + np.arange(shape.num_ranks * shape.num_tokens).reshape(shape.topk_shape[:2])
    column = np.arange(shape.hidden)
    numbers = np.where(column % 2 == 0, origin[..., None], 1 + column % 64)
    if dtype.itemsize == 1:
        return numbers.astype(np.uint8).view(dtype)
    return numbers.astype(dtype)


def poisoned(shape: tuple[int, ...], named: np.ndarray, dtype: np.dtype, seed: int) -> np.ndarray:
    """Draws random rows where ``named`` and NaN everywhere else."""
    values = np.random.default_rng(seed).normal(size=shape)
    return np.where(named[..., None], values, np.nan).astype(dtype)
