"""The decorator that runs a test body in several processes."""

from __future__ import annotations

import functools
import inspect
import pickle
from collections.abc import Callable
from typing import ParamSpec

from jax_ep.testing._cluster import run_cluster
from jax_ep.testing._job import Job

P = ParamSpec("P")


def multiprocess(
    num_processes: int, devices_per_process: int, *, timeout: float = 120.0
) -> Callable[[Callable[P, object]], Callable[P, None]]:
    """Makes a test run in every process of a JAX cluster on this machine.

    The body runs in ``num_processes`` fresh Python processes with ``devices_per_process`` CPU
    devices each, joined by ``jax.distributed``: ``jax.process_index()`` tells them apart and
    ``jax.devices()`` lists the devices of all of them. XLA's collectives cross processes through
    gloo::

        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import PartitionSpec as P
        from jax_ep.testing import multiprocess


        @multiprocess(2, 4)
        def test_psum():
            mesh = jax.make_mesh((8,), ("expert",))
            total = jax.jit(
                jax.shard_map(
                    lambda: jax.lax.psum(jax.lax.axis_index("expert"), "expert"),
                    mesh=mesh,
                    in_specs=(),
                    out_specs=P(),
                )
            )()
            assert int(total) == sum(range(8))

    The test passes when the body returns on every rank. When it raises, hangs or ends its process
    on one of them, the others are killed and the failure shows what each rank printed, with the
    stacks of all threads of those that hung. No process outlives the test, nor a killed pytest.

    The body is found again by its file and name, so it must be a function at a module's top level
    with this decorator outermost but for pytest's marks. Its arguments (parametrized values, or
    fixtures such as ``tmp_path``) must be picklable; fixtures run in the parent only. Asserts
    in children are not rewritten by pytest: prefer ``np.testing`` for arrays.

    Args:
      num_processes: how many ranks.
      devices_per_process: CPU devices of each of them.
      timeout: seconds that the whole cluster may take, from its start to its end.

    Returns:
      A decorator for the test function. The undecorated body stays at ``multiprocess_body``.

    Raises:
      ValueError: a number is not positive or, from the decorator, the body is not at the top
        level of a module.
    """
    for name, value in [
        ("num_processes", num_processes),
        ("devices_per_process", devices_per_process),
        ("timeout", timeout),
    ]:
        if value <= 0:
            raise ValueError(f"{name} must be positive; got {value}.")

    def decorate(body: Callable[P, object]) -> Callable[P, None]:
        name = getattr(body, "__qualname__", repr(body))
        if not name.isidentifier():
            raise ValueError(
                "body must be a function at the top level of a module, where the child processes "
                f"find it by name; got {name}."
            )

        @functools.wraps(body)
        def test(*args: P.args, **kwargs: P.kwargs) -> None:
            __tracebackhide__ = True
            run_cluster(
                Job(
                    file=inspect.getfile(body),
                    module="__mp_main__" if body.__module__ == "__main__" else body.__module__,
                    name=name,
                    arguments=pickle.dumps((args, kwargs)),
                    num_processes=num_processes,
                    devices_per_process=devices_per_process,
                    timeout=timeout,
                )
            )

        test.multiprocess_body = body  # type: ignore[attr-defined]
        return test

    return decorate
