# SPDX-License-Identifier: GPL-2.0-or-later
"""Which peers hold which session: consistent hashing, the same on every node and machine.

Rules
- A session's hash is made of its tuple alone (``collector.record.identity``): it stays where it is for its life. Its
  upper 16 bits are one of 65 536 places on a ring.
- Each peer stands at 64 places that follow from its name. A session is held by the first k different peers from its
  place on. So a peer that joins takes about k/n of the sessions from the others, and one that leaves gives its own to
  those that stand next: nothing else moves. Points that share a place keep one order, whoever else is there.
- A table of the ring says for each place who holds it, one bit a peer. A decision is a hash and a look into the table.
- k = all needs neither, and is the default.

Numbers in here are a protocol of the cluster with itself: a change of one moves sessions. Tests hold them.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from collector.record import Bools, Records, words
from probes.errors import DpvsProbeError

POINTS = 64  # a peer, if nobody says otherwise
PLACES = 1 << 16
MAX_PEERS = 64  # bits of a mask
_BLOCK = 2048  # sessions hashed at once: they and what is made of them stay in the processor's cache

Hashes = npt.NDArray[np.uint64]
Masks = npt.NDArray[np.uint64]
Places = npt.NDArray[np.uint16]

# The tuple in a record's 64-bit words: af, af_out, proto (three bytes of word 1), four addresses, four ports.
_FIRST, _LAST = 1, 11
_WORD_1 = np.uint64(0xFFFFFF)
_HALF, _PLACE_SHIFT = np.uint64(32), np.uint64(48)


def _weights() -> npt.NDArray[np.uint64]:
    """Odd numbers without a pattern: SplitMix64 from zero."""
    made = []
    for step in range(1, _LAST - _FIRST + 1):
        mixed = step * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ mixed >> shift) * factor & 0xFFFFFFFFFFFFFFFF
        made.append((mixed ^ mixed >> 31) | 1)
    return np.array(made, np.uint64)


_WEIGHTS = _weights()


class BadPlacement(DpvsProbeError):
    """Peers among which sessions cannot be placed."""

    help_text = f"Give each peer a name of its own, {MAX_PEERS} peers at most, and one replica or more."


def hashes(records: Records) -> Hashes:
    """64 bits for the tuple of each of n sessions; equal tuples, equal hashes. A new array."""
    out = np.empty(len(records), np.uint64)
    mixed = np.empty((min(len(records), _BLOCK), _LAST - _FIRST), np.uint64)
    for start in range(0, len(records), _BLOCK):
        block = words(records[start : start + _BLOCK])[:, _FIRST:_LAST]
        found, made = out[start : start + len(block)], mixed[: len(block)]
        # Halves folded together first: a product keeps what differs in a word's upper bytes (the end of an IPv6
        # address, a port) in the upper bytes, where two such differences would cancel too often.
        np.right_shift(block, _HALF, out=made)
        made ^= block
        np.bitwise_and(block[:, 0], _WORD_1, out=made[:, 0])
        np.matmul(made, _WEIGHTS, out=found)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            found ^= found >> np.uint64(shift)
            found *= np.uint64(factor)
        found ^= found >> np.uint64(31)
    return out


def places(records: Records) -> Places:
    """The place of each of n sessions on the ring, whoever stands there. A new array."""
    return (hashes(records) >> _PLACE_SHIFT).astype(np.uint16)


class Placement:
    """Who holds what among ``peers`` (names, in any order), each session ``replicas`` times; None: everywhere."""

    def __init__(self, peers: Iterable[str], replicas: int | None = None, points: int = POINTS) -> None:
        given = list(peers)
        self.peers = tuple(sorted(given))
        self.index = {peer: number for number, peer in enumerate(self.peers)}
        if len(self.index) != len(given):
            raise BadPlacement("two peers have one name")
        if len(given) > MAX_PEERS:
            raise BadPlacement(f"{len(given)} peers")
        if replicas is not None and replicas < 1:
            raise BadPlacement(f"{replicas} replicas of each session")
        self.replicas = len(given) if replicas is None else min(replicas, len(given))
        self._everybody = np.uint64((1 << len(given)) - 1)
        self._table: Masks | None = None
        self._held: dict[str, Bools] = {}
        if self.replicas < len(given):
            self._table = _ring(self.peers, self.replicas, points)

    @property
    def everywhere(self) -> bool:
        """Every peer holds every session."""
        return self._table is None

    def masks(self, records: Records) -> Masks:
        """For each of n sessions one bit for each peer that holds it: bit i for ``peers[i]``. (n,) uint64, new."""
        return self.masks_at(places(records)) if self._table is not None else self._all(len(records))

    def masks_at(self, at: Places) -> Masks:
        """The same for places: they can be kept, as they do not depend on the peers."""
        return self._table.take(at) if self._table is not None else self._all(len(at))

    def owners(self, records: Records) -> Bools:
        """Who holds each of n sessions: (n, peers) bool, columns in the order of ``peers``. A new array."""
        out = np.ones((len(records), len(self.peers)), np.bool_)
        if self._table is not None:
            at = places(records)
            for number, peer in enumerate(self.peers):
                out[:, number] = self.held_at(peer, at)
        return out

    def held_by(self, peer: str, records: Records) -> Bools:
        """Which of n sessions ``peer`` holds: (n,) bool, new. Raises KeyError for a peer that is not placed."""
        self.index[peer]
        return self.held_at(peer, places(records)) if self._table is not None else np.ones(len(records), np.bool_)

    def held_at(self, peer: str, at: Places) -> Bools:
        """The same for places."""
        bit = np.uint64(1 << self.index[peer])
        if self._table is None:
            return np.ones(len(at), np.bool_)
        held = self._held.get(peer)
        if held is None:
            held = self._held[peer] = np.asarray((self._table & bit) != 0)
        return held.take(at)

    def shares(self) -> dict[str, float]:
        """What part of all sessions each peer holds, 0 to 1; they sum up to ``replicas``."""
        every_place = np.arange(PLACES, dtype=np.uint16)
        return {peer: float(self.held_at(peer, every_place).mean()) for peer in self.peers}

    def _all(self, count: int) -> Masks:
        return np.full(count, self._everybody)


def _ring(peers: tuple[str, ...], replicas: int, many: int) -> Masks:
    """For each place, who holds what is there."""
    points = sorted((point, number) for number, peer in enumerate(peers) for point in _points(peer, many))
    at = np.array([point >> 48 for point, _ in points], np.int64)
    holders = np.zeros(len(points), np.uint64)
    order = [number for _, number in points]
    for start in range(len(points)):
        mask, count, step = 0, 0, start
        while count < replicas:
            bit = 1 << order[step]
            if not mask & bit:
                mask, count = mask | bit, count + 1
            step = step + 1 if step + 1 < len(points) else 0
        holders[start] = mask
    first = np.searchsorted(at, np.arange(PLACES))  # the first point at or after each place; past the last, the first
    return holders[first % len(points)]


def _points(peer: str, many: int) -> list[int]:
    """Where a peer stands: 64-bit numbers, the upper 16 bits are the place."""
    name = peer.encode()
    made = []
    for number in range(many):
        digest = hashlib.blake2b(number.to_bytes(4, "little") + name, digest_size=8, person=b"dpvs-probe ring").digest()
        made.append(int.from_bytes(digest, "little"))
    return made
