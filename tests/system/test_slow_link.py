# SPDX-License-Identifier: GPL-2.0-or-later
"""LZ4 by itself: on over a way that is slow, off over a fast one to a slow receiver. Real TCP, real queueing."""

import asyncio
import os
import time
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
from pyroute2 import IPRoute, netns

from collector.table import SessionTable
from replicator.link import Receiver, Sender
from replicator.links import Links, Outbound
from replicator.replica import Replicas
from replicator.transport.address import Address, parse
from replicator.transport.interface import Backoff
from replicator.transport.tcp import TcpConnection, TcpDialer, TcpListener
from replicator.wire import Hello, Role
from tests.lab.net import inside, remove_namespace
from tests.unit.session_records import sessions

SESSIONS = 300_000  # 29 MB: several windows
MBIT = 1_000_000 // 8

pytestmark = [pytest.mark.needs("netns")]


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace whose loopback is all there is, this thread in it."""
    name = f"dpl-slow-{os.getpid()}"
    netns.create(name)
    try:
        with inside(f"/var/run/netns/{name}"), IPRoute() as handle:
            handle.link("set", index=1, state="up")
            yield name
    finally:
        remove_namespace(name)


class Sluggish(TcpListener):
    """Its connections read no more than so many bytes a second, like a receiver whose processor is busy."""

    bytes_per_s = 30e6

    async def accept(self) -> TcpConnection:
        connection = await super().accept()
        receive = connection.receive

        async def slowly() -> bytes:
            data = await receive()
            await asyncio.sleep(len(data) / self.bytes_per_s)
            return data

        connection.receive = slowly  # type: ignore[method-assign]
        return connection


async def full_sync(listener: TcpListener) -> Mapping[str, object]:
    """A full sync over TCP on the loopback; what the sender reports when the receiver has it all."""
    replicas = Replicas(Hello("b", 1, Role.RECEIVER))
    await listener.start()
    far = Links([], replicas, listener=listener, make_receiver=lambda: Receiver(replicas, now_ns=time.monotonic_ns()))
    table = SessionTable(SESSIONS)
    sender = Sender(table, table.add_peer("b"), Hello("a", 1, Role.SENDER, SESSIONS))
    link = Outbound(TcpDialer(parse(listener.address)), sender, time.monotonic_ns, Backoff(0.02, 0.1))
    near = Links([link], Replicas(Hello("a", 1, Role.RECEIVER)))
    rows = sessions(SESSIONS)
    table.apply(rows["slot"].astype(np.int64), rows, np.ones(SESSIONS, np.bool_), time.monotonic_ns())
    table.complete = True
    running = [asyncio.create_task(links.run()) for links in (near, far)]
    async with asyncio.timeout(60):
        while not sender.settled or not next(iter(replicas)).synced:
            await asyncio.sleep(0.01)
    report = sender.report()
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await far.close()
    return report


def test_a_slow_way_is_worth_lz4(namespace: str) -> None:
    with IPRoute() as handle:
        handle.tc("add", "tbf", index=1, handle=0x10000, rate=160 * MBIT, burst=300_000, latency=50_000)
    report = asyncio.run(full_sync(TcpListener(Address("127.0.0.1", 7001))))
    assert report["compressing"]
    assert report["compression_trials"] == 1


def test_a_slow_receiver_is_not(namespace: str) -> None:
    report = asyncio.run(full_sync(Sluggish(Address("127.0.0.1", 7001))))
    rate = report["held_back_bytes_per_s"]
    assert isinstance(rate, int)
    assert 1e6 < rate < 60e6  # as slow as a link that would be worth it
    assert report["compression_trials"] == 0
    assert report["frames_compressed"] == 0
