"""The exchange in native code: where it serves, and its foreign calls."""

import ctypes
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jax_ep import _processes
from jax_ep._axes import Place
from jax_ep._checks import check_seconds
from jax_ep._compat import result_type, trace_platform, vary_over, varying_axes
from jax_ep._layout import Layout
from jax_ep._library import describe, library, library_problem, register_handlers, warn_once
from jax_ep._ops import OPS, Op, result_shapes
from jax_ep._plan import Route
from jax_ep._types import Binding, LoweredBinding, Platform


def serves(layout: Layout, binding: Binding) -> bool:
    """Tells whether native code serves an exchange here; warns once if its library does not load.

    Says nothing of the processes that its ranks are in: only a program's devices tell.
    """
    platform = trace_platform()
    if platform in ("cpu", "gpu") and (reason := library_problem(platform)) is not None:
        warn_once(reason)
        return False
    return refusal(platform, layout, binding) is None


def unavailable_reason() -> str | None:
    """Returns why native code does not serve at all here, or None. Waits for nobody."""
    return refusal(trace_platform(), None, "none")


def refusal(platform: str, layout: Layout | None, binding: Binding | LoweredBinding) -> str | None:
    """Returns why native code does not serve a platform, or not that exchange there, or None."""
    if platform not in ("cpu", "gpu"):
        return f"there is native code for cpu and gpu, and this is for {platform}"
    if (reason := library_problem(platform)) is not None:
        return reason
    if layout is None or platform == "cpu":
        return None
    if binding == "mesh" and layout.num_ranks > 1:
        return (
            "native code on GPUs serves one rank, or the ranks of a vmap axis on one GPU, and "
            f"these are {layout.num_ranks} GPUs"
        )
    if layout.num_topk > (most := library(platform).jax_ep_max_topk()):
        return (
            f"native code on GPUs has room for {most} choices per token, and these are "
            f"{layout.num_topk}"
        )
    return None


def processes_refusal(devices: np.ndarray | None, *, warn: bool) -> str | None:
    """Returns why native code does not serve ranks on these devices, or None.

    Waits for the other processes among them when they are first asked about.

    Args:
      devices: [groups, ranks], or None if the program does not say.
      warn: whether to warn if it might be expected to serve.

    Raises:
      TimeoutError: another process did not say in time where it is.
    """
    if devices is None:
        if jax.process_count() == 1:
            return None
        reason, expected = "the mesh is abstract, so that its processes are not known", False
    else:
        processes = tuple(sorted({device.process_index for device in devices.flat}))
        reason, expected = _processes.join(processes)
    if reason is not None and warn and not expected:
        warn_once(reason)
    return reason


def library_info() -> dict[str, str]:
    """Returns what the native library for this platform says of itself.

    Raises:
      NotImplementedError: there is none, or it cannot be loaded.
    """
    if (reason := unavailable_reason()) is not None:
        raise NotImplementedError(reason)
    platform = trace_platform()
    assert platform in ("cpu", "gpu")
    return describe(platform)


def set_wait_timeout(seconds: float) -> float:
    """Sets how long a rank of this process waits for its peers before the call fails.

    On expiry every rank that was waiting gets an error that names the op, the rank, the peers that
    did not come and the time waited, and one line on stderr says the same at once; the process goes
    on. It holds for waits that begin later.

    Between processes it bounds each wait of an exchange for another process, that of its first run
    for the others to run it too, and how long the first compilation waits for the others to say on
    which host they run. Set it alike in all of them; setting it waits for none of them.

    What XLA's own collectives wait is XLA's affair. By default they end the process when a rank has
    not come for a minute, so choose less than that if the program has any.

    Args:
      seconds: the new limit, at least 0.001. It is 30 until set.

    Returns:
      The limit until now.

    Raises:
      TypeError: ``seconds`` is not a real number.
      ValueError: ``seconds`` is below 0.001 or not finite.
      NotImplementedError: the native library cannot be loaded, so nothing would wait.
    """
    check_seconds("seconds", seconds, 0.001)
    if (reason := library_problem("cpu")) is not None:
        raise NotImplementedError(reason)
    return library("cpu").jax_ep_set_wait_timeout(float(seconds))


def end_at(phase: int, exchanges: int, signal: int) -> None:
    """Ends this process by a signal, or by exiting if that is 0, in a phase of an exchange.

    Args:
      phase: its number in ``ffi/fabric/processes/process_words.h``.
      exchanges: how many exchanges with other processes come before.
      signal: what the process sends itself.
    """
    register_handlers("cpu")  # Which says what process this is.
    library("cpu").jax_ep_end_at(phase, ctypes.c_int64(exchanges), signal)


def run(
    op: Op,
    layout: Layout,
    binding: LoweredBinding,
    where: Place,
    route: Route | None,
    payloads: tuple[Array, ...],
    *,
    call: str,
    platform: Platform,
    devices: np.ndarray | None,
) -> list[Array]:
    """Calls an op's handler for the rank of this device, or for all ranks of a leading axis."""
    register_handlers(platform)
    stack, like = where.rank.shape, payloads[0]
    types = [
        result_type(stack + shape, dtype, like) for shape, dtype in result_shapes(op, layout, like)
    ]
    attributes = {"call": call, **_geometry(op, layout)}
    operands = (*where, *_operands(op, route, payloads))
    if binding != "mesh" or layout.num_ranks == 1:
        if platform == "gpu" and op == "plan":
            types.append(result_type(_workspace(layout), jnp.int32, like))
        results = jax.ffi.ffi_call(f"jax_ep_{op}_stacked", types)(*operands, **attributes)
        return list(results[: len(types) - (platform == "gpu" and op == "plan")])
    attributes["members"] = _processes.members(devices)
    if _spans_processes(devices):
        attributes["op"] = np.int64(OPS.index(op))
        attributes["row_bytes"] = np.int64(like.shape[-1] * like.dtype.itemsize)
        operands += _roll_call(op, layout, where, route, operands, attributes)
    return list(jax.ffi.ffi_call(f"jax_ep_{op}_devices", types)(*operands, **attributes))


def _geometry(op: Op, layout: Layout) -> dict[str, np.int64]:
    geometry = ("num_ranks", "num_experts", "num_tokens", "num_topk", "capacity")
    attributes = {name: np.int64(getattr(layout, name)) for name in geometry}
    if op == "plan":
        attributes["alignment"] = np.int64(layout.alignment)
    if op == "gather_rows":
        attributes["zero_tail"] = np.int64(layout.tail == "zero")
    return attributes


def _operands(op: Op, route: Route | None, payloads: tuple[Array, ...]) -> tuple[Array, ...]:
    """Returns an op's operands in the order in which ``ffi/bind/read_calls.cc`` reads them."""
    if route is None:
        return (
            jnp.zeros_like(payloads[0], shape=payloads[0].shape[:-2], dtype=jnp.uint32),
            *payloads,
        )
    first, second = payloads if len(payloads) == 2 else (payloads[0], _none(payloads[0]))
    pulled = (route.topk_idx, route.send_row)
    received = (route.recv_choice, route.recv_row, route.recv_counts)
    groups = (route.group_sizes, route.group_rows)
    if op == "gather_rows":
        return (route.fingerprint, first, second, *received, *groups)
    return (route.fingerprint, first, second, *pulled)


def _none(like: Array) -> Array:
    """Stands in for weights that are not there: no elements mean all ones."""
    return jnp.zeros_like(like, shape=(0,), dtype=jnp.float32)


def _workspace(layout: Layout) -> tuple[int]:
    geometry = (layout.num_ranks, layout.num_tokens, layout.num_topk, layout.num_experts)
    return (library("gpu").jax_ep_plan_workspace(*geometry),)


def _spans_processes(devices: np.ndarray | None) -> bool:
    return devices is not None and len({device.process_index for device in devices.flat}) > 1


def _roll_call(
    op: Op,
    layout: Layout,
    where: Place,
    route: Route | None,
    operands: tuple[Array, ...],
    attributes: dict[str, Any],
) -> tuple[Array, ...]:
    """Returns what a call needs beside its operands where its ranks may be in several processes.

    The ranks of a group must agree on a number for the call. When they all run it for the first
    time, XLA's all-gather takes the first rank's number to the others: only XLA knows which call in
    one process is which in another. Later runs gather nothing.
    """
    rank = where.rank
    number_type = result_type((1,), jnp.int32, rank)
    number = jax.ffi.ffi_call("jax_ep_roll_call", number_type)(*operands, **attributes)
    numbers = result_type((layout.num_ranks,), jnp.int32, rank)
    axes = varying_axes(number)
    numbers = jax.lax.cond(
        number[0] >= 0,
        lambda: vary_over(
            jax.lax.all_gather(number, layout.axis_name, tiled=False).reshape(numbers.shape), axes
        ),
        lambda: vary_over(jnp.broadcast_to(number, numbers.shape), axes),
    )
    if op in ("reduce_rows", "row_dots"):
        assert route is not None
        return numbers, route.recv_row, route.recv_counts
    return (numbers,)
