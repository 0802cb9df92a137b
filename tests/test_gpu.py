"""What only a GPU shows beyond the table of rows, on whatever devices native code serves here."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
import oracle
import pytest
import strategies
from exchanges import Answers, expected_fields, same_numbers
from implementations import ROWS, VMAP, Row
from layers import SHAPE, Problem, close
from strategies import Shape

import jax_ep

# What a graph leaves behind for its next replay may show in one of many.
REPLAYS, EMULATED_REPLAYS = 1000, 20
STACKED = [row for row in ROWS if row.implementation == "native" and row.fabric is VMAP]
EVERY_16_BITS = np.arange(2**16, dtype=np.uint16).reshape(1, 256, 256)


# Rows of each unit that kernels copy, more tokens than a warp plans at a time, choices that are
# dropped, and padding. A sanitizer is to look at all kernels while they run on these.
AWKWARD = [
    Shape(num_tokens=70, hidden=hidden, num_experts=16, capacity=120, alignment=4, tail=tail)
    for hidden, tail in ((1, "zero"), (3, "uninitialized"), (8, "uninitialized"), (136, "zero"))
]


@pytest.fixture(params=STACKED, ids=str)
def stacked_row(request: pytest.FixtureRequest) -> Row:
    """Native code for ranks stacked on one device."""
    request.param.require()
    return request.param


def there_and_back(row: Row) -> Callable[..., Any]:
    def replayed(x, topk_idx, weights):
        plan = row.make_plan(topk_idx, num_experts=SHAPE.num_experts, capacity=SHAPE.capacity)
        return jax_ep.combine(jax_ep.dispatch(x, plan), plan, weights)

    return row.jit(replayed, SHAPE.num_ranks)


def test_replays_with_changing_inputs(stacked_row: Row) -> None:
    """XLA may record a program into a CUDA graph: then that is run again on other choices."""
    program = there_and_back(stacked_row)
    operands, results = [], []
    for seed in range(8):
        problem = Problem.of(seed)
        kept = SHAPE.plan(problem.topk_idx).kept
        want = np.where(kept, problem.weights, 0).sum(axis=2, keepdims=True) * problem.x
        operands.append(jax.device_put(problem.args[:3]))
        results.append(np.asarray(program(*operands[-1])))
        close(results[-1], want)
    assert len({result.tobytes() for result in results}) == len(results)
    for turn in range(EMULATED_REPLAYS if stacked_row.platform == "emulated" else REPLAYS):
        i = turn * 5 % len(operands)
        same_numbers(np.asarray(program(*operands[i])), results[i], f"replay {turn}")


def test_programs_are_recorded_into_graphs(stacked_row: Row) -> None:
    """XLA says in its dumps what became of a program, where ``XLA_FLAGS`` has it write them."""
    folder = re.search(r"--xla_dump_to=(\S+)", os.environ.get("XLA_FLAGS", ""))
    if stacked_row.platform != "gpu" or folder is None:
        pytest.skip("whether XLA records graphs is known of GPUs alone, and with --xla_dump_to")
    jax.block_until_ready(there_and_back(stacked_row)(*Problem.of(0).args[:3]))
    dumps = pathlib.Path(folder[1]).glob("*replayed*thunk_sequence*.txt")
    recorded = [kinds_in_graphs(dump.read_text()) for dump in dumps]
    assert max(kinds.count("kCustomCall") for kinds in recorded) == 3


def kinds_in_graphs(dump: str) -> list[str]:
    """Returns the kinds of what is in the CUDA graphs of a dump, whose lines are indented so."""
    kinds, graph = [], None
    for line in dump.splitlines():
        thunk = re.match(r"(\s*)\d+: (k\w+)", line)
        if thunk is None:
            continue
        if graph is not None and len(thunk[1]) > graph:
            kinds.append(thunk[2])
        else:
            graph = len(thunk[1]) if thunk[2] == "kCommandBuffer" else None
    return kinds


def test_dumps_are_understood() -> None:
    dump = """
    000: kKernel       (address_space: 0) fusion
    001: kCommandBuffer
      000: kCustomCall (address_space: 0) jax_ep_plan_stacked
      001: kKernel
    002: kCustomCall
    """
    assert kinds_in_graphs(dump) == ["kCustomCall", "kKernel"]


def test_ranks_on_the_second_device(stacked_row: Row) -> None:
    """Kernels run on the device that XLA calls them for, not on the first."""
    if len(jax.devices()) < 2:
        pytest.skip("there is one device here")
    program = there_and_back(stacked_row)
    args = Problem.of(3).args[:3]
    want = np.asarray(program(*jax.device_put(args, jax.devices()[0])))
    got = program(*jax.device_put(args, jax.devices()[1]))
    assert got.devices() == {jax.devices()[1]}
    same_numbers(np.asarray(got), want, "device 1")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("shape", AWKWARD, ids=lambda shape: f"width_{shape.hidden}")
def test_awkward_shapes(stacked_row: Row, shape: Shape, dtype: type) -> None:
    """Forward and backward, in one program each."""
    result = Answers.of(stacked_row, shape, strategies.duplicates(shape), dtype)
    assert not result.plan.kept.all()
    for name in expected_fields(result.plan):
        result.same(name)
    for name in ("sent", "drows", "plain_drows"):
        result.same_rows(name)
    result.same_sum("dx", result.inputs.drows)
    result.same_sum("out", result.inputs.rows, result.inputs.weights)
    result.same_sum("plain", result.inputs.rows)
    result.close_dots()


def check_numbers(row: Row, rows: np.ndarray, weights: np.ndarray) -> None:
    """Compares sums over one row each, with a weight and without, and rows that are scaled."""
    topk_idx = np.zeros((*rows.shape[:2], 1), np.int32)

    def per_rank(topk_idx, rows, weights):
        plan = row.make_plan(topk_idx, num_experts=1)
        out, pull = jax.vjp(lambda rows: jax_ep.combine(rows, plan, weights), rows)
        return out, pull(rows)[0], jax_ep.combine(rows, plan)

    out, scaled, plain = map(np.asarray, row.jit(per_rank, 1)(topk_idx, rows, weights))
    plan = oracle.plan(topk_idx, 1)
    with np.errstate(all="ignore"):
        same_numbers(out, oracle.combine(rows, plan, weights), "sum of one weighted row")
        same_numbers(scaled, (weights * rows.astype(np.float32)).astype(rows.dtype), "scaled row")
        same_numbers(plain, oracle.combine(rows, plan), "sum of one row")


def draw_weights(num_tokens: int, seed: int) -> np.ndarray:
    """Draws factors that take products to ties, to denormals and past the largest number."""
    rng = np.random.default_rng(seed)
    some = np.array([1, -1, 0.5, 0.75, 1 + 2**-8, 1 + 2**-9, 1 / 3], np.float32)
    return np.ldexp(rng.choice(some, (1, num_tokens, 1)), rng.integers(-40, 40, (1, num_tokens, 1)))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_every_number_of_16_bits(stacked_row: Row, dtype: type) -> None:
    """Each is read, and what comes of it is rounded, as the contract says."""
    rows = EVERY_16_BITS.view(dtype)
    check_numbers(stacked_row, rows, np.ones((1, 256, 1), np.float32))
    for seed in range(4):
        check_numbers(stacked_row, rows, draw_weights(256, seed))


def test_any_bits_of_float32(stacked_row: Row) -> None:
    rng = np.random.default_rng(11)
    rows = rng.integers(0, 2**32, (1, 256, 256), np.uint32).view(np.float32)
    check_numbers(stacked_row, rows, draw_weights(256, 5))
