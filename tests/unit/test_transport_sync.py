# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions of one process's table in another process's replica, over every transport."""

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from collector.record import Records
from collector.table import SessionTable
from replicator.link import Receiver, Sender
from replicator.links import Links, Outbound
from replicator.replica import Replica, Replicas
from replicator.transport.interface import Backoff
from replicator.wire import Hello, Role
from tests.unit import transports
from tests.unit.session_records import sessions
from tests.unit.transports import PATIENCE

SESSIONS = 10_000
SLOTS = 1 << 14
CHANGED = 1_009


def records() -> Records:
    """What the sender's table ends up with: half IPv4, half IPv6, some of them changed once more."""
    all_of_them = np.concatenate([sessions(SESSIONS // 2), sessions(SESSIONS // 2, first=SESSIONS // 2, ipv6=True)])
    return all_of_them.astype(sessions(0).dtype)


def final() -> Records:
    rows = records()
    rows["fnat_delta"][:CHANGED] += 1
    return rows


def send(name: str, address: str, where: Path | None) -> None:
    """The other process: a table, and a link that tells of it, until it is killed."""
    transports.use_keys(where)
    asyncio.run(_send(name, address))


async def _send(name: str, address: str) -> None:
    clock = time.monotonic_ns
    table = SessionTable(SLOTS)
    me = Hello("dialer", 1, Role.SENDER, SLOTS)
    sender = Sender(table, table.add_peer(address), me)
    link = Outbound(transports.make(name).dialer(address), sender, clock, Backoff(0.02, 0.1))
    links = Links([link], Replicas(Hello("dialer", 1, Role.RECEIVER)))
    rows, valid = records(), np.ones(SESSIONS, np.bool_)
    slots = rows["slot"].astype(np.int64)
    table.apply(slots, rows, valid, clock())
    table.complete = True
    running = asyncio.create_task(links.run())
    while not link.sender.counters["created"] or not links.settled():
        await asyncio.sleep(0.01)
    table.apply(slots[:CHANGED], final()[:CHANGED], valid[:CHANGED], clock())
    links.poke()
    await running


@pytest.mark.timeout(120 * PATIENCE)
@pytest.mark.parametrize("name", transports.names(but=transports.in_one_process))
def test_ten_thousand_sessions(name: str, tmp_path: Path) -> None:
    kind = transports.make(name)

    async def body() -> None:
        replicas = Replicas(Hello("listener", 2, Role.RECEIVER))
        listener = kind.listener(kind.first(Path("/tmp") / f"dpvs-probe-sync.{tmp_path.name[-12:]}"))
        await listener.start()
        links = Links(
            [],
            replicas,
            listener=listener,
            make_receiver=lambda: Receiver(replicas, now_ns=time.monotonic_ns()),
        )
        running = asyncio.create_task(links.run())
        where = transports.keys_directory() if kind.secured else None
        peer = transports.context().Process(target=send, args=(name, listener.address, where), daemon=True)
        peer.start()
        try:
            async with asyncio.timeout(100 * PATIENCE):
                replica = await arrived(replicas)
            got, wanted = replica.sessions(), final()
            assert len(got) == SESSIONS
            for field in ("generation", "worker"):
                wanted[field] = got[field]  # the table's own
            assert all((got[field] == wanted[field]).all() for field in wanted.dtype.names)
            assert replica.counters["created"] == SESSIONS
            assert replica.counters["full_syncs"] == 1
        finally:
            peer.kill()
            peer.join()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await links.close()

    async def arrived(replicas: Replicas) -> Replica:
        while True:
            for replica in replicas:
                if replica.synced and replica.counters["updated"] >= CHANGED:
                    return replica
            await asyncio.sleep(0.01)

    directory = Path("/tmp") / f"dpvs-probe-sync.{tmp_path.name[-12:]}"
    directory.mkdir()
    try:
        asyncio.run(body())
    finally:
        for left in directory.iterdir():
            left.unlink()
        directory.rmdir()
