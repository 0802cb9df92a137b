"""``record``: has native code write down what exchanges do and when."""

import contextlib
import ctypes
import pathlib
import platform
import threading
from collections.abc import Iterator

import jax
import numpy as np

from jax_ep._exchanges import Columns
from jax_ep._library import usable_libraries
from jax_ep._stream_times import StreamsBegin, begin_streams, end_streams, streams_beside
from jax_ep._trace import Trace
from jax_ep._types import Platform

_TEXTS = ("op", "scope", "fabric")
# CallRecord of ffi/fabric/threads/recorder.h.
_RECORD = np.dtype(
    [
        ("exchange", np.int64),
        *[(name, np.uint64) for name in _TEXTS],
        *[(name, np.int64) for name in ("run", "call_site", "group", "epoch")],
        *[(name, np.int64) for name in ("num_ranks", "lent_bytes")],
        *[(name, np.int64) for name in ("named", "published", "began", "ended", "told")],
        ("first_rank", np.int64),
        ("is_here", np.uint64),
        ("came", np.int64, (64,)),
    ]
)

_lock = threading.Lock()
_recording: list[Trace] = []


@contextlib.contextmanager
def record() -> Iterator[Trace]:
    """Records which rank came when to each native exchange of this process, and what that took.

    Times are kept beside the program, which computes the same bits: nothing is compiled anew, and
    programs that are already compiled are recorded too. Exchanges count that end within the block:
    wait for results (``jax.block_until_ready``) before leaving it. The library holds the latest
    32,768 exchanges of up to 64 ranks each; of what went before ``Trace.num_lost`` tells. Blocks
    may be nested, and may overlap in several threads: all record all of the process.

    What XLA's collectives carry or ``"xla"`` computes is not recorded, nor what is exchanged on one
    GPU. Among several GPUs an exchange is recorded twice: when their threads launched it, as
    ``dispatch (launch)``, and when their streams came to it.

    Yields:
      The trace, which holds what was recorded when the block has been left.

    Raises:
      NotImplementedError: the native library cannot be loaded, so there is nothing to record.

    Example:
      >>> import jax_ep
      >>> with jax_ep.record() as trace:
      ...     pass  # steps of a program
      >>> len(trace), trace.num_lost
      (0, 0)
    """
    libraries = usable_libraries()
    for loaded in libraries.values():
        assert loaded.jax_ep_record_bytes() == _RECORD.itemsize
    trace = Trace()
    with _lock:
        _recording.append(trace)
        _switch(libraries)
    begins: dict[Platform, tuple[int, StreamsBegin | None]] = {
        name: _begin(name, loaded) for name, loaded in libraries.items()
    }
    try:
        yield trace
    finally:
        with _lock:
            _recording.remove(trace)
            _switch(libraries)
        trace._parts = [
            part for name, begin in begins.items() for part in _parts(name, libraries[name], begin)
        ]


def _switch(libraries: dict[Platform, ctypes.CDLL]) -> None:
    for loaded in libraries.values():
        loaded.jax_ep_record_calls(int(bool(_recording)))


def _begin(name: Platform, loaded: ctypes.CDLL) -> tuple[int, StreamsBegin | None]:
    streams = begin_streams(loaded) if name == "gpu" else None
    return loaded.jax_ep_num_records(), streams


def _parts(
    name: Platform, loaded: ctypes.CDLL, begin: tuple[int, StreamsBegin | None]
) -> Iterator[Columns]:
    """Yields the records since, and those of streams: an exchange is recorded before these end."""
    number, streams = begin
    ended = end_streams(loaded, streams) if streams else None
    records = _read(name, loaded, number)
    if ended:
        yield streams_beside(records, *ended)
        op = np.char.add(records["op"], np.where(records["fabric"] == "launches", " (launch)", ""))
        records = {**records, "op": op}
    yield records


def _read(name: Platform, loaded: ctypes.CDLL, begin: int) -> Columns:
    """Returns the records from number ``begin`` on."""
    room = np.zeros(loaded.jax_ep_num_records() - begin, _RECORD)
    count = loaded.jax_ep_read_records(begin, room.ctypes.data, len(room))
    records = room[:count]
    widest = min(int(records["num_ranks"].max(initial=0)), records["came"].shape[1])
    texts = {column: _texts(records[column]) for column in _TEXTS}
    rest = {column: records[column] for column in _RECORD.names or () if column not in texts}
    return {
        **rest,
        **texts,
        "came": records["came"][:, :widest],
        "platform": np.array(name),
        "process": np.array(jax.process_index()),
        "host": np.array(_host()),
        "num_lost": np.array(len(room) - count),
    }


def _texts(addresses: np.ndarray) -> np.ndarray:
    """Reads texts of the library, which it never frees."""
    found, at = np.unique(addresses, return_inverse=True)
    texts = [ctypes.string_at(int(address)).decode() for address in found]
    return np.array(texts, np.str_)[at] if texts else np.zeros(0, np.str_)


def _host() -> str:
    """Names this host as it has run since its clock began."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()}/{boot.read_text().strip() if boot.exists() else ''}"
