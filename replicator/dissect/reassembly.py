# SPDX-License-Identifier: GPL-2.0-or-later
"""One direction of a TCP connection, from segments as they were captured to a stream of bytes.

Rules: pure; time is an argument. Bytes come out once and in order. A capture is not the connection: it may begin in
its middle, hold segments twice or out of order, and lack some that arrived. Lacking ones are given up when the other
side has acknowledged them for some time and they still have not turned up, when too much waits behind them, or at the
end; then a piece says how many bytes are missing before it. Numbers of TCP wrap at 2**32, positions in here do not.
"""

from bisect import insort
from typing import NamedTuple

MAX_AHEAD = 4 << 20  # bytes behind a hole; more than a receiver's window mostly is
PATIENCE_NS = 200_000_000  # of the capture's time, for what was acknowledged: packets of two interfaces may be mixed up
_OVERHEAD = 128  # bytes that it costs to keep a segment, so that tiny ones cannot pile up
_HALF, _MASK = 1 << 31, (1 << 32) - 1


class Piece(NamedTuple):
    """Bytes of the stream, and how many are missing before them."""

    missing: int
    data: bytes


class Direction:
    """What one side sent. ``held``: memory of what waits for bytes before it."""

    def __init__(self) -> None:
        self.held = 0
        self.from_start = False  # the SYN was captured
        self.repeated = 0  # bytes that came again
        self._next: int | None = None  # position of the next byte
        self._ahead: list[tuple[int, bytes]] = []  # behind a hole, by position
        self._acknowledged = 0
        self._hole_ns: int | None = None  # since when the hole is acknowledged

    @property
    def started(self) -> bool:
        """Something of it was captured."""
        return self._next is not None

    def begins(self, sequence: int) -> None:
        """A SYN with that sequence number."""
        if self._next is None:
            self._next = self._acknowledged = sequence + 1
            self.from_start = True

    def add(self, sequence: int, data: bytes, now_ns: int) -> list[Piece]:
        """A segment, without its SYN."""
        if self._next is None:
            self._next = self._acknowledged = sequence
        position = self._unwrapped(sequence)
        late = self._next - position
        if late > 0:
            self.repeated += min(late, len(data))
            data, position = data[late:], self._next
        if not data:
            return []
        if position != self._next:
            insort(self._ahead, (position, data))
            self.held += len(data) + _OVERHEAD
            return self._drain(now_ns)
        self._next += len(data)
        return [Piece(0, data), *self._drain(now_ns)] if self._ahead else [Piece(0, data)]

    def acknowledged(self, number: int, now_ns: int) -> list[Piece]:
        """The other side has all before that number."""
        if self._next is None:
            return []
        self._acknowledged = max(self._acknowledged, self._unwrapped(number))
        return self._drain(now_ns) if self._ahead else []

    def finish(self) -> list[Piece]:
        """Nothing more comes."""
        pieces = []
        while self._ahead:
            pieces += self._skip()
        return pieces

    def _unwrapped(self, number: int) -> int:
        assert self._next is not None
        return self._next + ((number - self._next + _HALF) & _MASK) - _HALF

    def _drain(self, now_ns: int) -> list[Piece]:
        pieces = self._join()
        while self._ahead:
            known_lost = self._acknowledged >= self._ahead[0][0]
            if not known_lost:
                self._hole_ns = None
            elif self._hole_ns is None:
                self._hole_ns = now_ns
            patient = not known_lost or self._hole_ns is None or now_ns - self._hole_ns < PATIENCE_NS
            if patient and self.held <= MAX_AHEAD:
                break
            pieces += self._skip()
        return pieces

    def _skip(self) -> list[Piece]:
        """Give the hole up."""
        assert self._next is not None
        missing = self._ahead[0][0] - self._next
        self._next = self._ahead[0][0]
        self._hole_ns = None
        first, *others = self._join()
        return [Piece(missing, first.data), *others]

    def _join(self) -> list[Piece]:
        """What waits and has no hole before it any more."""
        assert self._next is not None
        pieces, used = [], 0
        for position, data in self._ahead:
            if position > self._next:
                break
            used += 1
            self.held -= len(data) + _OVERHEAD
            fresh = data[self._next - position :]
            self.repeated += len(data) - len(fresh)
            if fresh:
                self._next += len(fresh)
                pieces.append(Piece(0, fresh))
        if used:
            del self._ahead[:used]
            self._hole_ns = None
        return pieces
