"""A random case: a shape, routings, dtypes, and what JAX does around the exchange."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax
import ml_dtypes
import numpy as np
import oracle
import strategies
from implementations import ONE, SHARD_MAP, VMAP, Row
from strategies import Shape

import jax_ep.testing

ROWS = tuple(
    Row(name, fabric, exact=name == "native")
    for name in ("native", "xla")
    for fabric in (SHARD_MAP, VMAP, ONE)
)
PLACES = (
    "plain",
    "plain",
    "inside",
    "outside",
    "made_inside_used_outside",
    "made_outside_used_inside",
    "groups",
)
WRAPS = ("nothing", "jit", "checkpoint", "scan", "cond")
ROW_DTYPES = (np.float32, np.float32, ml_dtypes.bfloat16, np.float16, np.float64)
TOKEN_DTYPES = (
    *ROW_DTYPES,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
    np.int8,
    np.uint16,
    np.int32,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled program and what it is run on; the same for the same seed."""

    seed: int
    row: Row
    shape: Shape
    place: str
    count: int
    """Exchanges in a batch."""
    wrap: str
    dtype: np.dtype
    token_dtype: np.dtype

    @classmethod
    def draw(cls, seed: int) -> Case:
        rng = np.random.default_rng(seed)

        def one_of(choices):
            return choices[rng.integers(len(choices))]

        row, place = one_of(ROWS), one_of(PLACES)
        if place == "groups" and row.fabric is not SHARD_MAP:
            place = "plain"
        num_ranks = 1 if row.fabric is ONE else int(rng.integers(1, 9))
        if place == "groups":
            num_ranks = one_of((1, 2, 3, 4))
        dtype = np.dtype(one_of(ROW_DTYPES))
        tokens = one_of(TOKEN_DTYPES) if rng.random() < 0.3 else dtype
        if dtype == np.float64 or tokens == np.float64:
            tokens = dtype = np.dtype(np.float64)
        return cls(
            seed=seed,
            row=row,
            shape=_on_nodes(_draw_shape(rng, num_ranks), seed),
            place=place,
            count=1 if place == "plain" else 2 if place == "groups" else one_of((2, num_ranks)),
            wrap=one_of(WRAPS),
            dtype=dtype,
            token_dtype=np.dtype(tokens),
        )

    @property
    def kinds(self) -> Iterator[str]:
        yield f"row {self.row}"
        yield f"place {self.place}"
        yield f"wrap {self.wrap}"
        yield f"dtype {self.dtype.name}, tokens {self.token_dtype.name}"

    def routings(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields names and [R, count, T, K]."""
        rng = np.random.default_rng([self.seed, 1])
        names = list(ROUTINGS)
        for name in (names[i] for i in rng.permutation(len(names))[:4]):
            several = [ROUTINGS[name](rng, self.shape) for _ in range(self.count)]
            yield name, np.stack(several, axis=1)


def _draw_shape(rng: np.random.Generator, num_ranks: int) -> Shape:
    local = int(rng.integers(1, 5))
    alignment = int(rng.choice([1, 1, 2, 4, 7]))
    shape = Shape(
        num_ranks=num_ranks,
        num_tokens=0 if rng.random() < 0.1 else int(rng.integers(1, 12)),
        num_topk=int(rng.integers(1, 6)),
        num_experts=num_ranks * local,
        hidden=int(rng.choice([1, 2, 3, 7, 16, 33])),
        alignment=alignment,
        tail=str(rng.choice(["zero", "uninitialized"])),
    )
    reserve = local * (alignment - 1)
    full = num_ranks * shape.num_tokens * shape.num_topk
    busiest = _most_arriving(shape)
    capacity = {
        "none": None,
        "exact": reserve + busiest,
        "one_too_few": reserve + busiest - 1,
        "small": reserve + int(rng.integers(0, max(1, full // 2))),
        "all": reserve + full,
    }[str(rng.choice(["none", "exact", "one_too_few", "small", "all"]))]
    if capacity is not None:
        capacity = max(1, reserve, capacity)
    return dataclasses.replace(shape, capacity=capacity)


def _on_nodes(shape: Shape, seed: int) -> Shape:
    divisors = [n for n in range(1, shape.num_ranks + 1) if shape.num_ranks % n == 0]
    per_node = np.random.default_rng([seed, 2]).choice(divisors)
    return dataclasses.replace(shape, ranks_per_node=int(per_node))


def _most_arriving(shape: Shape) -> int:
    """Counts the rows of the busiest rank under ``strategies.duplicates``."""
    return int(
        oracle.plan(strategies.duplicates(shape), shape.num_experts).recv_counts.sum(1).max()
    )


Routing = Callable[[np.random.Generator, Shape], np.ndarray]


def _of_testing(helper: Callable[..., jax.Array], **options) -> Routing:
    def draw(rng: np.random.Generator, shape: Shape) -> np.ndarray:
        if shape.num_topk > shape.num_experts or shape.num_tokens == 0:
            return strategies.duplicates(shape)
        sizes = ("num_ranks", "num_tokens", "num_experts", "num_topk")
        return np.asarray(helper(rng, **{s: getattr(shape, s) for s in sizes}, **options))

    return draw


def _from_a_pool(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """Draws from a few experts, some of which are none: skewed and empty ranks are common."""
    pool = rng.integers(-3, shape.num_experts + 3, int(rng.integers(1, 5)), np.int32)
    return rng.choice(pool, shape.topk_shape)


def _fixed(routing: strategies.Routing) -> Routing:
    return lambda _, shape: routing(shape)


ROUTINGS: dict[str, Routing] = {
    "uniform": _of_testing(jax_ep.testing.uniform_routing),
    "zipf": _of_testing(jax_ep.testing.zipf_routing, exponent=1.5),
    "with_holes": _of_testing(jax_ep.testing.routing_with_holes),
    "duplicates": _fixed(strategies.duplicates),
    "nothing_kept": _fixed(strategies.nothing_kept),
    "out_of_range": _fixed(strategies.out_of_range),
    "own_experts_only": _fixed(strategies.own_experts_only),
    "a_rank_sends_nothing": lambda rng, shape: _silence_last(_from_a_pool(rng, shape)),
    "pool": _from_a_pool,
    "another_pool": _from_a_pool,
}


def _silence_last(topk_idx: np.ndarray) -> np.ndarray:
    topk_idx[-1] = oracle.NOWHERE
    return topk_idx
