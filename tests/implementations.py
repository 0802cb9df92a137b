"""Every implementation on every fabric: one row each, and every test takes the row as a parameter.

A row turns a function of one rank into a function of all of them. The tests hand over NumPy arrays
with a leading axis of ranks and get such arrays back, whatever runs in between.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

import jax_ep
from jax_ep import _fabrics

AXIS = "expert"
DEFAULT_WAIT = 30.0
PerRank = Callable[..., Any]


def devices() -> list[Any]:
    """Returns all devices, those of several processes in turn: neighbors are in different ones."""
    by_process = [jax.local_devices(process) for process in range(jax.process_count())]
    return [device for place in zip(*by_process, strict=True) for device in place]


def over_devices(f: PerRank, num_ranks: int) -> PerRank:
    """Runs one rank on each of the first devices."""
    some = devices()[:num_ranks]
    mesh = jax.make_mesh((num_ranks,), (AXIS,), axis_types=(AxisType.Auto,), devices=some)

    def block(*args: Any) -> Any:
        out = f(*jax.tree.map(lambda a: a[0], args))
        return jax.tree.map(lambda a: a[None], out)

    spec = PartitionSpec(AXIS)
    return jax.shard_map(block, mesh=mesh, in_specs=spec, out_specs=spec)


def stacked(f: PerRank, num_ranks: int) -> PerRank:
    """Runs all ranks on one device."""
    return jax.vmap(f, axis_name=AXIS, axis_size=num_ranks)


def alone(f: PerRank, num_ranks: int) -> PerRank:
    """Runs the only rank, without an axis."""
    assert num_ranks == 1

    def block(*args: Any) -> Any:
        out = f(*jax.tree.map(lambda a: a[0], args))
        return jax.tree.map(lambda a: a[None], out)

    return block


@dataclasses.dataclass(frozen=True)
class Fabric:
    """How ranks meet, and for how many of them it serves."""

    name: str
    over_ranks: Callable[[PerRank, int], PerRank]
    max_ranks: int
    axis_name: str | None = AXIS


SHARD_MAP = Fabric("shard_map", over_devices, 8)
VMAP = Fabric("vmap", stacked, 64)
ONE = Fabric("one", alone, 1, axis_name=None)


@dataclasses.dataclass(frozen=True)
class Row:
    """One implementation on one fabric."""

    implementation: str
    fabric: Fabric
    exact: bool
    """Whether its rounding is the contract's bit for bit, or to the last place or two."""
    platform: str = "cpu"

    def __str__(self) -> str:
        names = (self.implementation, self.platform, self.fabric.name)
        return "-".join(name for name in names if name != "cpu")

    @property
    def backend(self) -> str:
        """The backend of JAX that runs it."""
        return "cpu" if self.platform == "emulated" else self.platform

    def require(self) -> None:
        """Skips the test where the row cannot run, or fails it if it had to."""
        require(self.implementation, self.backend)

    def serves(self, num_ranks: int) -> bool:
        return num_ranks <= self.fabric.max_ranks

    def over_ranks(self, f: PerRank, num_ranks: int) -> PerRank:
        """Makes ``f`` of one rank a function of all, on arrays with a leading axis of ranks."""
        return self.fabric.over_ranks(f, num_ranks)

    def jit(self, f: PerRank, num_ranks: int) -> PerRank:
        return jax.jit(self.over_ranks(f, num_ranks))

    @property
    def make_plan(self) -> Callable[..., jax_ep.Plan]:
        return functools.partial(
            jax_ep.make_plan,
            axis_name=self.fabric.axis_name,
            implementation=self.implementation,
        )


ALL_ROWS = [
    Row("xla", SHARD_MAP, exact=False),
    Row("xla", VMAP, exact=False),
    Row("xla", ONE, exact=False),
    Row("native", SHARD_MAP, exact=True),
    Row("native", VMAP, exact=True),
    Row("native", ONE, exact=True),
    Row("native", VMAP, exact=True, platform="gpu"),
    Row("native", ONE, exact=True, platform="gpu"),
    Row("native", SHARD_MAP, exact=True, platform="emulated"),
    Row("native", VMAP, exact=True, platform="emulated"),
    Row("native", ONE, exact=True, platform="emulated"),
]
EMULATED = os.environ.get("JAX_EP_EMULATED_GPUS")
"""The library in which CPU devices are emulated GPUs, where the tests are to run on these."""

FABRIC = os.environ.get("JAX_EP_FABRIC")
"""The fabric that carries what several devices exchange, where the tests are to run on this one."""

NAMES = ("xla", "native")


def prefer(name: str) -> None:
    """Has a fabric be chosen for whatever it serves."""
    _fabrics.FABRICS = tuple(sorted(_fabrics.FABRICS, key=lambda fabric: fabric.name != name))


def rows_for(jax_platforms: str | None, gpu_demanded: bool, emulated: bool = False) -> list[Row]:
    """Chooses the rows of the platform that JAX is told to use, and of GPUs if they have to run.

    The others could only be skipped, hundreds of times a run. `test_rows.py` names them once.
    """
    if emulated:
        return [row for row in ALL_ROWS if row.platform == "emulated"]
    if not jax_platforms:
        return [row for row in ALL_ROWS if row.platform != "emulated"]
    first = jax_platforms.split(",")[0]
    platforms = {"gpu" if first == "cuda" else first} | ({"gpu"} if gpu_demanded else set())
    return [row for row in ALL_ROWS if row.platform in platforms]


# To ask for the default backend would start it, before some tests' processes have set it up.
ROWS = rows_for(
    os.environ.get("JAX_PLATFORMS"), os.environ.get("JAX_EP_REQUIRE_GPU") == "1", bool(EMULATED)
)
if FABRIC:
    prefer(FABRIC)
    ROWS = [row for row in ROWS if row.implementation == "native" and row.fabric is SHARD_MAP]


def require(implementation: str, platform: str = "cpu") -> None:
    """Skips the test where the implementation cannot run, or fails it if it had to.

    It runs on the default backend. ``JAX_EP_REQUIRE_NATIVE=1`` says that native code for the CPU
    has to be there, ``JAX_EP_REQUIRE_GPU=1`` that a GPU and native code for it have to.
    """
    message = _what_is_missing(implementation, platform)
    if message is None:
        return
    demanded = "JAX_EP_REQUIRE_GPU" if platform == "gpu" else "JAX_EP_REQUIRE_NATIVE"
    if os.environ.get(demanded) == "1" and (platform == "gpu" or jax.default_backend() == "cpu"):
        pytest.fail(message)
    pytest.skip(message)


def _what_is_missing(implementation: str, platform: str) -> str | None:
    if (backend := jax.default_backend()) != platform:
        return f"this test is for the platform {platform!r}, and the default backend is {backend!r}"
    library = {"cpu": "libjax_ep_cpu.so", "gpu": "libjax_ep_cuda.so"}[platform]
    path = pathlib.Path(EMULATED or pathlib.Path(jax_ep.__file__).parent / library)
    if implementation == "native" and not path.is_file():
        return f"{path} was not built, so there is no native implementation to test."
    return None
