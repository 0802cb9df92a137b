"""``grouped_matmul`` against a loop over groups in NumPy, in every transformation it meets."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_ep import grouped_matmul
from jax_ep._ragged_dot import ragged_matmul, ragged_outer
from jax_ep._row_blocks import matmul_blocks, outer_blocks

HIDDEN, FFN_HIDDEN = 5, 3

# capacity and group sizes that break things: blocks are 32 to 128 rows long.
CASES = {
    "typical": (300, [70, 0, 3, 64, 100]),
    "capacity_exact": (237, [70, 0, 3, 64, 100]),
    "ends_inside_the_last_block": (130, [63, 66]),
    "shorter_than_a_block": (7, [2, 0, 3]),
    "one_row": (1, [0, 1]),
    "nothing_used": (90, [0, 0, 0]),
    "all_to_one": (200, [0, 200, 0, 0]),
    "long_groups": (700, [300, 129, 0, 200]),
    "no_rows": (0, [0, 0]),
    "no_groups": (4, []),
}


def arrays(capacity, sizes, dtype=np.float32, seed=0, tail=np.nan):
    """Random operands whose unused rows hold ``tail``."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((capacity, HIDDEN))
    rows[sum(sizes) :] = tail
    cotangent = rng.standard_normal((capacity, FFN_HIDDEN))
    cotangent[sum(sizes) :] = tail
    weights = rng.standard_normal((len(sizes), HIDDEN, FFN_HIDDEN))
    group_sizes = jnp.array(sizes, jnp.int32).reshape(len(sizes))
    return *(jnp.asarray(a, dtype) for a in (rows, weights, cotangent)), group_sizes


def expected(rows, weights, cotangent, group_sizes):
    """The result and both gradients, in float64."""
    rows, weights, cotangent = (np.asarray(a, np.float64) for a in (rows, weights, cotangent))
    out, drows, dweights = np.zeros_like(cotangent), np.zeros_like(rows), np.zeros_like(weights)
    end = 0
    for group, size in enumerate(np.asarray(group_sizes)):
        mine = slice(end, end := end + size)
        out[mine] = rows[mine] @ weights[group]
        drows[mine] = cotangent[mine] @ weights[group].T
        dweights[group] = rows[mine].T @ cotangent[mine]
    return out, drows, dweights


def actual(rows, weights, cotangent, group_sizes):
    out, pull = jax.vjp(lambda r, w: grouped_matmul(r, w, group_sizes), rows, weights)
    return out, *pull(cotangent)


def assert_all_close(got, want, tolerance=1e-5):
    for got_one, want_one in zip(got, want, strict=True):
        np.testing.assert_allclose(
            np.asarray(got_one, np.float64), want_one, rtol=tolerance, atol=tolerance * 10
        )


@pytest.mark.parametrize(("capacity", "sizes"), CASES.values(), ids=CASES)
def test_result_and_gradients(capacity, sizes):
    operands = arrays(capacity, sizes)
    assert_all_close(jax.jit(actual)(*operands), expected(*operands))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("bfloat16", 1e-2), ("float16", 2e-3), ("float64", 1e-13)]
)
def test_other_dtypes(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        operands = arrays(*CASES["typical"], dtype=jnp.dtype(dtype))
        got = jax.jit(actual)(*operands)
        assert [array.dtype.name for array in got] == [dtype] * 3
        assert_all_close(got, expected(*operands), tolerance)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_in_float32(dtype):
    """A sum of 512 ones in bfloat16 would stick at 256, and one in float16 at 2048."""
    depth = 4096 if dtype == "float16" else 512
    ones = partial(jnp.ones, dtype=jnp.dtype(dtype))
    sizes = jnp.array([depth], jnp.int32)
    out, drows, dweights = actual(
        ones((depth, depth)), ones((1, depth, 2)), ones((depth, 2)), sizes
    )
    assert np.all(np.asarray(out) == depth)
    assert np.all(np.asarray(drows) == 2)
    assert np.all(np.asarray(dweights) == depth)


@pytest.mark.parametrize("shared", ["none", "weights", "rows", "group_sizes"])
def test_vmap_folds_the_stack(shared):
    """Ranks of different loads: one rank's blocks must not write over the next rank's rows."""
    stacks = [arrays(150, sizes, seed=i) for i, sizes in enumerate(([150, 0], [3, 0], [66, 65]))]
    rows, weights, cotangent, sizes = (jnp.stack(a) for a in zip(*stacks, strict=True))
    if shared == "rows":
        rows = rows.at[0].set(jnp.nan_to_num(rows[0]))
    axes = [None if name == shared else 0 for name in ("rows", "weights", "", "group_sizes")]
    operands = [rows, weights, cotangent, sizes]
    operands = [a[0] if axis is None else a for a, axis in zip(operands, axes, strict=True)]
    got = jax.jit(jax.vmap(actual, in_axes=axes))(*operands)
    for i in range(3):
        own = [a if axis is None else a[i] for a, axis in zip(operands, axes, strict=True)]
        assert_all_close([a[i] for a in got], expected(*own))


@pytest.mark.parametrize("weights_axis", ["outer", "inner"])
def test_nested_vmap_with_weights_on_one_axis(weights_axis):
    sizes = jnp.array([[[40, 1], [7, 0], [0, 0]], [[79, 1], [0, 80], [64, 9]]], jnp.int32)
    rng = np.random.default_rng(0)
    rows, cotangent = (
        jnp.asarray(rng.standard_normal((2, 3, 80, width)), jnp.float32)
        for width in (HIDDEN, FFN_HIDDEN)
    )
    stack = 2 if weights_axis == "outer" else 3
    weights = jnp.asarray(rng.standard_normal((stack, 2, HIDDEN, FFN_HIDDEN)), jnp.float32)
    shared, own = (0, None, 0, 0), (0, 0, 0, 0)
    axes = (own, shared) if weights_axis == "outer" else (shared, own)
    got = jax.vmap(jax.vmap(actual, in_axes=axes[1]), in_axes=axes[0])(
        rows, weights, cotangent, sizes
    )
    for i, j in np.ndindex(2, 3):
        matrices = weights[i if weights_axis == "outer" else j]
        want = expected(rows[i, j], matrices, cotangent[i, j], sizes[i, j])
        assert_all_close([a[i, j] for a in got], want)


@pytest.mark.parametrize("shared_weights", [False, True])
def test_blocks_and_ragged_dot_agree(shared_weights):
    """What platforms other than CPU run, here by XLA's own expansion of it."""
    stacks = [arrays(150, sizes, seed=i) for i, sizes in enumerate(([150, 0], [3, 0], [66, 65]))]
    for stack in (stacks, stacks[:1]):
        rows, weights, cotangent, sizes = (jnp.stack(a) for a in zip(*stack, strict=True))
        weights = weights[:1] if shared_weights else weights
        for transpose, left in ((False, rows), (True, cotangent)):
            want = matmul_blocks(left, weights, sizes, transpose=transpose)
            got = jax.jit(partial(ragged_matmul, transpose=transpose))(left, weights, sizes)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        got = jax.jit(ragged_outer)(rows, cotangent, sizes)
        np.testing.assert_allclose(got, outer_blocks(rows, cotangent, sizes), rtol=1e-5, atol=1e-5)


def test_ragged_dot_is_not_trusted_with_unused_rows(monkeypatch):
    """What it does with rows of no group is not documented, and differs between platforms."""
    honest = jax.lax.ragged_dot

    def careless(rows, weights, group_sizes, **options):
        used = jnp.arange(len(rows)) < jnp.sum(group_sizes)
        poison = jnp.where(jnp.all(jnp.isfinite(rows)), 0.0, jnp.nan)
        products = honest(jnp.nan_to_num(rows), weights, group_sizes, **options) + poison
        return jnp.where(used[:, None], products, jnp.nan)

    monkeypatch.setattr(jax.lax, "ragged_dot", careless)
    operands = arrays(*CASES["typical"])
    rows, weights, _, sizes = operands
    got = ragged_matmul(rows[None], weights[None], sizes[None], transpose=False)[0]
    assert_all_close([got], expected(*operands)[:1])


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_inside_shard_map(explicit):
    """Weights replicated over ``data``: their gradient must be summed over it."""
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(kind,) * 2)
    shards = [arrays(80, sizes, seed=i) for i, sizes in enumerate([[i, 70 + i] for i in range(8)])]
    rows, weights, cotangent, sizes = (
        jnp.stack(a).reshape(2, 4, *a[0].shape) for a in zip(*shards, strict=True)
    )
    weights = weights[0]
    both = P("data", "expert")

    def per_shard(rows, weights, cotangent, sizes):
        got = actual(rows[0, 0], weights[0], cotangent[0, 0], sizes[0, 0])
        return got[0][None, None], got[1][None, None], got[2][None]

    specs = (both, P("expert"), both, both)
    outs = (both, both, P("expert"))
    with jax.set_mesh(mesh):
        put = [
            jax.device_put(a, jax.NamedSharding(mesh, spec))
            for a, spec in zip((rows, weights, cotangent, sizes), specs, strict=True)
        ]
        out, drows, dweights = jax.jit(jax.shard_map(per_shard, in_specs=specs, out_specs=outs))(
            *put
        )
    out, drows = np.asarray(out), np.asarray(drows)
    total = np.zeros_like(weights, np.float64)
    for i, j in np.ndindex(2, 4):
        want = expected(rows[i, j], weights[j], cotangent[i, j], sizes[i, j])
        assert_all_close([out[i, j], drows[i, j]], want[:2])
        total[j] += want[2]
    assert_all_close([dweights], [total])


def test_under_remat_and_scan():
    rows, weights, cotangent, sizes = arrays(150, [66, 0, 65], tail=0.0)

    def loss(rows, weights, wrap):
        layer = wrap(lambda r, w: grouped_matmul(r, w, sizes))
        layers = jnp.stack([weights, 2 * weights])
        return jnp.sum(jax.lax.map(lambda w: jnp.vdot(layer(rows, w), cotangent), layers))

    _, drows, dweights = expected(rows, weights, cotangent, sizes)
    for wrap in (lambda f: f, jax.checkpoint):
        got = jax.jit(jax.grad(partial(loss, wrap=wrap), argnums=(0, 1)))(rows, weights)
        assert_all_close(got, (3 * drows, 3 * dweights))


def test_sizes_that_overrun_do_not_reach_the_next_rank():
    rows = jnp.ones((2, 10, 1))
    weights = jnp.array([[[[2.0]]], [[[3.0]]]])
    out = jax.vmap(grouped_matmul)(rows, weights, jnp.array([[15], [4]], jnp.int32))
    assert np.asarray(out)[1, :, 0].tolist() == [3.0] * 4 + [0.0] * 6


def test_cost_follows_used_rows():
    """The compiled loop runs over groups and blocks that hold rows: no dot of the whole buffer."""
    rows, weights, _, sizes = arrays(4096, [1, 1])
    text = jax.jit(grouped_matmul).lower(rows, weights, sizes).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert not any("4096x" in line for line in products)


ROWS, WEIGHTS, SIZES = jnp.ones((4, 2)), jnp.ones((3, 2, 5)), jnp.ones(3, jnp.int32)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (([1.0], WEIGHTS, SIZES), TypeError, "rows must be an array"),
        ((ROWS[0], WEIGHTS, SIZES), ValueError, r"rows must have shape \[capacity, hidden\]"),
        ((ROWS.astype(jnp.int32), WEIGHTS, SIZES), TypeError, "rows must have one of the dtypes"),
        ((ROWS, WEIGHTS[0], SIZES), ValueError, "weights must have shape"),
        ((ROWS, WEIGHTS.astype(jnp.bfloat16), SIZES), TypeError, "weights must have dtype float32"),
        ((ROWS, WEIGHTS[:, :1], SIZES), ValueError, "weights must have the hidden = 2"),
        ((ROWS, WEIGHTS, SIZES[:2]), ValueError, r"group_sizes must have .* = \[3\]; got \[2\]"),
        ((ROWS, WEIGHTS, SIZES.astype(jnp.uint32)), TypeError, "group_sizes must have dtype int32"),
    ],
)
def test_errors(args, error, message):
    with pytest.raises(error, match=message):
        grouped_matmul(*args)
