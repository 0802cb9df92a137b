"""What users meet around an exchange: debugging, other platforms, export, empty and odd shapes."""

from __future__ import annotations

import gc
import importlib.util
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import attacks
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from attacks import SHAPE, Numbers, R, forward_and_back, make_plan, same
from elsewhere import run_elsewhere
from implementations import EMULATED, ONE, SHARD_MAP, VMAP, Row, require

import jax_ep
from jax_ep import _native

OPS = ("plan", "gather_rows", "reduce_rows", "row_dots")


def fill_the_heap_with_nan() -> None:
    """Leaves freed memory as a process that ran for long has it."""
    used = [jnp.full((1024, 64), jnp.nan) for _ in range(8)]
    jax.block_until_ready(used)
    del used
    gc.collect()


def moe(implementation: str) -> Callable[..., jax.Array]:
    def apply(x, topk_idx, weights, w):
        return jax_ep.moe(
            x,
            topk_idx,
            weights,
            w,
            w,
            w,
            num_experts=4,
            capacity=1024,
            implementation=implementation,
        )[0]

    return apply


def uninitialized(implementation: str) -> Callable[..., jax.Array]:
    def apply(x, topk_idx, weights, w):
        del w
        plan = jax_ep.make_plan(
            topk_idx,
            num_experts=4,
            capacity=1024,
            tail="uninitialized",
            implementation=implementation,
        )
        return jax_ep.combine(jax_ep.dispatch(x, plan), plan, weights)

    return apply


def with_gradients(f: Callable[..., jax.Array]) -> Callable[..., Any]:
    def run(x, topk_idx, weights, w):
        out, pull = jax.vjp(lambda x, weights, w: f(x, topk_idx, weights, w), x, weights, w)
        return out, pull(jnp.ones_like(out))

    return run


@pytest.mark.parametrize("make", [moe, uninitialized])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jitted"])
def test_debug_nans_raises_no_false_alarm(implementation: str, make, compiled: bool) -> None:
    """Rows that nobody reads held whatever the allocator had there."""
    x, w = jnp.ones((8, 64)), jnp.ones((4, 64, 64)) / 64
    topk_idx = jnp.tile(jnp.arange(2, dtype=jnp.int32), (8, 1))
    f = with_gradients(make(implementation))
    run = jax.jit(f) if compiled else f
    args = x, topk_idx, jnp.full((8, 2), 0.5), w
    for _ in range(3):
        fill_the_heap_with_nan()
        with jax.debug_nans(True):
            jax.block_until_ready(run(*args))


def test_debug_nans_finds_a_real_nan(implementation: str) -> None:
    x, w = jnp.full((8, 64), jnp.nan), jnp.ones((4, 64, 64)) / 64
    topk_idx = jnp.zeros((8, 2), jnp.int32)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        jax.block_until_ready(moe(implementation)(x, topk_idx, jnp.ones((8, 2)), w))


NO_TOKENS = attacks.Shape(num_tokens=0, num_topk=2, hidden=3, capacity=5)


def test_no_tokens(ranks_row: Row) -> None:
    """Only the experts' numbers are no empty array.

    XLA itself refuses a ``shard_map`` with several operands that are all empty, whatever it does.
    """
    numbers = Numbers.draw(np.random.default_rng(0), NO_TOKENS)

    def whole(topk_idx, *args):
        return forward_and_back(make_plan(ranks_row, topk_idx, NO_TOKENS), *args)

    same(ranks_row.jit(whole, R)(*numbers.args), numbers.expect(NO_TOKENS))


def test_no_tokens_for_a_plan_from_elsewhere(ranks_row: Row) -> None:
    """Each program exchanges alone, with nothing else in it that keeps XLA content."""
    numbers = Numbers.draw(np.random.default_rng(0), NO_TOKENS)
    make = ranks_row.jit(lambda idx: make_plan(ranks_row, idx, NO_TOKENS), R)
    use = ranks_row.jit(lambda plan, x: jax_ep.dispatch(x, plan), R)
    rows = use(make(numbers.topk_idx), numbers.x)
    np.testing.assert_array_equal(rows, np.zeros((R, 5, 3), np.float32))


def there_and_back(topk_idx: jax.Array, x: jax.Array, **options) -> jax.Array:
    plan = jax_ep.make_plan(topk_idx, num_experts=SHAPE.num_experts, **options)
    return jax_ep.combine(jnp.tanh(jax_ep.dispatch(x, plan)), plan)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("fabric", [SHARD_MAP, VMAP, ONE], ids=lambda fabric: fabric.name)
def test_lowered_for_another_platform(fabric, platform: str) -> None:
    """Its module held the CPU's foreign calls, unknown where it was to run."""
    numbers = Numbers.draw(np.random.default_rng(0))
    num_ranks = 1 if fabric is ONE else R

    def per_rank(topk_idx, x):
        return jax.grad(lambda x: jnp.sum(there_and_back(topk_idx, x, axis_name=fabric.axis_name)))(
            x
        )

    program = jax.jit(fabric.over_ranks(per_rank, num_ranks))
    args = numbers.topk_idx[:num_ranks], numbers.x[:num_ranks]
    with warnings.catch_warnings():
        # Where the library for GPUs was not built, it says so.
        warnings.simplefilter("ignore", RuntimeWarning)
        text = program.trace(*args).lower(lowering_platforms=(platform,)).as_text()
    library = "libjax_ep_cuda.so" if platform == "cuda" else "none"
    if EMULATED and platform == "cuda":
        assert "@jax_ep_" in text
    elif not (pathlib.Path(jax_ep.__file__).parent / library).exists():
        assert "@jax_ep_" not in text


LOAD = """
    import pathlib, sys
    import jax, jax.export
    import numpy as np
    import jax_ep

    jax_ep.register()
    jax_ep.register()
    folder = pathlib.Path(sys.argv[1])
    inputs = np.load(folder / "inputs.npz")
    program = jax.export.deserialize(bytearray((folder / "program").read_bytes()))
    some = jax.devices()[: program.nr_devices]
    mesh = jax.make_mesh((len(some),), ("rank",), devices=some)
    per_rank = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rank"))
    args = [jax.device_put(inputs[name], per_rank) for name in inputs.files]
    np.save(folder / "out.npy", jax.jit(program.call)(*args))
"""


@pytest.mark.parametrize("fabric", [SHARD_MAP, VMAP, ONE], ids=lambda fabric: fabric.name)
def test_exported_and_loaded_elsewhere(implementation: str, fabric, tmp_path) -> None:
    """The other process traces nothing of ours: ``register`` is all that it does."""
    if importlib.util.find_spec("flatbuffers") is None:
        pytest.skip("jax.export serializes with the package flatbuffers, which is not installed")
    row, num_ranks = Row(implementation, fabric, exact=True), 1 if fabric is ONE else R
    numbers = Numbers.draw(np.random.default_rng(0))
    args = numbers.topk_idx[:num_ranks], numbers.x[:num_ranks]
    program = row.jit(
        lambda idx, x: there_and_back(
            idx, x, axis_name=fabric.axis_name, implementation=implementation
        ),
        num_ranks,
    )
    names = [f"jax_ep_{op}_{kind}" for op in OPS for kind in ("stacked", "devices")]
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in names]
    exported = jax.export.export(program, disabled_checks=allowed)(*args)
    (tmp_path / "program").write_bytes(exported.serialize())
    np.savez(tmp_path / "inputs.npz", *args)
    run_elsewhere(LOAD, tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), program(*args))


def test_a_symbolic_number_of_tokens(implementation: str) -> None:
    [tokens] = jax.export.symbolic_shape("t")
    shapes = (
        jax.ShapeDtypeStruct((tokens, 2), jnp.int32),
        jax.ShapeDtypeStruct((tokens, 3), jnp.float32),
    )
    program = jax.jit(lambda idx, x: there_and_back(idx, x, implementation=implementation))
    with pytest.raises((TypeError, ValueError), match=r"topk_idx must .*\bt\b"):
        jax.export.export(program)(*shapes)


def test_a_symbolic_capacity(implementation: str) -> None:
    def apply(x):
        topk_idx = jnp.zeros((4, 2), jnp.int32)
        return there_and_back(
            topk_idx, jnp.ones((4, 1)), capacity=x.shape[0], implementation=implementation
        )

    [rows] = jax.export.symbolic_shape("c")
    with pytest.raises((TypeError, ValueError), match=r"capacity must .*\bc\b"):
        jax.export.export(jax.jit(apply))(jax.ShapeDtypeStruct((rows,), jnp.float32))


def dispatch_gradient(plan, x, weights):
    del weights
    rows, pull = jax.vjp(lambda x: jax_ep.dispatch(x, plan), x)
    return pull, rows


def rows_gradient(plan, x, weights):
    rows = jnp.zeros((plan.capacity, x.shape[1]), x.dtype) + x[0, 0]
    return jax.vjp(lambda r: jax_ep.combine(r, plan, weights), rows)[1], x


def weights_gradient(plan, x, weights):
    rows = jnp.zeros((plan.capacity, x.shape[1]), x.dtype) + x[0, 0]
    return jax.vjp(lambda w: jax_ep.combine(rows, plan, w), weights)[1], x


@pytest.mark.usefixtures("wait_timeout")
@pytest.mark.parametrize(
    ("gradient", "named"),
    [
        (dispatch_gradient, "dispatch (gradient)"),
        (rows_gradient, "combine (gradient)"),
        (weights_gradient, "combine (gradient)"),
    ],
)
def test_an_error_names_the_call_and_its_gradient(gradient, named: str) -> None:
    """One rank never comes: the message says what it was wanted for, in the user's words."""
    require("native")
    row = Row("native", SHARD_MAP, exact=True)
    numbers = Numbers.draw(np.random.default_rng(0))

    def per_rank(topk_idx, x, weights):
        pull, cotangent = gradient(make_plan(row, topk_idx), x, weights)
        nothing = jax.tree.map(jnp.zeros_like, pull(cotangent))
        gone = jax.lax.axis_index("expert") == 2
        return jax.lax.cond(gone, lambda: nothing, lambda: pull(cotangent))

    args = numbers.topk_idx, numbers.x, numbers.weights
    program = row.jit(per_rank, R).lower(*args).compile()
    jax_ep.set_wait_timeout(0.5)
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(program(*args))
    message = str(caught.value)
    assert f"jax_ep {named}: rank" in message
    assert "waited 0.5 s for rank 2 " in message
    for kernel in OPS:
        assert kernel not in message


def test_what_runs_where_the_default_backend_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The devices of a program decide, not what JAX would take without being asked."""
    require("native")
    monkeypatch.setattr(_native, "trace_platform", lambda: "tpu")
    topk_idx, x = np.zeros((6, 2), np.int32), np.ones((6, 3), np.float32)

    def layer(topk_idx: jax.Array, x: jax.Array) -> jax.Array:
        plan = jax_ep.make_plan(topk_idx, num_experts=4)
        assert plan.implementation == "xla"
        return jax_ep.combine(jax_ep.dispatch(x, plan), plan)

    program = jax.jit(layer).lower(topk_idx, x)
    assert "jax_ep_plan_stacked" in program.as_text()
    np.testing.assert_array_equal(program.compile()(topk_idx, x), 2 * x)
