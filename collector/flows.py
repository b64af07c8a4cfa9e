# SPDX-License-Identifier: GPL-2.0-or-later
"""Flows that an interface saw, joined to sessions: who is active, and which flows no session here covers.

Rules:
- A flow is a client's address and port and a service's. A session of ours with these is joined to it: its slot gets the
  flow's counters, together with the session's generation, so that they are never taken for another session's.
- A session of a peer with these covers a flow as well. Templates and sessions of one packet cover none.
- An *orphan* is a flow that nothing covers, for two looks in succession, and that had packets since it was last covered
  and in the last minute. A session is in the table within milliseconds of its first packet, and stays for seconds
  after its last one, so none of either is taken for an orphan.
- The work is done in whole arrays, on a thread of its own beside the one that changes the tables. What is read while it
  changes is at worst of a session that has just ended; the next look puts that right.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .record import ONE_PACKET, TCP, TEMPLATE, Bools, Records, Slots, Words, words

FIN, SYN, RST, ACK = 1, 2, 4, 16
ORPHAN_NS = 60_000_000_000  # a flow that is silent for longer is nobody's concern
ASK_AGAIN_NS = 10_000_000_000
ASKS = 3  # of one flow
KEY_WORDS = 5
_BLOCK = 1 << 16
_COVERS_NOTHING = np.uint64((TEMPLATE | ONE_PACKET) << 48)  # flags, in their word of a record
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SALT = (np.arange(1, KEY_WORDS + 1, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)) | np.uint64(1)

Flows = npt.NDArray[np.void]


class Sessions(NamedTuple):
    """One table of sessions: ``collector.table.SessionTable`` or ``replicator.replica.Replica``."""

    records: Records
    present: Bools


class Orphans(NamedTuple):
    """n flows that no session covers, those active last first."""

    keys: Flows  # FLOW_KEY of probes.flow
    values: Flows  # FLOW


class _Known(NamedTuple):
    """What is remembered of n flows from one look to the next, by rising hash."""

    hashes: Words
    base: Words  # packets when it was last covered
    uncovered: Bools
    asked_ns: npt.NDArray[np.int64]
    asks: npt.NDArray[np.uint8]


def _nothing() -> _Known:
    return _Known(
        np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.bool_), np.empty(0, np.int64),
        np.empty(0, np.uint8),
    )  # fmt: skip


class FlowJoin:
    """What flows say of the sessions of one table. ``look`` after each reading of the flows; one thread."""

    def __init__(self, slots: int) -> None:
        """29 bytes for each slot of the table."""
        self.generation = np.zeros(slots, np.uint32)  # the session that the rest is about; 0: none
        self.last_ns = np.zeros(slots, np.int64)  # CLOCK_MONOTONIC
        self.packets = np.zeros(slots, np.uint64)
        self.bytes = np.zeros(slots, np.uint64)
        self.flags = np.zeros(slots, np.uint8)
        self.flows = self.joined = self.covered = 0  # at the last look: all, ours, peers'
        self.orphans: Orphans | None = None
        self._known = _nothing()
        self._orphan_at: Slots = np.empty(0, np.int64)  # of each orphan, where it is in _known

    def look(self, keys: Flows, values: Flows, own: Sessions, others: Iterable[Sessions], now_ns: int) -> None:
        """``keys``, ``values``: n flows (probes.flow); ``own``: our table, complete; ``others``: those of peers."""
        hashes = hash_of(key_words(keys))
        order = np.argsort(hashes)
        hashes = hashes[order]
        slots = _find(hashes, own)
        mine = slots >= 0
        self._join(slots[mine], values[order[mine]], own)
        covered = mine.copy()
        for sessions in others:
            if covered.all():
                break
            covered |= _find(hashes, sessions) >= 0
        self.flows, self.joined = len(hashes), int(np.count_nonzero(mine))
        self.covered = int(np.count_nonzero(covered)) - self.joined
        self._remember(hashes, keys[order], values[order], covered, now_ns)

    def _join(self, slots: Slots, values: Flows, own: Sessions) -> None:
        self.generation[slots] = 0
        self.last_ns[slots] = values["last_ns"].astype(np.int64)
        self.packets[slots] = values["packets"]
        self.bytes[slots] = values["bytes"]
        self.flags[slots] = values["flags"].astype(np.uint8)
        self.generation[slots] = own.records["generation"][slots]

    def _remember(self, hashes: Words, keys: Flows, values: Flows, covered: Bools, now_ns: int) -> None:
        """Which of n flows, by rising hash, are orphans, and what has to be known of them at the next look."""
        before = self._known
        packets = values["packets"]
        at, known = _where(before.hashes, hashes)
        base, was_uncovered = np.zeros_like(packets), np.zeros(len(hashes), np.bool_)
        base[known], was_uncovered[known] = before.base[at[known]], before.uncovered[at[known]]
        base[packets < base] = 0  # it began anew
        base = np.where(covered | (known & ~was_uncovered), packets, base)
        asked_ns, asks = np.zeros(len(hashes), np.int64), np.zeros(len(hashes), np.uint8)
        kept = was_uncovered & ~covered
        asked_ns[kept], asks[kept] = before.asked_ns[at[kept]], before.asks[at[kept]]
        self._known = _Known(hashes, base, ~covered, asked_ns, asks)
        last_ns = values["last_ns"].astype(np.int64)
        found = np.flatnonzero(kept & (packets > base) & (now_ns - last_ns < ORPHAN_NS))
        found = found[np.argsort(-last_ns[found], kind="stable")]
        self._orphan_at = found
        self.orphans = Orphans(keys[found], values[found])

    def ask(self, limit: int, now_ns: int) -> Flows:
        """Up to ``limit`` orphans to ask peers for, noted as asked: not those that have only begun, which nobody has;
        none again within ten seconds, none more than three times.
        """
        if self.orphans is None:
            return np.empty(0, np.void)
        known, at = self._known, self._orphan_at
        flags, proto = self.orphans.values["flags"], self.orphans.keys["proto"]
        begun = (proto == TCP) & ((flags & ~np.uint32(SYN | RST)) == 0)
        due = (known.asks[at] == 0) | (now_ns - known.asked_ns[at] >= ASK_AGAIN_NS)
        chosen = np.flatnonzero(~begun & due & (known.asks[at] < ASKS))[:limit]
        known.asked_ns[at[chosen]] = now_ns
        known.asks[at[chosen]] += 1
        return self.orphans.keys[chosen]

    def of(self, records: Records) -> tuple[Bools, Slots]:
        """Of n sessions of our table: which have a flow, and their slots."""
        slots = records["slot"].astype(np.int64)
        return (self.generation[slots] == records["generation"]) & (records["generation"] != 0), slots


def key_words(keys: Flows) -> Words:
    """Keys of flows as (n, 5) words; a view."""
    return np.ascontiguousarray(keys).view(np.uint64).reshape(len(keys), KEY_WORDS)


def keys_of(records: Words) -> Words:
    """The keys that flows of these sessions have, (n, 5) words; ``records`` as words."""
    keys = np.empty((len(records), KEY_WORDS), np.uint64)
    keys[:, :4] = records[:, 2:6]  # caddr, vaddr
    kind = records[:, 1]
    low, byte = np.uint64(0xFFFFFFFF), np.uint64(0xFF)
    keys[:, 4] = (
        (records[:, 10] & low) | (kind >> np.uint64(16) & byte) << np.uint64(32) | (kind & byte) << np.uint64(40)
    )
    return keys


def hash_of(keys: Words) -> Words:
    """64 bits for each of n keys of 5 words."""
    out = np.zeros(len(keys), np.uint64)
    for column in range(KEY_WORDS):
        out ^= keys[:, column] + _SALT[column]
        out *= _FACTOR
        out ^= out >> np.uint64(29)
    return out


def _find(hashes: Words, sessions: Sessions) -> Slots:
    """For n rising hashes the slot of a session that has the key, -1 where there is none."""
    slots = np.flatnonzero(sessions.present)
    if len(slots) == 0 or len(hashes) == 0:
        return np.full(len(hashes), -1, np.int64)
    rows = words(sessions.records)
    found = np.full(len(hashes), -1, np.int64)
    for start in range(0, len(slots), _BLOCK):
        part = slots[start : start + _BLOCK]
        block = rows.take(part, axis=0)
        at, hit = _where(hashes, hash_of(keys_of(block)))
        hit &= (block[:, 1] & _COVERS_NOTHING) == 0
        found[at[hit]] = part[hit]
    return found


def _where(rising: Words, wanted: Words) -> tuple[Slots, Bools]:
    """For each wanted hash: a place in ``rising``, and whether it stands there."""
    if len(rising) == 0:
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), np.bool_)
    at = np.minimum(np.searchsorted(rising, wanted), len(rising) - 1)
    return at, np.asarray(rising[at] == wanted)
