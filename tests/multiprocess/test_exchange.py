"""The exchange between devices of several processes, natively and by JAX's own collectives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import strategies
from exchanges import FIELDS, Answers
from implementations import Fabric, PerRank, Row, devices, over_devices, require
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from strategies import Shape

import jax_ep
from jax_ep import _native, _processes
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
    sharded = over_devices(f, num_ranks)
    assert len(jax.devices()) == num_ranks
    whole = NamedSharding(Mesh(np.array(devices()), ("expert",)), P())
    return jax.jit(sharded, out_shardings=whole)


PROCESSES = Fabric("processes", _over_processes, 8)
NATIVE = Row("native", PROCESSES, exact=True)
XLA = Row("xla", PROCESSES, exact=False)


@multiprocess(2, 4, timeout=240)
def test_two_processes_agree_with_the_oracle() -> None:
    _compare_with_oracle(NATIVE, np.float32)
    _compare_with_oracle(NATIVE, ml_dtypes.bfloat16)


@multiprocess(8, 1, timeout=240)
def test_eight_processes_agree_with_the_oracle() -> None:
    _compare_with_oracle(NATIVE, np.float32)


@multiprocess(2, 4, timeout=240)
def test_two_processes_agree_with_the_oracle_by_collectives() -> None:
    _compare_with_oracle(XLA, np.float32)


def _compare_with_oracle(row: Row, dtype: Any) -> None:
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    for shape, routings in CASES:
        for routing in routings:
            result = Answers.of(row, shape, routing(shape), dtype)
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


@multiprocess(2, 1)
def test_the_choice_falls_on_native() -> None:
    require("native")
    assert _chosen() == "native"


@multiprocess(2, 1)
def test_processes_of_several_hosts_use_xla_and_native_says_why_not() -> None:
    require_library()
    _processes._host = lambda: [f"host {jax.process_index()}"]
    assert _chosen() == "xla"
    with pytest.raises(NotImplementedError, match=r"implementation='native'.* are on 2\b"):
        _chosen("native")
    alone = jax_ep.make_plan(jnp.zeros((2, 1), jnp.int32), num_experts=2)
    assert alone.implementation == "native"


@multiprocess(2, 1)
def test_what_one_process_cannot_do_all_know() -> None:
    """They must choose alike, or they would wait for each other in different places."""
    require_library()
    open_all = _processes._open_all
    if jax.process_index() == 1:
        _processes._open_all = lambda *args: open_all(*args) or "the needle"
    assert _chosen() == "xla"
    with pytest.raises(NotImplementedError, match="the needle"):
        _chosen("native")


@multiprocess(2, 1)
def test_a_process_that_traces_alone_is_told_so() -> None:
    require_library()
    if jax.process_index() == 0:
        jax_ep.set_wait_timeout(0.5)
        with pytest.raises(TimeoutError, match="process 1 must trace the same program.* 0.5 s"):
            _chosen()


def require_library() -> None:
    """Like ``require``, which would already bring the processes together."""
    if (problem := _native._library_problem("cpu")) is not None:
        pytest.fail(problem)


def _chosen(implementation: Any = None) -> str:
    chosen = []

    def per_rank(topk_idx: jax.Array) -> jax.Array:
        plan = jax_ep.make_plan(
            topk_idx[0], num_experts=2, axis_name="expert", implementation=implementation
        )
        chosen.append(plan.implementation)
        return topk_idx

    jax.eval_shape(over_devices(per_rank, 2), np.zeros((2, 1, 1, 1), np.int32))
    return chosen[0]
