"""What of the integration with MaxText needs no MaxText; ``tests/with_trainers`` has the rest."""

from __future__ import annotations

import importlib
import importlib.util
import types

import pytest
from jax.sharding import PartitionSpec as P

from jax_ep.integrations._maxtext_config import check_served, find_places, tile_sizes

ASKS_NOTHING = {
    "moe_quantize_token_all_gather": False,
    "moe_quantize_combine_bwd_method": "",
    "moe_dropless_fallback": None,
    "defer_small_all_reduces": False,
    "attention": "dot_product",
}


def layer(rules=(), experts="expert", **sizes):
    """What a layer says of its arrays; the rules are those after removal of axes of one device."""
    known = {
        "activation_batch": ("fsdp", "expert"),
        "activation_embed": (),
        "exp": "expert",
        "mlp_no_fsdp": (),
        **dict(rules),
    }
    return types.SimpleNamespace(
        mesh=types.SimpleNamespace(shape={"fsdp": 2, "expert": 4, **sizes}),
        _expert_parallelism_name=experts,
        _logical_to_mesh_axes=lambda names: P(*(known.get(name) for name in names)),
    )


@pytest.mark.skipif(importlib.util.find_spec("maxtext") is not None, reason="MaxText is there")
def test_importing_it_says_what_to_install():
    with pytest.raises(ImportError, match=r"needs MaxText .*pip install maxtext==0\.2\.5.*\("):
        importlib.import_module("jax_ep.integrations.maxtext")


def test_arrays_lie_where_maxtexts_rules_say():
    rules = {"exp": ("expert", "fsdp"), "mlp_no_fsdp": ("tensor",), "activation_embed": ("tensor",)}
    places = find_places(layer(rules, tensor=2), batch=8)
    assert places.tokens == P(("fsdp", "expert"), (), None)
    assert places.out == P(("fsdp", "expert"), (), ("tensor",))
    assert places.weights[2] == P(("expert",), ("tensor",), None)
    assert find_places(layer(), batch=1).batch == ()


def test_an_axis_of_one_device_is_none():
    places = find_places(layer({"exp": None}, expert=1), batch=8)
    assert places.experts == ()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"exp": "data"}, r"'exp' must lie along .*\('expert',\); got \('data',\)"),
        (
            {"mlp_no_fsdp": "tensor"},
            r"'mlp_no_fsdp' must .*'activation_embed' .*\(\); got \('tensor'",
        ),
    ],
)
def test_other_rules_are_refused(rules, message):
    with pytest.raises(NotImplementedError, match=message):
        find_places(layer(rules, data=2, tensor=2), batch=8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("moe_quantize_token_all_gather", True),
        ("moe_quantize_combine_bwd_method", "rowwise"),
        ("moe_dropless_fallback", "layer"),
        ("defer_small_all_reduces", True),
        ("attention", "vllm_rpa"),
    ],
)
def test_what_would_be_left_out_is_refused(name, value):
    config = types.SimpleNamespace(**{**ASKS_NOTHING, name: value})
    with pytest.raises(
        NotImplementedError, match=f"does not serve {name}; got .*{value!r}.*uninstall"
    ):
        check_served(config)


def test_what_is_served_is_not_refused():
    check_served(types.SimpleNamespace(**ASKS_NOTHING))
    after_a_step = types.SimpleNamespace(**{**ASKS_NOTHING, "moe_dropless_fallback": "step"})
    check_served(after_a_step)


@pytest.mark.parametrize("is_eval", [False, True])
def test_tiles_are_in_the_order_of_maxtexts_kernels(is_eval):
    sides = ("wi_tile_fwd", "eval_wi_tile_fwd", "wi_tile_dlhs", "wi_tile_drhs", "wo_tile_drhs")
    dims = ("batch_seq", "embed_dim", "mlp_dim")
    names = {f"{side}_{dim}": f"{side}_{dim}" for side in sides for dim in dims}
    tiles = tile_sizes(types.SimpleNamespace(**names), "wi", is_eval)
    forward = "eval_wi_tile_fwd" if is_eval else "wi_tile_fwd"
    assert tiles[:3] == tuple(f"{forward}_{dim}" for dim in dims)
    backward = ("batch_seq", "mlp_dim", "embed_dim")  # of what the first product contracts
    assert tiles[3:6] == tuple(f"wi_tile_dlhs_{dim}" for dim in backward)
    assert tiles[6:] == tuple(f"wi_tile_drhs_{dim}" for dim in dims)
