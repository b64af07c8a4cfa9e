# SPDX-License-Identifier: GPL-2.0-or-later
"""What the probe program wrote, as numpy arrays: no callback, no object for an event.

There are two kinds of rings. ``Ring`` is the kernel's ring buffer, which any thread writes into. ``ThreadRings`` are
rings of single threads, in the memory of a BPF array: a hit costs its thread half as much there. Both have one
consumer, this process.

Rules: every record of our program has the same size, so a stretch of records is one strided array. In the kernel's ring
buffer a record is an 8-byte header (length, with a busy and a discarded bit, and a page offset) and the payload,
8-aligned (kernel/bpf/ringbuf.c). Reading stops at the first busy record. The data pages are mapped twice in a row, so a
stretch that wraps is contiguous too. In a thread's ring the thread writes an event and then its head, we read the head,
the events, and then write our tail. The order matters: producer position, (headers,) payload, and only then the
consumer position, which gives the space back; x86 keeps loads, and a store after them, in program order, and each of
these steps is a call of its own. What ``drain`` returns is a copy, yours to keep.
"""

import mmap
import os
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from probes import gathering
from probes.errors import DpvsProbeError

EVENT = np.dtype(
    [
        ("conn", "<u8"),  # address of the session
        ("time_ns", "<u8"),  # CLOCK_MONOTONIC
        ("tid", "<u4"),  # thread that the probe fired on
        ("kind", "<u4"),  # CREATE or FREE
    ]
)  # struct event of bpf/session.bpf.c
CREATE, FREE = 1, 2
THREADS = 1024  # rows of the table of threads: the thread id modulo that
BRIEF_BYTES = 16  # struct brief: an event in a thread's own ring
_ROW_WORDS = 16  # struct thread
_OWNER, _HEAD, _TAIL = 0, 1, 8
HEADER_BYTES = 8
RECORD_BYTES = HEADER_BYTES + EVENT.itemsize
CHUNK = 8192
BUSY, DISCARDED = 1 << 31, 1 << 30
_WORDS = RECORD_BYTES // 8
_LENGTH_BITS = np.uint64(0xFFFFFFFF)

Events = npt.NDArray[np.void]


class RingBroken(DpvsProbeError):
    help_text = "The ring buffer holds records that dpvs-probe did not write. Detach and attach again."


class Ring:
    """Consumer of one ring buffer. ``Ring.map(fd, size)`` for a real one; the constructor takes the three areas.

    ``consumer``, ``producer``: uint64 arrays whose first element is the position; ``data``: uint64 array of twice the
    ring's size, its second half the same memory as the first.
    """

    def __init__(
        self, consumer: npt.NDArray[np.uint64], producer: npt.NDArray[np.uint64], data: npt.NDArray[np.uint64]
    ) -> None:
        self.ring_bytes = data.nbytes // 2
        if self.ring_bytes & (self.ring_bytes - 1) or not self.ring_bytes:
            raise RingBroken(f"a ring of {self.ring_bytes} bytes is no power of two")
        self._consumer, self._producer, self._data = consumer, producer, data
        self._mask = self.ring_bytes - 1
        self._position = int(consumer[0])
        self._maps: tuple[mmap.mmap, ...] = ()
        self.discarded = 0

    @classmethod
    def map(cls, fd: int, ring_bytes: int) -> Self:
        """The ring buffer of a BPF map: consumer page writable, producer page and data read-only."""
        page = os.sysconf("SC_PAGE_SIZE")
        try:
            consumer = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            rest = mmap.mmap(fd, page + 2 * ring_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        except (OSError, ValueError) as error:
            raise RingBroken(f"cannot map the ring buffer: {error}") from None
        ring = cls(
            np.frombuffer(consumer, np.uint64, 1),
            np.frombuffer(rest, np.uint64, 1),
            np.frombuffer(rest, np.uint64, 2 * ring_bytes // 8, page),
        )
        ring._maps = (consumer, rest)
        return ring

    def close(self) -> None:
        """Unmap. Arrays that ``drain`` gave stay good."""
        empty = np.zeros(1, np.uint64)
        self._consumer = self._producer = empty
        self._data = np.zeros(2, np.uint64)
        self._position = 0
        maps, self._maps = self._maps, ()
        for area in maps:
            area.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    @property
    def pending(self) -> int:
        """Records written and not drained yet, busy and discarded ones included."""
        return (int(self._producer[0]) - self._position) // RECORD_BYTES

    def drain(self, maximum: int = 1 << 16) -> Events:
        """Up to ``maximum`` events, oldest first, shape (n,), dtype EVENT; a copy."""
        count = min(self.pending, maximum)
        if count <= 0:
            return np.empty(0, EVENT)
        out = np.empty((count, EVENT.itemsize // 8), np.uint64)
        done = kept = 0
        while done < count:
            taken, good = self._take(out[kept:], min(CHUNK, count - done))
            done += taken
            kept += good
            if taken == 0:
                break
        return out[:kept].view(EVENT)[:, 0]

    def _take(self, out: npt.NDArray[np.uint64], limit: int) -> tuple[int, int]:
        """Copy up to ``limit`` records and give their space back: (records consumed, events copied)."""
        start = (self._position & self._mask) // 8
        records = self._data[start : start + limit * _WORDS].reshape(limit, _WORDS)
        lengths = records[:, 0] & _LENGTH_BITS
        odd = np.flatnonzero(lengths != EVENT.itemsize)
        if len(odd) == 0:
            out[:limit] = records[:, 1:]
            self._give_back(limit)
            return limit, limit
        flags = lengths[odd]
        if ((flags & ~np.uint64(BUSY | DISCARDED)) != EVENT.itemsize).any():
            raise RingBroken(f"a record of {int(flags[0])} bytes is not one of ours")
        busy = odd[(flags & np.uint64(BUSY)) != 0]
        limit = int(busy[0]) if len(busy) else limit
        keep = np.ones(limit, bool)
        keep[odd[odd < limit]] = False
        good = int(np.count_nonzero(keep))
        out[:good] = records[:limit, 1:][keep]
        self.discarded += limit - good
        self._give_back(limit)
        return limit, good

    def _give_back(self, records: int) -> None:
        self._position += records * RECORD_BYTES
        self._consumer[0] = self._position


class ThreadRings:
    """Consumer of all that one probe program writes: rings of single threads, and the shared one for the others.

    A thread that was heard in the shared ring gets one of its own, as long as there are any left; ``adopt`` gives them
    beforehand. ``threads``: uint64, (THREADS, 16), struct thread; ``events``: uint64, the rings one behind the other,
    two words an event; ``rings``: how many.
    """

    def __init__(
        self,
        shared: Ring,
        threads: npt.NDArray[np.uint64],
        events: npt.NDArray[np.uint64],
        rings: int,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """``clock``: CLOCK_MONOTONIC in ns, as the events have it."""
        self._shared, self._threads, self._events = shared, threads, events
        self.rings, self.size = rings, len(events) * 8 // BRIEF_BYTES // max(1, rings)  # size: events in each
        if threads.shape != (THREADS, _ROW_WORDS) or not self.size or self.size & (self.size - 1):
            raise RingBroken(f"{rings} rings in {events.nbytes} bytes")
        self._clock = clock
        self._maps: tuple[mmap.mmap, ...] = ()
        owned = np.flatnonzero(threads[:, _OWNER])
        self._places = owned[np.argsort(threads[owned, _OWNER] >> np.uint64(32))]
        self._look_up()

    @classmethod
    def map(cls, shared: Ring, threads_fd: int, rings_fd: int, rings: int, ring_events: int) -> Self:
        """The rings of BPF arrays, ``ring_events`` events each. ``shared`` is closed with them."""
        try:
            table = mmap.mmap(threads_fd, THREADS * _ROW_WORDS * 8)
            data = mmap.mmap(rings_fd, _whole_pages(rings * ring_events * BRIEF_BYTES), mmap.MAP_SHARED, mmap.PROT_READ)
        except (OSError, ValueError) as error:
            shared.close()
            raise RingBroken(f"cannot map the rings: {error}") from None
        words = np.frombuffer(data, np.uint64, rings * ring_events * BRIEF_BYTES // 8)
        made = cls(shared, np.frombuffer(table, np.uint64).reshape(THREADS, _ROW_WORDS), words, rings)
        made._maps = (table, data)
        return made

    def close(self) -> None:
        """Unmap. Arrays that ``drain`` gave stay good."""
        self._shared.close()
        self._threads = np.zeros((THREADS, _ROW_WORDS), np.uint64)
        self._events = np.zeros(len(self._events) and 2, np.uint64)
        self._places = self._places[:0]
        self._look_up()
        maps, self._maps = self._maps, ()
        for area in maps:
            area.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    @property
    def owners(self) -> list[int]:
        """Threads that have a ring of their own."""
        return [int(tid) for tid in self._tids]

    @property
    def pending(self) -> int:
        """Events written and not drained yet."""
        return int((self._words.take(self._heads) - self._tails).sum()) + self._shared.pending

    def adopt(self, tids: Iterable[int]) -> None:
        """Give each of these threads a ring of its own, unless none is left or its row is another thread's."""
        for tid in tids:
            place, ring = tid % THREADS, len(self._places)
            if ring == self.rings or self._threads[place, _OWNER]:
                continue
            self._places = np.append(self._places, place)
            self._threads[place, _OWNER] = ring << 32 | tid
        self._look_up()

    def release(self) -> None:
        """Take all rings back. No probe may be on."""
        self._threads[self._places, _OWNER] = 0
        self._places = self._places[:0]
        self._look_up()

    def _look_up(self) -> None:
        """What ``drain`` needs of the rows that are in use, in the order of their rings."""
        self._words = self._threads.reshape(-1)
        self._heads = self._places * _ROW_WORDS + _HEAD
        rows = self._threads[self._places]
        self._tids, self._tails = rows[:, _OWNER] & _LENGTH_BITS, rows[:, _TAIL].copy()
        self._taken = np.zeros(len(rows), np.int64)

    def drain(self, maximum: int = 1 << 16) -> Events:
        """About ``maximum`` events at most, oldest first; shape (n,), dtype EVENT; a copy. Raises RingBroken.

        There may be fewer than there are rings more, and all that threads without a ring have written.
        """
        parts, room, more = [], maximum, True
        while more and room > 0:
            events, more = self._take(room)
            parts.append(events)
            room -= len(events)
        events = np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else np.empty((0, 3), np.uint64)
        return events.view(EVENT)[:, 0]

    def _take(self, room: int) -> tuple[npt.NDArray[np.uint64], bool]:
        """About ``room`` events as words, (n, 3), ordered by time; whether there are more that were there before.

        What happened after ``before`` is left for the next time: so of two events, one of which came of the other on
        another thread, the later one is never taken alone.
        """
        before = self._clock()
        heads = self._words.take(self._heads)
        waiting = heads - self._tails
        most = int(waiting.max(initial=0))
        if most > self.size:
            raise RingBroken(f"{most} events in a ring of {self.size}")
        total, more = int(waiting.sum()), False
        if total > room:
            more = True
            share = max(1, room // int(np.count_nonzero(waiting)))
            longer = np.flatnonzero(waiting > share)
            last = (self._tails[longer] + np.uint64(share - 1)) & np.uint64(self.size - 1)
            ends = self._events[2 * (longer * self.size + last.view(np.int64)) + 1]
            before = min(before, int(ends.min(initial=before)))
            heads = self._tails + np.minimum(waiting, np.uint64(share))
            total = int((heads - self._tails).sum())
        out = np.empty((total, EVENT.itemsize // 8), np.uint64)
        rings = 0
        if total:
            found = gathering.take(self._events, self.size, self._tails, heads, self._tids, before, out, self._taken)
            out = out[:found]
            moved = np.flatnonzero(self._taken)
            rings = len(moved)
            self._tails += self._taken.view(np.uint64)
            self._words[self._heads[moved] + (_TAIL - _HEAD)] = self._tails[moved]
        if self._shared.pending:
            others = self._shared.drain(self._shared.pending)  # all: none of a thread's stays behind what is in its own
            self.adopt(np.unique(others["tid"]).tolist())
            out = np.concatenate((out, others.view(np.uint64).reshape(-1, 3)))
            rings += 2
        if rings > 1:
            out = out[np.argsort(out[:, 1], kind="stable")]
        return out, more


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
