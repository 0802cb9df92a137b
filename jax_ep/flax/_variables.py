"""The layer's variables, as they are made: what draws each, and where it is put."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer

from jax_ep.flax._config import Config
from jax_ep.flax._parameters import check_names, dims_of, shape_of
from jax_ep.flax._storage import specs_of

KernelInit: TypeAlias = Initializer | Mapping[str, Initializer]


class RouterBias(nnx.Variable):
    """The bias of a router that has one: state, but no ``nnx.Param``: no optimizer trains it."""


def make_variables(
    config: Config,
    kernel_init: KernelInit | None,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
) -> dict[str, nnx.Variable]:
    """Makes what the layer holds, and has Flax put it where it is stored if there is a mesh.

    Raises:
      TypeError: ``kernel_init`` is neither an initializer nor a mapping to some.
      ValueError: it has a name that no parameter has.
    """
    inits, variables = _initializers(config, kernel_init), dict[str, nnx.Variable]()
    # Without a mesh Flax refuses the annotation.
    specs = {} if jax.sharding.get_abstract_mesh().empty else specs_of(config)
    for name, dims in dims_of(config).items():
        value = inits[name](rngs.params(), shape_of(config, dims), dtype)
        sharded: dict[str, Any] = {"out_sharding": specs[name]} if specs else {}
        variables[name] = nnx.Param(value, **sharded)
    if config.router is not None and config.router.has_bias:
        variables["router_bias"] = RouterBias(jnp.zeros(config.num_choosable, jnp.float32))
    return variables


def _initializers(config: Config, kernel_init: KernelInit | None) -> dict[str, Initializer]:
    """Returns what draws each trained parameter: what a user gives, or a default."""
    all_dims = dims_of(config)
    inits = {name: _default_init(dims) for name, dims in all_dims.items()}
    if kernel_init is None:
        return inits
    if isinstance(kernel_init, Mapping):
        check_names("kernel_init", kernel_init, all_dims)
        given = dict(kernel_init)
    else:
        given = {name: kernel_init for name, dims in all_dims.items() if _matrix(dims)}
    if not all(callable(init) for init in given.values()):
        raise TypeError(
            "kernel_init must be None, an initializer, or a mapping to these from parameters' "
            f"names; got {kernel_init!r}."
        )
    return {**inits, **given}


def _default_init(dims: tuple[str | int, ...]) -> Initializer:
    """Returns LeCun's normal initializer of each expert's matrices; biases begin as zero."""
    if not (matrix := _matrix(dims)):
        return jax.nn.initializers.zeros
    batch = tuple(i for i in range(len(dims)) if i not in matrix)
    return jax.nn.initializers.lecun_normal(
        in_axis=matrix[0], out_axis=matrix[-1], batch_axis=batch
    )


def _matrix(dims: tuple[str | int, ...]) -> list[int]:
    """Returns the axes of each expert's matrices, or none where it has but vectors.

    A matrix goes from the first axis to the last; what is between counts further ones.
    """
    matrix = [
        i
        for i, dim in enumerate(dims)
        if dim != "num_experts" and (not isinstance(dim, int) or i + 1 == len(dims))
    ]
    return matrix if len(matrix) > 1 else []
