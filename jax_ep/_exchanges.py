"""What several processes recorded of their exchanges, put together by exchange."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

Columns = Mapping[str, np.ndarray]
"""Records of one process: an array for each field, and what they have in common as scalars."""

STREAMS = "streams"
"""The fabric of GPUs' streams, of which each rank is recorded by itself."""

_PHASES = ("named", "published")
_TIMES = ("began", "ended", "told")

_CHUNK = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Exchanges:
    """Exchanges in the order in which they began: times in ns, 0 where they are not known.

    Of n exchanges, P processes that recorded them, and R ranks, as many as the largest has.

    Attributes:
      labels: by name: ``op``, ``scope``, ``fabric``, ``epoch``, ``num_ranks``, ``lent_bytes``, [n].
      processes: the numbers of the processes, [P].
      came: when each rank came, [n, R].
      process_of: the place in ``processes`` of each rank's, [n, R]; -1 where it is not known.
      times: by name: when each rank's work ``began`` and ``ended`` and it was ``told``, [n, R]; all
        of a process work as one, but for streams.
      phases: by name: when a process had been told by the leader which exchange it is (``named``),
        and ``published``, [n, P].
      seen: when a process saw what a rank of another one lends to be there, [n, P, R].
    """

    labels: Mapping[str, np.ndarray]
    processes: Int64[np.ndarray, "P"]
    came: Int64[np.ndarray, "n R"]
    process_of: Int64[np.ndarray, "n R"]
    times: Mapping[str, Int64[np.ndarray, "n R"]]
    phases: Mapping[str, Int64[np.ndarray, "n P"]]
    seen: Int64[np.ndarray, "n P R"]

    @property
    def is_rank(self) -> Bool[np.ndarray, "n R"]:
        """Whether an exchange has so many ranks."""
        return np.arange(self.came.shape[1]) < self.labels["num_ranks"][:, None]

    @property
    def is_whole(self) -> Bool[np.ndarray, "n"]:
        """Whether it is known of all ranks of an exchange when they came."""
        return np.all((self.came > 0) | ~self.is_rank, axis=1)

    def __getitem__(self, which: Any) -> "Exchanges":
        """Returns some of the exchanges."""
        return Exchanges(
            labels={name: column[which] for name, column in self.labels.items()},
            processes=self.processes,
            came=self.came[which],
            process_of=self.process_of[which],
            times={name: column[which] for name, column in self.times.items()},
            phases={name: column[which] for name, column in self.phases.items()},
            seen=self.seen[which],
        )


def put_together(parts: Sequence[Columns]) -> Exchanges:
    """Finds the records of each exchange, in all processes."""
    processes = np.unique([int(part["process"]) for part in parts]).astype(np.int64)
    places: dict[tuple[Any, ...], int] = {}
    found = [
        np.array([places.setdefault(key, len(places)) for key in _keys(part)], np.int64)
        for part in parts
    ]
    num_ranks = max((int(part["num_ranks"].max(initial=0)) for part in parts), default=0)
    made = _empty(len(places), processes, num_ranks)
    for part, at in zip(parts, found, strict=True):
        _enter(made, part, at)
    never = np.iinfo(np.int64).max
    began = np.where(made.came > 0, made.came, never).min(axis=1, initial=never)
    return made[np.argsort(began, kind="stable")]


def _keys(part: Columns) -> list[tuple[Any, ...]]:
    """Tells exchanges apart: those of several processes by what is the same in all of these."""
    own = (int(part["process"]), str(part["platform"]))
    columns = [part[name].tolist() for name in ("fabric", "exchange", "group", "epoch", "op")]
    return [
        (fabric, group, epoch, op) if epoch else (fabric, *own, exchange)
        for fabric, exchange, group, epoch, op in zip(*columns, strict=True)
    ]


def _empty(count: int, processes: np.ndarray, num_ranks: int) -> Exchanges:
    texts = {name: np.full(count, "", object) for name in ("op", "scope", "fabric")}
    numbers = {name: np.zeros(count, np.int64) for name in ("epoch", "num_ranks", "lent_bytes")}
    shape = (count, len(processes))
    return Exchanges(
        labels={**texts, **numbers},
        processes=processes,
        came=np.zeros((count, num_ranks), np.int64),
        process_of=np.full((count, num_ranks), -1, np.int64),
        times={name: np.zeros((count, num_ranks), np.int64) for name in _TIMES},
        phases={name: np.zeros(shape, np.int64) for name in _PHASES},
        seen=np.zeros((*shape, num_ranks), np.int64),
    )


def _enter(made: Exchanges, part: Columns, at: Int64[np.ndarray, "records"]) -> None:
    place = int(np.searchsorted(made.processes, int(part["process"])))
    for name, column in made.labels.items():
        column[at] = part[name]
    for name, column in made.phases.items():
        column[at, place] = part[name]
    width = part["came"].shape[1]
    rank = part["first_rank"][:, None] + np.arange(width)
    is_rank = rank < part["num_ranks"][:, None]
    bits = part["is_here"][:, None] >> np.arange(width, dtype=np.uint64)
    is_here = is_rank & (bits & np.uint64(1)).astype(bool)
    for of_place, column in ((is_here, made.came), (is_rank & ~is_here, made.seen[:, place])):
        row, k = np.nonzero(of_place)
        column[at[row], rank[row, k]] = part["came"][row, k]
    row, k = np.nonzero(is_here)
    made.process_of[at[row], rank[row, k]] = place
    for name, column in made.times.items():
        column[at[row], rank[row, k]] = part[name][row]


def sum_of_waits(exchanges: Exchanges) -> Int64[np.ndarray, "R R"]:
    """Adds up for how many ns rank i waited for rank j."""
    num_ranks = exchanges.came.shape[1]
    total = np.zeros((num_ranks, num_ranks), np.int64)
    for start in range(0, len(exchanges.came), _CHUNK):
        total += _waits(exchanges[start : start + _CHUNK]).sum(axis=0)
    return total


def median_of_waits(exchanges: Exchanges) -> Float64[np.ndarray, "R R"]:
    """Returns for how many ns rank i waits for rank j in the median, of some exchanges."""
    step = max(1, -(-len(exchanges.came) // _CHUNK))
    return np.median(_waits(exchanges[::step]), axis=0)


def _waits(some: Exchanges) -> Int64[np.ndarray, "n R R"]:
    came, process_of = some.came, some.process_of
    late = np.maximum(came[:, None, :] - came[:, :, None], 0)
    late = np.where((came[:, None, :] > 0) & (came[:, :, None] > 0), late, 0)
    # By the process of i, then by i: what its wait for another process took, from when that had
    # published, if it is known.
    looked = _looked(some)
    whose = np.maximum(process_of, 0)
    there = np.take_along_axis(some.phases["published"], whose, axis=1)
    there = np.where(process_of >= 0, there, 0)[:, None, :]
    took = np.maximum(np.where(some.seen > 0, some.seen - np.maximum(looked, there), 0), 0)
    took += np.where(process_of[:, None, :] >= 0, 0, _led(some))
    by_rank = np.take_along_axis(took, whose[:, :, None], axis=1)
    return late + np.where((process_of >= 0)[:, :, None], by_rank, 0)


def _led(some: Exchanges) -> Int64[np.ndarray, "n P R"]:
    """Returns how long a process waited for the leader, that of rank 0, to name the exchange."""
    is_own = some.process_of[:, None, :] == np.arange(len(some.processes))[:, None]
    gathered = np.where(is_own, some.came[:, None, :], 0).max(axis=2, initial=0)
    waited = np.maximum(some.phases["named"] - gathered, 0)
    is_leaders = (some.seen > 0) & (some.seen == some.seen[:, :, :1])
    return np.where(is_leaders, waited[:, :, None], 0)


def _looked(some: Exchanges) -> Int64[np.ndarray, "n P R"]:
    """Returns since when a process waited for each rank's: it waits for one after the other."""
    looked = np.zeros_like(some.seen)
    before = some.phases["published"].copy()
    latest = before.copy()
    order = np.argsort(some.seen, axis=2)
    for k in range(some.seen.shape[2]):
        which = order[:, :, k : k + 1]
        seen = np.take_along_axis(some.seen, which, axis=2)[:, :, 0]
        before = np.where(seen > latest, latest, before)
        latest = np.maximum(seen, latest)
        np.put_along_axis(looked, which, before[:, :, None], axis=2)
    return looked
