"""MaxText's routed experts by this library's exchange.

``install`` puts another method in the place of MaxText's ``RoutedMoE.sparse_matmul``: it routes by
MaxText's own functions, and then dispatches, applies the experts and combines. It was written for
MaxText 0.2.5, which is imported here.
"""

import functools
import inspect
from typing import Any, Final, get_args

from jax_ep._checks import check_one_of
from jax_ep._types import Implementation
from jax_ep.integrations._replace import check_like, own, put, put_back

MADE_FOR: Final = "0.2.5"
"""The version of MaxText that this module was written for and is tested with."""

try:
    from maxtext.layers import moe as _moe  # pyright: ignore[reportMissingImports]

    from jax_ep.integrations._maxtext_method import sparse_matmul as _sparse_matmul
except ImportError as error:
    raise ImportError(
        f"jax_ep.integrations.maxtext needs MaxText and what that imports, which `pip install "
        f"maxtext=={MADE_FOR}` does not bring: docs/trainers.md says what to install. ({error})",
        name=error.name,
    ) from error


def install(*, implementation: Implementation | None = None) -> None:
    """Has MaxText's routed experts exchange tokens by this library, where ``sparse_matmul=True``.

    To be called before the model is compiled, in every process. Called again, it replaces what it
    has put there. ``docs/trainers.md`` lists what of MaxText's configuration is served.

    Args:
      implementation: what carries the exchange, as for ``make_plan``.

    Raises:
      NotImplementedError: MaxText's method takes other arguments than in the version that this
        module was made for. (Of another version that takes the same, a warning tells.)
      ValueError: ``implementation`` is none of those known.
    """
    check_one_of("implementation", implementation, (None, *get_args(Implementation)))
    original = own(_moe.RoutedMoE, "sparse_matmul")
    ours = list(inspect.signature(_sparse_matmul).parameters)[1:-1]
    check_like("MaxText", "maxtext", MADE_FOR, original, ["self", *ours])

    @functools.wraps(original)
    def sparse_matmul(layer: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        return _sparse_matmul(layer, *args, **kwargs, implementation=implementation)

    put(_moe.RoutedMoE, "sparse_matmul", sparse_matmul)


def uninstall() -> None:
    """Puts MaxText's own method back, if ``install`` has taken it out."""
    put_back(_moe.RoutedMoE, "sparse_matmul")
