"""What programs for a GPU consist of, as far as a machine without one can tell."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from implementations import AXIS
from jax.sharding import AxisType, PartitionSpec

import jax_ep
from jax_ep import _encoding, _fabrics, _foreign, _native, _native_fp8, _refusals, wire

T, K, E, H, C, WORKSPACE = 6, 2, 8, 16, 20, 123


class Library:
    """Stands in for the native library: says what it would."""

    @staticmethod
    def jax_ep_max_topk() -> int:
        return 3

    @staticmethod
    def jax_ep_max_peers() -> int:
        return 4

    @staticmethod
    def jax_ep_plan_workspace(*geometry: int) -> int:
        assert geometry in {(4, T, K, E), (4, T // 2, K, E), (1, T, K, E), (8, T, K, E)}
        return WORKSPACE


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "trace_platform", lambda: "gpu")
    monkeypatch.setattr(_fabrics, "library", lambda _: Library)
    monkeypatch.setattr(_refusals, "library", lambda _: Library)
    monkeypatch.setattr(_fabrics, "platform_problem", lambda _: None)
    monkeypatch.setattr(_refusals, "gpu_peers_problem", lambda: None)
    monkeypatch.setattr(_native, "platform_problem", lambda _: None)
    monkeypatch.setattr(_encoding, "platform_problem", lambda _: None)
    monkeypatch.setattr(_foreign, "register_handlers", lambda _: None)
    monkeypatch.setattr(_native_fp8, "register_handlers", lambda _: None)


def layer(x: jax.Array, topk_idx: jax.Array, weights: jax.Array, axis: str | None) -> jax.Array:
    plan = jax_ep.make_plan(topk_idx, num_experts=E, axis_name=axis, capacity=C)
    assert plan.implementation == "native"
    return jax_ep.combine(jax_ep.dispatch(x, plan), plan, weights)


def operands(*stack: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    return (
        jnp.ones((*stack, T, H)),
        jnp.zeros((*stack, T, K), jnp.int32),
        jnp.ones((*stack, T, K)),
    )


def calls(f, *args: jax.Array) -> list[str]:
    """Returns the lines of the program for CUDA in which it calls foreign code."""
    text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r".*custom_call @jax_ep.*", text)


def names(lines: list[str]) -> list[str]:
    return [re.findall(r"@(\w+)", line)[0] for line in lines]


FORWARD = ["jax_ep_plan_stacked", "jax_ep_gather_rows_stacked", "jax_ep_reduce_scaled_stacked"]


@pytest.mark.parametrize("axis", [AXIS, None], ids=["vmap", "one"])
def test_forward(axis: str | None) -> None:
    """One call per op, which gets the workspace that the library asks for."""

    def ranks(*args: jax.Array) -> jax.Array:
        f = lambda *shards: layer(*shards, axis)  # noqa: E731
        return jax.vmap(f, axis_name=AXIS)(*args) if axis else f(*args)

    found = calls(ranks, *(operands(4) if axis else operands()))
    assert names(found) == FORWARD
    assert f"tensor<{WORKSPACE}xi32>" in found[0]


def test_backward() -> None:
    """The gradients are exchanges too; nothing is gathered, scattered or planned again."""

    def loss(x, topk_idx, weights):
        f = lambda *shards: layer(*shards, AXIS)  # noqa: E731
        return jnp.sum(jax.vmap(f, axis_name=AXIS)(x, topk_idx, weights) ** 2)

    found = names(calls(jax.grad(loss, (0, 2)), *operands(4)))
    assert found.count("jax_ep_plan_stacked") == 1
    assert found.count("jax_ep_gather_rows_stacked") == 1
    assert found.count("jax_ep_gather_scaled_stacked") == 1
    assert found.count("jax_ep_reduce_scaled_stacked") == 1
    assert found.count("jax_ep_reduce_rows_stacked") == 1
    assert found.count("jax_ep_row_dots_stacked") == 1


def test_chunks_side_by_side_exchange_on_the_stream_of_collectives() -> None:
    """There XLA lets them go beside what it computes; plans are waited for at once."""

    def rank(x, topk_idx, weights):
        w = jnp.ones((2, H, H))
        options = {"num_experts": E, "axis_name": AXIS, "capacity": C}
        return jax_ep.moe(x, topk_idx, weights, w, w, w, chunks=2, unroll_chunks=True, **options)[0]

    found = calls(lambda *ranks: jax.vmap(rank, axis_name=AXIS)(*ranks), *operands(4))
    on_stream = ['_xla_stream_annotation = "collective"' in line for line in found]
    once = [*zip(FORWARD, (False, True, True), strict=True)]
    assert sorted(zip(names(found), on_stream, strict=True)) == sorted(2 * once)


def test_tokens_are_encoded_by_one_call_for_all_ranks() -> None:
    def rank(x: jax.Array, topk_idx: jax.Array) -> jax.Array:
        plan = jax_ep.make_plan(topk_idx, num_experts=E, axis_name=AXIS, capacity=C)
        return wire.dispatch(x, plan)

    x, topk_idx, _ = operands(4)
    found = calls(lambda *ranks: jax.vmap(rank, axis_name=AXIS)(*ranks), x, topk_idx)
    assert sorted(names(found)) == ["jax_ep_encode_rows", *sorted(FORWARD[:2])]


def over_mesh(num_ranks: int, implementation: str | None = None):
    devices = jax.devices("cpu")[:num_ranks]
    mesh = jax.make_mesh((num_ranks,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)

    def block(topk_idx):
        plan = jax_ep.make_plan(
            topk_idx, num_experts=E, axis_name=AXIS, capacity=C, implementation=implementation
        )
        chosen.append(plan.implementation)
        return plan.recv_counts

    chosen: list[str] = []
    spec = PartitionSpec(AXIS)
    f = jax.shard_map(block, mesh=mesh, in_specs=spec, out_specs=spec)
    topk_idx = jnp.zeros((num_ranks * T, K), jnp.int32)
    text = jax.jit(f).trace(topk_idx).lower(lowering_platforms=("cuda",)).as_text()
    return chosen, text


def test_a_mesh_axis_of_one_rank() -> None:
    chosen, text = over_mesh(1)
    assert set(chosen) == {"native"}
    assert "jax_ep_plan_stacked" in text


def test_several_gpus() -> None:
    chosen, text = over_mesh(4)
    assert set(chosen) == {"native"}
    assert "jax_ep_plan_devices" in text
    # Peers lend each other what they need: XLA carries nothing.
    assert "all_gather" not in text


def test_more_gpus_than_there_is_room_for() -> None:
    _check_rounds(*over_mesh(8))


def test_gpus_that_cannot_read_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = "GPU 1 cannot read the memory of GPU 0 of this process"
    monkeypatch.setattr(_refusals, "gpu_peers_problem", lambda: problem)
    _check_rounds(*over_mesh(4))


def _check_rounds(chosen: list[str], text: str) -> None:
    """XLA gathers the choices, and each rank plans for itself."""
    assert set(chosen) == {"native"}
    assert "jax_ep_plan_rounds" in text
    assert "all_gather" in text


def test_more_choices_than_there_is_room_for() -> None:
    topk_idx = jnp.zeros((T, 4), jnp.int32)
    plan = jax.eval_shape(lambda i: jax_ep.make_plan(i, num_experts=E), topk_idx)
    assert plan.implementation == "xla"
    with pytest.raises(NotImplementedError, match="room for 3 .* these are 4"):
        jax_ep.make_plan(topk_idx, num_experts=E, implementation="native")
