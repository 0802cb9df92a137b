"""How devices are laid out, as a flag says it, and a model's state on them."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def parse_mesh(mesh: str | None, num_devices: int) -> tuple[int, int]:
    """Returns how many devices lie along the data and the expert axis.

    Args:
      mesh: both numbers, as in ``"2x4"``; None for all devices, two along data where they are even
        and more than two.
      num_devices: how many there are.

    Raises:
      ValueError: ``mesh`` is not two positive numbers, or they ask for more devices than there are.
    """
    if mesh is None:
        data = 2 if num_devices > 2 and num_devices % 2 == 0 else 1
        return data, num_devices // data
    sizes = mesh.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"--mesh must be two positive numbers, as in 2x4; got {mesh!r}.")
    data, expert = (int(size) for size in sizes)
    if data * expert > num_devices:
        raise ValueError(f"--mesh must not exceed the {num_devices} devices; got {mesh!r}.")
    return data, expert


def place_state(state: Any, mesh: Mesh) -> Any:
    """Copies to all devices of the mesh what the model has not put on them itself."""

    def place(x: jax.Array) -> jax.Array:
        is_placed = isinstance(x.sharding, NamedSharding)
        return x if is_placed else jax.device_put(x, NamedSharding(mesh, P()))

    return jax.tree.map(place, state)
