"""Which rows of the table a run has, and what is marked by them."""

from __future__ import annotations

import os

import jax
import pytest
from implementations import ALL_ROWS, EMULATED, ROWS, Row, rows_for


@pytest.mark.parametrize(
    ("jax_platforms", "demanded", "want"),
    [
        ("cpu", False, {"cpu"}),
        ("cpu", True, {"cpu", "gpu"}),
        ("cuda", False, {"gpu"}),
        ("cuda,cpu", True, {"gpu"}),
        ("", False, {"cpu", "gpu"}),
        (None, False, {"cpu", "gpu"}),
        ("tpu", True, {"gpu"}),
    ],
)
def test_rows_of_other_platforms_are_left_out(
    jax_platforms: str | None, demanded: bool, want: set[str]
) -> None:
    """But never those that have to run: they are there to fail."""
    got = rows_for(jax_platforms, demanded)
    assert got == [row for row in ALL_ROWS if row.platform in want]


def test_emulated_gpus_leave_no_room_for_others() -> None:
    got = rows_for("cpu", False, emulated=True)
    assert got == [row for row in ALL_ROWS if row.platform == "emulated"]
    assert {row.backend for row in got} == {"cpu"}


def test_which_rows_are_left_out() -> None:
    """Says so, once for all tests."""
    left_out = [row for row in ALL_ROWS if row not in ROWS]
    assert EMULATED or jax.default_backend() not in {row.platform for row in left_out}
    if left_out:
        names = ", ".join(map(str, left_out))
        pytest.skip(f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} leaves out the rows {names}")


def test_rows_of_pure_jax_are_marked(row: Row, request: pytest.FixtureRequest) -> None:
    marked = request.node.get_closest_marker("xla") is not None
    assert marked == (row.implementation == "xla")


def test_names_of_pure_jax_are_marked(implementation: str, request: pytest.FixtureRequest) -> None:
    marked = request.node.get_closest_marker("xla") is not None
    assert marked == (implementation == "xla")
