"""Models by name: how a family routes and what its experts are, in sizes that train on a laptop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_ep.integrations import transformers
from jax_ep.routing import Router
from moe_lm.model import Config

ROUTERS = {"softmax": Router(), "sigmoid": Router("sigmoid", has_bias=True)}
"""By their short names: the second is balanced by its bias, the first by a loss."""

_SIZES = {"hidden_size": 128, "hidden_act": "silu"}
# As config.json has them. Sizes are shrunk, the rest is the family's: experts are as wide beside
# the model as the published ones are, and chosen in the same way.
_FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {
        "model_type": "olmoe",
        "intermediate_size": 64,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 48,
        "num_experts": 64,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
    "mixtral": {
        "model_type": "mixtral",
        "intermediate_size": 448,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 40,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_shared_experts": 1,
    },
}

DEFAULT = "small"
NAMES = (DEFAULT, *_FAMILIES)


def make_config(name: str, changes: Mapping[str, Any]) -> Config:
    """Returns the model of a name, with changes.

    Args:
      name: one of ``NAMES``; ``"small"`` is this example's own, 16 experts of which softmax
        chooses 2.
      changes: values of ``Config`` by name; those that are None stay as they are.
    """
    options: dict[str, Any] = {}
    if name in _FAMILIES:
        family = _SIZES | _FAMILIES[name]
        options = transformers.layer_options(family["model_type"], family)
    given = {field: value for field, value in changes.items() if value is not None}
    return dataclasses.replace(Config(**options), **given)
