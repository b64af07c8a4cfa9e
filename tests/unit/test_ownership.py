# SPDX-License-Identifier: GPL-2.0-or-later
"""replicator/ownership.py: the index, the order of claims, and what becomes of deletions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector import record
from collector.record import INJECTED, Records, Slots, pick, words
from collector.table import SessionTable
from replicator.ownership import MOVED_NS, OURS, THEIRS, UNKNOWN, Ownership, TupleIndex
from tests.unit.session_records import sessions

SLOTS = 1 << 14


class World:
    def __init__(self, node_id: int = 100) -> None:
        self.table = SessionTable(SLOTS)
        self.released: list[int] = []
        self.ownership = Ownership(self.table, node_id, self._release)
        self.now = 0

    def _release(self, slots: Slots, now_ns: int) -> None:
        self.released += slots.tolist()
        self.apply(slots, sessions(len(slots)), valid=False)

    def apply(self, slots: Slots, records: Records, *, valid: bool = True) -> None:
        self.now += 1
        self.table.apply(slots, records, np.full(len(slots), valid), self.now)

    def add(self, n: int, *, first: int = 0, at: int = 0, flags: int = 0) -> Records:
        records = sessions(n, first=first)
        records["flags"] |= flags
        self.apply(np.arange(at, at + n), records)
        return records


def claimed(records: Records, claim: int) -> Records:
    copy = pick(records, np.arange(len(records)))
    copy["claim"] = claim
    return copy


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_the_index_finds_what_is_there_and_nothing_else(seed: int) -> None:
    random = np.random.default_rng(seed)
    world = World()
    index = TupleIndex(world.table)
    universe = sessions(9000)
    at: dict[int, int] = {}  # session -> slot
    for _ in range(6):
        n = int(random.choice([1, 30, 5000]))
        numbers = random.choice(len(universe), n, replace=False)
        slots = random.choice(SLOTS, n, replace=False)
        valid = random.random() < 0.7
        new = np.array([number not in at for number in numbers]) if valid else np.ones(n, np.bool_)
        numbers, slots = numbers[new], slots[new]
        world.now += 1
        world.table.apply(slots, pick(universe, numbers), np.full(len(slots), valid), world.now)
        taken = set(slots.tolist())
        at = {number: slot for number, slot in at.items() if slot not in taken}
        if valid:
            at |= dict(zip(numbers.tolist(), slots.tolist(), strict=True))
        expected = [at.get(number, -1) for number in range(len(universe))]
        assert index.find(universe).tolist() == expected


def test_the_local_side_is_not_looked_at() -> None:
    """DPVS finds a session by its client's side, so two with another local side cannot both be there."""
    world = World()
    records = world.add(3)
    records["lport"] += 1
    records["laddr"][:, 0] = 99
    assert TupleIndex(world.table).find(records).tolist() == [0, 1, 2]
    records["cport"][1] += 7
    records["proto"][2] = record.UDP
    assert TupleIndex(world.table).find(records).tolist() == [0, -1, -1]


@pytest.mark.parametrize(
    ("ours", "node", "theirs", "peer", "verdict"),
    [
        (0, 100, 1, 5, THEIRS),
        (1, 100, 0, 500, OURS),
        (1, 100, 1, 500, THEIRS),
        (1, 500, 1, 100, OURS),
        ((1 << 32) - 2, 500, (1 << 32) - 1, 100, THEIRS),
    ],
)
def test_the_order(ours: int, node: int, theirs: int, peer: int, verdict: int) -> None:
    world = World(node)
    world.table.hear(ours)
    records = world.add(2)
    assert world.ownership.judge(claimed(records, theirs), peer).tolist() == [verdict] * 2
    assert world.ownership.judge(sessions(1, first=77), peer).tolist() == [UNKNOWN]


@given(*[st.integers(0, 3) for _ in range(2)], *[st.sampled_from([3, 4, 1 << 63])] * 2)
def test_both_nodes_come_to_the_same_end(claim_a: int, claim_b: int, a: int, b: int) -> None:
    if a == b:
        return
    worlds = {a: World(a), b: World(b)}
    for node, claim in ((a, claim_a), (b, claim_b)):
        worlds[node].table.hear(claim)
        worlds[node].add(1)
    said = {node: worlds[node].table.sessions() for node in (a, b)}
    verdicts = [int(worlds[node].ownership.judge(said[peer], peer)[0]) for node, peer in ((a, b), (b, a))]
    assert sorted(verdicts) == [OURS, THEIRS]


def test_what_was_heard_is_below_what_is_carried_on() -> None:
    world = World()
    world.ownership.hear(claimed(sessions(3), 41)["claim"])
    world.ownership.hear(sessions(3)["claim"])
    world.ownership.hear(sessions(0)["claim"])
    world.add(2, flags=INJECTED)
    world.add(2, first=10, at=10)
    assert world.table.records["claim"][[0, 1, 10, 11]].tolist() == [42, 42, 41, 41]


def test_released_rows_leave_by_the_answer() -> None:
    world = World()
    records = world.add(4)
    world.ownership.released(pick(records, np.array([1, 3])), 5, yielded=1)
    assert world.released == [1, 3]
    assert world.table.present[:4].tolist() == [True, False, True, False]
    assert world.ownership.counters["yielded"] == 1
    world.ownership.released(pick(records, np.array([1])), 6, yielded=1)
    assert world.released == [1, 3]


class TestDeletions:
    """Node 7 had sessions, node 8 carries two of them on."""

    def moved(self) -> tuple[World, Records]:
        world, records = World(), sessions(4)
        records["flags"][:2] |= INJECTED
        self.has = np.ones(4, np.bool_)
        world.ownership.moved(records, np.arange(4)[::-1], self.has, 8, 10)
        return world, records

    def test_copies_stay_for_the_node_that_has_the_session(self) -> None:
        world, records = self.moved()
        assert world.ownership.stay(words(records), 7, 11).tolist() == [True, True, False, False]

    def test_they_go_when_that_node_says_so(self) -> None:
        world, records = self.moved()
        assert not world.ownership.stay(words(records), 8, 11).any()

    def test_they_go_when_that_node_has_ended_its_own_before(self) -> None:
        world, records = self.moved()
        self.has[3] = False  # that of the first
        assert world.ownership.stay(words(records), 7, 11).tolist() == [False, True, False, False]

    def test_not_for_ever(self) -> None:
        world, records = self.moved()
        assert not world.ownership.stay(words(records), 7, 11 + MOVED_NS).any()
