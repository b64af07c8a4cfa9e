# SPDX-License-Identifier: GPL-2.0-or-later
"""The scan alone: in a full pool, where walks compare words only, and beside a process that writes all the time."""

import multiprocessing
import time
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest

from collector import record
from collector.collector import THOROUGH_BLOCK, Collector, Settings
from collector.record import FNAT, Bools, Slots
from collector.table import SessionTable
from probes.memory import SessionPool
from tests.unit.own_pool import LAYOUT, XMIT_FNAT, OwnPool, OwnZones, own_target
from tests.unit.simulated_dpvs import MODES, SimulatedDpvs

SLOTS = 1 << 11
SECOND = 1_000_000_000
NEVER = 1 << 30


class Full:
    """A pool of which most slots are used, and a collector that has walked through it: nothing is read whole again."""

    def __init__(self, dpvs: "Racing | None" = None, used: range = range(0, SLOTS, 2)) -> None:
        self.dpvs = dpvs or Racing(SLOTS)
        for slot in used:
            self.dpvs.create(slot, slot)
            self.dpvs.establish(slot)
        self.table = SessionTable(SLOTS)
        self.collector = Collector(self.dpvs, None, self.table, modes=MODES, settings=Settings(thorough_each=NEVER))
        self.collector.scan_all(self.dpvs.clock())
        self.walk()
        self.walk()

    def walk(self) -> int:
        """One walk at the usual pace, and the tick after it; how many sessions were read."""
        reads = self.collector.counters["reads"]
        passes = self.collector.counters["scan_passes"]
        while self.collector.counters["scan_passes"] == passes:
            self.collector.scan(self.dpvs.clock(SECOND))
        self.collector.tick(self.dpvs.clock(SECOND))
        return self.collector.counters["reads"] - reads

    def equal(self) -> bool:
        return bool((self.table.present == self.dpvs.live(np.arange(SLOTS))).all())


def test_nothing_changed_nothing_read() -> None:
    full = Full()
    assert full.equal()
    assert full.walk() <= SLOTS // THOROUGH_BLOCK  # a slice boundary may be looked at
    assert full.collector.alone


def test_creations_ends_changes_and_ports_that_are_used_again() -> None:
    full = Full()
    made, ended, changed, reused, other = (range(first, SLOTS, 64) for first in (1, 2, 4, 6, 8))
    generations = full.table.generation.copy()
    for slot in made:
        full.dpvs.create(slot, SLOTS + slot)
    for slot in ended:
        full.dpvs.free(slot)
    full.dpvs.conns["state"][changed] = record.FIN_WAIT
    for slot in reused:  # the same client port, another client: a new session in the slot of the old one
        full.dpvs.conns["caddr"][slot, 1] = 77
    full.dpvs.conns["fnat_seq_delta"][other] += 5
    assert full.walk() <= 8 * SLOTS // 64  # of 5 sorts, and again those that are young or seem gone
    full.walk()  # what seems gone is doubted once
    assert full.equal()
    assert (full.table.records["state"][changed] == record.FIN_WAIT).all()
    assert (full.table.records["fnat_delta"][other] == full.dpvs.conns["fnat_seq_delta"][other]).all()
    assert (full.table.records["caddr"][reused, 1] == 77).all()
    assert (full.table.generation[reused] == generations[reused] + 1).all()
    assert (full.table.generation[other] == generations[other]).all()


def test_a_slice_that_empties_and_fills_again() -> None:
    full = Full()
    for slot in range(0, SLOTS, 2):
        full.dpvs.free(slot)
    full.walk()
    full.walk()
    assert full.table.count == 0
    for slot in range(SLOTS):
        full.dpvs.create(slot, slot)
    full.walk()
    full.walk()
    assert full.table.count == SLOTS


class Racing(SimulatedDpvs):
    """A session is made just after somebody asked what is live, and before he reads what the sessions are."""

    late: int | None = None

    def live(self, slots: Slots) -> Bools:
        found = super().live(slots)
        if self.late is not None:
            self.create(self.late, self.late)
            self.late = None
        return found


@pytest.mark.parametrize("whole", [True, False])
def test_a_session_made_between_two_questions_is_found_on_the_next_walk(whole: bool) -> None:
    few, some = SLOTS // 16 - 28, SLOTS // 16 + 28  # so many that words are compared, but not that nobody is asked
    full = Full(Racing(SLOTS), range(0, few))
    for slot in range(few, some):
        full.dpvs.create(slot, slot)
    full.dpvs.late = SLOTS // 2
    if whole:
        full.collector.scan_all(full.dpvs.clock())
    else:
        full.walk()
    assert full.dpvs.late is None
    full.walk()
    assert full.table.present[SLOTS // 2]
    assert full.equal()


@pytest.mark.parametrize(("slots", "milliseconds"), [(1000, 20), (1 << 16, 26), (1_000_000, 400), (8_000_000, 3200)])
def test_alone_it_walks_more_often(slots: int, milliseconds: int) -> None:
    class Pool(SimulatedDpvs):
        def __init__(self) -> None:
            super().__init__(1)
            self.slots = slots

    collector = Collector(Pool(), None, SessionTable(1), modes=MODES)
    assert collector._period_ns // 1_000_000 == milliseconds
    collector.alone = False
    assert collector._period_ns == (SECOND // 10 if slots <= 1 << 16 else max(SECOND, 400 * slots))


SOME = 64


def write_sessions(pool: OwnPool, stop: Event, rounds: "Synchronized[int]") -> None:
    """A process that changes sessions all the time, field by field: each time all fields get the same new number."""
    number = 0
    while not stop.is_set():
        number += 1
        for slot in range(SOME):
            half = number.to_bytes(4, "little")
            pool.set(slot, fnat_seq=half * 4, rs_end_ack=number, timeout=number.to_bytes(8, "little") + bytes(8))
            pool.set(slot, syn_proxy_seq=half * 4)
        rounds.value = number


def test_torn_reads_are_seen_and_read_again(tmp_path: Path) -> None:
    """Two sequence structs far from each other carry one number: two numbers in one read are a torn one."""
    own = OwnPool(tmp_path, chunks=(SOME,))
    zones = OwnZones(tmp_path, [own])
    for slot in range(SOME):
        own.session(slot)
    context = multiprocessing.get_context("fork")
    stop, rounds = context.Event(), context.Value("i", 0)
    writer = context.Process(target=write_sessions, args=(own, stop, rounds), daemon=True)
    with own_target(tmp_path) as target, SessionPool.open(target, LAYOUT) as pool:
        table = SessionTable(pool.slots)
        collector = Collector(pool, None, table, modes={XMIT_FNAT: FNAT})
        writer.start()
        torn = mixed = read = 0
        end = time.monotonic() + 5
        while time.monotonic() < end and (torn < 50 or rounds.value < 200):
            conns, whole = pool.read(np.arange(SOME))
            differ = conns["fnat_seq_isn"] != conns["syn_proxy_seq_prev_delta"]
            differ &= rounds.value > 1
            torn += int(np.count_nonzero(~whole))
            mixed += int(np.count_nonzero(differ & whole))
            read += SOME
            collector.scan(time.monotonic_ns())
            collector.tick(time.monotonic_ns())
        stop.set()
        writer.join(10)
        assert writer.exitcode == 0
        assert torn > 0
        assert mixed < read / 50  # where the writer was stopped between two fields for as long as both looks took
        for _ in range(2):
            collector.scan_all(time.monotonic_ns())
            collector.tick(time.monotonic_ns())
        assert table.count == SOME
        assert (table.records["fnat_delta"] == rounds.value).all()
        assert (table.records["sp_delta"] == rounds.value).all()
    del zones
