"""Encoding rows as a JAX primitive: how it is typed, batched and carried out."""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.interpreters import batching, mlir
from jaxtyping import Array, Float, Float32

from jax_ep import _fp8, _native_fp8
from jax_ep._compat import Primitive, result_type, run_primitive
from jax_ep._fabrics import platform_problem
from jax_ep._library import native_platform
from jax_ep._lowering import FFI_PLATFORMS
from jax_ep._types import Implementation, Platform


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How rows are encoded, as ``wire.encode`` is told, and what does it."""

    dtype: jnp.dtype
    block: int
    power_of_two: bool
    implementation: Implementation | None


def encode(
    encoding: Encoding, x: Float[Array, "*lead hidden"]
) -> tuple[Float[Array, "*lead hidden"], Float32[Array, "*lead num_blocks"]]:
    """Quantises rows as ``wire.encode`` says; it has no derivative."""
    rows, scales = _encode_p.bind(x, encoding=encoding)
    return rows, scales


def _types(x: Any, *, encoding: Encoding) -> list[Any]:
    count = (*x.shape[:-1], _fp8.num_blocks(x.shape[-1], encoding.block))
    return [result_type(x.shape, encoding.dtype, x), result_type(count, jnp.float32, x)]


def _lower(platform: str | None, ctx: Any, x: Any, *, encoding: Encoding) -> Any:
    run: Any = _fp8.encode_rows
    # XLA does not always compile a shard_map in which an empty operand goes to a foreign call.
    if encoding.implementation != "xla" and ctx.avals_in[0].size:
        name = native_platform(platform)
        problem = platform_problem(name)
        if problem is None:
            run = functools.partial(_native_fp8.encode_rows, cast(Platform, name))
        elif encoding.implementation == "native":
            raise NotImplementedError(f"implementation='native' cannot serve here: {problem}")
    run = functools.partial(
        run, dtype=encoding.dtype, block=encoding.block, power_of_two=encoding.power_of_two
    )
    return mlir.lower_fun(run, multiple_results=True)(ctx, x)


def _batch(
    operands: tuple[jax.Array], dims: tuple[int], *, encoding: Encoding
) -> tuple[list[jax.Array], list[int]]:
    # One more axis before the last.
    out = _encode_p.bind(jnp.moveaxis(operands[0], dims[0], 0), encoding=encoding)
    return out, [0] * len(out)


_encode_p = Primitive("jax_ep_encode_rows")
_encode_p.multiple_results = True
_encode_p.def_impl(functools.partial(run_primitive, _encode_p))
_encode_p.def_abstract_eval(_types)
batching.primitive_batchers[_encode_p] = _batch
for _platform, _name in (*FFI_PLATFORMS.items(), (None, None)):
    mlir.register_lowering(_encode_p, functools.partial(_lower, _platform), platform=_name)
