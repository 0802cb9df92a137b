"""Helps to test expert-parallel code: processes, routings, payloads, comparisons and a rival.

Nothing here needs pytest, and of the rest of the library only its commands import this.
"""

from jax_ep.testing._cluster import MultiprocessFailure
from jax_ep.testing._compare import assert_bitwise_equal, assert_close_ulp
from jax_ep.testing._kill import kill
from jax_ep.testing._multiprocess import multiprocess
from jax_ep.testing._origin import decode_origin, encode_origin
from jax_ep.testing._routings import (
    k_hot_routing,
    routing_with_holes,
    uniform_routing,
    zipf_routing,
)
from jax_ep.testing._slots import SlotsResult, slots_all_to_all, slots_moe

__all__ = [
    "MultiprocessFailure",
    "SlotsResult",
    "assert_bitwise_equal",
    "assert_close_ulp",
    "decode_origin",
    "encode_origin",
    "k_hot_routing",
    "kill",
    "multiprocess",
    "routing_with_holes",
    "slots_all_to_all",
    "slots_moe",
    "uniform_routing",
    "zipf_routing",
]
