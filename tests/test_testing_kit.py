"""The multi-process kit, on bodies that pass, fail, hang and vanish."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jax_ep.testing import MultiprocessFailure, _cluster, multiprocess

pytestmark = pytest.mark.long


def _psum_over_all_devices():
    mesh = jax.make_mesh((8,), ("expert",))
    index_sum = jax.shard_map(
        lambda: jax.lax.psum(jax.lax.axis_index("expert"), "expert"),
        mesh=mesh,
        in_specs=(),
        out_specs=P(),
    )
    return int(jax.jit(index_sum)())


@multiprocess(2, 4)
def test_collectives_cross_two_processes():
    assert (jax.process_count(), jax.local_device_count()) == (2, 4)
    assert _psum_over_all_devices() == sum(range(8))


@multiprocess(4, 2)
def test_collectives_cross_four_processes():
    assert (jax.process_count(), jax.local_device_count()) == (4, 2)
    assert _psum_over_all_devices() == sum(range(8))


@pytest.mark.parametrize("shape", [(2, 3), (4,)])
@multiprocess(1, 3)
def test_arguments_reach_the_body(shape, tmp_path):
    assert jax.local_device_count() == 3
    assert jnp.zeros(shape).shape == shape
    (tmp_path / "seen").write_text("here")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_body_runs_once_on_each_rank(num_processes, tmp_path):
    multiprocess(num_processes, 1)(_leave_a_note)(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"rank-{rank}-of-{num_processes}" for rank in range(num_processes)
    ]


def _leave_a_note(folder):
    note = folder / f"rank-{jax.process_index()}-of-{jax.process_count()}"
    with note.open("x") as file:  # a second run of this rank would fail
        file.write(str(os.getpid()))


@multiprocess(2, 1, timeout=30)
def _raise_on_rank_1(folder):
    _leave_a_note(folder)
    if jax.process_index() == 1:
        raise ValueError("the needle")
    time.sleep(600)


def test_exception_is_shown_with_its_rank_and_the_others_are_killed(tmp_path):
    start = time.monotonic()
    with pytest.raises(MultiprocessFailure) as failure:
        _raise_on_rank_1(tmp_path)
    message = str(failure.value)
    assert "test_testing_kit.py::_raise_on_rank_1 did not pass on 2 processes x 1" in message
    assert "rank 1 raised an exception" in message
    assert re.search(r"rank 0 was still (running the test body|connecting)", message)
    traceback = message.split("----- output of")[1]
    assert traceback.startswith(" rank 1 -----\nTraceback")
    assert 'raise ValueError("the needle")' in traceback
    assert time.monotonic() - start < 30
    _assert_gone(tmp_path)


@multiprocess(2, 1, timeout=12)
def _hang_on_rank_1(folder):
    _leave_a_note(folder)
    if jax.process_index() == 1:
        time.sleep(600)


def test_hanging_rank_is_named_with_its_stack_and_killed(tmp_path):
    start = time.monotonic()
    with pytest.raises(MultiprocessFailure) as failure:
        _hang_on_rank_1(tmp_path)
    message = str(failure.value)
    assert "rank 1 was still running the test body when its 12 s were over" in message
    assert "rank 0 was still leaving\n" in message
    assert "in _hang_on_rank_1" in message  # the stack
    assert 12 <= time.monotonic() - start < 20
    _assert_gone(tmp_path)


@pytest.mark.parametrize("code", [0, 7])
def test_vanished_rank_is_a_failure_whatever_its_exit_code(code, tmp_path):
    with pytest.raises(MultiprocessFailure, match=f"rank 0 ended with exit code {code} while runn"):
        multiprocess(2, 1, timeout=60)(_vanish_on_rank_0)(code, tmp_path)
    _assert_gone(tmp_path)


def _vanish_on_rank_0(code, folder):
    _leave_a_note(folder)
    if jax.process_index() == 0:
        os._exit(code)
    time.sleep(600)


def test_death_by_signal_is_named():
    with pytest.raises(MultiprocessFailure, match="rank 0 ended with SIGKILL while running"):
        multiprocess(1, 1)(_kill_self)()


def _kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def test_long_output_is_cut_at_its_head():
    with pytest.raises(MultiprocessFailure) as failure:
        multiprocess(1, 1)(_print_much_and_fail)()
    assert re.search(r"\.\.\. \d+ lines above \.\.\.", str(failure.value))
    assert "line 0\n" not in str(failure.value)
    assert "line 999\n" in str(failure.value)


def _print_much_and_fail():
    for i in range(1000):
        print("line", i)
    raise RuntimeError


def test_taken_port_is_replaced(monkeypatch, tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken, free = holder.getsockname()[1], _cluster.free_port()
        tries = iter([taken, free])
        monkeypatch.setattr(_cluster, "free_port", lambda: next(tries))
        multiprocess(2, 1)(_leave_a_note)(tmp_path)
    assert next(tries, None) is None
    assert len(list(tmp_path.iterdir())) == 2


def test_device_count_replaces_only_its_own_flag(monkeypatch):
    monkeypatch.setenv(
        "XLA_FLAGS",
        "--xla_cpu_enable_fast_math=false --xla_force_host_platform_device_count=8",
    )
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "5")
    multiprocess(1, 2)(_check_flags)()


def _check_flags():
    assert "--xla_cpu_enable_fast_math=false" in os.environ["XLA_FLAGS"]
    assert jax.device_count() == 2


def test_ranks_end_when_their_parent_is_killed(tmp_path):
    script = (
        "import sys, test_testing_kit as kit; from pathlib import Path; "
        "kit.multiprocess(2, 1)(kit._note_and_sleep)(Path(sys.argv[1]))"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=env)
    try:
        _wait_until(lambda: len(list(tmp_path.iterdir())) == 2, 60)
    finally:
        parent.kill()
        parent.wait()
    _wait_until(lambda: not _living(tmp_path), 10)


def _note_and_sleep(folder):
    _leave_a_note(folder)
    time.sleep(600)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_processes": 0}, "num_processes must be positive; got 0"),
        ({"devices_per_process": -1}, "devices_per_process must be positive; got -1"),
        ({"timeout": 0}, "timeout must be positive; got 0"),
    ],
)
def test_bad_numbers_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        multiprocess(**({"num_processes": 2, "devices_per_process": 1} | arguments))


def test_local_function_is_refused():
    with pytest.raises(ValueError, match=r"top level of a module.*got .*<lambda>"):
        multiprocess(1, 1)(lambda: None)


def _wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _living(folder):
    pids = [int(file.read_text()) for file in folder.iterdir()]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def _assert_gone(folder):
    assert list(folder.iterdir())
    assert not _living(folder)
