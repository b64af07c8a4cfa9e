# SPDX-License-Identifier: GPL-2.0-or-later
"""The drain loop: from what the probes and the pool show to one current table.

Rules:
- An event only says "look at this slot". What the session is now is read from the pool; what the event adds is that a
  creation or an end happened, when, and on which worker.
- Whatever a look leaves open is looked at again on the next tick: torn reads, sessions announced but not hashed yet
  (DPVS calls the create point before it hashes), sessions that seem gone without an event (DPVS takes a busy session
  out of its hash and puts it back, ``dp_vs_conn_expire``), and young TCP sessions that have not finished their
  handshake, whose state and sequence delta nothing announces.
- The scan walks the whole pool in slices. It finds what was there before us, what an event was lost for, and what
  changes without one: states, sequence fields, and a client port that got its TIME_WAIT session back. It compares a
  few words of each slot with what they were on the walk before; only what differs is read, and a part of the rest.
  Where it is alone, no event telling of creations and ends, it walks as often as half of our time lets it.
- A new generation: the slot was free; or its tuple is another; or an event later than the row's birth says that a
  session was made or freed there. The same tuple with other sequence numbers and no event is an update. A row is born
  when its slot had been read, not when the tick began: what DPVS did in between is what was read, and its event, heard
  on the next tick, tells nothing new.
- A session with flag INJECTED was put in for a peer. As long as it waits for its first packet it is a copy: counted,
  not in the table. Once DPVS has moved it on, its packets arrive here: it is ours, and stands in the table like any
  other. Nothing announces that; the scan finds it. That a copy was made, or ended, is heard like anything else, and
  changes nothing in the table.
- Sessions of one packet are never hashed by DPVS, so they do not get in either.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from . import notes
from .conns import as_words, conversion
from .record import RECORD, UNKNOWN_WORKER, Bools, Records, Slots
from .rows import Looks
from .table import BLOCK, NO_SLOTS, NOTHING, Applied, Bytes, SessionTable, Times, joined

SPARSE = 16  # a slice with less than one session in so many slots is read without comparing
THOROUGH_BLOCK = 512  # neighbours that are read whole on the same walk
THOROUGH_LARGE = 8  # in large pools so many times more rarely

MS, SECOND = 1_000_000, 1_000_000_000


_COUNTERS = (
    "events", "events_created", "events_freed", "events_unknown_slot", "events_lost", "full_scans",
    "reads", "reads_torn", "created", "updated", "deleted", "renewed_by_event", "found_by_scan",
    "one_packet", "never_hashed", "malformed", "adopted", "released", "scan_passes", "scan_late",
)  # fmt: skip


_HEARD = ("events_created", "events_freed", "events_unknown_slot")
_LOOKS = ("malformed", "one_packet", "never_hashed", "renewed_by_event", "adopted")


class Pool(Protocol):
    """The session pool of the process, as ``probes.memory.SessionPool`` shows it."""

    slots: int

    def slot_of(self, addresses: npt.NDArray[np.uint64]) -> Slots:
        """Slots of n object addresses; -1 where there is no object."""

    def read(self, slots: Slots) -> tuple[Records, Bools]:
        """Sessions in n slots and whether each was read whole (not while DPVS wrote it)."""

    def scan_prints(self, first: int, last: int) -> npt.NDArray[np.uint32]:
        """Of the slots from ``first`` to before ``last``, a number each, never 0, that differs when the session or its
        state does.
        """

    def live(self, slots: Slots) -> Bools:
        """Which of n slots hold a hashed session; one word of each is read."""


class Ring(Protocol):
    """What the probe program writes: ``probes.ring.ThreadRings``."""

    def drain(self, maximum: int) -> Records:
        """About ``maximum`` events at most that came since the last call, oldest first; dtype EVENT."""


class Settings:
    """How often and how much. Times in ns."""

    def __init__(
        self,
        *,
        pass_small_ns: int = 100 * MS,
        pass_large_ns: int = SECOND,
        small_slots: int = 1 << 16,
        slice_slots: int = 1 << 14,
        slice_busy: int = 1 << 11,
        young_ns: int = 3 * SECOND,
        young_each_tick: int = 1 << 12,
        drain_events: int = 1 << 15,
        slice_least: int = 1 << 9,
        thorough_each: int = 8,
        alone_least_ns: int = 20 * MS,
        slot_ns: int = 400,
    ) -> None:
        self.pass_small_ns = pass_small_ns  # one walk over a pool of up to small_slots
        self.pass_large_ns = pass_large_ns  # one walk over any larger pool, or slot_ns a slot if that is more
        self.small_slots = small_slots
        self.slice_slots = slice_slots  # looked at in one go, at most
        self.slice_busy = slice_busy  # the same while events come, which shall not wait for it
        self.young_ns = young_ns  # how long a slot is looked at each tick at most
        self.young_each_tick = young_each_tick  # looks a tick that no event asked for, at most
        self.drain_events = drain_events  # taken from the ring a tick, at most
        self.slice_least = slice_least  # less than that is not worth a look
        self.thorough_each = thorough_each  # a usual walk reads one in so many whole, another one each time
        self.alone_least_ns = alone_least_ns  # one walk without events, at least
        self.slot_ns = slot_ns  # no walk is to take less for each slot: about half of that is its processor time


class Collector:
    """Keeps ``table`` equal to the sessions of one process. One thread; ``tick`` and ``scan`` called in turn."""

    def __init__(
        self,
        pool: Pool,
        ring: Ring | None,
        table: SessionTable,
        *,
        modes: Mapping[int, int],
        workers: Mapping[int, int] | None = None,
        lost: Callable[[], int] | None = None,
        clock: Callable[[], int] | None = None,
        settings: Settings | None = None,
    ) -> None:
        """``ring``: None when the scan works alone for ever; ``modes``: address of ``dp_vs_xmit_*`` -> forwarding mode;
        ``workers``: thread id -> lcore; ``lost``: how many events the program could not put into the ring so far;
        ``clock``: CLOCK_MONOTONIC in ns, as events have it; None where no time passes within a tick.
        """
        self.settings = settings or Settings()
        self.table = table
        self.alone = ring is None  # no event tells of creations and ends now
        self.copies = 0  # slots that held a copy of ours when last read
        self._pool, self._ring, self._modes = pool, ring, dict(modes)
        self._lost, self._clock = lost, clock
        self._lost_before = lost() if lost else 0
        self.set_workers(workers or {})
        slots = pool.slots
        self._notes: Bytes = np.zeros(slots, np.uint8)
        self._since_ns: Times = np.zeros(slots, np.int64)  # first event not acted on yet; 0 without one
        self._until_ns: Times = np.zeros(slots, np.int64)  # a young session is looked at each tick until then
        self._lcore: Bytes = np.full(slots, UNKNOWN_WORKER, np.uint8)  # from a creation not acted on yet
        self._conversion = conversion(pool.read(NO_SLOTS)[0].dtype, self._modes)
        self._conversion.into(table.row)
        self._watch: Slots = NO_SLOTS  # slots with _WATCHED, each once, longest not looked at first
        self._prints = np.zeros(slots, np.uint32)  # of the words that the last scan saw; 0 after any other look
        self._looks = Looks(
            table.rows_, self._conversion, self._notes, self._since_ns, self._until_ns, self._lcore, self._prints
        )  # fmt: skip
        self._cursor = 0
        self._hurry = slots  # slots still to scan without pause
        self._passes = 0
        self._pass_began_ns: int | None = None
        self.behind = False  # the last tick left events in the ring
        self._busy = False  # the last tick found events there
        self.counters: dict[str, int] = dict.fromkeys(_COUNTERS, 0)

    def set_workers(self, workers: Mapping[int, int]) -> None:
        """Which thread is which lcore."""
        tids = sorted(workers)
        self._tids = np.array(tids, np.uint32)
        self._lcores = np.array([workers[tid] for tid in tids], np.uint8)

    @property
    def watching(self) -> int:
        """Slots that the next tick looks at even without an event."""
        return len(self._watch)

    def tick(self, now_ns: int) -> Applied:
        """Drain the ring, and look at what the events named and at what the last looks left open."""
        heard = self._hear()
        self._busy = len(heard) > 0
        self._count_lost()
        waiting, slots, room = self._watch, heard, self.settings.young_each_tick
        if len(waiting):
            waiting = waiting[(self._notes[waiting] & notes.HEARD) == 0]
            slots = np.concatenate((heard, waiting[:room]))
        if len(slots) == 0:
            return NOTHING
        applied, keep = self._look(slots, now_ns)
        if len(self._watch):  # else none of them has the note
            self._notes[slots] &= np.uint8(0xFF ^ notes.WATCHED)
        if len(keep):
            self._notes[keep] |= np.uint8(notes.WATCHED)
        self._watch = np.concatenate((waiting[room:], keep)) if len(waiting) > room else keep
        return applied

    def scan(self, now_ns: int) -> Applied:
        """Look at the next slice of the pool, if it is due."""
        most = self.settings.slice_busy if self._busy else self.settings.slice_slots
        end = min(self._slice_end(now_ns), self._cursor + most)
        if end <= self._cursor:
            return NOTHING
        applied = self._scan_to(end, now_ns)
        if self._cursor == self._pool.slots:
            self._cursor = 0
            self._passes += 1
            self.counters["scan_passes"] += 1
            period = self._period_ns
            began = self._pass_began_ns if self._pass_began_ns is not None else now_ns
            if now_ns - began > period + period // 4:
                self.counters["scan_late"] += 1
            self._pass_began_ns = max(began + period, now_ns) if self._hurry == 0 else now_ns
        return applied

    def scan_all(self, now_ns: int) -> None:
        """Look at the whole pool at once, from its first slot on."""
        self._cursor, self._hurry = 0, self._pool.slots
        while self._hurry:
            self.scan(now_ns)

    def scan_soon(self) -> None:
        """From here on once around the pool without pause: something may have been missed."""
        self._hurry = self._pool.slots
        self.counters["full_scans"] += 1

    @property
    def _period_ns(self) -> int:
        settings, usual = self.settings, self._usual_ns
        return min(usual, max(settings.alone_least_ns, settings.slot_ns * self._pool.slots)) if self.alone else usual

    @property
    def _usual_ns(self) -> int:
        """One walk while events come."""
        settings, slots = self.settings, self._pool.slots
        if slots <= settings.small_slots:
            return settings.pass_small_ns
        return max(settings.pass_large_ns, settings.slot_ns * slots)

    def _slice_end(self, now_ns: int) -> int:
        """Where the walk should be by now; the cursor itself when too little is due to be worth a call."""
        slots = self._pool.slots
        if self._hurry:
            return min(slots, self._cursor + self._hurry)
        if self._pass_began_ns is None:
            self._pass_began_ns = now_ns
        due = min(slots, slots * max(0, now_ns - self._pass_began_ns) // self._period_ns)
        return due if due == slots or due - self._cursor >= self.settings.slice_least else self._cursor

    def _scan_to(self, end: int, now_ns: int) -> Applied:
        look = self._worth_a_look(self._cursor, end)
        applied = NOTHING
        slots = np.flatnonzero(look) + self._cursor
        if len(slots):
            prints = self._prints[slots]
            applied, keep = self._look(slots, now_ns)
            # What this look left open is on the watch list, so the words need not be seen to differ once more.
            self._prints[slots] = prints
            keep = keep[(self._notes[keep] & notes.WATCHED) == 0]
            self._notes[keep] |= np.uint8(notes.WATCHED)
            self._watch = np.concatenate((self._watch, keep))
            self.counters["found_by_scan"] += len(applied.created)
        if self._hurry:
            self._hurry -= end - self._cursor
            if self._hurry == 0:
                self.table.complete = True
        self._cursor = end
        return applied

    def _worth_a_look(self, first: int, end: int) -> Bools:
        """Which slots from ``first`` to before ``end`` may hold something else than the table says."""
        part = slice(first, end)
        used: Bools = self.table.present[part] | ((self._notes[part] & notes.COPY) != 0)
        dense = int(np.count_nonzero(used)) * SPARSE >= end - first
        if self._hurry or not dense:
            used |= self._pool.live(np.arange(first, end))
            if int(np.count_nonzero(used)) * SPARSE < end - first:
                self._prints[part] = 0
                return used  # so few that reading them costs less than comparing all
        prints = self._pool.scan_prints(first, end)
        differs: Bools = prints != self._prints[part]
        self._prints[part] = prints
        # Nobody has asked yet whether there is a session where there was none, or one came between that question and
        # the reading of its words: whoever asks before reading loses it, as the words will not differ any more.
        new = np.flatnonzero(differs & ~used)
        used[new] = self._pool.live(new + first)
        return used if self._hurry else used & (differs | self._thorough(first, end))

    def _thorough(self, first: int, end: int) -> Bools:
        """Which slots from ``first`` to before ``end`` this walk reads whole, whatever the words say.

        Walks that come more often read no more in all.
        """
        settings, small = self.settings, self._pool.slots <= self.settings.small_slots
        each = settings.thorough_each * (1 if small else THOROUGH_LARGE)
        each = max(1, each * self._usual_ns // max(1, self._period_ns))
        blocks = np.arange(first // THOROUGH_BLOCK, -(-end // THOROUGH_BLOCK))
        chosen = (blocks + self._passes) % each == 0
        skip = first % THOROUGH_BLOCK
        return np.repeat(chosen, THOROUGH_BLOCK)[skip : skip + end - first]

    def _hear(self) -> Slots:
        """Take events from the ring and note what they say; the distinct slots they name, with _HEARD set."""
        if self._ring is None:
            return NO_SLOTS
        events = self._ring.drain(self.settings.drain_events)
        self.behind = len(events) >= self.settings.drain_events
        if len(events) == 0:
            return NO_SLOTS
        slots = self._pool.slot_of(events["conn"])
        self.counters["events"] += len(slots)
        heard = np.empty(len(slots), np.int64)
        raw = events.view(np.uint64).reshape(len(slots), -1)
        found = self._looks.hear(raw, slots, self._tids, self._lcores, heard)
        for name in _HEARD:
            self.counters[name] = getattr(self._looks, name)
        return heard[:found]

    def _count_lost(self) -> None:
        if self._lost is None:
            return
        lost = self._lost()
        if lost != self._lost_before:
            self.counters["events_lost"] += lost - self._lost_before
            self._lost_before = lost
            self.scan_soon()

    def release(self, slots: Slots, now_ns: int) -> None:
        """Sessions in these slots (distinct) were just turned into copies that wait: they are not ours any more.

        Looked at on the next tick: one that a packet has moved on meanwhile becomes ours anew, with a new claim.
        """
        ended = self.table.apply(slots, np.zeros(len(slots), RECORD), np.zeros(len(slots), np.bool_), now_ns)
        self.counters["released"] += len(ended.deleted)
        watched = (self._notes[slots] & notes.WATCHED) != 0
        self._notes[slots] |= np.uint8(notes.WATCHED)
        self._watch = np.concatenate((self._watch, slots[~watched]))

    def _look(self, slots: Slots, now_ns: int) -> tuple[Applied, Slots]:
        """Bring distinct slots into the table; which of them have to be looked at again on the next tick."""
        if len(slots) <= BLOCK:
            return self._look_block(slots, now_ns)
        parts = [self._look_block(slots[start : start + BLOCK], now_ns) for start in range(0, len(slots), BLOCK)]
        return joined([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _look_block(self, slots: Slots, now_ns: int) -> tuple[Applied, Slots]:
        conns, whole = self._pool.read(slots)
        read_ns = max(now_ns, self._clock()) if self._clock else now_ns
        again = np.empty(len(slots), np.int64)
        self.table.rows_.begin()
        self._conversion.read(as_words(conns))
        found = self._looks.look(whole.view(np.uint8), slots, now_ns, read_ns, self.settings.young_ns, again)
        applied = self.table.finish()
        count, looks = self.counters, self._looks
        count["reads"] += len(slots)
        count["reads_torn"] = looks.torn
        count["created"] += len(applied.created)
        count["updated"] += len(applied.updated)
        count["deleted"] += len(applied.deleted)
        for name in _LOOKS:
            count[name] = getattr(looks, name)
        self.copies = looks.copies
        return applied, again[:found]
