"""Who carries an exchange is decided by the members of its groups, not by the whole job."""

from __future__ import annotations

import jax
import numpy as np
from implementations import require
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from layers import SHAPE, Problem, close, whole
from meshes import flat_answers, flat_args, layer_on, put

from jax_ep import _processes
from jax_ep.testing import multiprocess

SPEC = P(("data", "expert"))
R = SHAPE.num_ranks


@multiprocess(2, R, timeout=200)
def test_groups_inside_processes_meet_there() -> None:
    """No process waits for another, wherever that is."""
    require("native")
    _processes._host = lambda: [f"host {jax.process_index()}"]
    _processes._join = None
    _check([[(p, i) for i in range(R)] for p in range(2)], "devices")


@multiprocess(4, R // 2, timeout=200)
def test_groups_of_different_hosts() -> None:
    require("native")
    host = jax.process_index() // 2
    _processes._host = lambda: [f"host {host}"]
    reached, reach_all = [], _processes._reach_all
    _processes._reach_all = lambda places, *args: reached.extend(places) or reach_all(places, *args)
    sides = [[(p, i) for p in (first, first + 1) for i in range(R // 2)] for first in (0, 2)]
    _check(sides, "processes")
    assert reached == [2 * host, 2 * host + 1]
    across = [[(p, i) for p in pair for i in range(R // 2)] for pair in ((0, 2), (1, 3))]
    _check(across, "rounds", "native")
    _check(across, "rounds")
    _check(across, None, "xla")
    # Both in one program, each by who its members are.
    _check(sides, "processes")


@multiprocess(3, R, timeout=200)
def test_some_groups_inside_and_some_between() -> None:
    require("native")
    inside = [(0, i) for i in range(R)]
    between = [(p, i) for i in range(R // 2) for p in (1, 2)]
    others = [(p, R // 2 + i) for p in (2, 1) for i in range(R // 2)]
    _check([between, inside, others], "processes")


def _check(
    groups: list[list[tuple[int, int]]], fabric: str | None, implementation: str | None = None
) -> None:
    """Runs the layer with ranks on these (process, device), and looks at who carries it."""
    devices = [[jax.local_devices(p)[i] for p, i in group] for group in groups]
    mesh = Mesh(np.array(devices), ("data", "expert"))
    problems = [Problem.of(seed) for seed in range(len(groups))]
    args = [np.concatenate(each) for each in zip(*map(flat_args, problems), strict=True)]
    want = np.concatenate([flat_answers(problem)[0] for problem in problems])
    layer = jax.shard_map(layer_on(implementation), mesh=mesh, in_specs=SPEC, out_specs=SPEC)
    program = jax.jit(layer)
    operands = [put(a, mesh, SPEC) for a in args]
    text = program.lower(*operands).as_text()
    assert ("jax_ep_plan" in text) == (fabric is not None)
    assert fabric is None or f"jax_ep_plan_{fabric}" in text
    for _ in range(3):
        close(whole(program(*operands)), want)
