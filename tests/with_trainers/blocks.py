"""MaxText's own blocks of routed experts, small, on a mesh of 8 CPU devices, by either path."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from installed import installed
from maxtext.configs import pyconfig  # pyright: ignore[reportMissingImports]
from maxtext.layers import initializers, moe, quantizations  # pyright: ignore[reportMissingImports]
from maxtext.utils import maxtext_utils  # pyright: ignore[reportMissingImports]

from jax_ep.integrations import maxtext as adapter

BATCH, LENGTH, HIDDEN, FFN_HIDDEN, NUM_EXPERTS, NUM_TOPK = 8, 16, 16, 12, 16, 2

SMALL = {
    "override_model_config": True,
    "base_emb_dim": HIDDEN,
    "base_mlp_dim": FFN_HIDDEN,
    "base_moe_mlp_dim": FFN_HIDDEN,
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": NUM_TOPK,
    "max_target_length": LENGTH,
    "per_device_batch_size": 1,
    "dtype": "float32",
    "weight_dtype": "float32",
    "matmul_precision": "highest",
    "megablox": False,
    "load_balance_loss_weight": 0.01,
    "run_name": "blocks",
    "base_output_directory": "build",
    "enable_checkpointing": False,
}
FSDP_AND_EXPERT = {"ici_fsdp_parallelism": 2, "ici_expert_parallelism": 4}


@functools.cache
def make_config(model_name: str, **options: Any) -> Any:
    """Returns MaxText's configuration of a model, made small."""
    base = Path(pyconfig.__file__).parent / "base.yml"
    settings = {"model_name": model_name, **SMALL, **FSDP_AND_EXPERT, **options}
    return pyconfig.initialize(["", str(base), *(f"{k}={v}" for k, v in settings.items())])


class Block:
    """A block with parameters that are all different, and what to give it."""

    def __init__(self, model_name: str, force_dropless: bool = False, **options: Any) -> None:
        self.config = make_config(model_name, **options)
        self.mesh = maxtext_utils.get_mesh_from_config(self.config)
        with self.context():
            block = moe.RoutedMoE(
                config=self.config,
                num_experts=NUM_EXPERTS,
                num_experts_per_tok=self.config.num_experts_per_tok,
                mesh=self.mesh,
                kernel_init=initializers.nd_dense_init(1.0, "fan_in", "truncated_normal"),
                kernel_axes=("embed", None),
                rngs=nnx.Rngs(params=0),
                intermediate_dim=FFN_HIDDEN,
                dtype=self.config.dtype,
                weight_dtype=self.config.weight_dtype,
                quant=quantizations.configure_quantization(self.config),
                force_dropless=force_dropless,
            )
        self.graph, state = nnx.split(block)
        rng = np.random.default_rng(0)

        def draw(leaf: jax.Array) -> jax.Array:
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                return leaf
            return jnp.asarray(rng.standard_normal(leaf.shape) / 2, leaf.dtype)

        self.state = jax.tree.map(draw, state)
        self.x = jnp.asarray(rng.standard_normal((BATCH, LENGTH, HIDDEN)), jnp.float32)
        self.cotangent = jnp.asarray(rng.standard_normal(self.x.shape), jnp.float32)

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        with jax.set_mesh(self.mesh), linen.logical_axis_rules(self.config.logical_axis_rules):
            yield

    def apply(self, state: Any, x: jax.Array, **kwargs: Any) -> tuple[Any, Any]:
        """Returns output, loss and update of the bias, and what MaxText logs."""
        block = nnx.merge(self.graph, state)
        results = block(x, **kwargs)
        logged = nnx.pop(block, nnx.Intermediate)
        return results, nnx.to_pure_dict(logged)

    def run(self, x: jax.Array | None = None, **kwargs: Any) -> tuple[Any, Any]:
        with self.context():
            apply = jax.jit(self.apply)
            return apply(self.state, self.x if x is None else x, **kwargs)

    def route(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns MaxText's scores, with the router's bias and without, and its choices."""
        with self.context():
            block = nnx.merge(self.graph, self.state)
            biased, scores = block.gate(self.x)
            return biased, scores, block.get_topk(biased, scores)[1]

    def run_with_gradients(self, **kwargs: Any) -> tuple[Any, Any]:
        """Returns the results, and gradients of all that has some: parameters, and the input."""
        floats, others = {}, {}
        for path, leaf in nnx.to_flat_state(self.state):
            is_float = jnp.issubdtype(leaf.get_value().dtype, jnp.floating)
            (floats if is_float else others)[path] = leaf

        def objective(floats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            fresh = jax.tree.map(lambda leaf: leaf, others)  # counts of random numbers go up
            state = nnx.from_flat_state({**floats, **fresh})
            results, _ = self.apply(state, x, **kwargs)
            out, loss, _ = results
            total = jnp.vdot(out, self.cotangent)
            return total if loss is None else total + loss, results

        with self.context():
            grad = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
            (_, results), grads = jax.jit(grad)(floats, self.x)
        names = {"/".join(map(str, path)): leaf.get_value() for path, leaf in grads[0].items()}
        return results, {**names, "x": grads[1]}


ours = functools.partial(installed, adapter)


@contextlib.contextmanager
def dense() -> Iterator[None]:
    """Has blocks go MaxText's dense way, which takes the same arguments."""
    own = moe.RoutedMoE.sparse_matmul
    moe.RoutedMoE.sparse_matmul = moe.RoutedMoE.dense_matmul
    try:
        yield
    finally:
        moe.RoutedMoE.sparse_matmul = own
