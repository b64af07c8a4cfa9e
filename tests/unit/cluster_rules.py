# SPDX-License-Identifier: GPL-2.0-or-later
"""What a replica may hold, given all that its origin's table ever said. See cluster.py for the rules."""

import numpy as np

from collector import record
from collector.record import Bools
from collector.table import Dirty, SessionTable
from replicator.replica import Replica


class Broken(AssertionError):
    """A rule was broken."""


def demand(holds: object, what: str) -> None:
    if not holds:
        raise Broken(what)


class Ledger:
    """All that one run of an origin ever said to one peer: each state of each generation, and when it ended."""

    def __init__(self, slots: int) -> None:
        self._rows = np.zeros((slots, record.WORDS), np.uint64)
        self._wanted: Bools = np.zeros(slots, np.bool_)
        self._states: dict[tuple[int, int], dict[bytes, int]] = {}
        self._ended: dict[tuple[int, int], int] = {}
        self._left: set[tuple[int, int]] = set()

    def write(self, table: SessionTable, wanted: Bools, step: int) -> None:
        rows = table.records.view(np.uint64).reshape(table.slots, record.WORDS)
        moved = (rows != self._rows).any(axis=1)
        touched = np.flatnonzero(moved | (wanted != self._wanted))
        for slot in touched.tolist():
            before = (slot, int(self._rows[slot, 0] >> np.uint64(32)))
            now = (slot, int(rows[slot, 0] >> np.uint64(32)))
            if self._wanted[slot] and (now != before or not wanted[slot]):
                self._ended[before] = step
                self._left.add(before)
            if wanted[slot]:
                self._ended.pop(now, None)
                self._states.setdefault(now, {}).setdefault(rows[slot].tobytes(), len(self._states[now]))
        if len(touched):
            self._rows[touched] = rows[touched]
            self._wanted = wanted.copy()

    def state(self, name: tuple[int, int], row: bytes) -> int | None:
        """Which of a session's states that is, counted from its first."""
        return self._states.get(name, {}).get(row)

    def ended(self, name: tuple[int, int]) -> int | None:
        """The step at which it ended; None while it is there."""
        return self._ended.get(name)

    def left(self, name: tuple[int, int]) -> bool:
        """Whether it was not the peer's to hold at any time, though it may be again."""
        return name in self._left


class Watch:
    """One replica, followed from step to step."""

    def __init__(self, replica: Replica, ledger: Ledger) -> None:
        self.replica, self._ledger = replica, ledger
        self._words = replica.records.view(np.uint64).reshape(replica.slots, record.WORDS)
        self._rows = self._words.copy()
        self._present = replica.present.copy()
        self._best: dict[int, tuple[int, int]] = {}
        self._began = 0
        self._counters = dict(replica.counters)
        self.copies: dict[int, bytes] = {}  # what an injector believes to be here

    def follow(self, began: int, *, aged: bool = False) -> None:
        """After a step. ``began``: the step at which the link that may have written here began."""
        replica = self.replica
        touched = np.flatnonzero((self._words != self._rows).any(axis=1) | (replica.present != self._present))
        if len(touched) == 0:
            return
        for slot in touched.tolist():
            was, before = bool(self._present[slot]), int(self._rows[slot, 0] >> np.uint64(32))
            name = (slot, int(replica.generation[slot]))
            if replica.present[slot]:
                state = self._ledger.state(name, self._words[slot].tobytes())
                demand(state is not None, f"{replica.node} never had {name} as the replica has it")
                best = self._best.get(slot, (0, 0))
                demand((name[1], state) >= best, f"{name} of {replica.node} goes back from {best} to state {state}")
                self._best[slot] = (name[1], state or 0)
                if not was or before != name[1]:
                    demand(was or before != name[1], f"{name} of {replica.node} had ended here and comes again")
                    ended = self._ledger.ended(name)
                    demand(ended is None or ended >= began, f"{name} of {replica.node} ended before it was told of")
            elif was:
                demand(
                    aged or self._ledger.left((slot, before)),
                    f"{(slot, before)} of {replica.node} is dropped, and has not ended",
                )
                if aged:
                    self.copies.pop(slot, None)
        self._rows[touched], self._present[touched] = self._words[touched], replica.present[touched]

    def check(self) -> None:
        """What need not be looked at in each step."""
        replica = self.replica
        demand(replica.count == np.count_nonzero(replica.present), "the count of a replica")
        demand(all(replica.counters[n] >= c for n, c in self._counters.items()), "a counter of a replica fell")
        self._counters = dict(replica.counters)
        check_marks(replica.pending)

    def inject(self, limit: int) -> None:
        """What an injector does with the marks."""
        for slot in replica_slots(self.replica, limit):
            if self.replica.present[slot]:
                self.copies[slot] = self._words[slot].tobytes()
            else:
                self.copies.pop(slot, None)


def replica_slots(replica: Replica, limit: int) -> list[int]:
    """Slots that an injector has to look at."""
    found: list[int] = replica.pending.take(limit).tolist()
    demand(len(set(found)) == len(found) <= limit, "a slot is handed out twice")
    return found


def check_marks(dirty: Dirty) -> None:
    """The books of the marks are right, and bounded."""
    marks, queued = dirty._marks, sum(map(len, dirty._queue))
    changes, owed = (marks & 1) != 0, (marks & 2) != 0
    demand(dirty.changes == np.count_nonzero(changes) == queued <= dirty.slots, "the number of changes")
    demand(dirty.owed == np.count_nonzero(owed), "the number of slots owed")
    demand(dirty.pending == np.count_nonzero(changes | owed), "the number of marks")
