"""What of the integration with MaxText needs no MaxText; ``tests/with_maxtext`` has the rest."""

from __future__ import annotations

import importlib
import importlib.util
import types

import pytest
from jax.sharding import PartitionSpec as P

from jax_ep.integrations._maxtext_config import check_served, find_places

ASKS_NOTHING = {
    "moe_quantize_token_all_gather": False,
    "moe_quantize_combine_bwd_method": "",
    "moe_dropless_fallback": None,
    "defer_small_all_reduces": False,
    "attention": "dot_product",
    "quantization": "",
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
        check_served(config, is_quantised=False)


def test_quantised_experts_are_refused():
    config = types.SimpleNamespace(**{**ASKS_NOTHING, "quantization": "int8"})
    with pytest.raises(NotImplementedError, match="does not serve quantization; got .*'int8'"):
        check_served(config, is_quantised=True)


def test_what_is_served_is_not_refused():
    check_served(types.SimpleNamespace(**ASKS_NOTHING), is_quantised=False)
    after_a_step = types.SimpleNamespace(**{**ASKS_NOTHING, "moe_dropless_fallback": "step"})
    check_served(after_a_step, is_quantised=False)
