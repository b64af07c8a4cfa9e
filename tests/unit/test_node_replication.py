# SPDX-License-Identifier: GPL-2.0-or-later
"""Two nodes on simulated DPVSes, over TCP on the loopback interface: what one has, the other gets, whatever happens."""

import asyncio
import logging
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from collector import record
from replicator.transport.address import Address
from tests.unit.simulated_node import LiveDpvs, SimulatedNode, Wire, until
from tests.unit.transports import Turns


def test_sessions_arrive_and_leave(tmp_path: Path) -> None:
    async def body() -> None:
        async with SimulatedNode("b", tmp_path) as b, SimulatedNode("a", tmp_path, peers=(b.address,)) as a:
            await until(lambda: b.holds(a))
            a.dpvs.create(3, 7)
            await until(lambda: len(a.table) == 1 and b.holds(a))
            a.dpvs.establish(3, delta=99)
            await until(lambda: a.table.records["fnat_delta"][3] == 99 and b.holds(a))
            a.dpvs.free(3)
            a.dpvs.create(3, 8)
            await until(lambda: a.table.generation[3] == 2 and b.holds(a))
            a.dpvs.free(3)
            await until(lambda: len(a.table) == 0 and b.holds(a))
            replica = b.replica_of("a")
            assert replica is not None
            assert replica.counters["full_syncs"] == 1

    asyncio.run(body())


def test_the_log_names_the_peer_on_both_sides(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fields of the journal, whatever is said of a link."""

    async def body() -> None:
        async with SimulatedNode("b", tmp_path) as b:
            async with SimulatedNode("a", tmp_path, peers=(b.address,)) as a:
                await until(lambda: b.holds(a) and a.outbound[0].sender.settled)
            await until(lambda: "is gone" in caplog.text)

    caplog.set_level(logging.INFO, "replicator.links")
    asyncio.run(body())
    said = {entry.getMessage(): entry.__dict__["fields"] for entry in caplog.records if "peer" in entry.getMessage()}
    peers = {words: next(fields["PEER"] for text, fields in said.items() if words in text)
             for words in ("needs all sessions", "has all", "sends us its", "sessions of peer", "is gone")}  # fmt: skip
    assert list(peers.values()) == ["b", "b", "a", "a", "a"]
    assert all(fields["PEER_ADDRESS"] for fields in said.values())


def test_what_was_there_before(tmp_path: Path) -> None:
    async def body() -> None:
        dpvs = LiveDpvs(4096)
        for slot in range(1009):
            dpvs.create(slot, slot)
        async with (
            SimulatedNode("b", tmp_path) as b,
            SimulatedNode("a", tmp_path, slots=4096, dpvs=dpvs, peers=(b.address,)) as a,
        ):
            await until(lambda: b.holds(a) and len(a.table) == 1009)

    asyncio.run(body())


def test_both_ways_and_to_many(tmp_path: Path) -> None:
    async def body() -> None:
        random = np.random.default_rng(1)
        async with (
            Wire() as to_a,
            SimulatedNode("b", tmp_path, peers=(to_a.address,)) as b,
            SimulatedNode("c", tmp_path) as c,
            SimulatedNode("a", tmp_path, peers=(b.address, c.address)) as a,
        ):
            to_a.to = a.address
            for _ in range(40):
                a.dpvs.churn(random, 50)
                b.dpvs.churn(random, 50)
                await asyncio.sleep(0.005)
            await until(lambda: b.holds(a) and c.holds(a) and a.holds(b))
            assert c.replica_of("b") is None

    asyncio.run(body())


@pytest.mark.parametrize("seed", range(3))
def test_a_link_that_breaks_again_and_again(tmp_path: Path, seed: int) -> None:
    async def body() -> None:
        random = np.random.default_rng(seed)
        async with Wire() as wire, SimulatedNode("b", tmp_path) as b:
            wire.to = b.address
            async with SimulatedNode("a", tmp_path, peers=(wire.address,)) as a:
                await until(lambda: b.holds(a))
                sender = a.outbound[0].sender
                for number in range(10):
                    for _ in range(6):
                        a.dpvs.churn(random, 100)
                        await asyncio.sleep(0.005)
                    wire.refuses = number % 2 == 1
                    wire.cut()
                    a.dpvs.churn(random, 100)
                    await asyncio.sleep(0.05)
                    wire.refuses = False
                    await until(lambda count=number: sender.counters["partial_syncs"] > count)  # type: ignore[misc]
                await until(lambda: b.holds(a))
                assert sender.counters["full_syncs"] == 1, "a reconnect goes on where it was"

    asyncio.run(body())


def test_a_peer_that_falls_silent_is_noticed_and_caught_up(tmp_path: Path) -> None:
    async def body() -> None:
        async with Wire() as wire, SimulatedNode("b", tmp_path) as b:
            wire.to = b.address
            async with SimulatedNode("a", tmp_path, peers=(wire.address,)) as a:
                await until(lambda: b.holds(a))
                replica = b.replica_of("a")
                assert replica is not None
                wire.swallows = True
                a.dpvs.create(1, 1)
                turns = Turns()
                await until(lambda: a.outbound[0].note and not replica.link_up)
                assert turns.seconds() < 4.5
                assert "silent for 3 s" in a.outbound[0].note
                assert len(replica) == 0
                wire.swallows = False
                wire.cut()
                await until(lambda: b.holds(a) and len(replica) == 1)

    asyncio.run(body())


def test_a_peer_that_dies_and_comes_back_gets_everything(tmp_path: Path) -> None:
    async def body() -> None:
        random = np.random.default_rng(5)
        async with Wire() as wire, SimulatedNode("a", tmp_path, peers=(wire.address,)) as a:
            a.dpvs.churn(random, 500)
            for _ in range(3):
                async with SimulatedNode("b", tmp_path) as b:
                    wire.to = b.address
                    a.dpvs.churn(random, 500)
                    await until(lambda b=b: b.holds(a))  # type: ignore[misc]
                wire.cut()
            assert a.outbound[0].sender.counters["full_syncs"] == 3

    asyncio.run(body())


def test_an_origin_that_dies_and_comes_back_with_other_sessions(tmp_path: Path) -> None:
    async def body() -> None:
        random = np.random.default_rng(6)
        async with SimulatedNode("b", tmp_path) as b:
            async with SimulatedNode("a", tmp_path, peers=(b.address,)) as a:
                a.dpvs.churn(random, 500)
                await until(lambda: len(a.table) > 0 and b.holds(a))
                before = b.replica_of("a")
                assert before is not None
                held = before.digest()
            await until(lambda: not before.connected)
            assert before.digest() == held, "the end of a link ends no session"
            async with SimulatedNode("a", tmp_path, peers=(b.address,)) as again:
                again.dpvs.churn(random, 500)
                await until(lambda: b.holds(again))
                assert b.replica_of("a") is not before

    asyncio.run(body())


def test_the_death_of_the_dpvs_deletes_nothing(tmp_path: Path) -> None:
    async def body() -> None:
        with subprocess.Popen(["sleep", "100"]) as dpvs_process:
            pidfd = os.pidfd_open(dpvs_process.pid)
            async with (
                SimulatedNode("b", tmp_path) as b,
                SimulatedNode("a", tmp_path, peers=(b.address,), pidfd=pidfd) as a,
            ):
                for slot in range(100):
                    a.dpvs.create(slot, slot)
                await until(lambda: b.holds(a) and len(a.table) == 100)
                for slot in range(100):  # the last moments: seen by nobody yet
                    a.dpvs.establish(slot, delta=slot)
                a.dpvs.create(100, 100)
                dpvs_process.kill()
                assert a.task is not None
                assert await asyncio.wait_for(a.task, 60) == 3
                assert a.released == 1
                replica = b.replica_of("a")
                assert replica is not None
                await until(lambda: not replica.connected)
                assert len(replica) == 101
                assert replica.digest() == a.truth(), "what peers have is how it was at the end"
                assert (replica.records["state"][:100] == record.ESTABLISHED).all()
                a.dpvs.conns["flags"] = 0  # the memory of a dead process means nothing any more
                a.collector.scan_all(a.dpvs.clock())
                a.collector.scan_all(a.dpvs.clock())
                assert len(a.table) == 101
            os.close(pidfd)

    asyncio.run(body())


def test_the_death_of_the_dpvs_while_the_peer_is_away(tmp_path: Path) -> None:
    async def body() -> None:
        with subprocess.Popen(["sleep", "100"]) as dpvs_process:
            pidfd = os.pidfd_open(dpvs_process.pid)
            async with SimulatedNode("a", tmp_path, peers=(Address("127.0.0.1", 1),), pidfd=pidfd) as a:
                a.dpvs.create(1, 1)
                dpvs_process.kill()
                assert a.task is not None
                assert await asyncio.wait_for(a.task, 60) == 3
            os.close(pidfd)

    asyncio.run(body())


def test_two_nodes_of_one_name_refuse_each_other(tmp_path: Path) -> None:
    async def body() -> None:
        one, two = tmp_path / "1", tmp_path / "2"
        one.mkdir()
        two.mkdir()
        async with (
            SimulatedNode("a", one) as listening,
            SimulatedNode("a", two, peers=(listening.address,)) as dialling,
        ):
            await until(lambda: "both nodes are called 'a'" in dialling.outbound[0].note)
            assert list(listening.replicas) == []

    asyncio.run(body())


def test_a_stranger_on_the_port(tmp_path: Path) -> None:
    async def body() -> None:
        async with SimulatedNode("b", tmp_path) as b:
            reader, writer = await asyncio.open_connection(*b.address)
            writer.write(b"GET / HTTP/1.0\r\n\r\n" * 100)
            async with asyncio.timeout(60):
                await reader.read(-1)
            writer.close()
            async with SimulatedNode("a", tmp_path, peers=(b.address,)) as a:
                a.dpvs.create(1, 1)
                await until(lambda: len(a.table) == 1 and b.holds(a))

    asyncio.run(body())


def test_other_peers_are_given_while_it_runs(tmp_path: Path) -> None:
    async def body() -> None:
        async with (
            SimulatedNode("b", tmp_path) as b,
            SimulatedNode("c", tmp_path) as c,
            SimulatedNode("a", tmp_path, peers=(b.address,)) as a,
        ):

            def has(node: SimulatedNode) -> bool:
                replica = node.replica_of("a")
                return replica is not None and replica.synced and replica.digest() == a.truth()

            def row(of: SimulatedNode) -> dict[str, Any]:
                rows = a.links.peers(0, injecting=False)
                return next((row for row in rows if row["address"] == str(of.address)), {})

            for slot in range(40):
                a.dpvs.create(slot, slot)
            await until(lambda: has(b))
            a.links.give([str(b.address), str(c.address)])
            await until(lambda: has(c))
            assert row(b)["link"]["connections"] == 1, "who stays does not notice"
            assert row(c)["source"] == "given"
            a.links.give([str(c.address)])
            await until(lambda: not row(b))
            for slot in range(40, 50):
                a.dpvs.create(slot, slot)
            await until(lambda: has(c))
            assert not has(b)
            assert row(c)["link"]["connections"] == 1
            a.links.give([str(b.address), str(c.address)])
            await until(lambda: has(b))
            assert (a.membership.joined, a.membership.left) == (2, 1)

    asyncio.run(body())
