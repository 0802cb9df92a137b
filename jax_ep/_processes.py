"""Brings the processes that exchange with each other together, if they are on one host."""

import ctypes
import json
import os
import pathlib
import sys
import threading
import time
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep._call import Call, Operands
from jax_ep._compat import distributed_client, result_type, vary_over, varying_axes
from jax_ep._library import library, ordinal, register_handlers

_PROBLEM_BYTES = 512
_join_lock = threading.Lock()
_joined: dict[tuple[int, ...], "Refusal | None"] = {}


class Refusal(NamedTuple):
    """Why an exchange is not carried natively."""

    reason: str
    # Whether that is how things are, and not how something went wrong.
    is_expected: bool = True


def members(devices: np.ndarray | None) -> np.ndarray:
    """Returns which devices the ranks of each group are: ``process << 32 | ordinal`` of each."""
    if devices is None:
        return np.zeros(0, np.int64)
    codes = [(d.process_index << 32) | ordinal(d) for d in devices.flat]
    return np.array(codes, np.int64)


def kind(call: Call, operands: Operands) -> np.int64:
    """Returns a number that tells one kind of call from another, in all processes alike."""
    payloads = [(x.shape, x.dtype.name) for x in operands.payloads]
    text = repr((call.op.name, call.name, call.layout, payloads))
    return np.int64(zlib.crc32(text.encode()))


def agree(call: Call, operands: Operands, members: np.ndarray, kind: np.int64) -> jax.Array:
    """Has the ranks of a group agree on a number for their call, the same in all processes.

    When they all run it for the first time, XLA's all-gather takes the first rank's number to the
    others: only XLA knows which call in one process is which in another. Later runs gather nothing.

    Returns:
      What each rank has told, [num_ranks] int32, as the fabric's handlers take it.
    """
    rank, num_ranks = operands.where.rank, call.layout.num_ranks
    flat = (*operands.where, *(operands.plan or ()), *operands.payloads)
    attributes: dict[str, Any] = {
        "call": call.name,
        "num_ranks": np.int64(num_ranks),
        "members": members,
        "kind": kind,
    }
    number_type = result_type((1,), jnp.int32, rank)
    # All operands, so that XLA does not take calls with different ones for the same.
    number = jax.ffi.ffi_call("jax_ep_roll_call", number_type)(*flat, **attributes)
    axes = varying_axes(number)
    return jax.lax.cond(
        number[0] >= 0,
        lambda: vary_over(
            jax.lax.all_gather(number, call.layout.axis_name, tiled=False).reshape(num_ranks), axes
        ),
        lambda: vary_over(jnp.broadcast_to(number, num_ranks), axes),
    )


def join(processes: tuple[int, ...]) -> Refusal | None:
    """Lets the native code of these processes reach each other, this one among them.

    Each of them must call it for the same processes, and waits until all have; from then on it
    returns at once. If some did not come in time, it may be called again.

    Args:
      processes: their indices in the job, ascending.

    Returns:
      Why they cannot exchange natively, the same for all of them, or None.

    Raises:
      TimeoutError: one of them did not call it in time.
    """
    with _join_lock:
        if processes not in _joined:
            _joined[processes] = _join(processes)
        return _joined[processes]


def _join(processes: tuple[int, ...]) -> Refusal | None:
    if distributed_client() is None:
        return _failed("this job has several processes without jax.distributed")
    register_handlers("cpu")
    job = "-".join(map(str, processes))
    deadline = time.monotonic() + library("cpu").jax_ep_wait_timeout()
    told = _tell_all(f"{job}/place", json.dumps(_place()), processes, deadline)
    places = [json.loads(text) for text in told]
    # All decide by the same facts; what only one of them can know it tells the others.
    for process, place in zip(processes, places, strict=True):
        if place["problem"]:
            return _failed(f"process {process} cannot share memory: {place['problem']}")
    hosts = {tuple(place["host"]) for place in places}
    if len(hosts) > 1:
        return Refusal(f"it serves processes of one host, and these are on {len(hosts)}")
    problems = _tell_all(f"{job}/problem", _open_all(processes, places), processes, deadline)
    return next((_failed(problem) for problem in problems if problem), None)


def _failed(problem: str) -> Refusal:
    return Refusal(problem, is_expected=False)


def _place() -> dict:
    """Says where this process is and where others find its board, or why there is none."""
    address = (ctypes.c_int32 * 2)()
    problem = ctypes.create_string_buffer(_PROBLEM_BYTES)
    library("cpu").jax_ep_board(address, problem, _PROBLEM_BYTES)
    why = problem.value.decode()
    try:
        host = _host()
    except OSError as error:
        host, why = [], why or str(error)
    return {"host": host, "address": list(address), "problem": why}


def _host() -> list[str]:
    """Names what processes must have in common to open each other's files."""
    if sys.platform != "linux":
        return [sys.platform]
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [boot, os.readlink("/proc/self/ns/pid"), str(os.getuid())]


def _open_all(processes: tuple[int, ...], places: list[dict]) -> str:
    problem = ctypes.create_string_buffer(_PROBLEM_BYTES)
    for process, place in zip(processes, places, strict=True):
        address = (ctypes.c_int32 * 2)(*place["address"])
        if not library("cpu").jax_ep_open_board(process, address, problem, _PROBLEM_BYTES):
            here = jax.process_index()
            return f"process {here} cannot reach process {process}: {problem.value.decode()}"
    return ""


def _tell_all(what: str, text: str, processes: tuple[int, ...], deadline: float) -> list[str]:
    """Tells these processes ``text``, and returns what each of them told, in their order."""
    client = distributed_client()
    key = "jax_ep/{}/{}".format
    # Whoever was told in vain that this process did not come in time asks again.
    client.key_value_set(key(what, jax.process_index()), text, allow_overwrite=True)
    return [_ask(client, key(what, process), process, deadline) for process in processes]


def _ask(client, key: str, process: int, deadline: float) -> str:
    left = min(max(deadline - time.monotonic(), 0.001), 3e6)
    try:
        return client.blocking_key_value_get(key, max(1, int(1000 * left)))
    except jax.errors.JaxRuntimeError as error:
        seconds = library("cpu").jax_ep_wait_timeout()
        raise TimeoutError(
            f"process {process} must compile the same program as the others: process "
            f"{jax.process_index()} waited {seconds:g} s for it to say where it runs."
        ) from error
