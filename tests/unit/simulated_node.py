# SPDX-License-Identifier: GPL-2.0-or-later
"""Whole nodes on simulated DPVSes, replicating over real TCP on the loopback interface; and a wire to cut."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from collector import record
from collector.collector import Collector
from collector.record import digest
from collector.table import SessionTable
from replicator.activity import Activity, Packets
from replicator.discovery.discovery import Discovery, source
from replicator.discovery.source import Myself, Place, name_of
from replicator.link import Receiver, Sender
from replicator.links import Links, Outbound
from replicator.membership import Membership
from replicator.node import Injector, Node, Parts
from replicator.replica import Replica, Replicas
from replicator.sharing import AWAY_NS, Sharing
from replicator.transport.address import Address, parse
from replicator.transport.interface import Backoff
from replicator.transport.tcp import TcpDialer, TcpListener
from replicator.transport.tls import Tls, TlsDialer, TlsListener
from replicator.wire import LZ4, WANTS, Hello, Role
from replicator.wire import node_id as id_of
from tests.unit.simulated_dpvs import MODES, WORKERS, SimulatedDpvs

LOCALHOST = "127.0.0.1"
SETTLE_NS, LEAVE_NS = 100_000_000, 500_000_000
PATIENCE = 6  # a busy machine takes so many times as long as an idle one, on which waits are measured


class LiveDpvs(SimulatedDpvs):
    """One whose events carry the time of the real clock."""

    def _event(self, slot: int, kind: int, tid: int) -> None:
        self.now_ns = time.monotonic_ns()
        super()._event(slot, kind, tid)

    def churn(self, random: np.random.Generator, steps: int) -> None:
        """Sessions that come, get established and go."""
        for _ in range(steps):
            slot = int(random.integers(self.slots))
            if self.conns["flags"][slot] & record.HASHED:
                if random.random() < 0.5:
                    self.free(slot)
                else:
                    self.establish(slot, int(random.integers(1 << 32)))
            else:
                self.create(slot, int(random.integers(60_000)))


class SimulatedNode:
    """One node. ``async with``: runs from enter to exit."""

    def __init__(
        self,
        name: str,
        directory: Path,
        *,
        slots: int = 1024,
        peers: tuple[Address, ...] = (),
        pidfd: int = -1,
        prove: Callable[[], bool] | None = None,
        injector: Injector | None = None,
        dpvs: LiveDpvs | None = None,
        admin_name: str | None = None,
        share: int | None = None,
        away_ns: int = AWAY_NS,
        tls: Tls | None = None,
        places: tuple[Place, ...] = (),
        port: int = 0,
        packets: Packets | None = None,
    ) -> None:
        """``share``: peers that hold each session, if not all; ``tls``: keys of this node, for its links; ``places``:
        where other peers are found; ``port``: to listen on, where it must be known before; ``packets``: what an
        interface sees.
        """
        self.name, self.slots = name, slots
        self.dpvs = dpvs or LiveDpvs(slots)
        self.table = SessionTable(slots)
        epoch = time.time_ns()
        me = Hello(name, epoch, Role.SENDER, slots, instance=epoch, capabilities=LZ4 | WANTS)
        self.replicas = Replicas(Hello(name, epoch, Role.RECEIVER, instance=epoch))
        here = Address(LOCALHOST, port)
        self.listener = TlsListener(here, tls) if tls else TcpListener(here)

        def outbound_to(peer: Address) -> Outbound:
            return Outbound(
                TlsDialer(peer, tls, timeout_s=1) if tls else TcpDialer(peer, timeout_s=1),
                Sender(self.table, self.table.add_peer(str(peer)), me),
                time.monotonic_ns,
                Backoff(0.02, 0.1),
            )

        self.outbound = [outbound_to(peer) for peer in peers]
        myself = Myself(name, f"{LOCALHOST}:{port}", port)
        sources = {name_of(place): source(place, myself) for place in places}
        self.membership = Membership(map(str, peers), sources, settle_ns=SETTLE_NS, leave_ns=LEAVE_NS)
        discovery = Discovery(self.membership, sources)
        self.released = 0
        self.admin_path = directory / (admin_name or f"{name}.sock")
        self.collector = Collector(self.dpvs, self.dpvs, self.table, modes=MODES, workers=WORKERS, lost=self.dpvs.lost)
        self.sharing = Sharing(self.table, self.outbound, share, away_ns=away_ns) if share else None
        self.links = Links(
            self.outbound,
            self.replicas,
            listener=self.listener,
            make_receiver=lambda: Receiver(self.replicas, now_ns=time.monotonic_ns()),
            sharing=self.sharing,
            discovery=discovery,
            make_outbound=lambda address: outbound_to(parse(address)),
            forget=self.table.remove_peer,
        )
        self.activity: Activity | None = None
        if packets is not None:
            self.activity = Activity(
                packets, self.table, self.links.replicas, lambda: None, ask=self.links.want, look_s=0.05
            )  # fmt: skip
        self.node = Node(
            Parts(
                name=name, pid=4711, collector=self.collector, links=self.links, admin_path=self.admin_path,
                injector=injector, origins=len(peers), pidfd=pidfd, release=self._release, prove=prove,
                activity=self.activity,
            )
        )  # fmt: skip
        self.task: asyncio.Task[int] | None = None

    async def __aenter__(self) -> "SimulatedNode":
        await self.listener.start()
        up = asyncio.Event()
        self.task = asyncio.create_task(self.node.run(up.set))
        waiting = asyncio.create_task(up.wait())
        await asyncio.wait({self.task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    async def die(self) -> None:
        """As if its process ended: whatever was under way is cut."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

    @property
    def address(self) -> Address:
        """Where it listens."""
        return Address(LOCALHOST, int(self.listener.address.rpartition(":")[2]))

    def replica_of(self, name: str) -> Replica | None:
        """What it holds of another node."""
        return self.replicas.get(id_of(name))

    def holds(self, origin: "SimulatedNode") -> bool:
        """Whether it has exactly what ``origin`` has, and that is exactly what the DPVS there has."""
        replica = self.replica_of(origin.name)
        return replica is not None and replica.synced and replica.digest() == origin.table.digest() == origin.truth()

    def truth(self) -> int:
        """The digest that the table must have."""
        expected = self.dpvs.expected()
        expected["generation"] = self.table.generation[expected["slot"].astype(np.int64)]
        return digest(expected)

    def _release(self) -> None:
        self.released += 1


class Wire:
    """A TCP connection's way through the network: passes on, can be cut, or swallow everything in silence."""

    def __init__(self) -> None:
        self.to: Address | None = None
        self.swallows = False
        self.refuses = False
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> "Wire":
        self._server = await asyncio.start_server(self._arrived, LOCALHOST, 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def address(self) -> Address:
        assert self._server is not None
        return Address(LOCALHOST, self._server.sockets[0].getsockname()[1])

    def cut(self) -> None:
        """Reset what is connected."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _arrived(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuses or self.to is None:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(self.to.host, self.to.port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        for ours, theirs in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pump(ours, theirs))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                if not self.swallows:
                    sink.write(data)
                    await sink.drain()
        if not self.swallows:
            sink.close()


async def until(what: Callable[[], object], within_s: float = 5.0) -> None:
    """Wait for something to become true; AssertionError after PATIENCE times ``within_s``."""
    within_s *= PATIENCE
    try:
        async with asyncio.timeout(within_s):
            while not what():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"not within {within_s:g} s") from None
