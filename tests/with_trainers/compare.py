"""How far results are from a trainer's own."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def assert_close(
    got: Mapping[str, jax.Array], want: Mapping[str, jax.Array], limit: float = 1e-6
) -> None:
    """Compares arrays by name: the greatest error, over the greatest value."""
    assert got.keys() == want.keys()
    errors = {
        name: float(jnp.max(jnp.abs(got[name] - want[name])) / jnp.max(jnp.abs(want[name])))
        for name in want
        if jnp.any(want[name])
    }
    silent = {name for name in want if name not in errors and jnp.any(got[name])}
    assert not silent, f"zero in the trainer's: {silent}"
    assert all(error < limit for error in errors.values()), errors  # NaN is not
