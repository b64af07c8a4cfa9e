# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose a session is when two nodes have it: what the injector asks before it believes a peer.

Rules (docs/ownership.md has the reasons)
- A node that announces a session says that its packets arrive there, and gives the claim that the session was stamped
  with as it became that node's. Of two claims the higher one is right, of two equal ones that of the higher node id: an
  order that both nodes compute alike, whatever each heard first.
- The node that is wrong turns its session back into a copy that waits, and it leaves the table. Nothing can be lost by
  that: the next packet makes it live, with a claim above all that were heard.
- The node that is right does nothing. The other one will learn of the claim and give way.
- A session that moves from one peer to another is a deletion at the first: the copy here stands for the second by then,
  so it stays. That the second has it is noted when its copy is found to be here already, or is made of our session.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from collector.record import Bools, Records, Slots, Words, carried, words
from collector.table import SessionTable

MOVED_NS = 30_000_000_000  # after so long, a node that gave a session away has said so
UNKNOWN, OURS, THEIRS = range(3)

_INBOUND = (
    (1, 0xFF00FF, 0x9E3779B97F4A7C15),  # family towards the client, protocol
    *((word, 0xFFFFFFFFFFFFFFFF, 0xC2B2AE3D27D4EB4F * (2 * word + 1)) for word in range(2, 6)),  # client, virtual
    (10, 0xFFFFFFFF, 0x165667B19E3779F9),  # their ports
)
_RECENT = 1 << 12  # entries that are sorted on their own before all are sorted again

Hashes = npt.NDArray[np.uint64]


def inbound_hash(rows: Words) -> Hashes:
    """One number for the client's side of each of n sessions, shape (n, 18): what DPVS finds them by."""
    total = np.zeros(len(rows), np.uint64)
    for word, mask, factor in _INBOUND:
        total += (rows[:, word] & np.uint64(mask)) * np.uint64(factor & 0xFFFFFFFFFFFFFFFF)
        total ^= total >> np.uint64(29)
    return total * np.uint64(0xBF58476D1CE4E5B9)


def _same_inbound(one: Words, other: Words) -> Bools:
    same = np.ones(len(one), np.bool_)
    for word, mask, _ in _INBOUND:
        same &= ((one[:, word] ^ other[:, word]) & np.uint64(mask)) == 0
    return same


class TupleIndex:
    """Finds rows of a table by the client's side. Costs nothing until asked; then what was created since is added."""

    def __init__(self, table: SessionTable) -> None:
        self._table = table
        self._born_ns = np.zeros(table.slots, np.int64)  # of the rows that are in the index
        # May name rows that are gone. What is new is kept apart until it is worth to sort all of it.
        self._all: tuple[Hashes, Slots] = (np.empty(0, np.uint64), np.empty(0, np.int64))
        self._recent = self._all

    def find(self, records: Records) -> Slots:
        """Slots of the n sessions in the table, -1 for those that are not there."""
        found = np.full(len(records), -1, np.int64)
        if len(records) == 0 or self._table.count == 0:
            return found
        self._refresh()
        wanted = words(records)
        keys = inbound_hash(wanted)
        for hashes, slots in (self._recent, self._all):
            at = np.searchsorted(hashes, keys)
            left = np.flatnonzero(found < 0)
            while len(left := left[at[left] < len(hashes)]) and len(left := left[hashes[at[left]] == keys[left]]):
                there = slots[at[left]]
                rows = words(self._table.rows(there))
                good = self._table.present[there] & _same_inbound(rows, wanted[left])
                found[left[good]] = there[good]
                left = left[~good]
                at[left] += 1
        return found

    def _refresh(self) -> None:
        table = self._table
        fresh = np.flatnonzero(table.present & (table.born_ns != self._born_ns))
        if len(fresh) == 0:
            return
        hashes, slots = self._recent
        if len(slots) + len(fresh) > max(_RECENT, table.count // 8):
            fresh = np.flatnonzero(table.present)
            self._all = _in_order(inbound_hash(words(table.rows(fresh))), fresh)
            self._recent = (hashes[:0], slots[:0])
        else:
            added = inbound_hash(words(table.rows(fresh)))
            self._recent = _in_order(np.concatenate((hashes, added)), np.concatenate((slots, fresh)))
        self._born_ns[fresh] = table.born_ns[fresh]


def _in_order(hashes: Hashes, slots: Slots) -> tuple[Hashes, Slots]:
    order = np.argsort(hashes, kind="stable")
    return hashes[order], slots[order]


@dataclass(frozen=True)
class _Moved:
    """Copies here that stand for sessions of one node now, in order of their hashes."""

    until_ns: int
    node_id: int
    hashes: Hashes
    slots: Slots  # in that node's pool
    has: Bools  # by such a slot: a copy still stands here for that node


class Ownership:
    """Compares what peers claim with what this node has."""

    def __init__(self, table: SessionTable, node_id: int, release: Callable[[Slots, int], None]) -> None:
        """``release``: ``collector.collector.Collector.release``."""
        self._table, self._node_id, self._release = table, node_id, release
        self._index = TupleIndex(table)
        self._moved: deque[_Moved] = deque()
        self.counters: Counter[str] = Counter(kept=0, yielded=0, unknown=0, moved=0)

    def hear(self, claims: npt.NDArray[np.uint32]) -> None:
        """Peers' sessions are about to be put in: whatever becomes ours from now on is claimed above them."""
        if len(claims):
            self._table.hear(int(claims.max()))

    def judge(self, records: Records, node_id: int) -> npt.NDArray[np.uint8]:
        """Of n sessions that a peer claims: OURS or THEIRS where the table has them too, else UNKNOWN."""
        verdict = np.full(len(records), UNKNOWN, np.uint8)
        slots = self._index.find(records)
        held = np.flatnonzero(slots >= 0)
        ours = self._table.records["claim"][slots[held]]
        theirs = records["claim"][held]
        wrong = (ours < theirs) | ((ours == theirs) & (self._node_id < node_id))
        verdict[held] = np.where(wrong, THEIRS, OURS)
        return verdict

    def contested(self, records: Records, node_id: int) -> npt.NDArray[np.uint8]:
        """``judge`` for sessions that DPVS has of its own, or with packets: counted."""
        verdict = self.judge(records, node_id)
        self.counters["kept"] += int(np.count_nonzero(verdict == OURS))
        self.counters["unknown"] += int(np.count_nonzero(verdict == UNKNOWN))
        return verdict

    def released(self, records: Records, now_ns: int, *, yielded: int) -> None:
        """DPVS has made copies that wait of n sessions, ``yielded`` of them, or has them no more."""
        self.counters["yielded"] += yielded
        slots = self._index.find(records)
        slots = np.unique(slots[slots >= 0])
        if len(slots):
            self._release(slots, now_ns)

    def moved(self, records: Records, slots: Slots, has: Bools, node_id: int, now_ns: int) -> None:
        """Copies that were here already stand for sessions of this node now, which carried them on.

        ``slots``: of n sessions, in that node's pool; ``has``: by such slots, where a copy stands here for that node,
        looked at when ``stay`` is asked.
        """
        which = np.flatnonzero(carried(records))
        if len(which):
            hashes = inbound_hash(words(records)[which])
            order = np.argsort(hashes)
            self._moved.append(_Moved(now_ns + MOVED_NS, node_id, hashes[order], slots[which[order]], has))

    def stay(self, rows: Words, node_id: int, now_ns: int) -> Bools:
        """Which of n sessions, rows (n, 18), that ended at a node stand for another node's by now."""
        while self._moved and self._moved[0].until_ns < now_ns:
            self._moved.popleft()
        stay = np.zeros(len(rows), np.bool_)
        if self._moved and len(rows):
            keys = inbound_hash(rows)
            for moved in self._moved:
                if moved.node_id != node_id:
                    at = np.minimum(np.searchsorted(moved.hashes, keys), len(moved.hashes) - 1)
                    stay |= (moved.hashes[at] == keys) & moved.has[moved.slots[at]]
            self.counters["moved"] += int(np.count_nonzero(stay))
        return stay
