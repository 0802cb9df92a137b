"""Trains a small Mixtral by MaxText's own training loop, whose experts exchange tokens by jax_ep.

Runs on eight CPU devices, with what ``make trainers-test`` installs; settings of MaxText's may be
given, and replace those here::

    PYTHONPATH=. build/trainers-venv/bin/python examples/maxtext_train.py
    PYTHONPATH=. build/trainers-venv/bin/python examples/maxtext_train.py model_name=qwen3-30b-a3b
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

if "XLA_FLAGS" not in os.environ:
    # Before JAX starts: it reads this once.
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from maxtext.configs import pyconfig  # pyright: ignore[reportMissingImports]
from maxtext.trainers.pre_train import train  # pyright: ignore[reportMissingImports]

from jax_ep.integrations.maxtext import install

MODEL = {
    "model_name": "mixtral-8x7b",
    "override_model_config": True,
    "base_num_decoder_layers": 2,
    "base_emb_dim": 64,
    "base_mlp_dim": 48,
    "base_moe_mlp_dim": 48,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 4,
    "head_dim": 16,
    "vocab_size": 256,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "load_balance_loss_weight": 0.01,
    "attention": "dot_product",
    "dtype": "float32",
}
MESH = {"ici_fsdp_parallelism": 2, "ici_expert_parallelism": 4}
TRAINING = {
    "steps": 10,
    "learning_rate": 3e-3,
    "per_device_batch_size": 1,
    "max_target_length": 64,
    "dataset_type": "synthetic",
    # Rows of a device's buffer of received tokens, over the mean; what finds no room is dropped.
    "ragged_buffer_factor": 1.5,
}
NOTHING_ELSE = {
    "run_name": "jax_ep",
    "enable_checkpointing": False,
    "enable_goodput_recording": False,
    "enable_tensorboard": False,
}


def read_losses(metrics_file: Path) -> list[float]:
    """Reads the loss of each step from the file that MaxText writes."""
    lines = metrics_file.read_text().splitlines()
    return [json.loads(line)["learning/loss"] for line in lines]


def main(arguments: list[str]) -> None:
    """Trains, and prints the loss of each step."""
    given = dict(argument.split("=", 1) for argument in arguments)
    base = Path(pyconfig.__file__).parent / "base.yml"
    with tempfile.TemporaryDirectory() as folder:
        places = {"base_output_directory": folder, "metrics_file": f"{folder}/metrics.jsonl"}
        settings: dict[str, Any] = {**MODEL, **MESH, **TRAINING, **NOTHING_ELSE, **places, **given}
        install()
        train.main(["", str(base), *(f"{name}={value}" for name, value in settings.items())])
        for step, loss in enumerate(read_losses(Path(settings["metrics_file"]))):
            print(f"step {step}: loss {loss:.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
