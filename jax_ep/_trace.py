"""What exchanges did and when, as users read it."""

import functools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from jax_ep._exchanges import Columns, Exchanges, median_of_waits, put_together, sum_of_waits

_FORMAT = 1
_NS = 1e-9


class Trace:
    """What ``record`` recorded: who came when to which call, and how long that took.

    It holds whole exchanges in the order in which they began, those that ended while it recorded.
    An exchange of several processes is in the trace of each, with what it saw; ``load`` puts these
    together.

    Example:
      >>> import pathlib, tempfile, jax_ep
      >>> with jax_ep.record() as trace:
      ...     pass  # steps of a program
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     trace.save(pathlib.Path(folder, "trace.npz"))
      ...     loaded = jax_ep.Trace.load(pathlib.Path(folder, "trace.npz"))
      >>> loaded.ops, loaded.waits().shape
      ((), (0, 0, 0))
    """

    def __init__(self, parts: Sequence[Columns] = ()) -> None:
        self._parts = list(parts)

    @staticmethod
    def load(*paths: str | os.PathLike[str]) -> "Trace":
        """Reads what ``save`` wrote, in this process or in others of the same host.

        Args:
          paths: the files; those of several processes of one run are put together.

        Raises:
          OSError: a file cannot be read.
          ValueError: there is no file, one was not written by ``save``, or they are of several
            hosts, which have no clock in common.
        """
        if not paths:
            raise ValueError("paths must name at least one file; got none.")
        parts = [part for path in paths for part in _read(pathlib.Path(path))]
        if len(hosts := sorted({str(part["host"]) for part in parts})) > 1:
            raise ValueError(
                f"paths must be of one host, whose processes share a clock; got some of {hosts}."
            )
        return Trace(parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to a file, for ``load`` and for ``python -m jax_ep report``.

        Args:
          path: the file, which is replaced. Give each process its own.

        Raises:
          OSError: the file cannot be written.
        """
        columns: dict[str, Any] = {"format": _FORMAT, "num_parts": len(self._parts)}
        columns |= {
            f"{number}/{name}": column
            for number, part in enumerate(self._parts)
            for name, column in part.items()
        }
        with open(path, "wb") as file:
            np.savez_compressed(file, **columns)

    @functools.cached_property
    def _exchanges(self) -> Exchanges:
        return put_together(self._parts)

    @property
    def ops(self) -> tuple[str, ...]:
        """The public functions that made the calls: ``dispatch``, ``dispatch (gradient)``."""
        return tuple(sorted(set(self._exchanges.labels["op"].tolist())))

    @property
    def processes(self) -> tuple[int, ...]:
        """The numbers of the processes that recorded it."""
        return tuple(self._exchanges.processes.tolist())

    @property
    def num_lost(self) -> int:
        """How many records are not here: more came than the library holds."""
        return sum(int(part["num_lost"]) for part in self._parts)

    def __len__(self) -> int:
        return len(self._exchanges.came)

    def _visits(self) -> Iterator[tuple[int, int, list[int]]]:
        """Yields process, rank, and the number of an exchange with its times there, in ns."""
        exchanges = self._exchanges
        for number, rank in np.argwhere(exchanges.came > 0).tolist():
            place = exchanges.process_of[number, rank]
            times = [exchanges.times[name][number, rank] for name in ("began", "ended", "told")]
            came = exchanges.came[number, rank]
            yield self.processes[place], rank, [number, int(came), *map(int, times)]

    def waits(self) -> Float64[np.ndarray, "ops i j"]:
        """Adds up how long rank i waited for rank j, by op.

        That is how much later j came than i; between processes also how long i went on waiting
        when j's process had shown what it lends. Of processes that are not in the trace only their
        neighbors' waits are known: one's wait for each, after it had waited for those before.
        While a rank waits for two, it waits for each.

        Returns:
          Seconds, for each of ``ops``.
        """
        op = self._exchanges.labels["op"]
        num_ranks = self._exchanges.came.shape[1]
        total = np.zeros((len(self.ops), num_ranks, num_ranks))
        for place, name in enumerate(self.ops):
            total[place] = sum_of_waits(self._exchanges[op == name]) * _NS
        return total

    def _usual_waits(self, which: Bool[np.ndarray, "n"]) -> Float64[np.ndarray, "i j"]:
        """Returns how long rank i waits for rank j in the median call of some."""
        return median_of_waits(self._exchanges[which]) * _NS

    def calls(self) -> dict[str, np.ndarray]:
        """Returns what is known of each exchange, an array of one entry for each.

        Returns:
          ``op``, ``scope`` (the ``jax.named_scope`` around the call), ``fabric`` (who met:
          ``"devices"``, ``"processes"``, or of GPUs the threads that launch, ``"launches"``, and
          what they launch, ``"streams"``; nobody where ranks are ``"stacked"`` on one device),
          ``epoch`` (its number, the same in all processes; 0 within one), ``num_ranks``,
          ``lent_bytes`` (what each rank lends its peers to read); ``first_arrival`` and
          ``last_arrival`` in ns of the host's steady clock (``time.monotonic_ns``); ``last_rank``,
          or -1 where not all arrivals are known; and in seconds: ``gather`` until all had come,
          ``work`` and ``tell``, each of the process that took longest, or the stream, ``lateness``
          [n, ranks] behind the first to come, and ``rank_work`` [n, ranks] of the rank's process,
          or its stream; that process's number is ``rank_process`` [n, ranks]. What is not known is
          NaN, or -1.
        """
        exchanges = self._exchanges
        came = exchanges.came
        never = np.iinfo(np.int64).max
        first = np.where(came > 0, came, never).min(axis=1, initial=never)
        last = came.max(axis=1, initial=0)
        began, ended, told = (exchanges.times[name] for name in ("began", "ended", "told"))
        is_there = ended > 0
        work = np.where(is_there, ended - began, np.nan) * _NS
        last_rank = came.argmax(axis=1) if came.size else np.zeros(len(came), np.int64)
        return {
            **{name: np.array(column.tolist()) for name, column in exchanges.labels.items()},
            "first_arrival": first,
            "last_arrival": last,
            "last_rank": np.where(exchanges.is_whole, last_rank, -1),
            "gather": (began.max(axis=1, initial=0) - first) * _NS,
            "work": np.where(is_there, ended - began, 0).max(axis=1, initial=0) * _NS,
            "tell": np.where(is_there, told - ended, 0).max(axis=1, initial=0) * _NS,
            "lateness": np.where(came > 0, came - first[:, None], np.nan) * _NS,
            "rank_work": work,
            "rank_process": np.where(
                exchanges.process_of >= 0, exchanges.processes[exchanges.process_of], -1
            ),
        }


def _read(path: pathlib.Path) -> list[Columns]:
    problem = f"paths must name files that Trace.save wrote; got {path}"
    try:
        with np.load(path, allow_pickle=False) as file:
            if int(file["format"]) != _FORMAT:
                raise ValueError(f"{problem}, of another version of jax_ep.")
            parts: list[dict[str, np.ndarray]] = [{} for _ in range(int(file["num_parts"]))]
            for name in set(file.files) - {"format", "num_parts"}:
                number, _, column = name.partition("/")
                parts[int(number)][column] = file[name]
    except (KeyError, EOFError, AttributeError) as error:
        raise ValueError(f"{problem}.") from error
    except ValueError as error:
        raise (error if str(error).startswith(problem) else ValueError(f"{problem}.")) from error
    return list(parts)
