"""How long ranks wait for each other, and what they say of it."""

import ctypes

from jax_ep._checks import check_seconds
from jax_ep._library import library, register_handlers, usable_libraries, usable_platforms


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
    before, *_ = [
        loaded.jax_ep_set_wait_timeout(float(seconds)) for loaded in usable_libraries().values()
    ]
    return before


def log_calls(enabled: bool) -> bool:
    """Has every native exchange of this process say on stderr who comes, and who waited how long.

    One line when a rank comes to a call, and one when it leaves it, with the rank, the public
    function, which call of which run it is, how long the rank waited for its peers and, between
    processes, the exchange's number: of a program that hangs, the ranks that came and did not leave
    wait for those that have not come. It holds for calls that begin later. Exchanges on one device,
    where nobody waits, say nothing.

    Args:
      enabled: whether to.

    Returns:
      Whether it did until now.

    Raises:
      TypeError: ``enabled`` is not a bool.
      NotImplementedError: the native library cannot be loaded, so there is nothing to say.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be a bool; got {enabled!r}.")
    before, *_ = [loaded.jax_ep_log_calls(int(enabled)) for loaded in usable_libraries().values()]
    return bool(before)


def end_at(phase: int, exchanges: int, signal: int) -> None:
    """Ends this process by a signal, or by exiting if that is 0, in a phase of an exchange.

    Args:
      phase: its number in ``ffi/fabric/processes/process_words.h``.
      exchanges: how many exchanges with other processes come before.
      signal: what the process sends itself.
    """
    for platform in usable_platforms():
        register_handlers(platform)  # Which says what process this is.
        library(platform).jax_ep_end_at(phase, ctypes.c_int64(exchanges), signal)
