"""Expert networks: what the rows that ``dispatch`` brings are turned into.

To ``moe`` and ``flax.MoE`` an expert network is a callable ``(rows, group_sizes, *weights)`` that
returns a row for each row: this module has those that models use, by name, and any other will do.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from jax_ep._checks import check_array, check_dtype, check_shape
from jax_ep._grouped_matmul import grouped_matmul

Dims: TypeAlias = Mapping[str, tuple[str | int, ...]]
"""By name, the axes of an expert's parameters: ``"hidden"``, ``"ffn_hidden"``, or a size."""


class Experts(Protocol):
    """An expert network of a layer that makes the parameters: hashable, as it is static.

    ``FeedForward`` is one; a frozen dataclass with these two makes another.
    """

    @property
    def dims(self) -> Dims:
        """The axes of one expert's parameters, in the order in which the call takes them.

        Over a ``tensor_axis`` the layer splits those named ``"ffn_hidden"`` and adds up the
        results; a parameter without one must be added to the result: it is zero on all tensor ranks
        but the first.
        """
        ...

    def __call__(self, rows: jax.Array, group_sizes: jax.Array, *weights: jax.Array) -> jax.Array:
        """Applies each group's expert to its rows; ``weights`` lead with the local experts."""
        ...


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """Experts of two layers: in, an activation, and out.

    The output for row ``v`` is ``activation(v @ w_gate, v @ w_up) @ w_down``, or without a gate
    ``activation(v @ w_up) @ w_down``, each product plus its bias where there are any. Called as
    ``network(rows, group_sizes, *weights)`` with weights in the order of ``dims``.

    Attributes:
      activation: of two arrays ``(gate, up)``, or of one where there is no gate; elementwise.
        Compared as functions are: keep one ``functools.partial``, as a new one compiles anew.
      is_gated: whether there is a gate.
      is_fused: whether gate and up are one parameter, ``w_gate_up`` [num_local_experts, hidden, 2,
        ffn_hidden], gate first, so that rows are read once.
      has_bias: whether products have biases: ``b_gate``, ``b_up`` (or ``b_gate_up``) and
        ``b_down``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax_ep.experts import FeedForward
      >>> network = FeedForward(jax.nn.relu, is_gated=False)
      >>> list(network.dims)
      ['w_up', 'w_down']
      >>> weights = jnp.array([[[2.0]], [[3.0]]])
      >>> network(jnp.array([[1.0], [1.0], [-1.0]]), jnp.array([1, 2]), weights, weights).tolist()
      [[4.0], [9.0], [0.0]]
    """

    activation: Callable[..., jax.Array]
    is_gated: bool = True
    is_fused: bool = False
    has_bias: bool = False

    def __post_init__(self) -> None:
        """Checks that the options suit one another.

        Raises:
          TypeError: ``activation`` cannot be called.
          ValueError: ``is_fused`` without a gate.
        """
        if not callable(self.activation):
            raise TypeError(f"activation must be callable; got {self.activation!r}.")
        if self.is_fused and not self.is_gated:
            raise ValueError("is_fused needs is_gated: it is gate and up that become one.")

    @property
    def dims(self) -> Dims:
        """The axes of one expert's parameters: matrices first, biases behind them."""
        inward: dict[str, tuple[str | int, ...]] = {"up": ("ffn_hidden",)}
        if self.is_fused:
            inward = {"gate_up": (2, "ffn_hidden")}
        elif self.is_gated:
            inward = {"gate": ("ffn_hidden",), "up": ("ffn_hidden",)}
        matrices: Dims = {
            **{f"w_{name}": ("hidden", *dims) for name, dims in inward.items()},
            "w_down": ("ffn_hidden", "hidden"),
        }
        if not self.has_bias:
            return matrices
        biases: Dims = {f"b_{name}": dims for name, dims in inward.items()}
        return {**matrices, **biases, "b_down": ("hidden",)}

    def __call__(
        self,
        rows: Float[Array, "capacity hidden"],
        group_sizes: Int32[Array, "num_local_experts"],
        *weights: Float[Array, "num_local_experts ..."],
    ) -> Float[Array, "capacity hidden"]:
        """Applies each group's expert to its rows.

        Args:
          rows: what ``dispatch`` returned; rows past the last group may hold anything.
          group_sizes: rows of each group, ``plan.group_sizes``.
          *weights: this rank's experts' parameters, in the order of ``dims``.

        Returns:
          As many rows, in the dtype of ``rows``. Those past the last group may hold anything.

        Raises:
          TypeError: another number of weights, or one that is no array or has another dtype.
          ValueError: shapes do not fit one another.
        """
        check_array("rows", rows, "capacity, hidden")
        check_array("group_sizes", group_sizes, "num_local_experts")
        self.check_weights(weights, rows, len(group_sizes))
        named = dict(zip(self.dims, weights, strict=True))

        def product(rows: jax.Array, name: str) -> jax.Array:
            matrices = named[f"w_{name}"]
            flat = matrices.reshape(*matrices.shape[:2], -1)
            out = grouped_matmul(rows, flat, group_sizes)
            if self.has_bias:
                out = add_bias(out, named[f"b_{name}"].reshape(len(flat), -1), group_sizes)
            return out

        if self.is_fused:
            both = product(rows, "gate_up").reshape(len(rows), 2, -1)
            inner = self.activation(both[:, 0], both[:, 1])
        elif self.is_gated:
            inner = self.activation(product(rows, "gate"), product(rows, "up"))
        else:
            inner = self.activation(product(rows, "up"))
        return product(checkpoint_name(inner, "jax_ep.hidden"), "down")

    def check_weights(
        self, weights: Sequence[jax.Array], rows: jax.Array, num_local_experts: int
    ) -> None:
        """Checks parameters against what they are for: tokens or rows, and so many experts.

        Raises:
          TypeError: another number of weights, or one that is no array or has another dtype.
          ValueError: shapes do not fit one another.
        """
        if len(weights) != len(self.dims):
            names = ", ".join(self.dims)
            raise TypeError(f"weights must be the {len(self.dims)} {names}; got {len(weights)}.")
        named = dict(zip(self.dims, weights, strict=True))
        first = next(iter(self.dims))
        check_array(first, named[first], _say(self.dims[first]))
        sizes = {"hidden": rows.shape[1], "ffn_hidden": named[first].shape[-1], "2": 2}
        for name, weight in named.items():
            dims = self.dims[name]
            check_array(name, weight, _say(dims))
            shape = (num_local_experts, *(sizes[str(dim)] for dim in dims))
            check_shape(name, weight, shape, _say(dims))
            check_dtype(name, weight, rows.dtype)


def _say(dims: tuple[str | int, ...]) -> str:
    return ", ".join(map(str, ("num_local_experts", *dims)))


def add_bias(
    rows: Float[Array, "capacity width"],
    bias: Float[Array, "num_local_experts width"],
    group_sizes: Int32[Array, "num_local_experts"],
) -> Float[Array, "capacity width"]:
    """Adds to each row the vector of the expert that its group belongs to.

    Local arithmetic. The gradient of ``bias`` is summed in float32 over each group's rows, in a
    fixed order.

    Args:
      rows: rows in groups; those past the last group stay as they are.
      bias: one vector per local expert, in the dtype of ``rows``.
      group_sizes: rows of each group.

    Returns:
      The sums, in the dtype of ``rows``.

    Raises:
      TypeError: an argument is no array or has another dtype than asked for.
      ValueError: shapes do not fit one another.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax_ep.experts import add_bias
      >>> bias = jnp.array([[1.0], [2.0]])
      >>> add_bias(jnp.zeros((4, 1)), bias, jnp.array([1, 2])).ravel().tolist()
      [1.0, 2.0, 2.0, 0.0]
    """
    check_array("rows", rows, "capacity, width")
    check_array("bias", bias, "num_local_experts, width")
    check_shape("bias", bias, (bias.shape[0], rows.shape[1]), "num_local_experts, width")
    # A product, and not a lookup: a lookup's gradient would add in no fixed order on GPUs, and
    # would take in rows that belong to nobody.
    ones = jnp.ones_like(rows, shape=(rows.shape[0], 1))
    return rows + grouped_matmul(ones, bias[:, None], group_sizes)


def swiglu(gate: Float[Array, "*rows"], up: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Returns ``silu(gate) * up``: https://arxiv.org/abs/2002.05202."""
    return jax.nn.silu(gate) * up


def geglu(gate: Float[Array, "*rows"], up: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Returns ``gelu(gate) * up``, by the tanh formula: https://arxiv.org/abs/2002.05202."""
    return jax.nn.gelu(gate, approximate=True) * up


def clamped_swiglu(
    gate: Float[Array, "*rows"],
    up: Float[Array, "*rows"],
    *,
    limit: float = 7.0,
    alpha: float = 1.702,
) -> Float[Array, "*rows"]:
    """Returns gpt-oss's gate, ``g * sigmoid(alpha * g) * (u + 1)``, of clamped arguments.

    ``g`` is ``gate`` up to ``limit``, and ``u`` is ``up`` between ``-limit`` and ``limit``:
    https://arxiv.org/abs/2508.10925.

    Args:
      gate: the gate's product.
      up: the other one.
      limit: where they are clamped.
      alpha: the slope of the sigmoid.

    Returns:
      The gated product, in the dtype of its arguments.
    """
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


def relu2(up: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Returns ``relu(up) ** 2``: https://arxiv.org/abs/2109.08668."""
    return jnp.square(jax.nn.relu(up))
