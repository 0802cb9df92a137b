"""Whatever the library does in a program bears its name there, and that of the layer it is for."""

from __future__ import annotations

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from implementations import AXIS, over_devices, require

import jax_ep

R, T, K, E, H = 2, 4, 2, 4, 8
OP_NAME = re.compile(r'op_name="([^"]*)"')


def layer(x: jax.Array, topk_idx: jax.Array, weights: jax.Array) -> jax.Array:
    plan = jax_ep.make_plan(topk_idx, num_experts=E, axis_name=AXIS)
    rows = jax_ep.dispatch(x, plan) * jax_ep.row_weights(weights, plan)[:, None]
    return jax_ep.combine(rows, plan)


def program(f: Callable[..., object]) -> str:
    x, topk_idx = jnp.ones((R, T, H)), jnp.zeros((R, T, K), jnp.int32)
    text = jax.jit(f).lower(x, topk_idx, jnp.ones((R, T, K))).compile().as_text()
    assert text is not None
    return text


def named_blocks(x: jax.Array, topk_idx: jax.Array, weights: jax.Array) -> jax.Array:
    for block in range(2):
        with jax.named_scope(f"block_{block}"):
            # Each has its own choices: XLA would make one plan of equal ones.
            x = layer(x, (topk_idx + block) % E, weights + block)
    return x


def scopes_of_calls(text: str) -> set[tuple[str, str]]:
    """Returns the block and the function in the name of each of our foreign calls."""
    calls = [line for line in text.splitlines() if 'custom_call_target="jax_ep_' in line]
    assert calls
    names = [match[1] if (match := OP_NAME.search(call)) else "" for call in calls]
    found = [re.search(r"/(block_\d)/jax_ep\.(\w+)", name) for name in names]
    assert all(found), names
    return {(match[1], match[2]) for match in found if match}


def test_foreign_calls_bear_the_names_of_layer_and_function() -> None:
    """Two equal layers were lowered as one function, which had the name of neither."""
    require("native")
    sharded = over_devices(named_blocks, R)
    calls = ("make_plan", "dispatch", "row_weights", "combine")
    everything = {(block, call) for block in ("block_0", "block_1") for call in calls}
    assert scopes_of_calls(program(sharded)) == everything
    gradient = jax.grad(lambda *args: jnp.sum(sharded(*args)), argnums=(0, 2))
    assert scopes_of_calls(program(gradient)) == everything


@pytest.mark.long
@pytest.mark.parametrize("differentiate", [False, True])
def test_all_of_a_layer_bears_our_names(differentiate: bool) -> None:
    """What XLA computes for an exchange or an expert is found in profiles by them too."""

    def moe(x: jax.Array, topk_idx: jax.Array, weights: jax.Array) -> jax.Array:
        w = jnp.ones((E, H, H))
        options = {"num_experts": E, "implementation": "xla"}
        return jax_ep.moe(x, topk_idx, weights, w, w, w, **options)[0]

    f = jax.grad(lambda *args: jnp.sum(moe(*args))) if differentiate else moe
    args = jnp.ones((T, H)), jnp.zeros((T, K), jnp.int32), jnp.ones((T, K))
    text = jax.jit(f).lower(*args).compile().as_text()
    assert text is not None
    names = OP_NAME.findall(text)
    for call in ("make_plan", "dispatch", "grouped_matmul", "combine"):
        # A derivative's name has that of its transformation around ours, or before it.
        pattern = rf"jax_ep\.moe\)*/.*jax_ep\.{call}\)*/"
        assert any(re.search(pattern, name) for name in names), (call, names)


def test_functions_stay_what_they_are() -> None:
    """A scope wraps them; what users read of them does not change."""
    assert jax_ep.dispatch.__name__ == "dispatch"
    assert jax_ep.dispatch.__module__ == "jax_ep._dispatch"
