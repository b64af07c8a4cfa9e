# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions of one process's table in another process's replica, over every transport, whatever happens on the way."""

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from collector.record import RECORD, Records
from collector.table import SessionTable
from replicator.link import Receiver, Sender
from replicator.links import Links, Outbound
from replicator.replica import Replica, Replicas
from replicator.transport.interface import PEER_TIMEOUT_S, Backoff, Connection, LinkLost
from replicator.wire import HEADER, MAGIC, MAX_BODY, VERSION, Hello, Opcode, Role
from tests.unit import transports
from tests.unit.session_records import sessions
from tests.unit.transports import PATIENCE, Kind, Mortal, Peer, Turns

SESSIONS = 10_000
FEW = 2_000
SLOTS = 1 << 14
CHANGED = 1_009
NOTICED_S = PEER_TIMEOUT_S + 0.5
LAST_TURNS = (20, 0, 2, 5, 50, 10)  # of event loops that die: from the hello to long after the full sync

pytestmark = pytest.mark.timeout(120 * PATIENCE)


def records(count: int) -> Records:
    """What the sender's table begins with: half IPv4, half IPv6."""
    all_of_them = np.concatenate([sessions(count // 2), sessions(count // 2, first=count // 2, ipv6=True)])
    return all_of_them.astype(sessions(0).dtype)


def final(count: int) -> Records:
    """What it ends up with: some of them changed once more."""
    rows = records(count)
    rows["fnat_delta"][:CHANGED] += 1
    return rows


@dataclass(frozen=True)
class Job:
    """What a sender is to do. ``turns``: of its event loop, since it was let in, until it dies."""

    name: str
    address: str
    keys: Path | None
    epoch: int
    count: int
    turns: int | None


@dataclass
class Node:
    """The receiving side, in this process."""

    kind: Kind
    address: str
    replicas: Replicas

    def sender(self, epoch: int = 1, count: int = FEW, turns: int | None = None) -> Peer:
        """A process that sends until it is killed, or has lived for so many turns since it was let in."""
        where = transports.keys_directory() if self.kind.secured else None
        job = Job(self.kind.name, self.address, where, epoch, count, turns)
        peer = transports.context().Process(target=send, args=(job,), daemon=True)
        peer.start()
        return peer

    async def replica(self, holds: Callable[[Replica], bool]) -> Replica:
        """What came of the sender, as soon as that holds."""
        async with asyncio.timeout(50 * PATIENCE):
            while True:
                for replica in self.replicas:
                    if holds(replica):
                        return replica
                await asyncio.sleep(0.01)


def send(job: Job) -> None:
    """The other process: a table, and a link that tells of it, until it is killed."""
    transports.use_keys(job.keys)
    with asyncio.Runner(loop_factory=Mortal) as runner:
        runner.run(_send(job))


async def _send(job: Job) -> None:
    clock = time.monotonic_ns
    table = SessionTable(SLOTS)
    me = Hello("dialer", job.epoch, Role.SENDER, SLOTS)
    sender = Sender(table, table.add_peer(job.address), me)
    link = Outbound(transports.make(job.name).dialer(job.address), sender, clock, Backoff(0.02, 0.1))
    links = Links([link], Replicas(Hello("dialer", job.epoch, Role.RECEIVER)))
    rows, valid = records(job.count), np.ones(job.count, np.bool_)
    slots = rows["slot"].astype(np.int64)
    table.apply(slots, rows, valid, clock())
    table.complete = True
    running = asyncio.create_task(links.run())
    while link.sender.peer is None:
        await asyncio.sleep(0)
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Mortal)
    loop.left = job.turns
    while not link.sender.counters["created"] or not links.settled():
        await asyncio.sleep(0.01)
    table.apply(slots[:CHANGED], final(job.count)[:CHANGED], valid[:CHANGED], clock())
    links.poke()
    await running


def must_be_final(replica: Replica, count: int = FEW) -> None:
    got, wanted = replica.sessions(), final(count)
    assert len(got) == count
    for field in ("generation", "worker"):
        wanted[field] = got[field]  # the table's own
    assert all((got[field] == wanted[field]).all() for field in RECORD.names or ())


def is_final(replica: Replica) -> bool:
    return replica.synced and replica.counters["updated"] >= CHANGED


def receiving(kind: Kind, body: Callable[[Node], Awaitable[None]]) -> None:
    """Run ``body`` beside a node that takes in what peers send."""

    @asynccontextmanager
    async def serving(directory: Path) -> AsyncIterator[Node]:
        replicas = Replicas(Hello("listener", 2, Role.RECEIVER))
        listener = kind.listener(kind.first(directory))
        await listener.start()
        links = Links(
            [],
            replicas,
            listener=listener,
            make_receiver=lambda: Receiver(replicas, now_ns=time.monotonic_ns()),
        )
        running = asyncio.create_task(links.run())
        try:
            yield Node(kind, listener.address, replicas)
            assert not running.done()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await links.close()

    async def all_of_it(directory: Path) -> None:
        async with serving(directory) as node:
            await body(node)

    with tempfile.TemporaryDirectory(prefix="dpvs-probe-sync.", dir="/tmp") as directory:
        asyncio.run(all_of_it(Path(directory)))


def end(peer: Peer) -> None:
    peer.kill()
    peer.join()


@pytest.fixture(params=transports.names(but=transports.in_one_process))
def kind(request: pytest.FixtureRequest) -> Kind:
    return transports.make(request.param)


def test_ten_thousand_sessions(kind: Kind) -> None:
    async def body(node: Node) -> None:
        peer = node.sender(count=SESSIONS)
        try:
            replica = await node.replica(is_final)
            must_be_final(replica, SESSIONS)
            assert replica.counters["created"] == SESSIONS
            assert replica.counters["full_syncs"] == 1
        finally:
            end(peer)

    receiving(kind, body)


def test_a_sender_that_dies_at_any_time_and_comes_back(kind: Kind) -> None:
    async def body(node: Node) -> None:
        for epoch, turns in enumerate(LAST_TURNS[:: kind.stride], 1):
            peer = node.sender(epoch, turns=turns)
            await asyncio.to_thread(peer.join)
            assert peer.exitcode == -signal.SIGKILL
        peer = node.sender(epoch + 1)
        try:
            must_be_final(await node.replica(lambda replica: is_final(replica) and replica.epoch == epoch + 1))
        finally:
            end(peer)
        turns_alone = Turns()
        replica = await node.replica(lambda replica: not replica.connected)
        assert turns_alone.seconds() < NOTICED_S
        must_be_final(replica)  # a peer that is gone takes nothing with it

    receiving(kind, body)


def test_a_sender_that_hangs_is_down_within_three_seconds_and_comes_back(kind: Kind) -> None:
    async def body(node: Node) -> None:
        peer = node.sender()
        try:
            await node.replica(is_final)
            assert peer.pid is not None
            os.kill(peer.pid, signal.SIGSTOP)
            turns = Turns()
            await node.replica(lambda replica: not replica.connected)
            assert turns.seconds() < NOTICED_S
            os.kill(peer.pid, signal.SIGCONT)
            must_be_final(await node.replica(lambda replica: replica.connected and is_final(replica)))
        finally:
            end(peer)

    receiving(kind, body)


def test_a_frame_too_large_ends_its_link_and_no_other(kind: Kind) -> None:
    """Its length is enough for that: nothing of it is waited for, or kept."""

    async def read_to_end(connection: Connection) -> None:
        while await connection.receive():
            pass

    async def body(node: Node) -> None:
        for code in (Opcode.HELLO, Opcode.CREATE):
            connection = await transports.dial(kind.dialer(node.address))
            await connection.send([HEADER.pack(MAGIC, VERSION, code, MAX_BODY + 1, 1)])
            async with asyncio.timeout(NOTICED_S * PATIENCE):
                try:
                    await read_to_end(connection)
                except LinkLost:
                    pass
            await connection.close()
        assert not list(node.replicas)
        peer = node.sender()
        try:
            must_be_final(await node.replica(is_final))
        finally:
            end(peer)

    receiving(kind, body)
