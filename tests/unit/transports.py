# SPDX-License-Identifier: GPL-2.0-or-later
"""The transports as the conformance suite sees them, and peers in processes of their own that it can kill."""

import asyncio
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from replicator.transport import shm
from replicator.transport.address import Address, parse
from replicator.transport.interface import Connection, Dialer, Listener, PeerUnreachable
from replicator.transport.rdma import RdmaDialer, RdmaListener
from replicator.transport.tcp import TcpDialer, TcpListener
from tests.unit.simulated_queue import DEVICE, SimulatedQueue

ENVIRONMENT = "DPVS_PROBE_TRANSPORTS"  # names the transports to test, with commas; else those that this machine has
MIB = 1 << 20


@dataclass(frozen=True)
class Kind:
    """One transport. A listener's ``address`` is what its dialer is made of, in whatever process."""

    name: str
    listener: Callable[[Path], Listener]  # given an empty directory
    dialer: Callable[[str], Dialer]
    again: Callable[[str], Listener]  # at the address of another one
    nobody: Callable[[Path], Dialer]  # whom it dials is not there
    bulk_bytes: int = 16 * MIB  # what passes in a second or so
    held_bytes: int = 32 * MIB  # no more than that is on the way when the peer reads nothing

    def __str__(self) -> str:
        return self.name


def _tcp_nobody(_directory: Path) -> Dialer:
    return TcpDialer(Address("127.0.0.1", 1))


TCP = Kind(
    "tcp",
    listener=lambda _: TcpListener(Address("127.0.0.1", 0)),
    dialer=lambda address: TcpDialer(parse(address)),
    again=lambda address: TcpListener(parse(address)),
    nobody=_tcp_nobody,
)
SHM = Kind(
    "shm",
    listener=lambda directory: shm.ShmListener(directory / "node.shm"),
    dialer=lambda address: shm.ShmDialer(shm.parse(address)),
    again=lambda address: shm.ShmListener(shm.parse(address)),
    nobody=lambda directory: shm.ShmDialer(directory / "nobody.shm"),
    held_bytes=shm.RING_BYTES + 2 * MIB,
)


# RDMA in all but the device; both ends have to be in one process.
SLOTS = Kind(
    "slots",
    listener=lambda _: _simulated_listener("127.0.0.1:0"),
    dialer=lambda address: _simulated_dialer(parse(address)),
    again=lambda address: _simulated_listener(address),  # noqa: PLW0108 - not defined yet
    nobody=lambda _: _simulated_dialer(Address("127.0.0.1", 1)),
    held_bytes=4 * MIB,
)


def _simulated_listener(address: str) -> Listener:
    return RdmaListener(TcpListener(parse(address, listen=True)), DEVICE, make_queue=SimulatedQueue)


def _simulated_dialer(address: Address) -> Dialer:
    return RdmaDialer(TcpDialer(address), DEVICE, make_queue=SimulatedQueue)


def _rdma() -> Kind:
    from replicator.transport import verbs

    device = verbs.find()
    return Kind(
        "rdma",
        listener=lambda _: RdmaListener(TcpListener(Address("127.0.0.1", 0)), device),
        dialer=lambda address: RdmaDialer(TcpDialer(parse(address)), device),
        again=lambda address: RdmaListener(TcpListener(parse(address)), device),
        nobody=lambda directory: RdmaDialer(_tcp_nobody(directory), device),
        bulk_bytes=4 * MIB,  # soft-RoCE in an emulated machine
        held_bytes=16 * MIB,
    )


MAKERS: dict[str, Callable[[], Kind]] = {
    "tcp": lambda: TCP,
    "shm": lambda: SHM,
    "slots": lambda: SLOTS,
    "rdma": _rdma,
}


def names() -> list[str]:
    """What to test here: rdma only on a machine with a device."""
    if wanted := os.environ.get(ENVIRONMENT):
        return wanted.split(",")
    devices = Path("/sys/class/infiniband")
    return [name for name in MAKERS if name != "rdma" or (devices.is_dir() and any(devices.iterdir()))]


def make(name: str) -> Kind:
    """The transport of that name."""
    return MAKERS[name]()


def context() -> ForkServerContext:
    """Starts processes that have imported everything and opened nothing: no device may be open when one forks."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["tests.unit.transports"])
    return made


def start(name: str, behaviour: str, address: str) -> ForkServerProcess:
    """A peer that dials ``address`` and then behaves in one way until it is killed."""
    peer = context().Process(target=_peer, args=(name, behaviour, address), daemon=True)
    peer.start()
    return peer


async def dial(dialer: Dialer, attempts: int = 100) -> Connection:
    """Dial until somebody answers."""
    for _ in range(attempts):
        try:
            return await dialer.dial()
        except PeerUnreachable:
            await asyncio.sleep(0.02)
    return await dialer.dial()


def _peer(name: str, behaviour: str, address: str) -> None:
    asyncio.run(_behave(make(name), behaviour, address))


async def _behave(kind: Kind, behaviour: str, address: str) -> None:
    connection = await dial(kind.dialer(address))
    await connection.send([behaviour.encode()])
    match behaviour:
        case "idle":
            await asyncio.sleep(60)
        case "flood":
            frame = bytes(64 << 10)
            while True:
                await connection.send([frame])
        case "drink":
            while await connection.receive():
                pass
        case "trickle":  # slow, but alive
            for _ in range(60):
                await connection.receive()
                await asyncio.sleep(0.05)
        case "leave":
            await connection.close()
