# SPDX-License-Identifier: GPL-2.0-or-later
"""RDMA devices that are not as they should be, and what is said of it. All of this runs in the virtual machine."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from replicator.transport.address import Address, parse
from replicator.transport.interface import LinkLost, PeerUnreachable
from replicator.transport.rdma import RdmaDialer, RdmaListener
from replicator.transport.tcp import TcpDialer, TcpListener
from replicator.transport.verbs import BadDevice, Device, NoRdma, find
from tests.unit import transports
from tests.unit.transports import PATIENCE

pytestmark = pytest.mark.timeout(60 * PATIENCE)

GOOD = Device("rxe0")
NETWORK_DEVICE = "roce0"
GIDS = Path("/sys/class/infiniband/rxe0/ports/1/gids")
LINK_LOCAL = 0  # index of an IPv6 address; the peer's is of IPv4
ROOT = Path(__file__).parents[2]

LOCKS = """
import sys
from replicator.transport.verbs import NoLockedMemory, VerbsQueue, find
try:
    VerbsQueue(find())
except NoLockedMemory as error:
    sys.exit(f"{error}|{error.help_text}")
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def down() -> Iterator[None]:
    ip("link", "set", NETWORK_DEVICE, "down")
    try:
        yield
    finally:
        ip("link", "set", NETWORK_DEVICE, "up")


def test_which_device() -> None:
    assert find() == find("rxe0") == GOOD
    assert find("rxe0:1:0") == Device("rxe0", 1, 0)
    for text, says in (
        ("mlx5_0", "there is no RDMA device 'mlx5_0', but rxe0"),
        ("rxe0:2", "RDMA device 'rxe0' has no port 2"),
        ("rxe0:1:7", r"port 1 of rxe0 has no address at index 7, but 0 \(fe80::.*\), 1 \(10\.90\.0\.1\)$"),
        ("rxe0:1:99999", "port 1 of rxe0 has no address at index 99999, but 0"),
    ):
        with pytest.raises(BadDevice, match=says) as caught:
            find(text)
        assert "rdma link" in caught.value.help_text


def test_a_port_that_is_down() -> None:
    with down():
        with pytest.raises(NoRdma, match="no port of rxe0 is active"):
            find()
        with pytest.raises(NoRdma, match="port 1 of rxe0 is not active") as caught:
            find("rxe0")
    assert "--mode tcp" in caught.value.help_text
    assert find() == GOOD


def test_memory_that_cannot_be_locked() -> None:
    """Root may lock all there is, but for a service whose unit takes that away."""
    limited = f"ulimit -l 64 && exec {sys.executable} -c '{LOCKS}'"
    bare = ["setpriv", "--bounding-set=-ipc_lock", "bash", "-c", limited]
    done = subprocess.run(bare, capture_output=True, text=True, cwd=ROOT, check=False)
    said, _, help_text = done.stderr.strip().partition("|")
    assert said == "RDMA device rxe0:1: 4 MiB of memory cannot be locked"
    assert "LimitMEMLOCK" in help_text


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        (Device("gone0"), GOOD, r"by RDMA: cannot open RDMA device 'gone0'"),
        (GOOD, Device("gone0"), r"by RDMA: refused: cannot open RDMA device 'gone0'"),
        (
            GOOD,
            Device("rxe0", 1, LINK_LOCAL),
            r"by RDMA: refused: the RDMA device has no address that fits the peer's 10\.",
        ),
        (Device("rxe0", 1, 7), GOOD, r"by RDMA: the RDMA device has no address$"),
    ],
    ids=["gone here", "gone there", "another family", "no address"],
)
def test_links_that_cannot_be(ours: Device, theirs: Device, says: str) -> None:
    async def body() -> None:
        listener = RdmaListener(TcpListener(Address("127.0.0.1", 0)), theirs)
        await listener.start()
        accepting = asyncio.create_task(listener.accept())
        await asyncio.sleep(0.05)
        with pytest.raises(PeerUnreachable, match=says) as caught:
            await RdmaDialer(TcpDialer(parse(listener.address)), ours).dial()
        assert "\n" not in str(caught.value)
        assert caught.value.help_text
        accepting.cancel()
        await listener.close()

    asyncio.run(body())


def test_a_port_that_goes_down_under_a_link_and_comes_back() -> None:
    kind = transports.make("rdma")

    async def body() -> None:
        listener = kind.listener("127.0.0.1:0")
        await listener.start()
        accepting = asyncio.create_task(listener.accept())
        near, far = await transports.dial(kind.dialer(listener.address)), await accepting
        accepting = asyncio.create_task(listener.accept())
        with down():
            turns = transports.Turns()
            with pytest.raises(LinkLost, match=r"no answer from|can send no more"):
                while True:
                    await near.send([b"x"])
                    await asyncio.sleep(0.05)
            assert turns.seconds() < 3
            await near.close()
            with pytest.raises(LinkLost):
                while await far.receive():
                    pass
                raise LinkLost("far", "in order")
            await far.close()
            with pytest.raises(PeerUnreachable, match=r"cannot reach 10\.90\.0\.1: Network is unreachable"):
                await kind.dialer(listener.address).dial()
        near, far = await transports.dial(kind.dialer(listener.address)), await accepting
        await near.send([b"again"])
        assert await far.receive() == b"again"
        await asyncio.gather(near.close(), far.close())
        await listener.close()

    asyncio.run(body())


def test_no_queue_pair_is_left_behind() -> None:
    """After all that was tested before: what connections took, they gave back."""
    shown = subprocess.run(["rdma", "resource", "show", "qp"], capture_output=True, text=True, check=True).stdout
    assert f"pid {os.getpid()} " not in shown
