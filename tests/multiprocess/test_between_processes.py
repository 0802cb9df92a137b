"""Native exchanges between processes, through everything that one process is put through.

Neighboring ranks are in different processes, so each group of ranks spans them.
"""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
import test_beside_collectives
import test_meshes
import test_replicated_operands
import test_transforms
import test_vmap
from implementations import EMULATED, SHARD_MAP, Row, require
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from layers import SHAPE, Problem, close, inside, outside
from meshes import AUTO, EXPLICIT, flat_answers, flat_args, layer_on

from jax_ep.testing import multiprocess

R = SHAPE.num_ranks


@multiprocess(2, 4, timeout=300)
def test_meshes_of_every_kind() -> None:
    """Groups along other axes, tuples of axes, axes left to the compiler, and several meshes."""
    _prepare()
    test_meshes.test_data_and_expert("native", AUTO, "data_major")
    test_meshes.test_data_and_expert("native", EXPLICIT, "expert_major")
    test_meshes.test_plan_fields_by_group("native")
    test_meshes.test_a_group_never_sees_another("native")
    test_replicated_operands.test_tokens_replicated_over_another_axis("native", AUTO)
    test_replicated_operands.test_hidden_sharded_over_another_axis("native")
    test_replicated_operands.test_tokens_replicated_over_the_expert_axis("native")
    test_replicated_operands.test_routing_replicated_over_the_expert_axis("native")
    for names in (("a", "b"), ("b", "a")):
        test_meshes.test_tuple_of_axes("native", names, AUTO)
    test_meshes.test_rank_is_the_place_on_the_axis_and_no_device_id("native")
    test_meshes.test_an_axis_of_one_rank("native")
    test_meshes.test_two_meshes_take_turns("native")
    test_meshes.test_other_axes_left_to_the_compiler("native")
    test_meshes.test_mesh_from_the_context("native")


@multiprocess(2, 2, timeout=300)
def test_transformations() -> None:
    _prepare()
    row = Row("native", SHARD_MAP, exact=True)
    for differentiate in (outside, inside):
        test_transforms.test_grad(row, differentiate)
        test_transforms.test_checkpoint(row, differentiate)
    test_transforms.test_compiled_ahead_of_time(row)
    test_transforms.test_scan_over_layers(row, remat=True)
    test_transforms.test_one_plan_for_every_step_of_a_scan(row)
    test_vmap.test_vmap_of_a_plain_axis_inside(row, inside)
    test_transforms.test_one_jitted_layer_called_twice(row)
    test_transforms.test_independent_exchanges_in_one_program(row)
    test_transforms.test_many_programs_in_flight(row)
    test_transforms.test_cond_that_all_ranks_agree_on(row)
    test_transforms.test_unused_results_vanish(row)


@multiprocess(2, 4, timeout=200)
def test_beside_the_collectives_of_xla() -> None:
    """Both wait for other processes, and neither takes the threads that the other needs."""
    _prepare()
    test_beside_collectives.repeat(runs=5)


@pytest.mark.skipif(
    EMULATED is not None,
    reason="calls of emulated GPUs, which have no order, are numbered by what a process compiles",
)
@multiprocess(3, 2, timeout=200)
def test_meshes_of_some_of_the_processes() -> None:
    """Each process has a mesh of its own, and shares others with some; ranks lie anyhow."""
    _prepare()
    here = jax.process_index()
    problem = Problem.of(40)
    mine = [[jax.local_devices(p)[i] for p, i in places] for places in PLACES]
    programs = [
        jax.jit(
            jax.shard_map(
                layer_on("native"),
                mesh=(mesh := Mesh(np.array(some), ("expert",))),
                in_specs=P("expert"),
                out_specs=P("expert"),
            ),
            out_shardings=NamedSharding(mesh, P()),
        )
        for some in mine
        if here in {device.process_index for device in some}
    ]
    for program, _ in itertools.product(programs, range(3)):
        close(program(*flat_args(problem)), flat_answers(problem)[0])


# (process, device) of each of the four ranks.
PLACES = [
    [(0, 0), (0, 1), (1, 0), (1, 1)],
    [(2, 1), (0, 0), (2, 0), (0, 1)],
    [(1, 0), (2, 1), (1, 1), (0, 1)],
    [(0, 1), (1, 1), (2, 0), (2, 1)],
]


def _prepare() -> None:
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    require("native")
