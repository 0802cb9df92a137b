"""The exchange in native code: whether it serves where a plan is traced."""

from typing import cast, get_args

from jax_ep._call import Call
from jax_ep._compat import trace_platform
from jax_ep._fabrics import choose, platform_problem
from jax_ep._layout import Layout
from jax_ep._library import describe, native_platform, warn_once
from jax_ep._ops import PLAN
from jax_ep._processes import Refusal
from jax_ep._types import Binding, Platform


def platform_here() -> str | None:
    """Returns the platform whose native code will most likely run what is traced here."""
    return native_platform(trace_platform())


def refusal(layout: Layout, binding: Binding) -> str | None:
    """Returns why native code does not serve an exchange that is traced here, or None.

    Says nothing of the processes that its ranks are in: only a program's devices tell.
    """
    chosen = choose(Call(PLAN, layout, binding, "make_plan", platform_here()), join=False)
    return chosen.reason if isinstance(chosen, Refusal) else None


def serves(layout: Layout, binding: Binding) -> bool:
    """Tells whether native code serves an exchange here; warns once if its library is unfit."""
    platform = platform_here()
    if platform in get_args(Platform) and (reason := platform_problem(platform)) is not None:
        warn_once(reason)
        return False
    return refusal(layout, binding) is None


def unavailable_reason() -> str | None:
    """Returns why native code does not serve at all here, or None. Waits for nobody."""
    return platform_problem(platform_here())


def library_info() -> dict[str, str]:
    """Returns what the native library for this platform says of itself.

    Raises:
      NotImplementedError: there is none, or it cannot be loaded.
    """
    if (reason := unavailable_reason()) is not None:
        raise NotImplementedError(reason)
    return describe(cast(Platform, platform_here()))
