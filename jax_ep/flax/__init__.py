"""Flax layers on global arrays. Imported on its own: the rest of the library needs no Flax."""

from jax_ep.flax._layer import MoE as MoE
from jax_ep.flax._layer import RouterBias as RouterBias
