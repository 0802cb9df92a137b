"""Eight CPU devices, strict dtype promotion, warnings as errors; the table's fixtures and marks."""

from __future__ import annotations

import os
import zlib
from collections import defaultdict
from collections.abc import Iterator

# Before JAX is imported: it reads this once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

# Before XLA starts: it reads these once. Compiling takes most of the tests' time, so LLVM gets
# little to do; XLA's own passes all run.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if jax.__version_info__ < (0, 11):
    # Emits code three times as fast. Newer versions do not know the flag, and end where they meet
    # one: tests with them cover the emitters that are used by default.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS))

import hypothesis  # noqa: E402
import pytest  # noqa: E402
from implementations import DEFAULT_WAIT, NAMES, ROWS, Row, require  # noqa: E402

import jax_ep  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
# GPUs would multiply matrices of float32 in TF32, which is off by more than any tolerance here.
jax.config.update("jax_default_matmul_precision", "highest")
hypothesis.settings.register_profile(
    "jax_ep", deadline=None, derandomize=True, max_examples=20, database=None
)
hypothesis.settings.load_profile("jax_ep")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parts",
        type=_parse_parts,
        default=({1}, 1),
        metavar="I,J/N",
        help="deal what each test is parametrized with into N parts, the same ones in every run, "
        "and run parts I and J, or all of a test that has fewer, unless it is marked 'long'",
    )


def _parse_parts(text: str) -> tuple[set[int], int]:
    chosen, number = text.split("/")
    parts = {int(part) for part in chosen.split(",")}
    if not parts <= set(range(1, int(number) + 1)):
        raise ValueError(f"parts must be from 1 to {number}; got {chosen}.")
    return parts, int(number)


def _hash(item: pytest.Item) -> int:
    return zlib.crc32(item.nodeid.encode())


def _hash_of_many(item: pytest.Item) -> int:
    """By parameters alone: so tests that look at one program's answers stay together."""
    return zlib.crc32(item.nodeid.partition("[")[2].encode())


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves what ``--parts`` takes of each test."""
    chosen, number = config.option.parts
    by_test = defaultdict(list)
    left_out = set()
    for item in items:
        if item.get_closest_marker("long") is None:
            by_test[item.nodeid.partition("[")[0]].append(item)
        elif _hash(item) % number + 1 not in chosen:
            left_out.add(item)
    for tests in by_test.values():
        if len(tests) >= number:
            # By names: in their order a part could miss a row of the table altogether.
            tests.sort(key=_hash_of_many if len(tests) > 100 else _hash)
            left_out.update(item for i, item in enumerate(tests) if i % number + 1 not in chosen)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks what starts processes, and what runs pure JAX, by the row or the name it is given."""
    if item.path.parent.name == "multiprocess":
        item.add_marker(pytest.mark.long)
    callspec = getattr(item, "callspec", None)
    if callspec and any(map(_is_pure_jax, callspec.params.values())):
        item.add_marker(pytest.mark.xla)
        if item.get_closest_marker("composes") is not None:
            item.add_marker(pytest.mark.long)


def _is_pure_jax(value: object) -> bool:
    if isinstance(value, Row):
        return value.implementation == "xla"
    return isinstance(value, str) and value == "xla"


@pytest.fixture(scope="session", params=ROWS, ids=str)
def row(request: pytest.FixtureRequest) -> Row:
    """Each implementation on each fabric."""
    request.param.require()
    return request.param


@pytest.fixture(scope="session", params=[row for row in ROWS if row.serves(4)], ids=str)
def ranks_row(request: pytest.FixtureRequest) -> Row:
    """Each implementation on each fabric that serves several ranks."""
    request.param.require()
    return request.param


LAYER_ROWS = [row for row in ROWS if row.serves(4) and str(row) != "xla-vmap"]


@pytest.fixture(scope="session", params=LAYER_ROWS, ids=str)
def layer_row(request: pytest.FixtureRequest) -> Row:
    """The same but for collectives under ``vmap``: for dtypes, widths and whole layers.

    There the library does nothing that the conformance tests do not see: batching is JAX's.
    """
    request.param.require()
    return request.param


@pytest.fixture(scope="session", params=NAMES)
def implementation(request: pytest.FixtureRequest) -> str:
    """Each implementation, where the test brings its own mesh."""
    require(request.param)
    return request.param


@pytest.fixture(scope="module")
def standard_promotion() -> Iterator[None]:
    """What other libraries count on, such as Optax: that dtypes are promoted."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def wait_timeout() -> Iterator[float]:
    """Puts the bound on waiting to its default, and back to what it was."""
    before = jax_ep.set_wait_timeout(DEFAULT_WAIT)
    yield DEFAULT_WAIT
    jax_ep.set_wait_timeout(before)
