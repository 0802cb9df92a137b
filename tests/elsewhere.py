"""Another process, which has JAX and the library and nothing of what a test has traced."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import textwrap


def run_elsewhere(source: str, folder: pathlib.Path) -> None:
    """Runs a program that is given the folder, and fails the test if it fails."""
    script = folder / "load.py"
    script.write_text(textwrap.dedent(source))
    child = subprocess.run(
        [sys.executable, "-S", str(script), str(folder)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.returncode == 0, child.stderr
