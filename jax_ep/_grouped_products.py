"""The products behind ``grouped_matmul`` as a JAX primitive that is differentiable to any order.

With ``g`` the group of row ``i``, all three come from one form that is linear in each array: the
sum over ``i`` of ``rows[i] @ weights[g] @ result[i]``. Leaving one array out gives the product by
that name: ``result[i]`` is ``rows[i] @ weights[g]``, ``rows[i]`` is ``weights[g] @ result[i]``, and
``weights[g]`` sums ``outer(rows[i], result[i])``. So each derivative of one is another.
"""

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from jax_ep._compat import Primitive, result_type, run_primitive, vary_together
from jax_ep._ragged_dot import ragged_matmul, ragged_outer
from jax_ep._row_blocks import matmul_blocks, outer_blocks

Factor: TypeAlias = Literal["rows", "weights", "result"]

_FACTORS: tuple[Factor, ...] = ("rows", "weights", "result")
_BLOCKS = {
    "result": partial(matmul_blocks, transpose=False),
    # The operands stand in the order of _FACTORS.
    "rows": lambda weights, result, sizes: matmul_blocks(result, weights, sizes, transpose=True),
    "weights": outer_blocks,
}
_RAGGED = {
    "result": partial(ragged_matmul, transpose=False),
    "rows": lambda weights, result, sizes: ragged_matmul(result, weights, sizes, transpose=True),
    "weights": ragged_outer,
}

_product_p = Primitive("jax_ep_grouped_product")


def grouped_product(
    of: Factor, first: jax.Array, second: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    """Computes one of the three arrays' products from the two others.

    Each array leads with a stack axis, as in ``matmul_blocks``. Rows past the last group are zero
    in what is returned, and what is given may hold anything there.

    Args:
      of: the array that the form is left without.
      first: of rows, weights and result the first that is given.
      second: the other one.
      group_sizes: as in ``grouped_matmul``.

    Returns:
      The product in the dtype of the operands, summed in at least float32.
    """
    operands = vary_together([first, second, group_sizes])
    return _product_p.bind(*operands, of=of)


def _given(of: Factor) -> tuple[Factor, ...]:
    """Names the first two operands of a product."""
    return tuple(factor for factor in _FACTORS if factor != of)


@_product_p.def_abstract_eval
def _type_of_result(first: Any, second: Any, group_sizes: Any, *, of: Factor) -> Any:
    stack, num_groups = group_sizes.shape
    if of == "weights":
        shape = (stack, num_groups, first.shape[2], second.shape[2])
    elif of == "rows":
        shape = (*second.shape[:2], first.shape[2])
    else:
        shape = (*first.shape[:2], second.shape[3])
    return result_type(shape, first.dtype, first)


def _derive(
    primals: Sequence[jax.Array], tangents: Sequence[Any], *, of: Factor
) -> tuple[jax.Array, Any]:
    first, second, group_sizes = primals
    out = _product_p.bind(*primals, of=of)
    terms = []
    if not isinstance(tangents[0], ad.Zero):
        terms.append(grouped_product(of, tangents[0], second, group_sizes))
    if not isinstance(tangents[1], ad.Zero):
        terms.append(grouped_product(of, first, tangents[1], group_sizes))
    return out, reduce(ad.add_jaxvals, terms) if terms else jnp.zeros_like(out)


def _transpose(cotangent: Any, *operands: Any, of: Factor) -> list[Any]:
    transposed: list[Any] = [None] * len(operands)
    [linear] = (i for i, operand in enumerate(operands) if ad.is_undefined_primal(operand))
    if isinstance(cotangent, ad.Zero):
        return transposed
    wanted, other = _given(of)[linear], _given(of)[1 - linear]
    factors = {of: cotangent, other: operands[1 - linear]}
    first, second = (factors[name] for name in _given(wanted))
    back = grouped_product(wanted, first, second, operands[2])
    if operands[linear].aval.shape[0] < back.shape[0]:  # Weights that the whole stack shares.
        back = jnp.sum(back, axis=0, keepdims=True)
    transposed[linear] = back
    return transposed


def _fold_vmap(
    operands: Sequence[jax.Array], dims: Sequence[int | None], *, of: Factor
) -> tuple[jax.Array, int]:
    """Folds the mapped axis into the stack.

    Left to itself, ``vmap`` would run every rank's loop for as long as the longest one's and turn
    slices into gathers. Weights that are the same for all stay one copy.
    """
    [size] = {x.shape[dim] for x, dim in zip(operands, dims, strict=True) if dim is not None}
    stack = operands[2].shape[1 if dims[2] == 0 else 0]
    folded = [
        x if dim is None and name == "weights" and len(x) == 1 else _fold(x, dim, (size, stack))
        for name, x, dim in zip((*_given(of), "group_sizes"), operands, dims, strict=True)
    ]
    out = grouped_product(of, *folded)
    return out.reshape(size, stack, *out.shape[1:]), 0


def _fold(x: jax.Array, dim: int | None, stacks: tuple[int, int]) -> jax.Array:
    x = x[None] if dim is None else jnp.moveaxis(x, dim, 0)
    return jnp.broadcast_to(x, (*stacks, *x.shape[2:])).reshape(-1, *x.shape[2:])


_product_p.def_impl(partial(run_primitive, _product_p))
ad.primitive_jvps[_product_p] = _derive
ad.primitive_transposes[_product_p] = _transpose
batching.primitive_batchers[_product_p] = _fold_vmap
for _platform, _products in (("cpu", _BLOCKS), (None, _RAGGED)):
    mlir.register_lowering(
        _product_p,
        mlir.lower_fun(lambda *xs, of, by=_products: by[of](*xs), multiple_results=False),
        platform=_platform,
    )
