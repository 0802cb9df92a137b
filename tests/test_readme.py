"""Every Python block of the README runs as it stands."""

from __future__ import annotations

import contextlib
import io
import pathlib
import re

import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)


def test_there_are_blocks() -> None:
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_block_runs(block: str) -> None:
    """What a line prints stands behind it as a comment: ``print(...)  # 2.0``."""
    if "jax_ep.flax" in block:
        pytest.importorskip("flax")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, str(README), "exec"), {"__name__": "readme"})
    promised = re.findall(r"^print\(.*\)\s*# (.+)$", block, re.MULTILINE)
    assert printed.getvalue().splitlines() == promised
