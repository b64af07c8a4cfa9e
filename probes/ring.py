# SPDX-License-Identifier: GPL-2.0-or-later
"""A BPF ring buffer as numpy arrays: no callback, no object for an event.

Rules: the kernel is the producer, this is the one consumer. Every record of our program has the same size, so a stretch
of records is one strided array. A record is an 8-byte header (length, with a busy and a discarded bit, and a page
offset) and the payload, 8-aligned (kernel/bpf/ringbuf.c). Reading stops at the first busy record. The data pages are
mapped twice in a row, so a stretch that wraps is contiguous too. The order matters: producer position, headers,
payload, and only then the consumer position, which gives the space back; x86 keeps loads, and a store after them, in
program order, and each of these steps is a call of its own. What ``drain`` returns is a copy, yours to keep.
"""

import mmap
import os
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from probes.errors import DpvsProbeError

EVENT = np.dtype(
    [
        ("conn", "<u8"),  # address of the session
        ("time_ns", "<u8"),  # CLOCK_MONOTONIC
        ("tid", "<u4"),  # thread that the probe fired on
        ("kind", "<u2"),  # CREATE or FREE
        ("flags", "<u2"),  # conn->flags at that moment; 0 if unreadable
        ("reserved", "<u8"),
    ]
)  # struct event of bpf/session.bpf.c
CREATE, FREE = 1, 2
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
