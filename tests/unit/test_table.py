# SPDX-License-Identifier: GPL-2.0-or-later
"""collector/table.py: rows, generations and marks."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from collector import record, table
from collector.record import Records, Slots
from collector.table import Applied, Dirty, SessionTable
from tests.unit.session_records import sessions


def slots_of(*numbers: int) -> Slots:
    return np.array(numbers, np.int64)


def put(target: SessionTable, records: Records, now_ns: int = 1, **known: np.ndarray) -> Applied:  # type: ignore[type-arg]
    n = len(records)
    return target.apply(records["slot"].astype(np.int64), records, np.ones(n, np.bool_), now_ns, **known)


def end(target: SessionTable, *slots: int, now_ns: int = 1) -> Applied:
    n = len(slots)
    return target.apply(slots_of(*slots), np.zeros(n, record.RECORD), np.zeros(n, np.bool_), now_ns)


def lists(applied: Applied) -> tuple[list[int], list[int], list[int]]:
    return applied.created.tolist(), applied.updated.tolist(), applied.deleted.tolist()


def test_created_updated_deleted() -> None:
    t = SessionTable(10)
    records = sessions(4)
    assert lists(put(t, records)) == ([0, 1, 2, 3], [], [])
    assert lists(put(t, records)) == ([], [], [])
    records["state"][2] = record.FIN_WAIT
    assert lists(put(t, records)) == ([], [2], [])
    records["cport"][1] = 9
    assert lists(put(t, records)) == ([1], [], [])
    assert lists(end(t, 0, 7)) == ([], [], [0])
    assert (t.count, t.created, t.updated, t.deleted) == (3, 5, 1, 1)
    assert t.generation[:4].tolist() == [1, 2, 1, 1]
    assert t.sessions()["slot"].tolist() == [1, 2, 3]


def test_a_row_is_stored_whole_and_clean() -> None:
    t = SessionTable(4)
    records = sessions(2)
    records.view(np.uint8).reshape(2, 144)[:, 137:] = 0xAA
    records["generation"], records["worker"] = 99, 3
    put(t, records)
    wanted = sessions(2)
    assert t.sessions().tobytes() == wanted.tobytes()
    assert t.rows(slots_of(1, 0)).tobytes() == record.pick(wanted, slots_of(1, 0)).tobytes()


def test_what_moves_with_every_packet_is_not_stored() -> None:
    t = SessionTable(4)
    put(t, sessions(1))
    moved = sessions(1)
    moved["rs_end_seq"] = 5
    assert lists(put(t, moved)) == ([], [], [])
    assert t.records["rs_end_seq"][0] == 0
    moved["state"] = record.FIN_WAIT
    put(t, moved)
    assert t.records["rs_end_seq"][0] == 5


def test_renewed_rows_get_a_new_generation_with_the_same_tuple() -> None:
    t = SessionTable(4)
    put(t, sessions(2))
    assert lists(put(t, sessions(2), now_ns=7, renewed=np.array([False, True]))) == ([1], [], [])
    assert t.generation[:2].tolist() == [1, 2]
    assert t.born_ns[:2].tolist() == [1, 7]
    assert t.count == 2


def test_workers_are_learned_late_kept_and_forgotten_with_the_session() -> None:
    t = SessionTable(4)
    put(t, sessions(1))
    known = np.array([2], np.uint8)
    assert lists(put(t, sessions(1), worker=known)) == ([], [0], [])
    assert lists(put(t, sessions(1), worker=known)) == ([], [], [])
    changed = sessions(1, state=record.FIN_WAIT)
    put(t, changed, worker=np.array([record.UNKNOWN_WORKER], np.uint8))
    assert t.worker[0] == 2
    put(t, sessions(1))
    assert t.worker[0] == 2
    put(t, sessions(1), renewed=np.array([True]))
    assert t.worker[0] == record.UNKNOWN_WORKER


def test_generation_0_is_never_used() -> None:
    t = SessionTable(2)
    put(t, sessions(1))
    t.generation[0] = 0xFFFFFFFF
    put(t, sessions(1), renewed=np.array([True]))
    assert t.generation[0] == 1


def test_sessions_of_one_packet_are_not_shared() -> None:
    t = SessionTable(4)
    dirty = t.add_peer("b")
    records = sessions(2)
    records["flags"][1] |= record.ONE_PACKET
    put(t, records)
    assert dirty.take(9).tolist() == [0]
    assert t.shared.tolist() == [True, False, False, False]
    end(t, 0, 1)
    assert dirty.take(9).tolist() == [0]


def test_every_peer_has_its_own_marks() -> None:
    t = SessionTable(4)
    a = t.add_peer("a")
    put(t, sessions(1))
    b = t.add_peer("b")
    assert t.add_peer("a") is a
    put(t, sessions(1, first=1))
    assert (a.take(9).tolist(), b.take(9).tolist()) == ([0, 1], [1])
    t.remove_peer("b")
    end(t, 0)
    assert (a.pending, b.pending) == (1, 0)


def test_large_blocks_are_applied_in_pieces() -> None:
    n = 3 * table.BLOCK + 5
    t = SessionTable(n)
    dirty = t.add_peer("b")
    records = sessions(n)
    order = np.random.default_rng(1).permutation(n)
    since = np.arange(1, n + 1)
    assert len(put(t, record.pick(records, order), since_ns=since).created) == n
    taken = dirty.claim(n)
    assert taken.slots.tolist() == order.tolist()
    assert taken.since_ns.tolist() == since.tolist()
    assert t.sessions().tobytes() == records.tobytes()
    assert t.count == n


def test_frozen() -> None:
    t = SessionTable(4)
    put(t, sessions(2))
    t.freeze()
    assert lists(end(t, 0)) == ([], [], [])
    assert t.count == 2


def test_digest_is_of_what_peers_are_told() -> None:
    t = SessionTable(4)
    records = sessions(3)
    put(t, records)
    before = t.digest()
    single = sessions(1, first=3)
    single["flags"] |= record.ONE_PACKET
    put(t, single)
    assert t.digest() == before == record.digest(t.sessions()[:3])


def test_marks_are_taken_in_order_and_once() -> None:
    d = Dirty(10)
    d.mark(slots_of(5, 2, 9), 10)
    d.mark(slots_of(2, 3), 20)
    assert d.oldest_ns == 10
    assert d.pending == 4
    assert d.take(2).tolist() == [5, 2]
    d.mark(slots_of(5), 30)
    taken = d.claim(9)
    assert taken.slots.tolist() == [9, 3, 5]
    assert taken.since_ns.tolist() == [10, 20, 30]
    assert d.pending == 0
    assert d.oldest_ns is None


def test_a_mark_remembers_the_oldest_change_and_a_new_generation() -> None:
    d = Dirty(10)
    d.mark(slots_of(1), 10, fresh=True)
    d.mark(slots_of(1), 20, fresh=False)
    taken = d.claim(9)
    assert (taken.since_ns.tolist(), taken.fresh.tolist()) == ([10], [True])
    d.mark(slots_of(1), 20, fresh=False)
    assert not d.claim(9).fresh.any()


def test_what_is_owed_comes_beside_changes_and_once() -> None:
    d = Dirty(100)
    present = np.zeros(100, np.bool_)
    present[10:50] = True
    d.mark(np.arange(0, 20), 5)
    d.owe(present)
    assert (d.pending, d.owed, d.changes) == (50, 40, 20)
    taken = d.claim(8)
    assert taken.slots.tolist() == [0, 1, 2, 3, 4, 5, 20, 21]
    assert (taken.since_ns > 0).tolist() == [True] * 6 + [False] * 2
    assert d.claim(1000).slots.tolist() == [*range(6, 20), *range(22, 50)]
    assert (d.pending, d.owed, d.changes) == (0, 0, 0)


def test_what_did_not_arrive_is_given_back() -> None:
    d = Dirty(10)
    present = np.zeros(10, np.bool_)
    present[:4] = True
    d.owe(present)
    d.mark(slots_of(3, 8), 5)
    taken = d.claim(10)
    d.mark(slots_of(8), 9)
    d.give_back(taken, owed=True)
    assert (d.pending, d.owed, d.changes) == (5, 5, 2)
    again = d.claim(10)
    assert sorted(again.slots.tolist()) == [0, 1, 2, 3, 8]
    assert sorted(again.since_ns.tolist()) == [0, 0, 0, 5, 5]
    d.give_back(taken, owed=False)
    assert (d.pending, d.owed, d.changes) == (5, 3, 2)


def test_single_changes_for_a_reader_who_is_away_do_not_pile_up() -> None:
    d = Dirty(20_000)
    order = np.random.default_rng(1).permutation(20_000)
    for number in range(len(order)):
        d.mark(order[number : number + 1], number + 1)
        assert d.pending == number + 1
    assert len(d._queue) < 64
    taken = d.claim(20_000)
    assert taken.slots.tolist() == order.tolist()
    assert taken.since_ns.tolist() == list(range(1, 20_001))


@pytest.mark.parametrize("limit", [1, 3, 4, 100])
def test_a_full_sync_gets_its_share(limit: int) -> None:
    d = Dirty(1000)
    d.owe(np.ones(1000, np.bool_))
    for _ in range(5000):
        d.mark(np.arange(0, 10), 1)
        d.claim(limit)
        if d.owed <= 10:
            break
    assert limit < 4 or d.owed <= 10


class Marks(RuleBasedStateMachine):
    """Dirty against two plain sets."""

    N = 40

    @initialize(window=st.sampled_from([3, 7, 64]))
    def start(self, window: int) -> None:
        self.patch = mock.patch.object(table, "_WINDOW", window)
        self.patch.start()
        self.d = Dirty(self.N)
        self.changes: dict[int, int] = {}
        self.owed: set[int] = set()
        self.taken = self.d.claim(0)
        self.now = 0

    @rule(slots=st.lists(st.integers(0, N - 1), unique=True))
    def mark(self, slots: list[int]) -> None:
        self.now += 1
        self.d.mark(slots_of(*slots), self.now)
        for slot in slots:
            self.changes.setdefault(slot, self.now)

    @rule(slots=st.sets(st.integers(0, N - 1)))
    def owe(self, slots: set[int]) -> None:
        present = np.zeros(self.N, np.bool_)
        present[list(slots)] = True
        self.d.owe(present)
        self.owed = set(slots)

    @rule(limit=st.integers(0, 50))
    def claim(self, limit: int) -> None:
        taken = self.d.claim(limit)
        slots = taken.slots.tolist()
        assert len(slots) == len(set(slots)) == min(limit, len(self.changes.keys() | self.owed))
        for slot, since in zip(slots, taken.since_ns.tolist(), strict=True):
            assert since == self.changes.pop(slot, 0)
            self.owed.discard(slot)
        self.taken = taken

    @rule(owed=st.booleans())
    def give_back(self, owed: bool) -> None:
        self.d.give_back(self.taken, owed=owed)
        for slot, since in zip(self.taken.slots.tolist(), self.taken.since_ns.tolist(), strict=True):
            if since:
                self.changes[slot] = min(self.changes.get(slot, since), since)
            if owed or not since:
                self.owed.add(slot)
        self.taken = self.d.claim(0)

    @rule()
    def clear(self) -> None:
        self.d.clear()
        self.changes.clear()
        self.owed.clear()

    def teardown(self) -> None:
        self.patch.stop()

    @invariant()
    def counts(self) -> None:
        assert self.d.changes == len(self.changes)
        assert self.d.owed == len(self.owed)
        assert self.d.pending == len(self.changes.keys() | self.owed)


Marks.TestCase.settings = settings(max_examples=100, deadline=None)
TestMarks = Marks.TestCase


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 2), st.booleans()), unique_by=lambda x: x[0]
        )
    )
)
def test_rows_follow_a_plain_model(history: list[list[tuple[int, int, int, bool]]]) -> None:
    t, model, generations = SessionTable(6), {}, [0] * 6
    for block in history:
        records = sessions(6)[[slot for slot, *_ in block]]
        valid = np.array([there for *_, there in block], np.bool_)
        for row, (slot, client, state, there) in zip(records, block, strict=True):
            row["cport"], row["state"] = client, state
            if there and model.get(slot, (None,))[0] != client:
                generations[slot] += 1
            if there:
                model[slot] = (client, state)
            else:
                model.pop(slot, None)
        t.apply(records["slot"].astype(np.int64), records, valid, 1)
        assert {int(r["slot"]): (int(r["cport"]), int(r["state"])) for r in t.sessions()} == model
        assert t.generation.tolist() == generations
        assert t.count == len(model)
