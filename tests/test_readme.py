"""Every Python block of the README and of the pages in docs runs as it stands."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import re
import subprocess
import sys

import pytest
from implementations import EMULATED, require

from jax_ep.testing._cluster import free_port

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    block
    for page in PAGES
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
]


def test_there_are_blocks() -> None:
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_block_runs(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a line prints stands behind it as a comment: ``print(...)  # 2.0``."""
    if "jax_ep.flax" in block:
        pytest.importorskip("flax")
    if EMULATED and "jax_ep.record()" in block:
        pytest.skip("on GPUs an exchange is recorded twice")
    monkeypatch.setattr(sys, "argv", ["readme"])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block, "a page", "exec"), {"__name__": "readme"})
    promised = re.findall(r"^print\(.*\)\s*# (.+)$", block, re.MULTILINE)
    assert printed.getvalue().splitlines() == promised


@pytest.mark.long
def test_the_block_of_several_processes_runs_in_two(tmp_path: pathlib.Path) -> None:
    require("native")
    (block,) = (block for block in BLOCKS if "initialize" in block)
    script = tmp_path / "readme.py"
    script.write_text(block.replace("9876", str(free_port())))
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    children = [
        subprocess.Popen([sys.executable, str(script), process], stdout=subprocess.PIPE, env=env)
        for process in ("0", "1")
    ]
    try:
        printed = [child.communicate(timeout=100)[0].decode().splitlines() for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    # The collectives of XLA's say that they have connected.
    assert [lines[-1] for lines in printed] == ["2.0", "2.0"]
