# SPDX-License-Identifier: GPL-2.0-or-later
"""Sessions that a peer asks for, by client and service, found in our table.

Rules: pure. One question at a time and not more often than twice a second; what comes in between is not answered, as
who asks asks again. The table is looked through in slices of about a millisecond, a slice for each call.
"""

import numpy as np

from collector.flows import hash_of, key_words, keys_of
from collector.record import Slots, Words, words
from collector.table import NO_SLOTS, SessionTable

from .codec import FlowKeys

SLICE = 1 << 16
PAUSE_NS = 500_000_000


class Wanted:
    """What the peer of one link asks for."""

    def __init__(self, table: SessionTable) -> None:
        self._table = table
        self._keys: Words = np.empty((0, 5), np.uint64)  # by rising hash
        self._hashes: Words = np.empty(0, np.uint64)
        self._ports = np.zeros(1 << 16, np.bool_)  # of clients, as they stand in memory: what most sessions fail at
        self._cursor = table.slots
        self._asked_ns: int | None = None

    @property
    def busy(self) -> bool:
        """Whether ``step`` has something to do."""
        return self._cursor < self._table.slots

    def ask(self, keys: FlowKeys, now_ns: int) -> bool:
        """Look for the sessions of n flows; False if it is not the time for that."""
        if self.busy or (self._asked_ns is not None and now_ns - self._asked_ns < PAUSE_NS):
            return False
        asked = key_words(keys)
        hashes = hash_of(asked)
        order = np.argsort(hashes)
        self._keys, self._hashes = asked[order].copy(), hashes[order]
        self._ports[:] = False
        self._ports[_client_ports(self._keys[:, 4])] = True
        self._cursor, self._asked_ns = 0, now_ns
        return True

    def forget(self) -> None:
        """Nobody waits for it any more."""
        self._cursor = self._table.slots

    def step(self) -> Slots:
        """The slots of those that stand in the next slice."""
        first = self._cursor
        self._cursor = min(first + SLICE, self._table.slots)
        part = slice(first, self._cursor)
        rows = words(self._table.records[part])
        near = np.flatnonzero(self._ports[_client_ports(rows[:, 10])] & self._table.shared[part])
        if len(near) == 0:
            return NO_SLOTS
        keys = keys_of(rows[near])
        at = np.minimum(np.searchsorted(self._hashes, hash_of(keys)), len(self._hashes) - 1)
        slots: Slots = near[(self._keys[at] == keys).all(axis=1)] + first
        return slots


def _client_ports(column: Words) -> Slots:
    return (column & np.uint64(0xFFFF)).astype(np.int64)
