"""Expert blocks of transformers: the options of a layer that is one, and its weights both ways.

Names and layouts are those of transformers 5.24, as a block's ``state_dict()`` has them. (Published
checkpoints may have an array for each expert; transformers stacks these as it loads them.) Arrays
are NumPy's, going in and coming out: neither transformers nor PyTorch is imported, nor is Flax.
"""

from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np

from jax_ep._checks import check_one_of
from jax_ep.integrations._families import FAMILIES, Config, Family, value
from jax_ep.integrations._layout import Array


def layer_options(model_type: str, config: Config) -> dict[str, Any]:
    """Returns the arguments with which ``jax_ep.flax.MoE`` is a family's expert block.

    Args:
      model_type: the family, as its configuration's ``model_type`` says it; ``"deepseek_v4_hash"``
        for the layers of DeepSeek-V4 whose choices a table of token ids makes: call these with
        ``topk_idx=table[input_ids]``, where the table is the block's ``gate.tid2eid``.
      config: the configuration, as ``config.to_dict()`` or ``config.json`` has it.

    Returns:
      Keyword arguments. Those of the exchange, such as ``capacity_factor``, are not among them, nor
      is ``rngs``.

    Raises:
      ValueError: the family is none of those known, the configuration lacks a value, or it asks for
        an activation or a score that is not served.

    Example:
      >>> from jax_ep.integrations import transformers
      >>> config = {"hidden_size": 16, "intermediate_size": 12, "hidden_act": "silu"}
      >>> config |= {"num_local_experts": 8, "num_experts_per_tok": 2}
      >>> options = transformers.layer_options("mixtral", config)
      >>> options["num_experts"], options["router"]
      (8, Router(score='softmax', ...))
    """
    family = _family(model_type)
    name, served = family.activation
    check_one_of(f"config[{name!r}]", value(config, name), (served,))
    return {
        "hidden": value(config, "hidden_size"),
        "ffn_hidden": value(config, family.ffn_hidden),
        "num_experts": value(config, "num_local_experts", "num_experts", "n_routed_experts"),
        "num_topk": value(config, "num_experts_per_tok", "moe_topk"),
        "router": family.router(config),
        **family.others(config),
    }


def from_transformers(model_type: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Turns a block's arrays into those of ``jax_ep.flax.MoE``.

    Numbers move and none changes, so that gradients are turned alike.

    Args:
      model_type: as ``layer_options`` takes it.
      arrays: the block's, under its own names: its ``state_dict()``, each as an array of NumPy's.

    Returns:
      The layer's arrays, by the names of its attributes, in the dtypes of what was given.

    Raises:
      ValueError: the family is none of those known, an array is missing, or one is none of the
        family's.

    Example:
      >>> import numpy as np
      >>> from jax_ep.integrations import transformers
      >>> arrays = {"gate.weight": np.zeros((8, 16)), "experts.gate_up_proj": np.zeros((8, 24, 16))}
      >>> arrays["experts.down_proj"] = np.zeros((8, 16, 12))
      >>> layer = transformers.from_transformers("mixtral", arrays)
      >>> {name: array.shape for name, array in layer.items()}
      {'router_kernel': (16, 8), 'w_gate': (8, 16, 12), 'w_up': (8, 16, 12), 'w_down': (8, 12, 16)}
    """
    family = _family(model_type)
    _check_names(arrays, family.layouts, family.optional)
    num_experts = len(arrays["experts.down_proj"])
    of_layer = {}
    for name, layout in family.layouts.items():
        if name in arrays:
            of_layer |= layout.split(np.asarray(arrays[name]), num_experts)
    return of_layer


def to_transformers(model_type: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Turns the arrays of ``jax_ep.flax.MoE`` into a block's: undoes ``from_transformers``.

    Args:
      model_type: as ``layer_options`` takes it.
      arrays: the layer's, by the names of its attributes.

    Returns:
      The block's arrays, under its own names, in the dtypes of what was given. LongCat-Flash's
      blocks have weights of experts that compute nothing: zeros.

    Raises:
      ValueError: the family is none of those known, an array is missing, or one is none of the
        family's.
    """
    family = _family(model_type)
    known = {name for layout in family.layouts.values() for name in layout.names}
    optional = {name for key in family.optional for name in family.layouts[key].names}
    _check_names(arrays, known, optional)
    given = {name: np.asarray(array) for name, array in arrays.items()}
    num_choices = given["router_kernel"].shape[-1]
    return {
        name: layout.join(given, num_choices)
        for name, layout in family.layouts.items()
        if given.keys() >= set(layout.names)
    }


def _family(model_type: str) -> Family:
    check_one_of("model_type", model_type, FAMILIES)
    return FAMILIES[model_type]


def _check_names(given: Iterable[str], known: Iterable[str], optional: Set[str]) -> None:
    """Checks that there are the arrays of a family, and no others.

    Raises:
      ValueError: some are missing, or there are others.
    """
    given, known = set(given), set(known)
    if missing := sorted(known - given - optional):
        raise ValueError(f"arrays must have {missing}; got {sorted(given)}.")
    if others := sorted(given - known):
        raise ValueError(f"arrays must be {sorted(known)}; got {others} too.")
