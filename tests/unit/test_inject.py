# SPDX-License-Identifier: GPL-2.0-or-later
"""The injector against an agent that behaves as agent.c does, but in Python and at once."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.record import (
    AF_INET6,
    CLOSE,
    DR,
    ESTABLISHED,
    FIN_WAIT,
    FNAT,
    INJECTED,
    NAT,
    ONE_PACKET,
    RECORD,
    SCTP,
    SNAT,
    SYN_RECV,
    TCP,
    TEMPLATE,
    TIME_WAIT,
    TUNNEL,
    UDP,
    Records,
    Slots,
)
from collector.table import SessionTable
from probes.agent.abi import MAX_RECORDS, MAX_REQUESTS, Code, RecordOp
from probes.agent.client import AgentBusy, AgentRefused
from probes.errors import DpvsProbeError
from replicator.inject import MIN_COPY_TIMEOUT_MS, Injector, injectable
from replicator.ownership import Ownership
from replicator.promotion import HURRY_NS, Policy, Promotion

SLOTS = 64
SECOND = 1_000_000_000


class Now(Executor):
    """Runs what it is given at once, in the caller's thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class FakeMarks:
    def __init__(self) -> None:
        self.slots: list[int] = []

    def mark(self, slots: Slots) -> None:
        self.slots += [int(s) for s in slots if int(s) not in self.slots]

    def take(self, limit: int) -> Slots:
        taken, self.slots = self.slots[:limit], self.slots[limit:]
        return np.array(taken, np.int64)


class FakeReplica:
    def __init__(self, slots: int = SLOTS) -> None:
        self.node_id, self.instance = 7, 1
        self.node, self.workers = "a", 0
        self.slots = slots
        self.records: Records = np.zeros(slots, RECORD)
        self.present = np.zeros(slots, np.bool_)
        self.pending = FakeMarks()
        self.link_up = True

    def put(self, slot: int, client: int, lport: int, state: int = ESTABLISHED, proto: int = TCP) -> None:
        r = self.records[slot : slot + 1]
        r[:] = np.zeros(1, RECORD)
        r["slot"], r["af"], r["af_out"], r["proto"], r["fwdmode"], r["state"] = slot, 2, 2, proto, FNAT, state
        r["cport"], r["vport"], r["lport"], r["dport"], r["timeout_ms"] = client, 80, lport, 8080, 7000
        self.present[slot] = True
        self.pending.mark(np.array([slot]))

    def drop(self, slot: int) -> None:
        self.present[slot] = False
        self.pending.mark(np.array([slot]))


class FakeAgent:
    """Sessions by client port; a local port is taken once; answers are there from the second question on."""

    def __init__(self) -> None:
        self.sessions: dict[int, tuple[int, int, int]] = {}  # client port -> local port, fnat_delta, timeout
        self.live: set[int] = set()
        self.foreign: set[int] = set()
        self.refuse: Code | None = None
        self.error: DpvsProbeError | None = None
        self.log: list[tuple[int, int]] = []
        self.answers: dict[int, tuple[int, npt.NDArray[np.uint8]]] = {}
        self.delay = 1
        self.largest = 0
        self.max_records = MAX_RECORDS
        self.stuck: set[int] = set()  # on one of several workers
        self.crowded = True  # look whether a local port is taken

    def submit(self, ops: npt.NDArray[np.uint8], records: Records) -> int:
        if self.error:
            raise self.error
        assert 0 < len(ops) == len(records) <= MAX_RECORDS
        self.largest = max(self.largest, len(ops))
        codes = np.array([self._one(int(o), r) for o, r in zip(ops, records, strict=True)], np.uint8)
        number = len(self.answers) + 1
        self.answers[number] = (self.delay, codes)
        return number

    def results(self, request_id: int) -> npt.NDArray[np.uint8] | None:
        left, codes = self.answers[request_id]
        self.answers[request_id] = (left - 1, codes)
        return codes if left <= 0 else None

    def _one(self, op: int, record: Any) -> Code:
        client, local = int(record["cport"]), int(record["lport"])
        self.log.append((op, client))
        if client in self.stuck:
            return Code.BUSY
        if op == RecordOp.YIELD:
            if client not in self.foreign | self.live:
                return Code.ABSENT
            self.foreign.discard(client)
            self.live.discard(client)
            self.sessions[client] = (local, int(record["fnat_delta"]), int(record["timeout_ms"]))
            return Code.YIELDED
        if client in self.foreign:
            return Code.FOREIGN
        if op == RecordOp.CLAIM:
            if client not in self.sessions:
                return Code.ABSENT
            self.live.add(client)
            return Code.LIVE
        have = self.sessions.get(client)
        if op != RecordOp.UPSERT:
            if have is None or have[0] != local:
                return Code.ABSENT
            if op == RecordOp.CHECK:
                return Code.LIVE if client in self.live else Code.WAITING
            if client in self.live:
                return Code.LIVE
            del self.sessions[client]
            return Code.DELETED
        if self.refuse:
            return self.refuse
        assert int(record["timeout_ms"]) >= MIN_COPY_TIMEOUT_MS
        if have is not None and client in self.live:
            return Code.LIVE
        if self.crowded and any(lport == local and c != client for c, (lport, _, _) in self.sessions.items()):
            return Code.PORT_BUSY
        self.sessions[client] = (local, int(record["fnat_delta"]), int(record["timeout_ms"]))
        return Code.UPDATED if have and have[0] == local else Code.CREATED


class World:
    def __init__(self) -> None:
        self.agent, self.replica = FakeAgent(), FakeReplica()
        self.injector = Injector(self.agent, lambda: [self.replica], executor=Now(), refresh_ns=10 * SECOND)
        self.now = 1

    def run(self, ticks: int = 20, step_ns: int = 2_000_000) -> None:
        for _ in range(ticks):
            self.now += step_ns
            self.injector.tick(self.now)


@pytest.fixture
def world() -> World:
    return World()


def test_a_session_is_put_in_changed_and_taken_out(world: World) -> None:
    world.replica.put(3, 1000, 2000)
    world.run()
    assert world.agent.sessions == {1000: (2000, 0, MIN_COPY_TIMEOUT_MS)}
    world.replica.records["fnat_delta"][3] = 77
    world.replica.pending.mark(np.array([3]))
    world.run()
    assert world.agent.sessions[1000][1] == 77
    world.replica.drop(3)
    world.run()
    assert world.agent.sessions == {}
    assert world.injector.installed() == 0
    assert world.injector.idle()


@pytest.mark.parametrize(
    ("state", "wanted"), [(ESTABLISHED, True), (FIN_WAIT, True), (SYN_RECV, False), (CLOSE, False)]
)
def test_only_open_connections_stand_by(world: World, state: int, wanted: bool) -> None:
    world.replica.put(3, 1000, 2000, state)
    world.run()
    assert (1000 in world.agent.sessions) is wanted


def test_udp_once_a_packet_was_seen(world: World) -> None:
    for state in (0, 3):
        world.replica.put(3, 1000, 2000, state, UDP)
        world.run()
        assert world.agent.log == []
    for state in (1, 2):
        world.replica.put(3, 1000, 2000, state, UDP)
        world.run()
        assert 1000 in world.agent.sessions


@pytest.mark.parametrize(
    ("field", "value"),
    [("fwdmode", SNAT), ("fwdmode", 255), ("af", 1), ("af_out", AF_INET6), ("proto", 50), ("flags", ONE_PACKET)],
)
def test_what_no_agent_takes_is_not_sent(world: World, field: str, value: int) -> None:
    world.replica.put(3, 1000, 2000)
    world.replica.records[field][3] = value
    world.run()
    assert world.agent.log == []


@pytest.mark.parametrize("mode", [FNAT, DR, NAT, TUNNEL])
@pytest.mark.parametrize("families", [(2, 2), (10, 10), (10, 2), (2, 10)])
def test_the_modes_and_families_that_dpvs_carries(mode: int, families: tuple[int, int]) -> None:
    records = np.zeros(1, RECORD)
    records["af"], records["af_out"] = families
    records["proto"], records["state"], records["fwdmode"] = TCP, ESTABLISHED, mode
    wanted = families in ((2, 2), (10, 10)) or (families == (10, 2) and mode in (FNAT, TUNNEL))
    assert injectable(records).tolist() == [wanted]


def test_sctp_once_it_is_open(world: World) -> None:
    for mode, state, wanted in (
        (FNAT, 2, False), (FNAT, 7, False), (FNAT, 8, True), (FNAT, 11, True), (FNAT, 13, False), (DR, 2, True),
        (NAT, 2, False), (TUNNEL, 2, True), (TUNNEL, 1, False),
    ):  # fmt: skip
        world.replica.put(3, 1000, 2000, state, SCTP)
        world.replica.records["fwdmode"][3] = mode
        world.run()
        assert (1000 in world.agent.sessions) is wanted


def test_templates_are_put_in_and_those_out_of_use_are_not(world: World) -> None:
    world.replica.put(3, 0, 0, state=0)
    world.replica.records["flags"][3], world.replica.records["dport"][3] = TEMPLATE, 0
    world.run()
    assert world.agent.log == [(RecordOp.UPSERT, 0)]
    world.replica.records["dport"][3] = 0xFFFF
    world.replica.pending.mark(np.array([3]))
    world.run()
    assert world.agent.log == [(RecordOp.UPSERT, 0), (RecordOp.DELETE, 0)]


@pytest.mark.parametrize(("link_up", "ends"), [(True, True), (False, False)])
def test_a_tie_is_left_to_dpvs_where_its_owner_is_gone(world: World, link_up: bool, ends: bool) -> None:
    world.replica.put(3, 0, 0, state=0)
    world.replica.records["flags"][3], world.replica.records["dport"][3] = TEMPLATE, 0
    world.run()
    world.agent.log.clear()
    world.replica.link_up = link_up
    world.replica.drop(3)
    world.run()
    assert world.agent.log == ([(RecordOp.DELETE, 0)] if ends else [])
    assert world.injector.installed() == 0


@pytest.mark.parametrize("mode", [DR, NAT])
def test_without_its_owner_what_may_stand_on_several_workers_is_looked_at(world: World, mode: int) -> None:
    world.replica.put(3, 1000, 2000)
    world.replica.put(4, 1001, 1001)
    world.replica.put(5, 0, 0, state=0)  # a template stands once, on any of them
    world.replica.records["flags"][5], world.replica.records["dport"][5] = TEMPLATE, 0
    world.replica.records["fwdmode"][4:6] = mode
    world.run()
    world.replica.link_up = False
    world.agent.log.clear()
    world.run(ticks=12, step_ns=SECOND)
    assert set(world.agent.log) == {(RecordOp.CHECK, 1001)}
    assert world.injector.codes(world.replica)[4] == Code.WAITING
    world.agent.stuck.add(1001)  # it is live on one worker, and could not be taken from another
    world.run(ticks=12, step_ns=SECOND)
    assert world.injector.codes(world.replica)[4] == Code.BUSY
    world.agent.stuck.clear()
    world.agent.live.add(1001)
    world.agent.log.clear()
    world.run(ticks=12, step_ns=SECOND)
    assert set(world.agent.log) == {(RecordOp.CHECK, 1001)}
    assert world.injector.codes(world.replica)[4] == Code.LIVE
    assert world.injector.installed() == 3
    world.agent.log.clear()
    world.run(ticks=12, step_ns=SECOND)
    assert world.agent.log == []


def test_a_copy_that_is_busy_on_one_worker_is_not_forgotten(world: World) -> None:
    world.replica.put(4, 1001, 1001)
    world.replica.records["fwdmode"][4] = DR
    world.run()
    world.agent.stuck.add(1001)
    world.replica.records["timeout_ms"][4] += 1
    world.replica.pending.mark(np.array([4]))
    world.run()
    assert (world.injector.codes(world.replica)[4], world.injector.installed()) == (Code.BUSY, 1)
    world.replica.link_up = False
    world.agent.stuck.clear()
    world.agent.live.add(1001)
    world.run(ticks=12, step_ns=SECOND)
    assert world.injector.codes(world.replica)[4] == Code.LIVE


def test_what_there_was_no_room_to_refresh_is_owed(world: World) -> None:
    for slot in range(SLOTS):
        world.replica.put(slot, 1000 + slot, 2000 + slot)
    world.run()
    world.agent.log.clear()
    world.agent.delay = 1 << 30  # nothing is answered any more
    world.run(ticks=300, step_ns=50_000_000)
    held = len(world.agent.log)
    assert 0 < held < SLOTS
    world.agent.answers = {number: (0, codes) for number, (_, codes) in world.agent.answers.items()}
    world.agent.delay = 0
    world.run(ticks=3, step_ns=50_000_000)
    assert len(world.agent.log) >= SLOTS


def test_a_copy_goes_when_its_connection_closes_and_comes_back_when_the_port_is_used_again(world: World) -> None:
    world.replica.put(3, 1000, 2000)
    world.run()
    for state, there in ((TIME_WAIT, False), (SYN_RECV, False), (ESTABLISHED, True)):
        world.replica.put(3, 1000, 2000, state)
        world.run()
        assert (1000 in world.agent.sessions) is there


def test_a_slot_used_again_deletes_the_old_session_before_the_new_one(world: World) -> None:
    world.replica.put(3, 1000, 2000)
    world.run()
    world.replica.put(3, 1001, 2000)  # the very same local port
    world.run()
    assert world.agent.sessions.keys() == {1001}
    assert world.agent.log[-2:] == [(RecordOp.DELETE, 1000), (RecordOp.UPSERT, 1001)]


def test_one_operation_per_slot_is_under_way(world: World) -> None:
    world.agent.delay = 5
    world.replica.put(3, 1000, 2000)
    world.run(2)
    for delta in (1, 2, 3):
        world.replica.records["fnat_delta"][3] = delta
        world.replica.pending.mark(np.array([3]))
        world.run(1)
    assert len(world.agent.log) == 1
    world.run(20)
    assert len(world.agent.log) == 2
    assert world.agent.sessions[1000][1] == 3


def test_what_dpvs_has_not_answered_for(world: World) -> None:
    world.agent.delay = 5
    for slot in (3, 4):
        world.replica.put(slot, 1000 + slot, 2000)
    assert world.injector.unanswered() == 0  # not asked yet
    world.run(2)
    assert world.injector.unanswered() == 2
    world.run(20)
    assert world.injector.unanswered() == 0
    world.replica.records["fnat_delta"][3] = 1
    world.replica.pending.mark(np.array([3]))
    world.run(2)
    assert not world.injector.idle()
    assert world.injector.unanswered() == 0  # it stands there


def test_refresh_while_the_owner_lives_and_not_after(world: World) -> None:
    for i in range(20):
        world.replica.put(i, 1000 + i, 2000 + i)
    world.run()
    world.agent.log.clear()
    world.run(100, SECOND // 5)  # two whole rounds
    assert len(world.agent.log) == pytest.approx(40, abs=20)
    world.agent.sessions.pop(1005)  # DPVS dropped it by itself
    world.run(60, SECOND // 5)
    assert 1005 in world.agent.sessions
    world.replica.link_up = False
    world.agent.log.clear()
    world.run(100, SECOND // 5)
    assert world.agent.log == []


def test_live_and_foreign_sessions_are_left_alone(world: World) -> None:
    world.replica.put(3, 1000, 2000)
    world.replica.put(4, 1001, 2001)
    world.agent.foreign.add(1001)
    world.run()
    world.agent.live.add(1000)
    world.replica.drop(3)
    world.replica.drop(4)
    world.run(200, SECOND // 5)
    assert 1000 in world.agent.sessions
    results = world.injector.counters()["results"]
    assert results["live"] == 1
    assert results["foreign"] == 1


def test_what_cannot_be_now_is_tried_again_and_what_never_can_is_not(world: World) -> None:
    world.agent.refuse = Code.NO_SERVICE
    world.replica.put(3, 1000, 2000)
    world.run()
    world.agent.refuse = None
    world.run(60, SECOND // 5)
    assert 1000 in world.agent.sessions
    world.agent.refuse = Code.WRONG_WORKER
    world.replica.put(4, 1001, 2001)
    world.run()
    world.agent.log.clear()
    world.run(60, SECOND // 5)
    assert (RecordOp.UPSERT, 1001) not in world.agent.log


def test_a_busy_agent_and_a_broken_socket_lose_nothing(world: World) -> None:
    world.agent.error = AgentBusy("busy")
    world.replica.put(3, 1000, 2000)
    world.run()
    world.agent.error = DpvsProbeError("no answer")
    world.run()
    assert world.injector.socket_errors > 0
    world.agent.error = None
    world.run(60, SECOND // 100)
    assert 1000 in world.agent.sessions
    assert world.injector.stopped is None


def test_a_refusing_agent_stops_injection_and_says_so(world: World) -> None:
    world.agent.error = AgentRefused("poisoned: a service is not laid out as expected")
    world.replica.put(3, 1000, 2000)
    world.run()
    assert "laid out" in str(world.injector.counters()["stopped"])
    world.agent.error = None
    world.run()
    assert world.agent.log == []


def test_a_later_run_of_the_owner_takes_over_and_what_it_does_not_name_is_deleted() -> None:
    agent, old = FakeAgent(), FakeReplica()
    replicas = [old]
    injector = Injector(agent, lambda: replicas, executor=Now())
    for i in range(4):
        old.put(i, 1000 + i, 2000 + i)
    for now in range(1, 20):
        injector.tick(now)
    new = FakeReplica(SLOTS // 2)  # its DPVS has another pool, and the sessions other slots
    for i in range(2):
        new.put(10 + i, 1000 + i, 2000 + i)
    replicas.append(new)
    for now in range(20, 40):
        injector.tick(now)
    assert agent.sessions.keys() == {1000, 1001, 1002, 1003}
    replicas.remove(old)
    for now in range(40, 60):
        injector.tick(now)
    assert agent.sessions.keys() == {1000, 1001}
    assert injector.installed() == 2


def test_a_replica_that_just_goes_leaves_its_copies_alone() -> None:
    agent, old = FakeAgent(), FakeReplica()
    replicas = [old]
    injector = Injector(agent, lambda: replicas, executor=Now())
    old.put(1, 1000, 2000)
    for now in range(1, 20):
        injector.tick(now)
    replicas.clear()
    for now in range(20, 40):
        injector.tick(now)
    assert agent.sessions.keys() == {1000}


@pytest.mark.parametrize("largest", [MAX_RECORDS, 256])
def test_many_sessions_go_in_requests_of_what_the_agent_takes(largest: int) -> None:
    agent, replica = FakeAgent(), FakeReplica(20_000)
    agent.max_records = largest
    agent.crowded = False
    injector = Injector(agent, lambda: [replica], executor=Now())
    replica.records["af"] = replica.records["af_out"] = 2
    replica.records["proto"], replica.records["fwdmode"], replica.records["state"] = TCP, FNAT, ESTABLISHED
    replica.records["cport"] = replica.records["lport"] = np.arange(20_000)
    replica.present[:] = True
    replica.pending.slots = list(range(20_000))
    for now in range(1, 400):
        injector.tick(now)
        assert len(injector._batches) <= MAX_REQUESTS
    assert injector.installed() == 20_000
    assert agent.largest == largest


actions = st.lists(
    st.tuples(
        st.sampled_from(["put", "drop", "tick", "busy", "lose"]),
        st.integers(0, 5),
        st.integers(1000, 1007),
        st.integers(2000, 2005),
        st.sampled_from([ESTABLISHED, ESTABLISHED, TIME_WAIT, FIN_WAIT]),
        st.integers(0, 4),
    ),
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(actions)
def test_whatever_happens_dpvs_ends_up_with_what_the_replica_wants(
    steps: list[tuple[str, int, int, int, int, int]],
) -> None:
    world = World()
    owner: dict[int, int] = {}  # client port -> slot: an owner has each tuple once, each local port once
    for what, slot, client, local, state, delay in steps:
        world.agent.delay = delay
        if what == "put":
            taken = [s for s in range(SLOTS) if world.replica.present[s] and s != slot]
            rows = world.replica.records[taken]
            if client in rows["cport"] or local in rows["lport"]:
                continue
            world.replica.put(slot, client, local, state)
            owner[client] = slot
        elif what == "drop":
            world.replica.drop(slot)
        elif what == "lose":
            world.agent.sessions.pop(client, None)
        elif what == "busy":
            world.agent.error = AgentBusy("busy")
            world.run(1)
            world.agent.error = None
        else:
            world.run(1)
    world.agent.delay = 0
    world.run(60, SECOND // 2)
    rows = world.replica.records[world.replica.present]
    wanted = {int(r["cport"]): int(r["lport"]) for r in rows if r["state"] in (ESTABLISHED, FIN_WAIT)}
    assert {c: s[0] for c, s in world.agent.sessions.items()} == wanted


class Owning(World):
    """With a table of its own, node id 50; the peer is node 7. Sessions by client port here too."""

    def __init__(self, policy: Policy = Policy.INJECT) -> None:
        super().__init__()
        self.table = SessionTable(SLOTS)
        self.released: list[int] = []
        self.ownership = Ownership(self.table, 50, self._release)
        self.injector = Injector(
            self.agent, lambda: [self.replica], executor=Now(), refresh_ns=10 * SECOND, ownership=self.ownership,
            promotion=Promotion(policy),
        )  # fmt: skip

    def _release(self, slots: Slots, now_ns: int) -> None:
        self.released += slots.tolist()
        self._apply(slots, valid=False)

    def _apply(self, slots: Slots, client: int = 0, lport: int = 0, flags: int = 0, *, valid: bool = True) -> None:
        one = FakeReplica()
        one.put(0, client, lport)
        record = np.repeat(one.records[:1], len(slots))
        record["flags"] |= flags
        self.table.apply(slots, record, np.full(len(slots), valid), self.now)

    def own(self, slot: int, client: int, lport: int, flags: int = 0) -> None:
        """DPVS has a session of its own, or carried on."""
        (self.agent.live if flags else self.agent.foreign).add(client)
        if flags:
            self.agent.sessions[client] = (lport, 0, 0)
        self._apply(np.array([slot]), client, lport, flags)

    def claim(self, slot: int, claim: int, flags: int = 0, state: int = ESTABLISHED) -> None:
        """The peer says that it is its own: that of client 1."""
        self.replica.put(slot, 1, 100, state)
        self.replica.records["claim"][slot] = claim
        self.replica.records["flags"][slot] |= flags


class TestContests:
    def test_a_session_that_a_peer_carries_on_is_made_to_wait(self) -> None:
        w = Owning()
        w.own(3, client=1, lport=100)
        w.claim(0, claim=1, flags=INJECTED)
        w.run()
        assert (w.agent.foreign, w.released) == (set(), [3])
        assert w.agent.log == [(RecordOp.YIELD, 1), (RecordOp.UPSERT, 1)]
        assert w.injector.installed() == 1
        assert w.ownership.counters["yielded"] == 1
        w.replica.drop(0)
        w.run()
        assert w.agent.sessions == {}

    def test_one_that_the_agent_tells_of(self) -> None:
        """Nothing says that the peer carries it on: both nodes' DPVSes made it."""
        w = Owning()
        w.own(3, client=1, lport=100)
        w.claim(0, claim=1)
        w.run()
        assert [op for op, _ in w.agent.log] == [RecordOp.UPSERT, RecordOp.YIELD, RecordOp.UPSERT]
        assert w.agent.foreign == set()

    @pytest.mark.parametrize("flags", [0, INJECTED])
    def test_ours_is_kept(self, flags: int) -> None:
        w = Owning()
        w.table.hear(5)
        w.own(3, client=1, lport=100)
        w.claim(0, claim=4, flags=flags)
        w.run()
        assert w.agent.log == [(RecordOp.UPSERT, 1)]
        assert w.agent.foreign == {1}
        assert w.ownership.counters["kept"] == 1

    def test_what_we_carried_on_goes_back(self) -> None:
        w = Owning()
        w.claim(0, claim=4)
        w.run()
        w.own(3, client=1, lport=100, flags=INJECTED)
        assert w.table.records["claim"][3] == 5
        w.claim(0, claim=4)  # it changed there before it heard of us
        w.run()
        assert w.agent.live == {1}
        w.replica.drop(0)
        w.run()
        assert w.agent.live == {1}
        w.claim(1, claim=6, flags=INJECTED)
        w.run()
        assert (w.agent.live, w.released, w.injector.installed()) == (set(), [3], 1)

    def test_a_session_in_its_last_state_is_given_up_too(self) -> None:
        """It is not put in, but must not stay ESTABLISHED here either."""
        w = Owning()
        w.own(3, client=1, lport=100)
        w.claim(0, claim=1, flags=INJECTED, state=TIME_WAIT)
        w.run()
        assert [op for op, _ in w.agent.log] == [RecordOp.YIELD, RecordOp.DELETE]
        assert (w.agent.sessions, w.agent.foreign) == ({}, set())

    def test_a_table_that_does_not_know_yet(self) -> None:
        w = Owning()
        w.replica.node_id = 99  # ours is stamped as late as it is seen, so the claims are equal
        w.agent.foreign.add(1)
        w.claim(0, claim=1)
        w.run()
        assert w.ownership.counters["unknown"] == 1
        w.own(3, client=1, lport=100)
        w.run(10, step_ns=5 * SECOND)
        assert w.agent.foreign == set()

    def test_it_ended_before_the_agent_came_to_it(self) -> None:
        w = Owning()
        w.own(3, client=1, lport=100)
        w.agent.foreign.clear()
        w.claim(0, claim=1, flags=INJECTED)
        w.run()
        assert w.released == [3]
        assert (list(w.agent.sessions), w.ownership.counters["yielded"]) == ([1], 0)


class TestInheritance:
    """Node 7's DPVS died and a new one is there."""

    def returned(self, instance: int) -> tuple[Owning, FakeReplica]:
        w, later = Owning(), FakeReplica()
        later.instance, later.link_up = instance, False
        replicas = [w.replica]
        w.injector = Injector(w.agent, lambda: replicas, executor=Now(), ownership=w.ownership)
        for slot in range(5):
            w.replica.put(slot, client=slot, lport=100 + slot)
        w.run()
        w.replica.link_up = False
        replicas.append(later)
        w.agent.log.clear()
        w.run()
        assert w.agent.log == [], "not before all that the new one has is here"
        later.link_up = True
        return w, later

    def test_what_waits_is_ours(self) -> None:
        w, _ = self.returned(2)
        w.agent.live.add(3)
        w.run()
        assert sorted(w.agent.log) == [(RecordOp.CLAIM, client) for client in range(5)]
        assert w.agent.live == set(range(5))
        w.run(5, step_ns=20 * SECOND)
        assert len(w.agent.log) == 5

    def test_and_is_claimed_later_where_that_cannot_be_now(self) -> None:
        w, _ = self.returned(2)
        w.agent.stuck = {3}
        w.run()
        assert w.agent.live == {0, 1, 2, 4}
        w.agent.log.clear()
        w.run(5, step_ns=SECOND)
        assert len(w.agent.log) < 4, "not all the time"
        w.agent.stuck.clear()
        w.run(5, step_ns=5 * SECOND)
        assert w.agent.live == set(range(5))

    def test_not_when_only_the_probe_was_started_anew(self) -> None:
        w, _ = self.returned(1)
        w.run()
        assert w.agent.log == []


class TestPromotion:
    def settled(self, w: Owning, seconds: float = 1.0) -> dict[str, Any]:
        w.run(int(seconds * 100), step_ns=10_000_000)
        return w.injector.progress()

    def standby(self) -> Owning:
        w = Owning(Policy.PROMOTE)
        for slot in range(10):
            w.replica.put(slot, client=slot, lport=100 + slot)
        w.run()
        assert (w.agent.log, w.replica.pending.slots) == ([], [])
        return w

    def test_nothing_goes_in_before(self) -> None:
        w = self.standby()
        assert w.injector.progress()["role"] == "standby"
        w.run(3, step_ns=20 * SECOND)
        assert w.agent.log == []
        assert w.table.claim == 0

    def test_all_goes_in_and_out_again(self) -> None:
        w = self.standby()
        w.injector.promote(w.now)
        assert w.injector.progress()["waiting"] == 10
        assert self.settled(w) == {"role": "promoted", "waiting": 0, "installed": 10, "refused": {}, "retrying": 0}
        w.agent.live |= {2, 3}
        w.injector.demote()
        assert w.injector.progress()["waiting"] == 10
        assert self.settled(w) == {"role": "standby", "waiting": 0, "installed": 0, "refused": {}, "retrying": 0}
        assert set(w.agent.sessions) == {2, 3}
        w.injector.promote(w.now)
        self.settled(w)
        assert len(w.agent.sessions) == 10

    def test_addresses_that_come_later(self) -> None:
        w = self.standby()
        w.agent.refuse = Code.NO_LADDR
        w.injector.promote(w.now)
        progress = self.settled(w)
        assert (progress["waiting"], progress["refused"], progress["retrying"]) == (0, {"no_laddr": 10}, 10)
        w.agent.refuse = None
        assert self.settled(w)["installed"] == 10

    def test_refusals_are_not_hurried_for_ever(self) -> None:
        w = self.standby()
        w.agent.refuse = Code.NO_LADDR
        w.injector.promote(w.now)
        self.settled(w)
        w.run(2, step_ns=HURRY_NS)
        asked = len(w.agent.log)
        self.settled(w)
        assert len(w.agent.log) < asked + 30

    def test_sessions_with_traffic_go_when_a_peer_has_them(self) -> None:
        """On the node that was left nothing is taken out: packets that still come would be reset."""
        w = Owning(Policy.PROMOTE)
        w.injector.promote(w.now)
        w.own(3, client=1, lport=100)
        w.injector.demote()
        w.run()
        assert w.agent.foreign == {1}
        w.claim(0, claim=1, flags=INJECTED)
        w.run(3, step_ns=10 * SECOND)
        assert w.agent.log == [(RecordOp.YIELD, 1)]
        assert (w.released, list(w.agent.sessions), w.injector.installed()) == ([3], [1], 0)

    def test_the_policy_inject_has_nothing_to_take_out(self) -> None:
        w = Owning()
        w.replica.put(0, client=1, lport=100)
        w.run()
        w.injector.demote()
        assert self.settled(w)["installed"] == 1
        w.injector.promote(w.now)
        assert w.injector.progress()["role"] == "always"
