"""Expert networks by name."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax

from jax_ep._checks import check_leading_axis, check_one_of
from jax_ep.experts import Experts, FeedForward, clamped_swiglu, geglu, relu2, swiglu

ExpertsName: TypeAlias = Literal["swiglu", "geglu", "clamped_swiglu", "relu2"]

_NAMED: dict[str, Experts] = {
    "swiglu": FeedForward(swiglu),
    "geglu": FeedForward(geglu),
    "clamped_swiglu": FeedForward(clamped_swiglu, has_bias=True),
    "relu2": FeedForward(relu2, is_gated=False),
}


def resolve_experts(experts: Any) -> Callable[..., Any]:
    """Returns the network of a name, or what is one.

    Raises:
      TypeError: it is neither a name nor callable.
      ValueError: nothing has this name.
    """
    if isinstance(experts, str):
        check_one_of("experts", experts, tuple(_NAMED))
        return _NAMED[experts]
    if not callable(experts):
        raise TypeError(f"experts must be one of {tuple(_NAMED)} or callable; got {experts!r}.")
    return experts


def check_weights(
    experts: Callable[..., jax.Array],
    weights: tuple[jax.Array, ...],
    x: jax.Array,
    num_local_experts: int,
) -> None:
    """Checks a network's parameters, as far as is known what they have to be.

    Raises:
      TypeError: one is no array; or, of a ``FeedForward``, their number or a dtype is wrong.
      ValueError: one does not lead with the local experts; or a ``FeedForward``'s shapes do not fit
        one another.
    """
    if isinstance(experts, FeedForward):
        experts.check_weights(weights, x, num_local_experts)
        return
    for i, weight in enumerate(weights):
        check_leading_axis(f"weights[{i}]", weight, num_local_experts, "num_local_experts")
