"""Runs the tests that the arguments name on the package and library that Bazel built."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    # The import hook of an editable install would prefer the source tree and its library.
    sys.meta_path[:] = [hook for hook in sys.meta_path if "ScikitBuild" not in type(hook).__name__]
    package = importlib.util.find_spec("jax_ep")
    assert package is not None
    assert package.origin == str(Path.cwd() / "jax_ep" / "__init__.py"), package.origin
    sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
