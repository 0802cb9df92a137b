"""Flax layers on global arrays. Imported on its own: the rest of the library needs no Flax."""

try:
    import flax as _flax  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "jax_ep.flax needs Flax: install it by `pip install 'jax_ep[flax]'`.", name="flax"
    ) from error

from jax_ep.flax._layer import MoE as MoE
from jax_ep.flax._variables import RouterBias as RouterBias
