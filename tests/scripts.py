"""Loads scripts that no package holds."""

from __future__ import annotations

import importlib.util
import pathlib
import types


def load(path: pathlib.Path) -> types.ModuleType:
    """Runs a script as a module, by its name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
