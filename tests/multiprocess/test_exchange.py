"""The exchange between devices of several processes, where JAX's own collectives carry it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import strategies
from exchanges import FIELDS, Answers
from implementations import Fabric, PerRank, Row, over_devices, require
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from strategies import Shape

import jax_ep
from jax_ep.testing import multiprocess

CASES = [
    (
        Shape(num_ranks=8, num_tokens=9, num_topk=3, num_experts=16, hidden=33, capacity=24),
        (strategies.distinct, strategies.duplicates, strategies.out_of_range),
    ),
    (
        Shape(num_ranks=8, num_experts=24, alignment=4, tail="uninitialized"),
        (strategies.everything_to_one_expert, strategies.a_rank_receives_nothing),
    ),
]


def _over_processes(f: PerRank, num_ranks: int) -> PerRank:
    """Runs one rank on each device of all processes, and hands every process all results."""
    mesh = Mesh(np.array(jax.devices()), ("expert",))
    assert mesh.size == num_ranks
    return jax.jit(over_devices(f, num_ranks), out_shardings=NamedSharding(mesh, P()))


PROCESSES = Row(
    None,  # type: ignore[arg-type]  # the choice is left to the library
    Fabric("processes", _over_processes, 8),
    exact=False,
)


@multiprocess(2, 4, timeout=240)
def test_two_processes_agree_with_the_oracle() -> None:
    _compare_with_oracle()


@multiprocess(4, 2, timeout=240)
def test_four_processes_agree_with_the_oracle() -> None:
    _compare_with_oracle()


def _compare_with_oracle() -> None:
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    for shape, routings in CASES:
        for routing in routings:
            result = Answers.of(PROCESSES, shape, routing(shape))
            for name in FIELDS:
                result.same(name)
            for name in ("sent", "drows", "plain_drows"):
                result.same_rows(name)
            inputs = result.inputs
            result.same_sum("out", inputs.rows, inputs.weights)
            result.same_sum("plain", inputs.rows)
            result.same_sum("dx", inputs.drows)
            np.testing.assert_allclose(
                result.got["dweights"], result.want["dweights"], rtol=1e-4, atol=1e-5
            )


def test_the_choice_falls_on_xla_and_native_says_why_not() -> None:
    require("native")
    _check_choice()


@multiprocess(2, 1)
def _check_choice() -> None:
    def make_plan(topk_idx: jax.Array, implementation: Any) -> jax_ep.Plan:
        return jax_ep.make_plan(
            topk_idx, num_experts=2, axis_name="expert", implementation=implementation
        )

    def chosen(topk_idx: jax.Array) -> jax.Array:
        assert make_plan(topk_idx[0], None).implementation == "xla"
        with pytest.raises(NotImplementedError, match=r"implementation='native'.*2 processes"):
            make_plan(topk_idx[0], "native")
        return topk_idx

    jax.eval_shape(over_devices(chosen, 2), np.zeros((2, 1, 1, 1), np.int32))
