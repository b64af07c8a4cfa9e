# SPDX-License-Identifier: GPL-2.0-or-later
"""The session table: what this DPVS holds now, by slot, and what each peer has not been told yet.

Rules:
- One row per slot of the session pool, structures of arrays, no object per session. A session is named by its slot and
  generation; a slot that is used again gets the next generation (1, 2, ...; 0 means never used).
- The table holds state, not history. A change marks its slot dirty for every peer; who takes a dirty slot reads the
  row as it is then. A session that came and went in between costs nothing, and memory is bounded by the pool.
- A row is stored when it is new or has changed (``record.changed``); what moves with every packet does not touch it.
  So a peer that was told everything holds exactly these rows.
- Templates and sessions of one packet stand in the table but are not shared with peers (``record.replicable``).
- A row that becomes ours is stamped with a claim: above all that peers were heard to claim if it was their session
  until now (flag INJECTED), else equal to the highest of them. It keeps its claim for as long as it is ours.
- ``freeze()`` stops all change for good: sessions of a process that died are not sessions that ended.
"""

from collections import deque
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .notes import CHANGE, OWED
from .record import COMPARE, RECORD, UNKNOWN_WORKER, WORDS, Bools, Records, Slots, Words, digest, pick, words
from .rows import Marks, Rows

_WINDOW = 1 << 13  # marks looked at in one step for what a full sync owes
_FEW = 32  # pieces of a queue that are left as they came
MAX_CLAIM = (1 << 32) - 2

Times = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

NO_SLOTS: Slots = np.empty(0, np.int64)
BLOCK = 2048  # rows handled at once by who reads them first: all that belongs to them stays in the processor's cache


class Applied(NamedTuple):
    """What one ``apply`` changed: distinct slots, each in at most one of the three."""

    created: Slots
    updated: Slots
    deleted: Slots


NOTHING = Applied(NO_SLOTS, NO_SLOTS, NO_SLOTS)


def joined(parts: list[Applied]) -> Applied:
    """What several calls changed, of different slots each."""
    return parts[0] if len(parts) == 1 else Applied(*(np.concatenate(column) for column in zip(*parts, strict=True)))


class Taken(NamedTuple):
    """Marks taken from a ``Dirty``: n distinct slots."""

    slots: Slots
    since_ns: Times  # of the oldest change behind the mark; 0 where there was none, only a full sync
    fresh: Bools  # the taker may never have heard of this generation


class Dirty:
    """The slots one reader (a peer's sender, an injector) has to look at again.

    Two kinds of mark: a *change*, handed out first and in order of arrival, and *owed*, a full sync, handed out in
    order of slots beside the changes. A slot is handed out once for both. Memory: 9 bytes a slot and 8 a waiting
    change.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.owed = 0  # slots that a full sync has still to hand out
        self._marks: Bytes = np.zeros(slots, np.uint8)
        self._since_ns: Times = np.zeros(slots, np.int64)
        self._rows = Marks(self._marks, self._since_ns)
        self._queue: deque[Slots] = deque()
        self._changes = 0
        self._cursor = 0
        self._overlap = 0  # slots with both kinds of mark

    @property
    def pending(self) -> int:
        """Slots to hand out."""
        return self._changes + self.owed - self._overlap

    @property
    def changes(self) -> int:
        """Slots to hand out because they changed."""
        return self._changes

    @property
    def oldest_ns(self) -> int | None:
        """Time of the change that waits at the head of the queue; None when no change waits."""
        return int(self._since_ns[self._queue[0][0]]) if self._queue else None

    @property
    def marked(self) -> Bools:
        """Which slots are to be handed out; a new array, one flag a slot."""
        return np.asarray(self._marks != 0)

    def mark(self, slots: Slots, since_ns: Times | int = 0, fresh: Bools | bool = True) -> None:
        """Slots (distinct) have changed at ``since_ns``; ``fresh`` where the change is a new generation."""
        if len(slots) == 0:
            return
        added = np.empty(len(slots), np.int64)
        since = since_ns if isinstance(since_ns, np.ndarray) else np.full(len(slots), since_ns)
        kinds = fresh.view(np.uint8) if isinstance(fresh, np.ndarray) else np.full(len(slots), fresh, np.uint8)
        self._add(added, self._rows.mark(slots, since, kinds, added))

    def mark_rows(self, rows: Rows) -> None:
        """The same of what was just changed in the table."""
        added = np.empty(rows.marked, np.int64)
        self._add(added, self._rows.mark_rows(rows, added))

    def _add(self, added: Slots, count: int) -> None:
        if count == 0:
            return
        self._changes += count
        self._overlap += self._rows.overlap
        self._rows.overlap = 0
        self._queue.append(added if count == len(added) else added[:count].copy())
        # Single changes, for a reader who is away, shall not be kept as so many arrays. Each joins ever larger ones.
        while len(self._queue) > _FEW and len(self._queue[-1]) >= len(self._queue[-2]):
            last = self._queue.pop()
            self._queue.append(np.concatenate((self._queue.pop(), last)))

    def owe(self, present: Bools) -> None:
        """A full sync: every slot where ``present`` (one flag a slot) is to be handed out once, from slot 0 on."""
        self._marks &= np.uint8(0xFF ^ OWED)
        self._marks[present] |= np.uint8(OWED)
        self.owed = int(np.count_nonzero(present))
        self._overlap = int(np.count_nonzero((self._marks & 3) == 3))
        self._cursor = 0

    def give_back(self, taken: Taken, *, owed: bool) -> None:
        """What was taken has not arrived: mark it as it was. ``owed``: the full sync it may belong to still goes on."""
        changes = taken.since_ns > 0
        self.mark(taken.slots[changes], taken.since_ns[changes], taken.fresh[changes])
        slots = taken.slots if owed else taken.slots[~changes]
        before = self._marks[slots]
        slots, before = slots[(before & OWED) == 0], before[(before & OWED) == 0]
        if len(slots):
            self._marks[slots] = before | np.uint8(OWED)
            self.owed += len(slots)
            self._overlap += int(np.count_nonzero(before & CHANGE))
            self._cursor = min(self._cursor, int(slots.min()))

    def clear(self) -> None:
        """Forget all marks."""
        self._marks[:] = 0
        self._queue.clear()
        self.owed = self._changes = self._overlap = self._cursor = 0

    def take(self, limit: int) -> Slots:
        """Up to ``limit`` marked slots, their marks removed: changes first, but a quarter is kept for what is owed."""
        return self.claim(limit).slots

    def claim(self, limit: int) -> Taken:
        """Like ``take``, with what the marks said."""
        kept = min(self.owed - self._overlap, limit // 4)
        changes = self._pop_changes(limit - kept)
        since, flags = np.empty(len(changes), np.int64), np.empty(len(changes), np.uint8)
        both = self._rows.take(changes, since, flags)
        self._changes -= len(changes)
        self._overlap -= both
        self.owed -= both
        fresh = flags.view(np.bool_)
        if len(changes) == limit or self.owed == self._overlap:
            return Taken(changes, since, fresh)
        owed = self._pop_owed(limit - len(changes))
        self._marks[owed] = 0
        self.owed -= len(owed)
        return Taken(
            np.concatenate((changes, owed)),
            np.concatenate((since, np.zeros(len(owed), np.int64))),
            np.concatenate((fresh, np.ones(len(owed), np.bool_))),
        )

    def _pop_changes(self, limit: int) -> Slots:
        parts: list[Slots] = []
        while limit > 0 and self._queue:
            head = self._queue.popleft()
            if len(head) > limit:
                self._queue.appendleft(head[limit:])
                head = head[:limit]
            limit -= len(head)
            parts.append(head)
        return _joined(parts)

    def _pop_owed(self, limit: int) -> Slots:
        """Owed slots that no change has in the queue."""
        parts: list[Slots] = []
        while limit > 0 and self._cursor < self.slots:
            window = self._marks[self._cursor : self._cursor + _WINDOW] & (CHANGE | OWED)
            found = np.flatnonzero(window == OWED)[:limit] + self._cursor
            self._cursor = int(found[-1]) + 1 if len(found) == limit else self._cursor + len(window)
            limit -= len(found)
            parts.append(found)
        return _joined(parts)


def _joined(parts: list[Slots]) -> Slots:
    if not parts:
        return NO_SLOTS
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class SessionTable:
    """All sessions of one DPVS, by slot. Arrays are read-only to others and valid as long as the table."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.complete = False  # set once a full scan has found all that was there before us
        self.frozen = False
        self._words = np.zeros((slots, WORDS), np.uint64)
        self.records: Records = self._words.view(RECORD).reshape(slots)
        self.generation: npt.NDArray[np.uint32] = self.records["generation"]
        self.worker: Bytes = self.records["worker"]
        self.present: Bools = np.zeros(slots, np.bool_)
        self.shared: Bools = np.zeros(slots, np.bool_)  # present, and peers are told
        self.born_ns: Times = np.zeros(slots, np.int64)  # when this generation was first seen
        self.row: Words = np.zeros(WORDS, np.uint64)  # scratch, for who brings a row
        self._changed = np.zeros((5, BLOCK), np.int64)
        self.rows_ = Rows(
            self._words,
            self.present.view(np.uint8),
            self.shared.view(np.uint8),
            self.born_ns,
            COMPARE,
            self.row,
            self._changed,
            np.zeros(BLOCK, np.uint8),
        )
        self.count = 0
        self.created = self.updated = self.deleted = 0
        self._peers: dict[str, Dirty] = {}

    def __len__(self) -> int:
        return self.count

    def add_peer(self, key: str) -> Dirty:
        """Marks for one more peer, none set; a key that is there already gets its old one."""
        return self._peers.setdefault(key, Dirty(self.slots))

    def remove_peer(self, key: str) -> None:
        """Nobody takes this peer's marks any more."""
        self._peers.pop(key, None)

    def mark(self, slots: Slots, now_ns: int) -> None:
        """All peers are to look at these slots (distinct) again, as if their sessions were new."""
        for dirty in self._peers.values():
            dirty.mark(slots, now_ns)

    def freeze(self) -> None:
        """Keep the table as it is from now on; ``apply`` does nothing more."""
        self.frozen = self.rows_.frozen = True

    @property
    def claim(self) -> int:
        """The highest that was heard of any peer."""
        return int(self.rows_.claim)

    def hear(self, claim: int) -> None:
        """A peer claims a session with that much: what becomes ours from now on is not below it."""
        self.rows_.claim = max(self.claim, min(claim, MAX_CLAIM))

    def sessions(self) -> Records:
        """All present records, (n,), by slot; a copy."""
        return pick(self.records, self.present)

    def rows(self, slots: Slots) -> Records:
        """The records of n slots, (n,); a copy."""
        return self._words.take(slots, axis=0).view(RECORD).reshape(len(slots))

    def digest(self) -> int:
        """``record.digest`` of all sessions that peers are told of; in quiet that of a peer's replica is equal."""
        return digest(pick(self.records, self.shared))

    def apply(
        self,
        slots: Slots,
        records: Records,
        valid: Bools,
        now_ns: int,
        *,
        renewed: Bools | None = None,
        since_ns: Times | None = None,
        worker: Bytes | None = None,
    ) -> Applied:
        """Make n rows what ``records`` say; ``slots`` are distinct.

        ``valid``: the slot holds a session of ours (else it has ended, and its record is not looked at);
        ``renewed``: it is known to be another session than the row's, even with the same tuple; ``since_ns``: when what
        we see now happened, as far as known, else ``now_ns``; ``worker``: lcores, where UNKNOWN_WORKER leaves what is
        known of the session.
        """
        n = len(slots)
        if self.frozen or n == 0:
            return NOTHING
        new, checked = words(records), valid.view(np.uint8)
        again = np.zeros(n, np.uint8) if renewed is None else renewed.view(np.uint8)
        workers = np.full(n, UNKNOWN_WORKER, np.uint8) if worker is None else worker
        since = np.full(n, now_ns) if since_ns is None else since_ns
        parts = []
        for start in range(0, n, BLOCK):
            b = slice(start, start + BLOCK)
            self.rows_.begin()
            self.rows_.apply(new[b], slots[b], checked[b], again[b], workers[b], since[b], now_ns)
            parts.append(self.finish())
        return joined(parts)

    def finish(self) -> Applied:
        """What ``rows_`` changed since its ``begin``, at most BLOCK rows; peers are to be told of it."""
        rows = self.rows_
        changed = self._changed
        created = changed[0, : rows.created].copy() if rows.created else NO_SLOTS
        updated = changed[1, : rows.updated].copy() if rows.updated else NO_SLOTS
        deleted = changed[2, : rows.deleted].copy() if rows.deleted else NO_SLOTS
        self.count += rows.more
        self.created += len(created)
        self.updated += len(updated)
        self.deleted += len(deleted)
        if rows.marked:
            for dirty in self._peers.values():
                dirty.mark_rows(rows)
        return Applied(created, updated, deleted)
