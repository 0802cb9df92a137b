"""Brings the processes of a job together, if they are on one host."""

import ctypes
import functools
import json
import os
import pathlib
import sys
import threading

import jax

from jax_ep._compat import distributed_client

_KEY = "jax_ep/{what}/{process}"
_PROBLEM_BYTES = 512
_join_lock = threading.Lock()


def join(library: ctypes.CDLL) -> str | None:
    """Lets this process's native code reach that of all other processes of the job.

    Every process must call it, and waits until all have; from then on it returns at once.

    Args:
      library: the native library for the CPU.

    Returns:
      Why the processes cannot exchange natively, the same for all of them, or None.

    Raises:
      TimeoutError: some process did not call it in time.
    """
    with _join_lock:
        return _join_once(library)


@functools.cache
def _join_once(library: ctypes.CDLL) -> str | None:
    if distributed_client() is None:
        return "this job has several processes without jax.distributed"
    places = [json.loads(text) for text in _tell_all("place", json.dumps(_place(library)), library)]
    # All decide by the same facts; what only one of them can know it tells the others.
    problems = [place["problem"] for place in places]
    hosts = {tuple(place["host"]) for place in places}
    if len(hosts) > 1:
        problems.append(
            f"native code serves processes of one host, and this job's are on {len(hosts)}"
        )
    if not any(problems):
        problems = _tell_all("problem", _open_all(library, places), library)
    return next((problem for problem in problems if problem), None)


def _place(library: ctypes.CDLL) -> dict:
    """Says where this process is and where others find its board."""
    address = (ctypes.c_int32 * 2)()
    problem = ctypes.create_string_buffer(_PROBLEM_BYTES)
    library.jax_ep_open_board(address, problem, _PROBLEM_BYTES)
    return {"host": _host(), "address": list(address), "problem": problem.value.decode()}


def _host() -> list[str]:
    """Names what processes must have in common to open each other's files."""
    if sys.platform != "linux":
        return [sys.platform]
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [boot, os.readlink("/proc/self/ns/pid"), str(os.getuid())]


def _open_all(library: ctypes.CDLL, places: list[dict]) -> str:
    numbers = [number for place in places for number in place["address"]]
    addresses = (ctypes.c_int32 * len(numbers))(*numbers)
    problem = ctypes.create_string_buffer(_PROBLEM_BYTES)
    library.jax_ep_join(jax.process_index(), len(places), addresses, problem, _PROBLEM_BYTES)
    return problem.value.decode()


def _tell_all(what: str, text: str, library: ctypes.CDLL) -> list[str]:
    """Tells all processes ``text``, and returns what each of them told, in their order."""
    client = distributed_client()
    client.key_value_set(_KEY.format(what=what, process=jax.process_index()), text)
    seconds = library.jax_ep_wait_timeout()
    told = []
    for process in range(jax.process_count()):
        try:
            key = _KEY.format(what=what, process=process)
            told.append(client.blocking_key_value_get(key, int(1000 * min(seconds, 3e6))))
        except jax.errors.JaxRuntimeError as error:
            raise TimeoutError(
                f"process {process} must trace the same program as the others: process "
                f"{jax.process_index()} waited {seconds:g} s for it to say where it runs."
            ) from error
    return told
