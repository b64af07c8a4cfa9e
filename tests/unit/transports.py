# SPDX-License-Identifier: GPL-2.0-or-later
"""The transports as the conformance suite sees them, and peers in processes of their own that it can kill."""

import asyncio
import atexit
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection as Pipe
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from replicator import keys
from replicator.seal import Party
from replicator.transport import shm, verbs
from replicator.transport.address import parse
from replicator.transport.interface import (
    PEER_TIMEOUT_S,
    Connection,
    Dialer,
    LinkLost,
    Listener,
    PeerUnreachable,
)
from replicator.transport.rdma import MakeQueue, RdmaDialer, RdmaListener
from replicator.transport.shm import Security, ShmDialer, ShmListener
from replicator.transport.tcp import TcpDialer, TcpListener
from replicator.transport.tls import Tls, TlsDialer, TlsListener
from replicator.transport.verbs import Device
from tests.unit.simulated_queue import DEVICE, SimulatedQueue

ENVIRONMENT = "DPVS_PROBE_TRANSPORTS"  # names the transports to test, with commas; else all
# Limits of time are as many times longer: for machines that are slow, as an emulated one is.
PATIENCE = float(os.environ.get("DPVS_PROBE_PATIENCE", "1"))
SETUP_S = PEER_TIMEOUT_S * PATIENCE
MIB = 1 << 20
Peer = ForkServerProcess
_given: Path | None = None
NOWHERE = "127.0.0.1:1"
STRANGER = "stranger"
COMES_S = 60 * PATIENCE  # what has to come has come by then, on a machine with much else to do


@dataclass(frozen=True)
class Kind:
    """One transport. A listener's ``address`` is what its dialer is made of, in whatever process."""

    name: str
    first: Callable[[Path], str]  # where to listen, given an empty directory
    listener: Callable[[str], Listener]
    dialer: Callable[[str], Dialer]
    nobody: Callable[[Path], str] = lambda _: NOWHERE  # an address where nobody listens
    bulk_bytes: int = 16 * MIB  # what passes in a second or so
    held_bytes: int = 32 * MIB  # no more than that is on the way when the peer reads nothing
    stride: int = 1  # of the turns of an event loop that may be its last, each so-manieth is tried out

    @property
    def secured(self) -> bool:
        """Both sides prove their names."""
        return is_secured(self.name)


@cache
def keys_directory() -> Path:
    """Keys of two nodes, ``dialer`` and ``listener``, and of a STRANGER from another cluster whose name and whose
    authority's name are the dialer's; made once for all processes of a test run.
    """
    if _given is not None:
        return _given
    made = Path(tempfile.mkdtemp(prefix="dpvs-probe-keys."))
    atexit.register(shutil.rmtree, made)
    keys.init_authority(made / "authority", "east")
    for node in ("dialer", "listener"):
        keys.issue(made / "authority", node, made / node)
    keys.init_authority(made / "elsewhere", "east")
    keys.issue(made / "elsewhere", "dialer", made / STRANGER)
    return made


@cache
def _tls(node: str) -> Tls:
    return Tls.load(keys_directory() / node)


def _tcp_listener(address: str, *, secured: bool) -> TcpListener:
    at = parse(address, listen=True)
    return TlsListener(at, _tls("listener")) if secured else TcpListener(at)


def _tcp_dialer(address: str, *, secured: bool, who: str) -> TcpDialer:
    to = parse(address)
    return TlsDialer(to, _tls(who), timeout_s=SETUP_S) if secured else TcpDialer(to, timeout_s=SETUP_S)


def _tcp(secured: bool, who: str) -> Kind:
    return Kind(
        "tls" if secured else "tcp",
        first=lambda _: "127.0.0.1:0",
        listener=lambda address: _tcp_listener(address, secured=secured),
        dialer=lambda address: _tcp_dialer(address, secured=secured, who=who),
    )


def _shm(secured: bool, who: str) -> Kind:
    def security(keys_of: str, node: str) -> Security | None:
        return Security(_tls(keys_of), Party(node, 1)) if secured else None

    return Kind(
        "shm+tls" if secured else "shm",
        first=lambda directory: f"shm:{directory}/node.shm",
        listener=lambda address: ShmListener(shm.parse(address), security("listener", "listener")),
        dialer=lambda address: ShmDialer(shm.parse(address), security(who, "dialer")),
        nobody=lambda directory: f"shm:{directory}/nobody.shm",
        held_bytes=shm.RING_BYTES + 2 * MIB,
    )


def _over_tcp(name: str, device: Device, make_queue: MakeQueue, secured: bool, who: str) -> Kind:
    def party(node: str) -> Party | None:
        return Party(node, 1) if secured else None

    def listener(address: str) -> RdmaListener:
        stream = _tcp_listener(address, secured=secured)
        return RdmaListener(stream, device, party("listener"), timeout_s=SETUP_S, make_queue=make_queue)

    def dialer(address: str) -> RdmaDialer:
        stream = _tcp_dialer(address, secured=secured, who=who)
        return RdmaDialer(stream, device, party("dialer"), timeout_s=SETUP_S, make_queue=make_queue)

    return Kind(name + "+tls" * secured, first=lambda _: "127.0.0.1:0", listener=listener, dialer=dialer)


def _slots(secured: bool, who: str) -> Kind:
    """RDMA in all but the device; both ends have to be in one process."""
    return replace(_over_tcp("slots", DEVICE, SimulatedQueue, secured, who), held_bytes=4 * MIB)


def _rdma(secured: bool, who: str) -> Kind:
    kind = _over_tcp("rdma", verbs.find(), verbs.VerbsQueue, secured, who)
    return replace(kind, bulk_bytes=2 * MIB, held_bytes=6 * MIB, stride=4)  # emulated: a MiB takes a second


_MAKERS = {"tcp": _tcp, "shm": _shm, "slots": _slots, "rdma": _rdma}


def names(but: Callable[[str], bool] = lambda _: False) -> list[ParameterSet]:
    """What to test: parameters. Without an RDMA device here, rdma is tested in the virtual machine, which has one."""
    wanted = os.environ.get(ENVIRONMENT, "tcp,tls,shm,shm+tls,slots,slots+tls,rdma,rdma+tls").split(",")
    there = (pytest.mark.vm, pytest.mark.needs("vm"))
    return [
        pytest.param(name, marks=there if name.startswith("rdma") and not _rdma_is_here() else ())
        for name in wanted
        if not but(name)
    ]


def _rdma_is_here() -> bool:
    devices = Path("/sys/class/infiniband")
    return devices.is_dir() and any(devices.iterdir())


def in_one_process(name: str) -> bool:
    """Both ends of a connection have to be."""
    return name.startswith("slots")


def is_secured(name: str) -> bool:
    """Both sides prove their names."""
    return name == "tls" or name.endswith("+tls")


def make(name: str, who: str = "dialer") -> Kind:
    """The transport of that name; ``who`` dials."""
    if name == "tls":
        return _tcp(True, who)
    return _MAKERS[name.removesuffix("+tls")](is_secured(name), who)


def context() -> ForkServerContext:
    """Starts processes that have imported everything and opened nothing: no device may be open when one forks."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["tests.unit.transports", "tests.unit.test_transport_sync"])
    return made


def start(name: str, behaviour: str, address: str, turns: int | None = None) -> Peer:
    """A peer that dials ``address`` and then behaves in one way until it is killed, or has lived for so many turns."""
    where = keys_directory() if is_secured(name) else None
    peer = context().Process(target=_peer, args=(name, behaviour, address, where, turns), daemon=True)
    peer.start()
    return peer


def start_listener(name: str, directory: Path, turns: int) -> tuple[Peer, str]:
    """A peer that lets one in, says "hello" and ends, if it has not died before; and its address."""
    ours, theirs = context().Pipe()
    where = keys_directory() if is_secured(name) else None
    peer = context().Process(target=_host, args=(name, directory, theirs, where, turns), daemon=True)
    peer.start()
    theirs.close()
    return peer, ours.recv()


class Mortal(asyncio.SelectorEventLoop):
    """An event loop that is the end of its process after some turns: at any step of what it does."""

    left: int | None = None  # for ever

    def _run_once(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        super()._run_once()  # type: ignore[misc]


class Turns:
    """Seconds since it was made, but those in which this process was held up: a busy machine is no slow transport."""

    TURN_S = 0.05

    def __init__(self) -> None:
        self._turns = 0
        self._task = asyncio.create_task(self._count())

    async def _count(self) -> None:
        while True:
            await asyncio.sleep(self.TURN_S)
            self._turns += 1

    def seconds(self) -> float:
        """Until now, and starts anew."""
        turns, self._turns = self._turns, 0
        return turns * self.TURN_S

    def stop(self) -> None:
        """Count no more."""
        self._task.cancel()


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """What is done inside takes less than so many seconds, as ``Turns`` counts them."""
    turns = Turns()
    try:
        async with asyncio.timeout(COMES_S):
            yield
    finally:
        turns.stop()
    assert turns.seconds() < seconds


async def dial(dialer: Dialer, attempts: int = 100) -> Connection:
    """Dial until somebody answers."""
    for _ in range(attempts):
        try:
            return await dialer.dial()
        except PeerUnreachable:
            await asyncio.sleep(0.02)
    return await dialer.dial()


def use_keys(where: Path | None) -> None:
    """In a process that another one started: the keys are those of that one."""
    global _given  # noqa: PLW0603
    _given = where


def _peer(name: str, behaviour: str, address: str, where: Path | None, turns: int | None) -> None:
    use_keys(where)
    kind = make(name)
    with asyncio.Runner(loop_factory=Mortal) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, Mortal)
        loop.left = turns
        runner.run(_live(kind, behaviour, address))


def _host(name: str, directory: Path, tell: Pipe, where: Path | None, turns: int) -> None:
    use_keys(where)
    with asyncio.Runner(loop_factory=Mortal) as runner:
        runner.run(_let_one_in(make(name), directory, tell, turns))


async def _let_one_in(kind: Kind, directory: Path, tell: Pipe, turns: int) -> None:
    listener = kind.listener(kind.first(directory))
    await listener.start()
    tell.send(listener.address)
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Mortal)
    loop.left = turns
    connection = await listener.accept()
    await connection.send([b"hello"])
    await connection.close()
    await listener.close()


async def _live(kind: Kind, behaviour: str, address: str) -> None:
    while True:
        connection = await dial(kind.dialer(address))
        try:
            await connection.send([behaviour.encode()])
            await _behave(connection, behaviour)
            return
        except LinkLost:  # as any node: again. A machine that is slow may not have let us in at first.
            await connection.close()


async def _behave(connection: Connection, behaviour: str) -> None:
    match behaviour:
        case "idle":
            await connection.receive()
        case "flood":
            frame = bytes(64 << 10)
            while True:
                await connection.send([frame])
        case "drink":
            while await connection.receive():
                pass
        case "trickle":  # slow, but alive
            while await connection.receive():
                await asyncio.sleep(0.05)
        case "leave":
            await connection.close()
