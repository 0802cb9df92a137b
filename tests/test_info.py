"""``python -m jax_ep info`` says which implementation serves, and why the other does not."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import jax
import pytest
from implementations import require

import jax_ep
from jax_ep import _fabrics, _info, _library
from jax_ep.testing import multiprocess


def test_command_prints_the_report() -> None:
    command = [sys.executable, "-m", "jax_ep", "info"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    assert printed == _info.info() + "\n"


def test_unknown_command_is_refused() -> None:
    command = [sys.executable, "-m", "jax_ep", "nonsense"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 2
    assert "invalid choice: 'nonsense'" in done.stderr


def test_versions_and_devices() -> None:
    lines = _lines()
    assert lines["jax_ep"] == jax_ep.__version__
    assert lines["jax"] == importlib.metadata.version("jax")
    assert lines["jaxlib"] == importlib.metadata.version("jaxlib")
    assert lines["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert lines["in all processes"] == f"{jax.device_count()} x cpu: cpu"
    assert lines["in this process"] == "8 (process 0 of 1)"


def test_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_info, "_PACKAGES", ("no-such-package",))
    assert _lines()["no-such-package"] == "not installed"


def test_native_serves_where_it_is_built() -> None:
    require("native")
    lines = _lines()
    _check_that_native_serves(lines)
    assert lines["None"] == "takes native where it serves"
    assert lines["path"] == str(_library.library_path("cpu"))
    assert lines["ffi_version"].startswith("0.")
    assert lines["instruction_set"]


def test_native_says_why_it_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fabrics, "native_problem", lambda _: "the needle")
    lines = _lines()
    assert lines["native"] == "does not serve: the needle"
    assert lines["None"] == "takes xla"
    assert lines["unusable"] == "the needle"


def test_several_processes_are_told() -> None:
    require("native")
    _check_in_two_processes()


@multiprocess(2, 3)
def _check_in_two_processes() -> None:
    lines = _lines()
    assert lines["in all processes"] == "6 x cpu: cpu"
    assert lines["in this process"] == f"3 (process {jax.process_index()} of 2)"
    _check_that_native_serves(lines)


def _check_that_native_serves(lines: dict[str, str]) -> None:
    assert lines["native"] == "serves, in this order:"
    for fabric in _fabrics.FABRICS:
        if fabric.platform == "cpu":
            assert lines[fabric.name] == fabric.serves


def _lines() -> dict[str, str]:
    """Returns the report's lines by their first words."""
    lines = [line for line in _info.info().splitlines() if line.startswith("  ")]
    return {line[2:22].strip(): line[22:] for line in lines}
