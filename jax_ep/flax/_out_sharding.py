"""Where a user wants parameters to be stored, checked."""

import math
from collections.abc import Mapping
from typing import Any

from flax.core.spmd import get_pspec
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jax_ep.flax._config import Config
from jax_ep.flax._parameters import check_names, dims_of, shape_of
from jax_ep.flax._storage import computed_over, stored_over


def resolve_out_sharding(given: Any) -> tuple[tuple[str, P], ...]:
    """Returns the specs that a user gives, with what stands for logical axes in Flax's rules.

    Raises:
      TypeError: it is no mapping, or one of its values is none of axes.
    """
    if given is None:
        return ()
    if not isinstance(given, Mapping):
        raise TypeError(
            "out_sharding must be None or a mapping from parameters' names to PartitionSpecs; got "
            f"{given!r}."
        )
    return tuple((name, _resolve(name, spec)) for name, spec in given.items())


def _resolve(name: str, spec: Any) -> P:
    if isinstance(spec, P | tuple):
        resolved: P = get_pspec(P(*spec))
        named = [axis for entry in resolved for axis in (entry if _is_tuple(entry) else [entry])]
        if all(axis is None or isinstance(axis, str) for axis in named):
            return resolved
    raise TypeError(
        f"out_sharding[{name!r}] must be a PartitionSpec, or a tuple, of names of axes, tuples of "
        f"these, and None; got {spec!r}."
    )


def _is_tuple(entry: Any) -> bool:
    return isinstance(entry, tuple)


def check_out_sharding(config: Config, mesh: AbstractMesh) -> None:
    """Checks where a user wants parameters, and that the mesh in context, if any, has room there.

    Raises:
      ValueError: a name is no parameter's; a spec has too many entries, repeats an axis, or would
        have parts change places; or the mesh lacks an axis or does not divide what is cut over it.
    """
    all_dims = dims_of(config)
    check_names("out_sharding", dict(config.out_sharding), all_dims)
    for name, spec in config.out_sharding:
        shape = shape_of(config, all_dims[name])
        if len(spec) > len(shape):
            raise ValueError(
                f"out_sharding[{name!r}] must have at most {len(shape)} entries, for the shape "
                f"{list(shape)}; got {spec}."
            )
        _check_order(config, name, spec)
        if not mesh.empty:
            _check_fits(mesh, name, spec, shape)


def _check_order(config: Config, name: str, spec: P) -> None:
    computed = computed_over(config, name)
    stored = stored_over(spec, len(computed))
    named = [axis for axes in stored for axis in axes]
    if len(set(named)) < len(named):
        raise ValueError(f"out_sharding[{name!r}] must name each axis once; got {spec}.")
    own = {axis for axes in computed for axis in axes}
    for kept, cut in zip(stored, computed, strict=True):
        if kept[: len(cut)] != cut[: len(kept)] or own.intersection(kept[len(cut) :]):
            whole = P(*(axes or None for axes in computed))
            raise ValueError(
                f"out_sharding[{name!r}] must begin each entry as the layer computes, {whole}, and "
                "go on with axes that are not in there, or leave an entry out: else parts would "
                f"have to change places at every call; got {spec}."
            )


def _check_fits(mesh: AbstractMesh, name: str, spec: P, shape: tuple[int, ...]) -> None:
    for size, axes in zip(shape, stored_over(spec, len(shape)), strict=True):
        if missing := [axis for axis in axes if axis not in mesh.axis_names]:
            raise ValueError(
                f"out_sharding[{name!r}] must name axes of the mesh in context, {mesh.axis_names}, "
                "or logical ones that nnx.logical_axis_rules had one for when the layer was made; "
                f"got {spec}, without {missing}."
            )
        num_parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % num_parts:
            raise ValueError(
                f"out_sharding[{name!r}] must cut the shape {list(shape)} into equal parts; got "
                f"{spec}, which cuts {size} over the {num_parts} devices along {axes}."
            )
