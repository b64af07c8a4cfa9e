# SPDX-License-Identifier: GPL-2.0-or-later
"""Two nodes that cover each other, or three, and routes that move between them as they like.

Each node is what runs in a real one: collector, table, replica, injector and ownership, on a simulated DPVS and with an
agent that does what session.c does. What hypothesis chooses is where packets arrive and in which order everything else
happens. Whatever it was, as soon as no packets come for a while each session is live at one node and waits at the
others, and one more packet makes it live where that arrives; and, of two nodes, no packet ever meets one without the
session. The third may hear that a session is another's after its deletion, and is without it in between.
"""

from itertools import permutations

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
MOST = 5  # a node's number, to be taken modulo how many there are
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
        self.collector = Collector(self.dpvs, self.dpvs, self.table, modes=MODES)
        self.hello = Hello(name, 1, Role.SENDER, SLOTS)
        self.replicas: dict[str, Replica] = {}
        ownership = Ownership(self.table, self.hello.node_id, self.collector.release)
        self.injector = Injector(
            SimulatedAgent(self.dpvs), lambda: list(self.replicas.values()), executor=Now(), ownership=ownership
        )  # fmt: skip

    def hears(self, peer: "ModelNode") -> None:
        replica = self.replicas[peer.hello.node] = Replica(peer.hello, 1)
        replica.connected = replica.synced = True

    def send(self, peer: "ModelNode", limit: int) -> None:
        """What the link does with a few marks: the rows as they are now."""
        slots = self.table.add_peer(peer.hello.node).take(limit)
        there = self.table.present[slots]
        replica = peer.replicas[self.hello.node]
        if there.any():
            replica.put(self.table.rows(slots[there]), 1)
        if not there.all():
            gone = slots[~there]
            replica.end(gone, self.table.generation[gone].copy(), 1)

    def states(self, client: int) -> tuple[bool, bool]:
        """Whether this node has the session, and whether it is live."""
        slot = self.dpvs.slot_of_client(client)
        if slot < 0:
            return False, False
        here = from_conns(self.dpvs.conns[slot : slot + 1], np.array([slot]), MODES)
        return True, not record.waiting(here)[0]


class Routes(RuleBasedStateMachine):
    names = "ab"

    def __init__(self) -> None:
        super().__init__()
        self.nodes = [ModelNode(name) for name in self.names]
        for node, peer in permutations(self.nodes, 2):
            node.table.add_peer(peer.hello.node)
            node.hears(peer)
        self.last: dict[int, int] = {}  # session -> where its last packet arrived
        self.now = SECOND

    @initialize(owners=st.lists(st.integers(0, MOST), min_size=CLIENTS, max_size=CLIENTS), udp=st.integers(0, CLIENTS))
    def sessions(self, owners: list[int], udp: int) -> None:
        """Each was made by the DPVS of one node, and has a copy at the others."""
        for client, owner in enumerate(owners):
            dpvs = self._node(owner).dpvs
            dpvs.create(client, client)
            dpvs.establish(client)
            if client < udp:
                dpvs.conns["proto"][client], dpvs.conns["state"][client] = record.UDP, record.UDP_NORMAL
            self.last[client] = owner % len(self.nodes)
        self.rest()

    @rule(client=st.integers(0, CLIENTS - 1), node=st.integers(0, MOST))
    def packet(self, client: int, node: int) -> None:
        dpvs = self._node(node).dpvs
        slot = dpvs.slot_of_client(client)
        if slot < 0:
            assert len(self.nodes) > 2, "a packet met a node without the session"
            return
        dpvs.wake(slot)
        self.last[client] = node % len(self.nodes)

    @rule(node=st.integers(0, MOST))
    def scan(self, node: int) -> None:
        self._node(node).collector.scan_all(self._clock())

    @rule(node=st.integers(0, MOST))
    def look(self, node: int) -> None:
        self._node(node).collector.tick(self._clock())

    @rule(node=st.integers(0, MOST), away=st.integers(1, MOST), limit=st.integers(1, 4))
    def send(self, node: int, away: int, limit: int) -> None:
        away = 1 + away % (len(self.nodes) - 1)
        self._node(node).send(self._node(node % len(self.nodes) + away), limit)

    @rule(node=st.integers(0, MOST), steps=st.integers(1, 3))
    def inject(self, node: int, steps: int) -> None:
        for _ in range(steps):
            self._node(node).injector.tick(self._clock())

    @rule()
    def rest(self) -> None:
        """No packets for a while, then one more for each session, and none again."""
        self._quiet(5, SECOND // 20)
        for client in self.last:
            assert all(node.states(client)[0] for node in self.nodes), "a node without a copy, until the refresh"
        self._quiet()
        self._one_owner()
        for client, node in list(self.last.items()):
            self.packet(client, node)
        self._quiet()
        owners = self._one_owner()
        assert owners == self.last, "live where their last packets arrived"

    def _quiet(self, rounds: int = 10, round_ns: int = 1600 * MS) -> None:
        """Enough for everything to be said: less than the shortest timeout."""
        for _ in range(rounds):
            for number, node in enumerate(self.nodes):
                self.scan(number)
                self.look(number)
                for peer in self.nodes:
                    if peer is not node:
                        node.send(peer, 100)
                self.now += round_ns // len(self.nodes)
                self.inject(number, 1)

    def _one_owner(self) -> dict[int, int]:
        """Which node has each session; the others have its copies."""
        owners = {}
        for client in self.last:
            states = [node.states(client) for node in self.nodes]
            others = [(True, False)] * (len(self.nodes) - 1)
            assert sorted(states) == [*others, (True, True)], f"session {client}: {states}"
            owners[client] = states.index((True, True))
            node = self.nodes[owners[client]]
            assert node.table.present[node.dpvs.slot_of_client(client)]
        assert sum(node.table.count for node in self.nodes) == len(self.last)
        return owners

    def _node(self, number: int) -> ModelNode:
        return self.nodes[number % len(self.nodes)]

    def _clock(self) -> int:
        self.now += MS
        return self.now


Routes.TestCase.settings = settings(
    max_examples=20, stateful_step_count=30, deadline=None, report_multiple_bugs=False,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)  # fmt: skip
TestRoutes = Routes.TestCase


class RoutesOfThree(Routes):
    names = "abc"


RoutesOfThree.TestCase.settings = settings(Routes.TestCase.settings, max_examples=40)
TestRoutesOfThree = RoutesOfThree.TestCase


@pytest.mark.parametrize("fault", ["judge", "hear"])
@pytest.mark.parametrize("routes", [Routes, RoutesOfThree])
def test_the_model_finds_planted_faults(routes: type[Routes], fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gives way; claims do not grow."""

    def nothing(self: Ownership, records: Records, *_: object) -> npt.NDArray[np.uint8]:
        return np.full(len(records), UNKNOWN, np.uint8)

    monkeypatch.setattr(Ownership, fault, nothing)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            routes,
            settings=settings(
                Routes.TestCase.settings, max_examples=150, derandomize=True, database=None, phases=(Phase.generate,)
            ),
        )


def test_the_third_keeps_its_copies_of_what_two_have_claimed() -> None:
    """It gives way to both, one of them gives way to the other, and ends its own: the copy stands for the other now."""
    routes = RoutesOfThree()
    routes.sessions([0] * CLIENTS, 2)
    for client in range(CLIENTS):
        routes.packet(client, 1)
        routes.packet(client, 2)
    for number in (1, 2):
        routes.scan(number)
    a, b, c = routes.nodes
    b.send(a, 100)
    c.send(a, 100)
    for _ in range(6):
        routes.inject(0, 1)
    b.send(c, 100)
    c.send(b, 100)
    for _ in range(6):
        for number in range(3):
            routes.inject(number, 1)
        for node, peer in permutations(routes.nodes, 2):
            node.send(peer, 100)
    for client in range(CLIENTS):
        assert a.states(client) == (True, False)
        assert sorted(node.states(client) for node in (b, c)) == [(True, False), (True, True)]
