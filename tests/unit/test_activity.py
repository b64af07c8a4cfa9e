# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/activity.py: a node that sees packets, what it says of them, and what it asks its peers for."""

import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from collector.flows import Flows, Sessions
from collector.record import Records
from collector.table import SessionTable
from probes.errors import DpvsProbeError
from probes.flow import FLOW, FLOW_KEY, SERVICE
from probes.packets import COUNTERS
from replicator.activity import SERVICES_NS, Activity, services_of
from replicator.admin import AdminError
from tests.unit.session_records import sessions
from tests.unit.simulated_node import SimulatedNode, until
from tests.unit.test_node import answer, run

SECOND = 1_000_000_000


class FakePackets:
    """An interface on which flows have as many packets as a test says."""

    limit = 1024

    def __init__(self) -> None:
        self.services: npt.NDArray[np.void] = np.empty(0, SERVICE)
        self.keys, self.values = np.empty(0, FLOW_KEY), np.empty(0, FLOW)
        self.reads = self.ever_new = 0

    @property
    def watched(self) -> int:
        return len(self.services)

    def watch(self, services: npt.NDArray[np.void]) -> int:
        self.services = services
        return 3

    def read(self) -> tuple[Flows, Flows]:
        self.reads += 1
        return self.keys, self.values

    def counters(self) -> dict[str, int]:
        return {**dict.fromkeys(COUNTERS, 0), "packets": 7, "counted": 7, "flows_new": self.ever_new, "bytes": 700}

    def interfaces(self) -> list[dict[str, str]]:
        return [{"interface": "eth1", "mode": "native"}]

    def arrive(self, records: Records, packets: int, now_ns: int) -> None:
        """Packets of the flows of these sessions, the last just now."""
        self.keys, self.values = np.zeros(len(records), FLOW_KEY), np.zeros(len(records), FLOW)
        for name in ("caddr", "vaddr", "cport", "vport", "proto", "af"):
            self.keys[name] = records[name]
        self.values["packets"], self.values["bytes"], self.values["last_ns"] = packets, 100 * packets, now_ns
        self.values["flags"] = 0x18


def test_a_node_asks_for_what_it_has_no_session_for_and_gets_it(tmp_path: Path) -> None:
    async def body() -> None:
        packets = FakePackets()
        async with (
            SimulatedNode("b", tmp_path, packets=packets) as b,
            SimulatedNode("a", tmp_path, peers=(b.address,)) as a,
        ):
            for slot in range(5):
                a.dpvs.create(slot, slot)
            await until(lambda: b.holds(a) and len(a.table) == 5 and a.outbound[0].sender.settled)
            replica = b.replica_of("a")
            assert replica is not None
            lost = a.table.rows(np.array([3]))
            replica.end(np.array([3]), np.array([replica.generation[3]]), 1)  # as if it had never come
            replica.generation[3] = 0
            assert not b.holds(a)
            assert b.activity is not None
            for count in range(1, 200):
                packets.arrive(a.table.sessions(), count, b.activity._clock())
                reads = packets.reads
                await until(lambda before=reads: packets.reads > before)
                if b.activity.asked:
                    break
                assert len(await answer(b, "orphans")) <= 1
            await until(lambda: b.holds(a))
            assert lost["cport"][0] == replica.records["cport"][3]
            assert a.outbound[0].sender.counters["wanted_found"] == 1
            (status,) = await answer(b, "status")
            assert (status["packets"]["orphans_asked_for"], status["packets"]["services_from"]) == (1, "known sessions")
            assert status["packets"]["services_no_room"] == 3

    run(body())


def test_sessions_of_a_node_have_their_packets(tmp_path: Path) -> None:
    async def body() -> None:
        packets = FakePackets()
        async with SimulatedNode("a", tmp_path, packets=packets) as a:
            for slot in range(5):
                a.dpvs.create(slot, slot)
            await until(lambda: len(a.table) == 5)
            assert a.activity is not None
            packets.arrive(a.table.rows(np.array([1, 2])), 9, a.activity._clock())
            reads = packets.reads
            await until(lambda: packets.reads > reads + 1)
            rows = {row["slot"]: row for row in await answer(a, "sessions")}
            assert [slot for slot, row in rows.items() if "packets" in row] == [1, 2]
            assert (rows[1]["packets"], rows[1]["bytes"], rows[1]["tcp_flags"]) == (9, 900, ["ACK", "PSH"])
            assert 0 <= rows[1]["last_active_s"] < 5
            assert await answer(a, "orphans") == []

    run(body())


def test_a_node_that_looks_at_no_packets_says_so(tmp_path: Path) -> None:
    async def body() -> None:
        async with SimulatedNode("a", tmp_path) as a:
            with pytest.raises(AdminError, match="looks at no packets"):
                await answer(a, "orphans")
            (status,) = await answer(a, "status")
            assert status["packets"] == "off"

    run(body())


class Failing:
    """A control socket that works now and then."""

    def __init__(self) -> None:
        self.broken = True
        self.asked = 0

    def __call__(self) -> npt.NDArray[np.void] | None:
        self.asked += 1
        if self.broken:
            raise DpvsProbeError("no answer")
        return np.zeros(2, SERVICE)


def test_a_list_of_services_that_cannot_be_had_leaves_the_old_one() -> None:
    now, packets, services = [10 * SECOND], FakePackets(), Failing()
    table = SessionTable(16)
    table.complete = True
    activity = Activity(packets, table, lambda: [], services, clock=lambda: now[0])
    services.broken = False
    activity.look([])
    assert (packets.watched, services.asked) == (2, 1)
    activity.look([])
    assert services.asked == 1  # not each time
    services.broken = True
    now[0] += SERVICES_NS
    with pytest.raises(DpvsProbeError, match="no answer"):
        activity.look([])
    assert (packets.watched, packets.reads, activity.looks) == (2, 3, 3)  # the flows are read all the same


def test_trouble_is_said_once_and_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Gone(FakePackets):
        def read(self) -> tuple[Flows, Flows]:
            self.reads += 1
            raise OSError("the map is gone")

    async def body() -> None:
        packets = Gone()
        async with SimulatedNode("a", tmp_path, packets=packets) as a:
            await until(lambda: packets.reads >= 4)
            assert a.activity is not None
            assert a.activity.failures >= 3

    with caplog.at_level(logging.WARNING):
        run(body())
    assert [entry.getMessage() for entry in caplog.records] == ["packets: the map is gone; trying again"]


def test_services_of_known_sessions() -> None:
    table = np.zeros(64, sessions(1).dtype)
    table[:40] = sessions(40)
    table["vport"][:40] = np.arange(40) % 3 + 80
    table["vport"][5] = 0
    present = np.arange(64) < 40
    found = services_of([Sessions(table, present), Sessions(table, present)])
    assert sorted(found["port"].tolist()) == [80, 81, 82]
    assert set(found["proto"].tolist()) == {6}
    assert len(services_of([Sessions(table, np.zeros(64, np.bool_))])) == 0
