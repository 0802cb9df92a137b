"""The exchange between devices of several processes, natively and by JAX's own collectives."""

from __future__ import annotations

import re
import time
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import strategies
from exchanges import FIELDS, TARGETS, Answers
from implementations import Fabric, PerRank, Row, devices, over_devices, require
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from strategies import Shape

import jax_ep
from jax_ep import _info, _native, _processes
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
ONE_DEVICE = "stacked"
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


@multiprocess(2, 4, timeout=240)
def test_two_hosts_agree_with_the_oracle() -> None:
    _processes._host = lambda: [f"host {jax.process_index()}"]
    _compare_with_oracle(NATIVE, np.float32)
    _compare_with_oracle(NATIVE, ml_dtypes.bfloat16)


def _compare_with_oracle(row: Row, dtype: Any) -> None:
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    for shape, routings in CASES:
        for routing in routings:
            result = Answers.of(row, shape, routing(shape), dtype)
            for name in (*FIELDS, *TARGETS):
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
    assert _carrier() == "processes"


@multiprocess(2, 1)
def test_processes_of_several_hosts_exchange_in_rounds() -> None:
    require("native")
    _processes._host = lambda: [f"host {jax.process_index()}"]
    assert _carrier() == _carrier("native") == "rounds"
    assert _carrier(devices=jax.local_devices()) == ONE_DEVICE
    assert _carrier("xla") == "xla"


@multiprocess(2, 1)
def test_a_mesh_without_devices_exchanges_in_rounds() -> None:
    """Nobody knows whether its processes could meet; XLA knows them when the program runs."""
    require("native")
    assert _carrier("native", is_abstract=True) == "rounds"
    assert _carrier("native") == "processes"


@multiprocess(2, 1)
def test_what_one_process_cannot_do_all_know() -> None:
    """They must choose alike, or they would wait for each other in different places."""
    require("native")
    reach_all = _processes._reach_all
    if jax.process_index() == 1:
        _processes._reach_all = lambda *args: reach_all(*args) or "the needle"
    with pytest.warns(RuntimeWarning, match="the fabric 'rounds': the needle"):
        assert _carrier() == "rounds"
    assert _carrier() == _carrier("native") == "rounds"


@multiprocess(2, 1)
def test_a_process_without_shared_memory_is_told_to_all() -> None:
    """It says so before it could open what others show."""
    require("native")
    if jax.process_index() == 1:
        _processes._host = _no_boot_id
    with pytest.warns(RuntimeWarning, match="process 1 cannot share memory: no boot id"):
        assert _carrier() == "rounds"


@multiprocess(2, 1)
def test_a_process_that_compiles_late_is_waited_for_again() -> None:
    """A time-out is the end of one attempt, not of the job."""
    require("native")
    if jax.process_index() == 0:
        jax_ep.set_wait_timeout(0.5)
        with pytest.raises(TimeoutError, match="process 1 must compile the same program.* 0.5 s"):
            _carrier()
        assert _carrier(devices=jax.local_devices()) == ONE_DEVICE
        jax_ep.set_wait_timeout(60)
    else:
        time.sleep(1.5)
    assert _carrier() == "processes"


@multiprocess(2, 1)
def test_asking_waits_for_nobody() -> None:
    """One process asks what serves, and the other never takes part."""
    require("native")
    if jax.process_index() == 0:
        began = time.monotonic()
        assert "of several processes of one host" in _info.info()
        assert _native.library_info()["ffi_version"]
        assert time.monotonic() - began < 5


def _no_boot_id() -> list[str]:
    raise OSError("no boot id")


def _carrier(implementation: Any = None, devices: Any = None, *, is_abstract: bool = False) -> str:
    """Returns the fabric that carries a plan between one device of each process, or "xla".

    Or between the devices that are given.
    """
    mesh = jax.sharding.Mesh(np.array(devices or jax.devices()), ("expert",))

    def per_rank(topk_idx: jax.Array) -> jax.Array:
        plan = jax_ep.make_plan(
            topk_idx, num_experts=2, axis_name="expert", implementation=implementation
        )
        return plan.recv_counts

    spec = jax.sharding.PartitionSpec("expert")
    over = mesh.abstract_mesh if is_abstract else mesh
    program = jax.jit(jax.shard_map(per_rank, mesh=over, in_specs=spec, out_specs=spec))
    topk_idx = jax.ShapeDtypeStruct((mesh.size, 1), np.int32, sharding=NamedSharding(mesh, spec))
    text = program.lower(topk_idx).as_text()
    fabric = re.search(r"jax_ep_plan_(\w+)", text)
    return fabric[1] if fabric else "xla"
