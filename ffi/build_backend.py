"""The build backend: scikit-build-core, which compiles native code where there is a compiler.

Elsewhere the package is installed as pure JAX, and says so. A compiler that is there and does not
work is an error, and so is one that is missing where options of CMake's ask for native code.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping

from scikit_build_core import build
from scikit_build_core.build import build_sdist as build_sdist
from scikit_build_core.build import get_requires_for_build_sdist as get_requires_for_build_sdist

Settings = Mapping[str, str | list[str]] | None

# The FFI headers fix the oldest jaxlib that loads the library: newer ones accept older handlers,
# never the other way round. Hence the exact pins.
HEADERS = ["jax==0.10.2", "jaxlib==0.10.2"]
# Those that CMake looks for.
COMPILERS = ("c++", "g++", "clang++", "CC", "icpx", "icx", "xlC", "aCC")
SYSTEMS = {"linux": "Linux", "darwin": "macOS"}
MACHINES = ("x86_64", "amd64", "arm64", "aarch64")


def why_pure(settings: Mapping[str, str | list[str]]) -> str | None:
    """Returns why native code is left out, or None if it is not.

    Args:
      settings: what the installer was told. Whoever sets an option of CMake's wants it to run.
    """
    if any("cmake" in name for name in settings):
        return None
    if sys.platform not in SYSTEMS:
        return f"native code is for {' and '.join(SYSTEMS.values())}, and this is {sys.platform}"
    if (machine := platform.machine().lower()) not in MACHINES:
        return f"native code is for x86-64 and arm64, and this is {machine}"
    if not _has_compiler():
        return (
            f"CXX is not set, and none of {', '.join(COMPILERS)} is on the PATH; with a C++20 "
            "compiler, install it again"
        )
    return None


def _has_compiler() -> bool:
    if os.environ.get("CXX"):
        return True
    if not any(map(shutil.which, COMPILERS)):
        return False
    # macOS has a c++ from the start, which only asks for a compiler to be installed.
    if sys.platform == "darwin":
        asked = subprocess.run(["xcode-select", "--print-path"], check=False, capture_output=True)
        return asked.returncode == 0
    return True


def _complete(settings: Settings, *, say: bool = False) -> dict[str, str | list[str]]:
    """Adds to what the installer was told that CMake is not to run, where it is not."""
    told = dict(settings or {})
    if (reason := why_pure(told)) is None:
        return told
    if say:
        print(f"jax_ep is installed as pure JAX, without native code: {reason}.", file=sys.stderr)
    return told | {"wheel.cmake": "false"}


def _with_headers(requires: list[str], settings: Settings) -> list[str]:
    is_pure = _complete(settings).get("wheel.cmake") == "false"
    return requires if is_pure else [*requires, *HEADERS]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Returns what a wheel is built with: without native code, no other JAX."""
    requires = build.get_requires_for_build_wheel(_complete(config_settings))
    return _with_headers(requires, config_settings)


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """Returns what an editable install is built with, likewise."""
    requires = build.get_requires_for_build_editable(_complete(config_settings))
    return _with_headers(requires, config_settings)


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    """Writes a wheel's metadata; returns the name of their folder."""
    return build.prepare_metadata_for_build_wheel(metadata_directory, _complete(config_settings))


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: Settings = None
) -> str:
    """Writes an editable install's metadata; returns the name of their folder."""
    return build.prepare_metadata_for_build_editable(metadata_directory, _complete(config_settings))


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Builds a wheel, and says if it is without native code; returns its name."""
    told = _complete(config_settings, say=True)
    return build.build_wheel(wheel_directory, told, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """Builds the wheel of an editable install, likewise."""
    told = _complete(config_settings, say=True)
    return build.build_editable(wheel_directory, told, metadata_directory)
