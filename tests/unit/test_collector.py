# SPDX-License-Identifier: GPL-2.0-or-later
"""collector/collector.py on a simulated pool and ring: each rule of the module, then random histories."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from collector import record
from collector.collector import THOROUGH_BLOCK, Collector, Settings
from collector.record import Bools, Slots
from collector.table import SessionTable
from tests.unit.simulated_dpvs import BASE, MODES, STRIDE, WORKERS, SimulatedDpvs

SECOND = 1_000_000_000


class Node:
    def __init__(self, slots: int = 16, **wanted: int) -> None:
        self.dpvs = SimulatedDpvs(slots)
        self.table = SessionTable(slots)
        self.dirty = self.table.add_peer("peer")
        rates = Settings(**wanted)
        self.collector = Collector(
            self.dpvs, self.dpvs, self.table, modes=MODES, workers=WORKERS, lost=self.dpvs.lost, settings=rates,
            clock=lambda: self.dpvs.now_ns,
        )  # fmt: skip

    def tick(self) -> None:
        self.collector.tick(self.dpvs.clock())

    def started(self) -> "Node":
        self.collector.scan_all(self.dpvs.clock())
        return self

    def generation(self, slot: int) -> int:
        return int(self.table.generation[slot]) if self.table.present[slot] else 0

    def taken(self) -> list[int]:
        return self.dirty.take(1000).tolist()


@pytest.fixture
def node() -> Node:
    return Node().started()


def test_a_creation_is_in_the_table_after_one_tick(node: Node) -> None:
    node.dpvs.create(3, 7, tid=5002)
    node.tick()
    row = node.table.records[3]
    assert node.generation(3) == 1
    assert row["worker"] == 2
    assert row["fwdmode"] == record.FNAT
    assert row["caddr"].tolist() == [10, 0, 0, 7] + [0] * 12
    assert node.taken() == [3]


def test_a_creation_between_the_start_of_a_scan_and_its_look_is_one_creation(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node()
    live = node.dpvs.live

    def late(slots: Slots) -> Bools:
        node.dpvs.create(3, 7)  # after the time that the scan was given, and before it reads
        monkeypatch.undo()
        return live(slots)

    monkeypatch.setattr(node.dpvs, "live", late)
    node.collector.scan_all(node.dpvs.clock())
    assert node.generation(3) == 1
    node.tick()  # the event says what was read already
    assert (node.generation(3), node.collector.counters["created"]) == (1, 1)
    node.dpvs.free(3)
    node.dpvs.create(3, 7)
    node.tick()  # these came later: another session, though all else is the same
    assert (node.generation(3), node.collector.counters["renewed_by_event"]) == (2, 1)


def test_created_point_comes_before_the_hash(node: Node) -> None:
    node.dpvs.create(3, 7, hashed=False, tid=5002)
    created_ns = node.dpvs.now_ns
    node.tick()
    assert node.table.count == 0
    node.dpvs.hash(3)
    node.tick()
    assert node.generation(3) == 1
    assert node.table.worker[3] == 2
    assert node.dirty.claim(9).since_ns.tolist() == [created_ns]


def test_a_creation_that_failed_is_forgotten(node: Node) -> None:
    node.dpvs.create(3, 7, hashed=False)
    node.tick()
    assert node.collector.watching == 1
    node.dpvs.free(3)
    node.tick()
    assert (node.collector.watching, node.table.count) == (0, 0)


def test_a_session_never_hashed_is_not_watched_for_ever(node: Node) -> None:
    node.dpvs.create(3, 7, hashed=False)
    node.tick()
    node.dpvs.clock(3 * SECOND)
    node.tick()
    assert node.collector.watching == 0
    assert node.collector.counters["never_hashed"] == 1


def test_one_packet_sessions_do_not_get_in(node: Node) -> None:
    node.dpvs.create(3, 7, flags=record.ONE_PACKET, hashed=False)
    node.tick()
    assert (node.collector.watching, node.table.count) == (0, 0)
    assert node.collector.counters["one_packet"] == 1


def test_a_session_in_a_template_s_place_is_another_one(node: Node) -> None:
    node.dpvs.create(3, 7, flags=record.TEMPLATE)
    node.tick()
    assert node.table.count == 1
    assert node.table.shared[3]
    assert node.taken() == [3]
    node.dpvs.free(3)
    node.dpvs.create(3, 7)
    node.tick()
    assert node.taken() == [3]
    assert node.table.generation[3] == 2
    node.dpvs.free(3)
    node.tick()
    assert (node.table.count, node.taken()) == (0, [3])


def test_came_and_went_between_two_ticks(node: Node) -> None:
    node.dpvs.create(3, 7)
    node.dpvs.free(3)
    node.tick()
    assert (node.table.count, node.table.created, node.collector.watching) == (0, 0, 0)
    assert node.taken() == []


def test_an_end_is_seen_at_once(node: Node) -> None:
    node.dpvs.create(3, 7)
    node.tick()
    node.dpvs.free(3)
    node.tick()
    assert node.table.count == 0


@pytest.mark.parametrize("client", [7, 8], ids=["same tuple", "other tuple"])
def test_a_slot_used_again_between_two_ticks_is_a_new_generation(node: Node, client: int) -> None:
    node.dpvs.create(3, 7)
    node.tick()
    node.dpvs.free(3)
    node.dpvs.create(3, client)
    node.tick()
    assert node.generation(3) == 2
    assert node.table.count == 1


def test_used_again_while_the_new_one_is_not_hashed_yet(node: Node) -> None:
    node.dpvs.create(3, 7)
    node.tick()
    node.dpvs.free(3)
    node.dpvs.create(3, 7, hashed=False)
    node.tick()
    assert node.table.count == 0
    node.dpvs.hash(3)
    node.tick()
    assert node.generation(3) == 2


def test_a_free_event_without_the_creation_behind_it(node: Node) -> None:
    """The drain took the end; the session that is there now was made after it."""
    node.dpvs.create(3, 7)
    node.tick()
    node.dpvs.free(3)
    node.dpvs.losing = True
    node.dpvs.create(3, 7)
    node.tick()
    assert node.generation(3) == 2


def test_another_tuple_without_an_event_is_a_new_generation(node: Node) -> None:
    node.dpvs.create(3, 7)
    node.tick()
    node.dpvs.losing = True
    node.dpvs.free(3)
    node.dpvs.create(3, 8)
    node.tick()
    assert node.collector.counters["events_lost"] == 2
    node.collector.scan(node.dpvs.clock())
    assert node.generation(3) == 2
    assert node.collector.counters["full_scans"] == 1


def test_an_event_older_than_the_row_is_no_new_generation(node: Node) -> None:
    """The scan saw the session before the ring was drained."""
    node.dpvs.create(3, 7, tid=5002)
    node.collector.scan_all(node.dpvs.clock())
    assert node.table.worker[3] == record.UNKNOWN_WORKER
    node.tick()
    assert node.generation(3) == 1
    assert node.table.worker[3] == 2


def test_time_wait_used_again_by_the_same_client_port_is_an_update(node: Node) -> None:
    node.dpvs.create(3, 7)
    node.dpvs.establish(3)
    node.tick()
    node.dpvs.conns["state"][3] = record.TIME_WAIT
    node.collector.scan_all(node.dpvs.clock())
    node.dpvs.conns["state"][3] = record.SYN_RECV
    node.dpvs.conns["fnat_seq_isn"][3] = 1234
    node.collector.scan_all(node.dpvs.clock())
    assert node.generation(3) == 1
    assert node.collector.watching == 1  # its handshake is followed like any other
    node.dpvs.establish(3, 99)
    node.tick()
    assert node.table.records[3]["fnat_delta"] == 99
    assert node.collector.watching == 0


def test_the_handshake_of_a_young_session_is_followed_each_tick(node: Node) -> None:
    node.dpvs.create(3, 7)
    for state in (record.NONE, record.SYN_RECV):
        node.dpvs.conns["state"][3] = state
        node.tick()
        assert node.table.records[3]["state"] == state
    node.dpvs.establish(3, 4242)
    node.tick()
    assert node.table.records[3]["state"] == record.ESTABLISHED
    assert node.table.records[3]["fnat_delta"] == 4242
    assert node.collector.watching == 0


def test_a_handshake_that_does_not_end_is_left_to_the_scan(node: Node) -> None:
    node.dpvs.create(3, 7)
    node.tick()
    node.dpvs.clock(3 * SECOND)
    node.tick()
    assert node.collector.watching == 0
    node.dpvs.establish(3)
    node.collector.scan_all(node.dpvs.clock())
    assert node.table.records[3]["state"] == record.ESTABLISHED


def test_the_looks_at_young_sessions_are_bounded_and_take_turns() -> None:
    node = Node(young_each_tick=4).started()
    for slot in range(10):
        node.dpvs.create(slot, slot)
    node.tick()
    before = node.collector.counters["reads"]
    for slot in range(10):
        node.dpvs.establish(slot)
    node.tick()
    assert node.collector.counters["reads"] == before + 4
    for _ in range(2):
        node.tick()
    assert (node.table.records["state"][:10] == record.ESTABLISHED).all()


def test_packets_alone_change_nothing(node: Node) -> None:
    node.dpvs.create(3, 7)
    node.dpvs.establish(3)
    node.tick()
    node.taken()
    node.dpvs.packet(3)
    node.collector.scan_all(node.dpvs.clock())
    assert node.taken() == []


def test_a_torn_read_is_tried_again_and_keeps_what_is_known(node: Node) -> None:
    node.dpvs.create(3, 7)
    node.tick()
    node.taken()
    node.dpvs.free(3)
    node.dpvs.create(3, 7, tid=5002)
    freed_ns = node.dpvs.now_ns - 1000
    node.dpvs.torn.add(3)
    node.tick()
    assert node.generation(3) == 1
    assert node.collector.counters["reads_torn"] == 1
    node.tick()
    assert node.generation(3) == 2
    assert node.table.worker[3] == 2
    assert node.dirty.claim(9).since_ns.tolist() == [freed_ns]


def test_a_session_out_of_its_hash_for_a_moment_has_not_ended(node: Node) -> None:
    node.dpvs.create(3, 7)
    node.dpvs.establish(3)
    node.tick()
    node.dpvs.unhash(3)
    node.collector.scan_all(node.dpvs.clock())
    assert node.table.count == 1
    node.dpvs.hash(3)
    node.tick()
    assert node.generation(3) == 1
    assert node.collector.watching == 0


def test_an_end_without_an_event_takes_two_looks(node: Node) -> None:
    node.dpvs.create(3, 7)
    node.tick()
    node.dpvs.unhash(3)
    node.collector.scan_all(node.dpvs.clock())
    node.tick()
    assert node.table.count == 0


def test_our_own_copies_stay_out(node: Node) -> None:
    node.dpvs.create(3, 7, flags=record.INJECTED)
    node.collector.scan_all(node.dpvs.clock())
    assert (node.table.count, node.collector.copies) == (0, 1)
    node.dpvs.unhash(3)
    node.collector.scan_all(node.dpvs.clock())
    assert node.collector.copies == 0


def test_a_copy_in_a_slot_of_ours_ends_the_session_before_it(node: Node) -> None:
    node.dpvs.create(3, 7)
    node.tick()
    node.dpvs.losing = True
    node.dpvs.free(3)
    node.dpvs.create(3, 7, flags=record.INJECTED)
    node.collector.scan_all(node.dpvs.clock())
    assert (node.table.count, node.collector.copies) == (0, 1)


def test_what_was_there_before_us_is_found_by_the_first_scan() -> None:
    node = Node(slots=10, slice_slots=4)
    for slot in range(9):
        node.dpvs.create(slot, slot)
    node.dpvs.drain(100)
    for end in (4, 8):
        node.collector.scan(node.dpvs.clock())
        assert node.table.count == end
        assert not node.table.complete
    node.collector.scan(node.dpvs.clock())
    assert node.table.count == 9
    assert node.table.complete


def test_a_walk_reads_what_differs_and_an_eighth_of_the_rest() -> None:
    slots = 8 * THOROUGH_BLOCK
    node = Node(slots=slots, pass_small_ns=100, slice_slots=slots).started()
    node.dpvs.conns["flags"] = record.HASHED
    node.dpvs.conns["af"] = node.dpvs.conns["af_out"] = record.AF_INET
    node.dpvs.conns["flags"][-10:] |= record.INJECTED
    node.collector.scan(node.dpvs.clock(100))
    reads = []
    for step in range(10):
        if step == 3:
            node.dpvs.conns["state"][:4] = record.FIN_WAIT
        before = node.collector.counters["reads"]
        node.collector.scan(node.dpvs.clock(100))
        reads.append(node.collector.counters["reads"] - before)
    assert reads[0] == slots
    assert sorted(reads[1:]) == [THOROUGH_BLOCK] * 8 + [THOROUGH_BLOCK + 4]
    assert (node.table.records["state"][:4] == record.FIN_WAIT).all()
    assert (node.table.count, node.collector.copies) == (slots - 10, 10)


def test_a_change_that_the_compared_words_do_not_show_is_found_in_eight_walks() -> None:
    node = Node(pass_small_ns=100).started()
    for slot in range(10):
        node.dpvs.create(slot, slot)
        node.dpvs.establish(slot)
    node.tick()
    node.collector.scan(node.dpvs.clock(100))
    node.dpvs.conns["timeout_s"][4] = 7
    for _ in range(8):
        node.collector.scan(node.dpvs.clock(100))
    assert node.table.records[4]["timeout_ms"] == 7000


def test_a_pool_with_few_sessions_is_read_without_comparing() -> None:
    node = Node(slots=64, pass_small_ns=100).started()
    node.dpvs.create(7, 1)
    node.dpvs.establish(7)
    for _ in range(3):
        node.collector.scan(node.dpvs.clock(100))
    assert node.generation(7) == 1
    assert node.collector.counters["reads"] == 3
    node.dpvs.free(7)
    node.collector.scan(node.dpvs.clock(100))
    node.tick()
    assert node.table.count == 0


def test_the_scan_keeps_its_pace() -> None:
    node = Node(slots=1000, pass_small_ns=100, slice_least=50).started()
    base = node.dpvs.clock()
    node.collector.scan(base)  # the pass begins
    reads = []
    node.dpvs.conns["flags"] = record.HASHED
    for step in range(0, 101, 10):
        before = node.collector.counters["reads"]
        node.collector.scan(base + step)
        reads.append(node.collector.counters["reads"] - before)
    assert sum(reads) == 1000
    assert max(reads) <= 200


def test_lost_events_bring_a_scan_that_does_not_wait() -> None:
    node = Node(slots=64, slice_slots=16).started()
    node.collector.scan(node.dpvs.clock(10))
    node.dpvs.losing = True
    node.dpvs.create(60, 1)
    node.tick()
    for _ in range(4):
        node.collector.scan(node.dpvs.clock(10))
    assert node.generation(60) == 1


def test_an_event_from_nowhere_is_counted(node: Node) -> None:
    node.dpvs.stray_event(BASE + 99 * STRIDE)
    node.tick()
    assert node.collector.counters["events_unknown_slot"] == 1


def test_without_probes_the_scan_does_it_alone() -> None:
    dpvs, table = SimulatedDpvs(8), SessionTable(8)
    alone = Collector(dpvs, None, table, modes=MODES)
    dpvs.create(2, 2)
    alone.tick(dpvs.clock())
    alone.scan_all(dpvs.clock())
    assert table.count == 1


def test_a_frozen_table_keeps_the_sessions_of_a_dead_process(node: Node) -> None:
    node.dpvs.create(3, 7)
    node.tick()
    node.table.freeze()
    node.dpvs.free(3)
    node.tick()
    node.collector.scan_all(node.dpvs.clock())
    assert node.table.count == 1


def test_a_copy_that_is_heard_stays_out(node: Node) -> None:
    node.dpvs.create(3, 7, flags=record.INJECTED, hashed=False)
    node.tick()
    node.dpvs.hash(3)  # NONE for a moment
    node.tick()
    node.dpvs.wait(3)
    node.tick()
    assert (node.table.count, node.collector.copies, node.collector.counters["events_created"]) == (0, 1, 1)
    node.dpvs.free(3)
    node.tick()
    assert (node.table.count, node.collector.copies) == (0, 0)
    assert node.taken() == []


class TestCarriedOn:
    """Copies that wait, and what becomes of them when packets come."""

    def test_a_copy_with_packets_is_ours_within_one_scan(self, node: Node) -> None:
        node.table.hear(41)
        node.dpvs.inject(3, 7)
        node.collector.scan_all(node.dpvs.clock())
        assert (node.table.count, node.collector.copies, node.taken()) == (0, 1, [])
        node.dpvs.wake(3)
        node.collector.scan_all(node.dpvs.clock())
        assert (node.table.count, node.collector.copies, node.taken()) == (1, 0, [3])
        assert (node.table.records["claim"][3], node.collector.counters["adopted"]) == (42, 1)

    def test_without_a_look_at_everything(self) -> None:
        """A walk that compares words only, in a pool that is large and full."""
        slots = 1 << 12
        node = Node(slots=slots, thorough_each=1 << 20)
        for slot in range(slots):
            node.dpvs.inject(slot, slot)
        node.started()
        node.collector.scan(node.dpvs.clock(0))
        for udp in (5, 9):
            node.dpvs.conns["proto"][udp], node.dpvs.conns["state"][udp] = record.UDP, record.UDP_NONE
        for _ in range(2):  # the second finds nothing that differs
            node.collector.scan(node.dpvs.clock(SECOND))
        reads = node.collector.counters["reads"]
        node.dpvs.wake(THOROUGH_BLOCK + 1)
        node.dpvs.conns["state"][9] = record.UDP_ONEWAY
        node.collector.scan(node.dpvs.clock(SECOND))
        assert np.flatnonzero(node.table.present).tolist() == [9, THOROUGH_BLOCK + 1]
        assert node.collector.counters["reads"] - reads < slots // 2

    def test_its_end_is_found(self, node: Node) -> None:
        node.dpvs.inject(3, 7)
        node.dpvs.wake(3)
        node.collector.scan_all(node.dpvs.clock())
        assert node.table.count == 1
        node.dpvs.free(3)  # which the probe does not tell
        node.collector.scan_all(node.dpvs.clock())
        node.tick()
        assert node.table.count == 0

    def test_one_that_is_made_to_wait_leaves(self, node: Node) -> None:
        node.dpvs.create(3, 7)
        node.dpvs.establish(3)
        node.tick()
        node.dpvs.wait(3)
        node.collector.scan_all(node.dpvs.clock())
        assert (node.table.count, node.collector.copies) == (0, 1)

    def test_one_that_woke_before_anybody_looked_has_a_new_claim(self, node: Node) -> None:
        node.dpvs.create(3, 7)
        node.dpvs.establish(3)
        node.tick()
        node.table.hear(5)
        assert (node.generation(3), node.table.records["claim"][3]) == (1, 0)
        node.dpvs.wait(3)
        node.dpvs.wake(3)
        node.collector.release(np.array([3]), node.dpvs.clock())
        assert node.table.count == 0
        node.tick()
        assert (node.generation(3), node.table.records["claim"][3]) == (2, 6)
        assert node.collector.counters["released"] == 1

    def test_the_agent_is_still_making_it(self, node: Node) -> None:
        node.dpvs.create(3, 7, flags=record.INJECTED)  # hashed, and NONE for a moment
        node.collector.scan_all(node.dpvs.clock())
        assert node.table.count == 0


def test_a_claim_stays_as_long_as_the_session(node: Node) -> None:
    node.table.hear(3)
    node.dpvs.create(3, 7)
    node.tick()
    node.table.hear(9)
    node.table.hear(8)
    node.dpvs.establish(3)
    node.tick()
    assert node.table.records["claim"][3] == 3
    node.dpvs.free(3)
    node.dpvs.create(3, 7)
    node.tick()
    assert node.table.records["claim"][3] == 9


SLOTS = st.integers(0, 7)


class Histories(RuleBasedStateMachine):
    """Whatever happens, at every quiet moment the table is DPVS's list, and no two sessions shared a generation."""

    def __init__(self) -> None:
        super().__init__()
        self.node = Node(slots=8, slice_slots=3, young_each_tick=3, drain_events=5)
        self.dpvs = self.node.dpvs
        self.seen: dict[tuple[int, int], tuple[bytes, int]] = {}
        self.births = [0] * 8

    def _hashed(self, slot: int) -> bool:
        return bool(self.dpvs.conns["flags"][slot] & record.HASHED)

    @rule(slot=SLOTS, client=st.integers(0, 3), flags=st.sampled_from([0, 0, 0, record.INJECTED]), hashed=st.booleans())
    def create(self, slot: int, client: int, flags: int, hashed: bool) -> None:
        if not self._hashed(slot):
            self.dpvs.create(slot, client, flags=flags, hashed=hashed)
            self.births[slot] += 1

    @rule(slot=SLOTS)
    def free(self, slot: int) -> None:
        if self._hashed(slot):
            self.dpvs.free(slot)

    @rule(slot=SLOTS)
    def flicker(self, slot: int) -> None:
        if self._hashed(slot):
            self.dpvs.unhash(slot)
            self.node.collector.scan(self.dpvs.clock())
            self.dpvs.hash(slot)

    @rule(slot=SLOTS, state=st.integers(0, 10), delta=st.integers(0, 2))
    def packets(self, slot: int, state: int, delta: int) -> None:
        self.dpvs.conns["state"][slot] = state
        self.dpvs.conns["fnat_seq_delta"][slot] = delta

    @rule(slot=SLOTS)
    def give_away(self, slot: int) -> None:
        if self._hashed(slot):
            self.dpvs.wait(slot)
            self.node.collector.release(np.array([slot]), self.dpvs.clock())

    @rule(slot=SLOTS)
    def wake(self, slot: int) -> None:
        self.dpvs.wake(slot)

    @rule(slot=SLOTS)
    def tear(self, slot: int) -> None:
        self.dpvs.torn.add(slot)

    @rule(losing=st.booleans())
    def lose(self, losing: bool) -> None:
        self.dpvs.losing = losing

    @rule()
    def tick(self) -> None:
        self.node.tick()

    @rule(steps=st.integers(1, 5))
    def scan(self, steps: int) -> None:
        for _ in range(steps):
            self.node.collector.scan(self.dpvs.clock(30_000_000))

    @rule()
    def quiet(self) -> None:
        for _ in range(20):
            self.node.tick()
        self.node.collector.scan_all(self.dpvs.clock())
        self.dpvs.torn.clear()
        for _ in range(6):
            self.node.tick()
        self.node.collector.scan_all(self.dpvs.clock())
        self.node.tick()
        held, wanted = self.node.table.sessions(), self.dpvs.expected()
        assert held["slot"].tolist() == wanted["slot"].tolist()
        assert not record.changed(held, wanted).any()
        assert self.node.table.count == len(held)

    @invariant()
    def a_generation_names_one_tuple(self) -> None:
        table = self.node.table
        for slot in np.flatnonzero(table.present).tolist():
            key = (slot, int(table.generation[slot]))
            tuple_bytes = record.identity(table.records[slot : slot + 1]).tobytes()
            assert self.seen.setdefault(key, (tuple_bytes, 0))[0] == tuple_bytes


Histories.TestCase.settings = settings(max_examples=110, stateful_step_count=50, deadline=None)
TestHistories = Histories.TestCase
