"""The named shapes that benchmarks run, and where each comes from."""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """One exchange: sizes per rank, in the library's words."""

    name: str
    num_ranks: int
    num_tokens: int
    hidden: int
    num_experts: int
    num_topk: int
    dtype: type[np.generic]
    capacity_factor: float
    source: str

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def capacity(self) -> int:
        return math.ceil(self.capacity_factor * self.num_tokens * self.num_topk)

    @property
    def num_choices(self) -> int:
        """Choices of all ranks: the rows that one exchange moves if none is dropped."""
        return self.num_ranks * self.num_tokens * self.num_topk

    @property
    def row_bytes(self) -> int:
        return self.hidden * np.dtype(self.dtype).itemsize

    def as_json(self) -> dict[str, int | str]:
        """Returns what tells this shape from others, for a record."""
        return {
            "shape": self.name,
            "num_ranks": self.num_ranks,
            "num_tokens": self.num_tokens,
            "hidden": self.hidden,
            "num_experts": self.num_experts,
            "num_topk": self.num_topk,
            "dtype": np.dtype(self.dtype).name,
            "capacity": self.capacity,
        }


SMALL = Shape(
    name="small",
    num_ranks=8,
    num_tokens=512,
    hidden=256,
    num_experts=32,
    num_topk=4,
    dtype=np.float32,
    capacity_factor=1.25,
    source="the 32 experts, 4 a token, of gpt-oss-20b (https://arxiv.org/abs/2508.10925) at a "
    "width that trains on a laptop",
)
DECODE = Shape(
    name="decode",
    num_ranks=8,
    num_tokens=128,
    hidden=2048,
    num_experts=64,
    num_topk=8,
    dtype=ml_dtypes.bfloat16,
    capacity_factor=1.25,
    source="OLMoE-1B-7B (https://arxiv.org/abs/2409.02060), with the 128 tokens a rank at which "
    "DeepEP reports decoding (https://github.com/deepseek-ai/DeepEP)",
)
TOKEN = dataclasses.replace(
    DECODE, name="token", num_tokens=1, source="OLMoE-1B-7B, one sequence a rank"
)
LARGE = Shape(
    name="large",
    num_ranks=8,
    num_tokens=1024,
    hidden=1024,
    num_experts=64,
    num_topk=8,
    dtype=np.float32,
    capacity_factor=1.25,
    source="OLMoE-1B-7B's experts (https://arxiv.org/abs/2409.02060) at half its width, with a "
    "training batch of one short sequence a rank",
)
PLAN64 = Shape(
    name="plan64",
    num_ranks=64,
    num_tokens=1024,
    hidden=7168,
    num_experts=256,
    num_topk=8,
    dtype=ml_dtypes.bfloat16,
    capacity_factor=1.25,
    source="DeepSeek-V3's training, 64 ranks along the expert axis "
    "(https://arxiv.org/abs/2412.19437); plans only, so its width is not used",
)

PINNED = Shape(
    name="pinned",
    num_ranks=2,
    num_tokens=1024,
    hidden=256,
    num_experts=8,
    num_topk=2,
    dtype=np.float32,
    capacity_factor=1.25,
    source="the 8 experts, 2 a token, of Mixtral (https://arxiv.org/abs/2401.04088) at a width "
    "that trains on a laptop",
)

EXCHANGE_SHAPES = {shape.name: shape for shape in (SMALL, DECODE, LARGE)}

_GPU_WIDE = Shape(
    name="wide",
    num_ranks=8,
    num_tokens=4096,
    hidden=7168,
    num_experts=256,
    num_topk=8,
    dtype=ml_dtypes.bfloat16,
    capacity_factor=1.25,
    source="DeepSeek-V3 (https://arxiv.org/abs/2412.19437), with the 4096 tokens a rank at which "
    "DeepEP reports training (https://github.com/deepseek-ai/DeepEP)",
)
_GPU_NARROW = dataclasses.replace(
    _GPU_WIDE,
    name="narrow",
    hidden=2048,
    num_experts=64,
    num_topk=4,
    source="the width and the choices of Qwen1.5-MoE-A2.7B "
    "(https://qwenlm.github.io/blog/qwen-moe/), with 64 experts",
)
_GPU_DECODE = 128

# The short ones first: a run that is cut off has them.
GPU_SHAPES = {
    shape.name: shape
    for shape in (
        dataclasses.replace(_GPU_NARROW, name="narrow-decode", num_tokens=_GPU_DECODE),
        dataclasses.replace(_GPU_WIDE, name="wide-decode", num_tokens=_GPU_DECODE),
        _GPU_NARROW,
        _GPU_WIDE,
    )
}
