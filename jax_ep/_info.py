"""What runs here: versions, devices, and which implementation serves."""

from __future__ import annotations

import collections
import importlib.metadata
import platform

import jax

import jax_ep
from jax_ep import _fabrics, _native

_PACKAGES = ("jax", "jaxlib", "numpy", "flax", "jax-cuda13-plugin")


def info() -> str:
    """Describes this machine to a reader who wonders which implementation runs, and why.

    Starts JAX's backends, as it lists their devices.

    Returns:
      Lines of text in sections: versions, devices, implementations and the native library.
    """
    return "\n".join(
        f"{title}\n" + "\n".join(f"  {name:<20}{value}" for name, value in section.items())
        for title, section in {
            "versions": _versions(),
            "devices": _devices(),
            "implementations": _implementations(),
            "native library": _library(),
        }.items()
    )


def _versions() -> dict[str, str]:
    versions = {
        "jax_ep": jax_ep.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
    }
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _devices() -> dict[str, str]:
    kinds = collections.Counter(f"{d.platform}: {d.device_kind}" for d in jax.devices())
    local = len(jax.local_devices())
    return {
        "default backend": jax.default_backend(),
        "in all processes": ", ".join(f"{count} x {kind}" for kind, count in kinds.items()),
        "in this process": f"{local} (process {jax.process_index()} of {jax.process_count()})",
    }


def _implementations() -> dict[str, str]:
    reason = _native.unavailable_reason()
    fabrics = _fabrics.fabrics_for(_native.platform_here()) if reason is None else []
    return {
        "xla": "serves on every platform, in any number of processes",
        "native": "serves, in this order:" if reason is None else f"does not serve: {reason}",
        **{f"  {fabric.name}": fabric.serves for fabric in fabrics},
        "None": f"takes {'native where it serves' if reason is None else 'xla'}",
    }


def _library() -> dict[str, str]:
    try:
        return _native.library_info()
    except NotImplementedError as error:
        return {"unusable": str(error)}
