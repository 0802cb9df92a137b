"""When streams of GPUs came to exchanges and went on, as native code holds it."""

import ctypes
import dataclasses

import numpy as np
from jaxtyping import Shaped

from jax_ep._exchanges import STREAMS, Columns

_STAMPS = ("came", "began", "ended", "told")
# StreamTimes of ffi/fabric/gpus/stream_times.h, and ClockReading of gpu_clock.h there.
_TIMES = np.dtype([(name, np.int64) for name in ("number", "exchange", "rank", "device", *_STAMPS)])
_CLOCK = np.dtype([(name, np.int64) for name in ("device", "gpu", "host")])
_MAX_DEVICES = 64


@dataclasses.dataclass(frozen=True, eq=False)
class StreamsBegin:
    """Where a library's times of streams stand, and its GPUs' clocks, when recording begins."""

    number: int
    clocks: Shaped[np.ndarray, "devices"]


def begin_streams(loaded: ctypes.CDLL) -> StreamsBegin:
    """Notes where a library for GPUs begins to record.

    Clocks are those of the GPUs on which exchanges have been; the host waits for a few launches on
    each, on a stream of its own.
    """
    return StreamsBegin(clocks=_clocks(loaded), number=loaded.jax_ep_num_stream_times())


def end_streams(
    loaded: ctypes.CDLL, begin: StreamsBegin
) -> tuple[Shaped[np.ndarray, "times"], int]:
    """Reads what has been recorded since, by the host's clock, and how much of it is lost."""
    count = loaded.jax_ep_num_stream_times() - begin.number
    room = np.zeros(count, _TIMES)
    found = loaded.jax_ep_read_stream_times(begin.number, room.ctypes.data, count)
    lost = max(count - loaded.jax_ep_max_stream_times(), 0)
    if not found:
        return room[:0], lost
    return on_host_clock(room[:found], begin.clocks, _clocks(loaded)), lost


def _clocks(loaded: ctypes.CDLL) -> Shaped[np.ndarray, "devices"]:
    room = np.zeros(_MAX_DEVICES, _CLOCK)
    return room[: loaded.jax_ep_read_gpu_clocks(room.ctypes.data, len(room))]


def on_host_clock(
    times: Shaped[np.ndarray, "times"],
    before: Shaped[np.ndarray, "devices"],
    after: Shaped[np.ndarray, "devices"],
) -> Shaped[np.ndarray, "known"]:
    """Converts times from their GPUs' clocks, which run apart, by two readings of each.

    Args:
      times: by the clocks of GPUs.
      before: readings before them; a GPU's that is missing here is taken to keep the host's time.
      after: readings after them.

    Returns:
      Those whose GPU's clock could be read, by the host's.
    """
    converted, is_known = times.copy(), np.zeros(len(times), bool)
    earlier = {int(reading["device"]): reading for reading in before}
    for end in after:
        its = times["device"] == end["device"]
        start = earlier.get(int(end["device"]), end)
        passed = int(end["gpu"] - start["gpu"])
        # In 64 bits only what is small is a whole number of ns as a float.
        ahead = int(end["host"] - start["host"]) - passed
        for name in _STAMPS:
            since = times[name][its] - end["gpu"]
            drift = np.rint(since * (ahead / passed if passed > 0 else 0.0)).astype(np.int64)
            converted[name][its] = end["host"] + since + drift
        is_known |= its
    return converted[is_known]


def streams_beside(records: Columns, times: Shaped[np.ndarray, "times"], num_lost: int) -> Columns:
    """Makes records of streams, one for each rank, from those of when they were launched.

    Args:
      records: of launches, in which the exchanges are.
      times: by the host's clock. Those of exchanges that are not in the records, as they failed, or
        in which some stream of this process has none, are left out.
      num_lost: how many times are not here.
    """
    place = {exchange: i for i, exchange in enumerate(records["exchange"].tolist())}
    at = np.array([place.get(exchange, -1) for exchange in times["exchange"].tolist()], np.int64)
    times, at = times[at >= 0], at[at >= 0]
    num_here = np.array([bits.bit_count() for bits in records["is_here"].tolist()], np.int64)
    is_whole = np.bincount(at, minlength=len(num_here))[at] == num_here[at]
    times, at = times[is_whole], at[is_whole]
    part = {name: column[at] if column.ndim else column for name, column in records.items()}
    unknown = np.zeros(len(at), np.int64)
    return {
        **part,
        **{name: times[name] for name in _STAMPS},
        "came": times["came"][:, None],
        "named": unknown,
        "published": unknown,
        "fabric": np.full(len(at), STREAMS),
        "first_rank": times["rank"],
        "is_here": np.ones(len(at), np.uint64),
        "num_lost": np.array(num_lost),
    }
