"""Whether this process's GPUs run the library for them: asked once, and said in words."""

from __future__ import annotations

import contextlib
import ctypes
import json
import re
import types
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import EMULATED, require

import jax_ep
from jax_ep import _fabrics, _foreign, _info, _library, _native, _refusals

if EMULATED:
    pytest.skip("devices here are emulated GPUs, which anything runs on", allow_module_level=True)

T, K, E, H = 6, 2, 8, 3
CUDA, ROCM = "PJRT C API\ncuda 13000", "PJRT C API\nrocm 70000"


class Library:
    """Stands in for the library for GPUs: it was built, loads, and says what it is told to."""

    def __init__(self, problem: str = "") -> None:
        self.problem = problem
        self.asked: list[list[int]] = []

    def jax_ep_cuda_problem(self, devices, num_devices: int, text, num_bytes: int) -> int:
        assert num_bytes == len(text)
        self.asked.append(list(devices))
        assert num_devices == len(devices)
        text.value = self.problem.encode()
        return int(self.problem != "")

    def jax_ep_ffi_minor_version(self) -> int:
        return 3

    def jax_ep_cuda_version(self) -> int:
        return 13010

    def jax_ep_strangers(self, devices, num_devices: int, strangers) -> int:
        """Has a GPU read the memory of those with the same parity alone."""
        odd = [n for n in devices[:num_devices] if n % 2]
        even = [n for n in devices[:num_devices] if not n % 2]
        if not (odd and even):
            return 0
        strangers[0], strangers[1] = even[0], odd[0]
        return 1

    def jax_ep_handlers(self) -> bytes:
        signatures = _fabrics.signatures("gpu").items()
        handlers = {name: {"stages": {}, **signature} for name, signature in signatures}
        return json.dumps(handlers).encode()

    def jax_ep_max_topk(self) -> int:
        return 32

    def jax_ep_plan_workspace(self, *_: int) -> int:
        return 7


def gpus(runtime: str, *numbers: int) -> list[types.SimpleNamespace]:
    client = types.SimpleNamespace(platform_version=runtime)
    return [
        types.SimpleNamespace(client=client, platform="gpu", local_hardware_id=n) for n in numbers
    ]


def forget() -> None:
    for cached in (
        _library.library_problem,
        _library.native_problem,
        _library.describe_handlers,
        _library.gpu_peers_problem,
        _library.warn_once,
        _fabrics._mismatch,
    ):
        cached.cache_clear()


class Machine:
    """A process whose JAX has GPUs, and a library for them, as a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
        self.patch = monkeypatch
        self.file = tmp_path / "library.so"
        self.file.touch()

    def has(self, library: Library, *gpus: types.SimpleNamespace) -> Library:
        of_cpu, path_of_cpu = _library.library("cpu"), _library.library_path("cpu")
        which = lambda platform: library if platform == "gpu" else of_cpu  # noqa: E731
        self.patch.setattr(_library, "library", which)
        self.patch.setattr(_fabrics, "library", which)
        self.patch.setattr(_refusals, "library", which)
        self.patch.setattr(
            _library,
            "library_path",
            lambda platform: self.file if platform == "gpu" else path_of_cpu,
        )
        self.patch.setattr(_library, "local_gpus", lambda: list(gpus))
        if gpus:
            self.patch.setattr(_native, "trace_platform", lambda: "gpu")
        forget()
        return library


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[Machine]:
    require("native")
    yield Machine(monkeypatch, tmp_path)
    monkeypatch.undo()
    forget()


def layer(topk_idx: jax.Array, x: jax.Array, implementation: str | None = None) -> jax.Array:
    plan = jax_ep.make_plan(topk_idx, num_experts=E, implementation=implementation)
    return jax_ep.combine(jax_ep.dispatch(x, plan), plan)


def inputs() -> tuple[jax.Array, jax.Array]:
    return jnp.zeros((T, K), jnp.int32), jnp.ones((T, H))


def lowered_for_cuda(**options) -> str:
    f = lambda *args: layer(*args, **options)  # noqa: E731
    return jax.jit(f).trace(*inputs()).lower(lowering_platforms=("cuda",)).as_text()


def test_a_library_that_is_not_built_comes_with_the_command_that_builds_it(
    machine: Machine,
) -> None:
    machine.has(Library(), *gpus(CUDA, 0))
    machine.file.unlink()
    command = "`pip install -C cmake.define.JAX_EP_CUDA=ON .` builds it"
    with pytest.raises(NotImplementedError, match=command):
        jax_ep.make_plan(inputs()[0], num_experts=E, implementation="native")
    assert command in _info.info()


def test_gpus_that_run_it_are_asked_once(machine: Machine) -> None:
    library = machine.has(Library(), *gpus(CUDA, 2, 5))
    for _ in range(2):
        assert "jax_ep_plan_stacked" in lowered_for_cuda()
    assert library.asked == [[2, 5]]


def test_without_gpus_nobody_is_asked(machine: Machine) -> None:
    """Programs are lowered and exported for GPUs on machines that have none."""
    library = machine.has(Library("never said"))
    assert "jax_ep_plan_stacked" in lowered_for_cuda()
    assert library.asked == []


@pytest.mark.parametrize(
    ("runtime", "problem", "said"),
    [
        (CUDA, "the driver is too old", "the driver is too old"),
        (ROCM, "", "for CUDA's GPUs, and those here run rocm 70000"),
    ],
    ids=["driver", "rocm"],
)
def test_gpus_that_do_not_run_it(machine: Machine, runtime: str, problem: str, said: str) -> None:
    library = machine.has(Library(problem), *gpus(runtime, 0))
    with pytest.warns(RuntimeWarning, match=said):
        plan = jax_ep.make_plan(inputs()[0], num_experts=E)
    assert plan.implementation == "xla"
    # Said once: another warning would be an error.
    assert "jax_ep_plan" not in lowered_for_cuda()
    assert library.asked == ([[0]] if runtime == CUDA else [])
    with pytest.raises(NotImplementedError, match=said):
        jax_ep.make_plan(inputs()[0], num_experts=E, implementation="native")


def test_a_program_that_is_lowered_for_gpus_elsewhere_is_warned_of(machine: Machine) -> None:
    """What is traced for the CPU may be lowered for a GPU: by whoever places its arguments."""
    machine.has(Library("no code for it"), *gpus(CUDA, 0))
    machine.patch.setattr(_native, "trace_platform", lambda: "cpu")
    with pytest.warns(RuntimeWarning, match="no code for it"):
        first = lowered_for_cuda()
    assert "jax_ep_plan" not in first + lowered_for_cuda()
    with pytest.raises(NotImplementedError, match="no code for it"):
        lowered_for_cuda(implementation="native")


def test_info_says_which_gpus_cannot_read_each_other(machine: Machine) -> None:
    machine.has(Library(), *gpus(CUDA, 0, 2))
    assert re.search("cuda_version +13.1", _info.info())
    assert re.search("gpus +each can read the memory of all", _info.info())
    machine.has(Library(), *gpus(CUDA, 0, 1))
    assert re.search("gpus +GPU 0 cannot read the memory of GPU 1 of this process", _info.info())


def test_a_cpu_device_beside_gpus_is_served_by_its_own_library(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.has(Library(), *gpus(CUDA, 0))
    monkeypatch.setattr(_foreign, "register_handlers", register_of_the_cpu)
    topk_idx, x = jax.device_put(inputs(), jax.devices("cpu")[1])
    program = jax.jit(layer).lower(topk_idx, x)
    assert "jax_ep_plan_stacked" in program.as_text()
    np.testing.assert_array_equal(program.compile()(topk_idx, x), K * np.ones((T, H)))


def register_of_the_cpu(platform: str) -> None:
    assert platform == "cpu"
    _library.register_handlers("cpu")


def test_a_built_library_says_that_there_is_no_driver() -> None:
    """The library itself, where it was built and there is no GPU for it."""
    path = _library.library_path("gpu")
    if not path.exists():
        pytest.skip(f"{path} was not built")
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        pytest.skip("there is a driver here")
    text = ctypes.create_string_buffer(64)
    assert ctypes.CDLL(str(path)).jax_ep_cuda_problem((ctypes.c_int * 1)(0), 1, text, 64) == 1
    assert text.value == b"there is no CUDA driver"
