"""Ends a rank's process on purpose, to see what becomes of the others."""

from __future__ import annotations

import os
import signal
from typing import Literal, TypeAlias

import jax

from jax_ep import _native, _waits
from jax_ep.testing._job import Stage, current_folder, write_stage

When: TypeAlias = Literal["now", "publishing", "awaiting", "pulling"]
How: TypeAlias = Literal["kill", "stop", "exit"]

# The library's numbers of its phases.
_PHASES: dict[When, int] = {"publishing": 5, "awaiting": 6, "pulling": 7}
_SIGNALS: dict[How, int] = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "exit": 0}


def kill(rank: int, *, when: When = "now", how: How = "kill", exchanges: int = 0) -> None:
    """Ends the process of one rank of a multi-process test, which then counts as no failure.

    Call it on every rank, in the body of a `multiprocess` test; it returns at once on all ranks
    but the one that it names. The test passes if the body returns on all others::

        @multiprocess(3, 1)
        def test_survivors():
            first = step()  # the first run of a program is not a good time
            jax_ep.set_wait_timeout(2)
            kill(1, when="pulling")
            if jax.process_index() != 1:
                with pytest.raises(jax.errors.JaxRuntimeError, match="process 1"):
                    jax.block_until_ready(step())

    Args:
      rank: the index of the process. Rank 0 holds JAX's coordinator, and JAX ends all others when
        that is gone, so it can only be stopped.
      when: now, or in a native exchange with ranks of other processes: while it copies its rows to
        where they read them ("publishing"), waits for theirs ("awaiting") or reads them
        ("pulling"). Each of ``make_plan``, ``dispatch`` and ``combine`` is an exchange, and so is
        each of their gradients.
      how: by SIGKILL; by SIGSTOP, after which it is there but does nothing any more; or by
        ``os._exit``.
      exchanges: how many exchanges it first takes part in.

    Raises:
      ValueError: ``rank`` is none of the test's ranks, or is 0 and would be ended; ``when`` or
        ``how`` is none of these.
      RuntimeError: it is not called in the body of a `multiprocess` test.
      NotImplementedError: ``when`` is not "now" and native code does not serve here.
    """
    if not 0 <= rank < jax.process_count():
        raise ValueError(f"rank must be within 0 to {jax.process_count() - 1}; got {rank}.")
    for name, value, options in (("when", when, ("now", *_PHASES)), ("how", how, (*_SIGNALS,))):
        if value not in options:
            raise ValueError(f"{name} must be one of {', '.join(options)}; got {value!r}.")
    if rank == 0 and how != "stop":
        raise ValueError("rank must not be 0, which JAX cannot go on without; stop it instead.")
    folder = current_folder()
    if when != "now" and (reason := _native.unavailable_reason()) is not None:
        raise NotImplementedError(f"when={when!r} needs native exchanges: {reason}")
    if jax.process_index() != rank:
        return
    write_stage(folder, rank, Stage.DOOMED)
    if when != "now":
        _waits.end_at(_PHASES[when], exchanges, _SIGNALS[how])
    elif how == "exit":
        os._exit(1)
    else:
        os.kill(os.getpid(), _SIGNALS[how])
