"""Every documented mistake raises where the program is traced, naming argument and value."""

from __future__ import annotations

import fractions
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from implementations import AXIS, ROWS, VMAP, Row

import jax_ep

TOPK_IDX = np.zeros((6, 3), np.int32)


def raises(error: type[Exception], argument: str, given: object):
    """Expects a message that names the argument and what was given, a shape in any brackets."""
    value = re.escape(str(given).strip("()").rstrip(","))
    name = rf"(?<!\w){re.escape(argument)}(?!\w)"
    return pytest.raises(error, match=rf"(?s){name}.*(?<!\w){value}(?!\w)")


@pytest.mark.parametrize(
    ("changes", "error", "argument", "given"),
    [
        ({"num_experts": 0}, ValueError, "num_experts", "0"),
        ({"num_experts": -8}, ValueError, "num_experts", "-8"),
        ({"num_experts": 8.0}, TypeError, "num_experts", "8.0"),
        ({"capacity": 0}, ValueError, "capacity", "0"),
        ({"capacity": -3}, ValueError, "capacity", "-3"),
        ({"capacity": 2.5}, TypeError, "capacity", "2.5"),
        ({"alignment": 0}, ValueError, "alignment", "0"),
        ({"alignment": 1.5}, TypeError, "alignment", "1.5"),
        ({"alignment": 4, "capacity": 23}, ValueError, "capacity", "23"),
        ({"ranks_per_node": 0}, ValueError, "ranks_per_node", "0"),
        ({"ranks_per_node": 2.0}, TypeError, "ranks_per_node", "2.0"),
        ({"ranks_per_node": 2}, ValueError, "ranks_per_node", "2"),
        ({"tail": "ones"}, ValueError, "tail", "ones"),
        ({"implementation": "mpi"}, ValueError, "implementation", "mpi"),
        ({"axis_name": "nowhere"}, ValueError, "axis_name", "nowhere"),
        ({"axis_name": 3}, TypeError, "axis_name", "3"),
        ({"axis_name": ()}, ValueError, "axis_name", "()"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_make_plan(changes: dict, error: type[Exception], argument: str, given: object) -> None:
    with raises(error, argument, given):
        jax_ep.make_plan(TOPK_IDX, **{"num_experts": 8, **changes})


@pytest.mark.parametrize(
    ("topk_idx", "error", "given"),
    [
        (np.zeros(6, np.int32), ValueError, (6,)),
        (np.zeros((2, 6, 3), np.int32), ValueError, (2, 6, 3)),
        (np.zeros((6, 3), np.float32), TypeError, "float32"),
        (np.zeros((6, 3), np.uint8), TypeError, "uint8"),
    ],
)
def test_topk_idx(topk_idx: np.ndarray, error: type[Exception], given: object) -> None:
    with raises(error, "topk_idx", given):
        jax_ep.make_plan(topk_idx, num_experts=8)


def test_experts_must_divide_among_the_ranks(ranks_row: Row) -> None:
    """It is the number of ranks of the axis that counts: the message names it too."""
    program = ranks_row.jit(lambda idx: ranks_row.make_plan(idx, num_experts=10).kept, 4)
    with raises(ValueError, "num_experts", "10") as caught:
        program(np.zeros((4, 6, 3), np.int32))
    assert "4" in str(caught.value)


def test_axis_of_another_name(ranks_row: Row) -> None:
    program = ranks_row.jit(
        lambda idx: (
            jax_ep.make_plan(
                idx, num_experts=8, axis_name="model", implementation=ranks_row.implementation
            ).kept
        ),
        4,
    )
    with raises(ValueError, "axis_name", "model"):
        program(np.zeros((4, 6, 3), np.int32))


def test_axis_given_twice(implementation: str) -> None:
    with raises(ValueError, "axis_name", "expert"):
        jax.vmap(
            lambda idx: (
                jax_ep.make_plan(
                    idx, num_experts=8, axis_name=(AXIS, AXIS), implementation=implementation
                ).kept
            ),
            axis_name=AXIS,
        )(np.zeros((4, 6, 3), np.int32))


def plan() -> jax_ep.Plan:
    return jax_ep.make_plan(TOPK_IDX, num_experts=8, capacity=20, implementation="xla")


@pytest.mark.parametrize(
    ("x", "error", "given"),
    [
        (np.zeros((), np.float32), ValueError, ()),
        (np.zeros((5, 7), np.float32), ValueError, (5, 7)),
        ((), TypeError, "()"),
        (np.zeros((6, 7), np.complex64), TypeError, "complex64"),
    ],
)
def test_dispatch(x: np.ndarray, error: type[Exception], given: object) -> None:
    with raises(error, "x", given):
        jax_ep.dispatch(x, plan())


@pytest.mark.parametrize(
    ("rows", "error", "given"),
    [
        (np.zeros(20, np.float32), ValueError, (20,)),
        (np.zeros((21, 7), np.float32), ValueError, (21, 7)),
        (np.zeros((20, 7), np.int32), TypeError, "int32"),
        (np.zeros((20, 7), ml_dtypes.float8_e4m3fn), TypeError, "float8_e4m3fn"),
        (np.zeros((20, 7), ml_dtypes.float8_e5m2), TypeError, "float8_e5m2"),
        (np.zeros((20, 7), np.complex64), TypeError, "complex64"),
    ],
)
def test_combine(rows: np.ndarray, error: type[Exception], given: object) -> None:
    with raises(error, "rows", given):
        jax_ep.combine(rows, plan())


@pytest.mark.parametrize(
    ("weights", "error", "given"),
    [
        (np.zeros((6, 2), np.float32), ValueError, (6, 2)),
        (np.zeros(18, np.float32), ValueError, (18,)),
        (np.zeros((6, 3), np.int32), TypeError, "int32"),
        (np.zeros((6, 3), ml_dtypes.bfloat16), TypeError, "bfloat16"),
    ],
)
def test_topk_weights(weights: np.ndarray, error: type[Exception], given: object) -> None:
    with raises(error, "topk_weights", given):
        jax_ep.combine(np.zeros((20, 7), np.float32), plan(), weights)


def test_plan_must_be_a_plan() -> None:
    with raises(TypeError, "plan", "dict"):
        jax_ep.dispatch(np.zeros((6, 7), np.float32), {})  # pyright: ignore[reportArgumentType]
    with raises(TypeError, "plan", "NoneType"):
        jax_ep.combine(np.zeros((6, 7), np.float32), None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("changes", "argument", "given"),
    [
        ({"num_ranks": 3}, "num_experts", "16"),
        ({"num_ranks": 0}, "num_ranks", "0"),
        ({"num_tokens": -1}, "num_tokens", "-1"),
        ({"num_topk": 0}, "num_topk", "0"),
        ({"num_experts": 0}, "num_experts", "0"),
        ({"factor": 0.0}, "factor", "0.0"),
        ({"factor": -1.5}, "factor", "-1.5"),
        ({"factor": float("nan")}, "factor", "nan"),
        ({"factor": float("inf")}, "factor", "inf"),
        ({"alignment": 0}, "alignment", "0"),
    ],
    ids=str,
)
def test_suggest_capacity(changes: dict, argument: str, given: object) -> None:
    arguments = {"num_tokens": 32, "num_topk": 4, "num_experts": 16, "num_ranks": 4, "factor": 1.25}
    with raises(ValueError, argument, given):
        jax_ep.suggest_capacity(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        *[(ValueError, bad) for bad in (0.0, -1.0, 1e-9, 0.00099, 0, math.nan, math.inf, 10**400)],
        *[(TypeError, bad) for bad in (True, False, np.True_, None, "30", 1j, [30.0])],
    ],
    ids=lambda value: str(value)[:30],
)
def test_set_wait_timeout(wait_timeout: float, error: type[Exception], seconds: object) -> None:
    required = "finite and at least 0.001" if error is ValueError else "a real number"
    with pytest.raises(
        error, match=rf"^seconds must be {required}; got {re.escape(repr(seconds))}"
    ):
        jax_ep.set_wait_timeout(seconds)
    assert jax_ep.set_wait_timeout(wait_timeout) == wait_timeout, "it was not changed"


@pytest.mark.parametrize(
    "seconds", [0.001, 1, np.float32(2), np.int64(3), fractions.Fraction(5, 2)]
)
def test_set_wait_timeout_takes_real_numbers(wait_timeout: float, seconds: float) -> None:
    jax_ep.set_wait_timeout(seconds)
    assert jax_ep.set_wait_timeout(wait_timeout) == float(seconds)


@pytest.mark.parametrize("row", [row for row in ROWS if row.fabric is VMAP], ids=str)
def test_a_plan_of_ranks_is_of_no_use_outside_them(row: Row) -> None:
    """A plan made under the axis cannot be used where that axis is gone."""
    row.require()

    def all_ranks(topk_idx):
        return row.make_plan(topk_idx, num_experts=8)

    plans = jax.vmap(all_ranks, axis_name=AXIS)(np.zeros((4, 6, 3), np.int32))
    one = jax.tree.map(lambda a: a[0], plans)
    with raises(ValueError, f"axis_name {AXIS!r} of 4 ranks", "none"):
        jax_ep.dispatch(jnp.zeros((6, 7)), one)


WITHOUT_LIBRARY = """
    import warnings
    import numpy as np
    import jax_ep

    topk_idx = np.zeros((6, 3), np.int32)
    try:
        jax_ep.make_plan(topk_idx, num_experts=8, implementation="native")
    except NotImplementedError as error:
        print("asked:", error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plans = [jax_ep.make_plan(topk_idx, num_experts=8) for _ in range(2)]
    print("served by:", *(plan.implementation for plan in plans))
    print("warnings:", *(str(w.message) for w in caught if "jax_ep" in str(w.message)), sep="\\n- ")
"""


@pytest.fixture(params=["missing", "broken"])
def without_library(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> list[str]:
    """Runs a copy of the package whose native library is missing or cannot be loaded."""
    source = pathlib.Path(jax_ep.__file__).parent
    copy = shutil.copytree(source, tmp_path / "jax_ep", ignore=shutil.ignore_patterns("*.so"))
    if request.param == "broken":
        (copy / "libjax_ep_cpu.so").write_bytes(b"no library at all")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(WITHOUT_LIBRARY))
    # With -S an editable install of the package does not come before the copy; the packages that
    # it needs are found by their folder.
    packages = sysconfig.get_path("purelib")
    child = subprocess.run(
        [sys.executable, "-S", "-W", "error", str(script)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), packages])},
    )
    assert child.returncode == 0, child.stderr
    return child.stdout.splitlines()


def test_without_the_native_library(without_library: list[str]) -> None:
    """Asked for, it is an error that says why; not asked for, one warning and xla serves."""
    asked, served, _, *warnings = without_library
    assert asked.startswith("asked:")
    assert "native" in asked
    assert "libjax_ep_cpu.so" in asked
    assert served == "served by: xla xla"
    assert len(warnings) == 1
    assert "libjax_ep_cpu.so" in warnings[0]
