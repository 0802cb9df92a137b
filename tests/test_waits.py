"""What a process shows of a wait that expires when nobody gets to see the call's error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import DEFAULT_WAIT, require
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep.testing._cluster import free_port

WAIT, JAX_WAITS = 2, 3
LIMIT = 100
# What ends a process besides waiting, on a machine that does other things too.
SLACK = 6
SAID = re.compile(r"^jax_ep \w+: ranks? .* gave up, because .*$", re.MULTILINE)
pytestmark = [pytest.mark.long, pytest.mark.usefixtures("native")]


@pytest.fixture
def native() -> None:
    require("native")


def start(case: str, *args: object, flags: str = "") -> subprocess.Popen:
    """Runs a case below in a process of its own."""
    return subprocess.Popen(
        [sys.executable, __file__, case, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "XLA_FLAGS": flags,
        },
    )


def ends_in_time(child: subprocess.Popen, limit: float) -> str:
    """Returns what the child put on stderr until it ended, of which one line is ours.

    The time counts from when it has made its call.
    """
    assert child.stdout is not None
    assert "called\n" in iter(child.stdout.readline, ""), child.communicate(timeout=LIMIT)[1]
    begin = time.monotonic()
    errors = child.communicate(timeout=LIMIT)[1]
    took = time.monotonic() - begin
    assert took <= limit + SLACK, errors
    assert len(SAID.findall(errors)) == 1, errors
    return errors


@pytest.mark.parametrize(("case", "code"), [("ends", 0), ("exits", 3)])
def test_an_interpreter_that_ends_during_a_wait(case: str, code: int) -> None:
    """It waits for what was called, no longer than the call, and crashes in nothing."""
    child = start(case)
    errors = ends_in_time(child, WAIT)
    assert child.returncode == code, errors
    assert f"rank 0 waited {WAIT}.0 s for rank 1 to come" in errors


def test_an_interpreter_that_ends_while_another_process_does_not_come() -> None:
    """JAX has it wait for the other process as well, by a bound of its own, and then aborts it."""
    port = free_port()
    children = [start("one_of_two", port, process) for process in (0, 1)]
    try:
        errors = ends_in_time(children[0], WAIT + JAX_WAITS)
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert f"ranks 2, 3 of process 1 had not published after {WAIT}.0 s" in errors


def test_the_message_comes_before_xla_ends_the_process() -> None:
    """Rank 1 is in a collective that rank 0, whose call has failed, does not come to."""
    child = start(
        "before_a_collective",
        flags=f"--xla_cpu_collective_call_warn_stuck_timeout_seconds={2 * WAIT} "
        f"--xla_cpu_collective_call_terminate_timeout_seconds={WAIT}",
    )
    errors = ends_in_time(child, 3 * WAIT)
    assert child.returncode < 0, errors
    said = SAID.search(errors)
    assert said is not None
    assert said.start() < errors.index("Termination timeout"), errors


def call(mesh: Mesh, *, then_collect: bool = False) -> jax.Array:
    """Begins a dispatch, after a plan of all ranks, that rank 1 does not come to."""

    def per_rank(x: jax.Array, misses: jax.Array) -> jax.Array:
        topk_idx = jnp.zeros((x.shape[0], 1), jnp.int32)
        plan = jax_ep.make_plan(
            topk_idx, num_experts=4, axis_name="expert", implementation="native"
        )
        total = jax.lax.cond(misses[0], lambda: x[0, 0], lambda: jnp.sum(jax_ep.dispatch(x, plan)))
        return (jax.lax.psum(total, "expert") if then_collect else total)[None]

    ranks = NamedSharding(mesh, P("expert"))
    program = jax.jit(
        jax.shard_map(
            per_rank, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
        )
    )
    x, nobody, one = (
        jax.make_array_from_callback(a.shape, ranks, lambda at, a=a: a[at])
        for a in (np.ones((8, 4), np.float32), np.arange(mesh.size) < 0, np.arange(mesh.size) == 1)
    )
    jax.block_until_ready(program(x, nobody))
    assert jax_ep.set_wait_timeout(WAIT) == DEFAULT_WAIT
    if jax.process_index() == 1:
        time.sleep(LIMIT)
    result = program(x, one)
    print("called", flush=True)
    return result


def one_of_two(port: str, process: str) -> None:
    # Needs no other process, and starts nothing that JAX must be the first to start.
    jax_ep.set_wait_timeout(DEFAULT_WAIT)
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        num_processes=2,
        process_id=int(process),
        shutdown_timeout_seconds=JAX_WAITS,
    )


if __name__ == "__main__":
    case, *args = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 2)
    if case == "one_of_two":
        one_of_two(*args)
    pending = call(
        jax.make_mesh((jax.device_count(),), ("expert",)),
        then_collect=case == "before_a_collective",
    )
    if case == "exits":
        sys.exit(3)
    if case == "before_a_collective":
        jax.block_until_ready(pending)
