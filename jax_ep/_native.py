"""The exchange in native code: loads the library, registers its handlers, and calls them."""

import ctypes
import functools
import pathlib
import threading
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Num

from jax_ep import _processes
from jax_ep._compat import ffi_minor_version, result_type, vary_over, varying_axes
from jax_ep._layout import Layout
from jax_ep._plan import Plan, PlanArrays
from jax_ep._types import Fabric

Platform = Literal["cpu", "gpu"]

_LIBRARIES: dict[Platform, str] = {"cpu": "libjax_ep_cpu.so", "gpu": "libjax_ep_cuda.so"}
_FFI_PLATFORMS: dict[Platform, str] = {"cpu": "cpu", "gpu": "CUDA"}
_register_lock = threading.Lock()


def serves(layout: Layout) -> bool:
    """Tells whether native code serves an exchange; warns once if its library does not load."""
    platform = _platform()
    if platform in _LIBRARIES and (reason := _library_problem(platform)) is not None:
        _warn_once(reason)
        return False
    return unavailable_reason(layout) is None


def unavailable_reason(layout: Layout | None = None) -> str | None:
    """Returns why native code does not serve here, or not that exchange, or None where it does."""
    platform = _platform()
    if platform not in _LIBRARIES:
        return f"there is native code for cpu and gpu, and the default backend is {platform!r}"
    if (reason := _library_problem(platform)) is not None:
        return reason
    if layout is not None and (reason := _unserved(platform, layout)) is not None:
        return reason
    alone = layout is not None and _fabric(layout) == "stacked"
    return None if alone or jax.process_count() == 1 else _processes_problem(platform)


def _unserved(platform: Platform, layout: Layout) -> str | None:
    if platform == "cpu":
        return None
    if _fabric(layout) == "devices":
        return (
            "native code on GPUs serves one rank, or the ranks of a vmap axis on one GPU, and "
            f"these are {layout.num_ranks} GPUs"
        )
    if layout.num_topk > (most := _library(platform).jax_ep_max_topk()):
        return (
            f"native code on GPUs has room for {most} choices per token, and these are "
            f"{layout.num_topk}"
        )
    return None


def _fabric(layout: Layout) -> Fabric:
    """Returns how ranks meet: one rank meets nobody, whatever the mesh."""
    return layout.fabric if layout.num_ranks > 1 else "stacked"


def _platform() -> Any:
    return jax.default_backend()


def library_info() -> dict[str, str]:
    """Returns what the native library for this platform says of itself.

    Raises:
      NotImplementedError: there is none, or it cannot be loaded.
    """
    if (reason := unavailable_reason()) is not None:
        raise NotImplementedError(reason)
    platform = _platform()
    library = _library(platform)
    info = {
        "path": str(library_path(platform)),
        "ffi_version": f"0.{library.jax_ep_ffi_minor_version()}",
    }
    if platform == "cpu":
        info["instruction_set"] = library.jax_ep_instruction_set().decode()
    else:
        version = library.jax_ep_cuda_version()
        info["cuda_version"] = f"{version // 1000}.{version % 1000 // 10}"
    return info


def set_wait_timeout(seconds: float) -> float:
    """Sets how long a rank of this process waits for its peers before the call fails.

    On expiry every rank that was waiting gets an error that names the op, the rank, the peers that
    did not come and the time waited; the process goes on. It holds for waits that begin later.

    Between processes it bounds each wait of an exchange for another process, and how long the first
    trace waits for the others to say on which host they run. Set it alike in all of them.

    Args:
      seconds: the new limit, above 0. It is 60 until set.

    Returns:
      The limit until now.

    Raises:
      ValueError: ``seconds`` is not a positive finite number.
      NotImplementedError: the native library cannot be loaded, so nothing would wait.
    """
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds must be a positive finite number; got {seconds}.")
    if (reason := _library_problem("cpu")) is not None:
        raise NotImplementedError(reason)
    return _library("cpu").jax_ep_set_wait_timeout(float(seconds))


def end_at(phase: int, exchanges: int, signal: int) -> None:
    """Ends this process by a signal, or by exiting if that is 0, in a phase of an exchange.

    Args:
      phase: its number in ``ffi/fabric/process_words.h``.
      exchanges: how many exchanges with other processes come before.
      signal: what the process sends itself.
    """
    _library("cpu").jax_ep_end_at(phase, ctypes.c_int64(exchanges), signal)


def library_path(platform: Platform) -> pathlib.Path:
    """Returns where a platform's native library is expected: next to this file."""
    return pathlib.Path(__file__).with_name(_LIBRARIES[platform])


def stacked(op: str, layout: Layout, rank: Array, *args: Any) -> Any:
    """Runs ``op`` for all ranks of a leading axis at once."""
    return OPS[op](layout, rank, *args)


def devices(op: str, layout: Layout, rank: Array, *args: Any) -> Any:
    """Runs ``op`` for the rank of this device, together with its peers' devices."""
    return OPS[op](layout, rank, *args)


def plan(
    layout: Layout,
    rank: Int32[Array, "*stack"],
    group: Int32[Array, "*stack"],
    topk_idx: Int32[Array, "*stack num_tokens num_topk"],
) -> PlanArrays:
    """Computes each rank's plan from the choices of all ranks."""
    choices, capacity = (layout.num_tokens, layout.num_topk), (layout.capacity,)
    per_rank, local = (layout.num_ranks,), (layout.num_local_experts,)
    shapes = {
        "group_sizes": (local, jnp.int32),
        "kept": (choices, jnp.bool_),
        "expert_load": ((layout.num_experts,), jnp.int32),
        "recv_counts": (per_rank, jnp.int32),
        "num_dropped": ((), jnp.int32),
        "send_row": (choices, jnp.int32),
        "recv_choice": (capacity, jnp.int32),
        "recv_row": (capacity, jnp.int32),
        "group_rows": (local, jnp.int32),
        "fingerprint": ((), jnp.uint32),
    }
    types = [result_type(rank.shape + shape, dtype, topk_idx) for shape, dtype in shapes.values()]
    if _platform() == "gpu":
        geometry = (layout.num_ranks, layout.num_tokens, layout.num_topk, layout.num_experts)
        words = _library("gpu").jax_ep_plan_workspace(*geometry)
        types.append(result_type((words,), jnp.int32, topk_idx))
    no_plan_yet = jnp.zeros_like(rank, dtype=jnp.uint32)
    arrays = _call(
        "plan", types, layout, rank, group, no_plan_yet, topk_idx, alignment=layout.alignment
    )
    return PlanArrays(**dict(zip(shapes, arrays, strict=False)))


def gather_rows(
    layout: Layout,
    rank: Int32[Array, "*stack"],
    plan: Plan,
    x: Num[Array, "*stack num_tokens hidden"],
    weights: Float32[Array, "*stack num_tokens num_topk"] | None,
) -> Num[Array, "*stack capacity hidden"]:
    """Pulls each rank's rows from the tokens of their source ranks, scaled if given weights."""
    return _call(
        "gather_rows",
        result_type((*rank.shape, layout.capacity, x.shape[-1]), x.dtype, x),
        layout,
        *_whereabouts(rank, plan),
        x,
        _or_empty(weights, x),
        plan._recv_choice,
        plan._recv_row,
        plan.recv_counts,
        plan.group_sizes,
        plan._group_rows,
        zero_tail=int(layout.tail == "zero"),
    )


def reduce_rows(
    layout: Layout,
    rank: Int32[Array, "*stack"],
    plan: Plan,
    rows: Num[Array, "*stack capacity hidden"],
    weights: Float32[Array, "*stack num_tokens num_topk"] | None,
) -> Num[Array, "*stack num_tokens hidden"]:
    """Pulls each token's rows from the ranks of its experts and adds them up."""
    return _call(
        "reduce_rows",
        result_type((*rank.shape, layout.num_tokens, rows.shape[-1]), rows.dtype, rows),
        layout,
        *_whereabouts(rank, plan),
        rows,
        _or_empty(weights, rows),
        plan._topk_idx,
        plan._send_row,
        published=(plan._recv_row, plan.recv_counts),
    )


def row_dots(
    layout: Layout,
    rank: Int32[Array, "*stack"],
    plan: Plan,
    rows: Num[Array, "*stack capacity hidden"],
    dout: Num[Array, "*stack num_tokens hidden"],
) -> Float32[Array, "*stack num_tokens num_topk"]:
    """Pulls each token's rows and multiplies each with the token's row of ``dout``."""
    return _call(
        "row_dots",
        result_type((*rank.shape, layout.num_tokens, layout.num_topk), jnp.float32, rows),
        layout,
        *_whereabouts(rank, plan),
        rows,
        dout,
        plan._topk_idx,
        plan._send_row,
        published=(plan._recv_row, plan.recv_counts),
    )


OPS = {"plan": plan, "gather_rows": gather_rows, "reduce_rows": reduce_rows, "row_dots": row_dots}


def _call(
    op: str,
    results: Any,
    layout: Layout,
    *operands: Array,
    published: tuple[Array, ...] = (),
    **attributes: int,
) -> Any:
    _register(_platform())
    for name in ("num_ranks", "num_experts", "num_tokens", "num_topk", "capacity"):
        attributes[name] = getattr(layout, name)
    fabric = _fabric(layout)
    if fabric == "devices":
        attributes["num_processes"] = 1
        if jax.process_count() > 1:
            more, spanning = _spanning(layout, operands[0], operands, published)
            operands += more
            attributes |= spanning
    # A plain vmap around the ranks' own: independent exchanges, in turn.
    call = jax.ffi.ffi_call(f"jax_ep_{op}_{fabric}", results, vmap_method="sequential")
    return call(*operands, **{name: np.int64(value) for name, value in attributes.items()})


def _processes_problem(platform: Platform) -> str | None:
    if platform != "cpu":
        return f"native code on GPUs serves one process, and this job has {jax.process_count()}"
    return _processes.join(_library("cpu"))


def _spanning(
    layout: Layout, rank: Array, operands: tuple[Array, ...], published: tuple[Array, ...]
) -> tuple[tuple[Array, ...], dict[str, int]]:
    """Returns what a call needs beside its operands where its ranks may be in several processes.

    When a device first runs the call, all ranks tell each other in which process they are and what
    number the call has there. XLA knows who they are, and only XLA, so its all-gather carries that.
    """
    roll = jax.ffi.ffi_call("jax_ep_roll_call", result_type((2,), jnp.int32, rank))(rank, *operands)
    told = result_type((layout.num_ranks, 2), jnp.int32, rank)
    rolls = jax.lax.cond(
        roll[0] >= 0,
        lambda: vary_over(
            jax.lax.all_gather(roll, layout.axis_name, tiled=False).reshape(told.shape),
            varying_axes(roll),
        ),
        lambda: vary_over(jnp.full(told.shape, -1, jnp.int32), varying_axes(roll)),
    )
    if not published:
        published = (jnp.zeros_like(rank, shape=(0,)),) * 2
    attributes = {"num_processes": jax.process_count(), "published_rows": published[0].shape[0]}
    return (rolls, *published), attributes


def _whereabouts(rank: Array, plan: Plan) -> tuple[Array, Array, Array]:
    """Returns what a rendezvous needs to know: who this is, in which group, for which plan."""
    return rank, plan._group, plan._fingerprint


def _or_empty(weights: Array | None, like: Array) -> Array:
    """Stands in for weights that are not there: no elements mean all ones."""
    return jnp.zeros_like(like, shape=(0,), dtype=jnp.float32) if weights is None else weights


@functools.cache
def _library(platform: Platform) -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path(platform)))
    library.jax_ep_ffi_minor_version.restype = ctypes.c_int
    if platform == "gpu":
        library.jax_ep_cuda_version.restype = ctypes.c_int
        library.jax_ep_max_topk.restype = ctypes.c_int64
        library.jax_ep_plan_workspace.restype = ctypes.c_int64
        library.jax_ep_plan_workspace.argtypes = [ctypes.c_int64] * 4
        return library
    library.jax_ep_instruction_set.restype = ctypes.c_char_p
    library.jax_ep_wait_timeout.restype = ctypes.c_double
    library.jax_ep_set_wait_timeout.restype = ctypes.c_double
    library.jax_ep_set_wait_timeout.argtypes = [ctypes.c_double]
    library.jax_ep_call_site_type_id.restype = ctypes.c_void_p
    library.jax_ep_call_site_type_info.restype = ctypes.c_void_p
    return library


@functools.cache
def _library_problem(platform: Platform) -> str | None:
    if not library_path(platform).exists():
        return (
            f"the native library is not built: there is no {_LIBRARIES[platform]} next to "
            "jax_ep's modules"
        )
    try:
        built = _library(platform).jax_ep_ffi_minor_version()
    except (OSError, AttributeError) as error:
        return f"the native library does not load: {error}"
    if built > (runs := ffi_minor_version()):
        return f"the native library needs XLA FFI 0.{built}, and this jaxlib has 0.{runs}"
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"jax_ep uses implementation='xla': {reason}.", RuntimeWarning, stacklevel=3)


def _register(platform: Platform) -> None:
    with _register_lock:
        _register_once(platform)


@functools.cache
def _register_once(platform: Platform) -> None:
    # A state type that is registered before the client exists breaks the client's start.
    jax.devices(platform)
    library = _library(platform)
    for op in OPS:
        _register_target(platform, f"jax_ep_{op}_stacked", f"jax_ep_{op}_stacked")
    if platform == "gpu":
        return
    jax.ffi.register_ffi_type(
        "jax_ep_call_site",
        {
            "type_id": jax.ffi.pycapsule(library.jax_ep_call_site_type_id()),
            "type_info": jax.ffi.pycapsule(library.jax_ep_call_site_type_info()),
        },
        platform="cpu",
    )
    roll_call = {"instantiate": "jax_ep_new_call_site", "execute": "jax_ep_roll_call"}
    _register_target(platform, "jax_ep_roll_call", roll_call)
    for op in OPS:
        stages = {"instantiate": "jax_ep_new_call_site", "execute": f"jax_ep_{op}_devices"}
        _register_target(platform, f"jax_ep_{op}_devices", stages)


def _register_target(platform: Platform, name: str, symbols: str | dict[str, str]) -> None:
    library = _library(platform)
    target = jax.tree.map(lambda symbol: jax.ffi.pycapsule(getattr(library, symbol)), symbols)
    jax.ffi.register_ffi_target(name, target, platform=_FFI_PLATFORMS[platform])
