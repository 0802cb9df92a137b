"""Records what transformers' own expert blocks compute, for ``test_parity`` to compare with.

A developer runs it in an environment of its own, which the tests do without::

    python3.11 -m venv build/record
    build/record/bin/pip install transformers==5.24.0 torch==2.13.0 numpy==2.4.6
    build/record/bin/python tests/parity/record.py

Each case is one small block with random weights. Its file holds the configuration, the weights
under the block's own names, an input, the output in float32 and in bfloat16, and the gradients of
``sum(out * dout)`` in the input and in each parameter. The same versions write the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import pathlib
import zlib
from typing import Any

import numpy as np

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
HIDDEN, FFN_HIDDEN, NUM_EXPERTS, NUM_TOPK = 16, 12, 8, 2
BATCH = (2, 12)
VOCABULARY = 32


@dataclasses.dataclass(frozen=True)
class Case:
    """A block of one family.

    Attributes:
      block: its class, which is given the configuration and ``args``.
      options: of the configuration.
      gain: scales what comes before experts' activations, to reach where these clamp.
    """

    model_type: str
    block: str
    options: dict[str, Any]
    args: tuple[Any, ...] = ()
    gain: float = 1.0


def sizes(
    num_experts: str, ffn_hidden: str = "moe_intermediate_size", **options: Any
) -> dict[str, Any]:
    """Returns a family's options, with the sizes of all cases under the names that it has."""
    common = {"hidden_size": HIDDEN, "num_experts_per_tok": NUM_TOPK}
    return {**common, num_experts: NUM_EXPERTS, ffn_hidden: FFN_HIDDEN, **options}


DEEPSEEK_V3 = sizes(
    "n_routed_experts", n_group=4, topk_group=2, n_shared_experts=2, routed_scaling_factor=2.5
)
# With a limit that many values reach past.
DEEPSEEK_V4 = sizes(
    "n_routed_experts",
    vocab_size=VOCABULARY,
    swiglu_limit=1.0,
    num_hidden_layers=2,
    mlp_layer_types=["hash_moe", "moe"],
)
LONGCAT_FLASH = {
    "hidden_size": HIDDEN,
    "expert_ffn_hidden_size": FFN_HIDDEN,
    "n_routed_experts": NUM_EXPERTS,
    "zero_expert_num": 4,
    "moe_topk": NUM_TOPK,
}
NEMOTRON_H = sizes(
    "n_routed_experts",
    moe_latent_size=8,
    moe_shared_expert_intermediate_size=20,
    routed_scaling_factor=2.5,
    layers_block_type=["moe"],
)
CASES = {
    "mixtral": Case(
        "mixtral", "MixtralSparseMoeBlock", sizes("num_local_experts", "intermediate_size")
    ),
    "qwen2_moe": Case(
        "qwen2_moe",
        "Qwen2MoeSparseMoeBlock",
        sizes("num_experts", shared_expert_intermediate_size=20, norm_topk_prob=False),
    ),
    "qwen3_moe": Case(
        "qwen3_moe", "Qwen3MoeSparseMoeBlock", sizes("num_experts", norm_topk_prob=True)
    ),
    "qwen3_next": Case(
        "qwen3_next",
        "Qwen3NextSparseMoeBlock",
        sizes("num_experts", shared_expert_intermediate_size=20, norm_topk_prob=True),
    ),
    "deepseek_v3": Case("deepseek_v3", "DeepseekV3MoE", DEEPSEEK_V3 | {"norm_topk_prob": True}),
    "deepseek_v3_as_scored": Case(
        "deepseek_v3", "DeepseekV3MoE", DEEPSEEK_V3 | {"norm_topk_prob": False}
    ),
    "olmoe": Case(
        "olmoe",
        "OlmoeSparseMoeBlock",
        sizes("num_experts", "intermediate_size", norm_topk_prob=False),
    ),
    "gpt_oss": Case(
        "gpt_oss", "GptOssMLP", sizes("num_local_experts", "intermediate_size"), gain=4.0
    ),
    "llama4_text": Case(
        "llama4_text", "Llama4TextMoe", sizes("num_local_experts", "intermediate_size")
    ),
    "granitemoe": Case(
        "granitemoe", "GraniteMoeMoE", sizes("num_local_experts", "intermediate_size")
    ),
    "glm4_moe": Case(
        "glm4_moe",
        "Glm4MoeMoE",
        sizes("n_routed_experts", n_shared_experts=1, routed_scaling_factor=1.5),
    ),
    "minimax_m2": Case(
        "minimax_m2", "MiniMaxM2SparseMoeBlock", sizes("num_local_experts", "intermediate_size")
    ),
    "deepseek_v4": Case("deepseek_v4", "DeepseekV4SparseMoeBlock", DEEPSEEK_V4, (1,)),
    "deepseek_v4_hash": Case("deepseek_v4", "DeepseekV4SparseMoeBlock", DEEPSEEK_V4, (0,)),
    "longcat_flash": Case("longcat_flash", "LongcatFlashMoE", LONGCAT_FLASH),
    "nemotron_h": Case("nemotron_h", "NemotronHMoE", NEMOTRON_H),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=CASES, metavar="case", help="all, by default")
    names = parser.parse_args().names
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    FIXTURES.mkdir(exist_ok=True)
    for name in names:
        np.savez_compressed(FIXTURES / f"{name}.npz", **record(name, CASES[name]))


def record(name: str, case: Case) -> dict[str, np.ndarray]:
    """Returns the arrays of one file."""
    torch = importlib.import_module("torch")
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    config, block = make_block(case)
    draw_weights(rng, block, case.gain)
    x, ids = draw_tokens(rng, block)
    dout = bfloat16(rng.normal(size=x.shape))
    leaf = torch.tensor(x, requires_grad=True)
    out = call(block, leaf, ids)
    torch.sum(out * torch.tensor(dout)).backward()
    weights = {f"weight/{key}": value.numpy() for key, value in block.state_dict().items()}
    gradients = {
        f"gradient/{key}": value.grad.numpy()
        for key, value in block.named_parameters()
        if value.grad is not None
    }
    versions = [f"{module} {importlib.import_module(module).__version__}" for module in LIBRARIES]
    return {
        "config": np.array(json.dumps(config.to_dict(), sort_keys=True)),
        "versions": np.array(", ".join(versions)),
        "x": x,
        "ids": ids,
        "dout": dout,
        "out": out.detach().numpy(),
        "dx": leaf.grad.numpy(),
        "out_bfloat16": in_bfloat16(block, x, ids),
        **weights,
        **gradients,
    }


LIBRARIES = ("transformers", "torch", "numpy")


def make_block(case: Case) -> tuple[Any, Any]:
    transformers = importlib.import_module("transformers")
    config = transformers.AutoConfig.for_model(case.model_type, **case.options)
    # The loop over experts, and no kernel that is to compute the same.
    config._experts_implementation = "eager"
    folder = type(config).__module__.rpartition(".")[0]
    modeling = importlib.import_module(folder + ".modeling_" + folder.rpartition(".")[2])
    return config, getattr(modeling, case.block)(config, *case.args)


def draw_weights(rng: np.random.Generator, block: Any, gain: float) -> None:
    """Fills all of a block's arrays with numbers that bfloat16 has, too."""
    torch = importlib.import_module("torch")
    for name, value in block.state_dict().items():
        if value.dtype == torch.int64:  # the hash layers' table: distinct experts for each token
            drawn = rng.permuted(np.tile(np.arange(NUM_EXPERTS), (len(value), 1)), axis=1)
            drawn = drawn[:, : value.shape[1]]
        else:
            # A vector is a bias, and too small to choose by itself.
            scale = 0.2 if value.ndim == 1 else 0.4
            scale *= gain if "gate_up" in name else 1.0
            drawn = bfloat16(scale * rng.normal(size=value.shape))
        value.copy_(torch.tensor(drawn))


def draw_tokens(rng: np.random.Generator, block: Any) -> tuple[np.ndarray, np.ndarray]:
    """Draws tokens, and ids for them, that are sent to the same experts in bfloat16 too.

    A token whose choice rounding changes is no measure of how precisely the rest is computed.
    """
    num_tokens = BATCH[0] * BATCH[1]
    x = bfloat16(rng.normal(size=(1, 2 * num_tokens, HIDDEN)))
    ids = rng.integers(VOCABULARY, size=x.shape[:2])
    torch = importlib.import_module("torch")
    with torch.no_grad():
        exact = call(block, torch.tensor(x), ids).numpy()
    error = np.max(np.abs(in_bfloat16(block, x, ids) - exact), axis=-1)
    (same,) = np.nonzero(error[0] < np.max(np.abs(exact)) / 32)
    assert len(same) >= num_tokens, f"{len(same)} of {len(error[0])} tokens are left"
    same = same[:num_tokens]
    return x[0, same].reshape(*BATCH, HIDDEN), ids[0, same].reshape(BATCH)


def call(block: Any, x: Any, ids: np.ndarray) -> Any:
    """Returns the block's output alone, shaped as ``x``."""
    torch = importlib.import_module("torch")
    needs_ids = getattr(block, "is_hash", False)
    out = block(x.clone(), input_ids=torch.tensor(ids)) if needs_ids else block(x.clone())
    out = out[0] if isinstance(out, tuple) else out
    return out.reshape(x.shape)


def in_bfloat16(block: Any, x: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Returns the output if all of the arrays and the input are bfloat16."""
    torch = importlib.import_module("torch")
    with torch.no_grad():
        block.to(torch.bfloat16)
        out = call(block, torch.tensor(x, dtype=torch.bfloat16), ids).float().numpy()
        block.to(torch.float32)
    return out


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounds to numbers that bfloat16 has, which also take less room."""
    torch = importlib.import_module("torch")
    return torch.tensor(values).to(torch.bfloat16).float().numpy()


if __name__ == "__main__":
    main()
