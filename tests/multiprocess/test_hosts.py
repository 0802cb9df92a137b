"""Processes that take each other for other hosts: rounds over XLA's collectives, by gloo."""

from __future__ import annotations

import os
import time

import jax
import test_meshes
import test_replicated_operands
import test_transforms
from implementations import SHARD_MAP, Row, require
from meshes import AUTO, EXPLICIT
from test_faults import Layer, first_error

from jax_ep import _processes
from jax_ep.testing import kill, multiprocess


def _part_hosts() -> None:
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    require("native")
    _processes._host = lambda: [f"host {jax.process_index()}"]


@multiprocess(2, 4, timeout=300)
def test_meshes_of_every_kind() -> None:
    _part_hosts()
    test_meshes.test_data_and_expert("native", AUTO, "data_major")
    test_meshes.test_data_and_expert("native", EXPLICIT, "expert_major")
    test_meshes.test_plan_fields_by_group("native")
    test_meshes.test_a_group_never_sees_another("native")
    test_replicated_operands.test_tokens_replicated_over_another_axis("native", AUTO)
    test_meshes.test_tuple_of_axes("native", ("b", "a"), AUTO)
    test_meshes.test_two_meshes_take_turns("native")
    test_meshes.test_other_axes_left_to_the_compiler("native")
    test_meshes.test_mesh_from_the_context("native")


@multiprocess(2, 2, timeout=300)
def test_transformations() -> None:
    _part_hosts()
    row = Row("native", SHARD_MAP, exact=True)
    test_transforms.test_grad(row, test_transforms.outside)
    test_transforms.test_checkpoint(row, test_transforms.inside)
    test_transforms.test_scan_over_layers(row, remat=True)
    test_transforms.test_one_jitted_layer_called_twice(row)


@multiprocess(3, 2, timeout=100)
def test_a_process_that_ends() -> None:
    """Nothing of ours waits for another host: XLA's collectives end in their own time, if told."""
    limit = 4
    os.environ["XLA_FLAGS"] += f" --xla_cpu_collective_timeout_seconds={limit}"
    _part_hosts()
    layer = Layer(jax.devices())
    layer.run()
    kill(1)
    error, took = first_error(layer)
    assert took < limit + 20, took
    assert "Gloo" in error, error
    Layer(jax.local_devices()).run()


@multiprocess(2, 2, timeout=100)
def test_a_process_that_comes_late() -> None:
    """Later than our own time-out, of which XLA's collectives know nothing."""
    _part_hosts()
    layer = Layer(jax.devices())
    layer.run()
    if jax.process_index() == 1:
        time.sleep(3)
    layer.run(1)
