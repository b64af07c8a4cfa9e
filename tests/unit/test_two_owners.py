# SPDX-License-Identifier: GPL-2.0-or-later
"""Two nodes that cover each other, and routes that move between them as they like.

Each node is what runs in a real one: collector, table, replica, injector and ownership, on a simulated DPVS and with an
agent that does what session.c does. What hypothesis chooses is where packets arrive and in which order everything else
happens. Whatever it was, as soon as no packets come for a while each session is live at one node and waits at the
other, and one more packet makes it live where that arrives; and no packet ever meets a node without the session.
"""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from collector import record
from collector.collector import Collector
from collector.conns import from_conns
from collector.record import Records
from collector.table import SessionTable
from probes.agent.abi import Code, RecordOp
from replicator.inject import Injector
from replicator.ownership import UNKNOWN, Ownership
from replicator.replica import Replica
from replicator.wire import Hello, Role
from tests.unit.simulated_dpvs import MODES, SimulatedDpvs
from tests.unit.test_inject import Now

SLOTS, CLIENTS = 16, 4
MS, SECOND = 1_000_000, 1_000_000_000


class SimulatedAgent:
    """Sessions of a simulated DPVS, found by their client's port."""

    max_records = 512

    def __init__(self, dpvs: SimulatedDpvs) -> None:
        self.dpvs = dpvs
        self._answers: list[npt.NDArray[np.uint8]] = []

    def submit(self, ops: npt.NDArray[np.uint8], records: Records) -> int:
        codes = [self._one(RecordOp(op), records[i : i + 1]) for i, op in enumerate(ops)]
        self._answers.append(np.array(codes, np.uint8))
        return len(self._answers)

    def results(self, request_id: int) -> npt.NDArray[np.uint8] | None:
        return self._answers[request_id - 1]

    def _one(self, op: RecordOp, wanted: Records) -> Code:
        dpvs = self.dpvs
        client = int(wanted["cport"][0]) - 1024
        slot = dpvs.slot_of_client(client)
        if slot < 0:
            if op is not RecordOp.UPSERT:
                return Code.ABSENT
            slot = int(np.flatnonzero((dpvs.conns["flags"] & record.HASHED) == 0)[0])
            dpvs.inject(slot, client)
            dpvs.conns["lport"][slot] = wanted["lport"][0]
            if wanted["proto"][0] == record.UDP:
                dpvs.conns["proto"][slot], dpvs.conns["state"][slot] = record.UDP, record.UDP_NONE
            return Code.CREATED
        if op is RecordOp.YIELD:
            dpvs.wait(slot)
            return Code.YIELDED
        here = from_conns(dpvs.conns[slot : slot + 1], np.array([slot]), MODES)
        if not record.carried(here)[0]:
            return Code.FOREIGN
        if not record.waiting(here)[0]:
            return Code.LIVE
        if op is RecordOp.DELETE:
            dpvs.free(slot)
            return Code.DELETED
        return Code.UPDATED


class ModelNode:
    def __init__(self, name: str) -> None:
        self.dpvs = SimulatedDpvs(SLOTS)
        self.table = SessionTable(SLOTS)
        self.marks = self.table.add_peer("peer")
        self.collector = Collector(self.dpvs, self.dpvs, self.table, modes=MODES)
        self.hello = Hello(name, 1, Role.SENDER, SLOTS)
        self.replica: Replica
        self.injector: Injector

    def hears(self, peer: "ModelNode") -> None:
        self.replica = Replica(peer.hello, 1)
        self.replica.connected = self.replica.synced = True
        ownership = Ownership(self.table, self.hello.node_id, self.collector.release)
        self.injector = Injector(
            SimulatedAgent(self.dpvs), lambda: [self.replica], executor=Now(), ownership=ownership
        )  # fmt: skip

    def send(self, peer: "ModelNode", limit: int) -> None:
        """What the link does with a few marks: the rows as they are now."""
        slots = self.marks.take(limit)
        there = self.table.present[slots]
        if there.any():
            peer.replica.put(self.table.rows(slots[there]), 1)
        if not there.all():
            gone = slots[~there]
            peer.replica.end(gone, self.table.generation[gone].copy(), 1)

    def states(self, client: int) -> tuple[bool, bool]:
        """Whether this node has the session, and whether it is live."""
        slot = self.dpvs.slot_of_client(client)
        if slot < 0:
            return False, False
        here = from_conns(self.dpvs.conns[slot : slot + 1], np.array([slot]), MODES)
        return True, not record.waiting(here)[0]


class Routes(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.nodes = [ModelNode("a"), ModelNode("b")]
        for number in (0, 1):
            self.nodes[number].hears(self.nodes[1 - number])
        self.last: dict[int, int] = {}  # session -> where its last packet arrived
        self.now = SECOND

    @initialize(owners=st.lists(st.integers(0, 1), min_size=CLIENTS, max_size=CLIENTS), udp=st.integers(0, CLIENTS))
    def sessions(self, owners: list[int], udp: int) -> None:
        """Each was made by the DPVS of one node, and has a copy at the other."""
        for client, owner in enumerate(owners):
            dpvs = self.nodes[owner].dpvs
            dpvs.create(client, client)
            dpvs.establish(client)
            if client < udp:
                dpvs.conns["proto"][client], dpvs.conns["state"][client] = record.UDP, record.UDP_NORMAL
            self.last[client] = owner
        self.rest()

    @rule(client=st.integers(0, CLIENTS - 1), node=st.integers(0, 1))
    def packet(self, client: int, node: int) -> None:
        dpvs = self.nodes[node].dpvs
        slot = dpvs.slot_of_client(client)
        assert slot >= 0, "a packet met a node without the session"
        dpvs.wake(slot)
        self.last[client] = node

    @rule(node=st.integers(0, 1))
    def scan(self, node: int) -> None:
        self.nodes[node].collector.scan_all(self._clock())

    @rule(node=st.integers(0, 1))
    def look(self, node: int) -> None:
        self.nodes[node].collector.tick(self._clock())

    @rule(node=st.integers(0, 1), limit=st.integers(1, 4))
    def send(self, node: int, limit: int) -> None:
        self.nodes[node].send(self.nodes[1 - node], limit)

    @rule(node=st.integers(0, 1), steps=st.integers(1, 3))
    def inject(self, node: int, steps: int) -> None:
        for _ in range(steps):
            self.nodes[node].injector.tick(self._clock())

    @rule()
    def rest(self) -> None:
        """No packets for a while, then one more for each session, and none again."""
        self._quiet()
        self._one_owner()
        for client, node in list(self.last.items()):
            self.packet(client, node)
        self._quiet()
        owners = self._one_owner()
        assert owners == self.last, "live where their last packets arrived"

    def _quiet(self) -> None:
        """Enough for everything to be said: less than the shortest timeout."""
        for _ in range(10):
            for node in (0, 1):
                self.scan(node)
                self.look(node)
                self.send(node, 100)
                self.now += 800 * MS
                self.inject(node, 1)

    def _one_owner(self) -> dict[int, int]:
        """Which node has each session; the other one has its copy."""
        owners = {}
        for client in self.last:
            states = [node.states(client) for node in self.nodes]
            assert sorted(states) == [(True, False), (True, True)], f"session {client}: {states}"
            owners[client] = states.index((True, True))
            node = self.nodes[owners[client]]
            assert node.table.present[node.dpvs.slot_of_client(client)]
        assert sum(node.table.count for node in self.nodes) == len(self.last)
        return owners

    def _clock(self) -> int:
        self.now += MS
        return self.now


Routes.TestCase.settings = settings(
    max_examples=20, stateful_step_count=30, deadline=None, report_multiple_bugs=False,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)  # fmt: skip
TestRoutes = Routes.TestCase


@pytest.mark.parametrize("fault", ["judge", "hear"])
def test_the_model_finds_planted_faults(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gives way; claims do not grow."""

    def nothing(self: Ownership, records: Records, *_: object) -> npt.NDArray[np.uint8]:
        return np.full(len(records), UNKNOWN, np.uint8)

    monkeypatch.setattr(Ownership, fault, nothing)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            Routes,
            settings=settings(
                Routes.TestCase.settings, max_examples=150, derandomize=True, database=None, phases=(Phase.generate,)
            ),
        )
