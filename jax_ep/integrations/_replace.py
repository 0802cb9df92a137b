"""Puts functions of this library's in the place of another's, and those back."""

import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

_originals: dict[tuple[Any, str], Any] = {}
"""What was there, by who holds it and its name, while another is in its place."""


def put(owner: Any, name: str, value: Any) -> None:
    """Puts a value in the place of a class's or a module's own; called again, of an earlier one."""
    _originals.setdefault((owner, name), getattr(owner, name))
    setattr(owner, name, value)


def put_back(owner: Any, name: str) -> None:
    """Puts the owner's own value back, if ``put`` has taken it out."""
    if (owner, name) in _originals:
        setattr(owner, name, _originals.pop((owner, name)))


def own(owner: Any, name: str) -> Any:
    """Returns the owner's own value, whether or not another is in its place."""
    return _originals.get((owner, name), getattr(owner, name))


def check_like(
    library: str,
    package: str,
    made_for: str | None,
    function: Callable[..., Any],
    known: Sequence[str],
) -> None:
    """Checks that what is to be replaced takes what it is known to take.

    Args:
      library: whose it is, as messages name it.
      package: what has its version.
      made_for: the version that ours was made for, of others of which a warning tells; None for a
        library that has a new one every day.
      function: what the library has.
      known: the arguments that it must take, in their order.

    Raises:
      NotImplementedError: it takes others.
    """
    version = importlib.metadata.version(package)
    given = list(inspect.signature(function).parameters)
    if given != list(known):
        where = f", as in version {made_for}" if made_for else ""
        raise NotImplementedError(
            f"{library}'s {function.__qualname__} must take {list(known)}{where}; in {version} it "
            f"takes {given}."
        )
    if made_for not in (None, version):
        warnings.warn(
            f"jax_ep.integrations.{library.lower()} was made for {library} {made_for}, and is "
            f"tested with no other; this is {version}.",
            stacklevel=3,
        )
