"""Native exchanges beside XLA's own collectives that nothing orders among them."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from implementations import SHARD_MAP, Row, require
from layers import whole

import jax_ep

R, T, K, E, H = 8, 32, 2, 16, 64
PAIRS, RUNS, TURNS = 12, 15, 200
LIMIT = 100


def test_exchanges_run_beside_collectives() -> None:
    """Such programs hung now and then, and after 40 seconds XLA ended the process.

    XLA runs what is ready on a device on one pool of threads, as many as there are devices.
    Its collectives wait there for the other devices; when the exchange did so too, ranks that had
    come to the one and ranks that had come to the other held all the threads, and what each of them
    waited for stood in the queue behind. Hence the child, the limit, and the small pool.
    """
    require("native")
    child = subprocess.run(
        [sys.executable, __file__],
        check=False,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={**os.environ, "NPROC": "1"},
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout == f"{RUNS} equal gradients\n"


def late(x: jax.Array, turns: jax.Array) -> jax.Array:
    """Returns ``x`` after some work."""
    m = jnp.zeros((64, 64)) + jax.lax.stop_gradient(x[0, 0])
    m = jax.lax.fori_loop(0, turns, lambda _, m: 1e-3 * jnp.tanh(m @ m), m)
    return x + 0 * m[0, 0]


def per_rank(x: jax.Array, topk_idx: jax.Array, weights: jax.Array) -> jax.Array:
    """Half of the ranks come late to the collectives, the others to the exchanges."""
    odd = jax.lax.axis_index("expert") % 2
    make_plan = Row("native", SHARD_MAP, exact=True).make_plan
    plan = make_plan(topk_idx, num_experts=E)
    common, own = late(x, 1 + TURNS * odd), late(x, 1 + TURNS * (1 - odd))
    total = jnp.zeros_like(x)
    for i in range(PAIRS):
        common = jnp.sin(jax.lax.psum(common, "expert") / R)
        rows = jnp.tanh(jax_ep.dispatch((i + 1) * own, plan))
        total += jax_ep.combine(rows, plan, weights)
    return total + common


def dense(x: np.ndarray, weights: np.ndarray) -> jax.Array:
    """Computes all ranks' results [R, T, H] without an exchange."""
    common, total = jnp.asarray(x), jnp.zeros_like(x)
    for i in range(PAIRS):
        common = jnp.broadcast_to(jnp.sin(jnp.mean(common, axis=0)), x.shape)
        total += jnp.sum(weights, axis=2, keepdims=True) * jnp.tanh((i + 1) * x)
    return total + common


def repeat(runs: int) -> None:
    rng = np.random.default_rng(0)
    x, dout = (0.1 * rng.normal(size=(R, T, H)).astype(np.float32) for _ in range(2))
    topk_idx = rng.integers(0, E, (R, T, K), np.int32)
    weights = rng.normal(size=(R, T, K)).astype(np.float32)
    exchanged = SHARD_MAP.over_ranks(per_rank, R)
    grad = jax.jit(jax.grad(lambda x, w: jnp.vdot(exchanged(x, topk_idx, w), dout), (0, 1)))
    want = jax.jit(jax.grad(lambda x, w: jnp.vdot(dense(x, w), dout), (0, 1)))(x, weights)
    for _ in range(runs):
        got = grad(x, weights)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(whole(a), b, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    repeat(RUNS)
    print(f"{RUNS} equal gradients")
