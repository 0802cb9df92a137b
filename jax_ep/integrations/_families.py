"""The families of transformers' expert blocks, a row each: their options, and where arrays lie."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_ep._checks import check_one_of
from jax_ep.experts import FeedForward, clamped_swiglu
from jax_ep.integrations._layout import Layout
from jax_ep.routing import Router

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """What tells one family's blocks from another's.

    Attributes:
      layouts: by the names of a block's arrays.
      router: the layer's router, by the configuration.
      others: further options of the layer, by the configuration.
      ffn_hidden: what the configuration calls the width of an expert.
      activation: what it calls the activation, and the only one that is served.
      optional: the names of arrays that a block need not have.
    """

    layouts: Mapping[str, Layout]
    router: Callable[[Config], Router]
    others: Callable[[Config], dict[str, Any]] = lambda config: {}
    ffn_hidden: str = "moe_intermediate_size"
    activation: tuple[str, str] = ("hidden_act", "silu")
    optional: frozenset[str] = frozenset()


def value(config: Config, *names: str) -> Any:
    """Returns what a configuration says under the first of some names for one thing.

    Raises:
      ValueError: it has none of the names.
    """
    for name in names:
        if name in config:
            return config[name]
    raise ValueError(f"config must have a value for {' or '.join(names)}; got none.")


def _softmax(config: Config) -> Router:
    return Router("softmax")


def _softmax_of_biased(config: Config) -> Router:
    return Router("softmax", has_logit_bias=True)


def _softmax_or_its_parts(config: Config) -> Router:
    return Router("softmax", renormalize=value(config, "norm_topk_prob"))


def _biased_softmax(config: Config) -> Router:
    scale = value(config, "routed_scaling_factor")
    return Router("softmax", has_bias=True, renormalize=False, scale=scale)


def _sigmoid(config: Config) -> Router:
    return Router("sigmoid", renormalize=False)


def _biased_sigmoid(config: Config) -> Router:
    return Router("sigmoid", has_bias=True)


def _grouped_sigmoid(config: Config) -> Router:
    return Router(
        "sigmoid",
        has_bias=True,
        num_groups=value(config, "n_group"),
        topk_groups=value(config, "topk_group"),
        renormalize=value(config, "norm_topk_prob"),
        scale=value(config, "routed_scaling_factor"),
    )


def _sqrt_softplus(config: Config, has_bias: bool = True) -> Router:
    check_one_of("config['scoring_func']", value(config, "scoring_func"), ("sqrtsoftplus",))
    scale = value(config, "routed_scaling_factor")
    return Router("sqrt_softplus", has_bias=has_bias, scale=scale)


def _sqrt_softplus_given(config: Config) -> Router:
    return _sqrt_softplus(config, has_bias=False)


def _gated_shared_expert(config: Config) -> dict[str, Any]:
    width = value(config, "shared_expert_intermediate_size")
    return {"shared_hidden": width, "gate_shared": True}


def _weighed_input(config: Config) -> dict[str, Any]:
    return {"weigh": "input", "shared_hidden": value(config, "intermediate_size")}


def _shared_experts(config: Config) -> dict[str, Any]:
    width = value(config, "moe_intermediate_size")
    return {"shared_hidden": width * value(config, "n_shared_experts")}


def _clamped_swiglu(config: Config) -> dict[str, Any]:
    limit, alpha = config.get("swiglu_limit", 7.0), config.get("swiglu_alpha", 1.702)
    return {"experts": _network(clamped_swiglu, has_bias=True, limit=limit, alpha=alpha)}


def _clamped_silu(config: Config) -> dict[str, Any]:
    limit = value(config, "swiglu_limit")
    return {
        "experts": _network(clamped_silu, has_bias=False, limit=limit),
        "shared_hidden": value(config, "moe_intermediate_size"),
    }


# Networks are compared as their activations are: layers that share one are compiled once.
@functools.cache
def _network(
    activation: Callable[..., jax.Array], *, has_bias: bool, **limits: float
) -> FeedForward:
    return FeedForward(functools.partial(activation, **limits), has_bias=has_bias)


def clamped_silu(
    gate: Float[Array, "*rows"], up: Float[Array, "*rows"], *, limit: float
) -> Float[Array, "*rows"]:
    """Returns ``silu(gate) * up`` of clamped arguments, as DeepSeek-V4 has it."""
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


def _zero_experts(config: Config) -> dict[str, Any]:
    return {"num_zero_experts": value(config, "zero_expert_num") or 0}


def _ungated(config: Config) -> dict[str, Any]:
    return {
        "experts": "relu2",
        "shared_hidden": value(config, "moe_shared_expert_intermediate_size"),
        "latent_hidden": config.get("moe_latent_size"),
    }


def _alternating(*names: str) -> Layout:
    return Layout(names, is_transposed=False, is_interleaved=True)


def _gated(module: str, prefix: str) -> dict[str, Layout]:
    """Returns the layouts of a gated feed-forward network of linear layers."""
    parts = {"gate_proj": "w_gate", "up_proj": "w_up", "down_proj": "w_down"}
    return {f"{module}.{part}.weight": Layout((prefix + name,)) for part, name in parts.items()}


_GATE_UP = ("w_gate", "w_up")
_GATE = {"gate.weight": Layout(("router_kernel",))}
_ROUTER = {"router.weight": Layout(("router_kernel",))}
_BIAS = Layout(("router_bias",), is_transposed=False)
_GATE_BIAS = {"gate.e_score_correction_bias": _BIAS}
_EXPERTS = {
    "experts.gate_up_proj": Layout(_GATE_UP),
    "experts.down_proj": Layout(("w_down",)),
}
_SHARED_EXPERT = _gated("shared_expert", "shared_")
_SHARED_EXPERTS = _gated("shared_experts", "shared_")
_DEEPSEEK = {**_GATE, **_GATE_BIAS, **_EXPERTS, **_SHARED_EXPERTS}
_LATENT = {
    "fc1_latent_proj.weight": Layout(("latent_in",)),
    "fc2_latent_proj.weight": Layout(("latent_out",)),
}
_QWEN = {
    **_GATE,
    **_EXPERTS,
    **_SHARED_EXPERT,
    "shared_expert_gate.weight": Layout(("shared_gate_kernel",)),
}

FAMILIES = {
    "mixtral": Family({**_GATE, **_EXPERTS}, _softmax, ffn_hidden="intermediate_size"),
    "granitemoe": Family({**_ROUTER, **_EXPERTS}, _softmax, ffn_hidden="intermediate_size"),
    "olmoe": Family({**_GATE, **_EXPERTS}, _softmax_or_its_parts, ffn_hidden="intermediate_size"),
    "qwen2_moe": Family(_QWEN, _softmax_or_its_parts, _gated_shared_expert),
    "qwen3_moe": Family({**_GATE, **_EXPERTS}, _softmax_or_its_parts),
    "qwen3_next": Family(_QWEN, _softmax_or_its_parts, _gated_shared_expert),
    "deepseek_v3": Family(_DEEPSEEK, _grouped_sigmoid, _shared_experts),
    "glm4_moe": Family(_DEEPSEEK, _grouped_sigmoid, _shared_experts),
    "minimax_m2": Family(
        {**_GATE, "e_score_correction_bias": _BIAS, **_EXPERTS},
        _biased_sigmoid,
        ffn_hidden="intermediate_size",
    ),
    "llama4_text": Family(
        {
            **_ROUTER,
            "experts.gate_up_proj": Layout(_GATE_UP, is_transposed=False),
            "experts.down_proj": Layout(("w_down",), is_transposed=False),
            **_SHARED_EXPERT,
        },
        _sigmoid,
        _weighed_input,
        ffn_hidden="intermediate_size",
    ),
    "gpt_oss": Family(
        {
            **_ROUTER,
            "router.bias": Layout(("router_logit_bias",), is_transposed=False),
            "experts.gate_up_proj": _alternating("w_gate", "w_up"),
            "experts.gate_up_proj_bias": _alternating("b_gate", "b_up"),
            "experts.down_proj": Layout(("w_down",), is_transposed=False),
            "experts.down_proj_bias": Layout(("b_down",), is_transposed=False),
        },
        _softmax_of_biased,
        _clamped_swiglu,
        ffn_hidden="intermediate_size",
    ),
    "deepseek_v4": Family(_DEEPSEEK, _sqrt_softplus, _clamped_silu),
    "deepseek_v4_hash": Family(
        {**_GATE, **_EXPERTS, **_SHARED_EXPERTS}, _sqrt_softplus_given, _clamped_silu
    ),
    "longcat_flash": Family(
        {
            "router.classifier.weight": Layout(("router_kernel",)),
            "router.e_score_correction_bias": _BIAS,
            "experts.gate_up_proj": Layout(_GATE_UP, is_padded=True),
            "experts.down_proj": Layout(("w_down",)),
        },
        _biased_softmax,
        _zero_experts,
        ffn_hidden="expert_ffn_hidden_size",
    ),
    "nemotron_h": Family(
        {
            **_GATE,
            **_GATE_BIAS,
            "experts.up_proj": Layout(("w_up",)),
            "experts.down_proj": Layout(("w_down",)),
            "shared_experts.up_proj.weight": Layout(("shared_w_up",)),
            "shared_experts.down_proj.weight": Layout(("shared_w_down",)),
            **_LATENT,
        },
        _grouped_sigmoid,
        _ungated,
        activation=("mlp_hidden_act", "relu2"),
        optional=frozenset(_LATENT),
    ),
}
