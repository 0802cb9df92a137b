"""What converters of weights refuse, and what they do without."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from jax_ep.integrations._families import FAMILIES
from jax_ep.integrations.transformers import from_transformers, layer_options, to_transformers

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "models.md"
MIXTRAL = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
}


def block(**others):
    return {
        "gate.weight": np.zeros((8, 16), np.float16),
        "experts.gate_up_proj": np.zeros((8, 24, 16)),
        "experts.down_proj": np.zeros((8, 16, 12)),
        **others,
    }


def test_imports_nothing_that_it_converts():
    code = (
        "import sys, jax_ep.integrations.transformers; "
        "assert not {'flax', 'torch', 'transformers'} & set(sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


@pytest.mark.parametrize(
    "call",
    [
        lambda: layer_options("mixtrel", MIXTRAL),
        lambda: from_transformers("mixtrel", block()),
        lambda: to_transformers("mixtrel", {}),
    ],
    ids=["layer_options", "from_transformers", "to_transformers"],
)
def test_an_unknown_family(call):
    with pytest.raises(ValueError, match=r"model_type must be one of \('mixtral', .*'mixtrel'"):
        call()


def test_a_value_that_the_configuration_lacks():
    config = {name: value for name, value in MIXTRAL.items() if name != "num_local_experts"}
    with pytest.raises(
        ValueError, match="config must have a value for num_local_experts or num_experts or"
    ):
        layer_options("mixtral", config)


def test_an_activation_that_is_not_served():
    with pytest.raises(
        ValueError, match=r"config\['hidden_act'\] must be one of \('silu',\); got 'gelu'"
    ):
        layer_options("mixtral", MIXTRAL | {"hidden_act": "gelu"})


def test_a_missing_array():
    arrays = block()
    del arrays["experts.down_proj"]
    with pytest.raises(ValueError, match=r"arrays must have \['experts.down_proj'\].*got \['exp"):
        from_transformers("mixtral", arrays)
    arrays = from_transformers("mixtral", block())
    del arrays["w_up"]
    with pytest.raises(ValueError, match=r"arrays must have \['w_up'\]; got \['router_kernel"):
        to_transformers("mixtral", arrays)


def test_an_array_of_another_family():
    with pytest.raises(ValueError, match=r"arrays must be \['exp.*\]; got \['gate.bias'\] too"):
        from_transformers("mixtral", block(**{"gate.bias": np.zeros(8)}))
    arrays = from_transformers("mixtral", block())
    with pytest.raises(ValueError, match=r"arrays must be \['rou.*\]; got \['b_up'\] too"):
        to_transformers("mixtral", arrays | {"b_up": np.zeros((8, 12))})


def test_arrays_keep_their_dtypes_and_are_copies():
    arrays = block()
    converted = from_transformers("mixtral", arrays)
    assert converted["router_kernel"].dtype == np.float16
    converted["w_down"][...] = 1
    assert not arrays["experts.down_proj"].any()


def test_latent_projections_may_be_missing():
    arrays = {
        "gate.weight": np.ones((8, 16)),
        "gate.e_score_correction_bias": np.ones(8),
        "experts.up_proj": np.ones((8, 12, 16)),
        "experts.down_proj": np.ones((8, 16, 12)),
        "shared_experts.up_proj.weight": np.ones((20, 16)),
        "shared_experts.down_proj.weight": np.ones((16, 20)),
    }
    converted = from_transformers("nemotron_h", arrays)
    assert not {"latent_in", "latent_out"} & set(converted)
    assert set(to_transformers("nemotron_h", converted)) == set(arrays)


def test_networks_are_equal_if_their_limits_are():
    config = {"hidden_size": 16, "intermediate_size": 12, "num_local_experts": 8}
    config |= {"num_experts_per_tok": 2, "hidden_act": "silu"}
    networks = [
        layer_options("gpt_oss", config | limits)["experts"]
        for limits in ({}, {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}, {"swiglu_limit": 6.0})
    ]
    assert networks[0] == networks[1] != networks[2]


def test_the_page_names_all_families():
    text = PAGE.read_text()
    assert [name for name in FAMILIES if f"`{name}`" not in text] == []
