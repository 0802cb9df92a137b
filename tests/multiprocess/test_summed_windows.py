"""Partial sums in the windows that GPUs of other processes read: the bits of the contract."""

from __future__ import annotations

import exchanges
import ml_dtypes
import numpy as np
import pytest
import strategies
from exchanges import Answers
from implementations import EMULATED, require
from strategies import Shape
from test_exchange import NATIVE

from jax_ep import _partial_sums
from jax_ep.testing import multiprocess

# Sums stand at rows, and, where there are more of these, by token.
SHAPES = {
    "by_row": Shape(num_ranks=8, num_tokens=9, num_topk=6, num_experts=16, hidden=33, capacity=40),
    "by_token": Shape(num_ranks=8, num_tokens=3, num_topk=4, num_experts=16, hidden=8),
}


@pytest.mark.skipif(not EMULATED, reason="on CPUs there are no partial sums")
@multiprocess(2, 4, timeout=240)
def test_two_processes() -> None:
    for used in (True, False):
        for dtype in (np.float32, ml_dtypes.bfloat16):
            _check(used, dtype)


@pytest.mark.skipif(not EMULATED, reason="on CPUs there are no partial sums")
@multiprocess(8, 1, timeout=240)
def test_eight_processes() -> None:
    _check(True, np.float32)


def _check(used: bool, dtype: type) -> None:
    require("native")
    _partial_sums.FORCED = used
    exchanges.program.cache_clear()
    for shape in SHAPES.values():
        for routing in (strategies.distinct, strategies.duplicates):
            result = Answers.of(NATIVE, shape, routing(shape), dtype)
            result.same_sum("out", result.inputs.rows, result.inputs.weights)
            result.same_sum("plain", result.inputs.rows)
            result.same_sum("dx", result.inputs.drows)
