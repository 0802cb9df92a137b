"""Very many exchanges between processes that are never quite in step, every row checked."""

from __future__ import annotations

import dataclasses
import functools
import time

import jax
import numpy as np
from implementations import EMULATED, require
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep.testing import decode_origin, encode_origin, multiprocess

CALLS = 900 if EMULATED else 20_000  # of make_plan, dispatch and combine together
TURNS = 50  # of each in one run of a program
NUM_SHAPES = 6


@dataclasses.dataclass(frozen=True)
class Shape:
    """What one program exchanges; sizes are drawn so that windows grow now and then."""

    num_tokens: int
    num_topk: int
    num_local_experts: int
    hidden: int

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Shape:
        low, high = (1, 1, 1, 2), (24, 4, 4, 300)
        return cls(*(int(rng.integers(a, b)) for a, b in zip(low, high, strict=True)))


@multiprocess(4, 2, timeout=280)
def test_every_row_of_many_exchanges() -> None:
    require("native")
    mesh = Mesh(np.array(jax.devices()), ("expert",))
    shared, own = np.random.default_rng(0), np.random.default_rng(1 + jax.process_index())
    programs = [(shape, compiled(mesh, shape)) for shape in map(Shape.draw, [shared] * NUM_SHAPES)]
    calls = 0
    while calls < CALLS:
        shape, program = programs[shared.integers(NUM_SHAPES)]
        topk_idx = routing(shared, shape, mesh.size)
        time.sleep(own.exponential(2e-3))
        results = program(place(mesh, payload(shape, mesh.size)), place(mesh, topk_idx))
        time.sleep(own.exponential(2e-3))
        check(shape, topk_idx, *map(local_ranks, results))
        calls += 3 * TURNS


def compiled(mesh: Mesh, shape: Shape):
    """Makes the program that takes turns with a batch of routings."""

    def per_rank(x: jax.Array, topk_idx: jax.Array) -> tuple[jax.Array, jax.Array]:
        def turn(_: None, topk_idx: jax.Array):
            plan = jax_ep.make_plan(
                topk_idx,
                num_experts=shape.num_local_experts * mesh.size,
                axis_name="expert",
                implementation="native",
            )
            rows = jax_ep.dispatch(x[0], plan)
            return None, (rows, jax_ep.combine(rows, plan))

        return jax.tree.map(lambda a: a[None], jax.lax.scan(turn, None, topk_idx[0])[1])

    return jax.jit(jax.shard_map(per_rank, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))


def routing(rng: np.random.Generator, shape: Shape, num_ranks: int) -> np.ndarray:
    """Draws choices for all ranks and turns: distinct experts, some of them dropped."""
    num_experts = shape.num_local_experts * num_ranks
    size = num_ranks, TURNS, shape.num_tokens
    order = np.argsort(rng.random((*size, num_experts), np.float32), axis=-1)
    topk_idx = order[..., : shape.num_topk].astype(np.int32)
    return np.where(rng.random(topk_idx.shape) < 0.1, jax_ep.DROPPED, topk_idx)


@functools.cache
def payload(shape: Shape, num_ranks: int) -> np.ndarray:
    return encode_origin(
        np.arange(num_ranks)[:, None],
        np.arange(shape.num_tokens),
        num_tokens=shape.num_tokens,
        hidden=shape.hidden,
        dtype=np.float32,
    )


def place(mesh: Mesh, a: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(a.shape, NamedSharding(mesh, P("expert")), lambda at: a[at])


def local_ranks(a: jax.Array) -> dict[int, np.ndarray]:
    """Returns what this process's ranks have."""
    return {shard.index[0].start: np.asarray(shard.data)[0] for shard in a.addressable_shards}


def check(
    shape: Shape,
    topk_idx: np.ndarray,
    rows: dict[int, np.ndarray],
    out: dict[int, np.ndarray],
) -> None:
    """Compares each row's origin with the one that belongs there, and each sum."""
    x = payload(shape, len(topk_idx))
    for rank in rows:
        counts = (topk_idx[rank] != jax_ep.DROPPED).sum(axis=-1)[..., None]
        np.testing.assert_array_equal(out[rank], counts.astype(np.float32) * x[rank])
        for turn in range(TURNS):
            experts = rank * shape.num_local_experts + np.arange(shape.num_local_experts)
            found = [np.nonzero(topk_idx[:, turn] == expert)[:2] for expert in experts]
            source, token = np.concatenate(found, axis=1)
            got = decode_origin(rows[rank][turn], num_tokens=shape.num_tokens)
            for a, b in zip(got, (source, token), strict=True):
                np.testing.assert_array_equal(a[: len(b)], b)
                assert (a[len(b) :] == -1).all()
