"""The layer's parameters: their names and shapes."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import jax

from jax_ep.experts import Dims, Experts
from jax_ep.flax._config import Config

Weights: TypeAlias = dict[str, jax.Array]

SHARED = "shared_"


def dims_of(config: Config) -> dict[str, tuple[str | int, ...]]:
    """Returns the axes of each trained parameter, by what they count.

    A network's ``"hidden"`` is what crosses to experts; that of all others is the model's.
    """
    router = config.router
    dims: dict[str, tuple[str | int, ...]] = {}
    if router is not None:
        dims["router_kernel"] = ("hidden", "num_choosable")
        if router.has_logit_bias:
            dims["router_logit_bias"] = ("num_choosable",)
    own: Dims = config.experts.dims
    if config.latent_hidden is not None:
        dims["latent_in"] = ("hidden", "latent_hidden")
        dims["latent_out"] = ("latent_hidden", "hidden")
    renamed = {"hidden": "expert_hidden"}
    for name, axes in own.items():
        dims[name] = ("num_experts", *(renamed.get(str(axis), axis) for axis in axes))
    if config.shared_hidden is not None:
        renamed = {"ffn_hidden": "shared_hidden"}
        for name, axes in own.items():
            dims[SHARED + name] = tuple(renamed.get(str(axis), axis) for axis in axes)
        if config.gate_shared:
            dims["shared_gate_kernel"] = ("hidden", 1)
    return dims


def shape_of(config: Config, dims: tuple[str | int, ...]) -> tuple[int, ...]:
    """Returns a parameter's shape."""
    return tuple(dim if isinstance(dim, int) else getattr(config, dim) for dim in dims)


def with_dims(experts: Any) -> Experts:
    """Returns a network, checked to say what its parameters are.

    Raises:
      TypeError: it has no ``dims`` of names and tuples.
      ValueError: an axis is neither a size nor one that the layer knows.
    """
    dims = getattr(experts, "dims", None)
    if not isinstance(dims, Mapping):
        raise TypeError(
            "experts must be a name, or have `dims` beside its call, which say what parameters the "
            f"layer is to make: see jax_ep.experts.Experts; got {experts!r}."
        )
    for name, axes in dims.items():
        for axis in axes:
            if not isinstance(axis, int) and axis not in ("hidden", "ffn_hidden"):
                raise ValueError(
                    f"dims[{name!r}] must consist of 'hidden', 'ffn_hidden' and sizes; got {axes}."
                )
    return experts


def is_of_network(config: Config, name: str) -> bool:
    """Tells whether a parameter is an expert's, or the shared one's."""
    return name in config.experts.dims or (
        name.startswith(SHARED) and name.removeprefix(SHARED) in config.experts.dims
    )


def check_names(argument: str, given: Iterable[Any], all_dims: Mapping[str, Any]) -> None:
    """Checks that an option by parameter is about parameters that the layer has.

    Raises:
      ValueError: it has a name that is none of them.
    """
    for name in given:
        if name not in all_dims:
            raise ValueError(
                f"{argument} must name parameters of this layer, {tuple(all_dims)}; got {name!r}."
            )
