"""Derivatives of ``grouped_matmul`` of every kind and order against the dense formula's."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_ep import grouped_matmul

CAPACITY, HIDDEN, FFN_HIDDEN = 9, 3, 2
SIZES = jnp.array([3, 0, 4], jnp.int32)
USED = 7


def dense(rows, weights, sizes):
    """Picks each row's matrix; what no group holds is zero before it is multiplied."""
    ends = jnp.cumsum(sizes)
    index = jnp.arange(len(rows))
    used = (index < ends[-1])[:, None]
    group = jnp.sum(index[:, None] >= ends, axis=1) % len(sizes)
    matrices = weights[group].astype(jnp.float32)
    products = jnp.einsum("ch,chf->cf", jnp.where(used, rows, 0).astype(jnp.float32), matrices)
    return jnp.where(used, products, 0).astype(rows.dtype)


def operands(seed=0, dtype=jnp.float32, tail=np.nan, stack=()):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((*stack, CAPACITY, HIDDEN))
    rows[..., USED:, :] = tail
    weights = rng.standard_normal((*stack, len(SIZES), HIDDEN, FFN_HIDDEN))
    return jnp.asarray(rows, dtype), jnp.asarray(weights, dtype)


def smooth(matmul, rows, weights, sizes=SIZES):
    """Twice through the experts, so that derivatives of all orders differ from zero."""
    hidden = jnp.tanh(matmul(rows, weights, sizes))
    return jnp.sum(jnp.sin(matmul(hidden, weights.swapaxes(1, 2), sizes)).astype(jnp.float32))


def jvp(matmul, primals, tangents):
    return jax.jvp(partial(smooth, matmul), primals, tangents)


def gradient_of_gradient(matmul, primals, tangents):
    def slope(rows, weights):
        drows, dweights = jax.grad(partial(smooth, matmul), argnums=(0, 1))(rows, weights)
        used = jnp.arange(CAPACITY)[:, None] < USED
        along = jnp.vdot(drows, jnp.where(used, tangents[0], 0))
        return (along + jnp.vdot(dweights, tangents[1])).astype(jnp.float32)

    return jax.grad(slope, argnums=(0, 1))(*primals)


def forward_over_reverse(matmul, primals, tangents):
    return jax.jvp(jax.grad(partial(smooth, matmul), argnums=(0, 1)), primals, tangents)


def third_order(matmul, primals, tangents):
    def curvature(rows, weights):
        return forward_over_reverse(matmul, (rows, weights), tangents)[1]

    return jax.jvp(curvature, primals, tangents)


KINDS = [jvp, gradient_of_gradient, forward_over_reverse, third_order]


def assert_trees_close(got, want, dtype=jnp.float32):
    tolerance = 5e-2 if dtype == jnp.bfloat16 else 2e-5
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for got_one, want_one in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert got_one.dtype == want_one.dtype
        a, b = np.asarray(got_one, np.float32), np.asarray(want_one, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, np.abs(b).max()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_with_nan_past_the_groups(kind, dtype):
    primals, tangents = operands(0, dtype), operands(1, dtype)
    got = jax.jit(partial(kind, grouped_matmul))(primals, tangents)
    clean = operands(0, jnp.float32, tail=0), operands(1, jnp.float32, tail=0)
    if dtype == jnp.bfloat16:
        clean = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), clean)
    want = jax.tree.map(lambda x, like: x.astype(like.dtype), kind(dense, *clean), got)
    assert_trees_close(got, want, dtype)


@pytest.mark.parametrize("make", [jax.jacfwd, jax.jacrev, jax.hessian])
def test_whole_jacobians_and_hessians(make):
    """Each maps the products over basis vectors, of rows and of weights."""
    primals = operands()
    got = jax.jit(make(partial(smooth, grouped_matmul), argnums=(0, 1)))(*primals)
    assert_trees_close(got, make(partial(smooth, dense), argnums=(0, 1))(*primals))


@pytest.mark.parametrize("shared", ["none", "rows", "weights", "sizes"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_derivatives(kind, shared):
    stack = 3
    sizes = jnp.array([[3, 0, 4], [7, 0, 0], [1, 2, 3]], jnp.int32)
    primals, tangents = operands(0, stack=(stack,), tail=0), operands(1, stack=(stack,), tail=0)
    axes = [None if name == shared else 0 for name in ("rows", "weights", "sizes")]
    pick = [lambda x, i, a=axis: x if a is None else x[i] for axis in axes]
    args = [x[0] if a is None else x for x, a in zip((*primals, sizes), axes, strict=True)]

    def one(matmul, rows, weights, sizes, tangents):
        return kind(lambda r, w, _: matmul(r, w, sizes), (rows, weights), tangents)

    got = jax.jit(jax.vmap(partial(one, grouped_matmul), in_axes=(*axes, 0)))(*args, tangents)
    for i in range(stack):
        mine = [f(x, i) for f, x in zip(pick, args, strict=True)]
        want = one(dense, *mine, jax.tree.map(lambda x, i=i: x[i], tangents))
        assert_trees_close(jax.tree.map(lambda x, i=i: x[i], got), want)


@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_of_a_batch_that_shares_its_weights(order):
    """The weights' derivative sums over the batch."""
    rows = jnp.stack([operands(seed, tail=0)[0] for seed in range(3)])
    sizes = jnp.array([[3, 0, 4], [7, 0, 0], [1, 2, 3]], jnp.int32)
    primals, tangents = (rows, operands(0)[1]), (rows[::-1], operands(1)[1])

    def run(matmul):
        over_batch = jax.vmap(matmul, in_axes=(0, None, 0))
        total = partial(smooth, lambda r, w, _: over_batch(r, w, sizes))
        return jax.jvp(jax.grad(total, argnums=(0, 1)) if order == 2 else total, primals, tangents)

    assert_trees_close(jax.jit(run, static_argnums=0)(grouped_matmul), run(dense))


def test_second_derivatives_inside_shard_map():
    """Weights replicated over ``data``, whose derivatives sum over it."""
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    primals, tangents = (
        (operands(seed, stack=(2, 4), tail=0)[0], operands(seed, stack=(4,))[1]) for seed in (0, 1)
    )
    both, one = P("data", "expert"), P("expert")

    def per_shard(rows, weights):
        return jax.lax.psum(smooth(grouped_matmul, rows[0, 0], weights[0]), ("data", "expert"))

    def reference(rows, weights):
        each = jax.vmap(partial(smooth, dense))
        return jnp.sum(jax.vmap(each, in_axes=(0, None))(rows, weights))

    def run(f):
        return jax.jvp(jax.grad(f, argnums=(0, 1)), primals, tangents)

    sharded = jax.shard_map(per_shard, mesh=mesh, in_specs=(both, one), out_specs=P())
    assert_trees_close(jax.jit(run, static_argnums=0)(sharded), run(reference))


def test_it_is_linear_in_rows_and_in_weights():
    rows, weights = operands(tail=0)
    out = jnp.ones((CAPACITY, FFN_HIDDEN))
    for argument in (0, 1):

        def linear(x, matmul, argument=argument):
            return matmul(*((x, weights) if argument == 0 else (rows, x)), SIZES)

        x = (rows, weights)[argument]
        got = jax.linear_transpose(partial(linear, matmul=grouped_matmul), x)(out)
        assert_trees_close(got, jax.linear_transpose(partial(linear, matmul=dense), x)(out))


@pytest.mark.long
def test_without_compilation():
    primals, tangents = operands(), operands(1)
    with jax.disable_jit():
        got = forward_over_reverse(grouped_matmul, primals, tangents)
    clean = operands(tail=0), operands(1, tail=0)
    assert_trees_close(got, forward_over_reverse(dense, *clean))


# A NaN that a caller handles op by op is found by JAX before it comes to the product.
@pytest.mark.parametrize(
    ("compiled", "tail"), [(False, 0), (True, 0), (True, np.nan)], ids=["eager", "zeros", "nan"]
)
def test_debug_nans_finds_none_past_the_groups(compiled, tail):
    primals, tangents = operands(tail=tail), operands(1, tail=tail)
    run = partial(forward_over_reverse, grouped_matmul)
    with jax.debug_nans(True):
        got = (jax.jit(run) if compiled else run)(primals, tangents)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


def test_debug_nans_finds_one_within_the_groups():
    rows, weights = operands(tail=0)
    rows = rows.at[0, 0].set(jnp.inf)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="grouped_product"):
        grouped_matmul(rows, weights.at[:, 0].set(0), SIZES)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_each_platform_gets_its_own_products(platform):
    run = jax.jit(partial(forward_over_reverse, grouped_matmul))
    text = run.trace(operands(), operands()).lower(lowering_platforms=(platform,)).as_text()
    assert ("ragged_dot" in text) == (platform != "cpu")
    assert ("stablehlo.while" in text) == (platform == "cpu")
