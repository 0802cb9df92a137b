"""The native libraries: loads them, registers their handlers, says what they are."""

import ctypes
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import threading
import warnings
from collections.abc import Sequence
from typing import Any, get_args

import jax

from jax_ep._compat import ffi_minor_version, local_gpus
from jax_ep._types import Platform

_FILES: dict[Platform, str] = {"cpu": "libjax_ep_cpu.so", "gpu": "libjax_ep_cuda.so"}
_BUILDS: dict[Platform, str] = {
    "cpu": "with a C++20 compiler on Linux or macOS, `pip install .` builds it",
    "gpu": "`pip install -C cmake.define.JAX_EP_CUDA=ON .` builds it",
}
_GPU_PACKAGE = "jax_ep_cuda13"
"""What a release has the library for GPUs in."""
_FFI_PLATFORMS: dict[Platform, str] = {"cpu": "cpu", "gpu": "CUDA"}
# For tests: a library of the GPU's code in which XLA's CPU devices are emulated GPUs. It takes the
# place of both libraries.
_EMULATED = os.environ.get("JAX_EP_EMULATED_GPUS")
_register_lock = threading.Lock()


def native_platform(platform: str | None) -> str | None:
    """Returns whose native code serves a platform of JAX: its own, or that of emulated GPUs."""
    return "gpu" if _EMULATED and platform == "cpu" else platform


def _jax_platform(platform: Platform) -> Platform:
    """Returns whose devices run a platform's native code: its own, or those that emulate it."""
    return "cpu" if _EMULATED and platform == "gpu" else platform


def library_path(platform: Platform) -> pathlib.Path:
    """Returns where a platform's native library is expected.

    That is next to this file. Where it is not, the one for GPUs may be in a package of its own.
    """
    if _EMULATED and platform == "gpu":
        return pathlib.Path(_EMULATED)
    path = pathlib.Path(__file__).with_name(_FILES[platform])
    if platform == "gpu" and not path.exists():
        package = importlib.util.find_spec(_GPU_PACKAGE)
        if package is not None and package.origin is not None:
            return pathlib.Path(package.origin).with_name(path.name)
    return path


@functools.cache
def library(platform: Platform) -> ctypes.CDLL:
    """Loads a platform's library."""
    loaded = ctypes.CDLL(str(library_path(platform)))
    loaded.jax_ep_ffi_minor_version.restype = ctypes.c_int
    loaded.jax_ep_handlers.restype = ctypes.c_char_p
    if platform == "gpu":
        loaded.jax_ep_cuda_version.restype = ctypes.c_int
        loaded.jax_ep_max_peers.restype = ctypes.c_int64
        loaded.jax_ep_max_topk.restype = ctypes.c_int64
        loaded.jax_ep_plan_workspace.restype = ctypes.c_int64
        loaded.jax_ep_plan_workspace.argtypes = [ctypes.c_int64] * 4
        loaded.jax_ep_cuda_problem.restype = ctypes.c_int
        for read in ("read_stream_times", "num_stream_times", "max_stream_times"):
            getattr(loaded, f"jax_ep_{read}").restype = ctypes.c_int64
        loaded.jax_ep_read_stream_times.argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
        loaded.jax_ep_read_gpu_clocks.restype = ctypes.c_int64
        loaded.jax_ep_read_gpu_clocks.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        numbers = ctypes.POINTER(ctypes.c_int32)
        loaded.jax_ep_strangers.argtypes = [numbers, ctypes.c_int32, numbers]
    else:
        loaded.jax_ep_instruction_set.restype = ctypes.c_char_p
    loaded.jax_ep_log_calls.argtypes = [ctypes.c_int]
    loaded.jax_ep_record_calls.argtypes = [ctypes.c_int]
    loaded.jax_ep_num_records.restype = ctypes.c_int64
    loaded.jax_ep_read_records.restype = ctypes.c_int64
    loaded.jax_ep_read_records.argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
    loaded.jax_ep_wait_timeout.restype = ctypes.c_double
    loaded.jax_ep_set_wait_timeout.restype = ctypes.c_double
    loaded.jax_ep_set_wait_timeout.argtypes = [ctypes.c_double]
    loaded.jax_ep_call_site_type_id.restype = ctypes.c_void_p
    loaded.jax_ep_call_site_type_info.restype = ctypes.c_void_p
    return loaded


@functools.cache
def library_problem(platform: Platform) -> str | None:
    """Returns why a platform's library cannot be used, or None."""
    if _EMULATED and platform == "cpu":
        return f"devices are emulated GPUs, by {_EMULATED}"
    if not library_path(platform).exists():
        return (
            f"the native library is not built: there is no {_FILES[platform]} next to jax_ep's "
            f"modules; in its sources, {_BUILDS[platform]}"
        )
    if library_path(platform).parent.name == _GPU_PACKAGE:
        package, ours = map(importlib.metadata.version, (_GPU_PACKAGE, "jax_ep"))
        if package != ours:
            return (
                f"the native library must be that of jax_ep {ours}; {_GPU_PACKAGE} {package} is "
                f"installed: `pip install {_GPU_PACKAGE}=={ours}`"
            )
    try:
        built = library(platform).jax_ep_ffi_minor_version()
    except (OSError, AttributeError) as error:
        return f"the native library does not load: {error}"
    if built > (runs := ffi_minor_version()):
        return f"the native library needs XLA FFI 0.{built}, and this jaxlib has 0.{runs}"
    return None


@functools.cache
def native_problem(platform: Platform) -> str | None:
    """Returns why a platform's library does not run on this process's devices, or None.

    It starts JAX's backends. Without devices of the platform, what is lowered here is to run
    elsewhere, and nothing but the library is asked.
    """
    gpus = local_gpus() if platform == "gpu" else []
    if gpus and "cuda" not in (runtime := gpus[0].client.platform_version):
        version = runtime.splitlines()[-1]
        return f"there is native code for CUDA's GPUs, and those here run {version}"
    return library_problem(platform) or (_cuda_problem(gpus) if gpus else None)


def _cuda_problem(gpus: Sequence[Any]) -> str | None:
    """Returns why this machine's driver or one of its GPUs does not run the kernels, or None."""
    devices = (ctypes.c_int * len(gpus))(*(gpu.local_hardware_id for gpu in gpus))
    text = ctypes.create_string_buffer(512)
    ask = library("gpu").jax_ep_cuda_problem
    return text.value.decode() if ask(devices, len(gpus), text, len(text)) else None


def usable_platforms() -> list[Platform]:
    """Returns the platforms whose libraries can be loaded."""
    return [platform for platform in get_args(Platform) if library_problem(platform) is None]


def usable_libraries() -> dict[Platform, ctypes.CDLL]:
    """Loads all libraries that can be.

    Raises:
      NotImplementedError: there is none.
    """
    if not (usable := usable_platforms()):
        raise NotImplementedError(library_problem("cpu"))
    return {platform: library(platform) for platform in usable}


@functools.cache
def gpu_peers_problem() -> str | None:
    """Returns which of this process's GPUs cannot read each other's memory, or None."""
    devices = local_devices("gpu")  # none, if what is lowered here is to run elsewhere
    ordinals = (ctypes.c_int32 * len(devices))(*map(ordinal, devices))
    strangers = (ctypes.c_int32 * 2)()
    if not library("gpu").jax_ep_strangers(ordinals, len(devices), strangers):
        return None
    return "GPU {} cannot read the memory of GPU {} of this process".format(*strangers)


def local_devices(platform: Platform) -> list[Any]:
    """Returns this process's devices that run a platform's native code, if there are any."""
    if _jax_platform(platform) == "gpu":
        return local_gpus()
    return jax.local_devices(backend="cpu")


def ordinal(device: Any) -> int:
    """Returns the number of one of this process's devices, as XLA tells it to handlers."""
    return device.id if device.platform == "cpu" else device.local_hardware_id


def describe(platform: Platform) -> dict[str, str]:
    """Returns what a platform's library says of itself."""
    loaded = library(platform)
    info = {
        "path": str(library_path(platform)),
        "ffi_version": f"0.{loaded.jax_ep_ffi_minor_version()}",
    }
    if platform == "cpu":
        info["instruction_set"] = loaded.jax_ep_instruction_set().decode()
    else:
        version = loaded.jax_ep_cuda_version()
        info["cuda_version"] = f"{version // 1000}.{version % 1000 // 10}"
        info["gpus"] = gpu_peers_problem() or "each can read the memory of all of this process's"
    return info


@functools.cache
def warn_once(reason: str, instead: str = "implementation='xla'") -> None:
    """Warns of what takes the place of what should have served, once for each reason."""
    warnings.warn(f"jax_ep uses {instead}: {reason}.", RuntimeWarning, stacklevel=3)


def register() -> None:
    """Makes native code known to XLA, for programs that were compiled or exported elsewhere.

    A program that calls ``jax_ep`` needs nothing of the kind. A process that loads an exported
    program or a serialized executable calls this first; it traces and compiles nothing, and may be
    called any number of times. It starts JAX's backends.

    Raises:
      NotImplementedError: there is no native library for this process's devices.

    Example:
      >>> import jax_ep
      >>> jax_ep.register()
    """
    usable: list[Platform] = [p for p in get_args(Platform) if native_problem(p) is None]
    if not usable:
        raise NotImplementedError(native_problem("cpu"))
    for platform in usable:
        register_handlers(platform)


def register_handlers(platform: Platform) -> None:
    """Registers a library's handlers with XLA, if they are not yet and there is such a device."""
    try:
        # A state type that is registered before the client exists breaks the client's start.
        jax.devices(_jax_platform(platform))
    except RuntimeError:
        return  # What is lowered here is to run elsewhere.
    with _register_lock:
        _register_once(platform)


@functools.cache
def _register_once(platform: Platform) -> None:
    loaded = library(platform)
    ffi_platform = _FFI_PLATFORMS[_jax_platform(platform)]
    loaded.jax_ep_set_process(jax.process_index())
    call_site: Any = {
        "type_id": jax.ffi.pycapsule(loaded.jax_ep_call_site_type_id()),
        "type_info": jax.ffi.pycapsule(loaded.jax_ep_call_site_type_info()),
    }
    jax.ffi.register_ffi_type("jax_ep_call_site", call_site, platform=ffi_platform)
    for name, handler in describe_handlers(platform).items():
        stages = {
            stage: jax.ffi.pycapsule(getattr(loaded, symbol))
            for stage, symbol in handler["stages"].items()
        }
        jax.ffi.register_ffi_target(name, stages, platform=ffi_platform)


@functools.cache
def describe_handlers(platform: Platform) -> dict[str, dict[str, Any]]:
    """Returns what a platform's library says of its handlers, by the names of their targets.

    Of each: ``stages``, its symbols in the library by XLA's names of the stages that they carry
    out; and the names of the ``operands``, ``results`` and ``attributes`` that it reads, in order,
    in which ``*`` stands for one or more of a kind.
    """
    return json.loads(library(platform).jax_ep_handlers().decode())
