"""``python -m jax_ep info`` says which implementation serves, and why the other does not."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import EMULATED, require

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


def test_a_library_that_is_not_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, forget: None
) -> None:
    """The package is whole without it; one warning and ``info`` say how to get it."""
    monkeypatch.setattr(_library, "library_path", lambda _: tmp_path / "libjax_ep_cpu.so")
    how = "with a C++20 compiler on Linux or macOS, `pip install .` builds it"
    x, weights = jnp.ones((4, 8)), jnp.ones((2, 8, 8))
    arrays = (x, jnp.zeros((4, 1), jnp.int32), jnp.ones((4, 1)), weights, weights, weights)
    said = f"jax_ep uses implementation='xla': .*{re.escape(how)}"
    with pytest.warns(RuntimeWarning, match=said):
        jax_ep.moe(*arrays, num_experts=2)
    # Said once: another warning would be an error.
    out, plan = jax_ep.moe(*arrays, num_experts=2)
    assert plan.implementation == "xla"
    np.testing.assert_allclose(out, 64 * jax.nn.silu(8.0), rtol=1e-5)
    lines = _lines()
    assert lines["None"] == "takes xla"
    assert how in lines["unusable"]


def test_the_library_for_gpus_in_a_package_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, forget: None
) -> None:
    """A release has it there: beside jax_ep's modules there is none then."""
    if _library.library_path("gpu").exists():
        pytest.skip("the library for GPUs was built here, and comes first")
    package = tmp_path / "jax_ep_cuda13"
    installed = tmp_path / "jax_ep_cuda13-0.0.1.dist-info"
    for folder in (package, installed):
        folder.mkdir()
    (package / "__init__.py").touch()
    (package / "libjax_ep_cuda.so").touch()
    metadata = installed / "METADATA"
    metadata.write_text("Metadata-Version: 2.4\nName: jax_ep_cuda13\nVersion: 0.0.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert _library.library_path("gpu") == package / "libjax_ep_cuda.so"
    said = (
        f"the native library must be that of jax_ep {jax_ep.__version__}; jax_ep_cuda13 0.0.1 is "
        f"installed: `pip install jax_ep_cuda13=={jax_ep.__version__}`"
    )
    assert _library.library_problem("gpu") == said
    metadata.write_text(metadata.read_text().replace("0.0.1", jax_ep.__version__))
    _library.library_problem.cache_clear()
    assert "does not load" in str(_library.library_problem("gpu"))


@pytest.fixture
def forget() -> Iterator[None]:
    """Has the library be looked for anew, in the test and after it."""
    if EMULATED:
        pytest.skip("emulated GPUs have a library of their own, which is found otherwise")
    cached = (_library.library_problem, _library.native_problem, _library.warn_once)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


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
