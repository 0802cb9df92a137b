"""Brings the processes that exchange with each other together, if they are on one host."""

import ctypes
import json
import os
import pathlib
import sys
import threading
import time
import zlib
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep._call import Call, Operands, all_gather
from jax_ep._compat import distributed_client, result_type, vary_over, varying_axes
from jax_ep._library import library, local_devices, ordinal, register_handlers
from jax_ep._types import Platform

_PROBLEM_BYTES = 512
_HANDLE_BYTES = 64  # of a cudaIpcMemHandle_t
_join_lock = threading.Lock()
_joined: dict[tuple[Platform, "Groups"], "Refusal | None"] = {}


Groups: TypeAlias = tuple[tuple[int, ...], ...]
"""The processes that the ranks of each group are in, by their indices in the job."""


class Refusal(NamedTuple):
    """Why an exchange is not carried natively."""

    reason: str
    # Whether that is how things are, and not how something went wrong.
    is_expected: bool = True


class Deadline(NamedTuple):
    """Until when to wait for other processes, and how long that is."""

    time: float
    seconds: float


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
        lambda: vary_over(all_gather(call, number).reshape(num_ranks), axes),
        lambda: vary_over(jnp.broadcast_to(number, num_ranks), axes),
    )


def join(groups: Groups, platform: Platform) -> Refusal | None:
    """Lets a platform's native code reach the processes of which there are ranks in one group.

    Each process of any group must call it for the same groups, and waits until all have; from then
    on it returns at once. If some did not come in time, it may be called again.

    Args:
      groups: whom to reach; this process is in some of them.
      platform: that of their devices.

    Returns:
      Why they cannot exchange natively, the same for all of them, or None.

    Raises:
      TimeoutError: one of them did not call it in time.
    """
    key = (platform, groups)
    with _join_lock:
        if key not in _joined:
            _joined[key] = _join(groups, platform)
        return _joined[key]


def _join(groups: Groups, platform: Platform) -> Refusal | None:
    if distributed_client() is None:
        return _failed("this job has several processes without jax.distributed")
    register_handlers(platform)
    processes = tuple(sorted({process for group in groups for process in group}))
    job = f"{platform}/{'-'.join(map(str, processes))}/{zlib.crc32(repr(groups).encode()):x}"
    seconds = library(platform).jax_ep_wait_timeout()
    until = Deadline(time.monotonic() + seconds, seconds)
    told = _tell_all(f"{job}/place", json.dumps(_place(platform)), processes, until)
    places = {p: json.loads(text) for p, text in zip(processes, told, strict=True)}
    # All decide by the same facts; what only one of them can know it tells the others.
    for process, place in places.items():
        if place["problem"]:
            return _failed(f"process {process} cannot share memory: {place['problem']}")
    hosts = max(len({tuple(places[process]["host"]) for process in group}) for group in groups)
    if hosts > 1:
        return Refusal(f"it serves processes of one host, and these are on {hosts}")
    here = jax.process_index()
    peers = {process for group in groups if here in group for process in group}
    reached = _reach_all({process: places[process] for process in sorted(peers)}, platform)
    problems = _tell_all(f"{job}/problem", reached, processes, until)
    return next((_failed(problem) for problem in problems if problem), None)


def _failed(problem: str) -> Refusal:
    return Refusal(problem, is_expected=False)


def _place(platform: Platform) -> dict:
    """Says where this process is and where others find what it shows, or why it shows nothing."""
    address = (ctypes.c_int32 * 2)()
    problem = ctypes.create_string_buffer(_PROBLEM_BYTES)
    library(platform).jax_ep_board(address, problem, _PROBLEM_BYTES)
    offered = _offer_memory(problem) if platform == "gpu" and not problem.value else {}
    why = problem.value.decode()
    try:
        host = _host()
    except OSError as error:
        host, why = [], why or str(error)
    return {"host": host, "address": list(address), "gpus": offered, "problem": why}


def _offer_memory(problem: ctypes.Array) -> dict[int, str]:
    """Returns where other processes find some memory of each of this one's GPUs."""
    offered = {}
    for device in map(ordinal, local_devices("gpu")):
        handle = ctypes.create_string_buffer(_HANDLE_BYTES)
        if not library("gpu").jax_ep_offer_memory(device, handle, problem, _PROBLEM_BYTES):
            break
        offered[device] = handle.raw.hex()
    return offered


def _host() -> list[str]:
    """Names what processes must have in common to open each other's files."""
    if sys.platform != "linux":
        return [sys.platform]
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [boot, os.readlink("/proc/self/ns/pid"), str(os.getuid())]


def _reach_all(places: dict[int, dict], platform: Platform) -> str:
    """Reaches for what processes show at their places; returns what cannot be reached, if any."""
    here = jax.process_index()
    problem = ctypes.create_string_buffer(_PROBLEM_BYTES)
    for process, place in places.items():
        address = (ctypes.c_int32 * 2)(*place["address"])
        if not library(platform).jax_ep_open_board(process, address, problem, _PROBLEM_BYTES):
            return f"process {here} cannot reach process {process}: {problem.value.decode()}"
        if process == here or platform == "cpu":
            continue
        for theirs, handle in place["gpus"].items():
            for own in map(ordinal, local_devices("gpu")):
                memory = bytes.fromhex(handle)
                if not library("gpu").jax_ep_try_memory(own, memory, problem, _PROBLEM_BYTES):
                    return (
                        f"GPU {own} of process {here} cannot read the memory of GPU {theirs} of "
                        f"process {process}: {problem.value.decode()}"
                    )
    return ""


def _tell_all(what: str, text: str, processes: tuple[int, ...], until: Deadline) -> list[str]:
    """Tells these processes ``text``, and returns what each of them told, in their order."""
    client = distributed_client()
    key = "jax_ep/{}/{}".format
    # Whoever was told in vain that this process did not come in time asks again.
    client.key_value_set(key(what, jax.process_index()), text, allow_overwrite=True)
    return [_ask(client, key(what, process), process, until) for process in processes]


def _ask(client, key: str, process: int, until: Deadline) -> str:
    left = min(max(until.time - time.monotonic(), 0.001), 3e6)
    try:
        return client.blocking_key_value_get(key, max(1, int(1000 * left)))
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(
            f"process {process} must compile the same program as the others: process "
            f"{jax.process_index()} waited {until.seconds:g} s for it to say where it runs."
        ) from error
