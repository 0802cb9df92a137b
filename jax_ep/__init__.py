"""Expert-parallel dispatch and combine for JAX, inside the XLA program."""

from jax_ep import experts as experts
from jax_ep import routing as routing
from jax_ep import wire as wire
from jax_ep._balance import Balance as Balance
from jax_ep._balance import balance as balance
from jax_ep._balance import with_copies as with_copies
from jax_ep._combine import combine as combine
from jax_ep._dispatch import dispatch as dispatch
from jax_ep._eplb import eplb as eplb
from jax_ep._grouped_matmul import grouped_matmul as grouped_matmul
from jax_ep._layout import suggest_capacity as suggest_capacity
from jax_ep._library import register as register
from jax_ep._make_plan import make_plan as make_plan
from jax_ep._metrics import count_choices as count_choices
from jax_ep._metrics import load_metrics as load_metrics
from jax_ep._moe import moe as moe
from jax_ep._picture import draw_waits as draw_waits
from jax_ep._placement import Placement as Placement
from jax_ep._placement import place as place
from jax_ep._plan import Plan as Plan
from jax_ep._rebalancer import Proposal as Proposal
from jax_ep._rebalancer import Rebalancer as Rebalancer
from jax_ep._record import record as record
from jax_ep._rows import RowSources as RowSources
from jax_ep._rows import row_experts as row_experts
from jax_ep._rows import row_sources as row_sources
from jax_ep._rows import row_weights as row_weights
from jax_ep._slots import from_slots as from_slots
from jax_ep._slots import to_slots as to_slots
from jax_ep._trace import Trace as Trace
from jax_ep._types import DROPPED as DROPPED
from jax_ep._waits import log_calls as log_calls
from jax_ep._waits import set_wait_timeout as set_wait_timeout

__version__ = "0.1.0"
