"""Processes with a network between them, in which each has an address and a name of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

import jax
import pytest
from implementations import require
from test_faults import Layer, first_error

from jax_ep import _processes
from jax_ep.testing import multiprocess

NAMES = ("jax-ep-0", "jax-ep-1")
ADDRESSES = ("10.213.77.1", "10.213.77.2")
LIMIT = 4
_NEW_MOUNTS, _NEW_NAMES, _NEW_NETWORK = 0x00020000, 0x04000000, 0x40000000
_BIND, _PRIVATE, _RECURSIVE = 0x1000, 0x40000, 0x4000


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def network() -> Iterator[None]:
    """Two hosts as far as the network goes, with a cable between them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("a network needs root, and the command ip")
    try:
        run("ip", "netns", "add", NAMES[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network can be made here: {error.stderr.decode().strip()}")
    try:
        run("ip", "netns", "add", NAMES[1])
        run("ip", "-n", NAMES[0], "link", "add", "cable", "type", "veth", "peer", "cable", "netns",
            NAMES[1])  # fmt: skip
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                run("ip", "-n", name, "link", "set", link, "up")
        yield
    finally:
        for name in NAMES:
            with contextlib.suppress(subprocess.CalledProcessError):
                run("ip", "netns", "delete", name)


def test_between_addresses(network: None, tmp_path: pathlib.Path) -> None:
    hosts = tmp_path / "hosts"
    lines = (f"{a} {name}\n" for a, name in zip(ADDRESSES, NAMES, strict=True))
    hosts.write_text("".join(lines))
    exchange_and_cut(str(hosts))


@multiprocess(2, 2, timeout=100)
def exchange_and_cut(hosts: str) -> None:
    """What has been told is exchanged; who is cut off is an error of XLA's, in XLA's time."""
    here = int(sys.argv[2])  # what the kit tells us: to ask JAX would start its network
    move_to_host(here, hosts)
    os.environ["XLA_FLAGS"] += f" --xla_cpu_collective_timeout_seconds={LIMIT}"
    require("native")
    assert socket.gethostbyname(socket.gethostname()) == ADDRESSES[here]
    _processes._host = lambda: [NAMES[here]]
    layer = Layer(jax.devices())
    for seed in range(3):
        layer.run(seed)
    if here == 1:
        run("ip", "link", "set", "cable", "down")
    error, took = first_error(layer)
    assert took < LIMIT + 20, took
    assert "Gloo" in error, error
    Layer(jax.local_devices()).run()


def move_to_host(number: int, hosts: str) -> None:
    """Has the threads that this one starts live on a host, where a file says who the others are."""
    libc = ctypes.CDLL(None, use_errno=True)
    with pathlib.Path("/run/netns", NAMES[number]).open() as place:
        calls = [
            libc.setns(place.fileno(), _NEW_NETWORK),
            libc.unshare(_NEW_NAMES | _NEW_MOUNTS),
            libc.mount(b"none", b"/", None, _PRIVATE | _RECURSIVE, None),
            libc.mount(hosts.encode(), b"/etc/hosts", None, _BIND, None),
        ]
    assert calls == [0] * 4, (calls, os.strerror(ctypes.get_errno()))
    socket.sethostname(NAMES[number])
